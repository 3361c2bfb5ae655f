"""Files that hold the state of a run: written whole or not at all, checked before they are read.

A checkpoint is one line of text, with the format, the size and the SHA-256 of what follows, and
then what `torch.save` wrote. It is read as plain tensors and numbers; nothing in it is ever run.
"""

import hashlib
import io
import os
import sys
from pathlib import Path
from typing import Any

import torch

from vitx.files import Damaged, plain, write_whole

LAST, BEFORE, DAMAGED = "last.ckpt", "before.ckpt", "damaged.ckpt"
FORMAT = "vitx-checkpoint-2"
HEADER = 256
"""Largest length of the first line in bytes."""


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
