"""The command line that the programs share: settings as flags, mistakes as one plain sentence."""

import importlib
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, TypeVar

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from vitx.registry import Slot

Settings = TypeVar("Settings")

REGISTRY = ConstructorRegistry()
SIZE = re.compile(r"(\w+:)?[A-Za-z]+/\d{1,2}")
"""A named size, such as S/16 or vitx:S/16."""


@REGISTRY.primitive_rule
def _slot(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """A slot is written as a call-string; in Python it may be a callable too."""
    if info.type != Slot:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="NAME",
        instance_from_str=lambda words: words[0],
        is_instance=lambda value: isinstance(value, str) or callable(value),
        str_from_instance=lambda value: [str(value)],
    )


def module(name: str, file: str) -> ModuleType:
    """Import a module that a person wrote. Raises ValueError naming its file for what is wrong."""
    try:
        return importlib.import_module(name)
    except (SyntaxError, ImportError, NameError, AttributeError, TypeError, ValueError, LookupError,
            ArithmeticError, AssertionError, RuntimeError, OSError) as error:  # fmt: skip
        raise ValueError(f"{file} can't be read: {type(error).__name__}: {error}") from error
    except SystemExit as error:
        raise ValueError(f"{file} ends the program when it is imported") from error


def parse(kind: type[Settings], args: Sequence[str], *, prog: str) -> Settings:
    """Settings from flags; --help prints and exits 0, a mistake prints one message and exits 2."""
    return tyro.cli(
        kind, prog=prog, args=list(args), registry=REGISTRY, config=(tyro.conf.FlagCreatePairsOff,)
    )


def said(values: Mapping[str, Any], *, most: int = 1000) -> str:
    """Settings in a line of at most so many characters, with the seed, if there is one, last."""

    def word(value: object) -> str:
        if isinstance(value, list | tuple):
            return "x".join(map(word, value))
        plain = f"{value:.6g}" if isinstance(value, float) else str(value)
        # Of a path only the last part: a name is no place.
        return plain if SIZE.fullmatch(plain) else plain.rpartition("/")[2]

    words = {name: f"{name}={word(value)}" for name, value in values.items()}
    seed = words.pop("seed", "")
    line = ",".join(words.values())[: most - len(seed) - 1]
    return ",".join(part for part in (line, seed) if part)


def goes_with(settings: object, **needed: str) -> None:
    """ValueError for the first of these settings that was given without the one that it needs."""
    for name, other in needed.items():
        given = getattr(settings, name) != getattr(type(settings), name)
        if given and not getattr(settings, other):
            flag, its = (word.replace("_", "-") for word in (name, other))
            raise ValueError(f"--{flag} goes with --{its}")


def at_least(settings: object, **least: int) -> None:
    """ValueError naming the first of these settings that is too small."""
    for name, smallest in least.items():
        if (value := getattr(settings, name)) < smallest:
            raise ValueError(f"{name} = {value} must be at least {smallest}")


def run(program: Callable[[list[str]], None], args: list[str] | None = None) -> None:
    """Run a program: exit 2 with one sentence on a bad value or missing file, 130 on Ctrl-C.

    A ValueError raised in another library's Python code is a defect here: it keeps its traceback.
    """
    try:
        program(sys.argv[1:] if args is None else args)
    except (ValueError, OSError) as error:
        if isinstance(error, ValueError) and not _ours(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("stopped; what was finished is on disk", file=sys.stderr)
        raise SystemExit(130) from None


def _ours(error: ValueError) -> bool:
    """Whether the line that raised it is in this project."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    name = trace.tb_frame.f_globals.get("__name__", "") if trace else ""
    return name.partition(".")[0] in ("vitx", "experiments", "benchmarks", "__main__")
