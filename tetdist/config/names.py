"""Names of tetdist's own networks, losses and optimisers, without importing them.

An import of the networks takes seconds. tests/test_imports.py compares these names with the
registered ones.
"""

from tetdist.errors import UserError, typed
from tetdist.wording import meant

# fmt: off
NETWORKS = (
    "espikeformer_l", "espikeformer_m", "espikeformer_s", "espikeformer_t",
    "i2e_msnet18", "i2e_msnet34",
    "maxformer_10_384", "maxformer_10_512", "maxformer_10_768",
    "ms_qkformer_2_256_dvs", "ms_qkformer_4_384_cifar",
    "ms_qkformer_10_384", "ms_qkformer_10_512", "ms_qkformer_10_768",
    "ms_resnet14_cifar", "ms_resnet18", "ms_resnet34", "ms_resnet104",
    "preact_resnet18", "preact_resnet34", "psn_sew_resnet18", "psn_sew_resnet34",
    "qkformer_2_256_dvs", "qkformer_2_256_gesture", "qkformer_4_384_cifar",
    "qkformer_10_384", "qkformer_10_512", "qkformer_10_768",
    "sdt_2_256_cifar", "sdt_2_256_dvs", "sdt_2_256_gesture", "sdt_2_512_cifar",
    "sdt_6_512", "sdt_8_384", "sdt_8_512", "sdt_8_768", "sdt_10_512",
    "sew_resnet18", "sew_resnet34", "sew_resnet50", "sew_resnet101", "sew_resnet152",
    "spiking_convnet", "spiking_convnet_dvs",
    "spiking_resnet18", "spiking_resnet18_cifar", "spiking_resnet19", "spiking_resnet19_dvs",
    "spiking_resnet34", "spiking_resnet50", "vggsnn",
)
# fmt: on
LOSSES = ("sdt", "tet", "tet_of_means")
OPTIMIZERS = ("sgd", "adam", "adamw")


def check_network(name: str) -> None:
    """Refuse a --model that is none of tetdist's networks."""
    if name not in NETWORKS:
        near = meant(name, NETWORKS, f"`{typed('list', 'networks')}` lists those")
        raise UserError(f"--model: {name!r} is not a spiking model; {near}")
