"""How often the true class is among the first ones. ``B`` samples of ``K`` classes."""

from __future__ import annotations

from typing import NamedTuple, Self

import torch
from torch import Tensor

__all__ = ["ClassificationMetrics", "ClassificationScores"]

_FIRST = (1, 5)


class ClassificationScores(NamedTuple):
    """What :class:`ClassificationMetrics` computes.

    Attributes:
        top1: samples whose true class comes first, in percent.
        top5: samples whose true class is among the first five, in percent; 100 where there are but five.
        samples: that count.
    """

    top1: float
    top5: float
    samples: int


class ClassificationMetrics:
    """Top-1 and top-5 accuracy, summed over batches.

    The true class is among the first k if fewer than k others have a logit that is as large. So a tie counts against
    the network, as it has not decided: one that gives all classes the same is never right. Logits of float32 hardly
    tie; those of bfloat16 do, and cost some tenths of a percent. A logit that is not a number is larger than any, and
    that of the true class is always wrong.

    The state is counts, in int64: however samples are batched or shared out over processes, the scores are those of
    the samples, each of which must be given once.

    Example:
        >>> metrics = ClassificationMetrics()
        >>> metrics.update(torch.eye(8), torch.tensor([0, 1, 2, 3, 4, 5, 6, 0]))
        >>> metrics.compute()
        ClassificationScores(top1=87.5, top5=87.5, samples=8)
    """

    def __init__(self) -> None:
        # Right by the first one, right by the first five, samples. They live where predictions do.
        self.counts = torch.zeros(len(_FIRST) + 1, dtype=torch.int64)

    @torch.no_grad()
    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Take in a batch. Nothing waits for the device.

        Args:
            logits: ``[B, K]`` floating point; probabilities will do.
            labels: int64 ``[B]``, the true classes from 0, on the same device.

        Raises:
            ValueError: shapes or dtypes are others.
        """
        if logits.dim() != 2 or not logits.is_floating_point():
            raise ValueError(
                f"logits must be floating point [B, K]; got {logits.dtype} {tuple(logits.shape)}"
            )
        if labels.shape != logits.shape[:1] or labels.dtype != torch.int64:
            raise ValueError(
                f"labels must be int64 [B] with B = {len(logits)}; got {labels.dtype} {tuple(labels.shape)}"
            )
        true = logits.gather(1, labels.unsqueeze(1))  # [B, 1]
        # Asked this way round, what is not a number is not smaller. The true class itself is among them.
        rank = (~(logits < true)).sum(1)
        right = [(rank <= first) & ~true.squeeze(1).isnan() for first in _FIRST]
        counts = [part.sum() for part in right] + [rank.new_full((), len(rank))]
        self.counts = self.counts.to(logits.device) + torch.stack(counts)

    def merge(self, other: Self) -> Self:
        """The metrics of the samples of both, as if one had seen them all; neither is changed.

        Args:
            other: from another process, for one.
        """
        merged = type(self)()
        merged.counts = self.counts + other.counts.to(self.counts.device)
        return merged

    def compute(self) -> ClassificationScores:
        """The scores of all samples so far.

        Raises:
            ValueError: there was none.
        """
        *right, samples = self.counts.tolist()
        if samples == 0:
            raise ValueError("scores need a sample; got none")
        top1, top5 = (100 * count / samples for count in right)
        return ClassificationScores(top1, top5, samples)

    def reset(self) -> None:
        """Forget all samples."""
        self.counts = torch.zeros_like(self.counts)
