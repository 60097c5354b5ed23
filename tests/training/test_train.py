"""Whole runs: the same whatever stops them, and a sentence for whatever is wrong with them."""

import fcntl
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
from safetensors.torch import load_file, save_file
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
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    # Lines of metrics that a stop cuts in two, checkpoints between them, clipped gradients.
    "sparse": {"log_every": 3, "save.every_steps": 2, "gradient_clipping": 1.0},
    "phases": {"phases": TWO_PHASES, "log_every": 4},
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


STOPS = [
    *(
        ("default", point, number, sig)
        for point, number, sig in [
            ("micro", 1, TERM),
            ("micro", 3, KILL),
            ("micro", 14, INT),
            ("micro", 26, KILL),
            ("step", 1, KILL),
            ("step", 1, USR1),
            ("step", 5, TERM),
            ("step", 6, INT),
            ("step", 10, TERM),
            ("step", 10, KILL),
            ("evaluate", 1, TERM),
            ("evaluate", 4, TERM),
            ("evaluate", 3, KILL),
            ("evaluate", 7, INT),
            ("evaluate", 8, KILL),
            ("save", 1, KILL),
            ("save", 2, KILL),
            ("save", 2, TERM),
            ("saved", 1, KILL),
            ("saved", 2, TERM),
            ("log", 5, KILL),
            ("log", 6, KILL),
            ("log", 12, KILL),
        ]
    ),
    *(
        ("sparse", point, number, sig)
        for point, number, sig in [
            ("step", 2, TERM),
            ("step", 4, TERM),
            ("step", 7, TERM),
            ("step", 8, KILL),
            ("micro", 33, KILL),
            ("save", 2, KILL),
            ("evaluate", 2, TERM),
            ("log", 2, KILL),
            ("step", 9, INT),
        ]
    ),
    *(
        ("phases", point, number, sig)
        for point, number, sig in [
            ("step", 4, TERM),
            ("step", 5, TERM),
            ("step", 5, KILL),
            ("evaluate", 2, TERM),
            ("saved", 1, KILL),
            ("saved", 1, TERM),
            ("step", 6, TERM),
            ("step", 7, KILL),
            ("evaluate", 6, TERM),
        ]
    ),
    *(
        ("rare", point, number, sig)
        for point, number, sig in [
            ("step", 5, TERM),
            ("step", 7, INT),
            ("save", 1, KILL),
            ("saved", 1, KILL),
        ]
    ),
    ("torch", "step", 7, TERM),
    ("torch", "micro", 30, KILL),
    ("augmented", "micro", 14, KILL),
]


# Of the many, one of each kind is enough for every day.
EVERY_DAY = {
    ("default", "micro", 3),
    ("default", "step", 6),
    ("default", "evaluate", 8),
    ("default", "save", 2),
    ("sparse", "micro", 33),
    ("phases", "step", 5),
    ("phases", "saved", 1),
    ("phases", "step", 7),
    ("rare", "step", 7),
    ("torch", "step", 7),
    ("augmented", "micro", 14),
}


@pytest.mark.parametrize(
    ("variant", "point", "number", "sig"),
    [
        pytest.param(
            *stop,
            id=f"{stop[0]}-{stop[1]}-{stop[2]}-{stop[3].name}",
            marks=() if stop[:3] in EVERY_DAY else pytest.mark.long,
        )
        for stop in STOPS
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


@pytest.mark.long
def test_stopped_again_and_again(
    farm: Farm, straight: Callable[[str], Path], tiny_config: ConfigWriter, tmp_path: Path
) -> None:
    expected = straight("sparse")
    file = tiny_config({"name": "sparse"} | VARIANTS["sparse"])
    starts = 0
    while (outcome := farm(file, stop=("step", 1, TERM))).status == 128 + TERM:
        starts += 1
        assert starts < 20
    assert outcome.status == 0, outcome.text
    assert starts >= 9
    tiny.assert_same_run(tmp_path / "runs" / "sparse", expected)


# --- several processes -------------------------------------------------------------------------


def assert_close_runs(a: Path, b: Path, steps: int = 3) -> None:
    for kind, keys in (("train", ("loss", "grad_norm", "lr", "epoch")),):
        for ours, theirs in zip(
            tiny.metrics(a, kind)[:steps], tiny.metrics(b, kind)[:steps], strict=True
        ):
            assert ours["step"] == theirs["step"]
            for key in keys:
                assert ours[key] == pytest.approx(theirs[key], rel=1e-5), (ours["step"], key)


@pytest.mark.parametrize("variant", ["default", "torch", "augmented"])
def test_two_processes_are_the_run_of_one(
    variant: str,
    farm: Farm,
    straight: Callable[[str], Path],
    tiny_config: ConfigWriter,
    tmp_path: Path,
) -> None:
    file = tiny_config({"name": variant} | VARIANTS[variant])
    outcome = farm(file, world=2)
    assert outcome.status == 0, outcome.text
    run = tmp_path / "runs" / variant
    assert_close_runs(run, straight(variant))
    assert [line["samples"] for line in tiny.metrics(run, "val")] == [23, 23]
    assert [line["step"] for line in tiny.metrics(run)] == [
        line["step"] for line in tiny.metrics(straight(variant))
    ]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (1, 2),
        pytest.param(2, 4, marks=pytest.mark.long),
        pytest.param(2, 1, marks=pytest.mark.long),
    ],
)
def test_continued_at_another_world_size(
    before: int,
    after: int,
    farm: Farm,
    tiny_config: ConfigWriter,
    tmp_path: Path,
) -> None:
    """In mid-epoch, in the middle of a line of metrics."""
    changes = {"log_every": 5, "phases.0.epochs": 1, "phases.0.optimizer.lr": 0.001}
    expected = farm(tiny_config({"name": "one"} | changes))
    assert expected.status == 0, expected.text
    file = tiny_config({"name": "run"} | changes)
    first = farm(file, world=before, stop=("step", 2, TERM), rank=before - 1)
    assert first.status == 128 + TERM, first.text
    step = json.loads((tiny.newest(tmp_path / "runs/run") / "state.json").read_text())["step"]
    assert 2 <= step <= 4
    second = farm(file, world=after)
    assert second.status == 0, second.text
    (ours,) = tiny.metrics(tmp_path / "runs/run", "train")
    (theirs,) = tiny.metrics(tmp_path / "runs/one", "train")
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    weights = [
        load_file(tiny.newest(tmp_path / "runs" / n) / "model.safetensors") for n in ("run", "one")
    ]
    for key, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][key], rtol=1e-3, atol=1e-4, msg=key)


@pytest.mark.parametrize(
    ("point", "number", "sig"),
    [
        ("step", 7, TERM),
        pytest.param("evaluate", 2, TERM, marks=pytest.mark.long),
        pytest.param("micro", 13, INT, marks=pytest.mark.long),
    ],
)
def test_two_processes_stop_together_and_continue_to_the_bit(
    point: str,
    number: int,
    sig: signal.Signals,
    farm: Farm,
    tiny_config: ConfigWriter,
    tmp_path: Path,
) -> None:
    assert farm(tiny_config({"name": "straight"}), world=2).status == 0
    file = tiny_config({"name": "run"})
    first = farm(file, world=2, stop=(point, number, sig), rank=1)
    assert first.status == 128 + sig, first.text
    second = farm(file, world=2)
    assert second.status == 0, second.text
    tiny.assert_same_run(tmp_path / "runs/run", tmp_path / "runs/straight")


@pytest.mark.parametrize("world", [3, 8])
def test_world_size_that_does_not_divide(world: int, farm: Farm, tiny_config: ConfigWriter) -> None:
    """4 micro-batches a step."""
    outcome = farm(tiny_config(), world=world)
    assert outcome.status == 2, outcome.text
    assert outcome.text.count("error:") == 1, outcome.text
    assert "Traceback" not in outcome.text
    assert "1, 2" in outcome.text


def test_user_error_on_two_processes_is_said_once(farm: Farm, tiny_config: ConfigWriter) -> None:
    for override in ("data.root=/nowhere", "sede=1"):
        outcome = farm(tiny_config(), override, world=2)
        assert outcome.status == 2, outcome.text
        assert outcome.text.count("error:") == 1
        assert "Traceback" not in outcome.text


def test_both_engines_are_the_same_run(straight: Callable[[str], Path]) -> None:
    assert tiny.metrics(straight("default")) == tiny.metrics(straight("torch"))


def test_non_finite_on_two_processes(farm: Farm, tiny_config: ConfigWriter) -> None:
    outcome = farm(tiny_config({"phases.0.optimizer.lr": 1e30}), world=2)
    assert outcome.status == 2, outcome.text
    assert outcome.text.count("error:") == 1
    assert "Traceback" not in outcome.text


# --- whole programs ----------------------------------------------------------------------------


def test_ctrl_c_from_outside(tiny_config: ConfigWriter, tmp_path: Path) -> None:
    """The real command, started alone and interrupted by its pid somewhere in the middle."""
    changes = {"phases.0.epochs": 400, "evaluate_every": 1000}
    command = tiny.python(tiny.TRAIN, "--config", tiny_config(changes))
    with tiny.started(command, tmp_path) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "step 12/" in line:
                break
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "all saved; the same command continues" in output
    assert "Traceback" not in output
    step = json.loads((tiny.newest(tmp_path / "runs/tiny") / "state.json").read_text())["step"]
    assert 12 <= step < 2000
    assert tiny.metrics(tmp_path / "runs/tiny")[-1]["step"] == step


@pytest.mark.long
def test_launcher_with_two_processes(
    straight: Callable[[str], Path], tiny_config: ConfigWriter, tmp_path: Path
) -> None:
    file = tiny_config({"name": "default"})
    command = tiny.launched(2, tiny.TRAIN, "--config", file)
    status, output = tiny.execute(command, tmp_path)
    assert status == 0, output
    assert output.count("is finished") == 1
    assert_close_runs(tmp_path / "runs/default", straight("default"))


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


def test_ctrl_c_under_the_launcher(tiny_config: ConfigWriter, tmp_path: Path) -> None:
    """A terminal's Ctrl-C goes to the launcher and to all processes: they save, nobody dies."""
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


@pytest.mark.long
def test_user_error_under_the_launcher(tiny_config: ConfigWriter, tmp_path: Path) -> None:
    command = tiny.launched(2, tiny.TRAIN, "--config", tiny_config(), "data.root=/nowhere")
    status, output = tiny.execute(command, tmp_path)
    assert status == 2, output
    assert output.count("error: data.root") == 1, output
    assert "Traceback" not in output


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
    for package in ("pydantic",):
        (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules[{package!r}] = None\n")
        env = tiny.clean_environment(PYTHONPATH=str(tmp_path))
        command = tiny.python(tiny.TRAIN, "--config", tiny_config())
        status, output = tiny.execute(command, tmp_path, env=env)
        assert status == 2, output
        assert "Traceback" not in output
        assert f"the package {package} is not installed" in output
        assert "pip install" in output


# --- what a run leaves and says ----------------------------------------------------------------


def ended(outcome: Outcome, *parts: str, status: int = 2) -> None:
    assert outcome.status == status, outcome.text
    assert "Traceback" not in outcome.text, outcome.text
    assert [part for part in parts if part not in outcome.text] == [], outcome.text


def test_finished_run_says_so_and_changes_nothing(
    main: Main, tiny_config: ConfigWriter, tmp_path: Path
) -> None:
    file = tiny_config({"plots": True})
    run = tmp_path / "runs/tiny"
    start = f"samples an epoch, {LAST_STEP} in all; {run}"
    outcome = main(file)
    ended(outcome, start, "runs/tiny is finished", "top-1", "tools/eval.py", status=0)
    assert "training spiking_convnet, 2,472 parameters, in fp32 on cpu, 1 process" in outcome.text
    assert sorted(path.name for path in run.iterdir()) == [
        ".lock",
        "checkpoints",
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "plots",
    ]
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    outcome = main(file)
    ended(outcome, "runs/tiny is finished", "top-1", status=0)
    assert start not in outcome.text
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    best = max(tiny.metrics(run, "val"), key=lambda line: line["top1"])
    assert tiny.metrics(run, "val")[-1]["best_top1"] == best["top1"]


def test_it_learns(main: Main, tiny_config: ConfigWriter, tmp_path: Path) -> None:
    """Chance is 25 %."""
    ended(main(tiny_config({"phases.0.epochs": 8, "evaluate_every": 8})), status=0)
    (val,) = tiny.metrics(tmp_path / "runs/tiny", "val")
    assert val["top1"] > 60
    lines = tiny.metrics(tmp_path / "runs/tiny", "train")
    assert [line["step"] for line in lines] == list(range(1, 41))


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
    ended(main(file, "resume=never"), status=0)
    ended(main(file, "resume=never"), "resume=never", str(tmp_path / "runs/tiny"), "name=")
    ended(main(file, "resume=must", "max_steps=4"), "continuing", "step 2", status=0)


def test_refused_start_leaves_no_run_folder(
    main: Main, tiny_config: ConfigWriter, tmp_path: Path
) -> None:
    ended(main(tiny_config(), "resume=must"))
    ended(main(tiny_config(), "data.root=/nowhere"))
    assert not (tmp_path / "runs").exists()


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
    for text in ("", "a: [1", "- 1\n"):
        (tmp_path / "runs/tiny/config.yaml").write_text(text)
        ended(main(file, "max_steps=2"), "config.yaml")


def test_locked_run_folder(main: Main, tiny_config: ConfigWriter, tmp_path: Path) -> None:
    file = tiny_config({"max_steps": 1})
    ended(main(file), status=0)
    with (tmp_path / "runs/tiny/.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        ended(main(file), "another process is running in", "runs/tiny")
    ended(main(file), status=0)


def test_two_runs_in_one_folder_at_once(
    main: Main, tiny_config: ConfigWriter, tmp_path: Path
) -> None:
    changes = {"phases.0.epochs": 4000, "evaluate_every": 4000}
    file = tiny_config(changes | {"engine": "torch"})
    with tiny.started(tiny.python(tiny.TRAIN, "--config", file), tmp_path) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "step 1/" in line:
                break
        ended(main(file), "another process is running")
        process.terminate()
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 143, output


def test_read_only_place(main: Main, tiny_config: ConfigWriter, tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    ended(main(tiny_config()), "cannot write to", str(tmp_path / "runs"))


def test_read_only_run_folder(tiny_config: ConfigWriter, tmp_path: Path) -> None:
    """Told apart from a full disk, before training. Root is made to obey permissions, too."""
    file = tiny_config({"engine": "torch", "max_steps": 1})
    command = tiny.python(tiny.TRAIN, "--config", file)
    if os.geteuid() == 0:
        drop = "-dac_override,-dac_read_search"
        command = ["setpriv", "--bounding-set", drop, "--inh-caps", drop, *command]
    runs = tmp_path / "runs"
    runs.mkdir()
    runs.chmod(0o555)
    try:
        status, output = tiny.execute(command, tmp_path)
    finally:
        runs.chmod(0o755)
    assert status == 2, output
    assert f"cannot write to {runs / 'tiny'}: Permission denied" in output
    assert "give yourself permission" in output
    assert "make room" not in output
    assert "Traceback" not in output


def test_other_data_than_the_checkpoint(
    main: Main, tiny_copy: Path, tiny_config: ConfigWriter
) -> None:
    from tetdist.datasets import index

    file = tiny_config({"max_steps": 2, "data.root": str(tiny_copy)})
    ended(main(file), status=0)
    (tiny_copy / "train/up/11.png").unlink()
    index.index_splits(tiny_copy, ["train"])
    ended(main(file, "max_steps=4"), "trained on other data", "another name")


def test_data_may_move(
    main: Main, tiny_root: Path, tiny_config: ConfigWriter, tmp_path: Path
) -> None:
    file = tiny_config({"max_steps": 2})
    ended(main(file), status=0)
    moved = Path(shutil.copytree(tiny_root, tmp_path / "elsewhere"))
    ended(main(file, "max_steps=4", f"data.root={moved}"), "continuing", status=0)


def spoil_nothing_there(root: Path) -> None:
    shutil.rmtree(root)


def spoil_no_index(root: Path) -> None:
    shutil.rmtree(root / "index")


def spoil_no_val_index(root: Path) -> None:
    (root / "index/val.npz").unlink()


def spoil_no_val(root: Path) -> None:
    shutil.rmtree(root / "val")


def spoil_no_class(root: Path) -> None:
    shutil.rmtree(root / "val/up")


def spoil_new_file(root: Path) -> None:
    shutil.copy(root / "train/up/00.png", root / "train/up/99.png")


def spoil_size(root: Path) -> None:
    with (root / "train/down/00.png").open("ab") as stream:
        stream.write(b"more")


def spoil_index(root: Path) -> None:
    file = root / "index/train.npz"
    os.truncate(file, file.stat().st_size // 2)


@pytest.mark.parametrize(
    ("spoil", "parts"),
    [
        (spoil_nothing_there, ("data.root", "there is no folder")),
        (spoil_no_index, ("train.npz", "python tools/images.py index")),
        (spoil_no_val_index, ("val.npz", "python tools/images.py index")),
        (spoil_no_val, ("val", "no folder")),
        (spoil_no_class, ("val/up", "index the data again")),
        (spoil_new_file, ("train/up/99.png", "index the data again")),
        (spoil_size, ("train/down/00.png", "index the data again")),
        (spoil_index, ("train.npz", "damaged")),
    ],
)
def test_data_that_is_not_there(
    spoil: Callable[[Path], None],
    parts: tuple[str, ...],
    main: Main,
    tiny_copy: Path,
    tiny_config: ConfigWriter,
    tmp_path: Path,
) -> None:
    spoil(tiny_copy)
    ended(main(tiny_config({"data.root": str(tiny_copy)})), "error:", *parts)
    assert not (tmp_path / "runs").exists()


def test_file_that_breaks_after_indexing(
    main: Main, tiny_copy: Path, tiny_config: ConfigWriter
) -> None:
    """Same size and name, so that only decoding finds out: in training, and in evaluation."""
    for split in ("train", "val"):
        file = tiny_copy / split / "left/03.png"
        whole, status = file.read_bytes(), file.stat()
        file.write_bytes(whole[:60] + bytes(len(whole) - 60))
        # As a failing disk does it: nobody has touched the file.
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
        config = tiny_config({"data.root": str(tiny_copy), "name": split})
        ended(main(config), "error:", f"{split}/left/03.png")
        file.write_bytes(whole)
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
        ended(main(config), "is finished", status=0)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"model.num_classes": 3}, ("model.num_classes", "3", "4 classes")),
        ({"model.arguments": {"channls": [4]}}, ("model.arguments", "channls")),
        ({"model.arguments": {"channels": [4, 8]}}, ("16x16", "input_size=16")),
        ({"batch.global": 64, "batch.micro": 2}, ("global batch", "64", "47")),
        ({"phases.0.image_size": 32}, ("16x16", "32x32", "all phases")),
        (
            {"data.image_size": 32, "data.resize": 36, "data.crop": "padded"},
            ("20", "24", "padding=4"),
        ),
        ({"data.crop": "padded", "data.padding": 16}, ("data.padding", "16")),
        ({"data.mixup": 0.2, "batch.micro": 1}, ("batch.micro", "data.mixup")),
        ({"data.device": "gpu"}, ("data.device",)),
        ({"device": "cuda"}, ("device=cuda",)),
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


@pytest.mark.parametrize("engine", ["torch", "deepspeed"])
def test_non_finite_loss_names_step_rate_and_checkpoint(
    engine: str, farm: Farm, tiny_config: ConfigWriter, tmp_path: Path
) -> None:
    lr = {"phases.0.optimizer.lr": 1e30}
    file = tiny_config({"engine": engine, "save.every_steps": 1, "non_finite_limit": 3} | lr)
    outcome = farm(file)
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
    good = farm(file, "name=good", f"max_steps={last - 3}")
    assert good.status == 0, good.text
    ours, theirs = (
        load_file(tiny.newest(r) / "model.safetensors") for r in (run, run.parent / "good")
    )
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []
    # The same command goes on counting where it was, and fails in the same step.
    assert f"last at step {last} " in farm(file).text


def test_non_finite_on_one_process_names_it(
    farm: Farm, tiny_config: ConfigWriter, tmp_path: Path
) -> None:
    """Pixels that are not numbers, on rank 1 alone: no update anywhere, and rank 1 is to blame."""
    file = tiny_config({"engine": "torch", "non_finite_limit": 2})
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
    (line,) = tiny.metrics(tmp_path / "runs/tiny", "train")
    assert line["non_finite_steps"] == 1


def test_a_few_non_finite_steps_end_nothing(
    main: Main, tiny_config: ConfigWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps 4 and 5 change nothing and count for nothing but themselves."""
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


def test_float16_is_refused_on_a_cpu(main: Main, tiny_config: ConfigWriter) -> None:
    ended(main(tiny_config({"precision": "fp16"})), "fp16 needs a GPU", "bf16 or fp32")


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


# --- starting from a checkpoint ----------------------------------------------------------------


def test_init_checkpoint(
    main: Main, straight: Callable[[str], Path], tiny_config: ConfigWriter, tmp_path: Path
) -> None:
    """Somebody's weights at T=2, trained on at T=3: they are where it begins."""
    source = straight("torch")
    config = tiny_config({"phases.0.timesteps": 3, "phases.0.optimizer.lr": 1e-12, "max_steps": 1})
    outcome = main(config, f"init_checkpoint={source}")
    ended(outcome, f"beginning with the weights of {source} (step {LAST_STEP}, T=2)", status=0)
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
    ended(main(tiny_config(), "start_phase=1", source), "start_phase: 1 is none of the phases")
    two = tiny_config({"phases": TWO_PHASES})
    ended(main(two, "start_phase=1"), "set init_checkpoint")
    ended(main(two, "start_phase=1", source, "max_steps=3"), "max_steps: 3 ends before phase 1")
    assert not (tmp_path / "runs").exists()


def test_init_checkpoint_of_another_neuron_is_said(
    main: Main, straight: Callable[[str], Path], tiny_config: ConfigWriter
) -> None:
    changes = {"model.neuron.decay": 1.0, "max_steps": 1}
    outcome = main(tiny_config(changes), f"init_checkpoint={straight('torch')}")
    ended(outcome, "another network: model.neuron.decay is 1.0 and was 0.5", status=0)


def test_start_phase_is_the_rest_of_the_recipe(
    main: Main, farm: Farm, tiny_config: ConfigWriter, tmp_path: Path
) -> None:
    """What the second phase does from the first one's checkpoint, another run does from there."""
    changes = {"phases": TWO_PHASES}
    assert farm(tiny_config({"name": "both"} | changes)).status == 0
    ended(main(tiny_config({"name": "first"} | changes), "max_steps=5"), status=0)
    start = [f"init_checkpoint={tmp_path / 'runs/first'}", "start_phase=1"]
    ended(main(tiny_config({"name": "second"} | changes), *start), status=0)
    both, second = tmp_path / "runs/both", tmp_path / "runs/second"
    theirs = [line for line in tiny.metrics(both, "train") if line["phase"] == 1]
    assert tiny.metrics(second, "train") == theirs
    weights = [load_file(tiny.newest(run) / "model.safetensors") for run in (both, second)]
    assert [key for key in weights[0] if not torch.equal(weights[0][key], weights[1][key])] == []


def test_checkpoint_of_another_model(main: Main, tiny_config: ConfigWriter, tmp_path: Path) -> None:
    """By hand only, since another configuration is refused before."""
    from tetdist.storage import checkpoint

    file = tiny_config({"max_steps": 2})
    ended(main(file), status=0)
    path = tiny.newest(tmp_path / "runs/tiny")
    weights = load_file(path / "model.safetensors")
    weights["fc.weight"] = weights["fc.weight"][:2].clone()
    save_file(weights, path / "model.safetensors")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["model.safetensors"] = checkpoint._describe(path / "model.safetensors")
    (path / "manifest.json").write_text(json.dumps(manifest))
    ended(main(file, "max_steps=4"), "another model", "fc.weight")


def test_damaged_checkpoints(main: Main, tiny_config: ConfigWriter, tmp_path: Path) -> None:
    file = tiny_config({"name": "run"})
    ended(main(file), status=0)
    run, straight = tmp_path / "runs/run", tmp_path / "runs/straight"
    shutil.copytree(run, straight)
    os.truncate(tiny.newest(run) / "optimizer.pt", 100)
    ended(main(file), "step-00000010 is not used: optimizer.pt has 100 bytes", status=0)
    tiny.assert_same_run(run, straight)
    for path in (run / "checkpoints").glob("step-*"):
        os.truncate(path / "model.safetensors", 100)
    ended(main(file), "of 2 checkpoints", "none is whole")
    assert len(list((run / "checkpoints").glob("step-*"))) == 2


def test_full_disk_in_training(main: Main, tiny_config: ConfigWriter, tmp_path: Path) -> None:
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
    status, output = tiny.execute(tiny.python("-c", code), tmp_path)
    assert status == 2, output
    assert "could not be written" in output or "cannot write" in output
    assert "Traceback" not in output
    ended(main(tiny_config()), "continuing", "step 5", "is finished", status=0)
    ended(main(tiny_config(), "name=straight"), status=0)
    tiny.assert_same_run(tmp_path / "runs/tiny", tmp_path / "runs/straight")


@pytest.mark.parametrize(
    "model",
    [
        {"name": "sew_resnet18", "arguments": {"width": 8}},
        {"name": "spiking_convnet", "arguments": {"channels": [4, 8, 8], "input_size": 16}},
    ],
    ids=lambda model: model["name"],
)
def test_recomputed_blocks_are_the_same_run(
    model: dict[str, Any], main: Main, tiny_config: ConfigWriter, tmp_path: Path
) -> None:
    for mode in ("none", "blocks"):
        file = tiny_config({"name": mode, "model": model, "recompute": mode, "max_steps": 4})
        ended(main(file), status=0)
    tiny.assert_same_run(tmp_path / "runs/none", tmp_path / "runs/blocks")


def test_mlflow_has_the_run(farm: Farm, tiny_config: ConfigWriter, tmp_path: Path) -> None:
    tracking = {"mlflow": True, "experiment": "tiny", "log_checkpoint": "last", "register": "t"}
    file = tiny_config({"tracking": tracking, "plots": True})
    first = farm(file, stop=("step", 4, TERM))
    assert first.status == 143, first.text
    second = farm(file)
    assert second.status == 0, second.text
    assert "mlflow ui --workers 1 --backend-store-uri" in second.text
    run = tmp_path / "runs/tiny"
    with sqlite3.connect(tmp_path / "runs/mlflow.db") as store:

        def rows(query: str) -> list[Any]:
            return store.execute(query).fetchall()

        ((name, status),) = rows("select name, status from runs")
        assert (name, status) == ("tiny", "FINISHED")
        params = dict(rows("select key, value from params"))
        assert params["phases.0.optimizer.lr"] == "0.05"
        tags = dict(rows("select key, value from tags"))
        assert tags["resumed_at_step"] == "4"
        for tag, which in (("checkpoint", "last"), ("best_checkpoint", "best")):
            newest = (run / "checkpoints" / which).read_text().strip()
            assert tags[tag] == str(run / "checkpoints" / newest)
        assert Path(tags["run_dir"]) == run
        assert tags["split"] == "val"
        assert "| 0 | 2 | 2 | sgd | 0.05, cosine |" in tags["mlflow.note.content"]
        assert "\nLoss: TET, lambda 0.001, phi 1.\n" in tags["mlflow.note.content"]
        assert dict(rows("select name, digest from datasets")).keys() == {"data/train", "data/val"}
        (final,) = rows("select step, value from metrics where key = 'final/top1'")
        assert final == (10, tiny.metrics(run, "val")[-1]["top1"])
        ((source, description),) = rows(
            "select source, description from model_versions where name = 't'"
        )
        losses = rows("select step, value from metrics where key = 'train/loss' order by step")
    registered = Path(source.removeprefix("file://")) / "model.safetensors"
    told = f"The last checkpoint of tiny, of step 10: top-1 {final[1]:.2f} % on val.\n\n"
    assert description == told + tags["mlflow.note.content"]
    assert registered.read_bytes() == (tiny.newest(run) / "model.safetensors").read_bytes()
    plots = {path.name for path in registered.parents[2].glob("plots/*")}
    assert plots == {"learning_curves.png", "firing_rates.png", "membranes.png", "inputs.png"}
    assert losses == [(line["step"], line["loss"]) for line in tiny.metrics(run, "train")]


def test_mlflow_has_the_phases(farm: Farm, tiny_config: ConfigWriter, tmp_path: Path) -> None:
    file = tiny_config({"tracking": {"mlflow": True}, "phases": TWO_PHASES})
    run = tmp_path / "runs/tiny"

    def rows(query: str) -> list[Any]:
        with sqlite3.connect(tmp_path / "runs/mlflow.db") as store:
            return store.execute(query).fetchall()

    def statuses() -> dict[str, str]:
        return dict(rows("select name, status from runs"))

    # After the first phase's last step, before its evaluation.
    first = farm(file, stop=("step", 5, TERM))
    assert first.status == 143, first.text
    assert statuses() == {"tiny": "KILLED", "phase 0: T=2": "KILLED"}
    # After the second phase's first step.
    second = farm(file, stop=("step", 1, TERM))
    assert second.status == 143, second.text
    begun = {"tiny": "KILLED", "phase 0: T=2": "FINISHED", "phase 1: T=3": "KILLED"}
    assert statuses() == begun
    # Nothing is saved, and the store may have more than the checkpoint knows of.
    third = farm(file, stop=("step", 3, KILL))
    assert third.status == -KILL, third.text
    assert farm(file).status == 0
    assert statuses() == dict.fromkeys(begun, "FINISHED")
    assert len(rows("select * from runs")) == 3

    ((parent,),) = rows("select run_uuid from runs where name = 'tiny'")
    parents = rows("select value from tags where key = 'mlflow.parentRunId'")
    assert parents == [(parent,)] * 2
    of_parent = f"select value from tags where key = 'timesteps' and run_uuid = '{parent}'"
    assert rows(of_parent) == [("2 then 3",)]
    for number, (name, kind) in enumerate([("phase 0: T=2", "sgd"), ("phase 1: T=3", "adam")]):
        ((child,),) = rows(f"select run_uuid from runs where name = '{name}'")
        params = dict(rows(f"select key, value from params where run_uuid = '{child}'"))
        assert params["timesteps"] == str(TWO_PHASES[number]["timesteps"])
        assert params["optimizer.kind"] == kind
        for key in ("train/loss", "val/top1"):
            of_key = f"from metrics where key = '{key}' and run_uuid ="
            points = rows(f"select step, value {of_key} '{child}' order by step")
            lines = tiny.metrics(run, key.split("/")[0])
            value = key.split("/")[1]
            assert points == [(x["step"], x[value]) for x in lines if x["phase"] == number]
            points = rows(f"select step, value {of_key} '{parent}' order by step")
            assert points == [(x["step"], x[value]) for x in lines]


def test_description_in_the_model_file(straight: Callable[[str], Path]) -> None:
    from tetdist.storage import checkpoint

    _, description = checkpoint.load_model_file(straight("phases"))
    assert description.classes == list(tiny.CLASSES)
    assert (description.timesteps, description.step) == (3, LAST_STEP)
    last = tiny.metrics(straight("phases"), "val")[-1]
    assert description.validation["top1"] == last["top1"]
