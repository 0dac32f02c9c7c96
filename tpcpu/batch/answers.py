"""One answer as a line of the output: in a plain form, and for a line of OpenAI's batch file in that file's form too.

The same answer is the same bytes whenever it is given: nothing here tells of time or of a run.
"""

import json
from collections.abc import Mapping
from typing import Any

from tpcpu.batch.lines import CHAT_URL, Id
from tpcpu.engine.requests import Completion


def answer(line: int, name: Id, url: str | None, completion: Completion, *, drawn: bool) -> dict[str, Any]:
    """The answer to a line of this number and id; `url` is that of a line of OpenAI's. `drawn`: its seed matters."""
    told: dict[str, Any] = {
        "id": name,
        "text": completion.text,
        "ids": completion.ids,
        "finish_reason": completion.finish_reason,
        "prompt_tokens": len(completion.prompt_ids),
        "line": line,
    }
    if drawn:
        told["seed"] = completion.seed
    if completion.logprobs is not None:
        told["logprobs"] = completion.logprobs
    if url is not None:
        response = {"status_code": 200, "request_id": f"line-{line}", "body": _body(url, completion)}
        told |= {"custom_id": name, "response": response, "error": None}
    return told


def encode(entry: Mapping[str, Any]) -> bytes:
    """A line. ASCII only: no reader takes a character of a text for the end of the line."""
    return json.dumps(entry, allow_nan=False).encode() + b"\n"


def _body(url: str, completion: Completion) -> dict[str, Any]:
    """What OpenAI's server answers at this address, as far as an answer decides it."""
    is_chat = url == CHAT_URL
    said = {"message": {"role": "assistant", "content": completion.text}} if is_chat else {"text": completion.text}
    prompt_tokens, completion_tokens = len(completion.prompt_ids), len(completion.ids)
    return {
        "object": "chat.completion" if is_chat else "text_completion",
        "choices": [{"index": 0, **said, "finish_reason": completion.finish_reason}],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        },
    }
