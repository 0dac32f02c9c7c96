"""How fast `quantize` is, and how much memory it takes: MB/s of source, peak resident memory over the interpreter's.

Makes a Llama folder of random bf16 weights, quantises it in a process of its own, and removes both. The last line is
JSON.

    python tests/bench/quantize_speed.py [--folder /dev/shm] [--gigabytes 1] [--format nf4] [--runs 3]
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from tpcpu.checkpoint import Planned, WeightsWriter

HIDDEN, FFN, VOCAB = 2048, 5632, 32000

CHILD = """
import json, re, sys
from tpcpu.quantize import quantize

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

import numba, safetensors  # part of the baseline, with the compiled functions that tpcpu.quantize has loaded
baseline = peak()
report = quantize(sys.argv[1], sys.argv[2], sys.argv[3])
print(json.dumps({"seconds": report.seconds, "source_bytes": report.source_bytes, "written_bytes": report.written_bytes,
                  "peak_bytes": peak() - baseline}))
"""


def make_model(folder: Path, gigabytes: float) -> int:
    """A folder with about that many bytes of weights; returns the bytes of its largest tensor."""
    layer = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (HIDDEN // 8, HIDDEN),
        "self_attn.v_proj": (HIDDEN // 8, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (FFN, HIDDEN),
        "mlp.up_proj": (FFN, HIDDEN),
        "mlp.down_proj": (HIDDEN, FFN),
        "input_layernorm": (HIDDEN,),
        "post_attention_layernorm": (HIDDEN,),
    }
    layer_bytes = 2 * sum(int(np.prod(shape)) for shape in layer.values())
    layers = max(1, round((gigabytes * 1e9 - 2 * VOCAB * HIDDEN) / layer_bytes))
    shapes = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for i in range(layers):
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "max_position_embeddings": 2048,
        "num_attention_heads": 32,
        "num_hidden_layers": layers,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "vocab_size": VOCAB,
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    random = np.random.default_rng(0)
    some = (random.standard_normal(1 << 22, dtype=np.float32) * np.float32(0.02)).view(np.uint32) >> np.uint32(16)
    bits = some.astype(np.uint16)
    with WeightsWriter(folder / "model.safetensors", [Planned(n, "BF16", s) for n, s in shapes.items()]) as weights:
        for name, shape in shapes.items():
            size = int(np.prod(shape))
            for start in range(0, size, bits.size):
                weights.write(name, np.roll(bits, random.integers(bits.size))[: size - start], 2 * start)
        weights.finish()
    return 2 * max(int(np.prod(shape)) for shape in shapes.values())


def main() -> int:
    """Measure and print; 1 where more memory was taken than is allowed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"))
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--format", default="nf4")
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="tpcpu-bench-", dir=args.folder))
    try:
        largest = make_model(work / "model", args.gigabytes)
        runs = []
        for run in range(args.runs + 1):  # the first compiles and is not counted
            command = [sys.executable, "-c", CHILD, str(work / "model"), str(work / "out"), args.format]
            lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
            result = json.loads(lines[-1])
            shutil.rmtree(work / "out")
            if run:
                runs.append(result)
    finally:
        shutil.rmtree(work)
    speeds = [run["source_bytes"] / run["seconds"] / 1e6 for run in runs]
    peak = max(run["peak_bytes"] for run in runs)
    limit = runs[0]["written_bytes"] + 1.2 * largest
    for speed, run in zip(speeds, runs, strict=True):
        print(f"{speed:6.0f} MB/s of source, peak {run['peak_bytes'] / 1e6:.0f} MB over the interpreter's")
    print(f"largest tensor {largest / 1e6:.0f} MB; allowed: output + 1.2 × that = {limit / 1e6:.0f} MB")
    print(
        json.dumps(
            {
                "format": args.format,
                "mb_per_s": [round(speed) for speed in speeds],
                "source_bytes": runs[0]["source_bytes"],
                "peak_bytes": peak,
                "largest_tensor_bytes": largest,
                "peak_of_largest_tensor": round(peak / largest, 3),
            }
        )
    )
    return int(peak > limit)


if __name__ == "__main__":
    sys.exit(main())
