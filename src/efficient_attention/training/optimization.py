"""How weights change: optimizers, and learning rates as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

__all__ = ["SGD", "Adam", "AdamW", "Constant", "Cosine", "Optimizer", "Rates", "Schedule", "Steps"]


class Optimizer:
    """What all optimizers here have; :class:`SGD`, :class:`Adam` and :class:`AdamW` are those to choose from.

    Args:
        lr: learning rate, which the schedule multiplies by a factor.
        weight_decay: of the parameters.
        decay_vectors: whether parameters of one dimension, which are those of norms and biases, decay as others do.

    Raises:
        ValueError: numbers out of range.
    """

    def __init__(self, *, lr: float, weight_decay: float = 0.0, decay_vectors: bool = True) -> None:
        if not lr > 0:
            raise ValueError(f"lr must be positive; got {lr}")
        if not weight_decay >= 0:
            raise ValueError(f"weight_decay must not be negative; got {weight_decay}")
        self.lr, self.weight_decay, self.decay_vectors = lr, weight_decay, decay_vectors

    def build(self, network: nn.Module) -> torch.optim.Optimizer:
        """An optimizer of the parameters that train."""
        raise NotImplementedError

    def groups(self, network: nn.Module) -> list[dict[str, Any]]:
        """Parameters that train, with what their group has of its own; groups without parameters are left out."""
        parameters = [p for p in network.parameters() if p.requires_grad]
        if not parameters:
            raise ValueError("network must have parameters that train; all of them are frozen")
        vectors = [p for p in parameters if p.ndim <= 1 and not self.decay_vectors]
        apart = {id(p) for p in vectors}
        groups = [
            {
                "params": [p for p in parameters if id(p) not in apart],
                "weight_decay": self.weight_decay,
            },
            {"params": vectors, "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]


class SGD(Optimizer):
    """Stochastic gradient descent with momentum.

    Args:
        lr: learning rate.
        momentum: share of the last step in the next.
        nesterov: the momentum of Nesterov.
        weight_decay: of the parameters.
        decay_vectors: see :class:`Optimizer`.
    """

    def __init__(
        self,
        *,
        lr: float,
        momentum: float = 0.9,
        nesterov: bool = False,
        weight_decay: float = 1e-4,
        decay_vectors: bool = True,
    ) -> None:
        super().__init__(lr=lr, weight_decay=weight_decay, decay_vectors=decay_vectors)
        self.momentum, self.nesterov = momentum, nesterov

    def build(self, network: nn.Module) -> torch.optim.Optimizer:
        """An optimizer of the parameters that train."""
        groups = self.groups(network)
        return torch.optim.SGD(groups, self.lr, self.momentum, nesterov=self.nesterov)


class Adam(Optimizer):
    """Adam; ``weight_decay`` is added to the gradient.

    Args:
        lr: learning rate.
        betas: of the means of gradients and of their squares.
        eps: added to the root of the mean square.
        weight_decay: of the parameters.
        decay_vectors: see :class:`Optimizer`.
    """

    def __init__(
        self,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decay_vectors: bool = True,
    ) -> None:
        super().__init__(lr=lr, weight_decay=weight_decay, decay_vectors=decay_vectors)
        self.betas, self.eps = betas, eps

    def build(self, network: nn.Module) -> torch.optim.Optimizer:
        """An optimizer of the parameters that train."""
        return torch.optim.Adam(self.groups(network), self.lr, self.betas, self.eps)


class AdamW(Adam):
    """Adam whose weight decay is apart from the gradient.

    Args:
        lr: learning rate.
        betas: of the means of gradients and of their squares.
        eps: added to the root of the mean square.
        weight_decay: of the parameters.
        decay_vectors: see :class:`Optimizer`.
    """

    def __init__(
        self,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        decay_vectors: bool = False,
    ) -> None:
        super().__init__(
            lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, decay_vectors=decay_vectors
        )

    def build(self, network: nn.Module) -> torch.optim.Optimizer:
        """An optimizer of the parameters that train."""
        return torch.optim.AdamW(self.groups(network), self.lr, self.betas, self.eps)


class Schedule:
    """The factor of the learning rate at every step: a shape, behind a linear rise over the first steps.

    ``factor(s) = rise(s) shape(s)``, with ``rise`` going from ``warmup_from`` at step 0 to 1 at step ``warmup_steps``.
    :class:`Constant`, :class:`Steps` and :class:`Cosine` are those to choose from.

    Args:
        warmup_steps: length of the rise, in steps of the optimizer; 0: none.
        warmup_from: the factor of the first step.

    Raises:
        ValueError: numbers out of range.
    """

    def __init__(self, *, warmup_steps: int = 0, warmup_from: float = 0.001) -> None:
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps must not be negative; got {warmup_steps}")
        if not 0 <= warmup_from <= 1:
            raise ValueError(f"warmup_from must be from 0 to 1; got {warmup_from}")
        self.warmup_steps, self.warmup_from = warmup_steps, warmup_from

    def factor(self, step: int, *, steps_per_epoch: int, total_steps: int | None) -> float:
        """The factor of one step.

        Args:
            step: from 0.
            steps_per_epoch: of the optimizer.
            total_steps: of the run; None: it has no end.
        """
        epochs = step / steps_per_epoch
        share = min(step / total_steps, 1.0) if total_steps else None
        return self._rise(step) * self.shape(epochs, share)

    def shape(self, epochs: float, share: float | None) -> float:
        """The factor without the rise.

        Args:
            epochs: how many have passed.
            share: of the run that has passed, 0 to 1; None: it has no end.
        """
        raise NotImplementedError

    def _rise(self, step: int) -> float:
        if step >= self.warmup_steps:
            return 1.0
        return self.warmup_from + (1 - self.warmup_from) * step / self.warmup_steps


class Constant(Schedule):
    """One learning rate, behind the rise.

    Args:
        warmup_steps: see :class:`Schedule`.
        warmup_from: see :class:`Schedule`.

    Example:
        >>> Constant(warmup_steps=4, warmup_from=0.0).factor(1, steps_per_epoch=10, total_steps=None)
        0.25
    """

    def shape(self, epochs: float, share: float | None) -> float:
        """One."""
        return 1.0


class Steps(Schedule):
    """A learning rate that falls by a factor at the beginning of given epochs.

    Args:
        epochs: when it falls; fractions of an epoch count.
        gamma: by what.
        warmup_steps: see :class:`Schedule`.
        warmup_from: see :class:`Schedule`.

    Example:
        >>> schedule = Steps(epochs=[2, 3])
        >>> [round(schedule.factor(s, steps_per_epoch=10, total_steps=40), 3) for s in (19, 20, 30)]
        [1.0, 0.1, 0.01]
    """

    def __init__(
        self,
        *,
        epochs: Sequence[float],
        gamma: float = 0.1,
        warmup_steps: int = 0,
        warmup_from: float = 0.001,
    ) -> None:
        super().__init__(warmup_steps=warmup_steps, warmup_from=warmup_from)
        if list(epochs) != sorted(epochs) or any(epoch <= 0 for epoch in epochs):
            raise ValueError(f"epochs must be positive and ascending; got {list(epochs)}")
        self.epochs, self.gamma = tuple(epochs), gamma

    def shape(self, epochs: float, share: float | None) -> float:
        """Gamma to the power of the epochs of the list that have come."""
        return self.gamma ** sum(epochs >= milestone for milestone in self.epochs)


class Cosine(Schedule):
    """A learning rate that falls along half a cosine, to the last step of the run.

    Args:
        final: the factor at the end.
        warmup_steps: see :class:`Schedule`.
        warmup_from: see :class:`Schedule`.

    Example:
        >>> schedule = Cosine(final=0.5)
        >>> [schedule.factor(s, steps_per_epoch=10, total_steps=20) for s in (0, 10, 20)]
        [1.0, 0.75, 0.5]
    """

    def __init__(
        self, *, final: float = 0.0, warmup_steps: int = 0, warmup_from: float = 0.001
    ) -> None:
        super().__init__(warmup_steps=warmup_steps, warmup_from=warmup_from)
        self.final = final

    def shape(self, epochs: float, share: float | None) -> float:
        """Half a cosine over the share."""
        if share is None:
            raise ValueError(
                "schedule Cosine must know the end of the run; give trainer.max_epochs or trainer.max_steps"
            )
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * share)) / 2


class Rates(LRScheduler):
    """Learning rates of an optimizer as a function of the step alone.

    A run that is resumed takes its position from the checkpoint and all else from its own arguments: what a user
    changes between two starts counts, as :meth:`apply` puts it over what the optimizer's state brought.

    Args:
        optimizer: whose learning rates are set.
        factor: of a step, which multiplies what the optimizer was built with.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, factor: Callable[[int], float]) -> None:
        self.factor = factor
        self._options = [
            {k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups
        ]
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        """The learning rates of the present step, one a group."""
        return [options["lr"] * self.factor(self.last_epoch) for options in self._options]

    def apply(self) -> None:
        """Give the optimizer the options that it was built with, and the learning rates of the present step."""
        self._last_lr = self.get_lr()
        groups = zip(self.optimizer.param_groups, self._options, self._last_lr, strict=True)
        for group, options, lr in groups:
            group.update(options, lr=lr)

    def state_dict(self) -> dict[str, Any]:
        """The step."""
        return {"step": self.last_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on at a step; :meth:`apply` when its learning rate can be known."""
        self.last_epoch = state_dict["step"]
        # By which the parent sees whether the optimizer has stepped first.
        self._step_count = self.last_epoch + 1
