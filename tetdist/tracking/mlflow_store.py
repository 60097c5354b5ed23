"""A check of the configured MLflow store before the run begins.

A server that does not answer is accepted: it gets the run when it is back. Addresses that can never
work are refused.
"""

import contextlib
import functools
import logging
import os
import re
import sqlite3
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from tetdist.config.loading import TRACKING_VARIABLE
from tetdist.errors import UserError, without_passwords
from tetdist.tracking.mlflow_logger import is_server, new_client
from tetdist.tracking.trackers import first_line

logger = logging.getLogger(__name__)

_SUGGESTED = (
    "set tracking.uri=http://HOST:PORT or sqlite:////FOLDER/mlflow.db, or train without MLflow: "
    "tracking.mlflow=false"
)


def check_store(uri: str) -> None:
    """Check that MLflow can keep runs at an address, without contacting a server."""
    shown = without_passwords(uri)
    key = TRACKING_VARIABLE if uri == os.environ.get(TRACKING_VARIABLE) else "tracking.uri"
    if shown != uri:
        _warn_of_password()
    try:
        address = urlsplit(uri)
        match address.scheme.partition("+")[0]:
            case "http" | "https":
                if not address.hostname or address.port == 0:  # other bad ports raise, too
                    raise ValueError("it names no host")
            case "sqlite":
                _check_sqlite(uri.partition("///")[2])
            case "postgresql" | "mysql" | "mssql":
                from sqlalchemy import create_engine

                create_engine(uri)  # does not connect yet
            case _ if "://" not in uri and not uri.startswith("databricks"):
                raise ValueError("an address begins with http:// or sqlite:///")
            case _:
                new_client(uri)
    except Exception as error:  # MLflow, SQLAlchemy and SQLite raise many kinds
        raise UserError(
            f"{key}: MLflow cannot use {shown} ({first_line(error)}); {_SUGGESTED}"
        ) from error


def _check_sqlite(path: str) -> None:
    """Check that a file is an SQLite database; a missing one will be made, with its folder."""
    if not path or path == ":memory:":
        raise ValueError("no file after three slashes: a database in memory ends with the run")
    if forbidden := re.search(r"[%?\x00-\x1f\x7f]", path):
        raise ValueError(f"an address cannot hold the {forbidden[0]!r} of this path")
    if not Path(path).exists():
        return
    address = f"file:{quote(str(Path(path).absolute()))}?mode=rw"
    opened = contextlib.closing(sqlite3.connect(address, timeout=1.0, uri=True))
    # An OperationalError is temporary: another process uses it.
    with contextlib.suppress(sqlite3.OperationalError), opened as database:
        database.execute("PRAGMA schema_version")


def hand_over(uri: str) -> None:
    """Put a server's user and password into MLflow's variables, which jobs inherit.

    The configuration file of a job does not contain them.
    """
    if is_server(uri) and without_passwords(uri) != uri:
        address = urlsplit(uri)
        os.environ["MLFLOW_TRACKING_USERNAME"] = unquote(address.username or "")
        os.environ["MLFLOW_TRACKING_PASSWORD"] = unquote(address.password or "")


@functools.cache
def _warn_of_password() -> None:
    """Warn once per process that a password in tracking.uri is not saved."""
    logger.warning(
        "tracking.uri holds a password, which is not saved in any file: give it again whenever "
        "the run is resumed, or leave it out and export MLFLOW_TRACKING_USERNAME and "
        "MLFLOW_TRACKING_PASSWORD (of a database: put it where the driver finds it, ~/.pgpass)"
    )
