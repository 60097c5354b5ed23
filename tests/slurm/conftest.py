"""One Slurm cluster for the whole session, and none where there can be none."""

import os
from collections.abc import Iterator
from pathlib import Path

import cluster as slurm_cluster
import pytest
import runs
import tiny
from cluster import Cluster
from runs import Launcher, Run


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The running cluster. With CI set it must come up; elsewhere its absence is a reason to skip.

    Afterwards none of its processes, namespaces and network devices is left.
    """
    if (why_not := slurm_cluster.obstacle()) is not None:
        tiny.skip(why_not)
    cluster = Cluster(tmp_path_factory.mktemp("slurm") / "cluster")
    environment = dict(os.environ)
    cluster.start()
    try:
        # For the launcher, which runs in this process.
        os.environ.clear()
        os.environ |= tiny.clean_environment(**cluster.env)
        yield cluster
    finally:
        os.environ.clear()
        os.environ |= environment
        cluster.stop()
    assert [cluster.processes_of(node) for node in cluster.nodes] == [[]] * len(cluster.nodes)
    # The kernel takes a moment for devices of namespaces that are gone.
    slurm_cluster.wait_until(lambda: not cluster.devices(), "no network device left")


@pytest.fixture(scope="session")
def launcher(
    cluster: Cluster, tiny_root: Path, tmp_path_factory: pytest.TempPathFactory
) -> Launcher:
    """Submits runs into one folder, with one MLflow store."""
    folder = tmp_path_factory.mktemp("runs")
    config = tiny.write_config(folder / "tiny.yaml", tiny_root, runs.CHANGES)
    return Launcher(cluster, config, folder / "runs")


@pytest.fixture(scope="session")
def straight(launcher: Launcher) -> Run:
    """The run that nobody disturbs."""
    run = launcher("straight")
    run.wait_for("finished")
    return run


@pytest.fixture(autouse=True)
def _empty_queue(request: pytest.FixtureRequest) -> Iterator[None]:
    """What a failed test leaves in the queue must not disturb the next one."""
    yield
    if "cluster" in request.fixturenames or "launcher" in request.fixturenames:
        cluster: Path | Cluster = request.getfixturevalue("cluster")
        assert isinstance(cluster, Cluster)
        cluster.cancel_all()


@pytest.fixture(autouse=True)
def cluster_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A place for facts; those of this machine's real cluster are none of the tests' business."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("TETDIST_CLUSTER", raising=False)
    file = tmp_path / "home" / "tetdist" / "cluster.yaml"
    file.parent.mkdir(parents=True)
    return file
