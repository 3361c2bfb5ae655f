"""Whether rows hold what they claim: their words, their numbers, and verdicts made of their values.

What can't be recomputed is left as it is said: a step's ratio, of whose processes a row tells
nothing, and whatever was measured.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks import gate, trials
from benchmarks.report import matrix
from benchmarks.report.matrix import CHECKED, MEASURED, QUANTILES, SIDES, WHAT, Rendering
from experiments.study.pages import Row
from vitx.measure import stats
from vitx.measure.compare import ALONE, ONE_PROCESS
from vitx.measure.equality import TOLERANCE, largest
from vitx.measure.timing import COMPILES, DTYPES, MODES

NO_VERDICT = "smoke run, no verdict"
"""What rows of a run say whose settings are too small to tell anything."""
CELL = ("candidate", "reference", "mode", "batch", "batch_asked", "dtype", "compile", "device",
        "plan", "protocol")  # fmt: skip
ENVIRONMENT = ("cpu", "gpu", "cuda", "cores", "affinity", "threads", "versions", "matmul_precision")
NEEDED = ("images_per_s", "macs", "parameters", "peak_mib", "compile_s", "utilisation")
"""Fields that a throughput row of a timed model has, by side."""
RATES = ("flops", "peak_low", "peak_high", "bandwidth")
"""What utilisation is read from, a second."""
LEFT = ("remainder", "residual")
"""Stages that are differences of times, which noise can make less than nothing."""
SAVED = "saved"
"""What compiling saves may be less than nothing too."""
MOST = 1e21
"""No number of a row is larger."""
ERRORS = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
"""What a value of another kind than expected raises."""


def check(row: Row, where: str) -> None:
    """ValueError if a row claims what its values do not say, or a throughput row lacks what is
    shown."""
    if row.get("what") == WHAT:
        environment = row["environment"]
        missing = [name for name in CELL if name not in row]
        missing += [f"environment.{name}" for name in ENVIRONMENT if name not in environment]
        if row["kind"] == "speed":
            missing += [name for name in NEEDED if not isinstance(row.get(name), Mapping)]
        if missing:
            raise ValueError(f"{where} is a throughput row without {missing[0]}")
        shown(row, where, matrix.TABLES)
    try:
        for each in _checks(row):
            each(row)
    except ERRORS as error:
        raise ValueError(f"{where} is no whole row of kind {row['kind']}: {error!r}") from None


def shown(row: Row, where: str, tables: Mapping[str, Rendering]) -> None:
    """ValueError if one of the tables can't show the row."""
    try:
        lines = [line for table in tables.values() for line in table([row]).body]
        if not all(isinstance(cell, str) for line in lines for cell in line):
            raise TypeError("a cell is no text")
    except ERRORS as error:
        raise ValueError(f"{where} is no whole row of kind {row['kind']}: {error!r}") from None


def _checks(row: Row) -> list[Callable[[Row], None]]:
    """What is checked of a row of that kind."""
    kind, what = row["kind"], row.get("what")
    timed = [] if kind == "failure" else [_recompute, _processes]
    if what == WHAT:
        return [_words, _numbers, *timed, _outputs]
    if what == trials.WHAT:
        return [_trial, *([_numbers] if timed else []), *timed]
    if what == gate.WHAT:
        return timed if "log_ratios" in row else []  # the first of its rows have none
    if what is not None:
        return []
    if kind in ("speed", "plant", "noise"):
        return [_numbers, *timed]
    return {"equality": [_equal], "accuracy": [_accuracy]}.get(kind, [])


def _words(row: Row) -> None:
    """ValueError for a word that no throughput row has."""
    known = {"kind": ("speed", "failure"), "mode": MODES, "dtype": DTYPES, "compile": COMPILES}
    for name, words in known.items():
        if row[name] not in words:
            raise ValueError(f"{name} = {row[name]!r}")


def _numbers(row: Row) -> None:
    """ValueError for a number that can't be: too large, out of order, or no count of images."""
    least = 0 if row["kind"] == "failure" else 1  # the best batch of a failure may be unknown
    if type(row["batch"]) is not int or row["batch"] < least:
        raise ValueError(f"batch = {row['batch']!r}")
    for name, value in matrix.flat("", row):
        if isinstance(value, float | int) and not abs(value) < MOST:
            raise ValueError(f"{name} = {value}")
    for name, value in matrix.flat("", {what: row.get(what) for what in MEASURED}):
        if isinstance(value, bool):
            raise ValueError("a number is true or false")
        left = name.endswith(LEFT) or name.startswith(SAVED)
        if isinstance(value, float | int) and value < 0 and not left:
            raise ValueError(f"{name} = {value}")
    if row["kind"] == "failure":
        return
    for side in SIDES if row["ratio"] is not None else ("candidate",):
        rate = row["images_per_s"][side]
        _in_order(rate["low"], rate["median"], rate["high"])
        if "mean" in rate:
            _in_order(rate["mean_low"], rate["mean"], rate["mean_high"])
        if used := (row.get("utilisation") or {}).get(side):
            for name in (*RATES, "bytes") if "bytes" in used else RATES:
                _in_order(used[name])
        if found := (row.get(SAVED) or {}).get(side):
            low, value, high = (found[key] for key in ("low", "value", "high"))
            if not low <= value <= high:
                raise ValueError(f"{SAVED}: {low}, {value}, {high} are not in order")
        if found := (row.get("latency") or {}).get(side):
            for name in QUANTILES:
                _in_order(*(found[name][key] for key in ("low", "value", "high")))


def _in_order(*values: float) -> None:
    """ValueError unless these are positive numbers, none smaller than the one before."""
    if list(values) != sorted(values) or not values[0] > 0:
        raise ValueError(f"{', '.join(map(str, values))} are not in order")


def _recompute(row: Row) -> None:
    """ValueError if ratio, floor and verdict are not those of the processes' log ratios."""
    if row["ratio_low"] is None:
        alone = row["ratio"] is None and row["verdict"] in (ALONE, stats.INCONCLUSIVE)
        one = row["processes"] == 1 and row["verdict"] in (ONE_PROCESS, NO_VERDICT)
        if not (alone or one):
            raise ValueError(f"{row['verdict']!r} without an interval")
        return
    ratio, floor = stats.paired_ratio(row["log_ratios"]), stats.noise_floor(row["log_ratios_again"])
    said = [row[name] for name in ("ratio", "ratio_low", "ratio_high", "noise_floor")]
    verdicts = (stats.speed_verdict(ratio, floor), stats.INCONCLUSIVE, NO_VERDICT)
    same = _alike((ratio.value, ratio.low, ratio.high, floor), said)
    if not same or row["verdict"] not in verdicts:
        raise ValueError("ratio, floor and verdict are not those of its processes")


def _alike(found: Any, said: Any) -> bool:
    """Whether two lists of numbers are the same but for rounding."""
    pairs = zip(found, said, strict=True)
    return all(math.isclose(one, other, rel_tol=1e-6, abs_tol=1e-12) for one, other in pairs)


def _processes(row: Row) -> None:
    """ValueError if a row is not of as many processes as it says."""
    if row["ratio_low"] is not None and row["processes"] != len(row["log_ratios"]):
        raise ValueError(f"processes = {row['processes']} of {len(row['log_ratios'])} ratios")


def _outputs(row: Row) -> None:
    """ValueError if that its outputs were checked is only said."""
    claimed = row["kind"] == "speed" and row["checked"] == CHECKED
    if claimed and row["equality"].get("passed") is not True:
        raise ValueError("its outputs were not checked")


def _trial(row: Row) -> None:
    """ValueError for a trial that nobody plans, or one that failed and yet saw something."""
    if row["share"] not in trials.COUNTS or not 0 <= row["trial"] < sum(trials.COUNTS.values()):
        raise ValueError(f"there is no trial {row['trial']} of {row['share']}")
    if row["kind"] == "failure" and row["verdict"] in ("slower", "faster"):
        raise ValueError(f"it failed, and says {row['verdict']!r}")


def _equal(row: Row) -> None:
    """ValueError if models are said to be equal whose outputs or gradients differ."""
    found = row["equality"]
    errors = [float(found[name]) for name in ("output_error", "gradient_error")]
    if row["verdict"] == "equal" and not (found["passed"] and largest(errors) <= TOLERANCE):
        raise ValueError("what is said to be equal is not")


def _accuracy(row: Row) -> None:
    """ValueError if the equivalence test is not that of the values."""
    before, after = row["reference_values"], row["candidate_values"]
    if row["seeds"] != len(after):
        raise ValueError(f"seeds = {row['seeds']} of {len(after)} values")
    if not isinstance(row["low"], float):
        if row["verdict"] == "equivalent":
            raise ValueError("'equivalent' without an interval")
        return
    test = stats.equivalence(before, after, margin=row["margin"])
    said = [row[name] for name in ("difference", "low", "high", "p_equivalence")]
    same = _alike((test.difference, test.low, test.high, test.p_equivalence), said)
    if not same or (row["verdict"] == "equivalent" and not test.equivalent):
        raise ValueError("the equivalence test is not that of its values")
