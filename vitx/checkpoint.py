"""Files that hold the state of a run: written whole or not at all, checked before they are read.

A checkpoint is one line of text, with the format, the size and the SHA-256 of what follows, and
then what `torch.save` wrote. It is read as plain tensors and numbers; nothing in it is ever run.
"""

import fcntl
import hashlib
import io
import os
import pickle
import struct
import sys
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch

LAST, BEFORE, DAMAGED = "last.ckpt", "before.ckpt", "damaged.ckpt"
FORMAT = "vitx-checkpoint-2"
HEADER = 256
"""Largest length of the first line in bytes."""


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


class Damaged(ValueError):
    """A file that is not a whole checkpoint; says which and why."""


def save(folder: Path, state: dict[str, Any]) -> Path:
    """Write `last.ckpt`; the one before becomes `before.ckpt`. Raises OSError as `write_whole`."""
    payload = io.BytesIO()
    torch.save(state, payload)
    body = payload.getbuffer()
    header = f"{FORMAT} {len(body)} {hashlib.sha256(body).hexdigest()}\n".encode()
    write_whole(folder / LAST, header, body, before=folder / BEFORE)
    return folder / LAST


def load(folder: Path) -> dict[str, Any]:
    """The last checkpoint of a run folder, or with a warning the one before if it is damaged.

    Raises FileNotFoundError if there is none, and Damaged if none is whole.
    """
    last, before = folder / LAST, folder / BEFORE
    if not (last.exists() or before.exists()):
        raise FileNotFoundError(f"{folder} holds no checkpoint ({LAST})")
    try:
        return read(last)
    except (Damaged, FileNotFoundError) as error:
        if not before.exists():
            raise
        state = read(before)
        print(f"warning: {error}; going on from {before.name}", file=sys.stderr)
        return state


def set_aside(folder: Path) -> None:
    """Rename a damaged last checkpoint: the next save would put it in the place of the good one.

    For the process that holds the folder.
    """
    try:
        _body(folder / LAST)
    except FileNotFoundError:
        pass
    except Damaged:
        os.replace(folder / LAST, folder / DAMAGED)


def read(path: Path) -> dict[str, Any]:
    """The state in a file. Raises Damaged for any that is cut off, changed or of another kind."""
    return plain(io.BytesIO(_body(path)), path)


def _body(path: Path) -> bytes:
    """What follows the header, which it has to fit."""
    with path.open("rb") as file:
        words = file.readline(HEADER).split()
        body = file.read()
    if len(words) != 3 or words[0] != FORMAT.encode() or not words[1].isdigit():
        raise Damaged(f"{path} is not a checkpoint of this program ({FORMAT})")
    if len(body) != int(words[1]):
        raise Damaged(f"{path} is cut off: {len(body)} bytes of {int(words[1])}")
    if hashlib.sha256(body).hexdigest().encode() != words[2]:
        raise Damaged(f"{path} is changed: its SHA-256 is not the stated one")
    return body


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


class Busy(ValueError):
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
