"""A trained network and the data that it is evaluated on."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from tetdist.config.loading import CONFIGS_DIR, data_command, parse
from tetdist.config.messages import checked
from tetdist.config.schema import RunConfig
from tetdist.config.yaml_files import read_yaml
from tetdist.data.splits import evaluated_split, open_data, open_split
from tetdist.datasets.class_folders import folders_called
from tetdist.datasets.index import Index, index_file
from tetdist.datasets.recorded_split import binning, recorded_split
from tetdist.distributed.world import World
from tetdist.errors import UserError
from tetdist.evaluation.energy import EnergySection
from tetdist.evaluation.evaluate import Evaluator
from tetdist.nn.norm_neuron import is_causal
from tetdist.storage.checkpoint import Description
from tetdist.wording import and_more, counted


class Opened(NamedTuple):
    """A checkpoint and the split that it is evaluated on.

    Attributes:
        split: The evaluated samples, with all classes of the network.
        present: Names of the split's own classes.
        timesteps: All T to report, ascending.
        constants: Constants of the energy estimate.
    """

    weights: dict[str, Tensor]
    description: Description
    config: RunConfig
    split: Index
    present: tuple[str, ...]
    timesteps: list[int]
    constants: EnergySection

    @property
    def headline(self) -> int:
        """T of all results but the accuracy at each T."""
        trained = self.description.timesteps
        return trained if trained in self.timesteps else self.timesteps[-1]

    def warning_of(self, chosen_on: Path) -> str | None:
        """Return a warning if early exit is chosen on samples of the training or evaluation."""
        better = "is the evaluated split, so the result looks better than it is"
        higher = "holds samples of the training, on which confidences are higher than elsewhere"
        trained, root = self.description.config["data"]["root"], self.config.data.root
        used = {Path(one, "train"): higher for one in (trained, root)}
        used[Path(root, self.split.split)] = better
        return {one.resolve(): why for one, why in used.items()}.get(chosen_on.resolve())

    def about(self, source: Path) -> dict[str, Any]:
        """Return what the JSON file says of the network and the data."""
        some = {
            "averaged": self.description.averaged,
            "published": self.description.published,
            "data_split": recorded_split(self.config.data.root),
            "subset": list(self.present) if self.present != self.split.classes else None,
        }
        return {
            "checkpoint": str(source),
            "model": self.description.config["model"]["name"],
            "step": self.description.step,
            "split": self.split.split,
            **{key: value for key, value in some.items() if value},
            "trained_timesteps": self.description.timesteps,
            "reported_timesteps": self.timesteps,
        }


def evaluation_config(
    raw: dict[str, Any],
    source: str,
    data: Mapping[str, Any] | None = None,
    **changed: Any,
) -> RunConfig:
    """Return the training's configuration with changed keys, without what only affects training.

    Args:
        source: The checkpoint, for messages.
        data: Changed keys of its section data.
        changed: Other changed keys; None: as in the training.
    """
    # Another program may have written it.
    parse(raw, source, warn=False, is_trained=True)
    without = {
        "recompute": "none",
        "engine": "torch",
        "zero_stage": 0,
        "batch_norm": {"sync": False},
        "execution": "fused",
        "data": raw["data"] | {"device": "cpu"} | dict(data or {}),
    }
    given = {key: value for key, value in changed.items() if value is not None}
    return parse(raw | without | given, source, warn=False, is_trained=True)


def open_evaluated(config: RunConfig, split: str | None, world: World, *, own_data: bool) -> Index:
    """Return the index of a split; None: val, or without one the samples that the run held out.

    Args:
        own_data: The data are the training's, so that its held-out samples are known.
    """
    data = config.data
    file = index_file(data.index_dir, split or "val")
    # Exports have the root data; runs have an absolute one.
    if own_data and data.root == "data" and not file.is_file():
        raise UserError("this network's file does not name its data; give --data FOLDER")
    if not Path(data.root).is_dir():
        recipe = CONFIGS_DIR / f"{config.name}.yaml"
        # A run's root is absolute, and that command makes the data in the current folder.
        is_recipe = recipe.is_file() and not Path(data.root).is_absolute()
        make = f"make it with `{data_command(recipe)}`, or " if is_recipe else ""
        raise UserError(f"data.root: there is no folder {data.root}; {make}give --data FOLDER")
    indexed = [one for one in ("train", "val") if index_file(data.index_dir, one).is_file()]
    if file.is_file() or indexed != ["train"] or Path(data.root, split or "val").is_dir():
        return open_split(config, split or "val", world)
    if split is not None or not own_data or not data.held_out:
        flags = " and ".join(["--split"] * (split is not None) + ["--data"] * (not own_data))
        other = f"; without {flags}, the run's held-out samples are taken" if data.held_out else ""
        given = (*folders_called(Path(data.root), "val"), "train, the training samples")[0]
        raise UserError(
            f"there is no {split or 'validation'} split in {data.root}; add val/ and index it, or "
            f"give --split {given}{other}"
        )
    held = open_data(config, world)[1]
    return dataclasses.replace(held, split=evaluated_split(config) or held.split)


def other_binning(trained: Mapping[str, Any], root: str) -> str | None:
    """Return a warning if the data's events were binned otherwise than the training's."""
    data = binning(root) or trained
    was, now = (dict(one, size=one.get("size") or one.get("sensor")) for one in (trained, data))
    keys = ["values", "bins", "resize", "size"]
    if was.get("bins") in ("count", "time"):  # windows of a fixed size do not depend on T
        keys.append("timesteps")
    differ = [key for key in keys if was.get(key) != now.get(key)]
    ours, theirs = (" ".join(f"--{key} {one.get(key)}" for key in differ) for one in (now, was))
    why = f"with {ours}, but those of the training with {theirs}: the accuracy may be far too low"
    return f"the events of {root} were binned {why}; bin as for the training" if differ else None


def with_classes_of_model(
    index: Index, trained: list[str] | None, num_classes: int | None, source: str
) -> Index:
    """Return the index with all classes of the model, and labels among them.

    Args:
        index: A split, which may have only some of the classes; they are found by name.
        trained: Names of the network's classes; None: unknown.
        num_classes: Number of the network's classes, if the configuration sets it.
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
            f"the data has other classes than {source} was trained on, such as {unknown[0]}; it "
            f"knows {', '.join(trained[:10])}{and_more(trained, 10)}; give its data with --data"
        )
    labels = np.array([trained.index(name) for name in present], np.int32)[index.labels]
    return dataclasses.replace(index, classes=tuple(trained), labels=labels)


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
        index = open_split(config, folder.name, world)
        shape, own = (one.frames(config.data) for one in (index, evaluator.index))
        if shape is not None and own is not None:
            wanted = (timesteps, *own[1:])
            if shape[0] < timesteps or shape[1:] != wanted[1:]:
                raise UserError(
                    f"--exit-on: {other} has frames of {'x'.join(map(str, shape))}, and "
                    f"{'x'.join(map(str, wanted))} are needed; convert it as the evaluated split"
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


def timesteps(wanted: list[int] | None, config: RunConfig, trained: int, index: Index) -> list[int]:
    """Return the T to report; by default, every T up to the training's that the neurons support."""
    refusal = config.model.neuron.refusal
    if wanted is None:
        wanted = [t for t in range(1, trained + 1) if refusal(t) is None]
    elif reason := next(filter(None, map(refusal, wanted)), None):
        raise UserError(f"--timesteps: {reason}; leave it out for {trained}")
    frames = index.frames(config.data)
    if frames is not None and wanted[-1] > frames[0]:
        raise UserError(f"--timesteps: {wanted[-1]} exceeds the data's {frames[0]} time bins")
    return wanted


def energy_constants(file: Path | None) -> EnergySection:
    """Return the constants and assumptions of the energy estimate that a file changes."""
    return checked(EnergySection, read_yaml(file) if file else {}, f"--energy {file}")
