"""Lanes: each is the run that it would be alone."""

import pytest
import torch

from experiments.recipes import DIGITS
from vitx import data
from vitx.settings import override
from vitx.training import vectorize
from vitx.training.prepare import prepare
from vitx.training.trainer import train

SMALL = override(
    DIGITS,
    **{"model.width": 16, "model.heads": 2, "model.depth": 2, "model.mlp_ratio": 2.0,
       "model.qkv_bias": "none", "steps": 6, "batch": 32, "log_every": 2, "eval_every": 3,
       "optim.warmup_steps": 2, "ema": 0.9,
       "optim.clip": 1.0, "optim.label_smoothing": 0.1},
)  # fmt: skip


@pytest.fixture(scope="module")
def digits():
    return data.load(SMALL.data)


def alone(config, dataset):
    training = prepare(config, dataset=dataset)
    return training.state, train(training)


@pytest.mark.parametrize("name", ["adamw", "sgd", "muon", "lion"])
def test_a_lane_ends_where_the_run_alone_does(name, digits):
    both = {"lion": {"optim.lr": 1e-4}}.get(name, {})
    configs = [
        override(SMALL, seed=seed, **{"optim.name": name, "optim.lr": lr} | both)
        for seed, lr in ((0, 1e-3), (7, 1e-3), (7, 3e-3))
    ]
    lanes = vectorize.train(configs, dataset=digits)
    assert [lane.error for lane in lanes] == ["", "", ""]
    for config, lane in zip(configs, lanes, strict=True):
        state, result = alone(config, digits)
        for key, value in state.result.state_dict().items():
            torch.testing.assert_close(
                lane.training.state.result.state_dict()[key], value, atol=2e-5, rtol=0
            )
        assert lane.result.val.loss == pytest.approx(result.val.loss, abs=1e-4)
        assert len(lane.result.curve) == len(result.curve) == 2


def test_lanes_with_frozen_and_convolutional_parts_are_runs_alone(digits):
    config = override(
        SMALL, **{"model.patchify": "conv", "optim.freeze": ("blocks.0.*", "pos_embed")}
    )
    configs = [override(config, seed=seed) for seed in (1, 2)]
    for config, lane in zip(configs, vectorize.train(configs, dataset=digits), strict=True):
        state, _ = alone(config, digits)
        for key, value in state.result.state_dict().items():
            torch.testing.assert_close(
                lane.training.state.result.state_dict()[key], value, atol=2e-5, rtol=0
            )


def test_a_lane_that_diverges_leaves_the_others_as_they_are(digits):
    configs = [override(SMALL, seed=1), override(SMALL, seed=2, **{"optim.lr": 1e30})]
    good, bad = vectorize.train(configs, dataset=digits)
    assert "is not finite" in bad.error
    assert bad.result is None
    _, result = alone(configs[0], digits)
    assert good.result.val.loss == pytest.approx(result.val.loss, abs=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.depth": 3}, "not in model.depth"),
        ({"model.drop_path": 0.1}, "not in model.drop_path"),
        ({"steps": 7}, "not in steps"),
    ],
)
def test_lanes_differ_in_few_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        vectorize.check([SMALL, override(SMALL, seed=1, **changes)])


@pytest.mark.parametrize(
    ("name", "value"),
    [(f"model.{name}", 0.1) for name in vectorize.NOISE]
    + [("compile", True), ("precision", "bfloat16"), ("accumulate", 2), ("keep_every", 3)],
)
def test_noise_inside_the_model_and_what_has_no_lanes_is_refused_by_name(name, value):
    config = override(SMALL, **{name: value})
    with pytest.raises(ValueError, match=rf"^{name} = "):
        vectorize.check([config, override(config, seed=1)])
