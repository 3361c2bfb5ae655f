"""Files that are written whole or not at all, JSON, plain tensors, and locks of folders."""

import fcntl
import io
import json
import math
import os
import pickle
import re
import struct
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch

from vitx.registry import UserError

UNREADABLE = (
    pickle.UnpicklingError,
    struct.error,
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What the reader of pickles raises for bytes that are none: more than its own class of error."""


def shown(path: Path | str) -> str:
    """A path or its part as text for people and records: what is no UTF-8 in it is escaped."""
    return os.fsencode(path).decode("utf8", "backslashreplace")


class Damaged(UserError):
    """A file that is not a whole checkpoint; says which and why."""


def plain(source: Path | io.BytesIO, path: Path, also: Sequence[Any] = ()) -> Any:
    """What `torch.save` wrote, on the CPU: tensors, numbers and words; nothing in it is ever run.

    `also` are further types that hold values only. Raises Damaged naming `path` for anything else.
    """
    try:
        with torch.serialization.safe_globals(list(also)):
            return torch.load(source, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        if kind := re.search(r"GLOBAL (\S+) was not an allowed global", str(error)):
            raise Damaged(
                f"{path} holds a {kind[1]} beside plain tensors, which is not read, as reading it "
                "could run code. Where you trust the file, write its weights alone: "
                "torch.save(torch.load(PATH, weights_only=False)['state_dict'], NEW)"
            ) from None
        reason = (str(error).splitlines() or [""])[0]
        raise Damaged(
            f"{path} is no file of plain tensors: {type(error).__name__}: {reason}"
        ) from None


def write_whole(path: Path, *parts: bytes | memoryview, before: Path | None = None) -> None:
    """Write a file; the one that has its name becomes `before`, if that is given.

    The new file is complete on the disk before it takes the name, so that a kill or a full disk at
    any moment leaves a good one. Raises OSError naming the file that could not be written.
    """
    new = path.with_name(f"{path.name}.new")
    try:
        write_through(new, *parts)
        if before is not None and path.exists():
            os.replace(path, before)
        os.replace(new, path)
        _sync_folder(path.parent)
    except OSError as error:
        new.unlink(missing_ok=True)
        raise OSError(
            error.errno, f"{error.strerror}; what was saved before is whole", str(path)
        ) from None


def write_through(path: Path, *parts: bytes | memoryview) -> None:
    """Write a file and wait until it is on the disk."""
    with path.open("wb") as file:
        for part in parts:
            file.write(part)
        file.flush()
        os.fsync(file.fileno())


class Busy(UserError):
    """Another process holds a run folder."""


class Lock:
    """Holds a run folder for one process; the kernel lets go of it when the process ends."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / "lock").open("a+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            holder = self._file.read().strip() or "unknown"
            self._file.close()
            raise Busy(f"{folder} is in use by another trainer (process {holder})") from None
        except OSError as error:
            self._file.close()
            reason = f"its file system has no locks: {error.strerror}"
            raise OSError(error.errno, reason, str(folder)) from None
        _held.add(self)
        self._file.truncate(0)
        self._file.write(str(os.getpid()))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


_held: WeakSet[Lock] = WeakSet()


def _let_go() -> None:
    """In a child: a loader's worker would hold a lock for longer than its trainer lives."""
    for lock in _held:
        lock.close()


os.register_at_fork(after_in_child=_let_go)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def to_json(value: object, *, indent: int | None = None) -> str:
    """JSON, in which a number that is not finite is null: it has no other."""

    def plain(value: object) -> object:
        if isinstance(value, float):
            return value if math.isfinite(value) else None
        if isinstance(value, Mapping):
            return {key: plain(inner) for key, inner in value.items()}
        return [plain(inner) for inner in value] if isinstance(value, list | tuple) else value

    return json.dumps(plain(value), indent=indent, allow_nan=False)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object in a run folder; empty where there is none, or with a warning a damaged one."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError as error:  # json's and that of what is no UTF-8
        warn_once(f"{path} can't be read ({error}), and counts as absent")
        return {}
    if not isinstance(content, dict):
        warn_once(f"{path} holds no JSON object, and counts as absent")
        return {}
    return content


@cache
def warn_once(sentence: str) -> None:
    """Print a warning, the first time that it is given."""
    print(f"warning: {sentence}", file=sys.stderr)


def write_json(path: Path, value: object) -> None:
    """A JSON file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.{os.getpid()}")
    new.write_text(to_json(value, indent=1) + "\n", encoding="utf8")
    os.replace(new, path)
