"""Data, optimizer and trainer: splits, order, draws, schedule, determinism, the golden step."""

import math

import pytest
import torch

from benchmarks import accuracy
from benchmarks.accuracy import timm_model, trajectory
from experiments.recipes import DIGITS
from vitx import data
from vitx.settings import override
from vitx.training import evaluate, optim
from vitx.training.config import OptimConfig
from vitx.training.prepare import prepare
from vitx.training.state import init, step
from vitx.training.trainer import train

SHORT = override(DIGITS, steps=6, eval_every=3, batch=32)


def trained(config, run=None, *, folder=None, **how):
    """The last state and the result of a run."""
    training = prepare(config, **how)
    return training.state, train(training, run, folder=folder)


@pytest.fixture(scope="module")
def digits():
    return data.load(DIGITS.data)


def test_the_splits_share_no_image_and_are_stratified(digits):
    sizes = {name: len(getattr(digits, name)) for name in ("train", "val", "test")}
    assert sizes == {"train": 1257, "val": 180, "test": 360}
    for split in (digits.train, digits.val, digits.test):
        share = torch.bincount(split.target, minlength=10) / len(split)
        assert (share - 0.1).abs().max() < 0.012
    rows = torch.cat([s.image.flatten(1) for s in (digits.train, digits.val, digits.test)])
    whole = sorted(map(tuple, rows.tolist()))
    from sklearn.datasets import load_digits

    assert whole == sorted(map(tuple, load_digits().data.astype(int).tolist()))


def test_the_split_depends_on_its_seed_only(digits):
    again = data.load(override(DIGITS.data, rotate=0.0))
    other = data.load(override(DIGITS.data, split_seed=1))
    assert torch.equal(again.test.image, digits.test.image)
    assert not torch.equal(other.test.image, digits.test.image)


def test_normalised_training_images_have_mean_zero_and_deviation_one(digits):
    pixels = digits.normalise(digits.train.image.float())
    assert abs(pixels.mean().item()) < 1e-4
    assert pixels.std().item() == pytest.approx(1, abs=1e-4)


def test_an_epoch_shows_each_image_once_in_an_order_of_its_own():
    one, two = data.epoch_order(0, 0, 100), data.epoch_order(0, 1, 100)
    assert sorted(one.tolist()) == list(range(100))
    assert not torch.equal(one, two)
    assert torch.equal(one, data.epoch_order(0, 0, 100))
    assert not torch.equal(one, data.epoch_order(1, 0, 100))


def test_draws_are_rows_of_images_and_uniform():
    draws = data.epoch_draws(3, 2, 2000, 5)
    assert torch.equal(draws, data.epoch_draws(3, 2, 2000, 5))
    assert abs(draws.mean().item() - 0.5) < 0.02
    assert not torch.equal(draws, data.epoch_draws(3, 3, 2000, 5))


def test_batches_go_on_where_a_run_stopped(digits):
    whole = data.batches(digits, batch=500, seed=1)
    for _ in range(3):
        next(whole)
    later = data.batches(digits, batch=500, seed=1, start=3)
    for (a, x), (b, y), _ in zip(whole, later, range(3), strict=False):
        assert torch.equal(a, b)
        assert torch.equal(x, y)


def test_a_batch_larger_than_the_split_is_refused(digits):
    with pytest.raises(ValueError, match="batch = 2000 is larger than the training split of 1257"):
        next(data.batches(digits, batch=2000, seed=0))


def test_the_schedule_warms_up_and_ends_at_zero():
    config = OptimConfig(lr=1.0, warmup_steps=10)
    assert optim.learning_rate(config, 0, 110) == pytest.approx(0.1)
    assert optim.learning_rate(config, 9, 110) == pytest.approx(1.0)
    assert optim.learning_rate(config, 10, 110) == pytest.approx(1.0)
    assert optim.learning_rate(config, 60, 110) == pytest.approx(0.5)
    assert optim.learning_rate(config, 110, 110) == pytest.approx(0.0, abs=1e-12)


def test_only_matrices_and_kernels_decay():
    state = init(SHORT)
    decayed = {id(p) for p in state.optimizers[0].param_groups[0]["params"]}
    for name, parameter in state.model.named_parameters():
        decays = parameter.ndim >= 2 and not name.endswith(("_token", "pos_embed"))
        assert (id(parameter) in decayed) == decays, name
    assert state.optimizers[0].param_groups[1]["weight_decay"] == 0


def test_a_wrapped_models_tokens_and_positions_do_not_decay():
    state = init(SHORT)
    wrapped = torch.nn.ModuleDict({"module": state.model})
    decayed = {id(p) for p in optim.parameter_groups(wrapped, SHORT.optim)[0]["params"]}
    assert decayed == {id(p) for p in state.optimizers[0].param_groups[0]["params"]}


def test_the_same_seed_trains_to_the_same_bits_and_another_does_not():
    one, two, three = (trained(override(SHORT, seed=seed))[0].model for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.head.weight, three.head.weight)


def test_training_reads_validation_on_time_and_lowers_the_loss():
    _, result = trained(override(SHORT, steps=40, eval_every=15))
    assert [event["step"] for event in result.curve] == [15, 30, 40]
    assert result.curve[-1]["val/loss"] < result.curve[0]["val/loss"] < math.log(10) + 0.5
    assert result.test.images == 360


def test_a_step_moves_every_parameter():
    state = init(override(SHORT, **{"model.init": "timm"}))
    before = {name: p.detach().clone() for name, p in state.model.named_parameters()}
    stream = data.batches(data.load(SHORT.data), batch=32, seed=0)
    for _ in range(2):
        step(state, next(stream), SHORT)
    assert state.steps_done == 2
    moved = {n for n, p in state.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == set(before)


GOLDEN = {
    "image mean": -0.03991257,
    "image deviation": 0.8500786,
    "targets": 140,
    "position norm": 0.4298566,
    "qkv norm": 1.67029,
    "kernel norm": 4.041028,
    "loss": 2.291029,
    "second loss": 2.283525,
    "head norm after": 0.4075398,
    "bias norm after": 0.0008136578,
}


def test_one_seeded_step_gives_the_golden_numbers():
    """Written by this test's own code on a CPU. It moves when the init, the order or draws of the
    data, the model's function or the optimizer change; update it only for such a change."""
    config = override(SHORT, **{"model.init": "timm"})
    state = init(config)
    dataset = data.load(config.data)
    batch = next(data.batches(dataset, batch=32, seed=0))
    weights = dict(state.model.named_parameters())
    statistics = {
        "image mean": batch[0].mean(),
        "image deviation": batch[0].std(),
        "targets": batch[1].sum(),
        "position norm": weights["pos_embed"].norm(),
        "qkv norm": weights["blocks.1.attn.qkv.weight"].norm(),
        "kernel norm": weights["patch_embed.proj.weight"].norm(),
        "loss": step(state, batch, config)["loss"],
        "second loss": step(state, batch, config)["loss"],
        "head norm after": weights["head.weight"].norm(),
        "bias norm after": weights["blocks.2.mlp.fc2.bias"].norm(),
    }
    assert {name: value.item() for name, value in statistics.items()} == pytest.approx(
        GOLDEN, rel=1e-4
    )


def test_the_trajectory_of_timms_model_is_the_same_step_for_step():
    assert trajectory(DIGITS, 12) < 1e-10


def test_the_trajectory_check_sees_a_changed_function(monkeypatch):
    def other(model):
        vit = accuracy.build(override(DIGITS.model, norm="layernorm(eps=1e-3)")).double()
        vit.load_state_dict(model.state_dict())
        return vit

    monkeypatch.setattr(accuracy, "from_timm", other)
    assert accuracy.trajectory(DIGITS, 3) > 1e-6


def test_an_undefined_loss_is_no_agreement(monkeypatch):
    losses = iter([1.0, 1.0, 1.0, math.nan])
    monkeypatch.setattr(accuracy, "_double_step", lambda *_: next(losses))
    assert accuracy.trajectory(DIGITS, 2) == math.inf


def test_the_two_sides_draw_their_own_weights():
    ours, theirs = init(DIGITS).model.state_dict(), timm_model(DIGITS.model, 0).state_dict()
    assert ours.keys() == theirs.keys()
    assert not torch.equal(ours["pos_embed"], theirs["pos_embed"])


def test_scores_are_counted_by_hand():
    logits = torch.tensor([[2.0, 1.0], [0.0, 3.0], [1.0, 0.0], [5.0, 0.0]])
    target = torch.tensor([0, 1, 1, 0])
    score = evaluate.score(logits, target)
    assert score.accuracy == 0.75
    assert score.standard_error == pytest.approx((0.75 * 0.25 / 4) ** 0.5)
    assert evaluate.confusion(logits, target, 2).tolist() == [[2, 0], [1, 1]]


def test_predicting_leaves_the_models_mode_as_it_was(digits):
    model = init(SHORT).model
    evaluate.predict(model, digits, digits.val)
    assert model.training
    model.eval()
    evaluate.predict(model, digits, digits.val)
    assert not model.training


def test_the_support_vector_machine_reads_digits(digits):
    assert 0.97 < evaluate.svm_accuracy(digits) < 0.995
