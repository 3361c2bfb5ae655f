"""Sweep files: what is refused, and trials that are run once, through Optuna and through W&B."""

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import optuna
import pytest
import yaml
from optuna.trial import TrialState
from standin import StandIn

from experiments import sweep
from experiments.study import findings, sweepfile
from experiments.study.kinds import Candidate, Saving, SweepResult, TrialResult, saving
from experiments.study.pages import RESULTS, ROOT
from experiments.study.parameters import read_parameter
from experiments.study.results import FILE, read
from experiments.study.tables import stopping_table, sweep_table
from experiments.study.trials import (
    LOSSES,
    MOST_LOSSES,
    OWNER,
    SLOT,
    STEPS,
    VERSION,
    Trials,
    draw,
    error_of,
)
from vitx.data.config import DataConfig
from vitx.files import read_json
from vitx.settings import override
from vitx.training import provenance, tracking
from vitx.training.prepare import prepare
from vitx.training.trainer import train

GOOD = {
    "method": "grid",
    "metric": {"name": "val/loss", "goal": "minimize"},
    "parameters": {"model.depth": {"values": [1, 2]}, "optim.lr": {"values": [0.1, 0.01]}},
    "command": ["${env}", "python", "-m", "experiments.train", "digits", "${args}"],
}


def file(folder, changes=None, **keys):
    path = folder / "some.yaml"
    path.write_text(yaml.safe_dump(GOOD | (changes or {}) | keys))
    return path


def quick(folder, parameters, method="grid", wait=0.0, **keys):
    """A sweep of tests/trial.py."""
    words = ["${env}", "python", str(ROOT / "tests" / "trial.py"), f"--wait={wait}", "${args}"]
    said = {"name": "quick", "method": method, "metric": {"name": "loss"}, "command": words}
    path = folder / "quick.yaml"
    path.write_text(yaml.safe_dump(said | {"parameters": parameters} | keys))
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methd": "grid"}, "methd is not known; did you mean 'method'"),
        ({"method": "gird"}, "method = 'gird' is not known; did you mean 'grid'"),
        ({"method": "random"}, "run_cap is missing: a random sweep has no end of its own"),
        ({"run_cap": 0}, "run_cap = 0 must be a whole number, at least 1"),
        ({"metric": {"goal": "minimize"}}, "metric.name is missing"),
        ({"metric": {"name": "a", "gaol": "b"}}, "metric.gaol is not known; did you mean 'goal'"),
        ({"parameters": {}}, "parameters must name at least one"),
        ({"parameters": {"model.dept": {"values": [1]}}},
         "parameters.model.dept: ModelConfig has no field 'dept'; did you mean 'depth'"),
        ({"parameters": {"model.depth": {"values": [1, 0]}}},
         "parameters.model.depth: model.depth = 0 must be a whole number"),
        ({"parameters": {"optim.lr": {"values": ["1e-4"]}}},
         "parameters.optim.lr = '1e-4' is a string to YAML; write 0.0001"),
        ({"parameters": {"optim.lr": {"min": "1e-10", "max": 0.1}}},
         "parameters.optim.lr.min = '1e-10' is a string to YAML; write 1.0e-10"),
        ({"parameters": {"optim.lr": {"min": 0, "max": 0.1}}}, "must be both whole or neither"),
        ({"parameters": {"optim.lr": {"min": 0.2, "max": 0.1}}}, "min = 0.2 must be below max"),
        ({"parameters": {"optim.lr": {"min": 0.01, "max": 0.1}}}, "a grid needs values"),
        ({"parameters": {"optim.lr": {"vals": [1]}}}, "optim.lr.vals is not known"),
        ({"parameters": {"optim.lr": {"distribution": "normal", "min": 0.1, "max": 0.2}}},
         "optim.lr.distribution = 'normal' is not known"),
        ({"parameters": {"model": {"parameters": {}}}}, "write nested parameters with dots"),
        ({"early_terminate": {"type": "hyperband"}}, "early_terminate needs min_iter"),
        ({"early_terminate": {"type": "hyperband", "min_itr": 1}}, "terminate.min_itr is not"),
        ({"command": ["python", "x.py"]}, r"command has no \$\{args\}"),
        ({"command": ["${args_json}"]}, r"command: \$\{args_json\} is not filled in here"),
        ({"command": ["--data.root=${envvar:VITX_NOWHERE}", "${args}"]},
         "needs the environment variable VITX_NOWHERE"),
        ({"command": ["-m", "experiments.train", "digit", "${args}"]},
         "command: recipe = 'digit' is not known; did you mean 'digits'"),
        ({"command": ["-m", "experiments.ablate", "pooling", "${args}"]},
         "the runs of a question are made by python -m experiments.ablate"),
        ({"metric": {"name": "val/los"}}, "metric.name = 'val/los' is not known; .* 'val/loss'"),
        ({"metric": {"name": "test/loss"}}, "metric.name = 'test/loss' is not known; .*'val/loss'"),
        ({"metric": {"name": "val/accuracy"}},
         "metric.goal = 'minimize' must be 'maximize' for val/accuracy"),
        ({"metric": {"name": "images_per_s", "goal": "minimize"}}, "must be 'maximize' for images"),
        ({"command": [*GOOD["command"][:-1], "--data.val=0", "--curve=test", "${args}"]},
         "metric.name: val/loss needs --data.val in the command"),
        ({"command": [*GOOD["command"][:-1], "--data.rooot=x", "${args}"]},
         "command: --data.rooot=x is not known; did you mean '--data.root'"),
        ({"command": "python -m experiments.train digits ${args}"}, "must be a list of words"),
        ({"parameters": {"data.val": {"values": [100, 180]}}},
         "parameters.data.val can't be varied: all arms are read on the same images"),
        ({"parameters": {"optim.lr": {"values": [0.1, 0.1]}}}, "names a value twice"),
        ({"parameters": {"model.depth": {"values": ["6"]}}}, "is a string to YAML; write 6$"),
        ({"parameters": {"model.depth": {"values": [1, 0]}, "seed": {"values": [*range(900)]}}},
         "parameters.model.depth: model.depth = 0 must be a whole number"),
        ({"name": ""}, "name = '' must be a word"),
        ({"name": ".."}, r"name = '\.\.' must be a word"),
        ({"parameters": {"optim.lr": {"values": [1], "value": 1}}}, "both a value and values"),
        ({"parameters": {"optim.lr": {"values": [1], "min": 1}}}, "lr.min does not go with values"),
        ({"parameters": {"optim.lr": {"min": 0.1, "max": 1.0, "q": 0.0,
                                      "distribution": "q_uniform"}}}, "q = 0.0 must be positive"),
        ({"early_terminate": {"type": "hyperband", "min_iter": 1, "s": 2}}, "s does not go with"),
        (
            {"early_terminate": {"type": "hyperband", "max_iter": 2}},
            "max_iter = 2 is less than eta = 3",
        ),
        ({"parameters": {"model.heads": {"values": [5]}, "model.width": {"values": [32, 64]}}},
         "parameters.model.heads: model.heads = 5 does not divide"),
    ],
)  # fmt: skip
def test_a_wrong_sweep_file_is_one_sentence_that_names_file_and_key(tmp_path, changes, message):
    with pytest.raises(ValueError, match=rf"some\.yaml.*{message}"):
        sweepfile.read(file(tmp_path, changes))


def test_a_key_that_stands_twice_is_an_error(tmp_path):
    path = tmp_path / "some.yaml"
    path.write_text(yaml.safe_dump(GOOD) + "method: random\n")
    with pytest.raises(ValueError, match=r"some\.yaml can't be read: method stands twice"):
        sweepfile.read(path)


def test_values_that_go_only_together_are_taken(tmp_path):
    """Each with the others of its point, and with the flags of the command."""
    parameters = {"model.width": {"values": [64, 96]}, "model.heads": {"value": 4}}
    words = [*GOOD["command"][:-1], "--model.pool=mean", "${args}"]
    parameters["model.class_token"] = {"value": False}
    found = sweepfile.read(file(tmp_path, parameters=parameters, command=words))
    assert len(found.points()) == 2
    assert found.base().model.pool == "mean"
    parameters["model.width"], parameters["model.heads"] = {"values": [48, 50]}, {"values": [3, 5]}
    parameters["seed"] = {"values": [*range(900)]}  # of too many points to try them all
    assert (
        len(sweepfile.read(file(tmp_path, parameters=parameters, command=words)).points()) == 3600
    )


def test_yamls_merge_keys_are_taken(tmp_path):
    path = tmp_path / "merged.yaml"
    text = yaml.safe_dump(GOOD | {"parameters": {"model.depth": {"values": [1, 2]}}})
    path.write_text(
        text.replace("model.depth:", "optim.lr: &a {values: [0.1]}\n  model.depth:\n    <<: *a")
    )
    assert sweepfile.read(path).parameters["model.depth"].values == (1, 2)


def test_whole_numbers_and_steps_are_drawn_as_said(tmp_path):
    parameters = {
        "a": {"min": 1, "max": 4},
        "b": {"distribution": "q_uniform", "min": 0, "max": 10, "q": 2.5},
        "c": {"distribution": "q_uniform", "min": 0, "max": 12, "q": 4},
    }
    path = quick(tmp_path, parameters, method="random", run_cap=12)
    trials = Trials(sweepfile.read(path), "", tmp_path)
    drawn = [trials.take().values for _ in range(12)]
    assert {one["a"] for one in drawn} == {1, 2, 3, 4}
    assert {one["b"] for one in drawn} <= {0.0, 2.5, 5.0, 7.5, 10.0}
    assert {one["c"] for one in drawn} <= {0, 4, 8, 12}
    assert all(isinstance(one[name], int) for one in drawn for name in "ac")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "more", "message"),
    [
        ({"parameters": {"optim.lr": {"values": ["1e-4"]}}}, [], "is a string to YAML"),
        ({}, ["--storage", "postgresql://me:secret@127.0.0.1:9/none"], "Connection refused"),
        ({}, ["--storage", "postgresql://me:secret@127.0.0.1:9/none"], "me:***@127.0.0.1:9"),
        ({}, ["--storage", str(ROOT / "LICENSE")], "it is no journal"),
        ({}, ["--storage", str(next(RESULTS.glob("digits-*.jsonl")))], "it is no journal"),
        ({}, ["--storage", "postgresql://me:s@cret@127.0.0.1:x/none"], "me:***@127.0.0.1:x/none"),
        ({}, ["--storage", "journal", "--wandb"], "--storage is for sweeps without --wandb"),
        ({}, ["--show", "--storage", "absent"], "can't be reached: there is no such file"),
        ({}, ["--show", "--wandb"], "--show, --confirm and --wandb exclude each other"),
        ({}, ["--whole"], "--whole is for files with early_terminate, and without --wandb"),
        ({}, ["--seeds", "4"], "--seeds goes with --confirm"),
        ({}, ["--show", "--only-runs"], "--only-runs is for trials that this program runs"),
        ({}, ["--confirm", "-1"], "confirm = -1 must be at least 0"),
        ({}, ["--storage", "nosuch://x"], "can't be reached"),
        ({}, ["--workers", "0"], "workers = 0 must be at least 1"),
        (None, [], "absent.yaml"),
    ],
)
def test_what_is_wrong_exits_with_2_and_starts_nothing(tmp_path, changes, more, message):
    path = tmp_path / "absent.yaml" if changes is None else file(tmp_path, changes)
    words = [sys.executable, "-m", "experiments.sweep", str(path), "--out", str(tmp_path / "runs")]
    done = subprocess.run([*words, *more], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.glob("runs/*/*-*"))


def test_a_storage_of_another_question_is_refused(tmp_path):
    Trials(sweepfile.read(quick(tmp_path, {"x": {"values": [1, 2]}})), "", tmp_path)
    other = sweepfile.read(quick(tmp_path, {"x": {"values": [1, 3]}}))
    with pytest.raises(ValueError, match="holds another sweep named 'quick'"):
        Trials(other, "", tmp_path)
    url = f"sqlite:///{tmp_path}/foreign.db"
    study = optuna.create_study(storage=url, study_name="quick")
    study.add_trial(optuna.create_trial(value=-1.0))
    with pytest.raises(ValueError, match="holds another sweep named 'quick'"):
        Trials(other, url, tmp_path)
    assert len(study.trials) == 1


def test_a_larger_run_cap_adds_trials(tmp_path):
    parameters = {"x": {"min": 0.0, "max": 1.0}}
    for cap in (2, 5, 3):
        path = quick(tmp_path, parameters, method="random", run_cap=cap)
        trials = Trials(sweepfile.read(path), "", tmp_path)
    assert len(trials.all()) == 5


def test_every_point_of_a_grid_is_run_once_and_shown(tmp_path, capsys):
    asked = sweepfile.read(quick(tmp_path, {"x": {"values": [0.5, 2.0, 1.0]}}))
    trials = Trials(asked, "", tmp_path)
    sweep.work(trials, tmp_path)
    sweep.work(trials, tmp_path)
    assert Counter(Path(tmp_path, "finished").read_text().split()) == {"0.5": 1, "2.0": 1, "1.0": 1}
    assert [one.settings["x"] for one in findings.ranking(trials)] == [0.5, 1.0, 2.0]
    findings.show(trials)
    text = capsys.readouterr().out
    assert "  0.25: x=0.5" in text
    assert "3 trials ended, none stopped early" in text


def test_importance_is_read_of_numbers_and_of_few_words_in_a_moment(tmp_path):
    words = [f"word {number}" for number in range(4)]
    many = [f"name {number}" for number in range(40)]
    parameters = {"x": {"values": [*range(40)]}, "y": {"values": words}, "z": {"values": many},
                  "seed": {"values": [*range(40)]}}  # fmt: skip
    path = quick(tmp_path, parameters, method="random", run_cap=40)
    trials = Trials(sweepfile.read(path), "", tmp_path)
    for number in range(40):
        trials.complete(claim := trials.take(), float(claim.values["x"]))
        if number == 2:
            assert findings.importances(trials) == {}
    start = time.monotonic()
    found = findings.importances(trials)
    assert time.monotonic() - start < 30  # with a column a value it would not end
    assert set(found) == {"x", "y"}
    assert found["x"] > 0.8


def test_drawn_values_depend_on_the_trial_and_not_on_the_worker(tmp_path):
    parameters = {"x": {"distribution": "log_uniform_values", "min": 0.001, "max": 1.0}}
    path = quick(tmp_path, parameters, method="random", run_cap=4)
    found = []
    for out in (tmp_path / "a", tmp_path / "b"):
        trials = Trials(sweepfile.read(path), "", out)
        claims = [trials.take() for _ in range(4)]
        assert trials.take() is None
        found.append([claim.values["x"] for claim in claims])
    assert found[0] == found[1]
    assert len(set(found[0])) == 4
    assert all(0.001 <= value <= 1 for value in found[0])


def test_a_bad_trial_is_a_failed_trial_with_its_error(tmp_path):
    path = quick(tmp_path, {"bad": {"values": [True, False]}})
    trials = Trials(sweepfile.read(path), "", tmp_path)
    sweep.work(trials, tmp_path)
    states = {t.params["bad"]: (t.state, error_of(t)) for t in trials.all()}
    assert states[True] == (TrialState.FAIL, "exit 1: the trial went wrong")
    assert states[False] == (TrialState.COMPLETE, "")


@pytest.mark.parametrize(
    ("said", "error"),
    [
        ("undefined", "its final loss is nan"),
        ("word", "its final loss is 'word'"),
        ("none", "it left no run in "),
    ],
)
def test_a_final_value_that_is_no_number_fails_the_trial(tmp_path, said, error):
    path = quick(tmp_path, {"x": {"value": 1.0}, "final": {"value": said}})
    trials = Trials(sweepfile.read(path), "", tmp_path)
    sweep.work(trials, tmp_path)
    (trial,) = trials.all(TrialState.FAIL)
    assert error_of(trial).startswith(error)


def test_the_error_of_a_training_is_the_one_that_it_ends_with(tmp_path):
    """Not what else it printed, of which some reaches the file later."""
    words = [*GOOD["command"][:-1], "--data.name=imagefolder", "--data.root=/nowhere", "${args}"]
    path = file(tmp_path, name="wrong", parameters={"seed": {"value": 1}}, command=words)
    trials = Trials(sweepfile.read(path), "", tmp_path)
    sweep.work(trials, tmp_path)
    (trial,) = trials.all(TrialState.FAIL)
    assert error_of(trial) == "exit 2: data.root = '/nowhere' is not a folder"


def test_a_program_that_is_not_there_fails_its_trial(tmp_path):
    path = file(tmp_path, name="none", command=["no-such-program", "${args}"])
    trials = Trials(sweepfile.read(path), "", tmp_path)
    sweep.work(trials, tmp_path)
    assert {error_of(trial)[:10] for trial in trials.all()} == {"[Errno 2] "}
    assert trials.ended


def test_a_trial_of_which_every_worker_dies_is_given_up(tmp_path):
    trials = Trials(sweepfile.read(quick(tmp_path, {"x": {"value": 1.0}})), "", tmp_path)
    for _ in range(MOST_LOSSES):
        claim = trials.take()
        assert claim.values == {"x": 1.0}
        claim.lock.close()
    assert trials.take() is None
    assert trials.ended
    (trial,) = trials.all()
    assert error_of(trial) == f"{MOST_LOSSES} workers died of it"


@pytest.mark.slow
def test_hyperband_stops_what_is_behind_and_says_what_it_saved(tmp_path, capsys):
    path = quick(
        tmp_path, {"x": {"values": [0.1, 1, 2, 3]}}, wait=6.0,
        early_terminate={"type": "hyperband", "min_iter": 2, "eta": 2},
    )  # fmt: skip
    trials = Trials(sweepfile.read(path), "", tmp_path)
    sweep.work(trials, tmp_path)
    stopped = trials.all(TrialState.PRUNED)
    assert {trial.params["x"] for trial in stopped} == {2, 3}
    assert all(trial.user_attrs[STEPS] < 8 for trial in stopped)
    assert re.search(
        r"2 of them early, which saved (\d+)% of the steps",
        str(saving(findings.trial_results(trials))),
    )
    # Without stopping, the same points run to their ends.
    sweep.main([str(path), "--whole", "--workers", "2", "--out", str(tmp_path)])
    said = capsys.readouterr().out
    assert "4 trials ended, none stopped early" in said
    assert len(list((tmp_path / "quick-whole" / "trials").glob("0*"))) == 4


@pytest.mark.parametrize(
    ("rule", "rungs"),
    [
        ({"max_iter": 27, "s": 2, "eta": 3}, (3, 9)),
        ({"max_iter": 10, "s": 2}, (1, 3)),
        ({"max_iter": 10, "s": 9}, (1, 3)),
        ({"max_iter": 10}, (3,)),
        ({"min_iter": 2, "eta": 2}, (2, 4, 8)),
    ],
)
def test_rungs_are_those_of_wandb(tmp_path, rule, rungs):
    path = quick(tmp_path, {"x": {"value": 1}}, early_terminate={"type": "hyperband"} | rule)
    assert sweepfile.read(path).hyperband.rungs[:3] == rungs


def test_rungs_compare_what_stands_and_no_whole_trial(tmp_path):
    rule = {"type": "hyperband", "max_iter": 8, "s": 2, "eta": 2}
    path = quick(tmp_path, {"x": {"values": [1, 2, 3]}}, early_terminate=rule)
    found = sweepfile.read(path)
    assert found.hyperband.rungs == (2, 4)
    trials = Trials(found, "", tmp_path)
    claims = [trials.take() for _ in range(3)]
    for claim, values in zip(claims, [(5, 1.0), (5, 2.0), (5, 3.0)], strict=True):
        for place, value in enumerate(values, 1):
            claim.trial.report(value, place)
    assert [trials.behind(claim) for claim in claims] == [False, False, True]
    claims[0].lock.close()  # its worker dies: what it read counts no more
    again = trials.take()
    assert again.values == claims[0].values
    assert [trials.behind(claim) for claim in claims[1:]] == [False, False]


def worker(path, out, *more):
    words = [sys.executable, "-m", "experiments.sweep", str(path), "--out", str(out), *more]
    return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def begun(trials, process):
    """Whether a process has begun a trial within the last second."""
    return any(
        trial.state == TrialState.RUNNING
        and trial.user_attrs.get(OWNER, {}).get("process") == process.pid
        and datetime.now() - trial.datetime_start < timedelta(seconds=1)
        for trial in trials.study.get_trials(deepcopy=False)
    )


def survive(path, out, kills, *more, workers=3):
    """Workers on one sweep, killed so many times and replaced: first one that has just begun a
    trial, then any at random moments."""
    trials = Trials(sweepfile.read(path), "", out)
    draws, alive = random.Random(0), [worker(path, out, *more) for _ in range(workers)]
    for kill in range(kills):
        place, end = draws.randrange(workers), time.monotonic() + 300
        if kill:
            time.sleep(draws.uniform(2.0, 5.0))
        while not kill and not begun(trials, alive[place]):
            assert alive[place].poll() is None
            assert time.monotonic() < end
            time.sleep(0.05)
        alive[place].send_signal(signal.SIGKILL)
        alive[place].wait()
        alive[place] = worker(path, out, *more)
    for process in alive:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors


def lost(trials):
    """How many trials were lost with their workers."""
    found = trials.study.get_trials(deepcopy=False)
    return sum(trial.state == TrialState.FAIL and trial not in trials.all() for trial in found)


def once_each(trials, points):
    complete = Counter(trial.params["x"] for trial in trials.all(TrialState.COMPLETE))
    assert complete == dict.fromkeys(points, 1)
    assert trials.ended


@pytest.mark.slow
def test_trials_of_killed_workers_are_run_again_and_counted_once(tmp_path):
    points = [float(k) for k in range(6)]
    path = quick(tmp_path, {"x": {"values": points}}, wait=1.5)
    survive(path, tmp_path, 3, workers=2)
    trials = Trials(sweepfile.read(path), "", tmp_path)
    once_each(trials, points)
    assert lost(trials) >= 1


@pytest.mark.campaign
def test_24_trials_survive_20_kills(tmp_path, record):
    points = [float(k) for k in range(24)]
    path = quick(tmp_path, {"x": {"values": points}}, wait=3.0)
    survive(path, tmp_path, 20)
    trials = Trials(sweepfile.read(path), "", tmp_path)
    ended = Counter(trial.params["x"] for trial in trials.all(TrialState.COMPLETE))
    passed = sum(ended[point] == 1 for point in points)
    record("kill -9 of a sweep's worker, 20 times", trials=len(points), passed=passed)
    once_each(trials, points)
    assert lost(trials) >= 5  # of the 20, some hit a worker between two trials


def test_a_worker_killed_within_a_claim_loses_nothing(tmp_path):
    """Taken, but without an owner or a value; or failed, but not put back."""
    points = [float(k) for k in range(7)]
    path = quick(tmp_path, {"x": {"values": points}})
    trials = Trials(sweepfile.read(path), "", tmp_path)
    number = trials.study.ask().number
    (tmp_path / "quick" / "trials" / f"{number:04d}").mkdir()
    trials.study.tell(trials.study.ask(), state=TrialState.FAIL)
    assert not trials.ended
    sweep.work(trials, tmp_path)
    once_each(trials, points)


def test_what_two_machines_put_back_at_once_is_run_once(tmp_path):
    path = quick(tmp_path, {"x": {"values": [1.0]}})
    trials = Trials(sweepfile.read(path), "", tmp_path)
    trials.study.tell(trials.study.ask(), state=TrialState.FAIL)
    trials.study.ask()  # when none waits: a trial that nobody put there
    for _ in range(2):
        trials.study.enqueue_trial({"x": 1.0}, user_attrs={SLOT: "again 0", LOSSES: 1})
    sweep.work(trials, tmp_path)
    once_each(trials, [1.0])


def test_a_worker_whose_trial_was_taken_over_says_so_and_goes_on(tmp_path):
    path = quick(tmp_path, {"x": {"values": [1.0]}})
    trials = Trials(sweepfile.read(path), "", tmp_path)
    claim = trials.take()
    trials.study.tell(claim.trial.number, state=TrialState.FAIL)
    assert "taken over by another worker" in sweep.run(trials, claim, tmp_path)
    sweep.work(trials, tmp_path)
    once_each(trials, [1.0])


def test_another_machines_trial_is_left_alone_until_it_is_silent(tmp_path, monkeypatch):
    path = quick(tmp_path, {"x": {"values": [1.0]}})
    trials = Trials(sweepfile.read(path), "", tmp_path)
    claim = trials.take()
    claim.lock.close()  # a lock of another machine may not be seen here
    trials._host = "another"
    monkeypatch.setattr(time, "time", lambda: 1e12)  # whatever the other machine's clock says
    assert trials.take() is None
    real = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: real + 10_000)
    claim.trial.set_user_attr(OWNER, claim.trial.user_attrs[OWNER] | {"seen": 5.0})
    assert trials.take() is None  # a new sign of life
    monkeypatch.setattr(time, "monotonic", lambda: real + 20_000)
    assert trials.take().values == {"x": 1.0}


@pytest.fixture
def postgres():
    """A PostgreSQL server of this machine on a free port."""
    known = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    program = shutil.which("initdb") or (str(known[-1]) if known else None)
    if program is None:
        pytest.skip("PostgreSQL is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    as_user = ["runuser", "-u", "postgres", "--"] if os.getuid() == 0 else []
    # pytest's own folders can't be entered by another user.
    with tempfile.TemporaryDirectory(prefix="vitx-") as data:
        if as_user:
            shutil.chown(data, "postgres")
        quiet = {"check": True, "stdout": subprocess.DEVNULL, "cwd": "/"}
        subprocess.run([*as_user, program, "-D", data, "-A", "trust", "-U", "vitx"], **quiet)
        options = f"-p {port} -k {data} -c listen_addresses=127.0.0.1"
        control = [*as_user, str(Path(program).parent / "pg_ctl"), "-D", data, "-w"]
        subprocess.run([*control, "-o", options, "-l", f"{data}/log", "start"], **quiet)
        yield f"postgresql://vitx@127.0.0.1:{port}/postgres"
        subprocess.run([*control, "-m", "immediate", "stop"], **quiet)


@pytest.mark.slow
def test_two_workers_share_a_real_postgresql(tmp_path, postgres):
    points = [float(k) for k in range(6)]
    path = quick(tmp_path, {"x": {"values": points}}, wait=0.5)
    folders = [tmp_path / "one", tmp_path / "other"]  # as two machines have
    started = [worker(path, folder, "--storage", postgres) for folder in folders]
    for process in started:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    once_each(Trials(sweepfile.read(path), postgres, folders[0]), points)


def small(folder, **more):
    """A sweep of two trainings of a small model."""
    *words, args = GOOD["command"]
    words += ["--model.width=8", "--model.heads=2", "--model.depth=1", "--steps=4", "--batch=16",
              "--eval-every=2", args]  # fmt: skip
    path = folder / "small.yaml"
    parameters = {"optim.lr": {"values": [0.01, 0.001]}, "model.qk_norm": {"value": False}} | more
    said = GOOD | {"name": "small", "command": words, "parameters": parameters}
    path.write_text(yaml.safe_dump(said))
    return path


@pytest.mark.slow
def test_one_file_runs_through_optuna_and_through_wandbs_own_agent(tmp_path):
    path = small(tmp_path)
    clean = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    here = sweepfile.read(path)
    offline = tmp_path / "offline"
    subprocess.run(
        [sys.executable, "-m", "experiments.sweep", str(path), "--out", str(offline)],
        env=clean | {"WANDB_MODE": "disabled"}, check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    ours = {
        tuple(event["command"].split()[2:]): read_json(event_path.with_name("summary.json"))
        for event_path in offline.glob("small/*/environment.json")
        for event in [json.loads(event_path.read_text())]
    }
    online = tmp_path / "online"
    with StandIn() as server:
        environment = clean | server.environment
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{clean['PATH']}"
        done = subprocess.run(
            [sys.executable, "-m", "experiments.sweep", str(path), "--wandb", "--out", str(online)],
            env=environment, cwd=ROOT, capture_output=True, text=True, timeout=240,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        streamed = {name: server.history(name, "val/loss") for name in server.runs}
        swept = {kept.get("sweep") for kept in server.runs.values()}
    theirs = {}
    for environment_path in online.glob("*/*/environment.json"):
        run = read_json(environment_path.with_name("run.json"))
        summary = read_json(environment_path.with_name("summary.json"))
        command = tuple(read_json(environment_path)["command"].split()[2:])
        theirs[command] = summary
        assert streamed[run["id"]][-1] == pytest.approx(summary["val/loss"])
    assert (
        set(theirs) == set(ours) == {tuple(here.words(point)[3:]) for point in here.points()}
    )  # the same command lines
    assert swept == {"sweep001"}
    assert all(theirs[words]["val/loss"] == ours[words]["val/loss"] for words in ours)


def test_the_best_settings_are_confirmed_on_fresh_seeds(tmp_path, capsys, monkeypatch):
    path = small(tmp_path, **{"seed": {"values": [7, 8]}, "ema": {"value": 0.5}})
    trials = Trials(sweepfile.read(path), "", tmp_path)
    for claim in [trials.take() for _ in range(4)]:
        claim.trial.set_user_attr(VERSION, provenance.version())
        trials.complete(claim, claim.values["optim.lr"] * claim.values["seed"])
    first = findings.ranking(trials)[0]
    assert (first.value, first.settings, first.seeds) == (
        pytest.approx(0.0075), {"optim.lr": 0.001}, 2,
    )  # fmt: skip
    (_, unchanged), (best, jobs) = findings.candidates(trials, best=1, seeds=2)
    assert [job.config.seed for job in unchanged] == [10_000, 10_001]
    assert [job.config.seed for job in jobs] == [10_000, 10_001]
    assert best.settings == {"optim.lr": 0.001}
    assert {job.config.optim.lr for job in jobs} == {0.001}
    assert {job.config.optim.lr for job in unchanged} == {4e-3}
    assert {job.config.ema for job in (*jobs, *unchanged)} == {0.5}  # in every trial
    assert unchanged[0].name == "unchanged,seed=10000"
    sweep.main([str(path), "--out", str(tmp_path), "--confirm", "1", "--seeds", "2"])
    said = capsys.readouterr().out
    number = r"-?\+?[\d.]+ \([-+]?[\d.]+ to [-+]?[\d.]+\)"
    verdict = r"[01]\.\d00 \| too few seeds \| 2 of 2"
    assert re.search(
        rf"\| optim\.lr=0\.001 \| val/loss \| 0\.0075 .*\| {number} \| {number} \| {verdict} \|",
        said,
    )
    assert re.search(
        rf"\| unchanged \| val/loss \| – \| {number} \| – \| – \| – \| 2 of 2 \|", said
    )
    (kept,) = read(next((tmp_path / "small").glob("confirmed-*")) / FILE)
    assert [one.state for one in kept.trials] == ["complete"] * 4
    assert kept.saved == Saving(ended=4, stopped=0, share=0.0)
    assert kept.stale == 0
    findings.show(trials)
    assert "stale" not in capsys.readouterr().out
    monkeypatch.setattr(provenance, "version", lambda: "other")
    findings.show(trials)
    assert "stale: 4 trials were run by another version" in capsys.readouterr().out
    lost = replace(kept.confirmed[0], values={"10000": 1.0, "10001": None})
    line = sweep_table([replace(kept, confirmed=(lost, kept.confirmed[1]))]).body[1]
    assert line[-5:-1] == ("–", "–", "–", "2 of 2")  # of one pair nothing is said
    with pytest.raises(ValueError, match="the trials give 4 trials ended"):
        replace(kept, saved=Saving(ended=4, stopped=1, share=0.1)).check()
    with pytest.raises(ValueError, match="the unchanged command must be the first"):
        replace(kept, confirmed=kept.confirmed[1:]).check()


def result(name, confirmed, **fields):
    """The result of a sweep."""
    common = {
        "id": "x-0", "environment": provenance.environment(), "method": "grid", "config": {},
        "metric": "val/loss", "goal": "minimize", "trials": (), "importance": {},
        "saved": Saving(0, 0, 0.0),
    }  # fmt: skip
    return SweepResult(sweep=name, confirmed=tuple(confirmed), **common | fields)


def test_settings_that_are_confirmed_are_judged_together():
    """By the words and the correction of questions."""
    draws = random.Random(0)
    seeds = [str(seed) for seed in range(8)]

    def tried(shift, **settings):
        values = {seed: int(seed) + shift + draws.gauss(0, 0.1) for seed in seeds}
        return Candidate(settings=settings, value=1.0, seeds=1, values=values)

    trials = tuple(TrialResult(state=state, settings={}) for state in ("complete", "running"))
    confirmed = [tried(0), tried(1, a=1), tried(0, a=2), tried(-1, a=3)]
    kept = result("s", confirmed, trials=trials, stale=2, goal="maximize", metric="val/accuracy")
    lines = sweep_table([kept]).records()
    assert [line["verdict"] for line in lines] == ["–", "better", "no difference seen", "worse"]
    assert lines[1]["p"] == f"{3 * 2 / 2**8:.3f}"
    assert {line["trials"] for line in lines} == {"1 of 2 (stale: 2)"}
    assert [line["settings"] for line in lines] == ["unchanged", "a=1", "a=2", "a=3"]


def test_what_stopping_early_cost_is_read_on_the_same_seeds():
    def kept(name, values):
        unchanged = Candidate(settings={})
        best = Candidate(settings={"a": 1}, value=1.0, seeds=1, values=values)
        return result(name, [unchanged, best], saved=Saving(2, 1, 0.4))

    early = kept("s", {"1": 1.5, "2": 2.5, "3": None})
    (line,) = stopping_table([early, kept("s-whole", {"1": 1.0, "2": 1.9, "3": 9.0})]).records()
    assert line["steps saved"] == "40%"
    assert line["Δ in pairs (95 %)"].startswith("+0.5500 (")
    assert line["seeds"] == "2"
    assert stopping_table([early]).body == []


@pytest.mark.slow
def test_workers_share_a_journal_that_was_named(tmp_path, capsys):
    path = quick(tmp_path, {"x": {"min": 0.1, "max": 1.0}}, method="bayes", run_cap=6)
    flags = ["--out", str(tmp_path), "--storage", str(tmp_path / "journal"), "--workers", "2"]
    sweep.main([str(path), *flags])
    said = capsys.readouterr().out
    assert "6 trials ended, none stopped early" in said
    assert "x 100%" in said  # the only parameter explains all
    drawn = {trial.params["x"] for trial in Trials(sweepfile.read(path), flags[3], tmp_path).all()}
    assert len(drawn) == 6


SWEEPS = sorted((ROOT / "experiments" / "sweeps").glob("*.yaml"))


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_a_shipped_sweeps_metric_is_logged_by_its_program(path, monkeypatch, tmp_path):
    """By a run of its command with few steps; the benchmark's has a test of its own."""
    monkeypatch.setenv("CIFAR10", "somewhere")
    found = sweepfile.read(path)
    if not found.recipe:
        assert found.metric == tracking.IMAGES_PER_S
        return
    data = DataConfig(name="fake(images=60, size=8)", val=20, test=20)
    if found.base().model.channels == 1:
        data = DataConfig(name="digits", val=30, test=20, train=64)
    size = {"model.image": 8, "model.patch": 4, "model.width": 8, "model.heads": 2}
    config = override(found.base(), **size, data=data, steps=2, batch=16, eval_every=1)
    with tracking.Run(tmp_path, "g", "n", {}, mode="disabled") as run:
        train(prepare(config), run)
    events = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert sum(found.metric in event for event in events) == 2  # at every reading
    assert found.metric in read_json(run.folder / "summary.json")


@pytest.mark.slow
def test_the_benchmark_is_swept_by_its_own_summary(tmp_path):
    text = next(p for p in SWEEPS if p.stem == "throughput").read_text()
    said = yaml.safe_load(text)
    said["parameters"] = {"batch": {"values": [1, 2]}, "compile": {"value": "none"}}
    place = said["command"].index("--models=vitx:Ti/16")
    said["command"][place:] = [
        "--models=vitx:Pico/32", "--seconds=0.1", "--processes=2", "--wandb=disabled", "${args}",
    ]  # fmt: skip
    path = tmp_path / "throughput.yaml"
    path.write_text(yaml.safe_dump(said))
    trials = Trials(sweepfile.read(path), "", tmp_path)
    sweep.work(trials, tmp_path)
    assert {t.params["batch"]: t.value > 0 for t in trials.all(TrialState.COMPLETE)} == {
        1: True, 2: True,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("low", "high", "q", "drawn"),
    [
        (10, 100, 16, [16, 32, 48, 64, 80, 96]),
        (1, 10, 3, [0, 3, 6, 9]),
        (0.05, 1.0, 0.1, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]),
        (0, 8, 4, [0, 4, 8]),
        (0.25, 0.9, 0.5, [0.5, 1.0]),
    ],
)
def test_steps_of_q_are_wandbs(low, high, q, drawn):
    """W&B draws round(u / q)·q, of u between min and max."""
    keys = {"distribution": "q_uniform", "min": low, "max": high, "q": q}
    parameter = read_parameter("x", keys)
    values = set()
    for number in range(300):
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=number))
        values.add(draw(study.ask(), "x", parameter))
    assert sorted(values) == pytest.approx(drawn)
    theirs = {round(u / q) * q for u in np.random.default_rng(0).uniform(low, high, 3000)}
    assert sorted(values) == pytest.approx(sorted(theirs))


def stops(histories, mine, rungs, eta, *, strict):
    """W&B's rule by itself: of lower values, does the one in place `mine` stop?"""
    rung = max((rung for rung in rungs if rung <= len(histories[mine])), default=None)
    if rung is None:
        return False
    reached = sorted(history[rung - 1] for history in histories if len(history) >= rung)
    own = histories[mine][rung - 1] if strict else min(histories[mine])
    return sum(value < own for value in reached) > len(reached) // eta


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("goal", ["minimize", "maximize"])
def test_trials_stop_as_wandbs_engine_stops_them(tmp_path, goal, strict):
    rule = {"type": "hyperband", "min_iter": 2, "eta": 3, "strict": strict}
    path = quick(
        tmp_path, {"x": {"values": list(range(8))}}, early_terminate=rule,
        metric={"name": "loss", "goal": goal},
    )  # fmt: skip
    sweep_ = sweepfile.read(path)
    trials, draws = Trials(sweep_, "", tmp_path), np.random.default_rng(0)
    claims, sign = [trials.take() for _ in range(8)], 1 if goal == "minimize" else -1
    histories = [draws.normal(size=draws.integers(1, 9)).tolist() for _ in claims]
    for claim, history in zip(claims, histories, strict=True):
        for place, value in enumerate(history, 1):
            claim.trial.report(sign * value, place)
    expected = [stops(histories, k, (2, 6), 3, strict=strict) for k in range(8)]
    assert [trials.behind(claim) for claim in claims] == expected
    assert 0 < sum(expected) < 8
    best = min(range(8), key=lambda k: min(histories[k]))
    assert strict or not expected[best]


@pytest.mark.parametrize(
    "keys",
    [
        {"parameters": {f"x{k}": {"values": list(range(10))} for k in range(10)}},
        {"method": "random", "run_cap": 10**10, "parameters": {"x": {"min": 0, "max": 9}}},
    ],
)
def test_more_trials_than_a_storage_is_to_hold_are_refused_at_once(tmp_path, keys):
    parameters = keys.pop("parameters")
    path = quick(tmp_path, parameters, **keys)
    with pytest.raises(ValueError, match=r"10,000,000,000 trials are more than 100,000"):
        sweepfile.read(path)


def test_a_journal_that_a_full_disk_cut_off_goes_on(tmp_path, capsys):
    found = sweepfile.read(quick(tmp_path, {"x": {"values": [1, 2]}}))
    trials = Trials(found, "", tmp_path)
    trials.complete(trials.take(), 0.5)
    journal = tmp_path / "quick" / "journal"
    whole = journal.read_bytes()
    journal.write_bytes(whole + whole.splitlines()[-1][:20])
    again = Trials(found, "", tmp_path)
    assert "journal: an unfinished last line is cut off" in capsys.readouterr().err
    again.complete(again.take(), 0.25)
    assert sorted(t.value for t in Trials(found, "", tmp_path).all()) == [0.25, 0.5]


@pytest.mark.slow  # Optuna waits for 30 s before it frees a lock
def test_a_lock_that_a_killed_worker_left_is_freed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = sweepfile.read(quick(tmp_path, {"x": {"values": [1, 2]}}))
    Trials(found, "", Path("out"))
    lock = tmp_path / "out" / "quick" / "journal.lock"
    lock.symlink_to(tmp_path / "out" / "quick" / "journal")
    os.utime(lock, (time.time() - 3600,) * 2, follow_symlinks=False)
    assert Trials(found, "", Path("out")).take() is not None


def test_a_locked_database_is_waited_for(tmp_path):
    import sqlite3

    found = sweepfile.read(quick(tmp_path, {"x": {"values": [1, 2]}}))
    trials = Trials(found, f"sqlite:///{tmp_path}/s.db", tmp_path)
    claim = trials.take()
    holder = sqlite3.connect(tmp_path / "s.db", check_same_thread=False, isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    letting_go = threading.Timer(7, lambda: holder.execute("COMMIT"))  # SQLite's own wait is 5 s
    letting_go.start()
    trials.complete(claim, 0.5)
    letting_go.join()
    assert [t.value for t in trials.all(TrialState.COMPLETE)] == [0.5]


def test_a_sweep_whose_trials_all_failed_fails(tmp_path):
    words = ["${env}", "python", "-c", "raise SystemExit(3)", "${args}"]
    path = quick(tmp_path, {"x": {"values": [1, 2]}}, command=words)
    with pytest.raises(ValueError, match="all 2 trials failed; the first: exit 3"):
        sweep.main([str(path), "--out", str(tmp_path)])


def test_a_sweep_over_steps_says_that_the_warm_up_is_longer(tmp_path, capsys):
    sweepfile.read(file(tmp_path, parameters={"steps": {"values": [50, 2000]}}))
    assert "100 is not shorter than steps = 50" in capsys.readouterr().err
    sweepfile.read(file(tmp_path, parameters={"steps": {"values": [500, 2000]}}))
    assert not capsys.readouterr().err
