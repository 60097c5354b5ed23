"""One Slurm cluster for the whole session, and none where there can be none."""

import os
from collections.abc import Iterator

import cluster as slurm_cluster
import pytest
from cluster import Cluster


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The running cluster. With CI set it must come up; elsewhere its absence is a reason to skip.

    Afterwards none of its processes, namespaces and network devices is left.
    """
    why_not = slurm_cluster.obstacle()
    if why_not and not os.environ.get("CI"):
        pytest.skip(why_not)
    assert why_not is None, why_not
    devices = slurm_cluster.devices()
    cluster = Cluster(tmp_path_factory.mktemp("slurm") / "cluster")
    cluster.start()
    try:
        yield cluster
    finally:
        cluster.stop()
    assert [cluster.processes_of(node) for node in cluster.nodes] == [[]] * len(cluster.nodes)
    assert slurm_cluster.devices() == devices
