"""The check of a machine under srun, which starts its tasks without a launcher."""

import json
import sys

import pytest
import tiny


@pytest.mark.long
def test_the_tasks_of_srun_find_each_other(cluster, tmp_path):
    file = tmp_path / "found.json"
    command = [sys.executable, str(tiny.PROJECT / "tools/check_gpu.py"), "--device", "cpu"]
    output = cluster.run(
        *("srun", "--nodes=2", "--ntasks-per-node=2", "--cpus-per-task=2"),
        f"--export=ALL,PYTHONPATH={tiny.PROJECT}",
        *(*command, "--only", "versions,links,loading", "--json", str(file)),
        timeout=200,
    )
    assert "4 processes, 2 hosts" in output
    # Once, although four processes run.
    assert output.count("no GPU: the checks work on this CPU") == 1
    found = json.loads(file.read_text())
    assert found["processes"] == 4
    assert [one["host"] for one in found["checks"]["versions"]["by_rank"]] == [
        *["node1"] * 2,
        *["node2"] * 2,
    ]
