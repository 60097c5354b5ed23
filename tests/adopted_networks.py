"""Networks of spikingjelly, adopted and registered as a person would in a file of their own."""

from typing import Any

from spikingjelly.activation_based import functional, layer, neuron, surrogate
from spikingjelly.activation_based.model import sew_resnet
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from tetdist.models.adopted import Adopted, adopt
from tetdist.models.base import model_cfg

default_cfgs = generate_default_cfgs(
    {name: model_cfg(16) for name in ("sj_small", "sj_sew_resnet18")}
)


class Small(nn.Module):
    """Layers as those of the library's VGG, with its dropout, for 16x16 pixels; 16k parameters."""

    def __init__(self, num_classes: int = 4, in_channels: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, channels in ((in_channels, 8), (8, 16)):
            layers += [
                layer.Conv2d(before, channels, 3, padding=1),
                layer.BatchNorm2d(channels),
                # Below the usual 1, so that layers fire before they have learned to.
                neuron.LIFNode(
                    v_threshold=0.3, surrogate_function=surrogate.ATan(), detach_reset=True
                ),
                layer.MaxPool2d(2, 2),
            ]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            layer.Linear(256, 32),
            neuron.ParametricLIFNode(v_threshold=0.1, surrogate_function=surrogate.ATan()),
            layer.Dropout(),
            layer.Linear(32, num_classes),
        )
        functional.set_step_mode(self, "m")

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(2))


@register_model
def sj_small(*_: Any, num_classes: int, timesteps: int, **__: Any) -> Adopted:
    return adopt(Small(num_classes), timesteps=timesteps, num_classes=num_classes)


@register_model
def sj_sew_resnet18(*_: Any, num_classes: int, timesteps: int, **__: Any) -> Adopted:
    net = sew_resnet.sew_resnet18(
        num_classes=num_classes,
        cnf="ADD",
        spiking_neuron=neuron.LIFNode,
        surrogate_function=surrogate.ATan(),
        detach_reset=True,
    )
    functional.set_step_mode(net, "m")
    return adopt(net, timesteps=timesteps, num_classes=num_classes)
