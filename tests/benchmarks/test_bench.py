"""The published commands of tools/bench.py and docs/make/performance.py, on small networks."""

import argparse
import contextlib
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from statistics import mean

import pytest
import timm
import tiny
import torch
from kernel_runs import randomize

from tetdist import models
from tetdist.apps.benchmarks import bench as benchmark
from tetdist.apps.benchmarks import data, scaling
from tetdist.apps.benchmarks.streaming import survivors
from tetdist.apps.cli.bench import main, parse_arguments, problem_of
from tetdist.apps.reports import style
from tetdist.apps.slurm.cluster import ClusterSection
from tetdist.apps.slurm.speed import Speed, speed_of
from tetdist.config import loading

BENCH = tiny.PROJECT / "tools" / "bench.py"
README_FIGURE = tiny.PROJECT / "docs" / "make" / "readme_figure.py"
PERFORMANCE = tiny.PROJECT / "docs" / "make" / "performance.py"


def run(*command, status=0, limit=240):
    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, timeout=limit
    )
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout if status == 0 else done.stderr


def bench(tmp_path, arguments, farm=None):
    """Its JSON, and what it printed; in a process that has torch already, if given a farm."""
    command = [BENCH, *arguments.split(), "--json", tmp_path / "result.json"]
    if farm is None:
        out = run(*command)
    else:
        ((status, out),) = farm.side_by_side(1, tiny.python(*command), tmp_path)
        assert status == 0, out
    return json.loads((tmp_path / "result.json").read_text()), out


def speed_that_the_plan_reads(file):
    """The speed of a run, on a CPU, of what was measured."""
    measured = json.loads(file.read_text())
    changes = {
        "name": "x",
        "data.root": "d",
        "model.name": measured["model"],
        "model.arguments": {},
        "data.image_size": measured["size"] or 28,
        "data.resize": None,
        "precision": measured["precision"],
    }
    config = loading.parse(tiny.changed(tiny.CONFIG, changes), "x")
    return speed_of(config, ClusterSection(gpus_per_node=0), None, benchmark=str(file))


@pytest.mark.parametrize(
    ("arguments", "peers"),
    [
        ("--model spiking_convnet --timesteps 40", []),
        pytest.param(
            "--model sew_resnet18 --size 33 --timesteps 8",
            ["spikingjelly, single step"],
            marks=pytest.mark.long,
        ),
    ],
)
def test_a_step_of_a_stream_beside_other_ways(arguments, peers, farm, tmp_path):
    """A step costs what a pass at T = 1 does, and not what the whole pass does."""
    found, out = bench(tmp_path, f"stream {arguments} --threads 1 --repeats 9", farm)
    ratios = {row["name"]: row["ratio"] for row in found["rows"]}
    whole = f"whole pass, T={found['timesteps']}"
    graphs = ["onnxruntime, a step", "onnxruntime, a step in int8"]
    assert list(ratios) == ["T=1 pass", "stream, a step", whole, *peers, *graphs]
    assert ratios["T=1 pass"] == 1
    assert ratios["stream, a step"] < 0.8 * ratios[whole]
    assert all(name in out for name in ratios)
    assert found["threads"] == 1


def test_a_batch_that_decided_samples_leave(farm, tmp_path):
    """It takes less time than the whole pass of all samples does."""
    stream = "stream --model spiking_convnet_dvs --timesteps 10 --batch 16 --exits 1.75"
    found, out = bench(tmp_path, f"{stream} --threads 1 --repeats 5", farm)
    ratios = {row["name"]: row["ratio"] for row in found["rows"]}
    assert ratios["stream with exits"] < 0.7 * ratios["whole pass, T=10"]
    assert ratios["onnxruntime with exits"] < 5 * ratios["onnxruntime, a step"]
    assert "stream with exits" in out


def test_samples_leave_after_the_mean_of_timesteps():
    assert survivors(64, 10, 1.75) == [64, 27, 12, 5, 2, 1]
    assert survivors(64, 4, 4.0) == [64] * 4
    assert survivors(64, 4, 1.0) == [64]
    assert survivors(64, 4, None) == []


@pytest.mark.long
def test_a_step_is_timed_against_others(tmp_path):
    small = "--model sew_resnet18 --size 64 --timesteps 2 --batch 2 --repeats 3"
    result, out = bench(tmp_path, f"step {small} --modes none,timesteps --spikingjelly eager")
    names = [row["name"] for row in result["rows"]]
    assert names == ["relu", "tetdist, none", "tetdist, timesteps", "spikingjelly, eager"]
    assert result["rows"][0]["ratio"] == 1
    for row in result["rows"]:
        assert row["images_per_s"] == pytest.approx(2 / row["seconds"])
        assert row["name"] in out
        assert f"{row['seconds']:.3f}" in out
        # Each under the setting that made it faster.
        assert row["waiting"] in ("asleep", "spinning")
    assert {"device", "threads", "torch", "python"} <= result["machine"].keys()
    speed = speed_that_the_plan_reads(tmp_path / "result.json")
    assert speed == Speed(result["rows"][1]["images_per_s"], timesteps=2, source="measured")


def test_ratios_are_taken_round_by_round():
    """Something slows all contestants down in the second round."""
    seconds = {"relu": [1.0, 8.0, 2.0], "own": [2.0, 8.0, 8.0]}
    row = benchmark._row("own", seconds, argparse.Namespace(batch=4), 1.0)
    assert (row["ratio"], row["seconds"], row["fastest"], row["images_per_s"]) == (2, 8, 2, 0.5)
    names = ("torchvision", "DALI's reader", "decoding alone")
    rates = dict.fromkeys(names, (100.0, 10.0, 50.0)) | {"tetdist": (200.0, 10.0, 200.0)}
    found = data.row("tetdist", rates)
    assert (found["images_per_s"], found["fastest"], found["of_dali"]) == (200, 200, 2)


def test_several_processes_are_as_efficient_as_one_is_faster(monkeypatch):
    """Steps of 1 s alone, of 2 s side by side, and of 4 s together."""
    groups = contextlib.nullcontext((["a", "b"], ["c", "d"]))
    monkeypatch.setattr(scaling, "processes", lambda _: groups)
    seconds = {"a": 1.0, "ab": 2.0, "cd": 4.0}
    monkeypatch.setattr(scaling, "together", lambda workers, _: seconds["".join(workers)])
    keys = ("model", "size", "timesteps", "precision", "device", "engine")
    options = dict.fromkeys(keys) | {"processes": 2, "repeats": 3, "steps": 1}
    result = scaling.measure(argparse.Namespace(**options, batch=4, accumulation=2))
    rows = [(r["efficiency"], r["of_apart"], r["images_per_s"]) for r in result["rows"]]
    assert rows == [(1, 2, 8), (0.5, 1, 8), (0.25, 0.5, 4)]
    assert (result["images_per_s"], result["processes"]) == (4, 2)


def test_bytes_are_kept_once_and_parameters_not_at_all():
    model, x = torch.nn.Linear(3, 5), torch.ones(7, 3, requires_grad=True)
    saved = benchmark.SavedBytes(model)
    with saved.counting():
        y = (model(x) + model(x)).square()  # of `x` both layers keep the same
    assert saved.now == saved.most == 4 * 7 * (3 + 5)
    y.sum().backward()
    assert (saved.now, saved.most) == (0, 4 * 7 * (3 + 5))


@pytest.mark.long
def test_an_evaluation_is_timed(tmp_path):
    result, out = bench(
        tmp_path,
        "step --model vggsnn --timesteps 2 --batch 1 --evaluate --repeats 1 --precision bf16",
    )
    assert [row["name"] for row in result["rows"]] == ["relu", "tetdist, none"]
    assert "evaluation" in out
    # The plan is one of training.
    assert "images_per_s" not in result


@pytest.mark.long
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_memory_is_what_the_documentation_promises(tmp_path, precision):
    result, _ = bench(
        tmp_path, f"memory --model sew_resnet34 --size 64 --timesteps 2,4 --precision {precision}"
    )
    held = {(row["name"], row["timesteps"]): row["after_forward_mib"] for row in result["rows"]}
    for timesteps in (2, 4):
        # The convolutions' outputs, and spikes in bytes; ReLU keeps its own output as well.
        assert held["tetdist, none", timesteps] < 0.65 * held["relu", timesteps]
        assert held["tetdist, blocks", timesteps] < 0.25 * held["tetdist, none", timesteps]
    assert held["tetdist, none", 4] < 2 * held["tetdist, none", 2]


def test_a_model_without_a_relu_network_stands_alone(tmp_path):
    file = tmp_path / "result.json"
    command = "memory --model spiking_convnet --timesteps 2 --json"
    assert main([*command.split(), str(file)]) == 0
    result = json.loads(file.read_text())
    assert {row["name"].split(",")[0] for row in result["rows"]} == {"tetdist"}


@pytest.mark.long
@pytest.mark.parametrize("engine", ["torch", "deepspeed"])
def test_processes_are_timed_alone_apart_and_together(tmp_path, engine):
    result, out = bench(
        tmp_path, f"scaling --model spiking_convnet --engine {engine} --repeats 2 --accumulation 3"
    )
    alone, apart, together = result["rows"]
    assert (alone["name"], apart["name"], together["name"]) == ("alone", "apart", "together")
    assert alone["efficiency"] == apart["of_apart"] == 1
    for row, count in ((alone, 1), (apart, 2), (together, 2)):
        assert row["images_per_s"] == pytest.approx(count * 3 * 4 / row["seconds"])
    speed = speed_that_the_plan_reads(tmp_path / "result.json")
    assert isinstance(speed, Speed)
    assert speed.images_per_s == pytest.approx(together["images_per_s"] / 2)
    assert "averaging" in out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["step", "--model", "resnet99"], "'resnet99' is not a spiking model"),
        (["step", "--model", "resnet34"], "'resnet34' is not a spiking model"),
        (["step", "--model", "vggsnn", "--size", "32"], "vggsnn takes 48 pixels only, not 32"),
        (["memory", "--size", "32"], "--size: 32 leaves the last"),
        (["step", "--model", "vggsnn", "--spikingjelly", "eager"], "spikingjelly has no vggsnn"),
        (["step", "--json", "."], "--json"),
        (["step", "--modes", "none,all"], "'all' is not one of none, blocks, timesteps"),
        (["step", "--batch", "0"], "0 must be 1 or more"),
        (["stream", "--exits", "0"], "--exits: 0.0 is not between 1 and --timesteps 4"),
        (["memory", "--timesteps", "2,x"], "'x' is not a whole number"),
        (["scaling", "--json", "no/such/folder/x.json"], "--json"),
        (["step", "--json", "no/such/folder/x.json"], "--json"),
    ],
)
def test_wrong_flags_are_named_at_once(arguments, expected, capsys):
    try:
        status = main(arguments)
    except SystemExit as ended:
        status = ended.code
    assert status == 2
    assert expected in capsys.readouterr().err


def test_33_pixels_are_enough_for_imagenets_networks():
    assert problem_of(parse_arguments(["memory", "--size", "33"])) is None


def test_the_report_is_made_and_goes_on_after_a_stop(tmp_path, monkeypatch):
    """Of the results that the project has: its page, and after a stop what is missing alone."""
    recorded = json.loads((tiny.PROJECT / "docs/performance/results.json").read_text())
    measured = []

    def measure(command, **_):
        assert command[:2] == [sys.executable, str(BENCH)]
        file = Path(command[-1])
        measured.append(file.stem)
        file.write_text(json.dumps(recorded.get(file.stem, recorded["vggsnn-fp32"])))
        return argparse.Namespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", measure)
    make = runpy.run_path(str(PERFORMANCE))["main"]
    report, results = tmp_path / "performance.md", tmp_path / "results"
    for again in (False, True):
        assert make(["--results", str(results), "--output", str(report)]) == 0
        assert (measured == ["batch-2-fp32"]) if again else (recorded.keys() <= set(measured))
        measured.clear()
        (results / "batch-2-fp32.json").unlink()
    page = (tiny.PROJECT / "docs/performance.md").read_text().partition("\n## The GPU path")[0]
    # Some rows about other networks are of later measurements.
    page = re.sub("## Other networks.*?(?=## Scaling with T)", "", page, flags=re.DOTALL)
    text, rows = report.read_text(), [line for line in page.splitlines() if line[:1] == "|"]
    assert len(rows) > 50
    assert [row for row in rows if row not in text] == []
    for figure in ("timesteps.png", "batch.png"):
        assert (report.with_suffix("") / figure).stat().st_size > 10_000
        assert f"performance/{figure}" in text


def test_readmes_figure_shows_the_numbers_that_are_in_the_project(monkeypatch, capsys):
    drawn = []
    monkeypatch.setattr(style, "save", lambda figure, _: drawn.append(figure))
    draw = runpy.run_path(str(README_FIGURE))["main"]
    assert draw([]) == 0
    study, performance = (
        json.loads((tiny.PROJECT / "docs" / file).read_text())
        for file in ("results/early_exit_dvs128_objects.json", "performance/results.json")
    )
    exits, costs = drawn[0].axes
    assert exits.get_legend() is costs.get_legend() is None
    points = [line for line in exits.lines if line.get_marker() == "o"]
    for entry, label, point, text in zip(
        ("sdt", "tet"), ("usual loss", "TET"), points[::-1], exits.texts[::-1], strict=True
    ):
        exit_of = [run["chosen_exit"] for run in study["runs"] if run["entry"] == entry]
        x, y = (mean(one[key] for one in exit_of) for key in ("mean_timesteps", "top1"))
        assert [point.get_xdata().item(), point.get_ydata().item()] == pytest.approx([x, y])
        assert text.get_text() == f"{label}: {y:.1f} % after {x:.2f} timesteps"
    names = ("spikingjelly, eager", "relu", "tetdist, none", "tetdist, blocks")
    times = {row["name"]: row["ratio"] for row in performance["step-bf16"]["rows"]}
    rows = [row for row in performance["memory-bf16"]["rows"] if row["timesteps"] == 4]
    memory = {row["name"]: row["at_most_mib"] for row in rows}
    assert [bar.get_width() for bar in costs.patches] == pytest.approx(
        [values[name] / values["relu"] for values in (times, memory) for name in names]
    )
    assert draw(["--study", "/nowhere"]) == 2
    assert "No such file" in capsys.readouterr().err


@pytest.mark.long
def test_batches_are_timed_against_other_pipelines(tmp_path):
    result, out = bench(
        tmp_path, "data --images 48 --size 32 --batch 8 --batches 2 --repeats 2 --epochs 2"
    )
    names = [row["name"] for row in result["rows"]]
    assert names == ["torchvision", "DALI's reader", "tetdist", "decoding alone"]
    for row in result["rows"]:
        assert row["fastest"] >= row["images_per_s"] > 0
        assert row["name"] in out
    assert result["rows"][0]["of_torchvision"] == result["rows"][1]["of_dali"] == 1
    assert len(result["memory_mib"]) == 2
    assert "JPEG" in run(BENCH, "data", "--data", tmp_path, status=1)


@pytest.mark.parametrize("name", ["qkformer_10_384", "sdt_8_384"])
def test_transformers_of_spikingjellys_neurons_are_ours(name):
    """With the same weights in the same order, in a small size: logits at every timestep."""
    from spikingjelly.activation_based import functional

    from tetdist.apps.benchmarks import contestants, peers

    make = contestants.halving_neuron
    small = {"widths": (8, 16, 24), "depths": (1, 1, 1), "heads": 2}
    theirs: torch.nn.Module
    if name == "qkformer_10_384":
        theirs = peers.qkformer(*small.values(), make)
    else:
        small = {"channels": 32, "depth": 1}
        theirs = peers.spike_driven_transformer(32, 1, make)
    torch.manual_seed(0)
    ours = timm.create_model(name, timesteps=3, **small).double().eval()
    randomize(ours)
    if name.startswith("qkformer"):
        with torch.no_grad():
            for key, value in ours.named_parameters():
                if key.endswith("norm.bias"):
                    value += 1  # so that spikes come through to the end
    state = {key: value for key, value in theirs.state_dict().items() if value.is_floating_point()}
    theirs.load_state_dict(
        dict(zip(state, ours.state_dict().values(), strict=True)), strict=False, assign=True
    )
    functional.set_step_mode(theirs, "m")
    x = torch.randn(2, 3, 48, 48, dtype=torch.float64)
    with torch.no_grad():
        expected = ours(x, per_timestep=True)
        assert len(expected.flatten(1).unique(dim=0)) == 3
        torch.testing.assert_close(theirs.double().eval()(x.expand(3, *x.shape)), expected)


def test_whether_there_is_a_network_of_spikingjellys():
    from tetdist.apps.benchmarks.contestants import has_spikingjelly_network

    found = {name for name in models.names() if has_spikingjelly_network(name)}
    assert {"sew_resnet34", "spiking_resnet50", "qkformer_10_768", "sdt_10_512"} <= found
    assert not {"spiking_resnet19", "vggsnn", "qkformer_4_384_cifar", "sdt_2_256_dvs"} & found
    assert "maxformer_10_512" not in found
