"""A real Slurm cluster on one machine, for as long as the tests run.

Every node is a process tree in namespaces of its own. It has its own address, host name, loopback
and /etc/hosts, so that an address which only works on one host fails here as it fails on a real
cluster. It has its own process ids and boot id, so that what only works among processes of one
host fails as well. As on Debian, a node's own name leads to its loopback, 127.0.1.1. Files are
shared. Accounting is on: a database, its daemon, and so `sacct`.

The daemons run in the foreground, as children of this process, and die with it. The namespaces have
no names: they, and the network cables into them, vanish with their last process.

    main      partition by default; its jobs are preempted by those in urgent, 8 s after a warning
    abrupt    as main, without these seconds
    urgent    preempts
"""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import psutil

# Debian's names, by what they bring.
PACKAGES = {
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "sbatch": "slurm-client",
    "slurmdbd": "slurmdbd",
    "munged": "munge",
    "mariadbd": "mariadb-server-core",
    "my_print_defaults": "mariadb-client-core",  # mariadb-install-db calls it
    "ip": "iproute2",
    "setpriv": "util-linux",
}


def obstacle() -> str | None:
    """Why there can be no cluster here, or None."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    missing = [p for program, p in PACKAGES.items() if shutil.which(program, path=path) is None]
    if missing:
        return f"Slurm is not installed: apt-get install {' '.join(missing)}"
    if os.geteuid() != 0:
        return "a Slurm cluster needs root, for its network namespaces"
    return None


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 30) -> None:
    """Ask again and again, for a bounded time."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds:g} s: {what}"
        time.sleep(0.05)


def output(*command: str, env: dict[str, str] | None = None, timeout: float = 40) -> str:
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
    return done.stdout


def ip(command: str) -> None:
    output("ip", *command.split())


class Cluster:
    """``nodes`` nodes, node1 and following, of 8 claimed CPUs and no GPU each."""

    def __init__(self, folder: Path, nodes: int = 3) -> None:
        assert obstacle() is None, obstacle()
        self.folder = folder  # of everything that the cluster writes
        self.nodes = [f"node{i + 1}" for i in range(nodes)]
        self.conf = folder / "slurm.conf"
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._namespaces: dict[str, str] = {}
        self._crashed: set[str] = set()
        # Two of these at once must not meet: names and addresses from the number of this process.
        number = os.getpid() % (250 * 250)
        self._bridge = f"tet{os.getpid()}-"  # of a device's name, 15 characters are allowed
        self._net = f"10.{64 + number // (250 * 16) % 16}.{number % 250}"
        self.env = {"PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin", "SLURM_CONF": str(self.conf)}

    # --- up and down --------------------------------------------------------------------------

    def start(self) -> None:
        try:
            self._start()
        except BaseException:
            self.stop()
            raise

    def _start(self) -> None:
        for name in ("log", "state", "spool"):
            (self.folder / name).mkdir(parents=True)
        self._network()
        self._configure()
        socket_of_munge = self.folder / "munge.socket"
        self._run(
            f"munged --foreground --force --key-file={self.folder}/munge.key "
            f"--socket={socket_of_munge} --pid-file={self.folder}/munged.pid "
            f"--seed-file={self.folder}/munged.seed --log-file={self.folder}/log/munge"
        )
        self._start_database()
        wait_until(socket_of_munge.exists, "munge's socket")
        self._run("slurmdbd -D")
        wait_until(lambda: self._answers("sacctmgr", "-n", "show", "cluster"), "slurmdbd")
        self._run("slurmctld -D -c")
        wait_until(lambda: self._answers("scontrol", "ping"), "slurmctld")
        for node in self.nodes:
            self._start_node(node)
        wait_until(lambda: set(self.node_states().values()) == {"idle"}, "all nodes idle")

    def stop(self) -> None:
        """End every daemon and job, and leave no process, namespace or network device."""
        # The controller before the nodes, or it would see them failing.
        self._end("slurmctld")
        for node in self.nodes:
            self._kill_all(node)
        for name in ("slurmdbd", "mariadbd", "munged"):
            self._end(name)
        for process in self._daemons.values():  # a node whose start failed half-way
            if process.poll() is None:
                process.kill()
                process.wait(10)
        # The kernel keeps a node's network, for minutes, while a connection of a killed process
        # still waits for an answer; a cable goes with either of its ends.
        for device in self.devices():
            subprocess.run(["ip", "link", "del", device], stderr=subprocess.DEVNULL)

    def cancel_all(self) -> None:
        """Cancel what is queued, and wait until it is gone."""
        if self.squeue():
            self.run("scancel", "--user=root")
            wait_until(lambda: not self.squeue(), "an empty queue", 60)

    def crash(self, node: str) -> None:
        """End all that runs on a node, at once and without telling anybody, as a power cut."""
        # Otherwise the kernel would close the connections of the processes that are killed.
        cable = self._cable(node)
        if cable in self.devices():
            ip(f"link set {cable} down")
        self._kill_all(node)
        # The kernel gives the number to the next one, whose processes would count for both nodes.
        del self._namespaces[node]
        self._crashed.add(node)

    def lose(self, node: str) -> None:
        """End all that runs on a node, and keep its network, which refuses connections."""
        net = f"--net=/proc/{self._daemons[node].pid}/ns/net"
        # It belongs to no process of the node.
        holder = self._run(f"nsenter {net} sleep infinity", name=f"network of {node}")
        place = Path(f"/proc/{holder.pid}/ns/net")
        wait_until(lambda: str(place.readlink()) == self._namespaces[node], "a holder")
        self._crashed |= {node, f"network of {node}"}
        self._daemons[node].kill()
        self._daemons[node].wait(10)

    def boot(self, node: str) -> None:
        """Start a node again, with a new network and another boot id."""
        self._kill_all(node)
        (self.folder / f"ready-{node}").unlink()
        wait_until(lambda: self._cable(node) not in self.devices(), f"the end of {node}'s network")
        self._start_node(node)
        self._crashed.remove(node)

    def notice_crashes(self, after: int) -> None:
        """Have the controller give up nodes that have not answered for so many seconds."""
        conf = self.conf.read_text()
        self.conf.write_text(re.sub(r"(?m)^SlurmdTimeout=.*", f"SlurmdTimeout={after}", conf))
        self.run("scontrol", "reconfigure")

    def _kill_all(self, node: str) -> None:
        def is_empty() -> bool:
            for process in self.processes_of(node):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            if (daemon := self._daemons.get(node)) is not None:
                daemon.poll()
            return not self.processes_of(node)

        wait_until(is_empty, f"the end of all processes of {node}", 10)

    # --- asking -------------------------------------------------------------------------------

    def run(self, *command: str, timeout: float = 40) -> str:
        """What a client command prints; its failure is one of the test."""
        return output(*command, env=os.environ | self.env, timeout=timeout)

    def squeue(self) -> list[str]:
        return self.run("squeue", "-h", "-o", "%A %T").splitlines()

    def job(self, job_id: str) -> dict[str, str]:
        """What the controller knows of a job: JobState, Restarts, NodeList, ..."""
        text = self.run("scontrol", "show", "job", "--oneliner", job_id)
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def node_states(self) -> dict[str, str]:
        lines = self.run("sinfo", "-h", "-N", "-o", "%N %T").splitlines()
        return dict(line.split() for line in lines)

    def processes_of(self, node: str) -> list[psutil.Process]:
        """All processes in a node's network namespace that are not dead already."""
        namespace = self._namespaces.get(node)
        found: list[psutil.Process] = []
        for process in psutil.process_iter() if namespace else ():
            with contextlib.suppress(OSError, psutil.NoSuchProcess):  # it ended meanwhile
                same = str(Path(f"/proc/{process.pid}/ns/net").readlink()) == namespace
                if same and process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
                    found.append(process)
        return found

    def tasks_of(self, node: str) -> list[psutil.Process]:
        """The training processes of jobs on a node."""
        found: dict[psutil.Process, int] = {}
        for process in self.processes_of(node):
            with contextlib.suppress(psutil.NoSuchProcess):
                line = process.cmdline()
                if "submitit.core._submit" in line and "python" in line[0]:
                    found[process] = process.ppid()
        # Without their children: one that is about to become another program has the same line.
        pids = {process.pid for process in found}
        return [process for process, parent in found.items() if parent not in pids]

    def task(self, job_id: str, rank: int) -> psutil.Process:
        """The training process of a rank."""
        wanted = {"SLURM_JOB_ID": job_id, "SLURM_PROCID": str(rank)}
        tasks = [process for node in self.nodes for process in self.tasks_of(node)]
        (found,) = [process for process in tasks if wanted.items() <= process.environ().items()]
        return found

    def leftovers(self) -> list[str]:
        """The command lines of jobs' processes on all nodes: everything but the daemons."""
        lines: list[str] = []
        for node in self.nodes:
            for process in self.processes_of(node):
                with contextlib.suppress(psutil.NoSuchProcess):
                    line = process.cmdline()
                    if line and line[0] not in ("unshare", "sleep") and "slurmd" not in line[0]:
                        lines.append(f"{node}: {' '.join(line)}")
        return lines

    def devices(self) -> list[str]:
        """Its network devices on this machine."""
        links = json.loads(output("ip", "-json", "link"))
        return [link["ifname"] for link in links if link["ifname"].startswith(self._bridge)]

    def wait_until_clean(self) -> None:
        """Of jobs, no process is left on any node (some take a moment after the job's end)."""
        wait_until(lambda: not self.leftovers(), f"left: {self.leftovers()}", 15)

    # --- parts --------------------------------------------------------------------------------

    def _network(self) -> None:
        ip(f"link add {self._bridge} type bridge")
        ip(f"address add {self._net}.1/24 dev {self._bridge}")
        ip(f"link set {self._bridge} up")

    def _free_port(self) -> int:
        with socket.socket() as s:
            s.bind(("", 0))  # the daemons listen at every address
            return int(s.getsockname()[1])

    def _configure(self) -> None:
        folder, host, head = self.folder, socket.gethostname(), f"{self._net}.1"
        key = folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(1024))
        (folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
        (folder / "nothing").touch()
        self._database_port = self._free_port()
        values = {"folder": folder, "host": host, "head": head, "port": self._free_port()}
        values |= {"accounting_port": self._free_port(), "database_port": self._database_port}

        def filled(name: str) -> str:
            return Path(__file__).with_name(name).read_text().format(**values)

        addresses = {node: f"{self._net}.{i + 11}" for i, node in enumerate(self.nodes)}
        conf = filled("slurm.conf")
        for node, address in addresses.items():
            lines = [f"127.0.0.1 localhost\n127.0.1.1 {node}\n{head} {host}\n"]
            lines += [f"{a} {name}\n" for name, a in addresses.items() if name != node]
            (folder / f"hosts-{node}").write_text("".join(lines))
            conf += f"NodeName={node} NodeAddr={address} CPUs=8 RealMemory=64000\n"
        self.conf.write_text(conf)
        file = folder / "slurmdbd.conf"
        file.touch(mode=0o600)  # slurmdbd refuses another mode
        file.write_text(filled("slurmdbd.conf"))

    def _start_database(self) -> None:
        folder = self.folder
        # In /tmp, the temporary tables of two clusters were seen to meet.
        (folder / "tmp").mkdir()
        install = (
            f"mariadb-install-db --no-defaults --user=root --datadir={folder}/db "
            f"--tmpdir={folder}/tmp --skip-test-db --skip-name-resolve"
        )
        output(*install.split(), timeout=60)
        # slurmdbd would make its database itself, but its first connection then fails (seen with
        # Debian 13's client library).
        (folder / "database.sql").write_text(
            "CREATE DATABASE accounts;\n"
            f"CREATE USER slurm@'{self._net}.1';\n"
            f"GRANT ALL ON accounts.* TO slurm@'{self._net}.1';\n"
        )
        self._run(
            f"mariadbd --no-defaults --user=root --datadir={folder}/db --tmpdir={folder}/tmp "
            f"--bind-address={self._net}.1 --port={self._database_port} "
            f"--socket={folder}/mariadb.socket --pid-file={folder}/mariadb.pid "
            f"--init-file={folder}/database.sql --skip-name-resolve --innodb-buffer-pool-size=32M "
            "--innodb-log-file-size=8M --innodb-flush-log-at-trx-commit=0"
        )

        def listens() -> bool:
            with socket.socket() as s:
                return s.connect_ex((f"{self._net}.1", self._database_port)) == 0

        wait_until(listens, "the database")

    def _cable(self, node: str) -> str:
        """The device by which a node hangs on the bridge."""
        return f"{self._bridge}{node[-1]}"

    def _start_node(self, node: str) -> None:
        """A node: first its namespaces, then its cable, then its daemon in them."""
        (self.folder / f"boot-{node}").write_text(f"{uuid.uuid4()}\n")
        script = f"""
            hostname {node} && ip link set lo up &&
            mount --bind {self.folder}/boot-{node} /proc/sys/kernel/random/boot_id &&
            mount --bind {self.folder}/hosts-{node} /etc/hosts &&
            mount --bind {self.folder}/nothing /etc/resolv.conf &&
            echo ready >{self.folder}/ready-{node} && read -r _ && exec slurmd -D </dev/null"""
        namespaces = "unshare --net --uts --mount --pid --fork --mount-proc --kill-child sh -c"
        process = self._run(namespaces, script, name=node, talk=True)
        wait_until((self.folder / f"ready-{node}").exists, f"namespaces of {node}")
        self._namespaces[node] = str(Path(f"/proc/{process.pid}/ns/net").readlink())
        cable, number = self._cable(node), self.nodes.index(node) + 11
        ip(f"link add {cable} type veth peer name eth0 netns {process.pid}")
        ip(f"link set {cable} master {self._bridge} up")
        inside = ("nsenter", f"--net=/proc/{process.pid}/ns/net", "ip")
        output(*inside, "address", "add", f"{self._net}.{number}/24", "dev", "eth0")
        output(*inside, "link", "set", "eth0", "up")
        process.stdin.write(b"\n")
        process.stdin.close()

    def _run(
        self, command: str, *more: str, name: str = "", talk: bool = False
    ) -> subprocess.Popen[bytes]:
        """Start a daemon in the foreground that dies with this process."""
        words = command.split()
        name = name or words[0]
        with (self.folder / "log" / f"{name}.out").open("ab") as log:
            self._daemons[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *words, *more],
                env=os.environ | self.env,
                stdin=subprocess.PIPE if talk else subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # a Ctrl-C is for the tests
            )
        return self._daemons[name]

    def _alive(self, name: str) -> bool:
        return name in self._daemons and self._daemons[name].poll() is None

    def _end(self, name: str) -> None:
        if self._alive(name):
            self._daemons[name].terminate()
            try:
                self._daemons[name].wait(15)
            except subprocess.TimeoutExpired:
                self._daemons[name].kill()
                self._daemons[name].wait(10)

    def _answers(self, *command: str) -> bool:
        for name, process in self._daemons.items():
            if name in self._crashed:
                continue
            assert process.poll() is None, f"{name} has ended; see {self.folder}/log"
        done = subprocess.run(command, env=os.environ | self.env, capture_output=True, timeout=40)
        return done.returncode == 0 and b"DOWN" not in done.stdout
