"""Advice that can be read back from the kernel."""

import re
import sys
from pathlib import Path

import pytest
import torch

from efficient_attention import attend, summarize
from efficient_attention.ops import huge_pages


def flags(address):
    """The flags of the memory that an address is in; "hg" among them: on large pages, please."""
    mine = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            mine = int(found[1], 16) <= address < int(found[2], 16)
        elif mine and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise AssertionError(f"nothing is at {address:x}")


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists(),
    reason="this kernel has no large pages to give",
)
def test_large_results_and_no_others_are_on_large_pages():
    key = torch.randn(1, 1, 20, 8)
    memory = summarize(key, torch.randn(1, 1, 20, 64))
    large = attend(torch.randn(1, 1, 200_000, 8), memory)
    assert large.nbytes >= huge_pages.SMALLEST
    middle = large.data_ptr() + large.nbytes // 2
    assert "hg" in flags(middle)
    small = attend(torch.randn(1, 1, 20_000, 8), memory)
    channel_major = attend(torch.randn(1, 1, 8, 200_000).mT, memory)
    for x in (small, channel_major):
        assert "hg" not in flags(x.data_ptr() + x.nbytes // 2)


def test_other_systems_are_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    huge_pages._advise.cache_clear()
    x = torch.empty(huge_pages.SMALLEST, dtype=torch.uint8)
    assert huge_pages.on_huge_pages(x) is x
    assert huge_pages._advise() is None
    huge_pages._advise.cache_clear()
