"""Frozen configurations as values: checks of fields, `override`, `flat`, `delta`.

`override` derives one configuration from another, `delta` names how two differ, `flat` makes plain
values of one. Checks raise a ValueError that names field, value and rule.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints

from vitx.registry import name_of, nearest

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
else:
    DataclassInstance = object

Config = TypeVar("Config", bound=DataclassInstance)
"""A frozen dataclass, whose fields may be such dataclasses."""


def make(kind: type[Config], **fields: Any) -> Config:
    """`kind(**fields)`, with a ValueError that names the nearest field when one is unknown."""
    names = [entry.name for entry in dataclasses.fields(kind)]
    for key in fields:
        if key not in names:
            raise ValueError(f"{kind.__name__} has no field {key!r}; {nearest(key, names)}")
    return kind(**fields)


def override(config: Config, **changes: Any) -> Config:
    """A copy with dotted fields changed: `override(config, **{"model.depth": 6, "steps": 100})`."""
    direct = {key: value for key, value in changes.items() if "." not in key}
    for part in {key.partition(".")[0] for key in changes if "." in key}:
        inner = getattr(config, part, None)
        if not dataclasses.is_dataclass(inner):
            names = [f.name for f in dataclasses.fields(config)]
            raise ValueError(
                f"{type(config).__name__} has no part {part!r}; {nearest(part, names)}"
            )
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
            raise ValueError(f"the configuration has an unknown {name}")
    for entry in dataclasses.fields(kind):
        name, inner = prefix + entry.name, hints[entry.name]
        if dataclasses.is_dataclass(inner):
            fields[entry.name] = from_flat(inner, values, f"{name}.")  # type: ignore[type-var]
        elif name in values:
            value = values[name]
            fields[entry.name] = tuple(value) if isinstance(value, list) else value
    return kind(**fields)


def delta(config: Any, base: Any) -> dict[str, Any]:
    """The dotted fields in which `config` differs from `base`, with config's values."""
    before = flat(base)
    return {key: value for key, value in flat(config).items() if before[key] != value}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return name_of(value) if callable(value) else value


def pair(name: str, value: Any) -> tuple[int, int]:
    pair = value if isinstance(value, tuple | list) else (value, value)
    if len(pair) != 2:
        raise ValueError(f"{name} = {value!r} must be one number or height and width")
    for number in pair:
        check_int(name, number, 1)
    return pair[0], pair[1]


def check_int(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} = {value!r} must be a whole number, at least {least}")


def check_rate(name: str, value: float) -> None:
    check_number(name, value)
    if not 0 <= value < 1:
        raise ValueError(f"{name} = {value!r} must lie in [0, 1)")


def check_share(name: str, value: float) -> None:
    check_number(name, value)
    if not 0 <= value <= 1:
        raise ValueError(f"{name} = {value!r} must lie in [0, 1]")


def check_positive(name: str, value: float, *, zero: bool = False) -> None:
    check_number(name, value)
    if value < 0 or (value == 0 and not zero):
        raise ValueError(f"{name} = {value!r} must be {'0 or ' if zero else ''}positive")


def check_number(name: str, value: object) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"{name} = {value!r} must be a finite number")


def nearest_divisors(number: int, near: int) -> str:
    divisors = sorted(k for k in range(1, number + 1) if number % k == 0)
    below = [k for k in divisors if k < near][-1:]
    above = [k for k in divisors if k > near][:1]
    return " or ".join(str(k) for k in below + above)
