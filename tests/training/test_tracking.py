"""The run folder and W&B: modes, what an offline run holds, and that W&B never fails a run."""

import dataclasses
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from vitx import files
from vitx.training import provenance, tracking


@pytest.mark.parametrize(
    ("flag", "variables", "mode", "why"),
    [
        (None, {}, "offline", "the default"),
        (None, {"WANDB_MODE": ""}, "offline", "the default"),
        (None, {"WANDB_MODE": "disabled"}, "disabled", "WANDB_MODE says so"),
        (None, {"WANDB_SWEEP_ID": "abc"}, "online", "WANDB_SWEEP_ID is set"),
        ("offline", {"WANDB_MODE": "online", "WANDB_SWEEP_ID": "abc"}, "offline", "asked for"),
        (None, {"WANDB_MODE": "offline", "WANDB_SWEEP_ID": "abc"}, "offline", "WANDB_MODE says so"),
    ],
)
def test_the_mode_is_the_flag_else_the_variable_else_the_sweep(
    flag, variables, mode, why, monkeypatch
):
    for name in ("WANDB_MODE", "WANDB_SWEEP_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert tracking.wandb_mode(flag) == (mode, why)


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match=r"W&B mode 'onlin' \(asked for\) is not known"):
        tracking.wandb_mode("onlin")


def inspect(folder, *flags):
    command = [sys.executable, "-m", "wandb", "leet", "inspect", *flags, "--json", str(folder)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_an_offline_run_is_read_back_by_wandbs_own_reader(tmp_path):
    picture = tmp_path / "picture.png"
    _draw(picture)
    config = {"model.depth": 3, "optim.lr": 0.1}
    with tracking.Run(tmp_path, "group", "name", config, mode="offline") as run:
        for step in (10, 20):
            run.log({tracking.STEP: step, tracking.VAL_LOSS: 1 / step})
        run.table("rows", ["ratio", "verdict"], [[1.05, "faster"]])
        run.figure("picture", picture)
        run.summarise({tracking.TEST_ACCURACY: 0.99})
        where, folder = run.where, run.wandb_folder
    assert where == f"W&B: offline (asked for); upload with: wandb sync {folder}"
    whole = json.loads(inspect(folder, "--summary"))
    assert (whole["state"], whole["exit_code"]) == ("finished", 0)
    assert whole["config"]["model.depth"] == 3
    assert whole["summary"][tracking.TEST_ACCURACY] == 0.99
    records = [json.loads(line) for line in inspect(folder).splitlines()]
    history = [record["history"]["item"] for record in records if record["type"] == "history"]
    losses = [item[tracking.VAL_LOSS] for item in history if tracking.VAL_LOSS in item]
    assert losses == [0.1, 0.05]
    table = json.loads((folder / "files" / whole["summary"]["rows"]["path"]).read_text())
    assert table["data"] == [[1.05, "faster"]]
    image = folder / "files" / whole["summary"]["picture"]["path"]
    assert image.stat().st_size == picture.stat().st_size
    run_record = next(record["run"] for record in records if record["type"] == "run")
    assert run_record["run_group"] == "group"


def test_the_run_folder_holds_config_environment_metrics_and_summary(tmp_path):
    with tracking.Run(tmp_path, "group", "name", {"a": 1}, mode="disabled") as run:
        run.log({"step": 1, "loss": 0.5})
        lines = (run.folder / "metrics.jsonl").read_text().splitlines()
        run.summarise({"loss": 0.5})
    assert [json.loads(line) for line in lines] == [{"step": 1, "loss": 0.5}]
    assert run.folder.parent == tmp_path / "group"
    assert json.loads((run.folder / "config.json").read_text()) == {"a": 1}
    assert json.loads((run.folder / "summary.json").read_text()) == {"loss": 0.5}
    environment = json.loads((run.folder / "environment.json").read_text())
    assert environment["versions"]["torch"]
    assert {"commit", "dirty", "command", "cpu", "threads", "time"} <= set(environment)


def test_a_failing_wandb_is_said_once_and_the_run_goes_on(tmp_path, capsys):
    import wandb

    class Broken:
        dir = str(tmp_path)

        def log(self, values):
            raise wandb.Error("no space")

        def finish(self, exit_code):
            raise AssertionError("it was given up")

    with tracking.Run(tmp_path, "group", "name", {}, mode="disabled") as run:
        run._wandb = Broken()
        run.log({"step": 1})
        run.log({"step": 2})
    assert capsys.readouterr().err.count("W&B is left out from here on") == 1
    assert len((run.folder / "metrics.jsonl").read_text().splitlines()) == 2


def test_an_error_class_of_wandbs_own_is_caught_too(tmp_path):
    from wandb.sdk.mailbox.mailbox import MailboxClosedError

    with tracking.Run(tmp_path, "group", "name", {}, mode="disabled") as run:
        run._wandb = object()
        run._tell(lambda _: (_ for _ in ()).throw(MailboxClosedError()))
    assert run._wandb is None


def test_the_sync_command_can_be_pasted(tmp_path):
    with tracking.Run(tmp_path, "group", "model.norm=layernorm(eps=1e-5)", {}) as run:
        words = shlex.split(run.where.partition("upload with: ")[2])
    assert words[:2] == ["wandb", "sync"]
    assert Path(words[2]).is_dir()


def test_code_outside_of_a_checkout_is_dirty(monkeypatch, tmp_path):
    monkeypatch.setattr(
        provenance, "__file__", str(tmp_path / "vitx" / "training" / "provenance.py")
    )
    environment = provenance.environment()
    assert environment.commit is None
    assert environment.dirty


def test_an_empty_wandb_mode_is_the_default(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "")
    with tracking.Run(tmp_path, "group", "name", {}) as run:
        assert run.mode == "offline"
        assert run.wandb_folder is not None


def test_an_exception_in_the_run_is_its_exit_code(tmp_path):
    with pytest.raises(KeyError), tracking.Run(tmp_path, "g", "n", {}, mode="offline") as run:
        raise KeyError("stop")
    assert json.loads(inspect(run.wandb_folder, "--summary"))["exit_code"] == 1


def test_no_environment_names_a_folder_or_a_host():
    import socket

    text = json.dumps(dataclasses.asdict(provenance.environment()))
    assert socket.gethostname() not in text
    assert "/home" not in text
    assert "/root" not in text


def _draw(path):
    from PIL import Image

    Image.new("RGB", (8, 8), (200, 30, 30)).save(path)


def test_a_file_that_a_kill_cut_off_does_not_stop_the_next_start(tmp_path):
    with tracking.Run(tmp_path, "g", "n", {}, mode="disabled") as run:
        folder = run.folder
    (folder / "environment.json").write_text("")
    with tracking.Run(tmp_path, "g", "n", {}, mode="disabled", folder=folder) as again:
        assert again.id == run.id
        assert again.resumed
    with tracking.Run(tmp_path, "g", "n", {}, mode="disabled", folder=folder):
        environment = json.loads((folder / "environment.json").read_text())
    assert [set(part) for part in environment["before"]] == [
        {"time", "command", "commit", "dirty", "cpu", "gpu"}
    ]


@pytest.mark.parametrize("error", [TypeError, AttributeError, RuntimeError, SyntaxError])
def test_a_wandb_that_cant_be_imported_is_left_out(tmp_path, monkeypatch, capsys, error):
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "__init__.py").write_text(f"raise {error.__name__}('descriptors')\n")
    for name in [name for name in sys.modules if name.partition(".")[0] == "wandb"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    with tracking.Run(tmp_path / "runs", "group", "name", {}, mode="offline") as run:
        run.log({tracking.STEP: 1, tracking.VAL_LOSS: 0.5})
    assert (
        capsys.readouterr().err.count(f"W&B is left out from here on: W&B raised {error.__name__}")
        == 1
    )
    assert tracking.read_events(run.folder) == [{tracking.STEP: 1, tracking.VAL_LOSS: 0.5}]


@pytest.mark.parametrize("place", ["log", "finish", "summary"])
@pytest.mark.parametrize("error", [RuntimeError, AttributeError, KeyError])
def test_a_wandb_that_fails_later_is_left_out(tmp_path, capsys, place, error):
    class Broken:
        dir = str(tmp_path)

        def fail(self, *_, **__):
            raise error("broken")

        log = finish = fail

        @property
        def summary(self):
            return self.fail() if place == "summary" else {}

    with tracking.Run(tmp_path / "runs", "group", "name", {}, mode="disabled") as run:
        run._wandb, run.mode = Broken(), "offline"
        if place == "log":
            run.log({tracking.STEP: 1})
        if place == "summary":
            run.summarise({tracking.TEST_ACCURACY: 0.5})
    assert f"W&B raised {error.__name__}" in capsys.readouterr().err
    assert tracking.read_events(run.folder) == ([{tracking.STEP: 1}] if place == "log" else [])


@pytest.mark.parametrize("damage", [b"\0" * 40 + b"\n", b'{"step": 3, "val', b"[1]\n", b"\xff\n"])
def test_events_are_read_up_to_a_damaged_line_and_gone_on_with(tmp_path, capsys, damage):
    with tracking.Run(tmp_path, "group", "name", {}, mode="disabled") as run:
        for step in (1, 2):
            run.log({tracking.STEP: step})
    path = run.folder / tracking.EVENTS
    path.write_bytes(path.read_bytes() + damage + b'{"step": 4}\n' * damage.endswith(b"\n"))
    with tracking.Run(tmp_path, "group", "name", {}, mode="disabled", folder=run.folder) as again:
        again.rewind(2)
        again.log({tracking.STEP: 3})
    assert [event["step"] for event in tracking.read_events(run.folder)] == [1, 2, 3]
    said = capsys.readouterr().err
    assert said.count("line 3 is damaged; events from there on are left out") == damage.endswith(
        b"\n"
    )


def test_what_is_no_number_is_null_in_json(tmp_path):
    with tracking.Run(tmp_path, "group", "name", {}, mode="disabled") as run:
        run.log({tracking.STEP: 1, "mine": float("nan")})
        run.summarise({"a": [float("inf"), {"b": float("nan")}], "c": 0.5})
    assert tracking.read_events(run.folder) == [{tracking.STEP: 1, "mine": None}]
    whole = json.loads((run.folder / "summary.json").read_text(), parse_constant=pytest.fail)
    assert whole == {"a": [None, {"b": None}], "c": 0.5}


@pytest.mark.parametrize("damage", [b"", b'{"a": 1', b"[1, 2]", b"\xff\xfe", b"null"])
def test_a_damaged_json_counts_as_absent_and_is_said(tmp_path, capsys, damage):
    (tmp_path / "x.json").write_bytes(damage)
    for _ in range(2):
        assert files.read_json(tmp_path / "x.json") == {}
    assert capsys.readouterr().err.count("x.json") == 1
