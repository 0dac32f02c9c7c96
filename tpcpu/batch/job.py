"""Which job this is: what decides the answers, in a form that an earlier run's journal can be compared with.

Ranks, threads, chunks, pages and company change no answer, or only the order of float sums, so they are not in it.
Knows files of a model by name; nothing of tensors.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tpcpu.checkpoint import Checkpoint
from tpcpu.checkpoint.marks import samples
from tpcpu.engine.engine import Options
from tpcpu.sampling import SamplingParams

_TEXT_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "qwen.tiktoken",
)  # fmt: skip

_SAMPLES = 64
"""Of each weights file: reading all of it would take as long as loading does."""


def describe(checkpoint: Checkpoint, digest: str, options: Options, defaults: SamplingParams) -> dict[str, Any]:
    """The job whose input has this digest. `settings` are those of model and sampling that change answers."""
    return {
        "input": digest,
        "model": model_digest(checkpoint.path, checkpoint.files),
        "settings": {
            "context": options.context,
            "format": options.format,
            "lm_head": options.lm_head,
            "exact": options.exact,
            "wire": options.wire,
            "kv_cache": options.kv_cache or ("float32" if options.exact else "bf16"),
            **_plain(asdict(defaults)),
        },
    }


def model_digest(folder: Path, weights: Iterable[Path]) -> str:
    """The same for copies of a folder; another one for other text files, headers, sizes or (samples of) weights."""
    digest = hashlib.sha256()
    for name in _TEXT_FILES:
        path = folder / name
        if path.is_file():
            digest.update(f"{name}\0{path.stat().st_size}\0".encode())
            digest.update(path.read_bytes())
    for path in weights:
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        for sample in samples(path, _SAMPLES):
            digest.update(sample)
    return digest.hexdigest()


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON gives them back."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
