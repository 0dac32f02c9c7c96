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


@pytest.mark.parametrize("name", SPECIALS)
def test_ids_and_texts_are_those_of_transformers(name: str) -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    folder: Path = DATA / name if (DATA / name).exists() else shared(f"tokenizers/{name}")
    peer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    ours = load_tokenizer(folder, {})
    for text in (MIXED, SPECIALS[name], MIXED + SPECIALS[name] + MIXED, " " + MIXED, ""):
        ids = peer.encode(text)
        assert ours.encode(text) == ids
        for skip in (True, False):
            expected = peer.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
            assert ours.decode(ids, skip_special=skip) == expected


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
