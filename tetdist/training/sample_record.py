"""A debugging aid: a record of each process's samples at each step, with checksums."""

import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tetdist.config.schema import RunConfig
from tetdist.data.loader import Batch
from tetdist.distributed.world import World
from tetdist.storage.files import write_text

# Records a micro-batch of an optimiser step (counted from 1).
SampleRecord = Callable[[int, Batch], None]


@contextmanager
def sample_record(config: RunConfig, world: World, step: int) -> Iterator[SampleRecord]:
    """Record the samples that this process trains on from ``step`` on, if configured."""
    if not config.record_samples:
        yield lambda _step, _batch: None
        return
    world.run_on_all(lambda: _forget_later_than(step, config) if world.rank == 0 else None)
    path = config.run_dir / f"samples-{world.rank}.jsonl"
    with path.open("a", buffering=1) as stream:

        def record(step: int, batch: Batch) -> None:
            sums = [zlib.crc32(image.contiguous().numpy()) for image in batch.images.cpu()]
            line = {"step": step, "ids": batch.ids.tolist(), "crc32": sums}
            stream.write(json.dumps(line) + "\n")

        yield record


def _forget_later_than(step: int, config: RunConfig) -> None:
    """Remove records of steps that will be computed again, and a line cut off by a kill.

    Rank 0 does this for all, since there may have been more processes before.
    """
    for path in config.run_dir.glob("samples-*.jsonl"):
        whole = path.read_text().rpartition("\n")[0].splitlines(keepends=True)
        kept = (x.rstrip() + "\n" for x in whole if json.loads(x)["step"] <= step)
        write_text(path, "".join(kept))
