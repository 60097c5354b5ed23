"""Batch norm plus a shortcut, fused, against the definition: in C++, and in Triton."""

import itertools
from dataclasses import dataclass
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_runs import (
    IMPLEMENTATIONS,
    assert_same,
    each_implementation,
    fused_and_defined,
    interpreted,
    kept_tensors,
    needs_triton,
    randomize,
    results_of,
)
from torch import nn

from tetdist.nn.batch_norm import BatchNorm, defer_running_statistics, recomputing, synchronize
from tetdist.nn.fast import native
from tetdist.nn.norm_neuron import NormAdd

pytestmark = pytest.mark.usefixtures("one_thread")


Shortcut = Literal["none", "plain", "normalized"]
Layout = Literal["channels last", "channels first", "batch first"]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One way to call `NormAdd`."""

    shape: tuple[int, ...] = (3, 2, 3, 5, 4)  # T, B, C, H, W
    shortcut: Shortcut = "plain"
    shared: bool = False  # the shortcut, by all timesteps
    copies: int = 1
    training: bool = True
    layout: Layout = "channels last"
    seed: int = 0
    dtype: torch.dtype = torch.float64

    def inputs(self):
        generator = torch.Generator().manual_seed(self.seed)

        def draw(timesteps):
            shape = (timesteps, *self.shape[1:])
            x = 0.3 + 1.5 * torch.randn(shape, generator=generator, dtype=torch.float64)
            x = x.to(self.dtype)
            match self.layout:
                case "channels last":
                    x = x.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
                case "channels first":
                    pass
                case "batch first":
                    x = x.transpose(0, 1).contiguous().transpose(0, 1)
            return x.requires_grad_()

        inputs = {"current": draw(self.shape[0])}
        if self.shortcut != "none":
            inputs["shortcut"] = draw(1 if self.shared else self.shape[0])
        return inputs


class Pair(nn.Module):
    """The module, and a norm of its shortcut."""

    def __init__(self, case):
        super().__init__()
        self.add = NormAdd(case.shape[2])
        self.norm = BatchNorm(case.shape[2], scale=1.1) if case.shortcut == "normalized" else None
        self.copies = case.copies
        self.to(torch.promote_types(case.dtype, torch.float32))
        randomize(self, case.seed)
        self.train(case.training)

    def forward(self, inputs):
        return self.add(inputs["current"], inputs.get("shortcut"), self.norm, copies=self.copies)


def results(case):
    pair, inputs = Pair(case), case.inputs()
    return results_of(pair, lambda module: module(inputs), inputs)


def assert_fused_is_the_definition(case, implementation):
    inputs = case.inputs()
    fused_and_defined(Pair(case), lambda module: module(inputs), inputs, implementation)


# As many channels as are processed at a time, fewer and more, and no round number.
SHAPES = [
    (3, 2, 3, 5, 4),
    (1, 1, 1, 1, 2),
    (2, 3, 1, 2, 3),
    (4, 1, 8, 3, 3),
    (2, 2, 64, 1, 2),
    (3, 1, 65, 2, 1),
    (2, 5, 96, 1, 1),
]
any_case = st.builds(
    Case,
    shape=st.sampled_from(SHAPES),
    shortcut=st.sampled_from(["none", "plain", "normalized"]),
    shared=st.booleans(),
    copies=st.sampled_from([1, 4]),
    training=st.booleans(),
    layout=st.sampled_from(["channels last", "channels first", "batch first"]),
    seed=st.integers(0, 2**31),
)


def test_definition_by_hand():
    case = Case(shortcut="normalized")
    pair, inputs = Pair(case), case.inputs()
    pair.add.execution = "reference"
    expected = []
    for name, norm, scale in (("current", pair.add.norm, 1.0), ("shortcut", pair.norm, 1.1)):
        x = inputs[name].detach()
        mean, var = (x.mean((0, 1, 3, 4)), x.var((0, 1, 3, 4), correction=0))
        gain = scale * norm.weight / (var + norm.eps).sqrt()
        expected.append((x - mean.view(-1, 1, 1)) * gain.view(-1, 1, 1) + norm.bias.view(-1, 1, 1))
    torch.testing.assert_close(pair(inputs), expected[0] + expected[1])


@settings(derandomize=True, database=None, deadline=None, max_examples=100)
@given(any_case)
def test_any_combination_native(case):
    assert_fused_is_the_definition(case, "native")


@settings(derandomize=True, database=None, deadline=None, max_examples=12)
@given(any_case)
def test_any_combination_triton(case):
    assert_fused_is_the_definition(case, "triton")


@each_implementation
def test_many_rows_are_divided(implementation, monkeypatch):
    case = Case(shape=(2, 2, 16, 24, 24), shortcut="normalized", shared=True)
    if implementation == "triton":
        needs_triton()
        from tetdist.nn.fast import triton_kernels

        monkeypatch.setattr(triton_kernels, "PROGRAMS", dict.fromkeys(triton_kernels.PROGRAMS, 3))
    assert_fused_is_the_definition(case, implementation)


def test_native_results_are_the_same_for_any_number_of_threads():
    case = Case(shape=(2, 3, 40, 33, 31), shortcut="normalized", dtype=torch.bfloat16)
    found = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        try:
            with IMPLEMENTATIONS["native"]():
                found.append(results(case))
        finally:
            torch.set_num_threads(before)
    for other in found[1:]:
        assert [k for k, v in found[0].items() if not torch.equal(v, other[k])] == []


@pytest.mark.parametrize("shortcut", ["none", "normalized"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@each_implementation
def test_types(implementation, dtype, shortcut):
    """Rounded once, so at most as far from the exact result as the definition."""
    case = Case(shape=(2, 2, 24, 6, 5), shortcut=shortcut, dtype=dtype)
    with IMPLEMENTATIONS[implementation]():
        found = results(case)
    assert found["output"].dtype == found["gradient of current"].dtype == dtype
    pair = Pair(case).double()
    pair.add.execution = "reference"
    inputs = {name: x.detach().double().requires_grad_() for name, x in case.inputs().items()}
    exact = results_of(pair, lambda module: module(inputs), inputs)
    for name, value in exact.items():
        # Gradients come in from the same weights rounded to the type.
        error = (found[name].double() - value).norm() / value.norm().clamp(min=1e-3)
        assert error < 2 * torch.finfo(dtype).eps, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_triton_is_cpp_bitwise(shared, dtype):
    """Equal except for sums, which are added in another order."""
    case = Case(shape=(3, 1, 20, 6, 5), shortcut="normalized", shared=shared, dtype=dtype)
    pair, inputs = Pair(case), case.inputs()
    assert pair.norm is not None
    rows = [x.detach().permute(0, 1, 3, 4, 2).flatten(1, 3).contiguous() for x in inputs.values()]
    wide = torch.promote_types(dtype, torch.float32)
    ours = native.NormKernels(3)
    with torch.no_grad(), interpreted():
        from tetdist.nn.fast import triton_kernels

        theirs = triton_kernels.NormKernels(3)
        norms = [
            ours.normalization(n, x, n.weight, n.bias)
            for n, x in zip((pair.add.norm, pair.norm), rows, strict=True)
        ]
        grad = torch.randn(rows[0].shape, dtype=torch.float64).to(dtype)
        outputs = [one.add(*rows, *norms) for one in (ours, theirs)]
        if dtype == torch.bfloat16:
            # Triton's interpreter cuts off what a GPU rounds (test_triton_code.py).
            torch.testing.assert_close(*outputs, rtol=2**-7, atol=0)
        else:
            assert torch.equal(*outputs)
        sums = [one.add_sums(*rows, *norms, grad) for one in (ours, theirs)]
        assert all(one.grad_learned == () for one in sums)
        for one, other in zip(*(one[:3] for one in sums), strict=True):
            assert one.dtype == wide
            torch.testing.assert_close(one, other)
        for given_sums in (None, (sums[0].grad, sums[0].grad_xhat)):
            gradients = [
                one.norm_gradient(rows[0], grad, norms[0], given_sums) for one in (ours, theirs)
            ]
            tolerance = 2 * torch.finfo(dtype).eps
            torch.testing.assert_close(*gradients, rtol=tolerance, atol=tolerance)


@each_implementation
def test_only_what_was_normalised_is_kept(implementation):
    for shortcut, expected in (("none", 1), ("plain", 1), ("normalized", 2)):
        case = Case(shape=(2, 2, 8, 6, 6), shortcut=shortcut)
        pair, inputs = Pair(case), case.inputs()
        with IMPLEMENTATIONS[implementation](), kept_tensors() as kept:
            output = pair(inputs)
        large = {tensor.data_ptr() for tensor in kept if tensor.numel() > 8}
        assert large == {x.data_ptr() for x in list(inputs.values())[:expected]}
        assert output.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)


@each_implementation
def test_gradients_are_those_that_are_asked_for(implementation):
    """Gradients of a current alone, a shortcut alone, with frozen weights, in any layout."""
    for frozen, without in itertools.product((False, True), ("current", "shortcut", "")):
        found = []
        for execution in ("fused", "reference"):
            pair, inputs = Pair(Case()), Case().inputs()
            pair.add.execution = execution
            pair.requires_grad_(not frozen)
            if without:
                inputs[without] = inputs[without].detach()
            with IMPLEMENTATIONS[implementation]():
                output = pair(inputs).mean((0, 3, 4)).transpose(0, 1)[:2]
                found.append(_gradients(output, pair, inputs))
        assert_same(*found)


def _gradients(output, pair, inputs):
    output.square().sum().backward()
    named = {**inputs, **dict(pair.named_parameters())}
    return {name: x.grad for name, x in named.items() if x.grad is not None}


@pytest.mark.parametrize("processes", [1, 2])
@each_implementation
def test_statistics_are_recorded_as_by_the_definition(implementation, processes):
    """At once or once a step, on one process or several, and not when a block is recomputed."""
    for deferred, shared in itertools.product((False, True), (False, True)):
        found = []
        case = Case(shortcut="normalized", shared=shared, copies=2)
        for execution in ("fused", "reference"):
            pair, inputs = Pair(case), case.inputs()
            pair.add.execution = execution
            if deferred:
                defer_running_statistics(pair)
            if processes > 1:
                # Any linear function of one process's values serves.
                synchronize(pair, lambda x: x.mul_(0.75), processes)
            with IMPLEMENTATIONS[implementation]():
                with recomputing():
                    pair(inputs)
                found.append(results_of(pair, lambda m, x=inputs: m(x), inputs))
        assert_same(*found)
        changed = "add.norm.pending_mean" if deferred else "add.norm.running_mean"
        assert not torch.equal(found[0][changed], dict(Pair(case).named_buffers())[changed])


def test_types_that_differ_are_added_by_the_definition():
    case = Case(dtype=torch.float32)
    pair, inputs = Pair(case), case.inputs()
    low = {"current": inputs["current"].bfloat16(), "shortcut": inputs["shortcut"]}
    fused = pair(low)
    pair.add.execution = "reference"
    assert fused.dtype == torch.float32
    assert torch.equal(Pair(case)(low), fused)
