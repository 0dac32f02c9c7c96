"""`tpcpu bench` as a person starts it: every key, and figures that agree with one another."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.configs import PUBLISHED
from tests.e2e.test_commands import YUAN, assert_refused, run
from tpcpu.bench.times import CLASSES

KEYS = set(
    "model ranks threads_per_rank isa arithmetic weight_bytes_per_token weight_bytes_per_rank bits_per_nf4_weight "
    "read_bandwidth_gbs prefill_tokens_per_s prefill_gops int8_peak_gops fma_peak_gflops arithmetic_fraction "
    "decode_tokens_per_s decode_ms_per_token bandwidth_fraction time_share load_s load_gbs compile_s peak_rss_gb "
    "runs slow_ranks prompt_tokens new_tokens batch prefill_time_share prefill_attention_gflops "
    "prefill_attention_fraction prefill_outside_attention_tokens_per_s".split()
)
SHORT = ("--prompt-tokens", "8", "--new-tokens", "8", "--runs", "2", "--json")


def bench(*arguments: str | Path, launcher: tuple[str, ...] = ()) -> dict:
    done = run("bench", *arguments, *SHORT, launcher=launcher)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    return json.loads(done.stdout)


def assert_consistent(found: dict) -> None:
    runs = found["runs"]
    assert found["decode_tokens_per_s"] == pytest.approx(np.median(runs["decode_tokens_per_s"]))
    assert found["prefill_tokens_per_s"] == pytest.approx(np.median(runs["prefill_tokens_per_s"]))
    assert len(runs["decode_tokens_per_s"]) == len(runs["prefill_tokens_per_s"]) == len(runs["bandwidth_fraction"]) == 2
    assert found["decode_ms_per_token"] == pytest.approx(1e3 / found["decode_tokens_per_s"])
    loops = runs["read_bandwidth_gbs"]
    assert len(loops) >= 4
    assert {len(values) for values in loops.values()} == {3}
    assert found["read_bandwidth_gbs"] == max(max(values) for values in loops.values())
    gbs = found["weight_bytes_per_token"] * found["decode_tokens_per_s"] / found["batch"] / 1e9
    assert found["bandwidth_fraction"] == pytest.approx(gbs / found["read_bandwidth_gbs"])
    peak = found["int8_peak_gops"] if found["arithmetic"] == "int8" else found["fma_peak_gflops"]
    assert found["arithmetic_fraction"] == pytest.approx(found["prefill_gops"] / peak)
    for share in (found["time_share"], found["prefill_time_share"]):
        assert tuple(share) == CLASSES
        assert sum(share.values()) == pytest.approx(1)
        assert min(share.values()) >= 0
    assert 0 < found["prefill_attention_gflops"] < found["fma_peak_gflops"]
    fraction = found["prefill_attention_gflops"] / found["fma_peak_gflops"]
    assert found["prefill_attention_fraction"] == pytest.approx(fraction)
    assert found["prefill_outside_attention_tokens_per_s"] > 0
    assert len(found["weight_bytes_per_rank"]) == found["ranks"]
    # Rows that fill up a panel are held and not counted.
    assert 1 <= sum(found["weight_bytes_per_rank"]) / found["weight_bytes_per_token"] < 1.05
    assert sum(found["weight_bytes_per_rank"]) / 1e9 < found["peak_rss_gb"] < 2 * found["ranks"]
    assert min(found["load_s"], found["load_gbs"], found["compile_s"]) > 0


@pytest.mark.parametrize(
    ("launcher", "ranks", "threads"),
    [((), 1, 2), pytest.param((), 2, 1, marks=pytest.mark.full), (("mpiexec", "-n", "2"), 2, 1)],
    ids=["one rank", "--ranks 2", "mpiexec -n 2"],
)
def test_every_key_is_there_and_they_agree(launcher, ranks, threads):
    flags = ("--threads", str(threads)) if launcher else ("--ranks", str(ranks), "--threads", str(threads))
    found = bench("--model", YUAN, "--format", "nf4", *flags, launcher=launcher)
    assert set(found) == KEYS
    assert (found["model"], found["ranks"], found["threads_per_rank"]) == ("yuan-tiny", ranks, threads)
    assert_consistent(found)
    assert 4.12 < found["bits_per_nf4_weight"] < 4.2
    assert (found["time_share"]["all_reduce"] > 0) == (ranks > 1)
    assert found["time_share"]["conv"] > 0


def test_operations_and_exact_arithmetic():
    found = bench("--model", YUAN, "--exact", "--ranks", "1", "--operations")
    assert set(found) == KEYS | {"operations", "prefill_operations"}
    assert found["arithmetic"] == "float32"
    assert found["bits_per_nf4_weight"] is None
    assert_consistent(found)
    rows = found["operations"]
    assert sum(row["nbytes"] for row in rows if row["kind"] in ("linear", "conv")) == found["weight_bytes_per_token"]
    inside = sum(row["inside"] + row["after"] for row in rows) / 1e3
    assert 0 < inside < 20 * found["decode_ms_per_token"]


def test_several_requests_at_a_time_and_prompts_of_several_lengths():
    """A batch shares one reading of the weights; the sweep's first length is what stands at the top."""
    flags = ("--prompt-tokens", "24,8", "--new-tokens", "6", "--runs", "2", "--batch", "3", "--json")
    done = run("bench", "--model", YUAN, "--format", "nf4", "--ranks", "1", *flags)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    sweep = found.pop("sweep")
    assert found == sweep[0]
    assert [each["prompt_tokens"] for each in sweep] == [24, 8]
    for each in sweep:
        assert set(each) == KEYS
        assert each["batch"] == 3
        assert_consistent(each)


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.full), 2])
def test_a_cached_beginning_and_a_replayed_text(tmp_path, ranks):
    """Of a text that repeats itself all drafts are right, as many as were asked for."""
    text = tmp_path / "ids.json"
    text.write_text(json.dumps(list(range(100, 107)) * 30))
    flags = ("--prompt-tokens", "150", "--new-tokens", "48", "--runs", "2", "--cached-tokens", "128", "--json")
    drafts = ("--speculate", "7", "--replay", text)
    done = run("bench", "--model", YUAN, "--format", "nf4", "--ranks", str(ranks), "--threads", "1", *flags, *drafts)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    cached = {"ttft_ms", "cached_ttft_ms", "cached_ttft_ratio"}
    drafted = {"speculate_tokens_per_s", "plain_tokens_per_s", "speculate_ratio", "drafted_tokens", "accepted_tokens"}
    assert set(found) == KEYS | cached | drafted | {"speculate_steps"}
    # 128 of 150 tokens are in pages that another request has filled.
    assert 0 < found["cached_ttft_ratio"] < 0.9
    assert found["accepted_tokens"] == found["drafted_tokens"] > 30
    assert found["speculate_steps"] + found["accepted_tokens"] == 48


def test_a_replayed_text_is_read_by_the_models_tokenizer(tmp_path):
    text = tmp_path / "story.txt"
    text.write_text("Once upon a time there was a cat. " * 12)
    flags = (
        "--prompt-tokens",
        "16",
        "--new-tokens",
        "40",
        "--runs",
        "1",
        "--speculate",
        "4",
        "--replay",
        text,
        "--json",
    )
    done = run("bench", "--model", YUAN, "--ranks", "1", *flags)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["accepted_tokens"] > 20


def test_a_share_alone_and_ranks_without_exchange(tmp_path):
    """Rank 1 of 3 holds about a third; its exchanges, like those of ranks that do not speak, are copies."""
    config = tmp_path / "small.json"
    config.write_text(json.dumps(PUBLISHED["yuan2-2b"] | {"num_hidden_layers": 2, "vocab_size": 4000}))
    source = ("--config", config, "--fake-weights")
    whole = bench(*source, "--ranks", "1")
    part = bench(*source, "--as-rank", "1/3")
    silent = bench(*source, "--ranks", "2", "--no-exchange")
    for found in (whole, part, silent):
        assert found["model"] == "small"
        assert_consistent(found)
    assert part["ranks"] == 1
    assert part["weight_bytes_per_token"] == pytest.approx(whole["weight_bytes_per_token"] / 3, rel=0.05)
    assert silent["weight_bytes_per_token"] == pytest.approx(whole["weight_bytes_per_token"], rel=0.01)
    assert 0 < part["time_share"]["all_reduce"] < 0.5
    assert 0 < silent["time_share"]["all_reduce"] < 0.5
    assert whole["time_share"]["all_reduce"] == 0


def test_an_all_reduce_is_timed_beside_mpi():
    found = bench("--model", YUAN, "--ranks", "2", "--threads", "1", "--all-reduce", "32768")
    names = {"all_reduce_us", "mpi_all_reduce_us"}
    assert set(found) == KEYS | names
    assert_consistent(found)
    for name in names:
        assert len(found["runs"][name]) == 9
        assert found[name] == np.median(found["runs"][name])
        assert 0.5 < found[name] < 10_000


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (("--context", "20", "--prompt-tokens", "16", "--new-tokens", "8"), ("need a context of 24", "it is 20")),
        (("--as-rank", "0/4000"), ("4000 ranks are more than",)),
        (("--batch", "500"), ("--batch 500", "a step can take")),
        (("--batch", "20", "--cache-tokens", "512"), ("--batch 20 with 192 tokens each", "raise --cache-tokens")),
        (("--speculate", "4"), ("--speculate and --replay belong together",)),
        (("--replay", "x", "--speculate", "4"), ("--replay x: cannot be read",)),
    ],
)
def test_what_cannot_work_is_refused(flags, parts):
    assert_refused(run("bench", "--model", YUAN, "--ranks", "1", *flags), *parts)


def test_ranks_that_were_started_pass_a_mistake_on():
    done = run("bench", "--model", YUAN, "--ranks", "2", "--context", "8", "--json")
    assert_refused(done, "need a context of 192")
