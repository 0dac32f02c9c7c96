"""Which instruction set is chosen, from what the CPU says and what the user asks for."""

import pytest

from tpcpu.errors import UsageError
from tpcpu.kernels import isa

AVX2 = isa._AVX2
CPUS = {
    "cascade lake": (isa._AVX512 | {"avx512_vnni", "sse2"}, ["avx512_vnni", "avx512", "avx2", "generic"]),
    "skylake server": (isa._AVX512, ["avx512", "avx2", "generic"]),
    "zen 2": (AVX2 | {"sse4a"}, ["avx2", "generic"]),
    "avx2 without fma": (frozenset({"avx2", "f16c"}), ["generic"]),
    "not x86": (frozenset(), ["generic"]),
}


@pytest.fixture
def cpu(monkeypatch, request):
    flags, names = CPUS[request.param]
    monkeypatch.setattr(isa, "_cpu_flags", lambda: frozenset(flags))
    monkeypatch.delenv("TPCPU_ISA", raising=False)
    return names


# `selected` remembers what this process has chosen: the tests ask what lies below.
choose = isa.selected.__wrapped__


@pytest.mark.parametrize("cpu", CPUS, indirect=True)
def test_the_best_of_what_a_cpu_has(cpu):
    assert [each.name for each in isa.available()] == cpu
    assert choose().name == cpu[0]


@pytest.mark.parametrize("cpu", CPUS, indirect=True)
def test_each_of_them_can_be_forced(cpu, monkeypatch):
    for name in cpu:
        monkeypatch.setenv("TPCPU_ISA", name)
        assert choose().name == name


@pytest.mark.parametrize("cpu", ["zen 2"], indirect=True)
@pytest.mark.parametrize(
    ("name", "why"), [("avx512", "not supported by this CPU"), ("avx-512", "unknown"), ("AVX2", "unknown")]
)
def test_what_cannot_be_forced(cpu, monkeypatch, name, why):
    monkeypatch.setenv("TPCPU_ISA", name)
    with pytest.raises(UsageError, match=f"TPCPU_ISA={name} is {why}; this CPU runs {', '.join(cpu)}"):
        choose()


@pytest.mark.parametrize("cpu", ["zen 2"], indirect=True)
def test_an_empty_variable_chooses_nothing(cpu, monkeypatch):
    monkeypatch.setenv("TPCPU_ISA", "")
    assert choose().name == cpu[0]


def test_flags_are_read_from_this_machine():
    flags = isa._cpu_flags()
    assert not flags or "sse2" in flags


def test_sets_and_registers():
    """A panel is a register of float32 rows, or one row where there are no vector kernels; names are names."""
    assert len({each.name for each in isa.ISAS}) == len(isa.ISAS)
    assert all(each.panel_rows in (each.lanes, 1) for each in isa.ISAS)
    assert not isa.ISAS[-1].needs
