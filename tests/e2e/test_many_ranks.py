"""More ranks than heads, cores, or blocks of some weights: shares are uneven or empty, the answer is the same."""

import json

import pytest

from tests.e2e.test_commands import run
from tests.shared import DATA
from tpcpu import LLM, SamplingParams


def answer(name: str, prompt: str, ranks: int, tokens: int, *flags: str) -> dict[str, object]:
    arguments = ("--model", DATA / name, "--prompt", prompt, "--max-tokens", str(tokens), "--ignore-eos", "--exact")
    done = run("generate", *arguments, "--ranks", str(ranks), "--json", *flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    result: dict[str, object] = json.loads(done.stdout)
    return result


@pytest.mark.parametrize(
    ("name", "ranks"),
    [
        ("stories260k", 8),
        ("yuan-tiny", 5),
        pytest.param("yuan-tiny", 8, marks=pytest.mark.full),
        pytest.param("llama-tiny", 6, marks=pytest.mark.full),
    ],
)
def test_published_answers(name, ranks):
    """Heads: 8 of 8 with 4 for keys in the first, 4 of 64 in the others; feed-forward widths 172, 1024 and 704."""
    case = json.loads(next((DATA / name).glob("ref*.json")).read_text())["cases"][1]
    given = answer(name, case["prompt"], ranks, 24)
    assert given["prompt_ids"] == case["prompt_ids"]
    assert given["ids"] == case["greedy_ids"][:24]


def test_quantised_while_loading():
    """Block maxima come from ranks that hold nothing of a weight, too."""
    prompt = "Once upon a time, there was a little"
    with LLM(DATA / "yuan-tiny", ranks=1, format="nf4", exact=True) as llm:
        (alone,) = llm.generate([prompt], SamplingParams(max_tokens=12, ignore_eos=True, top_logits=5))
    given = answer("yuan-tiny", prompt, 7, 12, "--format", "nf4", "--top-logits", "5")
    assert given["ids"] == alone.ids
    assert alone.top_logits is not None
    for mine, theirs in zip(alone.top_logits, given["top_logits"], strict=True):
        assert [token for token, _ in mine] == [token for token, _ in theirs]
        assert [logit for _, logit in mine] == pytest.approx([logit for _, logit in theirs], abs=1e-4)
