"""Answer a question: `python -m experiments.ablate NAME [--run] [--workers 2]`.

Without --run it prints the plan: arms, costs, time, and the smallest effect that the seeds can
show. With it, it makes the runs that are missing, times every arm beside the baseline, and writes
the answer. Without a name it lists the questions.
"""

from dataclasses import dataclass
from pathlib import Path

import yaml

from experiments import answer, cli, plan, question, runs
from experiments.question import Question
from vitx import tracking

PROG = "python -m experiments.ablate"


@dataclass(frozen=True)
class Settings:
    """Print a question's plan; with --run, make its runs and write the answer."""

    run: bool = False
    """Make the runs that are missing, time the arms, write the answer."""
    workers: int = 1
    """Processes that make runs at the same time; they share the cores."""
    only_runs: bool = False
    """With --run: stop when the runs are made, as on one node of many."""
    vectorize: int = 1
    """Seeds of an arm that are trained as one program; for small models."""
    skip_timing: bool = False
    """With --run: leave out how fast the arms are."""
    fresh: bool = False
    """Make again what other code made."""
    arm: str = ""
    """Make one run only, of this arm with --seed. What a W&B agent calls."""
    seed: int = 0
    """The seed of --arm."""
    sweep: bool = False
    """Print the same runs as a W&B sweep."""
    out: Path = tracking.OUT
    """Folder of run folders. Questions that share a baseline share its runs there."""
    data_root: str = ""
    """Folder of the data, if it is not the question's."""
    wandb: str = ""
    """W&B mode of the runs: online, offline or disabled; empty for WANDB_MODE, else offline."""
    device: str = ""
    """Device; empty for the accelerator of this machine, else the CPU."""


def main(args: list[str]) -> None:
    """List the questions; or plan, run or export one."""
    if not args or args[0] in ("-h", "--help"):
        print(f"usage: {PROG} NAME [--run]\n\nquestions:")
        for name in question.names():
            print(f"  {name}: {question.read(name).headline}")
        print(f"\nsettings: {PROG} NAME --help")
        raise SystemExit(0 if args else 2)
    name, *flags = args
    settings = cli.parse(Settings, flags, prog=f"{PROG} {name}")
    for switch in ("workers", "vectorize"):
        if getattr(settings, switch) < 1:
            raise ValueError(f"{switch} = {getattr(settings, switch)} must be at least 1")
    asked = question.read(name, data_root=settings.data_root)
    if settings.sweep:
        print(as_sweep(asked), end="")
    elif settings.arm:
        job = asked.job(asked.arm(settings.arm), settings.seed)
        made = runs.make([job], _how(settings))
        print(job.folder(settings.out) if made else f"{job.name} was made before")
    elif settings.run:
        run(asked, settings)
    else:
        plan.show(asked, runs.ended(settings.out), tracking.device(settings.device))


def run(asked: Question, settings: Settings) -> None:
    """Make what is missing, by as many workers as asked for; then write the answer."""
    how = _how(settings)
    if settings.workers > 1 and runs.missing(asked.jobs(), how.out, fresh=how.fresh):
        spread(asked, settings)
    runs.work(asked.jobs(), how)
    if not settings.only_runs:
        answer.write(asked, how, timed=not settings.skip_timing)


def _how(settings: Settings) -> runs.How:
    return runs.How(
        out=settings.out,
        device=tracking.device(settings.device),
        wandb=settings.wandb or None,
        lanes=settings.vectorize,
        fresh=settings.fresh,
    )


def spread(asked: Question, settings: Settings) -> None:
    """Several processes of this program at the same runs."""
    flags = [asked.name, "--run", "--only-runs", "--out", str(settings.out)]
    flags += ["--vectorize", str(settings.vectorize)]
    flags += ["--fresh"] if settings.fresh else []
    for flag in ("data_root", "wandb", "device"):
        if value := getattr(settings, flag):
            flags += [f"--{flag.replace('_', '-')}", value]
    folder = settings.out / asked.name
    runs.spread("experiments.ablate", flags, workers=settings.workers, folder=folder)


def as_sweep(asked: Question) -> str:
    """The question's runs as a grid of arms and seeds for `wandb sweep`."""
    return yaml.safe_dump(
        {
            "name": asked.name,
            "description": asked.headline,
            "method": "grid",
            "metric": {
                "name": asked.metric,
                "goal": "minimize" if asked.lower_is_better else "maximize",
            },
            "parameters": {
                "arm": {"values": [arm.name for arm in asked.arms]},
                "seed": {"values": list(asked.seeds)},
            },
            "command": ["${env}", "python", "-m", "experiments.ablate", asked.name, "${args}"],
        },
        sort_keys=False,
    )


if __name__ == "__main__":
    cli.run(main)
