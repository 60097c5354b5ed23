"""Training of spikingjelly's networks: `adopt` wraps one in multi-step mode.

    @register_model
    def sj_sew18(pretrained=False, *, num_classes, timesteps, neuron=None):
        net = sew_resnet.sew_resnet18(
            num_classes=num_classes, cnf="ADD", spiking_neuron=LIFNode, detach_reset=True
        )
        functional.set_step_mode(net, "m")
        return adopt(net, timesteps=timesteps, num_classes=num_classes)

The network keeps the library's neurons, backends, surrogates and random numbers. tetdist changes
three things. It resets the library's state before every forward pass. It replaces batch norms by
`BatchNorm`, with the same parameters and buffers, so that running statistics move once per step, by
all micro-batches of all processes. And for activation checkpointing it runs parts again in the
backward pass (`_Parts`). Unsupported modules are refused with their name and the reason.

The state has the keys of the library's network, without ``num_batches_tracked``: load a run's
model.safetensors into that network by ``load_state_dict``.

Nothing else in tetdist imports this module, which needs the package spikingjelly.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypeGuard

import torch
from spikingjelly.activation_based import base, encoding, functional, layer, neuron, rnn
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.utils.checkpoint import checkpoint

from tetdist.errors import UserError
from tetdist.models.base import SpikingNetwork
from tetdist.models.separate import trace
from tetdist.models.streaming import Stream
from tetdist.nn import batch_norm
from tetdist.nn.batch_norm import BatchNorm


class Adopted(SpikingNetwork):
    """A spikingjelly network for tetdist's trainer and tools, made by `adopt`.

    Its first training pass checks what only a run shows.

    Args:
        net: Network that maps a sequence (T, B, C, H, W) to logits (T, B, K), in step mode "m". It
            is modified: its batch norms are replaced, and it must no longer be run on its own.
        input_kind: ``images``, each shown T times, or ``events``.

    Raises:
        UserError: Some module cannot be adopted; the text names it and says what to do.
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        timesteps: int,
        num_classes: int,
        input_kind: Literal["images", "events"] = "images",
    ) -> None:
        super().__init__(num_classes, timesteps)
        self.input_kind = input_kind
        _refuse(net)
        self.net = _with_own_norms(net)
        functional.invalidate_reset_cache(self.net)
        self._parts = _Parts(self.net)
        self._examined = False
        for module in self.net.modules():
            if _fires(module):
                module.fires_spikes = True  # type: ignore[assignment]  # see firing_layers
        self.register_state_dict_post_hook(_without_prefix)
        self.register_load_state_dict_pre_hook(_with_prefix)
        self.set_timesteps(timesteps)

    def set_timesteps(self, timesteps: int) -> None:
        """Change T.

        Raises:
            ValueError: T is below 1, or differs from the T of neurons with weights for each
                timestep.
        """
        super().set_timesteps(timesteps)
        for name, module in self.named_modules():
            if isinstance(module, neuron.MaskedPSN) and timesteps != module.T:
                name = name.removeprefix("net.")
                raise UserError(
                    f"{name} (MaskedPSN) is built for T={module.T} and cannot run {timesteps} "
                    "timesteps; use SlidingPSN, which runs any number"
                )

    def set_segment(self, timesteps: int | None) -> None:
        """Refuse to train in segments."""
        if timesteps is not None:
            raise UserError(
                f"recompute: a spikingjelly network cannot run in segments of {timesteps} "
                "timesteps; set recompute=blocks"
            )

    def stream(self) -> Stream:
        """Refuse to run one timestep at a time."""
        raise UserError(
            "a network of spikingjelly keeps its membranes in its own modules; run it by "
            'functional.set_step_mode(model.net, "s") and functional.reset_net(model.net)'
        )

    def get_classifier(self) -> nn.Module:
        raise UserError("an adopted network's classifier is unknown; find it in its net")

    # The next two have the arguments of timm and of the base class.
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:  # noqa: ARG002  # see above
        raise UserError("an adopted network's number of classes is set where it is built")

    def forward_features(self, x: Tensor) -> Tensor:  # noqa: ARG002  # see above
        raise UserError("an adopted network runs as a whole and returns no features")

    def forward(self, x: Tensor, per_timestep: bool = False) -> Tensor:
        """Return logits: their mean over time, (B, K), or those of each timestep, (T, B, K).

        Raises:
            ValueError: The input has a wrong shape, or fewer than T time bins.
            UserError: The output is not (T, B, K); or, in the first training pass, the logits
                depend on later inputs, or the network changes a buffer.
        """
        sequence = self.time_first(x)
        if self.input_kind == "images":
            # Copy once, in the convolutions' memory layout.
            sequence = torch.cat([sequence[0]] * self.timesteps).unflatten(0, (self.timesteps, -1))
        if self.training and not self._examined:
            functional.reset_net(self.net)
            _examine(self.net, sequence)
            logits = self._run_watched(sequence)
            # T = 1 cannot show a dependence on later inputs.
            self._examined = self.timesteps > 1
        else:
            logits = self._run_net(sequence)
        return logits if per_timestep else logits.mean(0)

    def _run_net(self, sequence: Tensor) -> Tensor:
        functional.reset_net(self.net)
        recompute = self.grad_checkpointing and self.training and torch.is_grad_enabled()
        with self._parts.recomputed() if recompute else contextlib.nullcontext():
            logits = self.net(sequence)
        wanted = (*sequence.shape[:2], self.num_classes)
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        if found != wanted:
            raise UserError(
                f"{type(self.net).__name__} returns {found} instead of logits (T, B, K) = "
                f"{wanted}; adopt it without its mean or decoding over time, and with K classes"
            )
        return logits

    def _run_watched(self, sequence: Tensor) -> Tensor:
        """Run the network in training and check that it changes no buffer."""
        own = {id(b) for m in self.net.modules() if isinstance(m, BatchNorm) for b in m.buffers()}
        before = {
            name: (buffer, buffer.clone())
            for name, buffer in self.net.named_buffers()
            if id(buffer) not in own
        }
        logits = self._run_net(sequence)
        after = dict(self.net.named_buffers())
        for name, (buffer, value) in before.items():
            if after.get(name) is not buffer or not torch.equal(buffer, value):
                raise UserError(
                    f"the forward pass changes the buffer {name}, which would differ between "
                    "processes; replace that module, or make the buffer a memory "
                    "(register_memory) that is reset"
                )
        return logits


adopt = Adopted


# --- batch norms ----------------------------------------------------------------------------------


class AdoptedBatchNorm(BatchNorm):
    """`BatchNorm` for the input shapes of a batch norm of the library or of torch.

    Args:
        norm: The norm to replace; its parameters and running statistics are kept.
    """

    def __init__(self, norm: _BatchNorm) -> None:
        assert norm.momentum is not None
        assert norm.running_mean is not None
        assert norm.running_var is not None
        super().__init__(norm.num_features, eps=norm.eps, momentum=norm.momentum)
        self.to(norm.weight.device, norm.weight.dtype)
        self.weight, self.bias = norm.weight, norm.bias
        self.running_mean, self.running_var = norm.running_mean, norm.running_var
        self.train(norm.training)
        # In single-step mode, and for torch's norms, time is folded into the batch.
        self.folded = getattr(norm, "step_mode", "s") == "s"
        self.dimensions = _DIMENSIONS[type(norm)]

    def forward(self, current: Tensor, copies: int = 1) -> Tensor:
        """Normalise (T, B, C, ...), or (N, C, ...) in single-step mode; for ``copies`` see
        `BatchNorm`."""
        x = current if self.folded else current.flatten(0, 1)
        if x.ndim - 2 not in self.dimensions:
            raise ValueError(f"{self} cannot normalise an input of shape {tuple(current.shape)}")
        if x.ndim != 4:
            x = x.reshape(*x.shape[:2], -1, 1)
        return super().forward(x, copies).reshape(current.shape)


# Possible numbers of dimensions after the channels, by supported norm.
_DIMENSIONS: dict[type[nn.Module], tuple[int, ...]] = {
    nn.BatchNorm1d: (0, 1),
    layer.BatchNorm1d: (0, 1),
    layer.ThresholdDependentBatchNorm1d: (0, 1),
    nn.BatchNorm2d: (2,),
    layer.BatchNorm2d: (2,),
    layer.ThresholdDependentBatchNorm2d: (2,),
    nn.BatchNorm3d: (3,),
    layer.BatchNorm3d: (3,),
    layer.ThresholdDependentBatchNorm3d: (3,),
}


def _is_foreign(norm: nn.Module) -> TypeGuard[_BatchNorm]:
    return isinstance(norm, _BatchNorm) and not isinstance(norm, BatchNorm)


def _with_own_norms(net: nn.Module) -> nn.Module:
    if _is_foreign(net):
        return AdoptedBatchNorm(net)
    own: dict[nn.Module, AdoptedBatchNorm] = {}
    for module in list(net.modules()):
        for name, child in module.named_children():
            if _is_foreign(child):
                own[child] = own.get(child) or AdoptedBatchNorm(child)
                setattr(module, name, own[child])
    return net


def _without_prefix(_module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    for key in [key for key in state if key.startswith(f"{prefix}net.")]:
        state[prefix + key.removeprefix(f"{prefix}net.")] = state.pop(key)


def _with_prefix(_module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for key in [key for key in state if key.startswith(prefix)]:
        state[f"{prefix}net.{key.removeprefix(prefix)}"] = state.pop(key)


# --- what is refused ------------------------------------------------------------------------------

_LOOPS = (
    layer.MultiStepContainer,
    layer.TLastMultiStepContainer,
    layer.TLastSeqToANNContainer,
    layer.ElementWiseRecurrentContainer,
    layer.LinearRecurrentContainer,
)
# Containers whose modules are rightly in single-step mode.
_CONTAINERS = (*_LOOPS, layer.SeqToANNContainer, layer.StepModeContainer)

_AHEAD = "its output at t depends on inputs after t, so it cannot be evaluated at every t"
_ONLINE = "it detaches the membrane at every timestep and needs its own training algorithm"
_NOISE = "it draws random numbers in evaluation, too, so results would not be reproducible"
_OWN_NORM = "it has a batch norm of its own for every timestep, which cannot be accumulated"
_LIF = "take neuron.LIFNode or another of BaseNode's kind"
_NORM = "take layer.BatchNorm2d or layer.ThresholdDependentBatchNorm2d"

# Kinds of modules, the reason for refusing them, and the way out.
_REFUSED: tuple[tuple[tuple[type, ...], str, str], ...] = (
    ((neuron.PSN,), _AHEAD, "take neuron.SlidingPSN, or MaskedPSN with lambda_ = 1"),
    ((layer.TemporalWiseAttention, layer.MultiDimensionalAttention), _AHEAD, "leave it out"),
    ((neuron.MPBNBaseNode, layer.bn._BatchNormThroughTimeBase), _OWN_NORM, f"{_LIF}, and {_NORM}"),
    (
        (layer.bn._TemporalEffectiveBatchNormBase,),
        "it has a factor for every timestep of one T, and T changes from phase to phase",
        _NORM,
    ),
    ((neuron.OTTTLIFNode, neuron.SLTTLIFNode), _ONLINE, _LIF),
    ((layer.OTTTSequential, layer.GradwithTrace), _ONLINE, "take nn.Sequential"),
    (
        (
            neuron.noisy.NoisyBaseNode,
            neuron.noisy.NoisyNonSpikingBaseNode,
            layer.DropConnectLinear,
            encoding.PoissonEncoder,
            encoding.PopSpikeEncoderRandom,
        ),
        _NOISE,
        "take a module without noise, or layer.Dropout",
    ),
    (
        (nn.SyncBatchNorm,),
        "the trainer synchronises batch norm itself",
        f"{_NORM}, and set batch_norm.sync=true",
    ),
)


def _refuse(net: nn.Module) -> None:
    """Raise UserError for the first module that cannot be adopted."""
    for name, module, around in _walk(net, "", ()):
        found = _objection(module, around)
        if found is not None:
            why, way_out = found
            raise UserError(
                f"{name or 'the network'} ({type(module).__name__}) cannot be adopted: {why}; "
                f"{way_out}"
            )


def _walk(
    module: nn.Module, name: str, around: tuple[nn.Module, ...]
) -> Iterator[tuple[str, nn.Module, tuple[nn.Module, ...]]]:
    """Yield modules with their names and the library's containers around them."""
    yield name, module, around
    if isinstance(module, _CONTAINERS):
        around = (*around, module)
    for child_name, child in module.named_children():
        yield from _walk(child, f"{name}.{child_name}" if name else child_name, around)


def _objection(module: nn.Module, around: Sequence[nn.Module]) -> tuple[str, str] | None:
    """Return why a module cannot be adopted, and the way out."""
    for kinds, why, way_out in _REFUSED:
        if isinstance(module, kinds):
            return why, way_out
    if isinstance(module, neuron.MaskedPSN) and float(module.lambda_) < 1:
        return _AHEAD, "set its lambda_ to 1"
    if isinstance(module, (nn.RNNBase, rnn.SpikingRNNBase)) and module.bidirectional:
        return _AHEAD, "build it with bidirectional=False"
    if isinstance(module, _NormBase) and not isinstance(module, BatchNorm):
        return _objection_to_norm(module, around)
    # Containers have no step mode before set_step_mode, and need none.
    if getattr(module, "step_mode", "m") == "s" and not around:
        return "it is in single-step mode", 'call functional.set_step_mode(net, "m") before'
    return None


def _objection_to_norm(norm: _NormBase, around: Sequence[nn.Module]) -> tuple[str, str] | None:
    if not isinstance(norm, _BatchNorm):
        if not norm.track_running_stats:
            return None
        return "its running statistics are not accumulated", "set track_running_stats=False"
    if type(norm) not in _DIMENSIONS:
        return "it is a batch norm that tetdist does not support", _NORM
    if not norm.track_running_stats:
        return "it has no running statistics to evaluate with", "set track_running_stats=True"
    if norm.momentum is None:
        return "its running statistics are an average over all steps", "set momentum=0.1"
    if not norm.affine:
        return "it has no weight and bias", "set affine=True, and requires_grad_(False) for both"
    if getattr(norm, "step_mode", "m") == "s" and not around:
        return "it is in single-step mode", 'call functional.set_step_mode(net, "m") before'
    for container in around:
        if isinstance(container, _LOOPS) or getattr(container, "stateful", False):
            return (
                f"{type(container).__name__} runs it once a timestep, and its statistics are over "
                "all of them",
                "put it into layer.SeqToANNContainer",
            )
    return None


@torch.no_grad()
def _examine(net: nn.Module, sequence: Tensor) -> None:
    """Run one sample twice in evaluation mode to check what types do not show.

    Raises:
        UserError: The output depends on later inputs.
    """
    sample = sequence[:, :1].clone()
    later = sample.clone()
    later[-1] = 1 - later[-1]
    try:
        ours, theirs = (
            trace(copy.deepcopy(net).eval(), x, lambda value: value) for x in (sample, later)
        )
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"{type(net).__name__} cannot run a sequence (T, B, C, H, W), here "
            f"{tuple(sample.shape)}: {reason}; one that loops over time itself cannot be adopted"
        ) from error
    for (name, a), (_, b) in zip(ours, theirs, strict=False):
        timed = a.ndim and len(a) == len(sequence) == len(b)
        if timed and not torch.equal(a[:-1], b[:-1]):
            if not (a.isfinite().all() and b.isfinite().all()):
                return
            raise UserError(
                f"{name} cannot be adopted: {_AHEAD}; replace it by a module that does not look "
                "ahead"
            )


# --- activation checkpointing ---------------------------------------------------------------------


def _fires(module: nn.Module) -> bool:
    """Return whether a module's outputs are spikes."""
    other = (neuron.LIAFNode, neuron.TernaryIFNode, neuron.TernaryLIFNode)
    return hasattr(module, "surrogate_function") and not isinstance(module, other)


def _has_neurons(module: nn.Module) -> bool:
    return any(isinstance(m, base.MemoryModule) or _fires(m) for m in module.modules())


class _Parts:
    """The parts of a network for which only the input is kept.

    Parts are the network's children; a plain Sequential, at any depth, is divided into its own
    children, of which single layers are joined up to the next neuron. Parts without neurons keep
    little besides their input and are not recomputed.
    """

    def __init__(self, net: nn.Module) -> None:
        self.alone: list[nn.Module] = []
        # Sequentials, cut into parts, each with whether it is recomputed.
        self.cut: dict[nn.Sequential, list[tuple[nn.Module, bool]]] = {}
        self._divide(net)

    def _divide(self, module: nn.Module) -> None:
        if _is_sequential(module):
            self.cut[module] = self._cut(module)
            return
        for child in module.children():
            if _is_sequential(child) or isinstance(child, (nn.ModuleList, nn.ModuleDict)):
                self._divide(child)
            elif _has_neurons(child) and child not in self.alone:
                self.alone.append(child)

    def _cut(self, sequential: nn.Sequential) -> list[tuple[nn.Module, bool]]:
        parts: list[tuple[nn.Module, bool]] = []
        joined: list[nn.Module] = []
        for child in sequential:
            if not _has_neurons(child) or isinstance(child, layer.Dropout):
                joined.append(child)
                continue
            if isinstance(child, base.MemoryModule) or _fires(child):
                parts.append((nn.Sequential(*joined, child), True))
            else:
                parts += [(nn.Sequential(*joined), False), (child, not _is_sequential(child))]
                if _is_sequential(child):
                    self._divide(child)
            joined = []
        return [*parts, (nn.Sequential(*joined), False)]

    @contextlib.contextmanager
    def recomputed(self) -> Iterator[None]:
        """Make forward passes keep only the parts' inputs within this context."""
        seen: set[nn.Module] = set()
        with contextlib.ExitStack() as stack:
            for part in self.alone:
                stack.enter_context(_running(part, _recomputed(part, part.forward, seen)))
            for sequential, parts in self.cut.items():
                stack.enter_context(_running(sequential, _chained(parts, seen)))
            yield


def _is_sequential(module: nn.Module) -> TypeGuard[nn.Sequential]:
    """Return whether a module only runs its children one after another."""
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


@contextlib.contextmanager
def _running(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace the module's forward by ``forward`` within this context."""
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def _chained(
    parts: list[tuple[nn.Module, bool]], seen: set[nn.Module]
) -> Callable[[Tensor], Tensor]:
    runs = [_recomputed(part, part, seen) if again else part for part, again in parts]

    def forward(x: Tensor) -> Tensor:
        for run in runs:
            x = run(x)
        return x

    return forward


def _recomputed(
    part: nn.Module, run: Callable[..., Any], seen: set[nn.Module]
) -> Callable[..., Any]:
    """Return ``run``, which runs the part, with recomputation in the backward pass."""
    last = part[-1] if _is_sequential(part) else part

    @contextlib.contextmanager
    def again() -> Iterator[None]:
        functional.reset_net(part)
        with batch_norm.recomputing():
            yield

    def forward(*args: Any, **kwargs: Any) -> Any:
        if last in seen:
            raise UserError(
                f"{type(last).__name__} runs more than once in a forward pass, so recomputation "
                "cannot restore its state; set recompute=none"
            )
        seen.add(last)
        return checkpoint(
            run,
            *args,
            use_reentrant=False,
            context_fn=lambda: (contextlib.nullcontext(), again()),
            **kwargs,
        )

    return forward
