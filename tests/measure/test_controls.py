"""The planted slowdown: the same function with the stated share of added work."""

import pytest
import torch

from benchmarks import render, speed
from vitx.measure.equality import equality
from vitx.model.cost import forward_macs


def test_the_planted_slowdown_adds_its_share_of_macs_and_changes_no_value():
    options = {"img_size": 64, "depth": 3}
    pair = speed.make_pair("vit_tiny_patch16_224", batch=2, device=torch.device("cpu"), **options)
    image = pair.example[:1]
    slowed, keys = speed.slow_down(pair.reference, image, speed.PLANTED)
    added = forward_macs(slowed, image) / forward_macs(pair.reference, image) - 1
    assert added == pytest.approx(speed.PLANTED, rel=0.06)  # widths are rounded
    assert equality(pair.reference, slowed, pair.example, keys=keys).passed


def pairs():
    """The committed rows of vitx against timm by the main job."""
    rows = (row for row in render.committed() if row["kind"] == "speed" and "what" not in row)
    return [row for row in rows if "page_faults" in row]


def test_a_failed_control_takes_no_place_among_the_speeds():
    rows = pairs()
    rows[-1] |= {"keep_memory": True}
    failed = rows[-1] | {"kind": "failure", "candidate": "timm:vit_tiny_patch16_224 again"}
    assert render.speed_rows([*rows, failed]) == render.speed_rows(rows)
    ours = rows[-1] | {"kind": "failure"}
    assert ours in render.speed_rows([*rows, ours])


def test_only_timings_with_freed_memory_kept_are_claimed():
    (*_, last) = pairs()
    kept, default = (last | {"keep_memory": keep, "ratio": 1.5 - keep} for keep in (True, False))
    assert render.claimed([kept, default]) == render.claimed([default, kept]) == [kept]
    assert [line[4] for line in render.speed_table([default, kept]).body] == ["kept", "by default"]
    assert "1.500" not in render.headline([kept, default]).markdown()
