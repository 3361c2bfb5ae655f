"""`RECIPE_VERSION` is raised when what it stands for changes: pins of each function and class.

A new function is no change. `PYTHONPATH=tests python tests/training/test_versions.py` writes the
pins anew.
"""

import importlib
import inspect
import json
import pkgutil
from pathlib import Path

from pins import statements_hash

from vitx.model import functional
from vitx.training.config import RECIPE_VERSION

PINS = Path(__file__).with_name("pins.json")
MODULES = [
    *(
        f"{functional.__name__}.{module.name}"
        for module in pkgutil.iter_modules(functional.__path__)
    ),
    *(f"vitx.model.{name}" for name in ("layers", "vit")),
    *(f"vitx.data.{name}" for name in ("augment", "dataset", "loader", "transforms")),
    *(f"vitx.training.{name}" for name in ("loss", "muon", "optim", "schedule", "state")),
]
"""Where the functions stand that decide which values a configuration trains to."""
RULE = (
    "{names} changed. If a configuration may now train to other values, raise RECIPE_VERSION in "
    "vitx/training/config.py; in any case refresh the pins with: "
    "PYTHONPATH=tests python tests/training/test_versions.py"
)


def hashes():
    """By qualified name, the hash of every function and class of the modules."""
    each = {}
    for name in MODULES:
        for word, value in vars(importlib.import_module(name)).items():
            source = inspect.unwrap(value) if callable(value) else value
            own = inspect.isfunction(source) or inspect.isclass(source)
            if own and source.__module__ == name:
                each[f"{name}.{word}"] = statements_hash(source)
    return each


def test_no_function_of_the_recipes_changed_without_a_decision():
    pins, now = json.loads(PINS.read_text()), hashes()
    assert pins["version"] == RECIPE_VERSION, "refresh the pins: " + RULE.format(
        names="the version"
    )
    changed = [name for name, pin in pins["hashes"].items() if now.get(name) != pin]
    assert not changed, RULE.format(names=", ".join(changed))


def test_the_pins_hold_what_decides_numbers():
    now = hashes()
    for name in ("model.functional.attention.sdpa", "model.layers.Attention", "model.vit.Block",
                 "data.loader.epoch_draws", "data.augment.mixup", "training.state.change",
                 "training.optim.learning_rate", "training.muon.orthogonal"):  # fmt: skip
        assert f"vitx.{name}" in now


if __name__ == "__main__":
    PINS.write_text(json.dumps({"version": RECIPE_VERSION, "hashes": hashes()}, indent=1) + "\n")
