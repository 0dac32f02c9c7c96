"""What the hosts of a job read, as the kernel counts it: one folder once, their own copies once each."""

import json
import shutil
import subprocess
import sys

import pytest

from tests.e2e.processes import environment
from tests.hosts import hosts, missing
from tests.random_folder import write_nf4
from tests.shared import DATA

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 1024, "intermediate_size": 4096,
    "num_hidden_layers": 4, "num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 4096,
    "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 1e4, "max_position_embeddings": 256,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip

# Rank 0 tells, for each load: bytes that each rank has asked for, bytes that the disk gave each, digests, lines.
PROGRAM = """
import gc, hashlib, json, os, sys
from pathlib import Path
import numpy as np
from tpcpu.engine.source import Folder
from tpcpu.errors import CheckpointError
from tpcpu.models import read_config
from tpcpu.parallel.communicator import connect
from tpcpu.parallel.partition import Share
from tpcpu.parallel.team import Team

root, communicator = Path(sys.argv[1]), connect()
share, other = Share(communicator.rank, communicator.size), communicator.host_of[communicator.rank] > 0
cpus = sorted(os.sched_getaffinity(0))[:1]
team = Team(cpus, pinned=False, crowded=True)
lines = []

class Told:
    say, advance = lines.append, lambda *_: None

def counted():
    return dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())

def load(name):
    if communicator.is_root:
        for file in root.glob("*/*.safetensors"):
            with open(file) as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    lines.clear()
    communicator.barrier()
    before, source, digest = counted(), Folder(root / name), ""
    try:
        model = read_config(source.open())
        source.bind(model, model.program(share), None, None)
        weights, arena = source.load(communicator, team, cpus, Told())
        digest = hashlib.sha256(np.asarray(arena)).hexdigest()
        del weights, arena
    except CheckpointError as problem:
        lines.append(str(problem))
    after = counted()
    source.close()
    gc.collect()
    asked, given = [int(after[key]) - int(before[key]) for key in ("rchar", "read_bytes")]
    return [list(each) for each in zip(*communicator.all_gather_object((asked, given, digest, list(lines))))]

import tpcpu.engine.loader
tpcpu.engine.loader.NOTICED_SECONDS = 0
load("first")  # which compiles the kernels, or reads them
results = [load("first"), load("second" if other else "first"), load("stale" if other else "first")]
team.close()
if communicator.is_root:
    print(json.dumps(results))
"""


def test_one_folder_is_read_once_and_copies_once_each(tmp_path):
    folder = tmp_path / "models"
    folder.mkdir()
    write_nf4(folder / "first", CONFIG, DATA / "llama-tiny")
    for copy in ("second", "stale"):
        shutil.copytree(folder / "first", folder / copy)
    stored = (folder / "first" / "model.safetensors").stat().st_size
    with open(folder / "stale" / "model.safetensors", "r+b") as file:
        file.seek(stored // 20)
        file.write(bytes(stored // 10))  # of the embedding, which comes first
    subprocess.run(["sync", *folder.glob("*/*.safetensors")], check=True)
    with hosts(2, tmp_path) as bed:
        command = bed.command([2, 1], [sys.executable, "-c", PROGRAM, folder], "mpich")
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    shared, local, stale = json.loads(done.stdout)
    asked, _, digests, lines = shared
    assert stored <= sum(asked) <= 1.05 * stored
    assert min(asked) > 0.2 * stored
    assert lines[0][-1].startswith(f"read {stored / 1e9:.2f} GB once for 2 hosts in ")
    _, (first, second, other), same_digests, lines = local
    # All that its ranks need, which is not all of it, and nothing twice.
    assert 0.6 * stored <= first + second <= 1.05 * stored
    assert 0.3 * stored <= other <= 1.05 * stored
    assert "once" not in lines[0][-1]
    assert same_digests == digests
    for (line,) in stale[3]:
        assert line.startswith(f"{folder}/stale/model.safetensors on {bed.names[1]} differs from model.safetensors on")
