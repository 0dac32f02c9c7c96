"""What quantising costs: the loss of the bundled models on `heldout.txt` in every format, the table of the README.

All rows in exact arithmetic with the head as stored, so that they differ in the weights alone; differences to bf16
with their standard errors, paired by document. Plain 4-bit integers are a format that tpcpu does not have: they are
simulated in a float32 folder. Then what else may move a loss: int8 arithmetic and an int8 head, as they come by
default, against exact arithmetic; and exact arithmetic against plain torch over bitsandbytes' reading of the NF4
folder. The last line is JSON.

    python tests/bench/loss_table.py [--documents 43] [--no-torch]
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (numpy learns bfloat16 from it, which safetensors asks for)
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

sys.path.insert(0, str(Path(__file__).parents[2]))

from tpcpu import LLM
from tpcpu.cli.eval import mean_and_error, read_documents
from tpcpu.models import read_config
from tpcpu.parallel.partition import Share
from tpcpu.quantize import quantize
from tpcpu.text import load_tokenizer

DATA = Path(__file__).parents[1] / "data"
MODELS = ("yuan-tiny", "llama-tiny")
WINDOW = 256

ROWS = {
    "bf16": ("bf16", "16"),
    "int8": ("int8, blocks of 64", "8.5"),
    "nf4": ("NF4, double quantisation", "4.13"),
    "int4": ("plain 4-bit integers, blocks of 64", "4.5"),
}


def round_to_nearest(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """4-bit integers from -7 to 7 with a float32 scale for each 64: the values that they stand for."""
    blocks = values.astype(np.float32).reshape(-1, 64)
    scales = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(7)
    return (np.rint(blocks / np.where(scales == 0, np.float32(1), scales)) * scales).reshape(values.shape)


def write_int4(source: Path, target: Path) -> None:
    """A float32 folder whose multiplying weights hold what 4-bit integers would."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors*", "ref*.json"))
    program = read_config(json.loads((source / "config.json").read_text())).program(Share())
    rounded = {each.name for each in program.weights if each.kind.multiplies and each.full_columns % 64 == 0}
    tensors = {}
    for file in sorted(source.glob("*.safetensors")):
        with safe_open(file, "np") as stored:
            for name in stored.keys():  # noqa: SIM118
                values = stored.get_tensor(name)
                tensors[name] = round_to_nearest(values) if name in rounded else values.astype(np.float32)
    save_file(tensors, target / "model.safetensors")


def losses(folder: Path, documents: Sequence[str], **settings: Any) -> tuple[list[float], list[int]]:
    """Loss and scored tokens of each document."""
    with LLM(folder, ranks=1, **settings) as llm:
        scores = llm.score(documents, WINDOW)
    return [score.nll for score in scores], [score.tokens for score in scores]


def torch_losses(folder: Path, documents: Sequence[str]) -> list[float]:
    from tests.e2e.torch_peer import losses as peer

    tokenizer = load_tokenizer(folder, json.loads((folder / "config.json").read_text()))
    return peer(folder, [tokenizer.encode(document)[:WINDOW] for document in documents])


def difference(losses: Sequence[float], others: Sequence[float], tokens: list[int]) -> tuple[float, float]:
    """The mean difference per token, and its standard error, paired by document."""
    return mean_and_error([loss - other for loss, other in zip(losses, others, strict=True)], tokens)


def measure(name: str, documents: Sequence[str], work: Path, torch: bool) -> dict[str, Any]:
    """All figures of one model."""
    source, nf4, int4 = DATA / name, work / f"{name}-nf4", work / f"{name}-int4"
    quantize(source, nf4, "nf4")
    write_int4(source, int4)
    exact = {"exact": True, "lm_head": "bf16"}
    bf16, tokens = losses(source, documents, **exact)
    held = {
        "bf16": bf16,
        "int8": losses(source, documents, format="int8", **exact)[0],
        "nf4": losses(nf4, documents, **exact)[0],
        "int4": losses(int4, documents, exact=True)[0],
    }
    result: dict[str, Any] = {"tokens": sum(tokens), "formats": {}}
    for format_name, values in held.items():
        more, error = difference(values, bf16, tokens)
        result["formats"][format_name] = {"loss": sum(values) / sum(tokens), "difference": more, "error": error}
    entry = result["formats"]["int4"]
    entry["minus_nf4"], entry["minus_nf4_error"] = difference(held["int4"], held["nf4"], tokens)
    for format_name, folder in (("int8", source), ("nf4", nf4)):
        by_default = losses(folder, documents, format=format_name)[0]
        slowly = losses(folder, documents, format=format_name, exact=True)[0]
        entry = result["formats"][format_name]
        entry["default_minus_exact"], entry["default_minus_exact_error"] = difference(by_default, slowly, tokens)
        entry["head_int8_minus_bf16"], entry["head_int8_minus_bf16_error"] = difference(
            slowly, held[format_name], tokens
        )
    if torch:
        theirs = torch_losses(nf4, documents)
        result["formats"]["nf4"]["exact_minus_torch"] = difference(held["nf4"], theirs, tokens)[0]
    return result


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=None, help="only the first so many")
    parser.add_argument("--no-torch", action="store_true", help="leave the comparison with torch out")
    args = parser.parse_args()
    documents = read_documents(DATA / "heldout.txt", "<eod>")[: args.documents]
    work = Path(tempfile.mkdtemp(prefix="tpcpu-bench-"))
    try:
        found = {name: measure(name, documents, work, not args.no_torch) for name in MODELS}
    finally:
        shutil.rmtree(work)
    print("| format | bits per weight | " + " | ".join(f"`{name}` | difference" for name in MODELS) + " |")
    print("|---|---|" + "---|---|" * len(MODELS))
    for row, (title, bits) in ROWS.items():
        cells = [title, bits]
        for name in MODELS:
            entry = found[name]["formats"][row]
            sign = "+" if entry["difference"] >= 0 else "−"
            cells.append(f"{entry['loss']:.4f}")
            cells.append("" if row == "bf16" else f"{sign}{abs(entry['difference']):.4f} ± {entry['error']:.4f}")
        print("| " + " | ".join(cells) + " |")
    print()
    for name in MODELS:
        entry = found[name]["formats"]["int4"]
        print(f"{name}: 4-bit integers − NF4 {entry['minus_nf4']:+.4f} ± {entry['minus_nf4_error']:.4f}")
        for row in ("int8", "nf4"):
            entry = found[name]["formats"][row]
            parts = [
                f"default − exact arithmetic {entry['default_minus_exact']:+.5f} ± "
                f"{entry['default_minus_exact_error']:.5f}",
                f"int8 − bf16 head {entry['head_int8_minus_bf16']:+.5f} ± {entry['head_int8_minus_bf16_error']:.5f}",
            ]
            if "exact_minus_torch" in entry:
                parts.append(f"exact − torch {entry['exact_minus_torch']:+.1e}")
            print(f"{name}, {row}: {'; '.join(parts)}")
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
