"""The parameters of a neuron that its kernels need."""

from dataclasses import dataclass

from tetdist.nn.integer_neurons import ILIF
from tetdist.nn.learned_decay import PLIF
from tetdist.nn.neurons import LIF, NeuronConfig
from tetdist.nn.parallel_neurons import ParallelNeuron, SlidingPSN


@dataclass(frozen=True)
class Dynamics:
    """A neuron's parameters as the kernels take them.

    Attributes:
        decay: Decay; the initial one if it is learnt.
        most: Maximum number of spikes in a timestep; None: at most one.
        levels: Divisor of the number of spikes that is sent.
        learns_decay: True if the decay is learnt, as the fraction 1 - decay.
        scales_input: True if the current is multiplied by 1 - decay.
        parallel: True if the neuron has no membrane and fires at learnt sums over time.
        past: Number of currents before a segment that its sums over time include.
    """

    threshold: float
    decay: float = 0.0
    resets_to_zero: bool = False
    detach_reset: bool = False
    surrogate: str = "triangle"
    width: float = 1.0
    fires_at_threshold: bool = False
    most: int | None = None
    levels: int = 1
    learns_decay: bool = False
    scales_input: bool = False
    parallel: bool = False
    past: int = 0

    @property
    def carried(self) -> int:
        """Number of tensors, (N, C), that a segment starts from: the membranes, or currents."""
        return self.past if self.parallel else 1


def dynamics_of(config: NeuronConfig) -> Dynamics:
    """Return the dynamics of a neuron that has kernels."""
    match config:
        case LIF():
            return Dynamics(
                decay=config.decay,
                threshold=config.threshold,
                resets_to_zero=config.resets_to_zero,
                detach_reset=config.detach_reset,
                surrogate=config.surrogate,
                width=config.surrogate_width,
                fires_at_threshold=config.fires_at_threshold,
                learns_decay=isinstance(config, PLIF),
                scales_input=isinstance(config, PLIF) and config.decay_input,
            )
        case ILIF():
            assert config.levels is not None
            # Counting neurons have no step function, so no surrogate and no exact threshold.
            return Dynamics(
                decay=config.decay,
                threshold=config.threshold,
                detach_reset=config.detach_reset,
                most=config.most_spikes,
                levels=config.levels,
            )
        case ParallelNeuron():
            return Dynamics(
                threshold=0.0,  # the sums' biases contain it
                surrogate=config.surrogate,
                width=config.surrogate_width,
                fires_at_threshold=True,
                parallel=True,
                past=config.order - 1 if isinstance(config, SlidingPSN) else 0,
            )
    raise AssertionError(f"{type(config).__name__} has no kernels")
