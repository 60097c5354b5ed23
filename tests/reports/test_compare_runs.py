"""tools/compare_runs.py says where two runs part, by how much, and finds no difference in none."""

import json
import math
import sys
from functools import partial

import pytest
import tiny
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from samples import pixels

from tetdist.apps.reports import compare, runs_table, style


@pytest.fixture
def run_tool(tool):
    return partial(tool, "compare_runs")


def train_line(step, **values):
    line = {"kind": "train", "step": step, "time": 1.0, "phase": 0, "loss": 1 / step, "lr": 0.1}
    return line | {"samples_per_s": 1.0, "data_wait": 1.0} | values


def val_line(step, **values):
    line = {"kind": "val", "step": step, "time": 1.0, "top1": 50.0, "seconds": 1.0}
    return line | {"per_timestep_top1": [40.0, 50.0], "firing_rate": {"a.sn": 0.25}} | values


def lines():
    """Ten steps with an evaluation at every fifth."""
    return [
        line
        for step in range(1, 11)
        for line in ([train_line(step), val_line(step)] if step % 5 == 0 else [train_line(step)])
    ]


def write_lines(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def make_run(folder, changes=None):
    """A run folder whose lines of some (kind, step) have other values; None: without the line."""
    changed = []
    for line in lines():
        change = (changes or {}).get((line["kind"], line["step"]), {})
        if change is not None:
            changed.append(line | change)
    write_lines(folder / "metrics.jsonl", changed)
    configuration = {"name": folder.name, "seed": 0, "phases": [{"epochs": 2, "timesteps": 4}]}
    (folder / "config.yaml").write_text(yaml.safe_dump(configuration))
    return folder


def row(text, start):
    (line,) = [line for line in text.splitlines() if line.strip().startswith(f"{start} ")]
    return line.split()


# --- metrics --------------------------------------------------------------------------------------


def test_what_only_the_clock_changes_is_the_same(run_tool, tmp_path):
    a = make_run(tmp_path / "a")
    clock = {"time": 2.0, "samples_per_s": 3.0, "data_wait": 4.0}
    b = make_run(tmp_path / "b", {("train", 3): clock, ("val", 5): {"time": 9.0, "seconds": 9.0}})
    status, printed, _ = run_tool(a, b)
    assert status == 0
    assert "Metrics: the same in 12 lines that both have." in printed
    assert printed.endswith("The runs are the same.\n")
    assert "train: 10 lines, step 1 to 10; val: 2 lines, step 5 to 10" in printed
    # Another name is no difference of the runs.
    assert "Configuration: 1 key differs." in printed
    assert row(printed, "name") == ["name", "a", "b"]


def test_where_they_part_and_by_how_much(run_tool, tmp_path):
    a = make_run(tmp_path / "a")
    bit = math.nextafter(1 / 4, 1)
    b = make_run(
        tmp_path / "b",
        {
            ("train", 4): {"loss": bit},
            ("train", 7): {"loss": 2 / 7, "lr": 0.2},
            ("val", 10): {
                "per_timestep_top1": [40.0, 25.0],
                "firing_rate": {"a.sn": 0.26, "b.sn": 1.0},
            },
        },
    )
    status, printed, _ = run_tool(a, b, "--json", tmp_path / "result.json")
    assert status == 1
    assert "Metrics: they first differ at step 4." in printed
    first, over_all = printed.split("Over all common steps:")
    assert row(first, "train/loss") == ["train/loss", "0.25", "0.25000000000000006", "2.2e-16"]
    assert row(over_all, "train/loss") == ["train/loss", "0.5", "7", "4", "2", "of", "10", "steps"]
    assert row(over_all, "train/lr")[1:4] == ["0.5", "7", "7"]
    assert row(over_all, "val/per_timestep_top1.t2")[1:4] == ["0.5", "10", "10"]
    assert row(over_all, "val/firing_rate.b.sn")[1:] == ["inf", "10", "10", "1", "of", "1", "step"]
    assert "bitwise identical: train/phase, val/top1, val/per_timestep_top1.t1\n" in over_all
    assert printed.endswith("The runs differ.\n")

    result = json.loads((tmp_path / "result.json").read_text())
    assert result["same"] is False
    assert result["first"]["step"] == 4
    assert result["first"]["kind"] == "train"
    (value,) = result["first"]["values"]
    assert (value["key"], value["a"], value["b"]) == ("loss", 0.25, bit)
    keys = {(key["kind"], key["key"]): key for key in result["keys"]}
    assert keys["val", "firing_rate.a.sn"]["largest"] == pytest.approx(0.01 / 0.26)
    assert keys["val", "firing_rate.b.sn"]["largest"] == "Infinity"
    assert keys["train", "phase"]["largest"] == 0
    assert result["configuration"] == [{"key": "name", "a": "a", "b": "b"}]
    assert result["samples"] is None


def test_an_evaluation_may_be_the_first_to_differ(run_tool, tmp_path):
    a = make_run(tmp_path / "a")
    b = make_run(tmp_path / "b", {("val", 5): {"top1": 55.0}, ("train", 8): {"loss": 1.0}})
    status, printed, _ = run_tool(a, b)
    assert status == 1
    assert "Metrics: they first differ at step 5." in printed
    assert row(printed.split("Over all")[0], "val/top1") == ["val/top1", "50.0", "55.0", "0.091"]


def test_the_tolerance_decides_what_is_different(run_tool, tmp_path):
    a = make_run(tmp_path / "a")
    b = make_run(tmp_path / "b", {("train", 2): {"loss": 0.5005}, ("train", 3): {"loss": 0.333}})
    for tolerance, status, first in (("0", 1, 2), ("0.0009995", 1, 3), ("0.0011", 0, None)):
        found, printed, _ = run_tool(a, b, "--tolerance", tolerance, "--json", tmp_path / "r.json")
        assert found == status
        result = json.loads((tmp_path / "r.json").read_text())
        assert (result["first"] and result["first"]["step"]) == first
    # What is within the tolerance is shown nevertheless.
    assert row(printed, "train/loss")[1:5] == ["0.001", "3", "-", "0"]
    assert "The runs are the same within 0.0011." in printed
    c = make_run(tmp_path / "c", {("val", 5): {"top1": None}})
    assert run_tool(a, c, "--tolerance", 9)[0] == 1


def test_what_is_not_finite(run_tool, tmp_path):
    values = {"loss": "NaN", "grad_norm": "Infinity"}
    a = make_run(tmp_path / "a", {("train", 6): values})
    assert run_tool(a, make_run(tmp_path / "b", {("train", 6): values}))[0] == 0
    for name, other in (("c", {"loss": 1.0}), ("d", {"grad_norm": "-Infinity"})):
        status, printed, _ = run_tool(a, make_run(tmp_path / name, {("train", 6): values | other}))
        assert status == 1
        (key,) = other
        assert row(printed.split("Over all")[0], f"train/{key}")[-1] == "inf"


def test_steps_that_only_one_has(run_tool, tmp_path):
    a = make_run(tmp_path / "a")
    without = {("train", step): None for step in (2, 9)}
    b = make_run(tmp_path / "b", without | {("val", 10): None})
    status, printed, _ = run_tool(b, a, "--tolerance", 1, "--json", tmp_path / "r.json")
    assert status == 1
    assert "Metrics: the same within 1 in 9 lines that both have." in printed
    assert row(printed, "train") == ["train", "only", "b", "2,", "9"]
    assert row(printed, "val") == ["val", "only", "b", "10"]
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["only"] == {"train": {"a": [], "b": [2, 9]}, "val": {"a": [], "b": [10]}}

    write_lines(b / "metrics.jsonl", [train_line(11)])
    _, printed, _ = run_tool(a, b)
    assert "Metrics: the runs have no common step." in printed
    assert "only a  1, 2, ... 10 (10 steps)" in printed


@given(st.floats(), st.floats() | st.integers())
@example(1.7e308, -1.7e308)
@example(1.0, 10**400)
def test_relative_difference(a, b):
    found = compare.relative_difference(a, b)
    assert found == compare.relative_difference(b, a)
    assert (found == 0) == (a == b or (math.isnan(a) and math.isnan(b)))
    if math.isfinite(a) and abs(b) <= sys.float_info.max:
        assert found <= 2
    else:
        assert found in (0, math.inf)


# --- what is read ---------------------------------------------------------------------------------


def test_files_alone_torn_and_empty(run_tool, tmp_path):
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    file = b / "metrics.jsonl"
    with file.open("a") as stream:
        stream.write('{"kind": "train", "st')
    status, printed, _ = run_tool(a / "metrics.jsonl", file)
    assert status == 0
    assert "Configuration" not in printed
    status, printed, _ = run_tool(a, file)
    assert status == 0
    assert "Configuration: only a has one; not compared." in printed

    file.write_text("")
    status, printed, _ = run_tool(a, b)
    assert status == 1
    assert f"b  {b}  no metrics" in printed
    assert "Metrics: the runs have no common step." in printed
    assert run_tool(b, b)[0] == 0


def test_mistakes_end_in_one_sentence(run_tool, tmp_path):
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    empty = tmp_path / "empty"
    empty.mkdir()

    def mistaken(*arguments):
        status, _, errors = run_tool(*arguments)
        assert status == 2
        assert errors.count("\n") == 1
        return errors

    expected = f"error: {empty} is not a run folder, because it has no metrics.jsonl"
    assert expected in mistaken(a, empty)
    assert f"there is no {tmp_path}/none; give a run folder" in mistaken(tmp_path / "none", a)
    assert "result.json: name a file in a folder" in mistaken(
        a, b, "--json", empty / "none/result.json"
    )
    file = b / "metrics.jsonl"
    file.write_text("{\n" + json.dumps(train_line(1)) + "\n")
    assert f"{file}: line 1 is damaged" in mistaken(a, b)
    for kinds_and_steps in (("train", 5), ("train", 3)), (("val", 5), ("train", 5), ("val", 5)):
        write_lines(file, [{"kind": kind, "step": step} for kind, step in kinds_and_steps])
        kind, step = kinds_and_steps[-1]
        message = f"{file}: step {step} of {kind} follows step 5, but steps must ascend"
        assert message in mistaken(a, b)
        assert message in mistaken(file, a)
    (b / "config.yaml").write_text("a: [")
    assert f"{b}/config.yaml is damaged" in mistaken(a, b)
    for text in ("-1", "nan", "inf", "much"):
        status, _, errors = run_tool(a, a, f"--tolerance={text}")
        assert status == 2
        assert "must be a number of at least 0" in errors
    assert run_tool(a)[0] == 2


# --- samples --------------------------------------------------------------------------------------


def sample_lines(step, *micro_batches, changed=-1):
    return [
        {"step": step, "ids": ids, "crc32": [id_ * 7 + (id_ == changed) for id_ in ids]}
        for ids in micro_batches
    ]


def write_samples(run, *ranks):
    for rank, values in enumerate(ranks):
        write_lines(run / f"samples-{rank}.jsonl", values)


@pytest.fixture
def sampled(tmp_path):
    """Two runs; the first saw, on one process, samples 0 to 3, then 4 to 7, then 8 to 11."""
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    write_samples(
        a,
        sample_lines(1, [0, 1], [2, 3])
        + sample_lines(2, [4, 5], [6, 7])
        + sample_lines(3, [8, 9], [10, 11]),
    )
    return a, b


def test_the_same_samples_on_two_processes(run_tool, sampled):
    a, b = sampled
    write_samples(
        b,
        sample_lines(1, [1, 0]) + sample_lines(2, [5, 4]) + sample_lines(3, [9], [8]),
        sample_lines(1, [3, 2]) + sample_lines(2, [7, 6]) + sample_lines(3, [10], [11]),
    )
    (b / "samples-of-mine.jsonl").write_text("notes\n")
    with (b / "samples-1.jsonl").open("a") as stream:
        stream.write('{"step": 4, "i')
    status, printed, _ = run_tool(a, b)
    assert status == 0
    assert "Samples: the same at 3 steps." in printed


def test_after_a_resume_the_last_start_counts(run_tool, sampled):
    a, b = sampled
    # Killed within step 3 and continued from step 1; killed again, within step 3, and continued
    # from step 2.
    write_samples(
        b,
        sample_lines(1, [0, 1], [2, 3])
        + sample_lines(2, [4, 5], [6, 8])
        + sample_lines(3, [8, 9])
        + sample_lines(2, [4, 5], [6, 7])
        + sample_lines(3, [8, 9])
        + sample_lines(3, [8, 9], [10, 11]),
    )
    assert run_tool(a, b)[0] == 0


def test_the_first_step_with_other_samples(run_tool, sampled, tmp_path):
    a, b = sampled
    write_samples(
        b,
        sample_lines(1, [0, 1], [2, 3])
        + sample_lines(2, [4, 20], [6, 7], changed=6)
        + sample_lines(3, [8, 9], [10, 10])
        + sample_lines(4, [12]),
    )
    status, printed, _ = run_tool(a, b, "--json", tmp_path / "r.json")
    assert status == 1
    assert "Samples: they first differ at step 2, in total at 2 of 3 steps. At step 2:" in printed
    assert "  only in a: 1 sample (5)\n" in printed
    assert "  only in b: 1 sample (20)\n" in printed
    assert "  with different content: 1 sample (6)\n" in printed
    assert "  only b recorded step 4\n" in printed
    assert json.loads((tmp_path / "r.json").read_text())["samples"] == {
        "common": 3,
        "different": [2, 3],
        "only": {"a": [], "b": [4]},
        "first": {"only": {"a": [5], "b": [20]}, "content": [6]},
    }


def test_a_step_whose_samples_one_run_alone_recorded(run_tool, sampled):
    a, b = sampled
    write_samples(b, sample_lines(1, [0, 1], [2, 3]) + sample_lines(2, [4, 5], [6, 7]))
    status, printed, _ = run_tool(a, b)
    assert status == 1
    assert "Samples: the same at 2 steps.\n  only a recorded step 3\n" in printed


def test_samples_of_one_run_only_and_damaged(run_tool, sampled):
    a, b = sampled
    status, printed, _ = run_tool(b, a)
    assert status == 0
    assert "Samples: only b recorded them; not compared." in printed
    for damaged in ('{"step": 1, "ids": [1, 2], "crc32": [1]}', '{"step": 1}', "[]", "{"):
        (b / "samples-0.jsonl").write_text(damaged + "\n")
        status, _, errors = run_tool(a, b)
        assert status == 2
        assert f"{b}/samples-0.jsonl: line 1 is damaged" in errors


# --- several --------------------------------------------------------------------------------------


def make_series(folder, loss, seed, top1):
    """A run folder with an evaluation an epoch."""
    lines = []
    for epoch, value in enumerate(top1, start=1):
        common = {"step": 10 * epoch, "time": 0.0, "epoch": float(epoch), "phase": 0}
        lines.append(common | {"kind": "train", "loss": 1 / epoch, "samples_per_s": 100.0 * epoch})
        lines.append(
            common
            | {"kind": "val", "top1": value, "loss": 2 / epoch, "per_timestep_top1": [1.0, value]}
        )
    write_lines(folder / "metrics.jsonl", lines)
    values = {"name": folder.name, "seed": seed, "loss": {"kind": loss}, "log_every": seed + 1}
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    return folder


@pytest.fixture
def series(tmp_path):
    return [
        make_series(tmp_path / "tet_0", "tet", 0, [50.0, 70.0]),
        make_series(tmp_path / "tet_1", "tet", 1, [60.0, 74.0]),
        make_series(tmp_path / "sdt_0", "sdt", 0, [65.0, 60.0]),
    ]


def test_table_has_the_moving_average_of_runs_with_one(run_tool, tmp_path):
    fast = {("train", 3): {"samples_per_s": 9.0}}  # of ten lines one, so that the median is 1
    plain, averaged, other = (make_run(tmp_path / name, fast) for name in ("a", "b", "c"))
    reached = [{"kind": "val_ema", "step": step, "top1": 10.0 * step} for step in (7, 5)]
    with (averaged / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(line | {"time": 1.0}) + "\n" for line in reached)
    status, printed, _ = run_tool(plain, averaged, other)
    assert status == 0
    assert "EMA top-1 %  EMA best" in printed
    assert row(printed, "a")[-3:] == ["1", "-", "-"]
    assert row(printed, "b")[-3:] == ["1", "50.00", "70.00"]
    assert "EMA" not in run_tool(plain, other, plain)[1]


def test_several_runs_in_one_table(run_tool, series, tmp_path):
    status, printed, _ = run_tool(*series, "--json", tmp_path / "all.json")
    assert status == 0
    each, groups = printed.split("group", 1)
    assert row(each, "run")[-1] == "loss.kind"
    assert " ".join(row(each, "tet_1")) == "tet_1 2 74.00 74.00 2 1.0000 0.5000 200 tet"
    assert " ".join(row(each, "sdt_0")) == "sdt_0 2 60.00 65.00 1 1.0000 0.5000 200 sdt"
    # (70 + 74) / 2, and the standard deviation of a sample: 2.83
    expected = "loss.kind=tet 2 72.00 +- 2.83 72.00 +- 2.83 1.0000 +- 0.0000"
    assert " ".join(row(groups, "loss.kind=tet")) == expected
    assert " ".join(row(groups, "sdt_0")) == "sdt_0 1 60.00 65.00 1.0000"
    result = json.loads((tmp_path / "all.json").read_text())
    assert [run["best_epoch"] for run in result["runs"]] == [2.0, 2.0, 1.0]
    assert result["groups"][0]["runs"] == ["tet_0", "tet_1"]
    assert result["groups"][0]["top1_deviation"] == pytest.approx(8**0.5)


def test_runs_without_configuration_or_evaluation(run_tool, tmp_path):
    diverged = {("val", 10): {"loss": "NaN"}}
    runs = [make_run(tmp_path / name, diverged) for name in "ab"]
    write_lines(tmp_path / "c.jsonl", [])
    status, printed, _ = run_tool(*runs, tmp_path / "c.jsonl")
    assert status == 0
    each, groups = printed.split("group", 1)
    assert row(each, str(tmp_path / "c.jsonl"))[1:] == ["-"] * 7
    assert row(groups, str(tmp_path / "c.jsonl"))[1:] == ["1", "-", "-", "-"]
    expected = "2 50.00 +- 0.00 50.00 +- 0.00 nan +- nan"
    assert " ".join(row(groups, "equal except for the seed")[5:]) == expected


def test_all_lines_of_training_are_kept_for_curves_alone(tmp_path):
    run = make_run(tmp_path / "a")
    (table,), (drawn,) = (runs_table.read_records([run], curves=one) for one in (False, True))
    assert table.result() == drawn.result()
    assert [len(record.of_kind("train")) for record in (table, drawn)] == [2, 10]


def test_figure_of_several_runs(run_tool, series, tmp_path):
    out = tmp_path / "all.png"

    def colours(*runs):
        run_tool(*runs, "--plot", out)
        return [pixels(out, colour) for colour in style.SERIES[:3]]

    first, second, third = colours(*series)  # two groups
    assert min(first, second) > 500
    assert third == 0
    assert min(colours(*series[1:])[:2]) > 500  # a pair
    assert colours(*reversed(series)) == [first, second, third]


def test_a_studys_folder(run_tool, tmp_path):
    """Runs that begin with runs of their own seed, beside logs and a report, by two versions."""
    from tetdist.config.loading import parse

    study = tmp_path / "study"
    for entry in ("tet", "tit"):
        for seed in (0, 1):
            run = make_series(study / f"{entry}-seed{seed}", "tet", seed, [50.0, 70.0 + seed])
            changes = {"name": run.name, "seed": seed, "data.root": "data"}
            changes["phases.0.optimizer.betas"] = [0.5, 0.5 + seed / 4]  # SGD has none
            if entry == "tit":
                changes["init_checkpoint"] = f"{study}/tet-seed{seed}/checkpoints/best"
            written = parse(tiny.changed(tiny.CONFIG, changes), "test").as_dict()
            if seed == 0:
                del written["data"]["roll"], written["loss"]["distillation"]
            (run / "config.yaml").write_text(yaml.safe_dump(written))
    (study / "logs").mkdir()
    (study / "report.md").write_text("# Report\n")

    status, printed, errors = run_tool(study)
    assert (status, errors) == (0, "")
    each, groups = printed.split("group", 1)
    assert row(each, "run")[-1] == "init_checkpoint"
    assert row(each, "tit-seed1")[-1] == "...eed1/checkpoints/best"
    assert row(groups, "tit")[:3] == ["tit", "2", "70.50"]
    assert row(groups, "tet")[:3] == ["tet", "2", "70.50"]
    status, same, errors = run_tool(*sorted(study.iterdir()))
    assert (status, same) == (0, printed)
    assert errors == "".join(
        f"skipped {study / name}: not a run\n" for name in ("logs", "report.md")
    )
    # Of the same names elsewhere, what they are called says where.
    other = make_series(tmp_path / "tet-seed0", "sdt", 0, [1.0])
    _, printed, _ = run_tool(study / "tet-seed0", study / "tet-seed1", other)
    assert row(printed.split("group")[1], str(other))[:3] == [str(other), "1", "1.00"]


def test_wrong_numbers_of_runs(run_tool, series, tmp_path):
    for arguments in (
        series[:1],
        [*series, "--tolerance", "1e-3"],
        [*series, "--plot", tmp_path / "all.pdf"],
        [*series, tmp_path / "none"],
    ):
        status, _, err = run_tool(*arguments)
        assert status == 2, arguments
        assert "error:" in err
