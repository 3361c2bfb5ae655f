"""Tables and charts from results: of a run's files, and of README from committed results.

`python -m benchmarks.render` rewrites `results/TABLES.md`, the charts, and the marked parts of
README.md and benchmarks/README.md; no number in them is typed by hand.
"""

import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from matplotlib.figure import Figure

from benchmarks import pack
from benchmarks.report import calibration, charts, tables, throughput, verdicts
from experiments import cli
from experiments.study import pages
from experiments.study import results as results_file
from experiments.study import tables as training_tables
from experiments.study.pages import Table
from experiments.study.results import Result
from vitx.pictures import save
from vitx.registry import UserError
from vitx.training import tracking

ROOT = pages.ROOT
RESULTS = ROOT / "benchmarks" / "results"
CHARTS = RESULTS / "charts"
FIGURE = RESULTS / "speed.svg"
"""The chart of the main job's ratios."""
PAGE = RESULTS / "TABLES.md"
READMES = (ROOT / "README.md", ROOT / "benchmarks" / "README.md")
TITLES: dict[str, tuple[str, Callable[[Sequence[Result]], Table]]] = {
    "headline": ("Verdicts", verdicts.headline),
    "equality": ("Equality in float64", tables.equality_table),
    "speed": ("Speed beside timm", tables.speed_table),
    "cost": ("Cost of the timed models", tables.cost_table),
    "controls": ("Controls", tables.control_table),
    "trials": ("Trials of this protocol", calibration.short_table),
    "calibration": ("All trials", calibration.table),
    "accuracy": ("Accuracy", tables.accuracy_table),
    "pilot": ("Pilot of the accuracy", tables.pilot_table),
    "pretrained": ("Accuracy of pretrained weights", tables.pretrained_table),
    "check": ("Devices beside a CPU", tables.check_table),
    "steps": ("Whole training steps", tables.step_table),
    "whole": ("What surrounds a step", tables.whole_table),
    "gate": ("Commits beside others", tables.gate_table),
    "throughput-settings": ("Settings of the throughput results", throughput.settings_table),
    "throughput-ratios": ("Throughput ratios", throughput.summary_table),
    "throughput": ("Rates and verdicts", throughput.throughput_table),
    "throughput-costs": ("Work, memory, compiling, utilisation", throughput.cost_table),
    "latency": ("Latency", throughput.latency_table),
    "stages": ("Stages of an inference call", throughput.stage_table),
    "phases": ("Phases of a training step", throughput.phase_table),
    "break-even": ("When compiling has paid for itself", throughput.break_even_table),
    "means": ("Means of one process", throughput.mean_table),
}
"""Each table by its name, with its heading."""
TABLES = {name: render for name, (_, render) in TITLES.items()}


def fill(text: str, results: Sequence[Result]) -> str:
    """The page with its marked parts filled."""
    texts = {"sentence": verdicts.sentence, "seen": training_tables.seen_text}
    return pages.fill(text, training_tables.TABLES | TABLES | texts, results)


def page(results: Sequence[Result]) -> str:
    """The page of all tables and charts, with a table of contents."""
    contents, parts = [], []
    for title, render in TITLES.values():
        shown = render(results)
        note = " ".join((render.__doc__ or "").split())
        contents.append(f"- [{title}](#{_anchor(title)})")
        parts += [f"## {title}", note, shown.markdown()]
    contents.append("- [Charts](#charts)")
    shown = (path.relative_to(RESULTS) for path in drawn(results))
    parts += ["## Charts", *(f"![{path.stem}]({path})" for path in shown)]
    intro = (
        "Written by `python -m benchmarks.render` from the results in this folder; "
        "[benchmarks/README.md](../README.md) says how they are made."
    )
    return "\n\n".join(["# All tables and charts", intro, "\n".join(contents), *parts]) + "\n"


def _anchor(title: str) -> str:
    """A heading's name in links, as GitHub makes it."""
    return "".join(c for c in title.lower() if c.isalnum() or c == " ").replace(" ", "-")


def drawn(results: Sequence[Result]) -> dict[Path, Figure]:
    """Every chart of committed results by its file."""
    figures = {CHARTS / f"{name}.svg": chart for name, chart in charts.charts(results).items()}
    return {FIGURE: verdicts.speed_figure(results)} | figures


def committed(more: Iterable[Result] = ()) -> list[Result]:
    """All committed results, of training too, and those that are to be, oldest first."""
    results = [*results_file.read_all(RESULTS), *results_file.read_all(pages.RESULTS), *more]
    return sorted(results, key=lambda result: result.when)


@dataclass(frozen=True)
class Settings:
    """Rewrite the tables, the charts and the marked parts of the READMEs from committed results.

    With files, instead write the tables and charts of their results.
    """

    files: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Files of results, packed or not."""
    out: Path | None = None
    """Folder of the tables and charts of the files; if none is given, one named by the time."""
    pack: str = ""
    """Write the results of the files as one small file that can be sent, and nothing else."""
    keep: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="RUN")] = ()
    """Folders of runs whose results are committed first."""


def main(args: list[str]) -> None:
    """Commit results if asked, then rewrite all pages and charts; or serve given files."""
    settings = cli.parse(Settings, args, prog="python -m benchmarks.render")
    cli.goes_with(settings, pack="files", out="files")
    if settings.files and settings.keep:
        raise UserError("--keep goes with no files; choose one")
    if settings.pack and settings.out:
        raise UserError("--out does not go with --pack, which writes one file")
    if settings.files:
        serve(settings)
    else:
        rewrite(settings.keep)


def serve(settings: Settings) -> None:
    """Pack the results of the given files, or write their tables and charts."""
    given = (result for path in settings.files for result in pack.read(path))
    results = sorted(given, key=lambda result: result.when)
    if settings.pack:
        pack.write(results, Path(settings.pack))
        print(settings.pack)
        return
    out = settings.out or tracking.OUT / "rendered" / time.strftime("%Y%m%d-%H%M%S")
    paths = charts.write(results, out, tables=TABLES)
    if any(result.comparison.ratio for result in tables.claimed(results)):
        paths.append(save(verdicts.speed_figure(results), out / FIGURE.name))
    if not paths:
        raise UserError(f"{settings.files[0]} holds no result that a table shows")
    print("\n".join(map(str, paths)))


def rewrite(folders: Sequence[Path]) -> None:
    """Commit the results of these folders, all or none, and rewrite all pages and charts."""
    kept: dict[str, list[Result]] = {}
    for path in folders:
        name = path.resolve().name
        if name in kept:
            raise UserError(f"two of the folders to keep are called {name}")
        kept[name] = results_file.read(path / results_file.FILE)
        results_file.check_kept(kept[name], RESULTS, name)
    results = committed(result for made in kept.values() for result in made)
    pages_of = {path: fill(path.read_text(encoding="utf8"), results) for path in READMES}
    pages_of[PAGE] = page(results)
    figures = drawn(results)
    for name, made in kept.items():
        results_file.commit(made, RESULTS, name)
    for path, text in pages_of.items():
        path.write_text(text, encoding="utf8")
    for path in {*CHARTS.glob("*.svg")} - figures.keys():  # newer results have replaced its own
        path.unlink()
    for path, figure in figures.items():
        save(figure, path)
    print(f"rendered {len(results)} results", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main)
