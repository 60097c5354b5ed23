"""The test cluster is a real one: several hosts, accounting, preemption's partitions."""


def test_nodes_are_hosts_of_their_own(cluster):
    script = "echo $SLURM_PROCID $(hostname) $(getent hosts node1)"
    output = cluster.run("srun", "-N2", "--ntasks-per-node=1", "--job-name=own", "sh", "-c", script)
    # A host's own name leads it to itself only; node2 finds the real address of node1.
    first, second = sorted(output.splitlines())
    assert first.split()[:3] == ["0", "node1", "127.0.1.1"]
    assert second.startswith("1 node2 10.")
    # Accounting remembers the job.
    assert "own" in cluster.run("sacct", "-n", "-P", "-X", "-o", "JobName")
