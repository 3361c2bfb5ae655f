"""What the programs' command lines share: flags that are wrong, and errors that are shown."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest
import tyro

from experiments import cli
from vitx.registry import UserError


@dataclass(frozen=True)
class Settings:
    """Settings of a test."""

    run: Annotated[Path, tyro.conf.Positional]
    images: int = 3
    split: Literal["val", "test"] = "val"
    keep_all: bool = False

    def __post_init__(self):
        cli.at_least(self, images=1)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["x", "--imags=3"], "--imags=3 is not known; did you mean '--images'?"),
        (["x", "--keep_al"], "--keep_al is not known; did you mean '--keep-all'?"),
        (["x", "y"], "y is not known; --help lists all flags"),
        (["x", "--images=y"], "--images: invalid literal for int() with base 10: 'y'"),
        (["x", "--images"], "--images must have a value"),
        (["x", "--images=0"], "images = 0 must be at least 1"),
        (["x", "--split=train"], "split = 'train' is not known; choices: val, test"),
        ([], "PATH must be given"),
    ],
)
def test_a_wrong_flag_is_one_sentence(flags, message):
    with pytest.raises(UserError) as refused:
        cli.parse(Settings, flags, prog="test")
    assert str(refused.value) == message


def test_help_names_the_choices_and_exits_0(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.parse(Settings, ["--help"], prog="test")
    assert stopped.value.code == 0
    assert "{val,test}" in capsys.readouterr().out


def test_a_users_error_is_shown_without_a_traceback_and_a_librarys_keeps_it(capsys):
    def refuse(args):
        raise UserError("size = 0 must be positive")

    with pytest.raises(SystemExit) as stopped:
        cli.run(refuse, [])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: size = 0 must be positive\n"

    with pytest.raises(ValueError, match="invalid literal"):
        cli.run(lambda args: exec("int('x')", {"__name__": "library"}), [])
