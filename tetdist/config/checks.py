"""Contradictions between keys that are each fine on their own, and keys that have no effect."""

import difflib
import logging
import re
from collections.abc import Collection, Iterator, Sequence
from typing import Any, assert_never

from tetdist.config.fields import TIMM
from tetdist.config.identity import flatten
from tetdist.config.schema import RunConfig, phase_image_sizes
from tetdist.config.sections.data import DataSection
from tetdist.config.sections.phase import PhaseSection
from tetdist.errors import UserError
from tetdist.losses import LOSSES
from tetdist.optimizers import kind_of
from tetdist.wording import counted

logger = logging.getLogger(__name__)

MOST_PROFILED = 100  # steps


def check(config: RunConfig) -> None:
    """Refuse contradictions between keys that are each fine on their own."""
    # Runs of earlier versions may have any name that a folder can have, and stay readable.
    if "/" in config.name or config.name in ("", ".", ".."):
        raise UserError(f"name: {config.name!r} cannot name a folder; use letters, digits, . _ -")
    batch = config.batch
    if batch.global_ % batch.micro:
        raise UserError(
            f"batch.global: {batch.global_} is not a multiple of batch.micro, {batch.micro}; "
            f"set it to {batch.global_ // batch.micro * batch.micro or batch.micro}, for instance"
        )
    if config.data.repeats > batch.global_:
        raise UserError(
            f"data.repeats: {config.data.repeats} must not be above batch.global, {batch.global_}; "
            "3 is usual"
        )
    _check_model(config)
    _check_kinds(config)
    data = config.data
    if data.scale[0] > data.scale[1] or data.scale[1] == 0:
        raise UserError(f"data.scale: {list(data.scale)} must be [SMALLEST, LARGEST above 0]")
    if not 0 < data.ratio[0] <= data.ratio[1]:
        raise UserError(f"data.ratio: {list(data.ratio)} must be [SMALLEST, LARGEST], both above 0")
    if min(data.std) <= 0:
        raise UserError(f"data.std: {list(data.std)} must be above 0")
    if data.resize is not None and data.resize < data.image_size:
        raise UserError(
            f"data.resize: {data.resize} is smaller than data.image_size, {data.image_size}, "
            "so the centre crop would not fit; set it to the image size or more"
        )
    _check_augmentation(config)
    _check_precision_and_engine(config)
    _check_cuda_graphs(config)
    _check_distillation(config)
    _check_profile(config)
    trackers = config.tracking.trackers
    if twice := [name for name in trackers if trackers.count(name) > 1]:
        raise UserError(f"tracking.trackers: {twice[0]} is listed twice; leave out one")
    if config.tracking.register_ is not None and config.tracking.log_checkpoint == "none":
        raise UserError(
            f"tracking.register: {config.tracking.register_!r} needs a checkpoint in MLflow; "
            "set tracking.log_checkpoint=best or last, too"
        )
    if config.start_phase >= len(config.phases):
        raise UserError(
            f"start_phase: {config.start_phase} must be one of 0 to {len(config.phases) - 1}"
        )
    if config.start_phase and config.init_checkpoint is None:
        raise UserError(
            f"start_phase: {config.start_phase} skips the phases before it; set init_checkpoint to "
            "the checkpoint of a run that trained them"
        )
    for i, phase in enumerate(config.phases):
        if phase.warmup_epochs + phase.cooldown_epochs >= phase.epochs:
            both = " and cooldown_epochs" if phase.cooldown_epochs else ""
            raise UserError(
                f"phases.{i}.warmup_epochs{both}: {phase.warmup_epochs + phase.cooldown_epochs:g} "
                f"must be below the phase's {counted(phase.epochs, 'epoch')}"
            )
        own = {"lr", "weight_decay", *kind_of(phase.optimizer.kind).reads}
        for key in phase.optimizer.arguments.keys() & own:
            raise UserError(
                f"phases.{i}.optimizer.arguments.{key}: set phases.{i}.optimizer.{key} instead"
            )
        peak = phase.optimizer.peak_lr(config.batch.global_)
        for key, value in (("warmup_lr", phase.warmup_lr), ("min_lr", phase.min_lr)):
            if value > peak:
                raise UserError(
                    f"phases.{i}.{key}: {value:g} must not be above the peak of the learning rate, "
                    f"{peak:g}"
                )


def check_name(config: RunConfig) -> None:
    """Refuse the name of a new run that a shell or Slurm would take for something else."""
    is_sound = re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", config.name)
    if not is_sound and not config.run_dir.is_dir():
        raise UserError(
            f"name: {config.name!r} must consist of letters (A to Z), digits and . _ -, and must "
            "not begin with . or -; choose another name=..."
        )


def _check_model(config: RunConfig) -> None:
    from tetdist import models

    name, known = config.model.name, models.names()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"
        raise UserError(
            f"model.name: {name!r} is not a spiking model; {hint} (for a model of your own, add "
            "its file: imports: [FILE.py], or --import FILE.py)"
        )
    allowed = models.arguments_of(name)
    for key in config.model.arguments:
        if key in ("num_classes", "neuron", "timesteps"):
            own = "phases.N.timesteps" if key == "timesteps" else f"model.{key}"
            raise UserError(f"model.arguments.{key}: set {own} instead")
        if allowed is not None and key not in allowed:
            close = difflib.get_close_matches(key, allowed, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(allowed)}"
            raise UserError(f"model.arguments.{key}: {name} has no such argument; {hint}")
    for i, phase in enumerate(config.phases):
        if (reason := config.model.neuron.refusal(phase.timesteps)) is not None:
            raise UserError(f"phases.{i}.timesteps: {reason}")
    kind = models.input_kind(name)
    if kind not in (None, config.data.kind):
        raise UserError(
            f"data.kind: model.name={name} takes {kind}, not {config.data.kind}; choose another "
            "model, or other data"
        )


def _check_kinds(config: RunConfig) -> None:
    """Refuse unknown losses and optimisers, and settings that do not suit them."""
    loss = LOSSES[config.loss.kind]
    own = [name for name in loss.arguments if name not in ("lambda_", "phi", "label_smoothing")]
    for key in config.loss.arguments:
        if key not in own:
            known = ", ".join(own) or "none"
            raise UserError(
                f"loss.arguments.{key}: loss.kind={config.loss.kind} has no such argument; known: "
                f"{known}"
            )
    if config.loss.distillation.self_weight and loss.of_time_mean:
        raise UserError(
            "loss.distillation.self_weight: timesteps cannot learn from their mean, because "
            f"loss.kind={config.loss.kind} sees only that; set loss.kind=tet, or self_weight=0"
        )
    for i, phase in enumerate(config.phases):
        kind = kind_of(phase.optimizer.kind, f"phases.{i}.optimizer.kind")
        if config.zero_stage not in kind.zero_stages:
            stages = ", ".join(map(str, kind.zero_stages))
            raise UserError(
                f"zero_stage: {config.zero_stage} does not suit phases.{i}.optimizer.kind="
                f"{phase.optimizer.kind}, which needs whole parameters; set zero_stage to {stages}"
            )


def _check_augmentation(config: RunConfig) -> None:
    data = config.data
    smallest = min(size for phase in config.phases for size in phase_image_sizes(config, phase))
    if data.crop == "padded" and data.padding >= smallest:
        raise UserError(
            f"data.padding: {data.padding} must be below the image size, {smallest}, or a crop "
            "could be all border"
        )
    if data.auto_augment.startswith("rand") and any(dict(data.color_jitter).values()):
        raise UserError(
            f"data.color_jitter: cannot go with data.auto_augment={data.auto_augment}, which "
            "changes colours itself (timm drops the jitter then); leave one of them out"
        )
    if (data.mixup or data.cutmix) and config.batch.micro == 1:
        raise UserError(
            "batch.micro: 1 leaves data.mixup and data.cutmix without a partner; set 2 or more"
        )


def _check_precision_and_engine(config: RunConfig) -> None:
    if config.precision == "fp64" and config.engine != "torch":
        raise UserError("precision: DeepSpeed does not train in fp64; set engine=torch, too")
    if config.zero_stage and config.engine != "deepspeed":
        raise UserError(
            f"zero_stage: {config.zero_stage} needs DeepSpeed; set engine=deepspeed or zero_stage=0"
        )
    if config.zero_stage and config.precision == "fp16":
        raise UserError(
            "precision: fp16 needs zero_stage=0 (DeepSpeed never lowers its loss scale at stages 1 "
            "and 2); set zero_stage=0, or precision=bf16, which works with all stages"
        )
    if config.zero_stage and config.gradient_clipping is not None and config.clip_mode != "norm":
        raise UserError(
            f"clip_mode: {config.clip_mode} needs zero_stage=0 (no process has the whole gradient "
            "at stages 1 and 2, where DeepSpeed clips by the norm); set that, or clip_mode=norm"
        )


def _check_cuda_graphs(config: RunConfig) -> None:
    if not config.cuda_graphs:
        return
    if config.engine != "torch":
        raise UserError(
            f"cuda_graphs=true needs engine=torch: engine={config.engine} does work on the host in "
            "each micro-batch, which a graph cannot repeat; set engine=torch, or cuda_graphs=false"
        )
    if config.batch_norm.sync:
        raise UserError(
            "cuda_graphs=true cannot go with batch_norm.sync=true, whose averages over processes "
            "are not captured; set one of them to false"
        )
    if config.model.neuron.at_epoch(0) != config.model.neuron:
        raise UserError(
            "cuda_graphs=true cannot go with model.neuron.mask_epochs, which changes neurons every "
            "epoch, while a graph repeats the captured ones; set cuda_graphs=false"
        )
    if config.device == "cpu":
        raise UserError(
            "cuda_graphs=true needs a GPU, but device=cpu; remove it or set device=cuda"
        )


def _check_profile(config: RunConfig) -> None:
    if config.profile is None:
        return
    first, last = config.profile.steps
    if first > last:
        raise UserError(f"profile.steps: [{first}, {last}] must be [FIRST, LAST], in this order")
    if last - first >= MOST_PROFILED:
        raise UserError(
            f"profile.steps: {last - first + 1:,} steps make a trace too large to open; choose at "
            f"most {MOST_PROFILED}"
        )
    if config.max_steps is not None and first > config.max_steps:
        raise UserError(
            f"profile.steps: step {first} is after the run's last, max_steps={config.max_steps}; "
            "choose earlier ones"
        )
    if config.cuda_graphs:
        raise UserError(
            "profile: the operations of a CUDA graph have no names; set cuda_graphs=false while "
            "profiling"
        )


def _check_distillation(config: RunConfig) -> None:
    section, key = config.loss.distillation, "loss.distillation"
    if section.teacher_weights and not (section.teacher or "").startswith(TIMM):
        raise UserError(
            f"{key}.teacher_weights: needs a timm teacher; set {key}.teacher=timm:NAME, too, or "
            f"give the file itself as {key}.teacher"
        )
    if not (config.data.mixup or config.data.cutmix):
        return
    needs_labels = {}  # by key, the value that needs none
    if section.teacher is not None and section.weight and section.teacher_alignment != "plain":
        needs_labels["teacher_alignment"] = "plain"
    if section.self_weight and section.self_target == "correct_mean":
        needs_labels["self_target"] = "time_mean"
    for name, other in needs_labels.items():
        raise UserError(
            f"{key}.{name}: {getattr(section, name)} needs samples of one class, and mixed samples "
            "have two; set data.mixup=0 and data.cutmix=0, or "
            f"{key}.{name}={other}"
        )


def effective(config: RunConfig) -> dict[str, Any]:
    """Return the configuration by dotted key, without keys that have no effect."""
    unread = [key for key, *_ in without_effect(config)]
    return {
        key: value
        for key, value in flatten(config.as_dict()).items()
        if not any(key == other or key.startswith(f"{other}.") for other in unread)
    }


def warn_without_effect(config: RunConfig, inherited: Collection[str]) -> None:
    """Warn of each key without effect that was set, unless a ``base`` has set it."""
    for key, is_set, because in without_effect(config):
        if is_set and not any(one == key or one.startswith(f"{key}.") for one in inherited):
            logger.warning("%s has no effect with %s", key, because)


def without_effect(config: RunConfig) -> Iterator[tuple[str, bool, str]]:
    """Yield each key without effect, whether it was set, and the setting that disables it."""
    for place, names, because in _unread(config):
        section: Any = config
        for part in place.split(".") if place else ():
            section = section[int(part)] if part.isdigit() else getattr(section, part)
        for name in names:
            alias = type(section).model_fields[name].alias or name
            yield f"{place}.{alias}".lstrip("."), name in section.model_fields_set, because


# A section's dotted key, its fields without effect, and the setting that disables them.
_Unread = tuple[str, Sequence[str], str]


def _unread(config: RunConfig) -> Iterator[_Unread]:
    known = LOSSES[config.loss.kind].arguments
    unread = [key for key in ("lambda_", "phi", "label_smoothing") if key not in known]
    yield "loss", unread, f"loss.kind={config.loss.kind}"
    yield from _unread_by_distillation(config)
    match config.data.kind:
        case "events":
            crops = ("image_size", "resize", "crop", "scale", "ratio", "padding", "interpolation")
            colors = ("auto_augment", "color_jitter", "erasing", "mean", "std")
            yield "data", (*crops, *colors), "data.kind=events"
        case "images":
            yield "data", ("roll", "event_augment", "event_drop"), "data.kind=images"
            crop, others = config.data.crop, {"padded": ("scale", "ratio"), "resized": ("padding",)}
            yield "data", others[crop], f"data.crop={crop}"
            if not config.data.erasing.probability:
                yield "data.erasing", ("mode", "count"), "data.erasing.probability=0"
        case other:
            assert_never(other)
    yield from _unread_by_mixing(config.data)
    for i, phase in enumerate(config.phases):
        place, optimizer = f"phases.{i}", phase.optimizer
        if config.data.kind == "events":
            yield place, ("image_size", "final_image_size"), "data.kind=events"
        yield place, _unread_by_schedule(phase), f"schedule={phase.schedule}"
        if not phase.warmup_epochs:
            yield place, ("warmup_lr", "clock_after_warmup"), f"{place}.warmup_epochs=0"
        read = kind_of(optimizer.kind).reads
        names = ("momentum", "nesterov", "betas", "arguments")
        unread = [name for name in names if name not in read]
        yield f"{place}.optimizer", unread, f"kind={optimizer.kind}"
        if optimizer.weight_decay == 0:
            yield f"{place}.optimizer", ("decay_norms", "decay_neurons"), "weight_decay=0"
    if config.ema.decay is None:
        yield "ema", ("warmup",), "ema.decay=null"
    if config.gradient_clipping is None:
        yield "", ("clip_mode",), "gradient_clipping=null"
    if not config.tracking.mlflow:
        # The experiment is wandb's project, too.
        of_both = () if "wandb" in config.tracking.trackers else ("experiment",)
        names = (*of_both, "uri", "log_checkpoint", "register_")
        yield "tracking", names, "tracking.mlflow=false"


def _unread_by_distillation(config: RunConfig) -> Iterator[_Unread]:
    section, place = config.loss.distillation, "loss.distillation"
    # A single timestep is its own target; only correct_mean depends on the label, too.
    alone = section.self_target != "correct_mean" and all(
        phase.timesteps == 1 for phase in config.phases
    )
    if section.teacher is None:
        yield place, ("weight", "teacher_alignment"), f"{place}.teacher=null"
        if not section.self_weight or alone:
            yield place, ("temperature",), "nothing to distil from"
    elif section.weight == 0:
        yield place, ("teacher", "teacher_alignment"), f"{place}.weight=0"
    if not section.self_weight:
        yield place, ("self_target",), f"{place}.self_weight=0"
    elif alone:
        yield place, ("self_weight", "self_target"), "timesteps=1 in every phase"


def _unread_by_mixing(data: DataSection) -> Iterator[_Unread]:
    if not (data.mixup or data.cutmix):
        names = tuple(type(data.mixing).model_fields)
        yield "data.mixing", names, "data.mixup=0 and data.cutmix=0"
    elif not (data.mixup and data.cutmix):
        without = "data.cutmix=0" if data.mixup else "data.mixup=0"
        yield "data.mixing", ("switch_probability",), without


def _unread_by_schedule(phase: PhaseSection) -> tuple[str, ...]:
    others = {
        "constant": ("min_lr", "cooldown_epochs", "clock_after_warmup"),
        "cosine": (),
        "polynomial": (),
        "step": ("cooldown_epochs",),
    }
    of_one = {"power": "polynomial", "decay_epochs": "step", "decay_rate": "step"}
    return others[phase.schedule] + tuple(
        key for key, schedule in of_one.items() if phase.schedule != schedule
    )
