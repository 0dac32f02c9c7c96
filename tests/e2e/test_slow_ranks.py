"""A rank whose core is busy with something else is named, with what the others wait for it."""

import json
import os
import subprocess
import sys

import pytest

from tests.e2e.processes import family
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
        assert out.count("rank") == 1, out + err
        (slow,) = json.loads(out)
        assert slow["rank"] == 1
        assert slow["host"] == os.uname().nodename
        assert 0.15 < slow["waited"] < 1
        assert f"said rank 1 on {slow['host']}: all-reduce waits " in err
        assert "% of the step for it" in err
    finally:
        hog.kill()
        hog.wait()
