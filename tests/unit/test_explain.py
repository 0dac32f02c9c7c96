"""`tpcpu explain`: what it prints, what its JSON holds, and what it refuses."""

import argparse
import json
from pathlib import Path

import pytest

from tests.configs import PUBLISHED
from tpcpu.cli import explain
from tpcpu.cli.listing import size
from tpcpu.errors import CheckpointError, ConfigError, LaunchError, UsageError

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture
def config(tmp_path):
    def write(name, **changes):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(PUBLISHED[name] | changes))
        return str(path)

    return write


@pytest.fixture
def explained(capsys):
    def call(*arguments):
        parser = argparse.ArgumentParser()
        explain.add_parser(parser.add_subparsers())
        assert explain.run(parser.parse_args(["explain", *arguments])) == 0
        return capsys.readouterr()

    return call


def test_experts_are_told(explained, config):
    text = explained("--config", config("qwen3-30b-a3b", num_hidden_layers=3), "--ranks", "2", "--rank", "1").out
    assert "2.49 billion parameters, 793.00 million for a token" in text.splitlines()[0]
    route, *_ = [line for line in text.splitlines() if "route " in line]
    assert "the 8 best of 128, their weights adding up to 1" in route
    gate, up, down = [line for line in text.splitlines() if "mlp.experts.0-127" in line][:3]
    assert "8 of 128 times rows 384-767 of 768 x 2048" in gate
    assert "gate_proj" in gate
    assert "up_proj" in up
    assert "8 of 128 times columns 384-767 of 2048 x 768" in down
    assert down.split()[-3:] == ["nf4", "3.25", "MB"]
    # The number of an expert was once taken for that of its layer.
    assert "layers 0-2, all alike" in text


def test_experts_in_a_format_of_their_own_are_told(explained, config):
    kinds = ["sliding_attention", "full_attention"]
    text = explained("--config", config("gpt-oss-20b", num_hidden_layers=2, layer_types=kinds)).out
    assert "weights nf4, experts mxfp4, head int8" in text
    gate, *_ = [line for line in text.splitlines() if "mlp.experts.0-31" in line]
    assert "gate_proj + bias" in gate
    assert gate.split()[-3:] == ["mxfp4", "17.6", "MB"]
    attention = next(line for line in text.splitlines() if "self_attn.sinks" in line)
    assert "the last 128 of them" in attention


def test_a_router_that_attends_is_told(explained, config):
    text = explained("--config", config("yuan2-m32", num_hidden_layers=2)).out
    assert "each of 32 experts attends to all" in text
    opened, up, *_ = [line for line in text.splitlines() if "mlp.experts.0-31" in line]
    assert "w1 gate" in opened
    assert "2 of 32 times rows 0-8191 of 16384 x 2048" in opened
    assert "w1 up" in up
    assert "2 of 32 times rows 8192-16383 of 16384 x 2048" in up


def test_the_reference_job_is_told(explained, config):
    text = explained("--config", config("yuan2-102b"), "--ranks", "4", "--rank", "1", "--threads", "32").out
    lines = text.splitlines()
    assert "102.58 billion parameters" in lines[0]
    assert "layers 0-83, all alike" in text
    assert text.count("lf_gate.conv1") == 1
    (conv,) = [line for line in lines if "lf_gate.conv1" in line]
    assert "short_conv" in conv
    assert "rows 1024-2047 of 4096 x 16384" in conv
    assert conv.split()[-3:] == ["nf4", "8.65", "MB"]
    assert "columns 2048-4095 of 8192 x 8192" in text
    assert "252 all-reduces" in text
    assert "53.5 GB of weights read for a token" in text
    assert "0-3  13.4 GB  25.00 %" in text
    assert "share 1.000" in text
    assert max(map(len, lines)) < 160


def test_a_window_is_told(explained, config):
    text = explained("--config", config("llama-1b", model_type="mistral", sliding_window=1024)).out
    attention = [line for line in text.splitlines() if "kv heads of 64; reads" in line]
    assert attention
    assert all("a position, the last 1024 of them" in line for line in attention)


def test_every_layer_when_asked(explained, config):
    text = explained("--config", config("llama-1b"), "--layers", "all").out
    assert text.count("mlp.gate_proj") == 16
    assert "layer 15: " in text


def test_shares_that_are_empty_or_uneven_are_shown(explained):
    text = explained("--model", str(DATA / "stories260k"), "--ranks", "6").out
    assert text.count("nothing on this rank") == 2
    assert "attention 64 (own 0-7)" in text
    shares = [line.split() for line in text.splitlines() if "%" in line]
    assert [line[0] for line in shares] == list("012345")
    assert sum(float(line[3]) for line in shares) == pytest.approx(100, abs=0.05)


def test_formats_are_as_stored_unless_asked_for(explained, config):
    model = str(DATA / "llama-tiny")
    assert "weights bf16, head bf16" in explained("--model", model).out
    assert "weights nf4, head int8" in explained("--model", model, "--format", "nf4").out
    assert "weights int8, head nf4" in explained("--model", model, "--format", "int8", "--lm-head", "nf4").out
    assert "weights nf4, head int8" in explained("--config", config("llama-1b")).out
    stored = config("llama-1b", quantization_config={"quant_method": "tpcpu_int8", "block": 64})
    assert "weights int8, head int8" in explained("--config", stored).out


def test_json_is_the_last_line_and_adds_up(explained, config):
    streams = explained("--config", config("llama-1b"), "--ranks", "3", "--context", "1000", "--threads", "5", "--json")
    assert "layers 0-15" in streams.err
    found = json.loads(streams.out)
    assert found["parameters"] == 1_104_218_112
    assert found["weight_bytes_per_token"] == sum(rank["weights"] for rank in found["memory_per_rank"])
    assert found["total"]["weight_bytes"] == found["memory_per_rank"][0]["weights"]
    assert found["total"]["messages"] == 32
    assert 4.12 < found["bits_per_nf4_weight"] < 4.14
    assert 0.9 < found["balance"] <= 1
    operations = found["operations"]
    assert sum(operation["cost"]["weight_bytes"] for operation in operations) == found["total"]["weight_bytes"]
    q = operations[2]["weights"][0]
    assert (q["name"], q["rows"], q["format"]) == ("model.layers.0.self_attn.q_proj.weight", [0, 640], "nf4")


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (("--ranks", "2", "--rank", "2"), UsageError, "0 to 1 work"),
        (("--rank", "-1"), UsageError, "--rank -1"),
        (("--ranks", "10000000000"), LaunchError, "1 to 2000 ranks work"),
        (("--context", "9000"), UsageError, "1 to 8192 work"),
    ],
)
def test_impossible_worlds_are_refused(explained, config, arguments, error, words):
    with pytest.raises(error, match=words):
        explained("--config", config("llama-1b"), *arguments)


def test_unsupported_and_missing_configs_are_refused(explained, config, tmp_path):
    with pytest.raises(ConfigError, match="longrope"):
        explained("--config", config("llama-1b", rope_scaling={"rope_type": "longrope", "factor": 8.0}))
    with pytest.raises(CheckpointError, match="nowhere"):
        explained("--config", str(tmp_path / "nowhere.json"))
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(CheckpointError, match="not JSON"):
        explained("--config", str(tmp_path / "broken.json"))


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (9994, "9.99 kB"), (9996, "10.0 kB"), (99_960, "100 kB"),
     (999_600, "1.00 MB"), (53_519_000_000, "53.5 GB"), (5e12, "5000 GB")],
)  # fmt: skip
def test_bytes_have_three_digits(count, text):
    assert size(count) == text
