"""An exponential moving average of the weights (EMA), kept beside them and evaluated like them.

After each optimiser step that was applied, average <- decay * average + (1 - decay) * weights, as
in timm's ModelEmaV3: the first step is copied, and a warm-up raises the decay gradually. Running
statistics are averaged like weights, with the same decay, since a step's statistics belong to its
weights.

The average depends only on the steps, so it is the same on every process, for any engine and ZeRO
stage, and continues from one phase to the next.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tetdist.config.sections.training import EmaSection


def decay_at(section: EmaSection, step: int) -> float:
    """Return the fraction of the average that the run's ``step``-th step keeps, counted from 1."""
    assert section.decay is not None
    if step == 1:
        return 0.0
    return min(section.decay, 1 - step ** (-2 / 3)) if section.warmup else section.decay


class WeightAverage:
    """The moving average of a model's parameters and of the buffers that checkpoints hold.

    Its values have the model's types, which are at least float32 in every precision.

    Args:
        model: The model; the average starts from its present weights.
    """

    def __init__(self, model: nn.Module, section: EmaSection) -> None:
        self._model, self._section = model, section
        self._averages = {key: value.clone() for key, value in model.state_dict().items()}
        self._pairs: list[tuple[Tensor, Tensor]] = []

    @classmethod
    def of(cls, model: nn.Module, section: EmaSection) -> "WeightAverage | None":
        """Start the average that the configuration asks for, if any."""
        return None if section.decay is None else cls(model, section)

    def as_text(self) -> str:
        """Return the description of the averages for checkpoints."""
        warmup = ", with warm-up" if self._section.warmup else ""
        return f"moving average, decay {self._section.decay:g}{warmup}"

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averages under the names of the model's own ``state_dict``."""
        return self._averages

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Load the averages of a checkpoint."""
        for key, average in self._averages.items():
            average.copy_(state[key])

    def follow(self) -> None:
        """Look up the model's tensors; call it after an engine has laid them out, before updates.

        The averages take over their layout, so that a GPU updates all of them in a few kernels.
        """
        pairs: dict[int, tuple[Tensor, Tensor]] = {}
        for key, value in self._model.state_dict(keep_vars=True).items():
            average = torch.empty_like(value, requires_grad=False).copy_(self._averages[key])
            # A tensor with two names is averaged once.
            _, self._averages[key] = pairs.setdefault(id(value), (value, average))
        self._pairs = list(pairs.values())

    @torch.no_grad()
    def update(self, step: int, applied: Tensor) -> None:
        """Add a step to the average.

        Args:
            step: Number of the run's steps so far, including this one.
            applied: () bool, on the model's device; if False, the step changed no weight and the
                average stays as it is. Not read on the host.
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
        """Make the model compute with the averages within this context; do not train in it.

        Tensors are swapped rather than copied, so the model's tensors return unchanged, in the
        memory that engines and CUDA graphs refer to.
        """
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        for value, average in self._pairs:
            value.data, average.data = average.data, value.data
