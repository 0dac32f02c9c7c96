"""How much the cache holds: what was asked for, else a few contexts, else what memory allows."""

from types import SimpleNamespace
from typing import Any

import pytest

from tests.fake_engine import PROGRAM
from tpcpu.engine import room
from tpcpu.engine.cache import Layout
from tpcpu.errors import UsageError
from tpcpu.parallel.limits import available_bytes
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
        "sys/fs/cgroup/job/memory.stat": "anon 1\ninactive_file 300000\n",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert available_bytes(tmp_path) == 1_300_000
    (tmp_path / "sys/fs/cgroup/job/memory.max").write_text("max")
    assert available_bytes(tmp_path) == 9000 * 1024
    assert available_bytes(tmp_path / "nowhere") is None
    here = available_bytes()
    assert here is not None
    assert here > 1 << 20
