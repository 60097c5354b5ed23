"""Contradictions between keys of sections that know nothing of each other.

Each section refuses its own (as `WrongValue`, which names the key). `check` imports what registers
networks, losses and optimisers, which takes seconds, so a command checks the rest before.
"""

from tetdist.config.fields import within
from tetdist.config.schema import RunConfig
from tetdist.config.sections.loss import LossSection
from tetdist.config.sections.phase import schedule_epochs
from tetdist.errors import WrongValue


def check_early(config: RunConfig, *, only_used: bool) -> None:
    """Refuse what shows without the network, the losses and the optimisers; see `check`."""
    if not only_used:
        for loss in config.losses():
            with within("loss"):
                loss.check_kind()
    if config.cuda_graphs and config.batch_norm.sync:
        raise WrongValue(
            "cuda_graphs",
            "cannot go with batch_norm.sync=true, whose averages over processes are not captured; "
            "set one of them to false",
        )
    if config.device == "cpu" and not only_used:
        check_gpu(config)
    data, batch = config.data, config.batch
    if data.repeats > batch.global_:
        most = f"is above batch.global, {batch.global_}; 3 is usual"
        raise WrongValue("data.repeats", most, data.repeats)
    if (data.mixup or data.cutmix) and batch.micro == 1:
        alone = "leaves data.mixup and data.cutmix without a partner; set 2 or more"
        raise WrongValue("batch.micro", alone, 1)
    frames = data.images_as_events.timesteps if data.images_as_events else None
    for number, phase in enumerate(config.phases):
        if frames is not None and phase.most_timesteps > frames:
            most = f"exceeds the {frames} frames of data.images_as_events; set {frames} or less"
            raise WrongValue(f"phases.{number}.timesteps", most, phase.most_timesteps)


def check_gpu(config: RunConfig) -> None:
    """Refuse what a run on the CPU cannot do."""
    needs = "needs a GPU; set device=cuda, or {}"
    if config.precision in ("fp16", "tf32"):
        raise WrongValue("precision", needs.format("precision=bf16 or fp32"), config.precision)
    if config.cuda_graphs:
        raise WrongValue("cuda_graphs", needs.format("cuda_graphs=false"), "true")
    if config.data.device == "gpu":
        raise WrongValue("data.device", needs.format("data.device=cpu"), "gpu")


def check(config: RunConfig, *, only_used: bool) -> None:
    """Refuse contradictions between keys that are each fine on their own.

    The loss of a network that is trained does not matter: its file need not be imported.
    """
    if not only_used:
        _check_loss(config, "loss", config.loss)
    for number, phase in enumerate(config.phases):
        if phase.loss.model_fields_set and not only_used:
            _check_loss(config, f"phases.{number}.loss", config.loss_of(phase))
        _check_phase(config, number)
    with within("model"):
        config.model.check_arguments()
    _check_input(config)


def _check_loss(config: RunConfig, key: str, loss: LossSection) -> None:
    with within(key):
        loss.check_arguments()
    if loss.operations and config.model.neuron.levels is None:
        what = "needs spikes, and the neurons that model.neuron names send real numbers; set 0"
        raise WrongValue(f"{key}.operations", what, loss.operations)
    distillation = loss.distillation
    for name in ("teacher", "teacher_weights"):
        if getattr(distillation, name) != getattr(config.loss.distillation, name):
            raise WrongValue(
                f"{key}.distillation.{name}",
                f"a run has one teacher; set loss.distillation.{name}, and distillation.weight=0 "
                "in the loss of phases without it",
            )
    needs_labels = {}  # by key, the value that needs none
    is_taught = distillation.teacher is not None and distillation.weight
    if is_taught and distillation.teacher_alignment != "plain":
        needs_labels["teacher_alignment"] = "plain"
    if distillation.self_weight and distillation.self_target == "correct_mean":
        needs_labels["self_target"] = "time_mean"
    for name, other in needs_labels.items():
        if config.data.mixup or config.data.cutmix:
            raise WrongValue(
                f"{key}.distillation.{name}",
                "needs samples of one class, and mixed samples have two; set data.mixup=0 and "
                f"data.cutmix=0, or {name}={other}",
                getattr(distillation, name),
            )


def _check_phase(config: RunConfig, number: int) -> None:
    from tetdist.optimizers import kind_of

    phase, place, neuron = config.phases[number], f"phases.{number}", config.model.neuron
    if reason := next(filter(None, map(neuron.refusal, phase.choices)), None):
        trained = getattr(neuron, "timesteps", None)
        only = f"; set {place}.timesteps={trained}, or model.neuron.timesteps to its only T"
        raise WrongValue(f"{place}.timesteps", f"{reason}{only if trained else ''}")
    optimizer = config.optimizer_of(number)
    with within(f"{place}.optimizer"):
        optimizer.check_arguments()
    stages = kind_of(optimizer.kind).zero_stages
    if config.zero_stage not in stages:
        raise WrongValue(
            "zero_stage",
            f"does not suit {place}.optimizer.kind={optimizer.kind}, which needs whole parameters; "
            f"set zero_stage to {', '.join(map(str, stages))}",
            config.zero_stage,
        )
    if phase.optimizer == "continue":
        return
    with within(place):
        peak = optimizer.peak_lr(config.batch.global_)
        phase.check_schedule(schedule_epochs(config.phases, number), peak)


def _check_input(config: RunConfig) -> None:
    from tetdist import models

    data, name = config.data, config.model.name
    kind = models.input_kind(name)
    if kind not in (None, data.input_kind) and not models.takes_both(name):
        key = "kind" if data.images_as_events is None else "images_as_events"
        convert = ", or convert images by data.images_as_events={}" if kind == "events" else ""
        raise WrongValue(
            f"data.{key}",
            f"model.name={name} takes {kind}, not {data.input_kind}; choose another model or "
            f"other data{convert}",
        )
