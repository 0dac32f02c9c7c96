"""From a model folder to its Tokenizer: which file counts, which roles the strings play, where answers end.

tokenizer.json counts before tokenizer.model and tiktoken files, as in transformers: publishers keep the first up to
date. Yuan is the exception: its rules are defined over tokenizer.model, so that file counts where there is one.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tpcpu.errors import TextError
from tpcpu.text import baichuan, chatglm, qwen, yuan
from tpcpu.text.added_tokens import AddedToken, Declarations, read_declarations
from tpcpu.text.chat_template import ChatTemplate, choose_template
from tpcpu.text.library_vocabulary import LibraryVocabulary, read_tokenizer_json
from tpcpu.text.rules import Config, Rules
from tpcpu.text.sentencepiece_model import SentencePieceModel
from tpcpu.text.tiktoken_file import is_tiktoken, read_tiktoken
from tpcpu.text.tokenizer import Tokenizer
from tpcpu.text.vocabulary import Vocabulary

RULES = {"baichuan": baichuan.RULES, "chatglm": chatglm.RULES, "qwen": qwen.RULES, "yuan": yuan.RULES}

# what the Llama tokenizer class calls its roles where the folder is silent
_LLAMA_ROLES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def load_tokenizer(
    folder: str | Path, config: Mapping[str, Any], generation_config: Mapping[str, Any] | None = None
) -> Tokenizer:
    """The tokenizer of the model in `folder`, whose config.json and generation_config.json are given as dicts.

    `config` decides whose rules hold (`model_type`), how many rows the embedding has, and with the others
    where answers end. Raises TextError where files are missing, broken, or contradict each other.
    """
    folder, generation = Path(folder), generation_config or {}
    model_type = config.get("model_type")
    rules = RULES.get(model_type, Rules()) if isinstance(model_type, str) else Rules()
    tokenizer_config = _read_object(folder / "tokenizer_config.json")
    declared = read_declarations(
        tokenizer_config,
        _read_object(folder / "special_tokens_map.json"),
        _read_object(folder / "added_tokens.json"),
    )
    declared = rules.complete(declared, config, generation)
    vocabulary, declared = _read_vocabulary(folder, tokenizer_config, declared, rules)
    prefix = _prefix(vocabulary, tokenizer_config, declared, rules)
    rows = _rows(config)
    if rows is not None and max(prefix, default=0) >= rows:
        beyond = vocabulary.piece(max(prefix)).decode(errors="replace")
        raise TextError(
            f"{folder}: every text begins with {beyond!r}, token {max(prefix)}, but the model has {rows} rows only; "
            "take the tokenizer files that belong to the model"
        )
    stop_ids = _stop_ids(vocabulary, declared, config, generation)
    stops = (vocabulary.id_of(token) for token in rules.stops(generation))
    return Tokenizer(
        vocabulary,
        prefix=prefix,
        stop_ids={*stop_ids, *(number for number in stops if number is not None)},
        chat_template=_chat_template(folder, tokenizer_config, declared, rules.chat_template(generation)),
        rows=rows,
    )


def _read_vocabulary(
    folder: Path, tokenizer_config: Mapping[str, Any], declared: Declarations, rules: Rules
) -> tuple[Vocabulary, Declarations]:
    json_file, model_file = folder / "tokenizer.json", folder / "tokenizer.model"
    if json_file.is_file() and not (rules.prefers_model and model_file.is_file()):
        return LibraryVocabulary(read_tokenizer_json(json_file), json_file, declared.tokens), declared
    if rules.tiktoken is not None and is_tiktoken(file := folder / rules.tiktoken[0]):
        return LibraryVocabulary(read_tiktoken(file, rules.tiktoken[1]), file, declared.tokens), declared
    if not model_file.is_file():
        raise TextError(_no_vocabulary(folder, rules))
    if is_tiktoken(model_file):
        raise TextError(
            f"{model_file}: is a tiktoken file, which does not say how texts are cut into words; "
            "expected tokenizer.json beside it: copy it from the model as it is published for transformers"
        )
    declared = _with_llama_roles(declared)
    legacy = _flag(tokenizer_config, "legacy")
    add_prefix_space = _flag(tokenizer_config, "add_prefix_space")
    # transformers before 5, by which these files were made: silence means the old behaviour
    vocabulary = SentencePieceModel(model_file, declared.tokens, legacy is not False, add_prefix_space is not False)
    return vocabulary, declared


def _no_vocabulary(folder: Path, rules: Rules) -> str:
    """What is wrong with a folder in which no vocabulary is read."""
    parts = {"vocab.json", "merges.txt"}
    found = sorted(path.name for path in folder.glob("*") if "token" in path.name or "tekken" in path.name)
    found += sorted(path.name for path in folder.glob("*") if path.name in parts)
    wanted = ["tokenizer.json", "tokenizer.model"]
    wanted += [] if rules.tiktoken is None or rules.tiktoken[0] in wanted else [rules.tiktoken[0]]
    mend = "copy it from the published model"
    if parts <= set(found):
        mend += ", or let transformers make it: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
    return f"{folder}: found {found or 'nothing of that kind'}, expected {' or '.join(wanted)}: {mend}"


def _with_llama_roles(declared: Declarations) -> Declarations:
    missing = {role: content for role, content in _LLAMA_ROLES.items() if role not in declared.roles}
    new = [content for content in missing.values() if not declared.declares([content])]
    return Declarations((*declared.tokens, *map(AddedToken, new)), {**declared.roles, **missing})


def _prefix(
    vocabulary: Vocabulary, tokenizer_config: Mapping[str, Any], declared: Declarations, rules: Rules
) -> tuple[int, ...]:
    if rules.prefix is not None:
        return tuple(_first_of(names.split("|"), vocabulary) for names in rules.prefix)
    wanted = _flag(tokenizer_config, "add_bos_token")
    if wanted is None:
        wanted = bool(vocabulary.default_prefix) or isinstance(vocabulary, SentencePieceModel)
    if not wanted:
        return ()
    if vocabulary.default_prefix:
        return vocabulary.default_prefix
    bos = declared.roles.get("bos_token")
    bos_id = None if bos is None else vocabulary.id_of(bos)
    if bos_id is None:
        raise TextError(
            f"tokenizer_config.json: add_bos_token is true, but bos_token {bos!r} is no token of the vocabulary"
        )
    return (bos_id,)


def _first_of(names: list[str], vocabulary: Vocabulary) -> int:
    """The id of the first of these tokens that there is."""
    for name in names:
        if (found := vocabulary.id_of(name)) is not None:
            return found
    raise TextError(
        f"tokenizer_config.json: every text of this model begins with {' or '.join(map(repr, names))}, which is no "
        "token of the vocabulary; expected it among the added tokens"
    )


def _stop_ids(
    vocabulary: Vocabulary, declared: Declarations, config: Config, generation_config: Config
) -> Iterable[int]:
    """Every end of sequence that any file names: a chat model often ends turns with another token than documents."""
    stop_ids: set[int] = set()
    sources = (("generation_config.json", generation_config), ("config.json", config))
    for where, source in sources:
        for key in ("eos_token_id", "eod_token_id", "eod_token"):
            value = source.get(key)
            for number in value if isinstance(value, list) else [value]:
                if isinstance(number, bool) or not isinstance(number, (int, type(None))):
                    raise TextError(f"{where}: {key} is {value!r}, expected a token id or a list of token ids")
                if number is not None:
                    stop_ids.add(number)
    eos = declared.roles.get("eos_token")
    eos_id = None if eos is None else vocabulary.id_of(eos)
    return stop_ids if eos_id is None else stop_ids | {eos_id}


def _chat_template(
    folder: Path, tokenizer_config: Mapping[str, Any], declared: Declarations, own: str | None
) -> ChatTemplate | None:
    """`own`: what the publisher's code does, where the folder has no template."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return ChatTemplate(_read_text(file), str(file), declared.roles)
    where = f"{folder / 'tokenizer_config.json'}"
    source = choose_template(tokenizer_config.get("chat_template"), where)
    if source is not None:
        return ChatTemplate(source, f"{where}, chat_template", declared.roles)
    return None if own is None else ChatTemplate(own, "the publisher's own chat template", declared.roles)


def _rows(config: Mapping[str, Any]) -> int | None:
    rows = config.get("vocab_size")
    return rows if isinstance(rows, int) and not isinstance(rows, bool) and rows > 0 else None


def _flag(tokenizer_config: Mapping[str, Any], name: str) -> bool | None:
    value = tokenizer_config.get(name)
    if value is not None and not isinstance(value, bool):
        raise TextError(f"tokenizer_config.json: {name} is {value!r}, expected true or false")
    return value


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TextError(f"{path}: cannot be read as UTF-8 text: {error}") from None


def _read_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`, {} where there is no such file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise TextError(f"{path}: is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise TextError(f"{path}: found {type(content).__name__}, expected a JSON object")
    return content
