"""The numpy reference against oracles that it shares no code with, and against itself divided and cut up."""

import numpy as np
import pytest

from tests.models.tiny import DATA, int8_weights, load, random_model
from tpcpu.program.reference import Batch

TRAINED = ("yuan-tiny", "llama-tiny")

ODD_LLAMA = {
    "model_type": "llama", "hidden_size": 80, "intermediate_size": 172, "num_hidden_layers": 2,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 24, "vocab_size": 101, "attention_bias": True,
    "mlp_bias": True, "tie_word_embeddings": True, "max_position_embeddings": 1024,
}  # fmt: skip
ODD_YUAN = {
    "model_type": "yuan", "hidden_size": 160, "intermediate_size": 200, "num_hidden_layers": 2,
    "num_attention_heads": 5, "vocab_size": 101,
}  # fmt: skip


def feed(reference, ids, sequence=0, start=0):
    """All of `ids` as one chunk; logits of its last token."""
    count = len(ids)
    return reference.run(ids, range(start, start + count), [sequence] * count, [count - 1])[0]


def greedy(reference, prompt, count):
    logits, ids = feed(reference, prompt), []
    while True:
        ids.append(int(logits.argmax()))
        if len(ids) == count:
            return ids
        logits = feed(reference, ids[-1:], start=len(prompt) + len(ids) - 1)


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
def test_logits_after_every_prompt(name, size):
    tiny = load(name)
    reference = tiny.reference(size, dtype=np.float64)
    for case in tiny.expected["cases"] if size < 3 else tiny.expected["cases"][::3]:
        reference.forget(0)
        logits = feed(reference, case["prompt_ids"])
        top = np.argsort(-logits)[:20]
        assert top.tolist() == case["top20_ids"]
        assert logits[top] == pytest.approx(case["top20_logits"], abs=2e-6)


@pytest.mark.parametrize(("name", "size"), [(name, size) for name in TRAINED for size in (1, 3, 8)])
def test_greedy_ids(name, size):
    tiny = load(name)
    for case in tiny.expected["cases"] if size == 1 else tiny.expected["cases"][:2]:
        assert greedy(tiny.reference(size, dtype=np.float32), case["prompt_ids"], 48) == case["greedy_ids"]


@pytest.mark.parametrize("size", [1, 3])
def test_published_stories(size):
    """Real published weights, whose feed-forward rows are no multiple of 64."""
    tiny = load("stories260k")
    for case in tiny.expected["cases"][:2]:
        reference = tiny.reference(size, dtype=np.float32)
        logits = feed(reference, case["prompt_ids"])
        ids, values = zip(*case["first_logits_top10"], strict=True)
        assert np.argsort(-logits)[:10].tolist() == list(ids)
        assert logits[list(ids)] == pytest.approx(values, abs=1e-4)
        reference.forget(0)
        assert greedy(reference, case["prompt_ids"], 60) == case["greedy_ids"][:60]


@pytest.mark.parametrize(("name", "size"), [("yuan-tiny", 2), ("llama-tiny", 3)])
def test_loss_of_held_out_stories(name, size):
    """Several documents in one batch, every position scored, up to the length that the oracle cut them at."""
    sentencepiece = pytest.importorskip("sentencepiece")
    tiny = load(name)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(DATA / name / "tokenizer.model"))
    texts = [text.strip() for text in (DATA / "heldout.txt").read_text(encoding="utf-8").split("<eod>")][:4]
    start = [1] if name == "llama-tiny" else []
    documents = [(start + pieces.encode(text))[:256] for text in texts]
    tokens = np.concatenate(documents)
    positions = np.concatenate([np.arange(len(ids)) for ids in documents])
    sequences = np.repeat(np.arange(len(documents)), [len(ids) for ids in documents])
    logits = tiny.reference(size, dtype=np.float64).run(tokens, positions, sequences, range(len(tokens)))
    top = logits.max(axis=1)
    loss = top + np.log(np.exp(logits - top[:, None]).sum(axis=1))
    loss[:-1] -= logits[np.arange(len(tokens) - 1), tokens[1:]]
    for number, expected in enumerate(tiny.expected["heldout"]["per_document"][: len(documents)]):
        of_document = loss[sequences == number][:-1]
        assert len(of_document) == expected["scored_tokens"]
        assert of_document.sum() == pytest.approx(expected["nll_sum"], abs=1e-3)


@pytest.mark.parametrize("config", [ODD_LLAMA, ODD_YUAN], ids=["llama", "yuan"])
@pytest.mark.parametrize("size", [2, 3, 5, 7, 10])
def test_divided_equals_whole_at_awkward_sizes(config, size):
    """Heads and blocks that do not line up, shares without a head, a vocabulary that does not divide, biases."""
    tiny = random_model(config)
    ids = np.random.default_rng(1).integers(0, config["vocab_size"], 9)
    whole = feed(tiny.reference(dtype=np.float64), ids)
    assert feed(tiny.reference(size, dtype=np.float64), ids) == pytest.approx(whole, abs=1e-11)


@pytest.mark.parametrize("arithmetic", ["exact", "int8"])
@pytest.mark.parametrize("config", [ODD_LLAMA, ODD_YUAN], ids=["llama", "yuan"])
def test_company_and_chunks_do_not_matter(config, arithmetic):
    """Tokens one by one, in chunks, and between other sequences' tokens give what one pass gives."""
    tiny = random_model(config | {"max_position_embeddings": 1024})
    settings = {
        "size": 2, "dtype": np.float64, "arithmetic": arithmetic, "context": 1024, "weights": int8_weights(tiny),
    }  # fmt: skip
    random = np.random.default_rng(2)
    first, second = random.integers(0, 101, 300), random.integers(0, 101, 40)
    whole = tiny.reference(**settings).run(first, range(300), [0] * 300, range(300))
    alone = tiny.reference(**settings).run(second, range(40), [0] * 40, range(40))

    chunked = tiny.reference(**settings)
    got, at = [], 0
    for count in (1, 1, 5, 93, 150, 49, 1):
        got.append(chunked.run(first[at : at + count], range(at, at + count), [7] * count, range(count)))
        at += count
    assert np.concatenate(got) == pytest.approx(whole, abs=1e-9)

    mixed = tiny.reference(**settings)
    mixed.run(first[:250], range(250), [3] * 250, [])
    mixed.run(second[:30], range(30), [9] * 30, [])
    together = mixed.run(
        np.concatenate((second[30:38], first[250:], second[:2])),
        [*range(30, 38), *range(250, 300), 0, 1], [9] * 8 + [3] * 50 + [4] * 2, range(60),
    )  # fmt: skip
    assert together[:8] == pytest.approx(alone[30:38], abs=1e-9)
    assert together[8:58] == pytest.approx(whole[250:], abs=1e-9)
    assert together[58:] == pytest.approx(alone[:2], abs=1e-9)


def test_a_sequence_that_starts_anew_remembers_nothing():
    tiny = random_model(ODD_YUAN)
    reference = tiny.reference()
    once = feed(reference, [1, 2, 3])
    assert (feed(reference, [1, 2, 3]) == once).all()


def test_only_wanted_logits_are_computed():
    reference = random_model(ODD_LLAMA).reference(3)
    every = reference.run([1, 2, 3], range(3), [0] * 3, [0, 1, 2])
    assert reference.run([1, 2, 3], range(3), [0] * 3, [2, 0]) == pytest.approx(every[[2, 0]], abs=1e-5)
    assert reference.run([1, 2, 3], range(3), [0] * 3, []).shape == (0, 101)


def test_what_a_rank_does_not_own_stays_zero():
    """Shares end inside blocks here; the covering block's other columns meet the neighbour's weights as zeros."""
    tiny = random_model(ODD_LLAMA)
    reference = tiny.reference(5)
    reference.trace(Batch(*(np.array(values) for values in ([1, 2], [0, 1], [0, 0], [1]))))
    foreign = [
        np.delete(values, np.s_[buffer.own.start : buffer.own.stop], axis=1)
        for rank in reference.ranks
        for buffer, values in rank.buffers.items()
    ]
    assert sum(values.size for values in foreign)
    assert not any(values.any() for values in foreign)


def test_every_rank_has_the_same_bits_after_an_all_reduce():
    reference = load("yuan-tiny").reference(3)
    reference.trace(Batch(*(np.array(values) for values in ([5, 6], [0, 1], [0, 0], [1]))))
    sums = [[v for b, v in rank.buffers.items() if b.name.startswith(("sum", "hidden"))] for rank in reference.ranks]
    assert len(sums[0]) > 18
    assert all((mine == first).all() for other in sums[1:] for mine, first in zip(other, sums[0], strict=True))


def test_zeroing_one_ranks_share_changes_the_answer():
    tiny = load("llama-tiny")
    reference = tiny.reference(3)
    before = feed(reference, [1, 621])
    for (name, *_), matrix in reference.ranks[1].weights.items():
        if name.endswith("down_proj.weight"):
            matrix.values[:] = 0
    assert np.abs(feed(reference, [1, 621]) - before).max() > 0.1


@pytest.mark.parametrize("name", TRAINED)
def test_int8_arithmetic_stays_close(name):
    """8-bit weights and activations move the logits a little; the same arithmetic divided moves them less."""
    tiny = load(name)
    case = tiny.expected["cases"][0]
    settings = {"weights": int8_weights(tiny), "dtype": np.float64}
    exact = feed(tiny.reference(**settings), case["prompt_ids"])
    rounded = feed(tiny.reference(arithmetic="int8", **settings), case["prompt_ids"])
    divided = feed(tiny.reference(3, arithmetic="int8", **settings), case["prompt_ids"])
    assert exact[case["top20_ids"]] == pytest.approx(case["top20_logits"], abs=0.3)
    assert 1e-4 < np.abs(rounded - exact).max() < 0.5
    assert divided == pytest.approx(rounded, abs=1e-9)


@pytest.mark.parametrize(("heads", "kv_heads", "tied", "bias"), [(6, 2, True, True), (4, 4, False, False)])
def test_llama_equals_transformers(heads, kv_heads, tied, bias):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = ODD_LLAMA | {
        "hidden_size": 96, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "tie_word_embeddings": tied,
        "attention_bias": bias, "mlp_bias": bias, "rope_theta": 500000.0, "rms_norm_eps": 1e-4,
    }  # fmt: skip
    tiny = random_model(config)
    peer = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).eval()
    state = {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in tiny.tensors.items()}
    missing, unexpected = peer.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= ({"lm_head.weight"} if tied else set())
    peer.tie_weights()
    ids = np.random.default_rng(4).integers(0, 101, 300)
    with torch.no_grad():
        expected = peer(torch.from_numpy(ids)[None]).logits[0].numpy()
    got = tiny.reference(4, context=512).run(ids, range(300), [0] * 300, range(300))
    assert got == pytest.approx(expected, abs=2e-4)


@pytest.mark.parametrize("window", [None, 7, 40, 280])
def test_mistral_equals_transformers(window):
    """A window that is shorter than the text, and none; over two pieces of the cache."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = {key: value for key, value in ODD_LLAMA.items() if "bias" not in key} | {
        "model_type": "mistral", "sliding_window": window, "tie_word_embeddings": False,
    }  # fmt: skip
    tiny = random_model(config)
    peer = transformers.MistralForCausalLM(transformers.MistralConfig(**config, attn_implementation="eager")).eval()
    peer.load_state_dict({name: torch.from_numpy(np.ascontiguousarray(v)) for name, v in tiny.tensors.items()})
    ids = np.random.default_rng(4).integers(0, 101, 300)
    with torch.no_grad():
        expected = peer(torch.from_numpy(ids)[None]).logits[0].numpy()
    got = tiny.reference(3, context=512).run(ids, range(300), [0] * 300, range(300))
    assert got == pytest.approx(expected, abs=2e-4)
    if window is not None:
        without = random_model(config | {"sliding_window": None}).reference(context=512)
        assert np.abs(without.run(ids, range(300), [0] * 300, range(300)) - expected)[window:].max() > 1e-2


def test_dynamic_rotation_is_that_of_one_token_after_another():
    """transformers turns all tokens of a call by the length of the whole; here a token does not depend on its chunk."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = {key: value for key, value in ODD_LLAMA.items() if "bias" not in key} | {
        "hidden_size": 96, "max_position_embeddings": 16, "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 4.0},
    }  # fmt: skip
    tiny = random_model(config)
    peer = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).eval()
    peer.load_state_dict({name: torch.from_numpy(np.ascontiguousarray(v)) for name, v in tiny.tensors.items()})
    ids, expected, cache = np.random.default_rng(4).integers(0, 101, 60), [], transformers.DynamicCache()
    with torch.no_grad():
        for token in ids:
            expected.append(peer(torch.tensor([[int(token)]]), cache=cache).logits[0, 0].numpy())
    got = tiny.reference(2).run(ids, range(60), [0] * 60, range(60))
    assert got == pytest.approx(np.array(expected), abs=2e-4)
    whole = random_model(config | {"max_position_embeddings": 64}).reference()
    assert np.abs(whole.run(ids, range(60), [0] * 60, range(60)) - got).max() > 1e-2
