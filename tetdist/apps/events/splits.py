"""Named splits of event recordings, as used in the literature.

Published results on one data set use different splits (three for CIFAR10-DVS), so a split has a
name, which is stored with every result. A recording is never divided: all its pieces are in the
same part.
"""

from collections import defaultdict
from collections.abc import Sequence

from tetdist.apps.events.folders import Part, Source
from tetdist.errors import UserError
from tetdist.order import permutation
from tetdist.wording import counted

# Percent of each class in the training part: the first ones, in the order of numbers.
_FIRST = {"first-90-percent": 90, "first-80-percent": 80, "first-70-percent": 70}
# The first 90 percent, but in alphabetical order (2 after 10), and rounded up: the result of
# torchvision's sorted file names and spikingjelly's `split_to_train_test_set`.
_BY_LETTERS = "first-90-percent-by-letters"
# Numbers 0 to 99 of each class are the test part, the others the training part.
_HUNDRED = "0-99-test"
_MIXED = "all classes"
_STRATIFIED = "stratified-9-1"
PUBLISHED = "published"
# New recordings, for evaluating a network that was trained on others.
ALL_TO_VAL = "all-to-val"
NAMES = (PUBLISHED, *_FIRST, _BY_LETTERS, _HUNDRED, _STRATIFIED, ALL_TO_VAL)


def default_split(sources: Sequence[Source]) -> str:
    """Return the published split if there is one, else the stratified one; for a lone test part,
    all-to-val."""
    parts = {source.part for source in sources if source.part}
    if parts == {"val"} and not any(source.part is None for source in sources):
        return ALL_TO_VAL
    return PUBLISHED if "val" in parts else _STRATIFIED


def split_name(name: str, seed: int, simulated: bool) -> str:
    """Return the recorded name of a split, which includes everything that it depends on."""
    seeded = f"{name}-seed-{seed}" if name == _STRATIFIED else name
    return f"simulated-{seeded}" if simulated else seeded


def assign(sources: Sequence[Source], name: str, seed: int) -> dict[str, Part]:
    """Assign each source, by its path, to train or val.

    Args:
        sources: Recordings in order, including bad ones, so that leaving one out does not move the
            others to another part.
    """
    if name == ALL_TO_VAL:
        return {source.path: "val" for source in sources if source.pieces}
    classes = {piece.class_name for source in sources for piece in source.pieces}
    if len(classes) < 2:
        raise UserError(
            f"there is only one class, {classes.pop()!r}, but training needs two; to evaluate, give"
            f" --split {ALL_TO_VAL}"
        )
    if name == PUBLISHED:
        without = [source for source in sources if source.part is None and not source.problem]
        if without:
            raise UserError(
                f"the split {PUBLISHED!r} needs folders Train/ and Test/ or lists of trials, but"
                f" the part of {without[0].path} is unknown; choose another with --split"
            )
        published = {source.path: source.part for source in sources if source.part}
        for part, purpose in (("train", "train"), ("val", "test")):
            if part not in published.values():
                raise UserError(
                    f"the split {PUBLISHED!r} has no recording to {purpose}; choose another with "
                    "--split, such as all-to-val to evaluate all of it"
                )
        return published
    parts: dict[str, Part] = {}
    for number, (stratum, members) in enumerate(_strata(sources).items()):
        train = _training_members(members, name, seed, number)
        if not 0 < len(train) < len(members):
            together = ", whose labelled intervals stay together" * (stratum == _MIXED)
            way = "choose another with --split" if members[1:] else "record more, at least two each"
            raise UserError(
                f"the split {name!r} leaves nothing to {'test' if train else 'train'} of"
                f" {stratum!r}, which has {counted(len(members), 'recording')}{together}; {way}, or"
                f" --split {ALL_TO_VAL} to evaluate all"
            )
        for source in members:
            parts[source.path] = "train" if source.path in train else "val"
    return parts


def _strata(sources: Sequence[Source]) -> dict[str, list[Source]]:
    """Group sources by class; those with pieces of several classes form one further group."""
    strata: defaultdict[str, list[Source]] = defaultdict(list)
    for source in sources:
        classes = {piece.class_name for piece in source.pieces}
        if classes:
            strata[classes.pop() if len(classes) == 1 else _MIXED].append(source)
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
