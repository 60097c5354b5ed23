"""The fused path against its definition, in value and in gradient: in C++, and in Triton.

Triton's kernels are interpreted here; test_triton.py has the tests for them alone.
"""

import dataclasses
import os
import signal
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import timm
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_runs import (
    IMPLEMENTATIONS,
    each_implementation,
    fused_and_defined,
    kept_tensors,
    native_kernels,
    randomize,
    results_of,
)
from torch import nn

import tetdist
from tetdist.losses import tet_loss
from tetdist.nn import norm_neuron
from tetdist.nn.batch_norm import BatchNorm
from tetdist.nn.fast import build, dispatch, native, native_pool
from tetdist.nn.neurons import LIF
from tetdist.nn.norm_neuron import NormNeuron
from tetdist.nn.surrogates import SURROGATES

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One way to call `NormNeuron`; the defaults are the simplest."""

    neuron: LIF = field(default_factory=LIF)
    timesteps: int = 4
    shape: tuple[int, int, int, int] = (2, 3, 5, 6)  # B, C, H, W
    shared: bool = False
    shortcut: bool = False
    shortcut_norm: bool = False  # if any
    identity: bool = False
    norm_scale: float = 1.0
    training: bool = True
    channels_last: bool = True
    seed: int = 0

    def module(self):
        module = NormNeuron(self.shape[1], self.neuron, norm_scale=self.norm_scale).double()
        randomize(module, self.seed)
        return module.train(self.training)

    def inputs(self):
        generator = torch.Generator().manual_seed(self.seed)

        def draw(timesteps):
            x = torch.randn(timesteps, *self.shape, generator=generator, dtype=torch.float64)
            if self.channels_last:
                x = x.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
            return x.requires_grad_()

        inputs = {"current": draw(1 if self.shared else self.timesteps)}
        if self.shortcut:
            inputs["shortcut"] = draw(self.timesteps)
        if self.identity:
            inputs["identity"] = draw(self.timesteps).detach().gt(0).double().requires_grad_()
        return inputs


class Pair(nn.Module):
    """The module and a norm of its shortcut, as in a Spiking-ResNet's merging layer."""

    def __init__(self, case):
        super().__init__()
        self.neuron = case.module()
        self.norm = None
        if case.shortcut and case.shortcut_norm:
            self.norm = BatchNorm(case.shape[1], scale=1.1 * case.norm_scale).double()
            randomize(self.norm, case.seed + 1)
            self.norm.train(case.training)

    def forward(self, inputs, timesteps):
        shortcut, identity = inputs.get("shortcut"), inputs.get("identity")
        return self.neuron(inputs["current"], timesteps, shortcut, identity, self.norm)


def assert_fused_is_the_definition(case, implementation):
    inputs = case.inputs()
    fused_and_defined(Pair(case), lambda m: m(inputs, case.timesteps), inputs, implementation)


# ----------------------------------------------------------------- the definition, once by hand


@pytest.mark.parametrize("shared", [False, True], ids=["own-current", "shared-current"])
def test_definition_is_norm_plus_shortcut_into_the_neuron(shared):
    case = Case(shape=(2, 2, 2, 3), shared=shared, shortcut=True, norm_scale=0.7, timesteps=3)
    module, inputs = case.module(), case.inputs()
    norm = module.norm
    x = inputs["current"].detach()
    mean = x.mean((0, 1, 3, 4)).view(-1, 1, 1)
    std = (x.var((0, 1, 3, 4), correction=0).view(-1, 1, 1) + norm.eps).sqrt()
    y = 0.7 * norm.weight.view(-1, 1, 1) * (x - mean) / std + norm.bias.view(-1, 1, 1)
    u = torch.zeros_like(x[0])
    expected = []
    for t in range(3):
        u = 0.5 * u + y[0 if shared else t] + inputs["shortcut"][t]
        expected.append(u > 1)
        u = torch.where(u > 1, 0.0, u)
    module.execution = "reference"
    spikes = module(inputs["current"], 3, inputs["shortcut"])
    assert 0.1 < spikes.mean() < 0.9
    assert torch.equal(spikes, torch.stack(expected).double())


# -------------------------------------------------------------------- kernels: the whole of options

any_neuron = st.builds(
    LIF,
    decay=st.sampled_from([0.5, 0.9, 1.0]),
    threshold=st.sampled_from([0.5, 1.0]),
    reset=st.sampled_from(["hard", "soft"]),
    detach_reset=st.booleans(),
    surrogate=st.sampled_from(list(SURROGATES)),
    surrogate_width=st.sampled_from([0.5, 1.0, 2.0]),
)
any_case = st.builds(
    Case,
    neuron=any_neuron,
    timesteps=st.sampled_from([1, 2, 4, 16]),
    shape=st.sampled_from([(2, 3, 5, 6), (1, 1, 1, 1), (1, 3, 1, 1), (3, 1, 2, 3), (1, 8, 4, 4)]),
    shared=st.booleans(),
    shortcut=st.booleans(),
    shortcut_norm=st.booleans(),
    identity=st.booleans(),
    norm_scale=st.sampled_from([1.0, 0.7]),
    training=st.booleans(),
    channels_last=st.booleans(),
    seed=st.integers(0, 2**31),
)


# A library is built for each kind of neuron; these four cover every surrogate, every reset, and
# both rules at the threshold.
BUILT = [
    {"surrogate": "triangle", "reset": "hard", "detach_reset": False},
    {"surrogate": "atan", "reset": "hard", "detach_reset": True, "fires_at_threshold": True},
    {"surrogate": "sigmoid", "reset": "soft", "detach_reset": False, "fires_at_threshold": True},
    {"surrogate": "rectangle", "reset": "soft", "detach_reset": True},
]


@settings(derandomize=True, database=None, deadline=None, max_examples=100)
@given(
    any_case,
    st.sampled_from(BUILT),
    # As many channels as are processed at a time, fewer, and more.
    st.sampled_from([None, (1, 64, 2, 2), (2, 65, 1, 3), (1, 200, 2, 1)]),
)
def test_any_combination_native(case, built, shape):
    neuron = dataclasses.replace(case.neuron, **built)
    case = dataclasses.replace(case, neuron=neuron, shape=shape or case.shape)
    assert_fused_is_the_definition(case, "native")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_native_sums_are_the_same_for_any_number_of_threads(dtype):
    case = Case(shape=(3, 40, 33, 31), timesteps=2, shortcut=True)
    module = case.module().float()
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3, 7):
        inputs = {k: v.detach().to(dtype).requires_grad_() for k, v in case.inputs().items()}
        torch.set_num_threads(threads)
        try:
            with native_kernels():
                results.append(
                    results_of(
                        module, lambda m, x=inputs: m(x["current"], 2, x["shortcut"]), inputs
                    )
                )
        finally:
            torch.set_num_threads(before)
    for other in results[1:]:
        assert other.keys() == results[0].keys()
        assert [k for k, v in results[0].items() if not torch.equal(v, other[k])] == []


def test_native_statistics_do_not_cancel():
    # In float32 the mean square minus the squared mean cancels completely here.
    x = 1000 + torch.randn(2, 5000, 3, generator=torch.Generator().manual_seed(0))
    with native_kernels():
        mean, var = native.NormKernels(1).statistics(x)
    torch.testing.assert_close(mean.double(), x.double().mean((0, 1)), rtol=1e-6, atol=0)
    torch.testing.assert_close(
        var.double(), x.double().var((0, 1), correction=0), rtol=1e-4, atol=0
    )


@pytest.mark.long
def test_a_library_is_built_once_and_survives_processes_that_build_it_at_once(tmp_path):
    script = (
        "import logging; logging.basicConfig(level=logging.INFO)\n"
        "from tetdist.nn.fast import native_pool\n"
        "assert native_pool.pool() is not None"
    )
    environment = {key: value for key, value in os.environ.items() if key != "CXX"} | {
        "XDG_CACHE_HOME": str(tmp_path),
        "TMPDIR": str(tmp_path / "passing"),
        "PYTHONPATH": str(Path(tetdist.__file__).parents[1]),
    }

    (tmp_path / "passing").mkdir()
    with native_kernels(), ExitStack() as stack:
        command = tiny.python("-c", script)
        both = [stack.enter_context(tiny.started(command, tmp_path, environment)) for _ in "12"]
        for process in both:
            output = process.communicate(timeout=120)[0]
            assert process.returncode == 0, output
    (library,) = (tmp_path / "tetdist").iterdir()
    assert library.suffix == ".so"

    # Run the rest in one process, since a start takes seconds.
    script = f"""
import logging, os, signal
logging.basicConfig(level=logging.INFO, format="%(message)s")
from tetdist.nn.fast import native, native_pool
def load(case, **variables):
    print(case, flush=True)
    os.environ.pop("CXX", None)
    os.environ.update(variables)
    native_pool.pool.cache_clear()
    assert native_pool.pool() is not None
load("again")
load("where there is no compiler", CXX="no-such-compiler")
library = {str(library)!r}
with open(library, "rb") as file:
    beginning = file.read(1000)
os.unlink(library)
with open(library, "wb") as file:
    file.write(beginning)  # what a full disk leaves of it; to load it would be a crash
load("damaged")
os.chmod(library, 0o777)
load("a library that others may change")
load("a command of two words", CXX="env g++")
os.chmod(os.path.dirname(library), 0o777)
load("a folder in which others may put one")
os.kill(os.getpid(), signal.SIGKILL)
"""
    status, output = tiny.execute(tiny.python("-c", script), tmp_path, env=environment)
    assert status == -signal.SIGKILL, output
    compiling = f"compiling kernels/pool.cpp, once (into {library.parent})"
    passing = output.rpartition("(into ")[2].rstrip(")\n")
    assert output.splitlines() == [
        "again",
        "where there is no compiler",
        "damaged",
        f"{library} is damaged and is rebuilt",
        compiling,
        "a library that others may change",
        f"{library} is writable by other users and is rebuilt",
        compiling,
        "a command of two words",
        compiling,
        "a folder in which others may put one",
        f"{library.parent} is writable by other users, so kernels are not loaded from it but "
        f"compiled at every start; its owner can fix that with `chmod go-w {library.parent}`",
        f"compiling kernels/pool.cpp, once (into {passing})",
    ]
    assert Path(passing).match(f"{tmp_path}/passing/tetdist-*")
    # wandb, which timm imports, leaves folders of its own.
    assert list((tmp_path / "passing").glob("tetdist-*")) == []


def test_what_a_killed_compilation_has_left_is_removed_later(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in ("tetdist-kernels-old", "tetdist-kernels-new", "of-others"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "kernels.o").touch()
        if name != "tetdist-kernels-new":
            os.utime(tmp_path / name, (0, 0))
    with build._passing_folder() as folder:
        assert folder.parent == tmp_path
    assert {path.name for path in tmp_path.iterdir()} == {"tetdist-kernels-new", "of-others"}


@pytest.mark.parametrize("built", BUILT, ids=[one["surrogate"] for one in BUILT])
def test_every_neuron_triton(built):
    neuron = LIF(surrogate_width=1.5, **built)
    case = Case(neuron=neuron, timesteps=3, shape=(1, 3, 3, 2))
    assert_fused_is_the_definition(case, "triton")


# As many channels as a program processes, fewer, and more; as many rows, and one more.
TRITON_SHAPES = [
    (1, 1, 1, 1),
    (2, 3, 5, 6),
    (1, 64, 2, 2),
    (2, 65, 1, 3),
    (1, 96, 3, 1),
    (5, 64, 1, 1),
]


@settings(derandomize=True, database=None, deadline=None, max_examples=12)
@given(any_case, st.sampled_from(TRITON_SHAPES))
def test_any_combination_triton(case, shape):
    assert_fused_is_the_definition(dataclasses.replace(case, shape=shape), "triton")


# ----------------------------------------------------------------------------- what it leaves alone


@each_implementation
def test_spikes_are_channels_last_so_that_the_next_layer_copies_nothing(implementation):
    case = Case(shape=(2, 8, 4, 4))
    current = case.inputs()["current"]
    rows = norm_neuron.rows_of(current)
    assert rows.data_ptr() == current.data_ptr()
    with IMPLEMENTATIONS[implementation]():
        spikes = case.module()(current, 4)
    assert spikes.shape == current.shape
    assert spikes.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)


@each_implementation
def test_gradients_are_those_that_are_asked_for(implementation):
    """Gradients of the norm alone, of the current alone, and in any layout, such as a pooling's."""
    for trains, frozen in ((True, False), (False, True), (True, True)):
        module, current = Case().module().requires_grad_(not frozen), Case().inputs()["current"]
        current = current.detach().requires_grad_(frozen)

        def call(m, x=current, trains=trains):
            spikes = m(x, 4)
            return spikes if trains else spikes.mean((0, 3, 4)).transpose(0, 1)[:2]

        fused_and_defined(module, call, {"current": current}, implementation)


@each_implementation
def test_only_the_current_is_kept_for_the_backward_pass(implementation):
    # The neuron is cheap because nothing of the size of T membranes is kept between the kernels.
    case = Case(shape=(2, 16, 8, 8), timesteps=16)
    module, current = case.module(), case.inputs()["current"]
    with IMPLEMENTATIONS[implementation](), kept_tensors() as tensors:
        module(current, 16)
    kept = [tensor.numel() for tensor in tensors]
    per_channel = 16
    assert sorted(kept, reverse=True)[0] == current.numel()
    assert sum(kept) <= current.numel() + 8 * per_channel


# ------------------------------------------------------------------------------ without a compiler


def test_without_a_compiler_a_model_trains_and_says_so_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("CXX", str(tmp_path / "no-such-compiler"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "kernels"))
    monkeypatch.setattr(build, "failures", {})
    libraries = (native.neuron_library, native.norm_library, native_pool.pool)
    kept = (*libraries, dispatch._neuron_kernels, dispatch._warn_of_missing_library)
    losses = {"fused": [], "reference": []}
    for one in kept:
        one.cache_clear()
    try:
        for execution, found in losses.items():
            torch.manual_seed(0)
            model = timm.create_model("spiking_convnet", channels=(4, 8), input_size=8)
            model.set_execution(execution)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
            images, target = torch.randn(4, 3, 8, 8), torch.arange(4)
            for _ in range(2):
                loss = tet_loss(model(images, per_timestep=True), target, lambda_=0.1)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                found.append(loss.item())
    finally:
        for one in kept:
            one.cache_clear()
    (message,) = caplog.messages
    assert "the C++ kernels cannot be built or loaded here (there is no C++ compiler)" in message
    assert "apt-get install g++" in message
    assert losses["fused"] == losses["reference"]
    assert losses["fused"][1] < losses["fused"][0]
