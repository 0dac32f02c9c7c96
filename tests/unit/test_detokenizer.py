"""Incremental detokenising by example: half characters, leading spaces, special tokens, stop strings."""

import json
import time

import pytest

from tests.shared import DATA
from tpcpu.errors import PromptError
from tpcpu.text import StopStrings, Tokenizer, load_tokenizer


@pytest.fixture(scope="module")
def llama() -> Tokenizer:
    return load_tokenizer(DATA / "llama-tiny", {})


@pytest.fixture(scope="module")
def yuan() -> Tokenizer:
    return load_tokenizer(DATA / "yuan-tiny", json.loads((DATA / "yuan-tiny" / "config.json").read_text()))


def chunks(tokenizer: Tokenizer, ids: list[int], stop: tuple[str, ...] = ()) -> list[str]:
    detokenizer = tokenizer.detokenizer(stop)
    return [*(detokenizer.push(number) for number in ids), detokenizer.flush()]


def byte(value: int) -> int:
    return value + 3


def test_a_character_of_several_bytes_comes_whole(yuan: Tokenizer) -> None:
    ids = yuan.encode("好🌸")
    assert chunks(yuan, ids) == ["", "", "", "好", "", "", "", "🌸", ""]


def test_bytes_that_are_no_character_become_replacement_characters(llama: Tokenizer) -> None:
    a = llama.encode("a")[-1]
    assert "".join(chunks(llama, [byte(0xFF)])) == "\ufffd"
    assert chunks(llama, [byte(0xE5), byte(0xA5)]) == ["", "", "\ufffd"]  # the end comes inside a character
    assert chunks(llama, [byte(0xE5), a, byte(0x80)]) == ["", "\ufffd a", "\ufffd", ""]


def test_the_dummy_prefix_is_not_shown_but_other_spaces_are(llama: Tokenizer) -> None:
    assert chunks(llama, llama.encode("Hello world")) == ["", "He", "ll", "o", " world", ""]
    assert llama.decode(llama.encode("  two")) == "  two"
    assert llama.decode(llama.encode("")) == ""


def test_special_tokens_write_nothing_unless_asked_for(llama: Tokenizer) -> None:
    ids = llama.encode("A<sep>B</s>")
    assert llama.decode(ids) == "A B"
    assert llama.decode(ids, skip_special=False) == "<s> A<sep> B</s>"


def test_a_special_token_inside_a_character_does_not_break_it(llama: Tokenizer) -> None:
    assert llama.decode([byte(0xE5), 4094, byte(0xA5), byte(0xBD)]) == "好"


def test_ids_outside_the_vocabulary_are_refused(yuan: Tokenizer) -> None:
    for number in (-1, 4098, 4159):
        with pytest.raises(PromptError, match="4097"):
            yuan.decode([number])
        with pytest.raises(PromptError, match="4097"):
            yuan.is_special(number)


def test_a_stop_string_ends_the_text_before_it(llama: Tokenizer) -> None:
    ids = llama.encode("One day, she saw a big dog")
    detokenizer = llama.detokenizer(("saw a", "nothing"))
    text = "".join(map(detokenizer.push, ids)) + detokenizer.flush()
    assert text == "One day, she "
    assert detokenizer.stopped == "saw a"
    assert detokenizer.push(ids[-1]) == ""


def test_the_string_of_a_special_token_stops_though_it_is_not_shown(yuan: Tokenizer) -> None:
    detokenizer = yuan.detokenizer(("<sep>", "Hello!"))
    text = "".join(map(detokenizer.push, yuan.encode("Hello<sep> there")))
    assert text + detokenizer.flush() == "Hello"
    assert detokenizer.stopped == "<sep>"


def test_what_may_become_a_stop_string_is_held_back() -> None:
    stop = StopStrings(["</end>"])
    assert [stop.push(text) for text in ("a<", "/en", "x", "<", "</end", ">b")] == ["a", "", "</enx", "", "<", ""]
    assert stop.found == "</end>"
    held = StopStrings(["\n\n"])
    assert (held.push("a\n"), held.flush(), held.flush()) == ("a", "\n", "")
    assert held.found is None


def test_the_first_stop_string_to_be_complete_counts() -> None:
    for parts in (["abc"], ["a", "b", "c"], ["ab", "c"]):
        stop = StopStrings(["abc", "b"])
        assert "".join(map(stop.push, parts)) + stop.flush() == "a"
        assert stop.found == "b"
    longer = StopStrings(["bc", "abc"])
    assert longer.push("xabc") == "x"
    assert longer.found == "abc"


def test_no_stop_strings_hold_nothing_back() -> None:
    stop = StopStrings([])
    assert stop.push("anything") == "anything"


def test_the_cost_of_a_token_does_not_grow_with_the_text(llama: Tokenizer) -> None:
    """The classic way decodes a growing tail again and again; here the last thousand tokens cost what the first do."""
    ids = [byte(0x41)] * 20000  # no character boundary that a tokenizer library would see as the end of a word
    detokenizer = llama.detokenizer(("never this",))
    times = []
    for start in range(0, len(ids), 1000):
        began = time.perf_counter()
        for number in ids[start : start + 1000]:
            detokenizer.push(number)
        times.append(time.perf_counter() - began)
    assert min(times[-5:]) < 5 * min(times[:5])
