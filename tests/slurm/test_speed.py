"""The speed that a plan assumes: given, measured, or by the roofline."""

import functools
import json
import os
import re

import pytest
from kernel_runs import needs_triton

from tetdist.apps.slurm import plan, speed
from tetdist.apps.slurm.cluster import ClusterSection, gather
from tetdist.apps.slurm.speed import Network, Speed
from tetdist.config import loading
from tetdist.errors import UserError
from tetdist.nn.neurons import NEURONS

needs_triton()

IMAGENET = {"train_images": 1281167, "val_images": 50000, "parameters": 20_000_000, "buffers": 0}
GPUS = {"nodes": 1, "gpus_per_node": 8, "gpu": "H100"}
# Less to count than the recipe's.
SMALL = ("model.name=sew_resnet18",)


def of(*overrides, recipe="sew34_t4.yaml", file=None, **cluster):
    config = loading.load(recipe, list(overrides))
    network = Network(config.model.build(num_classes=10, timesteps=4), None)
    if config.recompute != "none":
        network.model.set_grad_checkpointing(True)
    facts = ClusterSection(**(GPUS | cluster))
    return speed.speed_of(config, facts, network, file=None if file is None else str(file))


@functools.cache
def known(*overrides, **more):
    found = of(*overrides, **more)
    assert isinstance(found, Speed), found
    return found


def written(tmp_path, **values):
    file = tmp_path / "bench.json"
    file.write_text(json.dumps(values))
    return file


# --- by the roofline ------------------------------------------------------------------------------


def test_a_gpus_speed_is_computed_and_says_so():
    found = known()
    assert found.source == "computed, not measured, for an H100"
    text = " ".join(text for _, text in found.details)
    assert "computed, not measured" in text
    assert re.search(r"\d+ samples/s", text)
    assert re.search(
        r"needs \d+\.\d ms for memory and \d+\.\d ms for arithmetic, the host meanwhile \d", text
    )
    assert re.search(r"about \d+\.\d GB of the 80;", text)
    config = loading.load("sew34_t4.yaml", [])
    made = plan.make(config, ClusterSection(**GPUS), **IMAGENET)
    plan_text = plan.describe(made, found)
    assert "computed, not measured, for an H100" in plan_text
    assert re.search(r"hours +\d+\.\d, \d\.\d+ an epoch", plan_text)


def test_a_better_gpu_is_faster_and_what_it_does_more_is_slower():
    rate = known(*SMALL).images_per_s
    # By 43 % more bandwidth, where that bounds it.
    assert rate < known(*SMALL, gpu="H200").images_per_s < 1.44 * rate
    assert known(*SMALL, "precision=fp32").images_per_s < rate
    assert known(*SMALL, "recompute=blocks").images_per_s < rate
    assert known(*SMALL, "phases.0.timesteps=8").images_per_s < 0.7 * rate


def test_each_phase_has_its_own_speed():
    small, grown = known(*SMALL), known(*SMALL, "phases.0.final_image_size=256")
    large = known(*SMALL, "phases.0.image_size=256")
    # As many images of each: the mean of the times.
    times = 1 / small.images_per_s + 1 / large.images_per_s
    assert grown.images_per_s == pytest.approx(2 / times)
    # A step of T from 1 to 4 takes 2.5/4 of the time at T = 4, on average.
    drawn = known(*SMALL, "phases.0.timesteps={from: 1, to: 4}")
    assert drawn.images_per_s == drawn.of_phases[0] == pytest.approx(1.6 * small.images_per_s)
    assert drawn.rate(0, 2.5) == drawn.images_per_s
    two = known("model.name=spiking_resnet18", recipe="spiking34_t4_t6.yaml")
    assert two.of_phases[0] > two.of_phases[1] > two.of_phases[0] / 2


def test_what_cannot_be_computed_is_reported_with_the_way_out():
    unnamed = of(gpu=None)
    assert isinstance(unnamed, str)
    assert re.search(r"--gpu .*H100.*--benchmark FILE of tools/check_gpu.py", unnamed)
    without_units = of(*SMALL, gpu="V100")
    assert isinstance(without_units, str)
    assert "the speed of a V100 in precision=bf16; choose another" in without_units
    with pytest.raises(UserError, match=r"cluster.gpu: the plan does not know 'X1', only V100"):
        gather({"gpu": "X1"}, {})
    on_cpu = of(gpus_per_node=0, gpu=None)
    assert isinstance(on_cpu, str)
    assert "--images-per-s" in on_cpu


def test_memory_that_is_too_small_is_reported():
    large = ("batch.micro=256", "phases.0.timesteps=16")
    for gpu, more, fits in (
        ("H100", (), True),
        ("RTX-4090", (), False),
        ("RTX-4090", ("recompute=blocks",), True),
    ):
        memory = dict(known(*large, *more, gpu=gpu).details)["memory"]
        assert ("too much; use a smaller batch.micro, or recompute" in memory) != fits, gpu
    # 11 million weights, their gradients and momentum, in float32; then their average, too.
    for more, weights in (
        ((), "0.1 of it for weights"),
        (("ema.decay=0.9",), "0.2 of it for weights"),
    ):
        assert weights in dict(known(*SMALL, *more).details)["memory"]


# --- as measured ----------------------------------------------------------------------------------

MEASURED = {"model": "sew_resnet18", "size": 224, "precision": "bf16", "device": "cuda"}


def test_what_was_measured_comes_before_the_roofline(tmp_path):
    file = written(tmp_path, images_per_s=123.0, timesteps=4, **MEASURED)
    found = known(*SMALL, file=file)
    assert found == Speed(123.0, 4, source="measured")
    # Nobody needs to know the card then; and T is not what was measured.
    longer = known(*SMALL, "phases.0.timesteps=8", file=file, gpu=None)
    assert longer.rate(0, 8) == 123.0 / 2
    together = written(tmp_path, images_per_s=800, processes=8, timesteps=6)
    assert known(file=together) == Speed(100.0, 6, source="measured")


def test_the_batch_that_is_nearest_counts(tmp_path):
    rates = {"32": 100.0, "64": 150.0, "128": 170.0}
    file = written(tmp_path, images_per_s=100.0, timesteps=4, by_batch=rates, **MEASURED)
    for micro, expected in ((16, 100.0), (32, 100.0), (64, 150.0), (128, 170.0)):
        found = known(*SMALL, f"batch.micro={micro}", file=file)
        assert found.images_per_s == expected, micro


def test_a_graph_is_advised_where_the_host_is_waited_for():
    small = (*SMALL, "batch.micro=4", "engine=torch")
    alone, graphed = known(*small), known(*small, "cuda_graphs=true")
    assert graphed.images_per_s > 1.5 * alone.images_per_s
    assert ["cuda_graphs=true" in str(one.details) for one in (alone, graphed)] == [True, False]


@pytest.mark.parametrize("kind", NEURONS)
def test_every_kind_of_neuron_has_an_estimate(kind):
    assert known(*SMALL, f"model.neuron={{kind: {kind}}}").images_per_s > 0


def test_a_benchmark_that_says_nothing_about_the_run(tmp_path):
    on_cpu = written(tmp_path, images_per_s=4.2, **(MEASURED | {"device": "cpu"}))
    with pytest.raises(UserError, match="measured a CPU, which does not predict"):
        of(*SMALL, file=on_cpu)
    assert known(*SMALL, file=on_cpu, gpus_per_node=0, gpu=None).images_per_s == 4.2
    on_h100 = written(tmp_path, images_per_s=9.0, machine={"device": "NVIDIA H100"}, **MEASURED)
    for overrides, gpu, wrong in (
        (("model.name=sew_resnet34",), None, "model sew_resnet18 instead of sew_resnet34; measure"),
        ((*SMALL, "data.image_size=160", "data.resize=160"), None, "size .*--size 160"),
        ((*SMALL, "precision=fp32"), None, "precision bf16 instead of fp32"),
        ((*SMALL, "model.neuron={kind: plif}"), None, "neuron lif instead of plif; give"),
        ((*SMALL, "recompute=blocks"), None, "no recomputation; give"),
        (SMALL, "A100-80", "an H100 instead of an A100-80; .*or leave out the flag"),
    ):
        with pytest.raises(UserError, match=f"measured {wrong}"):
            of(*overrides, file=on_h100, gpu=gpu)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"images_per_s": "fast"}', '{"images_per_s": 0}']
)
def test_file_that_is_no_benchmark(text, tmp_path):
    file = tmp_path / "bench.json"
    file.write_text(text)
    with pytest.raises(UserError, match=r"--benchmark: .*bench\.json"):
        of(file=file)


def test_benchmark_that_is_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match=r"pipe cannot be read \(It is a pipe, a device"):
        of(file=tmp_path / "pipe")


def test_speed_that_is_none(tmp_path):
    config, facts = loading.load("sew34_t4.yaml", []), ClusterSection(**GPUS)
    network = Network(config.model.build(num_classes=10, timesteps=4), None)
    assert speed.speed_of(config, facts, network, images_per_s=90.0) == Speed(90.0, 4)
    for value in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match="--images-per-s"):
            speed.speed_of(config, facts, network, images_per_s=value)
    with pytest.raises(UserError, match="cannot be read"):
        of(file=tmp_path / "nothing")
