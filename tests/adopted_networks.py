"""A network of spikingjelly's layers that is small enough to train in seconds."""

from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import Tensor, nn


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
