"""Runs training steps and evaluation batches on a GPU that is not there, one case a line.

A start of Python with torch and DeepSpeed takes seconds, and then many cases are answered. Each
comes in on standard input, a line of JSON (the fields of `Case`), and its answer (`report`'s)
leaves on standard output. The library of cuda_guard.cpp has to be preloaded.
"""

import argparse
import contextlib
import ctypes
import gc
import inspect
import json
import os
import sys
import types
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

os.environ |= {"DS_ACCELERATOR": "cuda", "LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "8"}

import numpy as np
import pretended
import timm
import torch
import torch.distributed as dist
from faults import faulty
from happens_before import Order
from pretended import DEVICE, Recorder
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

WORLD_SIZE = 8
DALI = -2  # its stream
# The phases by which launches and waits are grouped.
STEP = ("input", "forward", "teacher", "loss", "backward", "update", "statistics")
EVALUATION, ASIDE = "evaluation", "shown besides"


@dataclass(frozen=True)
class Case:
    """One network and the way that it is trained.

    Attributes:
        model: By which timm knows it.
        overrides: ``key=value`` of the configuration.
        base: The configuration that they change.
        steps: Optimiser steps that are taken; the last one's launches are counted.
        micro_batches: Of this process, in each.
        learns: Whether it learns from a teacher, which has no weights.
        evaluates: True to evaluate a batch, too.
        feeds: Whether batches come from ``data.root``, as they come to a GPU, and the order of all
            work is checked.
        fault: Arguments of `faults.faulty`.
        timed: Options of the benchmark whose step is taken instead of the trainer's.
        made_up: Arguments of `training_step`, whose step is taken instead of the trainer's.
        processes: Of the run.
    """

    model: str
    overrides: list[str] = field(default_factory=list)
    base: str = "sew34_t4.yaml"
    steps: int = 1
    micro_batches: int = 1
    learns: bool = False
    evaluates: bool = False
    feeds: bool = False
    fault: list[str] | None = None
    timed: dict[str, Any] | None = None
    made_up: dict[str, Any] | None = None
    processes: int = WORLD_SIZE


def main() -> None:
    pretended.install(ctypes.CDLL(os.environ["LD_PRELOAD"]))
    from tetdist.nn import batch_norm
    from tetdist.nn.fast import dispatch
    from tetdist.training import graphs

    graphs.capture = pretended.compared(graphs.capture)
    # Nothing can be computed here to find out whether Triton's kernels work.
    dispatch._reason_against_triton = lambda _family, _device: None

    batch_norm.update_running_statistics = pretended.within(
        "statistics", batch_norm.update_running_statistics
    )
    dist.init_process_group("fake", rank=0, world_size=WORLD_SIZE, store=FakeStore())
    print(json.dumps({"ready": True}), flush=True)
    answers = sys.stdout
    sys.stdout = sys.stderr
    for line in sys.stdin:
        print(json.dumps(answer(Case(**json.loads(line)))), file=answers, flush=True)


class _FakeTensors(FakeTensorMode):
    """Makes tensors of numbers (`torch.tensor`) on the host first, and has them copied: so does a
    GPU, and there is no other way without one."""

    avoid_device_init = True


def answer(case: Case) -> dict[str, Any]:
    # DeepSpeed's optimisers of the case before wait for the device when they are let go of.
    gc.collect()
    gc.freeze()
    recorder = Recorder(Order(pretended.current_stream) if case.feeds else None)
    error = None
    torch.set_grad_enabled(True)
    try:
        with (
            _FakeTensors(allow_non_fake_inputs=case.feeds),
            faulty(*case.fault) if case.fault else contextlib.nullcontext(),
        ):
            world = _world(case.processes)
            if case.timed or case.made_up:
                run_made_up(case, world, recorder)
            else:
                run_in_order(case, world, recorder) if case.feeds else run(case, world, recorder)
    except Exception as raised:
        error = pretended.failure(raised)
    finally:
        torch.use_deterministic_algorithms(False)
    return report(recorder, error)


def report(recorder: Recorder, error: str | None) -> dict[str, Any]:
    launches: dict[str, dict[str, int]] = {}
    for (phase, name), number in recorder.launches.most_common():
        launches.setdefault(phase, {})[name] = number
    return {
        "error": error,
        "waits": recorder.waits_of(*STEP),
        "evaluation_waits": recorder.waits_of(EVALUATION),
        "refused": recorder.refused,
        "layouts": recorder.layouts,
        "captures": len(recorder.captures),
        "captured_in": recorder.captured_in,
        "replayed_at": recorder.replayed_at,
        "events": (len(recorder.events), recorder.num_events),
        "ungraphed": recorder.ungraphed,
        "unordered": recorder.order.faults if recorder.order else [],
        "launches": launches,
    }


def _world(processes: int) -> Any:
    from tetdist.distributed.world import World

    class Alone(World):
        """What goes over the network between hosts is not on the device, and is left out."""

        def gather(self, value: Any) -> list[Any]:
            return [value] * self.world_size

        def sum(self, values: list[float]) -> list[float]:
            return values

    return Alone(0, processes, DEVICE, None)


def run_made_up(case: Case, world: Any, recorder: Recorder) -> None:
    """Take the steps of a benchmark or of check_gpu."""
    from tetdist.apps.benchmarks import bench, made_up

    if case.timed:
        step = bench.contestants_of(argparse.Namespace(**case.timed))["tetdist, none"]()
    else:
        step = made_up.training_step(world, case.model, **case.made_up)
    feed = types.SimpleNamespace(prepared=None)  # batches are there
    _tell_phases_apart(
        types.SimpleNamespace(engine=step.step.engine, training_step=step.step, feed=feed)
    )
    try:
        for _ in range(case.steps):
            recorder.launches.clear()
            with recorder:
                step.take()
            recorder.phase = "input"
    finally:
        step.close()


def run(case: Case, world: Any, recorder: Recorder) -> None:
    from tetdist.config import loading

    config = loading.load(
        case.base, [f"model.name={case.model}", "data.root=nowhere", *case.overrides]
    )
    trainer = make_trainer(case, config, world)
    step = trainer.prepared.steps_per_epoch  # the first of the second epoch
    trainer.step = step
    trainer._enter(trainer.prepared.phases[0])
    try:
        trainer.model.train()
        _tell_phases_apart(trainer)
        for number in range(case.steps):
            recorder.launches.clear()
            with recorder:
                trainer._train_step()
            recorder.phase = "input"
            if trainer.engine.loss_scale is not None:
                # As after a step whose gradient overflowed.
                trainer.engine.loss_scale.overflowed()
            assert trainer.step == step + number + 1
        if case.evaluates:
            _evaluate(trainer, recorder)
    finally:
        trainer._leave()


def run_in_order(case: Case, world: Any, recorder: Recorder) -> None:
    """Train, save, evaluate and examine, with batches as a GPU gets them: by a thread's stream."""
    from tetdist.config import loading
    from tetdist.data import build, loader, pixels, transfer
    from tetdist.data.own_process import LoaderProcess as Source
    from tetdist.distributed import overlap
    from tetdist.evaluation.evaluate import evaluate
    from tetdist.order import evaluation_batches
    from tetdist.training import graphs, saving
    from tetdist.training.state import RunState

    pixels._scale.cache_clear()  # tensors of another case
    config = loading.load(case.base, case.overrides)
    # In its own process, DALI decodes on the CPU as ever.
    dali = types.SimpleNamespace(Pipeline=_Pipeline)
    with (
        recorder,
        mock.patch.object(transfer, "ThreadPoolExecutor", Turns),
        mock.patch.object(saving, "ThreadPoolExecutor", Turns),
        mock.patch.object(saving.checkpoint, "save", _save),
        mock.patch.object(saving, "show_checkpoints"),
        mock.patch.object(Source, "__next__", _of_a_process(Source.__next__)),
        mock.patch.object(loader, "import_dali", return_value=dali),
        mock.patch.object(loader, "image_graph", lambda _, source, __, out: (source, out.size)),
        mock.patch.object(torch, "from_dlpack", _decoded),
        mock.patch.object(overlap, "BUCKET_BYTES", 512),
        mock.patch.object(graphs, "capture", inspect.unwrap(graphs.capture)),
    ):
        trainer = make_trainer(case, config, world)
        trainer._enter(trainer.prepared.phases[0])
        assert len(trainer.engine.mean._overlapped._buckets) > 1
        try:
            trainer.model.train()
            writing = saving.Saving(trainer.prepared, mock.Mock(), mock.Mock())
            recorder.waits.clear()
            for _ in range(case.steps):
                trainer._train_step()
                optimizer = trainer.engine.optimizer_state()
                now = RunState(trainer.step, 0, {}, [], {}, None, WORLD_SIZE, "", None)
                writing.begin(now, optimizer, trainer.average, (), mock.Mock())
            waits = list(recorder.waits)
            writing.wait()
            val = trainer.prepared.val
            shares = evaluation_batches(len(val), config.batch.eval, 0, WORLD_SIZE)
            with build.eval_loader(config, val, world) as batches:
                samples = sum(map(len, shares))
                evaluate(trainer.model, batches, samples, world, precision=config.precision)
            with trainer.feed.again(0) as batches:
                trainer.training_step.examine(0, batches)
        finally:
            trainer._leave()
        recorder.order.find_freed()
        recorder.waits = waits
    assert not pretended._registered, "memory is unmapped while CUDA has it pinned"


def _save(_folder: Any, *, model: Any, optimizer: Any, average: Any, **_: Any) -> None:
    """Read on the host what `checkpoint.save` writes to a file."""
    order, averaged = pretended.order(), average and average.weights
    tensors = [x for x in tree_leaves((model, optimizer, averaged)) if isinstance(x, Tensor)]
    order.use("a file", tensors, [], on=order.host)


class Turns:
    """Threads in turn: each task is done at once, on the default stream, after what the thread that
    submits it has done, and before what comes after its result."""

    def __init__(
        self, _workers: int, thread_name_prefix: str, initializer: Callable[[], None] | None = None
    ) -> None:
        self._name = thread_name_prefix
        if initializer is not None:
            self.submit(initializer)

    def submit(self, task: Callable[..., Any], *arguments: Any) -> "_Turn":
        order, turn = pretended.order(), _Turn()
        with order.acting(self._name, order.reached(order.host)), pretended.stream():
            try:
                turn.set_result(task(*arguments))
            except Exception as error:
                turn.set_exception(error)
            turn.clock = order.reached(self._name)
        return turn

    def shutdown(self, **_: Any) -> None:
        order = pretended.order()
        order.wait(order.reached(self._name))


class _Turn(Future[Any]):
    clock: dict[Any, int]

    def result(self, timeout: float | None = None) -> Any:
        pretended.order().wait(self.clock)
        return super().result(timeout)


class _Channel:
    """The channel to the process that loads data, which writes to memory that is given back, some
    time before a batch comes from there."""

    def __init__(self, loader: Any) -> None:
        self._loader, self._channel = loader, loader._channel

    def send(self, slot: int) -> None:
        order, writer = pretended.order(), f"writer of slot {slot}"
        order.wait(order.reached(order.host), writer)
        order.use("the next batch", [], [self._loader._memory[slot]], on=writer)
        self._channel.send(slot)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._channel, name)


def _of_a_process(next_batch: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`LoaderProcess.__next__`, whose batches have numbers."""

    def wrapped(loader: Any) -> Any:
        order = pretended.order()
        with _disable_current_modes():
            if not isinstance(loader._channel, _Channel):
                loader._channel = _Channel(loader)
            batch = next_batch(loader)
        order.wait(order.reached(f"writer of slot {loader._used}"))
        return batch

    return wrapped


class _Pipeline(contextlib.nullcontext[None]):
    """DALI's, which decodes on a stream of its own."""

    def __init__(self, **_: Any) -> None:
        super().__init__()

    def build(self) -> None: ...

    def set_outputs(self, graph: tuple[Callable[[], Any], int]) -> None:
        self._source, self._size = graph

    def run(self) -> tuple[Any]:
        files, *_ = self._source()
        shape = (len(files), self._size, self._size, 3)
        return (types.SimpleNamespace(as_tensor=lambda: shape),)


def _decoded(shape: tuple[int, ...]) -> Tensor:
    """`torch.from_dlpack`, by which the current stream waits for DALI's."""
    order = pretended.order()
    with pretended.stream(DALI):
        images = torch.empty(shape, dtype=torch.uint8, device=DEVICE)
        order.use("DALI", [], [images], on=DALI)
    order.wait(order.reached(DALI), pretended.current_stream())
    return images


def make_trainer(case: Case, config: Any, world: Any) -> Any:
    """A trainer whose data are made up and whose run folder is not there; the rest is its own."""
    from tetdist import order
    from tetdist.data import splits
    from tetdist.training import prepared
    from tetdist.training.ema import WeightAverage
    from tetdist.training.feed import Feed
    from tetdist.training.observers import Observers
    from tetdist.training.trainer import Trainer
    from tetdist.training.window import Window

    size = config.model.arguments.get("input_size", 48)
    classes = [str(k) for k in range(config.model.num_classes or 1000)]
    index = _Index(classes=classes, heights=[size])
    prepared.open_data, prepared.order = splits.open_data, order
    if not case.feeds:
        prepared.open_data = lambda *_: (index, index)
        prepared.order = types.SimpleNamespace(
            steps_per_epoch=lambda *_: 10, rank_micro_batches=lambda *_: range(case.micro_batches)
        )

    class OnPaper(Trainer):
        def __init__(self) -> None:
            self.config, self.world = config, world
            self.watch = types.SimpleNamespace(progress=lambda _where: None)
            self.prepared = prepared._prepare(config, world)
            self.model = self.prepared.model
            self.average = WeightAverage.of(self.model, config.ema)
            self.window = Window(config.batch.global_, world)
            self.optimizer_state = self.loss_scale_state = None
            self.teacher = _teacher(config, index) if case.learns else None
            self.tracker = self.phase = None
            self.observers, self.step = Observers(), 0
            self.record = lambda _step, _batch: None
            self.feed = Feed(self.prepared, self._on_batch)
            if not case.feeds:
                self.feed._open_loader = lambda _step: _Batches(config, self.model)

    return OnPaper()


class _Index(types.SimpleNamespace):
    """An index of samples that nobody counts."""

    timesteps = None

    def __len__(self) -> int:
        return 0

    def frames(self, data: Any) -> tuple[int, ...] | None:
        side = data.image_size if data.images_as_events else self.heights[0]
        return (8, 2, side, side) if data.input_kind == "events" else None


class _Batches:
    """What a loader returns: images in pageable memory, for `pin_memory` is the trainer's."""

    def __init__(self, config: Any, model: Any) -> None:
        self._config, self._model = config, model

    def __next__(self) -> Any:
        from tetdist.data.loader import Batch
        from tetdist.data.transforms import micro_batch_mix

        config = self._config
        count, size = config.batch.micro, config.data.image_size
        if config.data.images_as_events:
            images = torch.zeros(count, 2, size, size, dtype=torch.uint8)
        elif config.data.kind == "events":
            size = self._model.input_size or 48
            images = torch.zeros(count, self._model.timesteps, 2, size, size)
        else:
            images = torch.zeros(count, size, size, 3).permute(0, 3, 1, 2)
        mix = micro_batch_mix(0, 0, np.arange(count), (size, size), config.data)
        labels = torch.zeros(count, dtype=torch.int64)
        return Batch(images, labels, np.arange(count), mix)

    def close(self) -> None: ...


def _teacher(config: Any, index: Any) -> Any:
    """One of timm's networks for images, one like the student for events."""
    from tetdist.training import teacher

    def untrained(_config: Any, _index: Any) -> Any:
        classes = config.model.num_classes or len(index.classes)
        if (kind := config.data.input_kind) == "events":
            model = config.model.build(num_classes=classes, timesteps=4, input_kind=kind)
        else:
            model = timm.create_model("resnet18", num_classes=classes)
        return model, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)

    teacher._from_timm, teacher.fingerprint = untrained, lambda _model: ""
    return teacher.Teacher(config, index, DEVICE)


def _tell_phases_apart(trainer: Any) -> None:
    for owner, phases in (
        (trainer.engine, {name: name for name in ("forward", "backward", "update")}),
        (trainer.feed, {"prepared": "input"}),
        (trainer.training_step, {"_teacher_logits": "teacher", "_attempt": "loss"}),
    ):
        for name, phase in phases.items():
            setattr(owner, name, pretended.within(phase, getattr(owner, name)))


def _evaluate(trainer: Any, recorder: Recorder) -> None:
    """Evaluate two batches, and look at what the commands show of a network besides."""
    from tetdist.evaluation.decisions import Decisions
    from tetdist.evaluation.evaluate import evaluate

    model, precision = trainer.model, trainer.config.precision
    batches = [next(trainer.feed._loader)._replace(mix=None) for _ in range(2)]
    samples = sum(len(batch.labels) for batch in batches)
    classes = trainer.prepared.train.classes
    decisions = Decisions(classes, model.num_classes, model.timesteps, DEVICE)
    logits = torch.empty(model.timesteps, samples, model.num_classes, device=DEVICE)
    labels = torch.empty(samples, dtype=torch.int64, device=DEVICE)
    with recorder:
        recorder.phase = EVALUATION
        evaluate(model, batches, samples, trainer.world, precision=precision)
    with recorder:
        recorder.phase = ASIDE
        decisions.add(logits, labels)


if __name__ == "__main__":
    main()
