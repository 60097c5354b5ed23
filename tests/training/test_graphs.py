"""A run with CUDA graphs is the run without them, to the bit: what a CPU can show of it.

Two things stand in for a GPU's graph. A tape takes down torch's operations and the tensors that
they read and write, and repeats these alone: like a graph it does nothing of what Python does, and
finds its numbers where they were when it was made. Fused passes, which are no operations of torch's
on a CPU, are run again by Python instead. tests/gpu_without_a_gpu/ looks at what a capture asks.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tiny import Outcome
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from tetdist.nn.batch_norm import BatchNorm
from tetdist.training import graphs, trainer
from tetdist.training.engines import base, torch_engine

ConfigWriter = Callable[..., Path]
Main = Callable[..., Outcome]
Captured = tuple[Tensor, Callable[[], None]]


class Tape(TorchDispatchMode):
    """Operations of torch, with the tensors that they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        result = function(*arguments, **(options or {}))
        # The memory as it is now, whatever becomes of the tensor that names it.
        held = tree_map_only(Tensor, Tensor.detach, (arguments, options or {}, result))
        self.operations.append((function, *held))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        """Repeat them on the same memory."""
        for function, arguments, options, result in self.operations:
            again = function(*arguments, **options)
            inputs = {_memory(x) for x in tree_leaves((arguments, options)) if torch.is_tensor(x)}
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if torch.is_tensor(old) and _memory(old) not in inputs:
                    old.copy_(new)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def taped(function: Callable[[], Tensor]) -> Captured:
    for _ in range(graphs.WARM_UPS):
        function()
    with Tape() as tape:
        result = function()
    return result, tape.replay


def run_again(function: Callable[[], Tensor]) -> Captured:
    for _ in range(graphs.WARM_UPS):
        function()
    result = function()
    recorded = BatchNorm.recorded

    def replay() -> None:
        # What is counted on the host is not counted by a graph.
        BatchNorm.recorded = lambda _: None  # type: ignore[method-assign]  # until the next line
        try:
            result.copy_(function())
        finally:
            BatchNorm.recorded = recorded  # type: ignore[method-assign]  # as it was

    return result, replay


@pytest.fixture
def both(
    main: Main, tiny_config: ConfigWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., tuple[Path, Path]]]:
    """Trains with and without graphs: (changes, what stands in); the folders of the runs."""
    monkeypatch.setattr(trainer, "_check_device", lambda *_: None)
    captures = 0

    def run(
        changes: dict[str, Any], capture: Callable[..., Captured], *, captured: int = 1
    ) -> tuple[Path, Path]:
        def counting(function: Callable[[], Tensor]) -> Captured:
            nonlocal captures
            captures += 1
            return capture(function)

        monkeypatch.setattr(graphs, "capture", counting)
        for name, with_graphs in (("plain", False), ("graphs", True)):
            file = tiny_config({"phases.0.epochs": 1, "name": name, "engine": "torch"} | changes)
            outcome = main(file, f"cuda_graphs={str(with_graphs).lower()}")
            assert outcome.status == 0, outcome.text
            assert ("check_gpu" in outcome.text) == with_graphs
        assert captures == captured
        return tmp_path / "runs/plain", tmp_path / "runs/graphs"

    return run


CASES: dict[str, dict[str, Any]] = {
    "clipped, smoothed, distilled from itself, mixed": {
        "gradient_clipping": 0.5,
        "phases.0.optimizer": {"kind": "adamw", "lr": 0.01, "weight_decay": 0.1},
        "loss": {"label_smoothing": 0.1, "distillation": {"self_weight": 0.3}},
        "data.mixup": 0.2,
        "data.cutmix": 1.0,
    },
    "bf16, blocks, one micro-batch": {
        "precision": "bf16",
        "recompute": "blocks",
        "batch": {"global": 8, "micro": 8, "eval": 7},
    },
    "segments, an optimiser that the host asks first": {
        "recompute": {"timesteps": 1},
        "phases.0.timesteps": 3,
        "phases.0.optimizer": {"kind": "timm:lamb", "lr": 0.01},
    },
}


long = pytest.mark.long


@pytest.mark.parametrize(
    ("case", "capture"),
    [
        *[(case, taped) for case in CASES],
        *[pytest.param(case, run_again, marks=long) for case in CASES],
        ("fused", run_again),
    ],
)
def test_a_run_is_the_same_with_graphs(
    case: str, capture: Callable[..., Captured], both: Callable[..., tuple[Path, Path]]
) -> None:
    execution = "fused" if capture is run_again else "reference"
    tiny.assert_same_run(*both(CASES.get(case, {}) | {"execution": execution}, capture))


@long
def test_each_phase_and_size_of_images_has_its_graph(
    both: Callable[..., tuple[Path, Path]],
) -> None:
    optimizer = {"kind": "sgd", "lr": 0.05, "momentum": 0.9}
    phases = [
        {"epochs": 2, "timesteps": 1, "image_size": 32, "final_image_size": 64},
        {"epochs": 1, "timesteps": 2, "image_size": 32},
    ]
    changes = {
        "model": {"name": "sew_resnet18"},
        "data.image_size": 32,
        "data.resize": 32,
        "batch.micro": 4,
        "phases": [phase | {"optimizer": optimizer} for phase in phases],
    }
    tiny.assert_same_run(*both(changes, taped, captured=3))


NETWORK = """
import torch
from timm.models import register_model
from torch import nn

from tetdist.models.spiking_convnet import SpikingConvNet
from tetdist.models import base


class Dropping(SpikingConvNet):
    '''Draws numbers, and has a parameter that takes no part.'''

    def __init__(self, **options):
        super().__init__(**options)
        self.stray = nn.Parameter(torch.ones(3))

    def forward_head(self, x, pre_logits=False):
        return super().forward_head(nn.functional.dropout(x, 0.3, self.training), pre_logits)


@register_model
def dropping(pretrained=False, **options):
    return base.build(Dropping, "dropping", pretrained, **options)


dropping.__annotations__["return"] = Dropping
"""


def test_what_a_network_draws_and_leaves_alone_is_the_same(
    both: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    """A parameter without a gradient decays in neither run."""
    (tmp_path / "dropping.py").write_text(NETWORK)
    optimizer = {"kind": "sgd", "lr": 0.05, "weight_decay": 0.1}
    changes = {
        "imports": [str(tmp_path / "dropping.py")],
        "model": {"name": "dropping", "arguments": {"channels": [4, 8], "input_size": 16}},
        "phases.0.optimizer": optimizer,
    }
    tiny.assert_same_run(*both(changes, taped))


@long
def test_a_teachers_answers_are_in_the_graph(
    main: Main, tiny_config: ConfigWriter, both: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    assert main(tiny_config({"name": "teacher", "seed": 5})).status == 0
    changes = {"loss.distillation": {"teacher": str(tmp_path / "runs/teacher"), "weight": 1.0}}
    tiny.assert_same_run(*both(changes, taped))


def test_steps_that_are_not_finite_change_nothing(
    both: Callable[..., tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does anything of them stay in the gradients that a graph adds to."""
    prepared, calls = trainer.Trainer._prepared, 0

    def spoilt(self: Any, batch: Any) -> tuple[Tensor, Tensor]:
        nonlocal calls
        images, targets = prepared(self, batch)
        calls += 1
        # A micro-batch of the first step and one of the third, of twenty in each run.
        return (images * float("nan") if calls % 20 in (2, 11) else images), targets

    monkeypatch.setattr(trainer.Trainer, "_prepared", spoilt)
    plain, with_graphs = both({}, taped)
    assert [one["non_finite_steps"] for one in tiny.metrics(plain, "train")][:4] == [1, 0, 1, 0]
    tiny.assert_same_run(plain, with_graphs)


def test_the_scale_of_a_float16_loss_is_read_anew(
    both: Callable[..., tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is halved while the graph is there, and doubled again."""
    monkeypatch.setattr(base.LossScale, "START", 2.0**30)
    monkeypatch.setattr(base.LossScale, "GROWTH_INTERVAL", 3)
    plain, with_graphs = both({"precision": "fp16"}, taped)
    lines = tiny.metrics(plain, "train")
    assert len({line["loss_scale"] for line in lines}) > 1
    assert lines[-1]["overflows"] > 2
    tiny.assert_same_run(plain, with_graphs)


@long
def test_a_stopped_run_goes_on_with_graphs_or_without(
    both: Callable[..., tuple[Path, Path]], main: Main, tiny_config: ConfigWriter, tmp_path: Path
) -> None:
    plain, _ = both({}, taped)
    changes = {"name": "changing", "engine": "torch", "phases.0.epochs": 1}
    for end, with_graphs in ((2, "true"), (3, "false"), (5, "true")):
        outcome = main(tiny_config(changes), f"max_steps={end}", f"cuda_graphs={with_graphs}")
        assert outcome.status == 0, outcome.text
    changing = tmp_path / "runs/changing"
    assert tiny.metrics(changing, "train") == tiny.metrics(plain, "train")


def _moves(patch: pytest.MonkeyPatch) -> None:
    """Have the update leave the gradients in other memory."""
    update = torch_engine.unscale_and_clip

    def moving(grads: list[Tensor], *rest: Any) -> base.Update:
        done = update(grads, *rest)
        for grad in grads:
            grad.data = grad.data.clone()
        return done

    patch.setattr(torch_engine, "unscale_and_clip", moving)


def _scales_on_the_host(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(base.LossScale, "START", 2.0**30)
    patch.setattr(torch_engine, "scaled", lambda loss, scale: loss * scale.value)


def _keeps_the_seed(patch: pytest.MonkeyPatch) -> None:
    """Have the calls before the capture draw numbers that the micro-batch should have drawn."""
    patch.setattr(torch.random, "fork_rng", lambda *_: contextlib.nullcontext())


MISTAKES: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], dict[str, Any]]] = {
    "gradients in other memory": (_moves, {}),
    "a number of the host": (_scales_on_the_host, {"precision": "fp16", "non_finite_limit": 100}),
    "seeds": (_keeps_the_seed, {"model.name": "dropping"}),
}


@long
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_found(
    mistake: str,
    both: Callable[..., tuple[Path, Path]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make, changes = MISTAKES[mistake]
    (tmp_path / "dropping.py").write_text(NETWORK)
    make(monkeypatch)
    plain, with_graphs = both(changes | {"imports": [str(tmp_path / "dropping.py")]}, taped)
    assert tiny.metrics(plain, "train") != tiny.metrics(with_graphs, "train")


def test_a_cpu_and_another_engine_are_refused(main: Main, tiny_config: ConfigWriter) -> None:
    outcome = main(tiny_config(), "cuda_graphs=true", "device=auto")
    assert outcome.status == 2
    assert "cuda_graphs: they are a GPU's" in outcome.text
