"""Amounts in words, and back."""

import pytest

from efficient_attention.planning.units import in_bytes, in_counts, parse_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8 GiB", 8 * 2**30),
        ("8gib", 8 * 2**30),
        ("1.5 KiB", 1536),
        (".5 MiB", 2**19),
        ("500 MB", 500_000_000),
        ("2 TB", 2 * 10**12),
        ("12", 12),
        ("12 B", 12),
        (12, 12),
        (2**40, 2**40),
    ],
)
def test_sizes_are_read_in_all_units(text, size):
    assert parse_bytes("budget", text) == size


@pytest.mark.parametrize(
    "text", ["", "GiB", "8 GiBs", "8 G", "-8 GiB", "8,5 GiB", "0", 0, -1, None, "1e9"]
)
def test_what_is_no_size_is_named_with_what_was_expected(text):
    with pytest.raises(
        ValueError, match="budget must be a positive size such as '8 GiB'"
    ) as caught:
        parse_bytes("budget", text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1,023 B"),
        (1024, "1.00 KiB"),
        (1536, "1.50 KiB"),
        (1023.9 * 2**20, "1.00 GiB"),
        (1023.4 * 2**20, "1,023 MiB"),
        (99.96 * 2**20, "100 MiB"),
        (12.34 * 2**20, "12.3 MiB"),
        (576 * 2**30, "576 GiB"),
        (5 * 2**50, "5.00 PiB"),
    ],
)
def test_bytes_are_written_with_three_digits(size, text):
    assert in_bytes(int(size)) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [(216, "216"), (999, "999"), (1000, "1.00 k"), (5_224_768, "5.22 M"), (118 * 10**12, "118 T")],
)
def test_numbers_are_written_with_three_digits(number, text):
    assert in_counts(number) == text
