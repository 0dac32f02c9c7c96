"""Models that the Hugging Face cache of this user holds, found by name (`owner/model`). Nothing is downloaded.

Knows the layout of that cache. Knows nothing of what is in a model.
"""

import os
import re
from pathlib import Path

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def cache_folder() -> Path:
    """Where the Hugging Face tools keep what they downloaded, by their own environment variables."""
    if folder := os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE"):
        return Path(folder).expanduser()
    home = os.environ.get("HF_HOME")
    if not home:
        home = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(home).expanduser() / "hub"


def find(name: str) -> Path | None:
    """The folder of the model `owner/model` as last downloaded (its `main`, or its only revision), or None."""
    if not _NAME.fullmatch(name):
        return None
    model = cache_folder() / f"models--{name.replace('/', '--')}"
    try:
        revision = (model / "refs" / "main").read_text(encoding="ascii").strip()
        snapshot = model / "snapshots" / revision
        if re.fullmatch(r"\w+", revision) and snapshot.is_dir():
            return snapshot
    except (OSError, UnicodeDecodeError):
        pass
    snapshots = sorted((model / "snapshots").glob("*/")) if model.is_dir() else []
    return snapshots[0] if len(snapshots) == 1 else None
