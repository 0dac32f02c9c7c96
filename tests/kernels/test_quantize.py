"""`tpcpu quantize` from folder to folder: the bytes of the specification, and what it does when things go wrong."""

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tpcpu.checkpoint import Checkpoint, writer
from tpcpu.errors import CheckpointError, ConfigError, OutputError, UsageError
from tpcpu.formats import int8, nf4
from tpcpu.formats.floats import convert
from tpcpu.quantize import quantize

DATA = Path(__file__).parents[1] / "data"
MODELS = ("yuan-tiny", "llama-tiny", "stories260k")


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def model(tmp_path):
    """A copy of a bundled model of two files, to be damaged."""
    shutil.copytree(DATA / "yuan-tiny", tmp_path / "model")
    return tmp_path / "model"


def changed_weights(folder, change, file="model-00001-of-00002.safetensors"):
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file, metadata={"format": "pt"})


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("target", ["nf4", "int8"])
def test_bytes_are_those_of_the_specification(name, target, tmp_path):
    report = quantize(DATA / name, tmp_path / "out", target)
    form = {"nf4": nf4, "int8": int8}[target]
    seen = 0
    with Checkpoint.open(DATA / name) as source, Checkpoint.open(tmp_path / "out") as written:
        for tensor, stored in source.tensors.items():
            values = source.array(tensor)
            if form.is_stored(tensor, written.tensors):
                seen += 1
                for part, expected in form.to_tensors(tensor, form.quantize(values)).items():
                    found = written.array(part)
                    assert found.dtype == expected.dtype
                    assert np.array_equal(found, expected), part
                again = form.from_tensors(tensor, written.array, written.tensors)
                assert again.shape == stored.shape
            elif values.ndim == 1:
                expected = values if target == "nf4" else convert(values, "float32")
                assert np.array_equal(written.array(tensor), expected)
                assert written.array(tensor).dtype == expected.dtype
            else:
                assert written.array(tensor).dtype == values.dtype
                assert np.array_equal(written.array(tensor).view(np.uint8), values.view(np.uint8))
    layers = json.loads((DATA / name / "config.json").read_text())["num_hidden_layers"]
    assert seen + len(report.kept) == layers * (9 if name == "yuan-tiny" else 7)
    assert all("172 values" in reason for reason in report.kept.values())
    assert len(report.kept) == (5 if name == "stories260k" else 0)


def test_convolutions_keep_their_shape_in_the_state(tmp_path):
    quantize(DATA / "yuan-tiny", tmp_path / "out")
    name = "model.layers.0.self_attn.lf_gate.conv1.weight"
    with Checkpoint.open(tmp_path / "out") as written:
        assert nf4.from_tensors(name, written.array, written.tensors).shape == (128, 256, 2, 1)


@pytest.mark.parametrize(("target", "dtype"), [("bf16", "bfloat16"), ("float32", "float32")])
def test_pass_through(target, dtype, tmp_path):
    quantize(DATA / "stories260k", tmp_path / "out", target)
    with Checkpoint.open(DATA / "stories260k") as source, Checkpoint.open(tmp_path / "out") as written:
        assert list(source.tensors) == sorted(written.tensors)
        for name, tensor in source.tensors.items():
            expected = convert(source.array(name), "float32" if len(tensor.shape) == 1 else dtype)
            assert np.array_equal(written.array(name).view(np.uint8), expected.view(np.uint8))
        assert written.config["torch_dtype"] == dtype
        assert "quantization_config" not in written.config


def test_the_folder_is_complete(tmp_path):
    told = []
    report = quantize(DATA / "yuan-tiny", tmp_path / "out", progress=lambda done, total: told.append((done, total)))
    written = files_of(tmp_path / "out")
    assert set(written) == {path.name for path in (DATA / "yuan-tiny").iterdir()}
    assert written["tokenizer.model"] == (DATA / "yuan-tiny" / "tokenizer.model").read_bytes()
    assert told[-1] == (report.source_bytes, report.source_bytes)
    assert told == sorted(told)
    assert report.source_bytes == 16300032
    assert report.written_bytes == sum(len(data) for name, data in written.items() if name.endswith(".safetensors"))
    index = json.loads(written["model.safetensors.index.json"])
    with Checkpoint.open(tmp_path / "out") as checkpoint:
        assert index["weight_map"] == {name: tensor.file.name for name, tensor in checkpoint.tensors.items()}
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in checkpoint.tensors.values())
        for tensor in checkpoint.tensors.values():
            if not tensor.name.endswith(nf4.STATE_KEY):
                assert checkpoint.array(tensor.name).flags.aligned, tensor.name
    assert not (tmp_path / "out.partial").exists()


def test_the_number_of_threads_changes_nothing(tmp_path):
    quantize(DATA / "llama-tiny", tmp_path / "one", jobs=1)
    quantize(DATA / "llama-tiny", tmp_path / "five", jobs=5)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "five")


def test_tensors_of_several_pieces(tmp_path, monkeypatch):
    quantize(DATA / "yuan-tiny", tmp_path / "whole", "nf4")
    quantize(DATA / "yuan-tiny", tmp_path / "whole8", "int8")
    monkeypatch.setattr("tpcpu.quantize.values.PIECE", 4096)
    quantize(DATA / "yuan-tiny", tmp_path / "pieces", "nf4")
    quantize(DATA / "yuan-tiny", tmp_path / "pieces8", "int8")
    assert files_of(tmp_path / "whole") == files_of(tmp_path / "pieces")
    assert files_of(tmp_path / "whole8") == files_of(tmp_path / "pieces8")


def test_torch_shards(tmp_path):
    torch = pytest.importorskip("torch")
    source = tmp_path / "torch"
    source.mkdir()
    shutil.copy(DATA / "yuan-tiny" / "config.json", source)
    weight_map = {}
    for i in (1, 2):
        name = f"pytorch_model-0000{i}-of-00002.bin"
        tensors = {
            key: torch.from_numpy(value.view(np.int16).copy()).view(torch.bfloat16)
            for key, value in load_file(DATA / "yuan-tiny" / f"model-0000{i}-of-00002.safetensors").items()
        }
        if i == 1:  # as some writers do: a tied head that shares the embedding's storage
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
        tensors = dict(sorted(tensors.items()))
        torch.save(tensors, source / name)
        weight_map |= dict.fromkeys(tensors, name)
    (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    report = quantize(source, tmp_path / "out")
    quantize(DATA / "yuan-tiny", tmp_path / "expected")
    assert report.dropped == ("lm_head.weight",)
    expected = {name: data for name, data in files_of(tmp_path / "expected").items() if "token" not in name}
    found = files_of(tmp_path / "out")
    for name in found.keys() - {"config.json"}:
        if name.endswith(".safetensors"):
            ours, theirs = load_file(tmp_path / "out" / name), load_file(tmp_path / "expected" / name)
            assert ours.keys() == theirs.keys()
            assert all(np.array_equal(ours[key], theirs[key]) for key in ours)
        else:
            assert found[name] == expected[name]


def test_transformers_loads_what_we_write_and_gives_its_logits(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    bnb = pytest.importorskip("bitsandbytes")
    quantize(DATA / "llama-tiny", tmp_path / "out")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of libraries, about libraries
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        plain = transformers.AutoModelForCausalLM.from_pretrained(DATA / "llama-tiny")
        linears = 0
        with Checkpoint.open(tmp_path / "out") as written:
            for name, module in theirs.named_modules():
                if not isinstance(module, bnb.nn.Linear4bit):
                    continue
                linears += 1
                ours = nf4.dequantize(nf4.from_tensors(f"{name}.weight", written.array, written.tensors))
                found = bnb.functional.dequantize_4bit(module.weight, module.weight.quant_state)
                assert found.dtype == torch.bfloat16
                assert torch.equal(found, torch.from_numpy(ours).bfloat16()), name
                plain.get_submodule(name).weight.data = found
        assert linears == 6 * 7
        ids = torch.tensor([[1, 394, 2055, 7, 93]])
        with torch.no_grad():
            expected = plain(ids).logits.float()
            difference = (theirs(ids).logits.float() - expected).abs().max()
    assert difference < 0.02 * expected.abs().max()  # the same weights and arithmetic, up to the order of bf16 sums


# ---- what is refused


def test_source_that_is_quantised_already(tmp_path):
    quantize(DATA / "stories260k", tmp_path / "once")
    with pytest.raises(CheckpointError, match=r"quantised already \(bitsandbytes\)"):
        quantize(tmp_path / "once", tmp_path / "twice")
    assert not (tmp_path / "twice.partial").exists()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("target", ["nf4", "int8", "bf16"])
def test_weights_that_are_not_finite_are_named(model, target, bad, tmp_path):
    def damage(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"][7, 70] = bad

    changed_weights(model, damage)
    with pytest.raises(CheckpointError, match=r"tensor model\.layers\.1\.mlp\.up_proj\.weight .* \[7, 70\]"):
        quantize(model, tmp_path / "out", target)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.0.input_layernorm.weight"])
def test_tensors_that_stay_are_checked_too(model, name, tmp_path):
    def damage(tensors):
        tensors[name].reshape(-1)[-1] = np.nan

    changed_weights(model, damage)
    with pytest.raises(CheckpointError, match=f"tensor {name} holds nan"):
        quantize(model, tmp_path / "out")


def test_tensors_that_do_not_fit_the_config(model, tmp_path):
    name = "model.layers.0.mlp.up_proj.weight"
    changed_weights(model, lambda tensors: tensors.update({name: tensors[name][:8]}))
    with pytest.raises(CheckpointError, match=r"up_proj\.weight has the shape \[8, 256\].*\[1024, 256\]"):
        quantize(model, tmp_path / "out")
    changed_weights(model, lambda tensors: tensors.update({name: np.zeros((1024, 256), np.int8)}))
    with pytest.raises(CheckpointError, match=r"up_proj\.weight is I8"):
        quantize(model, tmp_path / "out")
    changed_weights(model, lambda tensors: tensors.update(stranger=np.zeros(3, np.float32)))
    with pytest.raises(CheckpointError):
        quantize(model, tmp_path / "out")


def test_a_tensor_that_is_missing_or_strange(tmp_path):
    source = tmp_path / "model"
    shutil.copytree(DATA / "stories260k", source)
    file = "model.safetensors"
    changed_weights(source, lambda tensors: tensors.update(stranger=np.zeros(3, np.float32)), file)
    with pytest.raises(CheckpointError, match="tensor stranger does not belong"):
        quantize(source, tmp_path / "out")
    changed_weights(source, lambda tensors: (tensors.pop("stranger"), tensors.pop("model.norm.weight")), file)
    with pytest.raises(CheckpointError, match=r"tensor model\.norm\.weight is missing"):
        quantize(source, tmp_path / "out")


def test_a_tied_head_must_be_a_copy(tmp_path):
    source = tmp_path / "model"
    shutil.copytree(DATA / "stories260k", source)

    def copy_head(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    changed_weights(source, copy_head, "model.safetensors")
    assert quantize(source, tmp_path / "out").dropped == ("lm_head.weight",)

    def change_head(tensors):
        tensors["lm_head.weight"][3, 3] += 1

    changed_weights(source, change_head, "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        quantize(source, tmp_path / "again")


def test_values_beyond_half_precision_are_not_lost_in_silence(tmp_path):
    source = tmp_path / "model"
    shutil.copytree(DATA / "stories260k", source)

    def enlarge(tensors):
        tensors["model.embed_tokens.weight"][0, 0] = np.finfo(np.float32).max  # rounds to infinity in bf16

    changed_weights(source, enlarge, "model.safetensors")
    with pytest.raises(CheckpointError, match="beyond the range of bfloat16"):
        quantize(source, tmp_path / "out", "bf16")
    quantize(source, tmp_path / "out", "nf4")


def test_bad_arguments(tmp_path):
    with pytest.raises(UsageError, match="nf4, int8, bf16, float32"):
        quantize(DATA / "llama-tiny", tmp_path / "out", "int3")
    with pytest.raises(UsageError, match="0 jobs"):
        quantize(DATA / "llama-tiny", tmp_path / "out", jobs=0)
    with pytest.raises(CheckpointError, match="no such folder"):
        quantize(tmp_path / "absent", tmp_path / "out")


def test_an_unknown_architecture(model, tmp_path):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": "unheard-of"}))
    with pytest.raises(ConfigError, match="unheard-of"):
        quantize(model, tmp_path / "out")


def test_an_output_that_exists(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(OutputError, match="out exists; remove it"):
        quantize(DATA / "llama-tiny", out)
    assert list(tmp_path.iterdir()) == [out]
    out.rmdir()
    out.symlink_to("nowhere")
    with pytest.raises(OutputError, match="out exists"):
        quantize(DATA / "llama-tiny", out)


def test_a_partial_folder_of_someone_else(tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine").touch()
    with pytest.raises(OutputError, match="was not begun here"):
        quantize(DATA / "llama-tiny", tmp_path / "out")


# ---- interrupted, and taken up again


class Stopped(BaseException):
    """Stands for a kill or Ctrl-C in the middle."""


def stop_in_the_second_file(done, total):
    if done > total * 0.9:
        raise Stopped


def interrupted(source, out, **kwargs):
    with pytest.raises(Stopped):
        quantize(source, out, progress=stop_in_the_second_file, **kwargs)


def test_finished_files_are_not_made_again(tmp_path):
    out = tmp_path / "out"
    interrupted(DATA / "yuan-tiny", out)
    assert not out.exists()
    partial = tmp_path / "out.partial"
    assert sorted(files_of(partial)) == [writer.SETTINGS, "model-00001-of-00002.safetensors"]
    before = (partial / "model-00001-of-00002.safetensors").stat()
    report = quantize(DATA / "yuan-tiny", out)
    assert report.resumed_files == 1
    after = (out / "model-00001-of-00002.safetensors").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    quantize(DATA / "yuan-tiny", tmp_path / "undisturbed")
    assert files_of(out) == files_of(tmp_path / "undisturbed")


def test_a_finished_file_that_was_damaged_is_made_again(tmp_path):
    interrupted(DATA / "yuan-tiny", tmp_path / "out")
    os.truncate(tmp_path / "out.partial" / "model-00001-of-00002.safetensors", 5000)
    assert quantize(DATA / "yuan-tiny", tmp_path / "out").resumed_files == 0


def test_other_settings_or_another_source_are_refused(model, tmp_path):
    interrupted(model, tmp_path / "out")
    with pytest.raises(OutputError, match=r"begun with other settings \(format: 'nf4', now 'int8'\)"):
        quantize(model, tmp_path / "out", "int8")
    os.utime(model / "model-00002-of-00002.safetensors", (1, 1))
    with pytest.raises(OutputError, match="source changed"):
        quantize(model, tmp_path / "out")
    assert (tmp_path / "out.partial" / "model-00001-of-00002.safetensors").exists()


def test_two_jobs_are_kept_apart(tmp_path):
    interrupted(DATA / "yuan-tiny", tmp_path / "out")
    with open(tmp_path / "out.partial" / writer.SETTINGS) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match="being written by another job"):
            quantize(DATA / "yuan-tiny", tmp_path / "out")
    quantize(DATA / "yuan-tiny", tmp_path / "out")


@pytest.mark.parametrize("kind", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_says_what_is_needed_and_is_resumable(kind, tmp_path, monkeypatch):
    room = 4_000_000
    real = os.pwrite
    lock = threading.Lock()

    def pwrite(file, data, position):
        nonlocal room
        with lock:
            room -= len(data)
            if room < 0:
                raise OSError(kind, os.strerror(kind))
        return real(file, data, position)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(OutputError, match=r"no room left: 0\.00\d GB more are needed, .* run the same command again"):
        quantize(DATA / "yuan-tiny", tmp_path / "out")
    assert not list((tmp_path / "out.partial").glob("*.tmp"))
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    assert quantize(DATA / "yuan-tiny", tmp_path / "out").resumed_files == 1


FULL_DISK = """
mount -t tmpfs -o size=4m none {folder} 2>/dev/null || ulimit -S -f 4096
{python} -c '
from tpcpu.errors import OutputError
from tpcpu.quantize import quantize
try:
    quantize("{source}", "{folder}/out")
except OutputError as error:
    print(error)
'
ls {folder} {folder}/out.partial
mount -o remount,size=64m {folder} 2>/dev/null || ulimit -S -f unlimited
{python} -c '
from tpcpu.quantize import quantize
print(quantize("{source}", "{folder}/out").written_bytes, "written")
'
"""


def test_a_disk_that_is_really_full(tmp_path):
    """The system says no: on a file system of 4 MB of our own, or, where we may have none, by a limit on file sizes."""
    script = FULL_DISK.format(folder=tmp_path, python=sys.executable, source=DATA / "yuan-tiny")
    own = ["unshare", "--user", "--map-root-user", "--mount"]
    if shutil.which("unshare") is None or subprocess.run([*own, "true"], capture_output=True).returncode:
        own = []
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([*own, "sh", "-c", script], capture_output=True, text=True, env=environment, timeout=120)
    first, _, _ = done.stdout.partition("written")
    assert "no room left" in first, done.stderr
    assert ".tmp" not in first
    assert "out\n" not in first  # only out.partial
    assert "written" in done.stdout, done.stderr


def test_no_more_than_a_tensor_is_in_memory(tmp_path):
    bench = Path(__file__).parents[1] / "bench" / "quantize_speed.py"
    command = [sys.executable, str(bench), "--folder", str(tmp_path), "--gigabytes", "0.3", "--runs", "1"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["peak_bytes"] < 1.2 * result["largest_tensor_bytes"]


PARSER = """
import argparse, sys
from tpcpu.cli import quantize as command
parser = argparse.ArgumentParser()
command.add_parser(parser.add_subparsers())
args = parser.parse_args(["quantize", *sys.argv[1:]])
"""

# the progress of a small model is too quick to be interrupted: hold it in the second file
HELD = """
import time
import tpcpu.quantize as module
quantize = module.quantize
def held(*args, progress, **kwargs):
    def show(done, total):
        progress(done, total)
        if done > total * 0.9:
            print("held", flush=True)
            time.sleep(60)
    return quantize(*args, progress=show, **kwargs)
module.quantize = held
"""


def start(code, *arguments):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.Popen(
        [sys.executable, "-c", PARSER + code + "sys.exit(args.run(args))", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


@pytest.mark.parametrize(("with_signal", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_ctrl_c_and_kill_leave_a_folder_to_go_on_with(with_signal, code, tmp_path):
    process = start(HELD, DATA / "yuan-tiny", tmp_path / "out")
    assert process.stdout.readline() == "held\n", process.stderr.read()
    time.sleep(0.1)
    process.send_signal(with_signal)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == code, stderr
    assert "Traceback" not in stderr
    if code == 130:
        assert "goes on after the files finished" in stderr
    assert (tmp_path / "out.partial" / "model-00001-of-00002.safetensors").is_file()
    assert quantize(DATA / "yuan-tiny", tmp_path / "out").resumed_files == 1


def test_command(tmp_path):
    process = start("", DATA / "stories260k", tmp_path / "out", "--format", "int8", "--jobs", "2", "--json")
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    result = json.loads(stdout.splitlines()[-1])
    assert result["format"] == "int8"
    assert len(result["kept"]) == 5
    assert "not quantised: model.layers.4.mlp.down_proj.weight: rows of 172 values" in stderr
