"""Records the samples of each step of a run that imports this file.

Each process appends a line per micro-batch to samples-RANK.jsonl in the run's folder: the step, and
the ids and checksums of its samples. A resumed run repeats the lines of repeated steps.
"""

import functools
import json
import zlib
from pathlib import Path

from tetdist.data.loader import Batch
from tetdist.training.trainer import Trainer

FILE = Path(__file__).name
# A process may import this file again, and train runs that do not.
_on_batch = getattr(Trainer._on_batch, "__wrapped__", Trainer._on_batch)


@functools.wraps(_on_batch)
def _recorded(self: Trainer, step: int, batch: Batch) -> None:
    if FILE in (Path(one).name for one in self.config.imports):
        sums = [zlib.crc32(image.contiguous().numpy()) for image in batch.images.cpu()]
        line = {"step": step, "ids": batch.ids.tolist(), "crc32": sums}
        with (self.config.run_dir / f"samples-{self.world.rank}.jsonl").open("a") as stream:
            stream.write(json.dumps(line) + "\n")
    _on_batch(self, step, batch)


Trainer._on_batch = _recorded  # type: ignore[method-assign]  # also records
