"""Drawings: the model's diagram names each part with the shape that it gives."""

import numpy as np
import pytest
import torch
from matplotlib.text import Text

from vitx import pictures, size
from vitx.model.functional.pool import mean


def words(figure):
    """Each text of a figure, from top to bottom."""
    (axes,) = figure.axes
    texts = sorted(axes.texts, key=lambda text: -text.get_position()[1])
    return [text.get_text().split("\n") for text in texts if text.get_text()]


def test_the_diagram_of_a_model_has_each_part_and_its_shape(tmp_path):
    figure = pictures.architecture(size("S/16", registers=4))
    drawn = words(figure)
    for part in ("Image", "Patches", "Patch embedding", "Block × 12", "Pool: cls", "Head"):
        assert [part] in drawn
    assert ["+ class token, registers, positions"] in drawn
    assert ["c × h × w", "3 × 224 × 224"] in drawn
    assert ["(y·x) × (c·p·q)", "196 × 768"] in drawn
    assert ["n × d", "201 × 384"] in drawn
    assert ["Attention", "6 heads, e = 64"] in drawn
    assert ["MLP", "d → f → d, f = 1536"] in drawn
    assert drawn.count(["+"]) == 2
    path = pictures.save(figure, tmp_path / "model.svg")
    assert "Patch embedding" in path.read_text(encoding="utf8")


@pytest.mark.parametrize(
    ("fields", "present", "absent"),
    [
        ({"patchify": "stem"}, "Convolutional stem", "Patches"),
        ({"layer_scale": 0.1}, "Layer scale", "registers"),
        ({"classes": 0}, "Pool: cls", "Head"),
        ({"pool": mean}, "Pool: mean", "Pool: cls"),
        ({"class_token": False, "pool": "mean", "position": "none"}, "Pool: mean", "+ positions"),
    ],
)
def test_the_diagram_follows_the_configuration(fields, present, absent):
    drawn = [
        line for text in words(pictures.architecture(size("Ti/16", **fields))) for line in text
    ]
    assert present in drawn
    assert absent not in drawn


def test_a_block_that_normalises_after_is_drawn_so():
    def order(placement):
        drawn = words(pictures.architecture(size("Ti/16", placement=placement, final_norm=False)))
        return [text[0] for text in drawn if text[0] in ("Norm", "Attention", "MLP", "+")]

    assert order("pre") == ["Norm", "Attention", "+", "Norm", "MLP", "+"]
    assert order("post") == ["Attention", "+", "Norm", "MLP", "+", "Norm"]


@pytest.mark.parametrize("name", [r"a$\frac$b", "$5-$10", "{x}_y", "犬", "%s \\alpha"])
def test_names_are_drawn_as_they_are(tmp_path, name, recwarn):
    shown = [torch.rand(3, 8, 8)]
    figures = [
        pictures.confusion(np.eye(2, dtype=int), [name, "b"], title=name),
        pictures.pictures({name: shown}, titles={name: [name]}),
        pictures.attention_grid(torch.stack(shown), {name: torch.rand(1, 8, 8)}, [name], ["b"]),
    ]
    for figure in figures:
        pictures.save(figure, tmp_path / "x.png")
        texts = [text for text in figure.findobj(Text) if text.get_text().startswith(name)]
        assert texts
        assert not any(text.get_parse_math() for text in texts)
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]
