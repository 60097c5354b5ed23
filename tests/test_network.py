"""What is agreed on before the first step."""

import shutil
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from tetdist.config.loading import load
from tetdist.data.splits import open_split
from tetdist.distributed.world import World, join
from tetdist.errors import UserError
from tetdist.network import choose_kernels, make_model
from tetdist.nn.fast import dispatch, native_zeros


@pytest.mark.parametrize(
    ("reasons", "refusal"),
    [
        (
            [None, None, "no ptxas"],
            r"attention work on 2 of 3 processes, but not on rank 2 \(no ptxas\)",
        ),
        ([None, "no gcc", None], r"on 2 of 3 processes, but not on rank 1 \(no gcc\)"),
        ([None] * 3, None),
        (["no gcc"] * 3, None),
    ],
)
def test_kernels_work_on_all_processes_or_on_none(reasons, refusal, monkeypatch):
    """Of three processes, the second is this one."""
    first, own, last = ({"attention": reason} if reason else {} for reason in reasons)
    monkeypatch.setattr(dispatch, "decide", lambda _device, gather: gather(own))
    monkeypatch.setattr(World, "gather", lambda _, mine: [first, mine, last])
    with pytest.raises(UserError, match=refusal) if refusal else nullcontext():
        choose_kernels(World(1, 3, torch.device("cuda"), None))


def test_all_processes_skip_zeros_in_the_same_types(monkeypatch):
    every = frozenset({torch.float32, torch.bfloat16})
    others = [frozenset({torch.float32}), every]
    monkeypatch.setattr(native_zeros, "_agreed", None)
    monkeypatch.setattr(native_zeros, "types_here", lambda: every)
    monkeypatch.setattr(World, "gather", lambda _, mine: [mine, *others])
    world = World(0, 3, torch.device("cpu"), None)
    choose_kernels(world)
    assert native_zeros.types() == {torch.float32}
    others.append(frozenset())  # a processor without the extension, or no compiler
    choose_kernels(world)
    assert not native_zeros.types()


def test_frames_of_another_shape_than_the_networks_are_refused():
    index = SimpleNamespace(classes="ab", frames=lambda _: (10, 2, 34, 40))
    with pytest.raises(UserError, match=r"34x34 pixels .* has 40x34; bin with --size 34$"):
        make_model(load("nmnist.yaml", []), index)


def test_data_to_evaluate_alone_are_not_trained_on(tiny_copy, tiny_config):
    """No command is advised that cannot work."""
    config = load(tiny_config({"data.root": str(tiny_copy)}), [])
    (tiny_copy / "index" / "train.npz").unlink()
    events = load(tiny_config({"data.root": str(tiny_copy), "data.kind": "events"}), [])
    with join("cpu") as world:
        with pytest.raises(UserError, match=r"images; give a folder of events, or train with"):
            open_split(events.data, "val", world)
        with pytest.raises(UserError, match=r"there is no index .*make it with .*--splits train"):
            open_split(config.data, "train", world)
        shutil.rmtree(tiny_copy / "train")
        with pytest.raises(UserError, match=r"no split 'train', only val, which .*eval.* eval"):
            open_split(config.data, "train", world)
