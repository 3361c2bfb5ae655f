"""The loop: resume to the bit, bad steps, accumulation, averages, several processes, signals."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from vitx import data
from vitx.data.config import DataConfig
from vitx.interop import weights as files
from vitx.model.config import ModelConfig
from vitx.model.preprocessing import Preprocessing
from vitx.model.vit import build
from vitx.settings import override
from vitx.training import checkpoint, tracking, trainer
from vitx.training import state as training
from vitx.training.config import OptimConfig, TrainConfig
from vitx.training.prepare import prepare
from vitx.training.state import Diverged, init, pack, step, unpack
from vitx.training.trainer import train

ROOT = Path(__file__).resolve().parents[2]
CONFIG = TrainConfig(
    model=ModelConfig(image=8, patch=4, classes=4, width=24, depth=2, heads=2, drop=0.1),
    data=DataConfig(
        name="fake(images=120, size=8, classes=4)", val=20, test=20, flip=0.5, crop=0.5, mixup=0.3
    ),
    optim=OptimConfig(warmup_steps=2, clip=1.0),
    steps=12,
    batch=16,
    eval_every=4,
    log_every=2,
    save_every=5,
)


def trained(config, run=None, *, folder=None, **how):
    """The last state and the result of a run."""
    training = prepare(config, **how)
    return training.state, train(training, run, folder=folder)


def batches(config, count, dtype=torch.float32):
    stream = data.batches(data.load(config.data), batch=config.batch, seed=config.seed)
    return [(image.to(dtype), target) for image, target in (next(stream) for _ in range(count))]


def weights(state):
    return {name: p.detach().clone() for name, p in state.result.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"ema": 0.9},
        {"accumulate": 4, "optim.name": "muon"},
        {"precision": "bfloat16", "optim.name": "sgd", "model.drop_path": 0.2},
        {"optim.name": "lamb", "model.patch_drop": 0.5},
        {
            "precision": "float16",
            "optim.schedule": "wsd",
            "data.mixup": 0.0,
            "data.cutmix": 1.0,
            "data.erase": 0.5,
        },
        {
            "data.name": "imagefolder",
            "data.workers": 2,
            "model.image": 16,
            "model.classes": 3,
            "data.val": 12,
            "data.test": 12,
            "data.normalise": "half",
            "batch": 8,
        },
    ],
    ids=str,
)
def test_a_run_that_was_killed_goes_on_to_the_same_bits(tmp_path, monkeypatch, changes):
    config = override(CONFIG, **changes)
    if config.data.name == "imagefolder":
        from picture_files import folders

        folders(tmp_path / "pictures", splits=("train",), each=16)
        config = override(config, **{"data.root": str(tmp_path / "pictures")})

    def run(folder, *, resume=False):
        with tracking.Run(tmp_path, "g", "n", {}, mode="disabled", folder=tmp_path / folder) as it:
            again = {"resume": it.folder} if resume else {}
            state, result = trained(config, it, folder=it.folder, **again)
            return state, result, (it.folder / "metrics.jsonl").read_text()

    whole, whole_result, whole_log = run("whole")
    real = training.step

    def dies(state, batch, config):
        if state.steps_done == 8:
            raise RuntimeError("killed")
        return real(state, batch, config)

    monkeypatch.setattr(trainer, "step", dies)
    with pytest.raises(RuntimeError, match="killed"):
        run("cut")
    monkeypatch.setattr(trainer, "step", real)
    torch.manual_seed(99)
    again, result, log = run("cut", resume=True)
    assert _same(pack(again), pack(whole))
    assert result.test == whole_result.test
    assert torch.equal(result.test_logits, whole_result.test_logits)
    assert _events(log) == _events(whole_log)
    assert result.curve == whole_result.curve


def _events(log):
    return [{k: v for k, v in json.loads(line).items() if k != tracking.IMAGES_PER_S}
            for line in log.splitlines()]  # fmt: skip


def _same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return a == b


def test_the_state_survives_packing():
    config = override(CONFIG, ema=0.5)
    one, two = init(config), init(override(config, seed=1))
    for batch in batches(config, 3):
        step(one, batch, config)
    one.scale.fill_(8.0)
    one.steady.fill_(3)
    unpack(two, pack(one))
    assert _same(pack(two), pack(one))
    assert two.scale == 8
    assert two.sums[2] == 3 * config.batch


def test_a_state_of_another_device_is_refused():
    state = init(CONFIG)
    kept = pack(state)
    kept["random"][0]["cuda"] = torch.zeros(16, dtype=torch.uint8)
    with pytest.raises(ValueError, match="the checkpoint was made on cuda; on cpu draws differ"):
        unpack(state, kept)


def test_the_training_loss_is_the_mean_over_the_images_since_the_last_logging_step(tmp_path):
    config = override(CONFIG, steps=10, batch=24, log_every=4, **{"data.drop_last": False})
    seen, real = [], training.step

    def watched(state, batch, config):
        metrics = real(state, batch, config)
        seen.append((len(batch[0]), metrics["loss"].item(), metrics["accuracy"].item()))
        return metrics

    with (
        pytest.MonkeyPatch.context() as patch,
        tracking.Run(tmp_path, "g", "n", {}, mode="disabled") as run,
    ):
        patch.setattr(trainer, "step", watched)
        trained(config, run)
        events = run.events(tracking.TRAIN_LOSS)
    assert {images for images, *_ in seen} == {24, 80 % 24}
    for event, part in zip(events, (seen[:4], seen[4:8], seen[8:]), strict=True):
        images = sum(n for n, *_ in part)
        assert event[tracking.TRAIN_LOSS] == pytest.approx(sum(n * x for n, x, _ in part) / images)
        assert event[tracking.TRAIN_ACCURACY] == pytest.approx(
            sum(n * x for n, _, x in part) / images
        )


def test_weights_of_earlier_steps_are_kept_when_asked_for(tmp_path):
    from vitx import load

    config = override(CONFIG, keep_every=4)
    with tracking.Run(tmp_path, "g", "n", {}, mode="disabled") as run:
        trained(config, run, folder=run.folder)
    steps = {int(path.stem[6:]) for path in run.folder.glob("model-*.safetensors")}
    assert steps == {4, 8, 12}
    state = init(config)
    for batch in batches(config, 4):
        step(state, batch, config)
    kept = load(run.folder / "model-4.safetensors")
    assert _same(dict(kept.state_dict()), dict(state.model.state_dict()))


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "muon", "lamb", "lion"])
@pytest.mark.parametrize("fault_at", [0, 2])
def test_a_bad_step_and_all_later_ones_change_nothing(name, fault_at):
    config = override(CONFIG, **{"optim.name": name, "ema": 0.5, "data.mixup": 0.0})
    state = init(config)
    for number, (image, target) in enumerate(batches(config, 5)):
        if number == fault_at:
            before = weights(state), [p.detach().clone() for p in state.model.parameters()]
            image = image.clone()
            image[3, 0, 2, 2] = float("nan")
        step(state, (image, target), config)
    assert state.steps_done == 5
    assert _same([p.detach() for p in state.model.parameters()], before[1])
    if fault_at:
        assert _same(weights(state), before[0])
    with pytest.raises(Diverged, match=f"the loss of step {fault_at + 1} is not finite"):
        training.check(state)


def test_a_bad_gradient_is_named():
    state = init(CONFIG)
    parameter = dict(state.model.named_parameters())["blocks.1.mlp.fc1.bias"]
    parameter.register_hook(lambda gradient: gradient * float("inf"))
    step(state, batches(CONFIG, 1)[0], CONFIG)
    with pytest.raises(Diverged, match=r"gradient of blocks\.1\.mlp\.fc1\.bias of step 1"):
        training.check(state)


def test_a_diverged_run_stops_at_the_next_logging_step_with_its_last_good_weights(tmp_path):
    config = override(CONFIG, **{"optim.lr": 1e30, "optim.clip": 0.0, "optim.name": "sgd"})
    with tracking.Run(tmp_path, "g", "n", {}, mode="disabled") as run:
        with pytest.raises(Diverged, match="the weights are those before it"):
            trained(config, run, folder=run.folder)
        kept = checkpoint.load(run.folder)["state"]
    assert all(value.isfinite().all() for value in kept["model"].values())
    assert kept["bad_step"] >= 0


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_accumulated_parts_are_one_batch(parts):
    config = override(CONFIG, **{"model.drop": 0.0})
    other = override(config, accumulate=parts)
    states = [init(c, model=build(c.model).double()) for c in (config, other)]
    for batch in batches(config, 4, torch.float64):
        one, two = (step(s, batch, c) for s, c in zip(states, (config, other), strict=True))
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-12)
    for a, b in zip(*(s.model.parameters() for s in states), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("clip", [0.0, 0.01, 1e6])
def test_the_gradient_is_clipped_to_its_norm(clip):
    changes = {"name": "sgd", "clip": clip, "weight_decay": 0.0, "lr": 0.5, "warmup_steps": 0}
    config = override(CONFIG, **{f"optim.{name}": value for name, value in changes.items()})
    state = init(config, model=build(config.model).double())
    before = weights(state)
    norm = step(state, batches(config, 1, torch.float64)[0], config)["gradient_norm"].item()
    moved = torch.cat([(before[n] - p).flatten() for n, p in weights(state).items()])
    assert norm > 0.01
    expected = 0.5 * (min(norm, clip) if clip else norm)
    assert moved.norm().item() == pytest.approx(expected, rel=1e-3)


def test_the_average_follows_the_weights():
    config = override(CONFIG, ema=0.75)
    state = init(config)
    average = state.model.head.weight.detach().clone()
    for batch in batches(config, 4):
        step(state, batch, config)
        now = state.model.head.weight.detach().clone()
        average = average + 0.25 * (now - average)
    torch.testing.assert_close(state.result.head.weight, average)
    assert not torch.equal(state.result.head.weight, state.model.head.weight)


def test_frozen_parameters_stay_and_a_pattern_without_a_match_is_refused():
    config = override(CONFIG, **{"optim.freeze": ("blocks.0.*", "pos_embed")})
    state = init(config)
    before = {name: p.detach().clone() for name, p in state.model.named_parameters()}
    for batch in batches(config, 3):
        step(state, batch, config)
    still = {n for n, p in state.model.named_parameters() if torch.equal(p, before[n])}
    assert still == {n for n in before if n.startswith("blocks.0.") or n == "pos_embed"}
    with pytest.raises(ValueError, match=r"optim\.freeze = 'block\.\*' matches no parameter"):
        init(override(CONFIG, **{"optim.freeze": ("block.*",)}))


def test_freezing_does_not_change_the_rates_of_what_is_trained():
    config = override(CONFIG, **{"optim.layer_decay": 0.5})

    def shares(freeze):
        state = init(override(config, **{"optim.freeze": freeze}))
        names = {id(p): name for name, p in state.model.named_parameters()}
        groups = state.optimizers[0].param_groups
        return {names[id(p)]: group["share"] for group in groups for p in group["params"]}

    shares_of_all, shares_of_rest = shares(()), shares(("blocks.*",))
    assert 0 < len(shares_of_rest) < len(shares_of_all)
    assert shares_of_rest == {name: shares_of_all[name] for name in shares_of_rest}


def test_layer_decay_lowers_the_rate_block_by_block():
    config = override(CONFIG, **{"optim.layer_decay": 0.5})
    state = init(config)
    step(state, batches(config, 1)[0], config)
    names = {id(p): name for name, p in state.model.named_parameters()}
    rates = {names[id(p)]: group["lr"] for o in state.optimizers for group in o.param_groups
             for p in group["params"]}  # fmt: skip
    top = rates["head.weight"]
    assert rates["norm.bias"] == top == pytest.approx(1e-3 / 2)
    expected = {"blocks.1.mlp.fc1.weight": 0.5, "blocks.0.norm1.bias": 0.25, "pos_embed": 0.125,
              "patch_embed.proj.weight": 0.125}  # fmt: skip
    for name, share in expected.items():
        assert rates[name] == pytest.approx(top * share), name


def test_timms_optimizers_get_our_numbers_or_refuse_them():
    made = init(override(CONFIG, **{"optim.name": "lion", "optim.beta2": 0.98})).optimizers[0]
    assert {group["betas"] for group in made.param_groups} == {(0.9, 0.98)}
    made = init(override(CONFIG, **{"optim.name": "rmsprop", "optim.beta1": 0.7})).optimizers[0]
    assert {group["momentum"] for group in made.param_groups} == {0.7}
    with pytest.raises(ValueError, match=r"optim\.beta2 is no number of optim\.name = 'rmsprop'"):
        init(override(CONFIG, **{"optim.name": "rmsprop", "optim.beta2": 0.7}))


def test_muon_takes_the_blocks_matrices_and_adamw_the_rest():
    muon, rest = init(override(CONFIG, **{"optim.name": "muon"})).optimizers
    assert {p.ndim for group in muon.param_groups for p in group["params"]} == {2}
    rows = {p.shape[0] for g in muon.param_groups if g["parts"] == 3 for p in g["params"]}
    assert rows == {3 * CONFIG.model.width}
    held = sum(len(group["params"]) for o in (muon, rest) for group in o.param_groups)
    assert held == len(list(init(CONFIG).model.parameters()))


def test_compiling_without_a_compiler_is_refused_before_the_data_are_read(monkeypatch):
    from vitx.model import compiler

    monkeypatch.setattr(compiler.shutil, "which", lambda _: None)
    monkeypatch.setattr(data, "load", lambda *_, **__: pytest.fail("the data were read"))
    with pytest.raises(ValueError, match=r"torch.compile needs a C\+\+ compiler on the CPU"):
        trained(override(CONFIG, compile=True))


@pytest.mark.slow
def test_training_under_bfloat16_and_compile_lowers_the_loss(compiled):
    config = override(CONFIG, precision="bfloat16", compile=True, steps=30, **{"data.mixup": 0.0})
    _, result = trained(config)
    assert result.curve[-1]["val/loss"] < result.curve[0]["val/loss"]


def test_a_changed_setting_that_matters_is_refused_by_name(tmp_path):
    with tracking.Run(tmp_path, "g", "n", {}, mode="disabled") as run:
        trained(CONFIG, run, folder=run.folder)
        with pytest.raises(ValueError, match=r"optim\.lr = 0\.5, but the run to resume"):
            trained(
                override(CONFIG, **{"optim.lr": 0.5}), run, folder=run.folder, resume=run.folder
            )
        trained(override(CONFIG, log_every=3), run, folder=run.folder, resume=run.folder)


WORKER = """
import sys, torch
from pathlib import Path
sys.path[:0] = ["tests", "tests/data", "tests/training"]
from test_trainer import CONFIG
from vitx import data
from vitx.model.vit import build
from vitx.settings import override
from vitx.training.evaluate import predict, score
from vitx.training.parallel import processes
from vitx.training.state import init, step

config = override(CONFIG, **{"model.drop": 0.0, "optim.warmup_steps": 0, "data.test": 19,
                            "data.drop_last": False, "batch": 14})
with processes(torch.device("cpu")) as (part, device):
    state = init(config, model=build(config.model).double(), part=part)
    dataset = data.load(config.data)
    stream = data.batches(dataset, batch=14, seed=0, part=(part.rank, part.ranks))
    for _ in range(20):
        image, target = next(stream)
        step(state, (image.double(), target), config)
    logits, target, _ = predict(state.model, dataset, dataset.test, part=part)
    if part.first:
        torch.save([state.model.state_dict(), logits, target], sys.argv[1])
"""


ENDED = """
import torch, weakref
import torch.distributed as dist
from vitx.training.parallel import averaging, processes

with processes(torch.device("cpu")):
    model = averaging(torch.nn.Linear(3, 3))
    group = weakref.ref(dist.group.WORLD)
    assert group() is not None
assert group() is None, "the group outlives its processes, and so do its threads"
"""


def test_the_processes_group_ends_before_a_model_that_it_trained():
    part = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    part |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    done = subprocess.run(
        [sys.executable, "-c", ENDED], env=os.environ | part, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    program = tmp_path / "worker.py"
    program.write_text(WORKER)
    saved = {}
    for ranks in (1, 2):
        path = tmp_path / f"{ranks}.pt"
        command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        done = subprocess.run(
            [sys.executable, *command, str(program), str(path)],
            cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-9000:]
        saved[ranks] = torch.load(path)
    (one, logits1, target1), (two, logits2, target2) = saved[1], saved[2]
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-10, atol=1e-10)
    assert torch.equal(target1, target2)
    assert len(target1) == 19
    torch.testing.assert_close(logits1, logits2, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_leaves_with_its_status(tmp_path, number, status):
    command = [sys.executable, "-m", "experiments.train", "digits", "--steps=5000",
               "--out", str(tmp_path), "--log-every=5", "--save-every=5000"]  # fmt: skip
    how = {"cwd": ROOT, "env": os.environ | {"WANDB_MODE": "disabled"}, "text": True}
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, **how)
    try:
        deadline = time.monotonic() + 300
        while not any(path.stat().st_size for path in tmp_path.glob("digits/*/metrics.jsonl")):
            assert child.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        child.send_signal(number)
        _, errors = child.communicate(timeout=300)
    finally:
        child.kill()
    assert child.returncode == status, errors
    assert "the state is saved; go on with: --resume" in errors
    (folder,) = tmp_path.glob("digits/*")
    assert (folder / "last.ckpt").exists()


@pytest.mark.slow
def test_torchruns_processes_train_one_run_and_resume_it(tmp_path):
    def torchrun(*words):
        return subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3",
             "-m", "experiments.train", "digits", "--steps=12", "--batch=66", "--eval-every=6",
             "--save-every=6", "--log-every=4", "--wandb=disabled", "--device=cpu", *words],
            cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    done = torchrun("--out", str(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("test accuracy") == done.stdout.count("model.depth = 3") == 1
    (folder,) = tmp_path.glob("digits/*")
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["test/images"] == 360
    events = _events((folder / "metrics.jsonl").read_text())
    whole = checkpoint.load(folder)["state"]
    os.replace(folder / "before.ckpt", folder / "last.ckpt")
    again = torchrun("--resume", "--folder", str(folder))
    assert again.returncode == 0, again.stderr[-2000:]
    assert _events((folder / "metrics.jsonl").read_text()) == events
    assert _same(checkpoint.load(folder)["state"], whole)
    for name in ("test/loss", "test/accuracy", "val/loss"):
        assert json.loads((folder / "summary.json").read_text())[name] == summary[name]


def test_a_diverged_run_stays_diverged_when_it_is_resumed(tmp_path):
    config = override(CONFIG, steps=6, log_every=6, save_every=6,
                      **{"optim.lr": 1e30, "optim.clip": 0.0, "optim.name": "sgd"})  # fmt: skip
    with tracking.Run(tmp_path, "g", "n", {}, mode="disabled") as run:
        with pytest.raises(Diverged):
            trained(config, run, folder=run.folder)
        with pytest.raises(Diverged, match="is not finite"):
            trained(config, run, folder=run.folder, resume=run.folder)
        assert not (run.folder / "summary.json").exists()


def test_other_images_are_no_resumption(tmp_path):
    with tracking.Run(tmp_path, "g", "n", {}, mode="disabled") as run:
        trained(CONFIG, run, folder=run.folder)
        other = override(CONFIG, **{"data.root": "elsewhere"})
        trained(other, run, folder=run.folder, resume=run.folder)
        kept = checkpoint.load(run.folder)
        checkpoint.save(run.folder, kept | {"data": "0" * 32})
        with pytest.raises(ValueError, match="the data are not those of the run"):
            trained(CONFIG, run, folder=run.folder, resume=run.folder)


def test_weights_that_expect_other_pixels_are_told_of(tmp_path, capsys):
    config = override(CONFIG, steps=1, weights=str(tmp_path / "w.safetensors"))
    mine = data.load(config.data).preprocessing
    for other, warning in ((mine, ""), (Preprocessing("squash", (0.0,), (1.0,)), "mean 0.000 and")):
        about = files.Description(config.model, preprocessing=other)
        files.save(build(config.model), tmp_path / "w.safetensors", about)
        prepare(config)
        errors = capsys.readouterr().err
        assert warning in errors
        assert bool(errors) == bool(warning)


def test_a_diverged_run_keeps_no_weights_under_the_bad_steps_name(tmp_path, monkeypatch):
    config = override(CONFIG, steps=6, log_every=6, keep_every=3, **{"optim.clip": 0.0})
    with tracking.Run(tmp_path, "g", "n", {}, mode="disabled") as run:
        monkeypatch.setattr(trainer, "step", _bad_at(4, training.step))
        with pytest.raises(Diverged):
            trained(config, run, folder=run.folder)
        assert [p.name for p in run.folder.glob("model*")] == ["model-3.safetensors"]


def _bad_at(step_number, real):
    def made(state, batch, config):
        image, target = batch
        return real(state, (image * float("nan") if state.steps_done == step_number else image,
                            target), config)  # fmt: skip

    return made


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "muon", "lamb"])
def test_an_overflow_of_float16_in_the_first_step_is_left_out(name):
    config = override(CONFIG, precision="float16", **{"optim.name": name, "data.mixup": 0.0})
    state = init(config)
    before, (first, *others) = weights(state), batches(config, 4)
    image, target = first
    state.scale.fill_(2.0**127)
    step(state, (image, target), config)
    assert _same(weights(state), before)
    assert state.scale == 2.0**126
    state.scale.fill_(16.0)
    for batch in others:
        step(state, batch, config)
    training.check(state)
    assert all(value.isfinite().all() for value in weights(state).values())
    assert not _same(weights(state), before)


def test_weights_of_half_precision_are_trained_in_float32(tmp_path):
    from vitx.interop.weights import Description, save

    config = override(CONFIG, **{"model.position": "sincos2d"})
    model = build(config.model)
    fixed = model.pos_embed.clone()
    save(model.half(), tmp_path / "w.safetensors", Description(config.model))
    state = init(override(config, weights=str(tmp_path / "w.safetensors")))
    assert {p.dtype for p in state.model.parameters()} == {torch.float32}
    assert torch.equal(state.model.pos_embed, fixed)


def test_two_processes_mix_the_same_neighbours():
    config = override(CONFIG.data, mixup=1.0)
    dataset = data.load(config)
    whole = next(data.batches(dataset, batch=14, seed=0))
    shares = [next(data.batches(dataset, batch=14, seed=0, part=(rank, 2))) for rank in range(2)]
    assert [len(image) for image, _ in shares] == [6, 8]
    assert torch.equal(torch.cat([image for image, _ in shares]), whole[0])
    assert torch.equal(torch.cat([target for _, target in shares]), whole[1])


@pytest.mark.slow
def test_a_run_without_a_validation_split_ends_well_in_several_processes(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
         "-m", "experiments.train", "digits", "--steps=4", "--data.val=0", "--curve=test",
         "--wandb=disabled", "--device=cpu", "--out", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "validation accuracy" not in done.stdout


def test_betas_reach_timms_optimizers():
    (made,) = init(override(CONFIG, **{"optim.name": "lamb", "optim.beta1": 0.5})).optimizers
    assert made.param_groups[0]["betas"] == (0.5, 0.999)
