"""The hash of statements changes with what runs, and with nothing else."""

import types

from pins import statements_hash


def made(tmp_path, text: str) -> types.ModuleType:
    path = tmp_path / "made.py"
    path.write_text(text)
    module = types.ModuleType("made")
    module.__file__ = str(path)
    return module


def test_only_statements_change_a_hash(tmp_path, monkeypatch):
    import inspect

    monkeypatch.setattr(inspect, "getsource", lambda module: open(module.__file__).read())
    plain = statements_hash(made(tmp_path, "def f(x):\n    return x + 1\n"))
    documented = 'def f(x):\n    """One more."""\n    # as it should\n    return (x\n        + 1)\n'
    assert statements_hash(made(tmp_path, documented)) == plain
    assert statements_hash(made(tmp_path, "def f(x):\n    return x + 2\n")) != plain
    assert statements_hash(made(tmp_path, "def f(y):\n    return y + 1\n")) != plain
