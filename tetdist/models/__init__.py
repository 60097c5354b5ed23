"""Spiking networks, registered with timm: ``timm.create_model("sew_resnet34", timesteps=4)``."""

from tetdist.models.base import SpikingNetwork
from tetdist.models.sew_resnet import SEWResNet
from tetdist.models.spiking_convnet import SpikingConvNet
from tetdist.models.spiking_resnet import SpikingResNet
from tetdist.models.vggsnn import VGGSNN

MODEL_MODULES = ("sew_resnet", "spiking_resnet", "vggsnn", "spiking_convnet")

__all__ = ["VGGSNN", "SEWResNet", "SpikingConvNet", "SpikingNetwork", "SpikingResNet"]
