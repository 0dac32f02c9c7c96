"""Commands in child processes, as a person starts them: answers, JSON, exit codes, one line for any bad input."""

import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.processes import environment
from tests.flavours import flavour

DATA = Path(__file__).parents[1] / "data"
LLAMA = DATA / "llama-tiny"
YUAN = DATA / "yuan-tiny"
STORIES = DATA / "stories260k"
STORY = next(case for case in json.loads((LLAMA / "reference.json").read_text())["cases"] if case["name"] == "story")

SECONDS = 240  # the first command on a machine compiles the kernels
TPCPU = [sys.executable, "-m", "tpcpu"]
GREEDY = ["--temperature", "0", "--max-tokens", "48", "--ignore-eos"]


def run(
    *arguments: str | bytes | Path, launcher: tuple[str, ...] = (), **more: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*launcher, *TPCPU, *arguments],
        env=environment(**more),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        timeout=SECONDS,
        check=False,
    )


def assert_refused(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    """Exit code 2, nothing on standard output, one line of error with these parts, no traceback."""
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    lines = [
        line for line in done.stderr.splitlines() if not re.match(r"\[\S+:\d+\] ", line)
    ]  # Open MPI's launcher's own
    errors = [line for line in lines if "error" in line.lower()]
    assert len(errors) == 1, done.stderr
    assert errors[0].startswith("tpcpu: error: ")
    assert [part for part in parts if part.lower() not in errors[0].lower()] == [], errors[0]


# -- answers


@pytest.mark.parametrize(
    ("launcher", "flags"),
    [((), ("--ranks", "1")), ((), ("--ranks", "2")), (("mpiexec", "-n", "3"), ())],
    ids=["one rank", "--ranks 2", "mpiexec -n 3"],
)
def test_json_is_the_last_line_and_says_what_was_generated(launcher, flags):
    arguments = ("--model", LLAMA, "--prompt", STORY["prompt"], "--exact", *GREEDY, "--json", *flags)
    done = run("generate", *arguments, launcher=launcher)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    answer = json.loads(done.stdout)
    assert answer["prompt_ids"] == STORY["prompt_ids"]
    assert answer["ids"] == STORY["greedy_ids"]
    assert answer["text"].strip() == STORY["generated_text"]
    assert answer["finish_reason"] == "length"
    assert answer["ttft_ms"] > 0
    assert answer["decode_tokens_per_s"] > 0


def test_without_json_standard_output_is_the_text():
    done = run("generate", "--model", LLAMA, "--ranks", "1", "--exact", "--prompt", STORY["prompt"], *GREEDY)
    assert done.returncode == 0, done.stderr
    assert STORY["generated_text"] in done.stdout


def test_a_prompt_of_bos_alone_is_one():
    """llama-tiny's tokenizer puts BOS before the empty text; yuan-tiny's puts nothing, which is refused below."""
    done = run("generate", "--model", LLAMA, "--ranks", "1", "--prompt", "", *GREEDY, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["prompt_ids"] == [1]


def test_a_warm_start_takes_less_than_three_seconds():
    """The whole command, the best of three after one that may have compiled."""
    arguments = (
        "generate",
        "--model",
        YUAN,
        "--format",
        "nf4",
        "--ranks",
        "1",
        "--prompt",
        "Once",
        "--max-tokens",
        "1",
    )
    assert run(*arguments).returncode == 0
    seconds = []
    for _ in range(3):
        start = time.monotonic()
        assert run(*arguments).returncode == 0
        seconds.append(time.monotonic() - start)
    assert min(seconds) < 3


def test_version_is_one_line():
    done = run("--version")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    assert done.stdout.startswith("tpcpu ")
    for part in ("MPI", "core", "NUMA node"):
        assert part in done.stdout


def start_long_answer(*flags: str) -> subprocess.Popen[bytes]:
    """A process that has begun to stream an answer, the slow way; it leads a process group of its own."""
    process = subprocess.Popen(
        [
            *TPCPU,
            "generate",
            "--model",
            LLAMA,
            "--prompt",
            "Once",
            "--max-tokens",
            "500",
            "--ignore-eos",
            "--exact",
            *flags,
        ],
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.read(1)
    return process


@pytest.mark.parametrize("ranks", ["1", "2"])
def test_ctrl_c_is_130_and_takes_every_rank_down(ranks):
    process = start_long_answer("--ranks", ranks)
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to the whole group
    _, stderr = process.communicate(timeout=30)
    assert b"Traceback" not in stderr
    assert process.returncode == 130, stderr
    assert_group_is_gone(process.pid)


def test_a_reader_that_leaves_ends_the_answer_quietly():
    process = start_long_answer("--ranks", "1")
    process.stdout.close()
    assert process.wait(timeout=30) == 1
    assert b"Traceback" not in process.stderr.read()
    process.stderr.close()


def assert_group_is_gone(group: int) -> None:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    pytest.fail(f"processes of group {group} are still there")


# -- bad folders


def header_of(path: Path) -> tuple[dict[str, dict], bytes]:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_safetensors(path: Path, header: dict[str, dict] | bytes, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


Q_PROJ = "model.layers.2.self_attn.q_proj.weight"


@pytest.fixture
def llama(tmp_path) -> Path:
    """A copy of llama-tiny to be spoiled."""
    return Path(shutil.copytree(LLAMA, tmp_path / "spoiled"))


def spoil_header(change: Callable[[dict[str, dict]], None]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        header, data = header_of(folder / "model.safetensors")
        change(header)
        write_safetensors(folder / "model.safetensors", header, data)

    return spoil


def spoil_config(**keys: object) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **keys}))

    return spoil


def truncate(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 1_000_000)


def lengthen_header(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + content[8:])


def garble_header(folder: Path) -> None:
    write_safetensors(folder / "model.safetensors", b'{"half": [', b"")


def name_a_tensor_twice(folder: Path) -> None:
    header, data = header_of(folder / "model.safetensors")
    text = json.dumps(header)
    again = json.dumps({Q_PROJ: header[Q_PROJ]})
    write_safetensors(folder / "model.safetensors", f"{text[:-1]}, {again[1:]}".encode(), data)


def reach_outside(header: dict[str, dict]) -> None:
    last = max((t for t in header if t != "__metadata__"), key=lambda t: header[t]["data_offsets"][1])
    start, end = header[last]["data_offsets"]
    header[last]["data_offsets"] = [start + 4096, end + 4096]


def overlap(header: dict[str, dict]) -> None:
    header[Q_PROJ]["data_offsets"] = header["model.layers.2.self_attn.o_proj.weight"]["data_offsets"]


def invent_dtype(header: dict[str, dict]) -> None:
    header[Q_PROJ]["dtype"] = "F13"


def transpose_shape(header: dict[str, dict]) -> None:
    header["model.layers.2.mlp.up_proj.weight"]["shape"].reverse()


def drop_tensor(header: dict[str, dict]) -> None:
    header["model.layers.2.self_attn.x_proj.weight"] = header.pop(Q_PROJ)


def put_nan(folder: Path) -> None:
    path = folder / "model.safetensors"
    header, _ = header_of(path)
    content = bytearray(path.read_bytes())
    start = len(content) - max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    place = start + header[Q_PROJ]["data_offsets"][0] + 1000
    content[place : place + 2] = b"\xc0\x7f"  # bfloat16 NaN
    path.write_bytes(content)


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def empty_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


@pytest.mark.parametrize(
    ("spoil", "parts"),
    [
        (remove("config.json"), ["config.json"]),
        (empty_config, ["config.json"]),
        (remove("model.safetensors"), ["safetensors"]),
        (truncate, ["model.safetensors"]),
        (lengthen_header, ["model.safetensors"]),
        (garble_header, ["model.safetensors"]),
        (name_a_tensor_twice, ["model.safetensors", Q_PROJ]),
        (spoil_header(reach_outside), ["model.safetensors"]),
        (spoil_header(overlap), ["model.safetensors"]),
        (spoil_header(invent_dtype), ["model.safetensors", "F13"]),
        (spoil_header(transpose_shape), ["model.layers.2.mlp.up_proj.weight"]),
        (spoil_header(drop_tensor), [Q_PROJ]),
        (put_nan, [Q_PROJ, "nan"]),
        (spoil_config(model_type="no_such_model"), ["no_such_model", "llama", "yuan"]),
        (spoil_config(rope_scaling={"rope_type": "longrope", "factor": 4.0}), ["rope_scaling", "longrope"]),
        (spoil_config(sliding_window=128), ["sliding_window"]),
        (spoil_config(hidden_size=320), ["320"]),
        (spoil_config(num_hidden_layers=7), ["layers.6"]),
    ],
    ids=lambda value: getattr(value, "__name__", None) if callable(value) else "-".join(value),
)
def test_a_spoiled_folder_is_refused(llama, spoil, parts):
    spoil(llama)
    assert_refused(run("generate", "--model", llama, "--ranks", "1", "--prompt", "Once"), *parts)


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    done = run("generate", "--model", tmp_path / "nowhere", "--ranks", "1", "--prompt", "Once")
    assert_refused(done, "nowhere")


def test_a_folder_without_a_checkpoint_is_refused(tmp_path):
    assert_refused(run("generate", "--model", tmp_path, "--ranks", "1", "--prompt", "Once"), "config.json")


def test_an_index_that_names_a_missing_file_is_refused(tmp_path):
    folder = Path(shutil.copytree(YUAN, tmp_path / "yuan"))
    (folder / "model-00002-of-00002.safetensors").unlink()
    done = run("generate", "--model", folder, "--ranks", "1", "--prompt", "Once")
    assert_refused(done, "model-00002-of-00002.safetensors")


def test_yuan_with_shared_queries_and_keys_is_refused(tmp_path):
    folder = Path(shutil.copytree(YUAN, tmp_path / "yuan"))
    spoil_config(use_shareqk=True)(folder)
    assert_refused(run("generate", "--model", folder, "--ranks", "1", "--prompt", "Once"), "use_shareqk")


# -- bad prompts and values


@pytest.mark.parametrize(
    ("model", "arguments", "parts"),
    [
        (YUAN, ["--prompt", ""], ["prompt"]),
        (LLAMA, ["--prompt", "dog " * 600], ["context", "512"]),
        (LLAMA, ["--prompt", "one two three four five six", "--context", "4"], ["context", "4"]),
        (LLAMA, ["--prompt", b"caf\xe9"], ["utf-8"]),
        (LLAMA, ["--prompt", "a", "--message", "b"], ["--prompt", "--message"]),
        (LLAMA, [], ["--prompt", "--message"]),
        (LLAMA, ["--prompt", "Once", "--context", "100000"], ["context", "512"]),
        (LLAMA, ["--prompt", "Once", "--temperature", "-1"], ["temperature", "-1"]),
        (LLAMA, ["--prompt", "Once", "--temperature", "nan"], ["temperature", "nan"]),
        (LLAMA, ["--prompt", "Once", "--top-p", "1.5"], ["top_p", "1.5"]),
        (LLAMA, ["--prompt", "Once", "--top-p", "0"], ["top_p", "0"]),
        (LLAMA, ["--prompt", "Once", "--top-k", "-2"], ["top_k", "-2"]),
        (LLAMA, ["--prompt", "Once", "--min-p", "2"], ["min_p", "2"]),
        (LLAMA, ["--prompt", "Once", "--repetition-penalty", "0"], ["repetition_penalty", "0"]),
        (LLAMA, ["--prompt", "Once", "--max-tokens", "0"], ["max_tokens", "0"]),
        (LLAMA, ["--prompt", "Once", "--stop", ""], ["stop"]),
        (LLAMA, ["--prompt", "Once", "--threads", "0"], ["--threads", "0"]),
        (LLAMA, ["--prompt", "Once", "--format", "fp3"], ["--format", "fp3", "nf4"]),
    ],
    ids=lambda value: None if isinstance(value, Path) else "-".join(map(str, value))[:40],
)
def test_an_impossible_request_is_refused(model, arguments, parts):
    assert_refused(run("generate", "--model", model, "--ranks", "1", *arguments), *parts)


# -- bad launches


def test_an_unknown_instruction_set_is_refused():
    done = run("generate", "--model", LLAMA, "--ranks", "1", "--prompt", "Once", TPCPU_ISA="mmx")
    assert_refused(done, "TPCPU_ISA", "mmx", "generic")


def test_more_ranks_than_panels_are_refused_before_any_is_started():
    """The widest weight of stories260k, its head, has 512 rows: 32 panels."""
    start = time.monotonic()
    done = run("generate", "--model", STORIES, "--ranks", "33", "--prompt", "Once")
    assert_refused(done, "33")
    assert time.monotonic() - start < 30


def test_one_of_several_processes_with_a_communicator_of_its_own_is_refused():
    """Another MPI's launcher says so in the environment, while the MPI of this environment starts alone."""
    told = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}
    if flavour() == "openmpi":
        told = {"PMI_SIZE": "2", "PMI_RANK": "0", "MPI_LOCALNRANKS": "2"}
    done = run("generate", "--model", LLAMA, "--prompt", "Once", **told)
    assert_refused(done, "Intel MPI" if flavour() == "impi" else "MPICH", "Open MPI")


@pytest.mark.parametrize("way", ["--ranks 2", "mpiexec -n 2"])
@pytest.mark.parametrize(
    ("spoil", "parts"),
    [(spoil_config(model_type="no_such_model"), ["no_such_model"]), (put_nan, [Q_PROJ, "nan"]), (truncate, ["model."])],
    ids=["architecture", "NaN", "truncated"],
)
def test_a_mistake_is_said_once_however_many_ranks_meet_it(llama, spoil, parts, way):
    spoil(llama)
    if way == "--ranks 2":
        done = run("generate", "--model", llama, "--prompt", "Once", "--ranks", "2")
    else:
        done = run("generate", "--model", llama, "--prompt", "Once", launcher=("mpiexec", "-n", "2"))
    assert_refused(done, *parts)


def test_a_wrong_flag_is_said_once_under_a_launcher():
    assert_refused(run("generate", "--bogus", launcher=("mpiexec", "-n", "2")))


# -- quantize


def test_an_output_folder_that_exists_is_refused_and_left_alone(tmp_path):
    target = tmp_path / "there"
    target.mkdir()
    (target / "mine.txt").write_text("mine")
    assert_refused(run("quantize", LLAMA, target), "there")
    assert [path.name for path in tmp_path.rglob("*")] == ["there", "mine.txt"]


def test_a_mistake_leaves_no_half_written_folder(llama, tmp_path):
    put_nan(llama)
    assert_refused(run("quantize", llama, tmp_path / "out"), Q_PROJ, "nan")
    assert not (tmp_path / "out").exists()
