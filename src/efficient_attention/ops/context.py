"""The context: what a set of keys and values is to every query, as a value that can be kept, merged and sent.

Shapes: B batch, H heads, N queries, M keys, Dk key channels, Dv value channels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Context"]


class Context(NamedTuple):
    """A weighted mean of values for every key channel, with the logarithm of its total weight.

    With weights ``w[m, c] = exp(k[m, c])`` (softmax) or ``k[m, c]`` over a count (scaling)::

        mean[c]       = sum_m w[m, c] v[m] / total[c]
        log_weight[c] = log total[c]

    where ``total`` is ``sum_m exp(k[m, c])`` for softmax and the number of keys for scaling. Its size does not
    depend on M. Merging is associative and commutative, so a context may be built from blocks, tiles, frames or
    ranks in any order. A channel without weight, for want of keys or because all of them are -inf there, has
    ``mean = 0`` and ``log_weight = -inf``; queries get 0 from it.

    Being a named tuple it is a pytree: it passes through ``torch.compile``, collectives and data-parallel wrappers.
    It is two tensors and nothing else: it does not know its normalization. Contexts of one normalization merged with,
    or attended to under, the other give numbers without meaning and no error.

    Attributes:
        mean: ``[B, H, Dk, Dv]``, float32 (float64 for float64 inputs).
        log_weight: ``[B, H, Dk]``, dtype of ``mean``.

    Example:
        >>> k, v = torch.randn(1, 2, 100, 8), torch.randn(1, 2, 100, 16)
        >>> whole = efficient_attention.summarize(k, v)
        >>> left = efficient_attention.summarize(k[:, :, :30], v[:, :, :30])
        >>> right = efficient_attention.summarize(k[:, :, 30:], v[:, :, 30:])
        >>> torch.allclose(left.merge(right).mean, whole.mean, atol=1e-6)
        True

    Paper: Shen et al. 2021, Sec. 3.2 (the global context vectors) and 3.4 (their interpretation).
    """

    mean: Tensor
    log_weight: Tensor

    def merge(self, *others: Context) -> Context:
        """The context of the keys of ``self`` and ``others`` together; differentiable.

        Exact but for rounding: shares are as precise as ``log_weight``, about ``6e-8 * |log_weight|`` in float32.

        Args:
            others: contexts of the same shape, normalization and dtype.

        Raises:
            TypeError: an argument is not a ``Context``.
            ValueError: shapes or dtypes differ.
        """
        for i, other in enumerate(others):
            self._check_mergeable(other, f"others[{i}]")
        means = torch.stack([self.mean, *(other.mean for other in others)])
        log_weights = torch.stack([self.log_weight, *(other.log_weight for other in others)])

        # Relative to the heaviest part, so that nothing overflows; a channel without any weight is relative to 0.
        heaviest = log_weights.detach().amax(0)
        heaviest = heaviest.masked_fill(heaviest == -torch.inf, 0)
        weights = (log_weights - heaviest).exp()
        total = weights.sum(0)
        weighted = total > 0
        # Before the division and the logarithm, so that gradients stay finite.
        total = total.masked_fill(~weighted, 1)

        mean = (weights.unsqueeze(-1) * means).sum(0) / total.unsqueeze(-1)
        log_weight = (total.log() + heaviest).masked_fill(~weighted, -torch.inf)
        return Context(mean, log_weight)

    def _check_mergeable(self, other: Context, name: str) -> None:
        if not isinstance(other, Context):
            raise TypeError(f"{name} must be a Context; got {type(other).__name__}")
        for field in self._fields:
            mine, theirs = getattr(self, field), getattr(other, field)
            if mine.shape != theirs.shape or mine.dtype != theirs.dtype:
                raise ValueError(
                    f"{name}.{field} must match {tuple(mine.shape)} {mine.dtype} of the context it is merged into; "
                    f"got {tuple(theirs.shape)} {theirs.dtype}"
                )


# A kept context can be loaded with torch.load(weights_only=True).
torch.serialization.add_safe_globals([Context])
