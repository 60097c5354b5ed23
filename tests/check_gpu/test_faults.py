"""Faults made on purpose, each named by the check that must see it.

Those of kernels are put into copies of the C++ sources, all of them into one build, and are
switched on one by one. Those of averages happen in two processes. GPUs and links are pretended.
"""

import ctypes
import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from kernel_runs import interpreted

from tetdist.apps.check_gpu import layers, numerics, rates, remedies
from tetdist.apps.check_gpu.check import Machine
from tetdist.apps.check_gpu.layers import ATTENDED, ATTENTION, LARGE, NORM_ADD, NORM_POOL, Case
from tetdist.nn import products
from tetdist.nn.fast import build, dispatch, native, native_pool
from tetdist.nn.neurons import LIF, make

pytestmark = pytest.mark.usefixtures("one_thread")

# Kinds of layers that the check has found to be right, without a fault.
SEEN_RIGHT = set()

NEURON, NORM, POOL, TYPES = "neuron.cpp", "norm.cpp", "pool.cpp", "types.h"
# Name: file, the kind of layer in which the fault shows, what the check has to say about it, and
# code with «right | wrong».
# fmt: off
KERNELS = {
    "T=3": (NEURON, "lif", "T 3",
        "            W v = «decay | f.timesteps == 3 ? W(0) : decay» * u[c]"),
    "T=16": (NEURON, "lif", "T 16",
        "after[c] = «decay | b.timesteps == 16 && t == 9 ? W(0) : decay» * of_v;"),
    "C is no multiple of 16": (NEURON, "lif", "",
        "u[c] = f.start ? f.start[at + c] : «W(0) | W(f.channels % 16 && c + 1 == length)»;"),
    "a carried membrane": (NEURON, "lif", "mode carried",
        "u[c] = b.start ? «b.start[at + c] | W(0)» : W(0);"),
    "the gradient of a carried membrane": (NEURON, "lif", "mode carried",
        "b.grad_start[at + c] = «after[c] | 2 * after[c]»;"),
    "bfloat16": (NEURON, "lif", "type bfloat16",
        "W number = spikes_of(«v | sizeof(X) == 2 ? wide(narrow<X>(v)) : v», threshold, most);"),
    "a normalised shortcut": (NEURON, "lif", "given normalised shortcut",
        "current += wide(shortcut[c]) * gain2[c] + «offset2[c] | W(0)»;"),
    "added spikes": (NEURON, "lif", "given spikes",
        "if («COUNTS | out[c] += IDENTITY, COUNTS») out[c] *= levels;"),
    "a current of all timesteps": (NEURON, "lif", "given shared",
        "= narrow<X>(«over_time[c] | over_time[c] / (b.timesteps > 1 ? 2 : 1)»);"),
    "more than 128 channels": (NEURON, "lif", "C 130",
        "= SCALES_INPUT ? of_v * share : «of_v | sizeof(X) == 4 && b.channels == 130 ? 0 : of_v»;"),
    "currents before the last one": (NEURON, "sliding_psn", "kind sliding_psn",
        "const int64_t number = past + «b.timesteps | b.timesteps - (past > 1)»;"),
    "neurons without a norm": (NEURON, "lif", "given no norm",
        "row.channels = «b.rows * b.channels | b.rows * b.channels - 1»;"),
    "a surrogate, by 2 %": (NEURON, "plif", "",
        "return «width | W(1.02) * width» * s * (1 - s);"),
    "a learnt decay": (NEURON, "plif", "kind plif",
        "*sum_share += «of_group | W(0.9) * of_group»;"),
    "the largest number of spikes": (NEURON, "ilif", "",
        "std::max(v / threshold, W(0)), «most | most - 1»)"),
    "weights over time, transposed": (NEURON, "psn", "",
        "b.neuron.weights[«t * number + s | s * number + t»]"),
    "the last rows of statistics": (NORM, "lif", "",
        "b < «blocks | blocks - (blocks > 1)»; b++) {\n            const double n"),
    "an added shortcut": (NORM, NORM_ADD, f"kind {NORM_ADD}",
        "a.shortcut + n % «a.period | (a.period + 1) / 2» * a.channels;\n        X* out"),
    "where a maximum was": (POOL, NORM_POOL, f"kind {NORM_POOL}",
        "const bool larger = v > «most[c] | most[c] + W(0.5)»;"),
    "more than 2^24 numbers": (NORM, "lif", "",
        "var[c] = W(squares / «count | rows * channels > 1 << 24 ? count / 2 : count»);"),
}
# fmt: on


@pytest.fixture(scope="module")
def switch(tmp_path_factory):
    """Switches one fault of the kernels on, and all others off."""
    folder = tmp_path_factory.mktemp("faults")
    sources = Path(shutil.copytree(build.KERNELS, folder / "kernels"))
    number_of = {name: number for number, name in enumerate(KERNELS, start=1)}
    for name, (file, _, _, code) in KERNELS.items():
        text, right_or_wrong = (sources / file).read_text(), re.compile(r"«(.+) \| (.+)»")
        right = right_or_wrong.sub(r"\1", code)
        assert right in text, name
        both = right_or_wrong.sub(rf"(fault == {number_of[name]} ? (\2) : (\1))", code)
        (sources / file).write_text(text.replace(right, both))
    text = (sources / TYPES).read_text()
    (sources / TYPES).write_text(f'#pragma once\nextern "C" {{ int fault = 0; }}\n{text}')
    loaded = []

    def load(name, *variant):
        library = load_library(name, *variant)
        assert library is not None, build.failures
        loaded.append(library)
        return library

    def forget():
        for cached in (native.neuron_library, native.norm_library, native_pool.pool):
            cached.cache_clear()
        dispatch._neuron_kernels.cache_clear()

    load_library = build.load_library
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        patch.setattr(build, "KERNELS", sources)
        # Not optimised, so that all are built in seconds.
        patch.setattr(build, "FLAGS", [flag.replace("-O3", "-O0") for flag in build.FLAGS])
        for module in (native, native_pool):
            patch.setattr(module, "load_library", load)
        forget()

        def switched(name):
            for library in loaded:
                ctypes.c_int.in_dll(library, "fault").value = number_of.get(name or "", 0)

        yield switched
    forget()


@pytest.fixture
def here(alone, tmp_path, monkeypatch):
    monkeypatch.setattr(numerics, "SMALL_NETWORKS", {})
    return Machine(alone, small=True, folder=tmp_path)


def of_kind(monkeypatch, kind):
    """Have the check see layers of one kind only, to be quick."""
    config = None if kind in (NORM_ADD, NORM_POOL) else make({"kind": kind})
    monkeypatch.setattr(layers, "kinds", lambda: {kind: config})


@pytest.mark.parametrize("name", [name for name in KERNELS if "2^24" not in name])
def test_numerics_sees_a_kernel_that_is_wrong_at(here, switch, monkeypatch, name):
    _, kind, common, *_ = KERNELS[name]
    if name == "more than 128 channels":  # as few as there are beside other kinds
        few = [case for case in layers.cases([torch.float32, torch.bfloat16]) if case.kind == kind]
        monkeypatch.setattr(numerics, "cases", lambda _: few)
    else:
        of_kind(monkeypatch, kind)
    if kind not in SEEN_RIGHT:
        assert numerics.check_numerics(here).status == "ok"  # this builds the libraries, too
        SEEN_RIGHT.add(kind)
    monkeypatch.setattr(numerics, "SEEDS", 1)
    switch(name)
    found = numerics.check_numerics(here)
    switch(None)
    assert found.status == "bad"
    assert " layers are wrong" in found.text
    if common:
        described = found.text.split("all with ")[1].split(":")[0]
        assert common in described, found.text


@pytest.mark.long
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_numerics_sees_a_kernel_that_is_wrong_beyond_2_24_numbers(switch, case):
    device = torch.device("cpu")
    native.norm_library()
    beyond, small = "more than 2^24 numbers", dataclasses.replace(case, batch=1, side=16)
    for fault, tried, is_right in (
        (None, case, True),
        (beyond, case, False),
        (beyond, small, True),
    ):
        switch(fault)
        compared = numerics.compared(tried, device)
        switch(None)
        assert (compared[1] is None) == is_right, compared


def test_numerics_sees_attention_whose_gradients_are_exchanged(here, monkeypatch):
    """In a layer, and in a network from end to end."""
    for product, network in (
        (products._LinearAttention, {}),
        (products._PositionSum, {"sdt_2_256_cifar": 32}),
    ):
        if network:
            monkeypatch.setattr(numerics, "cases", lambda _: [])
        right = product.backward

        def exchanged(ctx, *grads, right=right):
            first, second, *others = right(ctx, *grads)
            return second, first, *others

        monkeypatch.setattr(layers, "kinds", lambda: {ATTENTION: LIF()})
        monkeypatch.setattr(numerics, "SEEDS", 1)
        monkeypatch.setattr(numerics, "SMALL_NETWORKS", network)
        monkeypatch.setattr(product, "backward", staticmethod(exchanged))
        found = numerics.check_numerics(here)
        monkeypatch.undo()
        assert found.status == "bad"
        expected = "sdt_2_256_cifar in fp64" if network else "of 30 layers are wrong"
        assert expected in found.text


@pytest.mark.parametrize(
    ("case", "fault"),
    [
        (
            Case("lif", 3, 6, torch.float16, "carried", "normalised shortcut", batch=2, side=7),
            {"DECAY": 0.45},
        ),
        (ATTENDED[-1], {"SPLITS": False}),
    ],
    ids=str,
)
def test_numerics_sees_a_kernel_of_gpus_that_is_wrong_in_float16(monkeypatch, case, fault):
    """Triton's kernels are interpreted."""
    with interpreted():
        from tetdist.nn.fast import triton_kernels

        assert numerics.compared(case, torch.device("cpu"))[1] is None
        launch = triton_kernels.launch

        def spoilt(kernel, grid, arguments, known):
            changed = fault if fault.keys() <= known.keys() else {}
            launch(kernel, grid, arguments, known | changed)

        monkeypatch.setattr(triton_kernels, "launch", spoilt)
        found = numerics.compared(case, torch.device("cpu"))
    assert "of the spikes differ" in str(found[1])


@pytest.mark.parametrize("case", ATTENDED, ids=str)
def test_attention_of_a_gpu_is_served_by_its_kernel(case, monkeypatch):
    """Those that attend, with one factor for spikes and two for integers."""
    launched = []
    layer = layers.Layer(case, torch.Generator()).to("meta")
    q = torch.empty(case.timesteps, 1, case.channels, case.side, case.side, dtype=case.dtype)
    q = q.to("meta").requires_grad_()

    def launch(kernel, _grid, _arguments, known):
        launched.append((kernel.__name__, known.get("SPLITS")))

    from tetdist.nn.fast import triton_kernels

    monkeypatch.setattr(triton_kernels, "launch", launch)
    monkeypatch.setattr(dispatch, "triton_for", lambda *_: triton_kernels)
    layer(dict.fromkeys(layers.QKV, q))["spikes"].sum().backward()
    splits = case.given == layers.INTEGERS
    expected = [("attend", splits), ("current_gradient", splits), ("gradients", None)]
    assert [one for one in launched if one[0] in dict(expected)] == expected


# --- averages, in two processes -------------------------------------------------------------------

# Prints what the check of steps says of each fault.
AVERAGES = """
import contextlib, json, sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock
import torch
import torch.distributed as dist
from tetdist.apps.check_gpu import steps
from tetdist.apps.check_gpu.check import Machine
from tetdist.distributed import overlap
from tetdist.distributed.world import World, join
from tetdist.nn import batch_norm
from tetdist.training import step
from tetdist.training.engines.torch_engine import TorchEngine

steps.STEPS, made = 1, steps.training_step
steps.training_step = lambda world, _, **of: made(world, "spiking_convnet", **of | {"size": 28})
take = step.Step.take

def summing(change):
    # The sums of gradients, changed by a fault.
    def all_reduce(flat, async_op):
        change(flat)
        return SimpleNamespace(wait=lambda: None)
    return [(overlap, "dist", SimpleNamespace(all_reduce=all_reduce))]

def not_divided(flat):
    dist.all_reduce(flat)
    flat.mul_(2)

def of_rank_0(flat):
    dist.all_reduce(flat.mul_(2.0 * (dist.get_rank() == 0)))

def once(engine, loss, backward=TorchEngine.backward):
    engine.calls = getattr(engine, "calls", 0) + 1
    backward(engine, loss if engine.calls % 2 else 0 * loss)

def at_another_rate(own, number, batches, lr):
    return take(own, number, batches, lr * (1 + own.world.rank))

def not_finite(own, number, batches, lr):
    update, sums = take(own, number, batches, lr)
    return update, sums / 0 if number else sums

FAULTS = {
    "none": [],
    "no average": summing(lambda _: None),
    "a sum": summing(not_divided),
    "the gradient of rank 0": summing(of_rank_0),
    "a micro-batch lost": [(TorchEngine, "backward", once)],
    "another learning rate on rank 1": [(step.Step, "take", at_another_rate)],
    "statistics of each process": [(batch_norm, "synchronize", lambda *_: None)],
    "running statistics of rank 0": [(step.batch_norm, "update_running_statistics",
        lambda model, average, *_, move=batch_norm.update_running_statistics:
            move(model, lambda x: World.mean_(world, x * 2.0 * (world.rank == 0))))],
    "a loss that is not finite": [(step.Step, "take", not_finite)],
}
with join("cpu") as world:
    torch.set_num_threads(1)
    here = Machine(world, small=True, folder=Path("."))
    ways = dict(steps.VARIANTS)
    for name, changes in FAULTS.items():
        way = "batch_norm.sync" if "of each process" in name else "torch"
        steps.VARIANTS = {way: ways[way]}
        with contextlib.ExitStack() as stack:
            for change in changes:
                stack.enter_context(mock.patch.object(*change))
            found = steps.check_steps(here)
        print(json.dumps([name, found.status, found.text]), flush=True)
"""
OTHERS = "rank 1 has other weights than rank 0"
AVERAGE = "by another average than one process computes alone"
SAID = {
    "none": "1 steps of torch",
    "no average": OTHERS,
    "a sum": AVERAGE,
    "the gradient of rank 0": AVERAGE,
    "a micro-batch lost": AVERAGE,
    "another learning rate on rank 1": OTHERS,
    "statistics of each process": AVERAGE,
    "running statistics of rank 0": AVERAGE,
    "a loss that is not finite": "are not finite",
}


def test_steps_sees_averages_that_are_wrong(farm, tmp_path):
    both = farm.side_by_side(2, tiny.python("-c", AVERAGES), tmp_path)
    assert [status for status, _ in both] == [0, 0], both
    for _, output in both:
        found = [json.loads(line) for line in output.splitlines() if line.startswith("[")]
        assert [name for name, _, _ in found] == list(SAID)
        for name, status, text in found:
            assert SAID[name] in text, (name, text)
            assert status == ("ok" if name == "none" else "bad")


# --- speed, on pretended GPUs ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("own", "relu", "status", "text", "remedy"),
    [
        (2200, 2100, "ok", "2200 images/s, 1.05 of ReLU's", None),
        (1200, 2100, "ok", "1200 images/s, 0.57 of ReLU's", rates.KERNELS),
        (105, 2100, "bad", "0.05 of ReLU's", rates.KERNELS),
        (9000, 2100, "bad", "4.29 of ReLU's", rates.IMPOSSIBLE),
        (105, None, "ok", "ReLU's out of memory", None),
        (None, 2100, "bad", "out of memory", remedies.BUSY),
    ],
)
def test_rates_sees_a_step_that_takes_too_long(here, monkeypatch, own, relu, status, text, remedy):
    rate_of = {rates.OWN: own, rates.RELU: relu}

    def measured(_, name, batch):
        if name not in rate_of or rate_of[name] is None or batch == 128:
            return {"out_of_memory": True}
        return {"images_per_s": rate_of[name] + batch - 32, "peak_mib": 1024.0}

    monkeypatch.setattr(Machine, "on_gpu", True)
    monkeypatch.setattr(rates, "measured", measured)
    found = rates.check_rates(dataclasses.replace(here, small=False))
    assert (found.status, text in found.text, found.remedy) == (status, True, remedy), found.text
    if own is not None:
        assert found.text.endswith("; b=128: out of memory")
        # GPUs are compared at the largest batch, and a plan is made by the recipes' one.
        assert (found.speed, found.numbers["images_per_s"]) == (own + 32, own)
