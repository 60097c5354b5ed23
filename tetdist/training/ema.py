"""An exponential moving average of the weights (EMA), kept beside them and evaluated like them.

After each optimiser step that was applied, average <- decay * average + (1 - decay) * weights, with
the numbers of timm's ModelEmaV3: the first step is taken over whole, and a warm-up lets the decay
rise. Running statistics are averaged like weights, with the same decay, since those of a step
belong to its weights.

The average is a function of the steps, so it has the same numbers on every process, whatever the
engine and its ZeRO stage, and goes on from one phase to the next.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tetdist.config.sections.training import EmaSection


def decay_at(section: EmaSection, step: int) -> float:
    """The share of the average that the run's ``step``-th step keeps, counted from 1."""
    assert section.decay is not None
    if step == 1:
        return 0.0
    return min(section.decay, 1 - step ** (-2 / 3)) if section.warmup else section.decay


class WeightAverage:
    """The moving average of a model's parameters and of the buffers that checkpoints hold.

    Its numbers have the types of the model's, which are float32 at least in every precision.

    Args:
        model: As it is now: the average begins with it.
        section: With a decay.
    """

    def __init__(self, model: nn.Module, section: EmaSection) -> None:
        self._model, self._section = model, section
        self._averages = {key: value.clone() for key, value in model.state_dict().items()}
        self._pairs: list[tuple[Tensor, Tensor]] = []

    @classmethod
    def of(cls, model: nn.Module, section: EmaSection) -> "WeightAverage | None":
        """Begin the average that is configured, if one is."""
        return None if section.decay is None else cls(model, section)

    def as_text(self) -> str:
        """Return the description of the averages for checkpoints."""
        warmup = ", with warm-up" if self._section.warmup else ""
        return f"moving average, decay {self._section.decay:g}{warmup}"

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by the names that the model's own ``state_dict`` has."""
        return self._averages

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from the averages of a checkpoint."""
        for key, average in self._averages.items():
            average.copy_(state[key])

    def follow(self) -> None:
        """Find the model's tensors: call it when an engine has laid them out, before the updates.

        The averages take their layout, in which a GPU goes through all of them in a few kernels.
        """
        pairs: dict[int, tuple[Tensor, Tensor]] = {}
        for key, value in self._model.state_dict(keep_vars=True).items():
            average = torch.empty_like(value, requires_grad=False).copy_(self._averages[key])
            # A tensor that has two names is one of the model, and is averaged once.
            _, self._averages[key] = pairs.setdefault(id(value), (value, average))
        self._pairs = list(pairs.values())

    @torch.no_grad()
    def update(self, step: int, applied: Tensor) -> None:
        """Take a step into the average.

        Args:
            step: The run's steps so far, this one counted.
            applied: () bool, on the model's device; where it is False the step changed no weight,
                and the average stays what it was. Not read on the host.
        """
        numbers = [pair for pair in self._pairs if pair[0].is_floating_point()]
        values, averages = [value for value, _ in numbers], [average for _, average in numbers]
        changes = torch._foreach_sub(values, averages)
        weight = applied.to(values[0].dtype) * (1 - decay_at(self._section, step))
        torch._foreach_mul_(changes, weight)
        torch._foreach_add_(averages, changes)
        for value, average in self._pairs:
            if not value.is_floating_point():  # a count has no mean
                average.copy_(value)

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """Have the model compute with the averages, within this context, and train with nothing.

        Tensors change places, so that nothing is copied, and what was the model's comes back as it
        was, in the memory in which engines and CUDA graphs know it.
        """
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        for value, average in self._pairs:
            value.data, average.data = average.data, value.data
