"""The page on architectures is true: its table is the registry's, and its diff is what stands in the files."""

import re
from pathlib import Path

import pytest

from tpcpu.models import table

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "tpcpu" / "models" / "README.md"


@pytest.mark.parametrize("page", [PAGE, ROOT / "README.md"], ids=["models", "project"])
def test_the_table_is_the_registrys(page: Path) -> None:
    assert table() in page.read_text(encoding="utf-8")


def test_the_diff_is_what_stands_in_the_files() -> None:
    (diff,) = re.findall(r"^```diff\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    parts = re.split(r"^--- a/.*\n\+\+\+ b/(.*)\n", diff, flags=re.MULTILINE)[1:]
    assert len(parts) == 8
    for path, added in zip(parts[::2], parts[1::2], strict=True):
        text = "".join(line[1:] + "\n" for line in added.splitlines())
        assert text in (ROOT / path).read_text(encoding="utf-8"), path
