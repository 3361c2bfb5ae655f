"""Answer a question: `python -m experiments.ablate NAME [--run] [--workers 2]`.

Without --run it prints a preview: arms, costs, time, and the smallest effect that the seeds can
show. With it, it makes the runs that are missing, times every arm beside the baseline, and writes
the answer. Without a name it lists the questions.
"""

from dataclasses import dataclass

import yaml

from experiments import cli
from experiments.study import answer, preview, runs
from experiments.study import question as questions
from experiments.study.question import Question
from experiments.study.workers import Making
from vitx.registry import UserError

PROG = "python -m experiments.ablate"


@dataclass(frozen=True)
class Settings(Making):
    """Preview a question; with --run, make its runs and write the answer."""

    run: bool = False
    """Make the runs that are missing, time the arms, write the answer."""
    skip_timing: bool = False
    """With --run: leave out how fast the arms are."""
    arm: str = ""
    """Make one run only, of this arm with --seed. What a W&B agent calls."""
    seed: int = 0
    """The seed of --arm."""
    sweep: bool = False
    """Print the same runs as a W&B sweep."""


def main(args: list[str]) -> None:
    """List the questions; or preview, run or export one."""
    if not args or args[0] in ("-h", "--help"):
        print(f"usage: {PROG} NAME [--run]\n\nquestions:")
        for name in questions.names():
            try:
                headline = questions.read(name).headline
            except ValueError as error:
                headline = f"error: {error}"
            print(f"  {name}: {headline}")
        print(f"\nsettings: {PROG} NAME --help")
        return
    name, *flags = args
    settings = cli.parse(Settings, flags, prog=f"{PROG} {name}")
    question = questions.read(name, data_root=settings.data_root)
    if settings.run + bool(settings.arm) + settings.sweep > 1:
        raise UserError("--run, --arm and --sweep exclude each other; choose one")
    cli.goes_with(settings, skip_timing="run", only_runs="run", seed="arm")
    if settings.sweep:
        print(as_sweep(question, settings), end="")
    elif settings.arm:
        job = question.job(question.arm(settings.arm), settings.seed)
        made = runs.make([job], settings.how())
        print(job.folder(settings.out) if made else f"{job.name} was made, or another makes it")
    elif settings.run:
        run(question, settings)
    else:
        preview.show(question, settings.how(), settings.passed_on)


def run(question: Question, settings: Settings) -> None:
    """Make what is missing, then write the answer."""
    settings.make(question.jobs(), "experiments.ablate", [question.name, "--run"])
    if not settings.only_runs:
        answer.write(question, settings.how(), timed=not settings.skip_timing)


def as_sweep(question: Question, settings: Settings) -> str:
    """The question's runs as a grid of arms and seeds for `wandb sweep`.

    Raises ValueError for a question that trains nothing.
    """
    if not question.trained:
        raise UserError(f"{question.name} trains nothing, so there is nothing to sweep")
    goal = "minimize" if question.lower_is_better else "maximize"
    command = ["${env}", "python", "-m", "experiments.ablate", question.name, *settings.passed_on]
    return yaml.safe_dump(
        {
            "name": question.name,
            "description": question.headline,
            "method": "grid",
            "metric": {"name": question.metric, "goal": goal},
            "parameters": {
                "arm": {"values": [arm.name for arm in question.arms]},
                "seed": {"values": list(question.seeds)},
            },
            "command": [*command, "${args}"],
        },
        sort_keys=False,
    )


if __name__ == "__main__":
    cli.run(main)
