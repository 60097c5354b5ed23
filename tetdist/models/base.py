"""The common part of all spiking networks: time first, logits per timestep, timm's methods."""

import inspect
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, ClassVar, Literal, Protocol, TypeVar, assert_never

import torch
from timm.models import build_model_with_cfg, register_model, resolve_pretrained_cfg
from torch import Tensor, nn

from tetdist.errors import UserError
from tetdist.models.streaming import Stream
from tetdist.nn import dropout, neurons
from tetdist.nn.neurons import LIF, NeuronConfig
from tetdist.nn.norm_neuron import FusedLayer, NeuronLayer, NormNeuron, neurons_of
from tetdist.nn.packed import Conv2d
from tetdist.nn.recompute import Block
from tetdist.storage import bundled

Network = TypeVar("Network", bound="SpikingNetwork")

INV_SQRT_2 = 1 / math.sqrt(2)

Init = Literal["kaiming", "torch"]


def conv3x3(in_channels: int, out_channels: int, stride: int = 1, bias: bool = False) -> Conv2d:
    return Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=bias)


def conv1x1(in_channels: int, out_channels: int, stride: int = 1, bias: bool = False) -> Conv2d:
    return Conv2d(in_channels, out_channels, 1, stride=stride, bias=bias)


class SpikingModel(Protocol):
    """The interface of models that training, evaluation and export need.

    Attributes:
        timesteps: T.
        num_classes: K.
        input_kind: ``images`` for (B, C, H, W), ``events`` for (B, T, C, H, W).
    """

    timesteps: int
    num_classes: int
    input_kind: Literal["images", "events"]

    def set_timesteps(self, timesteps: int) -> None:
        """Change T; weights and running statistics stay."""

    def __call__(self, x: Tensor, per_timestep: bool = False) -> Tensor:
        """Return logits: their mean over time, (B, K), or those of each timestep, (T, B, K)."""


def check_logits(
    logits: object, timesteps: int, samples: int, num_classes: int | None = None
) -> None:
    """Check that the logits are (T, B, K); a user's network may return others.

    Raises:
        UserError: They are not.
    """
    found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    right = isinstance(found, tuple) and len(found) == 3 and found[:2] == (timesteps, samples)
    if not right or num_classes not in (None, found[-1]):
        raise UserError(
            f"the network returned {found} for {samples} samples at T = {timesteps}; with "
            f"per_timestep=True it must return logits ({timesteps}, {samples}, "
            f"{num_classes or 'classes'})"
        )


class SpikingNetwork(nn.Module):
    """Base of all models: ``encode`` the input, ``body`` of blocks, pooled ``head``.

    Subclasses set ``stem``, ``blocks`` (an ``nn.Sequential`` of (T, B, C, H, W) modules) and the
    head (`set_head`, or ``num_features`` and ``fc``), and call `init_weights` at the end. A
    subclass whose `pooled` is not a mean over positions names it in ``global_pool``.

    Args:
        num_classes: K; 0 makes ``fc`` the identity.
        timesteps: T, how often a static image is shown; for events, how many of the input's
            bins are used.
        drop_path_rate: Probability of dropping the last block's branch in training, per sample and
            for all timesteps (timm's name); it rises linearly over the blocks, from 0 (see
            dropout.py).

    Subclasses also take ``drop_rate``, the fraction of the classifier's features dropped in
    training, the same ones at all timesteps.
    """

    stem: nn.Module
    blocks: nn.Sequential
    head_drop: dropout.Dropout
    fc: nn.Module
    num_features: int
    # Blocks exchange multiples of 1 / spike_levels (None: any numbers), up to 1 or, by block, up to
    # highest_inputs (None: any numbers); recompute.py stores them in half a byte or one. Networks
    # set these for spikes of 0 and 1; `build` adapts them to other neurons.
    spike_levels: int | None = 1
    highest_inputs: tuple[int | None, ...] = ()
    # Number of last blocks that are recomputed only in segments: recomputing a ResNet's last stage
    # takes time and saves next to no memory.
    small_blocks: int = 0
    # timm's name of the pooling before the classifier; '': no pooling and no classifier.
    global_pool: str = "avg"
    # ``images`` (B, C, H, W), the same at all timesteps, or ``events`` (B, T, C, H, W).
    input_kind: Literal["images", "events"] = "images"
    # Height and width of the input, if the classifier depends on it.
    input_size: int | None = None
    # Default neuron: the one that the network was published with; here TET's.
    default_neuron: ClassVar[NeuronConfig] = LIF()
    # Set by timm's builder.
    pretrained_cfg: dict[str, Any]
    default_cfg: dict[str, Any]

    def __init__(self, *, num_classes: int, timesteps: int, drop_path_rate: float = 0.0) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.drop_path_rate = drop_path_rate
        self.set_timesteps(timesteps)
        self.grad_checkpointing = False
        self.segment: int | None = None

    def set_timesteps(self, timesteps: int) -> None:
        """Change T; weights and running statistics stay.

        Raises:
            ValueError: T is below 1, or the neurons cannot run it.
        """
        if not isinstance(timesteps, int) or timesteps < 1:
            raise ValueError(f"timesteps must be a whole number and at least 1, not {timesteps!r}")
        for neuron in neurons_of(self):
            if (reason := neuron.refusal(timesteps)) is not None:
                raise UserError(f"timesteps: {reason}")
        self.timesteps = timesteps

    def set_execution(self, execution: str) -> None:
        """Choose ``fused`` kernels, or ``reference``: the plain definitions everywhere."""
        if execution not in ("fused", "reference"):
            raise ValueError(f"execution must be 'fused' or 'reference', not {execution!r}")
        for module in self.modules():
            if isinstance(module, FusedLayer):
                module.execution = execution

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only each block's input and recompute the block in the backward pass.

        Blocks of a ResNet's last stage keep what they computed, unless they run in segments.
        Gradients, losses and running statistics are the same as without.
        """
        self.grad_checkpointing = enable

    def set_segment(self, timesteps: int | None) -> None:
        """Train over segments of ``timesteps`` each, carrying membranes from one to the next.

        With activation checkpointing the backward pass then needs only the activations of one
        segment of one block. Batch norm normalises each segment separately, so training differs
        from training without segments (but not between with and without checkpointing).

        Raises:
            ValueError: ``timesteps`` is below 1, or the neurons cannot run in segments.
        """
        if timesteps is not None and timesteps < 1:
            raise ValueError(f"a segment must have at least 1 timestep, not {timesteps}")
        for neuron in neurons_of(self):
            if timesteps is not None and not neuron.segments:
                raise UserError(
                    f"recompute: {neurons.kind_of(neuron)} neurons have weights over all T "
                    f"timesteps and cannot run in segments of {timesteps}; set recompute=blocks"
                )
        self.segment = timesteps

    def set_head(self, num_features: int, drop_rate: float) -> None:
        """Make the classifier for ``num_features``, of which training drops a fraction."""
        self.num_features = self.head_hidden_size = num_features
        self.head_drop = dropout.Dropout(drop_rate, num_features)
        self.fc = new_classifier(num_features, self.num_classes)

    @property
    def in_chans(self) -> int:
        """Channels of the input, under the name that timm's distillation uses."""
        return next(one.in_channels for one in self.modules() if isinstance(one, nn.Conv2d))

    def get_classifier(self) -> nn.Module:
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the last layer by a new one for ``num_classes`` (0: none)."""
        self.set_global_pool(global_pool, num_classes)
        self.num_classes = num_classes
        old = next(self.parameters())
        self.fc = new_classifier(self.num_features, num_classes).to(old.device, old.dtype)

    def set_global_pool(self, global_pool: str | None, num_classes: int) -> None:
        """Pool features before a classifier of ``num_classes``; '' keeps them and has none.

        Raises:
            ValueError: The network has no such pooling; None changes nothing.
        """
        own, pool = type(self).global_pool, self.global_pool if global_pool is None else global_pool
        if pool != own and (pool or num_classes):
            raise ValueError(f"global_pool must be {own!r}, or '' with num_classes=0, not {pool!r}")
        self.global_pool = pool

    # timm's networks take `coarse` for stages instead of blocks; here only blocks exist.
    def group_matcher(self, coarse: bool = False) -> dict[str, str]:  # noqa: ARG002  # see above
        """Return patterns of parameter names by layer, as timm does: stem, each block, the rest."""
        return {"stem": r"^stem", "blocks": r"^blocks\.(\d+)"}

    def no_weight_decay(self) -> set[str]:
        """Return the parameters without weight decay in timm's optimisers: those of neurons."""
        return {name for name, _ in self.named_parameters() if ".learned." in name}

    def time_first(self, x: Tensor) -> Tensor:
        """Return the input as (1, B, C, H, W) for images, the same at all timesteps, or (T, B, C,
        H, W) for events.

        Raises:
            ValueError: The shape is wrong, or there are fewer than T time bins.
        """
        match self.input_kind:
            case "images":
                if x.ndim != 4:
                    raise ValueError(f"an image batch must be (B, C, H, W), not {tuple(x.shape)}")
                # channels_last, and so is every later activation (fused.py needs it to be fast).
                return x.contiguous(memory_format=torch.channels_last)[None]
            case "events":
                return self._frames_first(x)
            case other:
                assert_never(other)

    def _frames_first(self, x: Tensor) -> Tensor:
        if x.ndim != 5:
            raise ValueError(f"an event batch must be (B, T, C, H, W), not {tuple(x.shape)}")
        self.check_size(x)
        if x.shape[1] < self.timesteps:
            raise ValueError(
                f"the model runs {self.timesteps} timesteps, but the input has {x.shape[1]} bins"
            )
        frames = x[:, : self.timesteps].transpose(0, 1)
        flat = frames.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        return flat.unflatten(0, frames.shape[:2])

    def check_size(self, x: Tensor) -> None:
        """Raise a `UserError` if an input (..., H, W) is not of ``input_size``."""
        (height, width), side = x.shape[-2:], self.input_size
        if side is not None and (height, width) != (side, side):
            raise UserError(
                f"the model is built for {side}x{side} pixels, but the input has {height}x{width}"
            )

    def frame(self, x: Tensor, t: int) -> Tensor:
        """Return timestep t (from 0) of an input (B, C, H, W), as `features_of` takes it."""
        del t
        return x[None]

    def stream(self) -> Stream:
        """Take one timestep after another, instead of all T at once.

        Raises:
            UserError: The model's neurons need all timesteps at once.
        """
        return Stream(self)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the spikes of the last block, (T, B, C, H, W)."""
        return self.features_of(self.time_first(x), self.timesteps)

    def features_of(self, x: Tensor, timesteps: int) -> Tensor:
        """Compute `forward_features` of an input that `time_first` returned."""
        if self.training and self.drop_path_rate:
            dropout.draw_paths(self.blocks, x)
        x = self._run(self.forward_stem, x, timesteps, self.stem, levels=None)
        small_from = len(self.blocks) - (0 if self.segment else self.small_blocks)
        for i, block in enumerate(self.blocks):
            if i >= small_from:
                x = self.forward_block(block, x, timesteps)
                continue
            highest = self.highest_inputs[i] if self.highest_inputs else 1
            levels = None if highest is None else self.spike_levels
            run = partial(self.forward_block, block)
            x = self._run(run, x, timesteps, block, levels=levels, highest=highest or 1)
        return x

    def _run(
        self,
        function: Callable[[Tensor, int], Tensor],
        x: Tensor,
        timesteps: int,
        module: nn.Module,
        levels: int | None,
        highest: int = 1,
    ) -> Tensor:
        """Run a stem or block, in segments or with recomputation if configured."""
        if not self.training or not (self.segment or self.grad_checkpointing):
            return function(x, timesteps)
        # An image's result in layers without membranes is the same in every segment.
        timeless = x.shape[0] == 1 and not any(isinstance(m, NeuronLayer) for m in module.modules())
        block = Block(
            function,
            module,
            timesteps=timesteps,
            segment=None if timeless else self.segment,
            levels=levels,
            highest=highest,
        )
        if self.grad_checkpointing and torch.is_grad_enabled():
            return block.recomputed(x)
        return block.run_all(x)

    def forward_stem(self, x: Tensor, timesteps: int) -> Tensor:
        """Map (1 or T, B, C, H, W) to spikes (T, B, C', H', W'), or to the current of a stream,
        which may be (1, ...) for all timesteps."""
        y: Tensor = self.stem(x, timesteps)
        return y

    def forward_block(self, block: nn.Module, x: Tensor, timesteps: int) -> Tensor:
        """Run one of ``blocks``, with T from its input. Families whose stem returns a current,
        which may be (1, ...) for all timesteps, override this."""
        assert x.shape[0] == timesteps
        y: Tensor = block(x)
        return y

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map (T, B, C, H, W) to logits (T, B, K), or to pooled features (T, B, C).

        If ``global_pool`` is '', return the features unchanged.
        """
        if not self.global_pool:
            return x
        x = self.pooled(x)
        if pre_logits:
            return x
        # A user's network may have none.
        drop = getattr(self, "head_drop", None)
        return self.fc(x if drop is None else drop(x))

    def pooled(self, x: Tensor) -> Tensor:
        """Map (T, B, C, H, W) to the classifier's input, (T, B, C)."""
        return x.mean((3, 4))

    def forward(self, x: Tensor, per_timestep: bool = False) -> Tensor:
        """Return logits: their mean over time, (B, K), or those of each timestep, (T, B, K).

        The output layer neither decays nor fires: O(t) is its input at t.
        """
        logits = self.forward_head(self.forward_features(x))
        return logits if per_timestep else logits.mean(0)


class ConvNormNeuron(nn.Module):
    """Convolution, batch norm, neuron: (T, B, C, H, W) to spikes (T, B, C', H', W')."""

    def __init__(self, conv: Conv2d, neuron: NeuronConfig, *, norm_scale: float = 1.0) -> None:
        super().__init__()
        self.conv = conv
        self.neuron = NormNeuron(conv.out_channels, neuron, norm_scale=norm_scale)

    def forward(
        self, x: Tensor, timesteps: int | None = None, identity: Tensor | None = None
    ) -> Tensor:
        """Return the spikes, plus those of ``identity`` if given.

        ``timesteps`` is needed only if ``x`` is (1, ...), one input for all timesteps.
        """
        return self.neuron(self.conv(x), timesteps or x.shape[0], identity=identity)


def resnet_blocks(
    layers: tuple[int, ...], in_channels: int, width: int, *, expansion: int = 1, first: int = 1
) -> Iterator[tuple[int, int, int]]:
    """Yield input channels, width and stride of each block of a ResNet.

    Args:
        layers: Number of blocks in each of the stages.
        in_channels: Channels of the first block's input.
        width: Width of the first stage; it doubles from stage to stage.
        expansion: Ratio of a block's output channels to its width.
        first: Stride of the first stage; the others have 2.
    """
    for stage, num_blocks in enumerate(layers):
        for i in range(num_blocks):
            stride = 1 if i else (2 if stage else first)
            yield in_channels, width * 2**stage, stride
            in_channels = width * 2**stage * expansion


def new_classifier(num_features: int, num_classes: int) -> nn.Module:
    return nn.Linear(num_features, num_classes) if num_classes > 0 else nn.Identity()


def init_weights(model: nn.Module, init: Init = "kaiming") -> None:
    """Initialise convolutions; other layers keep torch's initial values.

    Args:
        model: New model, with torch's initial values everywhere.
        init: ``kaiming``: normal (fan out, ReLU gain), as in the code of SEW-ResNet and of TET's
            VGGSNN. ``torch``: torch's own, as in the code of TET's ResNet-19: uniform, with a
            standard deviation smaller by sqrt(6) if fan in and fan out are equal. A batch norm
            makes the outputs equal, but Adam's step relative to the weights is larger by that
            factor.

    Raises:
        ValueError: ``init`` is unknown.
    """
    match init:
        case "torch":
            return
        case "kaiming":
            pass
        case _:
            raise ValueError(f"init must be 'kaiming' or 'torch', not {init!r}")
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


# Common part of timm's descriptions of networks for CIFAR-10 and for event frames.
CIFAR: dict[str, Any] = {
    "num_classes": 10,
    "crop_pct": 1.0,
    "mean": (0.4914, 0.4822, 0.4465),
    "std": (0.2470, 0.2435, 0.2616),
}
EVENTS: dict[str, Any] = {"crop_pct": 1.0, "mean": (0.0, 0.0), "std": (1.0, 1.0)}


def model_cfg(image_size: int = 224, **overrides: Any) -> dict[str, Any]:
    """Return timm's description of a model, by default for ImageNet."""
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, image_size, image_size),
        "pool_size": None,
        "crop_pct": 0.875,
        "interpolation": "bilinear",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "stem.conv",
        "classifier": "fc",
        "license": "apache-2.0",
    } | overrides


def build(
    cls: type[Network],
    variant: str,
    pretrained: bool,
    *,
    neuron: NeuronConfig | dict[str, Any] | None = None,
    **kwargs: Any,
) -> Network:
    """Build a registered model through timm.

    ``neuron`` may be a mapping; missing values are those of the network's `default_neuron`.

    Raises:
        UserError: ``features_only``, or a drop rate that the network does not support, is
            requested.
    """
    if kwargs.pop("features_only", False):
        raise UserError(
            f"features_only: {variant} has features (T, B, C, H, W), which timm's feature "
            "extraction cannot handle; call forward_features, or put hooks on model.blocks"
        )
    neuron = neurons.make(neuron, cls.default_neuron)
    parameters = inspect.signature(cls).parameters
    for rate in ("drop_rate", "drop_path_rate"):  # timm's train.py passes 0 to any network
        if rate not in parameters and kwargs.pop(rate, 0):
            raise UserError(
                f"{rate}: {variant} drops nothing in training; remove it, or set it to 0"
            )
    global_pool = None if "global_pool" in parameters else kwargs.pop("global_pool", None)
    model: Network = build_model_with_cfg(cls, variant, pretrained, neuron=neuron, **kwargs)
    model.set_global_pool(global_pool, model.num_classes)
    model.set_timesteps(model.timesteps)  # The neurons now exist and may refuse T.
    _set_exchanged_values(model, neuron, variant)
    return model


def _set_exchanged_values(model: SpikingNetwork, neuron: NeuronConfig, variant: str) -> None:
    """Adapt what a network declares about its blocks' inputs to spikes other than 0 and 1.

    Raises:
        UserError: Sums of spikes in its blocks do not fit into a byte.
    """
    if neuron.levels is None or model.spike_levels is None:
        model.spike_levels = None
        return
    model.spike_levels *= neuron.levels
    if neuron.highest == 1:
        return
    ones = model.highest_inputs or (1,) * len(model.blocks)
    most_of_all = [None if one is None else one * neuron.highest for one in ones]
    model.highest_inputs = tuple(most_of_all)
    if (most := max(one or 0 for one in most_of_all) * model.spike_levels) > 255:
        raise UserError(
            f"model.neuron: sums of spikes of {variant} reach {most} with {neuron.highest} spikes "
            "a timestep, but at most 255 is stored; allow fewer, or take a smaller network"
        )


def register(cls: type[Network], name: str, **defaults: Any) -> Callable[..., Network]:
    """Register a variant with timm: a network of ``cls`` with these default arguments.

    With weights of the package, the default arguments are those of the trained network.
    """

    def entrypoint(pretrained: bool = False, **kwargs: Any) -> Network:
        own = {}
        if pretrained:
            cfg = resolve_pretrained_cfg(name, pretrained_cfg=kwargs.get("pretrained_cfg"))
            own = bundled.arguments(cfg.file)
        return build(cls, name, pretrained, **(defaults | own | kwargs))

    entrypoint.__name__, entrypoint.__module__ = name, cls.__module__
    entrypoint.__annotations__["return"] = cls  # `class_of` reads it
    registered: Callable[..., Network] = register_model(entrypoint)
    return registered
