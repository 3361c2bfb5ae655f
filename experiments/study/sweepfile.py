"""A W&B sweep file, read and checked: what is varied, how, and which command each trial runs.

The same file goes to `wandb sweep`. Here a key that would be ignored, or a number that YAML reads
as a string, is an error.
"""

import io
import itertools
import math
import os
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from experiments import train
from experiments.recipes import RECIPES
from experiments.study.question import METRICS, SHARED
from experiments.study.workers import last_error
from vitx.registry import choose, nearest
from vitx.settings import flat, override
from vitx.training import tracking
from vitx.training.config import TrainConfig

KEYS = ("name", "description", "project", "entity", "program", "command", "method", "metric",
        "parameters", "early_terminate", "run_cap")  # fmt: skip
METHODS = ("grid", "random", "bayes")
GOALS = ("minimize", "maximize")
RANGES = ("uniform", "q_uniform", "log_uniform_values", "int_uniform")
COMMAND = ("${env}", "${interpreter}", "${program}", "${args}")
"""What W&B runs if the file gives no command."""
TRIED = 256
"""Points with a value that are tried, at most, before it counts as one that no field takes."""
READ = (tracking.VAL_LOSS, tracking.VAL_ACCURACY)
"""Metrics by which trainings are compared: validation picks, the test split is read once."""
TRAIN = ("-m", "experiments.train")
MOST_RUNGS = 32
"""Of a rule that names the first."""
"""Words of a command that trains a recipe, whose name follows."""


@dataclass(frozen=True)
class Choice:
    """A parameter that takes one of some values."""

    values: tuple[Any, ...]

    @property
    def ends(self) -> tuple[Any, ...]:
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


@dataclass(frozen=True)
class Hyperband:
    """Trials are compared after so many readings, the rungs; the best 1/eta go on."""

    rungs: tuple[int, ...]
    eta: int


@dataclass(frozen=True)
class Sweep:
    """A checked sweep file."""

    path: Path
    name: str
    method: str
    metric: str
    goal: str
    parameters: Mapping[str, Choice | Range]
    command: tuple[str, ...]
    """Its words, with all but ${env} and ${args} filled in."""
    template: tuple[str, ...]
    """Its words as they stand in the file."""
    hyperband: Hyperband | None
    trials: int
    """How many there are: run_cap, or all points of a grid."""

    def points(self) -> list[dict[str, Any]]:
        """The points of a grid; for other methods empty ones, to be drawn."""
        if self.method != "grid":
            return [{} for _ in range(self.trials)]
        values = [each.ends for each in self.parameters.values()]
        product = itertools.product(*values)
        return [dict(zip(self.parameters, point, strict=True)) for point in product][: self.trials]

    def words(self, chosen: Mapping[str, Any]) -> list[str]:
        """The command line of a trial, as a W&B agent makes it."""
        args = [f"--{name}={value}" for name, value in chosen.items()]
        found: list[str] = []
        for word in self.command:
            found += {"${env}": ["/usr/bin/env"], "${args}": args}.get(word, [word])
        return found

    @property
    def recipe(self) -> str:
        """The recipe that its command trains; empty if it runs another program."""
        return _recipe(self.command)

    def base(self) -> TrainConfig:
        """The recipe with the settings that stand in the command itself.

        Raises ValueError naming the file for flags that the recipe does not take.
        """
        place = self.command.index(TRAIN[1]) + 2
        flags = [word for word in self.command[place:] if word != "${args}"]
        said = io.StringIO()
        try:
            with redirect_stderr(said):
                return train.read(self.recipe, flags)[0]
        except SystemExit:
            raise ValueError(f"{self.path}: command: {last_error(said.getvalue())}") from None

    def constants(self) -> dict[str, Any]:
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


def read(path: Path) -> Sweep:
    """The sweep in a file. Raises ValueError naming file and key."""
    try:
        said = yaml.load(path.read_text(encoding="utf8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} can't be read: {' '.join(str(error).split())}") from None
    if not isinstance(said, dict):
        raise ValueError(f"{path} is no sweep: it holds no keys")
    for key in said:
        _known(path, "", key, KEYS)
    for key in ("method", "metric", "parameters"):
        if key not in said:
            raise ValueError(f"{path}: {key} is missing")
    method = choose(f"{path}: method", said["method"], METHODS)
    metric, goal = _metric(path, said["metric"])
    if not isinstance(said["parameters"], dict) or not said["parameters"]:
        raise ValueError(f"{path}: parameters must name at least one parameter")
    parameters = {
        str(name): _parameter(path, f"parameters.{name}", value)
        for name, value in said["parameters"].items()
    }
    name = said.get("name", path.stem)
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*", name):
        raise ValueError(f"{path}: name = {name!r} must be a word, which names the folder of runs")
    found = Sweep(
        path=path,
        name=name,
        method=method,
        metric=metric,
        goal=goal,
        parameters=parameters,
        command=_command(path, said),
        template=tuple(said.get("command", COMMAND)),
        hyperband=_hyperband(path, said.get("early_terminate")),
        trials=_trials(path, method, parameters, said.get("run_cap")),
    )
    if found.recipe:
        _check_training(found)
    return found


class _Loader(yaml.SafeLoader):
    """YAML in which a key that stands twice is an error; otherwise the last one would count."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        written = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        keys = [self.construct_object(key, deep=True) for key in written]
        for key in keys:
            if keys.count(key) > 1:
                line = node.start_mark.line + 1
                raise yaml.YAMLError(f"{key} stands twice in the part from line {line} on")
        return super().construct_mapping(node, deep)


def _metric(path: Path, said: object) -> tuple[str, str]:
    if not isinstance(said, dict) or not isinstance(said.get("name"), str):
        raise ValueError(f"{path}: metric must have a name")
    for key in said:
        _known(path, "metric.", key, ("name", "goal"))
    name, goal = said["name"], choose(f"{path}: metric.goal", said.get("goal", GOALS[0]), GOALS)
    if name in METRICS and goal != (right := GOALS[not METRICS[name]]):
        raise ValueError(f"{path}: metric.goal = {goal!r} must be {right!r} for {name}")
    return name, goal


def _parameter(path: Path, key: str, said: object) -> Choice | Range:
    if not isinstance(said, dict):
        raise ValueError(f"{path}: {key} must have a value, values, or min and max")
    if "parameters" in said:
        raise ValueError(f"{path}: {key}: write nested parameters with dots, such as model.depth")
    for word in said:
        _known(path, f"{key}.", word, ("value", "values", "distribution", "min", "max", "q"))
    kind = said.get("distribution")
    if "value" in said or "values" in said:
        for word in ("min", "max", "q"):
            if word in said:
                raise ValueError(f"{path}: {key}.{word} does not go with values")
        if "value" in said and "values" in said:
            raise ValueError(f"{path}: {key} has both a value and values")
        values = said.get("values", [said.get("value")])
        if not isinstance(values, list) or not values:
            raise ValueError(f"{path}: {key}.values = {values!r} must be a list")
        if kind not in (None, "categorical", "constant"):
            raise ValueError(f"{path}: {key}.distribution = {kind!r} does not go with values")
        plain = tuple(_plain(path, key, value) for value in values)
        if len(set(map(repr, plain))) < len(plain):
            raise ValueError(f"{path}: {key}.values = {values!r} names a value twice")
        return Choice(plain)
    if "min" not in said or "max" not in said:
        raise ValueError(f"{path}: {key} must have a value, values, or min and max")
    low, high = (_number(path, f"{key}.{word}", said[word]) for word in ("min", "max"))
    if isinstance(low, int) != isinstance(high, int):
        raise ValueError(
            f"{path}: {key}: min = {low} and max = {high} must be both whole or neither"
        )
    if not low < high:
        raise ValueError(f"{path}: {key}: min = {low} must be below max = {high}")
    kind = kind or ("int_uniform" if isinstance(low, int) else "uniform")
    choose(f"{path}: {key}.distribution", kind, RANGES)
    step = _number(path, f"{key}.q", said.get("q", 1)) if kind == "q_uniform" else None
    if "q" in said and step is None:
        raise ValueError(f"{path}: {key}.q goes with q_uniform, not with {kind}")
    if step is not None and step <= 0:
        raise ValueError(f"{path}: {key}.q = {step} must be positive")
    if isinstance(step, float):
        low, high = float(low), float(high)
    if kind == "log_uniform_values" and low <= 0:
        raise ValueError(f"{path}: {key}.min = {low} must be positive for {kind}")
    if kind == "int_uniform" and not isinstance(low, int):
        raise ValueError(f"{path}: {key}.min = {low} must be whole for {kind}")
    if kind in ("uniform", "log_uniform_values"):
        low, high = float(low), float(high)
    return Range(low, high, kind == "log_uniform_values", step)


def _command(path: Path, said: Mapping[str, Any]) -> tuple[str, ...]:
    """The command's words, with all but ${env} and ${args} filled in."""
    words = said.get("command", COMMAND)
    if not isinstance(words, list | tuple) or not all(isinstance(word, str) for word in words):
        raise ValueError(f"{path}: command = {words!r} must be a list of words")
    if "${program}" in words and "program" not in said:
        raise ValueError(f"{path}: program is missing, or a command without ${{program}}")
    known = {"${interpreter}": "python", "${program}": str(said.get("program", ""))}
    filled = tuple(_from_environment(path, known.get(word, word)) for word in words)
    for word in filled:
        if word.startswith("${") and word not in ("${env}", "${args}"):
            raise ValueError(
                f"{path}: command: {word} is not filled in here; {nearest(word, COMMAND)}"
            )
    if "${args}" not in filled:
        raise ValueError(f"{path}: command has no ${{args}}, so every trial would be the same")
    if "experiments.ablate" in filled:
        raise ValueError(
            f"{path}: command: the runs of a question are made by python -m experiments.ablate "
            "NAME --run, or by W&B agents"
        )
    return filled


def _from_environment(path: Path, word: str) -> str:
    """A word with every ${envvar:NAME} replaced."""

    def value(match: re.Match[str]) -> str:
        if match[1] not in os.environ:
            raise ValueError(f"{path}: command: {word} needs the environment variable {match[1]}")
        return os.environ[match[1]]

    return re.sub(r"\$\{envvar:(\w+)\}", value, word)


def _check_training(found: Sweep) -> None:
    """The recipe is known and reads the metric; every value is one that a field takes.

    A value counts as taken if one point that holds it is valid; of many points some are tried.
    """
    path, name = found.path, found.recipe
    choose(f"{path}: command: recipe", name, RECIPES)
    choose(f"{path}: metric.name", found.metric, READ)
    base = found.base()
    if not base.data.has_val:
        raise ValueError(f"{path}: metric.name: {found.metric} needs --data.val in the command")
    known = flat(base)
    for key, parameter in found.parameters.items():
        if key in SHARED and key != "seed":
            raise ValueError(f"{path}: parameters.{key} can't be varied: {SHARED[key]}")
        if key not in known:
            try:
                override(base, **{key: parameter.ends[0]})
            except ValueError as error:
                raise ValueError(f"{path}: parameters.{key}: {error}") from None
    fits: set[tuple[str, Any]] = set()
    wrong: dict[str, str] = {}
    for key, parameter in found.parameters.items():
        for value in parameter.ends:
            if (key, value) in fits:
                continue
            for point in _holding(found.parameters, key, value):
                try:
                    override(base, **point)
                except (ValueError, TypeError) as error:
                    problem = str(error)
                else:
                    fits |= point.items()
                    break
            else:
                wrong.setdefault(key, problem)
    # The sentence names the field; of several keys that one is meant.
    for key, problem in sorted(wrong.items(), key=lambda one: one[0] not in one[1]):
        raise ValueError(f"{path}: parameters.{key}: {problem}")


def _holding(
    parameters: Mapping[str, Choice | Range], key: str, value: Any
) -> Iterator[dict[str, Any]]:
    """Points that hold a value: all of them, or of many those that chance finds."""
    ends = {name: each.ends for name, each in parameters.items()} | {key: (value,)}
    if math.prod(map(len, ends.values())) <= TRIED:
        points: Iterable[Sequence[Any]] = itertools.product(*ends.values())
    else:
        draws = random.Random(0)
        points = ([draws.choice(some) for some in ends.values()] for _ in range(TRIED))
    return (dict(zip(ends, point, strict=True)) for point in points)


def _recipe(command: Sequence[str]) -> str:
    places = [k for k in range(len(command) - 2) if tuple(command[k : k + 2]) == TRAIN]
    return command[places[0] + 2] if places else ""


def _hyperband(path: Path, said: object) -> Hyperband | None:
    if said is None:
        return None
    if not isinstance(said, dict) or said.get("type") != "hyperband":
        raise ValueError(f"{path}: early_terminate.type must be hyperband")
    for key in said:
        _known(path, "early_terminate.", key, ("type", "min_iter", "max_iter", "s", "eta"))
    eta = _whole(path, "early_terminate.eta", said.get("eta", 3), 2)
    if "min_iter" in said:
        for key in ("max_iter", "s"):
            if key in said:
                raise ValueError(f"{path}: early_terminate.{key} does not go with min_iter")
        least = _whole(path, "early_terminate.min_iter", said["min_iter"], 1)
        return Hyperband(tuple(least * eta**k for k in range(MOST_RUNGS)), eta)
    if "max_iter" not in said:
        raise ValueError(f"{path}: early_terminate needs min_iter, or max_iter and s")
    most = _whole(path, "early_terminate.max_iter", said["max_iter"], 1)
    brackets = _whole(path, "early_terminate.s", said.get("s", 1), 1)
    rungs = [most // eta**k for k in range(brackets, 0, -1)]
    if not rungs[-1]:
        raise ValueError(f"{path}: early_terminate.max_iter = {most} is less than eta = {eta}")
    return Hyperband(tuple(rung for rung in rungs if rung), eta)


def _trials(path: Path, method: str, parameters: Mapping[str, Choice | Range], cap: object) -> int:
    if cap is not None:
        _whole(path, "run_cap", cap, 1)
    if method != "grid":
        if not isinstance(cap, int):
            raise ValueError(f"{path}: run_cap is missing: a {method} sweep has no end of its own")
        return cap
    for name, parameter in parameters.items():
        if isinstance(parameter, Range):
            raise ValueError(f"{path}: parameters.{name}: a grid needs values, not min and max")
    points = math.prod(len(parameter.ends) for parameter in parameters.values())
    return min(points, cap) if isinstance(cap, int) else points


def _plain(path: Path, key: str, value: object) -> object:
    if isinstance(value, str):
        _number_in_words(path, key, value)
    elif not isinstance(value, int | float | bool):
        raise ValueError(f"{path}: {key}: {value!r} must be a plain value")
    return value


def _number(path: Path, key: str, value: object) -> Any:
    if isinstance(value, str):
        _number_in_words(path, key, value)
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"{path}: {key} = {value!r} must be a number")
    return value


def _number_in_words(path: Path, key: str, value: str) -> None:
    try:
        number = float(value)
    except ValueError:
        return
    plain = value if re.fullmatch(r"-?\d+", value) else _with_point(number)
    raise ValueError(f"{path}: {key} = {value!r} is a string to YAML; write {plain}")


def _with_point(number: float) -> str:
    """A number as YAML reads it: an exponent needs a point before it."""
    text = repr(number)
    return text if "e" not in text or "." in text else text.replace("e", ".0e")


def _whole(path: Path, key: str, value: object, least: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{path}: {key} = {value!r} must be a whole number, at least {least}")
    return value


def _known(path: Path, within: str, key: object, choices: Sequence[str]) -> None:
    if key not in choices:
        raise ValueError(f"{path}: {within}{key} is not known; {nearest(key, choices)}")
