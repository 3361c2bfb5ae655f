"""Files that are written whole or not at all, JSON, plain tensors, and locks of folders."""

import fcntl
import io
import json
import os
import pickle
import struct
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


class Damaged(UserError):
    """A file that is not a whole checkpoint; says which and why."""


def plain(source: Path | io.BytesIO, path: Path) -> Any:
    """What `torch.save` wrote, on the CPU: tensors, numbers and words; nothing in it is ever run.

    Raises Damaged naming `path` for anything else.
    """
    try:
        return torch.load(source, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
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


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of a run folder; empty where there is none, or it was cut off by a kill."""
    try:
        return json.loads(path.read_text(encoding="utf8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


def write_json(path: Path, value: object) -> None:
    """A JSON file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.{os.getpid()}")
    new.write_text(json.dumps(value, indent=1) + "\n", encoding="utf8")
    os.replace(new, path)
