"""The planted slowdown: the same function with the stated share of added work."""

from dataclasses import replace

import pytest
import torch

from benchmarks import render, speed
from benchmarks.kinds import Control, Speed
from benchmarks.report import tables, verdicts
from experiments.study.results import of_kind
from vitx.measure.equality import equality
from vitx.measure.stats import Interval
from vitx.model.cost import forward_macs


def test_the_planted_slowdown_adds_its_share_of_macs_and_changes_no_value():
    options = {"img_size": 64, "depth": 3}
    pair = speed.make_pair("vit_tiny_patch16_224", batch=2, device=torch.device("cpu"), **options)
    image = pair.example[:1]
    slowed, keys = speed.slow_down(pair.reference, image, speed.PLANTED)
    added = forward_macs(slowed, image) / forward_macs(pair.reference, image) - 1
    assert added == pytest.approx(speed.PLANTED, rel=0.06)  # widths are rounded
    assert equality(pair.reference, slowed, pair.example, keys=keys).passed


def speeds():
    """The committed timings of vitx beside timm by the main job, of kept memory."""
    committed = of_kind(render.committed(), Speed)
    return [result for result in committed if result.comparison.config.keep_memory]


def test_a_failed_timing_is_shown_and_a_failed_control_is_no_speed():
    results = speeds()
    last = results[-1]
    comparison = replace(last.comparison, verdict="failed", ratio=None, floor=None, processes=())
    labels = {"id": last.id, "environment": last.environment, "reference": last.reference}
    labels |= {"candidate": "timm again", "comparison": comparison}
    control = Control(**labels, planted=0.0, planted_counted=0.0)
    assert tables.speeds([*results, control]) == tables.speeds(results)
    failed = replace(last, comparison=comparison)
    assert failed in tables.speeds([*results, failed])


def test_only_timings_with_freed_memory_kept_are_claimed():
    kept = speeds()[-1]
    config = replace(kept.comparison.config, keep_memory=False)
    ratio = Interval(1.5, 1.4, 1.6)
    default = replace(kept, comparison=replace(kept.comparison, config=config, ratio=ratio))
    assert tables.claimed([kept, default]) == tables.claimed([default, kept]) == [kept]
    shown = tables.speed_table([default, kept]).records()
    assert [line["freed memory"] for line in shown] == ["kept", "by default"]
    assert "1.500" not in verdicts.headline([kept, default]).markdown()
