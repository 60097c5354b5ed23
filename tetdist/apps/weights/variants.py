"""Published variants of ImageNet's validation set, each evaluated as its authors do.

| variant | folders | compared |
|---|---|---|
| imagenet-v2 (Recht et al., 2019) | NUMBER of the class | all logits |
| imagenet-a, -r (Hendrycks et al., 2021) | WordNet id, of 200 classes | the logits of these alone |
| imagenet-c (Hendrycks and Dietterich, 2019) | corruption / severity / WordNet id | all logits |
| real (Beyer et al., 2020) | the validation set, and real.json | all logits with several labels |
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tetdist.data.transfer import on_device
from tetdist.datasets import index as data_index
from tetdist.datasets.index import Index
from tetdist.distributed.world import World
from tetdist.errors import UserError
from tetdist.evaluation.evaluate import Evaluation, running_means
from tetdist.storage.files import parse_json
from tetdist.wording import counted

REAL_FILE = "real.json"
SEVERITIES = range(1, 6)
# AlexNet's top-1 error, averaged over severities, which normalises the mean corruption error
# (github.com/hendrycks/robustness). The data set's four further corruptions do not count.
ALEXNET = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}
_FURTHER = ("speckle_noise", "gaussian_blur", "spatter", "saturate")
_VALIDATION_NUMBER = re.compile(r".*ILSVRC2012_val_(\d{8})\.\w+")


# --- classes --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Compared:
    """A split whose labels refer to a network's outputs.

    Attributes:
        index: Index whose labels are positions in ``outputs``, or in all outputs.
        outputs: Compared outputs; None: all.
        protocol: Note for readers of the result; may be empty.
        subset: Names of its classes, if more classes are compared than it has.
    """

    index: Index
    outputs: Sequence[int] | None = None
    protocol: str = ""
    subset: Sequence[str] = ()


def compared_with_model(
    index: Index,
    trained: list[str] | None,
    num_classes: int | None,
    variant: str | None,
    source: str,
) -> Compared:
    """Return a split with the labels that its classes have among a network's outputs.

    Args:
        trained: Names of the network's classes; None: unknown.
        num_classes: Number of the network's classes, if the configuration sets it.
        variant: Variant of ImageNet's validation set; None: not a variant.
    """
    match variant:
        case "imagenet-v2":
            return _numbered_classes(index, trained, num_classes or len(trained or ()))
        case "imagenet-a" | "imagenet-r":
            return _classes_alone(index, trained, variant)
        case "real":
            check_numbered("real", trained)
    known = with_classes_of_model(index, trained, num_classes, source)
    return Compared(known, subset=list(index.classes) if index.classes != known.classes else [])


def with_classes_of_model(
    index: Index, trained: list[str] | None, num_classes: int | None, source: str
) -> Index:
    """Return the index with all classes of the model, and labels among them.

    The data may have only some of the classes, found by name; see `compared_with_model`.
    """
    present = index.classes
    if trained is None:
        # The weights were converted from a file that does not name the classes.
        if num_classes != len(present):
            raise UserError(
                f"the data has {counted(len(present), 'class')}, but {source} has {num_classes} "
                "and does not name them; pass the data set that it was trained on with --data"
            )
        return index
    unknown = sorted(set(present) - set(trained))
    if unknown:
        raise UserError(
            f"the data has other classes than {source} was trained on, such as {unknown[:3]}; "
            "pass data with the training's classes with --data"
        )
    labels = np.array([trained.index(name) for name in present], np.int32)[index.labels]
    return dataclasses.replace(index, classes=tuple(trained), labels=labels)


def _numbered_classes(index: Index, trained: list[str] | None, num_classes: int) -> Compared:
    """Return a split whose class folders are named by number, as in imagenet-v2."""
    check_numbered("imagenet-v2", trained)
    wrong = [k for k in index.classes if not k.isdecimal() or int(k) >= num_classes]
    if wrong:
        raise UserError(
            "--variant imagenet-v2: class folders must be named by the network's class numbers, "
            f"0 to {num_classes - 1}, not {wrong[0]}; pass the folder that holds them with --data"
        )
    numbers = np.array([int(k) for k in index.classes], np.int32)
    names = tuple(trained or map(str, range(num_classes)))
    labels = numbers[index.labels]
    return Compared(
        dataclasses.replace(index, classes=names, labels=labels),
        protocol=f"{counted(len(numbers), 'class')} by number",
    )


def _classes_alone(index: Index, trained: list[str] | None, variant: str) -> Compared:
    """Return a split of some classes, compared only with each other: imagenet-a and -r."""
    known = trained or ()
    unknown = [name for name in index.classes if name not in known]
    if unknown:
        of_network = "was not trained on" if known else "does not name, nor any other"
        raise UserError(
            f"--variant {variant}: the folder has the class {unknown[0]}, which the network "
            f"{of_network}; it needs one that names its classes by the folders' WordNet ids"
        )
    places = {name: k for k, name in enumerate(known)}
    return Compared(
        index,
        outputs=[places[name] for name in index.classes],
        protocol=f"the logits of its {len(index.classes)} classes alone",
    )


def check_numbered(variant: str, trained: list[str] | None) -> None:
    """Refuse a network whose class order differs from the data set's class numbers."""
    if trained is not None and trained != sorted(trained):
        raise UserError(
            f"--variant {variant} numbers classes in the order of their WordNet ids, but this "
            "network has them in another order; evaluate a network with ImageNet's own order"
        )


# --- indexes --------------------------------------------------------------------------------------


def make_index(
    root: Path, index_dir: Path, split: str, workers: int, progress: Callable[[], Any]
) -> None:
    """Index a split, if it has no index yet, without decoding its images."""
    file = data_index.index_file(index_dir, split)
    if file.is_file() or not (root / split).is_dir():
        return  # opening the split reports what is missing
    built, bad = data_index.build_index(
        root, split, workers, decode=False, progress=lambda _done, _of: progress()
    )
    if bad:
        raise UserError(
            f"{counted(len(bad), 'file')} in {root} cannot be used, such as {bad[0].path} "
            f"({bad[0].reason}); download the data again"
        )
    try:
        data_index.save_index(built, file)
    except (OSError, UserError) as error:
        raise UserError(f"{error}; choose another place for it with --index DIR") from error


# --- corruptions ----------------------------------------------------------------------------------


def corruptions(folder: Path) -> dict[str, tuple[str, int]]:
    """Return corruption and severity of each split of imagenet-c, by folder.

    Corruptions are in the folder itself, or in subfolders as in the archives: blur/defocus_blur.
    """
    found = {}
    for name in (*ALEXNET, *_FURTHER):
        places = [folder / name, *sorted(folder.glob(f"*/{name}"))]
        place = next((one for one in places if one.is_dir()), places[0])
        for severity in SEVERITIES:
            if (split := place / str(severity)).is_dir():
                found[str(split.relative_to(folder))] = name, severity
    if not found:
        raise UserError(
            f"--variant imagenet-c: {folder} has no folder of a corruption, such as "
            f"{next(iter(ALEXNET))}/1; pass the folder that holds them with --data"
        )
    return found


def run_corruptions(
    splits: dict[str, tuple[str, int]], run: Callable[[str, str], Evaluation]
) -> dict[str, Any]:
    """Evaluate each split of imagenet-c with ``run(split, title)``; see `corruption_errors`."""
    top1: dict[str, dict[int, float]] = {}
    for split, (name, severity) in splits.items():
        top1.setdefault(name, {})[severity] = run(split, f"{name} {severity}").top1
    return corruption_errors(top1)


def corruption_errors(top1: dict[str, dict[int, float]]) -> dict[str, Any]:
    """Return errors in percent over the 15 official corruptions, from top-1 of each severity.

    Returns:
        ``corruptions``; ``mean_error`` over those of the 15 present, None without any; ``mce``, the
        mean of the errors relative to AlexNet's, None if a corruption or severity is missing.
    """
    errors = {
        name: 100 - sum(by_severity.values()) / len(by_severity)
        for name, by_severity in top1.items()
        if name in ALEXNET
    }
    whole = all(len(top1.get(name, ())) == len(SEVERITIES) for name in ALEXNET)
    return {
        "corruptions": top1,
        "mean_error": sum(errors.values()) / len(errors) if errors else None,
        "mce": sum(errors[name] / ALEXNET[name] for name in ALEXNET) / len(ALEXNET)
        if whole
        else None,
    }


# --- labels assessed anew -------------------------------------------------------------------------


class RealLabels:
    """Counts how often a prediction is one of an image's labels, over images that have any.

    Args:
        file: JSON list with a list of class numbers for each image of the validation set, in the
            order of file numbers.
    """

    def __init__(
        self, file: Path, index: Index, outputs: int, timesteps: int, device: torch.device
    ) -> None:
        answers = _read_real(file, outputs)
        self._answers = torch.zeros(len(index), outputs, dtype=torch.bool)
        for i in range(len(index)):
            found = _VALIDATION_NUMBER.fullmatch(index.path(i))
            if found is None or not 1 <= int(found[1]) <= len(answers):
                raise UserError(
                    f"--variant real: {index.path(i)} is no image of ImageNet's validation set "
                    f"(ILSVRC2012_val_NUMBER.JPEG, with a number up to the {len(answers)} of "
                    f"{file})"
                )
            self._answers[i, answers[int(found[1]) - 1]] = True
        self._right = torch.zeros(timesteps + 1, dtype=torch.float64, device=device)

    def add(self, logits: Tensor, _labels: Tensor, ids: Any) -> None:
        """Count a batch of logits (T, B, K) of the samples ``ids``, (B,)."""
        answers = on_device(self._answers[torch.from_numpy(ids)], logits.device)
        decided = running_means(logits).argmax(-1)  # (T, B)
        self._right[:-1] += answers.gather(1, decided.T).sum(0)
        self._right[-1] += answers.any(1).sum()

    def total(self, world: World, shows_each: bool) -> dict[str, Any]:
        """Return the accuracies over all processes in percent; also at t below T if
        ``shows_each``."""
        *right, samples = world.sum(self._right.tolist())
        top1 = [100 * count / samples for count in right] if samples else []
        return {
            "samples": int(samples),
            "top1": top1[-1] if top1 else None,
            "per_timestep_top1": top1 if shows_each else [],
        }


def _read_real(file: Path, outputs: int) -> list[list[int]]:
    try:
        answers = parse_json(file.read_text())
        good = isinstance(answers, list) and all(
            isinstance(k, int) and 0 <= k < outputs for labels in answers for k in labels
        )
    except FileNotFoundError as error:
        raise UserError(
            f"--variant real needs {file}; download {REAL_FILE} from "
            "github.com/google-research/reassessed-imagenet and put it there"
        ) from error
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{file} cannot be read ({error}); download it again") from error
    if not good:
        raise UserError(
            f"{file} must list, for each image, class numbers below {outputs}; download it again"
        )
    return answers
