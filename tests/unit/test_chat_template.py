"""Chat templates: what transformers renders, which messages are refused, and that a template cannot escape."""

import datetime
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.shared import DATA, shared
from tpcpu.errors import PromptError, TextError
from tpcpu.text import load_tokenizer
from tpcpu.text.chat_template import ChatTemplate

USER = {"role": "user", "content": "Hi"}
CONVERSATION = [
    {"role": "system", "content": " Be brief. "},
    {"role": "user", "content": "1 < 2 & “why”? "},
    {"role": "assistant", "content": "因为\n🌸"},
    {"role": "user", "content": "<sep> {{ no template }}"},
]


def render(source: str, messages: Any = (USER,), **names: str) -> str:
    return ChatTemplate(source, "a template", names).render(messages)


@pytest.mark.parametrize("generation", [True, False])
@pytest.mark.parametrize("folder", ["llama-tiny", "yuan-tiny", "qwen2"])
def test_templates_render_as_in_transformers(folder: str, generation: bool) -> None:
    peer = pytest.importorskip("transformers.utils.chat_template_utils", reason="needs transformers")
    path = shared("tokenizers/qwen2") if folder == "qwen2" else DATA / folder
    config = json.loads((path / "tokenizer_config.json").read_text(encoding="utf-8"))
    tokenizer = load_tokenizer(path, {"model_type": "yuan" if folder == "yuan-tiny" else "llama"})
    for messages in (CONVERSATION, CONVERSATION[1:2], CONVERSATION[1:3]):
        expected, _ = peer.render_jinja_template(
            conversations=[messages],
            chat_template=config["chat_template"],
            add_generation_prompt=generation,
            bos_token=config["bos_token"],
            eos_token=config["eos_token"],
        )
        assert tokenizer.render_chat(messages, add_generation_prompt=generation) == expected[0]


# Formats of families whose folders are not here, with the tests, loops and refusals that published templates use.
FORMATS = {
    "llama3": (
        "{% set loop_messages = messages %}{% for message in loop_messages %}"
        "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
        " + message['content'] | trim + '<|eot_id|>' %}"
        "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "mistral": (
        "{%- if messages[0]['role'] == 'system' -%}"
        "{%- set system_message = messages[0]['content'] -%}{%- set rest = messages[1:] -%}"
        "{%- else -%}{%- set rest = messages -%}{%- endif -%}{{ bos_token }}"
        "{%- for message in rest -%}"
        "{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}"
        "{{ raise_exception('after an optional system message roles must alternate: user, assistant, user, ...') }}"
        "{%- endif -%}"
        "{%- if message['role'] == 'user' -%}"
        "{%- if loop.last and system_message is defined -%}"
        "{{ '[INST] ' + system_message + '\n\n' + message['content'] + '[/INST]' }}"
        "{%- else -%}{{ '[INST] ' + message['content'] + '[/INST]' }}{%- endif -%}"
        "{%- else -%}{{ ' ' + message['content'] | trim + eos_token }}{%- endif -%}"
        "{%- endfor -%}"
    ),
    "gemma": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role here') }}{% endif %}"
        "{% for message in messages %}"
        "{% if message['role'] == 'assistant' %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}"
        "{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    ),
    "phi3": (
        "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
    ),
    "chatglm": (
        "{% for message in messages %}{% if loop.first %}[gMASK]sop{% endif %}<|{{ message['role'] }}|>\n "
        "{{ message['content'] }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    ),
    "deepseek": (
        "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}"
        "{% set ns = namespace(system_prompt='') %}{%- for message in messages %}{%- if message['role'] == 'system' %}"
        "{% set ns.system_prompt = message['content'] %}{%- endif %}{%- endfor %}{{bos_token}}{{ns.system_prompt}}"
        "{%- for message in messages %}"
        "{%- if message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}"
        "{%- elif message['role'] == 'assistant' and message['content'] is not none %}"
        "{{ '<｜Assistant｜>' + message['content'] + '<｜end▁of▁sentence｜>' }}{%- endif %}{%- endfor -%}"
        "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
    ),
    "qwen3": (
        "{%- if tools %}{{ tools | tojson }}{%- endif %}"
        "{%- set ns = namespace(last=messages|length - 1) %}{%- for message in messages[::-1] %}"
        "{%- if message.role == 'user' and not message.content.startswith('<tool_response>') and ns.last == messages|"
        "length - 1 %}{%- set ns.last = messages|length - 1 - loop.index0 %}{%- endif %}{%- endfor %}"
        "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\n' + message.content.split('</think>')[-1]"
        ".lstrip('\n') + '<|im_end|>\n' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
        "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
        "{%- endif %}"
    ),
}


@pytest.mark.parametrize("generation", [True, False])
@pytest.mark.parametrize("family", FORMATS)
def test_formats_of_families_render_as_in_transformers(family: str, generation: bool) -> None:
    peer = pytest.importorskip("transformers.utils.chat_template_utils", reason="needs transformers")
    jinja2 = pytest.importorskip("jinja2")
    names = {"bos_token": "<bos>", "eos_token": "<eos>"}
    refused = 0
    for messages in (CONVERSATION, CONVERSATION[1:2], CONVERSATION[1:3], CONVERSATION[2:], CONVERSATION[:2]):
        settings = {"conversations": [messages], "chat_template": FORMATS[family], "add_generation_prompt": generation}
        try:
            expected = peer.render_jinja_template(**settings, **names)[0][0]
        except jinja2.TemplateError as error:
            refused += 1
            with pytest.raises(TextError, match=str(error)):
                ChatTemplate(FORMATS[family], family, names).render(messages, generation)
        else:
            assert ChatTemplate(FORMATS[family], family, names).render(messages, generation) == expected
    assert refused == {"mistral": 1, "gemma": 2}.get(family, 0)


def test_blocks_are_trimmed_and_names_are_given() -> None:
    source = "{% for m in messages %}\n    {% if true %}\n{{ bos_token }}{{ m.content }}\n    {% endif %}\n{% endfor %}"
    assert render(source, bos_token="<s>") == "<s>Hi\n"
    assert render("{{ tools is none }} {{ add_generation_prompt }} {{ nothing }}") == "True True "


def test_the_filters_and_functions_of_transformers() -> None:
    assert render("{{ {'a': '<é>'} | tojson }}") == '{"a": "<é>"}'
    assert render("{{ [1] | tojson(indent=1) }}") == "[\n 1\n]"
    assert render("{{ strftime_now('%Y') }}") == str(datetime.datetime.now().year)
    assert render("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "01"
    assert render("{% generation %}{{ messages[0]['content'] }}{% endgeneration %}!") == "Hi!"


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ 1 + 'a' }}",
        "{{ nothing.more }}",
        "{{ ''.__class__.__mro__ }}{{ ().__class__.__base__.__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{% if %}",
        "{% generation %}",
        "{{ 'a' | nofilter }}",
    ],
)
def test_a_template_that_fails_is_one_line_that_names_it(source: str) -> None:
    with pytest.raises(TextError) as caught:
        render(source)
    assert str(caught.value).startswith("a template: ")
    assert "\n" not in str(caught.value)


def test_a_refusal_says_what_the_template_says() -> None:
    with pytest.raises(TextError, match="roles must alternate"):
        render("{{ raise_exception('roles must\\nalternate') }}")


@pytest.mark.parametrize(
    ("messages", "where"),
    [
        ([], "empty"),
        ("Hi", "expected a list"),
        (USER, "expected a list"),
        (None, "expected a list"),
        (["Hi"], "messages[0]"),
        ([USER, {"content": "Hi"}], "messages[1]"),
        ([{"role": "robot", "content": "Hi"}], "'robot'"),
        ([{"role": ["user"], "content": "Hi"}], "role"),
        ([{"role": "user"}], "content is NoneType"),
        ([{"role": "user", "content": 5}], "content is int"),
        ([{"role": "user", "content": b"Hi"}], "content is bytes"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content[0]"),
        ([{"role": "user", "content": [{"type": "text", "text": 1}]}], "messages[0].content[0]"),
        ([{"role": "user", "content": ["Hi"]}], "messages[0].content[0]"),
        ([{"role": "assistant", "content": "", "tool_calls": []}], "tool_calls"),
    ],
)
def test_impossible_messages_are_refused_with_their_place(messages: Any, where: str) -> None:
    with pytest.raises(PromptError) as caught:
        render("{{ messages }}", messages)
    assert where in str(caught.value)
    assert "expected" in str(caught.value)


def test_text_parts_are_joined_and_empty_extras_do_no_harm() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert render("{{ messages[0].content }}", [{"role": "user", "content": parts, "name": None}]) == "a\nb"


def test_the_messages_of_the_caller_stay_as_they_are() -> None:
    messages = [dict(USER)]
    with pytest.raises(TextError):
        render("{% set _ = messages[0].update({'content': 'x'}) %}{{ messages }}", messages)
    assert messages == [USER]


def folder_with(tmp_path: Path, **config: Any) -> Path:
    shutil.copy(DATA / "llama-tiny" / "tokenizer.model", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


def test_where_a_template_may_stand(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "default"}]
    assert load_tokenizer(folder_with(tmp_path, chat_template="one"), {}).render_chat([USER]) == "one"
    assert load_tokenizer(folder_with(tmp_path, chat_template=named), {}).render_chat([USER]) == "default"
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}文件{{ eos_token }}", encoding="utf-8")
    assert load_tokenizer(tmp_path, {}).render_chat([USER]) == "<s>文件</s>"
    assert load_tokenizer(tmp_path, {}).encode_chat([USER])[0] == 1


def test_without_a_template_a_model_says_to_use_prompt(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder_with(tmp_path), {})
    assert not tokenizer.has_chat_template
    with pytest.raises(TextError, match="--prompt"):
        tokenizer.render_chat([USER])
    with pytest.raises(TextError, match="--prompt"):
        tokenizer.prompt_ids([USER])


def test_a_broken_template_does_not_stop_a_raw_prompt(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder_with(tmp_path, chat_template="{% if %}"), {})
    assert tokenizer.encode("Hi")[0] == 1
    with pytest.raises(TextError, match="line 1"):
        tokenizer.render_chat([USER])


def test_surrogates_in_a_message_are_refused() -> None:
    with pytest.raises(PromptError, match="0xff"):
        load_tokenizer(DATA / "llama-tiny", {}).encode_chat([{"role": "user", "content": "a\udcff"}])
