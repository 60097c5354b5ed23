"""Networks from outside that pool over all T, or keep a state of their own."""

import json
import re
from types import SimpleNamespace

import pytest
import timm
import tiny
import torch
from tiny import expect, refused
from torch import nn

from tetdist.apps.weights import trained
from tetdist.config.loading import load
from tetdist.errors import UserError
from tetdist.models import freeze
from tetdist.models.separate import check_network
from tetdist.network import agree_on_looks_ahead
from tetdist.nn.batch_norm import (
    BatchNorm,
    RunningMean,
    recomputing,
    running_states,
    update_running_statistics,
)
from tetdist.plugins import import_files
from tetdist.storage.checkpoint import load_model_file, newest, write_model_file
from tetdist.training.prepared import prepare
from tetdist.training.state import restore

PAGE = (tiny.PROJECT / "docs" / "extending.md").read_text()
SNN = re.search(r"```python\n# my_snn.py\n(.*?)```", PAGE, re.DOTALL)[1].replace(
    "my_snn", "looking"
)
STATE = re.search(r"```python\n([^`]*?class Rarely.*?)```", PAGE, re.DOTALL)[1]
ATTENTION = """
import torch
from torch import nn

class Attention(nn.Module):
    '''Weighs channels by their mean over all T, or in a causal network at t.'''

    def __init__(self, channels, causal):
        super().__init__()
        self.causal, self.gate = causal, nn.Linear(channels, channels)

    def forward(self, x):
        mean = x.mean((3, 4)) if self.causal else x.mean((0, 3, 4))[None]
        return x * self.gate(mean).sigmoid()[..., None, None]

"""
COUNTING = """
import torch
from torch import nn

class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.steps += 1
        return x

"""
CHANGES = {
    "model": {"name": "looking", "arguments": {"width": 4}},
    "imports": ["looking.py"],
    "engine": "torch",
}


def with_layer(source, layer):
    """The page's network with a layer after its second block, which sends any numbers."""
    block = "ConvNormNeuron(conv3x3(2 * width, 4 * width, stride=2), neuron)"
    network = SNN.replace(block, f"nn.Sequential({block}, {layer})")
    network = network.replace("    def __init__(", "    spike_levels = None\n\n    def __init__(")
    return source + network


def attentive(*, causal):
    return with_layer(ATTENTION, f"Attention(4 * width, {causal})")


@pytest.fixture
def write(tiny_config, tmp_path):
    """Writes looking.py and a configuration that imports it: (source, {key: value}) -> file."""

    def make(source, changes=None):
        (tmp_path / "looking.py").write_text(source)
        return tiny_config(CHANGES | {"phases.0.epochs": 1} | (changes or {}))

    return make


@pytest.mark.parametrize("causal", [False, True])
def test_what_pools_over_time_is_evaluated_at_each_t_and_neither_exits_nor_streams(
    main, call, write, alone, tiny_root, tmp_path, causal
):
    file = write(
        attentive(causal=causal),
        {"phases.0.timesteps": 4, "precision": "fp64", "data.held_out": 0.2},
    )
    log = expect(main(file, "name=run"), "does not look ahead" if causal else "looking looks ahead")
    assert re.search(r"\(checked in \d+\.\d s\)", log)
    run, imports = tmp_path / "runs/run", ("--import", tmp_path / "looking.py")
    (line,) = tiny.metrics(run, "val")
    assert len(line["per_timestep_top1"]) == (4 if causal else 0)
    weights, description = load_model_file(run)
    assert description.looks_ahead is (not causal)
    state = json.loads((tiny.newest(run) / "state.json").read_text())
    assert state["looks_ahead"] is (not causal)
    data = ("--data", tiny_root, "--device", "cpu", *imports)
    status, text = call("eval", "--checkpoint", run, "--json", tmp_path / "all.json", *data)
    assert (status, "the network is not causal" in text) == (0, not causal)
    losses = json.loads((tmp_path / "all.json").read_text())["per_timestep_loss"]
    for t in (1, 4):
        at_t = tmp_path / f"{t}.json"
        assert call("eval", "--checkpoint", run, "--timesteps", t, "--json", at_t, *data)[0] == 0
        own = json.loads(at_t.read_text())["per_timestep_loss"][t - 1]
        assert losses[t - 1] == pytest.approx(own, rel=1e-9)
    exits = call("eval", "--checkpoint", run, "--exit-within", "1", *data)
    assert ("has no early exit" in exits[1]) is (not causal)
    network, x = trained.load(run).model.double(), torch.randn(2, 3, 16, 16).double()
    if causal:
        stream = network.stream()
        mean = [stream.step(x) for _ in range(4)][-1]
        torch.testing.assert_close(mean, network(x), rtol=0, atol=1e-12)
        # A verdict that the checkpoint keeps is obeyed, by a resumed run, too.
        changes = description.model_copy(update={"looks_ahead": True})
        write_model_file(kept := tmp_path / "kept.safetensors", weights, changes)
        assert "the network is not causal" in call("eval", "--checkpoint", kept, *data)[1]
        with pytest.raises(UserError, match="MySNN looks ahead"):
            trained.load(kept).model.stream()
        saved = newest(run / "checkpoints")
        saved.state["looks_ahead"] = True
        again = prepare(load(str(file), ["name=run"]), alone)
        restore(saved, again, None)
        assert again.model.looks_ahead is True
        return
    with pytest.raises(UserError, match="MySNN looks ahead"):
        network.stream()
    refused(main(file, "name=cut", "recompute={timesteps: 2}"), "cannot run in segments")
    step = ("--format", "onnx-step", "--output", tmp_path / "step.onnx", *imports)
    assert "MySNN looks ahead" in call("export", run, *step)[1]


def toy(source, tmp_path, **arguments):
    (tmp_path / "looking.py").write_text(source)
    import_files([tmp_path / "looking.py"])
    torch.manual_seed(0)
    return timm.create_model("looking", width=4, num_classes=4, **arguments)


@pytest.mark.parametrize("timesteps", [1, 2, 5])
def test_the_verdict_of_a_fresh_network_holds_at_any_t_and_random_numbers_stay(tmp_path, timesteps):
    for causal in (False, True):
        model = toy(attentive(causal=causal), tmp_path, timesteps=timesteps)
        before = torch.get_rng_state()
        check_network("toy", model, (3, 16, 16))
        assert model.looks_ahead is (not causal)
        assert torch.equal(torch.get_rng_state(), before)
        assert model.timesteps == timesteps


IN_PAIRS = ATTENTION.replace(
    "x.mean((0, 3, 4))[None]",
    """torch.cat(
            [pair.mean(0, keepdim=True).expand_as(pair) for pair in x.mean((3, 4)).split(2)]
        )""",
)


def test_a_layer_that_joins_timesteps_in_pairs_is_found_at_an_odd_t(tmp_path):
    """The third timestep is alone, so that T = 3 and T = 2 agree."""
    model = toy(with_layer(IN_PAIRS, "Attention(4 * width, False)"), tmp_path, timesteps=3)
    check_network("toy", model, (3, 16, 16))
    assert model.looks_ahead


UNDECIDED = """
import torch
from torch import nn

class Switched(nn.Module):
    '''Shows every timestep the mean of all T, plus the number of the timestep if it is on.'''

    def __init__(self):
        super().__init__()
        self.register_buffer("on", torch.zeros(()))

    def forward(self, x):
        times = torch.arange(len(x), dtype=x.dtype).view(-1, 1, 1, 1, 1)
        return x.mean(0, keepdim=True).expand_as(x) * 0 + 1 + self.on * (times - len(x))

"""


def test_what_is_not_decided_is_decided_at_an_evaluation_and_kept(write, alone, main, tmp_path):
    file = write(with_layer(UNDECIDED, "Switched()").replace("neuron, width", "neuron=None, width"))
    source = (tmp_path / "looking.py").read_text()
    last = "ConvNormNeuron(conv3x3(4 * width, 8 * width, stride=2), neuron)"
    (tmp_path / "looking.py").write_text(source.replace(last, "conv3x3(4 * width, 8 * width, 2)"))
    import_files([tmp_path / "looking.py"])
    run = prepare(load(str(file), []), alone)
    assert run.model.looks_ahead is None
    run.decide_looks_ahead()
    assert run.model.looks_ahead is None
    next(m for m in run.model.modules() if hasattr(m, "on")).on.fill_(1)
    before = torch.get_rng_state()
    run.decide_looks_ahead()
    assert run.model.looks_ahead is True
    assert torch.equal(torch.get_rng_state(), before)
    # At the start, and at both evaluations.
    assert expect(main(file, "name=unknown", "phases.0.epochs=2")).count("not decided") == 3
    for verdicts, worst in (([False, True], True), ([False, None], None), ([False], False)):
        world = SimpleNamespace(gather=lambda _, verdicts=verdicts: verdicts)
        agree_on_looks_ahead(run.model, world)
        assert run.model.looks_ahead is worst


# ------------------------------------------------------------------------- a state of one's own


def test_a_buffer_that_training_changes_is_refused_unless_it_is_a_running_mean(write, main):
    refused(
        main(write(with_layer(COUNTING, "Counting()"))),
        "looking changes the buffer blocks.1.1.steps",
        "RunningMean",
    )
    expect(main(write(with_layer(STATE, "Rarely(4 * width)"))))


def test_a_running_mean_is_the_same_on_two_processes_and_with_recompute(
    farm, main, write, tmp_path
):
    file = write(with_layer(STATE, "Rarely(4 * width)"), {"precision": "fp64"})
    expect(main(file, "name=one"))
    expect(main(file, "name=again", "recompute=blocks"))
    expect(farm(file, "name=two", world=2))
    one, again, two = (load_model_file(tmp_path / f"runs/{n}")[0] for n in ("one", "again", "two"))
    rate = one["blocks.1.1.rate.mean"]
    assert 0 < rate.mean() < 1
    assert all(torch.equal(value, again[key]) for key, value in one.items())
    torch.testing.assert_close(two["blocks.1.1.rate.mean"], rate, rtol=1e-9, atol=0)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_a_running_mean_moves_once_a_step_by_the_average(shape):
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3)]
    model = nn.ModuleList([RunningMean(torch.ones(shape), momentum=0.25), BatchNorm(2)]).double()
    state = model[0]
    assert torch.equal(state(values[0]), torch.ones(shape, dtype=torch.float64))
    moved = 0.75 + 0.25 * values[0]
    torch.testing.assert_close(state(values[1]), moved)
    state.deferred, start = True, state.mean.clone().view(shape)
    for value in values:
        assert torch.equal(state(value), start)
    with recomputing():
        state(values[0] + 1)
    update_running_statistics(model, lambda flat: flat + 1, torch.tensor(True))
    mean = sum(values) / 3 + 1
    torch.testing.assert_close(state.mean.view(shape), 0.75 * start + 0.25 * mean)
    assert running_states(model) == [*model]
    state.deferred, end = False, state.eval()(values[0])
    assert torch.equal(state(values[0]), end)
    freeze(whole := nn.ModuleDict({"part": nn.Sequential(state, nn.Linear(1, 1))}), ["part"])
    whole.train()
    assert torch.equal(state(values[0]), end)
    assert torch.equal(state(values[0]), end)
