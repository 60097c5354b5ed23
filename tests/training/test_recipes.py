"""Every recipe in configs/ resolves, plans and trains: its network, made small, on tiny data."""

import math

import numpy as np
import pytest
import timm
import tiny
import torch
from safetensors.torch import save_file
from tiny import expect

from tetdist.apps.cli import slurm
from tetdist.config.loading import CONFIGS_DIR, load
from tetdist.datasets import index as data_index
from tetdist.storage import checkpoint

SIDE = 32  # pixels of images; 16 of event frames
CLASSES = len(tiny.CLASSES)
STEPS = 2
TRANSFORMER = "widths=[16,16,32]", "heads=2", "depths=[1,1,1]"
# Smaller networks of the same kind, by the beginnings of their names: a longer one is nearer.
SMALL = {
    "espikeformer": ("widths=[16,16,32,32]", "depths=[1,1]", "heads=2"),
    "i2e_msnet": ("width=8",),
    "maxformer": TRANSFORMER,
    "ms_qkformer": TRANSFORMER,
    "ms_qkformer_2": ("widths=[16,32]", "heads=2"),
    "ms_resnet": ("width=8",),
    "preact_resnet": ("width=8",),
    "psn_sew_resnet": ("width=8",),
    "qkformer": TRANSFORMER,
    "qkformer_2": ("widths=[16,32]", "heads=2"),
    "sdt": ("channels=16", "depth=1", "heads=2"),
    "sew_resnet": ("width=8",),
    "spiking_convnet": ("channels=[4,4,4]", f"input_size={SIDE}"),
    "spiking_convnet_dvs": ("channels=[4,4,4]", "input_size=16"),
    "spiking_resnet": ("width=8",),
    "spiking_resnet19": ("width=8", "hidden_features=8"),
    "vggsnn": ("input_size=16",),  # it has no width: 9 million parameters
}
OVERRIDES = (
    *("batch.global=4", "batch.micro=2", "batch.eval=25", "data.threads=1", "precision=fp32"),
    *("device=cpu", "tracking.mlflow=false"),
    *(f"max_steps={STEPS}", "log_every=1", "plots=false"),
)


@pytest.fixture(scope="module")
def image_data(tmp_path_factory):
    """An indexed data root of few images."""
    root = tmp_path_factory.mktemp("images")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "TRAIN_SIZES", (2, 2, 2, 2))
        patch.setattr(tiny, "VAL_SIZES", (1, 1, 1, 1))
        tiny.make_images(root)
    data_index.index_splits(root)
    return root


@pytest.fixture(scope="module")
def event_data(tmp_path_factory):
    """An indexed data root of event tensors."""
    root, rng = tmp_path_factory.mktemp("events"), np.random.default_rng(0)
    for split in ("train", "val"):
        for name in tiny.CLASSES:
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(2):
                np.save(folder / f"{i}.npy", rng.integers(0, 4, (2, 2, 16, 16)).astype(np.uint8))
    data_index.index_splits(root, kind="events")
    return root


def small(name, data):
    """Overrides that make a recipe one for two cores."""
    config = load(name)
    nearest = max((key for key in SMALL if config.model.name.startswith(key)), key=len)
    overrides = [f"model.arguments.{item}" for item in SMALL[nearest]]
    overrides += [f"data.root={data}"]
    if config.data.kind == "images":
        overrides += [f"data.image_size={SIDE}", f"data.resize={SIDE}"]
    if config.data.cutout:  # of half of the sides, as of 224 pixels
        overrides.append(f"data.cutout={SIDE // 2}")
    if config.data.crop == "padded":
        overrides.append("data.padding=6")  # to 32 pixels, of images of 20
    for i, phase in enumerate(config.phases):
        # Some neurons have weights for one T.
        if phase.timesteps > 2 and config.model.neuron.refusal(2) is None:
            overrides.append(f"phases.{i}.timesteps=2")
    return [*overrides, *OVERRIDES]


def given(config, folder):
    """Overrides of what a recipe begins with, or learns from, by files of the right shape."""
    overrides = []
    if config.init_checkpoint:
        timesteps = config.phases[0].timesteps
        torch.manual_seed(0)
        model = config.model.build(num_classes=CLASSES, timesteps=timesteps)
        description = checkpoint.Description(
            config=config.as_dict(), classes=list(tiny.CLASSES), timesteps=timesteps, step=0
        )
        file = folder / "begin.safetensors"
        checkpoint.write_model_file(file, model.state_dict(), description)
        overrides.append(f"init_checkpoint={file}")
    if config.loss.distillation.teacher:
        weights = timm.create_model("test_resnet", num_classes=CLASSES).state_dict()
        save_file(weights, folder / "teacher.safetensors")
        overrides += [
            "loss.distillation.teacher=timm:test_resnet",
            f"loss.distillation.teacher_weights={folder / 'teacher.safetensors'}",
        ]
    return overrides


# Recipes that differ in a few numbers from one that is trained: other data, a wider network.
ALIKE = {"cifar100_resnet19", "dvs128_objects", "i2e_msnet34", "own_images", "simulated_digits"}
ALIKE |= {"sdt_8_512", "sdt_8_768", "sew34_t4_64gpus"}
WIDTHS = "10_512", "10_768", "cifar10"
ALIKE |= {f"{family}_{width}" for family in ("qkformer", "ms_qkformer") for width in WIDTHS}


@pytest.mark.parametrize("name", [file.stem for file in sorted(CONFIGS_DIR.glob("*.yaml"))])
def test_recipe_resolves_plans_and_trains(name, main, image_data, event_data, tmp_path, capfd):
    recipe = load(name)
    overrides = small(name, image_data if recipe.data.kind == "images" else event_data)
    overrides += given(load(name, overrides), tmp_path)
    overrides.append(f"runs_dir={tmp_path / 'runs'}")

    capfd.readouterr()
    arguments = ["--config", name, "--dry-run", "--gpus-per-node", "1", "--images-per-s", "100"]
    assert slurm.main([*arguments, *overrides]) == 0
    plan = capfd.readouterr().out
    assert "a step       4 samples in 2 micro-batches of 2, 2 a process" in plan
    assert f"{STEPS} in total" in plan
    if name in ALIKE:
        return

    assert "was disabled" not in expect(main(name, *overrides))  # an observer
    run = tmp_path / "runs" / name
    lines = tiny.metrics(run, "train")
    assert [line["step"] for line in lines] == [1, 2]
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in lines)
    assert lines[-1]["non_finite_steps"] == 0
