"""The command from its start to its end, whatever happens to a process, and its last line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch

from tetdist.apps.check_gpu import remedies, run
from tetdist.apps.check_gpu.check import Finding, Machine
from tetdist.apps.check_gpu.run import conclusion, reported
from tetdist.apps.cli import check_gpu
from tetdist.errors import PeerFailed, UserError, pip_install

pytestmark = pytest.mark.usefixtures("one_thread")

# Runs the command with checks of its own, of which the second has rank 1 fail or die, or hangs if
# there is a single process. Arguments: the JSON file, a folder for temporary files, who dies, and
# seconds after which a lone process hangs.
COMMAND = """
import os, sys, tempfile, threading
from tetdist.apps.check_gpu import run
from tetdist.apps.check_gpu.check import Finding
from tetdist.apps.cli import check_gpu
from tetdist.distributed import watchdog
file, tempfile.tempdir, dying, last_resort = sys.argv[1:]
run.LAST_RESORT, watchdog.SILENCE = float(last_resort), 3.0

def fine(here):
    return Finding("ok", "7 of 7")

def averages(here):
    if str(here.world.rank) == dying:
        os._exit(7)
    if here.world.rank == 1 and dying == "none":
        raise RuntimeError("CUDA error: an illegal memory access")
    here.world.sum([1.0])
    if here.world.world_size == 1:
        threading.Event().wait()
    return fine(here)

def alone(here):
    if here.world.rank == 1:
        raise RuntimeError("uncorrectable ECC error")
    return fine(here)

run.CHECKS |= {"versions": fine, "numerics": alone, "steps": averages, "rates": fine}
only = "versions,numerics,steps,rates"
sys.exit(check_gpu.main(["--device", "cpu", "--json", file, "--only", only]))
"""


@pytest.fixture
def temporary(tmp_path):
    """A folder for the temporary ones of processes that a test starts."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    return folder


def test_the_command_knows_all_checks():
    assert tuple(run.CHECKS) == check_gpu.NAMES


def test_the_quick_checks_pass_here(tmp_path, call):
    file = tmp_path / "found.json"
    names = "versions,rates,pixels"
    status, output = call("check_gpu", "--device", "cpu", "--only", names, "--json", file)
    assert status == 0, output
    flag = f"{json.loads(file.read_text())['by_batch']['2']:.4g} (sew_resnet34, 33 pixels, bf16, 1"
    assert f" for slurm: --images-per-s {flag} process, T=4)\n" in output
    assert output.splitlines()[-1].startswith("no GPU: ")
    assert output.splitlines()[-1].endswith("; left out: pixels")
    found = json.loads(file.read_text())
    assert set(found["checks"]) == set(names.split(","))
    assert found["machine"]["torch"]


@pytest.mark.long
@pytest.mark.timeout(1000)  # The machine may be busy: alone it takes less than a minute.
def test_all_checks_pass_here_on_two_processes(tmp_path):
    file = tmp_path / "found.json"
    command = tiny.launched(2, tiny.PROJECT / "tools" / "check_gpu.py", "--device", "cpu")
    status, output = tiny.execute([*command, "--json", str(file)], tmp_path, timeout=900)
    assert status == 0, output
    # What DeepSpeed and torch tell their developers does not come between the lines.
    table = output[output.index("no GPU: the checks run small") :]
    lines = [line for line in table.splitlines() if line and not line.startswith("ok ")]
    assert [line.split()[0] for line in lines] == ["no", "for", "left", "no"], output
    found = json.loads(file.read_text())
    statuses = {name: one["status"] for name, one in found["checks"].items()}
    assert statuses == dict.fromkeys(run.CHECKS, "ok") | {"pixels": "left out"}
    assert found["processes"] == 2


def test_a_rank_that_fails_or_dies_is_a_finding(farm, tmp_path, temporary):
    file = tmp_path / "found.json"
    for dying, statuses, text, remedy in (
        ("none", [3, 1], "rank 1 has failed", remedies.HARDWARE),
        ("1", [3, 7], "rank 1 (process ", remedies.DEAD),
        ("0", [7, 3], None, None),
    ):
        command = tiny.python("-c", COMMAND, file, temporary, dying, 60)
        both = farm.side_by_side(2, command, tmp_path)
        assert [status for status, _ in both] == statuses, both
        found = json.loads(file.read_text())
        if text is None:
            assert "error: rank 0 has " in both[1][1]
            assert list(found["checks"]) == ["versions", "numerics"]
            continue
        assert ". All processes end; the findings so far are kept" in both[0][1]
        assert f"bad       steps      {text}" in both[0][1]
        assert found["checks"]["steps"]["remedy"] == remedy
        # A check of which a process needs nobody's results does not keep others from running.
        text = "rank 1: RuntimeError: uncorrectable ECC error"
        assert found["checks"]["numerics"]["text"] == text
        fixes = f"to fix: numerics: {remedies.HARDWARE} (then 1 more)"
        assert found["conclusion"] == f"{fixes}; not reached: rates"


def test_a_lone_process_that_hangs_leaves_its_findings(farm, tmp_path, temporary):
    file = tmp_path / "found.json"
    command = tiny.python("-c", COMMAND, file, temporary, "none", 1)
    ((status, output),) = farm.side_by_side(1, command, tmp_path)
    assert status == 1, output
    assert "in averages" in output  # its stack
    found = json.loads(file.read_text())
    assert found["not_reached"] == ["steps", "rates"]
    ended = "the command ended before all was done; not reached: steps, rates"
    assert found["conclusion"] == f"{ended}; {remedies.ENDED}"


def test_an_error_of_a_lone_process_is_a_finding_with_its_remedy(alone, tmp_path, monkeypatch):
    def broken(here):
        here.progress("a case")
        raise RuntimeError("CUDA error: an illegal memory access\nmore")

    checks = {"first": lambda _: Finding("bad", "two builds", "pip uninstall one")}
    checks |= {"second": broken, "third": lambda _: Finding("ok", "7 of 7")}
    monkeypatch.setattr(run, "CHECKS", checks)
    found = {}
    run.run_checks(list(checks), Machine(alone, tmp_path), found.__setitem__)
    found = {name: reported(findings) for name, findings in found.items()}
    assert [one["status"] for one in found.values()] == ["bad", "bad", "ok"]
    assert found["second"]["text"] == "a case: RuntimeError: CUDA error: an illegal memory access"
    assert "Traceback" in found["second"]["traceback"]
    assert conclusion(found, [], "cuda") == "to fix: first: pip uninstall one (then 1 more)"


def test_a_file_that_cannot_be_written_is_reported_before_anything_is_checked(tmp_path, call):
    for file in (tmp_path, tmp_path / "none" / "x.json", Path("/proc/x.json")):
        status, output = call("check_gpu", "--device", "cpu", "--json", file)
        assert (status, output.startswith("error: "), output.count("\n")) == (2, True, 1)


def put_smi(folder, monkeypatch, body):
    file = folder / "nvidia-smi"
    file.write_text(f"#!{sys.executable}\nimport sys, threading\n{body}\n")
    file.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


UNREADY = "Unexpected error from cudaGetDeviceCount(). Did you run some functions? Error"


@pytest.mark.parametrize(
    ("said", "remedy"),
    [
        (
            "The NVIDIA driver on your system is too old (found version 12040).",
            "driver 550 is too old for CUDA 13.0; pip uninstall -y torch torchvision nvidia-dali-"
            "cuda120 nvidia-dali-cuda130; pip install 'torch<2.15' torchvision --index-url",
        ),
        ("No CUDA GPUs are available", "device: pip uninstall -y torch"),
        (f"{UNREADY} 802: system not yet initialized", "start the nvidia-fabricmanager"),
        (f"{UNREADY} 803: system has unsupported display driver", "restart this machine"),
        (f"{UNREADY} 804: forward compatibility was attempted", "take cuda-compat out of"),
        (f"{UNREADY} 999: unknown error", "see the rights of /dev/nvidia*"),
    ],
    ids=lambda one: one[-30:],
)
def test_a_machine_whose_gpu_torch_does_not_see_learns_why(
    tmp_path, monkeypatch, call, said, remedy
):
    """It ends in a table and a file like any other finding, and has torch installed only where
    that helps."""
    answer = "print('GPU 0: H100 (UUID: GPU-1)' if '-L' in sys.argv else '550.54.15, 9.0')"
    put_smi(tmp_path, monkeypatch, answer)
    for name in ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")

    def init():
        raise RuntimeError(said)

    monkeypatch.setattr(torch.cuda, "init", init)
    file = tmp_path / "found.json"
    status, output = call("check_gpu", "--json", file)
    assert status == 1
    assert output.startswith("bad       device     there is GPU 0: H100 (nvidia-smi)")
    last = output.splitlines()[-1]
    assert remedy in last
    assert ("pip install" in output) == ("pip" in remedy)
    found = json.loads(file.read_text())
    assert found["checks"]["device"]["status"] == "bad"
    assert found["conclusion"] == last


# --- the last line --------------------------------------------------------------------------------


def test_ranks_that_are_bad_and_what_is_slow_are_named():
    fine, bad = Finding("ok", "x"), Finding("bad", "too slow", "cool it", {"speed": 1})
    found = reported([fine, bad, fine, bad])
    assert (found["text"], found["speed"]) == ("rank 1, 3: too slow", 1)
    assert [one["status"] for one in found["by_rank"]] == ["ok", "bad", "ok", "bad"]
    slow = reported([fine, Finding("ok", "slow", "report it")])
    assert conclusion({"x": slow}, [], "cuda") == "all results are right, but x: report it"
    left_out = {"x": reported([Finding("left out", "no GPU")])}
    assert conclusion(left_out, [], "cuda") == "no problem found; left out: x"
    assert conclusion(left_out, [], "cpu").startswith("no GPU: ")


@pytest.mark.parametrize(
    ("driver", "gpu", "wanted"),
    [
        (580, (9, 0), "pip install torch torchvision --index-url https://download.pytorch.org/"),
        (550, (9, 0), "pip install 'torch<2.15' torchvision --index-url https://download."),
        (550, (8, 6), pip_install("train,cuda120")),
        (580, (7, 0), "whl/cu126"),  # CUDA 13 knows no Volta
        (550, (12, 0), "install a driver of version 580 or newer"),  # CUDA 12.6 knows no Blackwell
        (470, (8, 0), "install a driver of version 525 or newer"),
        (580, (3, 5), "use another GPU"),
        (None, None, "whl/cu130"),
    ],
)
def test_a_torch_is_found_for_a_driver_and_a_gpu(driver, gpu, wanted):
    assert wanted in remedies.torch_for(driver, gpu)


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), remedies.BUSY),
        (RuntimeError("NCCL error in: ProcessGroupNCCL.cpp:94"), remedies.NETWORK),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), remedies.HARDWARE),
        (RuntimeError("CUDA error: no kernel image is available for execution"), "whl/cu126"),
        (subprocess.TimeoutExpired(["/usr/bin/nvidia-smi"], 20), remedies.DRIVER),
        (UserError("data.x: set it to 2"), "data.x: set it to 2"),
        (PeerFailed("rank 1 has not joined"), "start all processes"),
        (ModuleNotFoundError("no", name="nvidia.dali"), pip_install("train,cuda130")),
        (RuntimeError("something else"), "None"),
    ],
)
def test_what_fails_for_a_known_reason_has_its_remedy(tmp_path, monkeypatch, error, remedy):
    put_smi(tmp_path, monkeypatch, 'print("570.86.15, 7.0\\n570.86.15, 7.0")')
    assert remedy in str(remedies.of(error))


def test_an_out_of_reach_driver_is_not_waited_for(tmp_path, monkeypatch):
    put_smi(tmp_path, monkeypatch, "threading.Event().wait()")
    monkeypatch.setattr(remedies, "SMI_TIMEOUT", 0.2)
    with pytest.raises(subprocess.TimeoutExpired) as caught:
        remedies.smi("driver_version")
    assert remedies.of(caught.value) == remedies.DRIVER
    assert remedies.driver_and_gpu() == (None, None)
