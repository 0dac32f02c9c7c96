"""Text: tokenizer files, chat templates and incremental detokenising: the only door to these libraries."""

from tpcpu.text.chat_template import check_messages
from tpcpu.text.detokenizer import IncrementalDetokenizer
from tpcpu.text.loading import load_tokenizer
from tpcpu.text.stop_strings import StopStrings
from tpcpu.text.tokenizer import Messages, Prompt, Tokenizer, check_text

__all__ = [
    "IncrementalDetokenizer",
    "Messages",
    "Prompt",
    "StopStrings",
    "Tokenizer",
    "check_messages",
    "check_text",
    "load_tokenizer",
]
