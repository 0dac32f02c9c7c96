"""Every instruction set that this machine can run gets the tests of this folder that compute, in a child process.

A process has one set, chosen before anything compiles. The set of this process is tested by those modules themselves.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tpcpu.kernels.isa import available, selected

ROOT = Path(__file__).parents[2]
MODULES = ("pack", "linear", "by_heads", "activations", "attention", "experts")
LONG = ("attention", "experts", "company", "joining", "ceilings")
"""With every format of the cache, and with all that a step has: minutes of compiling a set, so in long runs."""
OTHERS = [isa.name for isa in available() if isa is not selected()]
RUNS = [(isa, module) for isa in OTHERS for module in MODULES]
LONG_RUNS = [(isa, module) for isa in OTHERS for module in LONG]
ONE_CACHE = {"avx512": "bf16", "avx2": "int8", "generic": "float32"}
"""Attention compiles for 20 s a format of the cache: one format each, all of them in long runs."""


def usual(isa: str, module: str) -> str | None:
    """The tests of a module that are not left to long runs; None: all."""
    if module == "experts":
        return "nf4-False or layer"
    return ONE_CACHE[isa] if module == "attention" else None


def python(*arguments: str, isa: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """A child with another instruction set."""
    environment = {**os.environ, "TPCPU_ISA": isa}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=timeout
    )


def run_tests(isa: str, module: str, only: str | None) -> subprocess.CompletedProcess[str]:
    """A module's tests; those whose names hold `only`."""
    chosen = ("-k", only) if only else ()
    arguments = ("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *chosen, f"tests/kernels/test_{module}.py")
    return python(*arguments, isa=isa, timeout=220)


def assert_passed(run: subprocess.CompletedProcess[str]) -> None:
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    summary = run.stdout.splitlines()[-1]
    assert " passed" in summary
    assert "skipped" not in summary


@pytest.mark.parametrize(("isa", "module"), RUNS)
def test_operations(isa, module):
    assert_passed(run_tests(isa, module, usual(isa, module)))


@pytest.mark.full
@pytest.mark.parametrize(("isa", "module"), LONG_RUNS)
def test_operations_in_company(isa, module):
    assert_passed(run_tests(isa, module, None))


@pytest.mark.parametrize("isa", [isa.name for isa in available()])
def test_a_forced_set_is_the_one_that_is_used(isa):
    """No wider register than the set's appears in what is compiled under it."""
    run = python("-c", SHOW_REGISTERS, isa=isa, timeout=120)
    assert run.returncode == 0, run.stderr
    name, registers = run.stdout.split(maxsplit=1)
    assert name == isa
    widest = {"avx512_vnni": "zmm", "avx512": "zmm", "avx2": "ymm", "generic": "xmm"}[isa]
    for register in ("zmm", "ymm", "xmm"):
        if register == widest:
            break
        assert register not in registers
    assert ("vpdpbusd" in registers) == (isa == "avx512_vnni")


SHOW_REGISTERS = """
import re
from tpcpu.kernels import isa, record
from tpcpu.kernels.compile import prepare
if isa.selected().panel_rows == 1:
    from tpcpu.kernels.linear_plain import linear
else:
    from tpcpu.kernels.linear import linear
from numba import cfunc, types
kernel = linear(record.INT8, False)
made = cfunc(types.void(types.int64, types.int64, types.int64), error_model="numpy")(kernel._function)
text = made._library.get_asm_str()
print(isa.selected().name, *sorted(set(re.findall(r"[xyz]mm|vpdpbusd", text))))
"""


OTHER_CPU = """
import sys
from tpcpu.kernels import isa
asked = isa.prefetches()
isa.prefetches = lambda: not asked
import pytest
chosen = ["tests/kernels/test_linear.py", "-k", "shapes and (nf4 or bf16)"]
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *chosen]))
"""


@pytest.mark.skipif(selected().panel_rows == 1, reason="plain kernels have one way")
def test_weights_are_streamed_as_on_other_cpus(tmp_path):
    """Whether weights are asked for ahead, and how many panels go side by side, depends on the CPU; sums do not."""
    environment = {**os.environ, "TPCPU_CACHE_DIR": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", OTHER_CPU], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=280
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert " passed" in run.stdout.splitlines()[-1]


@pytest.mark.parametrize("isa", ["avx1024", "AVX2", "neon"])
def test_an_unknown_set_is_one_line(isa):
    """A user's mistake: exit code 2 and no traceback."""
    run = python("-m", "tpcpu", "quantize", "nowhere", "elsewhere", isa=isa)
    assert run.returncode == 2, run.stderr
    (line,) = run.stderr.strip().splitlines()
    assert f"TPCPU_ISA={isa} is unknown" in line
    assert "generic" in line
