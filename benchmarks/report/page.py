"""The report of a run: report.md and one self-contained report.html, from results and figures."""

import html
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks import kinds
from benchmarks.report import tables, verdicts
from experiments.study.pages import Table, floor_text, machine
from experiments.study.results import Result, of_kind
from vitx.measure.equality import SMALLEST
from vitx.measure.stats import FLOOR_LIMIT, Interval, mean_interval

STYLE = Path(__file__).with_suffix(".css")
PICTURES = ("attention", "confusion")
"""Figures whose colours mean something: they stay as they are on a dark page."""


@dataclass(frozen=True)
class Section:
    """A heading with a text, a table, and figures with the sentence that each supports."""

    title: str
    text: str
    table: Table
    figures: Mapping[str, str]

    @property
    def anchor(self) -> str:
        """Its name in links."""
        return self.title.lower().replace(" ", "-")


@dataclass(frozen=True)
class Card:
    """A verdict as a large number; of a ratio with its interval and noise floor on a scale."""

    claim: str
    number: str
    verdict: str
    note: str
    interval: Interval | None = None
    floor: float | None = None


def write(
    folder: Path, title: str, results: Sequence[Result], figures: Mapping[str, Path]
) -> tuple[Path, Path]:
    """Write report.md and report.html of a run into `folder`; the paths."""
    plain, page = folder / "report.md", folder / "report.html"
    shown = sections(results)
    lines = [f"# {title}", machine(results[-1]), verdicts.headline(results).markdown()]
    for section in shown:
        lines += [f"## {section.title}", section.text, section.table.markdown()]
        lines += [
            f"![{sentence}]({figures[name].relative_to(folder)})"
            for name, sentence in section.figures.items()
            if name in figures
        ]
    values = "\n".join(f"{name}: {value}" for name, value in environment(results))
    lines += ["## Environment", f"```\n{values}\n```"]
    plain.write_text("\n\n".join(lines) + "\n", encoding="utf8")
    page.write_text(_html(title, results, shown, figures), encoding="utf8")
    return plain, page


def environment(results: Sequence[Result]) -> list[tuple[str, str]]:
    """What the numbers depend on besides their configuration, by name."""
    values = vars(results[-1].environment)
    known = ((name, value) for name, value in values.items() if value not in (None, "", ()))
    return [
        (
            name,
            ", ".join(f"{k} {v}" for k, v in value.items())
            if isinstance(value, dict)
            else str(value),
        )
        for name, value in known
    ]


def sections(results: Sequence[Result]) -> list[Section]:
    """The sections that the results of a run support so far; the machine stands once, above."""
    every = (
        Section("Equality", EQUALITY, tables.equality_table(results), {}),
        Section("Speed", SPEED, tables.speed_table(results), {"speed": SPEED_FIGURE}),
        Section("Cost", COST, tables.cost_table(results), {}),
        Section("Controls", CONTROLS, tables.control_table(results), {}),
        Section("Accuracy", ACCURACY, tables.accuracy_table(results), ACCURACY_FIGURES),
        Section("Pilot", PILOT, tables.pilot_table(results), {}),
    )
    return [
        replace(section, table=_without(section.table, "machine"))
        for section in every
        if section.table.body
    ]


def _without(table: Table, column: str) -> Table:
    """The table without a column."""
    kept = [k for k, name in enumerate(table.header) if name != column]
    lines = [tuple(line[k] for k in kept) for line in (table.header, *table.body)]
    return Table(lines[0], lines[1:])


def cards(results: Sequence[Result]) -> Iterator[Card]:
    """A card for each claim of the run."""
    equal = tables.standing(results, kinds.EqualResult, lambda result: result.reference)
    if equal:
        passed = sum(result.verdict == "equal" for result in equal)
        claim, text = verdicts.claim(equal[-1], results)
        yield Card(claim, f"{passed} of {len(equal)}", "models", text.partition(", ")[2])
    for mutants in of_kind(results, kinds.Mutants):
        number = f"{mutants.caught} of {mutants.planted}"
        note = f"comparing logits at default init to 1e-4 catches {mutants.caught_by_common_check}"
        yield Card("planted bugs that the equality check catches", number, "", note)
    for speed in tables.claimed(results):
        comparison = speed.comparison
        claim = f"{verdicts.speed_claim(speed)}: {verdicts.vit(speed)}, batch {comparison.batch}"
        if comparison.ratio is None:
            yield Card(claim, "–", comparison.verdict, comparison.reason)
            continue
        known = comparison.floor is not None
        ends = f"95 % {comparison.ratio.low:.3f} to {comparison.ratio.high:.3f}"
        note = f"{ends}; noise floor {floor_text(comparison)}" if known else "one process"
        note += f"; {comparison.reason}" if comparison.reason else ""
        number = f"{comparison.ratio.value:.3f}×"
        yield Card(claim, number, comparison.verdict, note, comparison.ratio, comparison.floor)
    for accuracy in of_kind(results, kinds.Accuracy):
        vitx, timm = map(mean_interval, (accuracy.candidate_values, accuracy.reference_values))
        note = (
            f"95 % {vitx.low:.2%} to {vitx.high:.2%}, {accuracy.seeds} seeds; timm {timm.value:.2%}"
        )
        yield Card(verdicts.accuracy_claim(accuracy), f"{vitx.value:.2%}", accuracy.verdict, note)


EQUALITY = (
    "Both models hold the same randomised weights. The error of a tensor is max|Δ| over max|ref|, "
    f"for a gradient at least {SMALLEST:g} of the largest gradient. The check passes below 1e-10 "
    "for the outputs and for the gradient of every parameter."
)
SPEED = (
    "A ratio is vitx's images per second over timm's, on the same weights and batch, in processes "
    "that each hold both models. The last block of vitx computes only the query of the class "
    "token, which is exact. The MACs that this saves stand under Cost; none are saved when all "
    "tokens are read. A verdict is 'faster' or 'slower' only when the whole 95 % interval lies "
    "beyond the noise floor, which is the same comparison between two copies of timm's model. It "
    f"is 'inconclusive' where that floor exceeds {FLOOR_LIMIT:.0%}, or the machine was disturbed "
    "in most rounds of a process."
)
SPEED_FIGURE = "Ratios of images per second with 95 % intervals; grey: noise floor of each."
COST = (
    "Images per second: median and 10 to 90 % of all blocks. Peak MiB: one process per model; on a "
    "CPU what it needed above its imports, the compiler included, on a GPU all that was allocated "
    "there. Compile seconds: with an empty and a filled cache."
)
CONTROLS = (
    "The same protocol on known cases: timm with added work, which must be slower, and timm "
    "against itself, which must not be told apart."
)
ACCURACY = (
    "Each side draws its own initial weights with its own library's code and has its own data "
    "seeds. The test split is read once, after the last step; nothing is chosen by it."
)
ACCURACY_FIGURES = {
    "accuracy": "Test accuracy: a dot per seed, bar: the mean; dashed: a support vector machine.",
    "curves": "Validation accuracy in training: a thin line per seed, thick: the mean of a side.",
    "confusion": "Test confusion matrix of vitx, summed over seeds; colour: mistakes.",
    "attention": "Test images, and what the class token of one vitx model reads of them: attention "
    "averaged over blocks and heads, yellow: more.",
}
PILOT = "Validation accuracy over seeds that are not used again; it fixes how many are needed."


def _html(
    title: str,
    results: Sequence[Result],
    shown: Sequence[Section],
    figures: Mapping[str, Path],
) -> str:
    at = results[-1].environment
    links = "".join(f'<a href="#{s.anchor}">{s.title}</a>' for s in shown)
    body = [
        f"<h1>{html.escape(title)}</h1>",
        f'<p class="where">{html.escape(machine(results[-1]))} · {at.time} · '
        f"commit {str(at.commit)[:7]}{' with changes' if at.dirty else ''}</p>",
        f'<nav aria-label="Contents">{links}<a href="#environment">Environment</a></nav>',
        f'<div class="cards">{_cards(list(cards(results)))}</div>',
    ]
    for section in shown:
        body.append(f'<h2 id="{section.anchor}">{section.title}</h2>')
        body.append(f"<p>{html.escape(section.text)}</p>")
        body += [
            f'<div class="beside"><p>{html.escape(sentence)}</p>{_figure(figures[name], sentence)}'
            "</div>"
            for name, sentence in section.figures.items()
            if name in figures
        ]
        body.append(_table(section.table))
    values = "".join(
        f"<dt>{name}</dt><dd>{html.escape(value)}</dd>" for name, value in environment(results)
    )
    body.append(f'<h2 id="environment">Environment</h2><dl>{values}</dl>')
    style = STYLE.read_text(encoding="utf8")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{html.escape(title)}</title><style>{style}</style></head>\n<body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _cards(shown: Sequence[Card]) -> str:
    """All cards; the scales of ratios have the same ends."""
    ends = [abs(end - 1) for c in shown if c.interval for end in (c.interval.low, c.interval.high)]
    reach = 1.15 * max([0.05, *ends, *(card.floor or 0.0 for card in shown)])
    return "".join(
        f'<section class="card"><h3>{html.escape(card.claim)}</h3><b>{html.escape(card.number)}'
        f"<small>{html.escape(card.verdict)}</small></b><p>{html.escape(card.note)}</p>"
        f"{_scale(card.interval, card.floor, reach) if card.interval else ''}</section>"
        for card in shown
    )


def _scale(ratio: Interval, floor: float | None, reach: float) -> str:
    """A ratio with its interval on a line from 1 - reach to 1 + reach, the noise floor shaded."""

    def x(value: float) -> float:
        return round(150 + 140 * (value - 1) / reach, 1)

    band = ""
    if floor is not None:
        low, high = x(1 / (1 + floor)), x(1 + floor)
        band = f'<rect x="{low}" y="4" width="{high - low:.1f}" height="22" fill="var(--band)"/>'
    ends = "".join(
        f'<text x="{x(value)}" y="40" text-anchor="middle">{value:.2f}</text>'
        for value in (1 - 0.85 * reach, 1, 1 + 0.85 * reach)
    )
    return (
        f'<svg viewBox="0 0 300 44" role="img" aria-label="ratio {ratio.value:.3f} on a scale">'
        f'{band}<path d="M10 26H290M150 4V26" stroke="var(--line)"/>'
        f'<path d="M{x(ratio.low)} 15H{x(ratio.high)}" stroke="var(--blue)" stroke-width="3"/>'
        f'<circle cx="{x(ratio.value)}" cy="15" r="5" fill="var(--blue)"/>{ends}</svg>'
    )


def _table(table: Table) -> str:
    columns = [' class="number"' if number else "" for number in table.numeric]

    def line(tag: str, cells: Sequence[str]) -> str:
        shown = zip(columns, cells, strict=True)
        return "".join(f"<{tag}{kind}>{_inline(cell)}</{tag}>" for kind, cell in shown)

    body = "".join(f"<tr>{line('td', cells)}</tr>" for cells in table.body)
    head = f"<tr>{line('th', table.header)}</tr>"
    return f'<div class="wide"><table>{head}{body}</table></div>'


def _inline(cell: str) -> str:
    parts = html.escape(cell).split("`")
    marked = [f"<code>{part}</code>" if odd % 2 else part for odd, part in enumerate(parts)]
    return "".join(marked)


def _figure(path: Path, caption: str) -> str:
    """The figure's own markup, with names that no other figure of the page uses."""
    text = path.read_text(encoding="utf8")
    text = text[text.index("<svg") :]
    for mark in ('id="', 'href="#', "url(#"):
        text = text.replace(mark, f"{mark}{path.stem}-")
    label = html.escape(caption, quote=True)
    text = text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
    kind = "picture" if path.stem in PICTURES else "chart"
    return f'<figure class="{kind}">{text}</figure>'
