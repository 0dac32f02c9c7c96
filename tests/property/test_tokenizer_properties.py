"""Damaged tokenizer files always end in a named error or a working tokenizer."""

import contextlib
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.shared import DATA
from tpcpu.errors import TextError
from tpcpu.text import load_tokenizer

FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


@pytest.mark.parametrize("file", FILES)
@settings(max_examples=40, deadline=None)
@given(
    changes=st.lists(st.tuples(st.integers(0), st.integers(0, 255)), max_size=6), keep=st.floats(0, 1) | st.just(1.0)
)
def test_damaged_files_are_refused_or_work(file: str, changes: list[tuple[int, int]], keep: float) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for other in FILES:
            shutil.copyfile(DATA / "stories260k" / other, folder / other)
        if file == "tokenizer.model":
            (folder / "tokenizer.json").unlink()
        content = bytearray((folder / file).read_bytes())
        for place, value in changes:
            content[place % len(content)] = value
        (folder / file).write_bytes(content[: round(keep * len(content))])
        with contextlib.suppress(TextError):
            tokenizer = load_tokenizer(folder, {})
            ids = tokenizer.encode("Hello wörld 好 </s> x")
            tokenizer.decode(ids, skip_special=False)
            tokenizer.decode(range(tokenizer.size))
