"""What one line of the input asks for: its id, its prompt, and how its answer is sampled.

Two forms are read: a plain one, `{"id", "prompt" | "messages", …sampling}`, and OpenAI's batch file, whose `body` is
that of a request. Keys bear OpenAI's names. What would change the answer and is not supported is refused, line by line;
what changes none (`user`, `metadata`) is passed over. Knows JSON and SamplingParams; files and models are for others.
"""

import difflib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from tpcpu.errors import PromptError, TpcpuError
from tpcpu.sampling import SamplingParams
from tpcpu.text import Prompt, check_text

Id = str | int

_SAMPLING = (
    "max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "seed", "stop", "ignore_eos",
)  # fmt: skip
"""Keys that are SamplingParams' own; null stands for the default."""

_LENGTH, _LOGPROBS = "max_completion_tokens", ("logprobs", "top_logprobs")

_WITHOUT_EFFECT = ("model", "user", "metadata", "store", "service_tier")
"""What OpenAI's clients send along, and no answer here depends on."""

_FIXED: Mapping[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1,), "stream": (False,), "echo": (False,), "suffix": ("",), "logit_bias": ({},),
    "response_format": ({"type": "text"},), "tools": ([],), "tool_choice": ("none",),
}  # fmt: skip
"""Keys that are taken with these values, or null, which ask for nothing special."""

_BODY = ("prompt", "messages", *_SAMPLING, _LENGTH, *_LOGPROBS, *_WITHOUT_EFFECT, *_FIXED)
_ENVELOPE = ("custom_id", "method", "url", "body")
CHAT_URL = "/v1/chat/completions"
_URLS = {CHAT_URL: "messages", "/v1/completions": "prompt"}
_MOST_TOP = 20


@dataclass(frozen=True)
class Asked:
    """One line that can be answered, as far as the line itself tells."""

    id: Id
    prompt: Prompt
    params: SamplingParams
    url: str | None = None
    """Of a line of OpenAI's batch format, whose answer has that format too."""


@dataclass(frozen=True)
class BadLine:
    """One that cannot; `id` where it is known."""

    id: Id | None
    message: str


class _LineError(Exception):
    """Why a line cannot be answered."""


def parse(raw: bytes, defaults: SamplingParams) -> Asked | BadLine:
    """What a line asks for. `defaults` hold for what it does not say."""
    found: Id | None = None
    try:
        entry = _object(raw)
        is_envelope = any(key in entry for key in _ENVELOPE)
        found = _id(entry, "custom_id" if is_envelope else "id")
        body = _unwrapped(entry) if is_envelope else {key: value for key, value in entry.items() if key != "id"}
        return Asked(found, _prompt(body), _params(body, defaults), entry["url"] if is_envelope else None)
    except (_LineError, TpcpuError) as error:
        return BadLine(found, str(error))


def _object(raw: bytes) -> dict[str, Any]:
    def of_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(pairs)
        if len(entries) < len(pairs):
            names = [name for name, _ in pairs]
            raise _LineError(f"the key {next(name for name in names if names.count(name) > 1)!r} stands twice")
        return entries

    def constant(name: str) -> NoReturn:
        raise _LineError(f"not JSON: {name} is no number there")

    try:
        value = json.loads(raw.decode(), object_pairs_hook=of_pairs, parse_constant=constant)
    except UnicodeDecodeError as error:
        raise _LineError(f"not UTF-8 at byte {error.start}; convert the file first, with iconv -t UTF-8") from None
    except json.JSONDecodeError as error:
        raise _LineError(f"not JSON: {error.msg} at character {error.pos + 1}") from None
    except RecursionError:
        raise _LineError("not usable JSON: nested too deeply") from None
    except ValueError as error:  # a number of thousands of digits
        raise _LineError(f"not usable JSON: {error}") from None
    if not isinstance(value, dict):
        raise _LineError(f"found {_kind(value)}, expected a JSON object")
    return value


def _id(entry: Mapping[str, Any], key: str) -> Id:
    value = entry.get(key)
    if value is None:
        raise _LineError(f"{key}: missing; expected a string or a whole number that no other line has")
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise _LineError(f"{key}: found {_kind(value)}, expected a string or a whole number")
    return check_text(value, key) if isinstance(value, str) else value


def _unwrapped(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The body of a line of OpenAI's batch format."""
    _refuse_unknown(entry, _ENVELOPE)
    if entry.get("method") != "POST":
        raise _LineError(f"method: found {entry.get('method')!r}, expected 'POST'")
    url = entry.get("url")
    if not isinstance(url, str) or url not in _URLS:
        raise _LineError(f"url: found {url!r}, expected {' or '.join(_URLS)}")
    body = entry.get("body")
    if not isinstance(body, dict):
        raise _LineError(f"body: found {_kind(body)}, expected an object")
    for wanted in _URLS.values():
        if (wanted in body) != (wanted == _URLS[url]):
            raise _LineError(f"body: {url} takes {_URLS[url]} and nothing in its place")
    return body


def _prompt(body: Mapping[str, Any]) -> Prompt:
    _refuse_unknown(body, _BODY)
    if ("prompt" in body) == ("messages" in body):
        found = "both" if "prompt" in body else "neither"
        raise _LineError(f"expected one of prompt and messages, found {found}")
    if "messages" in body:
        messages = body["messages"]
        if not isinstance(messages, list) or not messages or not all(isinstance(each, dict) for each in messages):
            raise _LineError("messages: expected a list of objects with 'role' and 'content', at least one")
        return messages
    prompt = body["prompt"]
    if isinstance(prompt, str):
        return check_text(prompt)
    if not isinstance(prompt, list):
        raise _LineError(f"prompt: found {_kind(prompt)}, expected a text or a list of token ids")
    if any(isinstance(part, (str, list)) for part in prompt):
        raise _LineError("prompt: found a list of prompts, expected one prompt a line")
    if any(isinstance(part, dict) for part in prompt):
        raise PromptError("prompt: found objects, expected a text or a list of token ids; a conversation is messages")
    return prompt


def _params(body: Mapping[str, Any], defaults: SamplingParams) -> SamplingParams:
    for key, allowed in _FIXED.items():
        value = body.get(key)
        # 1 == True: the kind has to be right as well
        if value is not None and not any(value == each and type(value) is type(each) for each in allowed):
            raise _LineError(f"{key}: {_shown(value)} is not supported, expected {_shown(allowed[0])} or nothing")
    given = {key: body[key] for key in _SAMPLING if body.get(key) is not None}
    if body.get(_LENGTH) is not None:
        if "max_tokens" in given:
            raise _LineError(f"found both max_tokens and {_LENGTH}, expected one of them")
        given["max_tokens"] = body[_LENGTH]
    given |= _logprobs(body)
    return replace(defaults, **given)


def _logprobs(body: Mapping[str, Any]) -> dict[str, Any]:
    """OpenAI's two ways to ask: a switch and a number beside it (chat), or the number alone."""
    wanted, top = (body.get(key) for key in _LOGPROBS)
    if top is not None and wanted is not True:
        raise _LineError("top_logprobs: needs logprobs true beside it")
    if wanted is None or wanted is False:
        return {}
    number = (top or 0) if wanted is True else wanted
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number <= _MOST_TOP:
        name = _LOGPROBS[wanted is True]
        raise _LineError(f"{name}: found {_shown(number)}, expected a whole number from 0 to {_MOST_TOP}")
    return {"logprobs": number}


def _refuse_unknown(entry: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for key in entry:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            raise _LineError(f"the key {key!r} is not known" + (f"; is {near[0]} meant?" if near else ""))


def _kind(value: object) -> str:
    names: list[tuple[Callable[[object], bool], str]] = [
        (lambda v: v is None, "nothing"),
        (lambda v: isinstance(v, bool), "true or false"),
        (lambda v: isinstance(v, (int, float)), "a number"),
        (lambda v: isinstance(v, str), "a string"),
        (lambda v: isinstance(v, list), "a list"),
    ]
    return next((name for holds, name in names if holds(value)), "an object")


def _shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
