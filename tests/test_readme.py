"""README says what the files and the results say, and its code runs."""

import re
from dataclasses import replace

import pytest
import timm
import torch

import vitx
from benchmarks import render
from benchmarks.kinds import Speed
from experiments import render as training_render
from experiments.recipes import RECIPES
from experiments.study import pages, results
from experiments.study import tables as training_tables
from experiments.study.kinds import Trained
from vitx.measure.stats import Interval
from vitx.model.cost import forward_macs
from vitx.settings import flat, override
from vitx.training.evaluate import Score
from vitx.training.provenance import environment

README = (render.ROOT / "README.md").read_text(encoding="utf8")


@pytest.mark.parametrize("path", render.READMES, ids=lambda path: path.parent.name)
def test_tables_and_quoted_code_are_rendered_from_results_and_files(path):
    text = path.read_text(encoding="utf8")
    assert render.fill(text, render.committed()) == text


def test_the_page_of_all_tables_is_rendered_from_results():
    assert render.page(render.committed()) == render.PAGE.read_text(encoding="utf8")


@pytest.mark.parametrize("path", training_render.READMES, ids=lambda path: path.parent.name)
def test_tables_of_training_are_rendered_from_rows(path):
    text = path.read_text(encoding="utf8")
    assert pages.fill(text, training_render.TABLES, training_render.committed()) == text


def test_committed_results_are_small_and_hold_no_folder_of_a_machine():
    for path in [*render.RESULTS.glob("*.jsonl"), *training_render.RESULTS.glob("*.jsonl")]:
        text = path.read_text(encoding="utf8")
        assert not re.search(r'["= ]/\w+/\w+', text), path
        assert len(text) < 300_000


@pytest.mark.parametrize(
    ("path", "draw"), training_render.FIGURES.items(), ids=lambda value: getattr(value, "stem", "")
)
def test_a_figure_of_training_is_rendered_from_the_results(path, draw, tmp_path):
    again = render.save(draw(training_render.committed()), tmp_path / path.name)
    assert _numbers(again) == pytest.approx(_numbers(path), abs=0.01)


def test_the_charts_are_rendered_from_the_results(tmp_path):
    drawn = render.drawn(render.committed())
    assert {*render.CHARTS.glob("*.svg"), *render.RESULTS.glob("*.svg")} == drawn.keys()
    for path, chart in drawn.items():
        again = render.save(chart, tmp_path / path.name)
        assert _numbers(again) == pytest.approx(_numbers(path), abs=0.01), path.name


def test_a_changed_result_would_be_seen():
    committed = render.committed()
    changed = [
        replace(result, comparison=replace(result.comparison, ratio=Interval(9.999, 9.9, 10.0)))
        if isinstance(result, Speed)
        else result
        for result in committed
    ]
    assert render.fill(README, changed) != render.fill(README, committed)


def test_the_saving_in_the_text_is_the_counted_one():
    with torch.device("meta"):
        model = timm.create_model("vit_tiny_patch16_224")
        vit = vitx.Vit(vitx.size("Ti/16"))
    image = torch.empty(1, 3, 224, 224, device="meta")
    saving = 1 - forward_macs(vit, image) / forward_macs(model, image)
    assert f"saves {saving:.1%} of the MACs at depth 12".replace("%", " %") in " ".join(
        README.split()
    )


def test_the_length_and_tables_keep_their_limits():
    assert len(README.splitlines()) <= 200
    tables = re.findall(r"(?:^\|.*\n)+", README, flags=re.MULTILINE)
    assert len(tables) <= 3
    words = (render.ROOT / "benchmarks" / "README.md").read_text(encoding="utf8").split()
    assert len(words) <= 2500
    assert all(table.count("\n") <= 2 + 8 for table in tables)


def test_the_output_that_readme_shows_is_that_of_its_lines(unchecked, capsys):
    """But for rounding, which differs between machines, and the entropy of random images."""
    code, output = re.search(
        r"```python\n(.*?)```\n\n```\n(.*?)```", README, flags=re.DOTALL
    ).groups()
    exec(code, {})
    vague = re.compile(r"\d\.\de-\d+|\d+%")
    assert vague.sub("…", capsys.readouterr().out) == vague.sub("…", output)


def test_the_python_of_the_readme_runs(unchecked, tmp_path, monkeypatch):
    """All but the timing call and the variant, which has a test of its own."""
    monkeypatch.chdir(render.ROOT)
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL):
        if block.startswith(("import", "from")):
            code = "\n".join(line for line in block.splitlines() if "print(compare" not in line)
            exec(code, names)
    assert names["apply"](names["params"], names["image"]).shape == (2, 10)
    assert set(names["grads"]) == set(names["params"])
    assert names["metrics"]["loss"].item() > 0


def test_a_foreign_file_of_results_is_refused_by_line(tmp_path):
    file = tmp_path / "results.jsonl"
    line = (render.RESULTS / "20261129-161022-gate.jsonl").read_text().splitlines()[0]
    file.write_text(f"{line}\nnot json\n")
    with pytest.raises(ValueError, match=r"results\.jsonl line 2 is not JSON"):
        results.read(file)
    file.write_text('{"schema": 99, "kind": "speed"}\n')
    with pytest.raises(ValueError, match=r"line 1 is not a result of schema 2"):
        results.read(file)


def _numbers(path):
    text = re.sub(r"(?s)<metadata>.*?</metadata>", "", path.read_text())
    text = re.sub(r'(id|href)="[^"]*"|url\([^)]*\)', "", text)
    return [float(number) for number in re.findall(r"-?\d+\.\d+", text)]


def test_a_line_of_the_figure_is_the_seeds_of_a_recipe_as_it_is():
    def trained(seed, seconds, day=1, **changes):
        config = override(RECIPES["cifar10"], seed=seed, steps=20, **changes)
        score = Score(0.5, 0.01, 1.0, 100)
        return Trained(
            id=f"2026-01-0{day}T00:00:00Z-0", environment=replace(environment(), cpu="a", cores=2),
            recipe="cifar10", seed=seed, steps=20, batch=config.batch, parameters=1, macs=1,
            training_flops=1, curve_of="val", curve=((10, 0.5, 1.0), (20, 0.6 + seed, 1.0)),
            config=flat(config), seconds=seconds, cpu_seconds=seconds, test=score,
        )  # fmt: skip

    runs = [trained(0, 9.0), trained(0, 10.0, day=2), trained(1, 20.0), trained(2, 5.0, batch=64)]
    ((name, (seconds, curves)),) = training_tables.curves(runs).items()
    assert name == "cifar10, 20 steps: validation, 2 seeds"
    assert seconds == 15
    assert curves == [[(0.5, 0.5), (1.0, 0.6)], [(0.5, 0.5), (1.0, 1.6)]]
