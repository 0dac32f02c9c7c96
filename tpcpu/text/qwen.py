"""The first Qwen's own rules for text: a tiktoken file, special tokens behind it, and ChatML.

The published folders hold qwen.tiktoken and code. Whether a model is for chats its generation_config.json says
(`chat_format`). Source: QwenLM/Qwen, `tokenization_qwen.py` and `qwen_generation_utils.py` of the published models.
"""

from tpcpu.text.added_tokens import AddedToken, Declarations
from tpcpu.text.rules import Config, Rules
from tpcpu.text.tiktoken_file import Words

END = "<|endoftext|>"

SPECIALS = (END, "<|im_start|>", "<|im_end|>", *(f"<|extra_{number}|>" for number in range(205)))
"""In this order they follow the ranks of the file."""

WORDS = Words(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    compose=True,
)

CHAT_TEMPLATE = (
    "{%- if messages[0]['role'] != 'system' -%}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}"
    "{%- endif -%}"
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)


def _chats(generation: Config) -> bool:
    return generation.get("chat_format") == "chatml"


def _complete(declared: Declarations, _config: Config, _generation: Config) -> Declarations:
    new = [AddedToken(content) for content in SPECIALS if not declared.declares([content])]
    return Declarations((*declared.tokens, *new), {"eos_token": END, **declared.roles})


RULES = Rules(
    _complete,
    chat_template=lambda generation: CHAT_TEMPLATE if _chats(generation) else None,
    tiktoken=("qwen.tiktoken", WORDS),
    stops=lambda generation: ("<|im_end|>", "<|im_start|>") if _chats(generation) else (),
)
