"""What holds for detokenising whatever the ids are, for every tokenizer at hand."""

import functools
import itertools

import pytest
import tokenizers
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.shared import DATA, shared
from tpcpu.text import StopStrings, Tokenizer, load_tokenizer

BUNDLED = ("llama-tiny", "yuan-tiny", "stories260k")
PUBLISHED = ("llama2", "llama3", "qwen2", "gpt2", "yuan2")


@functools.cache
def load(name: str) -> Tokenizer:
    folder = DATA / name if name in BUNDLED else shared(f"tokenizers/{name}")
    return load_tokenizer(folder, {"model_type": "yuan" if name.startswith("yuan") else "llama"})


@functools.cache
def library(name: str) -> tokenizers.Tokenizer:
    folder = DATA / name if name in BUNDLED else shared(f"tokenizers/{name}")
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("name", [*BUNDLED, *PUBLISHED])
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_chunks_join_to_the_decoded_whole(name: str, data: st.DataObject) -> None:
    tokenizer = load(name)
    # small ids are bytes and control tokens in most vocabularies
    number = st.integers(0, min(tokenizer.size, 300) - 1) | st.integers(0, tokenizer.size - 1)
    ids = data.draw(st.lists(number, max_size=40))
    detokenizer = tokenizer.detokenizer()
    chunks = [detokenizer.push(number) for number in ids]
    rest = detokenizer.flush()
    whole = tokenizer.decode(ids)
    assert "".join(chunks) + rest == whole
    # what was shown is what decoding everything up to there shows: nothing is ever taken back
    shown = "".join(itertools.islice(chunks, len(ids) // 2))
    assert tokenizer.decode(ids[: len(ids) // 2]).startswith(shown)


@pytest.mark.parametrize("name", ["llama-tiny", "llama2", "llama3", "qwen2", "gpt2"])
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_decoding_is_the_tokenizers_librarys_where_the_bytes_are_text(name: str, data: st.DataObject) -> None:
    """Where they are not, the library writes a U+FFFD for each byte of a run, Python for each broken character."""
    tokenizer = load(name)
    ids = data.draw(st.lists(st.integers(0, tokenizer.size - 1), max_size=20))
    expected = library(name).decode(ids, skip_special_tokens=True)
    if "\ufffd" not in expected:
        assert tokenizer.decode(ids) == expected


@pytest.mark.parametrize("name", [*BUNDLED[:2], *PUBLISHED])
@settings(max_examples=40, deadline=None)
@given(text=st.text(max_size=60))
def test_a_text_comes_back(name: str, text: str) -> None:
    tokenizer = load(name)
    ids = tokenizer.encode(text)
    # hypothesis finds the special strings in our sources, and those write nothing
    assume(not any(tokenizer.is_special(number) for number in ids[tokenizer.bos_id is not None :]))
    decoded = tokenizer.decode(ids)
    if name == "qwen2":  # normalises to NFC, so decoding and encoding again is the fixed point
        assert tokenizer.decode(tokenizer.encode(decoded)) == decoded
    elif name in ("llama3", "gpt2"):
        assert decoded == text
    else:
        assert decoded == text.replace("▁", " ")


@given(st.text("ab<", max_size=40), st.lists(st.text("ab<", min_size=1, max_size=5), max_size=4), st.data())
def test_stop_strings_do_not_depend_on_the_chunks(text: str, strings: list[str], data: st.DataObject) -> None:
    ends = [(text.find(string) + len(string), text.find(string)) for string in strings if string in text]
    expected = text[: min(ends)[1]] if ends else text
    stop = StopStrings(strings)
    shown = []
    rest = text
    while rest:
        length = data.draw(st.integers(1, len(rest)))
        shown.append(stop.push(rest[:length]))
        rest = rest[length:]
    assert "".join(shown) + stop.flush() == expected
    assert (stop.found is not None) == bool(ends)
