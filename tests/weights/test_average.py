"""tools/average.py: the mean of weights, and running statistics that are the mean's own."""

import json

import pytest
import tiny
import torch
from safetensors.torch import load_file

from tetdist.apps.cli import train
from tetdist.apps.weights.average import mean_weights, recompute_statistics
from tetdist.config.loading import parse
from tetdist.data import mixing
from tetdist.data.build import train_loader
from tetdist.datasets.index import index_file, load_index
from tetdist.distributed.world import World
from tetdist.nn.batch_norm import BatchNorm
from tetdist.order import steps_per_epoch
from tetdist.storage import checkpoint

STATISTICS = ("running_mean", "running_var")
CPU = ("--device", "cpu", "--execution", "reference", "--threads", 1)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def run(tiny_root, tmp_path_factory):
    """A run with two checkpoints."""
    folder = tmp_path_factory.mktemp("average")
    changes = {"ema.decay": 0.8, "data.cutmix": 1.0, "engine": "torch", "name": "run"}
    file = tiny.write_config(folder / "t.yaml", tiny_root, changes)
    assert train.main(["--config", str(file)]) == 0
    return folder / "runs" / "run"


def both(run):
    return sorted((run / "checkpoints").glob("step-*"))


def is_statistic(key):
    return key.rpartition(".")[2] in STATISTICS


@pytest.mark.parametrize(("file", "options"), [("model", ()), ("ema", ("--ema",))])
def test_weights_are_the_mean(file, options, run, call, tmp_path):
    output = tmp_path / "mean.safetensors"
    later, earlier = reversed(both(run))
    status, printed = call("average", later, earlier, "--output", output, *CPU, *options)
    assert status == 0, printed
    assert "running statistics: 40 of 40 samples, " in printed
    names = "step-00000010, step-00000005; running statistics at T=2 from 40 training samples"
    assert names in printed
    a, b = (load_file(path / f"{file}.safetensors") for path in both(run))
    found, description = checkpoint.load_model_file(output)
    assert found.keys() == a.keys()
    for key, value in found.items():
        mean = ((a[key].double() + b[key].double()) / 2).float()
        assert value.dtype == torch.float32
        assert torch.equal(value, mean) != is_statistic(key), key
    assert (description.step, description.validation) == (10, None)
    status, printed = call("eval", "--checkpoint", output, "--json", tmp_path / "e.json", *CPU)
    assert status == 0, printed
    assert "mean of 2" in json.loads((tmp_path / "e.json").read_text())["averaged"]
    assert call("average", *both(run), "--output", output, *CPU)[0] == 2  # it exists


# --- running statistics -------------------------------------------------------------------------


class Alone(World):
    """One of several processes, whose averages are its own numbers."""

    def mean_(self, tensor):
        return tensor


def network(run, timesteps=2, **changes):
    """Configuration, training split and the mean of the checkpoints, in float64."""
    weights, description = mean_weights(both(run))
    changed = tiny.changed(description.config, {"precision": "fp64"} | changes)
    config = parse(changed, "test", warn=False)
    index = load_index(index_file(config.data.index_dir, "train"))
    model = config.model.build(num_classes=4, timesteps=timesteps)
    model.set_execution("reference")
    model.load_state_dict(weights)
    return config, index, model.double()


def statistics(run, samples, rank=0, world_size=1, timesteps=2, **changes):
    config, index, model = network(run, timesteps, **changes)
    world = Alone(rank, world_size, torch.device("cpu"), None)
    recompute_statistics(model, config, index, world, samples)
    return {key: value for key, value in model.state_dict().items() if is_statistic(key)}


@pytest.mark.parametrize(
    ("size", "timesteps", "changes"),
    [(16, 3, {}), (15, 2, {"data.repeats": 2, "phases.0.final_image_size": 15})],
)
def test_statistics_are_of_the_training_samples(size, timesteps, changes, run):
    """Against what the norms are given, each micro-batch by itself; 10 samples are two steps."""
    config, index, model = network(run, timesteps, **changes)
    seen = {}

    def note(name):
        def hook(_norm, inputs):
            x = inputs[0].transpose(0, 2).flatten(1)  # (C, ...)
            copies = inputs[1] if len(inputs) > 1 else 1
            count = x.shape[1] * copies
            variance = x.var(1, correction=0) * count / (count - 1)
            seen.setdefault(f"{name}.running_mean", []).append(x.mean(1))
            seen.setdefault(f"{name}.running_var", []).append(variance)

        return hook

    norms = {name: m for name, m in model.named_modules() if isinstance(m, BatchNorm)}
    for name, norm in norms.items():
        norm.register_forward_pre_hook(note(name))
    last = sum(phase.epochs for phase in config.phases) - 1
    step = last * steps_per_epoch(len(index), 8)
    model.train()
    world = Alone(0, 1, torch.device("cpu"), None)
    with train_loader(config, index, world, step, size) as loader, torch.no_grad():
        for _ in range(8):
            batch = next(loader)
            assert batch.mix is not None
            mix = mixing.on_device(batch.mix, world.device)
            model(mixing.mixed_images(batch.images.double(), mix))
    found = statistics(run, 10, timesteps=timesteps, **changes)
    assert found.keys() == seen.keys()
    for key, values in seen.items():
        assert len(values) == 8
        torch.testing.assert_close(found[key], torch.stack(values).mean(0), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("processes", [2, 3])
def test_any_number_of_processes_has_the_same_statistics(processes, run):
    batch = {"batch.global": 12}
    one = statistics(run, 24, **batch)
    shares = [statistics(run, 24, rank, processes, **batch) for rank in range(processes)]
    for key, value in one.items():
        together = torch.stack([share[key] for share in shares])
        torch.testing.assert_close(value, together.mean(0), rtol=1e-9, atol=1e-15)
        assert not torch.equal(shares[0][key], shares[1][key])


def test_all_commands_recompute_them_at_another_timestep(run, call, tmp_path, monkeypatch):
    """average writes them; eval and export get the same, and leave the checkpoint alone."""
    file, answers = tmp_path / "at_1.safetensors", []
    at_1 = ("--timesteps", 1)
    status, printed = call("average", run, "--output", file, *at_1, "--samples", 9, *CPU)
    assert status == 0, printed
    text = "running statistics at T=1 from 16 training samples"
    assert f"wrote {file}: {text}\n" in printed
    for number, given in enumerate([(file,), (run, "--recompute-statistics", 9), (run,)]):
        json_file = tmp_path / f"{number}.json"
        status, printed = call("eval", "--checkpoint", *given, *at_1, "--json", json_file, *CPU)
        assert status == 0, printed
        answers.append(json.loads(json_file.read_text()))
        assert (text in printed) == (number < 2)
    assert answers[0]["loss"] == answers[1]["loss"] != answers[2]["loss"]
    weights, description = checkpoint.load_model_file(file)
    assert description.timesteps == 1
    exported = tmp_path / "exported"
    options = ("--format", "safetensors", "--output", exported, *at_1)
    status, printed = call("export", run, "--recompute-statistics", 9, *options)
    assert status == 0, printed
    of_export, _ = checkpoint.load_model_file(exported)
    for key, value in weights.items():
        torch.testing.assert_close(of_export[key], value, rtol=1e-5, atol=1e-6)
    assert text in (exported / "README.md").read_text()
    monkeypatch.setenv("WORLD_SIZE", "2")
    options = ("--format", "safetensors", "--output", tmp_path / "another", *at_1)
    status, printed = call("export", run, "--recompute-statistics", 9, *options)
    assert (status, "an export runs on one process" in printed) == (2, True), printed


# --- what has no mean ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"model.neuron.decay": 0.9}, "model.neuron.decay is 0.9 and was 0.5"),
        ({"model.arguments.channels": [4, 6]}, "model.arguments.channels is [4, 6] and was [4, 8]"),
    ],
)
def test_unlike_networks_are_refused(changes, text, run, call, tmp_path):
    _, description = checkpoint.load_model_file(run)
    config = tiny.changed(description.config, changes)
    model = parse(config, "test", warn=False).model.build(num_classes=4, timesteps=2)
    other = tmp_path / "other.safetensors"
    theirs = description.model_copy(update={"config": config})
    checkpoint.write_model_file(other, model.state_dict(), theirs)
    status, output = call("average", run, other, "--output", tmp_path / "m.safetensors", *CPU)
    assert status == 2
    assert f"{other} is another network than {run}: {text}" in output


def test_other_timesteps_and_classes_are_refused(run, call, tmp_path):
    weights, description = checkpoint.load_model_file(run)
    changes = {"timesteps": 3, "classes": list("abcd")}
    other = tmp_path / "other.safetensors"
    checkpoint.write_model_file(other, weights, description.model_copy(update=changes))
    status, output = call("average", run, other, "--output", tmp_path / "m.safetensors", *CPU)
    assert status == 2
    reasons = "T is 3 instead of 2; its classes differ"
    assert reasons in output
    assert not (tmp_path / "m.safetensors").exists()
