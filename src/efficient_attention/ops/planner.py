"""What every exact order of the computation costs, and which is the cheapest.

The product ``rho_q(Q) rho_k(K)^T V`` is associative and its projections are linear, so the same map can be
computed in several orders. This file counts; it computes nothing and knows no tensors. Counts are Python integers.

========== ================================================= ============================================
order      operator                                          module, on top
========== ================================================= ============================================
linear     ``Q (K^T V)``                                     project to values, attend, reproject
quadratic  ``(Q K^T) V``                                     the same
folded     (linear)                                          ``Q [((K^T X) Wv) Wo]``: values and attended
                                                             values never exist
========== ================================================= ============================================

``folded_values`` and ``folded_output`` fold one side only. Paper: Sec. 3.2 (linear order), Sec. 3.3 (equivalence).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

OPERATOR_ORDERS = ("linear", "quadratic")
MODULE_ORDERS = ("linear", "quadratic", "folded_values", "folded_output", "folded")
# A context comes between the sides of these, so that each side is computed without knowing the other.
FOLDS_VALUES = ("folded_values", "folded")
FOLDS_OUTPUT = ("folded_output", "folded")

# A block of the blocked path stays in the cache of one core, and is long enough for its products to be efficient.
BLOCK_BYTES = 4 << 20
SHORTEST_BLOCK = 256

# While the normalized queries and keys take no more than this, few large operators are faster than many blocks. With
# gradients they are kept, one pair for each layer of a network, and blocks pay sooner.
PLAIN_BYTES = 32 << 20
PLAIN_BYTES_KEPT = 8 << 20
# Longer sums are taken in blocks in any case, for their rounding.
PLAIN_KEYS = 8192

# Up to so many positions, of all samples, a module on a CPU starts as few operators as it can, and folds no projections
# unless that saves so many multiply-adds.
SHORT_POSITIONS = 512
SHORT_MULTIPLY_ADDS = 8 << 20

# Beside a mean: its log_weight, and the largest key and the sum relative to it for the backward pass.
_CONTEXT_WEIGHTS = 3


class Cost(NamedTuple):
    """What one order costs.

    Attributes:
        multiply_adds: multiply-accumulate operations of the products; the softmaxes are the same in every order.
        bytes: the most that intermediate tensors hold at one time in a forward pass without gradients, blocks
            included; the inputs, the output, its sum with a residual and the parameters, which every order has, are
            not counted.
    """

    multiply_adds: int
    bytes: int


def operator_costs(
    *,
    queries: int,
    keys: int,
    key_channels: int,
    value_channels: int,
    batch: int = 1,
    heads: int = 1,
    itemsize: int = 4,
) -> dict[str, Cost]:
    """The cost of every order of :func:`efficient_attention`.

    Args:
        queries: N, the number of query positions.
        keys: M, the number of key positions.
        key_channels: Dk of one head.
        value_channels: Dv of one head.
        batch: B.
        heads: H.
        itemsize: bytes of one stored number (sums and contexts always take at least 4).

    Example:
        >>> costs = operator_costs(queries=4096, keys=4096, key_channels=64, value_channels=64)
        >>> costs["quadratic"].multiply_adds // costs["linear"].multiply_adds
        64
    """
    maps = batch * heads
    sums = max(itemsize, 4)
    context = key_channels * (value_channels + _CONTEXT_WEIGHTS)
    weights = keys * queries + (keys + queries) * key_channels
    blocks = max(
        block_bytes(batch, heads, positions, key_channels, value_channels, itemsize)
        for positions in (queries, keys)
    )
    return {
        "linear": Cost(
            maps * (queries + keys) * key_channels * value_channels,
            maps * context * sums + blocks,
        ),
        "quadratic": Cost(
            maps * queries * keys * (key_channels + value_channels),
            maps * weights * sums,
        ),
    }


def module_costs(
    *,
    queries: int,
    keys: int,
    in_channels: int,
    key_channels: int,
    value_channels: int,
    source_channels: int | None = None,
    column_sums: bool = False,
    streamed: bool = False,
    widened: bool = False,
    batch: int = 1,
    heads: int = 1,
    itemsize: int = 4,
) -> dict[str, Cost]:
    """The cost of every order of a module: projections, attention and reprojection.

    Args:
        queries: N, the number of positions that attend.
        keys: M, the number of positions that are attended to.
        in_channels: C, channels of the positions that attend, and of the output.
        key_channels: Dk of all heads together.
        value_channels: Dv of all heads together.
        source_channels: channels of the positions that are attended to; ``None``: ``in_channels``.
        column_sums: whether to fold the values takes the sums of rho_k(K) over positions, in a pass of their own. It
            does if the values have a bias, and the sums are not one: under ``normalization="scaling"``.
        streamed: whether the folded order runs as one operator over blocks of positions, in which projections never
            exist as a whole and column sums are no product.
        widened: whether it copies its blocks, as their numbers are multiplied in a wider dtype.
        batch: B.
        heads: H.
        itemsize: bytes of one stored number.

    Example:
        >>> costs = module_costs(queries=65536, keys=65536, in_channels=256, key_channels=128, value_channels=256)
        >>> round(costs["linear"].multiply_adds / costs["folded"].multiply_adds, 1)
        2.0
    """
    c, dk, dv = in_channels, key_channels, value_channels
    s = c if source_channels is None else source_channels
    sums = max(itemsize, 4)
    head = dv // heads  # value channels that a key channel meets

    projected = queries * c * dk + keys * s * dk  # queries and keys, in every order

    def split(positions: int, channels: int) -> int:
        """Bytes of blocks where heads are apart; ``together`` where they share one product with all ``channels``."""
        return block_bytes(batch, heads, positions, dk // heads, channels // heads, itemsize)

    def together(positions: int, channels: int) -> int:
        return block_bytes(batch, 1, positions, dk, channels, itemsize)

    # Of each side: multiply-adds; bytes of projections and contexts, a sample; bytes of blocks.
    sides = {
        "values": (keys * (s * dv + dk * head), keys * (dk + dv) * itemsize, split(keys, dv)),
        "values folded": (
            keys * dk * (s + column_sums) + dk * s * head,
            keys * dk * itemsize + dk * (s + column_sums) * sums,
            together(keys, s),
        ),
        "output": (
            queries * (dk * head + dv * c),
            queries * (dk + dv) * itemsize,
            split(queries, dv),
        ),
        "output folded": (
            dk * head * c + queries * dk * c,
            queries * dk * itemsize + dk * c * sums,
            together(queries, c),
        ),
    }

    def linear(key_side: str, query_side: str) -> Cost:
        # The key side is done with when the query side begins; only contexts pass from one to the other.
        context = dk * (head + _CONTEXT_WEIGHTS) * sums
        multiply_adds = projected + sides[key_side][0] + sides[query_side][0]
        alive = max(
            batch * held + blocks for _, held, blocks in (sides[key_side], sides[query_side])
        )
        return Cost(batch * multiply_adds, alive + batch * context)

    def stream() -> Cost:
        # Products with a context are of its size; positions are projected and multiplied once on each side.
        multiply_adds = 2 * projected + dk * head * (s + c)
        context = dk * (s + _CONTEXT_WEIGHTS + 1) * sums
        return Cost(
            batch * multiply_adds,
            batch * context
            + max(
                streamed_bytes(batch, keys, s, dk, 1, itemsize, contexts=1, copies=widened),
                streamed_bytes(batch, queries, c, dk, heads, itemsize, copies=2 * widened)
                + batch * dk * (head + c) * sums,
            ),
        )

    attention = queries * keys * (dk + dv)
    everything = (keys * (dk + dv) + queries * (dk + dv)) * itemsize
    weights = (heads * queries * keys + (queries + keys) * dk) * sums
    return {
        "linear": linear("values", "output"),
        "quadratic": Cost(
            batch * (projected + keys * s * dv + attention + queries * dv * c),
            batch * (everything + weights),
        ),
        "folded_values": linear("values folded", "output"),
        "folded_output": linear("values", "output folded"),
        "folded": stream() if streamed else linear("values folded", "output folded"),
    }


def cheapest(costs: Mapping[str, Cost], among: Collection[str] | None = None) -> str:
    """The order with the fewest multiply-adds; of equals, the one with the fewest bytes.

    The quadratic order keeps its N x M map and both softmaxes in memory, and is taken only where they fit the cache:
    beyond, what it saves in arithmetic it loses in traffic, and memory would no longer be bounded.

    Example:
        >>> cheapest(operator_costs(queries=32, keys=32, key_channels=64, value_channels=64))
        'quadratic'
    """

    def rank(name: str) -> tuple[bool, Cost]:
        return name == "quadratic" and costs[name].bytes > BLOCK_BYTES, costs[name]

    return min((name for name in costs if among is None or name in among), key=rank)


def crossover(key_channels: int, value_channels: int) -> float:
    """``2 Dk Dv / (Dk + Dv)``: with N = M positions the quadratic order is cheaper below this length, per head.

    Example:
        >>> crossover(64, 64)
        64.0
    """
    return 2 * key_channels * value_channels / (key_channels + value_channels)


def quadratic_is_cheaper(
    queries: int, keys: int, key_channels: int, value_channels: int, *, or_equal: bool = False
) -> bool:
    """Whether :func:`operator_costs` has fewer multiply-adds for the quadratic order than for the linear one.

    ``or_equal``: or as many.
    """
    quadratic = queries * keys * (key_channels + value_channels)
    linear = (queries + keys) * key_channels * value_channels
    return quadratic < linear or (or_equal and quadratic == linear)


def quadratic_gradients_are_cheaper(
    queries: int, keys: int, key_channels: int, value_channels: int
) -> bool:
    """Whether gradients, computed from the inputs alone, take no more multiply-adds in the quadratic order.

    The quadratic order has five products with its N x M map or the gradient of that: three with key channels, two with
    value channels. The linear one has five with the context or its gradient: three of keys, two of queries.
    """
    quadratic = queries * keys * (3 * key_channels + 2 * value_channels)
    return quadratic <= (2 * queries + 3 * keys) * key_channels * value_channels


def plain_is_cheaper(
    maps: int,
    queries: int,
    keys: int,
    key_channels: int,
    itemsize: int,
    *,
    kept: bool,
) -> bool:
    """Whether few plain operators are faster than blocks, for so many maps (batch times heads).

    ``kept``: for a backward pass.
    """
    weights = maps * (queries + keys) * key_channels * itemsize
    limit = PLAIN_BYTES_KEPT if kept else PLAIN_BYTES
    return keys <= PLAIN_KEYS and weights <= limit


def is_short(batch: int, positions: int) -> bool:
    """Whether a module on a CPU gains from few operators."""
    return batch * positions <= SHORT_POSITIONS


def folding_saves_little(
    *,
    batch: int,
    queries: int,
    keys: int,
    in_channels: int,
    source_channels: int,
    key_channels: int,
    value_channels: int,
    heads: int,
) -> bool:
    """Whether a short module gains more from few operators than from folding: :func:`module_costs` in one line."""
    head = value_channels // heads
    wider = value_channels - key_channels  # by so much products are narrower that have no values
    saved = queries * in_channels * wider + keys * source_channels * wider
    saved += (queries + keys - in_channels - source_channels) * key_channels * head
    return batch * saved <= SHORT_MULTIPLY_ADDS


def block_length(channels: int, itemsize: int) -> int:
    """Positions in one block: a power of two that depends on neither batch nor length."""
    affordable = BLOCK_BYTES // (itemsize * max(1, channels))
    return max(SHORTEST_BLOCK, 1 << max(0, affordable.bit_length() - 1))


def maps_per_block(positions: int, channels: int, itemsize: int) -> int:
    """How many maps, of as many samples and heads, are taken together in blocks of so many positions."""
    return max(1, BLOCK_BYTES // (itemsize * max(1, positions * channels)))


def block_bytes(
    batch: int, heads: int, positions: int, key_channels: int, value_channels: int, itemsize: int
) -> int:
    """What the blocked path holds of one block: its weights, in low precision in the dtypes of sums and of products."""
    channels = key_channels + value_channels
    length = min(block_length(channels, itemsize), positions)
    maps = min(maps_per_block(length, channels, itemsize), batch * heads)
    return maps * length * key_channels * _page_bytes(itemsize)


def _page_bytes(itemsize: int) -> int:
    """Of one intermediate number: low precision, where it is multiplied as it is stored, is added up in float32."""
    return itemsize if itemsize >= 4 else 4 + itemsize


def streamed_bytes(
    batch: int,
    positions: int,
    channels: int,
    key_channels: int,
    heads: int,
    itemsize: int,
    *,
    pages: int = 1,
    contexts: int = 0,
    copies: int = 0,
    backward: bool = False,
) -> int:
    """What the streamed module holds while it walks over blocks of one side.

    Pages of ``key_channels`` for each position of a block, in low precision twice, and one number for each head;
    ``contexts`` of each sum over blocks that is not yet complete. Where low precision is multiplied in that of sums,
    there are so many ``copies`` of a block of X instead of a second page. Then, and in the ``backward`` pass, blocks
    are as long as in the dtype of sums, and shorter for the copies.
    """
    sums = max(itemsize, 4)
    width = key_channels * (sums if copies else _page_bytes(itemsize))
    fitted = sums if backward or copies else itemsize
    together = key_channels + channels * (2 if copies else 1)
    length = min(block_length(together, fitted), positions)
    rows = min(maps_per_block(length, together, fitted), batch)
    incomplete = 1 + (-(-positions // max(1, length)) - 1).bit_length()
    partial = contexts * incomplete * key_channels * channels * sums
    return rows * (length * (pages * width + (copies * channels + heads) * sums) + partial)
