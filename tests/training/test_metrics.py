"""`report`: means since the last logging step, wherever it is called, and nothing elsewhere."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vitx import metrics, report
from vitx.data.config import DataConfig
from vitx.model.config import ModelConfig
from vitx.model.vit import build
from vitx.settings import override
from vitx.training import parallel, tracking, trainer, vectorize
from vitx.training import state as training_state
from vitx.training.config import OptimConfig, TrainConfig
from vitx.training.parallel import ALONE, Part
from vitx.training.prepare import prepare
from vitx.training.state import init, pack, step, unpack
from vitx.training.trainer import train

ROOT = Path(__file__).resolve().parents[2]
CONFIG = TrainConfig(
    model=ModelConfig(image=8, patch=4, classes=4, width=24, depth=2, heads=2),
    data=DataConfig(name="fake(images=120, size=8, classes=4)", val=20, test=20),
    optim=OptimConfig(warmup_steps=2),
    steps=10,
    batch=16,
    eval_every=3,
    log_every=4,
    save_every=5,
)


def reporting(name="train/logit", values=None):
    """A model whose forward reports the mean of its logits, and its mode."""

    def hook(model, _, logits):
        report(name, logits)
        report("train/mode", float(model.training))
        if model.training and values is not None:
            values.append(logits.detach().mean().item())

    model = build(CONFIG.model)
    model.register_forward_hook(hook)
    return model


def events(run):
    """The events with training metrics."""
    return run.events(tracking.TRAIN_LOSS)


@pytest.fixture
def run(tmp_path):
    with tracking.Run(tmp_path, "g", "n", {}, mode="disabled") as made:
        yield made


def test_outside_of_a_step_nothing_happens():
    report("train/entropy", torch.ones(()))
    assert metrics._recorded is None


def test_a_logging_step_has_the_mean_since_the_last_one_and_evaluation_does_not_count(run, capsys):
    values = []
    train(prepare(CONFIG, model=reporting(values=values)), run)
    assert len(values) == CONFIG.steps
    printed = capsys.readouterr().out
    for event, part in zip(events(run), (values[:4], values[4:8], values[8:]), strict=True):
        assert event["train/logit"] == pytest.approx(sum(part) / len(part), rel=1e-5)
        assert event["train/mode"] == 1
        assert f", train/logit {event['train/logit']:.4g}, train/mode 1," in printed


def test_without_a_report_the_events_are_what_they_were(run):
    training = prepare(CONFIG)
    train(training, run)
    assert training.state.reported == {}
    assert set(events(run)[0]) == {"step", "train/loss", "train/accuracy", "gradient_norm", "lr",
                                   "images_per_s"}  # fmt: skip


def test_a_report_changes_no_bit_of_the_training(run):
    one, two = prepare(CONFIG), prepare(CONFIG, model=reporting())
    train(one)
    train(two)
    pairs = zip(one.state.model.parameters(), two.state.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_calls_from_the_parts_of_a_batch_are_averaged():
    config = override(CONFIG, accumulate=4)
    state = init(config, model=reporting("train/part"))
    step(state, (torch.randn(16, 3, 8, 8), torch.randint(4, (16,))), config)
    assert state.reported["train/part"][1] == 4
    assert parallel.reported_means(state.reported, ALONE)["train/mode"] == 1
    assert state.reported == {}


@pytest.mark.parametrize("value", [2, 0.5, torch.tensor([1.0, 2.0]), torch.tensor([3, 4])])
def test_numbers_and_tensors_of_any_shape_count_by_their_mean(value):
    sums = {}
    with metrics.recording(sums):
        report("a", value)
        report("a", 1.0)
    mean = torch.as_tensor(value).float().mean().item()
    assert parallel.reported_means(sums, ALONE) == {"a": (mean + 1) / 2}


def test_a_metric_of_the_trainers_own_is_refused(run):
    training = prepare(CONFIG, model=reporting(tracking.VAL_LOSS))
    with pytest.raises(ValueError, match="metric = 'val/loss' is logged by the trainer itself"):
        train(training, run)


def test_what_was_not_yet_logged_is_part_of_a_checkpoint(tmp_path, monkeypatch):
    def lines(name, **how):
        with tracking.Run(tmp_path, "g", "n", {}, mode="disabled", folder=tmp_path / name) as made:
            train(prepare(CONFIG, model=reporting(), **how), made, folder=made.folder)
            return [{k: v for k, v in event.items() if k != tracking.IMAGES_PER_S}
                    for event in events(made)]  # fmt: skip

    whole = lines("whole")
    real = training_state.step

    def dies(state, batch, config):
        if state.steps_done == 7:
            raise RuntimeError("killed")
        return real(state, batch, config)

    monkeypatch.setattr(trainer, "step", dies)
    with pytest.raises(RuntimeError, match="killed"):
        lines("cut")
    monkeypatch.undo()
    assert lines("cut", resume=tmp_path / "cut") == whole


def test_a_state_without_reports_is_unpacked():
    one, two = init(CONFIG), init(CONFIG)
    packed = pack(one)
    del packed["reported"]
    unpack(two, packed)
    assert two.reported == {}


def test_a_compiled_graph_stays_whole_and_records_nothing(unchecked):
    sums = {}

    def double(x):
        report("train/sum", x.sum())
        return 2 * x

    with metrics.recording(sums):
        doubled = torch.compile(double, backend="eager", fullgraph=True)(torch.ones(3))
    assert doubled.tolist() == [2, 2, 2]
    assert sums == {}


def test_lanes_report_as_runs_alone(monkeypatch, tmp_path):
    def reports(*how, **more):
        model = build(*how, **more)
        model.register_forward_hook(lambda *call: report("train/logit", call[2].square().mean()))
        model.register_forward_hook(lambda *_: report("train/constant", 0.5))
        return model

    monkeypatch.setattr(vectorize, "build", reports)
    configs = [override(CONFIG, seed=seed) for seed in (1, 2)]
    lanes = vectorize.train(configs)
    for config, lane in zip(configs, lanes, strict=True):
        with tracking.Run(tmp_path, "g", "n", {}, mode="disabled") as made:
            train(prepare(config, model=reports(config.model, seed=config.seed)), made)
        names = ("train/logit", "train/constant", "train/loss")
        ours = [event for event in lane.events if names[0] in event]
        for one, two in zip(ours, events(made), strict=True):
            assert [one[n] for n in names] == pytest.approx([two[n] for n in names], abs=1e-4)
    assert lanes[0].events[1]["train/logit"] != lanes[1].events[1]["train/logit"]


def test_processes_are_averaged_by_the_number_of_their_calls(monkeypatch):
    other = {"a": (6.0, 3), "b": (1.0, 1)}
    monkeypatch.setattr(parallel, "any_of", lambda *_: True)
    monkeypatch.setattr(parallel, "gathered", lambda own, _: [own, other])
    sums = {"a": (torch.tensor(2.0), 1)}
    assert parallel.reported_means(sums, Part(0, 2)) == {"a": 2.0, "b": 1.0}


WORKER = """
import sys, torch
from pathlib import Path
sys.path[:0] = ["tests/training"]
from test_metrics import CONFIG
from vitx.model.vit import build
from vitx.training import tracking
from vitx import report
from vitx.training.parallel import processes
from vitx.training.prepare import prepare
from vitx.training.trainer import train

with processes(torch.device("cpu")) as (part, device):
    model = build(CONFIG.model)
    model.register_forward_hook(lambda *_: report("train/rank", float(part.rank)))
    if part.first:
        model.register_forward_hook(lambda *_: report("train/first", 3.0))
    training = prepare(CONFIG, model=model, part=part)
    if part.first:
        with tracking.Run(Path(sys.argv[1]), "g", "n", {}, mode="disabled") as run:
            train(training, run)
    else:
        train(training)
"""


@pytest.mark.slow
def test_two_processes_log_the_mean_over_both(tmp_path):
    program = tmp_path / "worker.py"
    program.write_text(WORKER)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(program)]
    done = subprocess.run(
        [sys.executable, *command, str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    (path,) = tmp_path.glob("g/*/metrics.jsonl")
    logged = [json.loads(line) for line in path.read_text().splitlines()]
    pairs = [(e["train/rank"], e["train/first"]) for e in logged if tracking.TRAIN_LOSS in e]
    assert pairs == [(0.5, 3.0)] * 3
