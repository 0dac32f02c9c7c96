"""Yuan 2.0's own rules for text, which its published files leave out or contradict.

The published folders hold a Llama SentencePiece model and say to add BOS and EOS; the publishers' code then adds
neither, makes `<eod>` the end of sequence and registers fifteen special strings in a fixed order, which decides the
ids of the five that are no pieces. A folder saved after that step lists the strings itself and is believed. Source:
IEIT-Yuan/Yuan-2.0, tools and README; the chat template is the one published with Yuan2-2B-Janus.
"""

from tpcpu.text.added_tokens import AddedToken, Declarations
from tpcpu.text.rules import Config, Rules

END = "<eod>"

SPECIALS = (
    "<sep>",
    "<pad>",
    "<mask>",
    "<predict>",
    "<FIM_SUFFIX>",
    "<FIM_PREFIX>",
    "<FIM_MIDDLE>",
    "<commit_before>",
    "<commit_msg>",
    "<commit_after>",
    "<jupyter_start>",
    "<jupyter_text>",
    "<jupyter_code>",
    "<jupyter_output>",
    "<empty_output>",
)

# Turns are joined by the literal <n>, nothing says whose they are; the answer follows <sep>.
CHAT_TEMPLATE = (
    "{%- set turn = namespace(first=true) -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}{{ message['content'] | trim + '\\n' }}"
    "{%- else -%}"
    "{{ '' if turn.first else '<n>' }}{{ message['content'] | trim }}"
    "{%- set turn.first = false -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{{ '<sep>' }}"
)


def _complete(declared: Declarations, _config: Config, _generation: Config) -> Declarations:
    """The publishers' registrations where a folder has none of them."""
    if declared.declares(SPECIALS):
        return Declarations(declared.tokens, {**declared.roles, "eos_token": END})
    roles = {"bos_token": "<s>", "unk_token": "<unk>", **declared.roles, "eos_token": END}
    replaced = declared.roles.get("eos_token")
    kept = [token for token in declared.tokens if token.content in roles.values() or token.content != replaced]
    contents = {token.content for token in kept}
    new = [content for content in (*roles.values(), *SPECIALS) if content not in contents]
    return Declarations((*kept, *map(AddedToken, dict.fromkeys(new))), roles)


RULES = Rules(_complete, prefix=(), chat_template=lambda _: CHAT_TEMPLATE, prefers_model=True)
