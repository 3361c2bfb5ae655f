"""The training program, which kills itself at a named point of its n-th save.

`python tests/dying.py POINT NUMBER RECIPE …`; a kill is SIGKILL, so nothing is cleaned up.
"""

import os
import signal
import sys
from pathlib import Path

from experiments import cli, train
from vitx import files

POINTS = ("half written", "not yet synced", "not yet renamed", "between renames", "not yet settled")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def main(point: str, number: int, words: list[str]) -> None:
    """Wrap what `checkpoint.save` calls so that the n-th save ends at the point."""
    saves, replaces = 0, 0
    write, replace, sync = files.write_through, os.replace, files._sync_folder

    def write_through(path: Path, *parts: bytes | memoryview) -> None:
        nonlocal saves
        saves += path.name.endswith(".ckpt.new")
        if saves == number and point in POINTS[:2]:
            whole = b"".join(bytes(part) for part in parts)
            path.write_bytes(whole if point == POINTS[1] else whole[: len(whole) // 2])
            die()
        write(path, *parts)

    def rename(source: Path, target: Path) -> None:
        nonlocal replaces
        if saves == number and str(source).endswith((".ckpt", ".ckpt.new")):
            replaces += 1
            if point == POINTS[2] or (point == POINTS[3] and replaces == 2):
                die()
        replace(source, target)

    def sync_folder(folder: Path) -> None:
        if saves == number and point == POINTS[4]:
            die()
        sync(folder)

    files.write_through, os.replace, files._sync_folder = write_through, rename, sync_folder
    cli.run(train.main, words)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
