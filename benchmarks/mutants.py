"""How good is the equality check? Thirty one-token bugs are planted in the source, one by one.

Each row names a file, a text that stands there once, and its replacement. The mutated package is
imported beside the real one, built with the same configuration, given the reference's weights and
compared with timm by the same check. A weaker check that is common (default initial weights, logits
only, float32, 1e-4) is scored beside it.
"""

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

import vitx
from vitx.interop.timm import read_config
from vitx.measure.equality import equality
from vitx.registry import UserError

SOURCE = Path(vitx.__file__).parent
COMMON_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Mutant:
    """One planted bug: `before` stands once in the file and becomes `after`."""

    name: str
    file: str
    before: str
    after: str


PLANTED = {
    "model/functional/attention.py": (
        ("attention scale 1/e", "dropout_p=drop", "scale=1 / q.shape[-1]"),
        ("no attention scale", "dropout_p=drop", "scale=1.0"),
        ("causal attention", "dropout_p=drop", "is_causal=True"),
        ("no gradient to k", "attention(q, k, v,", "attention(q, k.detach(), v,"),
    ),
    "model/layers.py": (
        ("q and k swapped", "            q, k, v = rearrange(", "            k, q, v = rearrange("),
        ("k and v swapped", "            q, k, v = rearrange(", "            q, v, k = rearrange("),
        ("heads and e swapped in the split", '"b n (three heads e) ->', '"b n (three e heads) ->'),
        ("heads and e swapped in the merge", '-> b i (heads e)"', '-> b i (e heads)"'),
        ("query bias dropped for read tokens", "None if bias is None else bias[:d])", "None)"),
        ("value bias dropped for read tokens", "None if bias is None else bias[d:])", "None)"),
        ("layer scale skipped", "branch * self.gamma", "branch * 1.0"),
    ),
    "model/functional/norm.py": (
        ("eps 1e-5 for 1e-6", "gain, bias, eps", "gain, bias, 1e-5"),
        ("norm bias dropped", "gain, bias, eps", "gain, None, eps"),
        ("norm gain dropped", "gain, bias, eps", "None, bias, eps"),
    ),
    "model/functional/mlp.py": (
        ("tanh for erf in GELU", "F.gelu(hidden)", 'F.gelu(hidden, approximate="tanh")'),
        ("sigmoid for erf in GELU", "F.gelu(hidden)", "hidden * (1.702 * hidden).sigmoid()"),
    ),
    "model/functional/patches.py": (
        ("y and x swapped", '"b d y x -> b (y x) d"', '"b d y x -> b (x y) d"'),
        (
            "patch rows reversed",
            "F.conv2d(image, kernel, bias",
            "F.conv2d(image, kernel.flip(2), bias",
        ),
        ("channels reversed", "F.conv2d(image,", "F.conv2d(image.flip(1),"),
        ("patch bias dropped", "kernel, bias, stride", "kernel, None, stride"),
    ),
    "model/vit.py": (
        ("ls1 and ls2 swapped", "self.drop_path1(self.ls1(", "self.drop_path1(self.ls2("),
        ("norm2 skipped", "self.placement(x, self.norm2, self.feed)", "x + self.feed(x)"),
        ("norm1 in place of norm2", "self.norm2, self.feed", "self.norm1, self.feed"),
        (
            "MLP beside attention",
            "self.placement(x, self.norm2, self.feed)",
            "x + self.feed(self.norm2(tokens[:, :queries]))",
        ),
        (
            "residual dropped",
            "self.placement(tokens, self.norm1, self.attend,",
            "self.attend(self.norm1(tokens),",
        ),
        ("final norm skipped", "self.norm(last(", "(last("),
        ("one block skipped", "*body, last =", "_, *body, last ="),
        (
            "registers before the class token",
            "(self.cls_token, self.reg_token)",
            "(self.reg_token, self.cls_token)",
        ),
        ("token norm in place of fc_norm", "self.fc_norm(self.pool(", "self.norm(self.pool("),
    ),
    "model/functional/pool.py": (
        ("mean over prefix tokens too", "tokens[:, prefix:]", "tokens[:, 0:]"),
    ),
}
"""By file: a bug's name, a text that stands there once, and what it becomes."""
MUTANTS = tuple(
    Mutant(name, file, *texts) for file, bugs in PLANTED.items() for name, *texts in bugs
)

SHAPES: tuple[dict[str, Any], ...] = (
    {"reg_tokens": 2, "init_values": 0.1},
    {"reg_tokens": 2, "global_pool": "avg", "no_embed_class": True},
)
"""timm options of the two references that every mutant is compared with."""


def reference(options: dict[str, Any]) -> nn.Module:
    """A small timm model: 9×20 pixels, 3×4 patches, so that swapped axes change the result."""
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    return VisionTransformer(
        img_size=(9, 20),
        patch_size=(3, 4),  # type: ignore[arg-type]
        num_classes=7,
        embed_dim=24,
        depth=3,
        num_heads=3,
        **options,
    ).eval()


@dataclass(frozen=True)
class Score:
    """Which check caught a mutant."""

    mutant: Mutant
    caught: bool
    caught_by_common_check: bool


def score() -> list[Score]:
    """Both checks on every mutant; the unmutated model must pass both, or ValueError."""
    references = [reference(options) for options in SHAPES]
    if any(_verdicts(vitx, model) != (False, False) for model in references):
        raise UserError("the unmutated model fails a check, so no mutant can be scored")
    scores = []
    for mutant in MUTANTS:
        with mutated(mutant) as package:
            caught = [_verdicts(package, model) for model in references]
        scores.append(Score(mutant, *(any(check) for check in zip(*caught, strict=True))))
    return scores


@contextmanager
def mutated(mutant: Mutant) -> Iterator[ModuleType]:
    """The package `vitx` with one planted bug, imported beside the real one, which is put back."""
    real = {name: module for name, module in sys.modules.items() if _is_vitx(name)}
    for name in real:
        del sys.modules[name]
    finder = _Finder(mutant)
    sys.meta_path.insert(0, finder)
    try:
        yield importlib.import_module("vitx")
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if _is_vitx(name)]:
            del sys.modules[name]
        sys.modules.update(real)


def _verdicts(package: Any, model: nn.Module) -> tuple[bool, bool]:
    """Whether the equality check, and the common check, see a difference."""
    candidate = package.build(package.ModelConfig(**vars(read_config(model)))).eval()
    candidate.load_state_dict(model.state_dict())
    image = torch.randn(2, 3, 9, 20, generator=torch.Generator().manual_seed(0))
    strict = not equality(model, candidate, image).passed
    return strict, _largest_difference(model, candidate, image) > COMMON_TOLERANCE


@torch.no_grad()
def _largest_difference(model: nn.Module, candidate: nn.Module, image: Tensor) -> float:
    return (model(image) - candidate(image)).abs().max().item()


def _is_vitx(name: str) -> bool:
    return name == "vitx" or name.startswith("vitx.")


class _Finder(MetaPathFinder, Loader):
    """Loads `vitx` from its source files, with the mutant's replacement."""

    def __init__(self, mutant: Mutant):
        self.mutant = mutant

    def find_spec(self, name, path=None, target=None) -> ModuleSpec | None:
        if not _is_vitx(name):
            return None
        stem = SOURCE.joinpath(*name.split(".")[1:])
        file = stem / "__init__.py" if stem.is_dir() else stem.with_suffix(".py")
        if not file.exists():
            return None
        spec = importlib.util.spec_from_file_location(
            name,
            file,
            loader=self,
            submodule_search_locations=[str(stem)] if stem.is_dir() else None,
        )
        return spec

    def exec_module(self, module: ModuleType) -> None:
        file = Path(str(module.__file__))
        source = file.read_text(encoding="utf8")
        if file == SOURCE / self.mutant.file:
            if source.count(self.mutant.before) != 1:
                raise UserError(
                    f"mutant {self.mutant.name!r}: {self.mutant.before!r} stands "
                    f"{source.count(self.mutant.before)} times in {self.mutant.file}, not once"
                )
            source = source.replace(self.mutant.before, self.mutant.after)
        exec(compile(source, str(file), "exec"), module.__dict__)
