"""The same run at any number of processes and ZeRO stage, and continued on another (P1 to P3)."""

import signal
from collections import Counter

import pytest
import timm
import tiny
import torch
from safetensors.torch import load_file, save_file
from tiny import expect, refused

TERM, KILL = signal.SIGTERM, signal.SIGKILL

STEPS = 6  # docs/make/exactness.py takes 30
# A small SEW-ResNet; 6 micro-batches a step, which 1, 2 and 3 processes share; 3 steps an epoch.
SEW = {
    "model": {"name": "sew_resnet18", "arguments": {"width": 8}},
    "batch": {"global": 12, "micro": 2, "eval": 7},
    # T drawn by step; the optimiser goes on from SDT to TET.
    "phases": [
        {"epochs": 1, "timesteps": {"from": 1, "to": 3}, "loss": {"kind": "sdt"}}
        | {"optimizer": {"kind": "sgd", "lr": 0.05}},
        {"epochs": 1, "timesteps": [1, 2], "optimizer": "continue"},
    ],
    "ema": {"decay": 0.8},
    "loss.operations": 0.1,
    "data.images_as_events": {"ratio": 0.15},  # of noise: places that differ change the losses
    "log_every": 4,  # runs are stopped in the middle of a line of metrics
    "imports": [str(tiny.RECORD)],
}
# Wide enough that float32 skips the zeros of spikes, on a processor on which that pays.
SKIPPING = {"execution": "fused", "model.arguments.channels": [32, 64]}
FLOAT64 = {"engine": "torch", "precision": "fp64"}


def assert_close_runs(a, b, tolerance):
    """Losses and weights and running statistics within a relative tolerance."""
    for ours, theirs in zip(tiny.metrics(a), tiny.metrics(b), strict=True):
        assert ours.keys() == theirs.keys()
        assert ours["kind"] == theirs["kind"]
        for key in ours.keys() - {"kind"}:
            expected = pytest.approx(theirs[key], rel=tolerance, abs=tolerance)
            assert ours[key] == expected, (key, ours, theirs)
    files = [{file.name for file in tiny.newest(run).glob("*.safetensors")} for run in (a, b)]
    assert files[0] == files[1]
    for name in files[0]:
        weights = [load_file(tiny.newest(run) / name) for run in (a, b)]
        for key, value in weights[0].items():
            largest = weights[1][key].abs().max()
            assert (value - weights[1][key]).abs().max() <= tolerance * largest, (name, key)


@pytest.fixture(scope="module")
def one_process(farm, tiny_root, tmp_path_factory):
    """The run in float64 on one process."""
    folder = tmp_path_factory.mktemp("float64")
    file = tiny.write_config(folder / "one.yaml", tiny_root, SEW | FLOAT64)
    expect(farm(file, "name=one"))
    return folder / "runs" / "one"


def test_continued_on_another_number_of_processes(one_process, farm, tiny_config, tmp_path):
    """Rounding flips no spike here, so what is left of a difference would be a fault."""
    file = tiny_config(SEW | FLOAT64 | {"save.every_steps": 4})
    expect(farm(file, world=3, stop=("micro", 2, TERM), rank=2), status=128 + TERM)
    statuses, text = farm.each(file, world=2, stop=("step", 3, KILL), rank=1)
    assert statuses[1] == -KILL, text
    # As the deepspeed launcher does.
    expect(farm(file, "--local_rank=RANK", world=2), "slowest rank ")
    run = tmp_path / "runs/tiny"
    # Each sample of each epoch once, on any process.
    samples = tiny.samples(run)
    assert samples == tiny.samples(one_process)
    assert {step: len(pairs) for step, pairs in samples.items()} == dict.fromkeys(
        range(1, STEPS + 1), 12
    )
    assert_close_runs(run, one_process, 1e-9)
    # Evaluation to the last correct answer.
    keys = ("samples", "top1", "per_timestep_top1")
    ours, theirs = (
        [[line[key] for key in keys] for line in tiny.metrics(r, "val")] for r in (run, one_process)
    )
    assert ours == theirs


def test_stopped_stage_continues_bitwise(farm, tiny_config, tmp_path):
    changes = SKIPPING | {"zero_stage": 1, "save.every_steps": 2, "ema.decay": 0.8}
    changes |= {"recompute": "blocks"}
    first = {"epochs": 1, "timesteps": [1, 2], "optimizer": {"kind": "sgd", "lr": 0.01}}
    second = {"epochs": 1, "timesteps": 2, "optimizer": "continue"}
    changes |= {"phases": [first, second]}
    expect(farm(tiny_config(changes | {"name": "straight"}), world=2))
    file = tiny_config(changes | {"name": "run"})
    statuses, text = farm.each(file, world=2, stop=("step", 7, KILL), rank=1)
    assert statuses[1] == -KILL, text
    expect(farm(file, world=2))
    tiny.assert_same_run(tmp_path / "runs/run", tmp_path / "runs/straight")


def test_stages_agree_and_continue_each_others_checkpoints(farm, tiny_config, tmp_path):
    """In float32 until the first spike flips. Stages clip in different ways.

    The optimiser's state comes along: without it the next step differs.
    """
    changes = SKIPPING | {
        "phases.0.optimizer": {"kind": "adam", "lr": 0.002, "weight_decay": 0.01},
        "gradient_clipping": 0.5,
        "imports": [str(tiny.RECORD)],
        "model.freeze": ["blocks.0"],
    }
    expect(farm(tiny_config(changes | {"name": "straight"})))
    changes["name"] = "run"
    file = tiny_config(changes | {"zero_stage": 1})
    expect(farm(file, world=2, stop=("step", 4, TERM)), status=128 + TERM)
    expect(farm(tiny_config(changes | {"zero_stage": 0})))
    runs = [tmp_path / "runs" / name for name in ("run", "straight")]
    assert tiny.samples(runs[0]) == tiny.samples(runs[1])
    lines = [tiny.metrics(run, "train") for run in runs]
    assert lines[1][0]["grad_norm"] > 0.5
    for ours, theirs in zip(*lines, strict=True):
        assert ours["lr"] == theirs["lr"]
        close = 1e-5 if ours["step"] <= 3 else 1e-4
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=close), ours["step"]
        assert ours["step"] > 3 or ours["loss"] == pytest.approx(theirs["loss"], rel=close)
    states = [torch.load(tiny.newest(run) / "optimizer.pt", weights_only=True) for run in runs]
    assert states[0]["param_groups"] == states[1]["param_groups"]
    assert states[0]["state"].keys() == states[1]["state"].keys()
    weights, others = (load_file(tiny.newest(run) / "model.safetensors") for run in runs)
    frozen = [key for key in weights if key.startswith("blocks.0.")]
    assert frozen
    assert all(torch.equal(weights[key], others[key]) for key in frozen)


def test_synchronised_batch_norm_of_two_is_one_with_twice_the_batch(farm, tiny_config, tmp_path):
    changes = SEW | FLOAT64 | {"batch_norm.sync": True, "max_steps": 4, "evaluate_every": 4}
    for world, micro in ((1, 4), (2, 2)):
        file = tiny_config(changes | {"name": str(world), "batch.micro": micro})
        expect(farm(file, world=world))
    assert_close_runs(tmp_path / "runs/2", tmp_path / "runs/1", 1e-9)
    # Another number of processes would be another network.
    file = tiny_config(changes | {"name": "2", "batch.micro": 2})
    for world in (1, 3):
        refused(farm(file, world=world), "batch_norm.sync", "trained on 2")


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_sixteen_processes_of_the_quickstart(farm, output_of, tmp_path):
    """A signal to one of them stops all; continued, it is bitwise the run that nothing stopped."""
    output_of("digits.py", tmp_path / "digits")
    file = tiny.PROJECT / "configs/quickstart.yaml"
    changes = (f"data.root={tmp_path / 'digits'}", f"runs_dir={tmp_path}", "batch.micro=4")
    changes += ("data.held_out=0.8", "max_steps=18", "save.every_steps=5", "plots=false")
    stop = ("step", 14, TERM)  # evaluated and saved after step 12

    def run(name, *, stop=None):
        options = {"world": 16, "stop": stop, "rank": 11, "timeout": 800}
        outcome = farm(file, *changes, name, "tracking.mlflow=false", **options)
        return expect(outcome, status=128 + TERM if stop else 0)

    assert "stopped at step 15, all saved" in run("name=run", stop=stop)
    assert len(tiny.metrics(tmp_path / "run", "val")) == 1
    assert "from step 15" in run("name=run")
    run("name=straight")
    tiny.assert_same_run(tmp_path / "run", tmp_path / "straight")


# --- everything on -----------------------------------------------------------------------------

# All that draws random numbers, averages weights or treats layers apart; see docs/exactness.md.
EVERYTHING = FLOAT64 | {
    "model": {
        "name": "qkformer_4_384_cifar",
        "freeze": ["blocks.0"],
        "arguments": {
            **{"widths": [8, 8, 16], "depths": [1, 1, 1], "heads": 2},
            **{"drop_rate": 0.2, "drop_path_rate": 0.3},
        },
        "neuron": {"kind": "plif"},
    },
    "data.auto_augment": "rand-m9-mstd0.5-inc1",
    "data.erasing": {"probability": 0.5},
    "data.repeats": 3,
    **{"data.mixup": 0.5, "data.cutmix": 1.0},
    "data.mixing": {"mode": "batch", "probability": 0.8, "off_epoch": 1},
    "loss": {
        "label_smoothing": 0.1,
        "distillation": {
            **{"teacher": "timm:test_resnet", "weight": 0.6, "temperature": 3.0},
            **{"self_weight": 0.15, "self_target": "similarity"},
        },
    },
    "phases.0.warmup_epochs": 0.5,
    "phases.0.optimizer": {
        **{"kind": "timm:lamb", "lr": 0.01, "layer_decay": 0.8},
        **{"weight_decay": 0.05, "decay_norms": False},
    },
    "gradient_clipping": 0.1,
    "ema": {"decay": 0.9, "warmup": True},
    "max_steps": 6,  # the last one is of the second epoch, which mixes nothing
    **{"execution": "fused", "recompute": "blocks", "batch.eval": 23, "evaluate_every": 2},
    **{"log_every": 4, "save.every_steps": 2},  # it goes on in the middle of a line of metrics
    "imports": [str(tiny.RECORD)],
}


def test_everything_on_two_processes_that_were_stopped(farm, tiny_config, tmp_path):
    torch.manual_seed(0)
    teacher = timm.create_model("test_resnet", num_classes=len(tiny.CLASSES)).state_dict()
    save_file(teacher, tmp_path / "teacher.safetensors")
    weights = {"loss.distillation.teacher_weights": str(tmp_path / "teacher.safetensors")}
    file = tiny_config(EVERYTHING | weights)
    expect(farm(file, "name=one"))
    statuses, text = farm.each(file, "name=two", world=2, stop=("step", 3, KILL), rank=1)
    assert statuses[1] == -KILL, text
    expect(farm(file, "name=two", world=2))
    one, two = tmp_path / "runs/one", tmp_path / "runs/two"
    samples = tiny.samples(one)
    assert len(samples) == EVERYTHING["max_steps"]
    assert samples == tiny.samples(two)
    counts = Counter(i for step in range(1, 6) for i, _ in samples[step])  # of an epoch
    assert max(counts.values()) == EVERYTHING["data.repeats"]
    assert_close_runs(two, one, 1e-9)
