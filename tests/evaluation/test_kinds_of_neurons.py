"""What evaluations say of networks whose neurons are no LIF."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import timm
import torch
from torch import Tensor

from tests.passes import randomize
from tetdist.data.loader import Batch
from tetdist.distributed.world import World, join
from tetdist.errors import UserError
from tetdist.evaluation.evaluate import Evaluation, evaluate
from tetdist.evaluation.suite import Passes, run_suite
from tetdist.models import SpikingNetwork
from tetdist.nn import neurons
from tetdist.nn.neurons import LIF
from tetdist.reports.evaluation_page import as_text, html_page, png_page

CLASSES = ("a", "b", "c", "d")


@dataclass(frozen=True, kw_only=True)
class Ahead(LIF):
    """Every timestep sees the mean of all timesteps' currents; any T will do."""

    causal: ClassVar[bool] = False

    def run(
        self, current: Tensor, membrane: Tensor | None, **parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        grown = torch.arange(1, len(current) + 1).view(-1, *(1,) * (current.ndim - 1))
        return neurons.run(current + (current * grown).mean(0), self, membrane, **parameters)


@pytest.fixture(autouse=True)
def ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(neurons.NEURONS._entries, "ahead", Ahead)


class OneBatch(Passes):
    """Evaluates a batch that is at hand, in place of a folder's."""

    batch: Batch

    def run(
        self,
        title: str,
        change: Callable[[Iterable[Batch]], Iterable[Batch]] = lambda batches: batches,
        also: Callable[..., Any] = lambda _logits, _labels: None,
    ) -> Evaluation:
        del title
        batches = change([self.batch])
        samples = len(self.batch.labels)
        return evaluate(self.model, batches, samples, self.world, precision="fp64", also=also)


@pytest.fixture
def alone() -> Iterator[World]:
    with join("cpu") as world:
        yield world


def network(name: str, neuron: dict[str, Any], **arguments: Any) -> SpikingNetwork:
    torch.manual_seed(0)
    model: SpikingNetwork = timm.create_model(name, num_classes=4, neuron=neuron, **arguments)
    randomize(model)
    return model.double().eval()


def small(neuron: dict[str, Any]) -> SpikingNetwork:
    return network("spiking_convnet", neuron, channels=(6, 8, 8), input_size=12)


def passes_of(model: SpikingNetwork, world: World) -> OneBatch:
    generator = torch.Generator().manual_seed(0)
    index: Any = type("Index", (), {"classes": CLASSES})
    config: Any = None
    passes = OneBatch(model, config, index, world, lambda: None)
    images = torch.randn(24, 3, 12, 12, generator=generator, dtype=torch.float64)
    object.__setattr__(passes, "batch", Batch(images, torch.arange(24) % 4, np.arange(24)))
    return passes


def suite(model: SpikingNetwork, world: World, timesteps: list[int]) -> dict[str, Any]:
    return run_suite(
        passes_of(model, world), timesteps=timesteps, drop_timesteps=[], drop_events=[], seed=0
    )


def test_what_is_not_causal_is_evaluated_at_each_t_by_itself(alone: World) -> None:
    model = small({"kind": "ahead"})
    found = suite(model, alone, [1, 2, 4])
    images, labels = passes_of(model, alone).batch.images, torch.arange(24) % 4
    losses = []
    with torch.no_grad():
        for t in (1, 2, 4):
            model.set_timesteps(t)
            losses.append(torch.nn.functional.cross_entropy(model(images), labels).item())
        first_two = model(images, per_timestep=True)[:2].mean(0)
    got = found["per_timestep_loss"]
    assert [got[0], got[1], got[3]] == pytest.approx(losses)
    assert got[2] is None
    # One pass at the largest T would have said something else.
    other = torch.nn.functional.cross_entropy(first_two, labels).item()
    assert abs(other - losses[1]) > 1e-3
    assert (found["timesteps"], found["loss"]) == (4, got[3])
    assert found["early_exit"] is None
    about = {"checkpoint": "x", "model": "m", "step": 1, "split": "val", "seed": 0}
    about |= {"trained_timesteps": 4, "reported_timesteps": [1, 2, 4]}
    for text in (as_text(about | found), html_page(about | found)):
        assert "the network is not causal" in text
    assert png_page(about | found).startswith(b"\x89PNG")


def test_a_training_says_of_what_is_not_causal_only_the_whole(alone: World) -> None:
    passes = passes_of(small({"kind": "psn"}), alone)
    result = passes.run("evaluate")
    assert result.timesteps == 4
    assert result.per_timestep_top1 == result.per_timestep_loss == []
    assert passes_of(small({"kind": "masked_psn"}), alone).run("").per_timestep_top1 != []


def test_a_network_runs_at_the_t_of_its_neurons_only() -> None:
    model = small({"kind": "psn"})
    with pytest.raises(UserError, match="timesteps: psn has weights for T=4 alone"):
        model.set_timesteps(2)
    assert model.timesteps == 4
    with pytest.raises(UserError, match="psn neurons weigh the currents of all timesteps at once"):
        model.set_segment(2)
    with pytest.raises(UserError, match="timesteps: psn has weights for T=4 alone"):
        network("spiking_convnet", {"kind": "psn"}, timesteps=6)
    masked = small({"kind": "masked_psn"})
    masked.set_timesteps(2)
    with pytest.raises(UserError, match="and none for later timesteps; it cannot run 5 timesteps"):
        masked.set_timesteps(5)


@pytest.mark.parametrize("kind", ["ilif", "nilif"])
def test_firing_rates_of_integer_spikes_are_shares_of_the_most(kind: str, alone: World) -> None:
    model = small({"kind": kind, "most_spikes": 8, "threshold": 0.3})
    seen: list[Tensor] = []
    model.stem.neuron.register_forward_hook(lambda _m, _i, output: seen.append(output))  # type: ignore[union-attr]  # of a ConvNormNeuron
    result = passes_of(model, alone).run("evaluate")
    spikes = seen[0] / (8 if kind == "ilif" else 1)
    assert 0.1 < result.firing_rate["stem.neuron"] < 1
    assert result.firing_rate["stem.neuron"] == pytest.approx(spikes.mean().item())
