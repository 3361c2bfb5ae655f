"""How a process learns that torchrun started it."""

import pytest

from vitx.training import parallel

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost",
            "MASTER_PORT": "1234"}  # fmt: skip


@pytest.fixture
def variables(monkeypatch):
    def write(**values):
        for name in TORCHRUN:
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return write


def test_the_numbers_are_torchruns(variables):
    variables(**TORCHRUN)
    assert parallel.launched() == {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 1}
    for alone in ({}, {"RANK": ""}, {"WORLD_SIZE": "2"}):
        variables(**alone)
        assert parallel.launched() is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"WORLD_SIZE": ""}, "WORLD_SIZE = ''"),
        ({"LOCAL_RANK": ""}, "LOCAL_RANK = ''"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR = ''"),
        ({"RANK": "first"}, "RANK = 'first'"),
        ({"RANK": "-1"}, "RANK = '-1'"),
    ],
)
def test_a_part_of_the_variables_is_refused(variables, change, message):
    variables(**TORCHRUN | change)
    with pytest.raises(ValueError, match=f"is set and {message}; torchrun sets both"):
        parallel.launched()
