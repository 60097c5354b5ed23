"""Machine and findings: the argument and the result of a check."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tetdist.distributed.world import World


@dataclass(frozen=True)
class Machine:
    """Machine that the checks run on.

    Attributes:
        folder: Folder of this process, removed at the end.
        progress: Function to call with the place that a check has reached; see `run.LIMIT`.
    """

    world: World
    folder: Path
    progress: Callable[[str], None] = lambda _: None

    @property
    def on_gpu(self) -> bool:
        """True on a GPU; on a CPU the checks run small sizes, whose figures mean nothing."""
        return self.world.device.type == "cuda"


@dataclass(frozen=True)
class Finding:
    """Finding of a check on one process.

    Attributes:
        status: "left out" if the check does not apply to the machine.
        text: A line of the table.
        remedy: The remedy; None: none is needed, or none is known. One that is ok may have advice.
        numbers: Numbers for the JSON file.
    """

    status: Literal["ok", "bad", "left out"]
    text: str
    remedy: str | None = None
    numbers: Mapping[str, Any] = field(default_factory=dict)
