"""Rows as one small file that can be sent: without its host's and its user's name, or folders.

A checksum says whether it is still what was packed; it does not say who packed it.
"""

import gzip
import hashlib
import json
import os
import pwd
import re
import socket
import zlib
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from benchmarks.report import claims
from experiments.study import rows as rows_file
from experiments.study.pages import Row

FORMAT = "vitx rows, packed, 2"
LIMIT = 200 * 2**10
ENVIRONMENT = ("time", "commit", "version", "dirty", "python", "versions", "cuda", "cudnn", "gpu",
               "cpu", "cpu_id", "cores", "affinity", "threads", "matmul_precision",
               "system")  # fmt: skip
"""What is kept of a row's environment."""
LEFT_OUT = ("raw", "order", "rounds_used", "rounds_disturbed", "warm_up")
WORDS = ("kind", "what", "device", "mode", "compile", "dtype", "batch_asked", "verdict")
"""Fields that hold words of this program alone."""
NAMES = ("candidate", "reference")
"""Fields that name a model."""
MAGIC = b"\x1f\x8b"
"""How a gzip file starts."""
MOST = 64 * LIMIT
"""Bytes that a packed file may unpack to."""
NO_PATH = re.compile(r"[A-Za-z]+/\d{1,2}|\d+/\d+/\d+")
"""A size such as S/16, or the numbers of a processor."""
QUOTED = re.compile(r"(?<=')[^']*[/\\][^']*(?=')|(?<=\")[^\"]*[/\\][^\"]*(?=\")")
WORD = re.compile(r"(?:^|(?<=[\s:='\"()]))[^\s:='\"()]*[/\\][^\s:='\"()]*")
"""From the start of a word on, or the search would take quadratic time in long ones."""


def write(rows: Sequence[Row], path: Path) -> None:
    """Pack rows into a file. Raises ValueError if it is larger than LIMIT, or a row was packed
    before: what it was sent as would be lost."""
    sent = [row["origin"] for row in rows if "origin" in row]
    if sent:
        raise ValueError(f"rows of {sent[0]} were packed before; pack those of a run")
    cut = _cut(dict.fromkeys(row[side] for row in rows for side in NAMES if side in row))
    kept = [_clean(row) | {side: cut[row[side]] for side in NAMES if side in row} for row in rows]
    said = {"format": FORMAT, "sha256": _digest(kept), "rows": kept}
    packed = gzip.compress(json.dumps(said).encode(), mtime=0)
    if len(packed) > LIMIT:
        raise ValueError(
            f"{len(rows)} rows make a file of {len(packed) // 2**10} KiB, more than "
            f"{LIMIT // 2**10}; pack fewer"
        )
    with path.open("xb") as file:
        file.write(packed)


def read(path: Path) -> list[Row]:
    """The rows of a packed file, or of a run's rows.jsonl. Raises ValueError naming the file.

    Packed rows get their file's name and a part of its checksum as `origin`: they are never shown
    as if made here, nor as one with those of another file.
    """
    if not path.is_file():
        raise ValueError(f"{path} is no file of rows")
    content = path.read_bytes()
    rows = _unpacked(path, content) if content.startswith(MAGIC) else rows_file.read(path)
    for number, row in enumerate(rows, 1):
        claims.check(row, f"{path} row {number}")
    return rows


def _unpacked(path: Path, content: bytes) -> list[Row]:
    if len(content) > LIMIT:
        raise ValueError(f"{path} is larger than the {LIMIT // 2**10} KiB of packed rows")
    try:
        text = zlib.decompressobj(wbits=31).decompress(content, MOST)
        said = json.loads(text, parse_constant=rows_file.no_number)
    except (ValueError, zlib.error, RecursionError) as error:
        raise ValueError(f"{path} can't be unpacked: {error}") from None
    if not isinstance(said, dict) or said.get("format") != FORMAT:
        raise ValueError(f"{path} is no file of packed rows")
    rows = said.get("rows")
    if not isinstance(rows, list) or said.get("sha256") != _digest(rows):
        raise ValueError(f"{path} does not fit its checksum: it was changed after it was packed")
    for number, row in enumerate(rows, 1):
        rows_file.check(row, f"{path} row {number}")
    origin = f"{path.stem} {_digest(rows)[:6]}"
    return [row | {"origin": origin} for row in rows]


def _digest(rows: Sequence[Row]) -> str:
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


def _clean(row: Row) -> Row:
    kept = {name: value for name, value in row.items() if name not in (*LEFT_OUT, "environment")}
    before = row["environment"]
    environment = {name: before[name] for name in ENVIRONMENT if name in before}
    kept |= {"environment": environment}
    return _without_places(kept) | {name: row[name] for name in WORDS if name in row}


def _cut(names: Iterable[str]) -> dict[str, str]:
    """Names of models without their folders; numbered where that makes two alike."""
    found: dict[str, str] = {}
    for name in names:
        cut = other = _without_places(name)
        number = 1
        while other in found.values():
            number += 1
            other = f"{cut} ({number})"
        found[name] = other
    return found


def _without_places(value: Any) -> Any:
    """The value without this person's name, every path in its texts cut to its last part."""
    if isinstance(value, str):
        for secret in _secrets():  # as a word: a person may be called as a part of another one
            value = re.sub(rf"(?<![\w-]){re.escape(secret)}(?![\w-])", "…", value)
        for path in (QUOTED, WORD):
            value = path.sub(_last, value)
        return value
    if isinstance(value, dict):
        return {name: _without_places(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_without_places(each) for each in value]
    return value


def _last(match: re.Match[str]) -> str:
    """The last part of a path; what is none as it is."""
    text = match[0]
    return text if NO_PATH.fullmatch(text) else re.split(r"[/\\]", text.rstrip("/\\"))[-1]


@lru_cache(maxsize=1)
def _secrets() -> list[str]:
    """Words that name this machine, its user or where this is run."""
    found = [str(Path.cwd()), str(Path.home()), socket.gethostname()]
    found += [os.environ.get(name, "") for name in ("USER", "LOGNAME")]
    with suppress(KeyError):  # a user without an entry, as in containers
        found.append(pwd.getpwuid(os.getuid()).pw_name)
    return [word for word in dict.fromkeys(found) if len(word) > 2]
