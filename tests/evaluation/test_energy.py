"""Energy with memory: a network counted by hand, and break-even rates of arXiv 2409.08290v4."""

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tetdist.errors import UserError
from tetdist.evaluation.energy import EnergySection, Estimator, read_constants
from tetdist.evaluation.operations import LayerOperations, OperationCounts, Operations
from tetdist.nn.neurons import LIF
from tetdist.nn.norm_neuron import Neuron


class ByHand(nn.Module):
    """A convolution of an image, neurons of which half fire at each of two timesteps, 3 outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.neuron, self.fc = Neuron(LIF()), nn.Linear(64, 3, bias=False)
        nn.init.zeros_(self.conv.weight)
        self.conv.bias = nn.Parameter(torch.tensor([2.0, 2.0, 0.0, 0.0]))

    def forward(self, x: Tensor) -> Tensor:
        fired = self.neuron(self.conv(x)[None], 2)
        return self.fc(fired.flatten(2))


def test_a_network_counted_by_hand(alone):
    model = ByHand().eval()
    with OperationCounts(model) as counts, torch.no_grad():
        model(0.3 * torch.ones(5, 2, 4, 4))
    found = Estimator(EnergySection(), 2, counts.total(alone, 5)).as_json()
    assert found["activation_bits"] == 2  # 0 to 2 spikes
    conv, fc = found["layers"]["conv"], found["layers"]["fc"]
    # 2 channels to 4 of 4x4 positions: 9 neighbours, less those beyond the borders. Once for both
    # timesteps, in both networks; each of the 72 weights is read once.
    synapses, neurons = 2 * 4 * (16 * 9 - 4 * 3 * 4 + 4), 64
    products = 0.0125 * 8 * 8 * synapses
    assert conv["spiking"] == pytest.approx(
        {
            "weight_bits_read": 72 * 8,
            "spikes_read": 0,
            "activation_bits_read": 8 * synapses,
            "activation_bits_written": 2 * neurons,
            "membrane_bits_read": 16 * 2 * neurons,
            "membrane_bits_written": 16 * 2 * neurons,
            "accumulates": 0,
            "comparisons": 2 * neurons,
            "bit_products": 8 * 8 * synapses,
            "pj": pytest.approx(
                {
                    "weights": 0.0375 * 72 * 8,
                    "activations": 0.25 * 8 * synapses + 0.0375 * 2 * neurons,
                    "membranes": 0.0375 * 2 * 16 * 2 * neurons,
                    "arithmetic": products + 0.05448 * 2 * neurons,
                    "total": pytest.approx(
                        576 * 0.0375 + 0.25 * 6400 + 4.8 + 153.6 + 640 + 6.97344
                    ),
                }
            ),
        }
    )
    assert conv["relu"]["pj"] == pytest.approx(
        {
            "weights": 0.0375 * 72 * 8,
            "activations": 0.25 * 8 * synapses + 0.0375 * 2 * neurons,  # one time 2 bits
            "membranes": 0,
            "arithmetic": products,
            "total": pytest.approx(576 * 0.0375 + 0.25 * 6400 + 4.8 + 640),
        }
    )
    assert (conv["spike_rate"], conv["break_even_rate"]) == (None, None)
    # 32 of 64 neurons reach 3 outputs, twice: 192 accumulates, each with its weight.
    assert fc["spike_rate"] == 0.5
    spikes, relu = 192 * (0.0375 * 8 + 3.0 + 0.05448), 192 * (0.0375 * 8 + 0.25 * 2)
    assert fc["spiking"]["pj"]["total"] == pytest.approx(spikes)
    assert fc["bitmaps"]["pj"]["total"] == pytest.approx(384 * (0.3 + 0.25) + 192 * 0.05448)
    # Of 2 s T / (T + 1) = 2/3 of its activations, all 192 synapses have 128 products.
    relu += 128 * 0.0125 * 2 * 8
    assert fc["relu"]["pj"]["total"] == pytest.approx(relu)
    # At rate s: 384 s of these spikes; products of 2 bits and 8 at 256 s synapses.
    even = 192 * 0.8 / (384 * 3.35448 - 256 * 0.2)
    assert fc["break_even_rate"] == pytest.approx(even)
    assert found["spike_rate"] == 0.5
    for network in ("spiking", "bitmaps", "relu"):
        parts = [layer[network]["pj"]["total"] for layer in (conv, fc)]
        assert found[network]["pj"]["total"] == pytest.approx(sum(parts))
    assert found["arithmetic_only_pj"] == pytest.approx(
        {"spiking": 4.6 * synapses + 0.9 * 192, "relu": 4.6 * (synapses + 192)}
    )
    # Without spikes, the classifier saves 0.8 * 192 = 153.6 pJ, less than the membranes' 160.6.
    assert found["break_even_rate"] == 0
    assert json.loads(json.dumps(found)) == found


def layer(sources: int = 4096, timesteps: int = 5, **changed: Any) -> LayerOperations:
    """A neuron with so many synapses, a tenth of which receive a spike in a timestep."""
    counts = {"accumulates": 0.1 * timesteps * sources, "multiply_accumulates": 0.0}
    counts |= {"synapses": sources, "weights": sources, "membrane_updates": timesteps}
    return LayerOperations(**counts | changed)


def estimator(
    one: LayerOperations,
    timesteps: int = 5,
    constants: EnergySection | None = None,
    most_spikes: int = 1,
) -> Estimator:
    return Estimator(constants or EnergySection(), timesteps, Operations({"": one}, most_spikes))


def even(timesteps: int, weight_bits: int, sources: int = 4096, **changed: Any) -> float:
    """The break-even rate in percent. Membranes of 8 bits are our fit."""
    constants = EnergySection(weight_bits=weight_bits, membrane_bits=8, **changed)
    rate, below = estimator(layer(sources, timesteps), timesteps, constants).break_even()
    assert below
    return 100 * rate


@pytest.mark.parametrize(
    ("timesteps", "weight_bits", "sources", "published"),
    [(5, 4, 4096, 5.7), (2, 4, 4096, 10.4), (2, 8, 4096, 12.3), (3, 8, 4096, 8.2), (5, 4, 64, 5.4)],
)
def test_break_even_rates_of_the_paper(timesteps, weight_bits, sources, published):
    """With constants that are fitted to them: weight_bit, state_bit, multiply_accumulate."""
    fitted = {key for key, one in EnergySection.model_fields.items() if "fitted" in one.description}
    assert fitted == {"weight_bit", "state_bit", "multiply_accumulate"}
    assert even(timesteps, weight_bits, sources) == pytest.approx(published, abs=0.13)


@pytest.mark.parametrize(
    ("fetches", "spiking", "bitmaps", "relu"),
    [("synapse", 2000, 20000, 4000), ("timestep", 500, 500, 100), ("sample", 100, 100, 100)],
)
def test_a_convolutions_weights_are_kept_for_all_positions_or_timesteps(
    fetches, spiking, bitmaps, relu
):
    """100 weights connect 4,000 synapses, of which 2,000 receive a spike in the five timesteps."""
    conv = layer(4000, weights=100)
    found = estimator(conv, 5, EnergySection(weight_fetches=fetches)).as_dict()
    read = [found[network]["weight_bits_read"] / 8 for network in ("spiking", "bitmaps", "relu")]
    assert read == [spiking, bitmaps, relu]


def test_neurons_that_fire_several_times_and_attention():
    integer = estimator(layer(timesteps=2), 2, most_spikes=4)
    assert integer.activation_bits == 4  # 0 to 8 spikes
    assert integer.spike_rate == pytest.approx(0.1 / 4)
    found = integer.as_dict()
    assert found["bitmaps"]["activation_bits_read"] == 2 * 3 * 4096  # 0 to 4 spikes
    assert found["spiking"]["activation_bits_written"] == 2 * 3
    # 2 s T D / (T D + 1) of 4,096 products, of 4 bits and 8.
    assert found["relu"]["bit_products"] == pytest.approx(2 * 0.025 * 8 / 9 * 4096 * 4 * 8)
    constants = EnergySection(weight_fetches="synapse")
    attention = estimator(layer(weights=0), 5, constants).as_dict()
    assert attention["spiking"]["weight_bits_read"] == attention["relu"]["weight_bits_read"] == 0
    assert attention["relu"]["bit_products"] == pytest.approx(2 * 0.1 * 5 / 6 * 4096 * 3 * 3)


def test_constants_of_a_file(tmp_path):
    file = tmp_path / "constants"
    file.write_text(json.dumps({"weight_bit": 20.3, "hops": 0}))
    constants = read_constants(file)
    assert constants == EnergySection(weight_bit=20.3, hops=0.0)
    assert constants.model_fields_set == {"weight_bit", "hops"}
    assert read_constants(None) == EnergySection()
    for text, problem in {
        "hop: 1": "hop: unknown key; did you mean 'hops'?",
        "compare: -1": "compare must be greater than or equal to 0, not -1",
        "": "must hold keys and values, but is empty",
    }.items():
        file.write_text(text)
        with pytest.raises(UserError, match=problem.replace("?", r"\?")):
            read_constants(file)
