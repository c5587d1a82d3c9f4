"""The memory counter against sizes known beforehand, and against the operating system."""

import os
import subprocess
import sys

import pytest
import torch

import efficient_attention
from efficient_attention import memory
from efficient_attention.memory import peak_bytes


def test_peak_counts_what_is_alive_at_one_time():
    def function():
        for _ in range(3):
            torch.ones(1000)  # 4,000 bytes, released before the next
        return torch.ones(250)

    assert peak_bytes(function) == 4000


def test_peak_counts_the_result():
    assert peak_bytes(lambda: [torch.ones(100), torch.ones(100)]) == 800


def test_peak_counts_temporaries_inside_one_operator():
    x = torch.ones(64, 1000).t()  # softmax copies a tensor whose last stride is not one
    assert 2 * x.nbytes <= peak_bytes(lambda: x.softmax(-1)) < 2.2 * x.nbytes


def test_peak_does_not_count_what_was_there():
    x = torch.ones(1000)
    assert peak_bytes(lambda: x.add_(1)) < 100


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_resident_memory_agrees_that_nothing_large_is_held():
    # Loosely: the allocator and the page cache have their own minds. Eager attention takes 256 MB beside the output.
    code = """
import torch, efficient_attention as ea
def status(field):
    return int(next(l for l in open("/proc/self/status") if l.startswith(field)).split()[1]) * 1024
q, k, v = (torch.randn(1, 8, 65536, 64) for _ in range(3))
ea.efficient_attention(*(x[:, :, :2048] for x in (q, k, v)))
with open("/proc/self/clear_refs", "w") as f:
    f.write("5")  # the peak is counted from here
before = status("VmRSS")
out = ea.efficient_attention(q, k, v)
print(status("VmHWM") - before - out.nbytes)
"""
    path = {"PYTHONPATH": efficient_attention.__path__[0] + "/.."}
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, env=path, capture_output=True, text=True
    )
    assert int(done.stdout) < 64_000_000


def test_machine_has_what_the_operating_system_says():
    page, pages = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_PHYS_PAGES")
    assert 0 < memory.device_bytes(torch.device("cpu")) <= page * pages


def test_nothing_is_known_of_a_device_without_memory():
    assert memory.device_bytes(torch.device("meta")) is None
    memory.refuse_beyond(2**70, torch.device("meta"), "nothing", "")


@pytest.mark.parametrize(
    ("membership", "limits"),
    [
        ("0::/user/me\n", {"user/me/memory.max": "max", "user/memory.max": "3000"}),
        ("4:memory:/a\n3:cpu:/b\n", {"memory/a/memory.limit_in_bytes": "3000"}),
        ("0::/\n", {"memory.max": "3000"}),
    ],
)
def test_limits_of_control_groups_are_found_in_both_versions(tmp_path, membership, limits):
    (tmp_path / "cgroup").write_text(membership)
    for name, limit in limits.items():
        path = tmp_path / "mount" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(limit + "\n")
    assert memory._control_group_limits(tmp_path / "cgroup", tmp_path / "mount") == [3000]


def test_system_without_control_groups_has_no_limits(tmp_path):
    assert memory._control_group_limits(tmp_path / "nothing", tmp_path) == []


@pytest.mark.parametrize(
    ("membership", "files"),
    [
        (
            "0::/me\n",
            {
                "me/memory.max": "3000",
                "me/memory.current": "2500",
                "me/memory.stat": "anon 1900\nactive_file 400\ninactive_file 200\nfile 600",
                "memory.max": "max",
            },
        ),
        (
            "4:memory:/a\n",
            {
                "memory/a/memory.limit_in_bytes": "3000",
                "memory/a/memory.usage_in_bytes": "2500",
                "memory/a/memory.stat": "active_file 1\ntotal_active_file 400\ntotal_inactive_file 200",
            },
        ),
    ],
)
def test_room_in_a_control_group_is_what_is_not_used_and_its_caches(tmp_path, membership, files):
    (tmp_path / "cgroup").write_text(membership)
    for name, text in files.items():
        path = tmp_path / "mount" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    # 3000 - 2500 + 400 + 200
    assert memory._control_group_room(tmp_path / "cgroup", tmp_path / "mount") == [1100]


def test_what_is_available_is_there_and_positive():
    device = torch.device("cpu")
    assert 0 < memory.available_bytes(device) <= memory.device_bytes(device)
    assert memory.available_bytes(torch.device("meta")) is None
