"""The speed that a plan assumes: given, or measured by a benchmark or a run."""

import json

import pytest
import tiny

from tetdist.apps.slurm import plan, speed
from tetdist.apps.slurm.cluster import ClusterSection
from tetdist.apps.slurm.speed import Speed
from tetdist.config import loading
from tetdist.errors import UserError

# Of a run of SEW-ResNet-18 in bfloat16 at T = 4, on ImageNet's pixels.
SMALL = ("model.name=sew_resnet18",)
MEASURED = {"model": "sew_resnet18", "size": 224, "precision": "bf16", "device": "cuda"}


def of(*overrides, gpus=8, **given):
    config = loading.load("sew34_t4.yaml", list(overrides))
    return speed.speed_of(config, ClusterSection(gpus_per_node=gpus), None, **given)


def written(tmp_path, **values):
    file = tmp_path / "bench.json"
    file.write_text(json.dumps(values))
    return str(file)


def test_without_a_measurement_the_command_is_named():
    found = of(*SMALL, "recompute=blocks")
    for part in (
        "bench",
        "step --model sew_resnet18 --size 224 --timesteps 4 --batch 32",
        "--device cuda",
        "--modes blocks",
        "--benchmark FILE",
    ):
        assert part in found
    assert "--device cpu" in of(gpus=0)
    config = loading.load("quickstart").model_copy(update={"imports": ("my_snn.py",)})
    assert "--benchmark runs/speed" in str(speed.speed_of(config, ClusterSection(), None))


def test_given_speed():
    assert of(images_per_s=90.0) == Speed(90.0, 4)


def test_measured_speed_of_a_process_and_its_memory(tmp_path):
    file = written(tmp_path, images_per_s=800, processes=8, timesteps=4, batch=32, peak_mib=2048)
    found = of(benchmark=file)
    assert found == Speed(100.0, 4, "as given", 2048)  # of a model that the file does not name
    assert (found.rate(4), found.rate(8)) == (100, 50)
    config, cluster = loading.load("sew34_t4.yaml", []), ClusterSection(gpus_per_node=8)
    sizes = {"train_images": 1000, "val_images": 0, "parameters": 20_000_000, "buffers": 0}
    text = plan.describe(plan.make(config, cluster, **sizes), found)
    assert "memory       2.31 GB a GPU: 2.15 GB as measured" in text
    # Another micro-batch needs other memory.
    assert of("batch.micro=16", benchmark=file).peak_mib is None
    # The nearest of several batches counts.
    rates = {"32": 100.0, "64": 150.0}
    file = written(tmp_path, images_per_s=100.0, by_batch=rates)
    for micro, expected in ((16, 100.0), (32, 100.0), (64, 150.0), (128, 150.0)):
        assert of(f"batch.micro={micro}", benchmark=file).images_per_s == expected, micro


def test_what_was_measured_of_something_else_is_refused(tmp_path):
    file = written(tmp_path, images_per_s=4.2, **MEASURED)
    assert of(*SMALL, benchmark=file).images_per_s == 4.2
    for overrides, wrong in (
        (("model.name=sew_resnet34",), "model sew_resnet18 instead of sew_resnet34; measure this"),
        ((*SMALL, "data.image_size=160", "data.resize=160"), "size .*--size 160"),
        ((*SMALL, "precision=fp32"), "precision bf16 instead of fp32"),
        ((*SMALL, "model.neuron={kind: plif}"), "neuron lif instead of plif; give the folder of a"),
        ((*SMALL, "recompute=blocks"), "recompute none instead of blocks; measure .*--modes"),
    ):
        with pytest.raises(UserError, match=f"measured {wrong}"):
            of(*overrides, benchmark=file)
    on_cpu = written(tmp_path, images_per_s=4.2, **MEASURED | {"device": "cpu"})
    with pytest.raises(UserError, match="measured a CPU, which does not predict"):
        of(*SMALL, benchmark=on_cpu)
    assert of(*SMALL, gpus=0, benchmark=on_cpu).images_per_s == 4.2


def test_what_is_no_benchmark(tmp_path):
    file = tmp_path / "bench.json"
    for text in ("", "{}", '{"images_per_s": 0}'):
        file.write_text(text)
        with pytest.raises(UserError, match=r"--benchmark: .*bench\.json does not give images_per"):
            of(benchmark=str(file))
    (tmp_path / "sdt-seed0").mkdir()
    (tmp_path / "sdt-seed0/metrics.jsonl").touch()
    with pytest.raises(UserError, match=r"metrics and a checkpoint; give .*/sdt-seed0, or a"):
        of(benchmark=str(tmp_path))


def test_speed_of_a_run(tmp_path):
    """A run on two processes whose steps had T = 2, then 4; its first steps built kernels."""
    values = tiny.changed(tiny.CONFIG, {"name": "x", "data.root": "d"})
    config = loading.parse(values, "x")
    last = tmp_path / "checkpoints/step-00000005"
    last.mkdir(parents=True)
    (last.parent / "last").write_text(last.name)
    (last / "state.json").write_text('{"world_size": 2}')
    (tmp_path / "environment.json").write_text('{"gpus": []}')
    (tmp_path / "config.yaml").write_text(config.as_yaml())
    rates = ((1, 2), (100, 400), (100, 400), (98, 392), (102, 408))
    lines = [
        {"kind": "train", "step": step, "samples_per_s": rate, "image_timesteps_per_s": timesteps}
        for step, (rate, timesteps) in enumerate(rates, start=1)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in lines))
    on_cpu, on_gpus = (ClusterSection(gpus_per_node=gpus) for gpus in (0, 1))
    found = speed.speed_of(config, on_cpu, None, benchmark=str(tmp_path))
    assert found == Speed(50.0, 4, "measured")
    with pytest.raises(UserError, match="measured a CPU"):
        speed.speed_of(config, on_gpus, None, benchmark=str(tmp_path))
    with pytest.raises(UserError, match="measured model spiking_convnet instead of sew_resnet18"):
        of(*SMALL, benchmark=str(tmp_path))
