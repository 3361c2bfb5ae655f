"""Picture folders as people have them: splits, classes and files, taken or refused by name."""

import os

import pytest
import torch
from picture_files import folders, picture

from vitx import data
from vitx.data import folders as picture_folders
from vitx.data.config import DataConfig


def load(root, **changes):
    config = DataConfig(name="imagefolder", root=str(root), normalise="half", **changes)
    return data.load(config, size=(16, 16))


@pytest.mark.parametrize(
    "names", [("Training", "Testing"), ("Train", "Val", "Test"), ("TRAIN", "dev"), ("train",)]
)
def test_splits_have_the_usual_names(tmp_path, names):
    dataset = load(folders(tmp_path, splits=names))
    assert dataset.classes == ("ant", "bee", "cat")
    assert len(dataset.train) == 18
    assert len(dataset.val) == 18 * any(name in ("Val", "dev") for name in names)
    assert len(dataset.test) == 18 * any(name in ("Test", "Testing") for name in names)


def test_one_folder_around_all_is_looked_through(tmp_path):
    folders(tmp_path / "archive" / "set")
    (tmp_path / "__MACOSX" / "archive").mkdir(parents=True)
    dataset = load(tmp_path)
    assert dataset.classes == ("ant", "bee", "cat")
    assert len(dataset.test) == 18


def test_splits_without_a_folder_per_class_are_refused(tmp_path):
    for name in ("Training", "Testing"):
        (tmp_path / name).mkdir()
        picture().save(tmp_path / name / "0.png")
    with pytest.raises(ValueError, match="Testing, Training, which are named like splits"):
        load(tmp_path)


def test_a_class_may_be_called_train_among_others(tmp_path):
    dataset = load(folders(tmp_path, splits=(".",), classes=("plane", "train"), each=9))
    assert dataset.classes == ("plane", "train")


def test_hidden_folders_and_files_are_no_classes_and_no_pictures(tmp_path, capsys):
    folders(tmp_path, splits=("train", "val"))
    for split in ("train", "val"):
        hidden = tmp_path / split / ".ipynb_checkpoints"
        hidden.mkdir()
        picture().save(hidden / "0.png")
    (tmp_path / "train" / ".cache").mkdir()
    (tmp_path / "train" / "ant" / "._0.png").write_bytes(bytes(64))
    (tmp_path / "train" / "ant" / "notes.pdf").write_bytes(b"%PDF")
    (tmp_path / "train" / "ant" / "README").write_text("pictures of ants")
    dataset = load(tmp_path)
    assert dataset.classes == ("ant", "bee", "cat")
    assert len(dataset.train) == 18
    assert "passed over 3 files: 1 .pdf, 1 hidden, 1 without an ending (" in dataset.notes[0]
    assert dataset.notes[0] in capsys.readouterr().err


def test_the_usual_endings_are_pictures(tmp_path):
    folders(tmp_path, splits=("train",), each=1)
    for ending in ("gif", "jfif", "avif", "webp", "JPG", "jpe"):
        shown = {"jfif": "JPEG", "jpe": "JPEG", "JPG": "JPEG"}.get(ending, ending)
        picture().save(tmp_path / "train" / "ant" / f"x.{ending}", shown)
    dataset = load(tmp_path)
    assert torch.bincount(dataset.train.target).tolist() == [7, 1, 1]
    assert all(dataset.train.read(item).size == (40, 30) for item in dataset.train.items)


@pytest.mark.parametrize("remains", [True, False])
def test_a_validation_split_may_lack_a_class(tmp_path, remains):
    folders(tmp_path, splits=("train", "val"))
    for path in (tmp_path / "val" / "bee").iterdir():
        path.unlink()
    if not remains:
        (tmp_path / "val" / "bee").rmdir()
    dataset = load(tmp_path)
    assert dataset.val.target.unique().tolist() == [0, 2]


def test_a_class_that_is_only_in_validation_is_refused_by_name(tmp_path):
    folders(tmp_path, splits=("train",), classes=("ant", "bee"))
    folders(tmp_path, splits=("val",), classes=("ant", "cat"))
    with pytest.raises(ValueError, match="val has the classes ant, cat, train has ant, bee"):
        load(tmp_path)


def test_a_training_class_without_pictures_is_refused_by_name(tmp_path):
    folders(tmp_path, splits=("train",))
    (tmp_path / "train" / "dog").mkdir()
    with pytest.raises(ValueError, match="dog is a class without pictures"):
        load(tmp_path)


def test_numbered_classes_are_in_the_order_of_their_numbers(tmp_path):
    dataset = load(folders(tmp_path, splits=("train",), classes=("0", "1", "2", "10"), each=2))
    assert dataset.classes == ("0", "1", "2", "10")


def test_a_link_back_is_not_followed(tmp_path):
    folders(tmp_path, splits=("train", "val"))
    (tmp_path / "train" / "ant" / "again").symlink_to(tmp_path / "train" / "ant")
    (tmp_path / "train" / "bee" / "up").symlink_to(tmp_path)
    (tmp_path / "train" / "bee" / "twin.png").symlink_to(
        next((tmp_path / "train" / "bee").glob("*.png"))
    )
    dataset = load(tmp_path)
    assert torch.bincount(dataset.train.target).tolist() == [6, 6, 6]


def test_a_file_in_two_splits_or_classes_is_refused(tmp_path):
    folders(tmp_path, splits=("train", "val"))
    first = next((tmp_path / "train" / "ant").glob("*.png"))
    (tmp_path / "val" / "ant" / "twin.png").symlink_to(first)
    with pytest.raises(ValueError, match=r"train/ant/\d+\.png and .*val/ant/twin\.png are one"):
        load(tmp_path)


def test_names_that_are_no_utf8_are_escaped(tmp_path):
    folders(tmp_path, splits=("train",), classes=("a", "b"))
    old = os.fsencode(tmp_path / "train" / "b")
    os.rename(old, old[:-1] + b"caf\xe9")
    dataset = load(tmp_path)
    assert dataset.classes == ("a", r"caf\xe9")
    assert len(dataset.fingerprint) == 65
    dataset.classes[1].encode()


def test_the_fingerprint_is_of_names_and_pictures_too(tmp_path):
    one = load(folders(tmp_path / "a", splits=("train",), classes=("a", "b")))
    renamed = load(folders(tmp_path / "b", splits=("train",), classes=("a", "c")))
    assert not one.is_of(renamed.fingerprint)
    path = next((tmp_path / "a" / "train" / "a").glob("*.png"))
    body = bytearray(path.read_bytes())
    body[-20] ^= 1
    path.write_bytes(body)
    changed = load(tmp_path / "a")
    assert changed.fingerprint[:32] == one.fingerprint[:32]
    assert not changed.is_of(one.fingerprint)
    assert one.is_of(one.fingerprint[:32])  # as versions before 0.3 wrote it


def test_digits_keep_their_fingerprint():
    dataset = data.load(DataConfig())
    assert dataset.is_of(dataset.fingerprint.partition("-")[0])
    assert not dataset.is_of("0" * 32)
    assert not dataset.is_of("")


def test_predictions_and_training_mean_the_same_files(tmp_path):
    folders(tmp_path, splits=("train",), each=1)
    (tmp_path / "train" / "ant" / "x.h5").write_bytes(b"")
    passed = picture_folders.Passed()
    assert len(list(picture_folders.pictures(tmp_path, passed))) == len(load(tmp_path).train)
    assert str(passed).startswith("1 file: 1 .h5")
