"""The sum of a test run: passed, failed and skipped over all tiers, and whether each skip was allowed.

Reads what test.sh leaves in its results folder: one JUnit file per pytest run, and notes.tsv with a line
(name, exit status) per run or check. With CI set, a skipped test counts as failed unless tests/allowed_skips.txt
names it with its reason. A test that was skipped in one run and ran in another (as a test for 3 ranks does, under
2 ranks) was not skipped. Knows nothing of tpcpu; standard library only.
"""

import os
import sys
import xml.etree.ElementTree as ET
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

ALLOWED_SKIPS = Path(__file__).parents[1] / "tests" / "allowed_skips.txt"


@dataclass
class Tally:
    """What a results folder adds up to. `skipped` maps a test's id to the reason; `complaints` are lines to print."""

    passed: int = 0
    failed: int = 0
    skipped: dict[str, str] = field(default_factory=dict)
    complaints: list[str] = field(default_factory=list)

    def line(self) -> str:
        """The closing line."""
        return f"{self.passed} passed, {self.failed} failed, {len(self.skipped)} skipped"


def read_allowed_skips(text: str) -> list[tuple[str, str]]:
    """Pairs (pattern of test ids, pattern of reasons) of an allowed_skips file; ValueError where a line lacks one."""
    pairs = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        test, separator, reason = (part.strip() for part in line.partition(" | "))
        if not (test and separator and reason):
            raise ValueError(f'allowed_skips.txt line {number}: found "{line}", expected "test id | reason"')
        pairs.append((test, reason))
    return pairs


def is_allowed(test: str, reason: str, allowed: list[tuple[str, str]]) -> bool:
    """Whether a line of the file names both this test and this reason (shell patterns)."""
    return any(fnmatchcase(test, t) and fnmatchcase(reason, r) for t, r in allowed)


def tally(results: Path, allowed: list[tuple[str, str]] | None) -> Tally:
    """Adds up a results folder; `allowed` None means that any skip is fine (outside CI)."""
    total = Tally()
    ran: set[str] = set()
    failures_of: dict[str, int] = {}
    for report in sorted(results.glob("*.xml")):
        for case in ET.parse(report).iter("testcase"):
            test = _test_id(case)
            skip = case.find("skipped")
            if case.find("failure") is not None or case.find("error") is not None:
                total.failed += 1
                failures_of[report.stem] = failures_of.get(report.stem, 0) + 1
            elif skip is not None and skip.get("type") != "pytest.xfail":
                total.skipped[test] = (skip.get("message") or "").removeprefix("Skipped: ")
            else:
                total.passed += 1
                ran.add(test)
    for name, status in _notes(results):
        is_pytest = (results / f"{name}.xml").exists()
        if status == 0:
            total.passed += not is_pytest
        elif not failures_of.get(name):
            # A limit that ran out, a rank that fell, a check that complained, no test at all: nothing above counted it.
            total.failed += 1
            total.complaints.append(f"{name}: {_meaning(status)}")
    total.skipped = {test: reason for test, reason in total.skipped.items() if test not in ran}
    if allowed is not None:
        for test, reason in list(total.skipped.items()):
            if not is_allowed(test, reason, allowed):
                del total.skipped[test]
                total.failed += 1
                total.complaints.append(f"{test}: skipped, and not in tests/allowed_skips.txt: {reason}")
    if total.passed + total.failed == 0:
        total.failed = 1
        total.complaints.append("no test ran")
    return total


def _test_id(case: ET.Element) -> str:
    """`tests/unit/test_x.py::TestY::test_z`, from what a JUnit file of the xunit1 family says."""
    file, classname, name = case.get("file"), case.get("classname") or "", case.get("name") or ""
    if file is None:
        return "::".join(part for part in (classname, name) if part)
    inside = classname.removeprefix(file.removesuffix(".py").replace("/", ".")).strip(".")
    return "::".join([file, *filter(None, inside.split(".")), name])


def _notes(results: Path) -> list[tuple[str, int]]:
    path = results / "notes.tsv"
    lines = path.read_text().splitlines() if path.exists() else []
    return [(name, int(status)) for name, status in (line.split("\t") for line in lines)]


def _meaning(status: int) -> str:
    known = {
        4: "pytest refused its arguments or found no such folder",
        5: "no test was found",
        124: "ended at its time limit",
        137: "killed at its time limit",
    }
    return known.get(status, f"exit status {status}")


def main(arguments: list[str]) -> int:
    """Prints the skips, the complaints and the closing line; 1 if anything failed."""
    allowed = read_allowed_skips(ALLOWED_SKIPS.read_text()) if os.environ.get("CI") else None
    total = tally(Path(arguments[0]), allowed)
    for test, reason in total.skipped.items():
        print(f"skipped: {test}: {reason}")
    for complaint in total.complaints:
        print(complaint)
    print(total.line(), flush=True)
    return int(total.failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
