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

    def disturbed(self, highest_clock_mhz: float) -> bool:
        """Whether others used it or its clock fell; judged from these readings, not from a time."""
        slow = self.clock_mhz is not None and self.clock_mhz < CLOCK_LIMIT * highest_clock_mhz
        return slow or (self.foreign or 0) > FOREIGN_LIMIT or (self.steal or 0) > STEAL_LIMIT


class Watch:
    """Reads the machine's state over a stretch of time."""

    def __init__(self):
        self._cores = core_numbers()
        self._start = (time.perf_counter(), _own_seconds(), cpu_seconds(self._cores))

    def read(self) -> Machine:
        wall, own, cpu = self._start
        elapsed = (time.perf_counter() - wall) * (len(self._cores) or cores())
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
        now = cpu_seconds(self._cores)
        if cpu is None or now is None:
            return Machine(None, None, self._clock_mhz(), load)
        foreign = (now["busy"] - cpu["busy"]) - (_own_seconds() - own)
        steal = now["steal"] - cpu["steal"]
        return Machine(max(foreign / elapsed, 0.0), steal / elapsed, self._clock_mhz(), load)

    def _clock_mhz(self) -> float | None:
        found = clocks_mhz()
        used = [clock for core, clock in found.items() if core in self._cores] or [*found.values()]
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
    return len(core_numbers()) or os.cpu_count() or 1


def memory_gib() -> float:
    """Memory of this machine, or what Linux's control groups leave this process of it."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        for _, kinds, place in (line.split(":", 2) for line in lines):
            root = CGROUPS / ("memory" if "memory" in kinds.split(",") else "")
            folder = root / place.lstrip("/")
            # A container sees its own group as the root, whatever its place outside is.
            for one in (folder, *folder.parents):
                limits += _limits(one) if one.is_relative_to(root) else []
    return min(limits) / 2**30


def _limits(group: Path) -> list[int]:
    """The limits of memory in bytes that a control group, of version 2 or 1, says it has."""
    found = []
    for name in ("memory.max", "memory.limit_in_bytes"):
        with contextlib.suppress(OSError):
            found.append((group / name).read_text().strip())
    return [int(word) for word in found if word.isdecimal()]


def page_faults() -> int:
    """Pages that the system has mapped for this process without reading a disk."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def _own_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def core_numbers() -> set[int]:
    """The cores that any thread of this process may use; empty where that can't be read."""
    threads = Path("/proc/self/task")
    if not (threads.exists() and hasattr(os, "sched_getaffinity")):
        return set()
    # OpenMP may bind the main thread to one core, and each of its others to another.
    found: set[int] = set()
    for thread in threads.iterdir():
        with contextlib.suppress(ProcessLookupError):  # it has ended since
            found |= os.sched_getaffinity(int(thread.name))
    return found


def cpu_seconds(numbers: set[int]) -> dict[str, float] | None:
    """Seconds since boot that these cores were busy, and were stolen; Linux only.

    None where the system does not list every one of them, as in some containers.
    """
    path = Path("/proc/stat")
    if not path.exists():
        return None
    ours = {f"cpu{core}" for core in numbers}
    lines = [words for line in path.read_text().splitlines() if (words := line.split())]
    each = [[int(word) for word in words[1:9]] for words in lines if words[0] in ours]
    if not ours or len(each) != len(ours):
        return None
    user, nice, system, _, _, irq, softirq, steal = map(sum, zip(*each, strict=True))
    hertz = os.sysconf("SC_CLK_TCK")
    return {"busy": (user + nice + system + irq + softirq) / hertz, "steal": steal / hertz}


def clocks_mhz() -> dict[int, float]:
    """The clock of each core that the system lists; empty where it lists none."""
    path = Path("/proc/cpuinfo")
    text = path.read_text() if path.exists() else ""
    pairs = re.findall(r"^processor\s*: (\d+)$.*?^cpu MHz\s*: ([\d.]+)$", text, re.M | re.S)
    return {int(core): float(clock) for core, clock in pairs}


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
    """Threads of this process (Linux; elsewhere 0)."""
    return len(list(Path("/proc/self/task").glob("*")))


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
    """Resident memory of a process and all that it started (Linux; elsewhere 0)."""
    return sum(_resident_mib(number) for number in (process, *descendants(process)))


def descendants(process: int) -> set[int]:
    """All processes under one, on Linux."""
    threads: list[str] = []
    direct: set[int] = set()
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended since
        threads = os.listdir(f"/proc/{process}/task")
    for thread in threads:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            listed = Path(f"/proc/{process}/task/{thread}/children").read_text()
            direct |= {int(word) for word in listed.split()}
    return direct.union(*(descendants(child) for child in direct))


def _resident_mib(process: int) -> float:
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    found = [int(line.split()[1]) for line in lines if line.startswith("VmRSS")]
    return found[0] / 2**10 if found else 0.0
