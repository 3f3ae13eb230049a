"""What a rank's process sets up for itself."""

import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

COUNT_FAULTS = """
import resource, torch
from moelab.engine.launch import process
def faults():
    counts = []
    for _ in range(20):
        torch.empty(10 * 2**20).fill_(1.0)  # 40 MiB: by default always a mapping of its own, gone when freed
        counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
    return counts[-1] - counts[4]
before = faults()
print(process.keep_freed_memory(), faults() * 10 < before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_freed_memory_is_used_again_without_page_faults():
    done = subprocess.run([sys.executable, "-c", COUNT_FAULTS], capture_output=True, text=True, check=True)
    assert done.stdout == "True True\n"


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").is_dir(), reason="the kernel has no huge pages")
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_the_heap_asks_for_huge_pages():
    look = (
        "from moelab.engine.launch import process as p; p.keep_freed_memory(); print(open('/proc/self/smaps').read())"
    )
    maps = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True).stdout
    heaps = [flags for part in maps.split("[heap]")[1:] for flags in re.findall("VmFlags: (.*)", part)[:1]]
    assert any("hg" in flags.split() for flags in heaps)
