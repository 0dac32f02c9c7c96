"""What `tests/bench/against_llama_cpp.py` does without llama.cpp and gguf: plans of files, reading output, verdicts."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.bench.against_llama_cpp import Visit, pairs, report, verdict
from tests.bench.gguf_model import BLOCKS, FORMATS, Tensor, bytes_per_token, random_blocks, tensors
from tests.bench.llama_cpp_peer import Work, huge_page_gb, llama_bench_commands, parse_llama_bench
from tests.bench.visits import parse_bench
from tests.configs import PUBLISHED
from tpcpu.errors import TpcpuError

SCRIPT = Path(__file__).parents[1] / "bench" / "against_llama_cpp.py"

SHAPE = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
}

CODEBOOK = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113])


def nibbles(packed):
    return np.concatenate([packed & 15, packed >> 4], axis=1).astype(np.int32)


def six_bit(packed):
    """The 8 scales and 8 least values of Q4_K's 12 bytes, after ggml's get_scale_min_k4."""
    low, high, rest = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([low & 63, (rest & 15) | (low >> 6 << 4)], axis=1)
    return scales, np.concatenate([high & 63, (rest >> 4) | (high >> 6 << 4)], axis=1)


def weights(type_name, blocks):
    """What blocks stand for, by the formulas of ggml; the order within a block aside."""
    d = blocks["d"].astype(np.float64)[:, None]
    if type_name == "Q4_0":
        return d * (nibbles(blocks["q"]) - 8)
    if type_name == "IQ4_NL":
        return d * CODEBOOK[nibbles(blocks["q"])]
    if type_name == "Q6_K":
        low = nibbles(blocks["q"])
        high = np.concatenate([blocks["h"] >> shift & 3 for shift in (0, 2, 4, 6)], axis=1)
        return d * np.repeat(blocks["s"].astype(np.int32), 16, axis=1) * ((low | high.astype(np.int32) << 4) - 32)
    scales, least = (np.repeat(each.astype(np.int32), 32, axis=1) for each in six_bit(blocks["s"]))
    return d * scales * nibbles(blocks["q"]) - blocks["dmin"].astype(np.float64)[:, None] * least


@pytest.mark.parametrize("type_name", ["Q4_0", "IQ4_NL", "Q4_K", "Q6_K"])
def test_random_blocks_are_valid_weights_of_the_width_asked_for(type_name):
    tensor = Tensor("blk.0.ffn_up.weight", 64, 2048, type_name)
    blocks = random_blocks(tensor, np.random.default_rng(0), 0.02)
    assert blocks.nbytes == tensor.nbytes
    made = weights(type_name, blocks)
    assert made.size == 64 * 2048
    assert np.isfinite(made).all()
    assert abs(made.mean()) < 0.005
    assert 0.016 < made.std() < 0.024
    smallest = np.finfo(np.float16).smallest_normal
    assert all((blocks[field] >= smallest).all() for field in BLOCKS[type_name].scales)


@pytest.mark.parametrize(("type_name", "bits"), [("Q4_0", 4.5), ("IQ4_NL", 4.5), ("Q4_K", 4.5), ("Q6_K", 6.5625)])
def test_blocks_have_the_sizes_of_ggml(type_name, bits):
    block = BLOCKS[type_name]
    assert 8 * block.layout.itemsize / block.weights == bits


def test_a_norm_is_one_everywhere():
    made = random_blocks(Tensor("output_norm.weight", 1, 96, "F32"), np.random.default_rng(0))
    assert made["value"].tolist() == [1.0] * 96


def test_every_format_holds_the_whole_model():
    for name in FORMATS:
        held = {each.name: each for each in tensors(SHAPE, name)}
        assert len(held) == 3 + 9 * 16
        assert sum(each.rows * each.columns for each in held.values()) == 1_104_218_112
        assert held["output.weight"].type == "Q6_K"
        assert (held["blk.3.attn_k.weight"].rows, held["blk.3.attn_k.weight"].columns) == (512, 2048)
        assert (held["blk.3.ffn_down.weight"].rows, held["blk.3.ffn_down.weight"].columns) == (2048, 8192)


def test_q4_k_m_keeps_more_bits_where_llama_quantize_does():
    better = [int(each.name.split(".")[1]) for each in tensors(SHAPE, "Q4_K_M") if each.name.endswith("down.weight")
              and each.type == "Q6_K"]  # fmt: skip
    assert better == [0, 1, 4, 7, 10, 13, 14, 15]


def test_an_embedding_counts_where_it_is_the_head_too():
    untied = bytes_per_token(SHAPE, "Q4_0")
    assert untied == sum(each.nbytes for each in tensors(SHAPE, "Q4_0")) - 32000 * 2048 * 18 // 32
    assert bytes_per_token(SHAPE | {"tie_word_embeddings": True}, "Q4_0") == untied


def test_a_width_that_no_block_divides_is_named():
    with pytest.raises(
        ValueError, match=r"Q4_K_M: token_embd.weight has rows of 96 weights, expected a multiple of 256"
    ):
        tensors(SHAPE | {"hidden_size": 96}, "Q4_K_M")


def visit(name, decode, bandwidth, theirs):
    speeds = {how: {"decode": speed, "prefill": prompt} for how, (speed, prompt) in theirs.items()}
    return Visit(name, {"decode": decode, "prefill": 200.0}, 0.8, bandwidth, speeds)


SLOW_THEN_FAST = [
    visit("A", 30.0, 20.0, {"A repacked": (20.0, 100.0), "A as stored": (15.0, 160.0)}),
    visit("B", 30.0, 20.0, {"B repacked": (25.0, 50.0)}),
    visit("A", 60.0, 40.0, {"A repacked": (40.0, 100.0), "A as stored": (30.0, 160.0)}),
    visit("B", 60.0, 40.0, {"B repacked": (40.0, 50.0)}),
]
"""The machine doubles its speed half-way."""


def test_ratios_are_of_neighbours_in_time():
    assert pairs(SLOW_THEN_FAST, "decode") == {
        "A repacked": [1.5, 1.5],
        "A as stored": [2.0, 2.0],
        "B repacked": [1.2, 1.5],
    }


def test_the_best_of_the_peer_counts_for_each_measure_apart():
    found = verdict(SLOW_THEN_FAST, {"A": 500_000_000, "B": 500_000_000})
    assert (found["peer_decode_best"], found["peer_prefill_best"]) == ("B repacked", "A as stored")
    assert found["decode_ratio"] == pytest.approx(1.35)
    assert found["prefill_ratio"] == pytest.approx(1.25)
    assert found["read_bandwidth_gbs"] == 30.0
    assert found["peer_bandwidth_fraction"] == pytest.approx((0.625 + 0.5) / 2)
    assert found["void"] is False


@pytest.mark.parametrize(("megabytes", "void"), [(361, False), (359, True)])
def test_a_peer_under_45_hundredths_of_the_bandwidth_makes_it_void(megabytes, void):
    one = [visit("A", 60.0, 40.0, {"A repacked": (50.0, 100.0)})]
    assert verdict(one, {"A": megabytes * 1_000_000})["void"] is void


def test_the_report_names_every_setting_and_both_ratios():
    lines = report(SLOW_THEN_FAST, {"A": 500_000_000, "B": 500_000_000}, 400_000_000)
    assert "| tpcpu NF4 | 400 | 45.0 (30.0 to 60.0) | 0.80 | 200 (200 to 200) |" in lines
    assert "| A as stored | 500 | 22.5 (15.0 to 30.0) | 0.38 | 160 (160 to 160) |" in lines
    assert "decode: tpcpu is 1.35 (1.20 to 1.50) × llama.cpp's best, B repacked" in lines
    assert "prefill: tpcpu is 1.25 (1.25 to 1.25) × llama.cpp's best, A as stored" in lines


BENCH = {
    "decode_tokens_per_s": 40.0,
    "prefill_tokens_per_s": 200.0,
    "read_bandwidth_gbs": 30.0,
    "bandwidth_fraction": 0.7,
    "weight_bytes_per_token": 571613184,
}


def test_the_last_line_of_bench_is_read():
    assert parse_bench("a line before\n" + json.dumps(BENCH) + "\n") == BENCH


@pytest.mark.parametrize("text", ["", "no JSON", "[1]", json.dumps({k: v for k, v in BENCH.items() if k[0] != "r"})])
def test_a_bench_that_lacks_a_key_is_refused(text):
    with pytest.raises(TpcpuError, match=r"expected JSON with .*read_bandwidth_gbs"):
        parse_bench(text)


def test_llama_bench_is_asked_in_the_words_of_its_version():
    work = Work(threads=2, prompt=16, new=128, prefill=512, runs=1)
    new = llama_bench_commands("llama-bench", "--load-mode <...> --repack <0|1>", "m.gguf", False, work)
    old = llama_bench_commands("llama-bench", "--mmap <0|1>", "m.gguf", True, work)
    assert new["decode"][-8:] == ["--repack", "0", "-p", "0", "-n", "128", "-d", "16"]
    assert new["prefill"][-4:] == ["-p", "512", "-n", "0"]
    assert "-lm" in new["decode"]
    assert old["prefill"][-6:] == ["-mmp", "0", "-p", "512", "-n", "0"]
    assert llama_bench_commands("llama-bench", "--mmap <0|1>", "m.gguf", False, work) is None


def test_llama_bench_output_is_read():
    text = json.dumps([{"build_commit": "0c1e570", "samples_ts": [45.3, 45.2], "n_gen": 128}])
    assert parse_llama_bench(text) == ([45.3, 45.2], "llama-bench 0c1e570")
    for wrong in ("", "[]", '[{"build_commit": "x"}]'):
        with pytest.raises(ValueError, match="expected the JSON of one test"):
            parse_llama_bench(wrong)


def test_huge_pages_are_read():
    assert huge_page_gb("Rss: 9 kB\nAnonHugePages:    749568 kB\n") == pytest.approx(0.767557632)
    assert huge_page_gb("Rss: 9 kB\n") == 0.0


def refused(*arguments, **environment):
    done = subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert not done.stdout
    return done.stderr


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(PUBLISHED["llama-1b"]))
    return str(path)


def test_missing_packages_are_named_with_what_installs_them(config, tmp_path):
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')  # without installed packages
    bare.chmod(0o755)
    said = refused("--config", config, "--peer-python", str(bare))
    assert "has no numpy and no gguf and no llama_cpp" in said
    assert f'CMAKE_ARGS="-DGGML_NATIVE=ON" {bare} -m pip install gguf llama-cpp-python' in said
    said = refused("--config", config, "--peer-python", str(bare), LLAMA_BENCH="/nowhere/llama-bench")
    assert "has no numpy and no gguf;" in said


def test_what_cannot_be_compared_is_refused(config, tmp_path):
    yuan = tmp_path / "yuan.json"
    yuan.write_text(json.dumps(PUBLISHED["yuan2-2b"]))
    assert "model_type is yuan, of which no GGUF file is made here; expected llama" in refused("--config", str(yuan))
    assert "nothing.json" in refused("--config", str(tmp_path / "nothing.json"))
    assert "/nowhere/python: No such file" in refused("--config", config, "--peer-python", "/nowhere/python")
