"""Tables and figures of throughput rows: what was timed, checked, and where its time goes.

Rows are shown together, and ranked, only where the machine and the settings of the process were the
same; otherwise each has its own lines.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from experiments.pages import Row, Table, floor_text, machine, ratio_text
from vitx import stats, visualize
from vitx.breakdown import STAGES

CELL = ("candidate", "reference", "mode", "batch", "dtype", "compile", "device")
ENVIRONMENT = ("cpu", "gpu", "cuda", "cores", "affinity", "threads", "versions", "matmul_precision")
LIBRARIES = {"hf": "transformers", "vit_pytorch": "vit-pytorch", "torchvision": "torchvision"}
"""Whose version stands with a model's name; those of PyTorch and timm stand with the machine."""


def check(row: Row, where: str) -> None:
    """ValueError if a throughput row lacks what is shown, or claims what its numbers do not say."""
    if row.get("what") != "throughput":
        return
    environment = row["environment"]
    missing = [name for name in CELL if name not in row]
    missing += [f"environment.{name}" for name in ENVIRONMENT if name not in environment]
    if missing:
        raise ValueError(f"{where} is a throughput row without {missing[0]}")
    shown(row, where, TABLES)
    try:
        _recompute(row)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{where} is no whole throughput row: {error!r}") from None


def shown(row: Row, where: str, tables: Mapping[str, Callable[[Sequence[Row]], Table]]) -> None:
    """ValueError if one of the tables can't show the row."""
    try:
        lines = [line for table in tables.values() for line in table([row]).body]
        if not all(isinstance(cell, str) for line in lines for cell in line):
            raise TypeError("a cell is no text")
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{where} is no whole row of kind {row['kind']}: {error!r}") from None


def _recompute(row: Row) -> None:
    """ValueError if ratio, floor and verdict are not those of the processes' log ratios."""
    if row["kind"] != "speed" or row["ratio_low"] is None:
        return
    ratio, floor = stats.paired_ratio(row["log_ratios"]), stats.noise_floor(row["log_ratios_again"])
    found = (ratio.value, ratio.low, ratio.high, floor)
    said = [row[name] for name in ("ratio", "ratio_low", "ratio_high", "noise_floor")]
    verdicts = (stats.speed_verdict(ratio, floor), stats.INCONCLUSIVE)
    same = all(
        math.isclose(one, other, rel_tol=1e-6) for one, other in zip(found, said, strict=True)
    )
    if not same or row["verdict"] not in verdicts:
        raise ValueError("ratio, floor and verdict are not those of its processes")


def cells(rows: Sequence[Row]) -> list[Row]:
    """The latest row of each configuration on each machine and setting."""
    wanted = [row for row in rows if row.get("what") == "throughput"]
    return list({(*_names(row), *_at(row), row["compile"]): row for row in wanted}.values())


def timed(rows: Sequence[Row]) -> list[Row]:
    return [row for row in cells(rows) if row["kind"] == "speed"]


def setting(row: Row) -> str:
    """The machine and the settings of the process that rows must share to be compared."""
    environment = row["environment"]
    host = ""
    if not row["device"].startswith("cpu"):
        cpu, cores = environment["cpu"], environment["cores"]
        host = f", CUDA {environment['cuda']}, host {cpu} with {cores} cores"
    free = environment["affinity"]
    bound = f" of {free} cores" if free not in (None, environment["cores"]) else ""
    versions = environment["versions"]
    changed = " with changes" if environment.get("dirty") else ""
    commit = f", commit {str(environment.get('commit'))[:7]}{changed}" if "origin" in row else ""
    return (
        f"{machine(row)}{commit}{host}, {environment['threads']} threads{bound}, torch "
        f"{versions['torch']}, timm {versions['timm']}, float32 products "
        f"{environment['matmul_precision']}"
    )


def _name(row: Row, side: str) -> str:
    """A model's name, with the version of its library where that is one of `LIBRARIES`."""
    name = row[side]
    library = LIBRARIES.get(name.partition(":")[0], "")
    version = row["environment"]["versions"].get(library)
    return f"{name} ({library} {version})" if version else name


def _names(row: Row) -> tuple[str, str]:
    return _name(row, "candidate"), _name(row, "reference")


def throughput_table(rows: Sequence[Row]) -> Table:
    """Every configuration: rate with its interval, ratio to the reference, cost; failures too."""
    header = ("model", "mode", "batch", "dtype", "compile", "images/s (95 %)", "reference",
              "its images/s (95 %)", "ratio (95 %)", "floor", "verdict", "outputs",
              "GMAC (reference)", "parameters (reference)", "peak MiB", "compile s",
              "MFU (peak)", "machine")  # fmt: skip
    body = []
    for row in cells(rows):
        candidate, name = _names(row)
        start = (candidate, row["mode"], str(row["batch"] or "auto"), row["dtype"], row["compile"])
        name = name or "–"
        if row["kind"] == "failure":
            said = f"{row['verdict']}: {row['reason']}"
            body.append((*start, "–", name, *["–"] * 3, said, *["–"] * 6, setting(row)))
            continue
        body.append(
            (*start, _rate(row, "candidate"), name, _rate(row, "reference"),
             "–" if row["ratio_low"] is None else ratio_text(row), floor_text(row), row["verdict"],
             row["checked"].partition(":")[0], *_cost(row), setting(row))
        )  # fmt: skip
    return Table(header, body)


def _cost(row: Row) -> tuple[str, ...]:
    side = "candidate"
    peak, compiled = (row[key].get(side) for key in ("peak_mib", "compile_s"))
    host = row.get("host_mib", {}).get(side)
    used = row["utilisation"].get(side)
    return (
        _both(row["macs"], lambda macs: f"{macs / 1e9:.3f}"),
        _both(row["parameters"], lambda number: f"{number:,}"),
        "–" if peak is None else f"{peak:.0f}" + (f", host {host:.0f}" if host else ""),
        f"{compiled['cold']:.0f} cold, {compiled['warm']:.0f} warm" if compiled else "–",
        _utilisation(used) if used else "–",
    )


def _utilisation(used: Mapping[str, Any]) -> str:
    """The share of the fastest product's rate, or why there is none; and what a data sheet says."""
    low, high = (f"{used[f'peak_{end}'] / 1e12:.3g}" for end in ("low", "high"))
    said = used["why"] if used["mfu"] is None else f"{used['mfu']:.0%}"
    sheet = used.get("data_sheet")
    known = f", data sheet {sheet / 1e12:.3g}" if sheet else ""
    return f"{said} ({low} to {high}{known} TFLOP/s)"


def _both(values: Mapping[str, Any], text: Callable[[Any], str]) -> str:
    """The candidate's value, and in brackets the reference's."""
    mine, other = (values.get(side) for side in ("candidate", "reference"))
    return (text(mine) if mine else "–") + (f" ({text(other)})" if other else "")


def _rate(row: Row, side: str) -> str:
    rate = row["images_per_s"].get(side)
    if rate is None:
        return "–"
    return _interval(rate) if "mean" in rate else f"{rate['median']:,.1f} (one process)"


def _interval(rate: Mapping[str, float]) -> str:
    return f"{rate['mean']:,.1f} ({rate['mean_low']:,.1f} to {rate['mean_high']:,.1f})"


def break_even_table(rows: Sequence[Row]) -> Table:
    """Images after which compiling has paid for itself, beside the same model not compiled.

    Only where the intervals of both rates do not meet: else it is not known whether it ever does.
    """
    header = ("model", "mode", "batch", "dtype", "compile", "saved ms an image", "cold: images",
              "warm: images", "machine")  # fmt: skip
    found = timed(rows)
    eager = {_at(row): row for row in found if row["compile"] == "none"}
    body = []
    for row in found:
        plain, seconds = eager.get(_at(row)), row["compile_s"].get("candidate")
        if row["compile"] == "none" or plain is None or not seconds:
            continue
        rates = [one["images_per_s"]["candidate"] for one in (plain, row)]
        if not all("mean" in rate for rate in rates):
            continue
        saved = 1 / rates[0]["mean"] - 1 / rates[1]["mean"]
        if rates[0]["mean_low"] > rates[1]["mean_high"]:
            images = ["never", "never"]
        elif rates[1]["mean_low"] > rates[0]["mean_high"]:
            images = [f"{seconds[start] / saved:,.0f}" for start in ("cold", "warm")]
        else:
            images = ["not told apart"] * 2
        body.append(
            (_name(row, "candidate"), row["mode"], str(row["batch"]), row["dtype"], row["compile"],
             f"{1e3 * saved:+.2f}", *images, setting(row))
        )  # fmt: skip
    return Table(header, body)


def _at(row: Row) -> tuple[Any, ...]:
    """A configuration but for how it is compiled."""
    return (*_names(row), *(row[key] for key in CELL if key != "compile"), setting(row))


def latency_table(rows: Sequence[Row]) -> Table:
    """Milliseconds of single calls with one image in one process, each waited for."""
    header = ("model", "dtype", "compile", "calls, one process", "p50 ms (95 %)", "p90 ms (95 %)",
              "p99 ms (95 %)", "machine")  # fmt: skip
    body = []
    for row in timed(rows):
        for name, found in _details(row, "latency"):
            quantiles = [
                f"{1e3 * q['value']:.2f} ({1e3 * q['low']:.2f} to {1e3 * q['high']:.2f})"
                for q in (found[key] for key in ("p50", "p90", "p99"))
            ]
            body.append(
                (name, row["dtype"], row["compile"], str(found["calls"]), *quantiles, setting(row))
            )
    return Table(header, _once(body))


def stage_table(rows: Sequence[Row]) -> Table:
    """Where an eager inference call spends its time, as shares."""
    header = ("model", "batch", "dtype", "call ms", *STAGES, "machine")
    body = []
    for row in timed(rows):
        for name, found in _details(row, "stages"):
            whole = sum(found.values())
            shares = [f"{found[stage] / whole:.1%}" for stage in STAGES]
            body.append(
                (name, str(row["batch"]), row["dtype"], f"{1e3 * whole:.1f}", *shares, setting(row))
            )
    return Table(header, _once(body))


def phase_table(rows: Sequence[Row]) -> Table:
    """Where an eager training step spends its time, as shares."""
    header = ("model", "batch", "dtype", "step ms", "forward", "backward", "optimizer", "machine")
    body = []
    for row in timed(rows):
        for name, found in _details(row, "phases"):
            whole = sum(found.values())
            shares = [f"{found[phase] / whole:.1%}" for phase in ("forward", "backward",
                      "optimizer")]  # fmt: skip
            body.append(
                (name, str(row["batch"]), row["dtype"], f"{1e3 * whole:.1f}", *shares, setting(row))
            )
    return Table(header, _once(body))


def mean_table(rows: Sequence[Row]) -> Table:
    """Rates by this protocol, and as timm's benchmark reports them: a mean of one process."""
    header = ("model", "mode", "batch", "dtype", "compile", "images/s, over processes (95 %)",
              "images/s, mean of 40 calls", "apart", "machine")  # fmt: skip
    body = []
    for row in timed(rows):
        for name, found in _details(row, "mean_images_per_s"):
            side = "candidate" if name == _name(row, "candidate") else "reference"
            rate = row["images_per_s"][side]
            if "mean" in rate:
                body.append(
                    (name, row["mode"], str(row["batch"]), row["dtype"], row["compile"],
                     _interval(rate), f"{found:,.1f}", f"{found / rate['mean'] - 1:+.1%}",
                     setting(row))
                )  # fmt: skip
    return Table(header, _once(body, 5))


def _details(row: Row, what: str) -> list[tuple[str, Any]]:
    """Each side's name and finding, where there is one."""
    found = row.get(what) or {}
    sides = ("reference", "candidate")
    return [(_name(row, side), found[side]) for side in sides if found.get(side)]


def _once(body: list[tuple[str, ...]], named: int = 3) -> list[tuple[str, ...]]:
    """The last line of each model and setting, told by its first cells and its machine.

    A reference stands in many rows.
    """
    return list({(*line[:named], line[-1]): line for line in body}.values())


TABLES: dict[str, Callable[[Sequence[Row]], Table]] = {
    "throughput": throughput_table,
    "latency": latency_table,
    "stages": stage_table,
    "phases": phase_table,
    "break-even": break_even_table,
    "means": mean_table,
}


def figures(rows: Sequence[Row]) -> dict[str, Figure]:
    """Every figure that the rows support, by name; one for each machine, mode and dtype."""
    found: dict[str, Figure] = {}
    places = list(dict.fromkeys(setting(row) for row in timed(rows)))
    for number, where in enumerate(places, 1):
        here = [row for row in timed(rows) if setting(row) == where]
        end = f"-{number}" if len(places) > 1 else ""
        for mode, dtype in dict.fromkeys((row["mode"], row["dtype"]) for row in here):
            some = [row for row in here if (row["mode"], row["dtype"]) == (mode, dtype)]
            title = f"{mode}, {dtype}: {where}"
            for name, drawn in _drawn(some, title).items():
                found[f"{name}-{mode}-{dtype}{end}"] = drawn
    return found


def _drawn(rows: Sequence[Row], title: str) -> dict[str, Figure]:
    drawn = {"throughput": visualize.rates(_by_batch(rows), title=title)}
    paired = [row for row in rows if row["ratio_low"] is not None]
    for reference in dict.fromkeys(row["reference"] for row in paired):
        bars = [
            visualize.Bar(_label(row), row["ratio"], row["ratio_low"], row["ratio_high"],
                          row["noise_floor"])
            for row in paired
            if row["reference"] == reference
        ]  # fmt: skip
        name = "ratios" if reference == paired[0]["reference"] else f"ratios-{len(drawn)}"
        label = f"images/s over {reference}"
        drawn[name] = visualize.ratios(bars, title=title, label=label)
    used = [(row["candidate"], row["utilisation"]["candidate"]) for row in rows
            if row["utilisation"].get("candidate", {}).get("bytes")]  # fmt: skip
    if used:
        drawn["roofline"] = visualize.roofline(
            [(name, found["flops"] / found["bytes"], found["flops"]) for name, found in used],
            peak=max(found["peak_high"] for _, found in used),
            bandwidth=max(found["bandwidth"] for _, found in used),
            title=title,
        )
    quantiles = {
        f"{name}\ncompile {row['compile']}": found
        for row in rows
        for name, found in _details(row, "latency")
    }
    if quantiles:
        drawn["latency"] = visualize.latencies(quantiles, title=title)
    memory = {_label(row): row["peak_mib"]["candidate"] for row in rows
              if row["peak_mib"].get("candidate") is not None}  # fmt: skip
    if memory:
        where = "the process" if rows[0]["device"].startswith("cpu") else "the device"
        label = f"peak MiB of {where}"
        drawn["memory"] = visualize.amounts(memory, label=label, title=title)
    return drawn


def _by_batch(rows: Sequence[Row]) -> dict[str, list[tuple[int, float, float, float]]]:
    """For each model and compile mode: batch, rate and the ends of its interval.

    Of a reference, which was timed with every model, the geometric mean of its rates, and the
    lowest and the highest end of their intervals.
    """
    found: dict[str, dict[int, list[tuple[float, float, float]]]] = {}
    for row in rows:
        for side, rate in row["images_per_s"].items():
            value, low, high = (
                rate.get(key, rate["median"]) for key in ("mean", "mean_low", "mean_high")
            )
            name = f"{_name(row, side)}, compile {row['compile']}"
            found.setdefault(name, {}).setdefault(row["batch"], []).append((value, low, high))
    return {
        name: [(batch, *_span(points[batch])) for batch in sorted(points)]
        for name, points in found.items()
    }


def _span(rates: Sequence[tuple[float, float, float]]) -> tuple[float, float, float]:
    values, lows, highs = zip(*rates, strict=True)
    return statistics.geometric_mean(values), min(lows), max(highs)


def _label(row: Row) -> str:
    return f"{_name(row, 'candidate')}\nbatch {row['batch']}, compile {row['compile']}"


def write(
    rows: Sequence[Row],
    folder: Path,
    *,
    tables: Mapping[str, Callable[[Sequence[Row]], Table]] = TABLES,
    pictures: str = ".svg",
) -> list[Path]:
    """Every table as markdown and CSV, every figure as SVG or PNG; the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, table in tables.items():
        shown = table(rows)
        if not shown.body:
            continue
        paths.append(folder / f"{name}.md")
        paths[-1].write_text(shown.markdown() + "\n", encoding="utf8")
        paths.append(folder / f"{name}.csv")
        shown.write_csv(paths[-1])
    for name, figure in figures(rows).items():
        paths.append(visualize.save(figure, folder / f"{name}{pictures}"))
    return paths
