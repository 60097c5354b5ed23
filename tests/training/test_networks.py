"""Small transformers, and ResNets whose shortcuts join membranes, train as any other network does:
on processes, and stopped and continued."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from safetensors.torch import load_file
from tiny import Farm

ConfigWriter = Callable[..., Path]

NEURON = {
    **{"decay": 0.5, "threshold": 1.0, "detach_reset": True},
    **{"surrogate": "sigmoid", "surrogate_width": 2.0, "fires_at_threshold": True},
}
NETWORKS: dict[str, dict[str, Any]] = {
    "qkformer": {
        "name": "qkformer_4_384_cifar",
        "arguments": {
            **{"widths": [8, 8, 16], "depths": [1, 1, 1], "heads": 2},
            "drop_path_rate": 0.3,
        },
        "neuron": NEURON,
    },
    "sdt": {"name": "sdt_2_256_cifar", "arguments": {"channels": 16}, "neuron": NEURON},
    "preact": {
        "name": "preact_resnet18",
        "arguments": {"width": 8},
        "neuron": {"decay": 0.2, "reset": "soft", "surrogate": "sigmoid", "surrogate_width": 4.0},
    },
    # What is dropped follows from the seed, the step and the sample, on any number of processes.
    "ms": {
        "name": "ms_resnet18",
        "arguments": {"width": 8, "stem": "deep", "drop_rate": 0.2, "drop_path_rate": 0.3},
        "neuron": {"decay": 0.25, "threshold": 0.5, "surrogate": "rectangle"},
    },
}
OPTIMIZERS = {
    "qkformer": {"kind": "adamw", "lr": 0.01},
    "sdt": {"kind": "adamw", "lr": 0.01},
    "preact": {"kind": "sgd", "lr": 0.1},
    "ms": {"kind": "sgd", "lr": 0.1},
}
STEPS = 6


def long(*names: str) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.long) for name in names]


def configured(network: str, **changes: Any) -> dict[str, Any]:
    optimizer = OPTIMIZERS[network]
    return {
        "model": NETWORKS[network],
        "batch": {"global": 8, "micro": 2, "eval": 7},
        "phases": [{"epochs": 2, "timesteps": 2, "optimizer": optimizer}],
        "execution": "fused",
        "max_steps": STEPS,
        "save.every_steps": 2,
        "engine": "torch",
        **changes,
    }


@pytest.mark.parametrize("network", ["qkformer", "ms", *long("sdt", "preact")])
def test_two_processes_are_one(
    network: str, farm: Farm, tiny_config: ConfigWriter, tmp_path: Path
) -> None:
    """In float64, where rounding flips no spike."""
    file = tiny_config(configured(network, precision="fp64", recompute="blocks"))
    for world in (1, 2):
        outcome = farm(file, f"name=on{world}", world=world)
        assert outcome.status == 0, outcome.text
    one, two = (tiny.metrics(tmp_path / "runs" / f"on{world}", "train") for world in (1, 2))
    assert len(one) == STEPS
    losses = [line["loss"] for line in one]
    assert [line["loss"] for line in two] == pytest.approx(losses, rel=1e-9)
    assert len(set(losses)) == STEPS
    weights = [
        load_file(tiny.newest(tmp_path / "runs" / f"on{world}") / "model.safetensors")
        for world in (1, 2)
    ]
    for key, value in weights[0].items():
        # Adam makes steps of one size of gradients that are nothing but rounding, as those of
        # biases before a norm are.
        if not key.endswith("conv.bias"):
            assert (value - weights[1][key]).abs().max() <= 1e-6 * value.abs().max().clamp(1), key


@pytest.mark.parametrize("network", ["sdt", *long("qkformer", "ms", "preact")])
def test_stopped_and_continued_to_the_bit(
    network: str, farm: Farm, tiny_config: ConfigWriter, tmp_path: Path
) -> None:
    file = tiny_config(configured(network, precision="bf16"))
    straight = farm(file, "name=straight")
    assert straight.status == 0, straight.text
    stopped = farm(file, "name=stopped", stop=("step", 3, signal.SIGTERM))
    assert stopped.status == 128 + signal.SIGTERM, stopped.text
    continued = farm(file, "name=stopped")
    assert continued.status == 0, continued.text
    tiny.assert_same_run(tmp_path / "runs" / "straight", tmp_path / "runs" / "stopped")
