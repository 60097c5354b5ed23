"""A held-out part of the training samples, evaluated in place of the validation split.

Hyperparameters chosen on the validation split bias its result upwards. Chosen on the held-out part,
they leave the validation split unseen.
"""

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from tetdist import order
from tetdist.datasets.index import Index
from tetdist.errors import UserError

_STREAM = order.named_stream("held out")


def divide(
    index: Index, share: float, seed: int, recordings: Sequence[str] | None = None
) -> tuple[Index, Index]:
    """Divide a training split into a part to train on and a held-out part.

    The same fraction of every class is held out, and at least one sample, chosen by ``seed``. All
    samples of one recording are in the same part. If any recording has samples of several classes,
    recordings are divided regardless of classes.

    Args:
        share: Fraction that is held out, above 0 and below 1.
        recordings: (N,) recording that each sample belongs to; None: each sample is a recording.
    """
    units = np.arange(len(index))
    if recordings is not None:
        units = np.unique(np.array(recordings), return_inverse=True)[1]
    stratum_of = _strata(index.labels, units)
    held = np.zeros(len(stratum_of), dtype=bool)
    for stratum in np.unique(stratum_of).tolist():
        (members,) = np.nonzero(stratum_of == stratum)
        if len(members) < 2:
            raise UserError(f"data.held_out: {_lacking(index, stratum)}; set data.held_out=0")
        count = min(max(1, round(share * len(members))), len(members) - 1)
        # Streams of draws are keyed by numbers from 0 on.
        shuffled = order.permutation(len(members), seed, stratum + 1, _STREAM)
        held[members[shuffled[:count]]] = True
    is_held = held[units]
    left = np.isin(np.arange(len(index.classes)), index.labels[~is_held])
    if not left.all():
        raise UserError(
            f"data.held_out: {share:g} leaves no sample of class {index.classes[left.argmin()]!r} "
            "to train on; set a smaller value, or 0"
        )
    return (
        _part(index, np.packbits(~is_held), "to train"),
        _part(index, np.packbits(is_held), "held out"),
    )


def name(share: float, seed: int, of: str | None) -> str:
    """Return the name of a held-out part, which marks results on it."""
    return f"{of or 'train'}-held-out-{share:g}-seed-{seed}"


def _strata(labels: npt.NDArray[np.int32], units: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the class of each recording; -1 for all of them if any has several classes."""
    lowest = np.full(units.max() + 1, np.iinfo(np.int64).max)
    highest = np.full(units.max() + 1, -1)
    np.minimum.at(lowest, units, labels)
    np.maximum.at(highest, units, labels)
    return highest if np.array_equal(lowest, highest) else np.full_like(highest, -1)


def _lacking(index: Index, stratum: int) -> str:
    if stratum < 0:
        return "all training samples are of one recording, which cannot be divided"
    return f"class {index.classes[stratum]!r} has only one recording or sample, but needs two"


def _part(index: Index, bits: npt.NDArray[np.uint8], what: str) -> Index:
    """Return the samples whose bits, (N / 8,), are set, as a new index."""
    keep = np.unpackbits(bits, count=len(index)).astype(bool)
    lengths = np.diff(index.path_offsets)
    digest = hashlib.sha256(f"{index.fingerprint} {what}".encode())
    digest.update(bits.tobytes())
    per_sample = ("labels", "heights", "widths", "file_sizes", "offsets", "archive_ids")
    part = dataclasses.replace(
        index,
        path_blob=index.path_blob[np.repeat(keep, lengths)],
        path_offsets=np.cumsum([0, *lengths[keep]], dtype=np.int64),
        fingerprint=digest.hexdigest(),
        **{field: getattr(index, field)[keep] for field in per_sample},
    )
    return part.made_by(_part, index, bits, what)
