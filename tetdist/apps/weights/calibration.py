"""The samples that a threshold of early exit is chosen on."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tetdist.config.schema import RunConfig
from tetdist.data.splits import open_data, open_split
from tetdist.datasets.index import Index
from tetdist.errors import UserError
from tetdist.evaluation.evaluate import Evaluator
from tetdist.nn.norm_neuron import is_causal


def calibration(
    evaluator: Evaluator, timesteps: int, trained: Sequence[str] | None, other: Path | None
) -> Evaluator:
    """Return the evaluator on the samples that a threshold of early exit is chosen on.

    These are the training samples that the run held out, or those of another split, ROOT/SPLIT,
    whose labels are blanked, since its class folders may have any names.
    """
    config, world = evaluator.config, evaluator.world
    if not is_causal(evaluator.model):
        raise UserError("--exit-within: the network is not causal and has no early exit; omit it")
    if other is not None:
        folder = other.absolute()
        data = config.data.model_copy(update={"root": str(folder.parent), "index": None})
        config = config.model_copy(update={"data": data})
        index = open_split(config.data, folder.name, world)
        shape, own = (one.frames(config.data) for one in (index, evaluator.index))
        if shape is not None and own is not None:
            needed = (timesteps, *own[1:])
            if shape[0] < timesteps or shape[1:] != needed[1:]:
                raise UserError(
                    f"--exit-on: {other} has frames of {'x'.join(map(str, shape))}, and "
                    f"{'x'.join(map(str, needed))} are needed; convert it as the evaluated split"
                )
        index = dataclasses.replace(index, classes=(), labels=np.zeros_like(index.labels))
        return dataclasses.replace(evaluator, config=config, index=index)
    try:
        index = open_data(config, world)[1]
        if list(index.classes) != list(trained or index.classes):
            raise UserError(f"the classes of {config.data.root} differ from those of the training")
    except UserError as error:
        raise UserError(
            f"--exit-within needs the training samples that the run held out: {error}; give --data,"
            " the data of the training, or --exit-on ROOT/SPLIT, which needs none of them"
        ) from error
    return dataclasses.replace(evaluator, index=index)


def warning(chosen_on: Path, config: RunConfig, split: Index, trained_root: str) -> str | None:
    """Return a warning if early exit is chosen on samples of the training or evaluation.

    Args:
        config, split: Configuration and samples of the evaluation.
        trained_root: Data root of the training.
    """
    better = "is the evaluated split, so the result looks better than it is"
    higher = "holds samples of the training, on which confidences are higher than elsewhere"
    root = config.data.root
    used = {Path(folder, "train"): higher for folder in (trained_root, root)}
    used[Path(root, split.split)] = better
    reasons = {folder.resolve(): reason for folder, reason in used.items()}
    reason = reasons.get(chosen_on.resolve())
    return reason and f"--exit-on {reason}"
