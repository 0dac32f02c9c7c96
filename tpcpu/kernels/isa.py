"""Which instruction set the kernels are written for, chosen once per process.

Knows CPU feature names; imports no compiler. `TPCPU_ISA` forces a set that this CPU can run: LLVM ends the process,
without an exception, over an instruction that its target lacks, so a choice is checked before anything compiles.
"""

import os
import platform
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tpcpu.errors import UsageError


@dataclass(frozen=True)
class Isa:
    """An instruction set: the features it needs, and the compiler's target when it is not simply this CPU."""

    name: str
    lanes: int
    """float32 values in a register."""
    panel_rows: int
    """Rows of a weight that are packed and multiplied together; 1: no vector kernels."""
    needs: frozenset[str]
    """Flags of /proc/cpuinfo."""
    cpu: str
    features: str
    """LLVM's target when this set is forced, so that nothing better is used on a CPU that has it."""


_AVX2 = frozenset({"avx2", "fma", "f16c"})
_AVX512 = _AVX2 | {"avx512f", "avx512bw", "avx512dq", "avx512vl"}

ISAS = (
    Isa("avx512_vnni", 16, 16, _AVX512 | {"avx512_vnni"}, "cascadelake", ""),
    Isa("avx512", 16, 16, _AVX512, "skylake-avx512", ""),
    Isa("avx2", 8, 8, _AVX2, "haswell", "+avx2,+fma,+f16c,+bmi,+bmi2,+lzcnt,+movbe,+popcnt"),
    Isa("generic", 8, 1, frozenset(), "", ""),
)
"""Best first."""


def _cpu_flags() -> frozenset[str]:
    if platform.machine() not in ("x86_64", "AMD64"):
        return frozenset()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            return frozenset(line.split(":", 1)[1].split())
    return frozenset()


def _cpu_vendor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("vendor_id"):
            return line.split(":", 1)[1].strip()
    return ""


def available() -> tuple[Isa, ...]:
    """The sets that this CPU can run, best first."""
    flags = _cpu_flags()
    return tuple(isa for isa in ISAS if isa.needs <= flags)


def forced() -> bool:
    """Whether `TPCPU_ISA` names the set, for which the compiler's target is then fixed."""
    return bool(os.environ.get("TPCPU_ISA"))


def has_byte_permute() -> bool:
    """Whether kernels may look bytes up in tables of 128 (AVX-512 VBMI: Ice Lake, AMD from Zen 4); not where the
    compiler's target is fixed to a CPU without it."""
    return not forced() and selected().lanes == 16 and "avx512vbmi" in _cpu_flags()


def prefetches() -> bool:
    """Whether kernels that stream weights ask for them ahead of their reading.

    Measured on NF4 products from memory, as parts of what the best read loop reaches. Intel Xeon with VNNI: 0.61
    without, 0.80 to 0.91 with. AMD Zen 4: 0.94 without, 0.76 with: there a line that is asked for holds one of the few
    buffers of misses until memory has answered, while the prefetcher of the second-level cache has its own.
    """
    return "AuthenticAMD" not in _cpu_vendor()


@cache
def selected() -> Isa:
    """The set that this process uses. Raises UsageError for a `TPCPU_ISA` that is unknown or not to be had here."""
    able = available()
    name = os.environ.get("TPCPU_ISA")
    if not name:
        return able[0]
    for isa in able:
        if isa.name == name:
            return isa
    known = name in {isa.name for isa in ISAS}
    raise UsageError(
        f"TPCPU_ISA={name} is {'not supported by this CPU' if known else 'unknown'}; "
        f"this CPU runs {', '.join(isa.name for isa in able)}"
    )
