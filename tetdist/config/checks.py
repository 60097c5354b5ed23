"""Contradictions between keys that are each fine on their own, and keys that have no effect."""

import difflib
import logging
import re
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from tetdist.config.fields import TIMM
from tetdist.config.identity import flatten
from tetdist.config.schema import RunConfig, phase_image_sizes
from tetdist.config.sections.loss import DistillationSection, LossSection
from tetdist.config.sections.phase import schedule_epochs
from tetdist.errors import UserError
from tetdist.losses import LOSSES
from tetdist.optimizers import OPTIMIZERS, kind_of
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
    _check_start(config)
    _check_kinds(config)
    data = config.data
    if data.scale[0] > data.scale[1] or data.scale[1] == 0:
        raise UserError(f"data.scale: {list(data.scale)} must ascend and end above 0")
    if not 0 < data.ratio[0] <= data.ratio[1]:
        raise UserError(f"data.ratio: {list(data.ratio)} must ascend, with both values above 0")
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
    _check_profile(config)
    trackers = config.tracking.trackers
    if twice := [name for name in trackers if trackers.count(name) > 1]:
        raise UserError(f"tracking.trackers: {twice[0]} is listed twice; leave out one")
    if config.tracking.register_ is not None and config.tracking.log_checkpoint == "none":
        raise UserError(
            f"tracking.register: {config.tracking.register_!r} needs a checkpoint in MLflow; "
            "set tracking.log_checkpoint=best or last, too"
        )
    for i, phase in enumerate(config.phases):
        if phase.optimizer == "continue":
            continue
        epochs = schedule_epochs(config.phases, i)
        if phase.warmup_epochs + phase.cooldown_epochs >= epochs:
            both = " and cooldown_epochs" if phase.cooldown_epochs else ""
            raise UserError(
                f"phases.{i}.warmup_epochs{both}: {phase.warmup_epochs + phase.cooldown_epochs:g} "
                f"must be below the schedule's {counted(epochs, 'epoch')}"
            )
        optimizer = config.optimizer_of(i)
        own = {"lr", "weight_decay", *kind_of(optimizer.kind).reads}
        for key in optimizer.arguments.keys() & own:
            raise UserError(
                f"phases.{i}.optimizer.arguments.{key}: set phases.{i}.optimizer.{key} instead"
            )
        peak = optimizer.peak_lr(config.batch.global_)
        for key, value in (("warmup_lr", phase.warmup_lr), ("min_lr", phase.min_lr)):
            if value > peak:
                raise UserError(
                    f"phases.{i}.{key}: {value:g} must not be above the peak of the learning rate, "
                    f"{peak:g}"
                )


def _check_start(config: RunConfig) -> None:
    number = config.start_phase
    if number >= len(config.phases):
        last = len(config.phases) - 1
        has = f"phases 0 to {last}" if last else "one phase, number 0"
        raise UserError(f"start_phase={number}: this run has {has}; set start_phase={last}")
    if number and config.init_checkpoint is None:
        raise UserError(
            f"start_phase: {number} skips the phases before it; set init_checkpoint to "
            "the checkpoint of a run that trained them"
        )
    for i in dict.fromkeys((0, number)):
        if config.phases[i].optimizer == "continue":
            raise UserError(
                f"phases.{i}.optimizer: continue needs a phase before it in the same run, whose "
                f"optimiser goes on, and this run begins with phase {i}; give the optimiser itself"
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
        refused = filter(None, map(config.model.neuron.refusal, phase.choices))
        if (reason := next(refused, None)) is not None:
            trained = getattr(config.model.neuron, "timesteps", None)
            one = f"; set phases.{i}.timesteps={trained}, or model.neuron.timesteps to its only T"
            raise UserError(f"phases.{i}.timesteps: {reason}{one if trained else ''}")
    kind = models.input_kind(name)
    if kind not in (None, config.data.kind):
        raise UserError(
            f"data.kind: model.name={name} takes {kind}, not {config.data.kind}; choose another "
            "model, or other data"
        )


def _check_kinds(config: RunConfig) -> None:
    """Refuse unknown losses and optimisers, and settings that do not suit them."""
    losses = {"loss": config.loss} | {
        f"phases.{i}.loss": config.loss_of(phase)
        for i, phase in enumerate(config.phases)
        if phase.loss.model_fields_set
    }
    for key, section in losses.items():
        _check_loss(key, section)
        _check_distillation(config, f"{key}.distillation", section.distillation)
    for i in range(len(config.phases)):
        optimizer = config.optimizer_of(i)
        kind = kind_of(optimizer.kind, f"phases.{i}.optimizer.kind")
        if config.zero_stage not in kind.zero_stages:
            stages = ", ".join(map(str, kind.zero_stages))
            raise UserError(
                f"zero_stage: {config.zero_stage} does not suit phases.{i}.optimizer.kind="
                f"{optimizer.kind}, which needs whole parameters; set zero_stage to {stages}"
            )


def _check_loss(key: str, section: LossSection) -> None:
    loss = LOSSES[section.kind]
    own = [name for name in loss.arguments if name not in ("lambda_", "phi", "label_smoothing")]
    for name in section.arguments:
        if name not in own:
            known = ", ".join(own) or "none"
            raise UserError(
                f"{key}.arguments.{name}: {key}.kind={section.kind} has no such argument; known: "
                f"{known}"
            )
    if section.distillation.self_weight and loss.of_time_mean:
        raise UserError(
            f"{key}.distillation.self_weight: timesteps cannot learn from their mean, because "
            f"{key}.kind={section.kind} sees only that; set {key}.kind=tet, or self_weight=0"
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


def _check_distillation(config: RunConfig, key: str, section: DistillationSection) -> None:
    for name in ("teacher", "teacher_weights"):
        if getattr(section, name) != getattr(config.loss.distillation, name):
            raise UserError(
                f"{key}.{name}: a run has one teacher; set loss.distillation.{name}, and "
                "distillation.weight=0 in the loss of phases without it"
            )
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
        if not any(_is_in(key, other) for other in unread)
    }


def warn_without_effect(config: RunConfig, inherited: Collection[str]) -> None:
    """Warn of each key without effect that was set, unless a ``base`` has set it."""
    for key, is_set, because in without_effect(config):
        if is_set and not any(_is_in(one, key) for one in inherited):
            logger.warning("%s has no effect with %s", key, because)


def _is_in(key: str, section: str) -> bool:
    return key == section or key.startswith(f"{section}.")


_ALONE = "phases.N.timesteps=1 and loss.distillation.self_target=time_mean or similarity"

# A section, its keys without effect, and the setting that disables them. A setting of phases.N
# disables keys of the same phase; other keys only if all phases have it.
_NO_EFFECT = (
    ("loss", "phi", "loss.kind=tet and loss.lambda=0"),
    ("loss.distillation", "weight teacher_alignment", "loss.distillation.teacher=null"),
    ("loss.distillation", "teacher teacher_alignment", "loss.distillation.weight=0"),
    ("loss.distillation", "teacher_weights", "loss.distillation.weight=0"),
    ("loss.distillation", "self_target", "loss.distillation.self_weight=0"),
    *(
        ("loss.distillation", "temperature", f"{off} and loss.distillation.self_weight=0")
        for off in ("loss.distillation.teacher=null", "loss.distillation.weight=0")
    ),
    # A single timestep is its own target; only correct_mean depends on the label, too.
    ("loss.distillation", "self_weight self_target", _ALONE),
    ("loss.distillation", "temperature", f"loss.distillation.teacher=null and {_ALONE}"),
    ("data", "image_size resize crop scale ratio padding interpolation", "data.kind=events"),
    ("data", "auto_augment color_jitter erasing mean std", "data.kind=events"),
    ("phases.N", "image_size final_image_size", "data.kind=events"),
    (
        "phases.N",
        "schedule warmup_epochs warmup_lr min_lr cooldown_epochs lr_changes clock_after_warmup "
        "power decay_epochs decay_rate",
        "phases.N.optimizer=continue",
    ),
    ("data", "roll event_augment event_drop", "data.kind=images"),
    ("data", "scale ratio", "data.crop=padded"),
    ("data", "padding", "data.crop=resized"),
    ("data.erasing", "mode count", "data.erasing.probability=0"),
    ("data.mixing", "mode probability off_epoch", "data.mixup=0 and data.cutmix=0"),
    ("data.mixing", "switch_probability", "data.mixup=0"),
    ("data.mixing", "switch_probability", "data.cutmix=0"),
    ("phases.N", "min_lr clock_after_warmup", "phases.N.schedule=constant"),
    ("phases.N", "cooldown_epochs", "phases.N.schedule=constant or step"),
    ("phases.N", "power", "phases.N.schedule=cosine or constant or step"),
    ("phases.N", "decay_epochs decay_rate", "phases.N.schedule=cosine or constant or polynomial"),
    ("phases.N", "warmup_lr clock_after_warmup", "phases.N.warmup_epochs=0"),
    ("phases.N.optimizer", "decay_norms decay_neurons", "phases.N.optimizer.weight_decay=0"),
    ("ema", "warmup", "ema.decay=null"),
    ("", "clip_mode", "gradient_clipping=null"),
    ("tracking", "uri log_checkpoint register", "tracking.mlflow=false"),
    # The experiment is wandb's project, too.
    ("tracking", "experiment", "tracking.mlflow=false and wandb not in tracking.trackers"),
)


def without_effect(config: RunConfig) -> Iterator[tuple[str, bool, str]]:
    """Yield each key without effect, whether it was set, and the setting that disables it."""
    values, phases = flatten(config.as_dict()), range(len(config.phases))
    losses = [config.loss_of(phase).model_dump(mode="json") for phase in config.phases]
    of_phases = [values | flatten({"loss": loss}) for loss in losses]
    found: dict[str, str] = {}
    for key, setting in _settings([config.optimizer_of(i).kind for i in phases]):
        held = [_held(setting, of_phases[phase], phase) for phase in phases]
        of_loss = "phases.N." + key if key.startswith("loss.") else key
        of_key = {_of_phase(of_loss, i): _of_phase(held[i], i) for i in phases if held[i]}
        if "phases.N." not in key:
            # A phase has only those keys of the loss that it sets.
            of_key = {one: because for one, because in of_key.items() if one in values}
            of_key |= {key: held[0]} if all(held) else {}
        for one, because in of_key.items():
            if not any(_is_in(one, known) for known in found):
                found[one] = because
    for key, because in found.items():
        yield key, _is_set(config, key), because


def settings_without(key: str) -> list[str]:
    """Return the settings with which a key has no effect, as short as its section allows."""
    prefix = key.rpartition(".")[0] + "."
    every = [setting for disabled, setting in _settings() if _is_in(key, disabled)]
    return [setting.replace(prefix, "") if "." in key else setting for setting in every]


def _settings(kinds: Sequence[str] = ()) -> Iterator[tuple[str, str]]:
    """Yield each key with a setting that disables it, also for losses and optimisers (``kinds``:
    more of these)."""
    for name in ("lambda", "phi", "label_smoothing"):
        others = [k for k, loss in LOSSES.items() if not {name, f"{name}_"} & {*loss.arguments}]
        if others:
            yield f"loss.{name}", f"loss.kind={' or '.join(others)}"
    for name in ("momentum", "nesterov", "betas", "arguments"):
        others = [k for k in dict.fromkeys([*OPTIMIZERS, *kinds]) if name not in kind_of(k).reads]
        yield f"phases.N.optimizer.{name}", f"phases.N.optimizer.kind={' or '.join(others)}"
    for section, names, setting in _NO_EFFECT:
        yield from ((f"{section}.{name}".lstrip("."), setting) for name in names.split())


def _held(setting: str, values: dict[str, Any], phase: int) -> str:
    """Return the setting as a phase has it; empty if it has another."""
    held = []
    for part in setting.split(" and "):
        wanted, is_out, owner = part.partition(" not in ")
        if is_out:
            held.append(part if wanted not in values[owner] else "")
            continue
        key, _, choices = part.partition("=")
        value = values.get(_of_phase(key, phase))
        held.append(next((f"{key}={c}" for c in choices.split(" or ") if _parsed(c) == value), ""))
    return " and ".join(held) if all(held) else ""


def _parsed(text: str) -> Any:
    return {"null": None, "false": False, "0": 0, "1": 1}.get(text, text)


def _of_phase(text: str, phase: int) -> str:
    return text.replace("phases.N.", f"phases.{phase}.")


def _is_set(config: RunConfig, key: str) -> bool:
    *place, name = key.split(".")
    section: Any = config
    for part in place:
        section = section[int(part)] if part.isdigit() else getattr(section, part)
    return bool({name, f"{name}_"} & section.model_fields_set)
