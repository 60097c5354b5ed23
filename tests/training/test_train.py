"""Whole runs: the same result after any stop, and one sentence for each mistake."""

import errno
import json
import os
import re
import shutil
import signal
import sqlite3
from pathlib import Path
from urllib.request import url2pathname

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from tiny import expect, refused

from tetdist.config.loading import load
from tetdist.datasets import index
from tetdist.storage import checkpoint, selection
from tetdist.training import prepared
from tetdist.training import step as step_module
from tetdist.training.engines import base
from tetdist.training.run_folder import is_trained

TERM, INT, KILL, USR1 = signal.SIGTERM, signal.SIGINT, signal.SIGKILL, signal.SIGUSR1
# Of the default configuration: 2 epochs of 5 steps of 4 micro-batches, evaluated in 4 batches.
LAST_STEP = 10

TWO_PHASES = [
    {"epochs": 1, "timesteps": 2, "optimizer": {"kind": "sgd", "lr": 0.05, "momentum": 0.9}},
    # The first one's momentum would fit the second optimiser, and would be wrong.
    {"epochs": 1, "timesteps": 3, "optimizer": {"kind": "sgd", "lr": 0.01, "momentum": 0.5}},
]
TURNING = [
    {"epochs": 1, "timesteps": {"from": 1, "to": 3}, "loss": {"kind": "sdt"}}
    | {"optimizer": {"kind": "sgd", "lr": 0.05, "momentum": 0.9}},
    {"epochs": 1, "timesteps": [1, 2], "optimizer": "continue"}
    | {"loss": {"distillation": {"self_weight": 0.5}}},
]
VARIANTS = {
    "default": {},
    # Lines of metrics that a stop cuts in two, checkpoints between them, clipped gradients.
    "sparse": {"log_every": 3, "save.every_steps": 2, "gradient_clipping": 1.0},
    "phases": {"phases": TWO_PHASES, "log_every": 4, "evaluate_every": 2, "precision": "bf16"},
    # T drawn by step; the optimiser goes on from SDT to TET.
    "turned": {"phases": TURNING, "save.every_steps": 2, "ema.decay": 0.8, "recompute": "blocks"},
    "torch": {"engine": "torch"},
    "frozen": {"model.freeze": ["stem", "blocks.0"], "save.every_steps": 2},
    "augmented": {
        "data.crop": "padded",
        "data.auto_augment": "cifar10",
        "data.color_jitter": [0.3, 0, 0, 0.1],
        "data.cutout": 4,
        "data.mixup": 0.4,
        "data.cutmix": 1.0,
        "data.mixing": {"mode": "batch", "probability": 0.7, "off_epoch": 1},
        "loss.label_smoothing": 0.1,
    },
    "as_events": {"data.images_as_events": {"ratio": 0.15}, "data.cutout": 4, "data.mixup": 0.4},
}


@pytest.fixture(scope="module")
def straight(farm, tiny_root, tmp_path_factory):
    """The run folder of a variant that nothing stopped; made once."""
    folder = tmp_path_factory.mktemp("straight")
    made = set()

    def get(variant):
        if variant not in made:
            file = tiny.write_config(folder / f"{variant}.yaml", tiny_root, VARIANTS[variant])
            expect(farm(file))
            made.add(variant)
        return folder / "runs" / variant

    return get


@pytest.mark.parametrize(
    ("variant", "point", "number", "sig"),
    [
        ("default", "step", 6, INT),
        ("default", "evaluate", 8, KILL),
        ("default", "save", 2, TERM),
        ("sparse", "micro", 33, KILL),
        ("turned", "save", 2, KILL),  # in mid-write, while training goes on
        ("phases", "saved", 1, KILL),  # at the phases' border
        ("phases", "step", 7, USR1),
        ("turned", "step", 8, KILL),
        ("augmented", "micro", 14, KILL),
        ("as_events", "micro", 14, KILL),
        ("frozen", "step", 5, KILL),
    ],
)
def test_stopped_and_continued_is_the_straight_run(
    variant, point, number, sig, farm, straight, tiny_config, tmp_path
):
    expected = straight(variant)
    file = tiny_config({"name": variant} | VARIANTS[variant])
    first = farm(file, stop=(point, number, sig))
    if sig == KILL:
        assert first.status == -KILL, first.text
    elif first.status != 0:  # 0: the signal came when all was done
        assert first.status == 128 + sig, first.text
        assert "all saved" in first.text
    expect(farm(file), "finished")
    tiny.assert_same_run(tmp_path / "runs" / variant, expected)


# --- several processes -------------------------------------------------------------------------


def test_user_error_on_several_processes_is_reported_once(farm, tiny_config):
    outcome = farm(tiny_config(), "seed=1", world=3)
    refused(outcome, "1, 2")  # 4 micro-batches a step
    assert outcome.text.count("error:") == 1


def test_frozen_parts_keep_weights_and_statistics(straight, main, tiny_config):
    everything = main(tiny_config(), "model.freeze=[stem,blocks,fc]")
    refused(everything, "stem, blocks, fc leave nothing to train")
    paths = sorted((straight("frozen") / "checkpoints").glob("step-*/model.safetensors"))
    before, after = (load_file(path) for path in (paths[0], paths[-1]))
    changed = {key for key in after if not torch.equal(before[key], after[key])}
    kept = {key for key in after if key.startswith(("stem.", "blocks.0."))}
    assert kept
    assert changed == after.keys() - kept
    assert all((after[key] == 1).all() for key in kept if key.endswith("running_var"))


def test_both_engines_are_the_same_run(straight):
    assert tiny.metrics(straight("default")) == tiny.metrics(straight("torch"))


# --- what a run leaves and says ----------------------------------------------------------------


def test_finished_run_says_so_and_changes_nothing(main, tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    file = tiny_config()
    run = tmp_path / "runs/tiny"
    start = f"samples an epoch, {LAST_STEP} in total; {run}"
    outcome = main(file)
    expect(outcome, start, "runs/tiny is finished", "top-1", "tools/eval.py")
    # The line does not continue the bar's.
    assert "\rtraining spiking_convnet, 2,472 parameters, in fp32 on cpu, 1 process" in outcome.text
    assert sorted(path.name for path in run.iterdir()) == [
        ".lock",
        "checkpoints",
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
    ]
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    outcome = main(file)
    expect(outcome, "runs/tiny is finished", "top-1")
    assert start not in outcome.text
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    best = max(tiny.metrics(run, "val"), key=lambda line: line["top1"])
    assert tiny.metrics(run, "val")[-1]["best_top1"] == best["top1"]
    # It is only finished with a checkpoint of its end, which a crash may have prevented.
    config = load(str(file))
    assert is_trained(config)
    shutil.rmtree(tiny.newest(run))
    assert not is_trained(config)


def test_max_steps_ends_evaluated_and_can_be_raised(main, straight, tiny_config, tmp_path):
    file = tiny_config({"name": "torch"})
    expect(main(file, "max_steps=3"), "is finished")
    run = tmp_path / "runs/torch"
    (run / "traceback.txt").touch()  # of an earlier start
    assert [line["step"] for line in tiny.metrics(run, "train")] == [1, 2, 3]
    assert [line["step"] for line in tiny.metrics(run, "val")] == [3]
    expect(main(file), "is finished")
    assert not (run / "traceback.txt").exists()
    assert tiny.metrics(run, "train") == tiny.metrics(straight("torch"), "train")
    kept = (run / "config.yaml").read_text()
    expect(main(file, "max_steps=3"), "nothing to do")
    assert (run / "config.yaml").read_text() == kept


def test_a_folder_is_continued_by_its_own_run_alone(main, tiny_root, tiny_config, tmp_path):
    file, run = tiny_config({"max_steps": 2}), tmp_path / "runs/tiny"
    refused(main(file, "resume=must"), "resume=must", str(run / "checkpoints"))
    assert not run.parent.exists()
    expect(main(file, "resume=never"))
    refused(main(file, "resume=never"), "resume=never", str(run), "name=")
    kept = (run / "config.yaml").read_text()
    outcome = main(file, "phases.0.optimizer.lr=0.1", "seed=5")
    refused(outcome, "seed is 5 and was 0", "optimizer.lr is 0.1 and was 0.05", "set these values")
    run.rename(run.with_name("other"))
    refused(main(file, "name=other"), f"to continue this run, rename the folder back to {run}")
    run.with_name("other").rename(run)
    assert (run / "config.yaml").read_text() == kept
    # What does not change the result may change.
    others = ("log_every=2", "data.prefetch=3", "max_steps=4")
    began = json.loads((run / "environment.json").read_text())
    began |= {"git": {"commit": "0123456789abcdef", "dirty": False}}
    del began["earlier"]
    (run / "environment.json").write_text(json.dumps(began))
    code = "this run's code was 0123456789ab before and is"
    expect(main(file, "resume=must", *others), "continuing", "step 2", code)
    now = json.loads((run / "environment.json").read_text())
    assert (now["earlier"], now["packages"]) == ([began], began["packages"])
    # Data may move but not change.
    moved = Path(shutil.copytree(tiny_root, tmp_path / "elsewhere"))
    expect(main(file, "max_steps=5", f"data.root={moved}"), "continuing")
    (moved / "train/up/11.png").unlink()
    built, _ = index.build_index(moved, "train", workers=1)
    index.save_index(built, index.index_file(moved / "index", "train"))
    outcome = main(file, "max_steps=6", f"data.root={moved}")
    refused(outcome, "trained on other data", "another name")
    # More epochs are another run, and the error says how it begins where this one ended.
    further = f"init_checkpoint={run}"
    refused(main(file, "phases.0.epochs=3"), "phases.0.epochs is 3 and was 2", "name=", further)
    expect(main(file, "phases.0.epochs=3", "name=more", further), "weights of")
    (run / "config.yaml").write_text("a: [1")
    refused(main(file), "config.yaml is damaged", "set another name=")
    (run / "config.yaml").write_text(kept[: kept.index("phases:")])
    refused(main(file), "config.yaml is damaged or of another version", "phases is missing")


def test_read_only_place(main, tiny_config, tmp_path, monkeypatch):
    """Distinguished from a full disk, before training."""
    (tmp_path / "runs").write_text("a file")
    refused(main(tiny_config()), "cannot write to", str(tmp_path / "runs"), "correct that")
    (tmp_path / "runs").unlink()

    # Root, as which the tests may run, writes everywhere.
    def refuse(path, *_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    message = f"cannot write to {tmp_path / 'runs/tiny'}: Permission denied; get permission"
    refused(main(tiny_config()), message)


@pytest.mark.parametrize(
    ("gone", "parts"),
    [
        ("", ("data.root: there is no folder", "; set data.root=FOLDER\n")),
        ("index", ("train.npz", "python tools/images.py index")),
        ("index/val.npz", ("val.npz", "python tools/images.py index")),
        ("val/up", ("val/up", "index the data again")),
    ],
)
def test_data_that_is_not_there(gone, parts, main, tiny_copy, tiny_config, tmp_path):
    (tiny_copy / gone).rename(tmp_path / "gone")
    refused(main(tiny_config({"data.root": str(tiny_copy)})), "error:", *parts)
    assert not (tmp_path / "runs").exists()


PSN, SIZE_32 = {"model.neuron": {"kind": "psn", "timesteps": 2}}, {"data.image_size": 32}


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"model.num_classes": 3}, ("model.num_classes", "3", "4 classes")),
        ({"model.arguments": {"channls": [4]}}, ("model.arguments", "channls")),
        ({"model.arguments": {"channels": [4, 8]}}, ("data.image_size=", "input_size=16")),
        ({"batch.global": 64, "batch.micro": 2}, ("47 samples, fewer than batch.global, 64",)),
        (SIZE_32 | {"data.resize": 36, "data.crop": "padded"}, ("20", "24", "padding=4")),
        ({"data.mixup": 0.2, "batch.micro": 1}, ("batch.micro", "data.mixup")),
        ({"data.device": "gpu"}, ("data.device",)),
        ({"device": "cuda"}, ("device=cuda",)),
        ({"precision": "fp16"}, ("fp16 needs a GPU", "bf16 or fp32")),
        ({"cuda_graphs": True}, ("cuda_graphs: true needs a GPU",)),
        (PSN | {"recompute": {"timesteps": 1}}, ("psn neurons have weights over all T timesteps",)),
    ],
    ids=str,
)
def test_what_does_not_suit_the_data(changes, parts, main, tiny_config, tmp_path):
    refused(main(tiny_config(changes)), "error:", *parts)
    assert not (tmp_path / "runs/tiny/metrics.jsonl").exists()


def test_non_finite_loss_names_step_rate_and_checkpoint(main, tiny_config, tmp_path):
    lr = {"phases.0.optimizer.lr": 1e30}
    file = tiny_config({"save.every_steps": 1} | lr)
    outcome = main(file)
    refused(outcome, "not finite in 5 steps in a row, last at step ", "learning rate ")
    run = tmp_path / "runs/tiny"
    last = int(outcome.text.split("last at step ")[1].split()[0])
    assert f"the last checkpoint is of step {last - 1}, in {run / 'checkpoints'}" in outcome.text
    assert re.search(r"Rank 0: loss .*; largest gradients .*stem.*; largest weights ", outcome.text)
    assert "Try a smaller phases.*.optimizer.lr" in outcome.text
    for value in load_file(tiny.newest(run) / "model.safetensors").values():
        assert torch.isfinite(value).all()
    # The steps that changed nothing are counted, and have left nothing but that.
    bad = [line["step"] for line in tiny.metrics(run, "train") if line["non_finite_steps"]]
    assert bad == list(range(last - 4, last))
    assert outcome.text.count("1 step since the last line had no finite gradient") == 4
    expect(main(file, "name=good", f"max_steps={last - 5}"))
    ours, theirs = (
        load_file(tiny.newest(r) / "model.safetensors") for r in (run, run.parent / "good")
    )
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []
    # The same command goes on counting where it was, and fails in the same step.
    assert f"last at step {last} " in main(file).text


def test_non_finite_on_one_process_names_it(farm, tiny_config, tmp_path):
    """NaN pixels on rank 1 alone: rank 1 is named, before the next line of metrics is due."""
    changes = {"engine": "torch", "log_every": 10, "imports": [str(tiny.RECORD)]}
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
    assert "not finite in 5 steps in a row, last at step 5" in first
    named = r"; the first layer with a non-finite output is stem\.conv; largest gradients"
    assert re.search(f"Rank 1: loss .*{named}", first)
    assert "Rank 0:" not in first
    assert "no checkpoint has been saved yet" in first
    look = f"look at the samples and the initial weights and at {tiny.RECORD}\n"
    assert f"No step has changed a weight, whatever the learning rate: {look}" in first
    assert sorted(tiny.samples(tmp_path / "runs/tiny")) == [1, 2, 3, 4, 5]
    assert not (tmp_path / "runs/tiny/checkpoints").exists()


def test_float16_takes_overflowed_steps_again(main, tiny_config, tmp_path, monkeypatch):
    """On a CPU, where only the tests let it run: the arithmetic is the same."""
    monkeypatch.setattr(prepared, "check_gpu", lambda *_: None)
    monkeypatch.setattr(base.LossScale, "START", 2.0**40)
    monkeypatch.setattr(base.LossScale, "GROWTH_INTERVAL", 3)
    phase = {"epochs": 1, "timesteps": 2, "optimizer": {"kind": "sgd", "lr": 0.01}}
    changes = {"precision": "fp16", "imports": [str(tiny.RECORD)], "phases": [phase, phase]}
    compute, calls = step_module.compute_loss, []
    with monkeypatch.context() as patch:
        patch.setattr(step_module, "compute_loss", lambda *of: calls.append(of) or compute(*of))
        expect(main(tiny_config(changes | {"name": "straight"})))
    straight = tmp_path / "runs/straight"
    lines = tiny.metrics(straight, "train")
    # Not counted as steps: each has its samples once, and the schedule's learning rate.
    assert [line["step"] for line in lines] == list(range(1, LAST_STEP + 1))
    assert all(len(pairs) == 8 for pairs in tiny.samples(straight).values())
    assert lines[0]["overflows"] > 5
    assert lines[0]["loss_scale"] < 2.0**35
    assert [line["non_finite_steps"] for line in lines] == [0] * LAST_STEP
    assert lines[-1]["loss_scale"] != lines[0]["loss_scale"]  # it grows, or overflows again
    # The next phase begins with the scale of the one before, and counts on.
    assert len(calls) == 4 * (LAST_STEP + lines[-1]["overflows"])
    assert lines[-1]["overflows"] - lines[4]["overflows"] < 5
    # The scale is part of the checkpoint.
    expect(main(tiny_config(changes | {"name": "run"}), "max_steps=4"))
    run = tmp_path / "runs/run"
    state = json.loads((tiny.newest(run) / "state.json").read_text())
    assert state["loss_scale"]["value"] == lines[3]["loss_scale"]
    expect(main(tiny_config(changes | {"name": "run"})))
    assert tiny.metrics(run, "train") == lines


def test_a_run_that_failed_before_its_first_line_can_be_corrected(main, tiny_config, tmp_path):
    """Only a run that has trained counts as having another configuration."""
    own = tmp_path / "own.py"
    begins = "import torch\nfrom tetdist.optimizers import register_optimizer\n"
    begins += "@register_optimizer('own')\ndef make(groups, section): "
    changes = {"imports": [str(own)], "phases.0.optimizer": {"kind": "own", "lr": 0.1}}
    own.write_text(begins + "...\n")
    run = tmp_path / "runs/tiny"
    refused(main(tiny_config(changes)), "own returns None, not an optimiser")
    assert (run / "config.yaml").is_file()
    (run / "mlflow_run_id").write_text("of the configuration that failed\n")
    expect(main(tiny_config(), "max_steps=1"))
    assert not (run / "mlflow_run_id").exists()
    expect(main(tiny_config(), "max_steps=2"), "from step 1")


# --- starting from a checkpoint ----------------------------------------------------------------


def test_init_checkpoint(main, straight, tiny_config, tmp_path):
    """Given weights at T=2, trained further at T=3: training starts from them."""
    source = straight("torch")
    changes = {"phases.0.timesteps": 3, "phases.0.optimizer.lr": 1e-12, "max_steps": 1}
    config = tiny_config(changes | {"model.neuron.decay": 1.0})
    outcome = main(config, f"init_checkpoint={source}")
    expect(outcome, f"beginning with the weights of {source} (step {LAST_STEP}, T=2)")
    assert "another network: model.neuron.decay is 1.0 and was 0.5" in outcome.text
    weights = [
        load_file(tiny.newest(run) / "model.safetensors")
        for run in (source, tmp_path / "runs/tiny")
    ]
    for key, value in weights[0].items():
        if "running" not in key:
            torch.testing.assert_close(value, weights[1][key], rtol=1e-5, atol=1e-9, msg=key)
    # Continuing does not need it any more.
    refused(main(config, "init_checkpoint=/nowhere", "max_steps=2"), "another configuration")
    (tmp_path / "runs/tiny/config.yaml").write_text(
        (tmp_path / "runs/tiny/config.yaml").read_text().replace(str(source), "/nowhere")
    )
    expect(main(config, "init_checkpoint=/nowhere", "max_steps=2"), "from step 1")


def test_init_checkpoint_of_other_classes(main, straight, tiny_config, tmp_path):
    """The classifier starts anew, as without init_checkpoint; the other weights do not."""
    changes = {"model.num_classes": 8, "phases.0.optimizer.lr": 1e-12}
    source, config = straight("torch"), tiny_config(changes)
    outcome = main(config, f"init_checkpoint={source}", "max_steps=1")
    expect(outcome, "starting anew, for 8 classes instead of 4: fc.weight, fc.bias")
    assert "other classes" not in outcome.text
    expect(main(config, "name=scratch", "max_steps=1"))
    runs = (source, tmp_path / "runs/tiny", tmp_path / "runs/scratch")
    old, tuned, scratch = (load_file(tiny.newest(run) / "model.safetensors") for run in runs)
    for key, value in tuned.items():
        if "running" not in key:
            torch.testing.assert_close(value, (scratch if "fc" in key else old)[key], msg=key)
    resumed = main(config, f"init_checkpoint={source}", "max_steps=2")
    assert "anew" not in expect(resumed, "from step 1")


def test_init_checkpoint_that_does_not_suit(main, straight, tiny_config, tmp_path):
    source = f"init_checkpoint={straight('torch')}"
    refused(main(tiny_config(), "init_checkpoint=/nowhere"), "init_checkpoint: there is no")
    for change in ({}, {"model.num_classes": 7}):
        config = tiny_config(change | {"model.arguments.channels": [4, 9]})
        refused(main(config, source), "another model", "blocks.0.conv.weight")
    refused(main(tiny_config(), "start_phase=1", source), "must be at most 0: this run has one")
    two = tiny_config({"phases": TWO_PHASES})
    refused(main(two, "start_phase=1"), "set init_checkpoint")
    refused(
        main(two, "start_phase=1", source, "max_steps=3"), "max_steps=3 ends the run before phase 1"
    )
    assert not (tmp_path / "runs").exists()


def test_start_phase_is_the_rest_of_the_recipe(main, straight, tiny_config, tmp_path):
    """Another run from the first phase's checkpoint equals the second phase."""
    changes = VARIANTS["phases"]
    expect(main(tiny_config({"name": "first"} | changes), "max_steps=5"))
    start = [f"init_checkpoint={tmp_path / 'runs/first'}", "start_phase=1"]
    expect(main(tiny_config({"name": "second"} | changes), *start))
    both, second = straight("phases"), tmp_path / "runs/second"
    theirs = [line for line in tiny.metrics(both, "train") if line["phase"] == 1]
    assert tiny.metrics(second, "train") == theirs
    weights = [load_file(tiny.newest(run) / "model.safetensors") for run in (both, second)]
    assert [key for key in weights[0] if not torch.equal(weights[0][key], weights[1][key])] == []


def test_damaged_checkpoints(main, tiny_config, tmp_path):
    file = tiny_config({"name": "run"})
    expect(main(file))
    run, straight = tmp_path / "runs/run", tmp_path / "runs/straight"
    shutil.copytree(run, straight)
    os.truncate(tiny.newest(run) / "optimizer.pt", 100)
    expect(main(file), "step-00000010: optimizer.pt has 100 bytes")
    tiny.assert_same_run(run, straight)
    for path in (run / "checkpoints").glob("step-*"):
        os.truncate(path / "model.safetensors", 100)
    refused(main(file), "2 checkpoints", "no undamaged one")
    assert len(list((run / "checkpoints").glob("step-*"))) == 2


def test_an_optimizers_state_of_another_network_is_one_sentence(main, tiny_config, tmp_path):
    """And NaN in the moving average. The manifest fits: who writes the one can write the other."""
    file = tiny_config({"max_steps": 2, "engine": "torch", "ema.decay": 0.8})
    expect(main(file))
    newest = tiny.newest(tmp_path / "runs/tiny")
    state = torch.load(newest / "optimizer.pt", weights_only=True)
    manifest = json.loads((newest / "manifest.json").read_text())

    def refused_with(name, *parts):
        manifest["files"][name] = checkpoint._describe(newest / name)
        (newest / "manifest.json").write_text(json.dumps(manifest))
        refused(main(file, "max_steps=4"), *parts)

    for hostile in (5, {"state": 3}, state | {"param_groups": [{}]}, state | {"state": {0: 1}}):
        torch.save(hostile, newest / "optimizer.pt")
        refused_with("optimizer.pt", "optimizer.pt does not suit the network", "remove this")
    average = load_file(newest / "ema.safetensors")
    average["fc.bias"] *= float("nan")
    save_file(average, newest / "ema.safetensors")
    refused_with("ema.safetensors", "ema.safetensors holds NaN or infinity (in fc.bias)")


def test_full_disk_in_training(main, farm, tiny_config, tmp_path):
    """A checkpoint that cannot be written ends the run after the next steps."""
    file = tiny_config({"save.every_steps": 6, "log_every": 10})
    code = f"""
import resource, signal, sys, time
from tetdist.apps.cli import train
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from tetdist.training import trainer
take, enter = trainer.Trainer._train_step, trainer.Trainer._train_epoch
def train_epoch(self):
    self.saving.wait()
    if self.step == 5:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))
    enter(self)
def train_step(self):
    assert self.step < 8
    end = time.monotonic() + 30
    while self.step == 6 and self.world.rank == 0 and not self.stop.signal:
        assert time.monotonic() < end
        time.sleep(0.01)
    return take(self)
trainer.Trainer._train_epoch, trainer.Trainer._train_step = train_epoch, train_step
sys.exit(train.main(["--config", {str(file)!r}, "engine=torch"]))
"""
    ended = farm.side_by_side(2, tiny.python("-c", code), tmp_path)
    assert [status for status, _ in ended] == [2, 2], ended
    output = ended[0][1]
    assert "the checkpoint of step 6 could not be written" in output
    assert "Traceback" not in output
    expect(main(file), "continuing", "step 5", "is finished")


def test_a_second_interrupt_ends_at_once(farm, tiny_config, tmp_path):
    """A disk that does not answer holds neither the process that writes nor one that waits."""
    file = tiny_config()
    code = f"""
import os, signal, sys, threading, time
from tetdist.apps.cli import train
from tetdist.training import trainer
take = trainer.Trainer._train_step
def interrupt_after(seconds):
    threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT)).start()
def hang(_):
    interrupt_after(1)
    time.sleep(300)
def train_step(self):
    if self.step == 6:
        self.saving.wait()
        os.fsync = hang
        interrupt_after(0)
        if self.world.rank == 1:
            interrupt_after(3)
    return take(self)
trainer.Trainer._train_step = train_step
sys.exit(train.main(["--config", {str(file)!r}]))
"""
    ended = farm.side_by_side(2, tiny.python("-c", code), tmp_path)
    assert [status for status, _ in ended] == [128 + INT] * 2, ended
    assert all(text.endswith("interrupted; earlier checkpoints are kept\n") for _, text in ended)
    expect(farm(file), "continuing", "step 5", "is finished")


def test_mlflow_has_the_run_with_its_tags_and_artifacts(farm, tiny_config, tmp_path, empty_store):
    tracking = {"mlflow": True, "experiment": "tiny", "log_checkpoint": "last"}
    (tmp_path / "own.py").touch()
    given = {"imports": ["own.py"], "plots": True, "phases": TURNING}
    file = tiny_config({"tracking": tracking, **given})
    run = tmp_path / "runs/tiny"

    def rows(query):
        with sqlite3.connect(tmp_path / "runs/mlflow.db") as store:
            return store.execute(query).fetchall()

    # Where a busy machine takes longer than a stop waits to set one up, nothing would arrive.
    (tmp_path / "runs").mkdir()
    shutil.copy(empty_store, tmp_path / "runs/mlflow.db")
    # After the second phase's first step.
    expect(farm(file, stop=("step", 6, TERM)), status=143)
    assert rows("select name, status from runs") == [("tiny", "KILLED")]
    late = "select min(timestamp) - min(start_time) from metrics join runs using (run_uuid)"
    assert 0 <= rows(late)[0][0] < 60_000
    expect(farm(file), "mlflow ui --workers 1 --backend-store-uri", "type val/top1 into")
    ended = rows("select name, status, end_time from runs")
    assert ended[0][:2] == ("tiny", "FINISHED")
    rows("delete from latest_metrics where key = 'final/top1'")
    expect(farm(file), "nothing to do", "sent 1 value to MLflow at sqlite:///")
    assert rows("select name, status, end_time from runs") == ended
    losses = rows("select step, value from metrics where key = 'train/loss' order by step")
    assert losses == [(line["step"], line["loss"]) for line in tiny.metrics(run, "train")]
    params, tags = (dict(rows(f"select key, value from {table}")) for table in ("params", "tags"))
    assert params["phases.0.optimizer.lr"] == "0.05"
    assert tags["checkpoint"] == str(tiny.newest(run))
    assert tags["best_checkpoint"] == str(selection.best(run / "checkpoints"))
    assert Path(tags["run_dir"]) == run
    assert (tags["split"], tags["timesteps"]) == ("val", "1 to 3 then 1 or 2")
    assert (tags["loss"], tags["self_distillation"]) == ("sdt then tet", "0.5")
    note = tags["mlflow.note.content"]
    assert "\nPhase 1: 1 epoch, T = 1 or 2, sgd, learning rate 0.05, cosine.\n" in note
    loss = "SDT: cross-entropy of the time-mean; then TET, lambda 0.001, phi 1; 0.5 x divergence"
    assert f"\nLoss: {loss} from the time-mean, " in note
    assert "\n10 steps of 8 samples in micro-batches of 2, " in note
    (final,) = rows("select step, value from metrics where key = 'final/top1'")
    assert final == (10, tiny.metrics(run, "val")[-1]["top1"])
    ((place,),) = rows("select artifact_uri from runs")
    artifacts = Path(url2pathname(place.removeprefix("file://")))
    (sent,) = artifacts.glob("checkpoints/*/model.safetensors")
    assert sent.read_bytes() == (tiny.newest(run) / "model.safetensors").read_bytes()
    assert {path.name for path in artifacts.iterdir()} >= {"config.yaml", "environment.json"}
    assert (artifacts / "imports/own.py").exists()
    plots = {path.name for path in artifacts.glob("plots/*")}
    assert plots == {"learning_curves.png", "firing_rates.png", "inputs.png"}
