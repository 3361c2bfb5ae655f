"""Parameters of a sweep file: the values that each may take, read and checked by declared keys."""

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeVar, get_type_hints

from experiments.study.kinds import Scalar
from vitx.registry import UserError, choose, nearest
from vitx.settings import check

RANGES = ("uniform", "q_uniform", "log_uniform_values", "int_uniform")
Part = TypeVar("Part")


@dataclass(frozen=True)
class Choice:
    """A parameter that takes one of several values."""

    values: tuple[Scalar, ...]

    @property
    def ends(self) -> tuple[Scalar, ...]:
        """The values that are tried before anything is run."""
        return self.values


@dataclass(frozen=True)
class Range:
    """A parameter between two numbers; whole ones if both are."""

    low: float
    high: float
    log: bool = False
    step: float | None = None

    @property
    def ends(self) -> tuple[float, float]:
        return self.low, self.high

    @property
    def whole(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)


Parameters = Mapping[str, Choice | Range]


def part(kind: type[Part], keys: object, within: str = "") -> Part:
    """A part of a file, its keys checked by their types. Raises ValueError naming the key."""
    if not isinstance(keys, dict):
        raise UserError(f"{within.rstrip('.') or 'the file'} must hold keys")
    hints = get_type_hints(kind, include_extras=True)
    for key, value in keys.items():
        if key not in hints:
            raise UserError(f"{within}{key} is not known; {nearest(key, hints)}")
        check(within + key, value, hints[key])
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        if field.default is dataclasses.MISSING and field.name not in keys:
            raise UserError(f"{within}{field.name} is missing")
    return kind(**keys)


@dataclass(frozen=True, kw_only=True)
class _Parameter:
    value: Scalar = None
    values: list[Scalar] | None = None
    distribution: str = ""
    min: Scalar = None
    max: Scalar = None
    q: Scalar = None


def read_parameter(key: str, keys: object) -> Choice | Range:
    """What the keys of one parameter say. Raises ValueError naming `key` and the key in it."""
    if isinstance(keys, dict) and "parameters" in keys:
        raise UserError(f"{key}: write nested parameters with dots, such as model.depth")
    if not isinstance(keys, dict):
        raise UserError(f"{key} must have a value, values, or min and max")
    given = part(_Parameter, keys, f"{key}.")
    if given.value is None and given.values is None:
        return _range(key, given)
    for word in ("min", "max", "q"):
        if getattr(given, word) is not None:
            raise UserError(f"{key}.{word} does not go with values")
    if given.value is not None and given.values is not None:
        raise UserError(f"{key} has both a value and values")
    if given.distribution not in ("", "categorical", "constant"):
        raise UserError(f"{key}.distribution = {given.distribution!r} does not go with values")
    values = [given.value] if given.values is None else given.values
    if not isinstance(values, list) or not values:
        raise UserError(f"{key}.values = {values!r} must be a list")
    for value in values:
        _no_number_in_words(key, value)
        if not isinstance(value, str | int | float | bool):
            raise UserError(f"{key}: {value!r} must be a plain value")
    if len(set(map(repr, values))) < len(values):
        raise UserError(f"{key}.values = {values!r} names a value twice")
    return Choice(tuple(values))


def _range(key: str, given: _Parameter) -> Range:
    if given.min is None or given.max is None:
        raise UserError(f"{key} must have a value, values, or min and max")
    low, high = _number(f"{key}.min", given.min), _number(f"{key}.max", given.max)
    whole = isinstance(low, int)
    if whole != isinstance(high, int):
        raise UserError(f"{key}: min = {low} and max = {high} must be both whole or neither")
    if not low < high:
        raise UserError(f"{key}: min = {low} must be below max = {high}")
    kind = given.distribution or ("int_uniform" if whole else "uniform")
    choose(f"{key}.distribution", kind, RANGES)
    if given.q is not None and kind != "q_uniform":
        raise UserError(f"{key}.q goes with q_uniform, not with {kind}")
    step = None
    if kind == "q_uniform":
        step = 1 if given.q is None else _number(f"{key}.q", given.q)
    if step is not None and step <= 0:
        raise UserError(f"{key}.q = {step} must be positive")
    if kind == "log_uniform_values" and low <= 0:
        raise UserError(f"{key}.min = {low} must be positive for {kind}")
    if kind == "int_uniform" and not whole:
        raise UserError(f"{key}.min = {low} must be whole for {kind}")
    if step is not None:
        low, high = _multiples(low, high, step)
    if kind in ("uniform", "log_uniform_values") or isinstance(step, float):
        low, high = float(low), float(high)
    return Range(low, high, kind == "log_uniform_values", step)


def _multiples(low: float, high: float, step: float) -> tuple[float, float]:
    """The least and the largest that W&B draws: round(u / step)·step of u between low and high."""
    by, *ends = (Fraction(str(value)) for value in (step, low, high))
    half = Fraction(1, 2)
    first, last = math.floor(ends[0] / by + half), math.ceil(ends[1] / by - half)
    return type(step)(first * by), type(step)(last * by)


def _number(key: str, value: Scalar) -> int | float:
    _no_number_in_words(key, value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{key} = {value!r} must be a number")
    return value


def _no_number_in_words(key: str, value: object) -> None:
    """ValueError for a string that is a number, with the number as YAML reads it."""
    try:
        number = float(value) if isinstance(value, str) else None
    except ValueError:
        return
    if number is not None:
        text = str(value) if re.fullmatch(r"-?\d+", str(value)) else repr(number)
        plain = text if "." in text else text.replace("e", ".0e")  # an exponent needs a point
        raise UserError(f"{key} = {value!r} is a string to YAML; write {plain}")
