"""Questions: what a file says, what is run for it, and how it is answered."""

import csv
import dataclasses
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import types
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
import torch
import yaml

from experiments import ablate, questions, variance
from experiments.recipes import DIGITS
from experiments.study import answer, preview, question, runs
from experiments.study.kinds import SOURCES, Answer, ArmResult, Variance
from experiments.study.pages import RESULTS, ROOT, machine
from experiments.study.results import FILE, Results, of_kind, read, read_all
from experiments.study.tables import variance_table
from vitx.data.config import DataConfig
from vitx.data.dataset import load
from vitx.files import read_json
from vitx.measure import stats, timing
from vitx.measure.comparison import Comparison, Process, Rate, Side
from vitx.measure.stats import Interval
from vitx.model.cost import cost
from vitx.settings import override
from vitx.training import provenance, tracking, trainer
from vitx.training import state as training
from vitx.training.config import identity

TINY = override(
    DIGITS,
    **{"model.width": 8, "model.heads": 2, "model.depth": 1, "steps": 4, "batch": 16,
       "eval_every": 2, "optim.warmup_steps": 0},
    data=DataConfig(name="digits", train=64, val=30, test=20, rotate=10.0),
)  # fmt: skip
DOC = "Does it help?\n\nQuestion: q\nExpect: e\nCost: c\nRun: r"


def module(**words):
    made = types.ModuleType("experiments.questions.invented", DOC)
    vars(made).update({"BASE": TINY, "AXES": {"model.registers": [1]}} | words)
    return made


def ask(**words):
    return question.from_module(module(**words))


def how(folder, **changes):
    return runs.How(out=folder, device=torch.device("cpu"), wandb="disabled", **changes)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"BASE": 3}, r"experiments/questions/invented\.py: BASE = 3 must be a TrainConfig"),
        ({"AXES": {}}, r"AXES = \{\} must name at least one axis"),
        ({"AXES": {"model.poool": ["mean"]}}, r"AXES, model\.poool=mean: ModelConfig has no field"),
        ({"AXES": {"model.heads": [3]}}, r"AXES, model\.heads=3: model\.heads = 3 does not divide"),
        ({"AXES": {"model.heads": 3}}, r"AXES\['model\.heads'\] = 3 must be a list of values"),
        ({"AXES": {"model.heads": []}}, r"AXES\['model\.heads'\] = \[\] must be a list of values"),
        ({"AXES": {"model.heads": [2]}}, r"changes nothing in BASE"),
        ({"AXES": {"pool": {"mean": {"model.pool": "men"}}}}, r"AXES, mean: model\.pool = 'men'"),
        ({"SEEDS": [1, 1]}, r"SEEDS = \[1, 1\] must be two or more different"),
        ({"SEEDS": 8}, r"SEEDS = 8 must be two or more"),
        ({"METRIC": "val/acuracy"}, r"METRIC = 'val/acuracy' is not known; did you mean"),
        ({"DESIGN": "half"}, r"DESIGN = 'half' is not known"),
        ({"MATCH": "flops"}, r"MATCH = 'flops' is not known"),
        ({"EFFECT": 0}, r"EFFECT = 0 must be a positive number"),
        ({"SEEDS": [0, 2**31]}, r"SEEDS = .* must be two or more different whole numbers below"),
        ({"AXES": {"seed": [1, 2]}}, r"AXES, seed=1: seed can't be varied: the seeds of all arms"),
        ({"AXES": {"data.val": [60]}}, r"data\.val can't be varied: all arms are read on the same"),
        ({"AXES": {"model": [1]}}, r"AXES, model=1: "),
        (
            {"AXES": {"optim.lr": [k / 1e4 for k in range(1, 200)]}},
            r"AXES: 198 arms are too many to be judged together; at most 102",
        ),
        ({"AXES": {"model.mlp": [len]}}, r"mlp = <built-in .* must be a name in its registry"),
        (
            {"AXES": {"a": {"on": {"model.registers": 1}}, "b": {"on": {"model.registers": 2}}}},
            r"AXES: two arms are called on",
        ),
        (
            {"BASE": override(TINY, curve="test", **{"data.val": 0})},
            r"METRIC = 'val/loss' is read on validation images; set data\.val",
        ),
        (
            {"AXES": {"model.width": [12], "model.depth": [2]}, "DESIGN": "full", "MATCH": "macs"},
            r"AXES, model\.width=12,model\.depth=2: width and depth are both set",
        ),
    ],
)
def test_a_wrong_question_is_one_sentence_that_names_file_and_key(words, message):
    with pytest.raises(ValueError, match=message):
        ask(**words)


def test_a_question_says_what_a_reader_needs():
    made = module()
    made.__doc__ = "Question: q\nExpect: e\nRun: r"
    with pytest.raises(ValueError, match=r"invented\.py: the docstring must say Cost"):
        question.from_module(made)
    del made.AXES
    with pytest.raises(ValueError, match=r"invented\.py is no question: it sets no AXES"):
        question.from_module(made)


def test_one_factor_at_a_time_and_all_combinations():
    axes = {"model.registers": [0, 1, 2], "mlp": {"tanh": {"model.mlp": "gelu_tanh"}}}
    one = ask(AXES=axes)
    assert [arm.name for arm in one.arms] == [
        "baseline", "model.registers=1", "model.registers=2", "tanh",
    ]  # fmt: skip
    full = ask(AXES=axes, DESIGN="full")
    assert len(full.arms) == 3 * 2
    assert full.arm("model.registers=2,tanh").config.model.registers == 2
    assert full.arm("model.registers=2,tanh").config.model.mlp == "gelu_tanh"
    assert one.family == 3
    assert one.seeds == tuple(range(8))
    with pytest.raises(ValueError, match="arm = 'tan' is none of invented; did you mean 'tanh'"):
        one.arm("tan")


def test_arms_of_a_seed_share_initial_values_order_and_augmentation(unchecked):
    asked = ask(AXES={"model.registers": [3]})
    states = [training.init(override(arm.config, seed=5)) for arm in asked.arms]
    before, after = (state.model.state_dict() for state in states)
    shared = set(before) - {"pos_embed"}  # which has a row for each register
    assert len(shared) == len(after) - 2
    assert all(torch.equal(before[name], after[name]) for name in shared)
    dataset = load(TINY.data)
    batches = [
        next(trainer.batches(override(arm.config, seed=5), dataset, state))
        for arm, state in zip(asked.arms, states, strict=True)
    ]
    assert all(torch.equal(one, other) for one, other in zip(*batches, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("by", ["macs", "params"])
def test_a_matched_arm_costs_what_the_baseline_does(by):
    base = override(TINY, **{"model.width": 96, "model.heads": 3, "model.depth": 4})
    asked = ask(
        BASE=base,
        AXES={"model.mlp_ratio": [2.0], "model.depth": [6], "model.width": [48]},
        MATCH=by,
    )

    def counted(config):
        found = cost(config.model)
        return {"macs": found.macs, "params": found.parameters}[by]

    wider, deeper, narrower = (arm.config.model for arm in asked.arms[1:])
    assert wider.mlp_ratio == 2
    assert (deeper.depth, deeper.width < 96) == (6, True)  # what was asked for stays
    assert (narrower.width, narrower.depth > 4) == (48, True)
    for arm in asked.arms[1:]:
        assert abs(counted(arm.config) / counted(base) - 1) < 0.2
        assert arm.adjusted.startswith(("width 96 to", "depth "))
        assert f"{counted(arm.config) / counted(base):.3f} of the" in arm.adjusted
    assert asked.arms[0].adjusted == ""


@pytest.fixture(scope="module")
def answered(tmp_path_factory):
    """A question that was run, and the folder of its runs."""
    folder = tmp_path_factory.mktemp("ablation")
    asked = ask(SEEDS=[3, 4])
    runs.work(asked.jobs(), how(folder))
    return asked, folder


def test_runs_are_made_once_and_found_by_what_they_are(answered, monkeypatch):
    asked, folder = answered
    found = runs.ended(folder)
    assert set(found) == {job.key for job in asked.jobs()}
    assert not any(run.stale for run in found.values())
    made = []
    monkeypatch.setattr(runs, "train", lambda *_, **__: made.append(1))
    runs.work(asked.jobs(), how(folder))
    other = replace(ask(SEEDS=[3, 4], AXES={"model.registers": [1]}), name="another")
    runs.work(other.jobs(), how(folder))  # the same runs under another name
    assert made == []
    monkeypatch.setattr(provenance, "version", lambda: "other")
    assert all(run.stale for run in runs.ended(folder).values())
    stale = runs.ended(folder)
    assert runs.missing(asked.jobs(), stale) == []
    assert len(runs.missing(asked.jobs(), stale, fresh=True)) == 4


def test_the_answer_pairs_by_seed_and_refuses_a_verdict_to_few_seeds(answered, monkeypatch):
    asked, folder = answered
    found = runs.ended(folder)
    values = {
        (arm.name, seed): found[asked.job(arm, seed).key].values["val/loss"]
        for arm in asked.arms
        for seed in (3, 4)
    }
    differences = [values["model.registers=1", seed] - values["baseline", seed] for seed in (3, 4)]
    here = provenance.environment()
    monkeypatch.setattr(answer, "time_arm", lambda *_: answer.ArmTiming(SLOWER, here))
    out = answer.write(asked, how(folder))
    (kept,) = read(out / FILE)
    table = answer.table(kept)
    (line,) = table.records()
    assert line["arm"] == "model.registers=1"
    assert line["verdict"] == "too few seeds"
    assert line["Δ images/s"] == "-10.0% (-18.2 to -1.0)"
    assert line["Δ peak MiB"] == "+3"
    assert line["pairs"] == "2"
    mean = stats.mean_interval(differences)  # which pairs that are mixed up make wider
    half = (mean.high - mean.low) / 2
    assert line["Δ val/loss"] == f"{mean.value:+.4f} ± {half:.4f}"
    del kept.arms[0].values["val/loss"]["3"]
    assert kept.pairs(kept.arms[1]) == 1
    assert kept.effects("val/loss") == {"model.registers=1": None}
    with (out / "answer.csv").open() as file:
        assert next(csv.reader(file)) == list(table.header)
    assert (out / "answer.md").read_text().count("\n| ") == 3
    assert (out / "figures" / "answer.png").stat().st_size > 5_000


LOGS = [math.log(0.9) - 0.0075, math.log(0.9) + 0.0075]  # per process
FLOORS = [-0.0001, 0.0001]
SLOWER = Comparison(
    config=answer.TIMING,
    verdict="slower",
    ratio=stats.paired_ratio(LOGS),
    floor=stats.noise_floor(FLOORS),
    reference=Side(Rate(10.0, 9.0, 11.0), peak_mib=10.0),
    candidate=Side(Rate(9.0, 8.0, 10.0), peak_mib=13.0),
    batch=8,
    device="cpu",
    processes=tuple(map(Process, LOGS, FLOORS)),
)


def answer_of(base, arm, **changes):
    """An answer with these values of ten seeds, and fields of the arm."""
    common = {"parameters": 1, "macs": 1, "images": ("a",)}
    varied = common | {"changes": {"model.registers": 1}, "speed": SLOWER} | changes
    return Answer(
        id="x-0", environment=provenance.environment(), question="q", text="", config={},
        metric="val/accuracy", effect=0.01, seconds=1.0,
        arms=(
            ArmResult(name="baseline", changes={}, values={"val/accuracy": base}, **common),
            ArmResult(name="arm", values={"val/accuracy": arm}, **varied),
        ),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "better"),
        ({"failed": ("the loss is not finite",)}, "1 failed: the loss is not finite"),
        ({"images": ("b",)}, "runs on different images"),
        ({"images": ("a", "b")}, "runs on different images"),
        ({"images": ("b",), "changes": {"data.train": 9}}, "better"),
        ({"images": ("a", "b"), "changes": {"data.train": 9}}, "runs on different images"),
        ({"stale": 3}, "better (stale: 3 runs of another version)"),
    ],
)
def test_no_verdict_is_given_on_what_is_no_pair_in_table_or_figure(changes, verdict):
    base = {str(seed): 0.5 + seed / 100 for seed in range(10)}
    kept = answer_of(base, {seed: value + 0.1 for seed, value in base.items()}, **changes)
    assert answer.table(kept).records()[0]["verdict"] == verdict
    (point,) = answer.points(kept)
    assert point.verdict == verdict.partition(":")[0]


def test_an_arm_whose_timing_failed_says_why():
    failed = Comparison(config=answer.TIMING, verdict="failed", reason="out of memory")
    kept = answer_of({"0": 0.1, "1": 0.2}, {"0": 0.1, "1": 0.3}, speed=failed)
    (line,) = answer.table(kept).records()
    assert (line["Δ images/s"], line["speed"]) == ("–", "failed: out of memory")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "arm .*: .* are not those of its processes"),
        ({"ratio": Interval(0.9, 0.8, 0.9)}, "arm .*: .* are not those of its processes"),
        ({"verdict": "faster"}, "arm .*: .* are not those of its processes"),
    ],
)
def test_a_speed_that_its_processes_do_not_give_is_refused(changes, message):
    answer_of({"0": 0.1}, {"0": 0.1}).check()
    disturbed = replace(SLOWER, verdict="inconclusive")  # whatever its ratio is
    answer_of({"0": 0.1}, {"0": 0.1}, speed=disturbed).check()
    wrong = replace(SLOWER, **(changes or {"floor": 0.02}))
    with pytest.raises(ValueError, match=message):
        answer_of({"0": 0.1}, {"0": 0.1}, speed=wrong).check()


def test_an_answers_machine_is_that_of_its_runs_and_of_its_times(answered, tmp_path):
    asked, folder = answered
    here = provenance.environment()
    on_gpu = answer.ArmTiming(replace(SLOWER, device="cuda:0"), here)
    kept = answer.add(Results(tmp_path), asked, runs.ended(folder), {"model.registers=1": on_gpu})
    assert kept.device == "cpu and cuda"
    environment = replace(here, cpu="A", cpu_id="", cores=2, gpu="B", threads=None)
    assert machine(replace(kept, environment=environment)) == "CPU (A, 2 cores) and B"
    assert all(len(arm.images) == 1 for arm in kept.arms)


def test_what_other_code_made_is_shown_as_stale(answered, monkeypatch, tmp_path):
    asked, folder = answered
    monkeypatch.setattr(provenance, "version", lambda: "other")
    kept = answer.add(Results(tmp_path), asked, runs.ended(folder), {})
    arm = kept.arms[1]
    effect = kept.effects("val/loss")[arm.name]
    assert kept.verdict(arm, effect) == "too few seeds (stale: 4 runs of another version)"


def test_a_run_that_diverges_has_ended_with_its_error(tmp_path):
    asked = ask(SEEDS=[0, 1], AXES={"optim.lr": [1e30]})
    runs.work(asked.jobs(), how(tmp_path))
    ended = runs.ended(tmp_path)
    assert len(ended) == 4
    assert len(asked.values(asked.arms[1], "val/loss", ended)) == 0
    kept = answer.add(Results(tmp_path), asked, ended, {})
    assert kept.verdict(kept.arms[1], None).startswith("2 failed: the ")


def test_runs_that_do_not_fit_into_memory_are_named_when_the_others_are_made(tmp_path, monkeypatch):
    asked, real = ask(SEEDS=[0, 1]), runs.train

    def train(training, *rest, **more):
        if training.config.model.registers:
            raise torch.OutOfMemoryError("out of memory")
        return real(training, *rest, **more)

    monkeypatch.setattr(runs, "train", train)
    with pytest.raises(ValueError, match=r"2 runs are not made.*model\.registers=1,seed=0: out of"):
        runs.work(asked.jobs(), how(tmp_path))
    assert len(runs.ended(tmp_path)) == 2
    monkeypatch.undo()
    runs.work(asked.jobs(), how(tmp_path))
    assert len(runs.ended(tmp_path)) == 4


def test_a_run_that_another_kind_of_device_has_begun_starts_anew(tmp_path, monkeypatch, capsys):
    job, real = ask().jobs()[0], runs.train

    def killed(training, run, **more):
        often = override(training.config, save_every=1)
        real(dataclasses.replace(training, config=often), run, **more)
        (run.folder / "summary.json").unlink()

    monkeypatch.setattr(runs, "train", killed)
    runs.make([job], how(tmp_path))
    monkeypatch.undo()
    folder = job.folder(tmp_path)
    assert list(folder.glob("*.ckpt"))
    config = read_json(folder / "config.json")
    (folder / "config.json").write_text(json.dumps(config | {"device": "cuda:0"}))
    runs.work([job], how(tmp_path))
    assert "was begun on cuda, and starts anew on cpu" in capsys.readouterr().out
    assert runs.ended(tmp_path)[job.key].values["step"] == 4


def test_lanes_give_the_runs_that_seed_by_seed_gives(answered, tmp_path):
    asked, folder = answered
    runs.work(asked.jobs(), how(tmp_path, lanes=2))
    alone, together = runs.ended(folder), runs.ended(tmp_path)
    assert set(alone) == set(together)
    for key, run in together.items():
        assert run.values["lanes"] == 2
        assert run.values["val/loss"] == pytest.approx(alone[key].values["val/loss"], abs=1e-4)
        lines = (run.folder / "metrics.jsonl").read_text().splitlines()
        assert len([line for line in lines if "val/loss" in json.loads(line)]) == 2
        assert (run.folder / "model.safetensors").exists()


def test_a_preview_says_costs_and_what_the_seeds_can_show(answered, capsys):
    asked, folder = answered
    preview.show(replace(asked, seeds=(3, 4, 5)), how(folder))
    text = capsys.readouterr().out
    assert "6 runs, 2 of them to be made" in text
    assert "no verdict: 1 comparison needs at least 8 seeds" in text
    assert "smallest effect" not in text
    assert "2 of 3" in text
    preview.show(replace(asked, seeds=tuple(range(8))), how(folder))
    assert "smallest effect: not known" in capsys.readouterr().out


def test_a_preview_knows_the_smallest_effect_from_pairs():
    words = preview.sensitivity(ask(EFFECT=0.02), preview.Deviation(0.01, "a pilot"))
    assert words[0] == "8 seeds, 1 comparison judged together"
    assert "with 80% power: 0.0116; power for the effect of interest, 0.02: 100%" in words[1]


def test_shipped_questions_would_find_one_point_before_any_run_of_theirs():
    """From the stored seed variance of their baseline alone."""
    powers = {}
    for name in question.names():
        asked = question.read(name)
        known = preview.deviation(asked, {})
        if asked.metric == tracking.VAL_ACCURACY and known:
            powers[name] = stats.paired_power(
                effect=0.01, std=known.std, seeds=len(asked.seeds), family=asked.family
            )
    assert len(powers) >= 6
    assert min(powers.values()) >= 0.8, powers


def test_the_sweep_file_has_an_arm_and_a_seed_for_every_run():
    asked = ask()
    settings = ablate.Settings(data_root="there", device="cpu")
    sweep = yaml.safe_load(ablate.as_sweep(asked, settings))
    parameters = sweep["parameters"]
    points = {
        (arm, seed) for arm in parameters["arm"]["values"] for seed in parameters["seed"]["values"]
    }
    assert points == {(arm.name, seed) for arm in asked.arms for seed in asked.seeds}
    assert sweep["metric"] == {"name": "val/loss", "goal": "minimize"}
    assert sweep["command"][-3:] == ["--data-root=there", "--device=cpu", "${args}"]
    fresh = yaml.safe_load(ablate.as_sweep(asked, ablate.Settings(fresh=True)))
    assert fresh["command"][-2:] == ["--fresh", "${args}"]
    with pytest.raises(ValueError, match="trains nothing, so there is nothing to sweep"):
        ablate.as_sweep(ask(METRIC="images_per_s"), settings)


def test_an_agent_makes_the_runs_of_the_exported_sweep_one_by_one(tmp_path, monkeypatch, capsys):
    """With the command lines that W&B makes of the file."""
    asked = ask(SEEDS=[0, 1])
    monkeypatch.setattr(question, "read", lambda name, data_root: asked)
    settings = ablate.Settings(out=tmp_path, wandb="disabled", device="cpu")
    sweep = yaml.safe_load(ablate.as_sweep(asked, settings))
    *words, args = sweep["command"]
    assert (words[:4], args) == (["${env}", "python", "-m", "experiments.ablate"], "${args}")
    arms, seeds = (sweep["parameters"][name]["values"] for name in ("arm", "seed"))
    for arm, seed in itertools.product(arms, seeds):
        ablate.main([*words[4:], f"--arm={arm}", f"--seed={seed}"])
        assert str(asked.job(asked.arm(arm), seed).folder(tmp_path)) in capsys.readouterr().out
    assert runs.missing(asked.jobs(), runs.ended(tmp_path)) == []
    ablate.main([*words[4:], f"--arm={arms[0]}", "--seed=1"])
    assert "baseline,seed=1 was made" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--skip-timing"], "--skip-timing goes with --run"),
        (["--only-runs", "--sweep"], "--only-runs goes with --run"),
        (["--seed=3"], "--seed goes with --arm"),
    ],
)
def test_a_flag_that_would_be_ignored_is_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        ablate.main(["pooling", *flags])


def test_identity_is_all_but_what_changes_no_number():
    same = override(TINY, log_every=7, **{"data.root": "elsewhere", "data.workers": 3})
    assert identity(same) == identity(TINY)
    assert identity(override(TINY, seed=1)) != identity(TINY)
    assert identity(override(TINY, **{"optim.lr": 1e-9})) != identity(TINY)
    pictures = override(TINY, **{"data.name": "imagefolder", "data.root": "cats"})
    # Here the folder says what the data are.
    assert identity(override(pictures, **{"data.root": "dogs"})) != identity(pictures)


MINE = '''"""Is attention with capped scores as good?

Question: on digits. Expect: as good (Gemma Team 2024). Cost: a minute.
Run: python -m experiments.ablate mine --run
"""
from experiments.recipes import DIGITS
from vitx.settings import override

BASE = override(DIGITS, steps=3, eval_every=3, batch=16)
AXES = {"model.attention": ["capped", "capped(cap=0.3)"]}
'''


SIZES = '''"""Is it the size?

Question: q. Expect: e. Cost: c. Run: r
"""
from experiments.recipes import DIGITS
from vitx.settings import override

BASE = override(DIGITS, steps=2, eval_every=2, batch=16)
AXES = {"size": {"S/1": {"model.depth": 1}}}
SEEDS = [0, 1]
'''


@pytest.mark.slow
def test_a_newcomer_adds_an_attention_and_asks_whether_it_helps(tmp_path):
    """The guide's diff: a function and its name in one file; and a question in another."""
    for name in ("vitx", "experiments"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("results"))
    guide = (ROOT / ".github" / "CONTRIBUTING.md").read_text()
    (diff,) = re.findall(r"attention\.py\n(\+def .*?)\n---", guide, flags=re.DOTALL)
    added = [line[1:] for line in diff.splitlines() if line.startswith("+")]
    (removed,) = (line[1:] for line in diff.splitlines() if line.startswith("-"))
    path = tmp_path / "vitx" / "model" / "functional" / "attention.py"
    text = path.read_text()
    assert text.count(removed) == 1
    path.write_text(text.replace(removed, "\n".join(added)))
    (tmp_path / "experiments" / "questions" / "mine.py").write_text(MINE)
    assert len(added) <= 20
    assert len(MINE.splitlines()) <= 10

    def ablate(*words):
        return subprocess.run(
            [sys.executable, "-m", "experiments.ablate", *words], cwd=tmp_path, text=True,
            env=os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"},
            capture_output=True, check=True,
        ).stdout  # fmt: skip

    assert "mine: Is attention with capped scores as good?" in ablate("-h")
    assert "model.attention=capped(cap=0.3)" in ablate("mine")
    said = ablate("mine", "--run", "--skip-timing", "--vectorize", "8", "--wandb", "disabled")
    assert "not timed" in said
    (csv_file,) = tmp_path.glob("runs/mine/answer-*/answer.csv")
    with csv_file.open() as file:
        lines = list(csv.DictReader(file))
    assert [line["arm"] for line in lines] == [
        "model.attention=capped", "model.attention=capped(cap=0.3)",
    ]  # fmt: skip
    assert {line["pairs"] for line in lines} == {"8"}
    assert all("too few" not in line["verdict"] for line in lines)
    assert len(list(tmp_path.glob("runs/mine/*/summary.json"))) == 3 * 8


@pytest.mark.slow
def test_a_worker_that_fails_is_named_by_its_log(tmp_path):
    asked = question.read("activation")
    assert asked.name == "activation"
    done = subprocess.run(
        [sys.executable, "-m", "experiments.ablate", "activation", "--run", "--workers", "2",
         "--data-root", str(tmp_path / "nowhere"), "--out", str(tmp_path)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: a worker failed: ")
    assert str(tmp_path / "nowhere") in done.stderr
    assert len(list(tmp_path.glob("activation/worker-*-1.log"))) == 1


def test_a_levels_name_may_hold_what_a_folders_may_not(tmp_path, monkeypatch):
    (tmp_path / "sizes.py").write_text(SIZES)
    monkeypatch.setattr(question, "FOLDER", tmp_path)
    monkeypatch.setattr(questions, "__path__", [*questions.__path__, str(tmp_path)])
    asked = question.read("sizes")
    runs.work(asked.jobs(), how(tmp_path))
    assert sorted(path.parent.name[:7] for path in tmp_path.glob("sizes/*/summary.json")) == [
        "S-1,see", "S-1,see", "baselin", "baselin",
    ]  # fmt: skip
    sys.modules.pop("experiments.questions.sizes")


def test_a_file_that_cant_be_read_is_named_and_does_not_hide_the_others(
    tmp_path, monkeypatch, capsys
):
    (tmp_path / "broken.py").write_text("from nowhere import x\nAXES = 1\n")
    (tmp_path / "misspelt.py").write_text("BASE = {}['cifar10_small']\nAXES = 1\n")
    (tmp_path / "leaves.py").write_text("raise SystemExit(0)\nAXES = 1\n")
    monkeypatch.setattr(question, "FOLDER", tmp_path)
    monkeypatch.setattr(questions, "__path__", [*questions.__path__, str(tmp_path)])
    ablate.main([])
    said = capsys.readouterr().out
    assert (
        "broken: error: experiments/questions/broken.py can't be read: ModuleNotFoundError" in said
    )
    assert "misspelt: error: experiments/questions/misspelt.py can't be read: KeyError" in said
    assert (
        "leaves: error: experiments/questions/leaves.py ends the program when it is imported"
        in said
    )


def test_lanes_that_cant_be_are_refused_before_anything_is_made(tmp_path):
    asked = ask(AXES={"model.patch_drop": [0.5]}, SEEDS=[0, 1])
    settings = ablate.Settings(out=tmp_path, vectorize=2, device="cpu")
    with pytest.raises(ValueError, match=r"model\.patch_drop = 0\.5 draws inside the model"):
        ablate.run(asked, settings)
    assert not list(tmp_path.glob("*/*/config.json"))


@pytest.mark.slow
def test_an_arms_own_optimizer_and_batch_are_timed(tmp_path, monkeypatch):
    quick = timing.TimingConfig(
        mode="training", processes=2, pair_s=0.05, block_s=0.01, warm_up_s=0.1
    )
    monkeypatch.setattr(answer, "TIMING", quick)
    asked = ask(BASE=override(TINY, batch=8), AXES={"batch": [64]})
    timed = answer.time_arm(asked, asked.arms[1], how(tmp_path))
    assert timed.comparison.ratio.value > 2  # 64 images take far less than eight times what 8 do
    assert timed.comparison.candidate.peak_mib > 0
    kept = [path.name for path in (tmp_path / answer.TIMES).iterdir()]
    if timed.comparison.verdict != stats.INCONCLUSIVE:
        assert answer.time_arm(asked, asked.arms[1], how(tmp_path)) == timed
    assert kept == [path.name for path in (tmp_path / answer.TIMES).iterdir()]
    monkeypatch.setattr(answer, "TIMING", replace(quick, processes=3))
    answer.time_arm(asked, asked.arms[1], how(tmp_path))  # another configuration's are others
    here = replace(provenance.environment(), cpu_id="0/0/0")
    monkeypatch.setattr(provenance, "environment", lambda: here)
    answer.time_arm(asked, asked.arms[1], how(tmp_path))  # so are another processor's
    assert len(list((tmp_path / answer.TIMES).iterdir())) == len(kept) + 2


def test_the_variance_of_a_recipe_is_split_among_its_sources(tmp_path, monkeypatch):
    monkeypatch.setitem(variance.RECIPES, "tiny", TINY)
    settings = variance.Settings(levels=2, held_out=3)
    crossed, held_out = variance.jobs("tiny", TINY, settings)
    assert len({job.key for job in (*crossed, *held_out)}) == 2**3 + 3
    runs.work([*crossed, *held_out], how(tmp_path, lanes=11))
    ended = runs.ended(tmp_path)
    kept = variance.add(Results(tmp_path), "tiny", TINY, crossed, held_out, ended)
    loss = kept.metrics["val/loss"]
    of = loss.components
    assert sum(of.shares) == pytest.approx(1)
    assert len(of.shares) == len(SOURCES) + 1
    assert of.std_low < of.std < of.std_high
    assert loss.values[0] == ended[crossed[0].key].values["val/loss"]
    assert variance_table([kept]).records()[0]["runs"] == "8"
    kept.check()
    wrong = replace(loss, components=replace(of, std=2 * of.std))
    with pytest.raises(ValueError, match=r"val/loss: std = .* does not follow from the values"):
        replace(kept, metrics={"val/loss": wrong}).check()


STORED = of_kind(read_all(RESULTS), Variance)


@pytest.mark.parametrize("stored", STORED, ids=lambda stored: stored.name)
def test_seeds_that_were_held_out_lie_where_the_stored_variance_predicts(stored):
    """95 of 100 are to; fewer than chance allows once in a hundred times are too few."""
    side = stored.levels
    for metric, spread in stored.metrics.items():
        again, of = stats.components(np.reshape(spread.values, (side,) * 3)), spread.components
        assert (again.low, again.high) == pytest.approx((of.low, of.high)), metric
        assert len(spread.held_out) >= 8
        inside = sum(again.low <= value <= again.high for value in spread.held_out)
        assert scipy.stats.binom.cdf(inside, len(spread.held_out), 0.95) > 0.01, metric


def test_each_source_of_noise_has_a_seed_of_its_own(unchecked):
    dataset = load(TINY.data)

    def drawn(**seeds):
        config = override(TINY, seed=3, **seeds)
        state = training.init(config)
        image, target = next(trainer.batches(config, dataset, state))
        return state.model.blocks[0].attn.qkv.weight, target, image

    plain = drawn()
    for name, changed in (("seed_init", {0}), ("seed_augment", {2}), ("seed_order", {1, 2})):
        other = drawn(**{name: 1})
        found = {k for k in range(3) if not torch.equal(plain[k], other[k])}
        assert found == changed, name
