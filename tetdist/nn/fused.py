"""Normalisation, an added shortcut, the neuron and added spikes as one operation: the fast path.

`NormNeuron` is what models are built of. Its definition is a few lines (`NormNeuron.reference`);
the fused path computes the same in one pass over memory each way. The forward pass keeps the
convolution's output and two numbers per channel; the backward pass computes the normalised
current and the membranes again from them, in registers, so nothing of the size of T membranes is
ever stored.

The passes see every activation as (T, N, C), N = B*H*W with channels last. On a CPU they are those
of native.py. Elsewhere, and for types that it does not know, they are those written here, in
PyTorch, and compiled by torch.compile with N and C symbolic, so that one kernel serves all layers
of a network. Without a working compiler the definition is used, with one warning.
"""

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tetdist.nn import native, neurons
from tetdist.nn.batch_norm import BatchNorm
from tetdist.nn.neurons import SURROGATES, NeuronConfig
from tetdist.nn.packed import Packed, carry

logger = logging.getLogger(__name__)

# One code object serves every variant of neuron, T, type and stem; torch's own limit of 8
# compilations of it is for code that changes shape by mistake.
_MAX_VARIANTS = 128


def spiking_layers(model: nn.Module) -> "dict[str, NormNeuron | neurons.Neuron]":
    """A model's layers of neurons, by name; none in a ReLU network."""
    found: dict[str, NormNeuron | neurons.Neuron] = {}
    for name, module in model.named_modules():
        if isinstance(module, (NormNeuron, neurons.Neuron)):
            neuron = module.neuron if isinstance(module, NormNeuron) else module.config
            if neuron.spike != "relu":
                found[name] = module
    return found


class NormNeuron(nn.Module):
    """Batch norm, an optional shortcut added to the normalised current, and the neuron.

    Args:
        num_channels: C.
        neuron: The neuron.
        norm_scale: See `BatchNorm`.
    """

    def __init__(self, num_channels: int, neuron: NeuronConfig, *, norm_scale: float = 1.0) -> None:
        super().__init__()
        self.norm = BatchNorm(num_channels, scale=norm_scale)
        self.neuron = neuron
        self.execution = "fused"
        # See carrying_membranes.
        self.carries = False
        self.membrane: Tensor | None = None

    def forward(
        self,
        current: Tensor,
        timesteps: int,
        shortcut: Tensor | None = None,
        identity: Tensor | None = None,
        shortcut_norm: BatchNorm | None = None,
    ) -> Tensor:
        """Spikes (T, B, C, H, W), of the current's type.

        Args:
            current: Output of a convolution, (T, B, C, H, W); or (1, B, C, H, W) when it is the
                same at all timesteps (the stem of a static image).
            timesteps: T.
            shortcut: Added to the normalised current, (T, B, C, H, W).
            identity: Spikes (T, B, C, H, W) that are added to those of the neurons.
            shortcut_norm: Normalises the shortcut before it is added.
        """
        assert current.shape[0] in (1, timesteps), (current.shape, timesteps)
        if self.execution == "fused" and _compiler_works(current.device.type, self.neuron):
            return self._fused(current, timesteps, shortcut, identity, shortcut_norm)
        return self.reference(current, timesteps, shortcut, identity, shortcut_norm)

    def reference(
        self,
        current: Tensor,
        timesteps: int,
        shortcut: Tensor | None = None,
        identity: Tensor | None = None,
        shortcut_norm: BatchNorm | None = None,
    ) -> Tensor:
        """The definition of `forward`."""
        total = self.input_current(current, timesteps, shortcut, shortcut_norm)
        spikes, membrane = neurons.run(total, self.neuron, self.membrane)
        if self.carries:
            self.membrane = membrane
        return spikes if identity is None else spikes + identity

    def input_current(
        self,
        current: Tensor,
        timesteps: int,
        shortcut: Tensor | None = None,
        shortcut_norm: BatchNorm | None = None,
    ) -> Tensor:
        """What the neurons integrate, (T, B, C, H, W); arguments as of `forward`."""
        if shortcut is not None and shortcut_norm is not None:
            shortcut = shortcut_norm(shortcut)
        normalized = self.norm(current).expand(timesteps, *current.shape[1:])
        return normalized if shortcut is None else normalized + shortcut

    def _fused(
        self,
        current: Tensor,
        timesteps: int,
        shortcut: Tensor | None,
        identity: Tensor | None,
        shortcut_norm: BatchNorm | None,
    ) -> Tensor:
        norm = self.norm
        x = _channels_last_rows(current)
        added = None if shortcut is None else _channels_last_rows(shortcut)
        joined = None if identity is None else _channels_last_rows(identity)
        packs = norm.training and torch.is_grad_enabled()
        build = _native_kernels if native.serves(x, added, joined) else _compiled_kernels
        kernels = build(self.neuron, timesteps, x.shape[0] == 1, self.carries, packs)
        own = _Norm.of(norm, x, kernels)
        others = None
        if added is not None and shortcut_norm is not None:
            assert shortcut_norm.training == norm.training
            others = _Norm.of(shortcut_norm, added, kernels)
        batch, channels, height, width = current.shape[1:]
        start = None
        if self.membrane is not None:
            start = self.membrane.permute(0, 2, 3, 1).reshape(-1, channels)
        parameters: list[Tensor | None] = [norm.weight, norm.bias]
        parameters += [None, None] if others is None else [others.norm.weight, others.norm.bias]
        rows, packed, end = _FusedNormNeuron.apply(
            x, added, joined, start, *parameters, own, others, kernels
        )
        if self.carries:
            self.membrane = end.view(batch, height, width, channels).permute(0, 3, 1, 2)

        def image(rows: Tensor) -> Tensor:
            return rows.view(timesteps, batch, height, width, channels).permute(0, 1, 4, 2, 3)

        return carry(image(rows), Packed(image(packed), 1)) if packs else image(rows)

    def extra_repr(self) -> str:
        return str(self.neuron)


def _channels_last_rows(x: Tensor) -> Tensor:
    """(T, B, C, H, W) as (T, B*H*W, C): a view where the channels are the last in memory."""
    return x.permute(0, 1, 3, 4, 2).flatten(1, 3).contiguous()


class _Norm(NamedTuple):
    """A batch norm and the statistics by which it normalises this time."""

    norm: BatchNorm
    mean: Tensor
    var: Tensor

    @classmethod
    def of(cls, norm: BatchNorm, x: Tensor, kernels: "_Kernels") -> "_Norm":
        if not norm.training:
            return cls(norm, norm.running_mean, norm.running_var)
        mean, var = norm.over_processes(*kernels.statistics(x.detach()))
        norm.record(mean, var, x.shape[0] * x.shape[1])
        return cls(norm, mean, var)

    def affine(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gain and offset, mean and reciprocal standard deviation."""
        rstd = torch.rsqrt(self.var + self.norm.eps)
        gain = self.norm.scale * weight * rstd
        return gain, bias - gain * self.mean, self.mean, rstd


class _FusedNormNeuron(torch.autograd.Function):
    """Forward and backward of norm + shortcut + neuron + identity on (T, N, C) tensors.

    Returns the spikes; where they are to be packed, the same in bytes; where it is to be carried
    on, the membrane after the last reset, (N, C).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        shortcut: Tensor | None,
        identity: Tensor | None,
        membrane: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        shortcut_weight: Tensor | None,
        shortcut_bias: Tensor | None,
        own: _Norm,
        others: _Norm | None,
        kernels: "_Kernels",
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        affine = own.affine(weight, bias)
        of_shortcut: tuple[Tensor | None, ...] = (None,) * 4
        if others is not None:
            assert shortcut_weight is not None
            assert shortcut_bias is not None
            of_shortcut = others.affine(shortcut_weight, shortcut_bias)
        ctx.save_for_backward(x, shortcut, membrane, *affine, *of_shortcut)
        ctx.norm, ctx.training, ctx.kernels = own.norm, own.norm.training, kernels
        ctx.shortcut_norm = None if others is None else others.norm
        ctx.has_identity = identity is not None
        ctx.set_materialize_grads(False)
        spikes, packed, end = kernels.spikes(
            x, shortcut, *affine[:2], *of_shortcut[:2], membrane, identity
        )
        if packed is not None:
            ctx.mark_non_differentiable(packed)
        return spikes, packed, end

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        x, shortcut, membrane, *affine = ctx.saved_tensors
        affine, of_shortcut = affine[:4], affine[4:]
        grad_spikes, _, grad_end = grad_outputs
        if grad_spikes is None:
            assert grad_end is not None
            grad_spikes = x.new_zeros(()).expand(ctx.kernels.timesteps, *grad_end.shape)
        # Gradient of the total current, of the convolution's own part of it (which is summed over
        # time where one output serves all timesteps), its sum per channel and those of its products
        # with both normalised currents, and the gradient of the membrane at the start.
        grad_total, grad_y, sum_grad, sum_grad_xhat, sum_grad_shortcut_hat, grad_start = (
            ctx.kernels.current_gradient(
                x,
                shortcut,
                *affine,
                *of_shortcut,
                membrane,
                grad_spikes.contiguous(),
                None if grad_end is None else grad_end.contiguous(),
            )
        )

        def through(
            norm: BatchNorm,
            x: Tensor,
            grad_y: Tensor,
            affine: list[Tensor],
            sum_grad_xhat: Tensor,
            in_place: bool,
        ) -> Tensor:
            """The gradient of what was normalised."""
            gain, _, mean, rstd = affine
            if not ctx.training:
                return (grad_y * gain).to(x.dtype)
            sums = norm.average_over_processes(torch.stack([sum_grad, sum_grad_xhat]))
            return ctx.kernels.input_gradient(x, grad_y, gain, mean, rstd, *sums, in_place=in_place)

        grad_shortcut = grad_total if shortcut is not None else None
        if ctx.shortcut_norm is not None:
            grad_shortcut = through(
                ctx.shortcut_norm, shortcut, grad_total, of_shortcut, sum_grad_shortcut_hat, False
            )
        grad_x = None
        if ctx.needs_input_grad[0]:
            # Written over grad_y, unless that is the shortcut's gradient, too.
            in_place = grad_shortcut is not grad_y
            grad_x = through(ctx.norm, x, grad_y, affine, sum_grad_xhat, in_place)
        grad_shortcut_weight = grad_shortcut_bias = None
        if ctx.shortcut_norm is not None:
            grad_shortcut_weight = ctx.shortcut_norm.scale * sum_grad_shortcut_hat
            grad_shortcut_bias = sum_grad
        return (
            grad_x,
            None if grad_shortcut is None else grad_shortcut.to(shortcut.dtype),
            grad_spikes if ctx.has_identity else None,
            grad_start,
            ctx.norm.scale * sum_grad_xhat,
            sum_grad,
            grad_shortcut_weight,
            grad_shortcut_bias,
            *(None,) * 3,
        )


class _Kernels(NamedTuple):
    """The passes of one variant: neuron, T, whether all timesteps share one x, whether membranes
    are carried on, and whether spikes are packed, too."""

    timesteps: int
    statistics: Callable[..., tuple[Tensor, Tensor]]
    spikes: Callable[..., tuple[Tensor, Tensor | None, Tensor | None]]
    current_gradient: Callable[..., tuple[Tensor | None, ...]]
    input_gradient: Callable[..., Tensor]


@functools.cache
def _native_kernels(
    config: NeuronConfig, timesteps: int, shared: bool, carries: bool, packs: bool
) -> _Kernels:
    passes = native.passes(config)
    if passes is None:
        return _compiled_kernels(config, timesteps, shared, carries, packs)
    return _Kernels(
        timesteps,
        passes.statistics,
        functools.partial(passes.spikes, timesteps=timesteps, packs=packs, carries=carries),
        passes.current_gradient,
        passes.input_gradient,
    )


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance per channel of (T, N, C)."""
    x = _wide(x)
    num_values = x.shape[0] * x.shape[1]
    # Two passes: the difference of the mean square and the squared mean cancels in float32.
    mean = x.sum((0, 1)) / num_values
    return mean, (x - mean).square().sum((0, 1)) / num_values


def _input_gradient(
    x: Tensor,
    grad_y: Tensor,
    gain: Tensor,
    mean: Tensor,
    rstd: Tensor,
    sum_grad: Tensor,
    sum_grad_xhat: Tensor,
) -> Tensor:
    """Batch norm's backward pass, (T, N, C), given its two sums per channel."""
    num_values = x.shape[0] * x.shape[1]
    xhat = (_wide(x) - mean) * rstd
    grad = _wide(grad_y) - sum_grad / num_values - xhat * (sum_grad_xhat / num_values)
    return (gain * grad).to(x.dtype)


@functools.cache
def _compiled_kernels(
    config: NeuronConfig, timesteps: int, shared: bool, carries: bool, packs: bool
) -> _Kernels:
    decay, threshold, hard = config.decay, config.threshold, config.reset == "hard"
    surrogate, width, detach = (
        SURROGATES[config.surrogate],
        config.surrogate_width,
        config.detach_reset,
    )

    def membranes(
        x: Tensor,
        shortcut: Tensor | None,
        gain: Tensor,
        offset: Tensor,
        shortcut_gain: Tensor | None,
        shortcut_offset: Tensor | None,
        start: Tensor | None,
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Membrane before the reset and spike (bool), each T times (N, C); membrane at the end."""
        u, us, spikes = start, [], []
        for t in range(timesteps):
            current = _wide(x[0 if shared else t]) * gain + offset
            if shortcut is not None:
                added = _wide(shortcut[t])
                if shortcut_gain is not None and shortcut_offset is not None:
                    added = added * shortcut_gain + shortcut_offset
                current = current + added
            u = current if u is None else decay * u + current
            fires = u - threshold > 0
            us.append(u)
            spikes.append(fires)
            u = torch.where(fires, 0.0 if hard else u - threshold, u)
        assert u is not None
        return us, spikes, u

    def spikes(
        x: Tensor,
        shortcut: Tensor | None,
        gain: Tensor,
        offset: Tensor,
        shortcut_gain: Tensor | None,
        shortcut_offset: Tensor | None,
        start: Tensor | None,
        identity: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        _, fired, end = membranes(x, shortcut, gain, offset, shortcut_gain, shortcut_offset, start)
        outputs = [s.to(x.dtype) for s in fired]
        if identity is not None:
            outputs = [output + identity[t] for t, output in enumerate(outputs)]
        # Each timestep's by itself, so that it is one loop with the spikes.
        packed = torch.stack([o.to(torch.uint8) for o in outputs]) if packs else None
        return torch.stack(outputs), packed, end if carries else None

    def current_gradient(
        x: Tensor,
        shortcut: Tensor | None,
        gain: Tensor,
        offset: Tensor,
        mean: Tensor,
        rstd: Tensor,
        shortcut_gain: Tensor | None,
        shortcut_offset: Tensor | None,
        shortcut_mean: Tensor | None,
        shortcut_rstd: Tensor | None,
        start: Tensor | None,
        grad_spikes: Tensor,
        grad_end: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        us, spikes, _ = membranes(x, shortcut, gain, offset, shortcut_gain, shortcut_offset, start)
        after_reset = grad_end  # gradient of the membrane after the reset
        grads: list[Tensor] = []
        for t in reversed(range(timesteps)):
            u, fires, grad_s = us[t], spikes[t], _wide(grad_spikes[t])
            slope = surrogate(u - threshold, width)
            if after_reset is None:
                grad_u = grad_s * slope
            else:
                through_reset = 0.0 if detach else after_reset * (u if hard else threshold)
                kept = torch.where(fires, 0.0, after_reset) if hard else after_reset
                grad_u = (grad_s - through_reset) * slope + kept
            grads.insert(0, grad_u)
            after_reset = decay * grad_u
        # The gradient of a current is that of its membrane: du/dI = 1.
        sum_over_time = functools.reduce(torch.add, grads)
        if shared:
            with_xhat = sum_over_time * (_wide(x[0]) - mean)
        else:
            with_xhat = functools.reduce(
                torch.add, [g * (_wide(x[t]) - mean) for t, g in enumerate(grads)]
            )
        sum_grad_shortcut_hat = None
        if shortcut is not None and shortcut_mean is not None and shortcut_rstd is not None:
            with_shortcut_hat = functools.reduce(
                torch.add, [g * (_wide(shortcut[t]) - shortcut_mean) for t, g in enumerate(grads)]
            )
            sum_grad_shortcut_hat = with_shortcut_hat.sum(0) * shortcut_rstd
        total = None
        if shortcut is not None or not shared:
            total = torch.stack([g.to(x.dtype) for g in grads])
        own = total if total is not None and not shared else sum_over_time.to(x.dtype)[None]
        grad_start = None if start is None else after_reset
        sum_grad_xhat = with_xhat.sum(0) * rstd
        return total, own, sum_over_time.sum(0), sum_grad_xhat, sum_grad_shortcut_hat, grad_start

    _announce_compilation()
    input_gradient = _compile(_input_gradient)
    return _Kernels(
        timesteps,
        _compile(_statistics),
        _compile(spikes),
        _compile(current_gradient),
        # in_place is a permission, which compiled code has no use for.
        lambda *tensors, in_place: input_gradient(*tensors),  # noqa: ARG005
    )


@functools.cache
def _announce_compilation() -> None:
    logger.info("compiling the kernels of the neurons: seconds each, fewer where torch kept them")


def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    # Beyond the limit there is an error, because of fullgraph, and no silent, slow fallback.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MAX_VARIANTS)
    compiled = torch.compile(function, dynamic=True, fullgraph=True)

    @functools.wraps(function)
    def call(*tensors: Tensor | None) -> Any:
        # Of a tensor that is a view for autograd, torch.compile also guards the shape of the base,
        # and compiles again for another: twice as often as there is anything new.
        return compiled(*(None if tensor is None else tensor.detach() for tensor in tensors))

    return call


@contextlib.contextmanager
def carrying_membranes(
    modules: list[NormNeuron], membranes: list[Tensor] | None
) -> Iterator[Callable[[], list[Tensor]]]:
    """Within this context the neurons start from the given membranes and keep their last ones.

    Args:
        modules: Each is to run once.
        membranes: Of each, after its last reset, (B, C, H, W); None: all at rest.

    Yields:
        Returns, when they have run, their membranes after the last reset.
    """
    for i, module in enumerate(modules):
        module.carries, module.membrane = True, membranes[i] if membranes else None

    def ends() -> list[Tensor]:
        found = [module.membrane for module in modules]
        assert all(end is not None for end in found)
        return [end for end in found if end is not None]

    try:
        yield ends
    finally:
        for module in modules:
            module.carries, module.membrane = False, None


def _compiler_works(device_type: str, config: NeuronConfig) -> bool:
    """Whether there are passes of the neuron for the device, or can be; if there is no compiler,
    this is said once."""
    if config.spike != "step":
        return False  # What leaves the passes is kept as bytes.
    if device_type == "cpu" and native.passes(config) is not None:
        return True
    works = _torch_compile_works(device_type)
    if works and device_type == "cpu":
        _say_that_it_is_slower()
    return works


@functools.cache
def _say_that_it_is_slower() -> None:
    logger.warning(
        "the C++ kernels cannot be built or loaded here (%s): torch.compile's are used, which are "
        "slower to begin and to run",
        native.failures.get("neuron", "for a reason unknown"),
    )


@functools.cache
def _torch_compile_works(device_type: str) -> bool:
    try:
        _compile(lambda x: x + 1)(torch.zeros(3, 5, device=device_type))
    except Exception as error:  # torch raises many kinds: no compiler, no headers, no write access
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        logger.warning(
            "torch.compile does not work here (%s): normalisation and neurons run uncompiled, "
            "slower and with more memory. A C++ compiler (Debian: apt-get install g++) mends it.",
            reason,
        )
        return False
    return True
