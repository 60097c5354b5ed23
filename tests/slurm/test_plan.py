"""The plan's arithmetic, against numbers worked out by hand."""

import dataclasses

import pytest

from tetdist.apps.slurm import plan
from tetdist.apps.slurm.cluster import ClusterSection
from tetdist.config import loading as configuration
from tetdist.errors import UserError

IMAGENET = {"train_images": 1281167, "val_images": 50000, "pixels": 224}
PARAMETERS = 20_000_000


def make(name="sew34_t4.yaml", overrides=(), **cluster):
    section = ClusterSection(**({"nodes": 2, "gpus_per_node": 4} | cluster))
    config = configuration.load(name, list(overrides))
    return plan.Plan(config, section, parameters=PARAMETERS, buffers=1000, **IMAGENET)


def hours(made, speed):
    return plan.seconds_of(made, speed) / 3600


def test_counts():
    made = make()
    assert made.micro_batches == 256 // 32
    assert made.steps_per_epoch == 1281167 // 256 == 5004
    assert made.last_step == 120 * 5004
    assert made.images == 120 * 5004 * 256
    assert made.evaluations == 120
    # Weights and SGD's momentum.
    assert made.checkpoint_bytes == 4 * (2 * PARAMETERS + 1000)
    # Both copies of weights and running statistics are kept, and evaluated.
    averaged = make(overrides=("ema.decay=0.999",))
    assert averaged.checkpoint_bytes == 4 * (3 * PARAMETERS + 2 * 1000)
    assert averaged.evaluations == 240
    # The newest and the best, of both copies.
    for one, best in ((made, 1), (averaged, 2)):
        kept = one.config.save.keep_last + best
        assert f" each, {kept} kept: " in plan.describe(one, None)
    # The second phase's Adam keeps two numbers a parameter.
    assert make("spiking34_t4_t6.yaml").checkpoint_bytes == 4 * (3 * PARAMETERS + 1000)


def test_fewer_steps_and_evaluations():
    made = make(overrides=("max_steps=5005", "evaluate_every=2"))
    assert (made.last_step, made.evaluations) == (5005, 1)
    assert " 5,005 in total (max_steps, of 120 epochs)\n" in plan.describe(made, None)


def test_processes_that_cannot_share_a_step():
    with pytest.raises(UserError, match=r"8 micro-batches a step .* among 16 processes; use 1, 2"):
        make(gpus_per_node=8)


def test_the_command_that_measures_is_named():
    text = plan.describe(make(overrides=("recompute=blocks",)), None)
    step = "step --model sew_resnet34 --size 224 --timesteps 4 --batch 32 --precision bf16"
    assert f"{step} --device cuda --modes blocks`, which prints --images-per-s" in text
    made = make(gpus_per_node=0)
    assert "--device cpu`" in plan.describe(made, None)
    own = dataclasses.replace(made, config=made.config.model_copy(update={"imports": ("own.py",)}))
    assert "max_steps=100, then give the --images-per-s that" in plan.describe(own, None)


def test_hours_by_hand():
    made = make(overrides=("evaluate_every=1000",), time="60")
    # 120 epochs of 5004 steps of 256 images, and one evaluation at three times the speed.
    seconds = (120 * 5004 * 256 + 50000 / 3) / (8 * 100)
    assert plan.seconds_of(made, 100.0) == pytest.approx(seconds, rel=1e-7)
    # Of each hour, 120 s are kept for saving and 5 minutes lost in restarting.
    starts = -(-seconds // (3600 - 120 - 300))
    text = plan.describe(made, 100.0)
    assert "duration     2 d 5 h, " in text
    assert f"GPU-hours {8 * seconds / 3600:.0f}, {starts:.0f} starts of the job" in text
    assert "from 100 samples/s a process at T=4, without the time" in text
    short = plan.describe(make(time="5", gpus_per_node=0), 100.0)
    text = plan.describe(make(time="24"), 300.0)  # 18 h 1 min, and 63 times 5 minutes
    assert "time limit   24 min (24 is minutes; hours: 24:00:00); saves" in text
    assert ", 64 starts of the job (24 min each, 5 minutes a restart); with restarts 23 h" in text
    for part in ("; warning: a start may take 5", " node-hours ", "many starts of the job (5 min"):
        assert part in short
    short = plan.describe(made, 10739.0 * 30)
    assert "duration     1 min, " in short
    assert "GPU-hours 0.13, " in short


def test_cores_that_load():
    made, speed = make(nodes=1, gpus_per_node=8, cpus_per_task=4), 2380.0
    text = plan.describe(made, speed)
    assert " 1 a process; possible numbers of processes: 1, 2, 4, 8\n" in text
    assert "\nloading      33.7 cores a node, of 32 (4 a process), for 19,040 images/s at" in text
    for cpus, more in ((4, " and --cpus-per-task 5"), (5, "")):
        text = plan.describe(make(overrides=("data.threads=2",), cpus_per_task=cpus), speed)
        warning = text.partition("loading      warning: 16.9 cores a node, of ")[2]
        assert warning.endswith(f"; 1.05 GB/s at 110.0 kB each; give data.threads=5{more}")
    made = make(overrides=("data.auto_augment=rand-m9",), cpus_per_task=8)
    made = dataclasses.replace(made, sample_bytes=1e5)
    text = plan.describe(made, 1000.0)
    assert (
        "\nloading      9.5 cores a node, of 32 (8 a process), for 4,000 images/s at 2.37" in text
    )
    assert text.endswith("; 400.0 MB/s at 100.0 kB each")
    for other in ("data.device=gpu", "data.kind=events", "data.image_size=32"):
        assert "loading" not in plan.describe(make(overrides=(other,)), 1000.0), other


def test_a_quarter_of_the_epochs_is_slower():
    plain = hours(make(overrides=("evaluate_every=1000",)), 9.0)
    phases = hours(make("spiking34_t4_t6.yaml", ("evaluate_every=1000",)), 9.0)
    drawn = make(overrides=("evaluate_every=1000", "phases.0.timesteps=[1, 2, 4]"))
    # The speed is that at the mean T of the run.
    assert hours(drawn, 9.0 * 4 / (7 / 3)) / plain == pytest.approx(7 / 3 / 4, rel=0.01)
    assert "T = 1 or 2 or 4" in plan.describe(drawn, None)
    # At T=6 instead of 4: 9/8 of the time.
    assert phases / plain == pytest.approx(9 / 8, rel=0.01)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, "warning: the cluster's default a process, often 1, but 8 threads load samples"),
        (4, "warning: 4 a process, but 8 threads load samples"),
        (8, "8 a process, of which data.threads=8 load samples"),
    ],
)
def test_cpus_that_are_too_few_are_reported(given, expected):
    text = plan.describe(make(cpus_per_task=given), None)
    assert f"CPUs         {expected}" in text
    assert ("give --cpus-per-task 8" in text) == (given != 8)
    text = plan.describe(make(overrides=("data.threads=1",)), None)
    assert "often 1, of which data.threads=1 load samples" in text


def test_run_that_begins_with_a_later_phase():
    later = ("start_phase=1", "init_checkpoint=weights.safetensors")
    made = make("spiking34_t4_t6.yaml", later)
    assert (made.phases[0].first_step, made.last_step) == (90 * 5004, 120 * 5004)
    assert (made.images, made.evaluations) == (30 * 5004 * 256, 30)
    text = plan.describe(made, None)
    assert "T = 6" in text
    assert "duration     unknown: measure it on a node with `" in text
    # 30 of 120 epochs and evaluations, each in 3/2 of the time of one at T = 4.
    part = hours(made, 100.0) / hours(make("spiking34_t4_t6.yaml"), 150.0)
    assert part == pytest.approx(30 * 3 / (90 * 2 + 30 * 3), rel=1e-4)
