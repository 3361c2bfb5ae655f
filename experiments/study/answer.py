"""The answer to a question: every arm beside the baseline, in what it reaches and what it costs."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from experiments.study import plots
from experiments.study.pages import Row, Table
from experiments.study.question import Arm, Question, paired
from experiments.study.rows import Rows
from experiments.study.runs import Ended, How, devices, ended, lasting, sources
from vitx import pictures
from vitx.files import read_json, write_json
from vitx.measure import stats, timing
from vitx.measure.compare import speed
from vitx.measure.timing import Training
from vitx.model.cost import cost
from vitx.settings import delta, flat
from vitx.training import provenance, tracking
from vitx.training.config import identity

TIMING = timing.TimingConfig(mode="training", processes=5, pair_s=6.0)
"""How an arm's training step is timed beside the baseline's."""
TIMES = "times"
"""Folder of the timed pairs, which are not timed again."""


def row(
    asked: Question, found: Mapping[str, Ended], times: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """The fields of the answer's row. `times` are those of `time_arm`, by the arm's name."""
    base = asked.arms[0]
    made = [run for arm in asked.arms for run in asked.ended(arm, found)]
    trained = (tracking.VAL_LOSS, tracking.VAL_ACCURACY) if asked.trained else ()
    metrics = sorted(trained, key=lambda metric: metric != asked.metric)
    return {
        "what": "answer",
        "question": asked.name,
        "text": asked.text,
        "metric": asked.metric,
        "effect": asked.effect,
        "config": lasting(base.config),
        "arms": [
            {
                "name": arm.name,
                "changes": delta(arm.config, base.config),
                "adjusted": arm.adjusted,
                "parameters": cost(arm.config.model).parameters,
                "macs": cost(arm.config.model).macs,
                "values": {metric: asked.values(arm, metric, found) for metric in metrics},
                "failed": [run.error for run in asked.ended(arm, found) if run.error],
                "images": sorted({run.images for run in asked.ended(arm, found)} - {""}),
                "stale": sum(run.stale for run in asked.ended(arm, found)),
                "speed": times.get(arm.name),
            }
            for arm in asked.arms
        ],
        "seconds": sum(run.values.get("seconds", 0) / run.values.get("lanes", 1) for run in made),
        "device": devices(
            [*(run.device for run in made), *(timed["device"] for timed in times.values())]
        ),
        "before": sources(
            [run.environment for run in made] + [timed["environment"] for timed in times.values()]
        ),
    }


def effects(row: Row, metric: str) -> dict[str, stats.Effect | None]:
    """The arms of an answer beside the baseline, judged together, by name."""
    base, *others = row["arms"]
    differences = [
        list(paired(base["values"][metric], arm["values"][metric]).values()) for arm in others
    ]
    lower = metric == tracking.VAL_LOSS
    margin = row["effect"] if metric == row["metric"] else float("inf")
    judged = stats.effects(differences, margin=margin, lower_is_better=lower)
    return {arm["name"]: effect for arm, effect in zip(others, judged, strict=True)}


def time_arm(asked: Question, arm: Arm, how: How) -> Mapping[str, Any]:
    """An arm's training step beside the baseline's, in pairs.

    What was timed before on this machine is read, unless it was inconclusive or `how.fresh`.
    """
    base, device, environment = asked.arms[0].config, how.device, provenance.environment()
    where = json.dumps([str(device), environment["cpu"], environment["cpu_id"],
                        environment["gpu"], torch.get_num_threads(), provenance.version(),
                        timing.PROTOCOL, flat(TIMING)])  # fmt: skip
    place = hashlib.sha256(where.encode()).hexdigest()[:8]
    path = how.out / TIMES / f"{identity(base)}-{identity(arm.config)}-{place}.json"
    known = {} if how.fresh else read_json(path)
    if known and known["verdict"] != stats.INCONCLUSIVE:
        return known
    steps = [Training(config) for config in (base, arm.config)]
    compiled = base.compile or arm.config.compile
    plan = replace(TIMING, compile="default" if compiled else "none")
    compared = speed(
        *steps, steps[0].example(device), plan=plan, say=lambda line: print(f"{arm.name}: {line}")
    )
    found = compared.fields() | {"environment": environment}
    if compared.verdict != "failed":
        write_json(path, found)
    return found


def table(row: Row) -> Table:
    """An answer's arms: what they change in each metric, and what they cost."""
    base, *others = row["arms"]
    metrics = list(base["values"])  # the question's first; none if nothing was trained
    judged = {metric: effects(row, metric) for metric in metrics}
    header = ("arm", *(f"Δ {metric}" for metric in metrics), *(("p", "verdict") if metrics else ()),
              "Δ images/s", "speed", "Δ parameters", "Δ MACs", "Δ peak MiB", "pairs")  # fmt: skip
    body = []
    for arm in others:
        each = [judged[metric][arm["name"]] for metric in metrics]
        words = (_p(each[0]), verdict(row, arm, each[0])) if metrics else ()
        body.append(
            (arm["name"] + (f" ({arm['adjusted']})" if arm["adjusted"] else ""),
             *(_interval(effect, metric) for effect, metric in zip(each, metrics, strict=True)),
             *words, *_speed(arm["speed"]),
             _share(arm["parameters"], base["parameters"]), _share(arm["macs"], base["macs"]),
             _memory(arm["speed"]), str(pairs(row, arm)))
        )  # fmt: skip
    return Table(header, body)


def _p(effect: stats.Effect | None) -> str:
    return f"{effect.p:.3f}" if effect else "–"


def pairs(row: Row, arm: Mapping[str, Any]) -> int:
    """Seeds that ended well in an arm and in the baseline."""
    before, after = (one["values"].get(row["metric"], {}) for one in (row["arms"][0], arm))
    return len(paired(before, after))


def verdict(row: Row, arm: Mapping[str, Any], effect: stats.Effect | None) -> str:
    """The verdict on an arm, or why there is none."""
    base = row["arms"][0]
    stale = arm["stale"] + base["stale"]
    if failed := [*arm["failed"], *base["failed"]]:
        return f"{len(failed)} failed: {failed[0]}"
    if _several_images(base, arm):
        return "runs on different images"
    words = effect.verdict if effect else "too few seeds"
    words += f" (runs on {row['device']})" if " and " in row["device"] else ""
    return f"{words} (stale: {stale} runs of another version)" if stale else words


def _several_images(base: Mapping[str, Any], arm: Mapping[str, Any]) -> bool:
    """Whether runs that ask for the same images found others, as under another folder.

    An arm that itself changes the images for training differs from the baseline, but not in itself.
    """
    one, other = (set(each.get("images", ())) for each in (base, arm))
    same = not any(name.startswith("data.") for name in arm["changes"])
    return max(len(one), len(other), len(one | other) if same else 0) > 1


def _interval(effect: stats.Effect | None, metric: str) -> str:
    if effect is None:
        return "–"
    value, half = effect.difference.value, (effect.difference.high - effect.difference.low) / 2
    if metric == tracking.VAL_ACCURACY:
        return f"{100 * value:+.2f} ± {100 * half:.2f} points"
    return f"{value:+.4f} ± {half:.4f}"


def _speed(found: Mapping[str, Any] | None) -> tuple[str, str]:
    if not found:
        return "not timed", "–"
    if found["ratio_low"] is None:
        return "–", f"{found['verdict']}: {found['reason']}"
    value, low, high = (100 * (found[name] - 1) for name in ("ratio", "ratio_low", "ratio_high"))
    return f"{value:+.1f}% ({low:+.1f} to {high:+.1f})", found["verdict"]


def _share(value: float, of: float) -> str:
    return f"{100 * (value / of - 1):+.1f}%"


def _memory(found: Mapping[str, Any] | None) -> str:
    peak = (found or {}).get("peak_mib") or {}
    if len(peak) < 2 or None in peak.values():
        return "–"
    return f"{peak['candidate'] - peak['reference']:+.0f}"


def points(row: Row) -> list[plots.Point]:
    """Arms by speed and metric, for the figure."""
    if row["metric"] not in row["arms"][0]["values"]:
        return []
    judged = effects(row, row["metric"])
    found = []
    for arm in row["arms"][1:]:
        effect, times = judged[arm["name"]], arm["speed"]
        if effect and times and times["ratio_low"] is not None:
            ratio = stats.Interval(*(times[f"ratio{end}"] for end in ("", "_low", "_high")))
            words = verdict(row, arm, effect).partition(":")[0]
            found.append(plots.Point(arm["name"], ratio, effect.difference, words))
    return found


def figure(row: Row) -> Figure:
    """What each arm gains beside what it costs."""
    return plots.tradeoff(points(row), metric=row["metric"], title=row["question"])


def write(asked: Question, how: How, *, timed: bool = True) -> Path:
    """Time the arms, print the table and keep it: markdown, CSV, figure, row and W&B run."""
    times = {arm.name: time_arm(asked, arm, how) for arm in asked.arms[1:] if timed}
    fields = row(asked, ended(how.out), times)
    with tracking.Run(how.out, asked.name, "answer", fields["config"], mode=how.wandb) as run:
        kept = Rows(run.folder)
        answer = kept.add("ablation", **fields)
        shown = table(answer)
        (run.folder / "answer.md").write_text(
            f"{asked.text}\n\n{shown.markdown()}\n", encoding="utf8"
        )
        shown.write_csv(run.folder / "answer.csv")
        run.table("answer", shown.header, shown.body)
        if points(answer):
            picture = pictures.save(figure(answer), run.figures / "answer.png")
            run.figure(f"{asked.metric} against speed", picture)
        print(shown.markdown())
        print(f"answer: {run.folder}")
    return run.folder
