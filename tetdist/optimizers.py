"""Optimisers by name: torch's, timm's, and those of imported files.

A step with a non-finite gradient changes nothing. Torch's fused kernels skip it on the device if
`found_inf` is set, as by torch's GradScaler. For other optimisers the device undoes the step.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from timm.models import group_parameters
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from tetdist.buffers import in_one_buffer
from tetdist.errors import UserError, WrongValue
from tetdist.nn.batch_norm import BatchNorm
from tetdist.plugins import Registry, none_of
from tetdist.wording import meant

Groups = list[dict[str, Any]]
Build = Callable[[Groups, "OptimizerSettings"], torch.optim.Optimizer]
TIMM = "timm:"  # before the name of one of timm's optimisers
# timm's optimisers that do not resume exactly: weights differ after some hundred steps.
NOT_CONTINUED = ("kron",)
# Moments of timm's optimisers that do not keep two; for matrices, if it depends on the shape.
TIMM_MOMENTS = {"adan": 4, "adanw": 4, "lion": 1, "muon": 1}


class OptimizerSettings(Protocol):
    """The section ``optimizer`` of a phase, as far as optimisers read it."""

    kind: str
    lr: float
    layer_decay: float | None
    momentum: float
    nesterov: bool
    betas: tuple[float, float]
    weight_decay: float
    decay_norms: bool
    arguments: dict[str, Any]


@dataclass(frozen=True)
class OptimizerKind:
    """An optimiser that `phases.*.optimizer.kind` may name.

    Attributes:
        build: Makes it from parameter groups (with their weight decay) and the section.
        reads: Keys of the section that it uses, besides kind, lr and weight decay.
        reads_found_inf: True if its step does nothing when `found_inf` is set; otherwise
            `make_optimizer` has the step undone.
        zero_stages: ZeRO stages that it supports. At 1 and 2 it gets flat partitions instead of
            parameters, so it must be elementwise.
        moments: Numbers that it keeps per parameter, to estimate the size of checkpoints.
    """

    build: Build
    reads: tuple[str, ...] = ()
    reads_found_inf: bool = False
    zero_stages: tuple[int, ...] = (0,)
    moments: int = 2


OPTIMIZERS: Registry[OptimizerKind] = Registry("optimiser", "phases.*.optimizer.kind")


def register_optimizer(name: str, **about: Any) -> Callable[[Build], Build]:
    """Make a decorator that enters a function into `OPTIMIZERS`.

    Args:
        name: The optimiser's name in a configuration.
        about: Attributes of `OptimizerKind` that differ from the defaults.
    """

    def enter(build: Build) -> Build:
        OPTIMIZERS.enter(name, OptimizerKind(build, **about), build.__module__)
        return build

    return enter


@register_optimizer(
    "sgd", reads=("momentum", "nesterov"), reads_found_inf=True, zero_stages=(0, 1, 2), moments=1
)
def _sgd(groups: Groups, section: "OptimizerSettings") -> torch.optim.Optimizer:
    momentum, nesterov = section.momentum, section.nesterov
    return torch.optim.SGD(groups, lr=section.lr, momentum=momentum, nesterov=nesterov, fused=True)


@register_optimizer("adam", reads=("betas",), reads_found_inf=True, zero_stages=(0, 1, 2))
def _adam(groups: Groups, section: "OptimizerSettings") -> torch.optim.Optimizer:
    return torch.optim.Adam(groups, lr=section.lr, betas=section.betas, fused=True)


@register_optimizer("adamw", reads=("betas",), reads_found_inf=True, zero_stages=(0, 1, 2))
def _adamw(groups: Groups, section: "OptimizerSettings") -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=section.lr, betas=section.betas, fused=True)


def _of_timm(name: str, key: str) -> OptimizerKind:
    """Describe timm's optimiser of that name.

    Raises:
        UserError: timm has none, or it needs second derivatives or does not resume exactly.
    """
    from timm import optim

    if name not in optim.list_optimizers():
        near = meant(name, optim.list_optimizers(), "see timm.optim.list_optimizers()")
        raise WrongValue(key, f"timm has no optimiser {name!r}; {near}")
    described = optim.get_optimizer_info(name)
    if name in NOT_CONTINUED:
        raise WrongValue(
            key,
            "does not resume exactly: after a stop it trains to other weights (seen with timm "
            "1.0); choose another optimiser",
            f"{TIMM}{name}",
        )
    if described.second_order:
        text = "needs second derivatives (unsupported); use another"
        raise WrongValue(key, text, f"{TIMM}{name}")
    reads: tuple[str, ...] = ("momentum",) if described.has_momentum else ()
    reads += ("betas",) if described.has_betas and described.num_betas == 2 else ()

    def build(groups: Groups, section: "OptimizerSettings") -> torch.optim.Optimizer:
        given = {option: getattr(section, option) for option in reads} | section.arguments
        return optim.create_optimizer_v2(groups, opt=name, lr=section.lr, **given)

    return OptimizerKind(build, (*reads, "arguments"), moments=TIMM_MOMENTS.get(name, 2))


def kind_of(name: str, key: str = OPTIMIZERS.key) -> OptimizerKind:
    """Return the optimiser that a configuration names at ``key``.

    Raises:
        UserError: It does not exist.
    """
    if name.startswith(TIMM):
        return _of_timm(name.removeprefix(TIMM), key)
    if name not in OPTIMIZERS:
        none = none_of("optimiser", name, OPTIMIZERS)
        raise WrongValue(key, f"{none}; timm's are {TIMM}NAME, such as {TIMM}lion")
    return OPTIMIZERS[name]


def make_optimizer(model: nn.Module, section: "OptimizerSettings") -> torch.optim.Optimizer:
    """Make a phase's optimiser of all parameters.

    Neuron parameters have no weight decay; norms and biases have it unless ``decay_norms`` is
    false. With ``layer_decay`` each layer has separate groups, and the
    engines multiply the learning rate by their ``lr_scale``.

    Raises:
        UserError: Its arguments or the model do not suit it.
    """
    kept = set[int]()
    for module in model.modules():
        learned = getattr(module, "learned", None)
        if isinstance(learned, nn.ParameterDict):
            kept |= {id(p) for p in learned.parameters()}
        if section.decay_norms:
            continue
        if isinstance(module, (BatchNorm, nn.GroupNorm, nn.LayerNorm)):
            kept |= {id(p) for p in module.parameters()}
        elif getattr(module, "bias", None) is not None:
            kept.add(id(module.bias))
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not section.decay_norms:
        kept |= {id(p) for p in parameters if p.ndim == 1}  # biases by another name
    groups: Groups = [
        {
            "params": [p for p in parameters if id(p) not in kept],
            "weight_decay": section.weight_decay,
        },
        {"params": [p for p in parameters if id(p) in kept], "weight_decay": 0.0},
    ]
    if section.layer_decay is not None:
        groups = _by_layer(model, groups, section.layer_decay)
    kind = kind_of(section.kind)
    try:
        optimizer = kind.build([group for group in groups if group["params"]], section)
    except (TypeError, ValueError, AssertionError, ImportError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{OPTIMIZERS.key}: {section.kind} cannot be built with arguments {section.arguments} "
            f"({error})"
        ) from error
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise UserError(f"{OPTIMIZERS.key}: {section.kind} returns {optimizer}, not an optimiser")
    scales = ["lr_scale" in group for group in optimizer.param_groups]
    if section.layer_decay is not None and not all(scales):
        raise UserError(
            f"phases.*.optimizer.layer_decay: kind={section.kind} drops lr_scale from parameter "
            "groups; keep it as it is given in each group, or set layer_decay=null"
        )
    if not kind.reads_found_inf:
        cls = type(optimizer)
        optimizer.__class__ = type(cls.__name__, (_SkipsNonFinite, cls), {})
    return optimizer


def layers_of(model: nn.Module) -> dict[str, int]:
    """Return the layer number of each parameter, by its name, counted from the input.

    Layers are timm's, by the model's ``group_matcher``; unmatched parameters are in the last one.

    Raises:
        UserError: The model has no matcher, or it finds only one layer.
    """
    layers: dict[str, int] = {}
    if (matcher := getattr(model, "group_matcher", None)) is not None:
        layers = group_parameters(model, matcher(coarse=False), reverse=True)
    if len(set(layers.values())) < 2:
        raise UserError(
            f"phases.*.optimizer.layer_decay: {type(model).__name__} has no group_matcher that "
            "divides parameters into layers; add one as timm's networks have, or set "
            "layer_decay=null"
        )
    return layers


def _by_layer(model: nn.Module, groups: Groups, layer_decay: float) -> Groups:
    """Divide groups by layers, each with a factor of the learning rate.

    The factor is layer_decay^(layers above it), so 1 for the classifier, as with timm's optimisers
    and in the fine-tuning of ELECTRA (https://arxiv.org/abs/2003.10555) and BEiT.
    """
    layers = layers_of(model)
    layer_of = {id(p): layers[name] for name, p in model.named_parameters()}
    last = max(layers.values())
    return [
        group
        | {
            "params": [p for p in group["params"] if layer_of[id(p)] == layer],
            "lr_scale": layer_decay ** (last - layer),
        }
        for layer in range(last + 1)
        for group in groups
    ]


class _SkipsNonFinite(torch.optim.Optimizer):
    """Skips steps with ``found_inf`` for an optimiser that does not read it.

    On a GPU every step is taken, and the device undoes it in weights and state if ``found_inf`` is
    set. The host holds numbers, too, such as the count of steps. It sets them back before it next
    needs them: by then the device has the next gradient to compute, so it never runs idle.
    """

    # Returns whether the last step was undone; and the state and the groups before it.
    _undone: tuple[Callable[[], bool], tuple[dict[Any, Any], Groups]] | None = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        # Removed because torch's optimisers that do not read these attributes refuse them.
        found_inf = self.__dict__.pop("found_inf", None)
        self.__dict__.pop("grad_scale", None)
        self._set_back()
        is_set = None if found_inf is None else _fetched(found_inf)
        if is_set is None:
            return None if found_inf else super().step(closure)
        weights = [group["params"] for group in self.param_groups]
        groups = [
            {key: value for key, value in group.items() if key not in ("params", "lr")}
            for group in self.param_groups
        ]
        # A step changes single numbers in place, too.
        held = tree_map_only(
            Tensor, lambda x: x if x.ndim else x.clone(), (dict(self.state), groups)
        )
        tensors = [x for x in tree_leaves((weights, held)) if isinstance(x, Tensor) and x.ndim]
        by_type = [[x for x in tensors if x.dtype == dtype] for dtype in {x.dtype for x in tensors}]
        before = [in_one_buffer(same) for same in by_type]
        result = super().step(closure)
        for same, (old, _) in zip(by_type, before, strict=True):
            new, parts = in_one_buffer(same)
            torch.where(found_inf > 0, old, new, out=new)
            torch._foreach_copy_(same, parts)
        self._undone = is_set, held
        return result

    def _set_back(self) -> None:
        """If the last step was undone, restore what the host holds."""
        undone, self._undone = self._undone, None
        if undone is None or not undone[0]():
            return
        state, groups = undone[1]
        self.state.clear()
        self.state.update(state)
        for group, old in zip(self.param_groups, groups, strict=True):
            for key in group.keys() - old.keys() - {"params", "lr"}:
                del group[key]
            group.update(old)

    def state_dict(self) -> dict[str, Any]:
        self._set_back()
        return super().state_dict()


def _fetched(flag: Tensor) -> Callable[[], bool] | None:
    """Begin to copy a flag to the host; return a function that waits for it and returns it.

    None: the host has it.
    """
    if flag.device.type == "cpu":
        return None
    here = torch.empty_like(flag, device="cpu", pin_memory=True)
    here.copy_(flag, non_blocking=True)
    arrived = torch.cuda.Event(blocking=True)
    arrived.record()

    def is_set() -> bool:
        arrived.synchronize()
        return bool(here)

    return is_set
