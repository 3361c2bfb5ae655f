"""A W&B sweep file, read and checked: what is varied, how, and which command each trial runs.

The same file goes to `wandb sweep`. Here a key that would be ignored, or a number that YAML reads
as a string, is an error.
"""

import itertools
import math
import os
import random
import re
import sys
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import yaml

from experiments import train
from experiments.recipes import RECIPES
from experiments.study.kinds import Scalar
from experiments.study.parameters import Choice, Parameters, Range, part, read_parameter
from experiments.study.question import METRICS, SHARED
from vitx.registry import UserError, choose, nearest
from vitx.settings import Whole, at_least, flat, override
from vitx.training import tracking
from vitx.training.config import TrainConfig, warm_up_warning

Method = Literal["grid", "random", "bayes"]
Goal = Literal["minimize", "maximize"]
RANGES = ("uniform", "q_uniform", "log_uniform_values", "int_uniform")
COMMAND = ("${env}", "${interpreter}", "${program}", "${args}")
"""What W&B runs if the file gives no command."""
COMPARED = (tracking.VAL_LOSS, tracking.VAL_ACCURACY)
"""Metrics by which trainings are compared: validation picks, the test split is read once."""
TRAIN = ("-m", "experiments.train")
"""Words of a command that trains a recipe, whose name follows."""
STEPS, WARM_UP = "steps", "optim.warmup_steps"
TRIED = 256
"""Points with a value that are tried, at most, before it counts as one that no field takes."""
MOST_TRIALS = 100_000
"""Of a sweep: all are put into its storage before the first is run."""
MOST_RUNGS = 32
"""Of a rule that names the first."""
Part = TypeVar("Part")


@dataclass(frozen=True, kw_only=True)
class Hyperband:
    """W&B's rule: trials are compared after so many values of the metric, the rungs; of n the best
    ⌊n/eta⌋ + 1 go on. `strict` compares the value at the rung, not the best so far."""

    type: Literal["hyperband"]
    min_iter: Whole = 0
    max_iter: Whole = 0
    s: Whole = 1
    eta: Annotated[int, at_least(2)] = 3
    strict: bool = False

    @property
    def rungs(self) -> tuple[int, ...]:
        if self.min_iter:
            return tuple(self.min_iter * self.eta**k for k in range(MOST_RUNGS))
        rungs = (self.max_iter // self.eta**k for k in range(self.s, 0, -1))
        return tuple(rung for rung in rungs if rung)


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A checked sweep file."""

    path: Path
    name: str
    method: Method
    metric: str
    goal: Goal
    parameters: Parameters
    command: tuple[str, ...]
    """Its words, with all but ${env} and ${args} filled in."""
    template: tuple[str, ...]
    """Its words as they stand in the file."""
    hyperband: Hyperband | None
    trials: int
    """How many there are: run_cap, or all points of a grid."""

    def points(self) -> list[dict[str, Scalar]]:
        """The points of a grid; for other methods empty ones, to be drawn."""
        if self.method != "grid":
            return [{} for _ in range(self.trials)]
        product = itertools.product(*(each.ends for each in self.parameters.values()))
        points = (dict(zip(self.parameters, point, strict=True)) for point in product)
        return list(itertools.islice(points, self.trials))

    def words(self, values: Mapping[str, Scalar]) -> list[str]:
        """The command line of a trial, as a W&B agent makes it."""
        args = [f"--{name}={value}" for name, value in values.items()]
        filled = {"${env}": ["/usr/bin/env"], "${args}": args}
        return [part for word in self.command for part in filled.get(word, [word])]

    @property
    def recipe(self) -> str:
        """The recipe that its command trains; empty if it runs another program."""
        places = (k for k in range(len(self.command) - 2) if self.command[k : k + 2] == TRAIN)
        return next((self.command[k + 2] for k in places), "")

    def base(self) -> TrainConfig:
        """The recipe with the settings that stand in the command itself.

        Raises ValueError for flags that the recipe does not take.
        """
        place = self.command.index(TRAIN[1]) + 2
        flags = [word for word in self.command[place:] if word != "${args}"]
        try:
            return train.read(self.recipe, flags)[0]
        except ValueError as error:
            raise UserError(f"command: {error}") from None

    def constants(self) -> dict[str, Scalar]:
        """The parameters that every trial sets to the same value, but for the seed."""
        return {
            name: each.values[0]
            for name, each in self.parameters.items()
            if isinstance(each, Choice) and len(each.values) == 1 and name != "seed"
        }

    def badness(self, value: float) -> float:
        """The metric so that lower is better; what is no number is worst."""
        if math.isnan(value):
            return math.inf
        return value if self.goal == "minimize" else -value


@dataclass(frozen=True, kw_only=True)
class _File:
    """The keys of a file. W&B alone reads description, project and entity."""

    method: Method
    metric: dict[str, Scalar]
    parameters: dict[str, object]
    name: str | None = None
    description: str = ""
    project: str = ""
    entity: str = ""
    program: str = ""
    command: Sequence[str] = COMMAND
    early_terminate: dict[str, Scalar] | None = None
    run_cap: Whole = 0


@dataclass(frozen=True, kw_only=True)
class _Metric:
    name: str
    goal: Goal = "minimize"


def read(path: Path) -> Sweep:
    """The sweep in a file. Raises UserError naming file and key."""
    try:
        keys = yaml.load(path.read_text(encoding="utf8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} can't be read: {' '.join(str(error).split())}") from None
    try:
        sweep = _sweep(path, part(_File, keys))
        if sweep.recipe:
            _check_training(sweep)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    return sweep


class _Loader(yaml.SafeLoader):
    """YAML in which a key that stands twice is an error; otherwise the last one would count."""

    def construct_mapping(
        self, node: yaml.MappingNode, deep: bool = False
    ) -> dict[Hashable, object]:
        written = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        keys = [self.construct_object(key, deep=True) for key in written]
        for key in keys:
            if keys.count(key) > 1:
                line = node.start_mark.line + 1
                raise yaml.YAMLError(f"{key} stands twice in the part from line {line} on")
        return super().construct_mapping(node, deep)


def _sweep(path: Path, file: _File) -> Sweep:
    """The sweep that the keys of a file make. Raises ValueError naming the key."""
    metric = part(_Metric, file.metric, "metric.")
    if metric.name in METRICS:
        goal = "minimize" if METRICS[metric.name] else "maximize"
        if metric.goal != goal:
            raise UserError(f"metric.goal = {metric.goal!r} must be {goal!r} for {metric.name}")
    if not isinstance(file.parameters, dict) or not file.parameters:
        raise UserError("parameters must name at least one parameter")
    parameters = {
        str(name): read_parameter(f"parameters.{name}", keys)
        for name, keys in file.parameters.items()
    }
    name, rule = path.stem if file.name is None else file.name, file.early_terminate
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*", name):
        raise UserError(f"name = {name!r} must be a word, which names the folder of runs")
    return Sweep(
        path=path,
        name=name,
        method=file.method,
        metric=metric.name,
        goal=metric.goal,
        parameters=parameters,
        command=_command(file),
        template=tuple(file.command),
        hyperband=None if rule is None else _hyperband(rule),
        trials=_trials(file, parameters),
    )


def _command(file: _File) -> tuple[str, ...]:
    """The command's words, with all but ${env} and ${args} filled in."""
    words = file.command
    if not isinstance(words, list | tuple) or not all(isinstance(word, str) for word in words):
        raise UserError(f"command = {words!r} must be a list of words")
    if "${program}" in words and not file.program:
        raise UserError("program is missing, or a command without ${program}")
    known = {"${interpreter}": "python", "${program}": file.program}
    filled = tuple(_from_environment(known.get(word, word)) for word in words)
    for word in filled:
        if word.startswith("${") and word not in ("${env}", "${args}"):
            raise UserError(f"command: {word} is not filled in here; {nearest(word, COMMAND)}")
    if "${args}" not in filled:
        raise UserError("command has no ${args}, so every trial would be the same")
    if "experiments.ablate" in filled:
        raise UserError(
            "command: the runs of a question are made by python -m experiments.ablate NAME --run, "
            "or by W&B agents"
        )
    return filled


def _from_environment(word: str) -> str:
    """A word with every ${envvar:NAME} replaced."""

    def value(match: re.Match[str]) -> str:
        if match[1] not in os.environ:
            raise UserError(f"command: {word} needs the environment variable {match[1]}")
        return os.environ[match[1]]

    return re.sub(r"\$\{envvar:(\w+)\}", value, word)


def _hyperband(keys: dict[str, Scalar]) -> Hyperband:
    rule = part(Hyperband, keys, "early_terminate.")
    for key in ("max_iter", "s"):
        if rule.min_iter and key in keys:
            raise UserError(f"early_terminate.{key} does not go with min_iter")
    if not (rule.min_iter or rule.max_iter):
        raise UserError("early_terminate needs min_iter, or max_iter and s")
    if not rule.rungs:
        raise UserError(f"early_terminate.max_iter = {rule.max_iter} is less than eta = {rule.eta}")
    return rule


def _trials(file: _File, parameters: Parameters) -> int:
    if file.method != "grid":
        if not file.run_cap:
            raise UserError(f"run_cap is missing: a {file.method} sweep has no end of its own")
        return _few(file.run_cap)
    for name, parameter in parameters.items():
        if isinstance(parameter, Range):
            raise UserError(f"parameters.{name}: a grid needs values, not min and max")
    points = math.prod(len(parameter.ends) for parameter in parameters.values())
    return _few(min(points, file.run_cap or points))


def _few(trials: int) -> int:
    """The number, unless it is of more trials than a storage is to hold."""
    if trials > MOST_TRIALS:
        raise UserError(
            f"{trials:,} trials are more than {MOST_TRIALS:,}; name fewer, or a run_cap"
        )
    return trials


def _check_training(sweep: Sweep) -> None:
    """The recipe is known and logs the metric; every value is one that a field takes."""
    choose("command: recipe", sweep.recipe, RECIPES)
    choose("metric.name", sweep.metric, COMPARED)
    base = sweep.base()
    if not base.data.has_val:
        raise UserError(f"metric.name: {sweep.metric} needs --data.val in the command")
    known = flat(base)
    for key, parameter in sweep.parameters.items():
        if key in SHARED and key != "seed":
            raise UserError(f"parameters.{key} can't be varied: {SHARED[key]}")
        if key not in known and (problem := _problem(base, {key: parameter.ends[0]})):
            raise UserError(f"parameters.{key}: {problem}")
    problems = _problems(base, sweep.parameters)
    # The sentence names the field; of several keys that one is meant.
    for key, problem in sorted(problems.items(), key=lambda one: one[0] not in one[1]):
        raise UserError(f"parameters.{key}: {problem}")
    for point in _shortest(sweep.parameters):
        if not _problem(base, point) and (warning := warm_up_warning(override(base, **point))):
            print(f"warning: {sweep.path}: {warning}", file=sys.stderr)
            break


def _shortest(parameters: Parameters) -> Iterator[dict[str, Scalar]]:
    """The ends of steps and warm-up, in all combinations."""
    ends = {name: parameters[name].ends for name in (STEPS, WARM_UP) if name in parameters}
    return (dict(zip(ends, point, strict=True)) for point in itertools.product(*ends.values()))


def _problems(base: TrainConfig, parameters: Parameters) -> dict[str, str]:
    """Per parameter what is wrong with one of its values, where one is.

    A value is right if one point that holds it is valid; of many points TRIED are tried.
    """
    valid: set[tuple[str, Scalar]] = set()
    problems: dict[str, str] = {}
    for key, parameter in parameters.items():
        for value in parameter.ends:
            if (key, value) in valid:
                continue
            problem = ""
            for point in _holding(parameters, key, value):
                problem = _problem(base, point)
                if not problem:
                    valid |= point.items()
                    break
            if problem:
                problems.setdefault(key, problem)
    return problems


def _problem(base: TrainConfig, point: Mapping[str, Scalar]) -> str:
    """Why a configuration can't have these values; empty if it can."""
    try:
        override(base, **point)
    except (ValueError, TypeError) as error:
        return str(error)
    return ""


def _holding(parameters: Parameters, key: str, value: Scalar) -> Iterator[dict[str, Scalar]]:
    """Points that hold a value: all of them, or of many those that chance gives."""
    ends = {name: each.ends for name, each in parameters.items()} | {key: (value,)}
    points: Iterable[Sequence[Scalar]] = itertools.product(*ends.values())
    if math.prod(map(len, ends.values())) > TRIED:
        draws = random.Random(0)
        points = ([draws.choice(values) for values in ends.values()] for _ in range(TRIED))
    return (dict(zip(ends, point, strict=True)) for point in points)
