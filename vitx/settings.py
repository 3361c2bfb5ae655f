"""Frozen configurations as values: checks of fields, `override`, `flat`, `delta`.

`override` derives one configuration from another, `delta` names how two differ, `flat` makes plain
values of one. A field's type says which values it takes: `depth: Whole`, `drop: Rate`, a `Literal`
of words, or `Annotated[float, within(0, 180)]`. `check_fields` checks all of them.
"""

import dataclasses
import math
from collections.abc import Mapping
from functools import cache
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    TypeVar,
    get_args,
    get_origin,
    get_type_hints,
)

from vitx.registry import UserError, choose, name_of, nearest

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
else:
    DataclassInstance = object

Config = TypeVar("Config", bound=DataclassInstance)
"""A frozen dataclass, whose fields may be such dataclasses."""


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, each one of them by `[` or `]`; `rule` is the message."""

    low: int | float
    high: int | float
    rule: str
    ends: str = "[]"

    def __contains__(self, value: int | float) -> bool:
        above = value >= self.low if self.ends[0] == "[" else value > self.low
        return above and (value <= self.high if self.ends[1] == "]" else value < self.high)


def within(low: int | float, high: int | float, *, ends: str = "[]", rule: str = "") -> Range:
    """The range of a number; `rule` is the message in place of the usual one."""
    return Range(low, high, rule or f"must lie in {ends[0]}{low:g}, {high:g}{ends[1]}", ends)


def at_least(low: int) -> Range:
    """The range of a whole number."""
    return within(low, math.inf, rule=f"must be a whole number, at least {low}")


MOST = within(-math.inf, 2**48, rule="must be at most 2**48")
Natural = Annotated[int, at_least(0), MOST]
Whole = Annotated[int, at_least(1), MOST]
Rate = Annotated[float, within(0, 1, ends="[)")]
Share = Annotated[float, within(0, 1)]
Positive = Annotated[float, within(0, math.inf, ends="()", rule="must be positive")]
NotNegative = Annotated[float, within(0, math.inf, rule="must be 0 or positive")]


def check_fields(config: DataclassInstance, prefix: str = "") -> None:
    """Check each field by its type and by the ranges beside it; `prefix` stands before its name.

    Raises ValueError naming the first field with another value, the value and the rule.
    """
    for name, hint in _hints(type(config)).items():
        check(prefix + name, getattr(config, name), hint)


def check(name: str, value: object, hint: Any) -> None:
    """Check a bool, int, float or Literal by its type and ranges; other types take any value."""
    kind, *ranges = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    if get_origin(kind) is Literal:
        choose(name, value, get_args(kind))
    if kind not in _RULES:
        return
    rule = ranges[0].rule if kind is int and ranges else _RULES[kind]
    if not _is_plain(value, kind):
        raise UserError(f"{name} = {value!r} {rule}")
    for numbers in ranges:
        if value not in numbers:
            raise UserError(f"{name} = {value!r} {numbers.rule}")


_RULES = {
    bool: "must be True or False",
    int: "must be a whole number",
    float: "must be a finite number",
}


def _is_plain(value: object, kind: type) -> bool:
    """Whether a value is of this kind; an int is a float too, and a bool is no number."""
    if kind is bool or isinstance(value, bool):
        return isinstance(value, kind) and kind is bool
    return isinstance(value, int) or (
        kind is float and isinstance(value, float) and math.isfinite(value)
    )


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def make(kind: type[Config], **fields: Any) -> Config:
    """`kind(**fields)`, with a ValueError that names the nearest field when one is unknown."""
    names = [entry.name for entry in dataclasses.fields(kind)]
    for key in fields:
        if key not in names:
            raise UserError(f"{kind.__name__} has no field {key!r}; {nearest(key, names)}")
    return kind(**fields)


def override(config: Config, **changes: Any) -> Config:
    """A copy with dotted fields changed: `override(config, **{"model.depth": 6, "steps": 100})`."""
    direct = {key: value for key, value in changes.items() if "." not in key}
    for part in {key.partition(".")[0] for key in changes if "." in key}:
        inner = getattr(config, part, None)
        if not dataclasses.is_dataclass(inner):
            names = [f.name for f in dataclasses.fields(config)]
            raise UserError(f"{type(config).__name__} has no part {part!r}; {nearest(part, names)}")
        nested = {k.partition(".")[2]: v for k, v in changes.items() if k.startswith(f"{part}.")}
        direct[part] = override(inner, **nested)  # type: ignore[type-var]
    kept = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    return make(type(config), **(kept | direct))


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted field names to plain values, for records and W&B.

    Raises ValueError for a callable that has no name to be recorded by.
    """
    values: dict[str, Any] = {}
    for entry in dataclasses.fields(config):
        value = getattr(config, entry.name)
        if dataclasses.is_dataclass(value):
            values |= flat(value, f"{prefix}{entry.name}.")
        else:
            values[prefix + entry.name] = _plain(value)
    return values


def from_flat(kind: type[Config], values: Mapping[str, Any], prefix: str = "") -> Config:
    """The inverse of `flat`; what was written before a field was there gets its default.

    Raises ValueError naming a field that is unknown.
    """
    hints, fields = get_type_hints(kind), {}
    nested = {entry.name: dataclasses.is_dataclass(hints[entry.name])
              for entry in dataclasses.fields(kind)}  # fmt: skip
    for name in values:
        head, dot, _ = name.removeprefix(prefix).partition(".")
        if name.startswith(prefix) and nested.get(head) is not bool(dot):
            raise UserError(f"the configuration has an unknown {name}")
    for entry in dataclasses.fields(kind):
        name, inner = prefix + entry.name, hints[entry.name]
        if dataclasses.is_dataclass(inner):
            fields[entry.name] = from_flat(inner, values, f"{name}.")  # type: ignore[type-var]
        elif name in values:
            value = values[name]
            fields[entry.name] = tuple(value) if isinstance(value, list) else value
    return kind(**fields)


def delta(config: DataclassInstance, base: DataclassInstance) -> dict[str, Any]:
    """The dotted fields in which `config` differs from `base`, with config's values."""
    before = flat(base)
    return {key: value for key, value in flat(config).items() if before[key] != value}


def _plain(value: object) -> object:
    if isinstance(value, tuple):
        return list(value)
    return name_of(value) if callable(value) else value


def pair(name: str, value: Any) -> tuple[int, int]:
    pair = value if isinstance(value, tuple | list) else (value, value)
    if len(pair) != 2:
        raise UserError(f"{name} = {value!r} must be one number or height and width")
    for number in pair:
        check(name, number, Whole)
    return pair[0], pair[1]


def nearest_divisors(number: int, near: int) -> str:
    """The largest divisor below `near` and the smallest above, as far as NEAR away, in words."""
    near = min(near, number + 1)
    below = range(near - 1, max(near - NEAR, 0), -1)
    above = range(near + 1, min(near + NEAR, number) + 1)
    found = [next((k for k in places if number % k == 0), 0) for places in (below, above)]
    return " or ".join(str(k) for k in found if k) or "1"


NEAR = 10_000
