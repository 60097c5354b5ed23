"""Sample order and random numbers as pure functions of (seed, epoch, position).

The order of an epoch is a function of (seed, epoch); every random number of a sample's augmentation
is one of (seed, epoch, position in the epoch). Nothing here has state, so a run resumes at any step
from one integer, and the number of processes only changes the division of work. The generator is
implemented here in exact integer arithmetic, so that no library release can change an old run.
"""

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from tetdist.errors import UserError

# Separate streams of the permutation, of augmentation, of mixing, and of the network (by torch's
# generator, and by its dropout factors). Use a `named_stream` for new ones.
_PERMUTATION, AUGMENTATION, MIXING, _FORWARD, _DROPPING = 1, 2, 3, 4, 5


def uniforms(
    seed: int,
    epoch: int,
    positions: npt.NDArray[np.int64],
    num_draws: int,
    stream: int = AUGMENTATION,
) -> npt.NDArray[np.float64]:
    """Random numbers for the samples at some positions of an epoch, uniform in [0, 1).

    Column j does not depend on `num_draws`, so new draws can be added at the end without changing
    the others.

    Args:
        positions: (B,) positions in the epoch's order.
        num_draws: Numbers for each sample.
        stream: AUGMENTATION, MIXING, or a `named_stream`.

    Returns:
        (B, num_draws), multiples of 2**-53.
    """
    keys = position_keys(seed, epoch, positions, stream)
    words = hashed(keys[:, None], np.arange(num_draws, dtype=np.uint64))
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def position_keys(
    seed: int, epoch: int, positions: npt.NDArray[np.int64], stream: int
) -> npt.NDArray[np.uint64]:
    """Return keys (B,) for `hashed` of the samples at some positions of an epoch."""
    return hashed(_key(stream, seed, epoch), positions.astype(np.uint64))


def named_stream(name: str) -> int:
    """Return the number of an augmentation's stream, which is independent of all others."""
    digest = hashlib.sha256(name.encode()).digest()
    # In the upper half of all numbers; the other streams are in the lower half.
    return int.from_bytes(digest[:8], "little") | 2**63


def transform_stream(name: str) -> int:
    """Return the number of a user transform's stream."""
    return named_stream(f"transform {name}")


def permutation(
    num_samples: int, seed: int, epoch: int, stream: int = _PERMUTATION
) -> npt.NDArray[np.int64]:
    """Return the epoch's order: (num_samples,) sample numbers, each once."""
    keys = hashed(_key(stream, seed, epoch), np.arange(num_samples, dtype=np.uint64))
    return np.argsort(keys, kind="stable")


def forward_seed(seed: int, step: int, micro_batch: int) -> int:
    """Return the seed, below 2**64, of a network's draws for one micro-batch, such as dropout.

    Args:
        step: Optimiser steps before this one.
        micro_batch: Number among the micro-batches of all processes; see `rank_micro_batches`.
    """
    return int(hashed(_key(_FORWARD, seed, step), np.array([micro_batch], np.uint64))[0])


def drop_uniforms(
    seed: int, step: int, micro_batch: int, batch_size: int, num_draws: int
) -> npt.NDArray[np.float64]:
    """Return random numbers in [0, 1), (batch_size, num_draws), for dropout (nn/dropout.py).

    They depend on the samples' positions in the step's global batch, however that is divided.

    Args:
        step, micro_batch: See `forward_seed`.
        batch_size: Number of samples per micro-batch.
        num_draws: Numbers for each sample.
    """
    positions = micro_batch_positions(0, micro_batch, 0, batch_size)
    return uniforms(seed, step, positions, num_draws, _DROPPING)


def drawn_timesteps(choices: Sequence[int], seed: int, step: int) -> int:
    """Return the T of the step after ``step`` others: one of ``choices``, all equally likely."""
    if len(choices) == 1:
        return choices[0]
    draw = uniforms(seed, step, np.zeros(1, np.int64), 1, named_stream("timesteps"))
    return choices[int(draw[0, 0] * len(choices))]


def _key(stream: int, seed: int, epoch: int) -> npt.NDArray[np.uint64]:
    key = np.array([stream], np.uint64)
    for word in (seed, epoch):
        key = hashed(key, np.array([word], np.uint64))
    return key


def hashed(key: npt.NDArray[np.uint64], word: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Hash of a key and one more word: the step and the finaliser of the splitmix64 generator.

    For one key it is a bijection of the words, so different positions never share a hash.
    """
    z = (key ^ word) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def steps_per_epoch(num_samples: int, global_batch: int) -> int:
    """Return the optimiser steps of an epoch; left-over samples, which vary by epoch, are dropped.

    Raises:
        UserError: There are fewer samples than in one step.
    """
    if num_samples < global_batch:
        fits = 1 << num_samples.bit_length() >> 1
        raise UserError(
            f"the training split has {num_samples} samples, fewer than batch.global, "
            f"{global_batch}; set batch.global={fits} batch.micro={min(fits, 32)}, for instance"
        )
    return num_samples // global_batch


def rank_micro_batches(rank: int, world_size: int, global_batch: int, micro_batch: int) -> range:
    """Return the numbers of a rank's micro-batches in each step: every world_size-th one.

    So micro-batches that ranks compute at the same time are neighbours. With synchronised batch
    norm, two processes normalise over the same samples as one with micro-batches twice as large.

    Raises:
        UserError: The global batch is not a multiple of the micro-batch, or its micro-batches
            cannot be divided equally.
    """
    assert 0 <= rank < world_size
    if global_batch % micro_batch:
        raise UserError(
            f"batch.global: {global_batch} is not a multiple of the micro-batch, {micro_batch}; "
            "change one of them"
        )
    count = global_batch // micro_batch
    if count % world_size:
        raise UserError(
            f"{count} micro-batches a step (global batch {global_batch}, micro-batch {micro_batch})"
            f" cannot be divided equally among {world_size} processes; use"
            f" {process_counts(count)} of them, or other batch sizes"
        )
    return range(rank, count, world_size)


def process_counts(micro_batches: int) -> str:
    """Return the numbers of processes that can share the micro-batches of a step, for messages."""
    numbers = range(1, micro_batches + 1)
    return ", ".join(str(n) for n in numbers if micro_batches % n == 0)


def micro_batch_positions(
    step_in_epoch: int, index_in_step: int, global_batch: int, micro_batch: int
) -> npt.NDArray[np.int64]:
    """Return the positions (micro_batch,) in the epoch's order of a micro-batch of a step."""
    start = step_in_epoch * global_batch + index_in_step * micro_batch
    return np.arange(start, start + micro_batch, dtype=np.int64)


def repeated(
    positions: npt.NDArray[np.int64], repeats: int, global_batch: int, micro_batch: int
) -> npt.NDArray[np.int64]:
    """Return places in the permutation for some positions, with each sample repeated.

    Copies of a sample are dealt out in turn among the micro-batches of a step, whatever the number
    of processes; timm's RepeatAugSampler deals them out among processes. An epoch has the same
    number of steps, so it shows only the first 1/``repeats`` of the permutation.
    """
    if repeats == 1:
        return positions
    step, place = np.divmod(positions, global_batch)
    number, place = np.divmod(place, micro_batch)
    micro_batches = global_batch // micro_batch
    return (step * global_batch + place * micro_batches + number) // repeats


def evaluation_batches(
    num_samples: int, batch_size: int, rank: int, world_size: int
) -> Iterator[npt.NDArray[np.int64]]:
    """Yield a rank's batches of an evaluation: each sample once, and as many batches per rank.

    Batches in the index's order are dealt out in turn. In the last round a rank's batch may be
    smaller, or empty.
    """
    assert 0 <= rank < world_size
    for start in range(0, num_samples, batch_size * world_size):
        first = start + rank * batch_size
        yield np.arange(first, min(first + batch_size, num_samples), dtype=np.int64)
