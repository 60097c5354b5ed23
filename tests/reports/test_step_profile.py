"""A profile names what took longest, tetdist's own passes among it, and changes no result."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
from tiny import Outcome

from tetdist.apps.reports.step_profile import Operation, as_table

Main = Callable[..., Outcome]


def table_of(run: Path) -> list[list[str]]:
    lines = (run / "profile" / "table.md").read_text().splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "|" in line]


def test_results_are_the_same_to_the_bit_and_own_passes_are_named(
    main: Main, tiny_config: Callable[..., Path], tmp_path: Path
) -> None:
    file = tiny_config({"execution": "fused", "max_steps": 7})
    assert main(file, "name=without").status == 0
    # Epochs are of 5 steps, and the profile ends with the first of them.
    outcome = main(file, "name=with", "profile.steps=[4,6]")
    assert outcome.status == 0, outcome.text
    runs = tmp_path / "runs"
    tiny.assert_same_run(runs / "without", runs / "with")
    assert "profile of steps 4 to 5: " in outcome.text

    head, _, *rows = table_of(runs / "with")
    assert head == ["operation", "calls a step", "ms a step", "%"]
    assert len(rows) == 21
    assert rows[-1][0].endswith("others")
    named = {row[0]: float(row[1]) for row in rows}
    # Four micro-batches a step, of a network with two neurons behind a norm.
    for half in ("forward", "backward"):
        assert named[f"tetdist FusedNormNeuron (nn/fast/fused.py), {half}"] == 8
    milliseconds = [float(row[2]) for row in rows[:-1]]
    assert milliseconds == sorted(milliseconds, reverse=True)
    assert sum(float(row[3]) for row in rows) == pytest.approx(100, abs=1.1)

    trace = json.loads(gzip.decompress((runs / "with/profile/trace.json.gz").read_bytes()))
    steps = {event["name"] for event in trace["traceEvents"] if "step" in event["name"]}
    assert {"step 4", "step 5"} <= steps
    assert "step 6" not in steps


def test_a_table_names_kernels_and_sums_up_the_rest() -> None:
    operations = [Operation(f"kernel{i}", 2, 0.001) for i in range(30)]
    operations.append(Operation("fire", 4, 0.07))
    table = as_table("kernel", operations, 2, {"fire": "tetdist fire (nn/fast/kernels/neuron.py)"})
    _, _, first, second, *_, last = table.splitlines()
    assert first == "| tetdist fire (nn/fast/kernels/neuron.py) | 2 | 35.000 | 70.0 |"
    assert second == "| kernel0 | 1 | 0.500 | 1.0 |"
    assert last == "| 11 others | 11 | 5.500 | 11.0 |"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["profile.steps=[6,4]"], "profile.steps: [6, 4] must rise"),
        (["profile.steps=[1,101]"], "profile.steps: 101 steps make a trace"),
        (["profile.steps=[8,9]", "max_steps=7"], "profile.steps: step 8 is after max_steps, 7"),
        (["profile.steps=[11,12]"], "profile.steps: step 11 is after the run's last, 10"),
        (["profile.steps=[1,2]", "cuda_graphs=true"], "profile: with cuda_graphs"),
    ],
)
def test_steps_that_cannot_be_profiled_are_refused(
    overrides: list[str], said: str, main: Main, tiny_config: Callable[..., Path]
) -> None:
    outcome = main(tiny_config(), *overrides)
    assert outcome.status == 2
    assert said in outcome.text
