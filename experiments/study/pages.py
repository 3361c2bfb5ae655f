"""Pages whose tables and quoted code are rendered: from rows, and from the source as it stands."""

import ast
import csv
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "experiments" / "results"
"""Committed rows of training."""

Row = dict


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


Columns = Mapping[str, Callable[[Any], str]]
"""What stands in each column of a table, by its heading."""


def table(items: Sequence[Any], columns: Columns) -> Table:
    """A table with a line an item."""
    body = [tuple(cell(item) for cell in columns.values()) for item in items]
    return Table(tuple(columns), body)


MACHINE = (
    "environment.cpu",
    "environment.cpu_id",
    "environment.gpu",
    "environment.cores",
    "environment.threads",
    "origin",
)
"""Rows that differ in one of these are never in one cell."""


def machine(row: Row) -> str:
    """What a row was measured on: the GPU, or the CPU with its cores, and its threads where these
    are others in number; and what it was sent as."""
    environment, devices = row["environment"], row.get("device", "cpu").split(" and ")
    cores, threads = environment["cores"], environment.get("threads")
    used = "" if threads in (None, cores) else f", {threads} thread{'s' * (threads > 1)}"
    cpu = f"CPU ({processor(environment)}, {cores} cores{used})"
    each = (cpu if device.startswith("cpu") else environment["gpu"] or device for device in devices)
    sent = f", sent as {row['origin']}" if "origin" in row else ""
    return " and ".join(each) + sent


def processor(environment: Mapping[str, Any]) -> str:
    """The CPU's name, with family/model/stepping where they are known: one name has several."""
    number = environment.get("cpu_id") or ""
    return f"{environment['cpu']} {number}" if number.strip("/") else environment["cpu"]


def ratio_text(row: Row) -> str:
    """The ratio with its interval, or why there is none."""
    if row["ratio"] is None:
        return f"{row['verdict']}: {row['reason']}"
    if row["ratio_low"] is None:
        return f"{row['ratio']:.3f} (one process, no interval)"
    return f"{row['ratio']:.3f} ({row['ratio_low']:.3f} to {row['ratio_high']:.3f})"


def floor_text(row: Row) -> str:
    """The noise floor as ± per cent, or a dash."""
    return "–" if row["noise_floor"] is None else f"±{row['noise_floor']:.1%}"


def fill(
    text: str, tables: Mapping[str, Callable[[Sequence[Row]], Table]], rows: Sequence[Row]
) -> str:
    """Fill each marked part: `<!-- table:NAME -->` or `<!-- code:FILE:Class.method -->`."""

    def part(match: re.Match[str]) -> str:
        kind, what = match[2], match[3]
        rendered = tables[what](rows).markdown() if kind == "table" else _code(*what.split(":"))
        return f"{match[1]}\n{rendered}\n{match[4]}"

    pattern = r"(<!-- (table|code):(\S+) -->)\n.*?(<!-- end -->)"
    return re.sub(pattern, part, text, flags=re.DOTALL)


def _code(file: str, name: str) -> str:
    """The source of a class's method, as a fenced block."""
    source = (ROOT / file).read_text(encoding="utf8")
    klass, method = name.split(".")
    (body,) = (
        node.body
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef) and node.name == klass
    )
    (found,) = (n for n in body if isinstance(n, ast.FunctionDef) and n.name == method)
    lines = source.splitlines()[found.lineno - 1 : found.end_lineno]
    return "```python\n" + textwrap.dedent("\n".join(lines)) + "\n```"
