"""What is agreed on before the first step."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tetdist.config.loading import load
from tetdist.distributed.world import World, join
from tetdist.errors import UserError
from tetdist.nn.fast import dispatch
from tetdist.training.setup import choose_kernels, open_split


class OneOfThree(World):
    """Rank 1 of three processes; what the other two say is given."""

    others: tuple[Any, Any] = (None, None)

    def gather(self, value: Any) -> list[Any]:
        return [self.others[0], value, self.others[1]]


@pytest.fixture
def reason(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """Why there are no kernels on this process; None: there are."""
    reasons: dict[str, str | None] = {"ours": None}
    monkeypatch.setattr(dispatch, "decide", lambda _device, gather: gather(reasons["ours"]))
    return reasons


def world(others: tuple[str | None, str | None]) -> World:
    one = OneOfThree(1, 3, torch.device("cuda"), None)
    object.__setattr__(one, "others", others)
    return one


def test_kernels_that_work_on_some_processes_end_the_run(reason: dict[str, str | None]) -> None:
    with pytest.raises(UserError, match=r"on 2 of 3 processes, but not on rank 2 \(no ptxas\)"):
        choose_kernels(world((None, "no ptxas")))
    reason["ours"] = "no gcc"
    with pytest.raises(UserError, match=r"on 2 of 3 processes, but not on rank 1 \(no gcc\)"):
        choose_kernels(world((None, None)))


def test_kernels_that_work_on_all_or_none_do_not(reason: dict[str, str | None]) -> None:
    choose_kernels(world((None, None)))
    reason["ours"] = "no gcc"
    choose_kernels(world(("no gcc", "no gcc")))


def test_data_to_evaluate_alone_are_not_trained_on(
    tiny_copy: Path, tiny_config: Callable[..., Path]
) -> None:
    """No command is advised that cannot work."""
    config = load(tiny_config({"data.root": str(tiny_copy)}), [])
    (tiny_copy / "index" / "train.npz").unlink()
    with join("cpu") as world:
        with pytest.raises(UserError, match=r"there is no index .*make it with .*--splits train"):
            open_split(config, "train", world)
        shutil.rmtree(tiny_copy / "train")
        with pytest.raises(
            UserError, match=r"no indexed train split, only val, which .*eval.* evaluates"
        ):
            open_split(config, "train", world)
