"""The command line's frame: which module is loaded, what an error looks like, where output goes."""

import argparse
import dataclasses
import json
import subprocess
import sys
from types import ModuleType

import pytest

from tpcpu import __version__, cli
from tpcpu.cli import flags, output
from tpcpu.errors import ConfigError, RankError, SamplingError
from tpcpu.sampling import SamplingParams


@pytest.fixture(autouse=True)
def _not_launched(monkeypatch):
    for name in ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "PMIX_RANK", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def command(monkeypatch):
    """Installs a command `probe` beside `other`, whose import fails the test; returns a setter of what `probe` does."""
    module = ModuleType("tpcpu.cli.probe")

    def add_parser(subparsers):
        parser = subparsers.add_parser("probe", help="a probe")
        parser.add_argument("--count", type=flags.positive, default=1)

    def install(run):
        module.add_parser = add_parser
        module.run = run
        monkeypatch.setattr(cli, "COMMANDS", ("probe", "other"))
        monkeypatch.setitem(sys.modules, "tpcpu.cli.probe", module)
        monkeypatch.setitem(sys.modules, "tpcpu.cli.other", None)  # importing it raises

    return install


def launched_as_rank_1(monkeypatch):
    monkeypatch.setenv("PMI_SIZE", "2")
    monkeypatch.setenv("PMI_RANK", "1")


def raising(error):
    def run(_args):
        raise error

    return run


def test_only_the_named_command_is_imported(command):
    command(lambda args: args.count)
    assert cli.main(["probe", "--count", "7"]) == 7
    with pytest.raises(ImportError):
        cli.main(["--help"])


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ConfigError("config.json: nothing works"), 2, "config.json: nothing works"),
        (RankError("rank 2 (host a) died in layer 3 all_reduce"), 1, "rank 2 (host a) died in layer 3 all_reduce"),
        (
            ConfigError("two\nlines, a bell \a and half a pair \ud800"),
            2,
            "two lines, a bell \\x07 and half a pair \\ud800",
        ),
        (MemoryError("cannot allocate 5.0 GB"), 1, "out of memory: cannot allocate 5.0 GB; a smaller --context"),
        (MemoryError(), 1, "out of memory; a smaller --context"),
    ],
)
def test_an_error_is_one_line_and_an_exit_code(command, capsys, error, code, line):
    command(raising(error))
    assert cli.main(["probe"]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"tpcpu: error: {line}")
    assert err.count("\n") == 1
    assert err.endswith("\n")


def test_ctrl_c_is_130_and_silent(command, capsys):
    command(raising(KeyboardInterrupt()))
    assert cli.main(["probe"]) == 130
    assert capsys.readouterr() == ("", "")


def test_a_programming_error_keeps_its_traceback(command):
    command(raising(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        cli.main(["probe"])


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["probe", "--count", "0"], "argument --count: found '0', expected a whole number of at least 1"),
        (["probe", "--count", "1.5"], "argument --count: found '1.5'"),
        (["probe", "--cou", "1"], "unrecognized arguments: --cou 1"),  # no abbreviations
        (["probe", "stray"], "unrecognized arguments: stray"),
    ],
)
def test_a_wrong_command_line_is_one_line(command, capsys, arguments, part):
    command(lambda _args: 0)
    assert cli.main(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("tpcpu: error: ")
    assert part in err
    assert "tpcpu probe --help" in err or "tpcpu --help" in err
    assert err.count("\n") == 1


def test_a_user_mistake_is_said_by_rank_0_a_failure_by_any_rank(command, capsys, monkeypatch):
    launched_as_rank_1(monkeypatch)
    command(raising(ConfigError("met by all")))
    assert cli.main(["probe"]) == 2
    assert capsys.readouterr().err == ""
    command(raising(RankError("met by one")))
    assert cli.main(["probe"]) == 1
    assert "met by one" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("environment", "speaks"),
    [
        ({}, True),
        ({"PMI_SIZE": "4", "PMI_RANK": "0"}, True),
        ({"PMI_SIZE": "4", "PMI_RANK": "3"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}, False),
    ],
)
def test_rank_0_speaks(environment, speaks):
    assert output.is_speaker(environment) is speaks


def test_output_without_json(capsys):
    out = output.Output(as_json=False)
    out.note("reading")
    out.text("Once ")
    out.line("upon")
    out.result({"ids": [1]})
    assert capsys.readouterr() == ("Once upon\n", "tpcpu: reading\n")


def test_output_with_json_keeps_standard_output_for_one_line(capsys):
    out = output.Output(as_json=True)
    out.line("Once upon")
    out.result({"text": "é \ud800", "ids": [1, 2]})
    stdout, stderr = capsys.readouterr()
    assert stderr == "Once upon\n"
    assert stdout.count("\n") == 1
    assert json.loads(stdout) == {"text": "é \ud800", "ids": [1, 2]}


def test_output_refuses_numbers_that_json_does_not_have():
    with pytest.raises(ValueError, match="JSON"):
        output.Output(as_json=True).result({"nll": float("nan")})


def test_followers_print_nothing(capsys, monkeypatch):
    launched_as_rank_1(monkeypatch)
    out = output.Output(as_json=True)
    out.line("a")
    out.note("b")
    out.result({})
    assert capsys.readouterr() == ("", "")


def parse(add, *arguments):
    parser = cli.Parser(prog="tpcpu probe")
    add(parser)
    return parser.parse_args(arguments)


def test_model_flags_have_the_defaults_of_the_documentation():
    args = parse(flags.model_flags, "--model", "folder")
    assert vars(args) == {
        "model": "folder",
        "format": None,
        "lm_head": None,
        "context": None,
        "exact": False,
        "ranks": "auto",
        "threads": None,
        "chunk_tokens": None,
        "page_tokens": None,
        "cache_tokens": None,
        "kv_cache": None,
        "all_reduce": "window",
        "wire": "float32",
        "read": None,
        "fault_timeout": 10.0,
        "json": False,
    }


@pytest.mark.parametrize(("text", "value"), [("3", 3), ("auto", "auto")])
def test_ranks(text, value):
    assert parse(flags.model_flags, "--model", "m", "--ranks", text).ranks == value


@pytest.mark.parametrize("text", ["0", "-1", "many", "", "2.0"])
def test_impossible_ranks(text):
    with pytest.raises(cli.UsageError, match="expected a whole number of at least 1, or auto"):
        parse(flags.model_flags, "--model", "m", "--ranks", text)


def test_sampling_flags_that_are_not_given_leave_the_defaults():
    assert flags.sampling_params(parse(flags.sampling_flags)) == SamplingParams()


def test_sampling_flags_that_are_given_count():
    given = ["--max-tokens", "5", "--temperature", "0.5", "--stop", "a", "--stop", "b", "--ignore-eos", "--seed", "9"]
    expected = SamplingParams(max_tokens=5, temperature=0.5, stop=("a", "b"), ignore_eos=True, seed=9)
    assert flags.sampling_params(parse(flags.sampling_flags, *given)) == expected


def test_impossible_sampling_values_are_refused_where_their_meaning_is_known():
    with pytest.raises(SamplingError, match="temperature"):
        flags.sampling_params(parse(flags.sampling_flags, "--temperature", "-1"))


def test_every_sampling_flag_is_a_field_of_sampling_params():
    names = {action.dest for action in _actions(flags.sampling_flags)}
    assert names <= {field.name for field in dataclasses.fields(SamplingParams)}


def _actions(add):
    parser = argparse.ArgumentParser(add_help=False)
    add(parser)
    return parser._actions


def test_version_is_one_line(capsys, monkeypatch):
    mpi = ModuleType("tpcpu.parallel.mpi_library")
    mpi.library_name = lambda: "MPICH 5.0.2"
    monkeypatch.setitem(sys.modules, "tpcpu.parallel.mpi_library", mpi)
    assert cli.main(["--version"]) == 0
    line = capsys.readouterr().out
    assert line.startswith(f"tpcpu {__version__}, MPICH 5.0.2, ")
    assert "NUMA node" in line
    assert "core" in line
    assert line.count("\n") == 1


def test_version_without_an_mpi_says_so(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tpcpu.parallel.mpi_library", None)  # importing it raises ImportError
    assert cli.main(["--version"]) == 0
    assert ", no MPI library (one rank works; pip install 'tpcpu[mpich]' brings one), " in capsys.readouterr().out


def test_help_names_every_command(capsys):
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    first = {line.split()[0] for line in text.splitlines() if line.startswith("    ")}
    assert [name for name in cli.COMMANDS if name not in first] == []


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_of_every_command(capsys, name):
    assert cli.main([name, "--help"]) == 0
    assert f"tpcpu {name}" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "--bogus"], []])
def test_help_and_usage_errors_load_no_kernel_and_no_mpi(arguments):
    code = f"from tpcpu.cli import main; main({arguments!r}); import sys; print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    heavy = {"numba", "llvmlite", "mpi4py", "numpy", "torch", "tokenizers", "sentencepiece", "jinja2"}
    assert heavy.isdisjoint(done.stderr.split())


def test_a_reader_that_leaves_is_no_traceback():
    """`tpcpu ... | head -1`: the pipe breaks while the answer still streams."""
    code = (
        "import sys, types\n"
        "from tpcpu import cli\n"
        "probe = types.ModuleType('tpcpu.cli.probe')\n"
        "probe.add_parser = lambda subparsers: subparsers.add_parser('probe')\n"
        "def run(args):\n"
        "    from tpcpu.cli.output import Output\n"
        "    while True:\n"
        "        Output(as_json=False).line('Once upon a time')\n"
        "probe.run = run\n"
        "sys.modules['tpcpu.cli.probe'] = probe\n"
        "cli.COMMANDS = ('probe',)\n"
        "sys.exit(cli.main(['probe']))\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"Once upon a time\n"
        process.stdout.close()
        assert process.wait(timeout=60) == 1
        assert process.stderr.read() == b""
