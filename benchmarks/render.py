"""Tables and figures from rows: those of a run's report, and those of README from committed rows.

`python -m benchmarks.render` rewrites the marked parts of README.md and benchmarks/README.md, and
the figures, from `benchmarks/results`; no number in them is typed by hand.
"""

import re
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Annotated, Any

import tyro
from matplotlib.figure import Figure

from benchmarks import calibration, check, gate, pack, pretrained
from benchmarks.mutants import Score
from benchmarks.report import charts, claims, matrix
from benchmarks.report.matrix import SIDES
from benchmarks.report.plots import Bar, ratios
from experiments import cli
from experiments.recipes import DIGITS
from experiments.study import pages
from experiments.study import rows as rows_file
from experiments.study.pages import (
    MACHINE,
    Columns,
    Row,
    Table,
    floor_text,
    machine,
    ratio_text,
    table,
)
from vitx.measure.equality import largest
from vitx.measure.stats import mean_interval
from vitx.pictures import save
from vitx.training import tracking

ROOT = pages.ROOT
RESULTS = ROOT / "benchmarks" / "results"
FIGURE = RESULTS / "speed.svg"
READMES = (ROOT / "README.md", ROOT / "benchmarks" / "README.md")
NOT_MEASURED = "not measured: run `python -m benchmarks --device cuda`"
FIGURES = "<!-- figures -->"
"""Where a page has the figures of throughput rows."""
LABELS = {"reference": "timm", "candidate": "vitx"}
UNCOUNTED = "not counted"
PLANTED_BUGS = "bugs of one word, planted in the source, that this check catches"
TRIALS = "trials in which this timing saw a difference"
NO_TRIALS = "not measured: run `python -m benchmarks --calibrate 120 --device cuda`"


def model_name(row: Row) -> str:
    """timm's short name of the compared model, such as vit_tiny_patch16_224."""
    return row["reference"].partition(":")[2]


def _memory(row: Row) -> str:
    """What a timed process did with the memory that it freed."""
    return "kept" if row["keep_memory"] else "by default"


CONFIGURATION: Columns = {
    "model": model_name,
    "mode": itemgetter("mode"),
    "compile": itemgetter("compile"),
    "batch": lambda row: str(row["batch"]),
    "freed memory": _memory,
}
FLOOR: Columns = {"floor": floor_text}
VERDICT: Columns = FLOOR | {"verdict": itemgetter("verdict")}
RATIO: Columns = {"images/s ratio (95 %)": ratio_text}
WHERE: Columns = {"machine": machine}


def standing(rows: Sequence[Row], *keys: str, **said: Any) -> list[Row]:
    """Of the rows that say this the latest on each machine, of each value of `keys`."""
    wanted = [row for row in rows if all(row.get(name) == said[name] for name in said)]
    return rows_file.latest(wanted, *keys, "device", *MACHINE)


def speed_rows(rows: Sequence[Row]) -> list[Row]:
    """The latest speed or failure row of each configuration on each machine."""
    kinds = ("speed", "failure")
    wanted = [
        row for row in rows if row["kind"] in kinds and row.get("candidate", "")[:5] == "vitx:"
    ]
    # Not the failure of a training, nor what another program has timed.
    wanted = [row for row in wanted if "mode" in row and "what" not in row]
    wanted = [{"keep_memory": False} | row for row in wanted]  # rows made before there was a choice
    found = standing(wanted, "reference", "mode", "compile", "keep_memory", "dtype", "batch")
    return sorted(
        found,
        key=lambda row: (
            row["mode"],
            row["compile"] != "none",
            _size(row),
            row["batch"],
            not row["keep_memory"],
        ),
    )


def claimed(rows: Sequence[Row]) -> list[Row]:
    """Of `speed_rows` those that stand for their configuration: timed with freed memory kept."""
    return [row for row in speed_rows(rows) if row["keep_memory"]]


def speed_table(rows: Sequence[Row]) -> Table:
    """Ratios with intervals, floors and verdicts, a line a configuration."""
    return table(speed_rows(rows), CONFIGURATION | RATIO | VERDICT | WHERE)


def cost_table(rows: Sequence[Row]) -> Table:
    """What each side of a timing cost: images/s, work, memory, compile seconds."""
    sides = [
        row | {"side": side}
        for row in speed_rows(rows)
        for side in SIDES
        if side in row["images_per_s"]
    ]
    columns: Columns = {
        "side": lambda row: LABELS[row["side"]],
        "images/s, median (10 to 90 % of blocks)": _rate,
        "page faults": _faults,
        "GMAC forward": lambda r: f"{r['macs'][r['side']] / 1e9:.3f}" if r["macs"] else UNCOUNTED,
        "peak MiB": lambda r: f"{r['peak_mib'][r['side']]:.0f}" if r["peak_mib"] else "–",
        "compile s": _compile_seconds,
    }
    return table(sides, CONFIGURATION | WHERE | columns)


def _rate(row: Row) -> str:
    rate = row["images_per_s"][row["side"]]
    return f"{rate['median']:.1f} ({rate['low']:.1f} to {rate['high']:.1f})"


def _faults(row: Row) -> str:
    return f"{row['page_faults'][row['side']]:,.0f}" if "page_faults" in row else UNCOUNTED


def _compile_seconds(row: Row) -> str:
    seconds = row["compile_s"].get(row["side"])
    return f"{seconds['cold']:.0f} cold, {seconds['warm']:.0f} warm" if seconds else "–"


def equality_table(rows: Sequence[Row]) -> Table:
    """float64 errors of outputs and gradients, a line a model."""
    columns: Columns = {
        "model": model_name,
        "outputs": lambda row: f"{float(row['equality']['output_error']):.0e}",
        "gradients": lambda row: f"{float(row['equality']['gradient_error']):.0e}",
        "tensors": lambda row: str(row["equality"]["gradients"]),
        "parameters": lambda row: f"{row['equality']['parameters_candidate']:,}",
        "verdict": itemgetter("verdict"),
    }
    return table(standing(rows, "reference", kind="equality"), columns | WHERE)


def mutant_table(scores: Sequence[Score]) -> Table:
    """Which check caught each planted bug, and both counts."""
    header = ("planted bug", "this check", "default init, logits, 1e-4")
    body = [
        (
            score.mutant.name,
            "caught" if score.caught else "MISSED",
            "caught" if score.caught_by_common_check else "missed",
        )
        for score in scores
    ]
    ours, common = (sum(counts) for counts in zip(
        *((score.caught, score.caught_by_common_check) for score in scores), strict=True
    ))  # fmt: skip
    return Table(header, [*body, ("all", f"{ours} of {len(body)}", f"{common} of {len(body)}")])


def accuracy_table(rows: Sequence[Row]) -> Table:
    """Test accuracy of both sides with intervals over seeds, and the equivalence test."""
    header = ("data", "side", "seeds", "test accuracy (95 % over seeds)",
              "standard error of the test set", "seconds a seed", "machine",
              "equivalence to timm")  # fmt: skip
    body = []
    for row in standing(rows, "data", kind="accuracy"):
        images, where = row.get("test_images", DIGITS.data.test), machine(row)
        for side in reversed(SIDES):
            mean = mean_interval(row[f"{side}_values"])
            text = f"{mean.value:.2%} ({mean.low:.2%} to {mean.high:.2%})"
            seconds = f"{row[f'{side}_seconds']:.0f}" if f"{side}_seconds" in row else "–"
            said = _equivalence_test(row) if side == "candidate" else ""
            body.append((row["data"], LABELS[side], str(row["seeds"]), text,
                         _standard_error(mean.value, images), seconds, where, said))  # fmt: skip
        if row["svm"] is not None:
            error = _standard_error(row["svm"], images)
            body.append((row["data"], "RBF SVM on pixels", "–", f"{row['svm']:.2%}", error, "–",
                         where, ""))  # fmt: skip
    return Table(header, body)


def _equivalence_test(row: Row) -> str:
    """The verdict of the equivalence test, with the numbers behind it where there is one."""
    if not _tested(row):
        return row["verdict"]
    difference, low, high = (f"{100 * row[name]:+.2f}" for name in ("difference", "low", "high"))
    return (
        f"{row['verdict']} within {100 * row['margin']:.1f} point: difference {difference} "
        f"(90 % {low} to {high}), p = {row['p_equivalence']:.1g}"
    )


def _standard_error(accuracy: float, images: int) -> str:
    """Binomial standard error of an accuracy on that many images."""
    return f"{100 * (accuracy * (1 - accuracy) / images) ** 0.5:.2f} points"


def plant_table(rows: Sequence[Row]) -> Table:
    """Controls of the protocol: a slowdown of counted size, and timm against itself."""
    wanted = [row for row in rows if row["kind"] in ("plant", "noise") and "what" not in row]
    columns: Columns = {
        "control": itemgetter("candidate"),
        "expected by MACs": lambda row: f"{1 / (1 + row['planted_counted']):.3f}",
    }
    return table(standing(wanted, "candidate"), columns | RATIO | VERDICT | WHERE)


def pilot_table(rows: Sequence[Row]) -> Table:
    """Standard deviations over the pilot's seeds, and the seeds that the margin needs."""
    columns: Columns = {
        "pilot seeds a side": lambda row: str(row["seeds"]),
        "std of timm": lambda row: f"{100 * row['reference_std']:.2f} points",
        "std of vitx": lambda row: f"{100 * row['candidate_std']:.2f} points",
        "margin": lambda row: f"{100 * row['margin']:.1f} points",
        "seeds for 90 % power": lambda row: str(row["seeds_needed"]),
    }
    return table(standing(rows, kind="calibration", what="pilot"), columns | WHERE)


def step_table(rows: Sequence[Row]) -> Table:
    """Whole training steps, data included, in pairs."""

    def rate(side: str) -> Callable[[Row], str]:
        return lambda row: (
            f"{row['images_per_s'][side]['median']:,.0f}" if row["images_per_s"] else "–"
        )

    columns: Columns = {
        **{name: itemgetter(name) for name in ("reference", "candidate", "compile")},
        **{f"{side} images/s": rate(side) for side in SIDES},
        "ratio (95 %)": ratio_text,
    }
    return table(standing(rows, "comparison", what="step"), columns | VERDICT | WHERE)


def whole_table(rows: Sequence[Row]) -> Table:
    """What surrounds the arithmetic of a step, and the time before the first one."""
    body = []
    for row in standing(rows, what="start"):
        least, most = min(row["seconds"]), max(row["seconds"])
        found = f"{statistics.median(row['seconds']):.1f} s ({least:.1f} to {most:.1f})"
        body.append(("from the start of the program to the end of the first step, median (range)",
                     found, machine(row)))  # fmt: skip
    for row in standing(rows, "comparison", what="step", kind="speed"):
        if row["data_share"] is not None:
            found = f"{row['data_share']:.1%}"
            body.append(("reading and varying a batch, of the step's time", found, machine(row)))
        if row["comparison"] == "wandb":
            low, value, high = (1 / row[f"ratio{end}"] - 1 for end in ("_high", "", "_low"))
            found = f"{value:+.1%} ({low:+.1%} to {high:+.1%})"
            body.append(("time that W&B offline adds (95 %)", found, machine(row)))
        if row["comparison"] == "epoch":
            seconds = 50_000 / row["images_per_s"]["reference"]["median"]
            said = "100 epochs of plain PyTorch with its test curve, projected from one run's rate"
            body.append((said, f"{100 * seconds:,.0f} s", machine(row)))
    return Table(("scratch-cifar10, 50,000 images in memory", "measured", "machine"), body)


def gate_table(rows: Sequence[Row]) -> Table:
    """Commits beside others: ratio, floor, and whether the gate let them pass."""
    columns: Columns = {
        "commit": lambda row: row["candidate"][:7],
        "against": lambda row: row["reference"][:7],
        "model": itemgetter("model"),
        "mode": itemgetter("mode"),
        "batch": lambda row: str(row["batch"]),
    }
    judged: Columns = {"threshold": lambda row: f"{row['threshold']:.0%}", "gate": gate.result}
    settings = ("model", "mode", "batch", "processes", "seconds", "block_s")
    found = standing(rows, "candidate", "reference", *settings, what=gate.WHAT)
    return table(found, columns | {"processes": _processes} | RATIO | FLOOR | judged | WHERE)


def _processes(row: Row) -> str:
    """How many processes the gate timed, and how long, where its row says so."""
    if "seconds" not in row:
        return str(row["processes"])
    return f"{row['processes']} of {row['seconds']:g} s, blocks of {row['block_s']:g} s"


def pretrained_table(rows: Sequence[Row]) -> Table:
    """Accuracy of the same weights in timm and in vitx."""
    found = standing(rows, "reference", "weights", "data", "images", kind="pretrained")
    columns: Columns = {
        "model": lambda row: row[row["side"]],
        "weights": itemgetter("weights"),
        "data": itemgetter("data"),
        "images": lambda row: f"{row['images']:,}",
        "top-1 (standard error)": lambda row: pretrained.accuracy_text(row, row["side"]),
        "top-5": lambda row: f"{row['top5'][row['side']]:.2%}",
        "predictions identical": lambda row: f"{row['identical']:,} of {row['images']:,}",
        "images/s": lambda row: f"{row['images_per_s'][row['side']]:,.1f}",
    }
    return table([row | {"side": side} for row in found for side in SIDES], columns | WHERE)


def check_table(rows: Sequence[Row]) -> Table:
    """What a device computes beside a CPU, and whether it lies within its band."""
    body = [
        (machine(row), *line)
        for row in standing(rows, kind="check")
        for line in check.findings(row)
    ]
    return Table(("machine", "compared with a CPU", "apart", "band", "within it"), body)


def headline(rows: Sequence[Row]) -> Table:
    """The verdict table: a line a claim; a column for each kind of device and packed file."""
    evidence, columns = _evidence(rows), _machines(rows)
    machines = [columns[column] for column in sorted(columns)]
    claims: dict[str, dict[str, list[str]]] = {}
    for row in evidence:
        claim, said = _claim(row, rows)
        claims.setdefault(claim, {}).setdefault(machine(row), []).append(said)
    unmeasured = [] if {kind for kind, _ in columns} - {"cpu"} else ["CUDA"]
    body = []
    for claim, found in claims.items():
        cells = ("; ".join(found.get(name, ["–"])) for name in machines)
        # The planted bugs are in the source, and score the check itself.
        missing = "–" if claim == PLANTED_BUGS else NOT_MEASURED
        body.append((claim, *cells, *(missing for _ in unmeasured)))
    series = [calibration.whole([row for row in rows if _column(row) == column])
              for column in sorted(columns)]  # fmt: skip
    if any(series):
        cells = (calibration.summary(trials) if trials else "–" for trials in series)
        body.append((TRIALS, *cells, *(NO_TRIALS for _ in unmeasured)))
    return Table(("claim", *machines, *unmeasured), body)


def _machines(rows: Sequence[Row]) -> dict[tuple[str, str], str]:
    """The machine that stands for each kind of device and packed file in verdict table and figure:
    the one that most claims were measured on, the later one if they are equal. The other tables
    show all."""
    evidence = _evidence(rows)
    counts = Counter(machine(row) for row in evidence)
    found: dict[tuple[str, str], str] = {}
    for row in sorted(evidence, key=rows_file.when):
        column, name = _column(row), machine(row)
        if counts[name] >= counts[found.get(column, "")]:
            found[column] = name
    return found


def _column(row: Row) -> tuple[str, str]:
    """The kind of device and the packed file that a row is of."""
    return row.get("device", "cpu").partition(":")[0], row.get("origin", "")


def _evidence(rows: Sequence[Row]) -> list[Row]:
    """The rows behind the verdict table, in its order."""
    return [
        *standing(rows, kind="equality"),
        *standing(rows, kind="calibration", what="mutants"),
        *claimed(rows),
        *standing(rows, "data", kind="accuracy"),
    ]


def _claim(row: Row, rows: Sequence[Row]) -> tuple[str, str]:
    """A row's line in the verdict table: the claim, and what was found."""
    if row["kind"] == "equality":
        same = [r for r in rows if r["kind"] == "equality" and machine(r) == machine(row)]
        equal = rows_file.latest(same, "reference")
        errors = [
            float(r["equality"][key]) for r in equal for key in ("output_error", "gradient_error")
        ]
        passed = sum(r["verdict"] == "equal" for r in equal)
        said = f"{passed} of {len(equal)} models, largest relative error {largest(errors):.0e}"
        return "float64 outputs and all gradients equal timm's", said
    if row["kind"] == "calibration":
        common = f"{row['caught_by_common_check']} of {row['planted']}"
        other = f"comparing logits at default init to 1e-4: {common}"
        said = f"{row['caught']} of {row['planted']} ({other})"
        return PLANTED_BUGS, said
    if row["kind"] == "accuracy":
        mean = mean_interval(row["candidate_values"])
        said = (
            f"{mean.value:.2%} ({mean.low:.2%} to {mean.high:.2%}), {row['seeds']} seeds; "
            f"{_equivalence_text(row)}"
        )
        return f"test accuracy on {row['data']}, from scratch", said
    how = "eager" if row["compile"] == "none" else "compiled"
    said = f"{_size(row)}, batch {row['batch']}: {ratio_text(row)}"
    if row["noise_floor"] is not None:
        said += f", floor {floor_text(row)}, {row['verdict']}"
    return f"images/s over timm's, {row['mode']}, {how}", said


def _equivalence_text(row: Row) -> str:
    within = f" to timm within {100 * row['margin']:.0f} point"
    return row["verdict"] + (within if _tested(row) else "")


def _tested(row: Row) -> bool:
    """Whether a row of accuracy has a test of equivalence that says something."""
    return isinstance(row["low"], float) and row["verdict"] != claims.NO_VERDICT


def _size(row: Row) -> str:
    """ViT-Ti/16 for vit_tiny_patch16_224."""
    sizes = {"tiny": "Ti", "small": "S", "base": "B", "large": "L", "huge": "H"}
    found = re.search(r"_(\w+?)_patch(\d+)", model_name(row))
    return f"ViT-{sizes.get(found[1], found[1])}/{found[2]}" if found else model_name(row)


def speed_figure(rows: Sequence[Row]) -> Figure:
    """A forest plot of what was timed on the verdict table's machines, with their names where there
    are several."""
    shown = _machines(rows).values()
    timed = [r for r in claimed(rows) if r["ratio"] is not None and machine(r) in shown]
    several = len({machine(row) for row in timed}) > 1
    bars = [
        Bar(
            f"{model_name(row).removesuffix('_224')}\n{row['mode']}, batch {row['batch']}, "
            f"compile {row['compile']}" + (f"\n{machine(row)}" if several else ""),
            row["ratio"],
            row["ratio_low"],
            row["ratio_high"],
            row["noise_floor"],
        )
        for row in timed
    ]
    return ratios(bars, title="vitx over timm on the same weights")


TABLES: dict[str, Callable[[Sequence[Row]], Table]] = {
    "headline": headline,
    "speed": speed_table,
    "cost": cost_table,
    "equality": equality_table,
    "accuracy": accuracy_table,
    "plant": plant_table,
    "pilot": pilot_table,
    "steps": step_table,
    "whole": whole_table,
    "calibration": calibration.table,
    "gate": gate_table,
    "check": check_table,
    "pretrained": pretrained_table,
    **matrix.TABLES,
}


def fill(text: str, rows: Sequence[Row]) -> str:
    """Fill the marked parts of a page: tables, and all figures of throughput rows."""
    text = pages.fill(text, TABLES, rows)
    if FIGURES not in text:
        return text
    shown = "\n\n".join(f"![{name}](results/{name}.svg)" for name in charts.figures(rows))
    part = f"{FIGURES}\n{shown or 'Not measured yet.'}\n<!-- end -->"
    return re.sub(rf"{FIGURES}\n.*?<!-- end -->", part, text, flags=re.DOTALL)


def committed(more: Iterable[Row] = ()) -> list[Row]:
    """All committed rows, and those that are to be, oldest first."""
    rows = sorted([*rows_file.read_all(RESULTS), *more], key=rows_file.when)
    # The first rows of equality and accuracy were all made on a CPU, and did not say so.
    return [{"device": "cpu"} | row for row in rows]


def read(path: Path) -> list[Row]:
    """The rows of a file, packed or not; ValueError naming the file if a table can't show one."""
    rows = [{"device": "cpu"} | row for row in pack.read(path)]
    for number, row in enumerate(rows, 1):
        claims.shown(row, f"{path} row {number}", TABLES)
    return rows


@dataclass(frozen=True)
class Settings:
    """Rewrite the rendered parts of the READMEs, and the figures, from committed rows.

    With files, instead write the tables and figures of their rows.
    """

    files: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Files of rows, packed or not."""
    out: Path | None = None
    """Folder of the tables and figures of the files; if none is given, one named by the time."""
    pack: str = ""
    """Write the rows of the files as one small file that can be sent, and nothing else."""
    keep: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="RUN")] = ()
    """Folders of runs whose rows are committed first."""


def main(args: list[str]) -> None:
    """Commit rows if asked, then rewrite both READMEs and the figures; or serve given files."""
    settings = cli.parse(Settings, args, prog="python -m benchmarks.render")
    cli.goes_with(settings, pack="files", out="files")
    if settings.files and settings.keep:
        raise ValueError("--keep goes with no files; choose one")
    if settings.pack and settings.out:
        raise ValueError("--out does not go with --pack, which writes one file")
    if settings.files:
        if settings.pack:
            packed = (row for path in settings.files for row in pack.read(path))
            pack.write(sorted(packed, key=rows_file.when), Path(settings.pack))
            print(settings.pack)
            return
        given = sorted((row for path in settings.files for row in read(path)), key=rows_file.when)
        out = settings.out or tracking.OUT / "rendered" / time.strftime("%Y%m%d-%H%M%S")
        paths = charts.write(given, out, tables=TABLES)
        if any(row["ratio"] is not None for row in claimed(given)):
            paths.append(save(speed_figure(given), out / FIGURE.name))
        if not paths:
            raise ValueError(f"{settings.files[0]} holds no row that a table shows")
        print("\n".join(map(str, paths)))
        return
    kept = {}
    for path in settings.keep:
        name, made = path.resolve().name, rows_file.read(path / "rows.jsonl")
        read(path / "rows.jsonl")  # refuses what no table shows
        rows_file.check_kept(made, RESULTS, name)
        if name in kept:
            raise ValueError(f"two of the folders to keep are called {name}")
        kept[name] = made
    rows = committed(row for made in kept.values() for row in made)
    pages_of = {path: fill(path.read_text(encoding="utf8"), rows) for path in READMES}
    drawn = {FIGURE.stem: speed_figure(rows), **charts.figures(rows)}
    for name, made in kept.items():  # all or nothing
        rows_file.commit(made, RESULTS, name)
    for path, text in pages_of.items():
        path.write_text(text, encoding="utf8")
    for path in RESULTS.glob("*.svg"):  # a figure of rows that newer ones have replaced
        if path.stem not in drawn:
            path.unlink()
    for name, figure in drawn.items():
        save(figure, RESULTS / f"{name}.svg")
    print(f"rendered {len(rows)} rows", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main)
