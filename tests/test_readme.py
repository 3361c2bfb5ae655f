"""README says what the files and the rows say, and its code runs."""

import re

import pytest
import timm
import torch

import vitx
from benchmarks import render
from benchmarks.report import charts
from experiments import render as training_render
from experiments.recipes import RECIPES
from experiments.study import pages, rows
from vitx.model.cost import forward_macs
from vitx.settings import flat, override

README = (render.ROOT / "README.md").read_text(encoding="utf8")


@pytest.mark.parametrize("path", render.READMES, ids=lambda path: path.parent.name)
def test_tables_and_quoted_code_are_rendered_from_rows_and_files(path):
    text = path.read_text(encoding="utf8")
    assert render.fill(text, render.committed()) == text


@pytest.mark.parametrize("path", training_render.READMES, ids=lambda path: path.parent.name)
def test_tables_of_training_are_rendered_from_rows(path):
    text = path.read_text(encoding="utf8")
    assert pages.fill(text, training_render.TABLES, training_render.committed()) == text


def test_committed_rows_are_small_and_hold_no_folder_of_a_machine():
    for path in [*render.RESULTS.glob("*.jsonl"), *training_render.RESULTS.glob("*.jsonl")]:
        text = path.read_text(encoding="utf8")
        assert not re.search(r'["= ]/\w+/\w+', text), path
        assert len(text) < 300_000


@pytest.mark.parametrize(
    ("draw", "found", "path"),
    [
        (render.speed_figure, render.committed, render.FIGURE),
        *(
            (draw, training_render.committed, path)
            for path, draw in training_render.FIGURES.items()
        ),
    ],
)
def test_a_figure_is_rendered_from_the_rows(draw, found, path, tmp_path):
    again = render.save(draw(found()), tmp_path / path.name)
    numbers = [_numbers(file) for file in (again, path)]
    assert numbers[0] == pytest.approx(numbers[1], abs=0.01)


def test_the_figures_of_throughput_are_rendered_from_the_rows(tmp_path):
    drawn = charts.figures(render.committed())
    assert {path.stem for path in render.RESULTS.glob("*.svg")} == {render.FIGURE.stem, *drawn}
    for name, figure in drawn.items():
        again = render.save(figure, tmp_path / f"{name}.svg")
        numbers = [_numbers(file) for file in (again, render.RESULTS / again.name)]
        assert numbers[0] == pytest.approx(numbers[1], abs=0.01), name


def test_a_changed_row_would_be_seen():
    found = render.committed()
    changed = [row | {"ratio": 9.999} if row["kind"] == "speed" else row for row in found]
    assert render.fill(README, changed) != render.fill(README, found)


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
    assert all(table.count("\n") <= 2 + 8 for table in tables)


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


def test_the_variant_of_the_readme_is_a_variant(unchecked):
    from vitx.functional import attention

    (block,) = (b for b in re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
                if b.startswith("def cosine"))  # fmt: skip
    names = dict(vars(attention))
    exec(block, names)
    q, k, v = (torch.randn(2, 2, 5, 8, dtype=torch.float64) for _ in range(3))
    found = names["ATTENTION"]["cosine"](q, k, v, temperature=0.3)
    cosines = torch.cosine_similarity(q[:, :, :, None], k[:, :, None], dim=-1)
    torch.testing.assert_close(found, (cosines / 0.3).softmax(-1) @ v)


def test_a_foreign_row_file_is_refused_by_line(tmp_path):
    file = tmp_path / "rows.jsonl"
    row = '{"schema": 1, "kind": "speed", "id": "x-0", "environment": {}}'
    file.write_text(f"{row}\nnot json\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl line 2 is not JSON"):
        rows.read(file)
    file.write_text('{"schema": 99, "kind": "speed"}\n')
    with pytest.raises(ValueError, match=r"line 1 is not a row of schema 1"):
        rows.read(file)


def _numbers(path):
    text = re.sub(r"(?s)<metadata>.*?</metadata>", "", path.read_text())
    text = re.sub(r'(id|href)="[^"]*"|url\([^)]*\)', "", text)
    return [float(number) for number in re.findall(r"-?\d+\.\d+", text)]


def test_a_line_of_the_figure_is_the_seeds_of_a_recipe_as_it_is():
    def row(seed, seconds, time="2026-01-01T00:00:00", **changes):
        config = flat(override(RECIPES["cifar10"], seed=seed, steps=20, **changes))
        return {
            "what": "run", "kind": "accuracy", "recipe": "cifar10", "seed": seed, "steps": 20,
            "config": config, "curve_of": "val", "curve": [[10, 0.5, 1.0], [20, 0.6 + seed, 1.0]],
            "cpu_seconds": seconds, "id": f"{time}-0",
            "environment": {"cpu": "a", "cores": 2, "time": time},
        }  # fmt: skip

    found = [row(0, 9.0), row(0, 10.0, "2026-01-02T00:00:00"), row(1, 20.0), row(2, 5.0, batch=64)]
    ((name, (seconds, curves)),) = training_render.lines(found).items()
    assert name == "cifar10, 20 steps: validation, 2 seeds"
    assert seconds == 15
    assert curves == [[(0.5, 0.5), (1.0, 0.6)], [(0.5, 0.5), (1.0, 1.6)]]
