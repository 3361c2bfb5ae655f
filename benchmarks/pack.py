"""Results as one small file that can be sent: without its host's and its user's name, or folders.

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
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from benchmarks.kinds import Pair
from experiments.study import results as results_file
from experiments.study.results import RAW, Result
from vitx.registry import UserError

FORMAT = "vitx results, packed, 3"
LIMIT = 200 * 2**10
LEFT_OUT = (RAW, "command", "load", "before", "warm_up", "rounds_used", "rounds_disturbed")
"""Fields that are not packed, at whatever depth."""
WORDS = ("kind", "id", "device", "mode", "compile", "dtype", "batch_asked", "verdict", "checked")
"""Fields that hold words of this program alone."""
MAGIC = b"\x1f\x8b"
"""How a gzip file starts."""
MOST = 64 * LIMIT
"""Bytes that a packed file may unpack to."""
NO_PATH = re.compile(r"[A-Za-z]+/\d{1,2}|\d+/\d+/\d+")
"""A size such as S/16, or the numbers of a processor."""
QUOTED = re.compile(r"(?<=')[^']*[/\\][^']*(?=')|(?<=\")[^\"]*[/\\][^\"]*(?=\")")
WORD = re.compile(r"(?:^|(?<=[\s:='\"()]))[^\s:='\"()]*[/\\][^\s:='\"()]*")
"""From the start of a word on, or the search would take quadratic time in long ones."""


def write(results: Sequence[Result], path: Path) -> None:
    """Pack results into a file. Raises ValueError if it is larger than LIMIT, or a result was
    packed before: what it was sent as would be lost."""
    origins = [result.origin for result in results if result.origin]
    if origins:
        raise UserError(f"results of {origins[0]} were packed before; pack those of a run")
    pairs = [result for result in results if isinstance(result, Pair)]
    names = _short_names(name for pair in pairs for name in (pair.reference, pair.candidate))
    kept = []
    for result in results:
        values = _without_places(json.loads(results_file.encode(result)))
        if isinstance(result, Pair):
            values["candidate"] = names[result.candidate]
            if result.reference:
                values["reference"] = names[result.reference]
        kept.append(values)
    content = {"format": FORMAT, "sha256": _digest(kept), "results": kept}
    packed = gzip.compress(json.dumps(content).encode(), mtime=0)
    if len(packed) > LIMIT:
        raise UserError(
            f"{len(results)} results make a file of {len(packed) // 2**10} KiB, more than "
            f"{LIMIT // 2**10}; pack fewer"
        )
    with path.open("xb") as file:
        file.write(packed)


def read(path: Path) -> list[Result]:
    """The results of a packed file, or of a run's results.jsonl. Raises ValueError naming the file.

    Packed results get their file's name and a part of its checksum as `origin`: they are never
    shown as if made here, nor as one with those of another file.
    """
    if not path.is_file():
        raise UserError(f"{path} is no file of results")
    content = path.read_bytes()
    return _unpacked(path, content) if content.startswith(MAGIC) else results_file.read(path)


def _unpacked(path: Path, packed: bytes) -> list[Result]:
    if len(packed) > LIMIT:
        raise UserError(f"{path} is larger than the {LIMIT // 2**10} KiB of packed results")
    try:
        text = zlib.decompressobj(wbits=31).decompress(packed, MOST)
        content = json.loads(text, parse_constant=results_file.no_number)
    except (ValueError, zlib.error, RecursionError) as error:
        raise UserError(f"{path} can't be unpacked: {error}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path} is no file of packed results")
    kept = content.get("results")
    if not isinstance(kept, list) or content.get("sha256") != _digest(kept):
        raise UserError(f"{path} does not fit its checksum: it was changed after it was packed")
    results = [
        results_file.decode(values, f"{path} result {number}")
        for number, values in enumerate(kept, 1)
    ]
    origin = f"{path.stem} {_digest(kept)[:6]}"
    return [replace(result, origin=origin) for result in results]


def _digest(values: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _short_names(names: Iterable[str]) -> dict[str, str]:
    """Names of models without their folders; numbered where that makes two alike."""
    short: dict[str, str] = {}
    for name in dict.fromkeys(names):
        cut = other = _without_places(name)
        number = 1
        while other in short.values():
            number += 1
            other = f"{cut} ({number})"
        short[name] = other
    return short


def _without_places(value: Any) -> Any:
    """The value without this person's name, every path in its texts cut to its last part."""
    if isinstance(value, str):
        for secret in _secrets():  # as a word: a person may be called as a part of another one
            value = re.sub(rf"(?<![\w-]){re.escape(secret)}(?![\w-])", "…", value)
        for path in (QUOTED, WORD):
            value = path.sub(_last, value)
        return value
    if isinstance(value, dict):
        return {
            name: each if name in WORDS else _without_places(each)
            for name, each in value.items()
            if name not in LEFT_OUT
        }
    return [_without_places(each) for each in value] if isinstance(value, list) else value


def _last(match: re.Match[str]) -> str:
    """The last part of a path; what is none as it is."""
    text = match[0]
    return text if NO_PATH.fullmatch(text) else re.split(r"[/\\]", text.rstrip("/\\"))[-1]


@lru_cache(maxsize=1)
def _secrets() -> list[str]:
    """Words that name this machine, its user or where this is run."""
    words = [str(Path.cwd()), str(Path.home()), socket.gethostname()]
    words += [os.environ.get(name, "") for name in ("USER", "LOGNAME")]
    with suppress(KeyError):  # a user without an entry, as in containers
        words.append(pwd.getpwuid(os.getuid()).pw_name)
    return [word for word in dict.fromkeys(words) if len(word) > 2]
