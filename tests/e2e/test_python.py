"""tpcpu.LLM as a person uses it: in one process, from a plain script with several ranks, and under mpiexec."""

import json
import os
import re
import signal
import sys
import textwrap
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.e2e.processes import Family, family
from tpcpu import LLM, Completion, SamplingParams
from tpcpu.engine.engine import Engine
from tpcpu.errors import PromptError, RankError, SamplingError, UsageError
from tpcpu.program.batch import Batch

DATA = Path(__file__).parents[1] / "data"
YUAN = DATA / "yuan-tiny"
STORIES = DATA / "stories260k"
CASES = {case["name"]: case for case in json.loads((YUAN / "reference.json").read_text())["cases"]}
STORY, MATHS = CASES["story"], CASES["maths"]
GREEDY = SamplingParams(max_tokens=48, ignore_eos=True)
SHORT = SamplingParams(max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module", params=[1, 2], ids=["1 rank", "2 ranks"])
def llm(request: pytest.FixtureRequest) -> Iterator[LLM]:
    """On one rank in this process, and on two that this process starts."""
    with LLM(YUAN, ranks=request.param, exact=True) as model:
        yield model


# -- whatever the number of ranks


def test_answers_come_in_order_and_are_the_published_ones(llm):
    question = [{"role": "user", "content": MATHS["prompt"].removesuffix("<sep>")}]
    text, ids, array, message = llm.generate(
        [STORY["prompt"], MATHS["prompt_ids"], np.array(STORY["prompt_ids"]), question], GREEDY
    )
    for answer, case in ((text, STORY), (ids, MATHS), (array, STORY), (message, MATHS)):
        assert answer.prompt_ids == case["prompt_ids"]
        assert answer.ids == case["greedy_ids"]
        assert answer.text.strip() == case["generated_text"]
        assert answer.finish_reason == "length"
        assert answer.ttft_ms > 0
        assert answer.decode_tokens_per_s > 0
        assert answer.logprobs is None
        assert answer.top_logits is None
    assert llm.is_root
    assert llm.info.exact
    assert len(llm.info.weight_bytes) == llm.info.ranks


def test_one_text_is_a_list_of_one(llm):
    (text,), (raw,) = llm.generate(STORY["prompt"], SHORT), llm.generate(STORY["prompt"].encode(), SHORT)
    assert text.ids == raw.ids == STORY["greedy_ids"][:8]
    assert llm.generate([], SHORT) == []


def test_figures_that_were_asked_for(llm):
    (answer,) = llm.generate(STORY["prompt"], replace(SHORT, logprobs=2, top_logits=3))
    assert isinstance(answer, Completion)
    assert len(answer.logprobs) == len(answer.top_logits) == 8
    for chosen, entry, top in zip(answer.ids, answer.logprobs, answer.top_logits, strict=True):
        assert entry["id"] == chosen == entry["top"][0][0] == top[0][0]
        assert isinstance(top[0], tuple)
        assert entry["logprob"] == pytest.approx(entry["top"][0][1])
    assert [number for number, _ in answer.top_logits[0]] == STORY["top20_ids"][:3]
    assert [value for _, value in answer.top_logits[0]] == pytest.approx(STORY["top20_logits"][:3], abs=2e-3)


def test_a_stream_is_the_answer_in_pieces(llm):
    chunks = list(llm.stream(STORY["prompt"], GREEDY))
    (whole,) = llm.generate(STORY["prompt"], GREEDY)
    assert [chunk.id for chunk in chunks if chunk.id is not None] == whole.ids
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert [chunk.completion is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
    assert chunks[-1].completion.ids == whole.ids


def test_an_answer_that_was_left_half_way_changes_nothing(llm):
    stream = llm.stream(STORY["prompt"], GREEDY)
    begun = [next(stream).id for _ in range(5)]
    stream.close()
    assert begun == STORY["greedy_ids"][:5]
    assert list(stream) == []
    (again,) = llm.generate(STORY["prompt"], GREEDY)
    assert again.ids == STORY["greedy_ids"]


def test_the_next_request_ends_an_answer(llm):
    """Two answers at a time would share a sequence: the first must not go on with the second one's tokens."""
    first = llm.stream(STORY["prompt"], GREEDY)
    next(first)
    second = llm.stream(MATHS["prompt"], GREEDY)
    next(second)
    with pytest.raises(UsageError, match="next request"):
        next(first)
    assert [MATHS["greedy_ids"][0], *(chunk.id for chunk in second)][:-1] == MATHS["greedy_ids"]


def test_ctrl_c_during_an_answer_leaves_a_model_that_answers(llm):
    def interrupted() -> None:
        for number, _ in enumerate(llm.stream(STORY["prompt"], GREEDY)):
            if number == 3:
                signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    (again,) = llm.generate(STORY["prompt"], SHORT)
    assert again.ids == STORY["greedy_ids"][:8]


@pytest.mark.parametrize(
    ("prompt", "error", "part"),
    [
        ("", PromptError, "no tokens"),
        ([], PromptError, "no tokens"),
        (STORY["prompt"] * 80, PromptError, "context of 512"),
        ([1, 99999], PromptError, "99999"),
        ([1, -1], PromptError, "-1"),
        ([1, 2.5], PromptError, "2.5"),
        ([1, True], PromptError, "True"),
        (["Once"], PromptError, "'Once'"),
        (7, PromptError, "int"),
        (None, PromptError, "NoneType"),
        ([object()], PromptError, "expected"),
        (b"caf\xe9", PromptError, "UTF-8"),
        ([{"role": "user"}], PromptError, "content"),
        ([{"role": "user", "content": "\ud800"}], PromptError, "surrogate"),
    ],
    ids=repr,
)
def test_a_prompt_that_cannot_be_answered(llm, prompt, error, part):
    with pytest.raises(error, match=part):
        llm.generate([prompt], SHORT)
    (answer,) = llm.generate(STORY["prompt"], SHORT)
    assert answer.ids == STORY["greedy_ids"][:8]


def test_a_list_of_messages_where_a_list_of_conversations_belongs(llm):
    with pytest.raises(PromptError, match="lists of messages"):
        llm.generate([{"role": "user", "content": "Hello"}], SHORT)


def test_a_seed_is_told_and_gives_the_text_again(llm):
    sampled = replace(SHORT, temperature=1.0)
    (first,) = llm.generate(STORY["prompt"], sampled)
    (again,) = llm.generate(STORY["prompt"], replace(sampled, seed=first.seed))
    assert again.ids == first.ids


# -- in one process


def test_impossible_values_are_refused_before_anything_runs():
    for wrong in ({"temperature": -1}, {"top_p": 0}, {"max_tokens": 0}, {"stop": ""}, {"seed": -1}, {"top_k": 1.5}):
        with pytest.raises(SamplingError, match=next(iter(wrong))):
            SamplingParams(**wrong)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_closed_model_says_so(ranks):
    model = LLM(STORIES, ranks=ranks)
    model.generate("Once", SHORT)
    left = model.stream("Once", SHORT)
    next(left)
    model.close()
    model.close()
    for request in (lambda: model.generate("Once"), lambda: model.stream("Once"), lambda: model.score(["Once"])):
        with pytest.raises(UsageError, match="closed"):
            request()
    with pytest.raises(UsageError):
        next(left)


def test_a_model_after_another_and_in_another_thread():
    answers = []

    def answer() -> None:
        with LLM(STORIES, ranks=1, exact=True) as model:
            answers.extend(model.generate(["Once", "The"], SHORT))

    answer()
    thread = threading.Thread(target=answer)
    thread.start()
    thread.join()
    assert [each.ids for each in answers[:2]] == [each.ids for each in answers[2:]]
    assert len(answers) == 4


def test_what_belongs_to_the_user_is_left_alone():
    """The main thread used to stay on one core while a model was open, and threads that it made inherited that."""
    mine, numbers = os.sched_getaffinity(0), [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD]
    handlers, threads = [signal.getsignal(number) for number in numbers], set(threading.enumerate())
    seen = []
    with LLM(STORIES, ranks=1) as model:
        stream = model.stream("Once", SHORT)
        next(stream)
        thread = threading.Thread(target=lambda: seen.append(os.sched_getaffinity(0)))
        thread.start()
        thread.join()
        assert [os.sched_getaffinity(0), *seen] == [mine, mine]
        assert [signal.getsignal(number) for number in numbers] == handlers
    assert os.sched_getaffinity(0) == mine
    assert set(threading.enumerate()) == threads


def test_a_conversation_goes_on_from_what_the_cache_has(monkeypatch):
    """And answers as if it had been read anew: a token's logits do not depend on how it came into the cache."""
    fed = []
    step = Engine.step

    def counted(self, batch: Batch):
        fed.append(len(batch.tokens))
        return step(self, batch)

    monkeypatch.setattr(Engine, "step", counted)
    with LLM(YUAN, ranks=1, format="nf4", page_tokens=16) as model:
        messages = [{"role": "user", "content": "How many legs have two cats?"}]
        (first,) = model.generate([messages], GREEDY)
        # The last token of the answer has not gone through the model; whole pages are kept.
        known = (len(first.prompt_ids) + len(first.ids) - 1) // 16 * 16
        assert known >= 48
        # As ids, for a text may be divided into tokens in another way when it is read again.
        longer = [*first.prompt_ids, *first.ids, *first.prompt_ids]
        model.generate([STORY["prompt"]], SHORT)
        fed.clear()
        (second,) = model.generate([longer], SHORT)
        assert sum(fed) == len(longer) - known + 7
    with LLM(YUAN, ranks=1, format="nf4") as model:
        fed.clear()
        (fresh,) = model.generate([longer], SHORT)
        assert sum(fed) == len(longer) + 7
    assert fresh.ids == second.ids


def test_many_prompts_are_answered_together_and_as_if_alone(llm):
    prompts = [case["prompt_ids"] for case in CASES.values()] * 3
    params = [
        replace(SHORT, max_tokens=3 + number, temperature=number % 2, seed=number) for number in range(len(prompts))
    ]
    together = llm.generate(prompts, params)
    for prompt, each, answer in zip(prompts, params, together, strict=True):
        (alone,) = llm.generate([prompt], each)
        assert (answer.ids, answer.text, answer.finish_reason) == (alone.ids, alone.text, alone.finish_reason)
    with pytest.raises(UsageError, match="found 2 for 3 prompts"):
        llm.generate(prompts[:3], [SHORT, SHORT])
    with pytest.raises(PromptError, match="context of 512"):
        llm.generate([*prompts[:3], STORY["prompt"] * 80], SHORT)


def test_ctrl_c_while_many_are_answered_leaves_a_model_that_answers(llm):
    def answer_for_ever() -> None:
        while True:
            llm.generate([STORY["prompt"], MATHS["prompt"]] * 20, replace(GREEDY, max_tokens=400))

    timer = threading.Timer(0.3, signal.raise_signal, [signal.SIGINT])
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        answer_for_ever()
    timer.join()
    (again,) = llm.generate(STORY["prompt"], SHORT)
    assert again.ids == STORY["greedy_ids"][:8]


@pytest.mark.parametrize("ranks", [1, 2])
def test_drafts_change_no_answer(ranks):
    with LLM(YUAN, ranks=ranks, exact=True, speculate=7) as model:
        for case in CASES.values():
            (answer,) = model.generate([case["prompt_ids"]], GREEDY)
            assert answer.ids == case["greedy_ids"]


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"cache_tokens": 10}, "--cache-tokens 10 is less than a page of 64"),
        ({"cache_tokens": 100, "context": 100}, "at least 128 works"),
        ({"max_batch": 0}, "--max-batch 0"),
        ({"speculate": 16}, "--speculate 16 is not between 0 and 15"),
        ({"speculate": -1}, "--speculate -1"),
    ],
    ids=str,
)
def test_sizes_that_cannot_be(options, part):
    with pytest.raises(UsageError, match=part):
        LLM(STORIES, ranks=1, **options)


def test_a_small_cache_shortens_the_context():
    with LLM(STORIES, ranks=1, cache_tokens=150) as model:
        assert model.info.context == 128


# -- a plain script that starts its ranks


def program(folder: Path, text: str) -> Path:
    path = folder / "program.py"
    head = f"""
        import os, signal, sys, time
        from tpcpu import LLM, SamplingParams
        MODEL = {str(STORIES)!r}
        LONG = SamplingParams(max_tokens=400, ignore_eos=True)
    """
    path.write_text(textwrap.dedent(head) + textwrap.dedent(text))
    # What lies beside a script is the script's own affair, and must not stand in for what the ranks import.
    (folder / "numpy.py").write_text("raise SystemExit('the wrong numpy')")
    (folder / "scripts").mkdir()
    return path.rename(folder / "scripts" / "program.py")


ENDLESS = """
    with LLM(MODEL, ranks=2) as llm:
        while True:
            for number, chunk in enumerate(llm.stream("Once", LONG)):
                if number == 3:
                    print("begun", flush=True)
"""


def test_an_exception_in_the_script_takes_the_ranks_along(tmp_path):
    text = """
        with LLM(MODEL, ranks=2) as llm:
            for chunk in llm.stream("Once", LONG):
                raise ValueError("mine")
    """
    with family([sys.executable, program(tmp_path, text)], tmp_path) as started:
        code, out, err = started.end()
        assert (code, out) == (1, "")
        assert err.count("Traceback") == 1
        assert err.endswith("ValueError: mine\n")
        started.assert_nothing_left()


def test_a_script_that_never_closes_its_model_leaves_nothing(tmp_path):
    text = """
        llm = LLM(MODEL, ranks=2)
        stream = llm.stream("Once", LONG)
        next(stream)
        print("done")
    """
    with family([sys.executable, "-W", "error", program(tmp_path, text)], tmp_path) as started:
        assert started.end() == (0, "done\n", "")
        started.assert_nothing_left()


def test_ctrl_c_in_a_script_takes_the_ranks_along(tmp_path):
    with family([sys.executable, program(tmp_path, ENDLESS)], tmp_path) as started:
        started.say_until("begun")
        os.killpg(started.process.pid, signal.SIGINT)
        code, _, err = started.end()
        assert code == -signal.SIGINT
        assert err.count("Traceback") == 1, err
        assert err.endswith("KeyboardInterrupt\n")
        started.assert_nothing_left()


def test_the_ranks_of_a_killed_script_are_gone_in_seconds(tmp_path):
    with family([sys.executable, program(tmp_path, ENDLESS)], tmp_path) as started:
        started.say_until("begun")
        assert len(started.ranks()) == 2
        started.process.kill()
        started.assert_nothing_left()


def test_a_killed_rank_is_an_error_of_the_script(tmp_path):
    with family([sys.executable, program(tmp_path, ENDLESS)], tmp_path) as started:
        started.say_until("begun")
        victim = started.ranks()[1]
        os.kill(victim, signal.SIGKILL)
        code, _, err = started.end()
        assert code == 1
        told = rf"tpcpu\.errors\.{RankError.__name__}: rank 1 on \S+ \(pid {victim}\) was killed by signal 9 .*"
        assert re.fullmatch(told, err.splitlines()[-1]), err
        started.assert_nothing_left()


# -- the same script on every rank, under mpiexec


def mpiexec(folder: Path, text: str, ranks: int = 2) -> Family:
    return family(["mpiexec", "-n", str(ranks), sys.executable, program(folder, text)], folder)


def test_under_mpiexec_all_ranks_get_the_same_answers(tmp_path):
    text = f"""
        import json
        from tpcpu.errors import PromptError
        from tpcpu.parallel.announcement import announced
        short = SamplingParams(max_tokens=8, ignore_eos=True)
        llm = LLM({str(YUAN)!r}, exact=True)
        first, second = llm.generate([{STORY["prompt"]!r}, {MATHS["prompt_ids"]!r}], short)
        sampled = llm.generate("Once", SamplingParams(max_tokens=8, temperature=1.0))[0]
        told = []
        for wrong in ("", [1, 99999], [{{"role": "user"}}]):
            try:
                llm.generate([wrong])
            except PromptError as error:
                told.append(str(error))
        pieces = []
        for chunk in llm.stream({STORY["prompt"]!r}, short):
            pieces.append(chunk.id)
            if len(pieces) == 3:
                break
        left = llm.stream({STORY["prompt"]!r}, short)
        next(left)
        after = llm.generate({STORY["prompt"]!r}, short)[0]
        score = llm.score(["Once upon a time"])[0]
        seen = [first.ids, second.ids, sampled.ids, sampled.text, told, pieces, after.ids, score.nll]
        rank = announced().rank
        assert llm.is_root == (rank == 0)
        with open(f"rank{{rank}}.json", "w") as file:
            json.dump(seen, file)
        llm.generate("")
    """
    with mpiexec(tmp_path, text, 3) as started:
        code, _, err = started.end()
        assert code == 1
        assert err.count("Traceback") == 1, err
        assert err.startswith("rank 0 on ")
        assert "PromptError: prompt: holds no tokens" in err
        started.assert_nothing_left()
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(3)]
    assert ranks[0] == ranks[1] == ranks[2]
    first, second, _, _, told, pieces, after, score = ranks[0]
    assert first == after == STORY["greedy_ids"][:8]
    assert second == MATHS["greedy_ids"][:8]
    assert pieces == STORY["greedy_ids"][:3]
    assert len(told) == 3
    assert score > 0


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("end", "part"),
    [
        ("raise ValueError('mine')", "ValueError: mine"),
        ("sys.exit(3)", "the same calls, in the same order"),
        ("sys.exit(0)", "the same calls, in the same order"),
    ],
    ids=["raises", "exits with 3", "is done"],
)
def test_a_rank_that_ends_alone_ends_the_job(tmp_path, rank, end, part):
    """It used to wait in MPI's finalise, and the others for a message: for ever, at full load."""
    text = f"""
        llm = LLM(MODEL)
        if llm.is_root == {rank == 0}:
            {end}
        llm.generate("Once")
    """
    with mpiexec(tmp_path, text) as started:
        code, _, err = started.end()
        assert code == 1
        assert part in err
        assert f"rank {rank} on " in err
        started.assert_nothing_left()
