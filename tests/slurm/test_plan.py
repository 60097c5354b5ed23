"""The plan's arithmetic, against numbers worked out by hand."""

import pytest

from tetdist.apps.slurm import plan
from tetdist.apps.slurm.cluster import ClusterSection
from tetdist.apps.slurm.speed import Speed
from tetdist.config import loading as configuration
from tetdist.errors import UserError

IMAGENET = {"train_images": 1281167, "val_images": 50000}
PARAMETERS = 20_000_000


def make(name="sew34_t4.yaml", overrides=(), **cluster):
    section = ClusterSection(**({"nodes": 2, "gpus_per_node": 4} | cluster))
    config = configuration.load(name, list(overrides))
    return plan.make(config, section, parameters=PARAMETERS, buffers=1000, **IMAGENET)


def cost(made, speed, nodes):
    found = plan.cost(made, speed, nodes)
    assert found is not None
    return found


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
        assert f" each, {kept} kept: " in plan.describe(one, "unknown")
    # The second phase's Adam keeps two numbers a parameter.
    assert make("spiking34_t4_t6.yaml").checkpoint_bytes == 4 * (3 * PARAMETERS + 1000)


def test_fewer_steps_and_evaluations():
    made = make(overrides=("max_steps=5005", "evaluate_every=2"))
    assert (made.last_step, made.evaluations) == (5005, 1)


def test_processes_that_cannot_share_a_step():
    with pytest.raises(
        UserError, match=r"8 micro-batches a step .* among 16 processes; use 1, 2, 4"
    ):
        make(gpus_per_node=8)


def test_averaging_by_hand():
    section = ClusterSection(link_in_node=100.0, link_between_nodes=10.0)
    # One process talks to nobody.
    assert plan.communication_seconds(10**9, 1, 1, section) == 0
    # 2 * 3/4 GB at 100 GB/s, then 2 * 1/2 GB at 10 GB/s.
    assert plan.communication_seconds(10**9, 1, 4, section) == pytest.approx(0.015)
    assert plan.communication_seconds(10**9, 2, 4, section) == pytest.approx(0.115)
    made = make(link_in_node=100.0, link_between_nodes=10.0)
    # 80 MB a step, of 32 samples a process; a share of training, without the evaluations.
    share = cost(made, Speed(100.0, 4), nodes=2).communication
    assert share == pytest.approx(0.0092 / (0.0092 + 0.32))


def test_hours_by_hand():
    made = make(
        overrides=("evaluate_every=1000",), link_in_node=1e9, link_between_nodes=1e9, time="60"
    )
    found = cost(made, Speed(images_per_s=100.0, timesteps=4), nodes=2)
    # 120 epochs of 5004 steps of 256 images, and one evaluation at three times the speed.
    seconds = (120 * 5004 * 256 + 50000 / 3) / (8 * 100)
    assert found.hours == pytest.approx(seconds / 3600, rel=1e-7)
    assert found.gpu_hours == pytest.approx(8 * seconds / 3600, rel=1e-7)
    assert found.images_per_s == pytest.approx(8 * 100)
    # Of each hour, 120 s are kept for saving and 5 minutes lost in restarting.
    assert found.periods == -(-seconds // (3600 - 120 - 300)) == 61
    assert "too short" in plan.describe(make(time="5"), Speed(100.0, 4))


def test_a_quarter_of_the_epochs_is_slower():
    plain = make(overrides=("evaluate_every=1000",))
    phases = make("spiking34_t4_t6.yaml", ("evaluate_every=1000",))
    drawn = make(overrides=("evaluate_every=1000", "phases.0.timesteps=[1, 4]"))
    shorter = cost(drawn, Speed(9.0, 4), 1).hours / cost(plain, Speed(9.0, 4), 1).hours
    assert shorter == pytest.approx(2.5 / 4, rel=0.01)
    assert "T = 1 or 4" in plan.describe(drawn, "not given")
    # At T=6 instead of 4: 9/8 of the time.
    longer = cost(phases, Speed(9.0, 4), 1).hours / cost(plain, Speed(9.0, 4), 1).hours
    assert longer == pytest.approx(9 / 8, rel=0.01)


def test_table():
    text = plan.describe(make(), Speed(100.0, 4))
    rows = {line.split()[0]: line for line in text.splitlines() if line[:5].strip().isdigit()}
    assert list(rows) == ["1", "2", "4", "8", "16", "32", "64"]
    problem = "8 micro-batches do not divide equally; a new run could use "
    assert rows["4"].endswith(f"{problem}batch.micro=16, or batch.global=512")
    # More processes than samples of a step.
    large = plan.describe(make(nodes=1, gpus_per_node=8), Speed(100.0, 4))
    assert large.endswith(f"64        512  {problem}batch.global=16384")
    # The newest three and the best; with a moving average its best, too.
    assert "160.0 MB each, 4 kept: 640.0 MB" in text
    averaged = plan.describe(make(overrides=("ema.decay=0.999",)), Speed(100.0, 4))
    assert "240.0 MB each, 5 kept: 1.20 GB" in averaged
    one, two = (cost(make(), Speed(100.0, 4), nodes) for nodes in (1, 2))
    assert f"{one.hours:.1f}" in rows["1"]
    assert f"{two.hours:.1f}" in rows["2"]
    assert one.hours / 2 < two.hours < one.hours


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, "warning: the cluster's default a process, often 1, but 8 threads load samples"),
        (4, "warning: 4 a process, but 8 threads load samples"),
        (8, "8 a process, of which data.threads=8 load samples"),
    ],
)
def test_cpus_that_are_too_few_are_reported(given, expected):
    text = plan.describe(make(cpus_per_task=given), "not given")
    assert f"CPUs         {expected}" in text
    assert ("give cluster.cpus_per_task=8" in text) == (given != 8)


def test_run_that_begins_with_a_later_phase():
    later = ("start_phase=1", "init_checkpoint=weights.safetensors")
    links = {"link_in_node": 1e9, "link_between_nodes": 1e9}
    made = make("spiking34_t4_t6.yaml", later, **links)
    assert (made.first_step, made.last_step) == (90 * 5004, 120 * 5004)
    assert (made.images, made.evaluations) == (30 * 5004 * 256, 30)
    text = plan.describe(made, "not given")
    assert "T = 6" in text
    assert "hours        unknown: not given" in text
    later_part = cost(made, Speed(images_per_s=100.0, timesteps=6), nodes=2)
    whole = cost(make("spiking34_t4_t6.yaml", **links), Speed(100.0, timesteps=6), nodes=2)
    # 30 of 120 epochs and evaluations, each in 3/2 of the time of one at T = 4.
    assert later_part.hours / whole.hours == pytest.approx(30 * 3 / (90 * 2 + 30 * 3), rel=1e-4)
