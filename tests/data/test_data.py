"""Data sources on small data in their true formats: splits, order, draws, workers, bad pictures."""

import io

import numpy as np
import pytest
import torch
from picture_files import folders, picture
from PIL import Image

import vitx
from vitx import data
from vitx.data import dataset as dataset_file
from vitx.data import images, loader, sources, transforms
from vitx.data.augment import CROP_DRAWS, resized_crop
from vitx.data.config import DataConfig
from vitx.model.config import ModelConfig
from vitx.settings import override

FILES = DataConfig(name="imagefolder", val=6, crop=0.5, flip=0.5, normalise="half")


@pytest.fixture
def root(tmp_path):
    return folders(tmp_path / "data")


def load(root, **changes):
    return data.load(override(FILES, root=str(root), **changes), size=(16, 16))


def stream(dataset, count, batch=4, **how):
    found = data.batches(dataset, batch=batch, seed=3, **how)
    return [next(found) for _ in range(count)]


def test_picture_folders_are_split_by_class_folders(root):
    dataset = load(root)
    assert [len(split) for split in (dataset.train, dataset.val, dataset.test)] == [12, 6, 18]
    assert dataset.classes == ("ant", "bee", "cat")
    assert torch.bincount(dataset.val.target).tolist() == [2, 2, 2]
    assert not set(dataset.train.items) & set(dataset.val.items)
    image, target = next(data.evaluation_batches(dataset, dataset.test, batch=5))
    assert image.shape == (5, 3, 16, 16)
    assert target.tolist() == [0] * 5
    assert -1 <= image.min() < image.max() <= 1


def test_a_split_may_have_another_name(tmp_path):
    parts = sources.imagefolder(
        root=str(folders(tmp_path, splits=("validation",))), max_pixels=10**6
    )
    assert (set(parts.splits), parts.classes) == ({"val"}, ("ant", "bee", "cat"))


def test_a_class_may_be_called_valid(tmp_path):
    dataset = load(folders(tmp_path, splits=(".",), classes=("invalid", "valid"), each=9))
    assert dataset.classes == ("invalid", "valid")


@pytest.mark.parametrize("randaugment", ["", "rand-m9-mstd0.5"])
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_of_files_depend_on_seed_and_step_alone(root, workers, randaugment):
    wanted = stream(load(root, randaugment=randaugment, erase=0.3), 8)
    again = load(root, randaugment=randaugment, erase=0.3, workers=workers)
    found = stream(again, 5, start=3)
    plain = stream(load(root, erase=0.3), 1)
    assert torch.equal(wanted[0][0], plain[0][0]) == (not randaugment)
    for (a, x), (b, y) in zip(wanted[3:], found, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(x, y)
    assert not torch.equal(wanted[0][0], wanted[3][0])


def test_reading_files_does_not_touch_the_global_generators(root, monkeypatch):
    # torch.manual_seed seeds a GPU too, from which a model draws its dropout.
    for name in ("manual_seed", "manual_seed_all"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: pytest.fail("a GPU was seeded"))
    before = torch.get_rng_state()
    stream(load(root), 2)
    assert torch.equal(torch.get_rng_state(), before)


def test_parts_of_a_batch_are_the_batch(root):
    whole = stream(load(root), 2)
    shares = [stream(load(root), 2, part=(rank, 2)) for rank in range(2)]
    for step, (image, target) in enumerate(whole):
        assert torch.equal(torch.cat([share[step][0] for share in shares]), image)
        assert torch.equal(torch.cat([share[step][1] for share in shares]), target)


def test_a_bad_picture_is_named_or_skipped_and_listed(root):
    broken = sorted(root.glob("train/*/*.png"))
    for path in broken[:3]:
        path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(images.BadImage, match=r"\.png can't be decoded"):
        stream(load(root, val=0), 4)
    dataset = load(root, val=0, on_bad_image="skip")
    found = stream(dataset, 9)
    assert all(len(image) == len(target) == 4 for image, target in found)
    assert all((target >= 0).all() for _, target in found)
    assert min(image.flatten(1).std(dim=1).min() for image, _ in found) > 0.1  # none is black
    assert len(dataset.skipped) == 3
    assert all("can't be decoded" in said for said in dataset.skipped)


def test_pictures_that_are_all_bad_are_no_split(cifar):
    for path in cifar.glob("train/*/*.png"):
        path.write_bytes(b"")
    with pytest.raises(images.BadImage, match=r"\.png can't be decoded"):
        data.load(DataConfig(name="cifar10", root=str(cifar), on_bad_image="skip"))


def test_two_folders_of_one_split_are_refused(root):
    folders(root, splits=("val", "validation"), each=1)
    with pytest.raises(ValueError, match="holds both val and validation, which mean one split"):
        load(root)


def test_a_picture_too_large_is_refused_before_it_is_decoded(root, monkeypatch):
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("it was decoded"))
    with pytest.raises(images.BadImage, match=r"40×30 pixels, more than 1,000 \(data"):
        stream(load(root, max_pixels=1000), 1)


def test_a_decompression_bomb_is_a_bad_picture(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    buffer = io.BytesIO()
    picture().save(buffer, "PNG")
    with pytest.raises(images.BadImage, match="the-name can't be decoded"):
        images.open_picture(buffer.getvalue(), name="the-name")


def test_squash_keeps_all_and_crop_keeps_the_centre(root):
    path = sorted(root.glob("test/ant/*.png"))[0]
    wide = Image.new("RGB", (40, 30))
    wide.paste((255, 255, 255), (0, 0, 4, 30))  # the left edge
    wide.save(path)
    for how, seen in (("squash", True), ("crop", False)):
        dataset = load(root, resize=how)
        image, _ = next(data.evaluation_batches(dataset, dataset.test, batch=1))
        assert (image[..., 0].max() > 0.9) == seen


@pytest.fixture
def cifar(tmp_path):
    return folders(
        tmp_path / "cifar", classes=[f"class {k}" for k in range(10)], size=(32, 32), each=4
    )


def test_cifar10_from_picture_folders_is_held_in_memory(cifar):
    config = DataConfig(name="cifar10", root=str(cifar), val=10)
    dataset = data.load(config)
    assert dataset.origin == "picture folders train/, test/"
    assert dataset.train.image.shape == (30, 3, 32, 32)
    assert len(dataset.test) == 40
    first = sorted(cifar.glob("test/class 0/*.png"))[0]
    assert torch.equal(
        dataset.test.image[0].permute(1, 2, 0), torch.tensor(np.array(Image.open(first)))
    )


@pytest.mark.parametrize("portion", [7, 100], ids=["several processes", "one"])
def test_pictures_are_read_in_order_by_any_number_of_processes(cifar, monkeypatch, portion):
    config = DataConfig(name="cifar10", root=str(cifar), val=10, on_bad_image="skip")
    whole = data.load(config)
    monkeypatch.setattr(images, "PORTION", portion)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    again = data.load(config)
    assert torch.equal(again.test.image, whole.test.image)
    assert torch.equal(again.test.target, whole.test.target)
    bad = sorted(cifar.glob("test/class 3/*.png"))[1]
    bad.write_bytes(b"no picture")
    skipped = data.load(config)
    assert torch.equal(skipped.test.target, whole.test.target[torch.arange(40) != 13])
    assert torch.equal(skipped.test.image, whole.test.image[torch.arange(40) != 13])
    assert len(skipped.skipped) == 1
    with pytest.raises(images.BadImage, match=rf"{bad.name} can't be decoded"):
        data.load(DataConfig(name="cifar10", root=str(cifar), val=10))
    Image.new("RGB", (30, 32)).save(bad)
    with pytest.raises(ValueError, match=r"one size were expected, not of \[\(32, 30, 3\)"):
        data.load(config)


def test_a_part_of_the_data_sets_own_test_split(cifar):
    whole = data.load(DataConfig(name="cifar10", root=str(cifar), val=10))
    part = data.load(DataConfig(name="cifar10", root=str(cifar), val=10, test=20))
    assert len(part.test) == 20
    assert torch.equal(part.train.image, whole.train.image)
    assert set(map(bytes, part.test.image.numpy())) < set(map(bytes, whole.test.image.numpy()))
    with pytest.raises(ValueError, match=r"data\.test = 41, but there are only 40 images"):
        data.load(DataConfig(name="cifar10", root=str(cifar), val=10, test=41))


def test_cifar10_from_torchvisions_batches(tmp_path, monkeypatch):
    import hashlib
    import pickle

    from torchvision.datasets import CIFAR10

    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    rows = np.random.default_rng(0).integers(0, 255, (20, 3072), dtype=np.uint8)

    def write(name, value):
        (folder / name).write_bytes(pickle.dumps(value))
        return name, hashlib.md5((folder / name).read_bytes()).hexdigest()

    labels = [k % 10 for k in range(20)]
    train = write("data_batch_1", {"data": rows, "labels": labels})
    test = write("test_batch", {"data": rows[:10], "labels": labels[:10]})
    meta = write("batches.meta", {"label_names": [f"c{k}" for k in range(10)]})
    monkeypatch.setattr(CIFAR10, "train_list", [list(train)])
    monkeypatch.setattr(CIFAR10, "test_list", [list(test)])
    monkeypatch.setattr(
        CIFAR10, "meta", {"filename": meta[0], "key": "label_names", "md5": meta[1]}
    )
    dataset = data.load(DataConfig(name="cifar10", root=str(tmp_path), val=10))
    assert dataset.origin == "torchvision's CIFAR10 batches"
    assert torch.equal(dataset.test.image[3].flatten(), torch.tensor(rows[3]))
    assert dataset.test.target.tolist() == list(range(10))
    assert dataset.classes[2] == "c2"


def test_places365_in_torchvisions_folders(tmp_path, monkeypatch):
    import hashlib

    from torchvision.datasets import Places365

    names = {
        "categories_places365.txt": "".join(f"/{c}/scene{c} {k}\n" for k, c in enumerate("abc")),
        "places365_val.txt": "".join(f"p{k}.jpg {k % 3}\n" for k in range(40)),
    }
    for name, text in names.items():
        (tmp_path / name).write_text(text)
    sums = {name: hashlib.md5(text.encode()).hexdigest() for name, text in names.items()}
    (tmp_path / "val_256").mkdir()
    for k in range(40):
        picture((64, 64), k).save(tmp_path / "val_256" / f"p{k}.jpg")
    monkeypatch.setattr(
        Places365,
        "_CATEGORIES_META",
        ("categories_places365.txt", sums["categories_places365.txt"]),
    )
    monkeypatch.setattr(
        Places365, "_FILE_LIST_META", {"val": ("places365_val.txt", sums["places365_val.txt"])}
    )
    config = DataConfig(
        name="places365", root=str(tmp_path), train=4, val=2, test=34, stratified=False,
        normalise="imagenet", resize="squash",
    )  # fmt: skip
    dataset = data.load(config, size=(32, 32))
    assert [len(split) for split in (dataset.train, dataset.val, dataset.test)] == [4, 2, 34]
    assert len({*dataset.train.items, *dataset.val.items, *dataset.test.items}) == 40
    image, _ = next(data.evaluation_batches(dataset, dataset.val))
    assert image.shape == (2, 3, 32, 32)


def test_the_notebooks_split_of_36500():
    labels = sources.Split(
        torch.zeros(36_500, 1, 1, 1, dtype=torch.uint8), torch.arange(36_500) % 365
    )
    config = DataConfig(name="places365", stratified=False)
    rest, test = dataset_file._hold_out(labels, "test", 31_025, config)
    train, val = dataset_file._hold_out(labels.take(rest), "val", 1_825, config)
    assert (len(train), len(val), len(test)) == (3_650, 1_825, 31_025)


def test_made_up_images_can_be_told_apart():
    dataset = data.load(DataConfig(name="fake(images=200, size=8, classes=4)", val=40, test=40))
    assert dataset.train.image.shape == (120, 3, 8, 8)
    means = torch.stack(
        [dataset.train.image[dataset.train.target == k].float().mean(0) for k in range(4)]
    )
    distance = torch.cdist(dataset.test.image.float().flatten(1), means.flatten(1))
    assert (distance.argmin(1) == dataset.test.target).float().mean() > 0.95


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"root": ""}, "data.root is empty"),
        ({"root": "/nowhere/at/all"}, "data.root = '/nowhere/at/all' is not a folder"),
        ({"name": "cifr10"}, "did you mean 'cifar10'"),
        ({"name": "imagefolder(x=1)"}, "imagefolder has no knob 'x'; it has none"),
        ({"name": "places365(part='all')"}, "part = 'all' is not known"),
        ({"normalise": "data"}, "data.normalise = 'data' needs images in memory"),
        ({"val": 99}, r"data\.val = 99: that many can't be held out of 18"),
        ({"val": 2}, r"data\.val = 2 of 18 images can't keep the shares of 3 classes"),
    ],
)
def test_data_that_cannot_be_is_refused(root, changes, message):
    with pytest.raises(ValueError, match=message):
        load(**({"root": root} | changes))


def test_a_batch_is_varied_in_memory_by_the_same_table_in_any_batch_size():
    config = DataConfig(name="fake(images=64, size=8)", crop=0.3, flip=0.5, val=10, test=10)
    dataset = data.load(config)
    small = [next(data.batches(dataset, batch=11, seed=5, start=0)) for _ in range(1)]
    whole = next(data.batches(dataset, batch=44, seed=5))
    assert torch.equal(small[0][0], whole[0][:11])
    order, draws = (
        data.epoch_order(5, 0, 44),
        data.epoch_draws(5, 0, 44, CROP_DRAWS, stream=loader.CROP),
    )
    rows = order[:11]
    varied = resized_crop(dataset.train.image[rows].float(), draws[rows], smallest=0.3)
    flipped = torch.where(
        data.epoch_draws(5, 0, 44, 1, stream=loader.FLIP)[rows][:, :, None, None] < 0.5,
        varied.flip(-1), varied,
    )  # fmt: skip
    torch.testing.assert_close(small[0][0], dataset.normalise(flipped))


@pytest.mark.parametrize("knob", ["mixup", "cutmix"])
def test_mixed_batches_have_soft_targets_of_two_classes(knob):
    config = DataConfig(name="fake(images=64, size=8)", val=10, test=10, **{knob: 1.0})
    _, target = next(data.batches(data.load(config), batch=16, seed=0))
    assert target.shape == (16, 10)
    torch.testing.assert_close(target.sum(dim=1), torch.ones(16))
    assert (target.max(dim=1).values < 1).any()


def test_the_last_images_of_an_epoch_are_kept_where_asked():
    config = DataConfig(name="fake(images=30, size=8)", val=10, test=0, drop_last=False)
    dataset = data.load(config)
    found = data.batches(dataset, batch=8, seed=0)
    assert [len(next(found)[1]) for _ in range(6)] == [8, 8, 4, 8, 8, 4]


def test_a_last_batch_smaller_than_the_processes_is_refused():
    config = DataConfig(name="fake(images=30, size=8)", val=10, test=0, drop_last=False)
    with pytest.raises(ValueError, match="a batch of 2 images can't be shared by 3 processes"):
        next(data.batches(data.load(config), batch=6, seed=0, part=(0, 3)))


def test_predictions_leave_out_what_was_skipped_and_keep_the_order(root):
    from vitx.training.evaluate import predict

    paths = sorted(root.glob("test/*/*.png"))
    for path in (paths[1], paths[-1]):
        path.write_bytes(b"nothing")
    dataset = load(root, on_bad_image="skip")
    model = vitx.build(ModelConfig(image=16, patch=8, classes=3, width=8, depth=1, heads=1))
    logits, target, rows = predict(model, dataset, dataset.test, batch=17)
    assert rows.tolist() == [0, *range(2, 17)]
    assert target.tolist() == dataset.test.target[rows].tolist()
    whole, *_ = predict(model, dataset, dataset.test.take(rows.tolist()))
    torch.testing.assert_close(logits, whole)


def test_a_bad_picture_stops_a_worker_by_name_too(root):
    path = sorted(root.glob("train/*/*.png"))[0]
    path.write_bytes(b"nothing")
    with pytest.raises(images.BadImage, match=f"{path.name} can't be decoded"):
        stream(load(root, val=0, workers=2), 6)


@pytest.mark.parametrize(
    ("name", "body"), [("a.ppm", b"P6 4 4 255\n1234"), ("b.ppm", b"P6 x 4 255\n"), ("c.png", b"")]
)
def test_pictures_that_pillow_refuses_in_other_words_are_bad_too(tmp_path, name, body):
    (tmp_path / name).write_bytes(body)
    with pytest.raises(images.BadImage, match=f"{name} can't be decoded"):
        images.open_picture(tmp_path / name)


def test_pictures_of_16_bits_are_refused(tmp_path):
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    with pytest.raises(images.BadImage, match=r"deep\.png has 16 bits per pixel"):
        images.open_picture(tmp_path / "deep.png")


def test_a_crop_for_a_model_that_is_not_square_has_no_border():
    white = Image.new("RGB", (40, 30), (255, 255, 255))
    for size in ((16, 64), (64, 16), (24, 24)):
        found = np.asarray(transforms.evaluation("crop", size)(white))
        assert found.shape == (*size, 3)
        assert found.min() == 255


def test_the_fingerprint_is_of_the_images_and_their_splits_not_of_their_place(root, tmp_path):
    import shutil

    copy = shutil.copytree(root, tmp_path / "moved")
    assert load(copy).fingerprint == load(root).fingerprint
    assert load(root, split_seed=1).fingerprint != load(root).fingerprint
    picture().save(copy / "train" / "ant" / "9999.png")
    assert load(copy).fingerprint != load(root).fingerprint


@pytest.mark.parametrize(
    ("label", "message"), [(-1, "the label -1 is none of 3 classes"), (None, "the label None")]
)
def test_a_hub_data_set_with_unknown_labels_is_refused(tmp_path, label, message):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])}
    )
    picture().save(tmp_path / "p.png")
    columns = {"image": [str(tmp_path / "p.png")] * 2, "label": [0, label]}
    part = datasets.Dataset.from_dict(columns, features=features)
    datasets.DatasetDict({"train": part}).save_to_disk(str(tmp_path / "set"))
    with pytest.raises(ValueError, match=f"row 1: {message}"):
        data.load(DataConfig(name="hf", root=str(tmp_path / "set"), normalise="half"), size=(8, 8))
