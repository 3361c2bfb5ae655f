"""Opening a picture: what is taken, and what is refused by its name."""

import os
import resource
import struct

import numpy as np
import pytest
from picture_files import picture
from PIL import Image
from torchvision.transforms import InterpolationMode, v2

from vitx.data import transforms
from vitx.data.images import BadImage, open_picture


def noise(width, height):
    return Image.effect_noise((width, height), 80).convert("RGB")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_stands_as_its_exif_says(tmp_path, orientation):
    upright, exif = noise(48, 32), Image.Exif()
    exif[0x112] = orientation
    inverse = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    stored = upright.transpose(inverse[orientation]) if orientation > 1 else upright
    stored.save(tmp_path / "x.png", exif=exif)
    assert np.array_equal(np.asarray(open_picture(tmp_path / "x.png")), np.asarray(upright))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.linspace(0, 1, 64, dtype=np.float32), "has floats per pixel"),
        (np.linspace(0, 60_000, 64).astype(np.int32), "32 bits per pixel, with values from 0 to"),
        (np.linspace(-9, 200, 64).astype(np.int32), "with values from -9 to 200"),
        (np.linspace(0, 60_000, 64).astype(np.uint16), "has 16 bits per pixel"),
    ],
)
def test_values_that_8_bits_cant_hold_are_refused(tmp_path, values, message):
    Image.fromarray(values.reshape(8, 8)).save(tmp_path / "x.tif")
    with pytest.raises(BadImage, match=rf"x\.tif .*{message}"):
        open_picture(tmp_path / "x.tif")


def test_32_bits_with_values_of_8_are_taken(tmp_path):
    values = np.arange(64, dtype=np.int32).reshape(8, 8) * 4
    Image.fromarray(values).save(tmp_path / "x.tif")
    assert np.array_equal(np.asarray(open_picture(tmp_path / "x.tif"))[..., 0], values)


def test_whatever_a_decoder_raises_is_the_pictures_fault(tmp_path):
    header = struct.pack("<4s7I", b"DDS ", 124, 0x1007, 4, 4, 16, 0, 0) + bytes(44)
    odd = header + struct.pack("<2I4s5I", 32, 0, bytes(4), 0, 0, 0, 0, 0) + bytes(84)
    for number, body in enumerate((odd, b"nothing", b"")):
        (tmp_path / f"{number}.png").write_bytes(body)
        with pytest.raises(BadImage, match=rf"{number}\.png can't be decoded: \w"):
            open_picture(tmp_path / f"{number}.png")
        with pytest.raises(BadImage, match=r"^row 5 can't be decoded: ") as caught:
            open_picture(body, name="row 5")
        assert "0x" not in str(caught.value)  # an address would be another one in each epoch


def test_what_is_no_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "x.jpg")
    with pytest.raises(BadImage, match=r"x\.jpg is no regular file"):
        open_picture(tmp_path / "x.jpg")
    (tmp_path / "y.jpg").mkdir()
    with pytest.raises(BadImage, match=r"y\.jpg is no regular file"):
        open_picture(tmp_path / "y.jpg")


@pytest.mark.parametrize("size", [(2, 3000), (3000, 2), (1, 20_000)])
def test_a_thin_picture_takes_little_memory(size):
    prepare, thin = transforms.evaluation("crop", (224, 224)), Image.new("RGB", size)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert prepare(thin).size == (224, 224)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB


@pytest.mark.parametrize("filter", ["nearest", "bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("size", [224, 32, 30, 97])
def test_the_centre_is_torchvisions_and_timms(size, filter):
    theirs = v2.Compose([
        v2.Resize(int(size / 0.875), InterpolationMode(filter), antialias=True),
        v2.CenterCrop(size),
    ])  # fmt: skip
    ours = transforms.evaluation("crop", (size, size), filter=filter)
    draws = np.random.default_rng(0)
    for width, height in draws.integers(20, 700, (40, 2)).tolist():
        shown = picture((width, height), seed=width)
        assert np.array_equal(ours(shown), theirs(shown)), (width, height)
