"""The shell around the attention that efficient attention replaces."""

from __future__ import annotations

from torch import Tensor

from ..ops import dot_product_attention
from .projected import ProjectedAttention


class DotProductModule(ProjectedAttention):
    """The shell around dot-product attention: the baseline."""

    # A softmax over N x M leaves no other.
    _orders = ("auto", "quadratic")

    def _run(self, x: Tensor, key_mask: Tensor | None) -> Tensor:
        features = self._features
        features.check("x", x, self.in_channels)
        # Without names, so that each is gone when it is done with.
        attended = features.join(
            dot_product_attention(
                features.split(self.queries(x), self.num_heads),
                features.split(self.keys(x), self.num_heads),
                features.split(self.values(x), self.num_heads),
                key_mask=self._key_mask(key_mask, x),
                normalization=self.normalization,
            ),
            like=x,
        )
        return self._with_residual(x, self.reprojection(attended))
