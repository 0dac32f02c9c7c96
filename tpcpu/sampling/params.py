"""SamplingParams: what a request asks of sampling, checked when it is made."""

import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tpcpu.errors import SamplingError


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens of one answer are chosen and where it ends. Raises SamplingError for values that cannot be meant.

    The default is greedy: the likeliest token, always, the lowest id where two are level. A temperature above 0
    samples. The values in a folder's generation_config.json are not applied: the same call would then answer
    differently for two copies of one model that differ in a file nobody looks at, and greedy figures would not
    compare. Its stop ids do count, they belong to the model (`tpcpu.text`).
    """

    max_tokens: int = 256
    """Tokens of the answer at most, at least 1."""
    temperature: float = 0.0
    """Divides the logits. 0 is greedy, the limit in which the filters below change nothing (none removes the best
    token)."""
    top_k: int = 0
    """Only the k likeliest tokens; of level ones the lowest ids. 0: all."""
    top_p: float = 1.0
    """Only the likeliest tokens until their probability reaches p, the one that reaches it included. 1: all."""
    min_p: float = 0.0
    """Only tokens at least this many times as likely as the likeliest. 0: all."""
    repetition_penalty: float = 1.0
    """Of each token in prompt or answer a positive logit is divided by it, a negative one multiplied.
    1: none."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of each token that stands in the answer. 0: none."""
    frequency_penalty: float = 0.0
    """Subtracted from the logit of each token as often as it stands in the answer. 0: none."""
    seed: int | None = None
    """The draw of a step depends on this and the step's number only. None: a random one, which `Sampler.seed` tells."""
    stop: tuple[str, ...] = ()
    """The answer ends before the first of these strings. A single string or a list is taken too."""
    ignore_eos: bool = False
    """Goes on after the model's own end of sequence, up to `max_tokens`."""
    logprobs: int | None = None
    """With each token its natural log probability in the model's own distribution, before penalties and filters, and
    those of this many likeliest tokens. None: nothing."""
    top_logits: int | None = None
    """With each token this many largest logits as the model gave them. None: nothing."""

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stop, (list, tuple)) or not all(isinstance(string, str) and string for string in stop):
            raise SamplingError(f"stop: found {self.stop!r}, expected strings of at least one character")
        for string in stop:
            try:
                string.encode()
            except UnicodeEncodeError as error:
                raise SamplingError(
                    f"stop: {string!r} is not UTF-8 at character {error.start}, expected text"
                ) from None
        object.__setattr__(self, "stop", tuple(stop))
        if not isinstance(self.ignore_eos, bool):
            raise SamplingError(f"ignore_eos: found {self.ignore_eos!r}, expected True or False")
        for name, (kind, accepts, expected) in _RANGES.items():
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            number = _number(value, kind)
            if number is None or not accepts(number):
                raise SamplingError(f"{name}: found {value!r}, expected {expected}")
            object.__setattr__(self, name, number)

    @property
    def greedy(self) -> bool:
        """Whether the best token after penalties is taken, without a draw."""
        return self.temperature == 0 or self.top_k == 1

    @property
    def penalises(self) -> bool:
        """Whether logits depend on the tokens that came before."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


def _number(value: object, kind: type) -> Any:
    """`value` as a finite int or float, None where it is neither. True is no number here, though Python counts it as
    1."""
    if isinstance(value, bool):
        return None
    if kind is int:
        return int(value) if isinstance(value, numbers.Integral) else None
    if not isinstance(value, numbers.Real):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


_Range = tuple[type, Callable[[Any], bool], str]
_RANGES: dict[str, _Range] = {
    "max_tokens": (int, lambda n: n >= 1, "a whole number from 1 upwards"),
    "temperature": (float, lambda t: t >= 0, "a number from 0 (greedy) upwards"),
    "top_k": (int, lambda k: k >= 0, "a whole number from 0 (all tokens) upwards"),
    "top_p": (float, lambda p: 0 < p <= 1, "a number above 0 and up to 1 (all tokens)"),
    "min_p": (float, lambda p: 0 <= p <= 1, "a number from 0 (all tokens) to 1"),
    "repetition_penalty": (float, lambda r: 0.01 <= r <= 100, "a number from 0.01 to 100; 1 is no penalty"),
    "presence_penalty": (float, lambda a: -2 <= a <= 2, "a number from -2 to 2; 0 is no penalty"),
    "frequency_penalty": (float, lambda a: -2 <= a <= 2, "a number from -2 to 2; 0 is no penalty"),
    "seed": (int, lambda s: 0 <= s < 2**64, "a whole number from 0 to 2**64 - 1, or none"),
    "logprobs": (int, lambda n: n >= 0, "a whole number from 0 upwards, or none"),
    "top_logits": (int, lambda n: n >= 1, "a whole number from 1 upwards, or none"),
}
_OPTIONAL = ("seed", "logprobs", "top_logits")
