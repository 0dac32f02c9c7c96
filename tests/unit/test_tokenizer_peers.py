"""Whole tokenizers against transformers on a mixed text."""

from pathlib import Path

import pytest

from tests.shared import DATA, shared
from tpcpu.text import load_tokenizer

MIXED = """请写一个关于春天的故事 🌸，包括 👩‍👩‍👧‍👦 和 ½ cup of naïve café…
def f(x: int) -> str:
\treturn f"{x:>08b}"  # 二进制，  two  spaces

Ünïcödé é  \u200b كتاب हिन्दी 한국어 1234567890 3.14e-10
"""
SPECIALS = {
    "llama2": "<s>a</s> b<unk>c",
    "llama3": "<|begin_of_text|>a<|eot_id|> b<|reserved_special_token_5|>",
    "qwen2": "<|im_start|>user\nHi<|im_end|>\n<|endoftext|>",
    "gpt2": "a<|endoftext|>b",
    "llama-tiny": "<s>a<sep> b</s>c<pad>",
    "stories260k": "<s>a</s>",
}


AUTO = ("gpt2", "qwen2")
"""Folders that transformers opens by itself, as they are; those with tokenizer.json alone it opens all alike."""


@pytest.mark.parametrize("name", SPECIALS)
def test_ids_and_texts_are_those_of_transformers(name: str) -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    folder: Path = DATA / name if (DATA / name).exists() else shared(f"tokenizers/{name}")
    if name in AUTO:
        peer = transformers.AutoTokenizer.from_pretrained(folder)
    else:
        # Its class for Llamas makes the file's rules anew, without the prefix before a space that there is.
        peer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    ours = load_tokenizer(folder, {})
    for text in (MIXED, SPECIALS[name], MIXED + SPECIALS[name] + MIXED, " " + MIXED, ""):
        ids = peer.encode(text)
        assert ours.encode(text) == ids
        for skip in (True, False):
            expected = peer.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
            assert ours.decode(ids, skip_special=skip) == expected


@pytest.mark.parametrize(
    ("name", "file"), [("llama2", "tokenizer.model"), ("mistral", "tokenizer.model.v1"), ("yuan2", "tokenizer.model")]
)
def test_sentencepiece_files_as_transformers_reads_them(name: str, file: str, tmp_path: Path) -> None:
    peers = pytest.importorskip("transformers.tokenization_utils_sentencepiece", reason="needs transformers")
    (tmp_path / "tokenizer.model").symlink_to(shared(f"tokenizers/{name}") / file)
    roles = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    peer = peers.SentencePieceBackend(vocab_file=str(tmp_path / "tokenizer.model"), legacy=True, **roles)
    ours = load_tokenizer(tmp_path, {})
    for text in (MIXED, "<s>a</s> b<unk>c", " a", "<s> a", f" {MIXED}</s>{MIXED}", "[INST] Hi [/INST] Ho</s>"):
        ids = peer.encode(text, add_special_tokens=False)
        assert ours.encode(text) == [1, *ids]
    assert ours.decode(ours.encode(MIXED)) == MIXED


def test_both_files_of_llama_2_agree(tmp_path: Path) -> None:
    """llama2's tokenizer.json has the legacy dummy prefix, so it agrees with the model file where `legacy` is on."""
    source = shared("tokenizers/llama2")
    (tmp_path / "tokenizer.model").symlink_to(source / "tokenizer.model")
    by_json, by_model = load_tokenizer(source, {}), load_tokenizer(tmp_path, {})
    lines = shared("text/wikitext-2-test.txt").read_text(encoding="utf-8").splitlines()[:300]
    for text in (MIXED, *lines):
        ids = by_json.encode(text)
        assert by_model.encode(text) == ids
        assert by_model.decode(ids) == by_json.decode(ids) == text
