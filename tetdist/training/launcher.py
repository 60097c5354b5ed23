"""What a program that starts a run, and starts it again, has to do with it."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Launcher:
    """The program that starts a run.

    Attributes:
        tags: Further tags for MLflow.
        goes_on_after: Signals after which the run is started again: meanwhile MLflow shows it as
            running.
        on_failure: Told what a process raises, before the other processes lose it and raise, too.
    """

    tags: Mapping[str, str] = field(default_factory=dict)
    goes_on_after: Collection[int] = ()
    on_failure: Callable[[Exception], None] = lambda _: None
