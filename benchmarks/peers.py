"""Models to time, by name, and how the weights of one become those of another.

`vitx:S/16`, `vitx:NAME` (made from timm's model of that name), `timm:NAME`, `torchvision:S/16` or
`torchvision:NAME`, `hf:S/16` or `hf:FOLDER`, `vit_pytorch:S/16`, and `python:FILE:FUNCTION` for any
other: the function gives a module, which may have an attribute `image` (channels, height, width).
All give logits of a batch of images.
"""

import importlib.util
import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from experiments import cli
from vitx.interop import names
from vitx.interop.names import Format
from vitx.interop.timm import from_timm, live_model
from vitx.measure.equality import Unmatched
from vitx.model.config import ModelConfig, size
from vitx.model.vit import build
from vitx.registry import UserError, nearest
from vitx.settings import pair


@dataclass(frozen=True)
class Model:
    """A module with what a timing must know of it."""

    name: str
    module: nn.Module
    image: tuple[int, int, int]
    """Channels, height and width."""
    depth: int
    form: Format | None
    """Its names of weights; timm's if None."""
    known: bool = True
    """Whether its weights can be made from another's: else nothing is checked."""


def check(name: str) -> None:
    """ValueError for a name that no model has, or a missing library; nothing is built."""
    family, _, rest = name.partition(":")
    if family not in FAMILIES or not rest:
        known = [f"{word}:" for word in FAMILIES]
        raise UserError(f"model = {name!r} is not known; {nearest(f'{family}:', known)}")
    library = LIBRARIES.get(family)
    if library and importlib.util.find_spec(library) is None:
        raise UserError(f"model = {name!r} needs {library}: pip install -e '.[peers]'")
    if family == "python":
        _function(name, rest)
    elif family == "timm" or (family == "vitx" and "/" not in rest):
        import timm

        if not timm.is_model(rest.partition(".")[0]):
            close = nearest(rest, timm.list_models("*vit*")).partition(" Choices")[0][:80]
            raise UserError(f"model = {name!r}: timm has no model {rest!r}; {close}")
        try:
            timm.get_pretrained_cfg(rest)
        except RuntimeError as error:  # an unknown tag
            raise UserError(f"model = {name!r}: {error}") from None
    elif family == "torchvision" and "/" not in rest:
        from torchvision.models import list_models

        listed = list_models(include="vit_*")
        if rest not in listed:
            raise UserError(f"model = {name!r} is not known; {nearest(rest, listed)}")
    elif family == "hf" and (Path(rest).is_dir() or rest.startswith(("/", ".", "~"))):
        config = Path(rest, "config.json")
        if not config.is_file():
            raise UserError(f"model = {name!r}: there is no {config}")
        try:
            content = json.loads(config.read_text(encoding="utf8"))
        except ValueError as error:  # no JSON, or no text
            raise UserError(f"model = {name!r}: {config} can't be read: {error}") from None
        if not isinstance(content, dict):
            raise UserError(f"model = {name!r}: {config} can't be read: it is no object")
        if (kind := content.get("model_type")) != "vit":
            raise UserError(f"model = {name!r}: {config} is of a model {kind!r}, not 'vit'")
    else:
        try:
            size(rest)
        except ValueError as error:
            raise UserError(f"model = {name!r}: {error}") from None


def make(name: str, device: torch.device | str = "cpu") -> Model:
    """The model of that name; ValueError as of `check`."""
    check(name)
    family, _, rest = name.partition(":")
    torch.manual_seed(0)
    model = FAMILIES[family](name, rest)
    return replace(model, module=model.module.to(device))


def conversion(
    reference: Model, candidate: Model
) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]] | None:
    """From the reference's weights to the candidate's; None where no names are known."""
    if not (reference.known and candidate.known):
        return None
    return partial(convert, reference.form, candidate.form, reference.depth)


def convert(
    before: Format | None, after: Format | None, depth: int, state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Weights under one project's names as another's, through timm's.

    Raises Unmatched naming a tensor that has no place.
    """
    try:
        ours = dict(state) if before is None else names.to_ours(state, before, depth, {})
        return ours if after is None else names.to_theirs(ours, after, depth)
    except ValueError as error:
        raise Unmatched(str(error)) from None


def _vitx(name: str, rest: str) -> Model:
    vit = build(size(rest)) if "/" in rest else from_timm(live_model(rest, {}))
    config = vit.config
    return Model(name, vit, (config.channels, *config.size), config.depth, None)


def _timm(name: str, rest: str) -> Model:
    module: Any = live_model(rest, {})
    depth = len(getattr(module, "blocks", ()))
    return Model(name, module, tuple(module.default_cfg["input_size"]), depth, None)


def _torchvision(name: str, rest: str) -> Model:
    from torchvision.models import get_model
    from torchvision.models.vision_transformer import VisionTransformer

    if "/" not in rest:
        module: Any = get_model(rest, weights=None)
        image = (3, module.image_size, module.image_size)
        return Model(name, module, image, len(module.encoder.layers), names.TORCHVISION)
    config = size(rest)
    module = VisionTransformer(
        image_size=config.size[0],
        patch_size=config.patch_size[0],
        num_layers=config.depth,
        num_heads=config.heads,
        hidden_dim=config.width,
        mlp_dim=config.hidden,
        num_classes=config.classes,
    )
    return _of(name, module, config, names.TORCHVISION)


class Logits(nn.Module):
    """A model of transformers, whose output is an object, as one that gives its logits."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        return self.model(pixel_values=image).logits


def _hf(name: str, rest: str) -> Model:
    from transformers import ViTConfig, ViTForImageClassification

    if Path(rest).is_dir():
        model = ViTForImageClassification.from_pretrained(
            rest, local_files_only=True, dtype=torch.float32
        )
        shape: Any = model.config
        image = (shape.num_channels, *pair("image_size", shape.image_size))
        return Model(name, Logits(model), image, shape.num_hidden_layers, names.TRANSFORMERS)
    config = size(rest)
    values: dict[str, Any] = {"num_labels": config.classes}
    theirs = ViTConfig(
        hidden_size=config.width,
        num_hidden_layers=config.depth,
        num_attention_heads=config.heads,
        intermediate_size=config.hidden,
        image_size=config.size[0],
        patch_size=config.patch_size[0],
        layer_norm_eps=1e-6,  # timm's, so that the same weights mean the same
        **values,
    )
    theirs._attn_implementation = "sdpa"
    return _of(name, Logits(ViTForImageClassification(theirs)), config, names.TRANSFORMERS)


def _vit_pytorch(name: str, rest: str) -> Model:
    from vit_pytorch import ViT

    config = size(rest)
    module = ViT(
        image_size=config.size[0],
        patch_size=config.patch_size[0],
        num_classes=config.classes,
        dim=config.width,
        depth=config.depth,
        heads=config.heads,
        dim_head=config.width // config.heads,
        mlp_dim=config.hidden,
    )
    # It normalises patches before and after their embedding, and has no biases in attention.
    return Model(name, module, (config.channels, *config.size), config.depth, None, known=False)


def _python(name: str, rest: str) -> Model:
    module = _function(name, rest)()
    channels, height, width = getattr(module, "image", (3, 224, 224))
    image = (channels, height, width)
    return Model(name, module, image, len(getattr(module, "blocks", ())), None)


def _function(name: str, rest: str) -> Callable[[], Any]:
    """The function in a file of a person's own."""
    path, _, function = rest.rpartition(":")
    if not Path(path).is_file():
        raise UserError(f"model = {name!r}: there is no file {path!r}")
    # By its own name, from its own folder, so that other processes can unpickle what it makes.
    folder = str(Path(path).resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    others = os.environ.get("PYTHONPATH", "")
    if folder not in others.split(os.pathsep):
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (folder, others)))
    module = cli.module(Path(path).stem, f"model = {name!r}: {path}")
    if Path(str(module.__file__)).resolve() != Path(path).resolve():
        raise UserError(
            f"model = {name!r}: another module is named {Path(path).stem}; rename the file"
        )
    if not callable(getattr(module, function, None)):
        raise UserError(f"model = {name!r}: {path} has no function {function!r}")
    return getattr(module, function)


def _of(name: str, module: nn.Module, config: ModelConfig, form: Format) -> Model:
    return Model(name, module, (config.channels, *config.size), config.depth, form)


FAMILIES: dict[str, Callable[[str, str], Model]] = {
    "vitx": _vitx,
    "timm": _timm,
    "torchvision": _torchvision,
    "hf": _hf,
    "vit_pytorch": _vit_pytorch,
    "python": _python,
}
LIBRARIES = {"hf": "transformers", "vit_pytorch": "vit_pytorch"}
"""What families need that is not installed with the project."""
