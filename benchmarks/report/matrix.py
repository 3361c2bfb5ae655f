"""What throughput rows say together: which are comparable, and their tables.

Rows are shown together, and ranked, only where the machine, the settings of the process and the
protocol were the same (`setting`). A reference was timed beside every model, so it has several
readings: they are shown as their median and range, its rate as the geometric mean and range. On a
machine that others use too, rates of different runs differ by more than their intervals; so the
rate of a model that was timed beside a reference is its ratio times the reference's rate.
"""

import csv
import hashlib
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.study.pages import Row, Table, floor_text, machine, processor, ratio_text
from vitx.measure import stats
from vitx.measure.breakdown import STAGES
from vitx.measure.timing import COMPILES

Rendering = Callable[[Sequence[Row]], Table]

WHAT = "throughput"
CHECKED = "checked"
AUTO = "auto"
SIDES = ("reference", "candidate")
LIBRARIES = {"hf": "transformers", "vit_pytorch": "vit-pytorch", "torchvision": "torchvision"}
"""Whose version stands with a model's name; those of PyTorch and timm stand with the setting."""
MEASURED = ("images_per_s", "macs", "parameters", "peak_mib", "host_mib", "compile_s",
            "utilisation", "latency", "stages", "phases", "saved", "mean_images_per_s",
            "page_faults")  # fmt: skip
"""Fields that hold a finding of each side."""
QUANTILES = ("p50", "p90", "p99")
"""Of the seconds of single calls."""
MOST_REMAINDER = 0.05
"""Share of a call beyond which what belongs to no stage is marked."""
UNKNOWN_STAGES = "its modules do not have timm's names"


def cells(rows: Sequence[Row]) -> list[Row]:
    """The latest row of each configuration on each machine and setting, oldest first.

    Where the best batch was asked for, a later one that was found replaces an earlier one.
    """
    found: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        if row.get("what") == WHAT:
            names = (_name(row, side) for side in SIDES)
            words = (row[key] for key in ("mode", "dtype", "compile", "batch_asked"))
            key = (setting(row), *names, *words)
            found.pop(key, None)
            found[key] = row
    return list(found.values())


def setting(row: Row) -> str:
    """The machine, the settings of the process and the protocol that rows share if compared.

    Two GPUs of one type count as one.
    """
    environment, plan = row["environment"], row["plan"]
    host = ""
    if not row["device"].startswith("cpu"):
        cpu, cores = processor(environment), environment["cores"]
        host = f", CUDA {environment['cuda']}, host {cpu} with {cores} cores"
    free = environment["affinity"]
    bound = f" of {free} cores" if free not in (None, environment["cores"]) else ""
    versions = environment["versions"]
    commit = f", commit {_commit(row)}" if "origin" in row else ""
    processes = row["processes"] if row["kind"] == "speed" else plan["processes"]
    freed = "" if row.get("keep_memory", True) else ", freed memory not kept"
    return (
        f"{machine(row)}{commit}{host}, {environment['threads']} threads{bound}, torch "
        f"{versions['torch']}, timm {versions['timm']}, float32 products "
        f"{environment['matmul_precision']}; {processes} processes of {plan['pair_s']:g} s, "
        f"blocks of {plan['block_s']:g} s{freed}, protocol {row['protocol']}"
    )


def _commit(row: Row) -> str:
    environment = row["environment"]
    return str(environment.get("commit"))[:7] + (" with changes" if environment["dirty"] else "")


def short(text: str) -> str:
    """Six hexadecimal digits for a setting, or for what a figure shows."""
    return hashlib.sha256(text.encode()).hexdigest()[:6]


def _sides(row: Row) -> tuple[str, ...]:
    """The models that a row tells of: of a failure, and of a model alone, only the candidate."""
    return SIDES if row["kind"] == "speed" and row["reference"] else ("candidate",)


def _name(row: Row, side: str) -> str:
    """A model's name, with the version of its library where that is one of `LIBRARIES`."""
    name = row[side]
    library = LIBRARIES.get(name.partition(":")[0], "")
    version = row["environment"]["versions"].get(library)
    return f"{name} ({library} {version})" if version else name


@dataclass(frozen=True)
class Entry:
    """A model in one configuration, with the rows that timed it there.

    A candidate has one row; a reference has one for each model that was timed beside it.
    """

    name: str
    side: str
    rows: list[Row]
    beside: "Entry | None" = None
    """Of a candidate with a ratio: its reference."""

    @property
    def row(self) -> Row:
        """The latest of its rows, for what all have in common."""
        return self.rows[-1]

    @property
    def reference(self) -> str:
        """The name of the model that it is, or was timed beside; empty for a model alone."""
        return _name(self.row, "reference")

    @property
    def checked(self) -> bool:
        """Whether it was found to compute what its reference does."""
        return self.row["checked"] == CHECKED

    @property
    def runs(self) -> str:
        """What its numbers are the median and range of; empty for a single run."""
        return f"{len(self.rows)} runs" if len(self.rows) > 1 else ""

    @property
    def known(self) -> bool:
        """Whether its rate has an interval or a range, which a single process does not give."""
        if self.beside:
            return self.row["ratio_low"] is not None
        return bool(self.runs) or "mean" in self.of("images_per_s")[0]

    @property
    def label(self) -> str:
        """Its name with its batch and compile mode, for figures."""
        return f"{self.name}, batch {self.row['batch']}, {how(self.row['compile'])}"

    def of(self, what: str) -> list[Any]:
        """What the rows found of this model, where they did."""
        found = ((row.get(what) or {}).get(self.side) for row in self.rows)
        return [value for value in found if value is not None]

    def rate(self) -> tuple[float, float, float]:
        """Images/s with the ends of its interval, comparable with those of the same reference.

        Of a candidate with a ratio that times the reference's rate, with the ratio's interval; of
        several runs the geometric mean, with the lowest and the highest; of one run the mean over
        processes with its interval, whose ends are alike if there is one process.
        """
        if self.beside:
            whole, (value, low, high) = self.beside.rate()[0], self._ratio()
            return value * whole, low * whole, high * whole
        rates = [
            tuple(each.get(name, each["median"]) for name in ("mean", "mean_low", "mean_high"))
            for each in self.of("images_per_s")
        ]
        if len(rates) == 1:
            return rates[0]
        values = [value for value, _, _ in rates]
        low, high = min(values), max(values)
        return min(max(statistics.geometric_mean(values), low), high), low, high

    def _ratio(self) -> tuple[float, float, float]:
        """The ratio and its ends, which of one process are alike."""
        value, low, high = (self.row[key] for key in ("ratio", "ratio_low", "ratio_high"))
        return value, value if low is None else low, value if high is None else high


def entries(rows: Sequence[Row]) -> list[Entry]:
    """Every model in every configuration: by setting, mode, dtype, reference, compile and batch,
    the reference first, then from the fastest to those that failed."""
    found: dict[tuple[Any, ...], Entry] = {}
    places = _places(rows)
    for row in cells(rows):
        for side in _sides(row):
            key = (
                places.index(setting(row)),
                row["mode"],
                row["dtype"],
                _name(row, "reference"),
                COMPILES.index(row["compile"]),
                row["batch"],
                side == "candidate",
                _name(row, side),
                "" if side == "reference" else row["batch_asked"],
            )
            if key not in found:
                whole = (*key[:6], False, _name(row, "reference"), "")
                paired = side == "candidate" and len(_sides(row)) == 2 and row["ratio"] is not None
                beside = found[whole] if paired else None
                found[key] = Entry(_name(row, side), side, [], beside)
            found[key].rows.append(row)

    def place(key: tuple[Any, ...]) -> tuple[Any, ...]:
        return (*key[:-2], -_speed(found[key]), *key[-2:])

    return [found[key] for key in sorted(found, key=place)]


def _speed(entry: Entry) -> float:
    """What ranks models of a configuration."""
    if entry.row["kind"] == "failure":
        return 0.0
    return entry.rate()[0]


def _places(rows: Sequence[Row]) -> list[str]:
    """The settings of the rows."""
    return list(dict.fromkeys(setting(row) for row in cells(rows)))


START = ("setting", "mode", "dtype", "compile", "batch", "model")


def _told(rows: Sequence[Row], *, failures: bool = False) -> Iterator[tuple[Entry, tuple]]:
    """Each entry with the cells under `START`."""
    for entry in entries(rows):
        row = entry.row
        if failures or row["kind"] == "speed":
            words = (row[key] for key in ("mode", "dtype", "compile"))
            yield entry, (short(setting(row)), *words, _batch(entry), entry.name)


def _batch(entry: Entry) -> str:
    """The batch, and whether it was found as the model's best one."""
    row = entry.row
    if entry.side == "reference" or row["batch_asked"] != AUTO:
        return str(row["batch"])
    return f"{row['batch']} ({AUTO})" if row["batch"] else AUTO


def how(compiled: str) -> str:
    """A compile mode in words."""
    return {"none": "eager", "default": "compiled"}.get(compiled, f"compiled, {compiled}")


def settings_table(rows: Sequence[Row]) -> Table:
    """What rows of a setting share, and the commits that they were made by."""
    body = []
    for where in _places(rows):
        here = [row for row in cells(rows) if setting(row) == where]
        commits = dict.fromkeys(_commit(row) for row in here)
        body.append((short(where), str(len(here)), ", ".join(commits), where))
    return Table(("setting", "rows", "commits", "machine, process and protocol"), body)


def summary_table(rows: Sequence[Row]) -> Table:
    """Ratios to the reference: a line a model, a column for each batch and compile mode."""
    columns: dict[tuple[int, int, str], str] = {}
    lines: dict[tuple[str, ...], dict[Any, str]] = {}
    for entry, (place, mode, dtype, compiled, batch, name) in _told(rows, failures=True):
        if entry.side == "reference" or not entry.reference:
            continue
        column = COMPILES.index(compiled), int(entry.row["batch"]), batch
        columns[column] = f"batch {batch}, {how(compiled)}"
        line = lines.setdefault((place, mode, dtype, entry.reference, name), {})
        line[column] = _summary(entry)
    body = [(*line, *(found.get(column, "–") for column in sorted(columns)))
            for line, found in lines.items()]  # fmt: skip
    header = ("setting", "mode", "dtype", "reference", "model")
    return Table((*header, *(columns[column] for column in sorted(columns))), body)


def _summary(entry: Entry) -> str:
    """The ratio with its interval, and what limits it."""
    row = entry.row
    if row["kind"] == "failure":
        return row["verdict"]
    if row["ratio_low"] is None or (entry.checked and row["verdict"] in ("faster", "slower")):
        return ratio_text(row)
    return f"{ratio_text(row)}, {verdict(row)}"


def verdict(row: Row) -> str:
    """What may be said of a ratio: of models whose outputs were not checked, which may compute
    something else, neither faster nor slower."""
    unchecked = row["ratio"] is not None and row["checked"] != CHECKED
    if not unchecked:
        return row["verdict"]
    return "not checked" + (f", {stats.INCONCLUSIVE}" * (row["verdict"] == stats.INCONCLUSIVE))


def throughput_table(rows: Sequence[Row]) -> Table:
    """Each model in each configuration: its rate, and its ratio to the reference; failures too."""
    header = (*START, "images/s (range of runs, or by ratio)", "reference", "ratio (95 %)", "floor",
              "verdict", "outputs")  # fmt: skip
    body = []
    for entry, start in _told(rows, failures=True):
        row = entry.row
        beside = entry.reference or "–"
        reason = f": {row['reason']}" if row["reason"] else ""
        if row["kind"] == "failure":
            body.append((*start, "–", beside, "–", "–", row["verdict"] + reason, "–"))
        elif entry.side == "reference":
            runs = f"reference, {entry.runs}" if entry.runs else "reference"
            body.append((*start, _rate(entry), "–", "–", "–", runs, "–"))
        else:
            ratio = "–" if row["ratio"] is None else ratio_text(row)
            said = verdict(row) + reason
            floor = floor_text(row)
            body.append((*start, _rate(entry), beside, ratio, floor, said, row["checked"]))
    return Table(header, body)


def _rate(entry: Entry) -> str:
    """A rate with its ends; those of a single run, over processes, say nothing of other runs."""
    value, low, high = entry.rate()
    if not entry.known:
        return f"{value:,.1f} (one process)"
    run = "" if entry.beside or entry.runs else ", within a run"
    return f"{value:,.1f} ({low:,.1f} to {high:,.1f}{run})"


def cost_table(rows: Sequence[Row]) -> Table:
    """What each model costs: work, parameters, memory, compiling, and how near the peak it runs.

    Of a reference's several runs the median and the range.
    """
    header = (*START, "GMAC an image forward", "parameters", "peak MiB", "compile s cold",
              "compile s warm", "MFU, in its own run", "peak TFLOP/s")  # fmt: skip
    body = []
    for entry, start in _told(rows):
        compiled = entry.of("compile_s")
        peak = _readings(entry.of("peak_mib"), "{:.0f}")
        host = _readings(entry.of("host_mib"), ", host {:.0f}")
        seconds = (_readings([one[state] for one in compiled], "{:.0f}")
                   for state in ("cold", "warm"))  # fmt: skip
        body.append(
            (
                *start,
                _readings([macs / 1e9 for macs in entry.of("macs")], "{:.3f}"),
                _readings(entry.of("parameters"), "{:,.0f}"),
                peak
                + (host if host != "–" else "")
                + (", compiling included" if compiled and peak != "–" else ""),
                *seconds,
                *_utilisation(entry.of("utilisation")),
            )
        )
    return Table(header, body)


def _readings(values: Sequence[float], form: str) -> str:
    """The median of several readings with their range, one reading as it is, a dash for none."""
    if not values:
        return "–"
    middle, low, high = (form.format(of(values)) for of in (statistics.median, min, max))
    return middle if low == high else f"{middle} ({low} to {high})"


def _utilisation(used: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """The share of the fastest product's rate, or why there is none; and what that rate was."""
    if not used:
        return "–", "–"
    shares = [each["mfu"] for each in used if each["mfu"] is not None]
    said = _readings(shares, "{:.0%}") if shares else used[-1]["why"]
    if 0 < len(shares) < len(used):
        said += f", {len(shares)} of {len(used)} runs steady"
    low, high = min(u["peak_low"] for u in used), max(u["peak_high"] for u in used)
    sheet = used[-1].get("data_sheet")
    known = f", data sheet {sheet / 1e12:.3g}" if sheet else ""
    return said, f"{low / 1e12:.3g} to {high / 1e12:.3g}{known}"


def break_even_table(rows: Sequence[Row]) -> Table:
    """Images after which compiling has paid for itself: its seconds over what it saves an image,
    read from pairs of blocks of the same model, compiled and not, in one process.

    The images' ends are those of what is saved; where they do not tell, nor does the table. Of a
    reference's several runs the median and the range.
    """
    ends = "ms an image (95 % in one process, or range of runs)"
    header = (*START, f"saved {ends}", "cold: images", "warm: images")
    body = []
    for entry, start in _told(rows):
        both = [(saved, seconds) for row in entry.rows
                if (saved := (row.get("saved") or {}).get(entry.side))
                and (seconds := row["compile_s"].get(entry.side))]  # fmt: skip
        if not both:
            continue
        found, seconds = zip(*both, strict=True)
        saved, least, most = interval_of(found)
        if most <= 0:
            images = ["never"] * 2
        elif least <= 0:
            images = ["not told apart"] * 2
        else:
            spent = (statistics.median(each[state] for each in seconds)
                     for state in ("cold", "warm"))  # fmt: skip
            images = [f"{s / saved:,.0f} ({s / most:,.0f} to {s / least:,.0f})" for s in spent]
        text = f"{1e3 * saved:+.3f} ({1e3 * least:+.3f} to {1e3 * most:+.3f})"
        body.append((*start, text, *images))
    return Table(header, body)


def latency_table(rows: Sequence[Row]) -> Table:
    """Milliseconds of single calls with one image, each waited for, in one process: its intervals
    say nothing of other processes. Of a reference's several runs the median and the range."""
    ends = "ms (95 %, or range of runs)"
    header = (*START, "calls of one process", *(f"{name} {ends}" for name in QUANTILES))
    body = []
    for entry, start in _told(rows):
        found = entry.of("latency")
        if not found:
            continue
        calls = _readings([each["calls"] for each in found], "{:,.0f}")
        calls += f", {entry.runs}" if entry.runs else ""
        spans = (interval_of([one[name] for one in found]) for name in QUANTILES)
        texts = (f"{1e3 * v:.2f} ({1e3 * low:.2f} to {1e3 * high:.2f})" for v, low, high in spans)
        body.append((*start, calls, *texts))
    return Table(header, body)


def interval_of(found: Sequence[Mapping[str, float]]) -> tuple[float, float, float]:
    """A value with its interval; of several runs the median and the range."""
    if len(found) == 1:
        value, low, high = (found[0][key] for key in ("value", "low", "high"))
        return value, low, high
    values = [one["value"] for one in found]
    return statistics.median(values), min(values), max(values)


def stage_table(rows: Sequence[Row]) -> Table:
    """Where an eager inference call spends its time, as shares of the sum of its stages, which are
    waited for one by one."""
    header = (*START, "sum of stages ms", *STAGES)
    body = []
    for entry, start in _told(rows):
        row, found = entry.row, entry.of("stages")
        if found:
            shares = _shares(found, STAGES)
            texts = [f"{share:.1%}" for share in shares]
            if abs(shares[STAGES.index("remainder")]) > MOST_REMAINDER:
                texts[STAGES.index("remainder")] += f", above {MOST_REMAINDER:.0%}"
            body.append((*start, _sums(found), *texts))
        elif row["mode"] == "inference" and row["compile"] == "none" and "stages" in row:
            body.append((*start, UNKNOWN_STAGES, *["–"] * len(STAGES)))
    return Table(header, body)


def phase_table(rows: Sequence[Row]) -> Table:
    """Where an eager training step spends its time, as shares of the sum of its phases."""
    phases = ("forward", "backward", "optimizer")
    body = [
        (*start, _sums(found), *(f"{share:.1%}" for share in _shares(found, phases)))
        for entry, start in _told(rows)
        if (found := entry.of("phases"))
    ]
    return Table((*START, "sum of phases ms", *phases), body)


def _sums(found: Sequence[Mapping[str, float]]) -> str:
    return _readings([1e3 * sum(parts.values()) for parts in found], "{:.1f}")


def _shares(found: Sequence[Mapping[str, float]], names: Sequence[str]) -> list[float]:
    """Each part's share of the whole; of several runs the median."""
    return [statistics.median(one[name] / sum(one.values()) for one in found) for name in names]


def mean_table(rows: Sequence[Row]) -> Table:
    """Rates by this protocol, and as timm's benchmark reports them: a mean of one process. Of a
    reference's several runs the median and the range."""
    header = (*START, "images/s over processes", "images/s, mean of 40 calls",
              "apart, in the same run")  # fmt: skip
    body = []
    for entry, start in _told(rows):
        both = [(mean, rate.get("mean", rate["median"])) for row in entry.rows
                if (rate := row["images_per_s"][entry.side])
                and (mean := (row.get("mean_images_per_s") or {}).get(entry.side))]  # fmt: skip
        if both:
            means, rates = zip(*both, strict=True)
            apart = [mean / rate - 1 for mean, rate in both]
            texts = (_readings(values, "{:,.1f}") for values in (rates, means))
            body.append((*start, *texts, _readings(apart, "{:+.1%}")))
    return Table(header, body)


TABLES: dict[str, Rendering] = {
    "throughput-settings": settings_table,
    "throughput-ratios": summary_table,
    "throughput": throughput_table,
    "throughput-costs": cost_table,
    "latency": latency_table,
    "stages": stage_table,
    "phases": phase_table,
    "break-even": break_even_table,
    "means": mean_table,
}


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Every number of timed rows with all its digits, a line for each side; failures too."""
    lines = [dict(_record(row, side)) for row in cells(rows) for side in _sides(row)]
    header = list(dict.fromkeys(name for line in lines for name in line))
    with path.open("w", encoding="utf8", newline="") as file:
        writer = csv.DictWriter(file, header)
        writer.writeheader()
        writer.writerows(lines)


def _record(row: Row, side: str) -> Iterator[tuple[str, Any]]:
    yield from {"setting": short(setting(row)), "machine": machine(row), "model": _name(row, side),
                "side": side, "reference": _name(row, "reference")}.items()  # fmt: skip
    names = ("mode", "dtype", "compile", "device", "batch", "batch_asked", "kind", "verdict",
             "reason", "checked", "ratio", "ratio_low", "ratio_high", "noise_floor")  # fmt: skip
    yield from ((name, row.get(name)) for name in names)
    for what in MEASURED if row["kind"] == "speed" else ():
        yield from flat(what, (row.get(what) or {}).get(side))
    yield "commit", row["environment"].get("commit")


def flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Single values within a value, lists left out, under their names joined."""
    if isinstance(value, Mapping):
        for key, each in value.items():
            yield from flat(f"{name}_{key}" if name else key, each)
    elif value is not None and not isinstance(value, list):
        yield name, value
