"""The shell that every attention module of the paper has: projections around an attention, and a residual.

Subclasses say where channels and positions lie (tokens or feature maps) and which attention runs inside.
Shapes: B batch, h heads, N positions that attend, M positions attended to, C channels in and out, dk and dv key and
value channels of all heads. Paper: Shen et al. 2021, Sec. 3.2 and Fig. 1.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..ops import Context, attend, efficient_attention, summarize
from ..ops.arguments import check_option, check_size
from ..ops.functional import (
    BACKENDS,
    LINEAR_BACKENDS,
    NORMALIZATIONS,
    is_traced,
    serves_every_length,
)
from ..ops.planner import (
    FOLDS_OUTPUT,
    FOLDS_VALUES,
    MODULE_ORDERS,
    Cost,
    cheapest,
    folding_saves_little,
    is_short,
    module_costs,
    quadratic_is_cheaper,
)
from ..ops.precision import is_widened
from .features import Features, Projection, coarsen
from .folding import fold_output, fold_values, obstacle
from .initialization import INITIALIZATIONS, start_at_zero
from .streaming import can_stream, records_gradients, stream, takes

# A compiled or exported program serves every length: it is planned for one at which only the cost per position counts.
_LONG = 1 << 40


class ProjectedAttention(nn.Module):
    """Projections to queries, keys and values, and back: the parameters of every module here."""

    keys: Projection
    queries: Projection
    values: Projection
    reprojection: Projection

    _orders: ClassVar[tuple[str, ...]]

    #: See :func:`masked`.
    shared_mask: Tensor | None = None

    def __init__(
        self,
        features: Features,
        in_channels: int,
        key_channels: int,
        value_channels: int,
        *,
        source_channels: int | None = None,
        num_heads: int,
        normalization: str,
        residual: bool,
        init: str,
        order: str = "auto",
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        source_channels = in_channels if source_channels is None else source_channels
        check_size("num_heads", num_heads)
        for name, size in {"key_channels": key_channels, "value_channels": value_channels}.items():
            check_size(name, size)
            if size % num_heads:
                raise ValueError(f"{name} must be divisible by num_heads = {num_heads}; got {size}")
        check_option("normalization", normalization, NORMALIZATIONS)
        check_option("init", init, INITIALIZATIONS)
        check_option("order", order, self._orders)

        self.in_channels = in_channels
        self.key_channels = key_channels
        self.value_channels = value_channels
        self.source_channels = source_channels
        self.num_heads = num_heads
        self.normalization = normalization
        self.residual = residual
        self.init = init
        self.order = order
        self._features = features

        options = {"bias": bias, "device": device, "dtype": dtype}
        self.keys = features.build_projection(source_channels, key_channels, **options)
        self.queries = features.build_projection(in_channels, key_channels, **options)
        self.values = features.build_projection(source_channels, value_channels, **options)
        self.reprojection = features.build_projection(value_channels, in_channels, **options)
        if init == "zero":
            start_at_zero(self.reprojection)

    def reset_parameters(self) -> None:
        """Initialize all parameters anew, as the constructor did."""
        for projection in (self.keys, self.queries, self.values, self.reprojection):
            projection.reset_parameters()
        if self.init == "zero":
            start_at_zero(self.reprojection)

    def _with_residual(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y if self.residual else y

    def _key_mask(self, key_mask: Tensor | None, source: Tensor) -> Tensor | None:
        if key_mask is None and self.shared_mask is not None:
            key_mask = coarsen(self.shared_mask, source.shape[2:])
        return None if key_mask is None else self._features.key_mask(key_mask, like=source)

    def extra_repr(self) -> str:
        parts = [str(self.in_channels), str(self.key_channels), str(self.value_channels)]
        parts += [f"num_heads={self.num_heads}", f"normalization={self.normalization!r}"]
        parts += [f"residual={self.residual}", f"init={self.init!r}"]
        return ", ".join(parts)


class EfficientModule(ProjectedAttention):
    """The shell around efficient attention, computed in the cheapest of its exact orders."""

    _orders = ("auto", *MODULE_ORDERS)

    #: Whether ``forward`` writes its output over its input, and returns that, where no gradient is recorded. A folded
    #: module on a CPU then takes a few MB beside its input, whatever its size; others take their time and memory.
    inplace: bool = False

    #: What computes the operators inside, as in :func:`~efficient_attention.efficient_attention`. In the folded order
    #: ``"triton"`` and ``"native"`` are one operator too, where all layers are plain: no keys or queries reach memory.
    backend: str = "auto"

    def summarize(self, source: Tensor, *, key_mask: Tensor | None = None) -> Context:
        """The context of the positions of ``source``; contexts of its parts merge into that of the whole.

        Args:
            source: what is attended to, laid out as the input of ``forward``.
            key_mask: bool, True = attend, one value for each position of ``source``.

        Returns:
            ``Context(mean [B, h, dk / h, dv / h], log_weight [B, h, dk / h])``, to be kept, merged, and given to
            :meth:`attend`.

        Raises:
            NotImplementedError: ``order="quadratic"`` was named, which has no context.
        """
        self._features.check("source", source, self.source_channels)
        order = self._resolve(None, self._features.count(source))
        return self._summarize(source, key_mask, order in FOLDS_VALUES)

    def attend(self, x: Tensor, context: Context) -> Tensor:
        """What ``forward`` returns for ``x``, attending to a ready-made context of this module.

        Args:
            x: the positions that attend, laid out as the input of ``forward``.
            context: as :meth:`summarize` returns it, of this module or one with its shapes and ``normalization``. The
                shapes are checked; a context does not tell what it was normalized by.

        Returns:
            The shape of ``x``.

        Raises:
            NotImplementedError: ``order="quadratic"`` was named, which knows no context.
        """
        self._features.check("x", x, self.in_channels)
        if not isinstance(context, Context):
            raise TypeError(f"context must be a Context; got {type(context).__name__}")
        heads = self.num_heads
        shape = (x.shape[0], heads, self.key_channels // heads, self.value_channels // heads)
        # Checked here, because a folded context forgets how many heads it came from.
        if tuple(context.mean.shape) != shape:
            raise ValueError(
                f"context.mean must have shape [B, h, dk / h, dv / h] = {shape}, as this module's summarize gives; "
                f"got {tuple(context.mean.shape)}"
            )
        order = self._resolve(self._features.count(x), None)
        return self._attend(x, context, order in FOLDS_OUTPUT)

    def costs(
        self, queries: int, keys: int | None = None, *, batch: int = 1, itemsize: int = 4
    ) -> dict[str, Cost]:
        """What each exact order of this module costs for N queries and M keys (default: as many)."""
        return module_costs(
            **self._channels(),
            queries=queries,
            keys=queries if keys is None else keys,
            column_sums=self._needs_column_sums(),
            streamed=can_stream(self),
            widened=is_widened(self.keys.weight),
            batch=batch,
            heads=self.num_heads,
            itemsize=itemsize,
        )

    def _channels(self) -> dict[str, int]:
        names = ("in_channels", "source_channels", "key_channels", "value_channels")
        return {name: getattr(self, name) for name in names}

    def planned_order(
        self, x: Tensor, context: Tensor | Context | None = None, *, key_mask: Tensor | None = None
    ) -> str:
        """The order in which ``forward`` computes for these inputs."""
        queries = self._features.count(x)
        if isinstance(context, Context):
            return self._resolve(queries, None)
        keys = self._features.count(x if context is None else context)
        few = self._is_short(x, queries, keys) and folding_saves_little(
            batch=len(x), queries=queries, keys=keys, heads=self.num_heads, **self._channels()
        )
        return self._resolve(queries, keys, few=few)

    def _is_short(self, x: Tensor, queries: int, keys: int) -> bool:
        """Whether what few operators save is felt, on a CPU."""
        return x.is_cpu and not serves_every_length() and is_short(len(x), max(queries, keys))

    def _run(self, x: Tensor, source: Tensor | Context, key_mask: Tensor | None) -> Tensor:
        features = self._features
        features.check("x", x, self.in_channels)
        if not self.inplace or records_gradients(self, x, source):
            return self._output(x, source, key_mask, overwrite=False)
        y = self._output(x, source, key_mask, overwrite=not serves_every_length())
        return y if y is x else x.copy_(y)

    def _output(
        self, x: Tensor, source: Tensor | Context, key_mask: Tensor | None, *, overwrite: bool
    ) -> Tensor:
        """What ``forward`` returns, perhaps written over x if it may be."""
        features = self._features
        if isinstance(source, Context):
            return self.attend(x, source)
        features.check("context", source, self.source_channels)
        if source.shape[0] != x.shape[0]:
            raise ValueError(f"context must have B = {x.shape[0]}, as x; got {source.shape[0]}")
        order = self.planned_order(x, source)
        short = self._is_short(x, features.count(x), features.count(source))
        if order == "quadratic" or (order == "linear" and short):
            return self._attend_at_once(x, source, key_mask)
        if order == "folded" and can_stream(self) and takes(self, x) and takes(self, source):
            mask = self._key_mask(key_mask, source)
            return stream(self, x, source, mask, overwrite=overwrite)
        context = self._summarize(source, key_mask, order in FOLDS_VALUES)
        return self._attend(x, context, order in FOLDS_OUTPUT)

    def _resolve(self, queries: int | None, keys: int | None, *, few: bool = False) -> str:
        """The order of a call: the one that was named, or the cheapest that nobody would notice.

        A side that is None comes in another call, and is taken to be as long as the one at hand. Nothing is folded if
        few operators are to be started: what that saves in arithmetic, it loses in others.
        """
        check_option("order", self.order, self._orders)
        check_option("backend", self.backend, BACKENDS)
        if (
            few
            and self.order == self.backend == "auto"
            and queries is not None
            and keys is not None
        ):
            head = self.key_channels // self.num_heads, self.value_channels // self.num_heads
            return "quadratic" if quadratic_is_cheaper(queries, keys, *head) else "linear"
        obstacles = self._folding_obstacles()
        if self.backend in LINEAR_BACKENDS:
            obstacles["quadratic"] = f"backend={self.backend!r} has no such order"
        if queries is None or keys is None:
            obstacles["quadratic"] = "it has no context, but needs queries and keys together"
        if self.order != "auto":
            reason = obstacles.get(self.order)
            if reason is not None:
                raise NotImplementedError(f"order={self.order!r}: {reason}; use order='auto'")
            return self.order
        lengths = [n for n in (queries, keys) if n is not None]
        if serves_every_length():
            lengths = [_LONG]
        return cheapest(
            self.costs(lengths[0], lengths[-1]),
            among=[o for o in MODULE_ORDERS if o not in obstacles],
        )

    def _folding_obstacles(self) -> dict[str, str]:
        """Orders that cannot be taken now, with the reason."""
        plain = self._features.projection
        sides = {"folded_values": self.values, "folded_output": self.reprojection}
        names = {"folded_values": "values", "folded_output": "reprojection"}
        found = {}
        for order, projection in sides.items():
            reason = obstacle(projection, plain)
            if reason is not None:
                message = f"{names[order]} cannot be folded into the context: {reason}"
                found[order] = found["folded"] = message
        return found

    def _summarize(self, source: Tensor, key_mask: Tensor | None, folds: bool) -> Context:
        features, mask = self._features, self._key_mask(key_mask, source)
        if folds:
            context = self._summarize_folded(source, mask)
        else:
            key = features.split(self._project_keys(source), self.num_heads)
            value = features.split(self.values(source), self.num_heads)
            context = summarize(key, value, key_mask=mask, **self._operator_options())
        return context._replace(mean=self._with_key_bias(context.mean))

    def _summarize_folded(self, source: Tensor, mask: Tensor | None) -> Context:
        # Softmax over positions treats every channel alone, so that all heads share one product with X.
        key = self._features.split(self._project_keys(source), 1)  # [B, 1, M, dk]
        x = self._features.split(source, 1)  # [B, 1, M, C]
        pooled = summarize(key, x, key_mask=mask, **self._operator_options())
        column_sums = (pooled.log_weight != -torch.inf).to(pooled.mean.dtype)  # [B, 1, dk]
        if self._needs_column_sums():
            ones = key.new_ones(()).expand(*key.shape[:3], 1)
            sums = summarize(key, ones, key_mask=mask, **self._operator_options())
            column_sums = sums.mean.squeeze(-1)
        return fold_values(
            pooled, column_sums, self.values.weight, self.values.bias, self.num_heads
        )

    def _needs_column_sums(self) -> bool:
        """Whether a bias of values has to be weighted by column sums of rho_k(K) that are not simply one."""
        return self.normalization == "scaling" and getattr(self.values, "bias", None) is not None

    def _attend(self, x: Tensor, context: Context, folds: bool) -> Tensor:
        features = self._features
        if not folds:
            return self._with_residual(x, self.reprojection(self._attended(x, context)))

        softmax = self.normalization == "softmax"
        weight, bias = self.reprojection.weight, self.reprojection.bias
        y = attend(
            features.split(self.queries(x), 1),  # [B, 1, N, dk]
            fold_output(context, weight, bias if softmax else None),
            num_groups=self.num_heads,
            **self._operator_options(),
        )  # [B, 1, N, C]
        if bias is not None and not softmax:
            y = y + bias.to(y.dtype)
        return self._with_residual(x, features.join(y, like=x))

    def _attended(self, x: Tensor, context: Context) -> Tensor:
        # In a call of its own, so that queries are gone before the output is made.
        query = self._features.split(self.queries(x), self.num_heads)  # [B, h, N, dk / h]
        attended = attend(query, context, **self._operator_options())
        return self._features.join(attended, like=x)

    def _attend_at_once(self, x: Tensor, source: Tensor, key_mask: Tensor | None) -> Tensor:
        """Queries, keys and values together, without a context in between."""
        features = self._features
        attended = efficient_attention(
            features.split(self.queries(x), self.num_heads),
            features.split(self._project_keys(source), self.num_heads),
            features.split(self.values(source), self.num_heads),
            key_mask=self._key_mask(key_mask, source),
            order=self.order,
            **self._operator_options(),
        )
        attended = self._with_key_bias(attended)
        return self._with_residual(x, self.reprojection(features.join(attended, like=x)))

    def _operator_options(self) -> dict[str, Any]:
        return {"normalization": self.normalization, "backend": self.backend}

    def _key_bias_is_idle(self) -> bool:
        """Softmax over positions does not see a constant added to a channel: the key bias has no effect."""
        return (
            self.normalization == "softmax"
            and obstacle(self.keys, self._features.projection) is None
            and self.keys.bias is not None
        )

    def _project_keys(self, source: Tensor) -> Tensor:
        if not self._key_bias_is_idle():
            return self.keys(source)
        bias = self.keys.bias
        return self._features.project(
            source, self.keys.weight, bias if bias is None else bias.detach()
        )

    def _with_key_bias(self, x: Tensor) -> Tensor:
        """Give an idle key bias its gradient, zero, in place of the rounding noise that optimizers would amplify."""
        # A trace is checked without gradients against itself with them.
        differentiable = torch.is_grad_enabled() or is_traced()
        if not differentiable or not self._key_bias_is_idle():
            return x
        bias = self.keys.bias
        return x if bias is None else x + bias.mul(0).sum().to(x.dtype)

    def extra_repr(self) -> str:
        inplace = ", inplace=True" if self.inplace else ""
        backend = f", backend={self.backend!r}" if self.backend != "auto" else ""
        return f"{super().extra_repr()}, order={self.order!r}{inplace}{backend}"
