"""What publishers' own code does with texts and their files leave out or contradict, by `model_type`.

Most families need none of it: their files say everything. Knows what there is to say; each family says it in a file
of its own.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tpcpu.text.added_tokens import Declarations
from tpcpu.text.tiktoken_file import Words

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Rules:
    """One publisher's. The configs that functions get are config.json and generation_config.json."""

    complete: Callable[[Declarations, Config, Config], Declarations] = lambda declared, *_: declared
    """What a folder declares, with what the publisher's code registers beside it."""
    prefix: tuple[str, ...] | None = None
    """Tokens before every text; None: as the files say. Of names in `a|b` the first that there is."""
    chat_template: Callable[[Config], str | None] = lambda _: None
    """The template where the folder has none; None where the publisher has none either."""
    prefers_model: bool = False
    """Whether tokenizer.model counts before tokenizer.json."""
    tiktoken: tuple[str, Words] | None = None
    """The name of a tiktoken file, which may be tokenizer.model, and how it cuts texts."""
    stops: Callable[[Config], tuple[str, ...]] = lambda _: ()
    """Tokens that end answers beside those that the files name; such as a model does not have are left out."""
