"""Tensors by name from a file or folder of weights; nothing that is in a file is ever run."""

import argparse
import re
import sys
from collections.abc import Mapping
from pathlib import Path, PosixPath
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor

from vitx.files import plain
from vitx.registry import UserError

FILE = "model.safetensors"
"""Name of a run's weights in its folder."""
FILES = (FILE, "pytorch_model.bin")
"""Names of the weights in a folder; those that Hugging Face gives them, with settings beside."""
VALUES = (argparse.Namespace, PosixPath, np.dtype, *map(type, map(np.dtype, "fdiq?")),
          np.float64(0).__reduce__()[0])  # fmt: skip
"""Types that trainers keep beside weights, and that hold values only."""
SHARD = re.compile(r"-\d{5}-of-\d{5}\.")
WEIGHTS = ("state_dict", "model", "model_state_dict", "net", "module", "student")
"""Entries of a trainer's checkpoint that hold weights, the first of them is read."""
AVERAGES = ("state_dict_ema", "model_ema", "ema_state_dict", "ema", "teacher")
"""Entries that hold an average of the weights; one is read where there are no others."""
PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "backbone.", "encoder_q.")
"""What wrappers put before every name."""


def find(path: Path) -> Path:
    """The file of weights in a folder, or its index of shards; a file is itself."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if path.is_dir():
        names = (*FILES, *(f"{name}.index.json" for name in FILES))
        for name in names:
            if (path / name).exists():
                return path / name
        raise FileNotFoundError(f"{path} holds neither {' nor '.join(FILES)}")
    if SHARD.search(path.name):
        raise UserError(f"{path} is one of several shards: give its folder, which has their index")
    return path


def read(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by name, without what wrappers put before, and the metadata of a safetensors file."""
    if file.name.endswith(".index.json"):
        return bare(_shards(file)), {}
    state, metadata = _tensors(file)
    return bare(state), metadata


def bare(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The names without the prefixes that all of them have."""
    while state and (
        prefix := next((p for p in PREFIXES if all(name.startswith(p) for name in state)), "")
    ):
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    return dict(state)


def dtype(state: Mapping[str, Tensor], file: Path) -> torch.dtype:
    """The widest of the tensors' precisions. Raises UserError for one that is no float of 16 bits
    or more, and says which values are not finite."""
    widest, odd = None, list[str]()
    for name, value in state.items():
        if not value.is_floating_point() or value.element_size() < 2:
            raise UserError(f"{file}: {name} holds {value.dtype}; weights are floats")
        widest = value.dtype if widest is None else torch.promote_types(widest, value.dtype)
        odd += [] if value.isfinite().all() else [name]
    if odd:
        print(
            f"warning: {file}: {len(odd)} of {len(state)} tensors hold values that are not "
            f"finite, the first is {odd[0]}",
            file=sys.stderr,
        )
    return widest or torch.float32


def _shards(index: Path) -> dict[str, Tensor]:
    """The tensors of all shards that an index names."""
    try:
        files = msgspec.json.decode(index.read_bytes(), type=_Index).weight_map
    except msgspec.DecodeError as error:
        raise UserError(f"{index} can't be read: {error}") from None
    state = dict[str, Tensor]()
    for name in sorted(set(files.values())):
        if Path(name).name != name or not (index.parent / name).is_file():
            raise UserError(f"{index} names {name}, which is no file beside it")
        state |= _tensors(index.parent / name)[0]
    if missing := [name for name in files if name not in state]:
        raise UserError(f"{index} names {missing[0]}, which {files[missing[0]]} lacks")
    return state


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def _tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if file.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, "pt") as opened:
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
                return tensors, opened.metadata() or {}
        except SafetensorError as error:
            raise UserError(f"{file} is no safetensors file: {error}") from None
    state = _unwrapped(plain(file, file, VALUES), file)
    if not (isinstance(state, dict) and all(isinstance(v, Tensor) for v in state.values())):
        raise UserError(f"{file} holds no state dict")
    return state, {}


def _unwrapped(state: Any, file: Path) -> Any:
    """The state dict within a trainer's checkpoint; what else it holds is said."""
    while isinstance(state, dict):
        entries = [key for key in (*WEIGHTS, *AVERAGES) if isinstance(state.get(key), dict)]
        if not entries:
            break
        if len(entries) > 1 or entries[0] in AVERAGES:
            more = f"; it also holds {', '.join(entries[1:])}" if entries[1:] else ""
            print(f"note: {file}: {entries[0]} is read{more}", file=sys.stderr)
        state = state[entries[0]]
    return state
