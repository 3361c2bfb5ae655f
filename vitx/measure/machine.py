"""The state of the machine around a timed block, and what processes have used of it."""

import contextlib
import ctypes
import os
import platform
import re
import resource
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

FOREIGN_LIMIT = 0.10
"""Share of the machine's time that others may use during a round of blocks."""
STEAL_LIMIT = 0.05
"""Share of the machine's time that the hypervisor may take during a round."""
CLOCK_LIMIT = 0.90
"""Lowest clock of a round, as a share of the highest that was read."""

CGROUPS = Path("/sys/fs/cgroup")
"""Where Linux shows its control groups."""

KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**60)}
"""What `keep_memory` sets, for a process to come."""

GPU_READINGS = (
    "driver_version",
    "clocks.sm",
    "clocks.mem",
    "power.draw",
    "power.limit",
    "temperature.gpu",
    "clocks_throttle_reasons.active",
)
"""Of an NVIDIA GPU, by `nvidia-smi`'s names: MHz, W and degrees Celsius."""


@dataclass(frozen=True)
class Machine:
    """Readings around a round, as shares of the time of the cores that this process may use.

    None where they can't be read. They say nothing of a GPU, which is not judged by them.
    """

    foreign: float | None
    steal: float | None
    clock_mhz: float | None
    load: float | None

    def is_disturbed(self, highest_clock_mhz: float) -> bool:
        """Whether others used it or its clock fell; judged from these readings, not from a time."""
        slow = self.clock_mhz is not None and self.clock_mhz < CLOCK_LIMIT * highest_clock_mhz
        return slow or (self.foreign or 0) > FOREIGN_LIMIT or (self.steal or 0) > STEAL_LIMIT


class Watch:
    """Reads the machine's state over a stretch of time.

    With `tree` the processes that this one has started are not others.
    """

    def __init__(self, *, tree: bool = False):
        self._cores, self._tree = core_numbers(), tree
        self._start = (time.perf_counter(), _own_seconds(tree=tree), cpu_seconds(self._cores))

    def read(self) -> Machine:
        """The state since this watch was made."""
        wall, own, before = self._start
        elapsed = (time.perf_counter() - wall) * len(self._cores)
        after, clock, load = cpu_seconds(self._cores), self._clock_mhz(), os.getloadavg()[0]
        if before is None or after is None:
            return Machine(None, None, clock, load)
        foreign = (after.busy - before.busy) - (_own_seconds(tree=self._tree) - own)
        steal = (after.steal - before.steal) / elapsed
        return Machine(max(foreign / elapsed, 0.0), steal, clock, load)

    def _clock_mhz(self) -> float | None:
        """The mean clock of these cores; of all where the system does not list each."""
        used = clocks_mhz()
        if len(used) == _configured_cores():
            used = [clock for core, clock in enumerate(used) if core in self._cores] or used
        return sum(used) / len(used) if used else None


def now(device: torch.device) -> float:
    """Seconds of a clock, once the device has done all that it was given."""
    synchronise(device)
    return time.perf_counter()


def synchronise(device: torch.device) -> None:
    """Wait until a device has done all that it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def cores() -> int:
    """Cores that this process may use."""
    return len(core_numbers())


def memory_gib() -> float:
    """Memory of this machine, or what Linux's control groups leave this process of it."""
    limits = [psutil.virtual_memory().total]
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        for _, kinds, place in (line.split(":", 2) for line in lines):
            root = CGROUPS / ("memory" if "memory" in kinds.split(",") else "")
            folder = root / place.lstrip("/")
            # A container sees its own group as the root, whatever its place outside is.
            for group in (folder, *folder.parents):
                limits += _limits(group) if group.is_relative_to(root) else []
    return min(limits) / 2**30


def _limits(group: Path) -> list[int]:
    """The limits of memory in bytes that a control group, of version 2 or 1, says it has."""
    words: list[str] = []
    for name in ("memory.max", "memory.limit_in_bytes"):
        with contextlib.suppress(OSError):
            words.append((group / name).read_text().strip())
    return [int(word) for word in words if word.isdecimal()]


def page_faults() -> int:
    """Pages that the system has mapped for this process without reading a disk."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def _own_seconds(*, tree: bool) -> float:
    """Processor time of this process; with `tree` also of those under it, ended ones included."""
    usages = [resource.getrusage(resource.RUSAGE_SELF)]
    seconds = 0.0
    if tree:
        usages.append(resource.getrusage(resource.RUSAGE_CHILDREN))
        for number in descendants(os.getpid()):
            with contextlib.suppress(psutil.NoSuchProcess):
                times = psutil.Process(number).cpu_times()
                seconds += times.user + times.system + times.children_user + times.children_system
    return seconds + sum(usage.ru_utime + usage.ru_stime for usage in usages)


def core_numbers() -> set[int]:
    """The cores that any thread of this process may use."""
    if not hasattr(os, "sched_getaffinity"):
        return set(range(psutil.cpu_count() or 1))
    # OpenMP may bind the main thread to one core, and each of its others to another.
    numbers: set[int] = set()
    for thread in psutil.Process().threads():
        with contextlib.suppress(ProcessLookupError):  # it has ended since
            numbers |= os.sched_getaffinity(thread.id)
    return numbers


class CpuSeconds(NamedTuple):
    """Seconds since boot that cores were busy, and were taken by the hypervisor."""

    busy: float
    steal: float


def cpu_seconds(numbers: set[int]) -> CpuSeconds | None:
    """Of these cores together; None where the system does not list each, as in some containers."""
    listed = psutil.cpu_times(percpu=True)
    if not numbers or len(listed) != _configured_cores() or max(numbers) >= len(listed):
        return None
    each = [listed[number] for number in numbers]

    def total(*kinds: str) -> float:  # Linux alone has all of them
        return sum(getattr(times, kind, 0.0) for times in each for kind in kinds)

    return CpuSeconds(total("user", "nice", "system", "irq", "softirq"), total("steal"))


def _configured_cores() -> int:
    """Cores of the machine, those that are switched off too: psutil's lists leave them out, so that
    a place in a list is a core's number only where all are on."""
    return os.sysconf("SC_NPROCESSORS_CONF")


def clocks_mhz() -> list[float]:
    """The clock of each core; empty where the system lists none, or not each."""
    try:
        clocks = [each.current for each in psutil.cpu_freq(percpu=True)]
    except (AttributeError, NotImplementedError, OSError):  # as in virtual machines of a Mac
        return []
    return clocks if any(clocks) else []


def gpu(device: torch.device) -> dict[str, str] | None:
    """What `nvidia-smi` reads of a CUDA device now, by the names of `GPU_READINGS`.

    None of another device, and where that program is missing or does not tell all of them.
    """
    if device.type != "cuda":
        return None
    number = f"--id=GPU-{torch.cuda.get_device_properties(device).uuid}"
    query = f"--query-gpu={','.join(GPU_READINGS)}"
    command = ["nvidia-smi", number, query, "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    values = re.split(r",\s*", done.stdout.strip())
    if len(values) != len(GPU_READINGS):
        return None
    return dict(zip(GPU_READINGS, values, strict=True))


def peak_mib() -> float:
    """Highest resident memory of this process so far."""
    path = Path("/proc/self/status")
    if path.exists():
        # getrusage's figure starts at the parent's memory on Linux; VmHWM is this process's own.
        line = next(row for row in path.read_text().splitlines() if row.startswith("VmHWM"))
        return int(line.split()[1]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def threads() -> int:
    """Threads of this process."""
    return psutil.Process().num_threads()


def keep_memory() -> None:
    """Have this process keep the memory that it frees, where the allocator is glibc's.

    By default large blocks go back to the system and are mapped again page by page, as often as the
    order of allocations happens to ask for; the cost differs between processes by more than the
    differences that are timed.
    """
    if platform.libc_ver()[0] == "glibc":
        allocator = ctypes.CDLL(None)
        most_mapped, trim_threshold = -4, -1  # M_MMAP_MAX, M_TRIM_THRESHOLD
        if not (allocator.mallopt(most_mapped, 0) and allocator.mallopt(trim_threshold, -1)):
            raise RuntimeError("the allocator did not take its settings")


def end_with_parent() -> None:
    """Have the kernel end this process when the one that started it dies (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1 is PR_SET_PDEATHSIG


def kill_tree(process: int) -> None:
    """Kill a process and all that it started, whatever their sessions are."""
    for number in (process, *descendants(process)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)


def tree_mib(process: int) -> float:
    """Resident memory of a process and all that it started."""
    used = 0.0
    for number in (process, *descendants(process)):
        with contextlib.suppress(psutil.NoSuchProcess):
            used += psutil.Process(number).memory_info().rss / 2**20
    return used


def descendants(process: int) -> set[int]:
    """All processes under one."""
    if sys.platform != "linux":
        with contextlib.suppress(psutil.NoSuchProcess):
            return {child.pid for child in psutil.Process(process).children(recursive=True)}
        return set()
    # psutil reads every process of the machine, which takes 25 times as long beside what is timed.
    direct: set[int] = set()
    threads: list[str] = []
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended since
        threads = os.listdir(f"/proc/{process}/task")
    for thread in threads:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            listed = Path(f"/proc/{process}/task/{thread}/children").read_text()
            direct |= set(map(int, listed.split()))
    return direct.union(*map(descendants, direct))
