"""The operators for GPUs: what one program of each kernel computes.

A sequence is cut into chunks, and a program takes the blocks of one chunk, one after another. Chunks that have sums of
their own (contexts, gradients of contexts) leave them in memory, and a second kernel adds them in the order of the
chunks, so that no result depends on which program ran first. ``triton_launch.py`` launches, ``tiling.py`` has sizes.

Names: i_ index of a program, o_ offsets, m_ masks, b_ blocks of values; B batch, H heads, N queries, M keys, Dk and Dv
channels of keys and values. Sizes of blocks, in capitals, are known to the compiler, as are DK and DV; lengths and
strides are not. ``BN`` positions are a block. ``BK`` is at least ``DK``, except in ``summarize``. ``OPERANDS``: see
``triton_blocks.py``.
"""

# What follows is compiled by triton, which needs annotations as they are and not as strings.
import triton
import triton.language as tl

from .triton_blocks import (
    LOWEST,
    add_product,
    grouped_channels,
    load,
    online_softmax,
    operand,
    product,
    pull_back_softmax,
    query_weights,
    store,
)


@triton.jit
def summarize_kernel(
    key,
    value,
    mask,
    mean,
    log_weight,
    shift,
    total,
    heads,
    length,
    chunk,
    chunks,
    key_stride_b,
    key_stride_h,
    key_stride_m,
    key_stride_c,
    value_stride_b,
    value_stride_h,
    value_stride_m,
    value_stride_c,
    mask_stride_b,
    mask_stride_h,
    mask_stride_m,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    SOFTMAX: tl.constexpr,
    MASKED: tl.constexpr,
    OPERANDS: tl.constexpr,
):
    """The context of one chunk of keys: mean ``[B, H, chunks, DK, DV]``, and its weights without the last dimension.

    Online softmax: sums are kept relative to the largest key so far, of every channel.
    """
    TILES_V: tl.constexpr = (DV + BV - 1) // BV
    TILES_K: tl.constexpr = (DK + BK - 1) // BK
    i = tl.program_id(0)
    i_v, i_k = i % TILES_V, i // TILES_V % TILES_K
    i_c = i // (TILES_V * TILES_K) % chunks
    i_bh = (i // (TILES_V * TILES_K) // chunks).to(tl.int64)
    i_b, i_h = i_bh // heads, i_bh % heads
    o_k, o_v = i_k * BK + tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    m_k, m_v = o_k < DK, o_v < DV
    key += i_b * key_stride_b + i_h * key_stride_h
    value += i_b * value_stride_b + i_h * value_stride_h
    mask += i_b * mask_stride_b + i_h * mask_stride_h

    b_shift = tl.full([BK], LOWEST if SOFTMAX else 0.0, tl.float32)
    b_total = tl.zeros([BK], tl.float32)
    b_mean = tl.zeros([BK, BV], tl.float32)
    start = i_c.to(tl.int64) * chunk
    end = tl.minimum(start + chunk, length)
    for i_m in range(start, end, BN):
        o_m = i_m + tl.arange(0, BN)
        m_m = o_m < end
        b_key = load(key, o_m, m_m, key_stride_m, o_k, m_k, key_stride_c).to(tl.float32)
        b_value = load(value, o_m, m_m, value_stride_m, o_v, m_v, value_stride_c)
        if MASKED:
            m_m = m_m & (tl.load(mask + o_m * mask_stride_m, m_m, other=0) != 0)
            # Replaced, for masked positions may hold anything: 0 * NaN is NaN.
            b_value = tl.where(m_m[:, None], b_value, tl.zeros_like(b_value))
        if SOFTMAX:
            b_weights, b_shift, b_total, b_mean = online_softmax(
                b_key, m_m, b_shift, b_total, b_mean
            )  # [BN, BK]
        else:
            b_weights = tl.where(m_m[:, None], b_key, 0.0)
            b_total += tl.sum(m_m.to(tl.float32), 0)
        b_mean = add_product(tl.trans(b_weights), b_value, b_mean, OPERANDS)

    # The heaviest key alone weighs 1, as does each that is counted: what weighs less is nothing.
    b_mean = b_mean / tl.maximum(b_total, 1.0)[:, None]
    o = (i_bh * chunks + i_c) * DK + o_k  # [BK]
    tl.store(mean + o[:, None] * DV + o_v[None, :], b_mean, m_k[:, None] & m_v[None, :])
    if i_v == 0:
        tl.store(log_weight + o, tl.log(b_total) + b_shift, m_k)
        tl.store(shift + o, b_shift, m_k)
        tl.store(total + o, b_total, m_k)


@triton.jit
def merge_kernel(
    means,
    shifts,
    totals,
    mean,
    log_weight,
    shift,
    total,
    chunks,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BN: tl.constexpr,
    BV: tl.constexpr,
):
    """One channel of a context, merged from those of all chunks, ``BN`` of them at a time and in their order."""
    TILES_V: tl.constexpr = (DV + BV - 1) // BV
    i = tl.program_id(0)
    i_v, i_k = i % TILES_V, i // TILES_V % DK
    i_bh = (i // (TILES_V * DK)).to(tl.int64)
    o_v = i_v * BV + tl.arange(0, BV)
    m_v = o_v < DV

    b_shift = tl.full([BN], LOWEST, tl.float32)
    for i_c in range(0, chunks, BN):
        o_c = i_c + tl.arange(0, BN)
        o = (i_bh * chunks + o_c) * DK + i_k
        b_shift = tl.maximum(b_shift, tl.load(shifts + o, o_c < chunks, other=LOWEST))
    b_largest = tl.max(b_shift, 0)

    b_total = tl.zeros([BN], tl.float32)
    b_mean = tl.zeros([BN, BV], tl.float32)
    for i_c in range(0, chunks, BN):
        o_c = i_c + tl.arange(0, BN)
        m_c = o_c < chunks
        o = (i_bh * chunks + o_c) * DK + i_k
        b_weights = tl.load(totals + o, m_c, other=0.0)
        b_weights *= tl.exp(tl.load(shifts + o, m_c, other=LOWEST) - b_largest)
        b_part = tl.load(means + o[:, None] * DV + o_v, m_c[:, None] & m_v[None, :], other=0.0)
        b_mean += b_part * b_weights[:, None]
        b_total += b_weights

    b_sum = tl.sum(b_total, 0)
    o = i_bh * DK + i_k
    tl.store(mean + o * DV + o_v, tl.sum(b_mean, 0) / tl.maximum(b_sum, 1.0), m_v)
    if i_v == 0:
        tl.store(log_weight + o, tl.log(b_sum) + b_largest)
        tl.store(shift + o, b_largest)
        tl.store(total + o, b_sum)


@triton.jit
def add_kernel(parts, whole, chunks, size, BN: tl.constexpr, BV: tl.constexpr):
    """``BV`` numbers of the sum over chunks of ``parts [B * H, chunks, size]``, in the order of the chunks."""
    tiles = tl.cdiv(size, BV)
    i = tl.program_id(0)
    i_bh = (i // tiles).to(tl.int64)
    o_v = i % tiles * BV + tl.arange(0, BV)
    m_v = o_v < size
    b_sum = tl.zeros([BN, BV], tl.float32)
    for i_c in range(0, chunks, BN):
        o_c = i_c + tl.arange(0, BN)
        m = (o_c < chunks)[:, None] & m_v[None, :]
        b_sum += tl.load(parts + (i_bh * chunks + o_c)[:, None] * size + o_v[None, :], m, other=0.0)
    tl.store(whole + i_bh * size + o_v, tl.sum(b_sum, 0), m_v)


@triton.jit
def summarize_backward_kernel(
    d_mean,
    d_log_weight,
    key,
    value,
    mask,
    mean,
    shift,
    total,
    d_key,
    d_value,
    heads,
    length,
    chunk,
    chunks,
    key_stride_b,
    key_stride_h,
    key_stride_m,
    key_stride_c,
    value_stride_b,
    value_stride_h,
    value_stride_m,
    value_stride_c,
    mask_stride_b,
    mask_stride_h,
    mask_stride_m,
    d_key_stride_b,
    d_key_stride_h,
    d_key_stride_m,
    d_key_stride_c,
    d_value_stride_b,
    d_value_stride_h,
    d_value_stride_m,
    d_value_stride_c,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    SOFTMAX: tl.constexpr,
    MASKED: tl.constexpr,
    WEIGHED: tl.constexpr,
    NEEDS_KEY: tl.constexpr,
    NEEDS_VALUE: tl.constexpr,
    OPERANDS: tl.constexpr,
):
    """Gradients of one chunk of keys and values: of all channels if one tile has them.

    Where values take several tiles, either gradient is a launch of its own: d_value tile by tile, in programs; d_key
    in one program, which adds what the tiles contribute. ``WEIGHED``: whether log_weight has a gradient too.
    """
    TILES_V: tl.constexpr = (DV + BV - 1) // BV
    TILES: tl.constexpr = TILES_V if NEEDS_VALUE else 1
    tl.static_assert(TILES_V == 1 or not (NEEDS_KEY and NEEDS_VALUE))
    i = tl.program_id(0)
    i_v, i_c = i % TILES, i // TILES % chunks
    i_bh = (i // TILES // chunks).to(tl.int64)
    i_b, i_h = i_bh // heads, i_bh % heads
    o_k, o_v = tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    m_k, m_v = o_k < DK, o_v < DV
    key += i_b * key_stride_b + i_h * key_stride_h
    value += i_b * value_stride_b + i_h * value_stride_h
    mask += i_b * mask_stride_b + i_h * mask_stride_h
    d_key += i_b * d_key_stride_b + i_h * d_key_stride_h
    d_value += i_b * d_value_stride_b + i_h * d_value_stride_h
    d_mean += i_bh * DK * DV
    mean += i_bh * DK * DV

    # Dividing what has the size of a context by the total weight spares dividing every weight.
    b_divisor = tl.maximum(tl.load(total + i_bh * DK + o_k, m_k, other=1.0), 1.0)
    if SOFTMAX:
        b_shift = tl.load(shift + i_bh * DK + o_k, m_k, other=0.0)
        if NEEDS_KEY:
            b_correction = tl.zeros([BK], tl.float32)
            for i_w in range(TILES_V):
                o_w = i_w * BV + tl.arange(0, BV)
                b_d = load(d_mean, o_k, m_k, DV, o_w, o_w < DV, 1)
                b_correction += tl.sum(b_d * load(mean, o_k, m_k, DV, o_w, o_w < DV, 1), 1)
            if WEIGHED:
                b_correction -= tl.load(d_log_weight + i_bh * DK + o_k, m_k, other=0.0)
            b_correction = b_correction / b_divisor
    b_slope = load(d_mean, o_k, m_k, DV, o_v, m_v, 1) / b_divisor[:, None]  # [BK, BV]
    b_slope = operand(b_slope, OPERANDS)

    start = i_c.to(tl.int64) * chunk
    end = tl.minimum(start + chunk, length)
    for i_m in range(start, end, BN):
        o_m = i_m + tl.arange(0, BN)
        m_m = o_m < end
        m_attended = m_m
        if MASKED:
            m_attended = m_m & (tl.load(mask + o_m * mask_stride_m, m_m, other=0) != 0)
        if SOFTMAX or NEEDS_VALUE:
            b_weights = load(key, o_m, m_m, key_stride_m, o_k, m_k, key_stride_c).to(tl.float32)
            if SOFTMAX:
                b_weights = tl.exp(b_weights - b_shift[None, :])
            b_weights = tl.where(m_attended[:, None], b_weights, 0.0)  # [BN, BK]
        if NEEDS_VALUE:
            b_d_value = product(b_weights, b_slope, OPERANDS)  # [BN, BV]
            store(d_value, b_d_value, o_m, m_m, d_value_stride_m, o_v, m_v, d_value_stride_c)
        if NEEDS_KEY:
            b_d_key = tl.zeros([BN, BK], tl.float32)
            for i_w in range(TILES_V):
                o_w = i_w * BV + tl.arange(0, BV)
                if TILES_V > 1:
                    b_slope = load(d_mean, o_k, m_k, DV, o_w, o_w < DV, 1) / b_divisor[:, None]
                    b_slope = operand(b_slope, OPERANDS)
                b_value = load(value, o_m, m_m, value_stride_m, o_w, o_w < DV, value_stride_c)
                if MASKED:
                    b_value = tl.where(m_attended[:, None], b_value, tl.zeros_like(b_value))
                b_d_key = add_product(b_value, tl.trans(b_slope), b_d_key, OPERANDS)
            if SOFTMAX:
                b_d_key = (b_d_key - b_correction[None, :]) * b_weights
            store(d_key, b_d_key, o_m, m_m, d_key_stride_m, o_k, m_k, d_key_stride_c)


@triton.jit
def attend_kernel(
    query,
    mean,
    output,
    heads,
    length,
    chunk,
    chunks,
    query_stride_b,
    query_stride_h,
    query_stride_n,
    query_stride_c,
    output_stride_b,
    output_stride_h,
    output_stride_n,
    output_stride_c,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BN: tl.constexpr,
    BV: tl.constexpr,
    GROUPS: tl.constexpr,
    BG: tl.constexpr,
    BS: tl.constexpr,
    SOFTMAX: tl.constexpr,
    OPERANDS: tl.constexpr,
):
    """One tile of channels of the outputs of one chunk of queries."""
    TILES: tl.constexpr = (DV + BV - 1) // BV
    i = tl.program_id(0)
    i_v, i_c = i % TILES, i // TILES % chunks
    i_bh = (i // TILES // chunks).to(tl.int64)
    i_b, i_h = i_bh // heads, i_bh % heads
    o_k, m_k, _ = grouped_channels(0, DK, GROUPS, BG, BS)
    o_v = i_v * BV + tl.arange(0, BV)
    m_v = o_v < DV
    query += i_b * query_stride_b + i_h * query_stride_h
    output += i_b * output_stride_b + i_h * output_stride_h
    b_mean = load(mean + i_bh * DK * DV, o_k, m_k, DV, o_v, m_v, 1)
    b_mean = operand(b_mean, OPERANDS)  # [BK, BV]

    start = i_c.to(tl.int64) * chunk
    end = tl.minimum(start + chunk, length)
    for i_n in range(start, end, BN):
        o_n = i_n + tl.arange(0, BN)
        m_n = o_n < end
        b_weights = query_weights(
            query, o_n, m_n, query_stride_n, query_stride_c, DK, BN, GROUPS, BG, BS, SOFTMAX
        )
        b_output = product(b_weights, b_mean, OPERANDS)
        store(output, b_output, o_n, m_n, output_stride_n, o_v, m_v, output_stride_c)


@triton.jit
def attend_backward_kernel(
    d_output,
    query,
    mean,
    d_query,
    d_mean,
    heads,
    length,
    chunk,
    chunks,
    d_output_stride_b,
    d_output_stride_h,
    d_output_stride_n,
    d_output_stride_c,
    query_stride_b,
    query_stride_h,
    query_stride_n,
    query_stride_c,
    d_query_stride_b,
    d_query_stride_h,
    d_query_stride_n,
    d_query_stride_c,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BN: tl.constexpr,
    BV: tl.constexpr,
    GROUPS: tl.constexpr,
    BG: tl.constexpr,
    BS: tl.constexpr,
    SOFTMAX: tl.constexpr,
    NEEDS_QUERY: tl.constexpr,
    NEEDS_MEAN: tl.constexpr,
    OPERANDS: tl.constexpr,
):
    """Gradients of one chunk of queries, and what it adds to the context's: ``d_mean [B, H, chunks, DK, DV]``.

    Where values take several tiles, either gradient is a launch of its own: d_mean tile by tile, in programs; d_query
    in one program, which adds what the tiles contribute.
    """
    BK: tl.constexpr = BG * BS
    TILES_V: tl.constexpr = (DV + BV - 1) // BV
    TILES: tl.constexpr = TILES_V if NEEDS_MEAN else 1
    tl.static_assert(TILES_V == 1 or not (NEEDS_QUERY and NEEDS_MEAN))
    i = tl.program_id(0)
    i_v, i_c = i % TILES, i // TILES % chunks
    i_bh = (i // TILES // chunks).to(tl.int64)
    i_b, i_h = i_bh // heads, i_bh % heads
    o_k, m_k, _ = grouped_channels(0, DK, GROUPS, BG, BS)
    o_v = i_v * BV + tl.arange(0, BV)
    m_v = o_v < DV
    d_output += i_b * d_output_stride_b + i_h * d_output_stride_h
    query += i_b * query_stride_b + i_h * query_stride_h
    d_query += i_b * d_query_stride_b + i_h * d_query_stride_h
    mean += i_bh * DK * DV

    if NEEDS_QUERY:
        b_mean = operand(load(mean, o_k, m_k, DV, o_v, m_v, 1), OPERANDS)  # [BK, BV]
    if NEEDS_MEAN:
        b_d_mean = tl.zeros([BK, BV], tl.float32)
    start = i_c.to(tl.int64) * chunk
    end = tl.minimum(start + chunk, length)
    for i_n in range(start, end, BN):
        o_n = i_n + tl.arange(0, BN)
        m_n = o_n < end
        if SOFTMAX or NEEDS_MEAN:
            b_weights = query_weights(
                query, o_n, m_n, query_stride_n, query_stride_c, DK, BN, GROUPS, BG, BS, SOFTMAX
            )
        if NEEDS_MEAN or TILES_V == 1:
            b_d_output = load(d_output, o_n, m_n, d_output_stride_n, o_v, m_v, d_output_stride_c)
        if NEEDS_MEAN:
            b_d_mean = add_product(tl.trans(b_weights), b_d_output, b_d_mean, OPERANDS)
        if NEEDS_QUERY:
            b_slope = tl.zeros([BN, BK], tl.float32)
            for i_w in range(TILES_V):
                if TILES_V > 1:
                    o_w = i_w * BV + tl.arange(0, BV)
                    m_w = o_w < DV
                    b_mean = operand(load(mean, o_k, m_k, DV, o_w, m_w, 1), OPERANDS)
                    b_d_output = load(
                        d_output, o_n, m_n, d_output_stride_n, o_w, m_w, d_output_stride_c
                    )
                b_slope = add_product(b_d_output, tl.trans(b_mean), b_slope, OPERANDS)
            if SOFTMAX:
                b_slope = pull_back_softmax(b_slope, b_weights, BN, BG, BS)
            store(d_query, b_slope, o_n, m_n, d_query_stride_n, o_k, m_k, d_query_stride_c)

    if NEEDS_MEAN:
        d_mean += (i_bh * chunks + i_c) * DK * DV
        tl.store(d_mean + o_k[:, None] * DV + o_v, b_d_mean, m_k[:, None] & m_v[None, :])
