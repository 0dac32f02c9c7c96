"""The folder of compiled kernels is named after the compiler's target: this machine's CPU, unless a set is forced."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

PROGRAM = """
import sys
import llvmlite.binding as llvm
if sys.argv[1:]:
    llvm.get_host_cpu_name = lambda: sys.argv[1]
from tpcpu.kernels.compile import folder
print(folder().name)
"""


@pytest.fixture
def folder_name(tmp_path: Path) -> Callable[[str, str], str]:
    """As a process sees it that is told another name of the CPU that it runs on, and to take a set of instructions."""

    def name(cpu: str, isa: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, *filter(None, [cpu])],
            env={**os.environ, "TPCPU_ISA": isa, "TPCPU_CACHE_DIR": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        return done.stdout.strip()

    return name


def test_another_cpu_has_another_folder_unless_the_set_is_forced(folder_name):
    """A home directory may be shared by unlike machines; a forced set is compiled alike for all of them."""
    own = folder_name("", "")
    assert folder_name("znver9", "") != own
    assert folder_name("znver9", "generic") == folder_name("", "generic") != own
