"""From a model folder to its Tokenizer: which file counts, which roles the strings play, where answers end.

tokenizer.json counts before tokenizer.model, as in transformers: publishers keep the first up to date. Yuan is the
exception: its rules are defined over tokenizer.model, so that file counts where there is one.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tpcpu.errors import TextError
from tpcpu.text import yuan
from tpcpu.text.added_tokens import AddedToken, Declarations, read_declarations
from tpcpu.text.chat_template import ChatTemplate, choose_template
from tpcpu.text.sentencepiece_model import SentencePieceModel
from tpcpu.text.tokenizer import Tokenizer
from tpcpu.text.tokenizer_json import TokenizerJson
from tpcpu.text.vocabulary import Vocabulary

# what the Llama tokenizer class calls its roles where the folder is silent
_LLAMA_ROLES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def load_tokenizer(
    folder: str | Path, config: Mapping[str, Any], generation_config: Mapping[str, Any] | None = None
) -> Tokenizer:
    """The tokenizer of the model in `folder`, whose config.json and generation_config.json are given as dicts.

    `config` decides whether Yuan's rules hold (`model_type`), how many rows the embedding has, and with the others
    where answers end. Raises TextError where files are missing, broken, or contradict each other.
    """
    folder = Path(folder)
    tokenizer_config = _read_object(folder / "tokenizer_config.json")
    declared = read_declarations(
        tokenizer_config,
        _read_object(folder / "special_tokens_map.json"),
        _read_object(folder / "added_tokens.json"),
    )
    is_yuan = config.get("model_type") == "yuan"
    if is_yuan:
        declared = yuan.complete(declared)
    vocabulary, declared = _read_vocabulary(folder, tokenizer_config, declared, prefer_model=is_yuan)
    prefix = () if is_yuan else _prefix(vocabulary, tokenizer_config, declared)
    rows = _rows(config)
    if rows is not None and max(prefix, default=0) >= rows:
        beyond = vocabulary.piece(max(prefix)).decode(errors="replace")
        raise TextError(
            f"{folder}: every text begins with {beyond!r}, token {max(prefix)}, but the model has {rows} rows only; "
            "take the tokenizer files that belong to the model"
        )
    stop_ids = _stop_ids(vocabulary, declared, config, generation_config or {})
    return Tokenizer(
        vocabulary,
        prefix=prefix,
        stop_ids=stop_ids,
        chat_template=_chat_template(folder, tokenizer_config, declared, is_yuan),
        rows=rows,
    )


def _read_vocabulary(
    folder: Path, tokenizer_config: Mapping[str, Any], declared: Declarations, prefer_model: bool
) -> tuple[Vocabulary, Declarations]:
    json_file, model_file = folder / "tokenizer.json", folder / "tokenizer.model"
    if json_file.is_file() and not (prefer_model and model_file.is_file()):
        return TokenizerJson(json_file, declared.tokens), declared
    if not model_file.is_file():
        found = sorted(path.name for path in folder.glob("*token*")) or "nothing of that kind"
        raise TextError(
            f"{folder}: found {found}, expected tokenizer.json or tokenizer.model: copy it from the published model"
        )
    declared = _with_llama_roles(declared)
    legacy = _flag(tokenizer_config, "legacy")
    add_prefix_space = _flag(tokenizer_config, "add_prefix_space")
    # transformers before 5, by which these files were made: silence means the old behaviour
    vocabulary = SentencePieceModel(model_file, declared.tokens, legacy is not False, add_prefix_space is not False)
    return vocabulary, declared


def _with_llama_roles(declared: Declarations) -> Declarations:
    missing = {role: content for role, content in _LLAMA_ROLES.items() if role not in declared.roles}
    new = [content for content in missing.values() if not declared.declares([content])]
    return Declarations((*declared.tokens, *map(AddedToken, new)), {**declared.roles, **missing})


def _prefix(vocabulary: Vocabulary, tokenizer_config: Mapping[str, Any], declared: Declarations) -> tuple[int, ...]:
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


def _stop_ids(
    vocabulary: Vocabulary, declared: Declarations, config: Mapping[str, Any], generation_config: Mapping[str, Any]
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
    folder: Path, tokenizer_config: Mapping[str, Any], declared: Declarations, is_yuan: bool
) -> ChatTemplate | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return ChatTemplate(_read_text(file), str(file), declared.roles)
    where = f"{folder / 'tokenizer_config.json'}"
    source = choose_template(tokenizer_config.get("chat_template"), where)
    if source is not None:
        return ChatTemplate(source, f"{where}, chat_template", declared.roles)
    return ChatTemplate(yuan.CHAT_TEMPLATE, "Yuan 2.0's own chat template", declared.roles) if is_yuan else None


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
