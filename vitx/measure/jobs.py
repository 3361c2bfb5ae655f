"""What worker processes are given: a folder of pickles, and how this process was set.

A `Job` is a folder of pickles (candidate, example, and the reference if there is one), with a
`TimingConfig` and the settings of the process that wrote it.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitx.measure.equality import Keys
from vitx.measure.subjects import Subject
from vitx.measure.timing import TimingConfig
from vitx.model.compiler import needs_compiler
from vitx.registry import UserError

REBUILD_FAILED = 3
"""Exit status of a process that can't unpickle a module."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is timed, how, and by which settings; it goes to each process."""

    folder: Path
    config: TimingConfig
    sides: tuple[str, ...]
    device: str
    """Type of the device."""
    threads: int
    matmul_precision: str
    tf32_convolutions: bool
    forked: bool = False
    """Whether the process that does the task was forked."""

    def load(self, name: str, device: str | None = None) -> Any:
        """Unpickle candidate, reference, example or keys."""
        # The pickles are this project's own, in a folder that only this user can write to.
        try:
            path = self.folder / f"{name}.pt"
            return torch.load(path, weights_only=False, map_location=device)
        except (AttributeError, ImportError) as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            raise SystemExit(REBUILD_FAILED) from None

    def import_all(self) -> None:
        """Import what the pickles need, without weights or a computation."""
        for side in self.sides:
            self.load(side, "meta")

    def start(self) -> Tensor:
        """Set this process up as the one that wrote the job; the example."""
        torch.set_num_threads(self.threads)
        torch.set_float32_matmul_precision(self.matmul_precision)
        torch.backends.cudnn.allow_tf32 = self.tf32_convolutions
        example = self.load("example")
        if self.config.compile != "none":
            needs_compiler(example.device)
        torch.manual_seed(self.config.seed)
        return example


def write(
    folder: Path,
    config: TimingConfig,
    reference: Subject | None,
    candidate: Subject,
    example: Tensor,
    keys: Keys | None,
) -> Job:
    """Write what the processes of a job need; raises what pickle raises.

    They get this process's number of threads and its precision of float32 products and
    convolutions; ValueError if that was set by PyTorch's newer interface.
    """
    private_folder(folder)
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:
        raise UserError(
            "torch.backends.*.fp32_precision is set, which fresh processes can't take over; use "
            "torch.set_float32_matmul_precision"
        ) from None
    sides = (
        {"candidate": candidate}
        if reference is None
        else {
            "reference": reference,
            "candidate": candidate,
        }
    )
    for name, value in {**sides, "example": example, "keys": keys}.items():
        torch.save(value, folder / f"{name}.pt")
    return Job(
        folder=folder,
        config=config,
        sides=tuple(sides),
        device=example.device.type,
        threads=torch.get_num_threads(),
        matmul_precision=precision,
        tf32_convolutions=torch.backends.cudnn.allow_tf32,
    )


def private_folder(path: Path) -> None:
    """Make a folder that no other user can write to: compiled code and pickles are run from it."""
    path.mkdir(parents=True, exist_ok=True)
    path.chmod(0o700)
