"""Batches loaded in a process of their own, finished on the device: the same ones, to the bit."""

import dataclasses
import multiprocessing
import os
import signal
from itertools import islice
from unittest.mock import MagicMock, call

import numpy as np
import pytest
import torch

from tetdist.config.loading import load
from tetdist.data import build, dali, loader, own_process, transfer
from tetdist.data.dali import import_dali
from tetdist.data.pixels import Edits, Output, edited
from tetdist.datasets.index import build_index, load_index, save_index
from tetdist.distributed.world import World
from tetdist.errors import UserError

# All that is done to images, before and after normalisation.
AUGMENTED = {
    "data.crop": "padded",
    "data.auto_augment": "cifar10",
    "data.color_jitter": [0.4, 0, 0, 0],
    "data.cutout": 5,
    "data.mixup": 0.5,
    "data.cutmix": 1.0,
    "data.erasing": {"probability": 0.6, "mode": "pixel"},
}


def batches_of(config, index, world, count, *, train=True):
    with (
        build.train_loader(config, index, world, 0)
        if train
        else build.eval_loader(config, index, world)
    ) as batches:
        return list(islice(batches, count))


def assert_same(first, second):
    assert len(first) == len(second) > 0
    for one, two in zip(first, second, strict=True):
        assert one.images.dtype == two.images.dtype == torch.float32
        assert one.images.stride() == two.images.stride()
        assert torch.equal(one.images, two.images)
        assert one.labels.tolist() == two.labels.tolist()
        assert one.ids.tolist() == two.ids.tolist()
        assert (one.mix is None) == (two.mix is None)
        for a, b in zip(one.mix or (), two.mix or (), strict=True):
            assert np.array_equal(a, b)
        assert one.rest is None is two.rest


@pytest.fixture
def apart(monkeypatch):
    """Has a process of its own load the data, as on a GPU."""

    def patch():
        monkeypatch.setattr(build, "in_own_process", lambda *_: True)

    return patch


def test_images_are_the_same_from_a_process_of_their_own(tiny_root, tiny_config, alone, apart):
    index = load_index(tiny_root / "index" / "train.npz")
    config, other = load(tiny_config(AUGMENTED)), load(tiny_config(AUGMENTED | {"seed": 3}))
    of_training = batches_of(config, index, alone, 7)
    assert batches_of(other, index, alone, 1)[0].ids.tolist() != of_training[0].ids.tolist()
    # All of an evaluation: its last batch is smaller, and it ends.
    evaluated = batches_of(config, index, alone, 99, train=False)
    assert sum(len(batch.labels) for batch in evaluated) == len(index)
    apart()
    assert_same(of_training, batches_of(config, index, alone, 7))
    assert_same(batches_of(config, index, alone, 99, train=False), evaluated)


def test_events_are_the_same_from_a_process_of_their_own(event_root, tiny_config, alone, apart):
    root = event_root(np.float16)
    index, _ = build_index(root, "train", workers=1, kind="events")
    changes = {"data.kind": "events", "data.root": str(root), "data.roll": 2, "data.cutout": 2}
    changes["model.name"] = "spiking_convnet_dvs"
    config = load(tiny_config(changes))
    here = batches_of(config, index, alone, 6)
    apart()
    assert_same(here, batches_of(config, index, alone, 6))


@pytest.fixture
def config(tiny_copy, tiny_config, apart):
    apart()
    return load(tiny_config({"data.root": str(tiny_copy)}))


def test_a_bad_file_is_named_as_ever(config, tiny_copy, alone):
    index = load_index(tiny_copy / "index" / "train.npz")
    file = tiny_copy / index.path(3)
    file.write_bytes(bytes(file.stat().st_size))
    with (
        pytest.raises(UserError, match=r"cannot be decoded: .*repair or remove"),
        build.train_loader(config, index, alone, 0) as batches,
    ):
        list(islice(batches, 40))


def test_a_loader_refuses_another_index_than_its_run_has(config, tiny_copy, alone):
    file = tiny_copy / "index" / "train.npz"
    index = load_index(file)
    save_index(dataclasses.replace(index, fingerprint="another"), file)
    with (
        pytest.raises(UserError, match=r"index/train\.npz was replaced while it was in use"),
        build.train_loader(config, index, alone, 0) as batches,
    ):
        next(batches)


def test_a_killed_loader_is_reported(config, tiny_copy, alone):
    index = load_index(tiny_copy / "index" / "train.npz")
    for taken in (0, 1, 5):  # Closing ends the process at any moment.
        batches_of(config, index, alone, taken)
        assert not multiprocessing.active_children()
    with build.train_loader(config, index, alone, 0) as batches:
        next(batches)
        (child,) = multiprocessing.active_children()
        # What asks the training to stop is no matter of the loader's.
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            os.kill(child.pid, number)
        next(batches)
        os.kill(child.pid, signal.SIGKILL)
        with pytest.raises(UserError, match=r"died \(killed.*smaller data.prefetch"):
            list(islice(batches, 40))
    assert not multiprocessing.active_children()


def test_a_slot_is_given_back_once():
    """Also before an empty batch, which has none; twice, two batches would share it."""
    batch = loader.Batch(torch.empty(0), torch.zeros(0), np.zeros(0))
    written = [
        own_process._Written(slot, (number,), torch.float32, (1,), batch)
        for slot, number in ((1, 2), (0, 0), (2, 2))
    ]
    channel, apart = MagicMock(), object.__new__(own_process.LoaderProcess)
    channel.recv.side_effect = written
    memory = torch.zeros(3, 8, dtype=torch.uint8)
    vars(apart).update(_channel=channel, _memory=memory, _used=None, _ended=False)
    for _ in written:
        next(apart)
    assert channel.send.call_args_list == [call(1)]


def test_missing_memory_is_reported(monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match=r"batches need 3 MiB of memory.*smaller batch.micro"):
        own_process._reserve(2**20, multiprocessing.Pipe()[0])


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_a_gpus_graph_places_windows_by_the_same_rules(interpolation):
    """On a CPU, where DALI has the same operations; only the resizing is not to the bit.

    Noise is averaged as it shrinks: without antialiasing, it would differ by 90 or more.
    """
    rng = np.random.default_rng(0)
    output = Output(size=16, mean=(0, 0, 0), std=(1, 1, 1), interpolation=interpolation)
    smooth = np.linspace(0, 255, 24 * 20 * 3).reshape(24, 20, 3).astype(np.uint8)
    windows = [smooth] + [rng.integers(0, 256, (24, 20, 3), np.uint8) for _ in range(4)]
    windows.append(rng.integers(0, 256, (40, 36, 3), np.uint8))
    edits = Edits(
        window=np.zeros((6, 4), np.int32),
        size=np.array([[16, 16], *[[24, 20]] * 4, [16, 16]], np.int32),
        corner=np.array([[0, 0], [-3, -2], [4, 5], [-9, 3], [2, -4], [0, 0]], np.int32),
        mirror=np.array([False, True, False, True, True, False]),
    )

    def source():
        start, mirror = -edits.corner, edits.mirror.astype(np.int32)
        return windows, edits.size.astype(np.float32), start, mirror

    module = import_dali()
    pipeline = module.Pipeline(batch_size=6, num_threads=1, device_id=None, exec_dynamic=True)
    with pipeline:
        images, *rest = module.fn.external_source(source, num_outputs=4, batch=True)
        images = module.fn.reshape(images, layout="HWC")
        pipeline.set_outputs(dali._placed(module, images, rest, output))
    pipeline.build()
    (placed,) = pipeline.run()
    for k, window in enumerate(windows):
        expected = edited(torch.from_numpy(window), edits, k, output).numpy()
        difference = np.abs(np.array(placed[k]).astype(int) - expected.astype(int))
        assert placed[k].shape() == [16, 16, 3]
        assert difference.max() <= {0: 2, 5: 16}.get(k, 0)


def test_each_process_decodes_on_its_own_gpu(tiny_root, tiny_config, monkeypatch):
    """GPU 0 would otherwise decode the images of all processes, or run the copies of another's."""
    index = load_index(tiny_root / "index" / "train.npz")
    world, module, streams = World(0, 1, torch.device("cuda", 3), None), MagicMock(), MagicMock()
    monkeypatch.setattr(loader, "import_dali", lambda: module)
    monkeypatch.setattr(loader, "image_graph", MagicMock())
    monkeypatch.setattr(torch.cuda, "Stream", streams)
    build.train_loader(load(tiny_config({"data.device": "gpu"})), index, world, 0).close()
    assert module.Pipeline.call_args.kwargs["device_id"] == 3
    assert streams.call_args_list == [call(world.device)] * 2  # to edit, and to deliver


def test_threads_ask_nothing_of_another_gpu(monkeypatch):
    """Their present GPU would be the first of the machine, whichever one trains here."""
    calls = []
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    device = torch.device("cuda", 3)
    with transfer.taker(device, "test") as taker:
        taker.submit(lambda: calls.append("work")).result(timeout=60)
    assert calls == [device, "work"]
    monkeypatch.setattr(torch.cuda, "current_device", lambda: calls.append("current"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with transfer.completed_on(None):
        assert calls == [device, "work"]
