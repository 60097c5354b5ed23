"""Learning from a teacher, and from the ReLU network of the same shape."""

import re
import shutil
from pathlib import Path

import pytest
import timm
import tiny
import torch
from safetensors.torch import save_file
from tiny import expect, refused

from tetdist import losses
from tetdist.config import loading
from tetdist.config.sections.loss import LossSection
from tetdist.config.sections.model import ModelSection
from tetdist.datasets import index as data_index
from tetdist.errors import UserError
from tetdist.storage import checkpoint
from tetdist.training.objective import compute_loss
from tetdist.training.teacher import Teacher

RELU = {"name": "relu", "model.neuron.kind": "relu", "phases.0.timesteps": 1}
KEY = "loss.distillation.teacher"
# As small as timm's are, and for any size of images.
TIMM, CPU = "timm:test_resnet", torch.device("cpu")


@pytest.fixture(scope="module")
def relu(farm, tiny_root, tmp_path_factory):
    """A finished run of the ReLU network of the tiny configuration's shape; to be read only."""
    folder = tmp_path_factory.mktemp("relu")
    expect(farm(tiny.write_config(folder / "relu.yaml", tiny_root, RELU), "max_steps=6"))
    return folder / "runs/relu"


def teacher(file, *overrides):
    config = loading.load(str(file), list(overrides))
    index = data_index.load_index(data_index.index_file(config.data.index_dir, "train"))
    return Teacher(config, index, CPU)


# --- the loss -------------------------------------------------------------------------------------


def test_loss_is_the_sum_of_its_parts():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, 5, generator=generator, dtype=torch.float64)
    taught = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    targets = torch.tensor([0, 4, 2, 2])
    soft = {"teacher": "runs/x", "weight": 0.3, "self_weight": 0.7, "temperature": 1.5}
    tet = LossSection.model_validate({"lambda": 0.05, "distillation": soft})
    expected = (
        losses.tet_loss(logits, targets, lambda_=0.05)
        + 0.3 * losses.distillation_loss(logits, taught, temperature=1.5)
        + 0.7 * losses.distillation_loss(logits, logits.mean(0), temperature=1.5)
    )
    torch.testing.assert_close(compute_loss(tet, logits, targets, taught), expected)
    # SDT's network answers once, by the time-mean, and so it learns.
    sdt = LossSection.model_validate({"kind": "sdt", "distillation": soft | {"self_weight": 0.0}})
    mean = logits.mean(0, keepdim=True)
    expected = losses.sdt_loss(logits, targets)
    expected = expected + 0.3 * losses.distillation_loss(mean, taught, temperature=1.5)
    torch.testing.assert_close(compute_loss(sdt, logits, targets, taught), expected)


# --- the ReLU network -----------------------------------------------------------------------------


def test_relu_network_is_a_teacher_and_the_weights_to_begin_with(main, relu, tiny_config, tmp_path):
    assert [line["firing_rate"] for line in tiny.metrics(relu, "val")] == [{}, {}]  # none fire
    changes = {"loss.distillation": {"weight": 0.5, "self_weight": 0.5}, "max_steps": 6}
    file = tiny_config(changes)
    expect(
        main(file, f"{KEY}={relu}", f"init_checkpoint={relu}", "name=taught"),
        "another network: model.neuron.kind is 'lif' and was 'relu'",
    )
    expect(main(file, f"init_checkpoint={relu}", "name=alone"))
    taught, alone = (tiny.metrics(tmp_path / "runs" / name) for name in ("taught", "alone"))
    # The same samples and weights, and more to be learnt.
    assert taught[0]["loss"] > alone[0]["loss"]
    assert taught[0]["top1"] == alone[0]["top1"]
    assert taught[-1] != alone[-1]


def test_teacher_stays_the_same_and_is_needed_no_longer_than_the_run(
    main, relu, tiny_config, tmp_path
):
    own = Path(shutil.copytree(relu, tmp_path / "own"))
    key = f"{KEY}={own}"
    expect(main(tiny_config({"name": "taught"}), key, "max_steps=2"))
    # Another network in its place: that of other initial weights.
    shutil.rmtree(own)
    changes = {"name": "own", "seed": 1, "runs_dir": str(tmp_path)}
    expect(main(tiny_config(RELU | changes), "max_steps=1"))
    file = tiny_config({"name": "taught"})
    refused(main(file, key, "max_steps=3"), f"learned from another network than {own}")
    shutil.rmtree(own)
    shutil.copytree(relu, own)
    expect(main(file, key, "max_steps=3"))
    shutil.rmtree(own)
    expect(main(file, key, "max_steps=3"), "was trained before: nothing to do")


# --- teachers -------------------------------------------------------------------------------------


def test_teacher_answers_as_its_own_run_does(relu, tiny_config):
    weights, description = checkpoint.load_model_file(relu)
    section = loading.parse(description.config, "relu").model
    model = section.build(num_classes=4, timesteps=1)
    model.load_state_dict(weights)
    images = torch.rand(3, 3, 16, 16)
    random = torch.random.get_rng_state()
    found = teacher(tiny_config(), f"{KEY}={relu}")
    # The student's initial weights are those without a teacher.
    assert torch.equal(random, torch.random.get_rng_state())
    answers = found(images)
    assert answers.shape == (3, 4)
    assert not answers.requires_grad
    assert not any(parameter.requires_grad for parameter in found.model.parameters())
    torch.testing.assert_close(answers, model.eval()(images).detach())


def test_timm_teacher_sees_images_in_its_own_normalisation(tiny_config, tmp_path):
    torch.manual_seed(3)
    theirs = timm.create_model(TIMM.removeprefix("timm:"), num_classes=4).eval()
    file = tmp_path / "weights.safetensors"
    save_file(theirs.state_dict(), file)
    changes = {"data.mean": [0.1, 0.2, 0.3], "data.std": [0.5, 0.25, 1.0]}
    weights = f"{KEY}_weights={file}"
    found = teacher(tiny_config(changes), f"{KEY}={TIMM}", weights)
    pixels = torch.rand(2, 3, 16, 16)

    def normalised(mean, std):
        return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)

    described = timm.get_pretrained_cfg(TIMM.removeprefix("timm:"))
    assert described.mean != (0.1, 0.2, 0.3)
    expected = theirs(normalised(described.mean, described.std)).detach()
    answers = found(normalised((0.1, 0.2, 0.3), (0.5, 0.25, 1.0)))
    torch.testing.assert_close(answers, expected, rtol=1e-4, atol=1e-5)


def test_events_are_taught_at_the_students_timesteps():
    section = ModelSection.model_validate({"name": "spiking_convnet_dvs"})
    model = section.build(num_classes=3, timesteps=2)
    answering = Teacher.__new__(Teacher)
    answering.model, answering.precision = model.eval(), "fp32"
    frames = torch.rand(2, 5, 2, 34, 34).round()
    answers = answering(frames)
    model.set_timesteps(5)
    torch.testing.assert_close(answers, model(frames).detach())


TAUGHT, SEVEN = f"{KEY}=RELU", f"{KEY}_weights=SEVEN"
EVENTS = "data.images_as_events={}"
ALIGNED = "loss.distillation.teacher_alignment=error_aware"
CORRECT = "loss.distillation.self_target=correct_mean"
SELF = "loss.distillation.self_weight=0.5"


# RELU is the run of the ReLU network, SEVEN a file of timm's network of seven classes.
OF_NONE, SIZE_24 = f"{KEY}_weights=/nowhere", ("data.image_size=24", "data.resize=24")


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        ([f"{KEY}=/nowhere"], f"{KEY}: there is no checkpoint /nowhere"),
        ([TAUGHT, *SIZE_24, "model.arguments={}"], "cannot take images of 24x24 pixels"),
        ([TAUGHT, "model.num_classes=7"], "has 4 classes, but the student 7"),
        ([f"{KEY}=timm:nobody", OF_NONE], f"{KEY}: timm cannot make nobody"),
        ([f"{KEY}={TIMM}", OF_NONE], "there is no file /nowhere"),
        ([f"{KEY}={TIMM}", SEVEN], "has shape (7,) instead of (4,)"),
        ([TAUGHT, EVENTS], "was trained on images, but the data are events"),
        ([f"{KEY}={TIMM}", SEVEN, EVENTS], "takes images, but the data are events"),
        (["loss.kind=sdt", SELF], "set kind=tet, or self_weight=0"),
        ([ALIGNED, TAUGHT, "data.mixup=0.2"], "error_aware: needs samples of one class"),
        ([CORRECT, SELF, "data.cutmix=1.0"], "correct_mean: needs samples of one class"),
        ([TAUGHT, SEVEN], "needs a timm teacher; set teacher=timm:NAME, too"),
    ],
)
def test_teachers_that_do_not_suit(overrides, text, relu, tiny_config, tmp_path):
    file = tmp_path / "seven.safetensors"
    save_file(timm.create_model(TIMM.removeprefix("timm:"), num_classes=7).state_dict(), file)
    overrides = [one.replace("RELU", str(relu)).replace("SEVEN", str(file)) for one in overrides]
    with pytest.raises(UserError, match=re.escape(text)):
        teacher(tiny_config(), *overrides)


def test_teacher_of_other_classes(relu, tiny_config, tmp_path):
    root = tmp_path / "other"
    tiny.make_images(root)
    for split in ("train", "val"):
        (root / split / "left").rename(root / split / "links")
    data_index.index_splits(root)
    with pytest.raises(UserError, match=f"{KEY}: .* must have the classes of"):
        teacher(tiny_config({"data.root": str(root)}), f"{KEY}={relu}")
