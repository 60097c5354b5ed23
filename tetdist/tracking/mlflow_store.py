"""A check of the configured MLflow store before the run begins.

A server that does not answer is accepted: it gets the run when it is back. Stores that can never
work are refused: invalid addresses and damaged databases.
"""

import contextlib
import functools
import importlib.util
import logging
import os
import sqlite3
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from tetdist.errors import UserError, without_passwords
from tetdist.tracking.mlflow_logger import is_server, new_client
from tetdist.tracking.trackers import first_line

logger = logging.getLogger(__name__)

_OTHERWISE = "or train without MLflow: tracking.mlflow=false"
_SUGGESTED = f"set tracking.uri=http://HOST:PORT or sqlite:////FOLDER/mlflow.db, {_OTHERWISE}"
# Reading a larger database completely would delay the start, and other writers.
_MOST_BYTES_READ = 64 * 2**20


def check_store(uri: str) -> None:
    """Check that MLflow can keep runs at an address, without contacting a server."""
    address = urlsplit(uri)
    shown = without_passwords(uri)
    if shown != uri:
        _warn_of_password(is_server(uri))
    match address.scheme.partition("+")[0]:
        case "http" | "https":
            if not address.hostname:
                raise UserError(f"tracking.uri: {shown} names no host; {_SUGGESTED}")
        case "sqlite":
            path = uri.partition("///")[2]
            if not path or path == ":memory:":
                raise UserError(
                    f"tracking.uri: {shown} is a database in memory, lost when the run ends; "
                    f"{_SUGGESTED}"
                )
            problem = _problem(Path(path))
            if problem is not None:
                raise UserError(
                    f"tracking.uri: MLflow cannot keep runs in {path}: {problem}; {_SUGGESTED}"
                )
        case scheme:
            try:
                if scheme in ("postgresql", "mysql", "mssql"):
                    from sqlalchemy import create_engine

                    create_engine(uri)  # does not connect yet
                else:
                    new_client(uri)
            except ModuleNotFoundError as error:
                raise UserError(
                    f"tracking.uri: {shown} needs the package {error.name}; install it, "
                    f"{_OTHERWISE}"
                ) from error
            except Exception as error:  # MLflow and SQLAlchemy raise many kinds
                raise UserError(
                    f"tracking.uri: MLflow cannot use {shown} ({first_line(error)}); {_SUGGESTED}"
                ) from error


def hand_over(uri: str) -> None:
    """Put a server's user and password into MLflow's variables, which jobs inherit.

    The configuration file of a job does not contain them.

    Raises:
        UserError: The password is of a database, for which there are no such variables.
    """
    if without_passwords(uri) == uri:
        return
    if not is_server(uri):
        raise UserError(
            f"tracking.uri: a job cannot get the password of {without_passwords(uri)}, because no "
            "file may hold it; put it where the database's driver finds it, such as ~/.pgpass, or "
            f"use an `mlflow server` in front of the database, {_OTHERWISE}"
        )
    address = urlsplit(uri)
    os.environ["MLFLOW_TRACKING_USERNAME"] = unquote(address.username or "")
    os.environ["MLFLOW_TRACKING_PASSWORD"] = unquote(address.password or "")


@functools.cache
def _warn_of_password(of_server: bool) -> None:
    """Warn once per process that a password in tracking.uri is not saved."""
    better = (
        "export MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        if of_server
        else "put it where the database's driver finds it, such as ~/.pgpass"
    )
    logger.warning(
        "tracking.uri holds a password, which is not saved in any file: give it again whenever "
        "the run is resumed, or leave it out and %s",
        better,
    )


def _problem(path: Path) -> str | None:
    """Return the reason why MLflow cannot keep runs in an SQLite file; None if it can."""
    # A missing database will be made, with its folder.
    place = next(one for one in (path, *path.absolute().parents) if one.exists())
    folder = path.parent if place == path else place
    if place == path and not path.is_file():
        return "it is no file"
    if not folder.is_dir():
        return f"{folder} is no folder"
    for one in (place, folder):
        if not os.access(one, os.W_OK):
            return f"you need permission to write to {one}"
    if place != path:
        return None
    try:
        address = f"file:{quote(str(path.absolute()))}?mode=rw"
        database = sqlite3.connect(address, timeout=1.0, uri=True)
        with contextlib.closing(database):
            database.execute("PRAGMA schema_version")
            if _is_newer(database):
                return "a newer MLflow than this one has upgraded it; pip install --upgrade mlflow"
            if path.stat().st_size > _MOST_BYTES_READ:
                return None
            (found,) = database.execute("PRAGMA quick_check(1)").fetchone()
            if found == "ok":
                return None
            damage = " ".join(str(found).split())
    except sqlite3.DatabaseError as error:
        damage = str(error)
        if isinstance(error, sqlite3.OperationalError) and ("lock" in damage or "busy" in damage):
            return None  # another process uses it, or a file server does not answer
    return (
        f"it is damaged ({damage}); restore it, or move it away: a new one is then made and gets "
        "this run from its first step on"
    )


def _is_newer(database: sqlite3.Connection) -> bool:
    """Return whether a newer MLflow than the installed one has upgraded a database."""
    mlflow = importlib.util.find_spec("mlflow")  # importing it takes seconds
    tables = database.execute("SELECT name FROM sqlite_master").fetchall()
    if mlflow is None or mlflow.origin is None or ("alembic_version",) not in tables:
        return False
    known = Path(mlflow.origin).parent / "store" / "db_migrations" / "versions"
    revisions = database.execute("SELECT version_num FROM alembic_version").fetchall()
    return not all(any(known.glob(f"{revision}_*.py")) for (revision,) in revisions)
