"""Detection of layers that no longer fire, or always do."""

from collections.abc import Mapping

# Firing rates in spikes per neuron per timestep. A layer below the first or above the second passes
# on no information.
DEAD, SATURATED = 0.001, 0.9


class FiringWatch:
    """Reports layers that became dead or saturated, or recovered, once per change."""

    def __init__(self) -> None:
        self._states: dict[str, str] = {}

    def changes(self, firing_rate: Mapping[str, float]) -> list[str]:
        """Return sentences on the layers whose state has changed since the last call.

        Args:
            firing_rate: Spikes per neuron per timestep, by layer.
        """
        states = {layer: _firing_state(rate) for layer, rate in firing_rate.items()}
        changed: dict[str, list[str]] = {}
        for layer, state in states.items():
            if state != self._states.get(layer, ALIVE):
                changed.setdefault(state, []).append(f"{layer} ({100 * firing_rate[layer]:.3g} %)")
        self._states = states
        return [f"{state}: {', '.join(layers)}" for state, layers in changed.items()]


ALIVE = "layers that fire again"


def _firing_state(rate: float) -> str:
    if rate < DEAD:
        return f"dead layers, firing below {100 * DEAD:g} %"
    return f"saturated layers, firing above {100 * SATURATED:g} %" if rate > SATURATED else ALIVE
