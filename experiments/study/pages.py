"""Tables, and pages whose tables and quoted code are rendered from results and source files."""

import csv
import inspect
import pkgutil
import re
import textwrap
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.study.results import Result
from vitx.measure.comparison import Comparison
from vitx.measure.stats import Interval
from vitx.training.provenance import Environment

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "experiments" / "results"
"""Committed results of training."""


@dataclass(frozen=True)
class Table:
    """A header and lines of cells, for markdown and for the report's page."""

    header: tuple[str, ...]
    body: list[tuple[str, ...]]

    @property
    def numeric(self) -> list[bool]:
        """Whether a column holds numbers, which are aligned right."""
        number = re.compile(r"[-+±]?[\d.,e-]+( ?(%|points))?|–")
        columns = range(len(self.header))
        return [all(number.fullmatch(line[k]) for line in self.body) for k in columns]

    def markdown(self) -> str:
        """The table as GitHub shows it; without lines, the words that it is not measured yet."""
        if not self.body:
            return "Not measured yet."
        rule = tuple("--:" if right else "---" for right in self.numeric)
        cells = (
            [cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in self.body
        )
        return "\n".join("| " + " | ".join(line) + " |" for line in (self.header, rule, *cells))

    def records(self) -> list[dict[str, str]]:
        """Each line's cells by their column."""
        return [dict(zip(self.header, line, strict=True)) for line in self.body]

    def write_csv(self, path: Path) -> None:
        """The table as a CSV file."""
        with path.open("w", encoding="utf8", newline="") as file:
            csv.writer(file).writerows([self.header, *self.body])


Columns = dict[str, Callable[[Any], str]]
"""What stands in each column of a table, by its heading."""


def table(items: Sequence[Any], columns: Mapping[str, Callable[[Any], str]]) -> Table:
    """A table with a line an item."""
    body = [tuple(cell(item) for cell in columns.values()) for item in items]
    return Table(tuple(columns), body)


def same_machine(result: Result) -> Hashable:
    """What results share that may stand in one cell of a table."""
    at = result.environment
    return at.cpu, at.cpu_id, at.gpu, at.cores, at.threads, result.origin


def machine(result: Result) -> str:
    """What it was measured on: the GPU, or the CPU with its cores, and its threads where these are
    others in number; and the file that it was sent as."""
    at = result.environment
    other = at.threads not in (None, at.cores)
    threads = f", {at.threads} thread{'s' * (at.threads != 1)}" if other else ""
    cpu = f"CPU ({processor(at)}, {at.cores} cores{threads})"
    devices = result.device.split(" and ")
    each = (cpu if device.startswith("cpu") else at.gpu or device for device in devices)
    return " and ".join(each) + (f", sent as {result.origin}" if result.origin else "")


def processor(environment: Environment) -> str:
    """The CPU's name, with family/model/stepping where they are known: one name has several."""
    known = environment.cpu_id.strip("/")
    return f"{environment.cpu} {environment.cpu_id}" if known else environment.cpu


def interval_text(interval: Interval, form: str = ".3f") -> str:
    """A value with the ends of its interval."""
    return f"{interval.value:{form}} ({interval.low:{form}} to {interval.high:{form}})"


def ratio_text(comparison: Comparison) -> str:
    """The ratio with its interval, or why there is none."""
    if comparison.ratio is None:
        return f"{comparison.verdict}: {comparison.reason}"
    if comparison.floor is None:
        return f"{comparison.ratio.value:.3f} (one process, no interval)"
    return interval_text(comparison.ratio)


def floor_text(comparison: Comparison) -> str:
    """The noise floor as ± per cent, or a dash."""
    return "–" if comparison.floor is None else f"±{comparison.floor:.1%}"


def fill(
    text: str,
    parts: Mapping[str, Callable[[Sequence[Any]], Table | str]],
    results: Sequence[Result],
) -> str:
    """Fill each marked part: `<!-- table:NAME -->`, `<!-- text:NAME -->`, or
    `<!-- code:FILE:Class.method -->`."""

    def part(match: re.Match[str]) -> str:
        start, kind, name, end = match.groups()
        shown = _code(*name.split(":")) if kind == "code" else parts[name](results)
        return f"{start}\n{shown.markdown() if isinstance(shown, Table) else shown}\n{end}"

    pattern = r"(<!-- (table|text|code):(\S+) -->)\n.*?(<!-- end -->)"
    return re.sub(pattern, part, text, flags=re.DOTALL)


def _code(file: str, name: str) -> str:
    """The source of a class's method, as a fenced block."""
    module = file.removesuffix(".py").replace("/", ".")
    method = inspect.getsource(pkgutil.resolve_name(f"{module}:{name}"))
    return f"```python\n{textwrap.dedent(method)}```"
