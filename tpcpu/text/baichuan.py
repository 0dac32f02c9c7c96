"""Baichuan's own rules for text: chats in which a token of its own begins each turn.

The generation_config.json of a model for chats says which (`user_token_id`, `assistant_token_id`); a system text
comes first, bare. Source: `generation_utils.py` of `baichuan-inc/Baichuan2-13B-Chat`.
"""

from tpcpu.errors import TextError
from tpcpu.text.added_tokens import AddedToken, Declarations
from tpcpu.text.rules import Config, Rules

TURNS = {"user_token_id": "<reserved_106>", "assistant_token_id": "<reserved_107>"}
"""What Baichuan2's vocabulary calls the tokens that the published models name."""

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}"
    "{%- if not loop.first -%}{{ raise_exception('a system message has to be the first') }}{%- endif -%}"
    "{%- else -%}{{ '<reserved_106>' if message['role'] == 'user' else '<reserved_107>' }}"
    "{%- endif -%}"
    "{{ message['content'] }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt and messages[-1]['role'] != 'assistant' -%}{{ '<reserved_107>' }}{%- endif -%}"
)


def _complete(declared: Declarations, _config: Config, generation: Config) -> Declarations:
    new = []
    for key, content in TURNS.items():
        number = generation.get(key)
        if isinstance(number, bool) or not isinstance(number, int | None) or (number or 0) < 0:
            raise TextError(f"generation_config.json: {key} is {number!r}, expected a token id")
        if number is not None and not declared.declares([content]):
            new.append(AddedToken(content, number))
    return Declarations((*declared.tokens, *new), declared.roles)


RULES = Rules(
    _complete,
    chat_template=lambda generation: CHAT_TEMPLATE if all(generation.get(key) is not None for key in TURNS) else None,
)
