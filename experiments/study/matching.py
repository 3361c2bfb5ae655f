"""Configurations of equal cost: a width or depth that costs what the baseline does."""

import bisect
import math

from vitx.model.cost import cost
from vitx.registry import UserError
from vitx.settings import delta, flat, override
from vitx.training.config import TrainConfig

NEAR = 0.02
"""A cost within this share of the baseline's is taken as matched by width alone."""


def matched(config: TrainConfig, base: TrainConfig, by: str) -> tuple[TrainConfig, str]:
    """`config` with the width, or where that comes not near the depth, that costs what `base` does.

    `by` is `macs` (of one image forward) or `params`. Widths keep the number of heads and are
    multiples of it and of 4. What `config` itself changes in `base` stays; ValueError if that is
    both. Also returns what was changed and how near it comes, in words.
    """
    counted, words = {"macs": ("macs", "MACs"), "params": ("parameters", "parameters")}[by]
    target = getattr(cost(base.model), counted)
    free = [name for name in ("width", "depth") if f"model.{name}" not in delta(config, base)]
    if not free:
        raise UserError("width and depth are both set, so neither can be adjusted to the cost")
    step = math.lcm(config.model.heads, 4)

    def share(one: TrainConfig) -> float:
        return getattr(cost(one.model), counted) / target

    def off(one: TrainConfig) -> float:
        return abs(share(one) - 1)

    def nearest_of(name: str, values: range) -> TrainConfig:
        made = [override(config, **{f"model.{name}": value}) for value in values]
        # The cost grows with the value, so a few of them are counted.
        place = bisect.bisect_left(made, 1, key=share)
        return min(made[max(place - 1, 0) : place + 1], key=off)

    if off(config) == 0:
        return config, ""
    best = config
    if "width" in free:
        best = nearest_of("width", range(step, 4 * config.model.width + step, step))
    if "depth" in free and off(best) > NEAR:
        deeper = nearest_of("depth", range(1, 8 * config.model.depth + 1))
        best = min((best, deeper), key=off)
    before = flat(config)
    changed = [
        f"{name.partition('.')[2]} {before[name]} to {value}"
        for name, value in delta(best, config).items()
    ]
    return best, f"{', '.join(changed) or 'nothing nearer'}; {share(best):.3f} of the {words}"
