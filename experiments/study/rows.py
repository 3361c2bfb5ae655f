"""Result rows: one JSON object a line, appended and never edited."""

import json
import lzma
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from vitx.training.provenance import environment

SCHEMA = 1
KINDS = (
    "equality",
    "noise",
    "speed",
    "accuracy",
    "pretrained",
    "check",
    "ablation",
    "variance",
    "sweep",
    "calibration",
    "plant",
    "fault",
    "failure",
)
RAW = ("raw", "order")
"""Fields that hold all raw values of a row; a committed row leaves them in the file beside it."""
COARSE = ("foreign", "steal", "load", "clock_mhz", "warm_up")
"""Readings beside the times, of which three digits are committed."""


class Rows:
    """The rows of one run, `folder/rows.jsonl`; each is on disk when `add` returns.

    Those that a run in this folder has left are kept; a line that a kill has cut off is not.
    """

    def __init__(self, folder: Path):
        self.path = folder / "rows.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        self.environment = environment()
        if self.path.exists():
            text = self.path.read_text(encoding="utf8")
            self.path.write_text(text[: text.rfind("\n") + 1], encoding="utf8")
        self.kept: list[dict] = read(self.path) if self.path.exists() else []

    def add(self, kind: str, **fields: Any) -> dict:
        """Append a row of a known kind with this run's environment; the row."""
        if kind not in KINDS:
            raise ValueError(f"a row's kind is one of {', '.join(KINDS)}, not {kind!r}")
        number = len(self.kept)
        row = {"schema": SCHEMA, "kind": kind, "id": f"{self.environment['time']}-{number}"}
        row |= _plain(fields) | {"environment": self.environment}
        with self.path.open("a", encoding="utf8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")
            file.flush()
        self.kept.append(row)
        return row


def read(path: Path, *, cut: bool = False) -> list[dict]:
    """The rows of a file. Raises ValueError naming file and line where one is not a row.

    With `cut` a last line without its end, which a kill has left, is passed over.
    """
    rows = []
    try:
        text = path.read_text(encoding="utf8")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not text") from None
    if cut:
        text = text[: text.rfind("\n") + 1]
    for number, line in enumerate(text.splitlines(), 1):
        try:
            row = json.loads(line, parse_constant=no_number)
        except (ValueError, RecursionError):
            raise ValueError(f"{path} line {number} is not JSON") from None
        check(row, f"{path} line {number}")
        rows.append(row)
    return rows


def no_number(word: str) -> NoReturn:
    """For `parse_constant`: NaN and Infinity, which Python reads, are no JSON."""
    raise ValueError(f"{word} is no number")


def check(row: Any, where: str) -> None:
    """ValueError if a value is no row of this schema."""
    known = isinstance(row, dict) and row.get("schema") == SCHEMA and row.get("kind") in KINDS
    name = row.get("id") if known else None
    named = isinstance(name, str) and re.fullmatch(r".*-\d+", name)
    if not (named and isinstance(row.get("environment"), dict)):
        raise ValueError(f"{where} is not a row of schema {SCHEMA}")


def read_all(folder: Path) -> list[dict]:
    """The rows of all files in a folder, oldest first."""
    return sorted((row for path in sorted(folder.glob("*.jsonl")) for row in read(path)), key=when)


def when(row: dict) -> tuple[str, int]:
    """A row's time and its number in the run."""
    started, _, number = row["id"].rpartition("-")
    return started, int(number)


def commit(rows: list[dict], folder: Path, name: str) -> None:
    """Add rows to the kept evidence: `name.jsonl`, and their raw values in `name.raw.jsonl.xz`.

    Raw floats keep four digits, and a list of objects with the same keys becomes one object of
    lists. Raises what `check_kept` does.
    """
    check_kept(rows, folder, name)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.jsonl").open("x", encoding="utf8") as file:
        for row in rows:
            slim = {key: value for key, value in row.items() if key not in RAW}
            file.write(json.dumps(slim) + "\n")
    raw = [
        {"id": row["id"]} | {key: _columns(_rounded(row[key])) for key in RAW if key in row}
        for row in rows
        if any(key in row for key in RAW)
    ]
    if raw:
        with lzma.open(folder / f"{name}.raw.jsonl.xz", "wt", encoding="utf8") as file:
            file.writelines(json.dumps(row, separators=(",", ":")) + "\n" for row in raw)


def check_kept(rows: list[dict], folder: Path, name: str) -> None:
    """ValueError for rows of a smoke run or of uncommitted code, which is also said of code that is
    in no checkout; FileExistsError if they were kept before."""
    if name.endswith("-smoke"):
        raise ValueError(f"{name} is a smoke run; its rows are not evidence")
    made = [(row, row["environment"], *row["environment"].get("before", [])) for row in rows]
    parts = [part for row, *parts in made for part in (*parts, *row.get("before", []))]
    if not all(isinstance(part, dict) and part.get("dirty") is False for part in parts):
        raise ValueError(f"{name} was made by uncommitted code; its rows are not evidence")
    path = folder / f"{name}.jsonl"
    if path.exists():
        raise FileExistsError(f"{path} is there already: these rows were kept before")


def _plain(value: Any) -> Any:
    """The value with infinite and undefined numbers as words, which JSON lacks."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _rounded(value: Any, digits: int = 4) -> Any:
    """The value with its floats to so many digits, times of day to tenths of a second."""
    if isinstance(value, float):
        return round(value, 1) if abs(value) > 1e6 else float(f"{value:.{digits}g}")
    if isinstance(value, list):
        return [_rounded(item, digits) for item in value]
    if isinstance(value, dict):
        return {k: _rounded(item, 3 if k in COARSE else digits) for k, item in value.items()}
    return value


def _columns(value: Any) -> Any:
    """The value with each list of objects that have the same keys as one object of lists."""
    if isinstance(value, dict):
        return {key: _columns(item) for key, item in value.items()}
    if not isinstance(value, list):
        return value
    keys = {frozenset(item) if isinstance(item, dict) else None for item in value}
    if len(keys) != 1 or None in keys:
        return [_columns(item) for item in value]
    return {key: _columns([item[key] for item in value]) for key in value[0]}


def latest(rows: list[dict], *keys: str) -> list[dict]:
    """The last row of each combination of the named fields, in order of first appearance."""
    found: dict[tuple, dict] = {}
    for row in rows:
        found[tuple(str(_at(row, key)) for key in keys)] = row
    return list(found.values())


def first(rows: list[dict], *keys: str) -> list[dict]:
    """The first row of each combination of the named fields, in order of appearance."""
    return latest(rows[::-1], *keys)[::-1]


def _at(row: Mapping[str, Any], dotted: str) -> Any:
    value: Any = row
    for part in dotted.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value
