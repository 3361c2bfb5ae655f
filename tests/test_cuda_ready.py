"""Ready for CUDA without a GPU: under fake tensors, every preset runs on `cuda` with no host sync.

Forward, loss, batch augmentation, metrics and the fused optimizer step are covered; backward and
autocast need a real device (`pytest --device cuda`).
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import vitx
from experiments.recipes import RECIPES
from vitx import metrics
from vitx.data.dataset import Dataset
from vitx.data.loader import Split, batches, epoch_draws
from vitx.model.config import SIZES
from vitx.settings import override
from vitx.training import optim
from vitx.training import state as training
from vitx.training.config import OptimConfig
from vitx.training.loss import cross_entropy


@pytest.fixture
def fake(unchecked, monkeypatch):
    """Fake tensors have no values, so none are drawn; drawing is CPU work on any device."""
    monkeypatch.setattr(vitx.Vit, "reset_parameters", lambda self, seed: None)
    epoch_draws.cache_clear()  # other tests left real ones
    with FakeTensorMode() as mode:
        yield mode
    epoch_draws.cache_clear()


PRESETS = {
    f"{name}/{patch}": vitx.size(f"{name}/{patch}") for name in SIZES for patch in (8, 14, 16, 32)
} | {name: recipe.model for name, recipe in RECIPES.items()}


def often(name):
    """Whether a preset runs in every test: each size with one patch, one size with each patch."""
    return name in RECIPES or name.endswith("/16") or name.startswith("Ti/")


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(config, id=name, marks=() if often(name) else pytest.mark.slow)
        for name, config in PRESETS.items()
    ],
)
def test_every_preset_runs_on_cuda(config, fake):
    vit = vitx.build(config, device="cuda")
    image = torch.empty(2, config.channels, *config.size, device="cuda")
    logits = vit(image)
    assert logits.device.type == "cuda"
    assert logits.shape == (2, config.classes)


def test_loss_augmentation_and_metrics_stay_on_the_device(fake):
    recipe = RECIPES["digits"]
    images = torch.empty(1257, 1, 8, 8, dtype=torch.uint8, device="cuda")
    split = Split(images, torch.empty(1257, dtype=torch.long, device="cuda"))
    one = torch.ones(1, device="cuda")
    dataset = Dataset(split, split, split, ("0",), one, one, "", recipe.data, (8, 8))
    image, target = next(batches(dataset, batch=4, seed=0, device="cuda"))
    logits = vitx.build(recipe.model, device="cuda")(image)
    loss = cross_entropy(logits, target, label_smoothing=0.1)
    accuracy = (logits.argmax(dim=1) == target).float().mean()
    assert loss.device.type == accuracy.device.type == "cuda"


def test_the_fused_optimizer_steps_on_cuda(fake):
    vit = vitx.build(vitx.size("Pico/4", image=8, classes=10), device="cuda")
    (optimizer,) = optim.optimizers(vit, OptimConfig())
    for parameter in vit.parameters():
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    assert all(s["exp_avg"].device.type == "cuda" for s in optimizer.state.values())


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_what_follows_the_backward_pass_waits_for_nothing(fake, monkeypatch, precision):
    config = override(RECIPES["digits"], precision=precision, **{"optim.clip": 1.0})
    # Fake models can be neither moved nor copied, so both are made where they belong.
    monkeypatch.setattr(vitx.Vit, "to", lambda self, device: self)
    model, average = (vitx.build(config.model, device="cuda") for _ in range(2))
    state = training.init(config, model=model, device="cuda")
    state.average, config = average, override(config, ema=0.9)
    for parameter in state.model.parameters():
        parameter.grad = torch.empty_like(parameter)
    loss, accuracy = torch.empty(2, device="cuda")
    metrics = training.change(state, loss, accuracy, 4.0, config)
    assert all(value.device.type == "cuda" for value in metrics.values())
    assert state.steps_done == 1


def test_a_reported_value_waits_for_nothing_until_it_is_logged(fake):
    sums = {}
    with metrics.recording(sums):
        for _ in range(2):
            metrics.report("train/entropy", torch.empty(3, device="cuda"))
    assert sums["train/entropy"][0].device.type == "cuda"
    with pytest.raises(RuntimeError, match="local_scalar"):
        metrics.numbers(sums)


def test_a_cpu_tensor_mixed_in_is_refused(fake):
    vit = vitx.build(vitx.size("Pico/4", image=8), device="cuda")
    with pytest.raises(RuntimeError, match=r"[Dd]evice"):
        vit(torch.empty(2, 3, 8, 8))


def test_a_host_sync_would_be_seen(fake):
    with pytest.raises(RuntimeError, match="local_scalar"):
        torch.empty(2, device="cuda").sum().item()
