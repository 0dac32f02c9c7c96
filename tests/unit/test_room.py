"""How much the cache holds: what was asked for, else a few contexts, else what memory allows."""

from types import SimpleNamespace
from typing import Any

import pytest

from tests.fake_engine import PROGRAM
from tpcpu.engine import room
from tpcpu.engine.cache import Layout
from tpcpu.errors import UsageError
from tpcpu.parallel.limits import Room, available, held_bytes
from tpcpu.program.kv_format import KV_FORMATS

PLENTY = 1 << 40


def model(most: int) -> Any:
    return SimpleNamespace(config=SimpleNamespace(max_position_embeddings=most))


@pytest.mark.parametrize(
    ("context", "cache_tokens", "fitting", "most", "decided"),
    [
        (None, None, PLENTY, 131072, (8192, 4 * 8192)),
        (None, None, PLENTY, 500, (500, 4 * 512)),
        (None, None, 20_032, 131072, (8192, 20_032)),
        (None, None, 3200, 131072, (3200, 3200)),
        (None, None, 0, 131072, (64, 64)),
        (100, None, PLENTY, 131072, (100, 512)),
        (30_000, None, 3200, 131072, (30_000, 30_016)),
        (None, 1000, PLENTY, 131072, (960, 960)),
        (None, 100_000, 3200, 131072, (8192, 99_968)),
        (500, 1000, PLENTY, 131072, (500, 960)),
    ],
)
def test_context_and_tokens(context, cache_tokens, fitting, most, decided):
    assert room.decide(context, cache_tokens, 64, fitting, model(most)) == decided


def test_half_of_what_is_available():
    layout = Layout(PROGRAM, 64, kv=KV_FORMATS["bf16"])
    # Keys and values of 3 heads of 64 in bfloat16, and a row of each convolution's float32 inputs.
    page = 2 * 64 * 3 * 64 * 2 + 4 * (192 + 96)
    assert layout.bytes_of_page == page
    assert room.tokens_that_fit(layout, 2 * 10 * page) == 640
    assert room.tokens_that_fit(layout, 2 * 10 * page - 2) == 576


@pytest.mark.parametrize(
    ("context", "cache_tokens", "part"),
    [
        (0, None, "--context 0 is impossible: the model was made for 1 to 500"),
        (501, None, "--context 501"),
        (None, 63, "--cache-tokens 63 is less than a page of 64"),
        (130, 130, "at least 192 works"),
    ],
)
def test_what_cannot_be(context, cache_tokens, part):
    with pytest.raises(UsageError, match=part):
        room.check(context, cache_tokens, 64, model(500))


def test_what_a_group_has_left_counts(tmp_path):
    files = {
        "proc/meminfo": "MemTotal: 100 kB\nMemAvailable:   9000 kB\n",
        "proc/self/cgroup": "0::/job\n",
        "sys/fs/cgroup/job/memory.max": "5000000",
        "sys/fs/cgroup/job/memory.current": "4000000",
        "sys/fs/cgroup/job/memory.stat": "anon 1\ninactive_file 300000\nactive_file 200000\n",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert available(tmp_path, {}) == Room(1_500_000, "its control group leaves")
    (tmp_path / "sys/fs/cgroup/job/memory.max").write_text("max")
    assert available(tmp_path, {}) == Room(9000 * 1024, "it has free")
    assert available(tmp_path / "nowhere", {}) is None
    here = available()
    assert here is not None
    assert here.nbytes > 1 << 20


def test_what_slurm_has_granted_counts(tmp_path):
    """Where no control group holds the job to it, too: SLURM looks, and kills."""
    granted = {"SLURM_MEM_PER_NODE": "100"}
    assert available(tmp_path, granted, held=10 << 20) == Room(90 << 20, "SLURM (--mem) leaves")
    assert available(tmp_path, granted, held=200 << 20) == Room(0, "SLURM (--mem) leaves")
    per_cpu = {"SLURM_MEM_PER_CPU": "30", "SLURM_CPUS_ON_NODE": "2"}
    assert available(tmp_path, per_cpu) == Room(60 << 20, "SLURM (--mem) leaves")
    assert available(tmp_path, {"SLURM_MEM_PER_NODE": "0"}) is None
    assert 1 << 20 < held_bytes() < 1 << 36


def test_a_model_that_does_not_fit_is_refused_with_figures():
    free = Room(10_000_000_000, "SLURM (--mem) leaves")
    assert room.shortage(9_000_000_000, 1_000_000_000, 6400, 64, free) is None
    said = str(room.shortage(9_000_000_000, 4_000_000_000, 6400, 64, free))
    assert "weights of its ranks take 9.00 GB and a cache of 6400 tokens 4.00 GB" in said
    assert "but SLURM (--mem) leaves 10.00 GB; a --context or --cache-tokens of 1600 works" in said
    assert "more hosts or a smaller --format" in str(room.shortage(11_000_000_000, 1, 64, 64, free))
