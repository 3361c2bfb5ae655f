"""A question: one baseline, what is varied, and how the answer is judged.

A file of experiments/questions is a question. It sets `BASE`, a `TrainConfig`, and `AXES`. An axis
is a dotted field with its values, or a name of its own whose values are named sets of fields:

    AXES = {"model.registers": [1, 4]}
    AXES = {"pool": {"mean": {"model.pool": "mean", "model.class_token": False}}}

It may also set SEEDS, METRIC (val/loss if not set; images_per_s to time without training), EFFECT
(the smallest difference of interest, in the metric's unit), DESIGN (`one` factor at a time, or
`full`: all combinations) and MATCH (`macs` or `params`: each arm's width or depth is adjusted until
it has the baseline's).
"""

import dataclasses
import importlib.util
import inspect
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Annotated, Literal

from experiments import cli
from experiments.study.kinds import paired
from experiments.study.matching import matched
from experiments.study.pages import ROOT
from experiments.study.runs import Ended, Job
from vitx.measure import stats
from vitx.registry import UserError, choose, nearest
from vitx.settings import check_fields, override, within
from vitx.training import tracking
from vitx.training.config import TrainConfig, identity

FOLDER = ROOT / "experiments" / "questions"
BASELINE = "baseline"
METRICS = {
    # whether lower is better
    tracking.VAL_LOSS: True,
    tracking.VAL_ACCURACY: False,
    tracking.IMAGES_PER_S: False,
}
SHARED = {
    "seed": "the seeds of all arms are set by SEEDS",
    **dict.fromkeys(
        ("data.name", "data.val", "data.test", "data.split_seed", "data.stratified"),
        "all arms are read on the same images",
    ),
}
"""Fields that no axis may set, and why."""


Effect = Annotated[float, within(0, math.inf, ends="()", rule="must be a positive number")]


@dataclass(frozen=True)
class _File:
    """What a question's file sets."""

    BASE: TrainConfig
    AXES: Mapping[str, object]
    SEEDS: Sequence[int] | None = None
    METRIC: str = tracking.VAL_LOSS
    EFFECT: Effect = 0.01
    DESIGN: Literal["one", "full"] = "one"
    MATCH: Literal["none", "macs", "params"] = "none"


@dataclass(frozen=True)
class Arm:
    """One configuration of a question, without its seed."""

    name: str
    config: TrainConfig
    adjusted: str = ""
    """What was changed to match the baseline's cost."""


@dataclass(frozen=True)
class Question:
    """What a question's file says, checked. The first arm is the baseline."""

    name: str
    text: str
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    metric: str
    effect: float
    """The smallest difference of interest, in the metric's unit."""

    @property
    def family(self) -> int:
        """Comparisons with the baseline, which are judged together."""
        return len(self.arms) - 1

    @property
    def lower_is_better(self) -> bool:
        return METRICS[self.metric]

    @property
    def headline(self) -> str:
        """The first line of its text."""
        return self.text.partition("\n")[0]

    @property
    def trained(self) -> bool:
        """Whether runs answer it; a question of speed alone is answered by timing."""
        return self.metric != tracking.IMAGES_PER_S

    def jobs(self) -> list[Job]:
        """Every run, seed by seed, so that what is made first is whole pairs."""
        if not self.trained:
            return []
        return [self.job(arm, seed) for seed in self.seeds for arm in self.arms]

    def job(self, arm: Arm, seed: int) -> Job:
        """One run: named by what differs from the baseline, with its seed."""
        name = f"{arm.name[:80]},seed={seed}"  # short enough for a folder
        return Job(self.name, name, override(arm.config, seed=seed))

    def ended(self, arm: Arm, runs: Mapping[str, Ended]) -> dict[int, Ended]:
        """The arm's runs that have ended, by seed, of all runs by identity."""
        keys = {seed: self.job(arm, seed).key for seed in self.seeds}
        return {seed: runs[key] for seed, key in keys.items() if key in runs}

    def values(self, arm: Arm, metric: str, runs: Mapping[str, Ended]) -> dict[int, float]:
        """A final value per seed, of the runs that ended well."""
        well = {seed: run for seed, run in self.ended(arm, runs).items() if not run.error}
        for run in well.values():
            if metric not in run.values:
                raise UserError(f"{run.folder} has no {metric}: no images were held out for it")
        return {seed: run.values[metric] for seed, run in well.items()}

    def differences(self, arm: Arm, metric: str, runs: Mapping[str, Ended]) -> dict[int, float]:
        """Arm minus baseline per seed, of the pairs that ended well."""
        return paired(*(self.values(one, metric, runs) for one in (self.arms[0], arm)))

    def arm(self, name: str) -> Arm:
        """The arm of that name. Raises ValueError."""
        by_name = {arm.name: arm for arm in self.arms}
        if name not in by_name:
            raise UserError(f"arm = {name!r} is none of {self.name}; {nearest(name, by_name)}")
        return by_name[name]


def names() -> list[str]:
    """The questions of this folder."""
    return [
        path.stem
        for path in sorted(FOLDER.glob("*.py"))
        if "\nAXES = " in path.read_text(encoding="utf8")
    ]


def read(name: str, *, data_root: str = "") -> Question:
    """The question in `experiments/questions/NAME.py`. Raises ValueError naming file and key.

    `data_root` replaces the folder of its data.
    """
    word = name.replace("-", "_")
    if not word.isidentifier() or importlib.util.find_spec(f"experiments.questions.{word}") is None:
        raise UserError(f"question = {name!r} is not known; {nearest(word, names())}")
    module = cli.module(f"experiments.questions.{word}", f"experiments/questions/{word}.py")
    return from_module(module, data_root=data_root)


def from_module(module: ModuleType, *, data_root: str = "") -> Question:
    """The question that a module states. Raises ValueError naming its file and the key."""
    name = module.__name__.rpartition(".")[2]
    path = f"experiments/questions/{name}.py"
    for word in ("BASE", "AXES"):
        if not hasattr(module, word):
            raise UserError(f"{path} is no question: it sets no {word}")
    words = [field.name for field in dataclasses.fields(_File)]
    file = _File(**{word: getattr(module, word) for word in words if hasattr(module, word)})
    try:
        return _question(name, inspect.getdoc(module) or "", file, data_root)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _question(name: str, text: str, file: _File, data_root: str) -> Question:
    """The question that a file's values make. Raises ValueError naming the key."""
    if not isinstance(file.BASE, TrainConfig):
        raise UserError(f"BASE = {file.BASE!r} must be a TrainConfig")
    check_fields(file)
    choose("METRIC", file.METRIC, METRICS)
    if file.METRIC != tracking.IMAGES_PER_S and not file.BASE.data.has_val:
        raise UserError(f"METRIC = {file.METRIC!r} is read on validation images; set data.val")
    for word in ("Question", "Expect", "Cost", "Run"):
        if f"{word}:" not in text:
            raise UserError(f"the docstring must say {word}")
    base = override(file.BASE, **{"data.root": data_root}) if data_root else file.BASE
    arms = _arms(file, base)
    seeds = range(stats.fewest_seeds(len(arms) - 1)) if file.SEEDS is None else file.SEEDS
    plain = tuple(seeds) if isinstance(seeds, Sequence) else ()
    whole = all(isinstance(seed, int) and 0 <= seed < 2**31 for seed in plain)
    if len(plain) < 2 or not whole or len(set(plain)) < len(plain):
        raise UserError(
            f"SEEDS = {seeds!r} must be two or more different whole numbers below 2**31"
        )
    return Question(name, text, arms, plain, file.METRIC, file.EFFECT)


Level = tuple[str, dict[str, object]]
"""What a level is called, and the fields that it sets."""


def _arms(file: _File, base: TrainConfig) -> tuple[Arm, ...]:
    """The baseline and every arm that differs from it."""
    if not isinstance(file.AXES, Mapping) or not file.AXES:
        raise UserError(f"AXES = {file.AXES!r} must name at least one axis with its values")
    levels = [_levels(str(axis), values) for axis, values in file.AXES.items()]
    if file.DESIGN == "one":
        combinations = [[level] for values in levels for level in values]
    else:
        unvaried: Level = ("", {})
        combinations = itertools.product(*([unvaried, *values] for values in levels))
    # Combinations that set the same come once, under their first name.
    by_identity = {identity(base): Arm(BASELINE, base)}
    for combination in combinations:
        key, arm = _arm(base, combination, file.MATCH)
        by_identity.setdefault(key, arm)
    arms = tuple(by_identity.values())
    if len(arms) - 1 > stats.MOST_COMPARISONS:
        raise UserError(
            f"AXES: {len(arms) - 1} arms are too many to be judged together; at most "
            f"{stats.MOST_COMPARISONS}"
        )
    if len(arms) < 2:
        raise UserError(f"AXES = {file.AXES!r} changes nothing in BASE")
    for words, keys in (
        ("are called", [arm.name for arm in arms]),
        ("are the same once their cost is matched:", [identity(arm.config) for arm in arms]),
    ):
        pairs = zip(arms, keys, strict=True)
        if twice := [arm.name for arm, key in pairs if keys.count(key) > 1]:
            raise UserError(f"AXES: two arms {words} {' and '.join(dict.fromkeys(twice))}")
    for arm in arms:
        for part in (arm.config, arm.config.model, arm.config.data, arm.config.optim):
            for name, value in vars(part).items():
                if callable(value):  # runs are kept, and found again, by words
                    rule = "must be a name in its registry"
                    raise UserError(f"{arm.name}: {name} = {value!r} {rule}")
    return arms


def _arm(base: TrainConfig, combination: Sequence[Level], match: str) -> tuple[str, Arm]:
    """The arm of a combination of levels, its cost matched; and the identity of what was set."""
    name = ",".join(label for label, _ in combination if label)
    changes = {field: value for _, fields in combination for field, value in fields.items()}
    for field in SHARED.keys() & changes:
        raise UserError(f"AXES, {name}: {field} can't be varied: {SHARED[field]}")
    try:
        config = override(base, **changes)
        same = match == "none" or identity(config) == identity(base)
        arm = Arm(name, config) if same else Arm(name, *matched(config, base, match))
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"AXES, {name}: {error}") from None
    return identity(config), arm


def _levels(axis: str, values: object) -> list[Level]:
    """The levels of one axis: a field's values, or named sets of fields."""
    levels = []
    if isinstance(values, Mapping) and all(isinstance(v, Mapping) for v in values.values()):
        levels = [(str(name), dict(fields)) for name, fields in values.items()]
    elif isinstance(values, Sequence) and not isinstance(values, str):
        levels = [(f"{axis}={value}", {axis: value}) for value in values]
    if not levels:
        raise UserError(
            f"AXES[{axis!r}] = {values!r} must be a list of values, or names with the fields that "
            "each sets"
        )
    return levels
