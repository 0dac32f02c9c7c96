"""Tokenizers of published and bundled models: ids that others computed, roles, and what happens with broken folders."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.shared import DATA, shared
from tpcpu.errors import PromptError, TextError
from tpcpu.text import Tokenizer, check_text, load_tokenizer
from tpcpu.text.added_tokens import AddedToken, Cutter
from tpcpu.text.sentencepiece_model import SentencePieceModel

MODELS = ("llama-tiny", "yuan-tiny", "stories260k")
YUAN_CONFIG = {
    "model_type": "yuan",
    "eod_token": 77185,
    "sep_token": 77187,
    "sep_token_id": 77185,
    "vocab_size": 135040,
}


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def load(folder: Path) -> Tokenizer:
    return load_tokenizer(folder, read(folder / "config.json"), read(folder / "generation_config.json"))


@pytest.fixture(scope="module")
def yuan() -> Tokenizer:
    return load_tokenizer(shared("tokenizers/yuan2"), YUAN_CONFIG)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of llama-tiny's text files, to be broken."""
    for path in (DATA / "llama-tiny").glob("*"):
        if path.suffix != ".safetensors":
            shutil.copy(path, tmp_path / path.name)
    return tmp_path


# The bundled models


@pytest.mark.parametrize("model", MODELS)
def test_prompts_have_the_reference_ids(model: str) -> None:
    tokenizer = load(DATA / model)
    file = "ref.json" if model == "stories260k" else "reference.json"
    for case in read(DATA / model / file)["cases"]:
        assert tokenizer.encode(case["prompt"]) == case["prompt_ids"]
        assert tokenizer.decode(case["prompt_ids"], skip_special=False).endswith(case["prompt"])


@pytest.mark.parametrize("model", MODELS)
def test_answers_have_the_reference_text(model: str) -> None:
    tokenizer = load(DATA / model)
    if model == "stories260k":
        for case in read(DATA / model / "ref.json")["cases"]:
            assert tokenizer.decode(case["prompt_ids"] + case["greedy_ids"]) == case["text"]
    else:
        for case in read(DATA / model / "reference.json")["cases"]:
            assert tokenizer.decode(case["greedy_ids"][: case["first_eos"]]) == case["generated_text"]
            assert case["first_eos"] is None or case["greedy_ids"][case["first_eos"]] in tokenizer.stop_ids


def test_roles_of_the_bundled_models() -> None:
    llama, yuan, stories = (load(DATA / model) for model in MODELS)
    assert (llama.bos_id, yuan.bos_id, stories.bos_id) == (1, None, 1)
    assert (llama.stop_ids, yuan.stop_ids, stories.stop_ids) == ({2}, {4092}, {2})
    assert (llama.size, yuan.size, stories.size) == (4096, 4098, 512)  # yuan-tiny has 4160 rows
    assert (llama.has_chat_template, yuan.has_chat_template, stories.has_chat_template) == (True, True, False)
    assert [number for number in range(4098) if yuan.is_special(number)] == [0, 1, 2, 4092, 4094, 4095, 4096, 4097]


def test_both_files_of_llama_tiny_agree(folder: Path) -> None:
    by_json = load(folder)
    (folder / "tokenizer.json").unlink()
    by_model = load(folder)
    texts = [*texts_of_the_peers(), *(DATA / "heldout.txt").read_text(encoding="utf-8").split("<eod>")]
    for text in texts:
        ids = by_json.encode(text)
        assert by_model.encode(text) == ids
        assert by_model.decode(ids) == by_json.decode(ids)
    assert by_model.stop_ids == by_json.stop_ids


# Yuan 2.0's published file, whose vectors come from running the publishers' code

YUAN_VECTORS = {
    "What is AI?<sep>": "1724 338 79545 29973 77187",
    "写一篇春游作文<sep>": "29871 31479 37056 31031 32419 39053 77187",
    "请问目前最先进的机器学习算法有哪些？<sep>": "29871 36264 32139 58274 54577 38386 33638 30882 77187",
    "Write a Python function that adds two numbers.<sep>": "14350 263 5132 740 393 12778 1023 3694 29889 77187",
    "1+1=?\n<sep>": "29871 29896 29974 29896 115798 13 77187",
    "A<sep>B": "319 77187 350",
    "<eod>Hi": "77185 6324",
    "A<n>B<sep>": "319 29966 29876 29958 29933 77187",
    "2024年12月 3.14": "29871 29906 29900 29906 29946 30470 29896 29906 30534 29871 29941 29889 29896 29946",
    "😀": "29871 243 162 155 131",
    "</s>": "1533 29879 29958",
    "<mask><predict><FIM_SUFFIX><FIM_PREFIX><FIM_MIDDLE>": "134953 134954 134955 134956 134957",
    "<pad><jupyter_start><empty_output><commit_before><commit_after>": "77188 96630 96634 96635 96637",
    "<s><unk>": "1 0",
}


@pytest.mark.parametrize(("text", "ids"), YUAN_VECTORS.items())
def test_yuan_vectors(yuan: Tokenizer, text: str, ids: str) -> None:
    assert yuan.encode(text) == [int(number) for number in ids.split()]


def test_yuan_roles_are_not_what_its_published_config_says(yuan: Tokenizer) -> None:
    assert read(shared("tokenizers/yuan2/tokenizer_config.json"))["add_eos_token"] is True
    assert yuan.bos_id is None
    assert yuan.stop_ids == {77185}
    assert yuan.size == 134958
    assert yuan.encode("") == []
    assert yuan.decode([*yuan.encode("答：好。<sep>"), 77185]) == "答：好。"


def test_yuan_answers_questions_without_a_template_in_the_folder(yuan: Tokenizer) -> None:
    messages = [
        {"role": "system", "content": " 你是助手。 "},
        {"role": "user", "content": "你好\n"},
        {"role": "assistant", "content": "好"},
        {"role": "user", "content": "What is AI?"},
    ]
    assert yuan.render_chat(messages) == "你是助手。\n你好<n>好<n>What is AI?<sep>"
    question = [{"role": "user", "content": "What is AI?"}]
    assert yuan.encode_chat(question) == [1724, 338, 79545, 29973, 77187]


# llama.cpp's vectors


@pytest.mark.parametrize(
    ("vectors", "published", "file"),
    [
        # Phi-3 has Llama 2's vocabulary, a distilled DeepSeek-R1 Qwen2's.
        (("llama-spm", "phi-3"), "llama2", "tokenizer.json"),
        (("llama-spm", "phi-3"), "llama2", "tokenizer.model"),
        (("llama-bpe",), "llama3", "tokenizer.json"),
        (("gpt-2",), "gpt2", "tokenizer.json"),
        (("qwen2", "deepseek-r1-qwen"), "qwen2", "tokenizer.json"),
    ],
)
def test_llama_cpp_vectors(vectors: tuple[str, ...], published: str, file: str, tmp_path: Path) -> None:
    source = shared(f"tokenizers/{published}")
    for name in (file, "tokenizer_config.json"):
        if (source / name).exists():
            (tmp_path / name).symlink_to(source / name)
    tokenizer = load_tokenizer(tmp_path, {})
    for name in vectors:
        base = shared("tokenizers/vectors") / f"ggml-vocab-{name}.gguf"
        texts = Path(f"{base}.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")[:-1]
        answers = Path(f"{base}.out").read_text().splitlines()
        assert len(texts) == len(answers) > 40
        for text, answer in zip(texts, answers, strict=True):
            ids = [int(number) for number in answer.split()]
            begun = tokenizer.encode(text)
            assert begun[len(begun) - len(ids) :] == ids
            assert tokenizer.decode(begun) == text


# transformers' slow Llama tokenizer: flags of added tokens, dummy prefixes

SLOW = read(Path(__file__).with_name("slow_llama_tokenizer.json"))


def texts_of_the_peers() -> list[str]:
    return [case["text"] for case in SLOW["cases"]]


@pytest.mark.parametrize("legacy", [True, False])
def test_added_tokens_as_the_slow_llama_tokenizer_takes_them(legacy: bool) -> None:
    roles = [AddedToken(content) for content in ("<s>", "</s>", "<unk>")]
    added = [*roles, *(AddedToken(**token) for token in SLOW["added_tokens"])]
    model = SentencePieceModel(DATA / "llama-tiny" / "tokenizer.model", added, legacy)
    for case in SLOW["cases"]:
        assert model.encode(case["text"]) == case["legacy" if legacy else "not_legacy"], case["text"]


def test_cutting_takes_the_leftmost_then_the_longest_string() -> None:
    cutter = Cutter([AddedToken("<a>"), AddedToken("<a><b>"), AddedToken("<b>"), AddedToken("w", single_word=True)])
    parts = [part if isinstance(part, str) else [part.content] for part in cutter.cut("x<a><b><b>y w wow")]
    assert parts == ["x", ["<a><b>"], ["<b>"], "y ", ["w"], " wow"]
    assert Cutter([]).cut("") == []


# What a folder may say


def test_added_tokens_may_be_declared_in_the_older_files(tmp_path: Path) -> None:
    shutil.copy(DATA / "llama-tiny" / "tokenizer.model", tmp_path)
    (tmp_path / "added_tokens.json").write_text('{"<tool>": 4097, "<call>": 4096}')
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": {"content": "<sep>"}, "pad_token": "<call>"}')
    tokenizer = load_tokenizer(tmp_path, {})
    assert tokenizer.encode("<call>a<tool>") == [1, 4096, *tokenizer.encode("a")[1:], 4097]
    assert tokenizer.stop_ids == {4094}
    assert tokenizer.size == 4098
    assert tokenizer.is_special(4096)
    assert not tokenizer.is_special(4097)
    assert tokenizer.decode(tokenizer.encode("a<call><tool>")) == "a<tool>"


def test_stop_ids_are_those_of_every_file(folder: Path) -> None:
    tokenizer = load_tokenizer(folder, {"eos_token_id": 7}, {"eos_token_id": [8, 9]})
    assert tokenizer.stop_ids == {2, 7, 8, 9}
    assert load_tokenizer(folder, {"eos_token_id": 99999}, {}).stop_ids == {2}  # can never be sampled
    for bad in ("2", True, [1, "2"], 2.0):
        with pytest.raises(TextError, match="eos_token_id"):
            load_tokenizer(folder, {"eos_token_id": bad})


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer.model"])
@pytest.mark.parametrize(("flag", "bos"), [(True, 1), (False, None), (None, 1)])
def test_add_bos_token_overrules_the_file(folder: Path, file: str, flag: bool | None, bos: int | None) -> None:
    (folder / {"tokenizer.json": "tokenizer.model", "tokenizer.model": "tokenizer.json"}[file]).unlink()
    config = read(folder / "tokenizer_config.json")
    config["add_bos_token"] = flag
    config["add_eos_token"] = True  # never added: a prompt is there to be continued
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(folder, {})
    assert tokenizer.bos_id == bos
    assert tokenizer.encode("") == ([] if bos is None else [bos])
    assert tokenizer.encode("a")[-1] != 2


def test_truncation_and_padding_in_the_file_do_not_touch_a_prompt(folder: Path) -> None:
    content = read(folder / "tokenizer.json")
    content["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {
        "strategy": {"Fixed": 64},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<pad>",
    }
    (folder / "tokenizer.json").write_text(json.dumps(content))
    text = "Once upon a time, there was a little girl"
    assert load_tokenizer(folder, {}).encode(text) == load(DATA / "llama-tiny").encode(text)


def test_a_token_beyond_the_embedding_is_refused_in_a_prompt_and_never_sampled(folder: Path) -> None:
    tokenizer = load_tokenizer(folder, {"vocab_size": 4090})
    assert tokenizer.size == 4090
    assert tokenizer.encode("Hello")
    with pytest.raises(PromptError, match="4094"):
        tokenizer.encode("Hello<sep>")


# Prompts


def test_a_prompt_may_be_text_bytes_ids_or_messages() -> None:
    tokenizer = load(DATA / "llama-tiny")
    ids = tokenizer.encode("Once upon")
    assert tokenizer.prompt_ids("Once upon") == tokenizer.prompt_ids(b"Once upon") == tokenizer.prompt_ids(ids) == ids
    chat = tokenizer.prompt_ids([{"role": "user", "content": "Hi"}])
    assert chat == tokenizer.encode("User: Hi\nAssistant:")
    assert chat.count(1) == 1  # the template writes <s> itself


def test_a_prompt_of_no_tokens_is_refused_but_bos_alone_is_one() -> None:
    llama, yuan = load(DATA / "llama-tiny"), load(DATA / "yuan-tiny")
    assert llama.prompt_ids("") == [1]
    for prompt in ("", b"", []):
        with pytest.raises(PromptError, match="no tokens"):
            yuan.prompt_ids(prompt)


@pytest.mark.parametrize("prompt", [[5, -1], [4096], [1.5], ["a"], [True], None, 7, {"role": "user"}])
def test_prompts_that_are_neither_text_nor_ids_nor_messages(prompt: Any) -> None:
    with pytest.raises(PromptError, match="expected"):
        load(DATA / "llama-tiny").prompt_ids(prompt)


@pytest.mark.parametrize(
    ("text", "where"),
    [
        (b"ab\xffcd", "byte 0xff at position 2"),
        (b"\xe4\xbd", "byte 0xe4 at position 0"),
        ("héllo \udcc4\udce3", "byte 0xc4 at position 7"),  # GBK on the command line, as Python hands it on
        ("ab\ud83d", "U+D83D at character 2"),
    ],
)
def test_text_that_is_not_utf8_is_refused_with_its_place(text: str | bytes, where: str) -> None:
    tokenizer = load(DATA / "yuan-tiny")
    for call in (tokenizer.prompt_ids, tokenizer.encode, check_text):
        with pytest.raises(PromptError) as caught:
            call(text)
        assert where in str(caught.value)
        assert "UTF-8" in str(caught.value) or "expected" in str(caught.value)


def test_surrogates_that_spell_utf8_are_taken_as_text() -> None:
    """Under a C locale Python may hand on valid UTF-8 as surrogates."""
    assert check_text("\udce4\udcbd\udca0好") == "你好"


# Broken folders: one line that names the file


def broken(folder: Path, name: str, content: str | bytes | None) -> TextError:
    path = folder / name
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(TextError) as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    return caught.value


def test_a_folder_without_a_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.model").unlink()
    message = str(broken(folder, "tokenizer.json", None))
    assert "tokenizer.json or tokenizer.model" in message
    assert str(folder) in message


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"model": 3}', b"\xff\xfe", '{"version": "1.0", "model": {}}']
)
def test_a_tokenizer_json_that_is_none(folder: Path, content: str | bytes) -> None:
    assert "tokenizer.json" in str(broken(folder, "tokenizer.json", content))


def test_a_tokenizer_json_with_an_unknown_decoder(folder: Path) -> None:
    content = read(folder / "tokenizer.json")
    content["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    assert "WordPiece" in str(broken(folder, "tokenizer.json", json.dumps(content)))
    content["decoder"] = None
    assert "no decoder" in str(broken(folder, "tokenizer.json", json.dumps(content)))


@pytest.mark.parametrize("content", ["", "version https://git-lfs.github.com/spec/v1\n", b"\x00" * 100, b"\x0a\xff"])
def test_a_tokenizer_model_that_is_none(folder: Path, content: str | bytes) -> None:
    (folder / "tokenizer.json").unlink()
    assert "no SentencePiece model" in str(broken(folder, "tokenizer.model", content))


def test_a_truncated_tokenizer_model(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    whole = (folder / "tokenizer.model").read_bytes()
    assert "no SentencePiece model" in str(broken(folder, "tokenizer.model", whole[: len(whole) // 2]))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("added_tokens_decoder", []),
        ("added_tokens_decoder", {"x": "<a>"}),
        ("added_tokens_decoder", {"-1": {"content": "<a>"}}),
        ("added_tokens_decoder", {"5": {"content": ""}}),
        ("added_tokens_decoder", {"5": {"content": "<a>", "lstrip": 1}}),
        ("added_tokens_decoder", {"9": {"content": "<sep>"}}),  # 4094 in the vocabulary
        ("additional_special_tokens", "<a>"),
        ("bos_token", 1),
        ("add_bos_token", "yes"),
        ("chat_template", 5),
        ("chat_template", [{"name": "tool_use", "template": ""}]),
    ],
)
def test_a_tokenizer_config_that_cannot_be_meant(folder: Path, key: str, value: object) -> None:
    config = read(folder / "tokenizer_config.json")
    config[key] = value
    broken(folder, "tokenizer_config.json", json.dumps(config))


def test_a_bos_without_a_row_in_the_embedding(folder: Path) -> None:
    """A role string that no file knows becomes a new token, beyond the last row of the model."""
    (folder / "tokenizer.json").unlink()
    config = read(folder / "tokenizer_config.json")
    config["bos_token"] = "<no such token>"
    message = str(broken(folder, "tokenizer_config.json", json.dumps(config)))
    assert "<no such token>" in message
    assert "4096" in message


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"])
@pytest.mark.parametrize("content", ["{", "[1]", b"\xff", "[" * 100000])
def test_small_files_that_are_not_json_objects(folder: Path, name: str, content: str | bytes) -> None:
    assert name in str(broken(folder, name, content))
