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
import time
from collections import Counter
from pathlib import Path

import pytest
import yaml
from optuna.trial import TrialState
from standin import StandIn

from experiments import sweep, sweepfile
from experiments.pages import ROOT
from experiments.study import ERROR, STEPS, Trials
from vitx import tracking

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
        ({"metric": {"goal": "minimize"}}, "metric must have a name"),
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
         "command: recipe 'digit' is not known; did you mean 'digits'"),
    ],
)  # fmt: skip
def test_a_wrong_sweep_file_is_one_sentence_that_names_file_and_key(tmp_path, changes, message):
    with pytest.raises(ValueError, match=rf"some\.yaml.*{message}"):
        sweepfile.read(file(tmp_path, changes))


@pytest.mark.parametrize(
    ("changes", "more", "message"),
    [
        ({"parameters": {"optim.lr": {"values": ["1e-4"]}}}, [], "is a string to YAML"),
        ({}, ["--storage", "postgresql://127.0.0.1:9/none"], "can't be reached"),
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


def test_every_point_of_a_grid_is_run_once_and_shown(tmp_path, capsys):
    asked = sweepfile.read(quick(tmp_path, {"x": {"values": [0.5, 2.0, 1.0]}}))
    trials = Trials(asked, "", tmp_path)
    sweep.work(trials, tmp_path)
    sweep.work(trials, tmp_path)
    assert Counter(Path(tmp_path, "finished").read_text().split()) == {"0.5": 1, "2.0": 1, "1.0": 1}
    assert [values["x"] for _, values in sweep.ranking(trials)] == [0.5, 1.0, 2.0]
    sweep.show(trials)
    text = capsys.readouterr().out
    assert "  0.25: x=0.5" in text
    assert "3 trials ended, none stopped early" in text


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
    states = {t.params["bad"]: (t.state, t.user_attrs.get(ERROR)) for t in trials.all()}
    assert states[True] == (TrialState.FAIL, "exit 1: the trial went wrong")
    assert states[False] == (TrialState.COMPLETE, None)


def test_hyperband_stops_what_is_behind_and_says_what_it_saved(tmp_path):
    path = quick(
        tmp_path, {"x": {"values": [0.1, 3, 2, 1]}}, wait=4.0,
        early_terminate={"type": "hyperband", "min_iter": 2, "eta": 2},
    )  # fmt: skip
    trials = Trials(sweepfile.read(path), "", tmp_path)
    sweep.work(trials, tmp_path)
    stopped = trials.all(TrialState.PRUNED)
    assert {trial.params["x"] for trial in stopped} == {1, 2, 3}
    assert all(trial.user_attrs[STEPS] < 8 for trial in stopped)
    assert re.search(r"3 of them early, which saved (\d\d)% of the steps", sweep.saved(trials))


def worker(path, out, *more):
    words = [sys.executable, "-m", "experiments.sweep", str(path), "--out", str(out), *more]
    return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def survive(path, out, kills, *more, workers=3):
    """Workers on one sweep, killed so many times at random moments and replaced."""
    draws, alive = random.Random(0), [worker(path, out, *more) for _ in range(workers)]
    for _ in range(kills):
        time.sleep(draws.uniform(2.0, 5.0))
        place = draws.randrange(workers)
        alive[place].send_signal(signal.SIGKILL)
        alive[place].wait()
        alive[place] = worker(path, out, *more)
    for process in alive:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors


def once_each(trials, points):
    complete = Counter(trial.params["x"] for trial in trials.all(TrialState.COMPLETE))
    assert complete == dict.fromkeys(points, 1)
    assert trials.ended


def test_trials_of_killed_workers_are_run_again_and_counted_once(tmp_path):
    points = [float(k) for k in range(6)]
    path = quick(tmp_path, {"x": {"values": points}}, wait=1.5)
    survive(path, tmp_path, 3, workers=2)
    once_each(Trials(sweepfile.read(path), "", tmp_path), points)


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


def test_a_worker_killed_between_any_two_moments_of_a_claim_loses_nothing(tmp_path):
    """Taken, but without a lock or an owner; then failed, but not put back."""
    path = quick(tmp_path, {"x": {"values": [1.0, 2.0]}})
    trials = Trials(sweepfile.read(path), "", tmp_path)
    number = trials.study.ask().number
    (tmp_path / "quick" / "trials" / f"{number:04d}").mkdir()
    trials.study.tell(trials.study.ask(), state=TrialState.FAIL)
    assert not trials.ended
    sweep.work(trials, tmp_path)
    once_each(trials, [1.0, 2.0])


def test_another_machines_trial_is_left_alone_until_it_is_silent(tmp_path, monkeypatch):
    path = quick(tmp_path, {"x": {"values": [1.0]}})
    trials = Trials(sweepfile.read(path), "", tmp_path)
    claim = trials.take()
    claim.lock.close()  # a lock of another machine may not be seen here
    trials._host = "another"
    assert trials.take() is None
    real = time.time()
    monkeypatch.setattr(time, "time", lambda: real + 10_000)
    assert trials.take().values == {"x": 1.0}


@pytest.fixture
def postgres(tmp_path):
    """A PostgreSQL server of this machine on a free port."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    program = shutil.which("initdb") or (str(found[-1]) if found else None)
    if program is None:
        pytest.skip("PostgreSQL is not installed")
    bin_folder, data = Path(program).parent, tmp_path / "postgres"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    as_user = ["runuser", "-u", "postgres", "--"] if os.getuid() == 0 else []
    if as_user:
        data.mkdir()
        shutil.chown(data, "postgres")
        for parent in list(data.parents)[:3]:
            parent.chmod(0o755)
    quiet = {"check": True, "stdout": subprocess.DEVNULL, "cwd": "/"}
    subprocess.run([*as_user, program, "-D", str(data), "-A", "trust", "-U", "vitx"], **quiet)
    options = f"-p {port} -k {data} -c listen_addresses=127.0.0.1"
    control = [*as_user, str(bin_folder / "pg_ctl"), "-D", str(data), "-w"]
    subprocess.run([*control, "-o", options, "-l", str(data / "log"), "start"], **quiet)
    yield f"postgresql+psycopg2://vitx@127.0.0.1:{port}/postgres"
    subprocess.run([*control, "-m", "immediate", "stop"], **quiet)


def test_two_workers_share_a_real_postgresql(tmp_path, postgres):
    points = [float(k) for k in range(6)]
    path = quick(tmp_path, {"x": {"values": points}}, wait=0.5)
    folders = [tmp_path / "one", tmp_path / "other"]  # as two machines have
    started = [worker(path, folder, "--storage", postgres) for folder in folders]
    for process in started:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    once_each(Trials(sweepfile.read(path), postgres, folders[0]), points)


def small(folder):
    """A sweep of two trainings of a small model."""
    *words, args = GOOD["command"]
    words += ["--model.width=8", "--model.heads=2", "--model.depth=1", "--steps=4", "--batch=16",
              "--eval-every=2", args]  # fmt: skip
    path = folder / "small.yaml"
    parameters = {"optim.lr": {"values": [0.01, 0.001]}, "model.qk_norm": {"value": False}}
    said = GOOD | {"name": "small", "command": words, "parameters": parameters}
    path.write_text(yaml.safe_dump(said))
    return path


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
        tuple(event["command"].split()[2:]): tracking.read_json(
            event_path.with_name("summary.json")
        )
        for event_path in offline.glob("small/*/environment.json")
        for event in [json.loads(event_path.read_text())]
    }
    online = tmp_path / "online"
    with StandIn() as server:
        environment = clean | server.environment | {"VITX_OUT": str(online)}
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{clean['PATH']}"
        done = subprocess.run(
            [sys.executable, "-m", "experiments.sweep", str(path), "--wandb"],
            env=environment, cwd=ROOT, capture_output=True, text=True, timeout=240,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        streamed = {name: server.history(name, "val/loss") for name in server.runs}
        swept = {kept.get("sweep") for kept in server.runs.values()}
    theirs = {}
    for environment_path in online.glob("*/*/environment.json"):
        run = tracking.read_json(environment_path.with_name("run.json"))
        summary = tracking.read_json(environment_path.with_name("summary.json"))
        command = tuple(tracking.read_json(environment_path)["command"].split()[2:])
        theirs[command] = summary
        assert streamed[run["id"]][-1] == pytest.approx(summary["val/loss"])
    assert (
        set(theirs) == set(ours) == {tuple(here.words(point)[3:]) for point in here.points()}
    )  # the same command lines
    assert swept == {"sweep001"}
    assert all(theirs[words]["val/loss"] == ours[words]["val/loss"] for words in ours)


SWEEPS = sorted((ROOT / "experiments" / "sweeps").glob("*.yaml"))


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_a_shipped_sweeps_metric_is_logged_by_its_program(path, monkeypatch):
    monkeypatch.setenv("CIFAR10", "somewhere")
    found = sweepfile.read(path)
    logged = {getattr(tracking, name) for name in dir(tracking) if name.isupper()
              if isinstance(getattr(tracking, name), str)}  # fmt: skip
    assert found.metric in logged
    assert found.recipe or found.metric == tracking.IMAGES_PER_S
