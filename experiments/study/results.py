"""Results: frozen dataclasses, one for each kind; one JSON object per line, never edited.

A kind is declared as a subclass of `Result` and is checked once, where a line is read: its fields
by their types, and what it claims by its `check`.
"""

import json
import lzma
import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, NoReturn, TypeVar

import msgspec

from vitx.registry import UserError
from vitx.training.provenance import Environment, environment

FILE = "results.jsonl"
"""Of a run's folder."""
SCHEMA = 2
KINDS: dict[str, type["Result"]] = {}
"""Every kind by its name."""
RAW = "raw"
"""Fields of this name hold raw values; committed results leave them in the file beside."""
COARSE = ("foreign", "steal", "load", "clock_mhz", "warm_up")
"""Readings beside the times, of which three digits are committed."""
EMPTY = (None, "", (), [], {})
"""Values that are left out where a field has them by default."""
NOT_FINITE = ("nan", "inf", "-inf")
"""Numbers that JSON lacks, as the words that stand for them."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What all kinds have in common."""

    kind: ClassVar[str] = ""
    id: str
    """The run's UTC time and the result's number in it."""
    environment: Environment
    device: str = "cpu"
    origin: str = ""
    """What it was sent as; empty for one that was made or committed here."""

    def __init_subclass__(cls, *, kind: str = ""):
        cls.kind = kind
        if kind:
            KINDS[kind] = cls

    @property
    def when(self) -> tuple[str, int]:
        """The time of the run and the number in it, by which results are ordered."""
        started, _, number = self.id.rpartition("-")
        return started, int(number)

    def check(self) -> None:
        """ValueError where the values do not say what the result claims."""


AnyResult = TypeVar("AnyResult", bound=Result)


class Results:
    """The results of one run, `folder/results.jsonl`; each is on disk when `add` returns.

    Those that a run in this folder has left are kept; a line that a kill has cut off is not.
    """

    def __init__(self, folder: Path):
        self.path = folder / FILE
        folder.mkdir(parents=True, exist_ok=True)
        self.environment = environment()
        if self.path.exists():
            text = self.path.read_text(encoding="utf8")
            self.path.write_text(text[: text.rfind("\n") + 1], encoding="utf8")
        self.kept: list[Result] = read(self.path) if self.path.exists() else []

    def add(self, kind: type[AnyResult], **values: Any) -> AnyResult:
        """Append a result of this run and environment."""
        name = f"{self.environment.time}-{len(self.kept)}"
        result = kind(id=name, environment=self.environment, **values)
        with self.path.open("a", encoding="utf8") as file:
            file.write(encode(result) + "\n")
            file.flush()
        self.kept.append(result)
        return result


def encode(result: Result) -> str:
    """One line of JSON. Fields whose default says that nothing is known are left out with it."""
    values = {"schema": SCHEMA, "kind": result.kind} | _plain(result)
    return json.dumps(values, allow_nan=False)


def decode(values: Any, where: str) -> Result:
    """The result that these plain values are. Raises ValueError naming `where`."""
    kind = KINDS.get(str(values.get("kind"))) if isinstance(values, dict) else None
    if kind is None or values.get("schema") != SCHEMA:
        raise UserError(f"{where} is not a result of schema {SCHEMA}")
    unknown = values.keys() - {"schema", "kind", *(field.name for field in fields(kind))}
    if unknown:
        raise UserError(f"{where}: a result of kind {kind.kind} has no {sorted(unknown)[0]}")
    try:
        result = msgspec.convert(_as_numbers(values), kind)
        _ = result.when
        result.check()
    except (ValueError, ArithmeticError, msgspec.ValidationError) as error:
        raise UserError(f"{where} is no whole result of kind {kind.kind}: {error}") from None
    return result


def read(path: Path, *, cut: bool = False) -> list[Result]:
    """The results of a file. Raises ValueError naming file and line where one is none.

    With `cut` a last line without its end, which a kill has left, is passed over.
    """
    try:
        text = path.read_text(encoding="utf8")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not text") from None
    lines = (text[: text.rfind("\n") + 1] if cut else text).splitlines()
    results = []
    for number, line in enumerate(lines, 1):
        try:
            values = json.loads(line, parse_constant=no_number)
        except (ValueError, RecursionError):
            raise UserError(f"{path} line {number} is not JSON") from None
        results.append(decode(values, f"{path} line {number}"))
    return results


def no_number(word: str) -> NoReturn:
    """For `parse_constant`: NaN and Infinity, which Python reads, are no JSON."""
    raise UserError(f"{word} is no number")


def read_all(folder: Path) -> list[Result]:
    """The results of all files in a folder, oldest first."""
    paths = sorted(folder.glob("*.jsonl"))
    return sorted((result for path in paths for result in read(path)), key=lambda r: r.when)


def of_kind(results: Iterable[Result], kind: type[AnyResult]) -> list[AnyResult]:
    """Those of one kind, and of kinds derived from it."""
    return [result for result in results if isinstance(result, kind)]


def latest(results: Iterable[AnyResult], key: Callable[[AnyResult], Hashable]) -> list[AnyResult]:
    """The last result of each key, in order of first appearance."""
    return list({key(result): result for result in results}.values())


def first(results: Sequence[AnyResult], key: Callable[[AnyResult], Hashable]) -> list[AnyResult]:
    """The first result of each key, in order of appearance."""
    return latest(results[::-1], key)[::-1]


def commit(results: Sequence[Result], folder: Path, name: str) -> None:
    """Add results to the kept evidence: `name.jsonl`, and raw values in `name.raw.jsonl.xz`.

    Raw floats keep four digits, and a list of objects with the same keys becomes one object of
    lists. Raises what `check_kept` does.
    """
    check_kept(results, folder, name)
    folder.mkdir(parents=True, exist_ok=True)
    raw: list[dict[str, object]] = []
    with (folder / f"{name}.jsonl").open("x", encoding="utf8") as file:
        for result in results:
            values = json.loads(encode(result))
            taken = _take_raw(values)
            file.write(json.dumps(values) + "\n")
            if taken:
                raw.append({"id": result.id, RAW: _columns(_rounded(taken))})
    if raw:
        with lzma.open(folder / f"{name}.raw.jsonl.xz", "wt", encoding="utf8") as file:
            file.writelines(json.dumps(line, separators=(",", ":")) + "\n" for line in raw)


def check_kept(results: Sequence[Result], folder: Path, name: str) -> None:
    """ValueError for results of a smoke run or of uncommitted code, which code outside of a
    checkout is too; FileExistsError if they were kept before."""
    if name.endswith("-smoke"):
        raise UserError(f"{name} is a smoke run; its results are not evidence")
    for result in results:
        earlier = (*result.environment.before, *getattr(result, "before", ()))
        if result.environment.dirty or any(one.get("dirty") is not False for one in earlier):
            raise UserError(f"{name} was made by uncommitted code; its results are not evidence")
    path = folder / f"{name}.jsonl"
    if path.exists():
        raise FileExistsError(f"{path} is there already: these results were kept before")


def _take_raw(values: object) -> object:
    """Remove the raw values from a result's, at whatever depth they lie."""
    if not isinstance(values, dict):
        return None
    taken = values.pop(RAW, None)
    for value in values.values():
        taken = taken or _take_raw(value)
    return taken


def _plain(value: object) -> Any:
    """The value as JSON has it, with infinite and undefined numbers as words."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if is_dataclass(value):
        return {
            field.name: _plain(item)
            for field in fields(value)
            if (item := getattr(value, field.name)) not in EMPTY or item != _default(field)
        }
    return value


def _default(field: Field) -> object:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _as_numbers(value: object) -> object:
    """The value with the words for such numbers as numbers."""
    if isinstance(value, str) and value in NOT_FINITE:
        return float(value)
    if isinstance(value, dict):
        return {key: _as_numbers(item) for key, item in value.items()}
    return [_as_numbers(item) for item in value] if isinstance(value, list) else value


def _rounded(value: object, digits: int = 4) -> object:
    """The value with its floats to so many digits, times of day to tenths of a second."""
    if isinstance(value, float):
        return round(value, 1) if abs(value) > 1e6 else float(f"{value:.{digits}g}")
    if isinstance(value, list):
        return [_rounded(item, digits) for item in value]
    if isinstance(value, dict):
        return {k: _rounded(item, 3 if k in COARSE else digits) for k, item in value.items()}
    return value


def _columns(value: object) -> object:
    """The value with each list of objects that have the same keys as one object of lists."""
    if isinstance(value, dict):
        return {key: _columns(item) for key, item in value.items()}
    if not isinstance(value, list):
        return value
    keys = {frozenset(item) if isinstance(item, dict) else None for item in value}
    if len(keys) != 1 or None in keys:
        return [_columns(item) for item in value]
    return {key: _columns([item[key] for item in value]) for key in value[0]}
