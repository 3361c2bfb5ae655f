"""Trials of the timing: pairs that are the same, and slowdowns that were planted.

They are fixed beforehand, in number and in order, and each is timed with the quick run's settings.
"""

import random
import time
from collections.abc import Callable
from typing import Any

from benchmarks import speed
from vitx.measure.timing import PROTOCOL, TimingConfig

COUNTS = {0.0: 60, 0.03: 30, 0.05: 30}
"""Trials by the planted share of further work."""
WHAT = "trial"


def shares() -> list[float]:
    """The planted share of every trial, in the order in which they are made."""
    found = [share for share, count in COUNTS.items() for _ in range(count)]
    random.Random(0).shuffle(found)
    return found


def trial(
    number: int, make: Callable[[], speed.Pair], plan: TimingConfig, **how: Any
) -> tuple[str, dict[str, Any]]:
    """One trial: the kind and the fields of its row. `how` are further arguments of `compare`."""
    share, start = shares()[number], time.perf_counter()
    pair = make()
    if share:
        kind, fields = speed.plant(pair, plan, share=share, **how)
    else:
        kind, fields = speed.null(pair, plan, **how)
    said = {"what": WHAT, "trial": number, "share": share, "protocol": PROTOCOL}
    return kind, fields | said | {"seconds": time.perf_counter() - start}
