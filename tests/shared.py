"""Where tests find files that are too large or too foreign to be bundled: a folder beside the repository, often
absent."""

from pathlib import Path

import pytest

SHARED = Path(__file__).parents[2] / "shared"
DATA = Path(__file__).parent / "data"


def shared(relative: str) -> Path:
    """The file or folder `relative` of the shared folder; skips the test where it is absent."""
    path = SHARED / relative
    if not path.exists():
        pytest.skip(f"needs shared/{relative} beside the repository")
    return path
