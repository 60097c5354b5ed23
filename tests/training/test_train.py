"""Whole runs: the same result after any stop, and one sentence for each mistake."""

import errno
import json
import os
import re
import shutil
import signal
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import tiny
import torch
from safetensors.torch import load_file
from tiny import Farm, Outcome

ConfigWriter = Callable[..., Path]
Main = Callable[..., Outcome]

TERM, INT, KILL, USR1 = signal.SIGTERM, signal.SIGINT, signal.SIGKILL, signal.SIGUSR1
# Of the default configuration: 2 epochs of 5 steps of 4 micro-batches, evaluated in 4 batches.
LAST_STEP = 10

TWO_PHASES = [
    {"epochs": 1, "timesteps": 2, "optimizer": {"kind": "sgd", "lr": 0.05}},
    {"epochs": 1, "timesteps": 3, "optimizer": {"kind": "adam", "lr": 0.01}},
]
TURNING = [
    {"epochs": 1, "timesteps": {"from": 1, "to": 3}, "loss": {"kind": "sdt"}}
    | {"optimizer": {"kind": "sgd", "lr": 0.05, "momentum": 0.9}},
    {"epochs": 1, "timesteps": [1, 2], "optimizer": "continue"}
    | {"loss": {"distillation": {"self_weight": 0.5}}},
]
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    # Lines of metrics that a stop cuts in two, checkpoints between them, clipped gradients.
    "sparse": {"log_every": 3, "save.every_steps": 2, "gradient_clipping": 1.0},
    "phases": {"phases": TWO_PHASES, "log_every": 4},
    # T drawn by step; the optimiser goes on from SDT to TET.
    "turned": {"phases": TURNING, "save.every_steps": 2, "ema.decay": 0.8, "recompute": "blocks"},
    "rare": {"evaluate_every": 2, "log_every": 2, "precision": "bf16"},
    "torch": {"engine": "torch"},
    "augmented": {
        "data.crop": "padded",
        "data.auto_augment": "cifar10",
        "data.color_jitter": {"brightness": 0.3, "hue": 0.1},
        "data.cutout": 4,
        "data.mixup": 0.4,
        "data.cutmix": 1.0,
        "data.mixing": {"mode": "batch", "probability": 0.7, "off_epoch": 1},
        "loss.label_smoothing": 0.1,
    },
}


@pytest.fixture(scope="module")
def straight(
    farm: Farm, tiny_root: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """The run folder of a variant that nothing stopped; made once."""
    folder = tmp_path_factory.mktemp("straight")
    made: set[str] = set()

    def get(variant: str) -> Path:
        if variant not in made:
            file = tiny.write_config(folder / f"{variant}.yaml", tiny_root, VARIANTS[variant])
            outcome = farm(file)
            assert outcome.status == 0, outcome.text
            made.add(variant)
        return folder / "runs" / variant

    return get


@pytest.mark.parametrize(
    ("variant", "point", "number", "sig"),
    [
        ("default", "micro", 3, KILL),
        ("default", "step", 6, INT),
        ("default", "evaluate", 8, KILL),
        ("default", "save", 2, TERM),
        ("sparse", "micro", 33, KILL),
        ("phases", "step", 5, TERM),
        ("phases", "saved", 1, KILL),
        ("phases", "step", 7, KILL),
        ("turned", "step", 3, TERM),
        ("turned", "saved", 3, KILL),  # at the phases' border
        ("turned", "step", 8, KILL),
        ("rare", "step", 7, USR1),
        ("augmented", "micro", 14, KILL),
        # At every day's places by the other kind of signal, and at other places.
        *(
            pytest.param(*stop, marks=pytest.mark.long)
            for stop in [
                ("default", "step", 10, KILL),
                ("default", "evaluate", 4, TERM),
                ("default", "saved", 2, TERM),
                ("default", "log", 6, KILL),
                ("sparse", "step", 8, KILL),
                ("sparse", "log", 2, KILL),
                ("phases", "step", 5, KILL),
                ("phases", "evaluate", 6, TERM),
                ("rare", "saved", 1, KILL),
                ("torch", "micro", 30, KILL),
            ]
        ),
    ],
)
def test_stopped_and_continued_is_the_straight_run(
    variant: str,
    point: str,
    number: int,
    sig: signal.Signals,
    farm: Farm,
    straight: Callable[[str], Path],
    tiny_config: ConfigWriter,
    tmp_path: Path,
) -> None:
    expected = straight(variant)
    file = tiny_config({"name": variant} | VARIANTS[variant])
    first = farm(file, stop=(point, number, sig))
    if sig == KILL:
        assert first.status == -KILL, first.text
    elif first.status != 0:  # 0: the signal came when all was done
        assert first.status == 128 + sig, first.text
        assert "all saved" in first.text
    second = farm(file)
    assert second.status == 0, second.text
    assert "finished" in second.text
    tiny.assert_same_run(tmp_path / "runs" / variant, expected)


# --- several processes -------------------------------------------------------------------------


def assert_close_runs(a: Path, b: Path, steps: int = 3) -> None:
    """The first lines of metrics, until a spike flips."""
    for ours, theirs in zip(*(tiny.metrics(run, "train")[:steps] for run in (a, b)), strict=True):
        assert ours["step"] == theirs["step"]
        for key in ("loss", "grad_norm", "lr", "epoch"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-5), (ours["step"], key)


def test_two_processes_are_the_run_of_one(
    farm: Farm, straight: Callable[[str], Path], tiny_config: ConfigWriter, tmp_path: Path
) -> None:
    file = tiny_config({"name": "augmented"} | VARIANTS["augmented"])
    outcome = farm(file, "--local_rank=RANK", world=2)  # which the deepspeed launcher adds
    assert outcome.status == 0, outcome.text
    assert "error" not in outcome.text
    run, expected = tmp_path / "runs/augmented", straight("augmented")
    assert_close_runs(run, expected)
    assert [line["samples"] for line in tiny.metrics(run, "val")] == [23, 23]
    steps = [[line["step"] for line in tiny.metrics(one)] for one in (run, expected)]
    assert steps[0] == steps[1]


def test_continued_at_another_world_size(
    farm: Farm, straight: Callable[[str], Path], tiny_config: ConfigWriter, tmp_path: Path
) -> None:
    """In mid-epoch, in the middle of a line of metrics."""
    file = tiny_config({"name": "sparse"} | VARIANTS["sparse"])
    first = farm(file, stop=("step", 2, TERM))
    assert first.status == 128 + TERM, first.text
    run = tmp_path / "runs/sparse"
    assert json.loads((tiny.newest(run) / "state.json").read_text())["step"] == 2
    second = farm(file, world=2)
    assert second.status == 0, second.text
    assert_close_runs(run, straight("sparse"), steps=2)


def test_two_processes_stop_together_and_continue_bitwise(
    farm: Farm, tiny_config: ConfigWriter, tmp_path: Path
) -> None:
    assert farm(tiny_config({"name": "straight"}), world=2).status == 0
    file = tiny_config({"name": "run"})
    first = farm(file, world=2, stop=("step", 7, TERM), rank=1)
    assert first.status == 128 + TERM, first.text
    second = farm(file, world=2)
    assert second.status == 0, second.text
    tiny.assert_same_run(tmp_path / "runs/run", tmp_path / "runs/straight")


@pytest.mark.parametrize(
    ("override", "world", "message"),
    [
        ("data.root=/nowhere", 2, "data.root"),
        ("sede=1", 2, "'sede'"),
        ("seed=1", 3, "1, 2"),  # 4 micro-batches a step
    ],
)
def test_user_error_on_several_processes_is_reported_once(
    override: str, world: int, message: str, farm: Farm, tiny_config: ConfigWriter
) -> None:
    outcome = farm(tiny_config(), override, world=world)
    ended(outcome, message)
    assert outcome.text.count("error:") == 1


def test_both_engines_are_the_same_run(straight: Callable[[str], Path]) -> None:
    assert tiny.metrics(straight("default")) == tiny.metrics(straight("torch"))


# --- whole programs ----------------------------------------------------------------------------


@pytest.mark.long
def test_a_killed_process_under_the_launcher(tiny_config: ConfigWriter, tmp_path: Path) -> None:
    """The launcher's status is that of the process that died: 256 - 9."""
    file = tiny_config({"phases.0.epochs": 1000, "log_every": 5})
    with tiny.started(tiny.launched(2, tiny.TRAIN, "--config", file), tmp_path) as process:
        assert process.stdout is not None
        while "step 10/" not in process.stdout.readline():
            pass
        ranks = psutil.Process(process.pid).children(recursive=True)
        next(one for one in ranks if one.environ().get("RANK") == "1").kill()
        text, _ = process.communicate(timeout=60)
        assert process.returncode == 247, text
    assert "error: rank 1 (process" in text
    assert "All processes end; the same command continues" in text


@pytest.mark.long
def test_ctrl_c_under_the_launcher(tiny_config: ConfigWriter, tmp_path: Path) -> None:
    """A terminal's Ctrl-C reaches the launcher and all processes: they save, and none dies."""
    changes = {"phases.0.epochs": 4000, "evaluate_every": 4000}
    command = tiny.launched(2, tiny.TRAIN, "--config", tiny_config(changes))
    with tiny.started(command, tmp_path) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "step 12/" in line:
                break
        os.killpg(process.pid, signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    assert "all saved; the same command continues" in output, output
    step = json.loads((tiny.newest(tmp_path / "runs/tiny") / "state.json").read_text())["step"]
    assert tiny.metrics(tmp_path / "runs/tiny")[-1]["step"] == step >= 12


@pytest.mark.parametrize(
    "arguments",
    [
        ("--config",),
        (),
        ("--nonsense",),
        ("--config", "quickstar"),
        ("--config", "quickstart", "a=1"),
    ],
)
def test_wrong_command_line(arguments: tuple[str, ...], capfd: pytest.CaptureFixture[str]) -> None:
    from tetdist.apps.cli import train

    try:
        status = train.main(list(arguments))
    except SystemExit as ended:
        status = ended.code
    assert status == 2
    text = capfd.readouterr().err
    assert "error:" in text
    assert "Traceback" not in text


def test_missing_package_is_named(tiny_config: ConfigWriter, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['pydantic'] = None\n")
    env = tiny.clean_environment(PYTHONPATH=str(tmp_path))
    command = tiny.python(tiny.TRAIN, "--config", tiny_config())
    status, output = tiny.execute(command, tmp_path, env=env)
    assert status == 2, output
    assert "Traceback" not in output
    assert "the package pydantic is not installed" in output
    assert "pip install" in output


# --- what a run leaves and says ----------------------------------------------------------------


def ended(outcome: Outcome, *parts: str, status: int = 2) -> None:
    assert outcome.status == status, outcome.text
    assert "Traceback" not in outcome.text, outcome.text
    assert [part for part in parts if part not in outcome.text] == [], outcome.text


def test_finished_run_says_so_and_changes_nothing(
    main: Main, tiny_config: ConfigWriter, tmp_path: Path
) -> None:
    file = tiny_config()
    run = tmp_path / "runs/tiny"
    start = f"samples an epoch, {LAST_STEP} in total; {run}"
    outcome = main(file)
    ended(outcome, start, "runs/tiny is finished", "top-1", "tools/eval.py", status=0)
    assert "training spiking_convnet, 2,472 parameters, in fp32 on cpu, 1 process" in outcome.text
    assert sorted(path.name for path in run.iterdir()) == [
        ".lock",
        "checkpoints",
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
    ]
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    outcome = main(file)
    ended(outcome, "runs/tiny is finished", "top-1", status=0)
    assert start not in outcome.text
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    best = max(tiny.metrics(run, "val"), key=lambda line: line["top1"])
    assert tiny.metrics(run, "val")[-1]["best_top1"] == best["top1"]


GROWING = {
    "model": {"name": "sew_resnet18", "arguments": {"width": 8}},
    "data.image_size": 32,
    "data.resize": ...,
    "phases.0": {"epochs": 2, "timesteps": 1, "optimizer": {"lr": 0.01}, "image_size": 16},
    "engine": "torch",
    "record_samples": True,
}


def test_images_grow_within_a_run_that_may_stop_anywhere(
    farm: Farm, tiny_config: ConfigWriter, tmp_path: Path
) -> None:
    """The first epoch's images have 16 pixels, the second's 32, as evaluation's have."""
    growing = GROWING | {"phases.0.final_image_size": 32}

    def run(name: str, changes: dict[str, Any], **stop: Any) -> Path:
        outcome = farm(tiny_config(changes | {"name": name}), **stop)
        assert outcome.status == (128 + TERM if stop else 0), outcome.text
        return tmp_path / "runs" / name

    straight = run("straight", growing)
    run("stopped", growing, stop=("step", 5, TERM))
    tiny.assert_same_run(run("stopped", growing), straight)
    seen, large = (
        tiny.samples(straight),
        tiny.samples(run("large", GROWING | {"phases.0.image_size": 32})),
    )
    for step in range(1, LAST_STEP + 1):
        assert [i for i, _ in seen[step]] == [i for i, _ in large[step]]
        assert (seen[step] == large[step]) == (step > 5)


def test_max_steps_ends_evaluated_and_can_be_raised(
    main: Main, straight: Callable[[str], Path], tiny_config: ConfigWriter, tmp_path: Path
) -> None:
    file = tiny_config({"name": "torch"})
    ended(main(file, "max_steps=3"), "is finished", status=0)
    run = tmp_path / "runs/torch"
    assert [line["step"] for line in tiny.metrics(run, "train")] == [1, 2, 3]
    assert [line["step"] for line in tiny.metrics(run, "val")] == [3]
    ended(main(file), "is finished", status=0)
    assert tiny.metrics(run, "train") == tiny.metrics(straight("torch"), "train")


def test_resume_never_and_must(main: Main, tiny_config: ConfigWriter, tmp_path: Path) -> None:
    file = tiny_config({"max_steps": 2})
    ended(main(file, "resume=must"), "resume=must", str(tmp_path / "runs/tiny/checkpoints"))
    assert not (tmp_path / "runs").exists()
    ended(main(file, "resume=never"), status=0)
    ended(main(file, "resume=never"), "resume=never", str(tmp_path / "runs/tiny"), "name=")
    ended(main(file, "resume=must", "max_steps=4"), "continuing", "step 2", status=0)


def test_run_folder_of_another_configuration(
    main: Main, tiny_config: ConfigWriter, tmp_path: Path
) -> None:
    file = tiny_config({"max_steps": 2})
    ended(main(file), status=0)
    kept = (tmp_path / "runs/tiny/config.yaml").read_text()
    outcome = main(file, "phases.0.optimizer.lr=0.1", "seed=5")
    ended(outcome, "seed is 5 and was 0", "phases.0.optimizer.lr is 0.1 and was 0.05", "name=")
    assert (tmp_path / "runs/tiny/config.yaml").read_text() == kept
    # What does not change the result may change.
    ended(main(file, "log_every=2", "data.prefetch=3", "max_steps=4"), status=0)
    # More epochs are another run, and the error says how it begins where this one ended.
    run = tmp_path / "runs/tiny"
    further = f"init_checkpoint={run}"
    ended(main(file, "phases.0.epochs=3"), "phases.0.epochs is 3 and was 2", "name=", further)
    ended(main(file, "phases.0.epochs=3", "name=more", further), "weights of", status=0)


def test_damaged_config_of_the_run_folder(
    main: Main, tiny_config: ConfigWriter, tmp_path: Path
) -> None:
    file = tiny_config({"max_steps": 1})
    ended(main(file), status=0)
    (tmp_path / "runs/tiny/config.yaml").write_text("a: [1")
    ended(main(file, "max_steps=2"), "config.yaml is damaged", "set another name=")


def test_a_real_command_has_its_folder_alone_and_is_interrupted(
    main: Main, tiny_config: ConfigWriter, tmp_path: Path
) -> None:
    """Somewhere in the middle, by its pid."""
    changes = {"phases.0.epochs": 4000, "evaluate_every": 4000}
    file = tiny_config(changes | {"engine": "torch"})
    with tiny.started(tiny.python(tiny.TRAIN, "--config", file), tmp_path) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "step 12/" in line:
                break
        ended(main(file, "max_steps=1"), "another process is running in", "runs/tiny")
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "all saved; the same command continues" in output
    assert "Traceback" not in output
    step = json.loads((tiny.newest(tmp_path / "runs/tiny") / "state.json").read_text())["step"]
    assert 12 <= step < 20_000
    assert tiny.metrics(tmp_path / "runs/tiny")[-1]["step"] == step


def test_read_only_place(
    main: Main, tiny_config: ConfigWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Distinguished from a full disk, before training."""
    (tmp_path / "runs").write_text("a file")
    ended(main(tiny_config()), "cannot write to", str(tmp_path / "runs"), "correct that")
    (tmp_path / "runs").unlink()

    # Root, as which the tests may run, writes everywhere.
    def refuse(path: Path, *_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    message = f"cannot write to {tmp_path / 'runs/tiny'}: Permission denied; get permission"
    ended(main(tiny_config()), message)


def test_data_may_move_but_not_change(
    main: Main, tiny_root: Path, tiny_config: ConfigWriter, tmp_path: Path
) -> None:
    from tetdist.datasets import index

    file = tiny_config({"max_steps": 2})
    ended(main(file), status=0)
    moved = Path(shutil.copytree(tiny_root, tmp_path / "elsewhere"))
    ended(main(file, "max_steps=4", f"data.root={moved}"), "continuing", status=0)
    (moved / "train/up/11.png").unlink()
    built, _ = index.build_index(moved, "train", workers=1)
    index.save_index(built, index.index_file(moved / "index", "train"))
    refused = main(file, "max_steps=6", f"data.root={moved}")
    ended(refused, "trained on other data", "another name")


@pytest.mark.parametrize(
    ("gone", "parts"),
    [
        ("", ("data.root: there is no folder", "the recipe's header, or set data.root=")),
        ("index", ("train.npz", "python tools/images.py index")),
        ("index/val.npz", ("val.npz", "python tools/images.py index")),
        ("val/up", ("val/up", "index the data again")),
    ],
)
def test_data_that_is_not_there(
    gone: str,
    parts: tuple[str, ...],
    main: Main,
    tiny_copy: Path,
    tiny_config: ConfigWriter,
    tmp_path: Path,
) -> None:
    (tiny_copy / gone).rename(tmp_path / "gone")
    ended(main(tiny_config({"data.root": str(tiny_copy)})), "error:", *parts)
    assert not (tmp_path / "runs").exists()


def test_file_that_breaks_after_indexing(
    main: Main, tiny_copy: Path, tiny_config: ConfigWriter
) -> None:
    """Same size and name, so that only decoding finds out: here in evaluation."""
    file = tiny_copy / "val/left/03.png"
    whole, status = file.read_bytes(), file.stat()
    for content in (whole[:60] + bytes(len(whole) - 60), whole):
        file.write_bytes(content)
        # As with a failing disk: the file's times are unchanged.
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
        outcome = main(tiny_config({"data.root": str(tiny_copy)}))
        if content != whole:
            ended(outcome, "error:", "val/left/03.png")
    ended(outcome, "is finished", status=0)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"model.num_classes": 3}, ("model.num_classes", "3", "4 classes")),
        ({"model.arguments": {"channls": [4]}}, ("model.arguments", "channls")),
        ({"model.arguments": {"channels": [4, 8]}}, ("16x16", "input_size=16")),
        ({"batch.global": 64, "batch.micro": 2}, ("47 samples, fewer than batch.global, 64",)),
        ({"phases.0.image_size": 32}, ("16x16", "32x32", "all phases")),
        (
            {"data.image_size": 32, "data.resize": 36, "data.crop": "padded"},
            ("20", "24", "padding=4"),
        ),
        ({"data.mixup": 0.2, "batch.micro": 1}, ("batch.micro", "data.mixup")),
        ({"data.device": "gpu"}, ("data.device",)),
        ({"device": "cuda"}, ("device=cuda",)),
        ({"precision": "fp16"}, ("fp16 needs a GPU", "bf16 or fp32")),
        ({"cuda_graphs": True}, ("cuda_graphs=true needs a GPU",)),
        (
            {"model.neuron": {"kind": "psn", "timesteps": 2}, "recompute": {"timesteps": 1}},
            ("recompute: psn neurons have weights over all T timesteps",),
        ),
    ],
    ids=str,
)
def test_what_does_not_suit_the_data(
    changes: dict[str, Any], parts: tuple[str, ...], main: Main, tiny_config: ConfigWriter
) -> None:
    ended(main(tiny_config(changes)), "error:", *parts)


def test_more_classes_than_the_data_is_fine(
    main: Main, tiny_config: ConfigWriter, tmp_path: Path
) -> None:
    ended(main(tiny_config({"model.num_classes": 7, "max_steps": 1})), status=0)
    weights = load_file(tiny.newest(tmp_path / "runs/tiny") / "model.safetensors")
    assert weights["fc.weight"].shape[0] == 7


def test_non_finite_loss_names_step_rate_and_checkpoint(
    main: Main, tiny_config: ConfigWriter, tmp_path: Path
) -> None:
    lr = {"phases.0.optimizer.lr": 1e30}
    file = tiny_config({"save.every_steps": 1, "non_finite_limit": 3} | lr)
    outcome = main(file)
    ended(outcome, "not finite in 3 steps in a row, last at step ", "learning rate ")
    run = tmp_path / "runs/tiny"
    last = int(outcome.text.split("last at step ")[1].split()[0])
    assert f"the last checkpoint is of step {last - 1}, in {run / 'checkpoints'}" in outcome.text
    assert re.search(r"Rank 0: loss .*; largest gradients .*stem.*; largest weights ", outcome.text)
    for value in load_file(tiny.newest(run) / "model.safetensors").values():
        assert torch.isfinite(value).all()
    # The steps that changed nothing are counted, and have left nothing but that.
    bad = [line["step"] for line in tiny.metrics(run, "train") if line["non_finite_steps"]]
    assert bad == [last - 2, last - 1]
    ended(main(file, "name=good", f"max_steps={last - 3}"), status=0)
    ours, theirs = (
        load_file(tiny.newest(r) / "model.safetensors") for r in (run, run.parent / "good")
    )
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []
    # The same command goes on counting where it was, and fails in the same step.
    assert f"last at step {last} " in main(file).text


def test_non_finite_on_one_process_names_it(
    farm: Farm, tiny_config: ConfigWriter, tmp_path: Path
) -> None:
    """NaN pixels on rank 1 alone: rank 1 is named, before the next line of metrics is due."""
    changes = {"engine": "torch", "non_finite_limit": 2, "log_every": 5, "record_samples": True}
    file = tiny_config(changes)
    code = f"""
import os, sys
from tetdist.apps.cli import train
from tetdist.data.loader import Loader
take = Loader.__next__
def spoilt(self):
    batch = take(self)
    if os.environ["RANK"] == "1":
        batch.images[:] = float("inf")
    return batch
Loader.__next__ = spoilt
sys.exit(train.main(["--config", {str(file)!r}]))
"""
    (status_0, first), (status_1, second) = farm.side_by_side(2, tiny.python("-c", code), tmp_path)
    assert (status_0, status_1) == (2, 2), first + second
    assert "not finite in 2 steps in a row, last at step 2" in first
    assert re.search(r"Rank 1: loss .*; not finite first after stem.conv; largest gradients", first)
    assert "Rank 0:" not in first
    assert "no checkpoint has been saved yet" in first
    assert sorted(tiny.samples(tmp_path / "runs/tiny")) == [1, 2]
    assert not (tmp_path / "runs/tiny/checkpoints").exists()


def test_a_few_non_finite_steps_end_nothing(
    main: Main, tiny_config: ConfigWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps 4 and 5 change nothing and count only as skipped."""
    from tetdist.training import step

    compute = step.compute_loss
    calls = iter(range(1000))

    def spoilt(*arguments: Any) -> torch.Tensor:
        bad = next(calls) // 4 + 1 in (4, 5)
        return compute(*arguments) * (float("nan") if bad else 1.0)

    monkeypatch.setattr(step, "compute_loss", spoilt)
    outcome = main(tiny_config({"log_every": 5, "phases.0.schedule": "constant"}))
    ended(outcome, "2 steps since the last line had no finite gradient", status=0)
    first, second = tiny.metrics(tmp_path / "runs/tiny", "train")
    assert (first["non_finite_steps"], second["non_finite_steps"]) == (2, 0)
    monkeypatch.undo()
    ended(main(tiny_config({"log_every": 5, "name": "three"}), "max_steps=3"), status=0)
    (three,) = tiny.metrics(tmp_path / "runs/three", "train")
    assert first["loss"] == pytest.approx(three["loss"], rel=0.2)


def test_float16_takes_overflowed_steps_again(
    main: Main, tiny_config: ConfigWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU, where only the tests let it run: the arithmetic is the same."""
    from tetdist.training import prepared
    from tetdist.training.engines import base

    monkeypatch.setattr(prepared, "_check_device", lambda *_: None)
    monkeypatch.setattr(base.LossScale, "START", 2.0**40)
    monkeypatch.setattr(base.LossScale, "GROWTH_INTERVAL", 3)
    changes = {"precision": "fp16", "record_samples": True}
    ended(main(tiny_config(changes | {"name": "straight"})), status=0)
    straight = tmp_path / "runs/straight"
    lines = tiny.metrics(straight, "train")
    # Not counted as steps: each has its samples once, and the schedule's learning rate.
    assert [line["step"] for line in lines] == list(range(1, LAST_STEP + 1))
    assert all(len(pairs) == 8 for pairs in tiny.samples(straight).values())
    assert lines[0]["overflows"] > 5
    assert lines[0]["loss_scale"] < 2.0**35
    assert [line["non_finite_steps"] for line in lines] == [0] * LAST_STEP
    assert lines[-1]["loss_scale"] != lines[0]["loss_scale"]  # it grows, or overflows again
    # The scale is part of the checkpoint.
    ended(main(tiny_config(changes | {"name": "run"}), "max_steps=4"), status=0)
    run = tmp_path / "runs/run"
    state = json.loads((tiny.newest(run) / "state.json").read_text())
    assert state["loss_scale"]["value"] == lines[3]["loss_scale"]
    ended(main(tiny_config(changes | {"name": "run"})), status=0)
    assert tiny.metrics(run, "train") == lines


def test_a_run_that_failed_before_its_first_line_can_be_corrected(
    main: Main, tiny_config: ConfigWriter, tmp_path: Path
) -> None:
    """Only a run that has trained counts as having another configuration."""
    own = tmp_path / "own.py"
    begins = "import torch\nfrom tetdist.optimizers import register_optimizer\n"
    begins += "@register_optimizer('own')\ndef make(groups, section): "
    changes = {"imports": [str(own)], "phases.0.optimizer": {"kind": "own", "lr": 0.1}}
    own.write_text(begins + "...\n")
    corrected = {"own": changes, "without": {}}
    for name in corrected:
        run = tmp_path / "runs" / name
        ended(main(tiny_config(changes), f"name={name}"), "own returns None, not an optimiser")
        assert (run / "config.yaml").is_file()
        (run / "mlflow_run_id").write_text("of the configuration that failed\n")
    own.write_text(begins + "return torch.optim.SGD(groups, lr=section.lr)\n")
    for name, configured in corrected.items():
        file = tiny_config(configured)
        ended(main(file, f"name={name}", "max_steps=1"), status=0)
        assert not (tmp_path / "runs" / name / "mlflow_run_id").exists()
        ended(main(file, f"name={name}", "max_steps=2"), "from step 1", status=0)


# --- starting from a checkpoint ----------------------------------------------------------------


def test_init_checkpoint(
    main: Main, straight: Callable[[str], Path], tiny_config: ConfigWriter, tmp_path: Path
) -> None:
    """Given weights at T=2, trained further at T=3: training starts from them."""
    source = straight("torch")
    changes = {"phases.0.timesteps": 3, "phases.0.optimizer.lr": 1e-12, "max_steps": 1}
    config = tiny_config(changes | {"model.neuron.decay": 1.0})
    outcome = main(config, f"init_checkpoint={source}")
    ended(outcome, f"beginning with the weights of {source} (step {LAST_STEP}, T=2)", status=0)
    assert "another network: model.neuron.decay is 1.0 and was 0.5" in outcome.text
    weights = [
        load_file(tiny.newest(run) / "model.safetensors")
        for run in (source, tmp_path / "runs/tiny")
    ]
    for key, value in weights[0].items():
        if "running" not in key:
            torch.testing.assert_close(value, weights[1][key], rtol=1e-5, atol=1e-9, msg=key)
    # Continuing does not need it any more.
    ended(main(config, "init_checkpoint=/nowhere", "max_steps=2"), "another configuration")
    (tmp_path / "runs/tiny/config.yaml").write_text(
        (tmp_path / "runs/tiny/config.yaml").read_text().replace(str(source), "/nowhere")
    )
    ended(main(config, "init_checkpoint=/nowhere", "max_steps=2"), "from step 1", status=0)


def test_init_checkpoint_that_does_not_suit(
    main: Main, straight: Callable[[str], Path], tiny_config: ConfigWriter, tmp_path: Path
) -> None:
    source = f"init_checkpoint={straight('torch')}"
    ended(main(tiny_config(), "init_checkpoint=/nowhere"), "/nowhere")
    ended(main(tiny_config({"model.num_classes": 7}), source), "another model", "fc.weight")
    ended(
        main(tiny_config(), "start_phase=1", source),
        "start_phase=1: this run has one phase, number 0",
    )
    two = tiny_config({"phases": TWO_PHASES})
    ended(main(two, "start_phase=1"), "set init_checkpoint")
    ended(
        main(two, "start_phase=1", source, "max_steps=3"), "max_steps=3 ends the run before phase 1"
    )
    assert not (tmp_path / "runs").exists()


def test_start_phase_is_the_rest_of_the_recipe(
    main: Main, straight: Callable[[str], Path], tiny_config: ConfigWriter, tmp_path: Path
) -> None:
    """Another run from the first phase's checkpoint equals the second phase."""
    changes = VARIANTS["phases"]
    ended(main(tiny_config({"name": "first"} | changes), "max_steps=5"), status=0)
    start = [f"init_checkpoint={tmp_path / 'runs/first'}", "start_phase=1"]
    ended(main(tiny_config({"name": "second"} | changes), *start), status=0)
    both, second = straight("phases"), tmp_path / "runs/second"
    theirs = [line for line in tiny.metrics(both, "train") if line["phase"] == 1]
    assert tiny.metrics(second, "train") == theirs
    weights = [load_file(tiny.newest(run) / "model.safetensors") for run in (both, second)]
    assert [key for key in weights[0] if not torch.equal(weights[0][key], weights[1][key])] == []


def test_damaged_checkpoints(main: Main, tiny_config: ConfigWriter, tmp_path: Path) -> None:
    file = tiny_config({"name": "run"})
    ended(main(file), status=0)
    run, straight = tmp_path / "runs/run", tmp_path / "runs/straight"
    shutil.copytree(run, straight)
    os.truncate(tiny.newest(run) / "optimizer.pt", 100)
    ended(main(file), "step-00000010: optimizer.pt has 100 bytes", status=0)
    tiny.assert_same_run(run, straight)
    for path in (run / "checkpoints").glob("step-*"):
        os.truncate(path / "model.safetensors", 100)
    ended(main(file), "2 checkpoints", "no undamaged one")
    assert len(list((run / "checkpoints").glob("step-*"))) == 2


def test_full_disk_in_training(
    main: Main, farm: Farm, tiny_config: ConfigWriter, tmp_path: Path
) -> None:
    """A checkpoint that cannot be written ends the run; with room it goes on to the same end."""
    code = f"""
import resource, signal, sys
from tetdist.apps.cli import train
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from tetdist.training import trainer
enter = trainer.Trainer._train_epoch
def train_epoch(self):
    if self.step == 5:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))
    enter(self)
trainer.Trainer._train_epoch = train_epoch
sys.exit(train.main(["--config", {str(tiny_config())!r}, "engine=torch"]))
"""
    ((status, output),) = farm.side_by_side(1, tiny.python("-c", code), tmp_path)
    assert status == 2, output
    assert "could not be written" in output or "cannot write" in output
    assert "Traceback" not in output
    ended(main(tiny_config()), "continuing", "step 5", "is finished", status=0)
    ended(main(tiny_config(), "name=straight"), status=0)
    tiny.assert_same_run(tmp_path / "runs/tiny", tmp_path / "runs/straight")


def test_mlflow_has_the_run_and_its_phases(
    farm: Farm, tiny_config: ConfigWriter, tmp_path: Path
) -> None:
    tracking = {"mlflow": True, "experiment": "tiny", "log_checkpoint": "last", "register": "t"}
    file = tiny_config({"tracking": tracking, "plots": True, "phases": TURNING})
    run = tmp_path / "runs/tiny"

    def rows(query: str) -> list[Any]:
        with sqlite3.connect(tmp_path / "runs/mlflow.db") as store:
            return store.execute(query).fetchall()

    def of(uuid: str, table: str) -> dict[str, str]:
        return dict(rows(f"select key, value from {table} where run_uuid = '{uuid}'"))

    def losses(uuid: str) -> list[Any]:
        where = f"where key = 'train/loss' and run_uuid = '{uuid}' order by step"
        return rows(f"select step, value from metrics {where}")

    names = ("tiny", "phase 0: T=1 to 3", "phase 1: T=1 or 2")
    # After the second phase's first step.
    first = farm(file, stop=("step", 6, TERM))
    assert first.status == 143, first.text
    stopped = zip(names, ("KILLED", "FINISHED", "KILLED"), strict=True)
    assert dict(rows("select name, status from runs")) == dict(stopped)
    second = farm(file)
    assert second.status == 0, second.text
    assert "mlflow ui --workers 1 --backend-store-uri" in second.text
    assert dict(rows("select name, status from runs")) == dict.fromkeys(names, "FINISHED")
    uuids = dict(rows("select name, run_uuid from runs"))
    parent, lines = uuids["tiny"], tiny.metrics(run, "train")
    assert losses(parent) == [(line["step"], line["loss"]) for line in lines]
    for number, name in enumerate(names[1:]):
        points = [(x["step"], x["loss"]) for x in lines if x["phase"] == number]
        assert losses(uuids[name]) == points
        assert of(uuids[name], "params")["timesteps"] == ("1 to 3", "1 or 2")[number]
        assert of(uuids[name], "tags")["mlflow.parentRunId"] == parent
    assert of(parent, "params")["phases.0.optimizer.lr"] == "0.05"
    tags = of(parent, "tags")
    assert tags["resumed_at_step"] == "6"
    for tag, which in (("checkpoint", "last"), ("best_checkpoint", "best")):
        newest = (run / "checkpoints" / which).read_text().strip()
        assert tags[tag] == str(run / "checkpoints" / newest)
    assert Path(tags["run_dir"]) == run
    assert (tags["split"], tags["timesteps"]) == ("val", "1 to 3 then 1 or 2")
    assert (tags["loss"], tags["self_distillation"]) == ("sdt then tet", "0.5")
    assert "| 1 | 1 | 1 or 2 | sgd | 0.05, cosine |" in tags["mlflow.note.content"]
    loss = "SDT: cross-entropy of the time-mean; then TET, lambda 0.001, phi 1; 0.5 x divergence"
    assert f"\nLoss: {loss} from the time-mean, " in tags["mlflow.note.content"]
    assert dict(rows("select name, digest from datasets")).keys() == {"data/train", "data/val"}
    (final,) = rows("select step, value from metrics where key = 'final/top1'")
    assert final == (10, tiny.metrics(run, "val")[-1]["top1"])
    ((source, description),) = rows(
        "select source, description from model_versions where name = 't'"
    )
    registered = Path(source.removeprefix("file://")) / "model.safetensors"
    summary = f"The last checkpoint of tiny, of step 10: top-1 {final[1]:.2f} % on val.\n\n"
    assert description == summary + tags["mlflow.note.content"]
    assert registered.read_bytes() == (tiny.newest(run) / "model.safetensors").read_bytes()
    plots = {path.name for path in registered.parents[2].glob("plots/*")}
    assert plots == {"learning_curves.png", "firing_rates.png", "membranes.png", "inputs.png"}


def test_description_in_the_model_file(straight: Callable[[str], Path]) -> None:
    from tetdist.storage import checkpoint

    _, description = checkpoint.load_model_file(straight("phases"))
    assert description.classes == list(tiny.CLASSES)
    assert (description.timesteps, description.step) == (3, LAST_STEP)
    last = tiny.metrics(straight("phases"), "val")[-1]
    assert description.validation["top1"] == last["top1"]
