"""The passes of `FusedNormNeuron` in PyTorch, compiled by torch.compile: what serves GPUs.

N and C are symbolic, so that one kernel serves all layers of a network.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tetdist.nn.fused import Affine, Passes
from tetdist.nn.neurons import LIF, SURROGATES

logger = logging.getLogger(__name__)

# One code object serves every variant of neuron, T, type and stem; torch's own limit of 8
# compilations of it is for code that changes shape by mistake.
_MAX_VARIANTS = 128


def wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance per channel of (T, N, C)."""
    x = wide(x)
    num_values = x.shape[0] * x.shape[1]
    # Two passes: the difference of the mean square and the squared mean cancels in float32.
    mean = x.sum((0, 1)) / num_values
    return mean, (x - mean).square().sum((0, 1)) / num_values


def _input_gradient(
    x: Tensor, grad_y: Tensor, affine: Affine, sum_grad: Tensor, sum_grad_xhat: Tensor
) -> Tensor:
    """Batch norm's backward pass, (T, N, C), given its two sums per channel."""
    num_values = x.shape[0] * x.shape[1]
    xhat = (wide(x) - affine.mean) * affine.rstd
    grad = wide(grad_y) - sum_grad / num_values - xhat * (sum_grad_xhat / num_values)
    return (affine.gain * grad).to(x.dtype)


@functools.cache
def compiled_passes(
    config: LIF, timesteps: int, shared: bool, carries: bool, packs: bool
) -> Passes:
    decay, threshold, hard = config.decay, config.threshold, config.resets_to_zero
    surrogate, width = SURROGATES[config.surrogate], config.surrogate_width
    detach = config.detach_reset

    def membranes(
        x: Tensor,
        shortcut: Tensor | None,
        affine: Affine,
        of_shortcut: Affine | None,
        start: Tensor | None,
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Membrane before the reset and spike (bool), each T times (N, C); membrane at the end."""
        u, us, spikes = start, [], []
        for t in range(timesteps):
            current = wide(x[0 if shared else t]) * affine.gain + affine.offset
            if shortcut is not None:
                added = wide(shortcut[t])
                if of_shortcut is not None:
                    added = added * of_shortcut.gain + of_shortcut.offset
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
        affine: Affine,
        of_shortcut: Affine | None,
        start: Tensor | None,
        identity: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        _, fired, end = membranes(x, shortcut, affine, of_shortcut, start)
        outputs = [s.to(x.dtype) for s in fired]
        if identity is not None:
            outputs = [output + identity[t] for t, output in enumerate(outputs)]
        # Each timestep is packed by itself, so that it is one loop with the spikes.
        packed = torch.stack([o.to(torch.uint8) for o in outputs]) if packs else None
        return torch.stack(outputs), packed, end if carries else None

    def current_gradient(
        x: Tensor,
        shortcut: Tensor | None,
        affine: Affine,
        of_shortcut: Affine | None,
        start: Tensor | None,
        grad_spikes: Tensor,
        grad_end: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        us, spikes, _ = membranes(x, shortcut, affine, of_shortcut, start)
        after_reset = grad_end  # gradient of the membrane after the reset
        grads: list[Tensor] = []
        for t in reversed(range(timesteps)):
            u, fires, grad_s = us[t], spikes[t], wide(grad_spikes[t])
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
            with_xhat = sum_over_time * (wide(x[0]) - affine.mean)
        else:
            with_xhat = functools.reduce(
                torch.add, [g * (wide(x[t]) - affine.mean) for t, g in enumerate(grads)]
            )
        sum_grad_shortcut_hat = None
        if shortcut is not None and of_shortcut is not None:
            centred = [g * (wide(shortcut[t]) - of_shortcut.mean) for t, g in enumerate(grads)]
            sum_grad_shortcut_hat = functools.reduce(torch.add, centred).sum(0) * of_shortcut.rstd
        total = None
        if shortcut is not None or not shared:
            total = torch.stack([g.to(x.dtype) for g in grads])
        own = total if total is not None and not shared else sum_over_time.to(x.dtype)[None]
        grad_start = None if start is None else after_reset
        sum_grad_xhat = with_xhat.sum(0) * affine.rstd
        return total, own, sum_over_time.sum(0), sum_grad_xhat, sum_grad_shortcut_hat, grad_start

    _announce_compilation()
    input_gradient = _compile(_input_gradient)
    return Passes(
        timesteps,
        _compile(_statistics),
        _compile(spikes),
        _compile(current_gradient),
        # in_place is a permission, which compiled code has no use for.
        lambda *arguments, in_place: input_gradient(*arguments),  # noqa: ARG005
    )


@functools.cache
def _announce_compilation() -> None:
    logger.info("compiling the kernels of the neurons: seconds each, fewer where torch kept them")


def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    # Beyond the limit there is an error, because of fullgraph, and no silent, slow fallback.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MAX_VARIANTS)
    compiled = torch.compile(function, dynamic=True, fullgraph=True)

    @functools.wraps(function)
    def call(*arguments: Tensor | Affine | None) -> Any:
        # Of a tensor that is a view for autograd, torch.compile also guards the shape of the base,
        # and compiles again for another: twice as often as there is anything new.
        return compiled(*map(_detached, arguments))

    return call


def _detached(argument: Tensor | Affine | None) -> Tensor | Affine | None:
    if isinstance(argument, Affine):
        return Affine(*(tensor.detach() for tensor in argument))
    return None if argument is None else argument.detach()


@functools.cache
def torch_compile_works(device_type: str) -> bool:
    """True if torch.compile works on a device; if not, this is said once."""
    reason = reason_against_torch_compile(device_type)
    if reason is not None:
        logger.warning(
            "torch.compile does not work here (%s): normalisation and neurons run uncompiled, "
            "slower and with more memory. A C++ compiler (Debian: apt-get install g++) mends it.",
            reason,
        )
    return reason is None


@functools.cache
def reason_against_torch_compile(device_type: str) -> str | None:
    try:
        _compile(lambda x: x + 1)(torch.zeros(3, 5, device=device_type))
    except Exception as error:  # torch raises many kinds: no compiler, no headers, no write access
        return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return None
