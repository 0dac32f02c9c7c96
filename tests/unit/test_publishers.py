"""Tokenizers whose rules are in their publishers' code: the first Qwen, ChatGLM and GLM-4, Baichuan."""

import base64
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.shared import DATA, shared
from tests.unit.test_tokenizer_peers import MIXED
from tpcpu.errors import TextError
from tpcpu.text import Tokenizer, chatglm, load_tokenizer, qwen
from tpcpu.text.library_vocabulary import _BYTES as BYTES

CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1 < 2 & “why”?"},
    {"role": "assistant", "content": "因为\n🌸"},
    {"role": "user", "content": "def f():\n\treturn 1"},
]
QWEN = {"model_type": "qwen", "vocab_size": 151936}
CHATML = {"chat_format": "chatml", "eos_token_id": 151643}


def tiktoken_lines(ranks: dict[bytes, int]) -> bytes:
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items())


def with_file(folder: Path, name: str, content: bytes, **configs: dict[str, Any]) -> Path:
    """A folder with a vocabulary and small files, named without their `.json`."""
    (folder / name).write_bytes(content)
    for each, values in configs.items():
        (folder / f"{each}.json").write_text(json.dumps(values))
    return folder


# The first Qwen: its vocabulary is that of Qwen2, whose publisher has put it into tokenizer.json


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    vocabulary = json.loads(shared("tokenizers/qwen2/tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    ranks = {bytes(BYTES[character] for character in token): rank for token, rank in vocabulary.items()}
    folder = with_file(tmp_path_factory.mktemp("qwen"), "qwen.tiktoken", tiktoken_lines(ranks))
    return load_tokenizer(folder, QWEN, CHATML)


@pytest.fixture(scope="module")
def successor() -> Tokenizer:
    return load_tokenizer(shared("tokenizers/qwen2"), {})


def test_qwen_has_the_ids_of_qwen2(chat: Tokenizer, successor: Tokenizer) -> None:
    lines = shared("text/wikitext-2-test.txt").read_text(encoding="utf-8").splitlines()[:300]
    runs = [text * count for text in ("a", "=", " ", "哈", "#", "aa ", "\n", "0") for count in range(1, 90, 4)]
    for text in (MIXED, f" {MIXED}<|im_start|>a<|im_end|>\n<|endoftext|>", "e\u0301", "", *lines, *runs):
        ids = successor.encode(text)
        assert chat.encode(text) == ids
        assert chat.decode(ids) == successor.decode(ids)


def test_qwen_s_special_tokens_and_ends(chat: Tokenizer) -> None:
    assert chat.encode("<|extra_0|><|extra_204|>") == [151646, 151850]
    assert chat.size == 151851
    assert chat.bos_id is None
    assert chat.stop_ids == {151643, 151644, 151645}


def test_a_qwen_that_is_not_for_chats(tmp_path: Path) -> None:
    folder = with_file(tmp_path, "qwen.tiktoken", tiktoken_lines(SMALL))
    base = load_tokenizer(folder, {"model_type": "qwen"}, {"chat_format": "raw"})
    assert base.stop_ids == {265}
    assert not base.has_chat_template


def test_qwen_chats_in_chatml(chat: Tokenizer, successor: Tokenizer) -> None:
    text = chat.render_chat(CONVERSATION)
    assert text == successor.render_chat(CONVERSATION)
    assert chat.encode_chat(CONVERSATION) == successor.encode_chat(CONVERSATION)
    # Where the prompt says nothing, both say something, one of them with a full stop.
    assert chat.render_chat(CONVERSATION[1:]).replace("assistant.<", "assistant<") == successor.render_chat(
        CONVERSATION[1:]
    )


# tiktoken files

SMALL = {bytes((byte,)): byte for byte in range(256)} | {
    b"ab": 256, b"abc": 257, b"bc": 258, b" a": 259, b"12": 260, b"345": 261, b"34": 262, b"aa": 263, b"aaaa": 264,
}  # fmt: skip


def plain(text: str, pattern: str) -> list[int]:
    """What tiktoken does: in each word the pair whose union has the lowest rank is joined, the first of several."""
    regex = pytest.importorskip("regex", reason="needs regex")
    ids = []
    for word in regex.findall(pattern, text):
        parts = [bytes((byte,)) for byte in word.encode()]
        while True:
            unions = [left + right for left, right in pairwise(parts)]
            known = [(SMALL[union], place) for place, union in enumerate(unions) if union in SMALL]
            if not known:
                break
            place = min(known)[1]
            parts[place : place + 2] = [unions[place]]
        ids += [SMALL[part] for part in parts]
    return ids


@pytest.mark.parametrize("text", ["abcabab", " abc  abc", "123456", "1234", "aaaaaaaaaaa", "好abc’s\r\n\n", "'S 12345"])
def test_words_and_merges_are_those_of_tiktoken(tmp_path: Path, text: str) -> None:
    tokenizer = load_tokenizer(with_file(tmp_path, "qwen.tiktoken", tiktoken_lines(SMALL)), {"model_type": "qwen"})
    assert tokenizer.encode(text) == plain(text, qwen.WORDS.pattern)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    named = {str(265 + place): {"content": name} for place, name in enumerate(("[gMASK]", "<sop>", "<|user|>"))}
    with_file(tmp_path, "tokenizer.model", tiktoken_lines(SMALL), tokenizer_config={"added_tokens_decoder": named})
    glm = load_tokenizer(tmp_path, {"model_type": "chatglm"})
    assert glm.encode(f"{text}<|user|>") == [265, 266, *plain(text, chatglm.WORDS.pattern), 267]
    assert glm.stop_ids == {267}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (tiktoken_lines(SMALL) + b"YWJj\n", "line 266"),
        (tiktoken_lines(SMALL) + b"YWJ 300\n", "line 266"),
        (tiktoken_lines(SMALL) + b"YWJj 300\n", "line 266: token b'abc'"),
        (tiktoken_lines(SMALL) + b"YWJjZA== 0\n", "its rank 0"),
        (tiktoken_lines({token: rank for token, rank in SMALL.items() if rank != 262}), "no token of rank 262"),
        (tiktoken_lines(SMALL | {b"abcd": 10**12}), "no token of rank 265"),
        (tiktoken_lines({token: rank - (rank > 7) for token, rank in SMALL.items() if rank != 7}), "the byte 0x07"),
    ],
)
def test_a_damaged_tiktoken_file(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(TextError) as caught:
        load_tokenizer(with_file(tmp_path, "qwen.tiktoken", content), {"model_type": "qwen"})
    assert message in str(caught.value)
    assert "qwen.tiktoken" in str(caught.value)


def test_what_is_not_read_is_named(tmp_path: Path) -> None:
    """Llama 3's own file, and the two files of older byte-pair tokenizers."""
    with_file(tmp_path, "tokenizer.model", tiktoken_lines(SMALL))
    with pytest.raises(TextError, match=r"tokenizer\.model: is a tiktoken file.*expected tokenizer\.json"):
        load_tokenizer(tmp_path, {"model_type": "llama"})
    (tmp_path / "tokenizer.model").unlink()
    with_file(tmp_path, "merges.txt", b"", vocab={})
    with pytest.raises(TextError, match=r"\['merges.txt', 'vocab.json'\].*save_pretrained"):
        load_tokenizer(tmp_path, {"model_type": "qwen2"})
    with pytest.raises(TextError, match=r"or qwen\.tiktoken"):
        load_tokenizer(tmp_path, {"model_type": "qwen"})


# ChatGLM, over a SentencePiece file of 4096 pieces

SENTENCEPIECE = (DATA / "llama-tiny" / "tokenizer.model").read_bytes()


def pieces(text: str) -> list[int]:
    """As SentencePiece itself has a text."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(SENTENCEPIECE)
    return list(processor.encode(text))


def test_chatglm_s_commands_follow_the_pieces(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(with_file(tmp_path, "tokenizer.model", SENTENCEPIECE), {"model_type": "chatglm"})
    begin = [4097, 4099]
    assert tokenizer.encode("") == begin
    for text in ("soporific, eop sop", "写一个 [gMASK] 故事", MIXED):
        assert tokenizer.encode(text) == [*begin, *pieces(text)]
    assert tokenizer.encode("<|user|>你好<|assistant|>") == [*begin, 4102, *pieces("你好"), 4103]
    assert tokenizer.stop_ids == {2, 4102, 4104}
    assert tokenizer.size == 4105
    assert tokenizer.decode(tokenizer.encode("好<|user|>")) == "好"


def test_chatglm3_chats_as_its_code_does(tmp_path: Path) -> None:
    """Folders published later name some commands, in any order, and have a template; the code joins lists of ids."""
    names = {"64790": "[gMASK]", "64792": "sop", "64795": "<|user|>", "64796": "<|assistant|>", "64794": "<|system|>"}
    named = {str(int(number) - 64789 + 4096): {"content": name} for number, name in names.items()}
    template = (
        "{% for message in messages %}{% if loop.first %}[gMASK]sop{% endif %}<|{{ message['role'] }}|>\n "
        "{{ message['content'] }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    config = {"added_tokens_decoder": named, "chat_template": template}
    folder = with_file(tmp_path, "tokenizer.model", SENTENCEPIECE, tokenizer_config=config)
    tokenizer = load_tokenizer(folder, {"model_type": "chatglm"})
    expected = [4097, 4099]
    for message in CONVERSATION:
        role = {"system": 4101, "user": 4102, "assistant": 4103}[message["role"]]
        expected += [role, *pieces("\n"), *pieces(message["content"])]
    assert tokenizer.encode_chat(CONVERSATION) == [*expected, 4103]


def test_glm_4_without_its_commands_is_refused(tmp_path: Path) -> None:
    with_file(tmp_path, "tokenizer.model", tiktoken_lines(SMALL), tokenizer_config={"added_tokens_decoder": {}})
    with pytest.raises(TextError, match=r"begins with '\[gMASK\]', which is no token"):
        load_tokenizer(tmp_path, {"model_type": "chatglm"})


# Baichuan, over the same


def test_baichuan_s_turns(tmp_path: Path) -> None:
    with_file(tmp_path, "tokenizer.model", SENTENCEPIECE, tokenizer_config={"add_bos_token": False})
    config = {"model_type": "baichuan"}
    tokenizer = load_tokenizer(tmp_path, config, {"user_token_id": 195, "assistant_token_id": 196})
    expected = pieces(CONVERSATION[0]["content"])
    for message in CONVERSATION[1:]:
        expected += [195 if message["role"] == "user" else 196, *pieces(message["content"])]
    assert tokenizer.encode_chat(CONVERSATION) == [*expected, 196]
    with pytest.raises(TextError, match="has to be the first"):
        tokenizer.encode_chat([*CONVERSATION, CONVERSATION[0]])
    assert not load_tokenizer(tmp_path, config).has_chat_template
    for wrong in ("195", True, -1):
        with pytest.raises(TextError, match="user_token_id"):
            load_tokenizer(tmp_path, config, {"user_token_id": wrong})
