"""Tokenizers as GGUF carries them: the files that are made of one give the ids of the tokenizer that it came from."""

import json

import pytest

from tests.shared import shared
from tpcpu.errors import CheckpointError
from tpcpu.quantize import gguf_tokenizer
from tpcpu.text import load_tokenizer


def carried(source):
    """The entries that converters write of a tokenizer.json."""
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    vocabulary = dict(tokenizer["model"]["vocab"])
    special = {token["id"]: token for token in tokenizer["added_tokens"]}
    vocabulary |= {token["content"]: number for number, token in special.items()}
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"]["merges"]]
    types = [1 if i not in special else 3 if special[i]["special"] else 4 for i in range(len(tokens))]
    return {"model": "gpt2", "tokens": tokens, "token_type": types, "merges": merges}


@pytest.mark.parametrize(
    ("name", "pre", "vector"),
    [("gpt2", "gpt-2", "gpt-2"), ("llama3", "llama-bpe", "llama-bpe"), ("qwen2", "qwen2", "qwen2")],
)
def test_ids_of_the_source_and_of_llama_cpp(tmp_path, name, pre, vector):
    """Texts and ids of llama.cpp's own tests: awkward spaces, digits, languages, emoji."""
    source = shared(f"tokenizers/{name}")
    entries = carried(source) | {"pre": pre, "add_bos_token": False}
    metadata = {f"tokenizer.ggml.{key}": value for key, value in entries.items()}
    for file, content in gguf_tokenizer.files(tmp_path / "model.gguf", metadata).items():
        (tmp_path / file).write_bytes(content)
    config = {"vocab_size": len(entries["tokens"])}
    ours, theirs = load_tokenizer(tmp_path, config), load_tokenizer(source, config)
    vectors = shared("tokenizers/vectors") / f"ggml-vocab-{vector}.gguf"
    texts = vectors.with_name(f"{vectors.name}.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")[:-1]
    answers = vectors.with_name(f"{vectors.name}.out").read_text().splitlines()
    assert len(texts) == len(answers) > 30
    special, before = entries["tokens"][-1], len(theirs.encode(""))
    for text, answer in zip([*texts, f"a {special}b"], [*answers, None], strict=True):
        ids = list(ours.encode(text))
        assert ids == list(theirs.encode(text))[before:], text
        assert answer is None or ids == [int(number) for number in answer.split()], text


LEAST = {"model": "gpt2", "tokens": ["a", "b"], "merges": [], "pre": "gpt2"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "t5"}, "model is 't5'"),
        ({"model": None}, "model is missing"),
        ({"pre": "unheard-of"}, "pre is 'unheard-of'; known are"),
        ({"tokens": [1, 2]}, "tokens holds other things than str"),
        ({"token_type": [1]}, "token_type has 1 entries for 2 tokens"),
        ({"merges": None}, "merges is missing"),
        ({"model": "llama"}, "scores is missing"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, changes, message):
    entries = {f"tokenizer.ggml.{key}": value for key, value in (LEAST | changes).items() if value is not None}
    with pytest.raises(CheckpointError, match=message) as error:
        gguf_tokenizer.files(tmp_path / "model.gguf", entries)
    assert "put the tokenizer.json of the published model beside the file" in str(error.value)


def test_a_tokenizer_beside_the_file_counts(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "chat_template.jinja").write_text("x")
    found = gguf_tokenizer.files(tmp_path / "model.gguf", {})
    assert found == {"tokenizer.json": b"{}", "chat_template.jinja": b"x"}
