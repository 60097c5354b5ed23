"""The tiny data set and the ways to train on it that several test files share."""

import gc
import importlib
import logging
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import Phase, settings

# Before anything imports numpy, whose threads take longer than small matrices, and torch; see
# tetdist_command.py.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import farm as farm_of_forks
import numpy as np
import tiny
from samples import picture
from tiny import Farm, Outcome, Tool

from tetdist import plugins

if TYPE_CHECKING:
    from tetdist.distributed.world import World

FARM = pytest.StashKey[Farm]()


def pytest_sessionstart(session: pytest.Session) -> None:
    """Have Ctrl-C and SIGTERM end the test under way, what it has started, and then all tests.

    In the background of a script Ctrl-C is ignored, also by every process that a test starts.
    """

    def end(number: int, _frame: object) -> None:
        # `timeout` sends SIGTERM twice, and the second must not interrupt what ends processes.
        if number == signal.SIGINT or not session.shouldstop:
            # Not only raised, because the program under test may catch it.
            session.shouldstop = f"ended by {signal.Signals(number).name}"
            raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)


def pytest_configure(config: pytest.Config) -> None:
    """Hide a launcher from the tests, and GPUs from those that are not about them.

    `make test` then passes on a machine with a GPU, too: most tests show something about CPUs, such
    as results that are equal to the bit.
    """
    for name in (*tiny.LAUNCHED, "MLFLOW_TRACKING_URI"):
        os.environ.pop(name, None)
    if config.getoption("markexpr") != "gpu":
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    # A failing example is not made smaller, which takes minutes in Triton's interpreter.
    seeded = {"derandomize": True, "database": None, "deadline": None, "phases": [Phase.generate]}
    settings.register_profile("seeded", **seeded)
    settings.load_profile("seeded")


def pytest_runtest_setup() -> None:
    """Forget what a run logged to MLflow, and a command, leave in the environment."""
    for name in ("MLFLOW_TRACKING_URI", "TETDIST_COMMAND"):
        os.environ.pop(name, None)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave tests that need a GPU to `make test-gpu`, since the others do not see one."""
    if config.getoption("markexpr") != "gpu":
        items[:] = [item for item in items if item.get_closest_marker("gpu") is None]
        return
    import torch

    if not torch.cuda.is_available():
        raise pytest.UsageError("-m gpu needs a CUDA device, and torch finds none here")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Spare garbage collections what was imported."""
    gc.freeze()
    session.config.add_cleanup(gc.unfreeze)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> Generator[None, object, object]:
    """Fork the farm before any test has done anything, if one needs it."""
    if not any("farm" in getattr(item, "fixturenames", ()) for item in session.items):
        return (yield)
    with farm_of_forks.forked() as session.config.stash[FARM]:
        return (yield)


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database that is set up, because that takes seconds."""
    import mlflow

    path = tmp_path_factory.mktemp("store") / "empty.db"
    mlflow.MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture(scope="session", autouse=True)
def _all_end_with_the_tests() -> Iterator[None]:
    """Whatever a test has started ends by itself when the tests are killed, and leaves no files."""
    from tetdist.distributed.launchers import as_launcher

    with tempfile.TemporaryDirectory(prefix="tetdist-tests-") as folder:
        os.environ |= as_launcher() | {"TMPDIR": folder}
        yield


@pytest.fixture(autouse=True)
def _without_what_others_imported() -> Iterator[None]:
    """Every test begins as a process does: without a user's own neurons, losses, optimisers."""
    yield
    own = [name for name in sys.modules if name.partition(".")[0] == plugins.PACKAGE]
    for name in own:
        del sys.modules[name]
    if own:
        from tetdist.losses import LOSSES
        from tetdist.nn.neurons import NEURONS
        from tetdist.optimizers import OPTIMIZERS

        registries: list[plugins.Registry[Any]] = [NEURONS, LOSSES, OPTIMIZERS]
        for known in registries:
            for kind in [k for k in known if known._modules[k].startswith(f"{plugins.PACKAGE}.")]:
                del known[kind], known._modules[kind]


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """One thread for tensors so small that a second would only wait for the first."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny data set, indexed; to be read only."""
    from tetdist.datasets import index

    root = tmp_path_factory.mktemp("tiny") / "data"
    tiny.make_images(root)
    index.index_splits(root)
    return root


@pytest.fixture
def tiny_copy(tiny_root: Path, tmp_path: Path) -> Path:
    """A copy of the tiny data set, to be spoilt."""
    return Path(shutil.copytree(tiny_root, tmp_path / "data"))


@pytest.fixture
def tiny_config(tiny_root: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes tiny.yaml: ({dotted key: value}) -> file; its runs go to tmp_path / "runs"."""

    def write(changes: dict[str, Any] | None = None) -> Path:
        return tiny.write_config(tmp_path / "tiny.yaml", tiny_root, changes)

    return write


@pytest.fixture
def main(
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Callable[..., Outcome]]:
    """Runs the training program in this process, with the plain engine: (file, *overrides).

    A start takes milliseconds here and seconds as a process of its own.
    """
    import torch

    from tetdist.apps.cli import train
    from tetdist.distributed.signals import StopRequest
    from tetdist.tracking import environment

    for name, function in farm_of_forks.environment().items():
        monkeypatch.setattr(environment, name, function)
    # These two end the tests, and not the training alone.
    others = [s for s in StopRequest.SIGNALS if s not in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr(StopRequest, "SIGNALS", tuple(others))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    status = 0

    def run(file: Path | str, *overrides: str) -> Outcome:
        nonlocal status
        if status:  # a lock is held until the last traceback that knows of it is gone
            gc.collect()
        status = 1
        caplog.clear()
        capfd.readouterr()
        with caplog.at_level("INFO"):
            try:
                status = train.main(["--config", str(file), "engine=torch", *overrides])
            except SystemExit as ended:  # argparse
                status = int(ended.code or 0)
        return Outcome(status, capfd.readouterr().err + caplog.text)

    yield run
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def farm(request: pytest.FixtureRequest) -> Farm:
    return request.config.stash[FARM]


@pytest.fixture
def image_root(tmp_path: Path) -> Callable[..., Path]:
    """Makes a data root of JPEG files, 2 splits of 3 classes: (per_class=4, size=...) -> root."""

    def make(per_class: int = 4, size: tuple[int, int] = (60, 80)) -> Path:
        root = tmp_path / "images"
        seed = 0
        for split in ("train", "val"):
            for name in ("ant", "bee", "cow"):
                folder = root / split / name
                folder.mkdir(parents=True)
                for i in range(per_class):
                    image = picture(size[0] + 3 * i, size[1] + 5 * i, seed)
                    image.save(folder / f"{name}{i}.jpg", quality=95)
                    seed += 1
        return root

    return make


@pytest.fixture
def event_root(tmp_path: Path) -> Callable[..., Path]:
    """Makes a data root of event tensors, 2 splits of 2 classes of 5: (dtype=uint8) -> root."""

    def make(dtype: type[np.generic] = np.uint8, shape: tuple[int, ...] = (3, 2, 8, 6)) -> Path:
        root = tmp_path / "events"
        rng = np.random.default_rng(0)
        for split in ("train", "val"):
            for name in ("left", "right"):
                folder = root / split / name
                folder.mkdir(parents=True)
                for i in range(5):
                    np.save(folder / f"{i}.npy", rng.integers(0, 200, shape).astype(dtype))
        return root

    return make


@pytest.fixture
def tool(capfd: pytest.CaptureFixture[str]) -> Iterator[Tool]:
    """Runs a tool in this process, which saves the seconds of its imports: status, standard output,
    standard error."""

    def run_main(name: str, *arguments: object) -> tuple[int, str, str]:
        module = importlib.import_module(f"tetdist.apps.cli.{name.removesuffix('.py')}")
        capfd.readouterr()
        try:
            status = module.main([*map(str, arguments)])
        except SystemExit as ended:
            status = int(ended.code or 0)
        return status, *capfd.readouterr()

    yield run_main
    # Which some tools set for a process of their own.
    logging.getLogger("tetdist.tracking").setLevel(logging.NOTSET)


@pytest.fixture
def call(tool: Tool) -> Callable[..., tuple[int, str]]:
    """Runs a tool in this process: status and output."""

    def run_main(name: str, *arguments: object) -> tuple[int, str]:
        status, out, err = tool(name, *arguments)
        return status, out + err

    return run_main


@pytest.fixture
def output_of(call: Callable[..., tuple[int, str]]) -> Callable[..., str]:
    """Runs a tool in this process, which ends with a status: (name, *arguments, status=0)."""

    def run_main(name: str, *arguments: object, status: int = 0) -> str:
        found, output = call(name, *arguments)
        assert found == status, output
        return output

    return run_main


@pytest.fixture
def alone() -> "Iterator[World]":
    """The processes of a run that has one."""
    from tetdist.distributed.world import join

    with join("cpu") as world:
        yield world


@pytest.fixture
def a_terminal() -> Iterator[None]:
    """As in a terminal, though the tests themselves may run under nohup."""
    as_started = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, as_started)
