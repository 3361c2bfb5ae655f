"""A W&B sweep file, read and checked: what is varied, how, and which command each trial runs.

The same file goes to `wandb sweep`. Here a key that would be ignored, or a number that YAML reads
as a string, is an error.
"""

import dataclasses
import itertools
import math
import os
import random
import re
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeVar, get_type_hints

import yaml

from experiments import train
from experiments.recipes import RECIPES
from experiments.study.kinds import Scalar
from experiments.study.question import METRICS, SHARED
from vitx.registry import UserError, choose, nearest
from vitx.settings import Whole, at_least, check, flat, override
from vitx.training import tracking
from vitx.training.config import TrainConfig

Method = Literal["grid", "random", "bayes"]
Goal = Literal["minimize", "maximize"]
RANGES = ("uniform", "q_uniform", "log_uniform_values", "int_uniform")
COMMAND = ("${env}", "${interpreter}", "${program}", "${args}")
"""What W&B runs if the file gives no command."""
COMPARED = (tracking.VAL_LOSS, tracking.VAL_ACCURACY)
"""Metrics by which trainings are compared: validation picks, the test split is read once."""
TRAIN = ("-m", "experiments.train")
"""Words of a command that trains a recipe, whose name follows."""
TRIED = 256
"""Points with a value that are tried, at most, before it counts as one that no field takes."""
MOST_RUNGS = 32
"""Of a rule that names the first."""
Part = TypeVar("Part")


@dataclass(frozen=True)
class Choice:
    """A parameter that takes one of several values."""

    values: tuple[Scalar, ...]

    @property
    def ends(self) -> tuple[Scalar, ...]:
        """The values that are tried before anything is run."""
        return self.values


@dataclass(frozen=True)
class Range:
    """A parameter between two numbers; whole ones if both are."""

    low: float
    high: float
    log: bool = False
    step: float | None = None

    @property
    def ends(self) -> tuple[float, float]:
        return self.low, self.high

    @property
    def whole(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)


Parameters = Mapping[str, Choice | Range]


@dataclass(frozen=True)
class Hyperband:
    """Trials are compared after so many values of the metric, the rungs; the best 1/eta go on."""

    rungs: tuple[int, ...]
    eta: int


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
            raise ValueError(f"command: {error}") from None

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


@dataclass(frozen=True, kw_only=True)
class _Parameter:
    value: Scalar = None
    values: list[Scalar] | None = None
    distribution: str = ""
    min: Scalar = None
    max: Scalar = None
    q: Scalar = None


@dataclass(frozen=True, kw_only=True)
class _EarlyTerminate:
    type: Literal["hyperband"]
    min_iter: Whole = 0
    max_iter: Whole = 0
    s: Whole = 1
    eta: int = 3


def _part(kind: type[Part], keys: object, within: str = "") -> Part:
    """A part of a file, its keys checked by their types. Raises ValueError naming the key."""
    if not isinstance(keys, dict):
        raise ValueError(f"{within.rstrip('.') or 'the file'} must hold keys")
    hints = get_type_hints(kind, include_extras=True)
    for key, value in keys.items():
        if key not in hints:
            raise ValueError(f"{within}{key} is not known; {nearest(key, hints)}")
        check(within + key, value, hints[key])
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        if field.default is dataclasses.MISSING and field.name not in keys:
            raise ValueError(f"{within}{field.name} is missing")
    return kind(**keys)


def read(path: Path) -> Sweep:
    """The sweep in a file. Raises UserError naming file and key."""
    try:
        keys = yaml.load(path.read_text(encoding="utf8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} can't be read: {' '.join(str(error).split())}") from None
    try:
        sweep = _sweep(path, _part(_File, keys))
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
    metric = _part(_Metric, file.metric, "metric.")
    if metric.name in METRICS:
        goal = "minimize" if METRICS[metric.name] else "maximize"
        if metric.goal != goal:
            raise ValueError(f"metric.goal = {metric.goal!r} must be {goal!r} for {metric.name}")
    if not isinstance(file.parameters, dict) or not file.parameters:
        raise ValueError("parameters must name at least one parameter")
    parameters = {
        str(name): _parameter(f"parameters.{name}", keys) for name, keys in file.parameters.items()
    }
    name = path.stem if file.name is None else file.name
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*", name):
        raise ValueError(f"name = {name!r} must be a word, which names the folder of runs")
    return Sweep(
        path=path,
        name=name,
        method=file.method,
        metric=metric.name,
        goal=metric.goal,
        parameters=parameters,
        command=_command(file),
        template=tuple(file.command),
        hyperband=_hyperband(file.early_terminate),
        trials=_trials(file, parameters),
    )


def _parameter(key: str, keys: object) -> Choice | Range:
    if isinstance(keys, dict) and "parameters" in keys:
        raise ValueError(f"{key}: write nested parameters with dots, such as model.depth")
    if not isinstance(keys, dict):
        raise ValueError(f"{key} must have a value, values, or min and max")
    part = _part(_Parameter, keys, f"{key}.")
    if part.value is None and part.values is None:
        return _range(key, part)
    for word in ("min", "max", "q"):
        if getattr(part, word) is not None:
            raise ValueError(f"{key}.{word} does not go with values")
    if part.value is not None and part.values is not None:
        raise ValueError(f"{key} has both a value and values")
    if part.distribution not in ("", "categorical", "constant"):
        raise ValueError(f"{key}.distribution = {part.distribution!r} does not go with values")
    values = [part.value] if part.values is None else part.values
    if not isinstance(values, list) or not values:
        raise ValueError(f"{key}.values = {values!r} must be a list")
    for value in values:
        _no_number_in_words(key, value)
        if not isinstance(value, str | int | float | bool):
            raise ValueError(f"{key}: {value!r} must be a plain value")
    if len(set(map(repr, values))) < len(values):
        raise ValueError(f"{key}.values = {values!r} names a value twice")
    return Choice(tuple(values))


def _range(key: str, part: _Parameter) -> Range:
    if part.min is None or part.max is None:
        raise ValueError(f"{key} must have a value, values, or min and max")
    low, high = _number(f"{key}.min", part.min), _number(f"{key}.max", part.max)
    whole = isinstance(low, int)
    if whole != isinstance(high, int):
        raise ValueError(f"{key}: min = {low} and max = {high} must be both whole or neither")
    if not low < high:
        raise ValueError(f"{key}: min = {low} must be below max = {high}")
    kind = part.distribution or ("int_uniform" if whole else "uniform")
    choose(f"{key}.distribution", kind, RANGES)
    if part.q is not None and kind != "q_uniform":
        raise ValueError(f"{key}.q goes with q_uniform, not with {kind}")
    step = None
    if kind == "q_uniform":
        step = 1 if part.q is None else _number(f"{key}.q", part.q)
    if step is not None and step <= 0:
        raise ValueError(f"{key}.q = {step} must be positive")
    if kind == "log_uniform_values" and low <= 0:
        raise ValueError(f"{key}.min = {low} must be positive for {kind}")
    if kind == "int_uniform" and not whole:
        raise ValueError(f"{key}.min = {low} must be whole for {kind}")
    if kind in ("uniform", "log_uniform_values") or isinstance(step, float):
        low, high = float(low), float(high)
    return Range(low, high, kind == "log_uniform_values", step)


def _number(key: str, value: Scalar) -> int | float:
    _no_number_in_words(key, value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{key} = {value!r} must be a number")
    return value


def _no_number_in_words(key: str, value: object) -> None:
    """ValueError for a string that is a number, with the number as YAML reads it."""
    try:
        number = float(value) if isinstance(value, str) else None
    except ValueError:
        return
    if number is not None:
        text = str(value) if re.fullmatch(r"-?\d+", str(value)) else repr(number)
        plain = text if "." in text else text.replace("e", ".0e")  # an exponent needs a point
        raise ValueError(f"{key} = {value!r} is a string to YAML; write {plain}")


def _command(file: _File) -> tuple[str, ...]:
    """The command's words, with all but ${env} and ${args} filled in."""
    words = file.command
    if not isinstance(words, list | tuple) or not all(isinstance(word, str) for word in words):
        raise ValueError(f"command = {words!r} must be a list of words")
    if "${program}" in words and not file.program:
        raise ValueError("program is missing, or a command without ${program}")
    known = {"${interpreter}": "python", "${program}": file.program}
    filled = tuple(_from_environment(known.get(word, word)) for word in words)
    for word in filled:
        if word.startswith("${") and word not in ("${env}", "${args}"):
            raise ValueError(f"command: {word} is not filled in here; {nearest(word, COMMAND)}")
    if "${args}" not in filled:
        raise ValueError("command has no ${args}, so every trial would be the same")
    if "experiments.ablate" in filled:
        raise ValueError(
            "command: the runs of a question are made by python -m experiments.ablate NAME --run, "
            "or by W&B agents"
        )
    return filled


def _from_environment(word: str) -> str:
    """A word with every ${envvar:NAME} replaced."""

    def value(match: re.Match[str]) -> str:
        if match[1] not in os.environ:
            raise ValueError(f"command: {word} needs the environment variable {match[1]}")
        return os.environ[match[1]]

    return re.sub(r"\$\{envvar:(\w+)\}", value, word)


def _hyperband(keys: dict[str, Scalar] | None) -> Hyperband | None:
    """The rungs that W&B's rule has."""
    if keys is None:
        return None
    rule = _part(_EarlyTerminate, keys, "early_terminate.")
    check("early_terminate.eta", rule.eta, Annotated[int, at_least(2)])
    if rule.min_iter:
        for key in ("max_iter", "s"):
            if key in keys:
                raise ValueError(f"early_terminate.{key} does not go with min_iter")
        return Hyperband(tuple(rule.min_iter * rule.eta**k for k in range(MOST_RUNGS)), rule.eta)
    if not rule.max_iter:
        raise ValueError("early_terminate needs min_iter, or max_iter and s")
    rungs = tuple(rule.max_iter // rule.eta**k for k in range(rule.s, 0, -1))
    if not rungs[-1]:
        raise ValueError(
            f"early_terminate.max_iter = {rule.max_iter} is less than eta = {rule.eta}"
        )
    return Hyperband(tuple(rung for rung in rungs if rung), rule.eta)


def _trials(file: _File, parameters: Parameters) -> int:
    if file.method != "grid":
        if not file.run_cap:
            raise ValueError(f"run_cap is missing: a {file.method} sweep has no end of its own")
        return file.run_cap
    for name, parameter in parameters.items():
        if isinstance(parameter, Range):
            raise ValueError(f"parameters.{name}: a grid needs values, not min and max")
    points = math.prod(len(parameter.ends) for parameter in parameters.values())
    return min(points, file.run_cap or points)


def _check_training(sweep: Sweep) -> None:
    """The recipe is known and logs the metric; every value is one that a field takes."""
    choose("command: recipe", sweep.recipe, RECIPES)
    choose("metric.name", sweep.metric, COMPARED)
    base = sweep.base()
    if not base.data.has_val:
        raise ValueError(f"metric.name: {sweep.metric} needs --data.val in the command")
    known = flat(base)
    for key, parameter in sweep.parameters.items():
        if key in SHARED and key != "seed":
            raise ValueError(f"parameters.{key} can't be varied: {SHARED[key]}")
        if key not in known and (problem := _problem(base, {key: parameter.ends[0]})):
            raise ValueError(f"parameters.{key}: {problem}")
    problems = _problems(base, sweep.parameters)
    # The sentence names the field; of several keys that one is meant.
    for key, problem in sorted(problems.items(), key=lambda one: one[0] not in one[1]):
        raise ValueError(f"parameters.{key}: {problem}")


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
