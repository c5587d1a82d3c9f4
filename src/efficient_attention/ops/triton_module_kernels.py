"""The folded module for GPUs: what one program of each kernel computes. Queries and keys never reach memory.

Every kernel projects a block of positions again, ``BC`` channels of X at a time, and goes on with the projections in
registers. Those that sum over positions take a chunk of them each and leave its sum in memory, as in
``triton_kernels.py``, whose names are used here; the others take a block. ``triton_module_launch.py`` launches.

B batch, C channels of the positions at hand (X, or the source), N of them, DK key channels of all heads. Positions are
``[B, C, N]`` with any strides; weights ``[DK, C]`` and contexts ``[B, DK, C]`` are contiguous. ``BG`` heads of ``BS``
channels each, powers of two, are a tile of key channels, ``BV`` channels one of C. Equations: ``streamed.py``.
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
    softmax,
    store,
)


@triton.jit
def pool_kernel(
    x,
    mask,
    weight,
    bias,
    pooled,
    shift,
    total,
    sums,
    length,
    chunk,
    chunks,
    x_stride_b,
    x_stride_c,
    x_stride_n,
    mask_stride_b,
    mask_stride_n,
    DK: tl.constexpr,
    C: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BC: tl.constexpr,
    SOFTMAX: tl.constexpr,
    MASKED: tl.constexpr,
    BIASED: tl.constexpr,
    OPERANDS: tl.constexpr,
):
    """``rho_k(K)^T X`` of one chunk: ``[B, chunks, DK, C]``, and its weights and their sums without the last dimension.

    Softmax does not see a bias of keys, and leaves ``sums`` alone, for they are 1.
    """
    TILES_V: tl.constexpr = (C + BV - 1) // BV
    TILES_K: tl.constexpr = (DK + BK - 1) // BK
    i = tl.program_id(0)
    i_v, i_k = i % TILES_V, i // TILES_V % TILES_K
    i_c = i // (TILES_V * TILES_K) % chunks
    i_b = (i // (TILES_V * TILES_K) // chunks).to(tl.int64)
    o_k, o_v = i_k * BK + tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    m_k, m_v = o_k < DK, o_v < C
    x += i_b * x_stride_b
    mask += i_b * mask_stride_b
    if BIASED:
        b_bias = tl.load(bias + o_k, m_k, other=0.0).to(tl.float32)

    b_shift = tl.full([BK], LOWEST if SOFTMAX else 0.0, tl.float32)
    b_total = tl.zeros([BK], tl.float32)
    b_sums = tl.zeros([BK], tl.float32)
    b_pooled = tl.zeros([BK, BV], tl.float32)
    start = i_c.to(tl.int64) * chunk
    end = tl.minimum(start + chunk, length)
    for i_n in range(start, end, BN):
        o_n = i_n + tl.arange(0, BN)
        m_n = o_n < end
        b_key = project(x, o_n, m_n, x_stride_n, x_stride_c, weight, o_k, m_k, C, BC, OPERANDS)
        b_x = load(x, o_n, m_n, x_stride_n, o_v, m_v, x_stride_c)
        if MASKED:
            m_n = m_n & (tl.load(mask + o_n * mask_stride_n, m_n, other=0) != 0)
            # Replaced, for masked positions may hold anything: 0 * NaN is NaN.
            b_x = tl.where(m_n[:, None], b_x, tl.zeros_like(b_x))
        if SOFTMAX:
            b_weights, b_shift, b_total, b_pooled = online_softmax(
                b_key, m_n, b_shift, b_total, b_pooled
            )  # [BN, BK]
        else:
            if BIASED:
                b_key += b_bias[None, :]
            b_weights = tl.where(m_n[:, None], b_key, 0.0)
            b_total += tl.sum(m_n.to(tl.float32), 0)
            b_sums += tl.sum(b_weights, 0)
        b_pooled = add_product(tl.trans(b_weights), b_x, b_pooled, OPERANDS)

    b_pooled = b_pooled / tl.maximum(b_total, 1.0)[:, None]
    o = (i_b * chunks + i_c) * DK + o_k  # [BK]
    tl.store(pooled + o[:, None] * C + o_v[None, :], b_pooled, m_k[:, None] & m_v[None, :])
    if i_v == 0:
        tl.store(shift + o, b_shift, m_k)
        tl.store(total + o, b_total, m_k)
        if not SOFTMAX:
            tl.store(sums + o, b_sums, m_k)


@triton.jit
def output_kernel(
    x,
    weight,
    bias,
    context,
    constant,
    output,
    length,
    x_stride_b,
    x_stride_c,
    x_stride_n,
    output_stride_b,
    output_stride_c,
    output_stride_n,
    DK: tl.constexpr,
    C: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
    GROUPS: tl.constexpr,
    BG: tl.constexpr,
    BS: tl.constexpr,
    SOFTMAX: tl.constexpr,
    BIASED: tl.constexpr,
    SHIFTED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    OPERANDS: tl.constexpr,
):
    """``X + rho_q(Q) M`` of one block, and a constant if ``SHIFTED``; output may be X."""
    i, blocks = tl.program_id(0), tl.cdiv(length, BN)
    i_b = (i // blocks).to(tl.int64)
    o_k, m_k, m_group = grouped_channels(0, DK, GROUPS, BG, BS)
    o_n = (i % blocks).to(tl.int64) * BN + tl.arange(0, BN)
    m_n = o_n < length
    x += i_b * x_stride_b
    output += i_b * output_stride_b
    context += i_b * DK * C

    b_query = project(x, o_n, m_n, x_stride_n, x_stride_c, weight, o_k, m_k, C, BC, OPERANDS)
    b_attention = attention(b_query, bias, o_k, m_k, m_group, BN, BG, BS, SOFTMAX, BIASED)
    b_attention = operand(b_attention, OPERANDS)
    for i_c in range(0, C, BC):
        o_c = i_c + tl.arange(0, BC)
        m_c = o_c < C
        b_output = product(b_attention, load(context, o_k, m_k, C, o_c, m_c, 1), OPERANDS)
        if SHIFTED:
            b_output += tl.load(constant + o_c, m_c, other=0.0).to(tl.float32)[None, :]
        if RESIDUAL:
            b_x = load(x, o_n, m_n, x_stride_n, o_c, m_c, x_stride_c)
            b_output += b_x.to(tl.float32)
        store(output, b_output, o_n, m_n, output_stride_n, o_c, m_c, output_stride_c)


@triton.jit
def sum_gradient_kernel(
    x,
    d_output,
    mask,
    weight,
    bias,
    context,
    constant,
    shift,
    sums,
    bias_sums,
    length,
    chunk,
    chunks,
    x_stride_b,
    x_stride_c,
    x_stride_n,
    d_output_stride_b,
    d_output_stride_c,
    d_output_stride_n,
    mask_stride_b,
    mask_stride_n,
    DK: tl.constexpr,
    C: tl.constexpr,
    BN: tl.constexpr,
    BV: tl.constexpr,
    BC: tl.constexpr,
    GROUPS: tl.constexpr,
    BG: tl.constexpr,
    BS: tl.constexpr,
    OF: tl.constexpr,
    SOFTMAX: tl.constexpr,
    MASKED: tl.constexpr,
    BIASED: tl.constexpr,
    OPERANDS: tl.constexpr,
):
    """What one chunk adds to a gradient that is a sum over positions, ``[B, chunks, DK, C]``.

    ``OF`` says of what: of the ``context``, ``A^T d_Y``; of the ``queries``' weight, ``d_Q^T X``; of the ``keys``',
    ``d_K^T X``. ``context`` is that of outputs, and for keys their slopes. A weight's bias goes with it.
    """
    BK: tl.constexpr = BG * BS
    TILES_V: tl.constexpr = (C + BV - 1) // BV
    TILES_K: tl.constexpr = (GROUPS + BG - 1) // BG
    i = tl.program_id(0)
    i_v, i_k = i % TILES_V, i // TILES_V % TILES_K
    i_c = i // (TILES_V * TILES_K) % chunks
    i_b = (i // (TILES_V * TILES_K) // chunks).to(tl.int64)
    o_k, m_k, m_group = grouped_channels(i_k * BG, DK, GROUPS, BG, BS)
    o_v = i_v * BV + tl.arange(0, BV)
    m_v = o_v < C
    x += i_b * x_stride_b
    d_output += i_b * d_output_stride_b
    mask += i_b * mask_stride_b
    context += i_b * DK * C
    constant += i_b * DK
    shift += i_b * DK

    b_sum = tl.zeros([BK, BV], tl.float32)
    b_bias_sum = tl.zeros([BK], tl.float32)
    start = i_c.to(tl.int64) * chunk
    end = tl.minimum(start + chunk, length)
    for i_n in range(start, end, BN):
        o_n = i_n + tl.arange(0, BN)
        m_n = o_n < end
        b_left = project(x, o_n, m_n, x_stride_n, x_stride_c, weight, o_k, m_k, C, BC, OPERANDS)
        if OF == "keys":
            m_attended = m_n
            if MASKED:
                m_attended = m_n & (tl.load(mask + o_n * mask_stride_n, m_n, other=0) != 0)
            b_slope = project(
                x, o_n, m_n, x_stride_n, x_stride_c, context, o_k, m_k, C, BC, OPERANDS
            )
            _, b_left = pull_back_keys(
                b_left, b_slope, m_attended, bias, constant, shift, o_k, m_k, SOFTMAX, BIASED
            )
        else:
            b_left = attention(b_left, bias, o_k, m_k, m_group, BN, BG, BS, SOFTMAX, BIASED)
            if OF == "queries":
                b_slope = project(
                    d_output,
                    *(o_n, m_n, d_output_stride_n, d_output_stride_c),
                    *(context, o_k, m_k, C, BC, OPERANDS),
                )
                if SOFTMAX:
                    b_slope = pull_back_softmax(b_slope, b_left, BN, BG, BS)
                b_left = b_slope
        if OF == "context":
            b_right = load(d_output, o_n, m_n, d_output_stride_n, o_v, m_v, d_output_stride_c)
        else:
            b_right = load(x, o_n, m_n, x_stride_n, o_v, m_v, x_stride_c)
            if OF == "keys":
                b_right = tl.where(m_attended[:, None], b_right, tl.zeros_like(b_right))
            b_bias_sum += tl.sum(b_left, 0)
        b_sum = add_product(tl.trans(b_left), b_right, b_sum, OPERANDS)

    o = (i_b * chunks + i_c) * DK + o_k  # [BK]
    tl.store(sums + o[:, None] * C + o_v[None, :], b_sum, m_k[:, None] & m_v[None, :])
    if OF != "context" and i_v == 0:
        tl.store(bias_sums + o, b_bias_sum, m_k)


@triton.jit
def input_gradient_kernel(
    x,
    d_output,
    mask,
    query_weight,
    query_bias,
    context,
    key_weight,
    key_bias,
    slopes,
    constant,
    shift,
    d_x,
    length,
    x_stride_b,
    x_stride_c,
    x_stride_n,
    d_output_stride_b,
    d_output_stride_c,
    d_output_stride_n,
    mask_stride_b,
    mask_stride_n,
    d_x_stride_b,
    d_x_stride_c,
    d_x_stride_n,
    DK: tl.constexpr,
    C: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
    GROUPS: tl.constexpr,
    BG: tl.constexpr,
    BS: tl.constexpr,
    ATTENDS: tl.constexpr,
    ATTENDED: tl.constexpr,
    SOFTMAX: tl.constexpr,
    MASKED: tl.constexpr,
    QUERY_BIASED: tl.constexpr,
    KEY_BIASED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    OPERANDS: tl.constexpr,
):
    """d_X of one block: what comes through queries if it ``ATTENDS``, through keys if it is ``ATTENDED`` to."""
    i, blocks = tl.program_id(0), tl.cdiv(length, BN)
    i_b = (i // blocks).to(tl.int64)
    o_k, m_k, m_group = grouped_channels(0, DK, GROUPS, BG, BS)
    o_n = (i % blocks).to(tl.int64) * BN + tl.arange(0, BN)
    m_n = o_n < length
    x += i_b * x_stride_b
    d_output += i_b * d_output_stride_b
    d_x += i_b * d_x_stride_b
    context += i_b * DK * C
    slopes += i_b * DK * C

    if ATTENDS:
        b_query = project(
            x, o_n, m_n, x_stride_n, x_stride_c, query_weight, o_k, m_k, C, BC, OPERANDS
        )
        b_attention = attention(
            b_query, query_bias, o_k, m_k, m_group, BN, BG, BS, SOFTMAX, QUERY_BIASED
        )
        b_d_query = project(
            d_output,
            *(o_n, m_n, d_output_stride_n, d_output_stride_c),
            *(context, o_k, m_k, C, BC, OPERANDS),
        )
        if SOFTMAX:
            b_d_query = pull_back_softmax(b_d_query, b_attention, BN, BG, BS)
        b_d_query = operand(b_d_query, OPERANDS)
    if ATTENDED:
        m_attended = m_n
        if MASKED:
            o_mask = i_b * mask_stride_b + o_n * mask_stride_n
            m_attended = m_n & (tl.load(mask + o_mask, m_n, other=0) != 0)
        b_key = project(x, o_n, m_n, x_stride_n, x_stride_c, key_weight, o_k, m_k, C, BC, OPERANDS)
        b_slope = project(x, o_n, m_n, x_stride_n, x_stride_c, slopes, o_k, m_k, C, BC, OPERANDS)
        b_weights, b_d_key = pull_back_keys(
            *(b_key, b_slope, m_attended, key_bias, constant + i_b * DK, shift + i_b * DK),
            *(o_k, m_k, SOFTMAX, KEY_BIASED),
        )
        b_weights = operand(b_weights, OPERANDS)
        b_d_key = operand(b_d_key, OPERANDS)

    for i_c in range(0, C, BC):
        o_c = i_c + tl.arange(0, BC)
        m_c = o_c < C
        b_d_x = tl.zeros([BN, BC], tl.float32)
        if ATTENDS:
            b_weight = load(query_weight, o_k, m_k, C, o_c, m_c, 1)
            b_d_x = add_product(b_d_query, b_weight, b_d_x, OPERANDS)
            if RESIDUAL:
                b_d_output = load(
                    d_output, o_n, m_n, d_output_stride_n, o_c, m_c, d_output_stride_c
                )
                b_d_x += b_d_output.to(tl.float32)
        if ATTENDED:
            b_weight = load(slopes, o_k, m_k, C, o_c, m_c, 1)
            b_d_x = add_product(b_weights, b_weight, b_d_x, OPERANDS)
            b_weight = load(key_weight, o_k, m_k, C, o_c, m_c, 1)
            b_d_x = add_product(b_d_key, b_weight, b_d_x, OPERANDS)
        store(d_x, b_d_x, o_n, m_n, d_x_stride_n, o_c, m_c, d_x_stride_c)


@triton.jit
def project(
    x,
    o_n,
    m_n,
    stride_n,
    stride_c,
    weight,
    o_k,
    m_k,
    C: tl.constexpr,
    BC: tl.constexpr,
    OPERANDS: tl.constexpr,
):
    """``X W^T`` of a block of positions, ``[BN, BK]`` in float32, ``BC`` of the C channels of X at a time."""
    b_sum = tl.zeros([o_n.shape[0], o_k.shape[0]], tl.float32)
    for i_c in range(0, C, BC):
        o_c = i_c + tl.arange(0, BC)
        m_c = o_c < C
        b_x = load(x, o_n, m_n, stride_n, o_c, m_c, stride_c)
        b_weight = load(weight, o_k, m_k, C, o_c, m_c, 1)
        b_sum = add_product(b_x, tl.trans(b_weight), b_sum, OPERANDS)
    return b_sum


@triton.jit
def attention(
    b_query,
    bias,
    o_k,
    m_k,
    m_group,
    BN: tl.constexpr,
    BG: tl.constexpr,
    BS: tl.constexpr,
    SOFTMAX: tl.constexpr,
    BIASED: tl.constexpr,
):
    """``rho_q(Q)`` of projected queries ``[BN, BG * BS]``."""
    if BIASED:
        b_query += tl.load(bias + o_k, m_k, other=0.0).to(tl.float32)[None, :]
    if SOFTMAX:
        b_query = softmax(b_query, m_k, m_group, BN, BG, BS)
    return b_query


@triton.jit
def pull_back_keys(
    b_key,
    b_slope,
    m_attended,
    bias,
    constant,
    shift,
    o_k,
    m_k,
    SOFTMAX: tl.constexpr,
    BIASED: tl.constexpr,
):
    """Weights of projected keys and dL/dK, ``[BN, BK]``: 0 where nobody attends, whatever is there."""
    b_slope += tl.load(constant + o_k, m_k, other=0.0)[None, :]
    if SOFTMAX:
        b_key = tl.exp(b_key - tl.load(shift + o_k, m_k, other=0.0)[None, :])
        b_slope = b_slope * b_key
    elif BIASED:
        b_key += tl.load(bias + o_k, m_k, other=0.0).to(tl.float32)[None, :]
    b_key = tl.where(m_attended[:, None], b_key, 0.0)
    return b_key, tl.where(m_attended[:, None], b_slope, 0.0)
