"""Tables and charts of throughput and of the main job: what stands together, and what is said."""

import csv
from dataclasses import replace

import pytest
from throughputs import SAVED, SECONDS, compiled, failed, rate_of, speed, throughput

from benchmarks import render
from benchmarks.report import charts, entries, plots, tables
from benchmarks.report import throughput as report
from benchmarks.throughput import line as line_of
from experiments.study import pages
from experiments.study.results import encode
from vitx import pictures
from vitx.measure import breakdown, timing
from vitx.measure.comparison import Saved
from vitx.measure.stats import Interval

START = tuple(report.START)


def ratio_charts(results):
    return [chart for name, chart in charts.charts(results).items() if name.startswith("ratios")]


def test_tables_and_charts_come_from_results(tmp_path):
    results = [throughput(), throughput(batch=1), compiled(), failed(batch=64)]
    paths = charts.write(results, tmp_path, tables=report.TABLES)
    names = {path.name for path in paths}
    assert {"throughput-settings.md", "throughput-ratios.md", "throughput.md", "latency.md",
            "stages.csv", "throughput-costs.csv"} <= names  # fmt: skip
    drawn = {name.removesuffix("-S-16-inference.svg") for name in names if name.endswith(".svg")}
    assert drawn == set(charts.DRAWN)
    table = (tmp_path / "throughput.md").read_text()
    assert "100.0 (95.0 to 105.0, within a run)" in table
    assert "110.0 (107.3 to 112.8)" in table
    assert "failed: no memory" in table
    with (tmp_path / "measurements.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["side"] for line in lines] == ["reference", "candidate"] * 3 + ["candidate"]
    assert float(lines[1]["rate_mean_low"]) == 95
    assert float(lines[5]["compile_s_cold"]) == 60
    assert lines[6]["reason"] == "no memory"


def test_models_stand_below_their_reference_from_the_fastest_to_those_that_failed():
    results = [throughput("torchvision:S/16", ratio=0.9), failed("hf:S/16"),
               throughput("vitx:S/16", ratio=1.2), throughput(batch=1)]  # fmt: skip
    body = report.throughput_table(results).body
    batch, name = (START.index(word) for word in ("batch", "model"))
    assert [(line[batch], line[name].partition(":")[0]) for line in body] == [
        ("1", "timm"), ("1", "vitx"),
        ("8", "timm"), ("8", "vitx"), ("8", "torchvision"), ("8", "hf"),
    ]  # fmt: skip


def test_ratios_stand_side_by_side_for_each_batch_and_compile_mode():
    wrong = failed("hf:S/16", "not equal")
    other = throughput("vit_pytorch:S/16", checked="not checked: other weights")
    table = report.summary_table([throughput(batch=1), throughput(), compiled(), wrong, other])
    assert table.header[5:] == ("batch 1, eager", "batch 8, eager", "batch 8, compiled")
    lines = {line[4].partition(" ")[0]: line[5:] for line in table.body}
    assert lines["vitx:S/16"] == ("1.100 (1.073 to 1.128)",) * 3
    assert lines["hf:S/16"] == ("–", "not equal", "–")
    assert lines["vit_pytorch:S/16"] == ("–", "1.100 (1.073 to 1.128), not checked", "–")


def test_a_model_whose_outputs_were_not_checked_gets_no_verdict():
    words = {"checked": "not checked: other weights", "reason": "the machine was disturbed"}
    other = throughput("vit_pytorch:S/16", verdict="inconclusive", **words)
    _, line = report.throughput_table([other]).body
    assert line[-2:] == (
        "not checked, inconclusive: the machine was disturbed", "not checked: other weights"
    )  # fmt: skip
    (ratios,) = ratio_charts([other])
    (label,) = ratios.axes[0].get_yticklabels()
    assert label.get_text().endswith("not checked, 0.935× the MACs, inconclusive")
    assert "faster" not in line_of(throughput("vit_pytorch:S/16", verdict="faster", **words))


def test_compiling_pays_only_where_it_is_known_to_save():
    def line(low, value, high):
        candidate = {"saved": Saved(200, Interval(value, low, high))}
        *_, last = report.break_even_table([throughput(), compiled(candidate=candidate)]).body
        return last[6:]

    assert line(0.002, 0.004, 0.005) == (
        "+4.000 (+2.000 to +5.000)",
        "15,000 (12,000 to 30,000)",
        "5,000 (4,000 to 10,000)",
    )
    assert line(-0.001, 0.004, 0.005)[1:] == ("not told apart", "not told apart")
    assert line(-0.003, -0.002, -0.001)[1:] == ("never", "never")
    assert not report.break_even_table([throughput(), compiled()]).body


def test_a_reference_that_was_timed_with_every_model_is_one_line_of_its_readings():
    """Its rate at the geometric mean, between the lowest and the highest."""
    results = [
        throughput(name, ratio=ratio, reference={
            "rate": replace(rate_of(rate), mean=Interval(rate, rate - 1, rate + 1)),
            "peak_mib": rate,
        })
        for name, ratio, rate in (("vitx:S/16", 1.1, 100.0), ("hf:S/16", 0.8, 121.0))
    ]  # fmt: skip
    reference, vitx, hf = entries.entries(results)
    assert (reference.side, len(reference.results)) == ("reference", 2)
    assert reference.rate().value == pytest.approx(110)
    assert (reference.rate().low, reference.rate().high) == (100, 121)
    (line, *_) = report.throughput_table(results).body
    assert line[6:] == ("110.0 (100.0 to 121.0)", "–", "–", "–", "reference, 2 runs", "–")
    (line, *_) = report.cost_table(results).body
    assert line[8] == "110 (100 to 121)"
    # Models of different runs are compared by their ratios to it.
    for entry, ratio in ((vitx, 1.1), (hf, 0.8)):
        assert entry.rate().value == pytest.approx(110 * ratio)
        assert entry.rate().low == pytest.approx(110 * entry.result.comparison.ratio.low)
    alike = [throughput("vitx:S/16"), throughput("hf:S/16")]  # their rate but for rounding
    assert entries.entries(alike)[0].rate() == Interval(100.0, 100.0, 100.0)
    assert charts.charts(alike)


def test_a_references_compiling_is_counted_beside_whatever_model_it_was_timed():
    more = {"compile_s": SECONDS, "saved": SAVED}
    results = [throughput("vitx:S/16"), throughput("hf:S/16"),
               compiled(reference=more, candidate=more)]  # fmt: skip
    models = [line[5].partition(":")[0] for line in report.break_even_table(results).body]
    assert models == ["timm", "vitx"]


def test_charts_of_two_versions_of_a_reference_are_two():
    newer = throughput(reference_name="hf:S/16")
    versions = newer.environment.versions | {"transformers": "0.1"}
    older = throughput(reference_name="hf:S/16", at={"versions": versions})
    assert len(ratio_charts([older, newer])) == 2


def test_every_model_has_a_colour_of_its_own():
    names = ["timm:a", "vitx:a", "vitx:b", *(f"python:f:{number}" for number in range(15))]
    colours = plots.colours(names)
    assert len(set(colours.values())) == len(names)
    assert colours["vitx:a"] == pictures.COLOURS["vitx"]


def test_the_best_batch_that_was_found_later_replaces_an_earlier_one():
    results = [throughput(batch=batch, batch_asked="auto") for batch in (8, 16)]
    (cell,) = entries.cells(results)
    assert cell.comparison.batch == 16
    *_, line = report.throughput_table(results).body
    assert line[START.index("batch")] == "16 (auto)"
    assert len(entries.cells([*results, throughput(batch=16)])) == 2


def test_what_belongs_to_no_stage_is_marked_where_it_is_much():
    parts = dict.fromkeys(breakdown.STAGES, 0.0) | {"mlp": 0.9, "remainder": 0.1}
    few = {"stages": parts | {"mlp": 0.98, "remainder": 0.02}}
    _, line = report.stage_table([throughput(reference=few, candidate={"stages": parts})]).body
    assert line[-1] == "10.0%, above 5%"
    unknown = throughput("hf:S/16", reference=few, candidate={"stages": None})
    reference, other = report.stage_table([unknown]).body
    assert reference[-1] == "2.0%"
    assert other[6] == "its modules do not have timm's names"


def test_a_mean_stands_beside_the_rate_of_the_same_run():
    """Also where only some runs of a reference have one."""
    mean = {"mean_images_per_s": 90.0}
    results = [throughput(), throughput("hf:S/16", ratio=0.8, reference=mean, candidate=mean)]
    reference, candidate = report.mean_table(results).body
    assert reference[-3:] == ("100.0", "90.0", "-10.0%")
    assert candidate[5][:7] == "hf:S/16"


def test_results_of_other_threads_never_replace_each_other():
    results = [speed(at={"threads": threads, "cores": 2}) for threads in (2, 1)]
    assert len(tables.speeds(results)) == 2
    assert [pages.machine(made).endswith("1 thread)") for made in results] == [False, True]


def test_results_of_other_settings_are_never_ranked_together():
    versions = throughput().environment.versions | {"timm": "9.0"}
    slow = timing.TimingConfig(pair_s=1.0)
    others = [throughput(at={"affinity": 0}), throughput(at={"versions": versions}),
              throughput(config=slow), throughput(protocol=0), throughput(origin="a"),
              throughput(origin="b")]  # fmt: skip
    assert len(entries.cells([throughput(), throughput(), *others])) == 7
    results = [throughput(), throughput(at={"threads": 1}, rate=60.0)]
    assert [line[0] for line in report.settings_table(results).body] == ["1", "2"]
    places = [line[0] for line in report.throughput_table(results).body]
    assert places == ["1", "1", "2", "2"]
    assert len(ratio_charts(results)) == 2


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Rendering into a folder of the test."""
    folder = tmp_path / "results"
    monkeypatch.setattr(render, "RESULTS", folder)
    monkeypatch.setattr(render, "CHARTS", folder / "charts")
    monkeypatch.setattr(render, "FIGURE", folder / "speed.svg")
    monkeypatch.setattr(render, "PAGE", folder / "TABLES.md")
    monkeypatch.setattr(render, "READMES", (tmp_path / "README.md",))
    (tmp_path / "README.md").write_text("a\n<!-- table:phases -->\n<!-- end -->\nb\n")
    return folder


def test_charts_of_results_that_were_replaced_are_removed(tmp_path, elsewhere):
    (elsewhere / "charts").mkdir(parents=True)
    (elsewhere / "charts" / "throughput-old.svg").write_text("")
    (elsewhere / "some.jsonl").write_text(f"{encode(throughput())}\n{encode(speed())}\n")
    render.main([])
    drawn = {path.stem for path in elsewhere.glob("charts/*.svg")}
    assert len(drawn) == len(charts.DRAWN)
    page = (elsewhere / "TABLES.md").read_text()
    assert {name for name in drawn if f"](charts/{name}.svg)" in page} == drawn
    assert "](speed.svg)" in page
    for line in page.splitlines():
        if line.startswith("- ["):  # every link of the contents has its heading
            assert f"\n## {line[3:].partition(']')[0]}\n" in page
    assert (tmp_path / "README.md").read_text() == (
        "a\n<!-- table:phases -->\nNot measured yet.\n<!-- end -->\nb\n"
    )


def test_keeping_runs_is_all_or_nothing(tmp_path, elsewhere, monkeypatch):
    run, other = tmp_path / "20261129-000000-full", tmp_path / "other" / "20261129-000000-full"
    for folder in (run, other):
        folder.mkdir(parents=True)
        (folder / "results.jsonl").write_text(encode(throughput()) + "\n")
    with pytest.raises(ValueError, match="two of the folders to keep are called 20261129-000000"):
        render.main(["--keep", str(run), str(other)])
    (other / "results.jsonl").write_text('{"schema": 2, "kind": "throughput"}\n')
    renamed = other.rename(tmp_path / "changed")
    with pytest.raises(ValueError, match="line 1 is no whole result of kind throughput"):
        render.main(["--keep", str(run), str(renamed)])
    with pytest.raises(ValueError, match="--out goes with --files"):
        render.main(["--out", str(tmp_path)])
    with pytest.raises(ValueError, match="--out does not go with --pack"):
        render.main([str(run / "results.jsonl"), "--pack", "x", "--out", str(tmp_path)])
    monkeypatch.setattr(render.verdicts, "speed_figure", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        render.main(["--keep", str(run)])
    assert not elsewhere.exists()


def test_utilisation_is_shown_beside_the_peak():
    def cells(*changes):
        used = throughput().comparison.candidate.utilisation
        results = [throughput(candidate={"utilisation": replace(used, **each)}) for each in changes]
        entry = entries.Entry("a", "candidate", 1, results)
        return report._utilisation(entry), report._peak(entry)

    unsteady = {"mfu": None, "why": "unsteady", "data_sheet": 989e12}
    assert cells({}) == ("45%", "2 to 2.1")
    assert cells(unsteady) == ("unsteady", "2 to 2.1, data sheet 989")
    assert cells(unsteady, {"mfu": 0.5}, {"mfu": 0.4}) == (
        "45% (40% to 50%), 2 of 3 runs steady", "2 to 2.1",
    )  # fmt: skip
