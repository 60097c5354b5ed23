"""The commands of tools/bench.py, on small networks."""

import json

import pytest
import tiny

from tetdist.apps.benchmarks import bench as step
from tetdist.apps.cli.bench import main


@pytest.mark.long
def test_a_step_is_timed_beside_the_relu_network(output_of, tmp_path):
    file = tmp_path / "result.json"
    small = "--model sew_resnet18 --size 64 --timesteps 2 --batch 2 --repeats 3"
    command = f"step {small} --modes blocks timesteps --json {file}"
    out = output_of("bench", *command.split())
    result = json.loads(file.read_text())
    names = [row["name"] for row in result["rows"]]
    assert names == ["relu", "tetdist, blocks", "tetdist, timesteps"]
    assert result["rows"][0]["ratio"] == 1
    for row in result["rows"]:
        assert row["images_per_s"] == pytest.approx(2 / row["seconds"])
        assert row["name"] in out
        assert f"{row['seconds']:.3f}" in out
    assert {"device", "threads", "torch", "python"} <= result["machine"].keys()


def test_a_network_without_a_relu_network_stands_alone(tmp_path):
    file = tmp_path / "result.json"
    command = "step --model spiking_convnet --timesteps 2 --repeats 1 --device cpu --json"
    script = tiny.PROJECT / "tools/bench.py"  # a new process: only what a command imports is there
    status, output = tiny.execute(tiny.python(script, *command.split(), file), tmp_path)
    assert status == 0, output
    (row,) = json.loads(file.read_text())["rows"]
    assert row["name"] == "tetdist, none"
    flag = f"--images-per-s {row['images_per_s']:.4g} (spiking_convnet, 28 pixels, fp32, 1 process"
    assert f"\nfor slurm: {flag}, T=2)\n" in output


def test_ratios_are_taken_round_by_round():
    """Something slows all contestants down in the second round."""
    seconds = {"relu": [1.0, 8.0, 2.0], "own": [2.0, 8.0, 8.0]}
    row = step.row_of("own", seconds, 4)
    assert (row["ratio"], row["seconds"], row["fastest"], row["images_per_s"]) == (2, 8, 2, 0.5)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["step", "--batch", "0"], "0 must be 1 or more"),
        (["step", "--json", "no/such/folder/x.json"], "--json"),
        (["loader", "--data", "tests/benchmarks"], "tests/benchmarks has no JPEG files"),
    ],
)
def test_wrong_flags_are_named_at_once(arguments, expected, capsys, monkeypatch):
    monkeypatch.chdir(tiny.PROJECT)
    try:
        status = main(arguments)
    except SystemExit as ended:
        status = ended.code
    assert status == 2
    assert expected in capsys.readouterr().err
