"""Splits of event recordings by name, as the literature uses them.

Published figures of one data set were measured on different splits (for CIFAR10-DVS three), so a
split has a name, and the name goes wherever a result does. A recording is never divided: all pieces
of one are on the same side.
"""

from collections import defaultdict
from collections.abc import Sequence

from tetdist.apps.events.folders import Part, Source
from tetdist.errors import UserError
from tetdist.order import permutation

# Percent of each class that are to train: the first ones, in the order of numbers.
_FIRST = {
    "first-90-percent": 90,
    "first-80-percent": 80,
    "first-70-percent": 70,
}
# As the first 90 percent, but by the letters of names (2 after 10), and rounded up: what
# torchvision's sorted file names and spikingjelly's `split_to_train_test_set` make.
_BY_LETTERS = "first-90-percent-by-letters"
# Numbers 0 to 99 of each class are to test, the others to train.
_HUNDRED = "0-99-test"
_STRATIFIED = "stratified-9-1"
PUBLISHED = "published"
# New recordings, to be evaluated with a network that was trained on others.
ALL_TO_VAL = "all-to-val"
NAMES = (PUBLISHED, *_FIRST, _BY_LETTERS, _HUNDRED, _STRATIFIED, ALL_TO_VAL)


def default_split(sources: Sequence[Source]) -> str:
    """The published split where there is one, otherwise the stratified one; of a lone test part
    there is nothing to train on."""
    parts = {source.part for source in sources if source.part}
    if parts == {"val"} and not any(source.part is None for source in sources):
        return ALL_TO_VAL
    return PUBLISHED if "val" in parts else _STRATIFIED


def split_name(name: str, seed: int, simulated: bool) -> str:
    """The name under which a split is recorded, which says all that it depends on."""
    seeded = f"{name}-seed-{seed}" if name == _STRATIFIED else name
    return f"simulated-{seeded}" if simulated else seeded


def assign(sources: Sequence[Source], name: str, seed: int) -> dict[str, Part]:
    """Assign each source, by its path, to train or val.

    Args:
        sources: Recordings in order; those that turn out to be bad are among them, so that leaving
            one out does not move the others to another part.
        name: One of `NAMES`.
        seed: Seed of the stratified split.

    Raises:
        UserError: The sources do not have this split, or are of fewer than two classes, of which
            nothing can be learnt.
    """
    if name == ALL_TO_VAL:
        return {source.path: "val" for source in sources if source.pieces}
    classes = {piece.class_name for source in sources for piece in source.pieces}
    if len(classes) < 2:
        raise UserError(
            f"there is only one class, {classes.pop()!r}, and two are the least to train on; to"
            f" evaluate, give --split {ALL_TO_VAL}"
        )
    if name == PUBLISHED:
        without = [source for source in sources if source.part is None and not source.problem]
        if without:
            raise UserError(
                f"the split {PUBLISHED!r} needs folders Train/ and Test/ or lists of trials, and"
                f" nothing says the part of {without[0].path}: choose another with --split"
            )
        published = {source.path: source.part for source in sources if source.part}
        for part, purpose in (("train", "train"), ("val", "test")):
            if part not in published.values():
                raise UserError(
                    f"the split {PUBLISHED!r} has nothing to {purpose}, no recording is of that "
                    "part: choose another with --split, such as all-to-val to evaluate all of it"
                )
        return published
    parts: dict[str, Part] = {}
    for number, (stratum, members) in enumerate(_strata(sources).items()):
        train = _training_members(members, name, seed, number)
        if not 0 < len(train) < len(members):
            raise UserError(
                f"the split {name!r} leaves nothing to {'test' if train else 'train'} of"
                f" {stratum!r}, which has {len(members)} recordings: choose another with --split"
            )
        for source in members:
            parts[source.path] = "train" if source.path in train else "val"
    return parts


def _strata(sources: Sequence[Source]) -> dict[str, list[Source]]:
    """Sources by class; those whose pieces are of several classes are one group of their own."""
    strata: defaultdict[str, list[Source]] = defaultdict(list)
    for source in sources:
        classes = {piece.class_name for piece in source.pieces}
        if classes:
            strata[classes.pop() if len(classes) == 1 else "all classes"].append(source)
    return dict(sorted(strata.items()))


def _training_members(members: list[Source], name: str, seed: int, stratum: int) -> set[str]:
    number = len(members)
    if name in _FIRST:
        chosen = members[: number * _FIRST[name] // 100]
    elif name == _BY_LETTERS:
        chosen = sorted(members, key=lambda source: source.path)[: -(-number * 9 // 10)]
    elif name == _HUNDRED:
        chosen = members[100:]
    else:
        assert name == _STRATIFIED
        order = permutation(number, seed, stratum)
        chosen = [members[i] for i in order[: number * 9 // 10]]
    return {source.path for source in chosen}
