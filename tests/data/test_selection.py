"""Images of one json are shared out by name or by parts, the same wherever it is done."""

from itertools import pairwise

import pytest

from efficient_attention.data.selection import selected

NAMES = [f"site{i % 3}/{i}.png" for i in range(20)]


def test_patterns_are_those_of_a_shell_and_add_up():
    assert selected(NAMES, patterns=["site1/*", "site0/0.png"]) == {
        "site0/0.png",
        *(f"site1/{i}.png" for i in range(1, 20, 3)),
    }


@pytest.mark.parametrize("cuts", [(0, 0.8, 1), (0, 0.33, 0.4, 0.5, 1)])
def test_shares_that_meet_have_every_name_once(cuts):
    parts = [selected(NAMES, share=share) for share in pairwise(cuts)]
    assert sum(map(len, parts)) == len(NAMES)
    assert set().union(*parts) == set(NAMES)
    assert [len(part) for part in parts] == [
        round(20 * b) - round(20 * a) for a, b in pairwise(cuts)
    ]


def test_shares_follow_from_the_names_alone():
    """Neither from their order nor from the alphabet."""
    share = selected(NAMES, share=(0, 0.5))
    assert selected(reversed(NAMES), share=(0, 0.5)) == share
    assert share not in ({*sorted(NAMES)[:10]}, {*NAMES[:10]})


def test_a_share_is_of_what_the_patterns_leave():
    assert selected(NAMES, patterns=["site1/*"], share=(0, 1)) == selected(
        NAMES, patterns=["site1/*"]
    )
    assert len(selected(NAMES, patterns=["site1/*"], share=(0.5, 1))) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patterns": ["site1/*", "site9/*"]}, "none is 'site9/\\*'"),
        ({"share": (0.5, 0.5)}, r"the first below the second; got \(0.5, 0.5\)"),
        ({"share": (-0.1, 0.5)}, "share must be from 0 to 1"),
        ({"share": (0.5, 1.5)}, "share must be from 0 to 1"),
        ({"share": (0.5, 0.51)}, "images and share must leave an image"),
        ({"patterns": []}, "images and share must leave an image"),
    ],
)
def test_what_selects_nothing_is_an_error(options, message):
    with pytest.raises(ValueError, match=message):
        selected(NAMES, **options)
