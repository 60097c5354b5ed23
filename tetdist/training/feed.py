"""Training batches of this process, from any step on: mixed, and on the device."""

import contextlib
import time
from collections.abc import Callable, Iterator

from tetdist.data import mixing
from tetdist.data.build import train_loader
from tetdist.data.loader import Batch, Batches
from tetdist.data.transfer import on_device
from tetdist.nn.precision import parameter_type
from tetdist.training.prepared import Prepared
from tetdist.training.step import MicroBatch


class Feed:
    """This process's micro-batches, step after step.

    Attributes:
        waited: Seconds spent waiting for data so far.

    Args:
        on_batch: Called with the step (from 1) and each batch before mixing.
    """

    def __init__(self, run: Prepared, on_batch: Callable[[int, Batch], None]) -> None:
        self.run, self.on_batch = run, on_batch
        self.waited = 0.0
        self._loader: Batches | None = None

    def open(self, step: int) -> None:
        """Continue with the batches that follow ``step`` completed steps."""
        self.close()
        self._loader = self._open_loader(step)

    def of_step(self, step: int) -> Iterator[MicroBatch]:
        """Yield the step's images and targets."""
        assert self._loader is not None, "open() comes first"
        for _ in self.run.micro_batches:
            started = time.monotonic()
            batch = next(self._loader)
            self.waited += time.monotonic() - started
            self.on_batch(step + 1, batch)
            yield self.prepared(batch)

    @contextlib.contextmanager
    def again(self, step: int) -> Iterator[Iterator[MicroBatch]]:
        """Yield the batches of an earlier step again, from a separate loader."""
        with self._open_loader(step) as loader:
            yield (self.prepared(next(loader)) for _ in self.run.micro_batches)

    def _open_loader(self, step: int) -> Batches:
        return train_loader(self.run.config, self.run.train, self.run.world, step)

    def prepared(self, batch: Batch) -> MicroBatch:
        """Bring a batch to the device and mix it."""
        device = self.run.world.device
        images = batch.inputs(device, parameter_type(self.run.config.precision))
        labels = on_device(batch.labels, device)
        if batch.mix is None:
            return images, labels
        return mixing.mixed(images, labels, batch.mix, self.run.model.num_classes)

    def close(self) -> None:
        """Close the loader, with its threads and processes."""
        if self._loader is not None:
            self._loader.close()
            self._loader = None
