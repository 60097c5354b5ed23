"""The moving average of the weights: timm's numbers, of all steps of a run, and what reads it."""

import copy
import json

import pytest
import tiny
import torch
from safetensors.torch import load_file
from timm.utils import ModelEmaV3
from tiny import expect, refused
from torch import nn

from tetdist.apps.cli import eval as evaluation
from tetdist.apps.weights import export
from tetdist.apps.weights.trained import load
from tetdist.config.sections.training import EmaSection
from tetdist.errors import UserError
from tetdist.storage import checkpoint, selection
from tetdist.training.ema import WeightAverage, decay_at

APPLIED, GIVEN_UP = torch.tensor(True), torch.tensor(False)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)).double()


def change(model):
    """Stand in for a step: other weights, running statistics and counts."""
    for value in model.state_dict().values():
        value += torch.randn_like(value) if value.is_floating_point() else 1


@pytest.mark.parametrize("warmup", [False, True])
def test_average_is_timms(warmup):
    model = network()
    section = EmaSection(decay=0.9, warmup=warmup)
    ours = WeightAverage(model, section)
    theirs = ModelEmaV3(model, decay=0.9, use_warmup=warmup)
    # As DeepSpeed and channels_last do: the tensors move, and the average comes along.
    model.to(memory_format=torch.channels_last)
    ours.follow()
    for step in range(1, 60):
        change(model)
        ours.update(step, APPLIED)
        theirs.update(model, step)
        assert decay_at(section, step) == pytest.approx(theirs.get_decay(step), abs=1e-15)
        for key, value in theirs.module.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[key], value, rtol=1e-12, atol=1e-13)
    assert decay_at(section, 2) == (pytest.approx(0.370, abs=0.001) if warmup else 0.9)
    assert ours.state_dict()["0.weight"].is_contiguous(memory_format=torch.channels_last)


def test_step_that_was_given_up_changes_nothing():
    model = network()
    ours = WeightAverage(model, EmaSection(decay=0.9))
    ours.follow()
    change(model)
    ours.update(1, APPLIED)
    change(model)
    ours.update(2, APPLIED)
    before = copy.deepcopy(ours.state_dict())
    ours.update(3, GIVEN_UP)
    assert all(torch.equal(value, before[key]) for key, value in ours.state_dict().items())
    ours.update(3, APPLIED)
    assert not torch.equal(ours.state_dict()["0.weight"], before["0.weight"])


def test_averages_and_weights_change_places_and_back():
    model = network()
    model.add_module("tied", nn.Linear(4, 2))
    model.tied.weight = model[2].weight  # the same parameter by two names
    ours = WeightAverage(model, EmaSection(decay=0.5))
    ours.follow()
    for step in (1, 2):
        change(model)
        ours.update(step, APPLIED)
    own = {
        key: (value, value.data_ptr(), value.clone()) for key, value in model.state_dict().items()
    }
    averages = {key: value.clone() for key, value in ours.state_dict().items()}
    assert not torch.equal(averages["2.weight"], own["2.weight"][2])

    def interrupted():
        with ours.in_model():
            for key, value in model.state_dict().items():
                assert torch.equal(value, averages[key]), key
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    for key, value in model.state_dict().items():
        _, pointer, before = own[key]
        assert value.data_ptr() == pointer
        assert torch.equal(value, before)
        assert torch.equal(ours.state_dict()[key], averages[key])


# --- runs ---------------------------------------------------------------------------------------

DECAY = 0.8
EVERY_STEP = {"ema.decay": DECAY, "save": {"every_steps": 1, "keep_last": 100}, "seed": 2}
PHASES = [
    {"epochs": 2, "timesteps": 2, "optimizer": {"kind": "sgd", "lr": 0.1}},
    {"epochs": 1, "timesteps": 3, "optimizer": {"kind": "adam", "lr": 0.01}},
]


def averaged_again(run):
    """The average by its definition, of the weights in the checkpoints of all steps."""
    average = {}
    checkpoints = sorted((run / "checkpoints").glob("step-*"))
    assert len(checkpoints) == json.loads((checkpoints[-1] / "state.json").read_text())["step"]
    for path in checkpoints:
        for key, value in load_file(path / "model.safetensors").items():
            before = average.get(key, value.double())
            average[key] = DECAY * before + (1 - DECAY) * value.double()
    return average


def assert_average_of_its_steps(run):
    found = load_file(tiny.newest(run) / "ema.safetensors")
    expected = averaged_again(run)
    assert found.keys() == expected.keys()
    for key, value in found.items():
        torch.testing.assert_close(value.double(), expected[key], rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def run(farm, tiny_root, tmp_path_factory):
    """A finished run of two phases with an average."""
    folder = tmp_path_factory.mktemp("ema")
    file = tiny.write_config(folder / "t.yaml", tiny_root, EVERY_STEP | {"phases": PHASES})
    expect(
        farm(file, "name=run", "engine=torch"),
        "evaluation of the moving average at epoch 3, step 15: top-1 ",
        ". Moving average: ",
    )
    return folder / "runs" / "run"


def test_average_is_of_all_steps_of_all_phases(run):
    assert_average_of_its_steps(run)


def test_average_at_a_higher_stage_of_zero(farm, tiny_config, tmp_path):
    expect(farm(tiny_config(EVERY_STEP | {"zero_stage": 2, "max_steps": 3}), world=2))
    assert_average_of_its_steps(tmp_path / "runs/tiny")


def test_evaluated_beside_the_weights_and_chosen_by_itself(run):
    weights, averages = tiny.metrics(run, "val"), tiny.metrics(run, "val_ema")
    assert [line["step"] for line in averages] == [line["step"] for line in weights] == [5, 10, 15]
    assert all(ours.keys() == theirs.keys() for ours, theirs in zip(averages, weights, strict=True))
    assert all(
        ours["loss"] != theirs["loss"] for ours, theirs in zip(averages, weights, strict=True)
    )
    (final,) = tiny.metrics(run, "final")
    kinds = ((weights, "", "model.safetensors"), (averages, "ema_", "ema.safetensors"))
    for lines, prefix, file in kinds:
        best = max(lines, key=lambda line: line["top1"])
        assert [line["best_top1"] for line in lines][-1] == best["top1"]
        assert final[f"{prefix}top1"] == lines[-1]["top1"]
        assert (final[f"{prefix}best_top1"], final[f"{prefix}best_step"]) == (
            best["top1"],
            best["step"],
        )
        name = f"step-{best['step']:08}"
        assert selection.best(run / "checkpoints", file).name == name
    # One's verdict would be wrong for the other.
    assert (final["best_step"], final["ema_best_step"]) == (5, 10)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("which", ["last", "best"])
def test_evaluated_again_it_is_what_the_run_logged(which, run, tmp_path):
    options = ["--execution", "reference", "--device", "cpu", "--json", str(tmp_path / "e.json")]
    options += ["--best"] if which == "best" else []
    assert evaluation.main(["--checkpoint", str(run), "--ema", *options]) == 0
    found = json.loads((tmp_path / "e.json").read_text())
    lines = tiny.metrics(run, "val_ema")
    line = lines[-1] if which == "last" else max(lines, key=lambda line: line["top1"])
    assert (found["step"], found["top1"]) == (line["step"], line["top1"])
    assert found["loss"] == pytest.approx(line["loss"], rel=1e-6)
    assert found["averaged"] == "moving average, decay 0.8"


def test_exported_and_begun_with(run, main, tiny_config, tmp_path):
    trained = load(run, "last", ema=True)
    expected = load_file(tiny.newest(run) / "ema.safetensors")
    assert all(torch.equal(v, expected[k]) for k, v in trained.model.state_dict().items())
    card = export.card(trained)
    assert "| weights | moving average, decay 0.8 |" in card
    assert f"| accuracy | {tiny.metrics(run, 'val_ema')[-1]['top1']:.2f} % top-1" in card
    file = tiny.newest(run) / "ema.safetensors"
    expect(main(tiny_config(), f"init_checkpoint={file}", "max_steps=1"))
    begun = load_file(tiny.newest(tmp_path / "runs/tiny") / "model.safetensors")
    key = "blocks.0.conv.weight"
    assert 0 < (begun[key] - expected[key]).abs().max() < 0.05


def test_average_cannot_come_or_go_within_a_run(main, tiny_config, tmp_path):
    file = tiny_config({"save.every_steps": 1})
    expect(main(file, "max_steps=1"))
    refused(main(file, "ema.decay=0.9", "max_steps=2"), "ema.decay is 0.9 and was None")
    with pytest.raises(UserError, match="has no moving average of its weights"):
        checkpoint.load_model_file(tmp_path / "runs/tiny", "best", ema=True)
    # Nor where nobody knows any more what the run was.
    (tmp_path / "runs/tiny/config.yaml").unlink()
    refused(main(file, "ema.decay=0.9", "max_steps=2"), "has no moving average to continue from")
