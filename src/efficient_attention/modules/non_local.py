"""Non-local blocks of other libraries, over their own layers, at linear cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from torch import Tensor, nn

from ..ops import efficient_attention
from ..ops.arguments import check_option
from ..ops.functional import NORMALIZATIONS, cheapest_order
from ..ops.planner import OPERATOR_ORDERS
from .features import FeatureMaps, coarsen
from .tracing import one_operation

__all__ = ["EfficientNonLocal"]


class EfficientNonLocal(nn.Module):
    """A non-local block whose layers, whatever they are, somebody else made: ``x + output(E(theta(x), phi(x), g(x)))``.

    E is :func:`efficient_attention`, with one head. The layers stay children under the names they had, so that
    state_dicts load, and all that is in them stays at work: a normalization behind the output, a pooling that
    sub-samples what is attended to. Under ``normalization="scaling"`` this equals the dot-product form of the non-local
    block, ``(theta(x)^T phi(x) / M) g(x)``, M positions attended to, up to rounding; under ``"softmax"`` it stands in
    for the embedded Gaussian, and needs training. :func:`replace` makes it of blocks of mmcv, timm and others; a block
    of this library is :class:`EfficientAttention2d`.

    Args:
        layers: the block's children by name, in the order of its state_dict.
        query: which of them makes queries ``[B, Dk, *spatial]`` of ``[B, C, *spatial]``.
        key: which makes keys, ``[B, Dk, ...]``, of perhaps fewer positions.
        value: which makes values, ``[B, Dv, ...]``, of the positions of the keys.
        output: which map ``[B, Dv, *spatial]`` back to ``[B, C, *spatial]``, one behind the other.
        normalization: ``"softmax"`` or ``"scaling"``.
        order: ``"auto"``, ``"linear"`` or ``"quadratic"``, as in :func:`efficient_attention`.

    ``forward(x, return_nl_map=False)``: ``x`` is ``[B, C, *spatial]`` of 1 to 3 dimensions. Returns its shape.
    ``return_nl_map``, which some of those blocks take, must be False: the map is never built.

    Raises:
        ValueError: a name that is not among the layers, an unknown option, an input of another rank.
        NotImplementedError: ``return_nl_map``.

    Example:
        >>> layers = {name: torch.nn.Conv2d(8, 8, 1) for name in ("g", "theta", "phi", "W")}
        >>> names = {"query": "theta", "key": "phi", "value": "g", "output": ["W"]}
        >>> block = EfficientNonLocal(layers, **names, normalization="scaling")
        >>> block(torch.randn(1, 8, 64, 64)).shape
        torch.Size([1, 8, 64, 64])

    Paper: Shen et al. 2021, Sec. 3.3; Wang et al. 2018 (arXiv 1711.07971), Eq. 4.
    """

    #: See :func:`masked`.
    shared_mask: Tensor | None = None

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        *,
        query: str,
        key: str,
        value: str,
        output: Sequence[str],
        normalization: str,
        order: str = "auto",
    ):
        super().__init__()
        for name in (query, key, value, *output):
            if name not in layers:
                raise ValueError(
                    f"query, key, value and output must be among {[*layers]}; got {name!r}"
                )
        check_option("normalization", normalization, NORMALIZATIONS)
        check_option("order", order, ("auto", *OPERATOR_ORDERS))
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.normalization = normalization
        self.order = order
        self._inputs = (query, key, value)
        self._output = tuple(output)

    @one_operation
    def forward(self, x: Tensor, return_nl_map: bool = False) -> Tensor:
        """Let every position of ``x`` attend to all of them; see the class."""
        if return_nl_map:
            raise NotImplementedError(
                "return_nl_map must be False: the N x N map is never built. Keep the non-local block here"
            )
        attention = partial(efficient_attention, normalization=self.normalization, order=self.order)
        return self.surround(attention, x)

    def surround(self, attention: Callable[..., Tensor], x: Tensor) -> Tensor:
        """The layers of this module around any attention over heads ``[B, 1, N, D]`` with a ``key_mask``."""
        if not isinstance(x, Tensor) or x.dim() not in (3, 4, 5):
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"x must have shape [B, C, ...] of 1 to 3 dimensions; got {got}")
        features = FeatureMaps(x.dim() - 2)
        maps = [self.get_submodule(name)(x) for name in self._inputs]
        query, key, value = (features.split(part, 1) for part in maps)
        y = features.join(attention(query, key, value, key_mask=self._key_mask(maps[1])), like=x)
        for name in self._output:
            y = self.get_submodule(name)(y)
        return x + y

    def _key_mask(self, keys: Tensor) -> Tensor | None:
        mask = self.shared_mask
        if mask is None or mask.dim() != keys.dim() - 1:
            return None
        return coarsen(mask, keys.shape[2:]).flatten(1)

    def planned_order(self, x: Tensor) -> str:
        """The order in which ``forward`` computes for this input."""
        if self.order != "auto":
            return self.order
        features = FeatureMaps(x.dim() - 2)
        query, key, value = (self.get_submodule(name)(x) for name in self._inputs)
        return cheapest_order(
            heads=1,
            queries=features.count(query),
            keys=features.count(key),
            key_channels=key.shape[1],
            value_channels=value.shape[1],
        )

    def extra_repr(self) -> str:
        return f"normalization={self.normalization!r}, order={self.order!r}"
