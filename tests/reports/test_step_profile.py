"""A profile names what took longest, tetdist's own kernels among it, and changes no result."""

import gzip
import json

import pytest
import tiny


def test_results_are_the_same_bitwise_and_own_kernels_are_named(main, tiny_config, tmp_path):
    file = tiny_config({"execution": "fused", "max_steps": 7})
    assert main(file, "name=without").status == 0
    # Epochs are of 5 steps, and the profile ends with the first of them.
    tiny.expect(main(file, "name=with", "profile=[4,6]"), "profile of steps 4 to 5: ")
    runs = tmp_path / "runs"
    tiny.assert_same_run(runs / "without", runs / "with")

    table = (runs / "with" / "profile" / "table.md").read_text()
    rows = [line.split() for line in table.splitlines()]
    # Two steps of four micro-batches, of a network with two neurons behind a norm.
    assert [row[-1] for row in rows if row[:1] == ["FusedNormNeuron"]] == ["16"]
    assert "\n* `FusedNormNeuron`: tetdist/nn/fast/fused.py\n" in table
    assert sum("%" in line and line.split()[-1].isdigit() for line in table.splitlines()) == 20
    assert not [row for row in rows if row[:1] == ["step"]]

    trace = json.loads(gzip.decompress((runs / "with/profile/trace.json.gz").read_bytes()))
    steps = {event["name"] for event in trace["traceEvents"] if "step" in event["name"]}
    assert {"step 4", "step 5"} <= steps
    assert "step 6" not in steps
    # In the midst of an epoch it ends with the next step.
    assert "profile of steps 2 to 3: " in main(file, "name=early", "profile=[2,3]").text


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["profile=[8,9]", "max_steps=7"], "profile: step 8 comes after the run's last step, 7"),
        (["profile=[11,12]"], "profile: step 11 comes after the run's last step, 10"),
    ],
)
def test_steps_that_cannot_be_profiled_are_refused(overrides, expected, main, tiny_config):
    tiny.refused(main(tiny_config(), *overrides), expected)
