"""Contradictions between keys of several sections; sections check their own keys.

What registers names is imported in the functions: `loading.parse` checks other keys before that.
"""

import inspect
import re
import sys
from collections.abc import Iterator

from tetdist import plugins
from tetdist.config import names
from tetdist.config.schema import RunConfig
from tetdist.config.sections.loss import LossSection
from tetdist.config.sections.phase import schedule_epochs
from tetdist.errors import UserError
from tetdist.wording import counted


def check_early(config: RunConfig, *, is_trained: bool = False) -> None:
    """Refuse contradictions that show without the network, and unknown losses; see `check`."""
    losses = () if is_trained else (_of_names_of_losses,)
    for found in (_of_the_run, *losses, _of_the_engine):
        for sentence in found(config):
            raise UserError(sentence)


def check(config: RunConfig, *, is_trained: bool = False) -> None:
    """Refuse contradictions between keys that are each fine on their own.

    The loss of a network that is trained does not matter: its file need not be imported.
    """
    losses = () if is_trained else (_of_losses,)
    for found in (*losses, _of_phases, _of_data, _of_cuda_graphs):
        for sentence in found(config):
            raise UserError(sentence)


def check_name(config: RunConfig) -> None:
    """Refuse the name of a run that a shell or Slurm would take for something else."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", config.name):
        raise UserError(
            f"name: {config.name!r} must consist of letters (A to Z), digits and . _ -, and must "
            "not begin with . or -; choose another name=..."
        )


def _of_the_run(config: RunConfig) -> Iterator[str]:
    number = config.start_phase
    if number >= len(config.phases):
        last = len(config.phases) - 1
        has = f"phases 0 to {last}" if last else "one phase, number 0"
        yield f"start_phase={number}: this run has {has}; set start_phase={last}"
    if number and config.init_checkpoint is None:
        yield (
            f"start_phase: {number} skips the phases before it; set init_checkpoint to the "
            "checkpoint of a run that trained them"
        )
    events = config.data.images_as_events
    for i, most in enumerate(phase.most_timesteps for phase in config.phases):
        if events is not None and most > (n := events.timesteps):
            key = f"phases.{i}.timesteps"
            yield f"{key}: {most} exceeds data.images_as_events' {n} frames; set {key}={n} or less"
    for i in dict.fromkeys((0, number)):
        if config.phases[i].optimizer == "continue":
            yield (
                f"phases.{i}.optimizer: continue needs a phase before it in the same run, whose "
                f"optimiser goes on, and this run begins with phase {i}; give the optimiser itself"
            )


def _of_names_of_losses(config: RunConfig) -> Iterator[str]:
    those = f"there are {', '.join(names.LOSSES)}; sdt is the cross-entropy of the mean output"
    for loss in config.losses():
        # The user's files may register others, which `_of_losses` finds.
        if loss.kind not in names.LOSSES and plugins.PACKAGE not in sys.modules:
            yield f"loss.kind: {plugins.none_of('loss', loss.kind, names.LOSSES, those)}"


def _of_phases(config: RunConfig) -> Iterator[str]:
    from tetdist.optimizers import kind_of

    for i, phase in enumerate(config.phases):
        neuron = config.model.neuron
        if (reason := next(filter(None, map(neuron.refusal, phase.choices)), None)) is not None:
            trained = getattr(neuron, "timesteps", None)
            one = f"; set phases.{i}.timesteps={trained}, or model.neuron.timesteps to its only T"
            yield f"phases.{i}.timesteps: {reason}{one if trained else ''}"
        optimizer = config.optimizer_of(i)
        stages = kind_of(optimizer.kind).zero_stages
        if config.zero_stage not in stages:
            yield (
                f"zero_stage: {config.zero_stage} does not suit phases.{i}.optimizer.kind="
                f"{optimizer.kind}, which needs whole parameters; set zero_stage to "
                f"{', '.join(map(str, stages))}"
            )
        if phase.optimizer == "continue":
            continue
        epochs, outside = schedule_epochs(config.phases, i), phase.warmup_epochs
        outside += phase.cooldown_epochs
        if outside >= epochs:
            both = " and cooldown_epochs" if phase.cooldown_epochs else ""
            yield (
                f"phases.{i}.warmup_epochs{both}: {outside:g} must be below the schedule's "
                f"{counted(epochs, 'epoch')}"
            )
        peak = optimizer.peak_lr(config.batch.global_)
        for key, value in (("warmup_lr", phase.warmup_lr), ("min_lr", phase.min_lr)):
            if value > peak:
                yield (
                    f"phases.{i}.{key}: {value:g} must not be above the peak of the learning rate, "
                    f"{peak:g}"
                )


def _of_losses(config: RunConfig) -> Iterator[str]:
    yield from _of_loss(config, "loss", config.loss)
    for i, phase in enumerate(config.phases):
        if phase.loss.model_fields_set:
            yield from _of_loss(config, f"phases.{i}.loss", config.loss_of(phase))


def _of_loss(config: RunConfig, key: str, section: LossSection) -> Iterator[str]:
    from tetdist.losses import LOSSES

    loss, distillation = LOSSES[section.kind], section.distillation
    own = [name for name in loss.arguments if name not in ("lambda_", "phi", "label_smoothing")]
    for name in section.arguments:
        if name not in own:
            yield (
                f"{key}.arguments.{name}: {key}.kind={section.kind} has no such argument; known: "
                f"{', '.join(own) or 'none'}"
            )
    known = ({*loss.arguments} - {*own}) | section.arguments.keys()
    try:
        inspect.signature(loss.function).bind(None, None, **dict.fromkeys(known))
    except TypeError as error:
        taken = ", ".join(["logits", "targets", *sorted(known)])
        yield (
            f"{key}.kind: {section.kind} must take ({taken}), but: {error}; set any other "
            f"parameter in {key}.arguments"
        )
    if distillation.self_weight and loss.of_time_mean:
        yield (
            f"{key}.distillation.self_weight: timesteps cannot learn from their mean, because "
            f"{key}.kind={section.kind} sees only that; set {key}.kind=tet, or self_weight=0"
        )
    for name in ("teacher", "teacher_weights"):
        if getattr(distillation, name) != getattr(config.loss.distillation, name):
            yield (
                f"{key}.distillation.{name}: a run has one teacher; set loss.distillation.{name}, "
                "and distillation.weight=0 in the loss of phases without it"
            )
    if not (config.data.mixup or config.data.cutmix):
        return
    needs_labels = {}  # by key, the value that needs none
    is_taught = distillation.teacher is not None and distillation.weight
    if is_taught and distillation.teacher_alignment != "plain":
        needs_labels["teacher_alignment"] = "plain"
    if distillation.self_weight and distillation.self_target == "correct_mean":
        needs_labels["self_target"] = "time_mean"
    for name, other in needs_labels.items():
        yield (
            f"{key}.distillation.{name}: {getattr(distillation, name)} needs samples of one class, "
            "and mixed samples have two; set data.mixup=0 and data.cutmix=0, or "
            f"{key}.distillation.{name}={other}"
        )


def _of_data(config: RunConfig) -> Iterator[str]:
    from tetdist import models

    data, batch = config.data, config.batch
    kind, name = models.input_kind(config.model.name), config.model.name
    if kind not in (None, data.input_kind) and not models.takes_both(name):
        key = "kind" if data.images_as_events is None else "images_as_events"
        convert = ", or convert images by data.images_as_events={}" if kind == "events" else ""
        yield (
            f"data.{key}: model.name={name} takes {kind}, not {data.input_kind}; choose another "
            f"model or other data{convert}"
        )
    if data.repeats > batch.global_:
        yield (
            f"data.repeats: {data.repeats} must not be above batch.global, {batch.global_}; 3 is "
            "usual"
        )
    if (data.mixup or data.cutmix) and batch.micro == 1:
        yield "batch.micro: 1 leaves data.mixup and data.cutmix without a partner; set 2 or more"


def _of_the_engine(config: RunConfig) -> Iterator[str]:
    if config.precision == "fp64" and config.engine != "torch":
        yield "precision: DeepSpeed does not train in fp64; set engine=torch, too"
    if config.zero_stage and config.engine != "deepspeed":
        yield (
            f"zero_stage: {config.zero_stage} needs DeepSpeed; set engine=deepspeed or zero_stage=0"
        )
    if config.zero_stage and config.precision == "fp16":
        yield (
            "precision: fp16 needs zero_stage=0 (DeepSpeed never lowers its loss scale at stages 1 "
            "and 2); set zero_stage=0, or precision=bf16, which works with all stages"
        )


def _of_cuda_graphs(config: RunConfig) -> Iterator[str]:
    if not config.cuda_graphs:
        return
    if config.engine != "torch":
        yield (
            f"cuda_graphs=true needs engine=torch: engine={config.engine} does work on the host in "
            "each micro-batch, which a graph cannot repeat; set engine=torch, or cuda_graphs=false"
        )
    if config.batch_norm.sync:
        yield (
            "cuda_graphs=true cannot go with batch_norm.sync=true, whose averages over processes "
            "are not captured; set one of them to false"
        )
