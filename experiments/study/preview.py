"""The plan of a question: what will run, how long it takes, and what the seeds can show."""

import math
import shlex
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from experiments.study import rows
from experiments.study.pages import RESULTS, Table
from experiments.study.question import Question
from experiments.study.runs import Ended, How, ended, missing
from vitx.measure import stats
from vitx.measure.timing import Training, time_block
from vitx.model.cost import cost
from vitx.model.vit import build
from vitx.settings import override
from vitx.training.config import TrainConfig, identity

POWER = 0.8
STEPS = 3
"""Steps that are timed after a first one."""


@dataclass(frozen=True)
class Deviation:
    """The standard deviation over seeds of an arm minus the baseline, and where it is from."""

    std: float
    source: str


def show(asked: Question, how: How, flags: Sequence[str] = ()) -> None:
    """Print the plan, and the command to run it, which takes over these flags."""
    command = shlex.join(["python", "-m", "experiments.ablate", asked.name, "--run", *flags])
    found = ended(how.out)
    print(asked.text, end="\n\n")
    seconds = [seconds_a_run(arm.config, how.device) for arm in asked.arms]
    print(table(asked, found, seconds).markdown(), end="\n\n")
    if not asked.trained:
        print(f"nothing is trained; time it: {command}")
        return
    left = [
        each
        for arm, each in zip(asked.arms, seconds, strict=True)
        for seed in asked.seeds
        if missing([asked.job(arm, seed)], found, fresh=how.fresh)
    ]
    print(
        f"{len(asked.arms) * len(asked.seeds)} runs, {len(left)} of them to be made: about "
        f"{sum(left) / 60:.0f} min one after the other, data not counted"
    )
    for line in sensitivity(asked, deviation(asked, found)):
        print(line)
    print(f"make them: {command}")


def table(asked: Question, found: Mapping[str, Ended], seconds: Sequence[float]) -> Table:
    """What each arm costs and how much of it is there."""
    header = ("arm", "parameters", "MACs an image", "s a run", "ended", "stale", "adjusted")
    body = []
    for arm, each in zip(asked.arms, seconds, strict=True):
        costs = cost(arm.config.model)
        there = asked.ended(arm, found)
        body.append(
            (arm.name, f"{costs.parameters:,}", f"{costs.macs:,}", f"{each:.0f}",
             f"{len(there)} of {len(asked.seeds)}", str(sum(run.stale for run in there)),
             arm.adjusted or "–")
        )  # fmt: skip
    return Table(header, body)


def seconds_a_run(config: TrainConfig, device: torch.device) -> float:
    """The steps and readings of a run, from a few of each with random images."""
    training, model = Training(config), build(config.model).to(device).eval()
    step, image = training.make_step(device), training.example(device)
    times = [time_block(step, 1, device) for _ in range(1 + STEPS)]
    with torch.inference_mode():
        forward = min(time_block(lambda: model(image), 1, device) for _ in range(2))
    readings = math.ceil(config.steps / config.eval_every) + 1
    facts = config.data.facts
    test = config.data.test or (facts.test if facts else 0)
    read = (config.data.val * readings + test) / config.batch
    return config.steps * statistics.median(times[1:]) + read * forward


def deviation(asked: Question, found: Mapping[str, Ended]) -> Deviation | None:
    """From the question's own pairs, three an arm at least; else from stored seed variance."""
    variances = []
    for arm in asked.arms[1:]:
        pairs = asked.differences(arm, asked.metric, found)
        if len(pairs) >= 3:
            variances.append(statistics.variance(pairs.values()))
    if any(variances):
        return Deviation(math.sqrt(statistics.mean(variances)), "this question's own pairs")
    base = identity(override(asked.arms[0].config, seed=0))
    stored = [row for row in rows.read_all(RESULTS) if row.get("base") == base]
    for row in reversed(stored):
        if asked.metric in row["metrics"]:
            std = math.sqrt(2) * row["metrics"][asked.metric]["std"]
            runs = row["runs"]
            return Deviation(std, f"√2 times the stored deviation of {runs} runs of the baseline")
    return None


def sensitivity(asked: Question, known: Deviation | None) -> list[str]:
    """What the seeds can show, in words."""
    seeds, family = len(asked.seeds), asked.family
    needed = stats.fewest_seeds(family)
    words = [f"{seeds} seeds, {family} comparison{'s' if family > 1 else ''} judged together"]
    if seeds < needed:
        what = "1 comparison needs" if family == 1 else f"{family} comparisons need"
        return [*words, f"no verdict: {what} at least {needed} seeds"]
    if known is None:
        words.append(
            "smallest effect: not known before three pairs are there, or the seed variance of the "
            "baseline is stored: python -m experiments.variance"
        )
        return words
    least = stats.smallest_effect(std=known.std, seeds=seeds, family=family, wanted=POWER)
    chance = stats.paired_power(effect=asked.effect, std=known.std, seeds=seeds, family=family)
    words.append(
        f"smallest effect on {asked.metric} with {POWER:.0%} power: {least:.4f}; power for the "
        f"effect of interest, {asked.effect:g}: {chance:.0%} (standard deviation of a difference "
        f"{known.std:.4f}, {known.source})"
    )
    return words
