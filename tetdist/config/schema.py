"""The configuration of a run: typed, strict, from YAML plus ``key=value`` overrides.

A configuration describes one run completely; every default is written out in the run folder's
config.yaml. Keys that do not exist, values of the wrong type or range and settings that
contradict each other end in a `UserError` that names the dotted key.
"""

import difflib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import pydantic
import yaml
from pydantic import BaseModel, ConfigDict, Field

from tetdist.errors import UserError
from tetdist.nn.neurons import SpikeName, SurrogateName

logger = logging.getLogger(__name__)

TIMM = "timm:"  # before the name of one of timm's networks, where a path could stand

_PACKAGE = Path(__file__).resolve().parents[1]
# In a wheel they are in the package, in a checkout beside it.
CONFIGS_DIR = next(
    folder / "configs" for folder in (_PACKAGE, _PACKAGE.parent) if (folder / "configs").is_dir()
)

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
# A probability below 1: a share of 1 would leave nothing.
Share = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    # strict: "yes" is no bool and 1.5 no int; an int where a float is asked is fine.
    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        allow_inf_nan=False,
        populate_by_name=True,
        serialize_by_alias=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )


class NeuronSection(Section):
    """See `tetdist.neurons.NeuronConfig`, whose fields and defaults these are."""

    decay: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of the membrane kept from one timestep to the next; 1 is the IF neuron."""
    threshold: Annotated[float, Field(gt=0)] = 1.0
    reset: Literal["hard", "soft"] = "hard"
    """hard: to 0; soft: by the threshold."""
    detach_reset: bool = False
    """Whether the reset is a constant to the backward pass."""
    surrogate: SurrogateName = "triangle"
    surrogate_width: Annotated[float, Field(gt=0)] = 1.0
    """Half-width of triangle and rectangle, steepness of atan and sigmoid."""
    spike: SpikeName = "step"
    """sigmoid: the control of the paper whose gradient is its own. Needs surrogate=sigmoid, whose
    width is its steepness. relu: no neurons but max(0, I), so at T=1 the ReLU network of the same
    shape, to begin with or to learn from. Both without a fused path, so slower."""


class ModelSection(Section):
    name: str
    """A model registered with timm, such as sew_resnet34."""
    num_classes: Annotated[int, Field(gt=1)] | None = None
    """Null: as many as the data set has."""
    neuron: NeuronSection = NeuronSection()
    arguments: dict[str, Any] = {}
    """Further arguments of the model, such as connect_function: add."""


class ColorJitterSection(Section):
    """torchvision's ColorJitter: brightness 0.4 draws a factor from 0.6 to 1.4."""

    brightness: Annotated[float, Field(ge=0)] = 0.0
    contrast: Annotated[float, Field(ge=0)] = 0.0
    saturation: Annotated[float, Field(ge=0)] = 0.0
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """Largest shift of the hue; 0.5 is half a circle."""


class DataSection(Section):
    kind: Literal["images", "events"] = "images"
    """images: decoded and augmented here. events: pre-binned tensors (T, 2, H, W)."""
    root: str
    """Folder that holds train/ and val/, each with one folder a class."""
    index: str | None = None
    """Folder of the index files; null: ROOT/index."""
    image_size: Positive = 224
    """Height and width that the network sees."""
    resize: Positive | None = None
    """Shorter side before evaluation's centre crop; null: image_size / 0.875."""
    crop: Literal["resized", "padded"] = "resized"
    """resized: RandomResizedCrop. padded: image_size pixels of the image with a black border, as
    is usual for CIFAR."""
    scale: tuple[Fraction, Fraction] = (0.08, 1.0)
    """RandomResizedCrop: share of the area."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """RandomResizedCrop: width / height."""
    padding: Annotated[int, Field(ge=0)] = 4
    """crop=padded: width of the border."""
    flip: Fraction = 0.5
    """Probability of a horizontal flip."""
    roll: Annotated[int, Field(ge=0)] = 0
    """Events: largest shift in pixels, wrapping around, of a training sample."""
    auto_augment: Literal["none", "cifar10", "imagenet"] = "none"
    """AutoAugment's policy."""
    color_jitter: ColorJitterSection = ColorJitterSection()
    cutout: Annotated[int, Field(ge=0)] = 0
    """Side of a square that is set to 0 (after normalisation); 0: none."""
    mixup: Annotated[float, Field(ge=0)] = 0.0
    """Alpha of mixup, whose lambda is drawn from Beta(alpha, alpha); 0: off. A sample is mixed with
    the one before it in its micro-batch."""
    cutmix: Annotated[float, Field(ge=0)] = 0.0
    """Alpha of CutMix; 0: off. With mixup, too, each sample gets one of them, equally often."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    device: Literal["cpu", "gpu"] = "cpu"
    """Where DALI decodes; gpu needs a GPU."""
    threads: Positive = 2
    """DALI's threads, per process."""
    prefetch: Positive = 2
    """Batches decoded ahead."""

    @property
    def index_dir(self) -> Path:
        return Path(self.index) if self.index else Path(self.root) / "index"

    @property
    def resize_side(self) -> int:
        return self.resize or round(self.image_size / 0.875)


class BatchSection(Section):
    global_: Positive = Field(alias="global")
    """Samples of one optimiser step, whatever the number of processes."""
    micro: Positive
    """Samples of one forward pass on one process: what batch norm normalises over."""
    eval: Positive = 64
    """Samples of one evaluation batch on one process."""


class DistillationSection(Section):
    """Softer targets beside the labels: what a teacher, or the network itself, makes of the same
    input. With TET they are those of every timestep, with SDT of the time-mean."""

    teacher: str | None = None
    """A run folder (its last checkpoint), a checkpoint folder, a .safetensors file (see
    init_checkpoint), or timm:NAME. Null: none."""
    teacher_weights: str | None = None
    """Of a timm:NAME teacher: the file of its weights; null: timm downloads those it knows."""
    weight: Annotated[float, Field(ge=0)] = 0.2
    """Of the divergence from the teacher, where there is one."""
    self_weight: Annotated[float, Field(ge=0)] = 0.0
    """Of the divergence of each timestep from the time-mean; 0: none. For TET only."""
    temperature: Annotated[float, Field(gt=0)] = 2.0
    """Both sides' logits are divided by it; above 1 it shows more of the lesser classes."""


class LossSection(Section):
    kind: Literal["tet", "sdt"] = "tet"
    lambda_: Fraction = Field(default=0.001, alias="lambda")
    """TET's weight of the pull towards phi."""
    phi: float = 1.0
    """TET's target of all outputs; the paper takes the threshold."""
    label_smoothing: Share = 0.0
    distillation: DistillationSection = DistillationSection()

    def as_text(self) -> str:
        """For a person, such as "TET, lambda 0.001, phi 1; 0.2 x divergence from timm:NAME"."""
        text = f"TET, lambda {self.lambda_:g}, phi {self.phi:g}"
        if self.kind == "sdt":
            text = "SDT: cross-entropy of the time-mean"
        if self.label_smoothing:
            text += f", label smoothing {self.label_smoothing:g}"
        soft = self.distillation
        if soft.teacher is not None:
            text += f"; {soft.weight:g} x divergence from {soft.teacher}"
        if soft.self_weight:
            text += f"; {soft.self_weight:g} x divergence from the time-mean"
        if soft.teacher is not None or soft.self_weight:
            text += f", temperature {soft.temperature:g}"
        return text


class OptimizerSection(Section):
    kind: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: Annotated[float, Field(gt=0)]
    """Peak learning rate, for the global batch as it is: nothing is scaled behind your back."""
    momentum: Share = 0.9
    nesterov: bool = False
    betas: tuple[Share, Share] = (0.9, 0.999)
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    decay_norms: bool = True
    """Whether weight decay applies to batch norm parameters and biases, too."""


class PhaseSection(Section):
    """A stretch of training with its own T, optimiser and schedule."""

    epochs: Positive
    timesteps: Positive
    optimizer: OptimizerSection
    schedule: Literal["cosine", "constant"] = "cosine"
    """cosine: from lr to 0 over the phase's steps."""
    warmup_epochs: Annotated[float, Field(ge=0)] = 0.0
    """Linear from 0 at the phase's start."""
    image_size: Positive | None = None
    """Of training images; null: data.image_size, which is also what evaluation takes."""
    final_image_size: Positive | None = None
    """Of the phase's last epoch; the epochs before rise to it evenly, in multiples of 32. Null: all
    are of image_size."""


class SegmentsSection(Section):
    timesteps: Positive
    """Run each block over segments of so many timesteps, and recompute segment by segment."""


class BatchNormSection(Section):
    sync: bool = False
    """Normalise over the micro-batches of all processes together, not over each one's own. The
    result then depends on the number of processes, as it does not otherwise."""


class SaveSection(Section):
    every_steps: Positive | None = None
    """Besides each epoch's end; null: only there."""
    keep_last: Annotated[int, Field(ge=2)] = 2
    """At least 2: the newest could be the one that a failing disk ruined."""


class TrackingSection(Section):
    mlflow: bool = True
    uri: str | None = None
    """MLflow's tracking URI; null: the SQLite file RUNS_DIR/mlflow.db."""
    experiment: str = "tetdist"
    log_checkpoint: Literal["none", "last", "best"] = "none"
    """Copy this checkpoint's model.safetensors to MLflow when the run is finished."""
    register_: str | None = Field(default=None, alias="register")
    """Name of a model in MLflow's registry that gets the logged checkpoint as its next version."""


class RunConfig(Section):
    name: str
    """Of the run and its folder."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    model: ModelSection
    data: DataSection
    batch: BatchSection
    loss: LossSection = LossSection()
    phases: Annotated[tuple[PhaseSection, ...], Field(min_length=1)]
    precision: Literal["bf16", "fp32", "fp16", "fp64"] = "bf16"
    """bf16, fp16 (GPU only): of convolutions, beside parameters in float32. fp64: for checks."""
    batch_norm: BatchNormSection = BatchNormSection()
    execution: Literal["fused", "reference"] = "fused"
    """reference runs the plain definitions of normalisation and neurons."""
    checkpoint: Literal["none", "blocks"] | SegmentsSection = "none"
    """Activation memory. blocks: keep each block's input only, compute the rest again; the same
    result to the bit. {timesteps: k}: the same over segments of k timesteps, for long T; batch
    norm then normalises each segment by itself, which is another network in training."""
    gradient_clipping: Annotated[float, Field(gt=0)] | None = None
    """Largest norm of the gradient."""
    non_finite_limit: Positive = 5
    """Steps in a row without a finite gradient after which the run ends; until then each of them
    changes nothing and is counted."""
    engine: Literal["deepspeed", "torch"] = "deepspeed"
    """torch: a few lines of plain torch, the check on DeepSpeed's result."""
    zero_stage: Literal[0, 1, 2] = 0
    """DeepSpeed's ZeRO. 1: the optimiser's state is divided among processes; 2: gradients, too."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    deterministic: bool = False
    """Only algorithms that repeat to the bit on a GPU; slower. (On a CPU they all do.)"""
    max_steps: Positive | None = None
    """End after so many optimiser steps in all, for a try; schedules stay those of the phases."""
    log_every: Positive = 20
    """Optimiser steps between two lines of metrics."""
    evaluate_every: Positive = 1
    """Epochs between two evaluations; the last epoch is always evaluated."""
    init_checkpoint: str | None = None
    """Weights and running statistics to begin with: a run folder (its last checkpoint), a
    checkpoint folder or a .safetensors file (tools/convert.py makes one of other libraries'
    weights). The optimiser starts anew."""
    start_phase: Annotated[int, Field(ge=0)] = 0
    """Begin with this phase, from init_checkpoint, as if those before it were done."""
    peer_timeout: Annotated[float, Field(gt=0)] = 600.0
    """Seconds without any progress of a process after which all others end."""
    record_samples: bool = False
    """Debugging aid: write ids and checksums of the samples of each step to samples-RANK.jsonl."""
    resume: Literal["auto", "never", "must"] = "auto"
    """What to do about checkpoints in the run folder: auto continues if there are any."""
    runs_dir: str = "runs"
    save: SaveSection = SaveSection()
    tracking: TrackingSection = TrackingSection()
    cluster: dict[str, Any] = {}
    """For launch/slurm.py, which checks it: partition, nodes, gpus_per_node, time, ..."""

    @property
    def run_dir(self) -> Path:
        return Path(self.runs_dir) / self.name

    @property
    def tracking_uri(self) -> str | None:
        if not self.tracking.mlflow:
            return None
        if self.tracking.uri:
            return self.tracking.uri
        return f"sqlite:///{(Path(self.runs_dir) / 'mlflow.db').resolve()}"

    def as_dict(self) -> dict[str, Any]:
        """Plain nested dictionaries and lists, as in YAML."""
        return self.model_dump(mode="json")

    def as_yaml(self) -> str:
        return yaml.safe_dump(self.as_dict(), sort_keys=False)


# What may differ between a run and its continuation: where things are, how much is shown or kept,
# and how the same numbers are computed, nothing that changes the result beyond rounding. (The data
# set's content is compared by the index's fingerprint.)
OPERATIONAL_KEYS = (
    "data.root",
    "data.index",
    "data.device",
    "data.threads",
    "data.prefetch",
    "batch.eval",
    "checkpoint",
    "engine",
    "zero_stage",
    "non_finite_limit",
    "peer_timeout",
    "record_samples",
    "device",
    "max_steps",
    "log_every",
    "resume",
    "runs_dir",
    "save.every_steps",
    "save.keep_last",
    "tracking.mlflow",
    "tracking.uri",
    "tracking.experiment",
    "tracking.log_checkpoint",
    "tracking.register",
)


# Files and folders of others, which are the same however their path is written. A teacher may be
# timm:NAME instead.
PATH_KEYS = (
    "init_checkpoint",
    "loss.distillation.teacher",
    "loss.distillation.teacher_weights",
)


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries and lists as one dictionary of dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        dotted = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{dotted}.")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            flat |= flatten({str(i): item for i, item in enumerate(value)}, f"{dotted}.")
        else:
            flat[dotted] = value
    return flat


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What makes two configurations different runs, a sentence part each."""
    a, b = _with_absolute_paths(flatten(old)), _with_absolute_paths(flatten(new))
    return [
        f"{key} is {b.get(key)!r} and was {a.get(key)!r}"
        for key in sorted(a.keys() | b.keys())
        if key not in OPERATIONAL_KEYS
        and key.partition(".")[0] != "cluster"
        and a.get(key) != b.get(key)
    ]


def _with_absolute_paths(flat: dict[str, Any]) -> dict[str, Any]:
    return flat | {key: absolute_path(flat[key]) for key in PATH_KEYS if flat.get(key)}


def absolute_path(value: str) -> str:
    """The value of one of the `PATH_KEYS` as it is understood in any folder."""
    return value if value.startswith(TIMM) else str(Path(value).absolute())


def find(name: str) -> Path:
    """The file of a configuration: a path, or a name (with or without .yaml) in configs/."""
    candidates = [Path(name), CONFIGS_DIR / name, CONFIGS_DIR / f"{name}.yaml"]
    for path in candidates:
        if path.is_file():
            return path
    known = sorted(path.name for path in CONFIGS_DIR.glob("*.yaml"))
    close = difflib.get_close_matches(f"{name}.yaml".replace(".yaml.yaml", ".yaml"), known, n=1)
    hint = f"; did you mean {close[0]}?" if close else f"; in configs/ there are {', '.join(known)}"
    raise UserError(f"no configuration {name!r}, neither as a file nor in configs/{hint}")


def load(name: str, overrides: list[str] | None = None) -> RunConfig:
    """Read, override and check a configuration.

    Args:
        name: A file or a name in configs/.
        overrides: ``dotted.key=value``; the value is YAML, list items are numbered from 0
            (``phases.0.epochs=1``).

    Raises:
        UserError: Anything about it is wrong; the text says what and where.
    """
    path = find(name)
    raw = read_yaml(path)
    raw.setdefault("name", path.stem)
    for override in overrides or []:
        apply_override(raw, override)
    return parse(raw, str(path))


class _Loader(yaml.SafeLoader):
    """YAML's safe loader keeps the last of several values of a key and says nothing."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Here the keys are still those of the file, without what `<<` merges into them.
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            line = key.start_mark.line + 1
            if key.value in lines:
                raise UserError(
                    f"{key.start_mark.name}: the key {key.value!r} is there twice, in lines "
                    f"{lines[key.value]} and {line}; rename or remove one"
                )
            lines[key.value] = line
        return node


def read_yaml(path: Path) -> dict[str, Any]:
    """Keys and values of a YAML file.

    Raises:
        UserError: It is no YAML, holds something else, or a key twice.
    """
    try:
        with path.open() as file:
            raw = yaml.load(file, _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        found = "and is empty" if raw is None else f"not a {type(raw).__name__}"
        raise UserError(f"{path} must hold keys and values, {found}")
    return raw


def parse(raw: dict[str, Any], source: str, *, warn: bool = True) -> RunConfig:
    """Check a configuration given as nested dictionaries; ``source`` is named in errors."""
    try:
        config = RunConfig.model_validate_json(_as_json(raw, source))
    except pydantic.ValidationError as error:
        errors = innermost([_united(e) for e in error.errors()])
        problems = "; ".join(dict.fromkeys(_explain(e) for e in errors))
        raise UserError(f"{source}: {problems}") from None
    _check(config)
    if warn:
        _warn_without_effect(config)
    return config


def _as_json(raw: dict[str, Any], source: str) -> str:
    try:
        # Through JSON, because strict validation of JSON takes a list for a tuple, and nothing
        # else that it should not.
        return json.dumps(raw)
    except TypeError as error:
        raise UserError(
            f"{source}: a value is neither text, number, list nor mapping ({error}); "
            "quote it if it is meant as text"
        ) from error


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Set one ``dotted.key=value`` in nested dictionaries."""
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError(f"{override!r} is not an override; write it as dotted.key=value")
    try:
        value = yaml.safe_load(text) if text else None
    except yaml.YAMLError as error:
        raise UserError(
            f"the value of {key!r} is not valid YAML: {' '.join(str(error).split())}"
        ) from error
    # YAML 1.1 takes 1e-4 for text; nobody who types it means that.
    value = _number(value)
    node: Any = raw
    *parents, last = key.split(".")
    for depth, part in enumerate(parents):
        node = _child(node, part, ".".join(parents[: depth + 1]))
    if isinstance(node, list):
        position = _position(node, last, key)
        node[position] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise UserError(f"{key!r} cannot be set: {'.'.join(parents)} is a single value")


def _number(value: Any) -> Any:
    if isinstance(value, str):
        try:
            return float(value) if "e" in value.lower() else value
        except ValueError:
            return value
    return value


def _child(node: Any, part: str, dotted: str) -> Any:
    if isinstance(node, list):
        return node[_position(node, part, dotted)]
    if not isinstance(node, dict):
        raise UserError(f"{dotted!r} cannot be reached: a value before it is single")
    if node.get(part) is None:
        node[part] = {}
    return node[part]


def _position(items: list[Any], part: str, dotted: str) -> int:
    if not part.isdigit() or int(part) >= len(items):
        raise UserError(f"{dotted!r}: {part!r} is not one of the items 0 to {len(items) - 1}")
    return int(part)


def _united(error: Any) -> Any:
    """One sentence for a key of two kinds, of which pydantic complains once a kind."""
    if error["loc"][0] != "checkpoint":
        return error
    message = "must be none, blocks or {timesteps: K} with a whole number K above 0"
    return {"loc": ("checkpoint",), "type": "union", "msg": message, "input": ...}


def innermost(errors: list[Any]) -> list[Any]:
    """Of pydantic's errors those that say enough: it also calls a list too short, and a mapping
    too small, of which an item is wrong."""
    return [e for e in errors if not any(_contains(e, other) for other in errors)]


def _contains(error: Any, other: Any) -> bool:
    outer, inner = error["loc"], other["loc"]
    return len(outer) < len(inner) and inner[: len(outer)] == outer


def _explain(error: Any) -> str:
    location = [str(part) for part in error["loc"]]
    dotted = ".".join(location)
    if error["type"] == "extra_forbidden":
        known = _known_keys(location[:-1])
        every = [*schema(), *known]
        prefix = "".join(f"{part}." for part in location[:-1])
        close = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        anywhere = [k for k in every if k.split(".")[-1] == location[-1]]
        if close:
            return f"unknown key {dotted!r}; the nearest known one is {prefix + close[0]!r}"
        if anywhere:
            return f"unknown key {dotted!r}; there is {anywhere[0]!r}"
        return f"unknown key {dotted!r}; known here are {', '.join(known)}"
    if error["type"] == "missing":
        return f"{dotted!r} is missing"
    message = error["msg"][0].lower() + error["msg"][1:]
    given = error["input"]
    shown = "" if given is ... or isinstance(given, dict) else f", not {given!r}"
    return f"{dotted!r}: {message}{shown}"


def _section_at(location: list[str]) -> type[BaseModel] | None:
    section: type[BaseModel] = RunConfig
    for part in location:
        if part.isdigit():
            continue
        field = next((f for n, f in section.model_fields.items() if part in (n, f.alias)), None)
        found = _section_in(field.annotation) if field else None
        if found is None:
            return None
        section = found
    return section


def _section_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((s for a in get_args(annotation) if (s := _section_in(a))), None)


def _known_keys(location: list[str]) -> list[str]:
    section = _section_at(location)
    return [f.alias or n for n, f in section.model_fields.items()] if section else []


def schema(section: type[BaseModel] = RunConfig, prefix: str = "") -> dict[str, str]:
    """Every key of the configuration, dotted (list items as ``N``), with its documentation."""
    keys: dict[str, str] = {}
    for name, field in section.model_fields.items():
        dotted = f"{prefix}{field.alias or name}"
        inner = _section_in(field.annotation)
        if inner is None or field.description:
            keys[dotted] = field.description or ""
        if inner is None:
            continue
        if inner is PhaseSection:
            keys |= schema(inner, f"{dotted}.N.")
        else:
            keys |= schema(inner, f"{dotted}.")
    return keys


def _check(config: RunConfig) -> None:
    """Contradictions between keys that are each fine on their own."""
    import timm

    import tetdist.models

    if "/" in config.name or config.name in ("", ".", ".."):
        raise UserError(f"name: {config.name!r} is not the name of a folder")
    batch = config.batch
    if batch.global_ % batch.micro:
        raise UserError(
            f"batch.global: {batch.global_} is not a multiple of batch.micro, {batch.micro}; "
            f"{batch.global_ // batch.micro * batch.micro or batch.micro} is"
        )
    known = [m for module in tetdist.models.MODEL_MODULES for m in timm.list_models(module=module)]
    if config.model.name not in known:
        close = difflib.get_close_matches(config.model.name, known, n=1)
        hint = f"; did you mean {close[0]}?" if close else f"; there are {', '.join(known)}"
        raise UserError(f"model.name: {config.model.name!r} is not a spiking model{hint}")
    allowed = tetdist.models.arguments_of(config.model.name)
    for key in config.model.arguments:
        if key in ("num_classes", "neuron", "timesteps"):
            raise UserError(f"model.arguments.{key}: has a key of its own; set it there")
        if key not in allowed:
            close = difflib.get_close_matches(key, allowed, n=1)
            hint = f"the nearest known one is {close[0]!r}" if close else f"known: {allowed}"
            raise UserError(f"model.arguments.{key}: {config.model.name} has no such; {hint}")
    kind = model_input_kind(config.model.name)
    if kind != config.data.kind:
        raise UserError(
            f"data.kind is {config.data.kind!r} and model.name {config.model.name!r} "
            f"takes {kind!r}: choose a model or data that suit each other"
        )
    data = config.data
    if data.scale[0] > data.scale[1] or data.scale[1] == 0:
        raise UserError(f"data.scale: {list(data.scale)} must rise from the first to the second")
    if not 0 < data.ratio[0] <= data.ratio[1]:
        raise UserError(f"data.ratio: {list(data.ratio)} must be positive and rise")
    if min(data.std) <= 0:
        raise UserError(f"data.std: {list(data.std)} must be above 0")
    if data.resize is not None and data.resize < data.image_size:
        raise UserError(
            f"data.resize: {data.resize} is smaller than data.image_size, {data.image_size}: "
            "the centre crop would not fit"
        )
    _check_augmentation(config)
    _check_precision_and_engine(config)
    _check_spike(config)
    _check_distillation(config)
    if config.tracking.register_ is not None and config.tracking.log_checkpoint == "none":
        raise UserError(
            f"tracking.register: {config.tracking.register_!r} needs a checkpoint that MLflow has; "
            "set tracking.log_checkpoint=best or last with it"
        )
    if config.start_phase >= len(config.phases):
        raise UserError(
            f"start_phase: {config.start_phase} is none of the phases 0 to {len(config.phases) - 1}"
        )
    if config.start_phase and config.init_checkpoint is None:
        raise UserError(
            f"start_phase: {config.start_phase} begins after phases that this run did not train; "
            "set init_checkpoint to what they left"
        )
    for i, phase in enumerate(config.phases):
        if phase.warmup_epochs >= phase.epochs:
            raise UserError(
                f"phases.{i}.warmup_epochs: {phase.warmup_epochs} must be below the phase's "
                f"{phase.epochs} epochs"
            )


def _check_augmentation(config: RunConfig) -> None:
    data = config.data
    smallest = min(size for phase in config.phases for size in phase_image_sizes(config, phase))
    if data.crop == "padded" and data.padding >= smallest:
        raise UserError(
            f"data.padding: {data.padding} must be below the image size, {smallest}: a crop could "
            "be all border"
        )
    if (data.mixup or data.cutmix) and config.batch.micro == 1:
        raise UserError(
            "batch.micro: 1 leaves data.mixup and data.cutmix nothing to mix a sample with; take 2 "
            "or more"
        )


def phase_image_sizes(config: RunConfig, phase: PhaseSection) -> tuple[int, int]:
    """Training images' size in a phase's first epoch and in its last."""
    first = phase.image_size or config.data.image_size
    return first, phase.final_image_size or first


def _check_precision_and_engine(config: RunConfig) -> None:
    if config.precision == "fp64" and config.engine != "torch":
        raise UserError("precision: DeepSpeed does not train in fp64; set engine=torch with it")
    if config.zero_stage and config.engine != "deepspeed":
        raise UserError(
            f"zero_stage: {config.zero_stage} is DeepSpeed's; set engine=deepspeed or zero_stage=0"
        )
    if config.zero_stage and config.precision == "fp16":
        raise UserError(
            "precision: fp16 needs zero_stage=0 (DeepSpeed never lowers its loss scale at stages 1 "
            "and 2); bf16 goes with all of them"
        )


def _check_spike(config: RunConfig) -> None:
    neuron = config.model.neuron
    if neuron.spike == "sigmoid" and neuron.surrogate != "sigmoid":
        raise UserError(
            "model.neuron.spike: sigmoid has its own derivative; set model.neuron.surrogate=sigmoid"
        )


def _check_distillation(config: RunConfig) -> None:
    section, key = config.loss.distillation, "loss.distillation"
    if section.self_weight and config.loss.kind == "sdt":
        raise UserError(
            f"{key}.self_weight: timesteps learn from their mean, and loss.kind=sdt sees that mean "
            "only; set loss.kind=tet with it"
        )
    if section.teacher_weights and not (section.teacher or "").startswith(TIMM):
        raise UserError(
            f"{key}.teacher_weights: is of a timm teacher; set {key}.teacher=timm:NAME with it, or "
            f"give the file itself as {key}.teacher"
        )


def model_input_kind(name: str) -> str:
    """``images`` or ``events``, by the model's number of input channels."""
    import timm

    return "events" if timm.get_pretrained_cfg(name).input_size[0] == 2 else "images"


def effective(config: RunConfig) -> dict[str, Any]:
    """The configuration as one dictionary of dotted keys, without those that have no effect."""
    unread = [key for key, *_ in _without_effect(config)]
    return {
        key: value
        for key, value in flatten(config.as_dict()).items()
        if not any(key == other or key.startswith(f"{other}.") for other in unread)
    }


def _warn_without_effect(config: RunConfig) -> None:
    """Say which keys were set that nothing reads."""
    for key, is_set, because in _without_effect(config):
        if is_set:
            logger.warning("%s has no effect with %s", key, because)


def _without_effect(config: RunConfig) -> Iterator[tuple[str, bool, str]]:
    """Every key that nothing reads, whether it was set, and the setting that makes it so."""
    for section, prefix, names, because in _unread(config):
        for name in names:
            alias = type(section).model_fields[name].alias or name
            yield f"{prefix}{alias}", name in section.model_fields_set, because


def _unread(config: RunConfig) -> Iterator[tuple[BaseModel, str, tuple[str, ...], str]]:
    """Sections, their prefixes, their fields that nothing reads, and why."""
    if config.loss.kind == "sdt":
        yield config.loss, "loss.", ("lambda_", "phi"), "loss.kind=sdt"
    soft = config.loss.distillation
    if soft.teacher is None:
        yield soft, "loss.distillation.", ("weight",), "loss.distillation.teacher=null"
        if not soft.self_weight:
            yield soft, "loss.distillation.", ("temperature",), "nothing to distil from"
    elif soft.weight == 0:
        yield soft, "loss.distillation.", ("teacher",), "loss.distillation.weight=0"
    if config.model.neuron.spike == "relu":
        every = tuple(name for name in NeuronSection.model_fields if name != "spike")
        yield config.model.neuron, "model.neuron.", every, "model.neuron.spike=relu"
    if config.data.kind == "events":
        crops = ("image_size", "resize", "crop", "scale", "ratio", "padding", "interpolation")
        colors = ("auto_augment", "color_jitter", "mean", "std")
        yield config.data, "data.", (*crops, *colors), "data.kind=events"
    else:
        yield config.data, "data.", ("roll",), "data.kind=images"
        if config.data.crop == "padded":
            yield config.data, "data.", ("scale", "ratio"), "data.crop=padded"
        else:
            yield config.data, "data.", ("padding",), "data.crop=resized"
    for i, phase in enumerate(config.phases):
        if config.data.kind == "events":
            sizes = ("image_size", "final_image_size")
            yield phase, f"phases.{i}.", sizes, "data.kind=events"
        prefix = f"phases.{i}.optimizer."
        if phase.optimizer.kind == "sgd":
            yield phase.optimizer, prefix, ("betas",), "kind=sgd"
        else:
            names = ("momentum", "nesterov")
            yield phase.optimizer, prefix, names, f"kind={phase.optimizer.kind}"
        if phase.optimizer.weight_decay == 0:
            yield phase.optimizer, prefix, ("decay_norms",), "weight_decay=0"
    if not config.tracking.mlflow:
        of_mlflow = ("uri", "experiment", "log_checkpoint", "register_")
        yield config.tracking, "tracking.", of_mlflow, "tracking.mlflow=false"
