"""Networks to compare: tetdist's, the ReLU network, spikingjelly's."""

import argparse
import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tetdist.apps.benchmarks import peers
from tetdist.apps.benchmarks.relu_baselines import relu_baseline


class Contestant(NamedTuple):
    model: torch.nn.Module
    images: Tensor
    logits: Callable[[Tensor], Tensor]  # (T, B, K)


def contestants_of(options: argparse.Namespace) -> dict[str, Callable[[], Contestant]]:
    """Return constructors of the contestants, by name."""
    contestants: dict[str, Callable[[], Contestant]] = {}
    if relu_baseline(options.model):
        contestants["relu"] = functools.partial(relu, options)
    for mode in options.modes:
        contestants[f"tetdist, {mode}"] = functools.partial(ours, options, mode)
    if options.spikingjelly:
        name = f"spikingjelly, {options.spikingjelly}"
        contestants[name] = functools.partial(spikingjelly, options)
    return contestants


def ours(options: argparse.Namespace, mode: str) -> Contestant:
    import timm

    torch.manual_seed(0)
    model = timm.create_model(options.model, timesteps=options.timesteps)
    model.set_execution("reference" if mode == "reference" else "fused")
    model.set_grad_checkpointing(mode in ("blocks", "timesteps"))
    model.set_segment(options.segment if mode == "timesteps" else None)
    return laid_out(options, model, batch_of(options), lambda x: model(x, per_timestep=True))


def relu(options: argparse.Namespace) -> Contestant:
    """Make the ReLU network with the same convolutions, on T times the batch."""
    baseline = relu_baseline(options.model)
    assert baseline is not None
    images = batch_of(options)
    if images.ndim == 5:
        images = images.flatten(0, 1)
    else:
        images = images.repeat(options.timesteps, 1, 1, 1)
    shape = (options.timesteps, options.batch)
    return laid_out(options, baseline, images, lambda x: baseline(x).unflatten(0, shape))


def spikingjelly(options: argparse.Namespace) -> Contestant:
    from spikingjelly.activation_based import functional

    model = spikingjelly_network(options.model)
    functional.set_step_mode(model, "m")
    run: Callable[[Tensor], Tensor] = model
    if options.spikingjelly == "compiled":
        torch._dynamo.config.recompile_limit = 128
        run = torch.compile(model)

    def logits(images: Tensor) -> Tensor:
        functional.reset_net(model)
        return run(images.expand(options.timesteps, *images.shape))

    return laid_out(options, model, batch_of(options), logits)


def has_spikingjelly_network(name: str) -> bool:
    """Return whether `spikingjelly_network` can make this network."""
    if name.startswith(("sew_resnet", "spiking_resnet")):
        return not name.startswith(("spiking_resnet19", "spiking_resnet18_"))
    # Transformers for images of ImageNet's size.
    return name.startswith(("qkformer_10_", "sdt_")) and not name.startswith("sdt_2_")


def spikingjelly_network(name: str) -> torch.nn.Module:
    """Make our network (with its default neuron) of spikingjelly's neurons: the library's own
    network, or a transformer of peers.py."""
    from spikingjelly.activation_based.model import sew_resnet, spiking_resnet

    family, *numbers = name.split("_")
    match family:
        case "sew":
            return getattr(sew_resnet, name)(spiking_neuron=spikingjelly_neuron, cnf="ADD")
        case "spiking":
            return getattr(spiking_resnet, name)(spiking_neuron=spikingjelly_neuron)
        case "qkformer":
            width = int(numbers[1])
            widths = (width // 4, width // 2, width)
            return peers.qkformer(widths, (1, 2, 7), width // 64, halving_neuron)
        case "sdt":
            depth, width = map(int, numbers)
            return peers.spike_driven_transformer(width, depth, halving_neuron)
        case _:
            raise AssertionError(name)


def spikingjelly_neuron() -> torch.nn.Module:
    """Make a layer of spikingjelly's neurons, with our settings in SEW- and Spiking-ResNets."""
    from spikingjelly.activation_based import neuron, surrogate

    return neuron.LIFNode(
        tau=2.0,
        decay_input=False,
        surrogate_function=surrogate.PiecewiseQuadratic(alpha=1.0),
        detach_reset=False,
    )


def halving_neuron(threshold: float = 1.0) -> torch.nn.Module:
    """Make a layer of spikingjelly's neurons as in QKFormer and SDT."""
    from spikingjelly.activation_based import neuron, surrogate

    return neuron.LIFNode(
        tau=2.0,
        v_threshold=threshold,
        surrogate_function=surrogate.Sigmoid(alpha=4.0),
        detach_reset=True,
    )


def batch_of(options: argparse.Namespace) -> Tensor:
    """Make random images (B, 3, H, W) or event frames (B, T, 2, H, W), by the network."""
    import timm

    *_, channels, size, _ = timm.get_pretrained_cfg(options.model).input_size
    size = options.size or size
    generator = torch.Generator().manual_seed(0)
    frames = (options.timesteps,) if channels == 2 else ()
    shape = (options.batch, *frames, channels, size, size)
    return torch.rand(shape, generator=generator).to(options.device)


def laid_out(
    options: argparse.Namespace,
    model: torch.nn.Module,
    images: Tensor,
    logits: Callable[[Tensor], Tensor],
) -> Contestant:
    model.to(options.device)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub
    model.train(not options.evaluate)
    if images.ndim == 4:
        images = images.contiguous(memory_format=torch.channels_last)
    return Contestant(model, images, logits)


def step_of(options: argparse.Namespace, contestant: Contestant) -> Callable[[], None]:
    """Return a function that makes a step: forward, TET loss, backward; or forward only."""
    from tetdist.losses import tet_loss
    from tetdist.nn.precision import autocast

    model, images, logits = contestant
    labels = torch.arange(options.batch, device=options.device) % 10

    def train() -> None:
        model.zero_grad(set_to_none=True)
        with autocast(images.device, options.precision):
            output = logits(images)
        tet_loss(output, labels, lambda_=0.001).backward()
        wait(options.device)

    @torch.no_grad()
    def evaluate() -> None:
        with autocast(images.device, options.precision):
            logits(images)
        wait(options.device)

    return evaluate if options.evaluate else train


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
