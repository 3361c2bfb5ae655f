#!/usr/bin/env bash
# Workers that share a study through a storage each make their own GridSampler. With the same seed
# they cover the grid. With different seeds, which one would give to workers that draw at random,
# the samplers number the points of the grid differently: after as many trials as there are points,
# some points were run twice and others never.
# Seen with optuna==5.0.0 on Python 3.11, Linux, CPU.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check optuna==5.0.0
cd "$work"
"$work/venv/bin/python" >output <<'PYTHON'
import optuna

optuna.logging.set_verbosity(optuna.logging.ERROR)
SPACE = {"a": [1, 2, 3], "b": [1, 2, 3, 4]}


def points(name, seeds):
    url = f"sqlite:///{name}.db"
    optuna.create_study(study_name=name, storage=url)
    for seed in seeds:
        sampler = optuna.samplers.GridSampler(SPACE, seed=seed)
        worker = optuna.load_study(study_name=name, storage=url, sampler=sampler)
        worker.optimize(lambda t: t.suggest_int("a", 1, 3) * t.suggest_int("b", 1, 4), n_trials=6)
    trials = optuna.load_study(study_name=name, storage=url).trials
    return len(trials), len({(trial.params["a"], trial.params["b"]) for trial in trials})


for name, seeds in (("same", (0, 0)), ("different", (0, 1))):
    trials, different = points(name, seeds)
    print(f"{name} seeds: {trials} trials at {different} of 12 points")
PYTHON
cat output
diff - output <<'SEEN'
same seeds: 12 trials at 12 of 12 points
different seeds: 12 trials at 10 of 12 points
SEEN
