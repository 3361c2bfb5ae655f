"""Results that are sent: without places, refused if they were changed, never ranked with others."""

import gzip
import json
import random
import re
import types
from dataclasses import replace
from pathlib import Path

import pytest
from throughputs import EQUAL, failed, plain, speed, throughput

from benchmarks import pack, render
from benchmarks.kinds import EqualResult
from benchmarks.report import charts, entries, tables, verdicts
from benchmarks.report import throughput as report
from experiments.study.results import encode


def test_a_pack_holds_results_without_places(tmp_path, monkeypatch):
    path = tmp_path / "results.pack"
    monkeypatch.setattr(pack.socket, "gethostname", lambda: "somehost")
    pack._secrets.cache_clear()
    placed = throughput(
        "hf:/home/someone/weights",
        reference_name="python:clients/someone/model.py:make",
        reason="on somehost no file '/home/someone/x.pt', -I/home/someone/include",
    )
    pack.write([placed], path)
    assert path.stat().st_size < pack.LIMIT
    (packed,) = pack.read(path)
    assert "someone" not in encode(packed)
    assert "somehost" not in encode(packed)
    assert packed.candidate == "hf:weights"
    assert packed.reference == "python:model.py:make"
    for text, left in (
        ("vitx:S/16 and hf:Ti/16", "vitx:S/16 and hf:Ti/16"),
        ("hf:/scratch/alice/1000", "hf:1000"),
        ("no '/data/Project X/secret/f.pt'", "no 'f.pt'"),
        (r"C:\data\secret\f.pt", "C:f.pt"),
        ("~/secret/runs/", "runs"),
    ):
        assert pack._without_places(text) == left
    assert packed.comparison.raw == []
    assert packed.environment.command == ""
    assert report.throughput_table([packed]).body[0][6] == "100.0 (95.0 to 105.0, within a run)"
    with pytest.raises(ValueError, match=r"results of results [0-9a-f]{6} were packed before"):
        pack.write([packed], tmp_path / "again.pack")
    pack._secrets.cache_clear()


def test_models_of_one_name_in_two_folders_stay_two(tmp_path):
    path = tmp_path / "results.pack"
    pack.write([throughput(f"hf:/{place}/weights") for place in ("a", "b", "a")], path)
    names = [packed.candidate for packed in pack.read(path)]
    assert names == ["hf:weights", "hf:weights (2)", "hf:weights"]


def test_a_persons_name_is_no_part_of_other_words(tmp_path, monkeypatch):
    for name in ("tim", "max"):
        monkeypatch.setenv("USER", name)
        pack._secrets.cache_clear()
        path = tmp_path / f"{name}.pack"
        pack.write([throughput(compile="max-autotune", reason=f"by {name}")], path)
        (packed,) = pack.read(path)
        assert packed.reference == "timm:vit_small_patch16_224"
        assert packed.comparison.config.compile == "max-autotune"
        assert packed.comparison.reason == "by …"
        assert re.fullmatch(rf"{name} [0-9a-f]{{6}}", packed.origin)
        sent = rf"sent as {name} [0-9a-f]{{6}}, commit [0-9a-f]{{7}}"
        assert re.search(sent, entries.setting(packed))
    pack._secrets.cache_clear()
    unknown = {"getpwuid": lambda _: {}["no such user"]}  # as in containers
    monkeypatch.setattr(pack, "pwd", types.SimpleNamespace(**unknown))
    assert str(Path.home()) in pack._secrets()
    pack._secrets.cache_clear()


def test_a_pack_that_was_changed_is_refused(tmp_path):
    path = tmp_path / "results.pack"
    pack.write([throughput()], path)
    content = json.loads(gzip.decompress(path.read_bytes()))
    content["results"][0]["comparison"]["candidate"]["rate"]["mean"]["value"] = 1e6
    path.write_bytes(gzip.compress(json.dumps(content).encode()))
    with pytest.raises(ValueError, match=r"results\.pack does not fit its checksum"):
        pack.read(path)
    path.write_bytes(gzip.compress(b"{}"))
    with pytest.raises(ValueError, match=r"results\.pack is no file of packed results"):
        pack.read(path)
    for text in (b"[" * 10**6, b'{"results": NaN}', b" " * (pack.MOST + 1)):
        path.write_bytes(gzip.compress(text))
        with pytest.raises(ValueError, match=r"results\.pack can't be unpacked"):
            pack.read(path)
    path.write_bytes(gzip.compress(b"") + b"x" * pack.LIMIT)
    with pytest.raises(ValueError, match=r"results\.pack is larger than the 200 KiB"):
        pack.read(path)
    path.unlink()
    pack.write([throughput()], path)
    with pytest.raises(FileExistsError):  # nothing is written over
        pack.write([throughput()], path)
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 0xFF
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"results\.pack can't be unpacked"):
        pack.read(path)
    path.write_text('{"kind": "speed"}\n')
    with pytest.raises(ValueError, match=r"results\.pack line 1 is not a result of schema 2"):
        render.main([str(path)])
    with pytest.raises(ValueError, match="is no file of results"):
        render.main([str(tmp_path / "absent")])


def test_two_packs_of_one_name_never_rank_together(tmp_path):
    paths = [tmp_path / name / "results.pack" for name in "ab"]
    for path, rate in zip(paths, (100.0, 50.0), strict=True):
        path.parent.mkdir()
        pack.write([throughput(rate=rate)], path)
    results = [*(result for path in paths for result in pack.read(path)), throughput()]
    assert len(report.settings_table(results).body) == 3
    assert len({line[0] for line in report.throughput_table(results).body}) == 3
    assert len([name for name in charts.charts(results) if name.startswith("ratios")]) == 3


def test_two_processors_in_one_pack_never_rank_together(tmp_path):
    numbers = ("25/1/1", "26/2/1")
    results = [throughput(at={"cpu_id": number}) for number in numbers]
    pack.write(results, tmp_path / "results.pack")
    lines = report.settings_table(pack.read(tmp_path / "results.pack")).body
    assert [f" {number}, " in line[-1] for number, line in zip(numbers, lines, strict=True)] == [
        True, True,
    ]  # fmt: skip


def test_a_packed_file_adds_a_column_to_the_verdicts(tmp_path, capsys):
    """Also where it is of the same kind of machine, with results of the main job."""
    ours = speed("vitx:from_timm(a)", reference_name="timm:vit_tiny_patch16_224")
    kept, packed = tmp_path / "results.jsonl", tmp_path / "theirs.pack"
    kept.write_text(encode(ours) + "\n")
    render.main([str(kept), "--pack", str(packed)])
    with pytest.raises(FileExistsError):
        render.main([str(kept), "--pack", str(packed)])
    render.main([str(kept), str(packed), "--out", str(tmp_path / "shown")])
    names = {Path(line).name for line in capsys.readouterr().out.splitlines()[1:]}
    assert {"headline.md", "speed.csv", "cost.md", "speed.svg"} <= names
    header, _, line = (tmp_path / "shown" / "headline.md").read_text().splitlines()
    assert header.count("cores)") + header.count("threads)") == 2
    assert header.count("sent as theirs") == 1
    assert line.count("ViT-Ti/16, batch 8: 1.100 (") == 2
    both = [*pack.read(kept), *pack.read(packed)]
    assert len(tables.speed_table(both).body) == 2
    (axes,) = verdicts.speed_figure(both).axes
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert sum("sent as theirs" in label for label in labels) == 1
    assert all("cores" in label for label in labels)


def test_what_went_wrong_can_be_shown_and_sent(tmp_path):
    """An equality check that gave no number; a failure has no figure."""
    undefined = replace(EQUAL, passed=False, output_error=float("nan"), gradient_error=1e-9)
    made = failed()
    wrong = EqualResult(id="2026-11-22T00:00:00Z-1", environment=made.environment, batch=2,
                        reference="timm:a", candidate="vitx:a", image=(8, 8),
                        equality=undefined, verdict="not equal")  # fmt: skip
    bad = replace(speed(), comparison=made.comparison)
    path = tmp_path / "results.jsonl"
    path.write_text(f"{encode(wrong)}\n{encode(bad)}\n")
    render.main([str(path), "--pack", str(tmp_path / "results.pack")])
    render.main([str(tmp_path / "results.pack"), "--out", str(tmp_path / "shown")])
    assert "| nan | 1e-09 |" in (tmp_path / "shown" / "equality.md").read_text()
    assert "largest relative error inf" in (tmp_path / "shown" / "headline.md").read_text()
    assert not (tmp_path / "shown" / "speed.svg").exists()


def test_a_file_of_results_that_no_table_shows_is_said_to_be(tmp_path):
    path = tmp_path / "results.jsonl"
    for text in ("", json.dumps({key: plain(speed())[key] for key in (
            "schema", "id", "environment")} | {"kind": "failure", "candidate": "a", "reason": "b"}
        ) + "\n"):  # fmt: skip
        path.write_text(text)
        with pytest.raises(ValueError, match=r"results\.jsonl holds no result that a table shows"):
            render.main([str(path), "--out", str(tmp_path / "shown")])


@pytest.mark.slow
def test_too_many_results_make_no_pack(tmp_path):
    noise = random.Random(0)
    results = [throughput(reason=noise.randbytes(2000).hex()) for _ in range(300)]
    with pytest.raises(ValueError, match="more than 200; pack fewer"):
        pack.write(results, tmp_path / "results.pack")
