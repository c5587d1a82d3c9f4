"""What a plan says: costs of a model, plain and with attention at each of its places."""

from __future__ import annotations

from typing import Any, NamedTuple

from .table import table


class Cost(NamedTuple):
    """What a model costs, plain or with attention at one place.

    Args:
        parameters: of the plain model, or of the attention.
        multiply_adds: in a forward pass, of the plain model, or of the attention.
        inference: the most bytes that the whole model holds at one time in a forward pass: parameters, buffers, inputs
            and all that lives between.
        training: the same in a forward and a backward pass, with gradients and what the optimizer keeps; ``None`` where
            it cannot be told, which the plan's notes explain.

    Example:
        >>> Cost(216, 221_184, 200_000, None).parameters
        216

    Paper: Shen et al. 2021, Sec. 3.2, compares the costs of the operators.
    """

    parameters: int
    multiply_adds: int
    inference: int
    training: int | None


class PlannedPlace(NamedTuple):
    """A place where attention could go, and what the model costs then, as :func:`plan` returns it.

    Args:
        name: of the module whose output attention would take.
        shape: of that output, the largest if it is called more than once.
        positions: that attend to each other, in one sample.
        channels: of a position.
        calls: of the module in one run.
        costs: by kind: ``"efficient"``; ``"explicit"``, dot-product attention with its N x M map in memory;
            ``"fused"``, dot-product attention in O(N) memory, though not in less time.

    Example:
        >>> PlannedPlace("res3", (1, 512, 100, 168), 16800, 512, 1, {}).positions
        16800

    Not part of the paper.
    """

    name: str
    shape: tuple[int, ...]
    positions: int
    channels: int
    calls: int
    costs: dict[str, Cost]


class Plan(NamedTuple):
    """Where attention could go in a model, what it would cost and what fits; ``print`` shows a table.

    Args:
        plain: the cost of the model as it is.
        places: in the order of the network.
        budget: bytes that are there, or ``None``.
        stopped_at: the module in which the run ended, because what follows depends on values: it is not counted.
        notes: what else a reader must know.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU())
        >>> planned = efficient_attention.plan(model, torch.randn(1, 3, 98, 98), places="0", budget="100 MB")
        >>> [(kind, planned.fits(cost)) for kind, cost in planned.places[0].costs.items()]
        [('efficient', 'training'), ('explicit', 'nothing'), ('fused', 'training')]

    Not part of the paper.
    """

    plain: Cost
    places: tuple[PlannedPlace, ...]
    budget: int | None = None
    stopped_at: str | None = None
    notes: tuple[str, ...] = ()

    def fits(self, cost: Cost) -> str:
        """What fits the budget: ``"training"``, and then inference too; ``"inference"``; or ``"nothing"``."""
        if self.budget is None:
            raise ValueError("budget must be given to plan() to know what fits it; got None")
        if cost.training is not None and cost.training <= self.budget:
            return "training"
        return "inference" if cost.inference <= self.budget else "nothing"

    def __str__(self) -> str:
        return table(self)

    def as_dict(self) -> dict[str, Any]:
        """All of it in plain types, for JSON."""
        return {
            **self._asdict(),
            "plain": self._described(self.plain),
            "places": [
                {
                    **place._asdict(),
                    "costs": {kind: self._described(cost) for kind, cost in place.costs.items()},
                }
                for place in self.places
            ],
        }

    def _described(self, cost: Cost) -> dict[str, Any]:
        return cost._asdict() | ({} if self.budget is None else {"fits": self.fits(cost)})
