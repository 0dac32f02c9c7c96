"""A rank whose core is busy with something else is named, with what the others wait for it."""

import json
import os
import re
import subprocess
import sys
from contextlib import ExitStack

import pytest

from tests.e2e.processes import family
from tests.hosts import hosts, missing
from tests.shared import DATA
from tpcpu.parallel.topology import Topology

HOG = "import os, sys; os.sched_setaffinity(0, {int(sys.argv[1])})\nwhile True: pass"
SCRIPT = f"""
import json, sys, time
from tpcpu import LLM, SamplingParams
class Said:
    def say(self, line): print("said", line, file=sys.stderr)
    def advance(self, done, total): pass
with LLM({str(DATA / "yuan-tiny")!r}, 2, format="nf4", threads=1, progress=Said()) as llm:
    begin, slow = time.monotonic(), False
    while not slow and time.monotonic() - begin < 60:
        llm.generate([[1, 2, 3]], SamplingParams(max_tokens=400, ignore_eos=True))
        slow = bool(llm.slow_ranks)
    print(json.dumps([vars(each) for each in llm.slow_ranks]))
"""


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two ranks need a core each")
def test_a_rank_on_a_busy_core_is_named(tmp_path):
    cpu = Topology.detect().cores_for(1, 2)[0]
    hog = subprocess.Popen([sys.executable, "-c", HOG, str(cpu)])
    try:
        with family([sys.executable, "-c", SCRIPT], tmp_path) as started:
            code, out, err = started.end()
        assert code == 0, err
        (slow,) = json.loads(out)
        assert slow["rank"] == 1
        assert slow["host"] == os.uname().nodename
        assert 0.15 < slow["waited"] < 1
        assert f"said rank 1 on {slow['host']}: all-reduce waits " in err
        assert "% of the step for it" in err
    finally:
        hog.kill()
        hog.wait()


ON_HOSTS = f"""
import os, sys
# as SLURM does: so many, and which
os.environ["SLURM_CPUS_ON_NODE"] = "1"
os.sched_setaffinity(0, {{int(dict(each.split("=") for each in sys.argv[1:])[os.uname().nodename])}})
sys.argv[1:] = [
    "batch", "--model", {str(DATA / "yuan-tiny")!r}, "--input", "in", "--output", "out", "--threads", "1", "--json",
    "--max-tokens", "2", "--ignore-eos",
]
from tpcpu.cli import main
sys.exit(main())
"""


@pytest.mark.full
@pytest.mark.skipif(missing() is not None, reason=str(missing()))
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two ranks need a core each")
def test_a_host_with_a_busy_core_is_named(tmp_path):
    """Two hosts with a core each, as an allocation can make them of one machine."""
    cpus = [Topology.detect().cores_for(rank, 2)[0] for rank in range(2)]
    (tmp_path / "program.py").write_text(ON_HOSTS)
    # long prompts: work, and not messages, is most of a step
    lines = [json.dumps({"id": number, "prompt": f"{number} " + 90 * "upon a time "}) for number in range(150)]
    (tmp_path / "in").write_text("\n".join(lines) + "\n")
    hog = subprocess.Popen([sys.executable, "-c", HOG, str(cpus[1])])
    with ExitStack() as stack:
        stack.callback(hog.wait)
        stack.callback(hog.kill)
        made = stack.enter_context(hosts(2, tmp_path))
        places = [f"{name}={cpu}" for name, cpu in zip(made.names, cpus, strict=True)]
        command = made.command([1, 1], [sys.executable, "program.py", *places], "mpich")
        with family(command, tmp_path) as started:
            code, out, err = started.end()
    assert code == 0, err
    (slow,) = json.loads(out.splitlines()[-1])["slow_ranks"]
    assert (slow["rank"], slow["host"]) == (1, made.names[1])
    assert re.search(rf"rank 1 on {made.names[1]}: all-reduce waits \d+% of the step for it", err), err
