"""Chat templates: messages to one prompt text, in the sandbox and with the names that transformers gives a template.

Knows Jinja and the shape of messages, nothing of ids. A template comes with a model and is not trusted: it runs in
Jinja's immutable sandbox, and whatever goes wrong inside becomes one TextError.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from tpcpu.errors import PromptError, TextError

ROLES = ("system", "user", "assistant")


class ChatTemplate:
    """One Jinja template and where it comes from. Compiled when first used: a broken one does not stop raw prompts."""

    def __init__(self, source: str, where: str, names: Mapping[str, str]) -> None:
        """`where` is named in errors; `names` are the role strings that templates use: bos_token, eos_token, ..."""
        self._source = source
        self._where = where
        self._names = dict(names)

    @cached_property
    def _template(self) -> jinja2.Template:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            return environment.from_string(self._source)
        except jinja2.TemplateSyntaxError as error:
            raise TextError(f"{self._where}: line {error.lineno} is not valid Jinja: {error.message}") from None

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """The prompt text. Raises PromptError for messages of the wrong shape, TextError where the template fails."""
        checked = check_messages(messages)
        template = self._template
        try:
            return template.render(
                messages=checked,
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **self._names,
            )
        except Exception as error:  # a template can raise whatever its expressions raise
            raise TextError(f"{self._where}: the template refused these messages: {_one_line(error)}") from None


def check_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Messages as `{"role", "content"}` of strings; content may also be a list of text parts, joined with newlines.

    Roles and keys beyond these are refused: a template that does not know them drops them in silence. Raises
    PromptError.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise PromptError(
            f"messages: found {type(messages).__name__}, expected a list of objects with 'role' and 'content'"
        )
    if not messages:
        raise PromptError("messages: the list is empty, expected at least one message")
    return [_check_message(message, f"messages[{place}]") for place, message in enumerate(messages)]


def _check_message(message: object, where: str) -> dict[str, str]:
    if not isinstance(message, Mapping):
        raise PromptError(f"{where}: found {type(message).__name__}, expected an object with 'role' and 'content'")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise PromptError(f"{where}: role {role!r} is not known, expected one of {', '.join(ROLES)}")
    unknown = sorted(str(key) for key, value in message.items() if key not in ("role", "content") and value is not None)
    if unknown:
        raise PromptError(f"{where}: {', '.join(unknown)} not supported, expected only 'role' and 'content'")
    if isinstance(content, list):
        content = "\n".join(_check_part(part, f"{where}.content[{place}]") for place, part in enumerate(content))
    if not isinstance(content, str):
        raise PromptError(f"{where}: content is {type(content).__name__}, expected a string or a list of text parts")
    return {"role": str(role), "content": content}


def _check_part(part: object, where: str) -> str:
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise PromptError(f'{where}: found a part of type {kind!r}, expected {{"type": "text", "text": ...}}')


def choose_template(value: object, where: str) -> str | None:
    """The template text of tokenizer_config.json's `chat_template`: a string, or a list of named ones (`default`).

    None where there is none. Raises TextError.
    """
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list) and all(
        isinstance(entry, Mapping) and isinstance(entry.get("name"), str) and isinstance(entry.get("template"), str)
        for entry in value
    ):
        named = {entry["name"]: str(entry["template"]) for entry in value}
        if "default" in named:
            return named["default"]
        raise TextError(f"{where}: chat_template has the names {sorted(named)}, expected one called 'default'")
    raise TextError(
        f"{where}: chat_template is {type(value).__name__}, expected a string or a list of name and template"
    )


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}` marks an assistant's words for training; here it only passes them on."""

    tags = {"generation"}  # noqa: RUF012  Jinja's own declaration is a plain set

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes for HTML, which would change the prompt
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
