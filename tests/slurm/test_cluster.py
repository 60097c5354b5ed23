"""The test cluster is a real one: several hosts, accounting, preemption's partitions."""

from cluster import Cluster


def test_nodes_are_hosts_of_their_own(cluster: Cluster) -> None:
    script = "echo $SLURM_PROCID $(hostname) $(getent hosts node1)"
    said = cluster.run("srun", "-N2", "--ntasks-per-node=1", "--job-name=own", "sh", "-c", script)
    # A host's own name leads it to itself only; node2 finds the real address of node1.
    first, second = sorted(said.splitlines())
    assert first.split()[:3] == ["0", "node1", "127.0.1.1"]
    assert second.startswith("1 node2 10.")
    # Accounting remembers the job.
    assert "own" in cluster.run("sacct", "-n", "-P", "-X", "-o", "JobName")


def test_nodes_share_neither_processes_nor_a_boot(cluster: Cluster) -> None:
    script = "readlink /proc/self/ns/pid; cat /proc/sys/kernel/random/boot_id; ls -d /proc/[0-9]*"
    said = [
        cluster.run("srun", "-w", node, "sh", "-c", script).split() for node in ("node1", "node2")
    ]
    for first, second in zip(*(lines[:2] for lines in said), strict=True):
        assert first != second
    # Of a node that sees its own processes only, they are few.
    assert all(len(lines) < 12 for lines in said), said
