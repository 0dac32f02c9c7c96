"""ChatGLM2's, ChatGLM3's and GLM-4's own rules for text: commands behind the vocabulary, two of them before every text.

The published code of the first two numbers nine commands behind the pieces of tokenizer.model, whether or not a folder
names any. A text is cut at those that the folder names, and at the roles; `sop` in a word is none. GLM-4's
tokenizer.model is a tiktoken file, and its folder names all of its tokens. Source: `tokenization_chatglm.py` of
`THUDM/chatglm2-6b`, `chatglm3-6b` and `glm-4-9b`.
"""

from tpcpu.text.added_tokens import AddedToken, Declarations
from tpcpu.text.rules import Config, Rules
from tpcpu.text.tiktoken_file import Words

ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
COMMANDS = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", *ROLES)
"""In this order they follow the pieces of ChatGLM3's file; ChatGLM2 has no roles."""

WORDS = Words(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def _complete(declared: Declarations, _config: Config, _generation: Config) -> Declarations:
    if declared.declares(["<sop>"]):
        return declared
    named = {token.content: token for token in declared.tokens}
    commands = [
        named.get(name) or AddedToken(name, cuts=name in ROLES, behind=place) for place, name in enumerate(COMMANDS)
    ]
    others = [token for token in declared.tokens if token.content not in COMMANDS]
    return Declarations((*commands, *others), declared.roles)


RULES = Rules(
    _complete,
    prefix=("[gMASK]", "<sop>|sop"),
    tiktoken=("tokenizer.model", WORDS),
    stops=lambda _: ("<|user|>", "<|observation|>"),
)
