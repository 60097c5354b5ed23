"""Branches whose gradients a kernel adds, against autograd, which adds them one by one."""

import copy
import dataclasses
import weakref
from collections.abc import Callable

import pytest
import torch
from kernel_runs import IMPLEMENTATIONS, draw, randomize
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tetdist.models.attention import HALVING_NEURON, StreamAttention
from tetdist.models.preact_resnet import Block
from tetdist.models.qkformer import Mlp, SelfAttention, TokenAttention
from tetdist.nn import norm_neuron
from tetdist.nn.branches import around, branch, fork
from tetdist.nn.neurons import NeuronConfig
from tetdist.nn.norm_neuron import Neuron
from tetdist.nn.parallel_neurons import PSN

pytestmark = pytest.mark.usefixtures("one_thread")


class Additions(TorchDispatchMode):
    """Counts the sums of two tensors of a layer's size."""

    number = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):  # type: ignore[no-untyped-def]
        result = function(*arguments, **(options or {}))
        if function._schema.name.startswith("aten::add") and result.ndim > 2:
            self.number += 1
        return result


class Spiking(nn.Module):
    """Neurons before layers that exchange spikes."""

    def __init__(self, neuron: NeuronConfig, *layers: nn.Module) -> None:
        super().__init__()
        first = Neuron(neuron, 8)
        first.branches = 4
        self.layers = nn.Sequential(first, *layers)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return y


class Residual(nn.Module):
    """A residual block, which takes T."""

    def __init__(self, neuron: NeuronConfig, width: int) -> None:
        super().__init__()
        self.block = Block(8, width, width // 8, neuron)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.block(x, 4)
        return y


NEURON = dataclasses.replace(HALVING_NEURON, threshold=0.5)
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "spikes": lambda: Spiking(
        *(NEURON, SelfAttention(8, 2, NEURON, 0.1), Mlp(8, 16, NEURON)),
        TokenAttention(8, 2, NEURON, 0.5),
    ),
    "psn": lambda: Spiking(PSN(timesteps=4), Mlp(8, 16, PSN(timesteps=4)), Mlp(8, 16, NEURON)),
    "stream": lambda: StreamAttention(8, 2, NEURON, 0.1),
    "residual": lambda: Residual(NEURON, 8),
    "residual, shared": lambda: Residual(NEURON, 8),
    "projected": lambda: Residual(NEURON, 16),
}


@pytest.mark.parametrize(
    ("implementation", "dtype"),
    # Interpreted, bfloat16 is rounded down.
    [("native", torch.float32), ("native", torch.bfloat16), ("triton", torch.float32)],
    ids=str,
)
@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_are_those_of_autograd_bitwise(
    implementation: str, dtype: torch.dtype, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    network = NETWORKS[name]().to(dtype).train()
    randomize(network)
    x = (2 * draw(0, 1 if "shared" in name else 4, 2, 8, 3, 3)).to(dtype)
    found, additions = [], []
    for forks in (True, False):
        if not forks:
            monkeypatch.setattr(norm_neuron, "fork", lambda *_: None)
            monkeypatch.setattr(norm_neuron, "lead_around", lambda *_: None)
        own, leaf = copy.deepcopy(network), x.clone().requires_grad_()
        with IMPLEMENTATIONS[implementation]():
            y = own(leaf)
            with Additions() as counted:
                (y * draw(1, *y.shape).to(dtype)).sum().backward()
        additions.append(counted.number)
        grads = [one.grad for one in (leaf, *own.parameters()) if one.grad is not None]
        # Biases before a norm have none.
        assert sum(bool(one.abs().max() > 0) for one in grads) > len(grads) / 2
        found.append(grads)
    assert additions[0] == 0 < additions[1]
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


def test_a_branch_takes_no_copy_of_what_was_written_into_since() -> None:
    x = torch.zeros(3)
    first, second = x.detach(), x.detach()
    fork(x, [first])
    fork(x, [second])
    assert branch(x) is second
    x += 1
    assert branch(x) is x


@pytest.mark.parametrize("takes", [True, False])
def test_nothing_is_left_of_a_forward_pass_without_a_backward_pass(takes: bool) -> None:
    """References in a circle through autograd's graph would keep the current for ever."""
    neuron, current = Neuron(NEURON), draw(0, 4, 2, 8, 3, 3).float().requires_grad_()
    neuron.branches = 2
    spikes = neuron(current)
    kept = weakref.ref(current)
    taken = (around(spikes, current), branch(spikes)) if takes else ()
    assert all(one is not current and one is not spikes for one in taken)
    del current, spikes, taken
    assert kept() is None
