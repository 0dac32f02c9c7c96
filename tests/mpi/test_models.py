"""Trained models on every rank of a job: the published answers, equal shares of weights, equal bits on all ranks.

The same bodies run on a lone rank. A model is loaded once for all the tests that use it.
"""

import ctypes
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest

from tpcpu import LLM, SamplingParams
from tpcpu.cli.eval import read_documents
from tpcpu.engine.engine import Candidates, Engine, Options
from tpcpu.engine.local import Local
from tpcpu.errors import CheckpointError, PromptError, UsageError
from tpcpu.parallel.communicator import Communicator, Solo, connect
from tpcpu.program.batch import Batch
from tpcpu.program.operations import Key, RmsNorm, Weight
from tpcpu.program.weights import PANEL_ROWS, Packed, packed_bytes
from tpcpu.quantize import quantize
from tpcpu.text import load_tokenizer

pytestmark = pytest.mark.mpi

DATA = Path(__file__).parents[1] / "data"
TRAINED = ("yuan-tiny", "llama-tiny")
GREEDY = SamplingParams(max_tokens=48, ignore_eos=True, top_logits=20)
EXACT = Options(format="bf16", exact=True)
T = TypeVar("T")


def expected(name: str) -> dict[str, Any]:
    """The published answers of a bundled model."""
    content: dict[str, Any] = json.loads(next((DATA / name).glob("ref*.json")).read_text())
    return content


@pytest.fixture(scope="module", params=TRAINED)
def model(request: pytest.FixtureRequest, communicator: Communicator) -> Iterator[tuple[str, Local]]:
    """A trained model as it is stored, in exact arithmetic, and its name."""
    local = Local(DATA / request.param, EXACT, communicator, None)
    yield request.param, local
    local.close()


@pytest.fixture(scope="module", params=TRAINED)
def engine(request: pytest.FixtureRequest, communicator: Communicator) -> Iterator[Engine]:
    """The same without requests and text."""
    engine = Engine(DATA / request.param, communicator, EXACT)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def quantised(communicator: Communicator) -> Iterator[Path]:
    """A folder that `quantize` wrote of each trained model, by name."""
    root = Path(tempfile.mkdtemp(prefix="tpcpu-test-")) if communicator.is_root else None
    folder: Path = communicator.broadcast_object(root)
    if communicator.is_root:
        for name in TRAINED:
            quantize(DATA / name, folder / name, "nf4")
    communicator.barrier()
    yield folder
    communicator.barrier()
    if communicator.is_root:
        shutil.rmtree(folder)


def together(engine: Engine, work: Callable[[], T]) -> T:
    """Rank 0 works while the others follow; all have the result."""
    if not engine.communicator.is_root:
        engine.follow()
        return engine.communicator.broadcast_object(None)
    try:
        result = work()
    finally:
        engine.release()
    return engine.communicator.broadcast_object(result)


def logits_after(engine: Engine, ids: list[int], candidates: int = 0) -> Candidates:
    """What may follow `ids` as a sequence of its own, on all ranks."""

    def work() -> Candidates:
        sequence = engine.cache.begin()
        engine.cache.reserve(sequence, len(ids))
        part = (ids, 0, sequence.state, sequence.pages)
        (result,) = engine.step(
            Batch.build([part], [len(ids) - 1], candidates=candidates, vocabulary=engine.vocabulary)
        )
        engine.cache.end(sequence)
        return result

    return together(engine, work)


def name_of(engine: Engine) -> str:
    assert engine.checkpoint is not None
    return engine.checkpoint.path.name


def prompt_of(engine: Engine) -> list[int]:
    ids: list[int] = expected(name_of(engine))["cases"][2]["prompt_ids"]
    return ids


# -- what was published


def test_greedy_ids_and_top_logits(model: tuple[str, Local]) -> None:
    name, local = model
    for case in expected(name)["cases"]:
        (*_, last) = local.stream(case["prompt"], GREEDY)
        assert last.completion is not None
        assert last.completion.prompt_ids == case["prompt_ids"]
        assert last.completion.ids == case["greedy_ids"]
        assert last.completion.top_logits is not None
        ids, logits = zip(*last.completion.top_logits[0], strict=True)
        assert list(ids) == case["top20_ids"]
        assert list(logits) == pytest.approx(case["top20_logits"], abs=2e-3)


def test_loss_of_every_document(model: tuple[str, Local]) -> None:
    name, local = model
    heldout = expected(name)["heldout"]
    scores = local.score(read_documents(DATA / "heldout.txt", "<eod>"), 256)
    assert [score.tokens for score in scores] == [document["scored_tokens"] for document in heldout["per_document"]]
    for score, document in zip(scores, heldout["per_document"], strict=True):
        assert score.nll / score.tokens == pytest.approx(document["nll_sum"] / score.tokens, abs=1e-3)
    mean = sum(score.nll for score in scores) / sum(score.tokens for score in scores)
    assert mean == pytest.approx(heldout["mean_nll_nats_per_token"], abs=1e-3)


def test_published_stories(communicator: Communicator) -> None:
    """Real published weights; rows of 172 are no multiple of 64, and heads of 8 share blocks among ranks."""
    folder = DATA / "stories260k"
    local = Local(folder, Options(exact=True), communicator, None)
    tokenizer = load_tokenizer(folder, json.loads((folder / "config.json").read_text()))
    for case in expected("stories260k")["cases"]:
        params = SamplingParams(max_tokens=len(case["greedy_ids"]))
        (*_, last) = local.stream(case["prompt"], params)
        assert last.completion is not None
        assert last.completion.prompt_ids == case["prompt_ids"]
        assert last.completion.ids == case["greedy_ids"]
        assert tokenizer.decode(case["prompt_ids"] + last.completion.ids) == case["text"]
    local.close()


# -- what every rank holds


def packed(engine: Engine) -> list[Packed]:
    return [weight for weight in engine.weights.values() if isinstance(weight, Packed)]


def held(engine: Engine) -> list[dict[Key, tuple[Weight, int]]]:
    """For every rank, each packed weight with its bytes."""
    mine = {each.weight.key: (each.weight, each.nbytes) for each in packed(engine)}
    return engine.communicator.all_gather_object(mine)


def test_the_parts_of_a_weight_are_the_whole(engine: Engine) -> None:
    """Every weight is held exactly once, save the two heads of keys and values that more than two ranks share."""
    ranks, size = held(engine), engine.communicator.size
    assert len({frozenset(weights) for weights in ranks}) == 1
    for key in ranks[0]:
        parts = [weights[key] for weights in ranks]
        count = np.zeros((parts[0][0].full_rows, parts[0][0].full_columns), int)
        for part, nbytes in parts:
            count[part.rows.start : part.rows.stop, part.columns.start : part.columns.stop] += 1
            # Panels are filled up; nothing else is held but the weights' own bytes.
            assert nbytes == 2 * -(-len(part.rows) // PANEL_ROWS) * PANEL_ROWS * len(part.columns), key
        shared = name_of(engine) == "llama-tiny" and size > 2 and key[0].split(".")[-2] in ("k_proj", "v_proj")
        assert (count >= 1).all() if shared else (count == 1).all(), key


def test_weight_bytes_are_reported_and_sum_to_the_whole(communicator: Communicator) -> None:
    """yuan-tiny shares no heads, and its shares end at whole panels and blocks, those of the head excepted."""
    local = Local(DATA / "yuan-tiny", Options(format="int8"), communicator, None)
    engine = local._engine
    whole = sum(packed_bytes(each.weight.full_rows, each.weight.full_columns, each.form) for each in packed(engine))
    row = max(packed_bytes(PANEL_ROWS, each.weight.full_columns, each.form) for each in packed(engine)) // PANEL_ROWS
    assert len(local.info.weight_bytes) == communicator.size
    assert local.info.weight_bytes[communicator.rank] == engine.weight_bytes
    assert 0 <= sum(local.info.weight_bytes) - whole <= communicator.size * PANEL_ROWS * row
    local.close()


def test_every_share_counts(engine: Engine) -> None:
    """Without the weights of any one rank the answer is another, and it comes back with them."""
    before = logits_after(engine, prompt_of(engine)).logits
    memory = np.asarray(engine.arena)
    for rank in range(engine.communicator.size):
        own = rank == engine.communicator.rank
        kept = memory.copy() if own else memory[:0]
        if own:
            memory[:] = 0
        without = logits_after(engine, prompt_of(engine)).logits
        if own:
            memory[:] = kept
        assert np.abs(without - before).max() > 0.1
    np.testing.assert_array_equal(logits_after(engine, prompt_of(engine)).logits, before)


# -- how they are joined


def last_norm(engine: Engine, tokens: int) -> bytes:
    """The bits of the last norm of `tokens` tokens, the input of this rank's part of the head."""
    norm = [operation for operation in engine.program.operations if isinstance(operation, RmsNorm)][-1]
    place = engine._compiled._buffers[norm.out]
    return b"".join(
        ctypes.string_at(place.address + token * place.stride, 4 * norm.out.width) for token in range(tokens)
    )


@pytest.mark.parametrize("tokens", [1, 7, 35])
def test_all_ranks_hold_the_same_bits(engine: Engine, tokens: int) -> None:
    logits_after(engine, (prompt_of(engine) * 2)[:tokens])
    bits = last_norm(engine, tokens)
    assert np.frombuffer(bits, np.float32).any()
    assert len(set(engine.communicator.all_gather_object(hashlib.sha256(bits).hexdigest()))) == 1


def test_sums_in_whatever_order_agree(engine: Engine) -> None:
    """`--all-reduce mpi` promises no order of addition, and so only closeness."""
    plain = Engine(DATA / name_of(engine), connect("mpi"), EXACT)
    for case in expected(name_of(engine))["cases"]:
        in_order = logits_after(engine, case["prompt_ids"]).logits
        np.testing.assert_allclose(logits_after(plain, case["prompt_ids"]).logits, in_order, atol=1e-4, rtol=0)
    plain.close()


@pytest.mark.parametrize("count", [1, 5, 40])
def test_candidates_are_the_largest_of_all_logits(engine: Engine, count: int) -> None:
    """Each rank sends its largest: together they hold the largest of all, with the same values."""
    every = logits_after(engine, prompt_of(engine))
    few = logits_after(engine, prompt_of(engine), count)
    assert every.ids.tolist() == list(range(engine.vocabulary))
    assert len(few.ids) == count * engine.communicator.size
    np.testing.assert_array_equal(every.logits[few.ids], few.logits)
    largest = np.argsort(-every.logits, kind="stable")[:count]
    assert set(largest.tolist()) <= set(few.ids.tolist())


# -- quantised weights


@pytest.mark.parametrize("name", TRAINED)
def test_nf4_is_the_same_for_any_number_of_ranks(communicator: Communicator, quantised: Path, name: str) -> None:
    """Quantised by n ranks while loading, by one rank alone, or by `quantize`: the same codes and scales."""
    options = Options(format="nf4", exact=True)
    loading = Engine(DATA / name, communicator, options)
    stored = Engine(quantised / name, communicator, options)
    np.testing.assert_array_equal(np.asarray(loading.arena), np.asarray(stored.arena))
    for one, other in zip(packed(loading), packed(stored), strict=True):
        assert one.weight == other.weight
        for mine, theirs in zip(one.keep[1:], other.keep[1:], strict=True):
            np.testing.assert_array_equal(mine, theirs)
    divided = logits_after(loading, prompt_of(loading)).logits
    np.testing.assert_array_equal(logits_after(stored, prompt_of(loading)).logits, divided)
    if communicator.is_root:
        alone = Engine(DATA / name, Solo(), options)
        np.testing.assert_allclose(logits_after(alone, prompt_of(loading)).logits, divided, atol=1e-4, rtol=0)
        alone.close()
    loading.close()
    stored.close()


# -- scripts that every rank runs


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(DATA / "llama-tiny", exact=True) as model:
        yield model


def test_every_rank_gets_the_same_answers(communicator: Communicator, llm: LLM) -> None:
    assert llm.is_root == communicator.is_root
    cases = expected("llama-tiny")["cases"][:3]
    params = SamplingParams(max_tokens=48, ignore_eos=True)
    answers = llm.generate([case["prompt"] for case in cases], params)
    assert [answer.ids for answer in answers] == [case["greedy_ids"] for case in cases]
    assert communicator.all_gather_object(answers) == [answers] * communicator.size
    drawn = llm.generate(["Once"], SamplingParams(max_tokens=8, temperature=1.0, top_p=0.9))
    assert communicator.all_gather_object(drawn) == [drawn] * communicator.size
    scores = llm.score(["Once upon a time"])
    assert communicator.all_gather_object(scores) == [scores] * communicator.size


def test_a_mistake_that_rank_0_finds_is_raised_on_all(communicator: Communicator, llm: LLM) -> None:
    with pytest.raises(PromptError, match="context of 512") as raised:
        llm.generate(["dog " * 600])
    assert communicator.all_gather_object(str(raised.value)) == [str(raised.value)] * communicator.size
    with pytest.raises(PromptError, match="context of 512"):
        llm.score(["dog " * 600])
    (answer,) = llm.generate("Once", SamplingParams(max_tokens=3))
    assert len(answer.ids) == 3


def test_an_answer_may_be_left_early(communicator: Communicator, llm: LLM) -> None:
    """Closing the stream on rank 0 lets the others go too."""
    stream = llm.stream("Once upon a time", SamplingParams(max_tokens=100, ignore_eos=True))
    first = next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert communicator.all_gather_object(first.id) == [first.id] * communicator.size
    (answer,) = llm.generate("Once", SamplingParams(max_tokens=3))
    assert communicator.all_gather_object(answer.ids) == [answer.ids] * communicator.size


@pytest.mark.parametrize(
    ("options", "error"),
    [(Options(format="fp3"), UsageError), (Options(context=100_000), UsageError), (Options(threads=0), UsageError)],
    ids=["format", "context", "threads"],
)
def test_impossible_options_are_refused_on_all_ranks(
    communicator: Communicator, options: Options, error: type[Exception]
) -> None:
    with pytest.raises(error) as raised:
        Engine(DATA / "llama-tiny", communicator, options)
    assert communicator.all_gather_object(str(raised.value)) == [str(raised.value)] * communicator.size


def test_a_folder_that_one_rank_cannot_read_is_refused_on_all(communicator: Communicator) -> None:
    last = communicator.rank == communicator.size - 1
    with pytest.raises(CheckpointError, match="no-such-folder"):
        Engine(DATA / ("no-such-folder" if last else "llama-tiny"), communicator, EXACT)
