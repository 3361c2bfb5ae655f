"""vitx: a compact Vision Transformer, checked equal to timm's, timed in pairs.

`import vitx` loads torch and einops only; the heavier parts load where they are first used.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from vitx.metrics import report
from vitx.model.config import ModelConfig, size
from vitx.model.vit import Block, Vit, build, functionalize
from vitx.settings import override

if TYPE_CHECKING:
    from vitx.interop.timm import from_timm
    from vitx.interop.weights import export, load

__version__ = "0.3.0"
__all__ = [
    "Block",
    "ModelConfig",
    "Vit",
    "build",
    "export",
    "from_timm",
    "functionalize",
    "load",
    "override",
    "report",
    "size",
]

_LAZY = {
    "from_timm": "vitx.interop.timm",
    "load": "vitx.interop.weights",
    "export": "vitx.interop.weights",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if importlib.util.find_spec(f"vitx.{name}"):
        return importlib.import_module(f"vitx.{name}")
    raise AttributeError(f"module 'vitx' has no attribute {name!r}")
