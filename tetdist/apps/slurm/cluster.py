"""Settings of a cluster and of the job to submit.

Each setting is taken from the last of these places that sets it:

    1. ~/.config/tetdist/cluster.yaml       (another file: TETDIST_CLUSTER)
    2. the section `cluster:` of the run's configuration, or cluster.key=value
    3. the flags of the command line
"""

import os
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from tetdist.config.fields import Positive, Section
from tetdist.config.messages import checked
from tetdist.config.yaml_files import read_yaml
from tetdist.errors import UserError

# Duration of a restart, from the stop to the first new step: queue, imports, compilation.
RESTART_MINUTES = 5.0

# No white space: a line break would start a new line of the script.
Word = Annotated[str, Field(pattern=r"^\S+$")]


class ClusterSection(Section):
    partition: Word | None = None
    account: Word | None = None
    qos: Word | None = None
    constraint: Word | None = None
    """Features that the nodes must have, as for sbatch."""
    nodes: Positive = 1
    gpus_per_node: Annotated[int, Field(ge=0)] | None = None
    """GPUs to use on each node, one process each; 0: train on the CPU."""
    tasks_per_node: Positive | None = None
    """Processes on each node; null: one a GPU."""
    cpus_per_task: Positive | None = None
    """CPU cores a process; null: the cluster's default, often one, too few to decode images."""
    mem_gb: Annotated[float, Field(gt=0)] | None = None
    """Memory on each node; null: the cluster's default."""
    time: str = "24:00:00"
    """Time limit of one job, in Slurm's notation; the run resumes in the next one."""
    setup: tuple[str, ...] = ()
    """Shell commands before the processes start, such as `module load cuda`."""
    sbatch: dict[str, str | int | bool] = Field(default={})
    """Further flags of sbatch, without the dashes: {exclusive: true, mail-user: me@example.org}."""
    warn_before_end: Positive = 120
    """Seconds before the time limit at which the run saves and stops; must cover one step, one
    evaluation batch and one checkpoint."""
    give_up_after: Positive = 5
    """Number of consecutive starts without a new checkpoint after which the run fails."""
    interface: str | None = None
    """Network interface between the nodes; null: the one that reaches the first node."""

    @property
    def processes_per_node(self) -> int:
        return self.tasks_per_node or self.gpus_per_node or 1

    @property
    def processes(self) -> int:
        return self.nodes * self.processes_per_node

    @property
    def minutes(self) -> int:
        return minutes(self.time)


def gather(section: dict[str, Any], flags: dict[str, Any]) -> ClusterSection:
    """Combine the cluster's file, the section ``cluster:`` of a configuration and the flags."""
    file = cluster_file()
    facts = read_yaml(file) if file.is_file() else {}
    _checked(facts, str(file))
    _checked(section, "the configuration's section cluster")
    if "time" in flags:
        minutes(flags["time"], "--time")
    cluster = _checked(facts | section | flags, "the command line")
    if cluster.minutes * 60 <= cluster.warn_before_end:
        raise UserError(
            f"cluster.time: {cluster.time} is not longer than cluster.warn_before_end "
            f"({cluster.warn_before_end} s); set a longer time or a smaller warn_before_end"
        )
    return cluster


def cluster_file() -> Path:
    named = os.environ.get("TETDIST_CLUSTER")
    if named:
        if not Path(named).is_file():
            raise UserError(f"TETDIST_CLUSTER: there is no file {named}; correct or unset it")
        return Path(named)
    home = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(home) / "tetdist" / "cluster.yaml"


def minutes(text: str, name: str = "cluster.time") -> int:
    """Convert Slurm's notation of a time to whole minutes, rounded up.

    It is ``M``, ``M:S``, ``H:M:S``, ``D-H``, ``D-H:M`` or ``D-H:M:S``.
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if match is None:
        raise UserError(
            f"{name}: {text!r} is not a time in Slurm's notation; write minutes, HOURS:MINUTES:"
            "SECONDS or DAYS-HOURS, such as 24:00:00 or 2-00"
        )
    days, *rest = match.groups()
    numbers = [int(n) for n in rest if n is not None]
    if days is not None or len(numbers) == 3:
        hours, mins, seconds = [*numbers, 0, 0][:3]
    else:
        hours, mins, seconds = 0, numbers[0], numbers[1] if len(numbers) == 2 else 0
    total = ((int(days or 0) * 24 + hours) * 60 + mins) * 60 + seconds
    return max(1, -(-total // 60))


def _checked(facts: dict[str, Any], source: str) -> ClusterSection:
    """Validate the settings; errors name their source."""
    cluster = checked(ClusterSection, facts, source)
    minutes(cluster.time)
    for flag in cluster.sbatch:
        if flag.startswith("-"):
            raise UserError(f"{source}: sbatch: write {flag} without the dashes")
    return cluster
