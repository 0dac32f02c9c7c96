"""Files that list hosts and how many ranks each holds, as MPICH, Intel MPI and Open MPI write them.

Knows lines; must not know launchers.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from tpcpu.errors import LaunchError

_LINE = re.compile(r"(?P<name>[\w.-]+|\[[0-9a-fA-F:]+\])(?::(?P<count>\d+))?(?:\s+(?P<words>.*))?")


@dataclass(frozen=True)
class Host:
    """A host and the ranks that it holds."""

    name: str
    ranks: int


def read_hostfile(path: Path) -> list[Host]:
    """`name`, `name:2` or `name slots=2`, one a line; the same host may come again. LaunchError for anything else."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise LaunchError(f"{path}: {getattr(error, 'strerror', None) or 'is no text'}") from error
    found: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        text = line.split("#")[0].strip()
        if not text:
            continue
        match = _LINE.fullmatch(text)
        slots = re.search(r"\bslots\s*=\s*(\d+)", (match and match["words"]) or "")
        if match is None or (match["words"] and slots is None and "=" not in match["words"]):
            raise LaunchError(f"{path}:{number}: found {text!r}, expected a line such as node1:2 or node1 slots=2")
        count = int(match["count"] or (slots[1] if slots else 1))
        found[match["name"]] = found.get(match["name"], 0) + count
    if not found:
        raise LaunchError(f"{path}: lists no host; a line such as node1:2 is one with two ranks")
    return [Host(name, ranks) for name, ranks in found.items()]
