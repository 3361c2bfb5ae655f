"""The preview of a question: its runs, the time that they take, and what the seeds can show."""

import itertools
import math
import shlex
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from experiments.study.kinds import Variance
from experiments.study.pages import RESULTS, Table
from experiments.study.question import Question
from experiments.study.results import of_kind, read_all
from experiments.study.runs import Ended, How, ended, missing
from vitx.measure import stats
from vitx.measure.subjects import Training
from vitx.measure.timing import time_block
from vitx.model.cost import cost
from vitx.model.vit import build
from vitx.settings import override
from vitx.training.config import TrainConfig, identity

POWER = 0.8
"""Of the smallest effect that is named, as `stats.smallest_effect` has it."""
STEPS = 3
"""Steps that are timed after a first one."""


@dataclass(frozen=True)
class Deviation:
    """The standard deviation over seeds of an arm minus the baseline, and where it is from."""

    std: float
    source: str


def show(question: Question, how: How, flags: Sequence[str] = ()) -> None:
    """Print the preview, and the command to run it, which takes over these flags."""
    command = shlex.join(["python", "-m", "experiments.ablate", question.name, "--run", *flags])
    runs = ended(how.out)
    print(question.text, end="\n\n")
    seconds = [seconds_per_run(arm.config, how.device) for arm in question.arms]
    print(table(question, runs, seconds).markdown(), end="\n\n")
    if not question.trained:
        print(f"nothing is trained; time it: {command}")
        return
    jobs = question.jobs()
    left = [
        each
        for job, each in zip(jobs, itertools.cycle(seconds), strict=False)  # seed by seed
        if missing([job], runs, fresh=how.fresh)
    ]
    print(
        f"{len(jobs)} runs, {len(left)} of them to be made: about "
        f"{sum(left) / 60:.0f} min one after the other, data not counted"
    )
    for line in sensitivity(question, deviation(question, runs)):
        print(line)
    print(f"make them: {command}")


def table(question: Question, runs: Mapping[str, Ended], seconds: Sequence[float]) -> Table:
    """What each arm costs and how many of its runs have ended."""
    header = ("arm", "parameters", "MACs per image", "s per run", "ended", "stale", "adjusted")
    body = []
    for arm, each in zip(question.arms, seconds, strict=True):
        costs, made = cost(arm.config.model), question.ended(arm, runs)
        body.append(
            (arm.name, f"{costs.parameters:,}", f"{costs.macs:,}", f"{each:.0f}",
             f"{len(made)} of {len(question.seeds)}", str(sum(run.stale for run in made.values())),
             arm.adjusted or "–")
        )  # fmt: skip
    return Table(header, body)


def seconds_per_run(config: TrainConfig, device: torch.device) -> float:
    """The time of a run's steps and evaluations, from a few of each with random images."""
    training, model = Training(config), build(config.model).to(device).eval()
    step, image = training.make_step(device), training.example(device)
    times = [time_block(step, 1, device) for _ in range(1 + STEPS)]
    with torch.inference_mode():
        forward = min(time_block(lambda: model(image), 1, device) for _ in range(2))
    evaluations = math.ceil(config.steps / config.eval_every) + 1
    facts = config.data.facts
    test = config.data.test or (facts.test if facts else 0)
    batches = (config.data.val * evaluations + test) / config.batch
    return config.steps * statistics.median(times[1:]) + batches * forward


def deviation(question: Question, runs: Mapping[str, Ended]) -> Deviation | None:
    """From the question's own pairs, three per arm at least; else from the stored variance."""
    pairs = [question.differences(arm, question.metric, runs) for arm in question.arms[1:]]
    variances = [statistics.variance(each.values()) for each in pairs if len(each) >= 3]
    if any(variances):
        return Deviation(math.sqrt(statistics.mean(variances)), "this question's own pairs")
    base = identity(override(question.arms[0].config, seed=0))
    for stored in reversed(of_kind(read_all(RESULTS), Variance)):
        if stored.base == base and question.metric in stored.metrics:
            std = math.sqrt(2) * stored.metrics[question.metric].components.std
            source = f"√2 times the stored deviation of {stored.runs} runs of the baseline"
            return Deviation(std, source)
    return None


def sensitivity(question: Question, known: Deviation | None) -> list[str]:
    """What the seeds can show, in words."""
    seeds, family = len(question.seeds), question.family
    needed = stats.fewest_seeds(family)
    words = [f"{seeds} seeds, {family} comparison{'s' if family > 1 else ''} judged together"]
    if seeds < needed:
        what = "1 comparison needs" if family == 1 else f"{family} comparisons need"
        return [*words, f"no verdict: {what} at least {needed} seeds"]
    if known is None:
        unknown = (
            "smallest effect: not known before three pairs are there, or the seed variance of the "
            "baseline is stored: python -m experiments.variance"
        )
        return [*words, unknown]
    least = stats.smallest_effect(std=known.std, seeds=seeds, family=family)
    power = stats.paired_power(effect=question.effect, std=known.std, seeds=seeds, family=family)
    return [
        *words,
        f"smallest effect on {question.metric} with {POWER:.0%} power: {least:.4f}; power for the "
        f"effect of interest, {question.effect:g}: {power:.0%} (standard deviation of a difference "
        f"{known.std:.4f}, {known.source})",
    ]
