"""Hugging Face data sets as people have them: columns, labels and rows."""

import io

import numpy as np
import pytest
from picture_files import picture
from PIL import Image

from vitx import data
from vitx.data.config import DataConfig
from vitx.data.images import BadImage

datasets = pytest.importorskip("datasets")


def load(root, name="hf", **changes):
    config = DataConfig(name=name, root=str(root), normalise="half", **changes)
    return data.load(config, size=(16, 16))


def hub(root, *, features=None, column="label", **splits):
    """Write a data set: each split as (names or None, labels[, colours])."""
    parts = {}
    for split, (names, labels, *colours) in splits.items():
        shown = [
            Image.new("RGB", (12, 12), COLOURS[(colours[0] if colours else labels)[k] or 0])
            for k in range(len(labels))
        ]
        kinds = datasets.Features({
            "image": datasets.Image(),
            column: datasets.ClassLabel(names=names) if names else features,
        })  # fmt: skip
        parts[split] = datasets.Dataset.from_dict({"image": shown, column: labels}, features=kinds)
    datasets.DatasetDict(parts).save_to_disk(str(root))
    return root


COLOURS = {0: "red", 1: "green", 2: "blue", 3: "white", -1: "black", "a": "red", "b": "blue",
           5: "grey", 7: "pink", 10: "brown", 2.5: "gold", "": "black"}  # fmt: skip


@pytest.mark.parametrize("names", [["bee", "cat"], ["cat", "bee", "ant"]])
def test_labels_are_matched_by_name_between_splits(tmp_path, names):
    labels = [names.index(word) for word in ("bee", "cat")]
    hub(tmp_path, train=(["ant", "bee", "cat"], [0, 1, 2] * 2), test=(names, labels))
    assert load(tmp_path).test.target.tolist() == [1, 2]


def test_labels_of_other_names_are_refused(tmp_path):
    hub(tmp_path, train=(["ant", "bee"], [0, 1] * 2), test=(["ant", "cow"], [0, 1]))
    with pytest.raises(ValueError, match="test has the classes ant, cow, train has ant, bee"):
        load(tmp_path)


@pytest.mark.parametrize("hidden", [-1, None])
def test_a_split_with_hidden_labels_is_left_out(tmp_path, hidden, capsys):
    hub(tmp_path, train=(["a", "b"], [0, 1] * 3), test=(["a", "b"], [hidden] * 4))
    dataset = load(tmp_path)
    assert len(dataset.test) == 0
    assert "test: its 4 labels are hidden; it is left out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "labels", "names", "target"),
    [
        ("string", ["b", "a", "b"], ("a", "b"), [1, 0, 1]),
        ("int64", [7, 2, 10], ("2", "7", "10"), [1, 0, 2]),
        ("uint8", [1, 0, 1], ("0", "1"), [1, 0, 1]),
        ("bool", [True, False, True], ("False", "True"), [1, 0, 1]),
    ],
)
@pytest.mark.parametrize("column", ["label", "kind"])
def test_labels_may_be_words_or_numbers(tmp_path, kind, labels, names, target, column):
    hub(tmp_path, train=(None, labels), features=datasets.Value(kind), column=column)
    dataset = load(tmp_path, "hf(label='kind')" if column == "kind" else "hf")
    assert (dataset.classes, dataset.train.target.tolist()) == (names, target)


def test_labels_of_another_kind_are_refused_with_the_remedy(tmp_path):
    hub(tmp_path, train=(None, [2.5, 1.0]), features=datasets.Value("float32"))
    with pytest.raises(ValueError, match=r"holds float32 values; .*class_encode_column"):
        load(tmp_path)


def test_pictures_may_be_bytes(tmp_path):
    out = io.BytesIO()
    picture().save(out, "PNG")
    columns = {"image": [out.getvalue()] * 4, "label": [0, 1] * 2}
    part = datasets.Dataset.from_dict(columns)
    datasets.DatasetDict(train=part).save_to_disk(str(tmp_path))
    dataset = load(tmp_path)
    assert dataset.train.read(0).size == (40, 30)


def test_a_column_of_pictures_keeps_its_mode(tmp_path):
    hub(tmp_path / "a", train=(["a", "b"], [0, 1]))
    part = datasets.load_from_disk(str(tmp_path / "a"))
    part = part.cast_column("image", datasets.Image(mode="L"))
    part.save_to_disk(str(tmp_path / "b"))
    pixel = np.asarray(load(tmp_path / "b").train.read(0))[0, 0]
    assert len(set(pixel.tolist())) == 1  # red, in grey


def test_a_row_without_a_picture_is_named_and_can_be_skipped(tmp_path):
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}
    )
    shown = [picture(), None, picture(), picture()]
    part = datasets.Dataset.from_dict({"image": shown, "label": [0, 1, 0, 1]}, features=features)
    datasets.DatasetDict(train=part).save_to_disk(str(tmp_path))
    dataset = load(tmp_path, "hf", on_bad_image="skip")
    with pytest.raises(BadImage, match="train, row 1 has no picture"):
        dataset.train.read(1)
    stream = data.batches(dataset, batch=4, seed=0)
    for _ in range(3):
        image, _ = next(stream)
        assert image.shape == (4, 3, 16, 16)
    assert dataset.skipped == [f"{tmp_path} train, row 1 has no picture"]


def test_what_datasets_cant_read_is_one_sentence(tmp_path):
    (tmp_path / "beans").mkdir()
    (tmp_path / "beans" / "beans.py").write_text("import datasets\n")
    with pytest.raises(ValueError, match="beans' can't be read by datasets: Dataset scripts"):
        load(tmp_path / "beans")
    (tmp_path / "lines").mkdir()
    (tmp_path / "lines" / "a.csv").write_text('a,b\n1,2\n"3,4,5\n6,7,8,9\n')
    with pytest.raises(ValueError, match="lines' can't be read by datasets: "):
        load(tmp_path / "lines")


def test_a_split_without_the_label_column_is_named(tmp_path):
    hub(tmp_path / "a", train=(["a", "b"], [0, 1]), test=(["a", "b"], [0, 1]))
    parts = datasets.load_from_disk(str(tmp_path / "a"))
    parts["test"] = parts["test"].remove_columns("label")
    parts.save_to_disk(str(tmp_path / "b"))
    with pytest.raises(ValueError, match="test has no column 'label'"):
        load(tmp_path / "b")


def test_pictures_exchanged_between_rows_are_other_data(tmp_path):
    one = load(hub(tmp_path / "a", train=(["a", "b"], [0, 1] * 4)))
    other = load(hub(tmp_path / "b", train=(["a", "b"], [0, 1] * 4, [1, 0] * 4)))
    assert not one.is_of(other.fingerprint)
