"""Cores and memory that a process may use, on systems with and without Linux's files."""

from __future__ import annotations

import os
import resource
import subprocess
import sys

import pytest
from conftest import ROOT

from liteguard import limits, machine
from liteguard.data.shards import Cleaner

GB = 10**9


@pytest.fixture
def system(tmp_path, monkeypatch):
    """A machine with 64 GB, of which 40 are free, and no control groups; returns a writer."""
    for name, place in (("MEMORY_INFO", "meminfo"), ("OWN_GROUPS", "own"), ("GROUPS", "groups")):
        monkeypatch.setattr(limits, name, tmp_path / place)

    def write(place: str, text: str) -> None:
        path = tmp_path / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    kib = {"MemTotal": 64, "MemAvailable": 38, "SwapFree": 2}
    write("meminfo", "".join(f"{name}: {n * GB // 1024} kB\n" for name, n in kib.items()))
    return write


def near(gigabytes: float):
    return pytest.approx(gigabytes * GB, rel=1e-6)


def test_without_groups_memory_is_what_the_machine_has(system):
    assert limits.available_memory() == near(40) and limits.total_memory() == near(64)


def test_the_tightest_group_counts_version_2(system):
    system("own", "0::/user/job\n")
    system("groups/memory.max", "max\n")
    system("groups/user/memory.max", f"{16 * GB}\n")
    system("groups/user/memory.current", f"{10 * GB}\n")
    system("groups/user/memory.stat", f"anon {6 * GB}\ninactive_file {3 * GB}\n")
    system("groups/user/job/memory.max", f"{20 * GB}\n")
    system("groups/user/job/memory.current", f"{1 * GB}\n")
    assert limits.available_memory() == near(16 - 7)
    assert limits.total_memory() == near(16)


def test_a_container_sees_its_own_group_as_the_root(system):
    system("own", "0::/docker/0123\n")
    system("groups/memory.max", f"{8 * GB}\n")
    system("groups/memory.current", f"{2 * GB}\n")
    assert limits.available_memory() == near(6)


def test_version_1_has_other_files_and_a_number_for_no_limit(system):
    system("own", "9:name=systemd:/\n4:cpu,memory:/job\n0::/\n")
    system("groups/memory/memory.limit_in_bytes", f"{2**63 - 4096}\n")
    system("groups/memory/memory.usage_in_bytes", f"{30 * GB}\n")
    assert limits.available_memory() == near(40)
    system("groups/memory/job/memory.limit_in_bytes", f"{12 * GB}\n")
    system("groups/memory/job/memory.usage_in_bytes", f"{5 * GB}\n")
    system("groups/memory/job/memory.stat", f"cache 1\ntotal_inactive_file {4 * GB}\n")
    assert limits.available_memory() == near(11)
    assert machine.available_memory() == near(11)  # what every script asks


def test_without_proc_nothing_is_claimed_to_be_free(system, tmp_path):
    (tmp_path / "meminfo").unlink()
    assert limits.available_memory() is None
    assert limits.total_memory() == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    machine.require_memory(10**15, "training", ".")  # not known: not refused


def test_cores_where_a_process_has_no_affinity(monkeypatch):
    assert limits.cores() == len(os.sched_getaffinity(0))
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert limits.cores() == 7
    assert Cleaner()._workers == 7
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert limits.cores() == 1


@pytest.mark.parametrize(
    ("own", "files", "wanted"),
    [
        ("0::/user/job\n", {"cpu.max": "max 100000\n"}, 64),
        ("0::/user/job\n", {"user/cpu.max": "150000 100000\n"}, 2),  # one and a half
        ("0::/docker/0123\n", {"cpu.max": "50000 100000\n"}, 1),  # as a container sees it
        ("4:cpu,cpuacct:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "9\n"}, 64),
        (
            "4:cpu,cpuacct:/job\n",
            {"cpu/job/cpu.cfs_quota_us": "300000\n", "cpu/job/cpu.cfs_period_us": "100000\n"},
            3,
        ),
    ],
)
def test_cores_are_those_that_the_groups_give_time_for(system, monkeypatch, own, files, wanted):
    """`docker run --cpus 2` on a machine of 64 takes none of them away by affinity."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {*range(64)})
    system("own", own)
    for name, text in files.items():
        system(f"groups/{name}", text)
    assert limits.cores() == wanted


def test_peak_memory_is_counted_in_bytes_on_macos(monkeypatch):
    assert limits.peak_memory(1000) == 1_024_000
    monkeypatch.setattr(sys, "platform", "darwin")
    assert limits.peak_memory(1000) == 1000
    monkeypatch.setattr(machine.Path, "read_text", lambda *_, **__: (_ for _ in ()).throw(OSError))
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert machine.peak_rss_gb() == pytest.approx(most / 1e9, abs=0.002)


@pytest.mark.parametrize("script", ["train_domain", "doctor"])
def test_windows_itself_is_refused_with_the_reason(script):
    code = (
        "import runpy, sys\nsys.platform, sys.argv = 'win32', ['x', '--help']\n"
        "sys.modules['fcntl'] = sys.modules['resource'] = None\n"
        f"runpy.run_path('{script}.py', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "WSL 2" in done.stderr and "no Windows build" in done.stderr
