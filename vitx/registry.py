"""Registries of variants, each named after its function, and the call-strings that select them."""

import ast
import difflib
import inspect
from collections.abc import Callable, Iterable
from functools import partial
from typing import Annotated, Any, ClassVar, get_args, get_origin

Slot = str | Callable[..., Any]
"""A variant's name, its call-string such as "layernorm(eps=1e-5)", or a callable in Python."""


class UserError(ValueError):
    """A value, flag or file that a user gave; its text is one sentence, made to be shown to them.

    Programs print it without a traceback.
    """


def _name(entry: Callable[..., Any]) -> str:
    """A function's name; of a module's class the name in lower case."""
    return entry.__name__.lower() if isinstance(entry, type) else entry.__name__


class Registry(dict[str, Callable[..., Any]]):
    """Variants of one slot by name: functions, and classes of modules where one has parameters.

    `given` are the keywords that the model passes itself. Every registry is kept in `ALL`.
    """

    ALL: ClassVar[list["Registry"]] = []

    def __init__(self, slot: str, *entries: Callable[..., Any], given: tuple[str, ...] = ()):
        super().__init__({_name(entry): entry for entry in entries})
        self.slot = slot
        self.given = given
        self.ALL.append(self)


def nearest(word: object, choices: Iterable[object]) -> str:
    """A short hint: the closest of the choices, and the first dozen of them."""
    names = [str(choice) for choice in choices]
    close = difflib.get_close_matches(str(word), names, n=1, cutoff=0.5)
    listed = ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
    return f"did you mean {close[0]!r}? Choices: {listed}" if close else f"choices: {listed}"


def choose(name: str, value: object, choices: Iterable[str]) -> str:
    """The value, if it is one of the choices. Raises ValueError with the nearest if it is not."""
    known = list(choices)
    if value not in known:
        raise UserError(f"{name} = {value!r} is not known; {nearest(value, known)}")
    return str(value)


def resolve(call: str | Callable[..., Any], entries: Registry) -> Callable[..., Any]:
    """`resolve("window(size=7)", WINDOWS)` is `partial(window, size=7)`; a callable stays as it is.

    Raises ValueError naming the slot, the value, the rule and the nearest choice.
    """
    if not isinstance(call, str):
        if callable(call):
            return call
        raise UserError(f"{entries.slot} = {call!r} is neither a name nor a callable")
    name, knobs = _parse(call, entries.slot)
    if name not in entries:
        raise UserError(f"{entries.slot} = {name!r} is not known; {nearest(name, entries)}")
    entry = entries[name]
    allowed = {
        key: parameter
        for key, parameter in inspect.signature(entry).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and key not in entries.given
    }
    for key, value in knobs.items():
        if key not in allowed:
            hint = nearest(key, allowed) if allowed else "it has none"
            raise UserError(f"{entries.slot} = {call!r}: {name} has no knob {key!r}; {hint}")
        _check_type(entries.slot, call, key, value, allowed[key].annotation)
    return partial(entry, **knobs) if knobs else entry


def _check_type(slot: str, call: str, key: str, value: object, annotation: object) -> None:
    """By its type, and by the ranges that `Annotated` names beside it."""
    annotation, *ranges = (
        get_args(annotation) if get_origin(annotation) is Annotated else (annotation,)
    )
    types = (int, float) if annotation is float else annotation
    if annotation is inspect.Parameter.empty or not isinstance(types, type | tuple):
        return
    if not isinstance(value, types) or (isinstance(value, bool) and annotation is not bool):
        kind = annotation.__name__ if isinstance(annotation, type) else annotation
        raise UserError(f"{slot} = {call!r}: {key} must be {kind}, not {value!r}")
    for numbers in ranges:
        if value not in numbers:
            raise UserError(f"{slot} = {call!r}: {key} {numbers.rule}")


def _parse(call: str, slot: str) -> tuple[str, dict[str, Any]]:
    rule = "write a name or a call with keywords, such as name or name(knob=1)"
    try:
        node = ast.parse(call.strip(), mode="eval").body
    except SyntaxError:
        raise UserError(f"{slot} = {call!r} can't be read; {rule}") from None
    if isinstance(node, ast.Name):
        return node.id, {}
    if isinstance(node, ast.Constant) and node.value is None:
        return "None", {}
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)) or node.args:
        raise UserError(f"{slot} = {call!r} can't be read; {rule}")
    knobs: dict[str, Any] = {}
    for keyword in node.keywords:
        try:
            knobs[keyword.arg or "**"] = ast.literal_eval(keyword.value)
        except (ValueError, TypeError):
            raise UserError(f"{slot} = {call!r}: a knob must be a plain value; {rule}") from None
    return node.func.id, knobs


def name_of(slot: Callable[..., Any]) -> str:
    """A slot's callable for records: its name in a registry, else with its module.

    Raises ValueError for one without a name of its own, of which a record would say nothing.
    """
    for entries in Registry.ALL:
        for name, entry in entries.items():
            if slot is entry:
                return name
    name = getattr(slot, "__qualname__", "<lambda>")
    if "<" in name:  # <lambda>, or <locals> of a function, which may make others of that name
        raise UserError(
            f"{slot!r} has no name of its own to be recorded by; write it as a def of a module"
        )
    return f"{slot.__module__}.{name}"
