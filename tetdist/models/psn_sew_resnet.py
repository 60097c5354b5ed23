"""SEW-ResNet of parallel spiking neurons (PSN, Fang et al., NeurIPS 2023), as in its authors' code.

github.com/fangwei123456/Parallel-Spiking-Neuron, imagenet/. Blocks are those of sew_resnet.py. The
stem differs: a learnt offset is added to the image at each timestep, so convolution and norm run T
times; and spikes are averaged over 3x3 pixels, where a SEW-ResNet max-pools. All weights except the
offsets and the neurons' are those of a ReLU ResNet, from which the published networks start.

The neurons have weights for one T, `model.neuron.timesteps`; another T needs another network. With
other neurons T may be lower than the one that the network was built for.
"""

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn

from tetdist.errors import UserError
from tetdist.models import base
from tetdist.models.sew_resnet import BasicBlock, Connect, SEWResNet
from tetdist.nn.neurons import NeuronConfig
from tetdist.nn.packed import AvgPool
from tetdist.nn.parallel_neurons import PSN
from tetdist.wording import counted


class PSNSEWResNet(SEWResNet):
    """SEW-ResNet with a learnt image offset for each timestep, and a stem that averages.

    Args:
        connect_function, width, in_chans: See `SEWResNet`.
        num_classes, timesteps: See `SpikingNetwork`; T is the largest that it can run.
    """

    default_neuron = PSN(timesteps=4)

    def __init__(
        self,
        layers: tuple[int, ...],
        *,
        neuron: NeuronConfig,
        connect_function: Connect = "add",
        width: int = 64,
        in_chans: int = 3,
        num_classes: int = 1000,
        timesteps: int = 4,
    ) -> None:
        super().__init__(
            BasicBlock,
            layers,
            neuron=neuron,
            connect_function=connect_function,
            width=width,
            in_chans=in_chans,
            num_classes=num_classes,
            timesteps=timesteps,
        )
        self.offsets = nn.Parameter(torch.empty(timesteps))
        trunc_normal_(self.offsets, std=0.02)
        self.pool = AvgPool(3, stride=2, padding=1)
        # The first stage's blocks have identity shortcuts, which pass means on.
        self.highest_inputs = tuple(
            None if i <= layers[0] else highest for i, highest in enumerate(self.highest_inputs)
        )

    def set_timesteps(self, timesteps: int) -> None:
        built_for = len(self.offsets) if hasattr(self, "offsets") else timesteps
        if isinstance(timesteps, int) and timesteps > built_for:
            raise UserError(
                "timesteps: the network has learnt image offsets for "
                f"{counted(built_for, 'timestep')} only, not for {timesteps}; build it with "
                f"timesteps={timesteps}"
            )
        super().set_timesteps(timesteps)

    def time_first(self, x: Tensor) -> Tensor:
        """Return the image plus each timestep's offset, (T, B, C, H, W)."""
        frames = super().time_first(x) + self.offsets[: self.timesteps].view(-1, 1, 1, 1, 1)
        flat = frames.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        return flat.unflatten(0, frames.shape[:2])

    def frame(self, x: Tensor, t: int) -> Tensor:
        if t >= len(self.offsets):
            raise UserError(
                f"the network has image offsets for {counted(len(self.offsets), 'timestep')} "
                "only; call reset() before another step"
            )
        return (x + self.offsets[t]).contiguous(memory_format=torch.channels_last)[None]


# 11,689,916 and 21,798,396 parameters at 1000 classes.
base.register(PSNSEWResNet, "psn_sew_resnet18", layers=(2, 2, 2, 2))
base.register(PSNSEWResNet, "psn_sew_resnet34", layers=(3, 4, 6, 3))
