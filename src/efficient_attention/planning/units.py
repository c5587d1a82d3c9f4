"""Amounts in the units that suit them, and back."""

from __future__ import annotations

import re

_BINARY = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "PiB": 2**50}
_DECIMAL = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_COUNTS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15}


def parse_bytes(name: str, size: int | str) -> int:
    """Bytes of a size such as ``"8 GiB"`` or ``"500 MB"``, or of a number of bytes.

    Args:
        name: of the argument, for the error.
        size: a number, perhaps with a fraction, and a unit: B, KiB to PiB (powers of 1024), KB to TB (of 1000).

    Raises:
        ValueError: what is given is no positive size.

    Example:
        >>> parse_bytes("budget", "1.5 GiB")
        1610612736
    """
    units = {unit.lower(): factor for unit, factor in (_BINARY | _DECIMAL).items()}
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-zA-Z]*)\s*", str(size))
    unit = found[2].lower() or "b" if found else ""
    if found is None or unit not in units or float(found[1]) == 0:
        raise ValueError(
            f"{name} must be a positive size such as '8 GiB', '500 MB' or a number of bytes; got {size!r}"
        )
    return round(float(found[1]) * units[unit])


def in_bytes(size: int) -> str:
    """Bytes with three digits that count.

    Example:
        >>> in_bytes(576 * 2**30), in_bytes(1_500_000)
        ('576 GiB', '1.43 MiB')
    """
    return _in_units(size, _BINARY)


def in_counts(number: int) -> str:
    """A number with three digits that count.

    Example:
        >>> in_counts(5_224_768)
        '5.22 M'
    """
    return _in_units(number, _COUNTS)


def _in_units(amount: int, units: dict[str, int]) -> str:
    # A number that would be rounded to the next unit is given in it.
    unit, size = [u for u in units.items() if u[1] == 1 or amount >= 0.9995 * u[1]][-1]
    share = amount / size
    decimals = 0 if size == 1 or share >= 99.95 else 1 if share >= 9.995 else 2
    return f"{share:,.{decimals}f} {unit}".rstrip()
