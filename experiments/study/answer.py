"""The answer to a question: every arm beside the baseline, in what it reaches and what it costs."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import torch

from experiments.study import plots
from experiments.study.kinds import Answer, ArmResult
from experiments.study.pages import Columns, Table
from experiments.study.pages import table as table_of
from experiments.study.question import Arm, Question
from experiments.study.results import Results
from experiments.study.runs import Ended, How, devices, ended, lasting, sources
from vitx import pictures
from vitx.files import read_json, write_json
from vitx.measure import stats, timing
from vitx.measure.compare import speed
from vitx.measure.comparison import Comparison
from vitx.measure.stats import Effect
from vitx.measure.subjects import Training
from vitx.model.cost import cost
from vitx.settings import delta, flat
from vitx.training import provenance, tracking
from vitx.training.config import identity
from vitx.training.provenance import Environment

TIMING = timing.TimingConfig(mode="training", processes=5, pair_s=6.0)
"""How an arm's training step is timed beside the baseline's."""
TIMES = "times"
"""Folder of the timed pairs, which are not timed again."""


@dataclass(frozen=True)
class ArmTiming:
    """An arm's training step beside the baseline's, and where it was timed."""

    comparison: Comparison
    environment: Environment


def write(question: Question, how: How, *, timed: bool = True) -> Path:
    """Time the arms, print the table and keep it: markdown, CSV, figure, result and W&B run."""
    timings = {arm.name: time_arm(question, arm, how) for arm in question.arms[1:] if timed}
    config = lasting(question.arms[0].config)
    with tracking.Run(how.out, question.name, "answer", config, mode=how.wandb) as run:
        answer = add(Results(run.folder), question, ended(how.out), timings)
        shown = table(answer)
        (run.folder / "answer.md").write_text(
            f"{question.text}\n\n{shown.markdown()}\n", encoding="utf8"
        )
        shown.write_csv(run.folder / "answer.csv")
        run.table("answer", shown.header, shown.body)
        if dots := points(answer):
            figure = plots.tradeoff(dots, metric=answer.metric, title=answer.question)
            picture = pictures.save(figure, run.figures / "answer.png")
            run.figure(f"{question.metric} against speed", picture)
        print(f"{shown.markdown()}\nanswer: {run.folder}")
    return run.folder


def add(
    results: Results,
    question: Question,
    runs: Mapping[str, Ended],
    timings: Mapping[str, ArmTiming],
) -> Answer:
    """Append the answer that these runs, by identity, and timings, by arm, give."""
    made = [run for arm in question.arms for run in question.ended(arm, runs).values()]
    environments = [timing.environment for timing in timings.values()]
    return results.add(
        Answer,
        question=question.name,
        text=question.text,
        metric=question.metric,
        effect=question.effect,
        config=lasting(question.arms[0].config),
        arms=tuple(_arm(question, arm, runs, timings.get(arm.name)) for arm in question.arms),
        seconds=sum(run.values.get("seconds", 0) / run.values.get("lanes", 1) for run in made),
        device=devices(
            [*(run.device for run in made), *(t.comparison.device for t in timings.values())]
        ),
        before=sources([*(run.environment for run in made), *map(vars, environments)]),
    )


def _arm(
    question: Question, arm: Arm, runs: Mapping[str, Ended], timing: ArmTiming | None
) -> ArmResult:
    made, costs = list(question.ended(arm, runs).values()), cost(arm.config.model)
    trained = (tracking.VAL_LOSS, tracking.VAL_ACCURACY) if question.trained else ()
    values = {
        metric: {str(seed): value for seed, value in question.values(arm, metric, runs).items()}
        for metric in sorted(trained, key=lambda metric: metric != question.metric)
    }
    return ArmResult(
        name=arm.name,
        changes=delta(arm.config, question.arms[0].config),
        adjusted=arm.adjusted,
        parameters=costs.parameters,
        macs=costs.macs,
        values=values,
        failed=tuple(run.error for run in made if run.error),
        images=tuple(sorted({run.images for run in made} - {""})),
        stale=sum(run.stale for run in made),
        speed=timing and replace(timing.comparison, raw=[]),
    )


def time_arm(question: Question, arm: Arm, how: How) -> ArmTiming:
    """An arm's training step beside the baseline's, in pairs.

    What was timed before on this machine is read, unless it was inconclusive or `how.fresh`.
    """
    base, device, environment = question.arms[0].config, how.device, provenance.environment()
    where = json.dumps([str(device), environment.cpu, environment.cpu_id, environment.gpu,
                        torch.get_num_threads(), provenance.version(), timing.PROTOCOL,
                        flat(TIMING)])  # fmt: skip
    place = hashlib.sha256(where.encode()).hexdigest()[:8]
    path = how.out / TIMES / f"{identity(base)}-{identity(arm.config)}-{place}.json"
    if not how.fresh and (kept := read_json(path)):
        earlier = msgspec.convert(kept, ArmTiming)
        if earlier.comparison.verdict != stats.INCONCLUSIVE:
            return earlier
    before, after = Training(base), Training(arm.config)
    compiled = base.compile or arm.config.compile
    comparison = speed(
        before, after, before.example(device),
        config=replace(TIMING, compile="default" if compiled else "none"),
        say=lambda line: print(f"{arm.name}: {line}"),
    )  # fmt: skip
    timed = ArmTiming(replace(comparison, raw=[]), environment)
    if comparison.verdict != "failed":
        write_json(path, msgspec.to_builtins(timed))
    return timed


def table(answer: Answer) -> Table:
    """An answer's arms: what they change in each metric, and what they cost."""
    base, *others = answer.arms
    effects = {metric: answer.effects(metric) for metric in answer.metrics}
    columns: Columns = {
        "arm": lambda arm: arm.name + (f" ({arm.adjusted})" if arm.adjusted else "")
    }
    for metric in answer.metrics:
        columns[f"Δ {metric}"] = lambda arm, of=metric: _change(effects[of][arm.name], of)
    if answer.metrics:
        first = effects[answer.metric]
        columns["p"] = lambda arm: f"{effect.p:.3f}" if (effect := first[arm.name]) else "–"
        columns["verdict"] = lambda arm: answer.verdict(arm, first[arm.name])
    columns |= {
        "Δ images/s": lambda arm: _speed(arm.speed)[0],
        "speed": lambda arm: _speed(arm.speed)[1],
        "Δ parameters": lambda arm: f"{100 * (arm.parameters / base.parameters - 1):+.1f}%",
        "Δ MACs": lambda arm: f"{100 * (arm.macs / base.macs - 1):+.1f}%",
        "Δ peak MiB": lambda arm: _memory(arm.speed),
        "pairs": lambda arm: str(answer.pairs(arm)),
    }
    return table_of(others, columns)


def _change(effect: Effect | None, metric: str) -> str:
    if effect is None:
        return "–"
    value, half = effect.difference.value, (effect.difference.high - effect.difference.low) / 2
    if metric == tracking.VAL_ACCURACY:
        return f"{100 * value:+.2f} ± {100 * half:.2f} points"
    return f"{value:+.4f} ± {half:.4f}"


def _speed(comparison: Comparison | None) -> tuple[str, str]:
    """The change of images per second, and the verdict or why there is none."""
    if comparison is None:
        return "not timed", "–"
    ratio = comparison.ratio
    if ratio is None or comparison.floor is None:  # of one process there is no interval
        return "–", f"{comparison.verdict}: {comparison.reason}"
    value, low, high = (100 * (bound - 1) for bound in (ratio.value, ratio.low, ratio.high))
    return f"{value:+.1f}% ({low:+.1f} to {high:+.1f})", comparison.verdict


def _memory(comparison: Comparison | None) -> str:
    sides = (comparison.reference, comparison.candidate) if comparison else ()
    peaks = [side.peak_mib for side in sides if side and side.peak_mib is not None]
    return f"{peaks[1] - peaks[0]:+.0f}" if len(peaks) == 2 else "–"


def points(answer: Answer) -> list[plots.Point]:
    """Arms by speed and metric, for the figure."""
    if answer.metric not in answer.metrics:
        return []
    effects = answer.effects(answer.metric)
    return [
        plots.Point(arm.name, arm.speed.ratio, effect.difference, verdict.partition(":")[0])
        for arm in answer.arms[1:]
        if (effect := effects[arm.name])
        and (verdict := answer.verdict(arm, effect))
        and arm.speed
        and arm.speed.ratio
        and arm.speed.floor is not None
    ]
