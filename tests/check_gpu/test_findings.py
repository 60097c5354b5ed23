"""Conclusions from the findings of several processes, and the remedies."""

import dataclasses
import subprocess
import sys

import pytest
import torch

from tetdist.apps.check_gpu import remedies
from tetdist.apps.check_gpu.check import Finding, Report, Result, compared
from tetdist.errors import UserError, pip_install


def rates(images_per_s, **others):
    rows = {"tetdist": {"images_per_s": images_per_s}}
    numbers = {"images_per_s": images_per_s, "timesteps": 4, "by_batch": {"32": rows}}
    return Finding("ok", f"{images_per_s} images/s", None, numbers, speed=images_per_s, same=others)


def test_ranks_that_fail_are_named():
    fine, bad = Finding("ok", "x"), Finding("bad", "no link")
    result = Result("links", [fine, bad, fine, bad], 0.1)
    assert result.line().endswith("rank 1, 3: no link")


def test_a_slow_gpu_among_others_is_bad():
    speeds = [2000.0, 1990.0, 2010.0, 1700.0, 2005.0]
    result = Result("rates", compared([rates(speed) for speed in speeds]), 1.0)
    assert result.worst.status == "bad"
    assert result.text == (
        "rank 3: 15% slower than most: 1700.0 images/s (slowest process 1700, fastest 2010)"
    )
    assert "nvidia-smi" in str(result.worst.remedy)
    # Of two, the slower one is; of three, not those beside which one is faster.
    for speeds, statuses in (
        ([1000.0, 800.0], ["ok", "bad"]),
        ([1000.0, 1000.0, 1500.0], ["ok"] * 3),
    ):
        assert [found.status for found in compared([rates(one) for one in speeds])] == statuses


def test_gpus_of_one_kind_may_differ_a_little():
    found = compared([rates(speed) for speed in (2000.0, 1850.0, 1990.0)])
    result = Result("rates", found, 1.0)
    assert result.worst.status == "ok"
    # The slowest is shown, and written: all wait for it.
    assert result.text.startswith("1850.0 images/s (slowest process 1850, fastest 2000)")


def test_a_speed_that_is_no_number_is_bad():
    found = compared([rates(2000.0), rates(float("nan")), rates(2000.0)])
    assert [one.status for one in found] == ["ok", "bad", "ok"]


def test_a_process_with_another_version_is_bad():
    drivers = ("580.1", "570.2", "580.1")
    found = compared([rates(1.0, driver=driver) for driver in drivers])
    assert [one.status for one in found] == ["ok", "bad", "ok"]
    assert found[1].text == "driver is 570.2, but 580.1 on other processes"
    without = compared([rates(1.0, triton="3.4"), rates(1.0), rates(1.0, triton="3.4")])
    assert without[1].text == "triton is None, but 3.4 on other processes"


def test_all_processes_together_are_as_fast_as_the_slowest():
    """What `slurm --benchmark` divides by their number."""
    report = Report({}, "cuda", 4, small=False)
    found = [rates(2000.0), rates(1900.0), rates(2000.0), rates(2000.0)]
    report.results.append(Result("rates", found, 1.0))
    written = report.as_dict()
    assert (written["images_per_s"], written["processes"]) == (4 * 1900.0, 4)
    assert written["by_batch"] == {"32": 1900.0}
    by_rank = [one["images_per_s"] for one in written["checks"]["rates"]["by_rank"]]
    assert by_rank == [2000.0, 1900.0, 2000.0, 2000.0]


def test_the_last_line_says_that_there_was_no_gpu():
    report = Report(
        {}, "cpu", 1, small=True, results=[Result("versions", [Finding("ok", "x")], 1.0)]
    )
    assert report.conclusion().startswith("no GPU: ")
    assert dataclasses.replace(report, small=False).conclusion() == "no problem found"


# --- remedies -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("driver", "gpu", "wanted"),
    [
        (
            580,
            (9, 0),
            "pip install torch torchvision --index-url https://download.pytorch.org/whl/cu130",
        ),
        (
            550,
            (9, 0),
            "pip install 'torch<2.15' torchvision --index-url https://download.pytorch.org/whl/cu126",
        ),
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
        (subprocess.TimeoutExpired(["/usr/bin/nvidia-smi"], 20), remedies.HANGING_DRIVER),
        (UserError("data.x: set it to 2"), "data.x: set it to 2"),
        (ModuleNotFoundError("no", name="nvidia.dali"), pip_install("train,cuda130")),
        (RuntimeError("something else"), None),
    ],
)
def test_what_fails_for_a_known_reason_has_its_remedy(error, remedy):
    found = remedies.of(error)
    assert found == remedy or (remedy is not None and remedy in str(found))


def put_smi(folder, body):
    file = folder / "nvidia-smi"
    file.write_text(f"#!{sys.executable}\n{body}\n")
    file.chmod(0o755)


def test_an_older_gpu_than_torch_is_built_for_gets_a_command(tmp_path, monkeypatch):
    put_smi(tmp_path, 'print("570.86.15, 7.0\\n570.86.15, 7.0")')
    monkeypatch.setenv("PATH", str(tmp_path))
    found = remedies.of(RuntimeError("CUDA error: no kernel image is available for execution"))
    assert "whl/cu126" in str(found)


def test_an_out_of_reach_driver_is_not_waited_for(tmp_path, monkeypatch):
    put_smi(tmp_path, "import threading; threading.Event().wait()")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(remedies, "SMI_TIMEOUT", 0.2)
    with pytest.raises(subprocess.TimeoutExpired) as caught:
        remedies.smi("driver_version")
    assert remedies.of(caught.value) == remedies.HANGING_DRIVER
    assert remedies.driver_and_gpu() == (None, None)
