"""What is agreed on before the first step."""

from typing import Any

import pytest
import torch

from tetdist.distributed.world import World
from tetdist.errors import UserError
from tetdist.nn import passes
from tetdist.training.setup import choose_passes


class OneOfThree(World):
    """Rank 1 of three processes; what the other two say is given."""

    others: tuple[Any, Any] = (None, None)

    def gather(self, value: Any) -> list[Any]:
        return [self.others[0], value, self.others[1]]


@pytest.fixture
def reason(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """Why there are no kernels on this process; None: there are."""
    said: dict[str, str | None] = {"ours": None}
    monkeypatch.setattr(passes, "decide", lambda _device, gather: gather(said["ours"]))
    return said


def world(others: tuple[str | None, str | None]) -> World:
    one = OneOfThree(1, 3, torch.device("cuda"), None)
    object.__setattr__(one, "others", others)
    return one


def test_kernels_that_work_on_some_processes_end_the_run(reason: dict[str, str | None]) -> None:
    with pytest.raises(UserError, match=r"on 2 of 3 processes, and not on rank 2 \(no ptxas\)"):
        choose_passes(world((None, "no ptxas")))
    reason["ours"] = "no gcc"
    with pytest.raises(UserError, match=r"on 2 of 3 processes, and not on rank 1 \(no gcc\)"):
        choose_passes(world((None, None)))


def test_kernels_that_work_on_all_or_none_do_not(reason: dict[str, str | None]) -> None:
    choose_passes(world((None, None)))
    reason["ours"] = "no gcc"
    choose_passes(world(("no gcc", "no gcc")))
