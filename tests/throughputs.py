"""Throughput results as the benchmark makes them, for tests of tables, packs and checks."""

import json
import math
from dataclasses import replace
from typing import Any

from benchmarks.kinds import Speed, Throughput
from experiments.study.results import encode
from vitx.measure import breakdown, stats
from vitx.measure.comparison import (
    Comparison,
    CompileSeconds,
    Latency,
    Process,
    Rate,
    Saved,
    Side,
    Utilisation,
)
from vitx.measure.equality import Equality
from vitx.measure.stats import Interval
from vitx.measure.timing import TimingConfig
from vitx.training.provenance import environment

EQUAL = Equality(True, "", 1e-16, 1e-15, "head.bias", 152, 0.8, 22_000_000, 22_000_000)
SAVED = Saved(200, Interval(0.004, 0.002, 0.005))
SECONDS = CompileSeconds(60.0, 20.0)


def rate_of(value: float) -> Rate:
    return Rate(value, value * 0.9, value * 1.1, Interval(value, value * 0.95, value * 1.05))


def side_of(images_per_s: float, macs: int, **more: Any) -> Side:
    flops, read = 9.2e9 * images_per_s, 3e7 * images_per_s
    used = Utilisation(flops, 2e12, 2.1e12, 2e10, 0.45, bytes=read)
    stages = dict.fromkeys(breakdown.STAGES, 0.01)
    values = {"rate": rate_of(images_per_s), "macs": macs, "parameters": 22_000_000}
    values |= {"peak_mib": 300.0, "stages": stages, "utilisation": used}
    return Side(**values | more)


def comparison_of(
    *,
    batch: int = 8,
    rate: float = 100.0,
    ratio: float = 1.1,
    compile: str = "none",
    reference: dict[str, Any] | None = None,
    candidate: dict[str, Any] | None = None,
    config: TimingConfig | None = None,
    **more: Any,
) -> Comparison:
    """Of a model beside one with 100 images per second; dicts change the two sides."""
    logs, again = ([middle - 0.01, middle, middle + 0.01] for middle in (math.log(ratio), 0.0))
    processes = tuple(Process(a, b) for a, b in zip(logs, again, strict=True))
    interval, floor = stats.paired_ratio(logs), stats.noise_floor(again)
    quantile = Interval(0.01, 0.009, 0.011)
    latency = Latency(300, quantile, quantile, quantile)
    values = {
        "config": replace(config or TimingConfig(details=True), compile=compile),
        "verdict": stats.speed_verdict(interval, floor),
        "ratio": interval,
        "floor": floor,
        "processes": processes,
        "batch": batch,
        "dtype": "float32",
        "device": "cpu",
        "equality": EQUAL,
        "reference": side_of(100.0, 4_600_000_000, **reference or {}),
        "candidate": side_of(rate, 4_300_000_000, **{"latency": latency} | (candidate or {})),
        "raw": [{"rounds": [1, 2, 3]}],
    }
    return Comparison(**values | more)


def throughput(
    model: str = "vitx:S/16",
    *,
    reference_name: str = "timm:vit_small_patch16_224",
    batch: int = 8,
    batch_asked: str = "",
    checked: str = "checked",
    protocol: int = 4,
    origin: str = "",
    number: int | None = None,
    at: dict[str, Any] | None = None,
    **more: Any,
) -> Throughput:
    """A result of a model beside timm's; `at` changes the environment, the rest its comparison."""
    here = replace(environment(), **{"threads": 2, "dirty": False} | (at or {}))
    return Throughput(
        id=f"2026-11-22T00:00:00Z-{batch if number is None else number}",
        environment=here,
        origin=origin,
        reference=reference_name,
        candidate=model,
        comparison=comparison_of(batch=batch, **more),
        configuration="a",
        batch_asked=batch_asked or str(batch),
        checked=checked,
        protocol=protocol,
    )


def compiled(rate: float = 150.0, **more: Any) -> Throughput:
    """One of a compiled model."""
    candidate = {"compile_s": SECONDS} | more.pop("candidate", {})
    return throughput(rate=rate, compile="default", candidate=candidate, **more)


def failed(model: str = "vitx:S/16", verdict: str = "failed", **more: Any) -> Throughput:
    """One that has nothing to show but the reason."""
    made = throughput(model, **more)
    reason = {"verdict": verdict, "reason": "no memory", "ratio": None, "floor": None}
    return replace(made, comparison=replace(made.comparison, processes=(), **reason))


def speed(model: str = "vitx:a", **more: Any) -> Speed:
    """A result of the main job with the same values."""
    made = throughput(model, **more)
    return Speed(
        id=made.id,
        environment=made.environment,
        origin=made.origin,
        reference=made.reference,
        candidate=made.candidate,
        comparison=made.comparison,
    )


def plain(result: Any) -> dict[str, Any]:
    """A result as its line has it."""
    return json.loads(encode(result))


def changed(result: Any, places: dict[str, Any]) -> dict[str, Any]:
    """The same with values at dotted places changed."""
    values = plain(result)
    for place, value in places.items():
        *path, name = place.split(".")
        inner = values
        for key in path:
            inner = inner[int(key)] if key.isdecimal() else inner[key]
        inner[name] = value
    return values
