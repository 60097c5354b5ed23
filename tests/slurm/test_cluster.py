"""The test cluster is a real one: several hosts, accounting, preemption's partitions."""

from cluster import Cluster


def test_nodes_are_hosts_of_their_own(cluster: Cluster) -> None:
    script = "echo $SLURM_PROCID $(hostname) $(getent hosts node1)"
    answers = sorted(
        line.split()[:3]
        for line in cluster.run("srun", "-N2", "--ntasks-per-node=1", "sh", "-c", script).split(
            "\n"
        )
        if line
    )
    # A host's own name leads it to itself only; node2 finds the real address of node1.
    assert answers[0] == ["0", "node1", "127.0.1.1"]
    assert answers[1][:2] == ["1", "node2"]
    assert answers[1][2].startswith("10.")


def test_nodes_share_neither_processes_nor_a_boot(cluster: Cluster) -> None:
    script = "readlink /proc/self/ns/pid; cat /proc/sys/kernel/random/boot_id; ls -d /proc/[0-9]*"
    said = [
        cluster.run("srun", "-w", node, "sh", "-c", script).split() for node in ("node1", "node2")
    ]
    for first, second in zip(*(lines[:2] for lines in said), strict=True):
        assert first != second
    # Of a node that sees its own processes only, they are few.
    assert all(len(lines) < 12 for lines in said), said


def test_accounting_remembers(cluster: Cluster) -> None:
    cluster.run("srun", "-N1", "--job-name=remember", "true")
    assert "remember" in cluster.run("sacct", "-n", "-P", "-X", "-o", "JobName")
