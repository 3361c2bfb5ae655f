"""The hash of statements changes with what runs, and with nothing else."""

import importlib.util
from pathlib import Path

import pytest
from pins import statements_hash

PLAIN = "def f(x):\n    return x + 1\n"


def hash_of(path: Path, text: str) -> str:
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return statements_hash(module)


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ('def f(x):\n    """One more."""\n    # as it says\n    return (x\n        + 1)\n', True),
        ("def f(x):\n    return x + 2\n", False),
        ("def f(y):\n    return y + 1\n", False),
    ],
)
def test_only_statements_change_a_hash(tmp_path, text, same):
    before = hash_of(tmp_path / "before.py", PLAIN)
    assert (hash_of(tmp_path / "after.py", text) == before) == same
