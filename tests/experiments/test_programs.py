"""The programs as a person meets them: commands, files, messages and exit codes."""

import importlib
import json
import lzma
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from throughputs import comparison_of

from benchmarks import __main__ as main_job
from benchmarks import kinds
from experiments import cli, train
from experiments.recipes import RECIPES
from experiments.study import results
from experiments.train import name_run
from vitx.measure import timing
from vitx.settings import override

ROOT = Path(__file__).resolve().parents[2]


def run(*words, **environment):
    return subprocess.run(
        [sys.executable, "-m", *words],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"WANDB_MODE": "disabled", "COLUMNS": "120"} | environment,
    )


def plain(text):
    """A message without the box around it and without line breaks."""
    return re.sub(r"\s+", " ", re.sub(r"[│╭╮╰╯─]", " ", text))


PROGRAMS = {
    "benchmarks": "benchmarks.__main__",
    "benchmarks.check": "benchmarks.check",
    "benchmarks.equality": "benchmarks.equality",
    "benchmarks.throughput": "benchmarks.throughput",
    "experiments.train": "experiments.train",
    "experiments.evaluate": "experiments.evaluate",
    "experiments.predict": "experiments.predict",
    "experiments.ablate": "experiments.ablate",
    "experiments.variance": "experiments.variance",
}


WITHOUT_OUT = ("benchmarks.check", "benchmarks.equality", "experiments.evaluate",
               "experiments.predict")  # fmt: skip


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["experiments.train", "digit"], "recipe = 'digit' is not known; did you mean 'digits'"),
        (["experiments.train", "digits", "--model.heads=5"], "model.heads = 5 does not divide"),
        (["experiments.train", "digits", "--model.dept=5"], "did you mean '--model.depth'"),
        (["experiments.train", "digits", "--model.depth=x"], "invalid literal for int"),
        (["experiments.train", "digits", "--model.attention=spda"], "did you mean 'sdpa'"),
        (["experiments.train", "digits", "--model.norm=layernorm(epz=1)"], "no knob 'epz'"),
        (["experiments.train", "digits", "--model.image=9"], "does not divide the image"),
        (["experiments.train", "digits", "--wandb=onlin", "--steps=1"], "W&B mode 'onlin'"),
        (["experiments.train", "digits", "--model.placement=mid"], "model.placement = 'mid'"),
        (["experiments.train", "digits", "--model.patchify=stem"], "needs a patch of 2, 4, 8"),
        (["experiments.train", "digits", "--model.patch-drop=1"], "must lie in [0, 1)"),
        (["experiments.train", "digits", "--optim.name=adamww"], "did you mean 'adamw'"),
        (["experiments.train", "digits", "--optim.schedule=cosin"], "did you mean 'cosine'"),
        (["experiments.train", "digits", "--optim.lr=-1"], "optim.lr = -1.0 must be positive"),
        (["experiments.train", "digits", "--optim.layer-decay=0"], "must lie in (0, 1]"),
        (["experiments.train", "digits", "--optim.decay=none"], "choices: matrices, all"),
        (["experiments.train", "digits", "--optim.freeze", "bloks.*"], "matches no parameter"),
        (["experiments.train", "digits", "--optim.freeze", "*"], "leaves no parameter to train"),
        (
            ["experiments.train", "digits", "--optim.schedule=cosine(end=-3)"],
            "end must lie in [0, 1]",
        ),
        (["experiments.train", "digits", "--data.randaugment=rand-zz9"], "must be timm's words"),
        (["experiments.train", "digits", "--data.randaugment=rand-m9.5"], "must be timm's words"),
        (["experiments.train", "digits", "--data.randaugment=rand-m9-w0"], "must be timm's words"),
        (["experiments.predict", "RUN", "a.png", "--batch=-1"], "batch = -1 must be at least 1"),
        (["experiments.predict", "RUN", "a.png", "--top=-1"], "top = -1 must be at least 1"),
        (["experiments.evaluate", "RUN", "--probe-images=-5"], "probe_images = -5 must be at"),
        (["experiments.train", "digits", "--data.val=1700"], "leave no image"),
        (["experiments.train", "digits", "--seed=5000000000"], "must be less than 2**31"),
        (["experiments.train", "digits", "--data.name=digit"], "did you mean 'digits'"),
        (["experiments.train", "digits", "--data.name=fake(size='8')"], "size must be int"),
        (["experiments.train", "digits", "--data.val=5"], "can't keep the shares of 10 classes"),
        (["experiments.train", "digits", "--data.train=1500"], "there are only 1257 images"),
        (["experiments.train", "digits", "--data.crop=0"], "data.crop = 0.0 must lie in (0, 1]"),
        (["experiments.train", "digits", "--data.mixup=-1"], "must be 0 or positive"),
        (["experiments.train", "digits", "--data.randaugment=rand-m9"], "held in memory"),
        (["experiments.train", "digits", "--data.randaugment=m9"], "must be timm's words"),
        (["experiments.train", "digits", "--data.normalise=imagenet"], "is for 3 channels"),
        (["experiments.train", "digits", "--data.on-bad-image=hide"], "choices: stop, skip"),
        (["experiments.train", "digits", "--batch=2000"], "batch = 2000 is larger than the"),
        (["experiments.train", "digits", "--accumulate=3"], "does not divide batch = 128"),
        (["experiments.train", "digits", "--precision=float8"], "precision = 'float8' is not"),
        (["experiments.train", "digits", "--ema=1"], "ema = 1.0 must lie in [0, 1)"),
        (["experiments.train", "digits", "--curve=train"], "curve = 'train' is not known"),
        (["experiments.train", "digits", "--model.classes=9"], "does not fit the data set digits"),
        (["experiments.train", "digits", "--weights=none.pt"], "none.pt does not exist"),
        (["experiments.train", "digits", "--resume"], "holds no run of these settings"),
        (["experiments.train", "scratch-cifar10"], "data.root is empty; give the folder"),
        (
            ["experiments.train", "scratch-cifar10", "--data.root=/nowhere"],
            "data.root = '/nowhere' is not a folder",
        ),
        (["benchmarks", "--smok"], "did you mean '--smoke'"),
        (["benchmarks", "--smoke", "--full"], "--smoke, --full, --check"),
        (["benchmarks", "--device", "cud"], "device = 'cud' is not on this machine; choices: cpu"),
        (["experiments.train", "digits", "--device", "cpu:x"], "device = 'cpu:x' is not on this"),
        (
            ["benchmarks", "--only", "sped"],
            "stage = 'sped' is not one of this scale; did you mean 'speed'",
        ),
        (["benchmarks", "--only", "pilot"], "stage = 'pilot' is not one of this scale"),
        (["benchmarks", "--models", "vit_small"], "model = 'vit_small' is not timed here"),
        (["benchmarks.check", "--device=cuda"], "--device=cuda is not known"),
        (["benchmarks", "--batch=16"], "--batch goes with --accuracy"),
        (["benchmarks", "--calibrate=0"], "calibrate = 0 must be at least 1"),
        (
            ["benchmarks", "--accuracy=timm:vit_small_patch16_224", "--data=tests"],
            "timm can't make",
        ),
        (["benchmarks.check"], "trajectory.json is there already; --replace makes it anew"),
        (["benchmarks", "--calibrate=1", "--models=a"], "--models does not go with --calibrate"),
        (["benchmarks", "--check", "--only=speed"], "--only does not go with --check"),
        (["benchmarks.equality", "vit_tiny_patch16_225"], "did you mean 'vit_tiny_patch16_224'"),
        (["benchmarks.equality", "vit_base_patch16_clip_224"], "timm's pre_norm"),
        (["benchmarks.equality", "resnet18"], "ResNet is another class"),
        (["benchmarks.throughput", "--batch=0"], "batch = '0' must be a whole number"),
        (["benchmarks.throughput", "--models=S/16"], "model = 'S/16' is not known"),
        (["benchmarks.throughput", "--models=vitx:Z/16"], "size = 'Z/16' is not known"),
        (["benchmarks.throughput", "--compile=fast"], "compile = 'fast' is not known"),
        (["experiments.ablate", "poolin"], "question = 'poolin' is not known; did you mean 'pool"),
        (["experiments.ablate", "train"], "question = 'train' is not known"),
        (["experiments.ablate", "pooling", "--run", "--workers=0"], "workers = 0 must be at least"),
        (["experiments.ablate", "pooling", "--arm=men"], "arm = 'men' is none of pooling; did you"),
        (["experiments.ablate", "pooling", "--run"], "data.root is empty; give the folder"),
        (["experiments.variance", "digit"], "recipe = 'digit' is not known; did you mean 'digits'"),
        (["experiments.variance", "digits", "--levels=1"], "levels = 1 must be at least 2"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_plain_sentence_and_exit_code_2(
    words, message, tmp_path, capsys, monkeypatch, unchecked
):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    program, *args = words
    out = [] if program in WITHOUT_OUT else ["--out", str(tmp_path)]
    main = importlib.import_module(PROGRAMS[program]).main
    with pytest.raises(SystemExit) as stopped:
        cli.run(main, [*args, *out])
    assert stopped.value.code == 2
    said = capsys.readouterr()
    assert message in plain(said.err + said.out)
    assert not [path for path in tmp_path.iterdir() if path.name != "claims"]


@pytest.mark.slow
def test_the_throughput_of_one_configuration_stands_in_its_summary(tmp_path, unchecked, capsys):
    words = ["--models=vitx:Pico/32", "--batch=2", "--seconds=0.1", "--processes=2",
             f"--out={tmp_path}"]  # fmt: skip
    cli.run(importlib.import_module("benchmarks.throughput").main, [*words, "--wandb=offline"])
    assert list(tmp_path.glob("throughput/*/wandb/offline-run-*/files/media/table/throughput*"))
    assert list(tmp_path.glob("throughput/*/wandb/offline-run-*/files/media/images/throughput-*"))
    (path,) = tmp_path.glob("throughput/*/summary.json")
    found = json.loads(path.read_text())
    low, high = (found[f"images_per_s_mean_{end}"] for end in ("low", "high"))
    assert low <= found["images_per_s"] <= high
    assert f"{found['images_per_s']:,.1f} images/s" in capsys.readouterr().out


def test_a_wrong_device_ends_the_check_with_a_result_and_exit_code_1(tmp_path, monkeypatch, capsys):
    values = {"facts": {}, "kernels": {}, "logits_error": {"float32": 1.0}, "losses": (1.0,),
              "trajectory_apart": 0.0, "bands": {"float32": 0.5, "trajectory": 0.5}}  # fmt: skip
    monkeypatch.setattr(main_job.check, "run", lambda device: values)
    monkeypatch.setattr(main_job.check, "text", lambda result: result.verdict)
    words = ["--check", "--out", str(tmp_path), "--wandb", "disabled"]
    with pytest.raises(SystemExit) as stopped:
        main_job.main(words)
    assert stopped.value.code == 1
    (path,) = tmp_path.glob("*-check/results.jsonl")
    assert [result.kind for result in results.read(path)] == ["check"]
    assert capsys.readouterr().out == f"outside a band\nresult: {path}\n"
    values["logits_error"] = {"float32": 0.1}
    main_job.main(words)


def test_the_calibration_goes_on_where_it_was_left(tmp_path, monkeypatch, capsys):
    def trial(number, make, config, **_):
        share, forked = kinds.shares()[number], sys.platform == "linux"
        comparison = comparison_of(batch=2)
        processes = tuple(replace(each, forked=forked) for each in comparison.processes)
        return {
            "trial": number, "planted": share, "planted_counted": share, "seconds": 1.0,
            "protocol": timing.PROTOCOL, "candidate": "b", "reference": "timm:vit_tiny_patch16_224",
            "comparison": replace(comparison, config=config, processes=processes),
        }  # fmt: skip

    monkeypatch.setattr(main_job.calibration, "trial", trial)
    monkeypatch.setattr(main_job.render, "RESULTS", tmp_path / "none")
    for count in (2, 3):
        main_job.main(["--calibrate", str(count), "--out", str(tmp_path), "--wandb", "disabled"])
        time.sleep(1)  # a folder is named by the second
    made = [[trial.trial for trial in results.read(path)]
            for path in sorted(tmp_path.glob("*-calibration/results.jsonl"))]  # fmt: skip
    assert made == [[0, 1], [2, 3, 4]]
    assert "| planted | work counted | trials |" in capsys.readouterr().out


def test_accuracy_of_weights_leaves_a_result(tmp_path, monkeypatch, capsys):
    arguments = {}

    def measure(model, folder, *, batch, device):
        arguments.update(model=model, folder=folder, batch=batch)
        side = kinds.Accurate(top1=1.0, top5=1.0, seconds=1.0)
        return {"candidate": "a", "weights": "a", "data": "b", "images": 4, "classes": 2,
                "of_reference": side, "of_candidate": side, "identical": 4, "logits_apart": 0.0,
                "preprocessing": {}}  # fmt: skip

    monkeypatch.setattr(main_job.pretrained, "measure", measure)
    monkeypatch.setattr(main_job.pretrained, "text", lambda result: f"{result.identical} of 4")
    main_job.main(["--accuracy", "a", "--data", "b", "--batch", "4", "--out", str(tmp_path),
                   "--wandb", "disabled"])  # fmt: skip
    assert arguments == {"model": "a", "folder": Path("b"), "batch": 4}
    (path,) = tmp_path.glob("*-accuracy/results.jsonl")
    assert results.read(path)[0].kind == "pretrained"
    assert capsys.readouterr().out == f"4 of 4\nresult: {path}\n"


def test_another_librarys_error_keeps_its_traceback():
    def program(args):
        json.loads("{")

    with pytest.raises(json.JSONDecodeError):
        cli.run(program, [])


def test_a_mistake_leaves_no_traceback_in_a_terminal():
    found = run("experiments.train", "digit")
    assert found.returncode == 2
    assert (
        found.stderr
        == "error: recipe = 'digit' is not known; did you mean 'digits'? Choices: "
        + ", ".join(RECIPES)
        + "\n"
    )


@pytest.mark.slow
@pytest.mark.parametrize("program", ["benchmarks", "experiments.train", "benchmarks.equality"])
def test_help_is_short_and_exits_0(program):
    found = run(program, "--help")
    assert found.returncode == 0
    assert len(found.stdout.splitlines()) < 40


def test_a_dry_run_prints_config_parameters_macs_and_steps_and_writes_nothing(tmp_path):
    found = run("experiments.train", "digits", "--dry-run", "--model.depth=6",
                "--model.class_token=True", "--out", str(tmp_path))  # fmt: skip
    assert found.returncode == 0, found.stderr
    assert "model.depth = 6" in found.stdout
    assert re.search(r"digits: [\d,]+ parameters, [\d,]+ MACs an image forward, 1,300 steps",
                     found.stdout)  # fmt: skip
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_training_leaves_a_run_folder_named_by_what_was_changed(tmp_path):
    found = run("experiments.train", "digits", "--steps=4", "--eval-every=2", "--out",
                str(tmp_path), WANDB_MODE="offline")  # fmt: skip
    assert found.returncode == 0, found.stderr
    (folder,) = (tmp_path / "digits").iterdir()
    assert folder.name.startswith("steps=4,eval_every=2-")
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if "val/accuracy" in event] == [2, 4]
    summary = json.loads((folder / "summary.json").read_text())
    assert 0 <= summary["test/accuracy"] <= 1
    assert "test accuracy" in found.stdout
    assert f"wandb sync {folder}" in found.stdout


def test_a_run_is_found_again_by_its_settings_and_a_folder_without_one_starts_it(tmp_path, capsys):
    def trained(*words):
        how = ["digits", "--steps=2", "--wandb=disabled", "--device=cpu", "--out", str(tmp_path)]
        train.main([*how, "--optim.freeze", "blocks.0.*", "--optim.lr=0.002", *words])
        return capsys.readouterr().out

    first = re.search(r"run: (.*)", trained())[1]
    trained("--save-every=1")
    os.utime(Path(first) / "last.ckpt")  # the last to be saved is gone on with
    assert f"run: {first}\n" in trained("--resume")
    folder = tmp_path / "mine"
    assert f"{folder} holds no checkpoint yet" in trained("--resume", "--folder", str(folder))
    assert "holds no checkpoint" not in trained("--resume", "--folder", str(folder))


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    out = tmp_path_factory.mktemp("smoke")
    found = run("benchmarks", "--smoke", "--out", str(out), WANDB_MODE="offline")
    assert found.returncode == 0, found.stderr
    (folder,) = out.iterdir()
    return found, folder


@pytest.mark.slow
def test_the_smoke_run_does_every_stage_and_gives_no_verdict(smoke):
    found, folder = smoke
    said = found.stdout
    assert said.index("budget: equality") < said.index("equality …") < said.index("speed …")
    kept = results.read(folder / "results.jsonl")
    assert [result.kind for result in kept] == ["equality", "speed", "speed", "accuracy"]
    speeds, (accuracy,) = results.of_kind(kept, kinds.Speed), kept[3:]
    verdicts = {result.comparison.verdict for result in speeds}
    assert {*verdicts, accuracy.verdict} == {"smoke run, no verdict"}
    assert "faster" not in said
    assert said.rstrip().splitlines()[-1].startswith("W&B: offline")
    assert "report.html" in said
    assert "| float64 outputs and all gradients equal timm's | 1 of 1 models" in said


@pytest.mark.slow
def test_every_timing_has_the_values_that_readers_rely_on(smoke):
    _, folder = smoke
    for result in results.of_kind(results.read(folder / "results.jsonl"), kinds.Speed):
        comparison = result.comparison
        assert result.image == (32, 32)
        assert comparison.equality.passed
        assert comparison.raw
        for side in comparison.sides.values():
            assert side.rate.median > 0
            assert min(side.macs, side.peak_mib, 1 + side.page_faults, side.timed_error) > 0


@pytest.mark.slow
def test_the_report_is_one_file_without_script_or_network(smoke):
    _, folder = smoke
    page = (folder / "report.html").read_text()
    assert "<script" not in page
    assert "viewport" in page
    loads = re.findall(r"(?:src|href)=[\"'](?!#)([^\"']+)", page)
    assert all(load.startswith("data:") for load in loads)
    assert "@import" not in page
    assert page.count("<svg") == 5 + 2  # figures, and the scales of both ratios
    figures = ("speed", "accuracy", "curves", "confusion", "attention")
    ids = re.findall(r' id="([^"]+)"', page)
    sections = set(re.findall(r'href="#(\w+)">\w', page))
    assert {name.split("-")[0] for name in ids} == {*figures, *sections}
    assert "prefers-color-scheme: dark" in page
    assert "## Speed" in (folder / "report.md").read_text()


@pytest.mark.slow
def test_the_smoke_runs_wandb_record_is_read_back(smoke):
    _, folder = smoke
    (wandb_run,) = (folder / "wandb").glob("offline-run-*")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--summary", "--json"]
    text = subprocess.run([*command, str(wandb_run)], capture_output=True, text=True).stdout
    found = json.loads(text)
    assert found["state"] == "finished"
    assert found["config"]["scale"] == "smoke"
    assert "speed" in found["summary"]


@pytest.mark.slow
def test_results_of_a_smoke_run_are_not_kept_as_evidence(smoke):
    _, folder = smoke
    with pytest.raises(ValueError, match="is a smoke run"):
        results.commit(results.read(folder / "results.jsonl"), folder / "kept", folder.name)
    assert not (folder / "kept").exists()


@pytest.mark.slow
def test_kept_results_leave_their_raw_times_in_the_file_beside_them(smoke):
    _, folder = smoke
    made = results.read(folder / "results.jsonl")
    clean = [replace(r, environment=replace(r.environment, dirty=False)) for r in made]
    results.commit(clean, folder / "kept", "run")
    kept = results.read(folder / "kept" / "run.jsonl")
    timed = results.of_kind(made, kinds.Speed)
    assert not any(result.comparison.raw for result in results.of_kind(kept, kinds.Speed))
    with lzma.open(folder / "kept" / "run.raw.jsonl.xz", "rt") as file:
        raw = [json.loads(line) for line in file]
    assert [line["id"] for line in raw] == [result.id for result in timed]
    (columns,) = raw[0]["raw"]["rounds"]  # of one process
    ((first, *others),) = (record["rounds"] for record in timed[0].comparison.raw)
    seconds = [each["blocks"]["candidate"]["seconds"] for each in (first, *others)]
    assert columns["blocks"]["candidate"]["seconds"] == [float(f"{s:.4g}") for s in seconds]
    assert columns["started"][0] == round(first["started"], 1)
    assert columns["load"][0] == float(f"{first['load']:.3g}")
    assert columns["order"][0] == first["order"]
    with pytest.raises(FileExistsError):
        results.commit(clean, folder / "kept", "run")
    dirty = replace(made[0], environment=replace(made[0].environment, dirty=True))
    with pytest.raises(ValueError, match="uncommitted code"):
        results.commit([dirty], folder / "kept", "other")


@pytest.mark.slow
def test_ctrl_c_leaves_every_finished_result_on_disk(tmp_path):
    child = subprocess.Popen(
        [sys.executable, "-m", "benchmarks", "--smoke", "--out", str(tmp_path)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"WANDB_MODE": "disabled"}, start_new_session=True,
        # What a shell starts in the background ignores Ctrl-C, and its children do too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    for line in child.stdout:
        if "speed …" in line:
            break
    time.sleep(1)
    os.killpg(child.pid, signal.SIGINT)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 130
    assert "what was finished is on disk" in errors
    assert "Traceback" not in errors
    (folder,) = tmp_path.iterdir()
    assert [r.kind for r in results.read(folder / "results.jsonl")] == ["equality"]


@pytest.mark.slow
def test_the_equality_command_prints_a_verdict_a_model():
    found = run("benchmarks.equality", "vit_tiny_patch16_224", "--image", "32")
    assert found.returncode == 0, found.stderr
    assert "vit_tiny_patch16_224: equal; float64 outputs differ by" in found.stdout


def test_a_run_is_named_by_what_matters_and_never_by_a_place():
    recipe = RECIPES["finetune-beans"]
    changed = override(recipe, weights="/a/b/vit", batch=8, **{"data.root": "/c/d"})
    assert name_run(changed, recipe) == "weights=vit,batch=8"
    assert name_run(override(recipe, log_every=3), recipe) == "base"


def test_sizes_keep_their_library_in_a_line_of_settings():
    found = cli.label({"models": "vitx:S/16", "size": "B/16", "root": "some/place", "seed": 1})
    assert found == "models=vitx:S/16,size=B/16,root=place,seed=1"
