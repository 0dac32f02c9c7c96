"""`tpcpu bench` without running a model: flags, and what is counted."""

import pytest

from tests.configs import PUBLISHED
from tpcpu import cli
from tpcpu.bench.resident import Peak, resident_bytes
from tpcpu.bench.weights import Tally, tally, token_bytes
from tpcpu.cli.bench import rank_of
from tpcpu.kernels import record as R
from tpcpu.models import read_config
from tpcpu.parallel.numa import arena
from tpcpu.parallel.partition import Share
from tpcpu.program import cost
from tpcpu.program.operations import Kind
from tpcpu.program.weights import Packed, Source


@pytest.fixture(autouse=True)
def _not_launched(monkeypatch):
    for name in ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "PMIX_RANK", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(("text", "parts"), [("0/4", (0, 4)), ("3/4", (3, 4)), ("0/1", (0, 1)), ("10/12", (10, 12))])
def test_a_rank_of_a_job(text, parts):
    assert rank_of(text) == parts


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--model", "x", "--as-rank", "4/4"], "found '4/4', expected R/N with R from 0 to N - 1"),
        (["--model", "x", "--as-rank", "1"], "found '1', expected R/N"),
        (["--model", "x", "--as-rank", "-1/4"], "--as-rank"),
        (["--model", "x", "--as-rank", "0/0"], "found '0/0'"),
        (["--model", "x", "--as-rank", "a/b"], "found 'a/b'"),
        (["--model", "x", "--as-rank", "1/²"], "found '1/²'"),
        (["--model", "x", "--as-rank", "0/4", "--ranks", "2"], "--as-rank runs in one process; leave --ranks 2 out"),
        (["--model", "x", "--fake-weights"], "--config and --fake-weights belong together"),
        (["--config", "x"], "--config and --fake-weights belong together"),
        (["--config", "x", "--fake-weights", "--read", "shared"], "--read shared says how a folder is read"),
        (["--config", "x", "--model", "y"], "not allowed with argument"),
        ([], "one of the arguments --model --config is required"),
        (["--model", "x", "--all-reduce", "ordered"], "found 'ordered', expected window, mpi, or a number of bytes"),
        (["--model", "x", "--all-reduce", "10"], "found '10', expected window, mpi, or a number of bytes that 4"),
        (["--model", "x", "--all-reduce", "0"], "found '0'"),
        (["--model", "x", "--all-reduce", "4096", "--ranks", "1"], "it needs --ranks 2 or more"),
        (["--model", "x", "--runs", "0"], "argument --runs: found '0'"),
        (["--model", "x", "--new-tokens", "none"], "argument --new-tokens: found 'none'"),
        (["--config", "/no/such/file.json", "--fake-weights", "--ranks", "1"], "/no/such/file.json: cannot be read"),
    ],
)
def test_a_wrong_command_line_is_one_line(capsys, arguments, part):
    assert cli.main(["bench", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("tpcpu: error: ")
    assert part in err
    assert err.count("\n") == 1


def packed_model(config, share, matrices, head):
    """What a rank would hold, without memory."""
    program = read_config(config).program(share)
    storage = cost.Storage(matrices=matrices, head=head)
    forms = {"nf4": R.NF4, "int8": R.INT8, "bf16": R.BF16, "float32": R.FLOAT32}
    packed = [
        Packed(weight, forms[storage.of(weight)], None, cost.weight_bytes(weight, storage.of(weight)), ())
        for weight in program.weights
        if weight.kind not in (Kind.VECTOR, Kind.EMBEDDING)
    ]
    return program, storage, packed


@pytest.mark.parametrize("name", ["llama-1b", "yuan2-2b", "yuan2-102b"])
@pytest.mark.parametrize("size", [1, 3, 4])
@pytest.mark.parametrize("formats", [("nf4", "int8"), ("int8", "int8"), ("bf16", "bf16")])
def test_a_tally_is_what_the_plan_says(name, size, formats):
    held = [packed_model(PUBLISHED[name], Share(rank, size), *formats) for rank in range(size)]
    programs, storage = [program for program, *_ in held], held[0][1]
    total = sum((tally(packed) for *_, packed in held), Tally())
    assert total.token_bytes == total.held_bytes == cost.weight_bytes_per_token(programs, storage)
    assert total.bits_per_nf4_weight == cost.bits_per_nf4_weight(programs, storage)
    whole = read_config(PUBLISHED[name]).program(Share())
    sizes = {kind: sum(w.size for w in whole.weights if w.kind is kind) for kind in Kind}
    products = sizes[Kind.MATRIX] + sizes[Kind.CONV]
    assert total.head_products == sizes[Kind.HEAD]
    # Key/value heads that two ranks need are multiplied by both.
    replicated = name == "llama-1b" and size == 3
    assert (total.products > sizes[Kind.MATRIX]) if replicated else total.products == products


def test_experts_that_a_token_leaves_out_are_not_counted():
    config = PUBLISHED["qwen3-30b-a3b"] | {"num_hidden_layers": 2}
    program, storage, packed = packed_model(config, Share(), "nf4", "int8")
    total = tally(packed, cost.unread(program))
    assert total.token_bytes == cost.weight_bytes_per_token([program], storage)
    assert total.held_bytes == cost.memory(program, storage, 64).weights
    sizes = [weight.size for weight in program.weights if weight.kind is Kind.EXPERT]
    others = sum(w.size for w in program.weights if w.kind in (Kind.MATRIX, Kind.ROUTER))
    assert total.products == others + sum(sizes) * 8 // 128


def test_single_scales_are_four_bytes_a_block():
    program = read_config(PUBLISHED["llama-1b"]).program(Share())
    weight = next(weight for weight in program.weights if weight.kind is Kind.MATRIX)
    packed = Packed(weight, R.NF4_SINGLE, None, 0, ())
    assert token_bytes(packed) == weight.size // 2 + weight.size // 16
    assert tally([packed, Source(R.NF4, None)]).bits_per_nf4_weight == 4.5


def test_a_peak_outlasts_what_was_given_back():
    before = resident_bytes()
    with Peak() as peak:
        memory = arena(64 << 20)
        import numpy as np

        np.asarray(memory)[:] = 1
        peak.look()
        memory.close()
    assert peak.nbytes >= before + (60 << 20)
    assert resident_bytes() < peak.nbytes - (50 << 20)
