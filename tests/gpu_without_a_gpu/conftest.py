"""The process that the tests ask, which starts once."""

from collections.abc import Iterator

import pytest
import worker
from worker import Worker


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    with worker.started(tmp_path_factory.mktemp("steps")) as started:
        yield started
