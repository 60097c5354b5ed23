"""Training of spikingjelly's networks: `adopt` wraps one in multi-step mode (docs/extending.md).

The network keeps the library's neurons, backends, surrogates and random numbers. tetdist changes
two things. It resets the library's state before every forward pass. It replaces batch norms by
`BatchNorm`, with the same parameters and buffers, so that running statistics move once per step, by
all micro-batches of all processes. Unsupported modules are refused with their name and the reason.

The state has the keys of the library's network, without ``num_batches_tracked``: load a run's
model.safetensors into that network by ``load_state_dict``.

Nothing else in tetdist imports this module, which needs the package spikingjelly.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from spikingjelly.activation_based import encoding, functional, layer, neuron, rnn
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from tetdist.errors import UserError
from tetdist.models.base import SpikingNetwork
from tetdist.models.streaming import Stream
from tetdist.nn.batch_norm import BatchNorm

if not hasattr(layer, "TLastMultiStepContainer"):
    raise UserError(
        "the installed spikingjelly is older than the one whose networks can be adopted; install "
        "version 2.0: pip install 'spikingjelly>=2.0,<2.1'"
    )
# Neurons whose outputs are not spikes.
_GRADED = (neuron.LIAFNode, neuron.TernaryIFNode, neuron.TernaryLIFNode)


class Adopted(SpikingNetwork):
    """A spikingjelly network for tetdist's trainer and tools, made by `adopt`.

    As of any user's network, `check_network` tries what only a run shows.

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
        for module in self.net.modules():
            if hasattr(module, "surrogate_function") and not isinstance(module, _GRADED):
                module.fires_spikes = True  # type: ignore[assignment]  # ours: it counts spikes
        self.register_state_dict_post_hook(_without_prefix)
        self.register_load_state_dict_pre_hook(_with_prefix)
        self.set_timesteps(timesteps)

    def set_timesteps(self, timesteps: int) -> None:
        """Change T, unless neurons have weights for each timestep of another T."""
        super().set_timesteps(timesteps)
        for name, module in self.named_modules():
            if isinstance(module, neuron.MaskedPSN) and timesteps != module.T:
                raise UserError(
                    f"{name.removeprefix('net.')} (MaskedPSN) is built for T={module.T} and cannot "
                    f"run {timesteps} timesteps; use SlidingPSN, which runs any number"
                )

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Refuse to recompute blocks, which are the library's."""
        if enable:
            raise UserError("recompute: a spikingjelly network cannot recompute; set it to none")

    def stream(self) -> Stream:
        """Refuse to run one timestep at a time."""
        raise UserError(
            "a network of spikingjelly keeps its membranes in its own modules; run it by "
            'functional.set_step_mode(model.net, "s") and functional.reset_net(model.net)'
        )

    def forward(self, x: Tensor, per_timestep: bool = False) -> Tensor:
        """Return logits: their mean over time, (B, K), or those of each timestep, (T, B, K).

        Raises:
            ValueError: The input has a wrong shape, or fewer than T time bins.
            UserError: The output is not (T, B, K).
        """
        sequence = self.time_first(x)
        if self.input_kind == "images":
            # Copy once, in the convolutions' memory layout.
            sequence = torch.cat([sequence[0]] * self.timesteps).unflatten(0, (self.timesteps, -1))
        functional.reset_net(self.net)
        try:
            logits = self.net(sequence)
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
            error.add_note(
                f"{type(self.net).__name__} ran a sequence (T, B, C, H, W), here "
                f"{tuple(sequence.shape)}; one that loops over time itself cannot be adopted"
            )
            raise
        wanted = (*sequence.shape[:2], self.num_classes)
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        if found != wanted:
            raise UserError(
                f"{type(self.net).__name__} returns {found} instead of logits (T, B, K) = "
                f"{wanted}; adopt it without its mean or decoding over time, and with K classes"
            )
        return logits if per_timestep else logits.mean(0)


adopt = Adopted


def _without_prefix(_module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    for key in [key for key in state if key.startswith(f"{prefix}net.")]:
        state[prefix + key.removeprefix(f"{prefix}net.")] = state.pop(key)


def _with_prefix(_module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for key in [key for key in state if key.startswith(prefix)]:
        state[f"{prefix}net.{key.removeprefix(prefix)}"] = state.pop(key)


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
        self.kind = type(norm)

    def forward(self, current: Tensor, copies: int = 1) -> Tensor:
        """Normalise (T, B, C, ...), or (N, C, ...) in single-step mode; for ``copies`` see
        `BatchNorm`."""
        x = current if self.folded else current.flatten(0, 1)
        self.kind._check_input_dim(self, x)
        if x.ndim != 4:
            x = x.reshape(*x.shape[:2], -1, 1)
        return super().forward(x, copies).reshape(current.shape)


def _with_own_norms(net: nn.Module) -> nn.Module:
    def own(module: nn.Module) -> nn.Module:
        if isinstance(module, BatchNorm) or not isinstance(module, _BatchNorm):
            return module
        return norms.setdefault(module, AdoptedBatchNorm(module))

    norms: dict[nn.Module, AdoptedBatchNorm] = {}
    for module in list(net.modules()):
        for name, child in module.named_children():
            setattr(module, name, own(child))
    return own(net)


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
_NORMS = [
    getattr(home, f"{kind}BatchNorm{dimensions}d")
    for home, kind in ((nn, ""), (layer, ""), (layer, "ThresholdDependent"))
    for dimensions in (1, 2, 3)
]
_AHEAD = "its output at t depends on inputs after t, so it cannot be evaluated at every t"
_ONLINE = "it detaches the membrane at every timestep and needs its own training algorithm"
_NOISE = "it draws random numbers in evaluation, too, so results would not be reproducible"
_OWN_NORM = "it has a batch norm of its own for every timestep, which cannot be accumulated"
_LIF = "take neuron.LIFNode or another of BaseNode's kind"
_NORM = "take layer.BatchNorm2d or layer.ThresholdDependentBatchNorm2d"
_NO_NOISE = "take a module without noise, or layer.Dropout"

# Kinds of modules, the reason for refusing them, and the way out.
_REFUSED: tuple[tuple[type | tuple[type, ...], str, str], ...] = (
    (neuron.PSN, _AHEAD, "take neuron.SlidingPSN, or MaskedPSN with lambda_ = 1"),
    ((layer.TemporalWiseAttention, layer.MultiDimensionalAttention), _AHEAD, "leave it out"),
    ((neuron.MPBNBaseNode, layer.bn._BatchNormThroughTimeBase), _OWN_NORM, f"{_LIF}, and {_NORM}"),
    (layer.bn._TemporalEffectiveBatchNormBase, "it has a factor for each timestep of one T", _NORM),
    ((neuron.OTTTLIFNode, neuron.SLTTLIFNode), _ONLINE, _LIF),
    ((layer.OTTTSequential, layer.GradwithTrace), _ONLINE, "take nn.Sequential"),
    ((neuron.noisy.NoisyBaseNode, neuron.noisy.NoisyNonSpikingBaseNode), _NOISE, _NO_NOISE),
    ((encoding.PoissonEncoder, encoding.PopSpikeEncoderRandom), _NOISE, _NO_NOISE),
    (layer.DropConnectLinear, _NOISE, _NO_NOISE),
    (nn.SyncBatchNorm, "the trainer synchronises norms", f"{_NORM}, and set batch_norm.sync=true"),
)


def _refuse(net: nn.Module) -> None:
    """Raise UserError for the first module that cannot be adopted."""
    for name, module in net.named_modules():
        parts = name.split(".") if name else []
        owners = [net.get_submodule(".".join(parts[:depth])) for depth in range(len(parts))]
        around = [owner for owner in owners if isinstance(owner, _CONTAINERS)]
        for why, way_out in _objections(module, around):
            raise UserError(
                f"{name or 'the network'} ({type(module).__name__}) cannot be adopted: {why}; "
                f"{way_out}"
            )


def _objections(module: nn.Module, around: Sequence[nn.Module]) -> Iterator[tuple[str, str]]:
    """Yield why a module in these containers cannot be adopted, and the way out."""
    if isinstance(module, BatchNorm):
        return
    for kinds, why, way_out in _REFUSED:
        if isinstance(module, kinds):
            yield why, way_out
    if isinstance(module, neuron.MaskedPSN) and float(module.lambda_) < 1:
        yield _AHEAD, "set its lambda_ to 1"
    if isinstance(module, (nn.RNNBase, rnn.SpikingRNNBase)) and module.bidirectional:
        yield _AHEAD, "build it with bidirectional=False"
    if isinstance(module, _BatchNorm):
        if type(module) not in _NORMS:
            yield "it is a batch norm that tetdist does not support", _NORM
        if not module.track_running_stats:
            yield "it has no running statistics to evaluate with", "set track_running_stats=True"
        if module.momentum is None:
            yield "its running statistics are an average over all steps", "set momentum=0.1"
        if not module.affine:
            yield "it has no weight and bias", "set affine=True, and requires_grad_(False) for both"
        for one in around:
            if isinstance(one, _LOOPS) or getattr(one, "stateful", False):
                why = f"{type(one).__name__} runs it once a timestep, and its statistics are of all"
                yield why, "put it into layer.SeqToANNContainer"
    elif isinstance(module, _NormBase) and module.track_running_stats:
        yield "its running statistics are not accumulated", "set track_running_stats=False"
    # Containers have no step mode before set_step_mode, and need none.
    if getattr(module, "step_mode", "m") == "s" and not around:
        yield "it is in single-step mode", 'call functional.set_step_mode(net, "m") before'
