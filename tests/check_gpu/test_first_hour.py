"""The first hour: what is trained, how much of it, and how it is judged."""

import dataclasses
import json
import subprocess
import time
import types
from pathlib import Path

import pytest

from tetdist.apps.check_gpu import check, first_hour, remedies
from tetdist.apps.check_gpu.check import Finding
from tetdist.apps.check_gpu.checks import CHECKS
from tetdist.apps.check_gpu.first_hour import Hour
from tetdist.apps.reports.reference import IMAGES, find_reference

STEPS = IMAGES // 256


def metrics(top1, rate=2300.0, wait=1.0, steps=STEPS):
    train = {"kind": "train", "step": steps, "samples_per_s": rate, "data_wait": wait, "loss": 5.0}
    return [train, {"kind": "val", "step": steps, "top1": top1}]


@pytest.mark.parametrize(
    ("lines", "status", "text", "remedy"),
    [
        (metrics(12.9, 4900.0), "bad", "4900 images/s impossibly fast", check.IMPOSSIBLE),
        (metrics(12.9), "ok", "2300 images/s as expected (computed 2400); sew34 had 12.59 %", None),
        (metrics(5.0), "bad", "far behind", first_hour.BEHIND),
        (metrics(12.9, 1200.0, 60.0), "ok", "1200 images/s slow", first_hour.LOADING),
        (metrics(12.9, 300.0, 60.0), "bad", "far too slow", first_hour.LOADING),
        (metrics(12.9, 300.0), "bad", "far too slow", remedies.NETWORK),
        (metrics(4.0, steps=STEPS // 2), "ok", "after 640,512 images", None),
        (
            metrics(0.1, steps=STEPS // 2),
            "bad",
            "sew34 had 6.34 % after as many: far",
            first_hour.BEHIND,
        ),
    ],
)
def test_an_epoch_is_judged_by_a_published_one_and_by_the_card(lines, status, text, remedy):
    reference = find_reference("sew34")
    hour = Hour((), 256, STEPS, reference, None, 2400.0, 2, Path(), time.monotonic())
    found = first_hour.judged(hour, lines)
    if remedy == remedies.NETWORK:
        alone = dataclasses.replace(hour, processes=1)
        assert first_hour.judged(alone, lines).remedy == check.THROTTLED
    assert (found.status, text in found.text, found.remedy) == (status, True, remedy), found
    assert found.numbers["expected"] == (
        "images/s 2400 computed, 9 minutes an epoch; epoch 1,281,024 images; top-1 12.6 % after an "
        "epoch (sew34, published)"
    )


@pytest.mark.long
@pytest.mark.parametrize(("seconds", "steps"), [(1e4, 5), (0.0, 2)])
def test_as_much_is_trained_as_fits_into_the_hour(
    tiny_root, tmp_path, call, monkeypatch, seconds, steps
):
    """Of 5 steps, of which 2 are taken first."""
    monkeypatch.setattr(first_hour, "HOUR", seconds)
    monkeypatch.setattr(first_hour, "FIRST_STEPS", 2)
    file = tmp_path / "hour.json"
    changes = [f"data.root={tiny_root}", f"runs_dir={tmp_path}", "batch.global=8", "batch.micro=4"]
    command = ["--device", "cpu", "--first-hour", "--only", "versions", "--json", file]
    status, output = call("check_gpu", *command, *changes)
    assert status == 0, output
    assert output.index("epoch 40 images") < output.index("ok        versions")
    found = json.loads(file.read_text())["checks"]["epoch"]
    assert found["status"] == "ok"
    assert found["images"] == 8 * steps
    assert "these data have 4" in found["text"]
    (run,) = tmp_path.glob("first_hour_*")
    assert len(list((run / "checkpoints").glob("step-*"))) == (2 if steps == 5 else 1)


def test_what_fails_is_reported(tiny_root, tmp_path, call, monkeypatch):
    """A mistake before the checks begin, and a training that fails as a finding; until the training
    ends, the file says that it was not reached."""
    command = ["--device", "cpu", "--only", "versions"]
    status, output = call("check_gpu", *command, "--first-hour", "data.root=/nowhere")
    assert (status, "ok        versions" in output) == (2, False)
    status, output = call("check_gpu", *command, f"data.root={tiny_root}")
    assert (status, "needs --first-hour" in output) == (2, True)
    small = ("batch.global=8", "batch.micro=4")
    hour = (*command, "--first-hour", f"data.root={tiny_root}", *small)
    with monkeypatch.context() as patch:
        patch.setitem(CHECKS, "versions", lambda _: Finding("bad", "two builds", "remove one"))
        status, output = call("check_gpu", *hour)
        assert (status, output.splitlines()[-1]) == (
            1,
            "to fix: versions: remove one; not reached: epoch",
        )
    file = tmp_path / "hour.json"
    meanwhile = []

    def fail(*_, **__):
        meanwhile.append(json.loads(file.read_text()))
        return types.SimpleNamespace(returncode=1)

    monkeypatch.setattr(subprocess, "run", fail)
    status, output = call("check_gpu", *hour, "--json", file)
    assert (status, list(meanwhile[0]["checks"])) == (1, ["versions"])
    assert meanwhile[0]["not_reached"] == ["epoch"]
    assert meanwhile[0]["conclusion"].endswith(
        "not reached: epoch; run it again, with --only NAME for fewer checks and more time"
    )
    assert json.loads(file.read_text())["not_reached"] == []
    assert output.splitlines()[-1] == "to fix: epoch: the training failed; read its message above"
