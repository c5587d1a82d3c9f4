"""What kernels do with a block of values: load, normalize, multiply, round, store. All of triton that others import.

Products take their operands as ``OPERANDS`` says:

=============  =======================================================================================
``bfloat16``   rounded to bfloat16, for tensor cores
``tf32``       rounded to float32 of 11 bits, for tensor cores: has all the digits of float16 and none
               of its limits, which weights of a long softmax and gradients of a loss exceed
``ieee``       float32, on ordinary cores
=============  =======================================================================================

Names are those of ``triton_kernels.py``.
"""

# What follows is compiled by triton, which needs annotations as they are and not as strings.
import triton
import triton.language as tl
from triton.runtime import errors

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
# A program of which the device has no room for even one.
OutOfResources = errors.OutOfResources
# The lowest float32: stands for the largest key where there is none, for -inf - -inf is NaN.
LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def grouped_channels(
    first, DK: tl.constexpr, GROUPS: tl.constexpr, BG: tl.constexpr, BS: tl.constexpr
):
    """``BG`` groups of ``BS`` channels, powers of two, for GROUPS equal parts of DK: where each channel is, and masks.

    They begin with group ``first``. The masks say which channels exist, and which belong to a group that exists.
    """
    SIZE: tl.constexpr = DK // GROUPS
    o = first * BS + tl.arange(0, BG * BS)
    m_group = o < GROUPS * BS
    m = m_group & (o % BS < SIZE)
    if SIZE < BS:
        o = o // BS * SIZE + o % BS
    return o, m, m_group


@triton.jit
def query_weights(
    query,
    o_n,
    m_n,
    stride_n,
    stride_c,
    DK: tl.constexpr,
    BN: tl.constexpr,
    GROUPS: tl.constexpr,
    BG: tl.constexpr,
    BS: tl.constexpr,
    SOFTMAX: tl.constexpr,
):
    """``rho_q`` of a block of queries, ``[BN, BG * BS]`` in float32; finite in rows that do not exist."""
    o_k, m_k, m_group = grouped_channels(0, DK, GROUPS, BG, BS)
    b_query = load(query, o_n, m_n, stride_n, o_k, m_k, stride_c).to(tl.float32)
    if SOFTMAX:
        b_query = softmax(b_query, m_k, m_group, BN, BG, BS)
    return b_query


@triton.jit
def softmax(b_query, m_k, m_group, BN: tl.constexpr, BG: tl.constexpr, BS: tl.constexpr):
    """Softmax of ``[BN, BG * BS]`` over the channels of each group that exist."""
    # A group that does not exist is left at 0: softmax of nothing but -inf is NaN.
    b_query = tl.where((m_k | ~m_group)[None, :], b_query, float("-inf"))
    if BG == 1:
        b_query = tl.exp(b_query - tl.max(b_query, 1)[:, None])
        b_query = b_query / tl.sum(b_query, 1)[:, None]
    else:
        b_query = tl.reshape(b_query, (BN, BG, BS))
        b_query = tl.exp(b_query - tl.max(b_query, 2)[:, :, None])
        b_query = b_query / tl.sum(b_query, 2)[:, :, None]
        b_query = tl.reshape(b_query, (BN, BG * BS))
    return b_query


@triton.jit
def online_softmax(b_key, m_m, b_shift, b_total, b_mean):
    """Weights of a block of keys ``[BM, BK]`` relative to the largest so far; sums so far, made relative to it too."""
    b_key = tl.where(m_m[:, None], b_key, float("-inf"))
    b_largest = tl.maximum(b_shift, tl.max(b_key, 0))
    b_ratio = tl.exp(b_shift - b_largest)
    b_weights = tl.exp(b_key - b_largest[None, :])
    b_total = b_total * b_ratio + tl.sum(b_weights, 0)
    return b_weights, b_largest, b_total, b_mean * b_ratio[:, None]


@triton.jit
def pull_back_softmax(b_slope, b_weights, BN: tl.constexpr, BG: tl.constexpr, BS: tl.constexpr):
    """dL/dQ from dL/dA, for A the softmax of Q over the channels of each group."""
    if BG == 1:
        b_slope = (b_slope - tl.sum(b_slope * b_weights, 1)[:, None]) * b_weights
    else:
        b_slope = tl.reshape(b_slope, (BN, BG, BS))
        b_weights = tl.reshape(b_weights, (BN, BG, BS))
        b_slope = (b_slope - tl.sum(b_slope * b_weights, 2)[:, :, None]) * b_weights
        b_slope = tl.reshape(b_slope, (BN, BG * BS))
    return b_slope


@triton.jit
def load(base, o_rows, m_rows, stride_rows, o_columns, m_columns, stride_columns):
    """Numbers of ``base`` at rows and columns, 0 where either does not exist."""
    o = (
        o_rows.to(tl.int64)[:, None] * stride_rows
        + o_columns.to(tl.int64)[None, :] * stride_columns
    )
    return tl.load(base + o, m_rows[:, None] & m_columns[None, :], other=0.0)


@triton.jit
def store(base, b_x, o_rows, m_rows, stride_rows, o_columns, m_columns, stride_columns):
    """Numbers of ``base`` at rows and columns that exist, in its dtype, rounded to nearest."""
    o = (
        o_rows.to(tl.int64)[:, None] * stride_rows
        + o_columns.to(tl.int64)[None, :] * stride_columns
    )
    b_x = narrow(b_x, base.dtype.element_ty)
    tl.store(base + o, b_x, m_rows[:, None] & m_columns[None, :])


@triton.jit
def product(b_a, b_b, OPERANDS: tl.constexpr):
    return tl.dot(
        operand(b_a, OPERANDS),
        operand(b_b, OPERANDS),
        input_precision="ieee" if OPERANDS == "ieee" else "tf32",
    )


@triton.jit
def add_product(b_a, b_b, b_sum, OPERANDS: tl.constexpr):
    return tl.dot(
        operand(b_a, OPERANDS),
        operand(b_b, OPERANDS),
        b_sum,
        input_precision="ieee" if OPERANDS == "ieee" else "tf32",
    )


@triton.jit
def operand(b_x, OPERANDS: tl.constexpr):
    """A block as products take it; to do it twice changes nothing."""
    if OPERANDS == "bfloat16":
        b_x = narrow(b_x, tl.bfloat16)
        if INTERPRETED:
            # Triton's interpreter multiplies the bits of bfloat16 as integers.
            b_x = b_x.to(tl.float32)
    else:
        b_x = b_x.to(tl.float32)
        if OPERANDS == "tf32":
            # Tensor cores would ignore what tf32 has no room for, which is to round towards zero.
            b_x = rounded(b_x, 13)
    return b_x


@triton.jit
def narrow(b_x, dtype: tl.constexpr):
    """A block in a narrower dtype, rounded to nearest."""
    if INTERPRETED and dtype == tl.bfloat16:
        # Triton's interpreter rounds to bfloat16 towards zero.
        b_x = rounded(b_x.to(tl.float32), 16)
    return b_x.to(dtype)


@triton.jit
def rounded(b_x, BITS: tl.constexpr):
    """float32 without its last bits, rounded to nearest; infinities and NaN as they are."""
    b_bits = b_x.to(tl.int32, bitcast=True) + (1 << (BITS - 1))
    b_rounded = (b_bits & -(1 << BITS)).to(tl.float32, bitcast=True)
    return tl.where(b_x == b_x, b_rounded, b_x)
