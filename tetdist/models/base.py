"""The common part of all spiking networks: time first, logits per timestep, timm's methods."""

import inspect
import itertools
import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, Literal, Protocol, TypeVar

import torch
from timm.layers import to_2tuple
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
    resolve_pretrained_cfg,
)
from timm.models._features import FeatureGetterNet, feature_take_indices
from torch import Tensor, nn

from tetdist.errors import UserError
from tetdist.models.streaming import Stream
from tetdist.nn import dropout, neurons
from tetdist.nn.batch_norm import BatchNorm
from tetdist.nn.neurons import LIF, NeuronConfig
from tetdist.nn.norm_neuron import FusedLayer, NeuronLayer, NormNeuron, neurons_of
from tetdist.nn.packed import Conv2d
from tetdist.nn.recompute import Block
from tetdist.storage import bundled

Network = TypeVar("Network", bound="SpikingNetwork")

INV_SQRT_2 = 1 / math.sqrt(2)

Init = Literal["kaiming", "fan_in", "torch"]
Kind = Literal["images", "events"]


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
    input_kind: Kind

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

    Subclasses set ``stem``, ``blocks`` (an ``nn.Sequential`` of (T, B, C, H, W) modules), name
    their stages (`set_stages`), make the head (`set_head`), and call `init_weights` at the end. A
    subclass whose `pooled` is not a mean over positions names it in ``global_pool``.

    Args:
        num_classes: K; 0 makes ``fc`` the identity.
        timesteps: T, how often a static image is shown; for events, how many of the input's
            bins are used.
        drop_path_rate: Probability of dropping the last block's branch in training, per sample and
            for all timesteps (timm's name); it rises linearly over the blocks, from 0 (see
            dropout.py).

    Subclasses also take ``neuron``, that of all layers, ``in_chans``, the input's channels, and
    ``drop_rate``, the fraction of the classifier's features dropped in training, the same ones at
    all timesteps.
    """

    stem: nn.Module
    blocks: nn.Sequential
    head_drop: dropout.Dropout
    fc: nn.Module
    # timm's names: channels of `forward_features`, and the number of the classifier's inputs.
    num_features: int
    head_hidden_size: int
    # Blocks exchange multiples of 1 / spike_levels (None: any numbers), up to 1 or, by block, up to
    # highest_inputs (None: any numbers); recompute.py stores them in half a byte or one. Networks
    # set these for spikes of 0 and 1; `build` adapts them to other neurons.
    spike_levels: int | None = 1
    highest_inputs: tuple[int | None, ...] = ()
    # Number of last blocks that are recomputed only in segments: recomputing a ResNet's last stage
    # takes time and saves next to no memory.
    small_blocks: int = 0
    # timm's name of the pooling before the classifier: ``avg``, ``max``, or ``flatten``, which
    # keeps all positions; '': no pooling and no classifier.
    global_pool: str = "avg"
    # ``images`` (B, C, H, W), the same at all timesteps, or ``events`` (B, T, C, H, W).
    input_kind: Kind = "images"
    # Height and width of the input, if the classifier depends on it.
    input_size: int | None = None
    # Default neuron: the one that the network was published with; here TET's.
    default_neuron: ClassVar[NeuronConfig] = LIF()
    # True if logits depend on later timesteps, as the check of a user's network found; None: not
    # decided, or tetdist's own, whose neurons say so.
    looks_ahead: bool | None = None
    # Set by timm's builder.
    pretrained_cfg: dict[str, Any]
    default_cfg: dict[str, Any]

    def __init__(self, num_classes: int, timesteps: int, drop_path_rate: float = 0.0) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.drop_path_rate = drop_path_rate
        self.set_timesteps(timesteps)
        self.grad_checkpointing = False
        self.segment: int | None = None
        self.feature_info: list[dict[str, Any]] = []

    def set_timesteps(self, timesteps: int) -> None:
        """Change T; weights and running statistics stay.

        Raises:
            ValueError: T is below 1, or the neurons cannot run it.
        """
        if not isinstance(timesteps, int) or timesteps < 1:
            raise ValueError(f"timesteps must be an integer and at least 1, not {timesteps!r}")
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

    def set_stages(self, stem: tuple[int, int], *stages: tuple[int, int, int]) -> None:
        """Describe the outputs of the stem and of each stage of blocks, for timm's users.

        Args:
            stem: Channels and reduction, the ratio of the input's sides to the output's.
            stages: Channels, reduction and number of ``blocks`` of each.
        """
        end, self.feature_info = 0, []
        for channels, reduction, blocks in ((*stem, 0), *stages):
            end += blocks
            module = f"blocks.{end - 1}" if end else "stem"
            self.feature_info.append(
                {"num_chs": channels, "reduction": reduction, "module": module, "blocks": end}
            )
        self.num_features = stages[-1][0]

    def set_resnet(
        self,
        make: Callable[..., nn.Module],
        layers: tuple[int, ...],
        stem: tuple[int, int],
        width: int,
        *,
        expansion: int = 1,
        first: int = 1,
    ) -> None:
        """Make the blocks of a ResNet, and describe its stages.

        Args:
            make: Returns a block for its input channels, width, stride and ``drop_path``.
            stem: See `set_stages`.
            width: Width of the first stage; it doubles from stage to stage.
            expansion: Ratio of a block's output channels to its width.
            first: Stride of the first stage; the others have 2.
        """
        channels, rates = stem[0], iter(dropout.rising_rates(self.drop_path_rate, sum(layers)))
        self.blocks = nn.Sequential()
        for stage, num_blocks in enumerate(layers):
            for i in range(num_blocks):
                stride = 1 if i else (2 if stage else first)
                block = make(channels, width * 2**stage, stride, drop_path=next(rates))
                self.blocks.append(block)
                channels = width * 2**stage * expansion
        self.small_blocks = layers[-1]
        widths = [width * 2**i * expansion for i in range(len(layers))]
        self.set_stages(stem, *stages_of(widths, layers, first * stem[1]))

    def set_head(self, drop_rate: float = 0.0, inputs: int | None = None) -> None:
        """Make the classifier of the last stage's channels, or of ``inputs`` features.

        Training drops the fraction ``drop_rate`` of them.
        """
        if inputs is None and not hasattr(self, "num_features"):
            raise UserError(f"{type(self).__name__}: call set_stages() before set_head()")
        self.head_hidden_size = inputs or self.num_features
        self.head_drop = dropout.Dropout(drop_rate, self.head_hidden_size)
        self.fc = new_classifier(self.head_hidden_size, self.num_classes)

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
        new = new_classifier(self.head_hidden_size, num_classes).to(old.device, old.dtype)
        self.fc = new.train(self.training)

    def set_global_pool(self, global_pool: str | None, num_classes: int) -> None:
        """Pool features before a classifier of ``num_classes``; '' keeps them and has none.

        Raises:
            ValueError: The network has no such pooling. None keeps it, and restores it from ''.
        """
        own = type(self).global_pool
        kept = self.global_pool or (own if num_classes else "")
        pool = kept if global_pool is None else global_pool
        pools = ("avg", "max") if own == "avg" else (own,)
        if pool not in pools and (pool or num_classes):
            raise ValueError(
                f"global_pool must be {' or '.join(map(repr, pools))}, or '' with num_classes=0, "
                f"not {pool!r}; to pool by yourself, take forward_features, (T, B, C, H, W)"
            )
        self.global_pool = pool

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Return patterns of parameter names by layer, as timm does: stem, each block (if
        ``coarse``, each stage), the rest."""
        if not coarse:
            return {"stem": r"^stem", "blocks": r"^blocks\.(\d+)"}
        ends = itertools.pairwise(info["blocks"] for info in self.feature_info)
        numbers = ["|".join(map(str, range(*stage))) for stage in ends]
        return {"stem": r"^stem"} | {f"stage{n}": rf"^blocks\.(?:{n})\." for n in numbers}

    def no_weight_decay(self) -> set[str]:
        """Return the parameters without weight decay in timm's optimisers: those of neurons."""
        return {name for name, _ in self.named_parameters() if ".learned." in name}

    def time_first(self, x: Tensor) -> Tensor:
        """Return the input as (1, B, C, H, W) for images, the same at all timesteps, or (T, B, C,
        H, W) for events.

        Raises:
            ValueError: The shape is wrong, or there are fewer than T time bins.
        """
        self.check_size(x)
        if self.input_kind == "images":
            if x.ndim != 4:
                raise ValueError(f"an image batch must be (B, C, H, W), not {tuple(x.shape)}")
            # channels_last, and so is every later activation (fused.py needs it to be fast).
            return x.contiguous(memory_format=torch.channels_last)[None]
        if x.ndim != 5:
            raise ValueError(f"an event batch must be (B, T, C, H, W), not {tuple(x.shape)}")
        if x.shape[1] < self.timesteps:
            raise ValueError(
                f"the model runs {self.timesteps} timesteps, but the input has {x.shape[1]} bins"
            )
        frames = x[:, : self.timesteps].transpose(0, 1)
        flat = frames.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        return flat.unflatten(0, frames.shape[:2])

    def check_size(self, x: Tensor) -> None:
        """Raise a `UserError` if an input (..., H, W) is not of ``input_size``."""
        side, sizes = self.input_size, tuple(x.shape[-2:])
        if side is not None and sizes != (side, side):
            raise UserError(
                f"the model is built for {side}x{side} pixels, but the input has "
                f"{'x'.join(map(str, sizes))}; give that size, or build it with input_size"
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
        """Return the spikes of the last block, (T, B, C, H, W): time first, unlike timm's."""
        return self.features_of(self.time_first(x), self.timesteps)

    def features_of(
        self, x: Tensor, timesteps: int, kept: dict[int, Tensor] | None = None
    ) -> Tensor:
        """Compute `forward_features` of an input that `time_first` returned.

        ``kept`` gets the outputs of the stem (key 0) and of block i (key i + 1), for its keys.
        """
        kept = {} if kept is None else kept
        if self.training and self.drop_path_rate:
            dropout.draw_paths(self.blocks, x)
        x = self._run(self.forward_stem, x, timesteps, self.stem, levels=None)
        if 0 in kept:
            kept[0] = x
        small_from = len(self.blocks) - (0 if self.segment else self.small_blocks)
        for i, block in enumerate(self.blocks):
            if i >= small_from:
                x = self.forward_block(block, x, timesteps)
            else:
                highest = self.highest_inputs[i] if self.highest_inputs else 1
                levels = None if highest is None else self.spike_levels
                run = partial(self.forward_block, block)
                x = self._run(run, x, timesteps, block, levels=levels, highest=highest or 1)
            if i + 1 in kept:
                kept[i + 1] = x
        return x

    # timm passes `norm` and `stop_early`: no network has a norm of features, and all blocks run.
    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,  # noqa: ARG002  # timm passes it
        stop_early: bool = False,  # noqa: ARG002  # timm passes it
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        per_timestep: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return `forward_features`, and the outputs that ``feature_info`` describes.

        Those are means over time, (B, C, H, W): firing rates, or the mean currents of a real-valued
        stream; with ``per_timestep`` the values of each timestep, (T, B, C, H, W). ``indices`` are
        positions in ``feature_info``, or a number of last ones; None: all.
        """
        if output_fmt != "NCHW":
            raise UserError(f"output_fmt must be NCHW, not {output_fmt}")
        taken, _ = self._taken(indices)
        kept = dict.fromkeys((self.feature_info[i]["blocks"] for i in sorted(taken)), x)
        y = self.features_of(self.time_first(x), self.timesteps, kept)
        outputs = [
            one.expand(self.timesteps, *one.shape[1:]) if per_timestep else one.mean(0)
            for one in kept.values()
        ]
        return outputs if intermediates_only else (y, outputs)

    def prune_intermediate_layers(
        self, indices: int | list[int] | None = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the outputs of ``indices`` do not need, and return them as a list."""
        del prune_norm
        taken, last = self._taken(indices)
        blocks = list(self.blocks)[: self.feature_info[last]["blocks"]]
        self.small_blocks = max(0, self.small_blocks - len(self.blocks) + len(blocks))
        self.blocks = nn.Sequential(*blocks)
        names = list(self._modules)
        for name in names[names.index("blocks") + 1 :] if prune_head else ():
            setattr(self, name, nn.Identity())
        return taken

    def _taken(self, indices: int | list[int] | None) -> tuple[list[int], int]:
        """Return positions in ``feature_info``, and the largest of them."""
        if not self.feature_info:
            raise UserError(f"{type(self).__name__} names no stages; call set_stages() in it")
        found: tuple[list[int], int] = feature_take_indices(len(self.feature_info), indices)
        return found

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
        pool = getattr(self, "pool", None)  # ResNets have one.
        return y if pool is None else pool(y)

    def forward_block(self, block: nn.Module, x: Tensor, timesteps: int) -> Tensor:
        """Run one of ``blocks``; ``x`` may be a current (1, ...) for all timesteps."""
        y: Tensor = block(x) if x.shape[0] == timesteps else block(x, timesteps)
        return y

    def forward_head(
        self, x: Tensor, pre_logits: bool = False, per_timestep: bool = False
    ) -> Tensor:
        """Map `forward_features` to logits, (B, K), or with ``pre_logits`` to the classifier's
        input, (B, F): means over time, or with ``per_timestep`` the values of each timestep, (T,
        B, ...). If ``global_pool`` is '', both are the features."""
        if self.global_pool:
            x = self.pooled(x)
            if not pre_logits and not hasattr(self, "fc"):
                raise UserError(f"{type(self).__name__}: call set_head() at the end of __init__")
            x = x if pre_logits else self.fc(self.head_drop(x))
        return x if per_timestep else x.mean(0)

    def pooled(self, x: Tensor) -> Tensor:
        """Map (T, B, C, H, W) to the classifier's input, (T, B, F)."""
        return self.over_positions(x)

    def over_positions(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Pool (T, B, C, H, W) by ``global_pool``; a mean is computed in ``dtype`` if given."""
        if self.global_pool == "flatten":
            return x.flatten(2)
        return x.amax((3, 4)) if self.global_pool == "max" else x.mean((3, 4), dtype=dtype)

    def forward(self, x: Tensor, per_timestep: bool = False) -> Tensor:
        """Return logits: their mean over time, (B, K), or those of each timestep, (T, B, K).

        The output layer neither decays nor fires: O(t) is its input at t.
        """
        return self.forward_head(self.forward_features(x), per_timestep=per_timestep)


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


def stages_of(
    widths: Sequence[int], depths: Sequence[int], reduction: int, embeddings: int = 0
) -> list[tuple[int, int, int]]:
    """Return stages for `set_stages`, whose reduction doubles; all but the first begin with
    ``embeddings``, which are not counted in ``depths``."""
    return [
        (width, reduction * 2**i, depth + min(i, 1) * embeddings)
        for i, (width, depth) in enumerate(zip(widths, depths, strict=True))
    ]


def new_classifier(num_features: int, num_classes: int) -> nn.Module:
    return nn.Linear(num_features, num_classes) if num_classes > 0 else nn.Identity()


def init_weights(model: nn.Module, init: Init = "kaiming") -> None:
    """Initialise convolutions; other layers keep torch's initial values.

    Args:
        init: ``kaiming``: normal (fan out, ReLU gain), as in the code of SEW-ResNet and of TET's
            VGGSNN. ``fan_in``: the same with fan in. ``torch``: torch's own, as in the code of
            TET's ResNet-19: uniform, with a standard deviation smaller by sqrt(6) if fan in and fan
            out are equal. A batch norm makes the outputs equal, but Adam's step relative to the
            weights is larger by that factor.

    Raises:
        ValueError: ``init`` is unknown.
    """
    if init == "torch":
        return
    if init not in ("kaiming", "fan_in"):
        raise ValueError(f"init must be 'kaiming', 'fan_in' or 'torch', not {init!r}")
    mode: Literal["fan_in", "fan_out"] = "fan_in" if init == "fan_in" else "fan_out"
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode=mode, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


# Common part of timm's descriptions of networks for CIFAR-10 and for event frames.
CIFAR: dict[str, Any] = {
    "num_classes": 10,
    "crop_pct": 1.0,
    "mean": (0.4914, 0.4822, 0.4465),
    "std": (0.2470, 0.2435, 0.2616),
}
# An event network's ``input_size`` is (T, C, H, W).
EVENTS: dict[str, Any] = {"crop_pct": 1.0, "mean": (0.0, 0.0), "std": (1.0, 1.0)}
FIXED_EVENTS = EVENTS | {"fixed_input_size": True}


def model_cfg(image_size: int = 224, **overrides: Any) -> dict[str, Any]:
    """Return timm's description of a model, by default for ImageNet."""
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, image_size, image_size),
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
    input_kind: Kind | None = None,
    img_size: Any = None,
    global_pool: str | None = None,
    device: Any = None,
    dtype: torch.dtype | None = None,
    bn_eps: float | None = None,
    bn_momentum: float | None = None,
    **kwargs: Any,
) -> Network:
    """Build a registered model through timm, whose arguments these are, and ``kwargs`` the class's.

    ``neuron`` may be a mapping; missing values are those of the network's `default_neuron`. With
    ``input_kind="events"`` a network for images takes event frames, by default of 2 channels.

    Raises:
        UserError: An argument of timm's is given that the network does not support.
    """
    own = inspect.signature(cls).parameters
    for rate in ("drop_rate", "drop_path_rate"):  # timm's train.py passes 0 to any network
        if rate not in own and kwargs.pop(rate, 0):
            raise UserError(
                f"{rate}: {variant} drops nothing in training; remove it, or set it to 0"
            )
    source = {name: kwargs.pop(name, None) for name in ("pretrained_cfg", "pretrained_cfg_overlay")}
    cfg = resolve_pretrained_cfg(variant, **source).to_dict()
    cfg["input_size"] = tuple(cfg["input_size"][-3:])  # timm expects no T
    if "input_size" in own and img_size is None:
        img_size = kwargs.pop("input_size", None)
    if img_size is not None:
        height, width = to_2tuple(img_size)
        if "input_size" not in own or height != width:
            sizes = "square images" if "input_size" in own else "images of any size"
            raise UserError(f"img_size: {variant} takes {sizes}; remove {img_size}")
        kwargs["img_size"] = img_size
    if kwargs.get("features_only"):
        kwargs = {"feature_cls": "getter", "out_indices": None} | kwargs
        if (other := kwargs["feature_cls"]) != "getter":
            raise UserError(f"feature_cls: {variant} needs timm's getter, not {other!r}; remove it")
    if input_kind == "events":
        kwargs = {"in_chans": 2} | kwargs
    if "global_pool" in own and global_pool is not None:
        kwargs["global_pool"] = global_pool
    kwargs |= {"neuron": neurons.make(neuron, cls.default_neuron), "pretrained_cfg": cfg}

    def make(img_size: Any = None, **arguments: Any) -> Network:
        size = {} if img_size is None else {"input_size": to_2tuple(img_size)[0]}
        return cls(**arguments | size)

    built: Network = build_model_with_cfg(make, variant, pretrained, **kwargs)
    model = built.model if isinstance(built, FeatureGetterNet) else built
    model.input_kind = input_kind or model.input_kind
    model.set_global_pool(None if "global_pool" in own else global_pool, model.num_classes)
    model.set_timesteps(model.timesteps)  # The neurons now exist and may refuse T.
    _set_exchanged_values(model, kwargs["neuron"], variant)
    for norm in (module for module in model.modules() if isinstance(module, BatchNorm)):
        norm.eps = norm.eps if bn_eps is None else bn_eps
        norm.momentum = norm.momentum if bn_momentum is None else bn_momentum
    _describe(model, [model.pretrained_cfg, built.pretrained_cfg])
    return built.to(device=device, dtype=dtype)


def _describe(model: SpikingNetwork, cfgs: list[dict[str, Any]]) -> None:
    """Set in timm's descriptions what depends on a network's arguments."""
    sides = model.pretrained_cfg["input_size"][1:]
    values: dict[str, Any] = {}
    if model.feature_info:
        reduction = model.feature_info[-1]["reduction"]
        values["pool_size"] = tuple(-(-side // reduction) for side in sides)
    if model.input_kind == "events":
        channels = model.in_chans
        values["input_size"] = (model.timesteps, channels, *sides)
        values |= {"mean": (0.0,) * channels, "std": (1.0,) * channels}
    for cfg in cfgs:
        cfg.update(values)


def _set_exchanged_values(model: SpikingNetwork, neuron: NeuronConfig, variant: str) -> None:
    """Adapt what a network declares about its blocks' inputs to spikes other than 0 and 1."""
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


def register(
    cls: type[Network], name: str, cfg: dict[str, Any] | None = None, **defaults: Any
) -> None:
    """Register a variant with timm: a network of ``cls`` with these default arguments.

    With weights of the package, the default arguments are those of the trained network. ``cfg`` is
    timm's description; None: that of a network for ImageNet.
    """
    cfgs = bundled.with_weights({name: cfg or model_cfg()})
    # timm reads them in the module of the function.
    vars(sys.modules[cls.__module__]).setdefault("default_cfgs", {}).update(
        generate_default_cfgs(cfgs)
    )

    def entrypoint(pretrained: bool = False, **kwargs: Any) -> Network:
        own = {}
        if pretrained:
            cfg = resolve_pretrained_cfg(name, pretrained_cfg=kwargs.get("pretrained_cfg"))
            own = bundled.arguments(cfg.file)
        return build(cls, name, pretrained, **(defaults | own | kwargs))

    entrypoint.__name__, entrypoint.__module__ = name, cls.__module__
    entrypoint.__annotations__["return"] = cls  # `class_of` reads it
    register_model(entrypoint)
