"""Packed items come back as they were, and workers share them."""

import io
import pickle
from multiprocessing.reduction import ForkingPickler

import pytest

from efficient_attention.data.packing import Packed

ITEMS = ["", "a", ("b", 1.5, None), [["c"], {"d": 2}], "é" * 1000]


def test_packed_items_come_back():
    packed = Packed(iter(ITEMS))
    assert len(packed) == len(ITEMS)
    assert list(packed) == ITEMS
    assert packed[-1] == ITEMS[-1]
    assert packed[1:4] == ITEMS[1:4]


def test_nothing_packs_too():
    packed = Packed([])
    assert len(packed) == 0
    assert list(packed) == []


@pytest.mark.parametrize("index", [5, -6])
def test_no_item_beyond_the_ends(index):
    with pytest.raises(IndexError, match="index must be below 5"):
        Packed(ITEMS)[index]


def test_packed_items_survive_pickling():
    assert list(pickle.loads(pickle.dumps(Packed(ITEMS)))) == ITEMS


def test_workers_get_a_handle_instead_of_a_copy():
    packed = Packed(str(i) for i in range(100_000))
    assert packed.nbytes > 1_000_000
    # The pickler by which DataLoader sends a data set to a worker that is not forked.
    sent = io.BytesIO()
    ForkingPickler(sent).dump(packed)
    assert sent.tell() < 2000


def test_items_are_counted_from_either_end():
    items = ["a", "bc", "def"]
    packed = Packed(items)
    assert [packed[i] for i in range(-3, 3)] == items * 2
