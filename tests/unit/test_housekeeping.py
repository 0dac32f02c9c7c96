"""What the project says about itself is true: the README's commands exist, and no file names somebody's machine."""

import re
import shlex
import subprocess
from importlib import import_module
from pathlib import Path

import pytest

from tpcpu import __version__, cli

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
LAUNCH = ROOT / "launch"


def tracked_files() -> list[Path]:
    """The files of the project: those that git would commit."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        check=True,
        timeout=60,
    ).stdout.decode()
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def command_lines(text: str) -> list[list[str]]:
    """The arguments of each `tpcpu ...` line in the text's blocks of code or here-documents."""
    joined = text.replace("\\\n", " ")
    lines = re.findall(r"^ *(?:mpiexec -n \d+ )?tpcpu (.+)$", joined, flags=re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]


def documented_commands() -> list[list[str]]:
    texts = [path.read_text() for path in (README, LAUNCH / "README.md", LAUNCH / "quickstart.sh")]
    return [line for text in texts for line in command_lines(text)]


def test_the_readme_begins_with_the_two_commands():
    head = README.read_text()[:1000]
    for script in ("./launch/quickstart.sh", "./launch/test.sh"):
        assert script in head
        assert (ROOT / script).stat().st_mode & 0o111, f"{script} cannot be run"
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
    assert "launch/test.sh" in (ROOT / ".ci" / "run").read_text()


def test_command_lines_are_found():
    text = (
        "a\n```\n. .venv/bin/activate\nmpiexec -n 2 tpcpu chat \\\n  --model m   # talk\n  tpcpu inspect 'a b'\n```\n"
    )
    assert command_lines(text) == [["chat", "--model", "m"], ["inspect", "a b"]]
    assert len(documented_commands()) >= 8


@pytest.mark.parametrize("arguments", documented_commands(), ids=" ".join)
def test_every_documented_command_line_is_one(arguments):
    """The parser takes it: the command exists, and so do its flags. A variable of the shell stands for one word."""
    modules = {name: import_module(f"tpcpu.cli.{name}") for name in cli.COMMANDS}
    assert cli.make_parser(modules).parse_args(arguments).command == arguments[0]


def test_every_command_named_in_the_readme_exists():
    named = set(re.findall(r"`tpcpu ([a-z]+)", README.read_text()))
    assert named >= set(cli.COMMANDS)
    assert named <= set(cli.COMMANDS)


def test_the_tree_in_the_readme_is_the_tree():
    (tree,) = re.findall(r"^```\n(launch/.*?)```", README.read_text(), flags=re.MULTILINE | re.DOTALL)
    for name in re.findall(r"^  (\S+)", tree, flags=re.MULTILINE):
        assert (ROOT / "tpcpu" / name).exists(), name
    listed = {name.rstrip("/") for name in re.findall(r"^  (\S+)", tree, flags=re.MULTILINE)}
    there = {path.name for path in (ROOT / "tpcpu").iterdir() if path.is_dir() and not path.name.startswith("_")}
    assert there <= listed


def test_the_changelog_names_this_version():
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert any(__version__ in heading for heading in headings)
    assert any("Unreleased" in heading for heading in headings)


def test_no_file_names_a_place_on_one_machine():
    """A path from somebody's home or workplace is of no use elsewhere."""
    pattern = re.compile(rb"(?<![\w.*{}~])/(?:work|farm|root|home)/[a-z.]")
    found = [
        f"{path.relative_to(ROOT)}: {line[:120]!r}"
        for path in tracked_files()
        if b"\0" not in (content := path.read_bytes())
        for line in content.splitlines()
        if pattern.search(line)
    ]
    assert found == []


def test_bundled_models_come_with_their_licence():
    readme = README.read_text()
    data = ROOT / "tests" / "data"
    for path in data.iterdir():
        if path.name != "README.md":
            assert f"`{path.name}`" in readme or f"`{path.name}:" in readme or f"`{path.name}`:" in readme, path.name
    for licence in ("Apache-2.0", "MIT", "CDLA-Sharing-1.0"):
        assert licence in readme
        assert licence in (data / "README.md").read_text()
