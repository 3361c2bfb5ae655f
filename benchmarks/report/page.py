"""The report of a run: report.md and one self-contained report.html, from its rows and figures."""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import render
from experiments.study.pages import Table
from vitx.measure.equality import SMALLEST

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff;
       max-width: 72rem; margin: 0 auto; padding: 1rem; }
p, figcaption { max-width: 46rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: 0.85rem; }
th, td { border-bottom: 1px solid #ccc; padding: 0.3rem 0.6rem; text-align: left;
         vertical-align: top; min-width: 5.5em; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
figure { margin: 1rem 0; } figure svg { width: 100%; height: auto; max-width: 40rem; }
figcaption { font-size: 0.85rem; color: #444; } pre { overflow-x: auto; font-size: 0.8rem; }
"""


@dataclass(frozen=True)
class Section:
    """A heading with text, a markdown table, and figures (path, caption); each may be empty."""

    title: str
    text: str = ""
    table: Table | None = None
    figures: Sequence[tuple[Path, str]] = ()


def write(folder: Path, title: str, sections: Sequence[Section]) -> tuple[Path, Path]:
    """Write report.md and report.html into `folder`; the paths."""
    plain, page = folder / "report.md", folder / "report.html"
    plain.write_text(_markdown(folder, title, sections), encoding="utf8")
    page.write_text(_html(title, sections), encoding="utf8")
    return plain, page


def sections_of(rows: list[dict], figures: dict[str, Path]) -> list[Section]:
    """The sections that the rows of a run support so far."""

    def pictures(*names: str) -> list[tuple[Path, str]]:
        return [(figures[name], CAPTIONS[name]) for name in names if name in figures]

    kinds = {row["kind"] for row in rows}
    found = [Section("Verdicts", VERDICT_WORDS, render.headline(rows))]
    if "equality" in kinds:
        found.append(Section("Equality in float64", EQUALITY_WORDS, render.equality_table(rows)))
    if render.speed_rows(rows):
        found.append(Section("Speed", SPEED_WORDS, render.speed_table(rows), pictures("speed")))
        found.append(Section("Cost", COST_WORDS, render.cost_table(rows)))
    if kinds & {"plant", "noise"}:
        found.append(Section("Controls", CONTROL_WORDS, render.plant_table(rows)))
    if "accuracy" in kinds:
        shown = pictures("accuracy", "curves", "confusion", "attention")
        found.append(Section("Accuracy", ACCURACY_WORDS, render.accuracy_table(rows), shown))
    if render.pilot_table(rows).body:
        found.append(Section("Pilot", PILOT_WORDS, render.pilot_table(rows)))
    environment = rows[-1]["environment"]
    lines = [f"{key}: {value}" for key, value in environment.items()]
    return [*found, Section("Where these numbers come from", "\n".join(lines))]


VERDICT_WORDS = (
    "A speed verdict is 'faster' or 'slower' only when the whole 95 % interval of the ratio lies "
    "beyond the noise floor, which is the same comparison made between two copies of timm's model."
)
EQUALITY_WORDS = (
    "Both models hold the same randomised weights. The error of a tensor is max|Δ| over max|ref|, "
    f"for a gradient at least {SMALLEST:g} of the largest gradient; the check passes below 1e-10 "
    "for the outputs and for every parameter's gradient."
)
SPEED_WORDS = (
    "Ratios are vitx's images/s over timm's on the same weights and batch, in processes that "
    "each hold both models. The last block of vitx computes only the query of the class token, "
    "which is exact; the MACs that this saves stand under Cost, and none are saved when all tokens "
    "are read."
)
COST_WORDS = (
    "images/s: median and 10 to 90 % of all blocks. Peak MiB: one process a model; on a CPU what "
    "it needed above its imports, the compiler included, on a GPU all that was allocated there. "
    "Compile seconds: with an empty and a filled cache."
)
CONTROL_WORDS = (
    "The same protocol on known cases: timm with added work, which must be found slower, and timm "
    "against itself, which must not be told apart."
)
ACCURACY_WORDS = (
    "Each side draws its own initial weights with its own library's code and has its own data "
    "seeds. The test split is read once, after the last step; nothing is chosen by it."
)
PILOT_WORDS = (
    "Validation accuracy over seeds that are not used again; it fixes how many are needed."
)
CAPTIONS = {
    "speed": "Ratio of images/s with 95 % intervals; grey: noise floor of each comparison.",
    "accuracy": "Test accuracy, a dot a seed.",
    "curves": "Validation accuracy in training, a thin line a seed, thick: mean.",
    "confusion": "Test confusion matrix of vitx, summed over seeds; colour: mistakes.",
    "attention": "Test images, and what the class token reads of them: attention of one vitx "
    "model, averaged over blocks and heads, yellow: more.",
}


def _markdown(folder: Path, title: str, sections: Sequence[Section]) -> str:
    parts = [f"# {title}"]
    for section in sections:
        text = section.text
        if section.title.startswith("Where"):
            text = f"```\n{text}\n```"
        parts += [f"## {section.title}", text, section.table.markdown() if section.table else ""]
        parts += [f"![{caption}]({path.relative_to(folder)})" for path, caption in section.figures]
    return "\n\n".join(part for part in parts if part) + "\n"


def _html(title: str, sections: Sequence[Section]) -> str:
    body = [f"<h1>{html.escape(title)}</h1>"]
    for section in sections:
        body.append(f"<h2>{html.escape(section.title)}</h2>")
        tag = "pre" if section.title.startswith("Where") else "p"
        if section.text:
            body.append(f"<{tag}>{html.escape(section.text)}</{tag}>")
        if section.table:
            body.append(_html_table(section.table))
        for path, caption in section.figures:
            body.append(
                f"<figure>{_svg(path, caption)}<figcaption>{html.escape(caption)}</figcaption>"
                "</figure>"
            )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _html_table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in table.header)
    lines = []
    for line in table.body:
        cells = [
            f'<td class="number">{_inline(cell)}</td>' if number else f"<td>{_inline(cell)}</td>"
            for cell, number in zip(line, table.numeric, strict=True)
        ]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(lines)}</table></div>'


def _inline(cell: str) -> str:
    parts = html.escape(cell).split("`")
    marked = [f"<code>{part}</code>" if odd % 2 else part for odd, part in enumerate(parts)]
    return "".join(marked)


def _svg(path: Path, caption: str) -> str:
    """The figure's own markup, with names that no other figure of the page uses."""
    text = path.read_text(encoding="utf8")
    text = text[text.index("<svg") :]
    for mark in ('id="', 'href="#', "url(#"):
        text = text.replace(mark, f"{mark}{path.stem}-")
    label = html.escape(caption, quote=True)
    return text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
