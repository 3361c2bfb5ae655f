"""The command line that the programs share: settings as flags, mistakes as one plain sentence."""

import difflib
import importlib
import io
import os
import re
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout, suppress
from types import ModuleType
from typing import TYPE_CHECKING, TypeVar

import torch
import tyro
from tyro import _errors as events
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from vitx.registry import Slot, UserError, nearest

if TYPE_CHECKING:
    from tyro._arguments import ArgumentDefinition

Settings = TypeVar("Settings")

REGISTRY = ConstructorRegistry()
OPTIONS = (tyro.conf.FlagCreatePairsOff,)
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


def parse(kind: type[Settings], args: Sequence[str], *, prog: str) -> Settings:
    """Settings from flags; --help prints and exits 0. Raises UserError for a mistake."""

    def refuse(event: events.ParseErrorEvent) -> None:
        raise UserError(_sentence(event, kind))

    with events.on_parse_error(refuse):
        return tyro.cli(kind, prog=prog, args=list(args), registry=REGISTRY, config=OPTIONS)


def _sentence(event: events.ParseErrorEvent, kind: type) -> str:
    """What is wrong with the flags; of a category that is not known here its name."""
    match event:
        case events.UnrecognizedArgs(tokens=tokens):
            name = tokens[0].partition("=")[0].replace("_", "-")
            close = difflib.get_close_matches(name, _flags(kind), n=1, cutoff=0.5)
            hint = f"did you mean {close[0]!r}?" if close else "--help lists all flags"
            return f"{tokens[0]} is not known; {hint}"
        case events.InvalidChoice(argument=argument, value=value, choices=choices):
            name, words = _flag(argument).lstrip("-"), [word for word in choices if word != "None"]
            return f"{name} = {value!r} is not known; {nearest(value, words)}"
        case events.InstantiationFailure(message=message, argument=argument):
            words = " ".join(re.sub(r"\[/?\w+\]", "", message).split())  # tyro's marks of style
            return f"{_flag(argument)}: {words}" if argument else words
        case events.BadValue(argument=argument):
            return f"{_flag(argument)} must have a value"
        case events.MissingArgs(missing_arguments=missing):
            return f"{', '.join(_flag(one.arg) for one in missing)} must be given"
    return f"{type(event).__name__}: see --help"


def _flags(kind: type) -> list[str]:
    """All flags, as --help names them, in its order."""
    with redirect_stdout(io.StringIO()) as text, suppress(SystemExit):
        tyro.cli(kind, args=["--help"], registry=REGISTRY, config=OPTIONS)
    return re.findall(r"(?<![\w-])--\w[\w.-]*\w", text.getvalue())


def _flag(argument: "ArgumentDefinition") -> str:
    """A flag as it is typed; of a positional word its place-holder."""
    lowered = argument.lowered
    return str(lowered.metavar) if argument.is_positional() else lowered.name_or_flags[-1]


def module(name: str, file: str) -> ModuleType:
    """Import a module that a person wrote. Raises UserError naming its file for what is wrong."""
    try:
        return importlib.import_module(name)
    except (SyntaxError, ImportError, NameError, AttributeError, TypeError, ValueError, LookupError,
            ArithmeticError, AssertionError, RuntimeError, OSError) as error:  # fmt: skip
        raise UserError(f"{file} can't be read: {type(error).__name__}: {error}") from error
    except SystemExit as error:
        raise UserError(f"{file} ends the program when it is imported") from error


def label(values: Mapping[str, object], *, most: int = 1000) -> str:
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
    """UserError for the first of these settings that was given without the one that it needs."""
    for name, other in needed.items():
        given = getattr(settings, name) != getattr(type(settings), name)
        if given and not getattr(settings, other):
            flag, its = (word.replace("_", "-") for word in (name, other))
            raise UserError(f"--{flag} goes with --{its}")


def at_least(settings: object, **least: int) -> None:
    """UserError naming the first of these settings that is too small."""
    for name, smallest in least.items():
        if (value := getattr(settings, name)) < smallest:
            raise UserError(f"{name} = {value} must be at least {smallest}")


def run(program: Callable[[list[str]], None], args: list[str] | None = None) -> None:
    """Run a program: exit 2 with one sentence on a bad value, a missing file or too little memory,
    130 on Ctrl-C, 141 where nobody reads its output any more.

    A ValueError that is no UserError is a defect of this or another library's code: it keeps its
    traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what its encoding lacks is escaped
            stream.reconfigure(errors="backslashreplace")
    try:
        program(sys.argv[1:] if args is None else args)
    except BrokenPipeError:
        # Python flushes what is left when it ends; it has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(128 + signal.SIGPIPE) from None
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except (MemoryError, OverflowError, RuntimeError) as error:
        if not (sentence := _memory(error)):
            raise
        print(f"error: {sentence}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("stopped; what was finished is on disk", file=sys.stderr)
        raise SystemExit(130) from None


def _memory(error: BaseException) -> str:
    """What is said where the memory does not suffice; nothing for other errors."""
    words = str(error)
    if size := re.search(r"you tried to allocate (\d+) bytes", words):
        return f"the memory does not suffice for {int(size[1]) / 2**30:,.1f} GiB more"
    if isinstance(error, OverflowError) or "overflow" in words.lower():
        return f"a size is larger than any memory: {words.splitlines()[0]}"
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return (
            f"the memory does not suffice: {words.splitlines()[0] if words else 'no size is told'}"
        )
    return ""
