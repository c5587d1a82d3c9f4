"""The numbers of a sample belong to the sample."""

import pytest
import torch

from efficient_attention.data.draws import Draw, as_draw, generator, reproducibly, seed_of


def test_seeds_differ_in_every_part_of_the_key():
    keys = [(a, b, c) for a in range(10) for b in range(10) for c in range(10)]
    assert len({seed_of(*key) for key in keys} | {seed_of(*key[:2]) for key in keys}) == 1100


def test_seeds_are_the_same_on_every_machine():
    # blake2b of the eight-byte words (1, 2), worked out with coreutils' b2sum -l 64.
    assert seed_of(1, 2) == int.from_bytes(bytes.fromhex("96a3cf72d606b6a4"), "little") >> 1


def test_generators_repeat():
    a, b = (torch.rand(4, generator=generator(3, 7)) for _ in range(2))
    assert torch.equal(a, b)
    assert not torch.equal(a, torch.rand(4, generator=generator(7, 3)))


def test_reproducible_numbers_leave_the_global_generator_as_it_was():
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    with pytest.raises(RuntimeError), reproducibly(1):
        torch.rand(100) @ torch.rand(99)
    assert torch.equal(torch.rand(2), expected)


def test_a_plain_index_is_a_draw_with_seed_zero():
    assert as_draw(3, 5) == Draw(3, 0)
    assert as_draw(torch.tensor(3), 5) == Draw(3, 0)
    assert as_draw(Draw(-2, 9), 5) == Draw(3, 9)


@pytest.mark.parametrize(
    ("key", "error", "message"),
    [
        (5, IndexError, r"below 5, the number of samples; got 5"),
        (Draw(-6, 0), IndexError, r"got -6"),
        (slice(2), TypeError, r"an index or a Draw; got slice"),
        ("3", TypeError, r"got str"),
    ],
)
def test_what_is_no_draw_is_refused(key, error, message):
    with pytest.raises(error, match=message):
        as_draw(key, 5)
