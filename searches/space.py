"""What a search varies: key=interval(a,b), key=choice(x,y,z) and key=range(a,b,step), as they are typed."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, RangeSweep

from common.errors import UserError
from configuration.compose import parse_overrides
from configuration.values import Setting, kinds_in

MOST = 1000  # values of one choice
LOG_FROM = 10  # times the lower end, from which on an interval is searched on a log scale
TAGS = {"log": True, "linear": False}
OF_THE_SEARCH = (
    "run_name", "output_dir", "resume", "overwrite", "eval_checkpoint", "monitor", "monitor_mode", "backend", "device",
    "devices", "trust", "show", "log", "trackio", "tracker", "teacher",
)  # fmt: skip
Value = float | int | str


@dataclass(frozen=True)
class Varied:
    """A key with the values it may have. typed: as on the command line; texts: of a choice, else empty; whole: numbers are.

    Of an interval: low and high, on a log scale or not.
    """

    key: str
    typed: str
    texts: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    whole: bool = False

    def word(self, value: Value) -> str:
        """Return the override that gives the key a value; one that is added, as +optimizer.eps, has its plus."""
        text = value if isinstance(value, str) else str(int(value) if self.whole else float(value))
        return f"{'+' * (len(self.typed) - len(self.typed.lstrip('+')))}{self.key}={text}"

    @property
    def ends(self) -> list[Value]:
        """Return every value of a choice, the two ends of an interval."""
        return list(self.texts or (self.low, self.high))

    def at(self, place: float) -> Value:
        """Return the value at a place from 0 to 1 of an interval; of whole numbers each has an equal share."""
        low, high = (self.low, self.high + 1) if self.whole else (self.low, self.high)
        value = low * (high / low) ** place if self.log else low + (high - low) * place
        return min(int(value), int(self.high)) if self.whole else min(max(value, self.low), self.high)

    def words(self) -> str:
        """Return what is searched, in words."""
        if self.texts:
            return f"one of {', '.join(self.texts)}"
        return f"{'whole ' * self.whole}numbers from {self.low:g} to {self.high:g}" + ", log scale" * self.log

    @cached_property
    def distribution(self) -> Any:
        """Return it as Optuna's."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        if self.texts:
            return CategoricalDistribution(self.texts)
        if self.whole:
            return IntDistribution(int(self.low), int(self.high), log=self.log)
        return FloatDistribution(self.low, self.high, log=self.log)


def divided(words: list[str]) -> tuple[list[str], list[Override]]:
    """Return the words that are fixed, and the overrides that vary. UserError for a key that a search may not vary."""
    parsed = parse_overrides(words)
    varied = [override for override in parsed if override.is_sweep_override()]
    for override in varied:
        key = override.key_or_group
        if key.split(".")[0] in OF_THE_SEARCH:
            raise UserError(f"{key} is one for all trials of a search and cannot vary; give it one value")
    keys = [override.key_or_group for override in parsed]
    twice = next((o.key_or_group for o in varied if keys.count(o.key_or_group) > 1), None)
    if twice is not None:
        raise UserError(f"{twice} is given twice; give it once, as what varies or as one value")
    return [w for w, o in zip(words, parsed, strict=True) if not o.is_sweep_override()], varied


def varied_by(override: Override, setting: Setting | None) -> Varied:
    """Return what an override varies; setting: what its key may be, if declared. UserError for what is no search space."""
    value, key, typed = override.value(), override.key_or_group, str(override.input_line)
    if isinstance(value, IntervalSweep):
        return interval(key, typed, value, setting)
    if isinstance(value, RangeSweep):
        steps = (float(value.stop or 0) - float(value.start or 0)) / float(value.step or math.nan)
        if not 0 < steps <= MOST:
            raise UserError(f"{typed} lists no values, or more than {MOST}; write {key}=interval(LOW,HIGH)")
    elif not isinstance(value, ChoiceSweep):
        raise UserError(f"{typed} is no search space; write {key}=interval(LOW,HIGH) or {key}=choice(A,B,C)")
    texts = tuple(override.sweep_string_iterator())
    if len(set(texts)) < len(texts) or len(texts) > MOST:
        raise UserError(f"{typed} lists a value twice, or more than {MOST}; give each value once")
    return Varied(key, typed, texts)


def interval(key: str, typed: str, found: IntervalSweep, setting: Setting | None) -> Varied:
    """Return an interval. UserError for ends that are none, or a scale that they do not have."""
    low, high = float(found.start or 0), float(found.end or 0)
    kinds: set[Any] = kinds_in(setting.kind) if setting is not None else set()
    whole = isinstance(found.start, int) or (int in kinds and float not in kinds)
    if not (math.isfinite(low) and math.isfinite(high) and low < high and high - low < math.inf):
        raise UserError(f"{typed} needs two finite numbers, the first below the second, as in {key}=interval(1e-4,1e-2)")
    if whole and not (low.is_integer() and high.is_integer()):
        raise UserError(f"{typed} needs whole numbers, as {key} is one")
    unknown = sorted(set(found.tags) - TAGS.keys())
    if unknown or len(found.tags) > 1:
        raise UserError(f"{typed} names no scale; write tag(log,interval(A,B)) or tag(linear,interval(A,B))")
    log = TAGS[next(iter(found.tags))] if found.tags else low > 0 and high >= LOG_FROM * low
    if log and low <= 0:
        raise UserError(f"{typed} has no log scale: its lower end is not above 0")
    scale: Literal[True, False] = bool(log)
    return Varied(key, typed, (), low, high, scale, whole)
