"""Throughput results that can be compared, by model.

Results are shown together, and ranked, only where the machine, the settings of the process and the
protocol were the same (`setting`). A reference was timed beside every model, so it has several
rates: they are shown as their median and range, its rate as the geometric mean and range. On a
machine that others use too, rates of different runs differ by more than their intervals; so the
rate of a model that was timed beside a reference is its ratio times the reference's rate.
"""

import csv
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from benchmarks.kinds import CHECKED, Throughput
from experiments.study.pages import machine, processor
from experiments.study.results import Result, of_kind
from vitx.measure.comparison import Side
from vitx.measure.stats import Interval
from vitx.measure.timing import COMPILES

AUTO = "auto"
SIDES = ("reference", "candidate")
LIBRARIES = {"hf": "transformers", "vit_pytorch": "vit-pytorch", "torchvision": "torchvision"}
"""Whose version stands with a model's name; those of PyTorch and timm stand with the setting."""
Value = TypeVar("Value")


def cells(results: Iterable[Result]) -> list[Throughput]:
    """The latest result of each configuration on each machine and setting, oldest first.

    Of a configuration with the best batch a later result replaces an earlier one, whose batch may
    be another.
    """
    newest: dict[tuple[str, ...], Throughput] = {}
    for result in of_kind(results, Throughput):
        config, comparison = result.comparison.config, result.comparison
        names = (named(result, side) for side in SIDES)
        words = (config.mode, comparison.dtype, config.compile, result.batch_asked)
        key = (setting(result), *names, *words)
        newest.pop(key, None)
        newest[key] = result
    return list(newest.values())


def settings(results: Iterable[Result]) -> list[str]:
    """The settings of the results; a setting's number is its place here, from 1."""
    return list(dict.fromkeys(setting(cell) for cell in cells(results)))


def setting(result: Throughput) -> str:
    """The machine, the settings of the process and the protocol that results share if compared.

    Two GPUs of one type count as one.
    """
    at, config, host = result.environment, result.comparison.config, ""
    if not result.device.startswith("cpu"):
        host = f", CUDA {at.cuda}, host {processor(at)} with {at.cores} cores"
    bound = f" of {at.affinity} cores" if at.affinity not in (None, at.cores) else ""
    made = f", commit {commit(result)}" if result.origin else ""
    processes = config.processes if result.untimed else len(result.comparison.processes)
    freed = "" if config.keep_memory else ", freed memory not kept"
    return (
        f"{machine(result)}{made}{host}, {at.threads} threads{bound}, torch "
        f"{at.versions.get('torch')}, timm {at.versions.get('timm')}, float32 products "
        f"{at.matmul_precision}; {processes} processes of {config.pair_s:g} s, blocks of "
        f"{config.block_s:g} s{freed}, protocol {result.protocol}"
    )


def commit(result: Result) -> str:
    """The commit that made a result, in seven digits."""
    changed = " with changes" if result.environment.dirty else ""
    return str(result.environment.commit)[:7] + changed


def named(result: Throughput, side: str) -> str:
    """A model's name, with the version of its library where that is one of `LIBRARIES`."""
    name: str = getattr(result, side)
    library = LIBRARIES.get(name.partition(":")[0], "")
    version = result.environment.versions.get(library)
    return f"{name} ({library} {version})" if version else name


@dataclass(frozen=True)
class Entry:
    """A model in one configuration, with the results that timed it there.

    A candidate has one result; a reference has one for each model that was timed beside it.
    """

    name: str
    side: str
    place: int
    """The number of its setting."""
    results: list[Throughput]
    beside: "Entry | None" = None
    """Of a candidate with a ratio: its reference."""

    @property
    def result(self) -> Throughput:
        """The latest of its results, for what all have in common."""
        return self.results[-1]

    @property
    def reference(self) -> str:
        """The name of the model that it is, or was timed beside; empty for a model alone."""
        return named(self.result, "reference")

    @property
    def compile(self) -> str:
        """Its compile mode."""
        return self.result.comparison.config.compile

    @property
    def batch(self) -> int:
        """Images of a batch; 0 where the best one is not known."""
        return self.result.comparison.batch

    @property
    def checked(self) -> bool:
        """Whether it computes what its reference does."""
        return self.result.checked == CHECKED

    @property
    def runs(self) -> str:
        """How many runs its numbers are the median and range of; empty for a single one."""
        return f"{len(self.results)} runs" if len(self.results) > 1 else ""

    @property
    def sides(self) -> list[Side]:
        """What each of the results says of this model."""
        sides = (getattr(result.comparison, self.side) for result in self.results)
        return [side for side in sides if side is not None]

    def values(self, of: Callable[[Side], Value | None]) -> list[Value]:
        """One thing that the results say of this model, where they do."""
        return [value for side in self.sides if (value := of(side)) is not None]

    @property
    def has_range(self) -> bool:
        """Whether its rate has an interval or a range, which a single process does not give."""
        if self.beside:
            return self.result.comparison.floor is not None
        return bool(self.runs) or bool(self.values(lambda side: side.rate and side.rate.mean))

    @property
    def label(self) -> str:
        """Its name with its batch and compile mode, for charts."""
        return f"{self.name}, batch {self.batch}, {how(self.compile)}"

    def rate(self) -> Interval:
        """Images per second, comparable with those of the same reference.

        Of a candidate with a ratio that times the reference's rate, with the ratio's interval; of
        several runs the geometric mean, with the lowest and the highest; of one run the mean over
        processes with its interval, whose ends are alike if there is one process.
        """
        ratio = self.result.comparison.ratio
        if self.beside and ratio:
            whole = self.beside.rate().value
            return Interval(ratio.value * whole, ratio.low * whole, ratio.high * whole)
        rates = self.values(lambda side: side.rate)
        means = [rate.mean or Interval(rate.median, rate.median, rate.median) for rate in rates]
        if len(means) == 1:
            return means[0]
        values = [mean.value for mean in means]
        low, high = min(values), max(values)
        return Interval(min(max(statistics.geometric_mean(values), low), high), low, high)


def entries(results: Sequence[Result]) -> list[Entry]:
    """Every model in every configuration: by setting, mode, dtype, reference, compile and batch,
    the reference first, then from the fastest to those that failed."""
    places = {where: number for number, where in enumerate(settings(results), 1)}
    references: dict[tuple[object, ...], Entry] = {}
    ordered: list[tuple[tuple[object, ...], Entry]] = []
    for cell in cells(results):
        comparison, place = cell.comparison, places[setting(cell)]
        reference = named(cell, "reference")
        group = (place, comparison.config.mode, comparison.dtype, reference,
                 COMPILES.index(comparison.config.compile), comparison.batch)  # fmt: skip
        beside = None
        if comparison.ratio and not cell.untimed:
            if group not in references:
                references[group] = Entry(reference, "reference", place, [])
                ordered.append(((*group, False), references[group]))
            beside = references[group]
            beside.results.append(cell)
        entry = Entry(named(cell, "candidate"), "candidate", place, [cell], beside)
        ordered.append(((*group, True), entry))

    def order(item: tuple[tuple[object, ...], Entry]) -> tuple[object, ...]:
        group, entry = item
        speed = 0.0 if entry.result.untimed or not group[-1] else entry.rate().value
        return (*group, -speed, entry.name, entry.result.batch_asked)

    return [entry for _, entry in sorted(ordered, key=order)]


def how(compiled: str) -> str:
    """A compile mode in words."""
    return {"none": "eager", "default": "compiled"}.get(compiled, f"compiled, {compiled}")


def write_csv(results: Sequence[Result], path: Path) -> None:
    """Every number of the results with all its digits, a line for each side; failures too."""
    places = {where: number for number, where in enumerate(settings(results), 1)}
    lines: list[dict[str, object]] = []
    for cell in cells(results):
        comparison, place = cell.comparison, places[setting(cell)]
        ratio = comparison.ratio and asdict(comparison.ratio)
        shared = {"verdict": comparison.verdict, "reason": comparison.reason, "ratio": ratio,
                  "floor": comparison.floor}  # fmt: skip
        sides = {"candidate": None} if cell.untimed else comparison.sides
        for side, measured in sides.items():
            config = comparison.config
            record = {"setting": place, "machine": machine(cell), "model": named(cell, side),
                      "side": side, "reference": named(cell, "reference"), "mode": config.mode,
                      "dtype": comparison.dtype, "compile": config.compile, "device": cell.device,
                      "batch": comparison.batch, "batch_asked": cell.batch_asked,
                      "checked": cell.checked, "commit": cell.environment.commit}  # fmt: skip
            lines.append(record | dict(_flat("", shared | (asdict(measured) if measured else {}))))
    header = list(dict.fromkeys(name for line in lines for name in line))
    with path.open("w", encoding="utf8", newline="") as file:
        writer = csv.DictWriter(file, header)
        writer.writeheader()
        writer.writerows(lines)


def _flat(name: str, value: object) -> Iterator[tuple[str, object]]:
    """Single values within a value under their names joined; what is not known is left out."""
    if isinstance(value, Mapping):
        for key, each in value.items():
            yield from _flat(f"{name}_{key}" if name else key, each)
    elif value is not None:
        yield name, value
