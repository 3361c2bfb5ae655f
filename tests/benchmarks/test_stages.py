"""Stages of the main job on small data: what they add to the run's results and figures."""

from dataclasses import replace

import pytest
import torch
from picture_files import folders

from benchmarks import kinds
from benchmarks.report import tables
from benchmarks.stages import QUICK, SMOKE, Job, grown, train_both
from experiments.study.results import Results
from vitx.settings import override
from vitx.training import tracking


@pytest.mark.slow
def test_the_main_job_compares_accuracy_on_cifar10(tmp_path):
    names = [f"class {k}" for k in range(10)]
    cifar = folders(tmp_path / "cifar", classes=names, size=(32, 32), each=4)
    scale = grown(QUICK, torch.device("cuda"), str(cifar))
    assert scale.recipe.data.root == str(cifar)
    small = {"data.train": 20, "data.val": 10, "model.width": 12, "model.depth": 1}
    recipe = override(scale.recipe, steps=2, batch=4, eval_every=1, **small)
    scale = replace(SMOKE, recipe=recipe)
    with tracking.Run(tmp_path, "benchmarks", "smoke", {}, mode="disabled") as run:
        job = Job(scale, torch.device("cpu"), Results(run.folder), run)
        train_both(job)
        assert {"accuracy", "curves", "confusion", "attention"} == set(job.figures)
    (result,) = job.results.kept
    assert (result.data, result.test_images, result.svm) == ("cifar10", 40, None)
    assert len(result.reference_values) == len(result.candidate_values) == 2
    assert result.trajectory_error < 1e-10
    assert [line[1] for line in tables.accuracy_table([result]).body] == ["vitx", "timm"]
    with pytest.raises(ValueError, match="is for a GPU; accuracy is compared on digits here"):
        grown(QUICK, torch.device("cpu"), str(cifar))


def test_the_main_job_adds_a_result_that_is_of_no_data(tmp_path):
    with tracking.Run(tmp_path, "benchmarks", "mutants", {}, mode="disabled") as run:
        job = Job(SMOKE, torch.device("cpu"), Results(run.folder), run)
        labels = {"reference": "timm", "candidate": "vitx", "device": "cpu"}
        job.add(kinds.Mutants, **labels, caught=30, caught_by_common_check=20, planted=30)
        assert [result.caught for result in job.results.kept] == [30]
