"""Generated data sets, weights and settings: each works, or ends in one sentence.

`pytest -m campaign -n 0 tests/test_fuzz.py`; VITX_FUZZ is the number of cases of each kind.
"""

import contextlib
import io
import json
import os
import random
import resource
import signal
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
import timm
import torch
from picture_files import picture
from PIL import Image
from safetensors.torch import save_file
from taken import SMALL
from transformers import ViTConfig, ViTForImageClassification

import vitx
from experiments import cli, train
from vitx import data
from vitx.data.config import DataConfig

CASES = int(os.environ.get("VITX_FUZZ", "500"))
SECONDS, GIB = 60, 2

NAMES = ["a", "b", "0", "1", "10", "02", "train", "Train", "val", "test", "valid", "a b", "$x$",
         "é", "犬", ".hidden", "__MACOSX", "x.png", "{}",
         "-1", b"caf\xe9", "Training", "dev"]  # fmt: skip
ENDINGS = ["png", "jpg", "JPEG", "gif", "tif", "bmp", "webp", "pdf", "h5", "txt", ""]


def name(draw: random.Random, names=NAMES):
    return os.fsdecode(draw.choice(names))


def write_file(draw: random.Random, path: Path) -> None:
    """A file as it may lie in a folder of pictures."""
    kind = draw.choice(
        ["good"] * 6 + ["cut", "bytes", "empty", "16", "float", "pipe", "link", "up"]
    )
    if kind == "pipe":
        os.mkfifo(path)
    elif kind in ("link", "up"):
        path.symlink_to(path.parent / name(draw) if kind == "link" else path.parent.parent)
    elif kind in ("16", "float"):
        depth = np.uint16 if kind == "16" else np.float32
        Image.fromarray(np.ones((6, 5), depth)).save(path, "TIFF")
    else:
        out = io.BytesIO()
        size = (draw.randint(1, 40), draw.randint(1, 40))
        mode = draw.choice(["RGB", "L", "LA", "P", "1"])
        picture(size, draw.randint(0, 9)).convert(mode).save(out, draw.choice(["PNG", "GIF"]))
        body = out.getvalue()
        lengths = {"cut": len(body) // 2, "empty": 0}
        path.write_bytes(draw.randbytes(50) if kind == "bytes" else body[: lengths.get(kind)])


def tree(draw: random.Random, folder: Path, depth: int) -> None:
    folder.mkdir(exist_ok=True)
    for _ in range(draw.randint(0, 4)):
        path = folder / name(draw)
        if depth and not path.exists():
            tree(draw, path, depth - 1)
    for number in range(draw.choice([0, 0, 1, 6]) if depth else draw.randint(0, 6)):
        path = folder / f"{number}.{draw.choice(ENDINGS)}"
        if not path.exists() and not path.is_symlink():
            write_file(draw, path)


def read(draw: random.Random, source: str, root: Path) -> None:
    """Load, and read a batch of training and all of the evaluation."""
    config = DataConfig(
        name=source, root=str(root), val=draw.choice([0, 0, 0, 3]), test=draw.choice([0] * 5 + [2]),
        stratified=draw.random() < 0.3, normalise=draw.choice(["half", "imagenet", "half", "data"]),
        crop=draw.choice([1.0, 0.5]), resize=draw.choice(["crop", "squash"]),
        on_bad_image=draw.choice(["stop", "skip"]),
    )  # fmt: skip
    dataset = data.load(config, size=(16, 16))
    assert len(dataset.fingerprint) == 65
    next(data.batches(dataset, batch=draw.randint(1, 4), seed=0))
    for split in (dataset.val, dataset.test):
        for image, _ in data.evaluation_batches(dataset, split):
            assert image.isfinite().all()


def of_folders(draw: random.Random, root: Path) -> None:
    if draw.random() < 0.5:
        tree(draw, root / "DIR", draw.randint(1, 3))
    else:  # as it is meant, with an odd name or file here and there
        for split in draw.choice([["."], ["train", "val"], ["Training", "Testing"], ["train"]]):
            for of_class in draw.sample(["a", "b", "c", "10", "2", "é", name(draw)], 3):
                folder = root / "DIR" / split / of_class
                folder.mkdir(parents=True, exist_ok=True)
                for number in range(draw.randint(1, 5)):
                    ending = draw.choice(ENDINGS if draw.random() < 0.1 else ["png", "jpg"])
                    write_file(draw, folder / f"{number}.{ending}")
    read(draw, "imagefolder", root / "DIR")


def of_labels(draw: random.Random, root: Path) -> None:
    words = ["a", "b", "c", "", None, "10", "2"]
    kinds = {
        "names": (datasets.ClassLabel(names=["a", "b", "c"]), [0, 1, 2, -1, None]),
        "turned": (datasets.ClassLabel(names=["c", "a", "b"]), [0, 1, 2]),
        "words": (datasets.Value("string"), words),
        "whole": (datasets.Value("int64"), [-1, 0, 1, 2, 7, None]),
        "float": (datasets.Value("float32"), [0.0, 1.5, None]),
        "lists": (datasets.Sequence(datasets.Value("int64")), [[0], [1, 2]]),
    }
    tidy = draw.random() < 0.5
    kind = draw.choice(["names", "words", "whole"] if tidy else list(kinds))
    column, pictures = ("label", "image") if tidy else draw.choice([("kind", "x"), ("label", "x")])
    parts = {}
    others = draw.sample(["test", "validation", "Val", "other"], draw.randint(0, 2))
    for split in ["train", *others] if tidy or draw.random() < 0.9 else others:
        feature, values = kinds[kind if draw.random() < 0.9 else draw.choice(list(kinds))]
        if draw.random() < 0.7:
            values = values[1:3] if kind == "whole" else values[:2]
        rows = draw.randint(4, 9) if tidy else draw.randint(0, 9)
        stored = "image" if tidy else draw.choice(["image", "image", "bytes", "none"])
        shown = [picture((8, 8), k) if draw.random() < 0.95 else None for k in range(rows)]
        image_kind: object = datasets.Image()
        if stored == "bytes":
            shown, image_kind = [b"\x89PNG" for _ in range(rows)], datasets.Value("binary")
        columns = {pictures: shown, column: [draw.choice(values) for _ in range(rows)]}
        features = {pictures: image_kind, column: feature}
        if stored == "none":
            del columns[pictures], features[pictures]
        parts[split] = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    datasets.DatasetDict(parts).save_to_disk(str(root / "DIR"))
    knobs = draw.choice(["hf", "hf(label='kind')", "hf(image='x')", "hf(label='no')"])
    knobs = "hf" if tidy else knobs
    read(draw, knobs, root / "DIR")


def foreign() -> dict[str, dict[str, torch.Tensor]]:
    """State dicts of other projects."""
    config = ViTConfig(
        hidden_size=48, num_hidden_layers=1, num_attention_heads=3, intermediate_size=96,
        image_size=32, patch_size=8,
    )  # fmt: skip
    options = [{}, {"reg_tokens": 2}, {"init_values": 0.1}, {"img_size": (16, 64)}]
    live = [timm.create_model("vit_tiny_patch16_224", **SMALL | more) for more in options]
    return {f"timm{k}": model.state_dict() for k, model in enumerate(live)} | {
        "hf": ViTForImageClassification(config).state_dict()
    }


def changed(draw: random.Random, state: dict[str, torch.Tensor]) -> object:
    """A state dict as a stranger's program may have written it."""
    state = dict(state)
    for _ in range(draw.choice([0, 0, 0, 0, 0, 0, 1, 2])):
        key = draw.choice(list(state))
        kind = draw.choice(["drop", "rename", "half", "whole", "nan", "shape", "empty"])
        value = state.pop(key)
        values = {
            "rename": lambda value: value, "half": lambda value: value.half(),
            "whole": lambda value: value.to(torch.int8),
            "nan": lambda value: torch.full_like(value, torch.nan),
            "shape": lambda value: value.flatten()[: draw.randint(0, 9)],
            "empty": lambda value: value[:0],
        }  # fmt: skip
        if kind != "drop":
            state[key + "x" if kind == "rename" else key] = values[kind](value)
    prefix = draw.choice(["", "", "", "module.", "_orig_mod.", "model.", "odd."])
    state = {prefix + key: value for key, value in state.items()}
    wrapped = draw.choice(["", "", "", "model", "state_dict", "state_dict_ema", "odd"])
    extra = draw.choice([{}, {"epoch": 3}, {"args": {"lr": 1}}, {"when": np.float64(1)}])
    return {wrapped: state} | extra if wrapped else state


CONFIGS = [{}, [], {"model_type": "vit"}, {"architecture": "vit_tiny_patch16_224"},
           {"architecture": "nothing"}, {"architecture": 3}, {"num_attention_heads": "three"},
           {"architecture": "vit_tiny_patch16_224", "model_args": SMALL},
           {"architecture": "vit_tiny_patch16_224", "global_pool": "map"},
           {"num_attention_heads": 5}, {"image_size": -1}, {"id2label": {"0": "a"}},
           {"hidden_act": "selu"}, {"image_size": [32, 32], "num_attention_heads": 3},
           {"layer_norm_eps": -1.0, "num_attention_heads": 3}]  # fmt: skip


def of_weights(draw: random.Random, root: Path) -> None:
    state = changed(draw, draw.choice(list(FOREIGN.values())))
    form = draw.choice(["w.pt", "w.safetensors", "pytorch_model.bin", "model.safetensors"])
    path = root / form
    if form.endswith("safetensors"):
        flat = {k: v.contiguous() for k, v in state.items() if isinstance(v, torch.Tensor)}
        save_file(flat or {"a": torch.zeros(1)}, path)
    else:
        torch.save(state, path)
    if draw.random() < 0.2:
        body = bytearray(path.read_bytes())
        place = draw.randrange(len(body))
        body[place] ^= 1 << draw.randrange(8)
        path.write_bytes(body[: draw.choice([place, len(body)])])
    if draw.random() < 0.3:
        (root / "config.json").write_text(json.dumps(draw.choice(CONFIGS)))
    if draw.random() < 0.3:
        odd = draw.choice([[], {"size": -1}, {"resample": 3}, {"image_mean": 3}, {"size": "big"}])
        (root / "preprocessor_config.json").write_text(json.dumps(odd))
    where = root if form in ("pytorch_model.bin", "model.safetensors") else path
    vit = vitx.load(where, heads=draw.choice([0, 3, 3, 3, 4]), classes=draw.choice([0, 0, 3]))
    size = vit.config.size
    assert vit(torch.zeros(1, vit.config.channels, *size)).shape == (1, vit.config.classes)


FLAGS = ["model.width", "model.depth", "model.heads", "model.patch", "model.image", "model.norm",
         "model.attention", "model.pool", "model.position", "model.init", "model.mlp-ratio",
         "model.drop", "model.registers", "optim.lr", "optim.name", "optim.schedule",
         "optim.warmup-steps", "optim.freeze", "data.name", "data.val", "data.train", "data.crop",
         "data.randaugment", "steps", "batch", "accumulate", "precision", "ema", "seed", "weights",
         "curve", "eval-every", "keep-every"]  # fmt: skip
VALUES = ["0", "1", "2", "3", "-1", "7", "64", "1e9", "0.5", "nan", "inf", "", "none", "[1,2]",
          "layernorm(eps=-1)", "normal(std=-1)", "mean", "sdpa", "sdpa(x=1)", "cosine(end=2)",
          "adamw", "lion", "fake", "fake(images=8, size=8)", "hf", "True", "None", "$x", "犬",
          "bfloat16", "test", "99999999999999999999", "rope", "sincos2d", "stem",
          "unfold"]  # fmt: skip


def of_settings(draw: random.Random, root: Path) -> None:
    recipe = draw.choice(["digits"] * 6 + ["cifar10", "finetune-beans", "nothing"])
    flags = {draw.choice(FLAGS): draw.choice(VALUES) for _ in range(draw.choice([1, 1, 1, 2]))}
    dry = draw.random() < 0.7 or bool(flags.keys() & LONG)
    words = ["--dry-run"] if dry else ["--wandb=disabled", f"--folder={root}/run"]
    given = [f"--{flag}={value}" for flag, value in flags.items()]
    with contextlib.redirect_stdout(io.StringIO()):
        train.main([recipe, "--steps=2", "--batch=4", *given, *words])


LONG = {"steps", "batch", "model.width", "model.depth", "model.registers", "model.image",
        "model.mlp-ratio"}  # fmt: skip
"""Settings that may ask for more than a minute of work; they are not trained here."""
FOREIGN: dict[str, dict[str, torch.Tensor]] = {}
KINDS = {"folders": of_folders, "labels": of_labels, "weights": of_weights, "settings": of_settings}


def outcome(attempt) -> str:
    """`works`, or `refused` in one line. Raises AssertionError for all else."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            cli.run(lambda _: attempt(), [])
        except SystemExit as stopped:
            code = stopped.code
        else:
            return "works"
    line = said.getvalue().splitlines()[-1]
    assert code == 2
    assert line.startswith("error: ")
    assert len(line) > 12
    return "refused"


@pytest.mark.campaign
@pytest.mark.timeout(0)
@pytest.mark.parametrize("kind", KINDS)
def test_generated_input_works_or_is_refused_in_one_sentence(kind, tmp_path, unchecked):
    FOREIGN.update(foreign())
    counts: Counter[str] = Counter()
    faults = []
    signal.signal(signal.SIGALRM, _too_long)
    for seed in range(CASES):
        draw, root = random.Random(f"{kind} {seed}"), tmp_path / str(seed)
        root.mkdir()
        signal.alarm(SECONDS)
        try:
            counts[outcome(lambda draw=draw, root=root: KINDS[kind](draw, root))] += 1
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            faults.append(f"{kind} {seed}: {type(error).__name__}: {str(error)[:300]}")
        finally:
            signal.alarm(0)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"\n{kind}: {dict(counts)}, {len(faults)} faults, peak {peak:.1f} GiB")
    assert not faults, "\n".join(faults[:20])
    assert peak < GIB
    assert min(counts["works"], counts["refused"]) > CASES // 50


def _too_long(*_: object) -> None:
    raise AssertionError(f"more than {SECONDS} s")
