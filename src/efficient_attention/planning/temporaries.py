"""What CPU operators hold while they run, beside what they take and return.

Convolutions are the case that matters: oneDNN computes on copies in layouts of its own, and PyTorch's own kernels write
all patches into a matrix; both can exceed the tensors of a network. Which of them runs PyTorch tells. What each holds
was found by recording every allocation, on a CPU with AVX2, and the tests compare it with such records. Left out: what
oneDNN needs for the gradient of the weights of dilated convolutions on CPUs that have nothing better than AVX2, and
conversions to float32 inside blocks of the operators (not of the module).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops.planner import block_length, maps_per_block, streamed_bytes
from ..ops.precision import accumulation_dtype, is_widened, product_dtype

_aten, _ours = torch.ops.aten, torch.ops.efficient_attention


def bytes_during(operator: Any, args: Sequence[Any], result: Any) -> int:
    """The most that an operator holds at one time beyond its arguments, what it returns included.

    0 where no more is known than what it returns.
    """
    count = _COUNTS.get(operator.overloadpacket)
    if count is None or args[0].device.type != "cpu":
        return 0
    return count(args, result)


def _convolution(args: Sequence[Any], y: Tensor) -> int:
    x, weight, *options = args[:9]
    transposed = options[4]
    backend = _backend(x, weight, options)
    if "Slow" in backend:
        return y.nbytes + _patches(backend, x, y, weight, options)
    if not _uses_onednn(backend):
        return 0
    if _is_channels_last(x, weight):
        return y.nbytes + 2 * weight.nbytes
    # Copies of x and y in blocks of channels; then y as it was asked for, behind a transposed convolution twice.
    return max(x.nbytes + weight.nbytes + y.nbytes, (3 if transposed else 2) * y.nbytes)


def _convolution_backward(args: Sequence[Any], result: Any) -> int:
    d_y, x, weight, _, *options = args[:10]
    stride, _, _, transposed, *_ = options
    d_x = 0 if result[0] is None else x.nbytes
    backend = _backend(x, weight, [None, *options])
    if "Slow" in backend:
        return d_x + weight.nbytes + _patches(backend, x, d_y, weight, [None, *options])
    if not _uses_onednn(backend):
        return 0
    if _is_channels_last(x, weight):
        return d_x + 4 * weight.nbytes
    # As above, with dL/dy for x and dL/dx for y; dL/dx then waits for copies of x and dL/dy to make dL/dweight.
    backwards = not transposed and max(stride) > 1
    for_x = max(d_y.nbytes + d_x, (3 if backwards else 2) * d_x)
    return weight.nbytes + max(for_x, d_x + x.nbytes + d_y.nbytes)


def _backend(x: Tensor, weight: Tensor, options: Sequence[Any]) -> str:
    """The name of the implementation that PyTorch chooses."""
    bias, stride, padding, dilation, transposed, output_padding, groups = options
    chosen = torch._C._select_conv_backend(
        x, weight, bias, stride, padding, dilation, transposed, output_padding, groups, None
    )
    return chosen.name


def _uses_onednn(backend: str) -> bool:
    # The name of its transposed convolutions is missing from PyTorch's table of names.
    return backend in ("Mkldnn", "???")


def _is_channels_last(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN takes the tensors as they are."""
    if x.dim() not in (4, 5):
        return False
    format_ = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    return any(
        t.is_contiguous(memory_format=format_) and not t.is_contiguous() for t in (x, weight)
    )


def _patches(backend: str, x: Tensor, y: Tensor, weight: Tensor, options: Sequence[Any]) -> int:
    """Bytes of the matrix of patches: a column for each position of the output, or of a transposed one's input."""
    _, stride, padding, _, transposed, *_ = options
    kernel = math.prod(weight.shape[2:])
    if kernel == 1 and set(stride) == {1} and not any(padding):
        return 0
    channels, side = (y.shape[1], x) if transposed else (x.shape[1], y)
    # Plain convolutions take the batch at once, the others one sample after another.
    samples = x.shape[0] if backend in ("Slow2d", "Slow3d") else 1
    return samples * channels * kernel * math.prod(side.shape[2:]) * x.element_size()


def _flash(args: Sequence[Any], result: Any) -> int:
    query, key = args[:2]
    rows, columns = _flash_block(query, key)
    return _nbytes(result) + torch.get_num_threads() * 4 * rows * (columns + 2 + query.shape[-1])


def _flash_backward(args: Sequence[Any], result: Any) -> int:
    d_y, query, key = args[:3]
    rows, columns = _flash_block(query, key)
    copy = 0 if d_y.transpose(1, 2).is_contiguous() else d_y.nbytes  # [B, N, H, D]
    return _nbytes(result) + torch.get_num_threads() * 4 * rows * 2 * columns + copy


def _flash_block(query: Tensor, key: Tensor) -> tuple[int, int]:
    """Queries and keys that a thread takes at a time."""
    queries, keys = query.shape[-2], key.shape[-2]
    return 256 if queries >= 768 else 64 if queries >= 192 else 32, min(512, keys)


def _multihead(args: Sequence[Any], result: Any) -> int:
    """What ``nn.MultiheadAttention`` and layers of ``nn.TransformerEncoder`` run in evaluation: all weights at once."""
    x, heads = args[0], args[2] if isinstance(args[1], int) else args[4]
    batch, positions, _ = x.shape
    weights = batch * heads * positions**2 * x.element_size()
    returned = _nbytes(result) if isinstance(result, tuple) and result[1] is not None else 0
    return max(6 * x.nbytes, 3 * x.nbytes + weights + returned)


def _summarize(args: Sequence[Any], result: Any) -> int:
    key, value, _, normalization = args
    pages = _Pages(key, value.shape[-1])
    weights = pages.of_both(key.shape[-1]) if normalization == "softmax" else 0
    return _nbytes(result) + weights


def _summarize_backward(args: Sequence[Any], result: Any) -> int:
    _, _, key, value, _, _, _, _, normalization, _ = args
    pages, channels = _Pages(key, value.shape[-1]), key.shape[-1]
    weights = pages.of_both(channels) if normalization == "softmax" else 0
    return _nbytes(result) + weights + pages.of_results(channels)


def _attend(args: Sequence[Any], result: Any) -> int:
    query, mean, normalization, _ = args
    pages, channels = _Pages(query, mean.shape[-1]), query.shape[-1]
    weights = pages.of_products(channels) if normalization == "softmax" else 0
    return _nbytes(result) + weights + pages.of_copies(normalization, channels)


def _attend_backward(args: Sequence[Any], result: Any) -> int:
    _, query, mean, normalization, _, _ = args
    pages, channels = _Pages(query, mean.shape[-1]), query.shape[-1]
    weights = pages.of_both(channels) if normalization == "softmax" else 0
    products = pages.of_sums(channels) if normalization == "softmax" else 0
    copies = pages.of_copies(normalization, channels)
    return _nbytes(result) + weights + products + pages.of_results(channels) + copies


def _folded(args: Sequence[Any], result: Any) -> int:
    x, source, _, (_, keys, values, _), _, _, num_heads, _ = args
    source = x if source is None else source
    sums, head = max(4, x.element_size()), len(values) // num_heads
    return _nbytes(result) + max(
        _streamed(source, keys, 1, contexts=1, copies=1),
        _streamed(x, keys, num_heads, copies=2) + sums * len(x) * len(keys) * (head + x.shape[1]),
    )


def _folded_backward(args: Sequence[Any], result: Any) -> int:
    _, x, source, _, (_, keys, *_), _, normalization, num_heads, *_ = args
    source = x if source is None else source
    context = max(4, x.element_size()) * len(x) * len(keys) * x.shape[1]
    parameters = _nbytes(result[2:])
    images = _nbytes(result[:2])
    # Products in low precision copy what they add to.
    wide = product_dtype(x.dtype, x.device) == accumulation_dtype(x.dtype)
    query = {"pages": 2 if normalization == "scaling" and wide else 3, "copies": 3}
    key = {"pages": 2, "copies": 3 if source is x else 2}
    return images + max(
        _streamed(x, keys, num_heads, contexts=2, backward=True, **query) + 4 * context,
        _streamed(source, keys, 0, contexts=1, backward=True, **key) + 9 * context,
        parameters,
    )


def _streamed(x: Tensor, weight: Tensor, heads: int, *, copies: int, **held: Any) -> int:
    """``copies`` of a block, where products are wider than x."""
    sizes = *x.mT.shape, weight.shape[0], heads, x.element_size()
    return streamed_bytes(*sizes, copies=is_widened(x) * copies, **held)


class _Pages:
    """What is held of a block of positions of ``x [B, H, N, D]``, of as many with other channels besides."""

    def __init__(self, x: Tensor, other_channels: int):
        batch, heads, positions, channels = x.shape
        both = channels + other_channels
        self._sums, self._products = accumulation_dtype(x.dtype), product_dtype(x.dtype, x.device)
        length = min(block_length(both, self._products.itemsize), positions)
        maps = maps_per_block(length, both, self._products.itemsize)
        self._numbers = min(maps, batch * heads) * length
        self._is_narrow = self._sums != x.dtype
        self._is_part = length < positions and not x[:1, :1, :length].is_contiguous()
        self._itemsize = x.itemsize

    def of_products(self, channels: int) -> int:
        """Bytes of a page that holds factors of products alone."""
        return self._numbers * channels * self._products.itemsize

    def of_both(self, channels: int) -> int:
        """Bytes of a page that is there in the dtype of sums, and in that of products where it is another."""
        return self.of_sums(channels) + (self._sums != self._products) * self.of_products(channels)

    def of_sums(self, channels: int) -> int:
        return self._numbers * channels * self._sums.itemsize

    def of_copies(self, normalization: str, channels: int) -> int:
        """Bytes of queries that are copied for their softmax, as those are that do not lie together."""
        copied = self._is_part and normalization == "softmax"
        return copied * self._numbers * channels * self._itemsize

    def of_results(self, channels: int) -> int:
        """Bytes of a page for what is stored in the end, which needs none if it is stored in the dtype of sums."""
        return self._is_narrow * self.of_both(channels)


def _nbytes(result: Any) -> int:
    tensors = result if isinstance(result, tuple) else (result,)
    return sum(x.nbytes for x in tensors if isinstance(x, Tensor))


_COUNTS: dict[Any, Callable[[Sequence[Any], Any], int]] = {
    _aten.convolution: _convolution,
    _aten.convolution_backward: _convolution_backward,
    _aten._scaled_dot_product_flash_attention_for_cpu: _flash,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _flash_backward,
    _aten._native_multi_head_attention: _multihead,
    _aten._transformer_encoder_layer_fwd: _multihead,
    _ours.summarize: _summarize,
    _ours.summarize_backward: _summarize_backward,
    _ours.attend: _attend,
    _ours.attend_backward: _attend_backward,
    _ours.folded: _folded,
    _ours.folded_backward: _folded_backward,
}
