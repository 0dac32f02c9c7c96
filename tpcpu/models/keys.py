"""Reading a published `config.json` strictly: every key is read, ignored by name, or refused.

Knows the keys that transformers writes for any model and that never change the mathematics. A key that nobody named
is refused unless it is switched off: a silently dropped setting would be a wrong answer in silence.
"""

import reprlib
from collections.abc import Callable, Iterable
from typing import Any

from tpcpu.errors import ConfigError

# Bookkeeping, training, and generation defaults.
IGNORED = frozenset(
    """_attn_implementation _attn_implementation_autoset _commit_hash _name_or_path architectures
    attention_dropout attn_pdrop auto_map bad_words_ids begin_suppress_tokens bos_token_id
    chunk_size_feed_forward classifier_dropout decoder_start_token_id diversity_penalty do_sample dropout dtype
    early_stopping embd_pdrop encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty
    finetuning_task forced_bos_token_id forced_eos_token_id hidden_dropout id2label initializer_range is_decoder
    label2id length_penalty max_length max_new_tokens min_length model_type no_repeat_ngram_size num_beam_groups
    num_beams num_return_sequences output_attentions output_hidden_states output_scores pad_token_id prefix
    problem_type quantization_config remove_invalid_values repetition_penalty resid_pdrop return_dict
    return_dict_in_generate sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss
    tokenizer_class top_k top_p torch_dtype torchscript transformers_version typical_p use_bfloat16 use_cache""".split()
)

FACTORS = frozenset(
    "embedding_multiplier logit_scale logits_scaling partial_rotary_factor residual_multiplier rotary_pct".split()
)
"""What other architectures multiply by: off at 1, where every other key is off at false, 0 or nothing."""

MAX_LAYERS, MAX_HEADS, MAX_WIDTH = 2**12, 2**16, 2**24
"""Far beyond any model; a config past them is a mistake, met before it takes memory and time."""

MAX_INTEGER, MAX_NUMBER = 2**31 - 1, 3e38
"""What an int32 and a float32 hold."""


class Keys:
    """The keys of one config; each getter marks its key as read, `finish` refuses the ones left over."""

    def __init__(self, config: dict[str, Any], ignored: Iterable[str] = (), *, inside: str = "") -> None:
        """`inside`: what stands before the names of keys of an object in the config, such as `rope_scaling.`"""
        self._config, self.inside = config, inside
        self._left = set(config) - IGNORED - set(ignored)

    def get(self, key: str, default: Any = None) -> Any:
        self._left.discard(key)
        value = self._config.get(key)
        return default if value is None else value

    def integer(self, key: str, default: int | None = None, minimum: int = 1, maximum: int = MAX_INTEGER) -> int:
        value = self.get(key, default)
        if value is None:
            raise ConfigError(f"config.json: {self.inside}{key} is missing; expected an integer of at least {minimum}")
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
            raise ConfigError(
                f"config.json: {self.inside}{key} is {shown(value)}; "
                f"expected an integer of at least {minimum} and at most {maximum}"
            )
        return value

    def number(self, key: str, default: float | None = None, *, zero: bool = False) -> float:
        """A positive number, or 0 where that is allowed."""
        value = self.get(key, default)
        if zero and value == 0 and not isinstance(value, bool):
            return 0.0
        if isinstance(value, bool) or not isinstance(value, int | float) or not 1 / MAX_NUMBER < value < MAX_NUMBER:
            raise ConfigError(
                f"config.json: {self.inside}{key} is {shown(value)}; expected a positive number that a float32 holds"
            )
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise ConfigError(f"config.json: {self.inside}{key} is {shown(value)}; expected true or false")
        return value

    def nothing(self, key: str) -> bool:
        """Whether a key is there and null, where that does not mean the same as leaving it out."""
        return key in self._config and self.get(key) is None

    def sliding(self, layers: int, default: Callable[[int], bool]) -> list[bool]:
        """Which layers have a sliding window: those of that type in `layer_types`, or what `default` says of each."""
        kinds = self.get("layer_types")
        if kinds is None:
            return [default(layer) for layer in range(layers)]
        known = ("full_attention", "sliding_attention")
        if not isinstance(kinds, list) or len(kinds) != layers or any(kind not in known for kind in kinds):
            raise ConfigError(
                f"config.json: layer_types is {shown(kinds)}; expected one of {', '.join(known)} for each of the "
                f"{layers} layers"
            )
        return [kind == known[1] for kind in kinds]

    def require(self, key: str, supported: Any, default: Any = None) -> None:
        """Refuses any value of `key` but the one supported; a missing key means `default`, or else `supported`."""
        value = self.get(key, supported if default is None else default)
        if value != supported:
            raise ConfigError(f"config.json: {key} = {shown(value)} is not supported; only {supported!r} is")

    def divisible(self, key: str, value: int, by_key: str, by: int) -> int:
        if value % by:
            raise ConfigError(f"config.json: {key} = {value} is not a multiple of {by_key} = {by}")
        return value // by

    def rope_theta(self, default: float) -> float:
        """The base of plain rotary embedding, wherever a writer puts it; scaled kinds are refused."""
        theta = self.number("rope_theta", default)
        for key in ("rope_scaling", "rope_parameters"):
            values = self.get(key, {})
            if not isinstance(values, dict):
                raise ConfigError(f"config.json: {key} is {shown(values)}; expected an object or null")
            kind = values.get("rope_type", values.get("type", "default"))
            extra = sorted(set(values) - {"rope_type", "type", "rope_theta"})
            if kind != "default" or extra:
                settings = f" with {_listed([_name(name) for name in extra])}" if extra else ""
                raise ConfigError(
                    f"config.json: {key} of type {shown(kind)}{settings} "
                    f"is not supported; only plain rotary embedding is"
                )
            theta = Keys(values).number("rope_theta", theta)
        return theta

    def finish(self) -> None:
        """Refuses keys that nobody asked for, unless their value switches them off."""
        unknown = sorted(key for key in self._left if not _is_off(key, self._config[key]))
        if unknown:
            named = _listed([f"{self.inside}{_name(key)} = {shown(self._config[key])}" for key in unknown])
            raise ConfigError(
                f"config.json: unknown to tpcpu, and may change the results: {named}; remove what does not change them"
            )


def shown(value: Any) -> str:
    """A value from a config in one short line, whatever it is."""
    return _SHORT.repr(value)


def _name(key: str) -> str:
    return shown(key)[1:-1]


def _is_off(key: str, value: Any) -> bool:
    """Whether a key that nobody asked for changes nothing. True is not 1: a switch is on."""
    if key in FACTORS:
        return value is None or (value == 1 and not isinstance(value, bool))
    return value is None or value == 0 or value in ("", [], {})


def _listed(items: list[str]) -> str:
    return ", ".join(items[:4]) + (f" and {len(items) - 4} more" if len(items) > 4 else "")


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60
