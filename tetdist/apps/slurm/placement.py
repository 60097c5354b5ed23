"""The place of a process within its job: its rank, where all meet, how the job starts again."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from tetdist.apps.slurm.history import LOCAL
from tetdist.errors import UserError, typed

# The exit status by which a process asks the local launcher to start the run again.
AGAIN = 75

# The port of slurmd. Any answer shows that a host lives, a refusal as well.
ANY_PORT = 6818

# Seconds that the controller of Slurm may be away, as when it is updated, while a job that has
# saved wants to be started again; and seconds between two attempts.
CONTROLLER_PATIENCE, CONTROLLER_PAUSE = 1800.0, 5.0

# Seconds for the answer to that, and to a question.
REQUEUE_TIMEOUT, QUESTION_TIMEOUT = 120.0, 15.0

# Linux gives ports above these to outgoing connections, one of which might take ours.
PORTS = range(16000, 32000)


@dataclass(frozen=True)
class ProcessContext(ABC):
    """One process among those of a job.

    Attributes:
        rank, world_size: Those among all processes.
        local_rank, local_world_size: Those on this host.
        master: Host of rank 0, as the other hosts know it.
        port: The one at which rank 0 waits for the others.
        interface: Network interface to the other hosts; None where there are none.
        job: The job's id.
        restart: How often the job was started before.
        hosts: The job's hosts.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master: str
    port: int
    interface: str | None
    job: str
    restart: int
    hosts: tuple[str, ...]

    def export(self) -> None:
        """Set the variables of the environment by which torch and DeepSpeed find each other."""
        os.environ |= {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_world_size),
            "MASTER_ADDR": self.master,
            "MASTER_PORT": str(self.port),
        }
        if self.interface:
            # gloo would tell the others the address that this host's own name resolves to, which is
            # 127.0.1.1 on many hosts.
            os.environ.setdefault("GLOO_SOCKET_IFNAME", self.interface)

    def silent_hosts(self) -> list[str]:
        """Hosts of the job that do not answer any more."""
        return []

    def was_cancelled(self) -> bool:
        """Return whether somebody cancelled the job while it saved."""
        return False

    @abstractmethod
    def why_stopped(self, number: int) -> str:
        """The likely meaning of the signal, by its number, that has just stopped the run."""

    @abstractmethod
    def why_ended(self) -> str | None:
        """The end of the job's earlier start, by Slurm's account; None if there is none."""

    @abstractmethod
    def start_again(self) -> int:
        """Have the whole job started again, once all is saved, on rank 0; the exit status."""


@dataclass(frozen=True)
class SlurmContext(ProcessContext):
    """A task of a Slurm job, as srun's variables say.

    Attributes:
        warn_before_end: Seconds before the time limit at which Slurm warns.
        answering: The other hosts that answered when the job started; a firewall may make a
            healthy one silent.
    """

    warn_before_end: int
    answering: tuple[str, ...]

    @classmethod
    def find(cls, interface: str | None, warn_before_end: int) -> "SlurmContext":
        """Find out about this process.

        Args:
            interface: None: the one that leads to the other hosts.
            warn_before_end: See the class.
        """
        from submitit.slurm.slurm import SlurmJobEnvironment

        environment = SlurmJobEnvironment()
        hosts = tuple(environment.hostnames)
        number = int(os.environ["SLURM_JOB_ID"])  # of an array, each task's own
        if interface is None and len(hosts) > 1:
            interface = interface_towards(hosts[1 if environment.node == 0 else 0])
        return cls(
            rank=environment.global_rank,
            world_size=environment.num_tasks,
            local_rank=environment.local_rank,
            local_world_size=environment.num_tasks // environment.num_nodes,
            master=hosts[0],
            port=PORTS[number * 7 % len(PORTS)],
            interface=interface,
            job=environment.job_id,
            restart=int(os.environ.get("SLURM_RESTART_COUNT", "0")),
            hosts=hosts,
            warn_before_end=warn_before_end,
            answering=tuple(_answering([h for i, h in enumerate(hosts) if i != environment.node])),
        )

    def silent_hosts(self) -> list[str]:
        return sorted(set(self.answering) - set(_answering(self.answering)))

    def was_cancelled(self) -> bool:
        # While a job's processes are being ended, Slurm says no more than COMPLETING.
        shown = _show(self.job)
        return "JobState=COMPLETING" in shown and "Reason=TimeLimit" not in shown

    def why_stopped(self, number: int) -> str:
        name = signal.Signals(number).name
        end = int(os.environ.get("SLURM_JOB_END_TIME", "0"))
        if number == signal.SIGTERM:
            return f"{name} from outside: cancelled, preempted or requeued"
        # Slurm looks at limits once or twice a minute, and may warn that much early.
        if end and end - time.time() <= self.warn_before_end + 60:
            return f"time limit ({name})"
        if re.search(r"\bPreemptTime=(?!None)", _show(self.job)):
            return f"preempted ({name})"
        return f"{name} from outside"

    def why_ended(self) -> str | None:
        # Accounting lags behind, or there is none: then the reason stays unknown.
        lines = _ask("sacct", "-D", "-X", "-n", "-P", "-j", self.job, "-o", "State").splitlines()
        ended = [line for line in lines if line and not line.startswith(("RUNNING", "PENDING"))]
        state = ended[-1] if ended else ""
        meaning = {
            "NODE_FAIL": "a node failed (NODE_FAIL)",
            "PREEMPTED": "preempted",
            "REQUEUED": "requeued from outside",
            "TIMEOUT": "time limit",
        }
        return meaning.get(state)

    def start_again(self) -> int:
        """Call `scontrol requeue`, from one process, when all of them have saved.

        Not by submitit's checkpoint(): it counts time-outs and gives up after a few, and replaces
        the pickled job, which a requeue by Slurm itself does not, so that there would be two ways
        to start again. Here every start is the same, and the run folder says where to go on.
        """
        end = time.monotonic() + CONTROLLER_PATIENCE
        is_told, refusals = False, 0
        while refusals < 2 and time.monotonic() < end:
            done, refusal = _try("scontrol", "requeue", self.job, timeout=REQUEUE_TIMEOUT)
            if done:
                return 0
            # A controller that answers another question has refused this one, unless it has come
            # back in between.
            if _show(self.job):
                refusals += 1
                continue
            refusals = 0
            if not is_told:
                print(
                    f"the controller of Slurm does not answer ({refusal}); all is saved, and it is "
                    f"asked to start the job again for {CONTROLLER_PATIENCE / 60:.0f} minutes more",
                    file=sys.stderr,
                    flush=True,
                )
                is_told = True
            time.sleep(CONTROLLER_PAUSE)
        print(
            f"Slurm does not take `scontrol requeue {self.job}`: {refusal}. If it is requeuing the "
            "job itself, as in a preemption, all is well; otherwise continue with "
            f"`{typed('slurm', 'resume')} RUN`",
            file=sys.stderr,
            flush=True,
        )
        # Nobody reads the status of a job that Slurm requeues; for any other job it says that the
        # run has not ended well.
        return 1


class LocalContext(ProcessContext):
    """A process that `tetdist.apps.slurm.local` started on this machine."""

    @classmethod
    def find(cls) -> "LocalContext":
        env = os.environ
        return cls(
            rank=int(env["RANK"]),
            world_size=int(env["WORLD_SIZE"]),
            local_rank=int(env["LOCAL_RANK"]),
            local_world_size=int(env["WORLD_SIZE"]),
            master=env["MASTER_ADDR"],
            port=int(env["MASTER_PORT"]),
            interface=None,
            job=LOCAL,
            restart=int(env["TETDIST_RESTART"]),
            hosts=(socket.gethostname(),),
        )

    def why_stopped(self, number: int) -> str:
        return signal.Signals(number).name

    def why_ended(self) -> str | None:
        return None

    def start_again(self) -> int:
        return AGAIN


def interface_towards(host: str) -> str:
    """The network interface by which this host reaches another.

    Raises:
        UserError: The other host's name leads nowhere.
    """
    import psutil

    try:
        family, kind, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as s:
            s.connect(address)  # of a datagram socket: nothing is sent
            own = s.getsockname()[0]
    except OSError as error:
        raise UserError(
            f"{socket.gethostname()} finds no way to {host} ({error}); name the network interface "
            "between the nodes: cluster.interface=NAME"
        ) from error
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == own for entry in addresses):
            return str(name)
    raise UserError(
        f"{socket.gethostname()} has no network interface with its address {own} towards {host}; "
        "name the one between the nodes: cluster.interface=NAME"
    )


def _answers(host: str) -> bool:
    try:
        socket.create_connection((host, ANY_PORT), timeout=5).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return True


def _answering(hosts: Sequence[str]) -> list[str]:
    """The hosts that answer; all are asked at once."""
    with ThreadPoolExecutor(32) as threads:
        return [host for host, ok in zip(hosts, threads.map(_answers, hosts), strict=True) if ok]


def _show(job: str) -> str:
    return _ask("scontrol", "show", "job", "--oneliner", job)


def _ask(*command: str) -> str:
    """The output of a command of Slurm; empty if it fails or takes long: no run depends on it."""
    done, text = _try(*command, timeout=QUESTION_TIMEOUT)
    return text if done else ""


def _try(*command: str, timeout: float) -> tuple[bool, str]:
    """Run a command of Slurm; return whether it succeeded, and its output or its error."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return False, f"no answer within {timeout:.0f} s"
    except OSError as error:
        return False, str(error)
    if done.returncode != 0:
        return False, " ".join(done.stderr.split()) or f"exit status {done.returncode}"
    return True, done.stdout
