"""Several processes that train one model: `torchrun` starts them, each with its own device."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
import torch.distributed.nn  # here: imported later, it would keep the processes' group for ever
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vitx.metrics import Sums, numbers
from vitx.registry import UserError

Value = TypeVar("Value")


@dataclass(frozen=True)
class Part:
    """This process's number among all; one process alone is 0 of 1."""

    rank: int = 0
    ranks: int = 1

    @property
    def alone(self) -> bool:
        return self.ranks == 1

    @property
    def first(self) -> bool:
        """The process that writes files and talks."""
        return self.rank == 0


ALONE = Part()
NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
"""Variables of `torchrun`."""


@contextmanager
def processes(device: torch.device) -> Iterator[tuple[Part, torch.device]]:
    """Join the processes that `torchrun` started, if it did; this one's part and device."""
    place = launched()
    if place is None:
        yield ALONE, device
        return
    if device.type != "cpu":
        device = torch.device(device.type, place["LOCAL_RANK"])
        torch.accelerator.set_device_index(device.index)
    # Gloo carries what lies on the CPU, such as the flag that a signal came.
    backends = {kind: dist.get_default_backend_for_device(kind) for kind in ("cpu", device.type)}
    dist.init_process_group(",".join(f"{kind}:{name}" for kind, name in backends.items()))
    try:
        part = Part(dist.get_rank(), dist.get_world_size())
        yield part, device
        wait(part)
    finally:
        dist.destroy_process_group()


def launched() -> dict[str, int] | None:
    """This process's numbers as `torchrun` gave them, or None where it did not start it.

    Raises UserError where only some of its variables are set, or one is no number.
    """
    given = {name: os.environ.get(name, "") for name in (*NUMBERS, "MASTER_ADDR", "MASTER_PORT")}
    if not given["RANK"]:
        return None
    for name, value in given.items():
        if not value or (name in NUMBERS and not value.isdecimal()):
            raise UserError(
                f"RANK = {given['RANK']!r} is set and {name} = {value!r}; torchrun sets both: "
                "start with it, or unset RANK to train in one process"
            )
    return {name: int(given[name]) for name in NUMBERS}


def averaging(module: nn.Module) -> DistributedDataParallel:
    """The module with gradients that are means over all processes; all call this together.

    It has a group of its own, which lives as long as the module. That of `processes` can then end
    with its threads: one that let go of a tensor while Python ends would abort the process.
    """
    return DistributedDataParallel(module, process_group=dist.new_group())


def wait(part: Part) -> None:
    """Until every process is here, so that none leaves while the first still writes."""
    if not part.alone:
        dist.barrier()


def any_of(flag: bool, part: Part) -> bool:
    """Whether the flag is set in any process."""
    return bool(largest(torch.tensor(int(flag)), part))


def largest(value: Tensor, part: Part) -> Tensor:
    """The largest over all processes, on the device."""
    if not part.alone:
        dist.all_reduce(value, dist.ReduceOp.MAX)
    return value


def total(value: Tensor, part: Part) -> Tensor:
    """The sum over all processes, on the device."""
    if not part.alone:
        dist.all_reduce(value, dist.ReduceOp.SUM)
    return value


def gathered(value: Value, part: Part) -> list[Value]:
    """The values of all processes, in their order."""
    values = [value] * part.ranks
    if not part.alone:
        dist.all_gather_object(values, value)
    return values


def device(name: str = "") -> torch.device:
    """The named device, or the accelerator of this machine (CUDA, MPS, XPU), or else the CPU.

    An accelerator has its number, and is made the current one, so that what asks no device means
    it. Raises ValueError for a device that this machine has not.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    here = ["cpu", *([accelerator.type] if accelerator else [])]
    kind, _, number = name.partition(":")
    count = max(torch.accelerator.device_count(), 1)
    if name and (kind not in here or not (number or "0").isdecimal() or int(number or 0) >= count):
        raise UserError(f"device = {name!r} is not on this machine; choices: {', '.join(here)}")
    if accelerator is None or kind == "cpu":
        return torch.device("cpu")
    if number:
        torch.accelerator.set_device_index(int(number))
    return torch.device(accelerator.type, torch.accelerator.current_device_index())


def reported_means(sums: Sums, part: Part) -> dict[str, float]:
    """The mean of each name over calls and processes; the sums start anew. This waits for the
    device, and all processes call it together."""
    if not any_of(bool(sums), part):
        return {}
    shares = gathered(numbers(sums), part)
    sums.clear()
    means = {}
    for name in dict.fromkeys(name for share in shares for name in share):
        totals, counts = zip(*(share[name] for share in shares if name in share), strict=True)
        means[name] = sum(totals) / sum(counts)
    return means
