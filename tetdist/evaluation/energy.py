"""Energy of counted operations with their memory, beside that of a ReLU network.

Both networks have the same synapses; `ASSUMPTIONS` has the ReLU network's bits, after arXiv
2409.08290v4, for D = 1. For each layer of synapses, and the neurons after it, the energy is that of

* weights, read as often as ``weight_fetches`` says, and not more often than they are used;
* activations, written once and moved to each synapse that they reach. Spikes move as events, or as
  bitmaps of all inputs in all timesteps;
* membranes, and arithmetic: accumulates, comparisons with thresholds, and multiply-accumulates.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field

from tetdist.config.fields import Section
from tetdist.config.messages import checked
from tetdist.config.yaml_files import read_yaml
from tetdist.evaluation.operations import LayerOperations, Operations

Bits = Annotated[int, Field(ge=1, le=64)]
Amount = Annotated[float, Field(ge=0, le=1e6)]


class EnergySection(Section):
    """Assumptions and constants, with energies in picojoules; --energy changes them."""

    weight_bits: Bits = 8
    """Bits of a weight (assumed: those of export --int8)."""
    membrane_bits: Bits = 16
    """Bits of a membrane (assumed: those of most chips; export --int8 has 32)."""
    real_bits: Bits = 8
    """Bits of a real-valued input, such as a pixel, a mean or a current (assumed)."""
    weight_fetches: Literal["synapse", "timestep", "sample"] = "timestep"
    """Reads of a weight (assumed). synapse: for each of its uses. timestep: once a
    timestep, and kept for all positions. sample: a T-th of that, as if kept for all timesteps."""
    hops: Amount = 1.0
    """Hops that an activation moves for each synapse (assumed; below 1 if synapses share moves)."""
    spike_move: Amount = 3.0
    """Energy of moving a spike, as an event, by one hop (arXiv 2409.08290v4, 22 nm; of Loihi 1)."""
    bit_move: Amount = 0.25
    """Energy of moving a bit of a dense activation by one hop (arXiv 2409.08290v4, 22 nm)."""
    weight_bit: Amount = 0.0375
    """Energy of reading a bit of a weight on chip (fitted to arXiv 2409.08290v4; DRAM: 20.3)."""
    state_bit: Amount = 0.0375
    """Energy of reading or writing a bit of a membrane or activation (fitted as weight_bit)."""
    accumulate: Amount = 0.05448
    """Energy of accumulating a weight (arXiv 2409.08290v4, 22 nm)."""
    compare: Amount = 0.05448
    """Energy of comparing a membrane with its threshold (arXiv 2409.08290v4, 22 nm)."""
    multiply_accumulate: Amount = 0.0125
    """Energy of a product of an activation's and a weight's bit (fitted to arXiv 2409.08290v4)."""
    fp32_accumulate: Amount = 0.9
    """Energy of a 32-bit addition, for arithmetic only (Horowitz, ISSCC 2014, 45 nm)."""
    fp32_multiply_accumulate: Amount = 4.6
    """Energy of a 32-bit multiply-accumulate, for arithmetic only (Horowitz, ISSCC 2014, 45 nm)."""


ASSUMED = ("weight_bits", "membrane_bits", "real_bits", "weight_fetches", "hops")
ASSUMPTIONS = (
    "a spike is an accumulate at each synapse that it reaches; a sum of n spikes (SEW's ADD) is n, "
    "a mean over 2x2 pixels is its spikes, and events of a camera are spikes",
    "real-valued inputs (images, means before a classifier) are a multiply-accumulate at each "
    "synapse in both networks; a static image's first layer is computed once for all timesteps",
    "attention: an accumulate a spike or product of spikes that is added up, d a spike of q; one "
    "factor of each product is moved, no weight is read, and masks are not counted",
    "the ReLU network has ceil(log2(T D + 1)) bits, also where SEW adds; T D is the largest number "
    "of spikes of a neuron that sends up to D in a timestep",
    "of the ReLU network's activations 2 s T D / (T D + 1) are not zero, at spike rate s (arXiv "
    "2409.08290v4); only these are multiplied",
    "a membrane is read and written once a timestep; partial sums are not spilled",
    "batch norm is folded into weights; biases, shortcuts, pooling and control are not counted",
)


class Use(NamedTuple):
    """Memory accesses and arithmetic for an average sample; spikes read are a bit each."""

    weight_bits_read: float = 0.0
    spikes_read: float = 0.0
    activation_bits_read: float = 0.0
    activation_bits_written: float = 0.0
    membrane_bits_read: float = 0.0
    membrane_bits_written: float = 0.0
    accumulates: float = 0.0
    comparisons: float = 0.0
    bit_products: float = 0.0

    def pj(self, c: EnergySection) -> dict[str, float]:
        """Return the energy in picojoules by its cause, and in total."""
        moves = c.spike_move * self.spikes_read + c.bit_move * self.activation_bits_read
        energies = {
            "weights": c.weight_bit * self.weight_bits_read,
            "activations": c.hops * moves + c.state_bit * self.activation_bits_written,
            "membranes": c.state_bit * (self.membrane_bits_read + self.membrane_bits_written),
            "arithmetic": c.accumulate * self.accumulates
            + c.compare * self.comparisons
            + c.multiply_accumulate * self.bit_products,
        }
        return energies | {"total": sum(energies.values())}


@dataclass(frozen=True)
class Estimator:
    """Estimates for operations at T timesteps, in each of which a neuron sends up to D spikes."""

    constants: EnergySection
    timesteps: int
    operations: Operations

    @property
    def most(self) -> int:
        """Largest number of spikes of a neuron in all timesteps, T D."""
        return self.timesteps * self.operations.most_spikes

    @property
    def activation_bits(self) -> int:
        return self.most.bit_length()  # ceil(log2(T D + 1)), of the ReLU network

    def spiking(self, scale: float = 1.0, *, bitmaps: bool = False) -> Use:
        """Return the spiking network's use if it sent ``scale`` times its spikes."""
        c, sent_bits, uses = self.constants, self.operations.most_spikes.bit_length(), []
        for layer in self.operations.layers.values():
            spikes, real = scale * layer.accumulates, layer.multiply_accumulates
            steps = real / layer.synapses if real else self.timesteps
            dense = steps * layer.synapses if real or bitmaps else 0.0
            updates = layer.membrane_updates
            use = Use(
                weight_bits_read=self._weight_bits(layer, dense or spikes, steps),
                spikes_read=0.0 if bitmaps else spikes,
                activation_bits_read=dense * (c.real_bits if real else sent_bits),
                activation_bits_written=sent_bits * updates,
                membrane_bits_read=c.membrane_bits * updates,
                membrane_bits_written=c.membrane_bits * updates,
                accumulates=spikes,
                comparisons=updates,
                bit_products=real * self._bit_products(layer, c.real_bits),
            )
            uses.append(use)
        return Use(*map(sum, zip(*uses, strict=True)))

    def relu(self, scale: float = 1.0) -> Use:
        """Return the ReLU network's use if the spiking network sent ``scale`` times its spikes."""
        uses = []
        for layer in self.operations.layers.values():
            products, bits = layer.synapses, self.constants.real_bits
            if not layer.multiply_accumulates:
                bits = self.activation_bits
                products = min(products, 2 * scale * layer.accumulates / (self.most + 1))
            outputs = layer.membrane_updates / self.timesteps
            use = Use(
                weight_bits_read=self._weight_bits(layer, layer.synapses, 1),
                activation_bits_read=bits * layer.synapses,
                activation_bits_written=self.activation_bits * outputs,
                bit_products=products * self._bit_products(layer, bits),
            )
            uses.append(use)
        return Use(*map(sum, zip(*uses, strict=True)))

    def _bit_products(self, layer: LayerOperations, bits: int) -> int:
        """Return the products of bits in a product with an activation of so many."""
        return bits * (self.constants.weight_bits if layer.weights else bits)

    def _weight_bits(self, layer: LayerOperations, uses: float, steps: float) -> float:
        """Return the bits of weights that are read for so many uses in so many timesteps."""
        fetches, kept_for = uses if layer.weights else 0.0, self.constants.weight_fetches
        if kept_for != "synapse":
            fetches = min(uses, steps * layer.weights)
        return self.constants.weight_bits * fetches / (steps if kept_for == "sample" else 1)

    @property
    def spike_rate(self) -> float | None:
        """Spikes that a synapse receives in a timestep, of up to D; None without any."""
        layers = [one for one in self.operations.layers.values() if not one.multiply_accumulates]
        spikes = sum(layer.accumulates for layer in layers)
        return spikes / self.most / sum(layer.synapses for layer in layers) if spikes else None

    def break_even(self) -> tuple[float | None, bool | None]:
        """Return the rate of equal energy, all layers' rates scaled alike, and whether spikes take
        less energy below it, not above it; (0, True): never, (1, True): at all rates; (None, None):
        there are no spikes."""
        rate = self.spike_rate
        if rate is None:
            return None, None

        def wins(at: float) -> bool:
            spiking, relu = (of(at / rate).pj(self.constants) for of in (self.spiking, self.relu))
            return spiking["total"] < relu["total"]

        low, high, first = 0.0, 1.0, wins(0.0)
        if wins(1.0) == first:
            return float(first), True
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if wins(middle) == first else (low, middle)
        return low, first

    def uses(self) -> dict[str, Use]:
        """Return the use of either network; ``bitmaps`` is the spiking one if it sends these."""
        spiking, bitmaps = self.spiking(), self.spiking(bitmaps=True)
        return {"spiking": spiking, "bitmaps": bitmaps, "relu": self.relu()}

    def arithmetic_only(self) -> dict[str, float]:
        """Return the energy of 32-bit arithmetic in picojoules, by network."""
        c, operations = self.constants, self.operations
        multiplied = c.fp32_multiply_accumulate * operations.multiply_accumulates
        return {
            "spiking": c.fp32_accumulate * operations.accumulates + multiplied,
            "relu": c.fp32_multiply_accumulate * operations.relu_multiply_accumulates,
        }

    def as_dict(self) -> dict[str, Any]:
        """Return the use and energy of both networks, ready for JSON."""
        rate, below = self.break_even()
        uses = self.uses().items()
        return {
            "spike_rate": self.spike_rate,
            "break_even_rate": rate,
            "wins_below": below,
            **{name: use._asdict() | {"pj": use.pj(self.constants)} for name, use in uses},
            "arithmetic_only_pj": self.arithmetic_only(),
        }

    def as_json(self) -> dict[str, Any]:
        """Return `as_dict` of all layers together and of each, with the assumptions."""
        layers, most = self.operations.layers, self.operations.most_spikes
        alone = {name: Operations({name: layer}, most) for name, layer in layers.items()}
        return {
            **self.as_dict(),
            "activation_bits": self.activation_bits,
            "constants": self.constants.model_dump(),
            "changed": sorted(self.constants.model_fields_set),
            "assumptions": list(ASSUMPTIONS),
            "layers": {name: replace(self, operations=a).as_dict() for name, a in alone.items()},
        }


def read_constants(file: Path | None) -> EnergySection:
    """Return the constants and assumptions of the estimate, some of them changed by a file."""
    return checked(EnergySection, read_yaml(file) if file else {}, f"--energy {file}")
