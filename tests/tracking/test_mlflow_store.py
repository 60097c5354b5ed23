"""A place that MLflow can never use is refused before the run begins, with a way out that works."""

import os
import secrets
import sqlite3
import sys

import pytest
import tiny
from tiny import expect, refused

from tetdist.config.loading import draft
from tetdist.errors import UserError, without_passwords
from tetdist.tracking import mlflow_store
from tetdist.tracking.mlflow_store import check_store, hand_over


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("foo://bar", "MLflow cannot use foo://bar"),
        ("http://me:secret@host:99999", "Port out of range"),
        ("localhost:5000", "localhost:5000 (an address begins with http://"),
        ("sqlite://", "in memory"),
        ("postgresql+nosuchdriver://host/runs", "MLflow cannot use"),
        ("sqlite:///{}/garbage.db", "not a database"),
        ("sqlite:///{}/a?b=c/mlflow.db", "an address cannot hold the '?' of this path"),
        # What may do its work later is taken.
        ("https://user:secret@nowhere.invalid/mlflow", None),
        ("sqlite:///{}/mlflow.db", None),
        ("sqlite:///{}/new/folder/mlflow.db", None),
        ("sqlite:///{}/busy.db", None),
    ],
)
def test_an_address_that_can_never_work_is_refused(uri, expected, tmp_path):
    (tmp_path / "garbage.db").write_bytes(b"no database" * 100)
    for name in ("mlflow.db", "busy.db"):
        with sqlite3.connect(tmp_path / name) as database:
            database.execute("create table metrics (key text, step integer)")
        database.close()
    busy = sqlite3.connect(tmp_path / "busy.db", isolation_level=None)
    busy.execute("begin exclusive")
    if expected is None:
        check_store(uri.format(tmp_path))
        assert not (tmp_path / "new").exists()
    else:
        with pytest.raises(UserError) as caught:
            check_store(uri.format(tmp_path))
        text = str(caught.value)
        assert text.startswith("tracking.uri: ")
        assert expected in text
        assert "tracking.mlflow=false" in text
        assert "secret" not in text
        assert "\n" not in text
    busy.close()


@pytest.mark.parametrize(
    ("overrides", "uri", "origin"),
    [
        ([], "foo://me:secret@host", "MLFLOW_TRACKING_URI"),
        (["tracking.uri=null"], None, "command line"),
        (["tracking={uri: 'http://host'}"], "http://host", "command line"),
    ],
)
def test_mlflows_variable_is_the_default(overrides, uri, origin, tiny_config, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "foo://me:secret@host")
    loaded = draft(str(tiny_config()), overrides)
    config = loaded.completed()
    assert (config.tracking.uri, loaded.origins["tracking.uri"]) == (uri, origin)
    assert "secret" not in config.as_yaml()
    with pytest.raises(UserError, match=r"^MLFLOW_TRACKING_URI: MLflow cannot use foo://me@host"):
        check_store("foo://me:secret@host")


def test_the_run_is_refused_before_it_begins(main, tiny_config, tmp_path):
    file = tiny_config({"tracking": {"mlflow": True}})
    refused(main(file, "tracking.trackers=mlflow"), "leave out mlflow, which tracking.mlflow")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mlflow.db").write_bytes(b"no database" * 100)
    refused(main(file), "not a database")
    assert not (tmp_path / "runs/tiny").exists()


def test_a_password_is_used_and_kept_nowhere(main, tiny_config, tmp_path, monkeypatch):
    # One that is not in the diff of this file, which environment.json has.
    secret, port = secrets.token_hex(8), tiny.free_port()
    address = f"127.0.0.1:{port}"
    tracking = {"mlflow": True, "trackers": ["tensorboard", "wandb"], "log_checkpoint": "last"}
    file = tiny_config({"tracking": tracking, "max_steps": 1})
    given = f"tracking.uri=http://me:{secret}@{address}"
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", str(file), given])
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb"))
    mlflow_store._warn_of_password.cache_clear()  # of an earlier test
    database = tmp_path / "store" / "mlflow.db"
    database.parent.mkdir()
    with tiny.mlflow_server(database, port, secret):
        done = expect(main(file, given))
    assert done.count("tracking.uri holds a password") == 1
    assert "export MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD" in done
    assert f"  look      http://{address}/#/experiments/1/runs/" in done
    with sqlite3.connect(database) as store:
        assert store.execute("select key from metrics where key = 'train/loss'").fetchall()
        kept = store.execute("select value from params where key = 'tracking.uri'").fetchall()
    assert kept == [(f"http://{address}",)]
    run = tmp_path / "runs" / "tiny"
    assert f"uri: http://{address}\n" in (run / "config.yaml").read_text()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {".json", ".safetensors", ".wandb"} <= {path.suffix for path in files}
    assert [path for path in files if secret.encode() in path.read_bytes()] == []
    later = refused(main(file, "tracking.mlflow=7", given))
    assert secret not in done + later + main(file, given, given).text


def test_a_job_gets_a_servers_password_by_variables(monkeypatch):
    variables = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")
    for name in variables:
        monkeypatch.setenv(name, "")
    hand_over("http://host")
    assert [os.environ[name] for name in variables] == ["", ""]
    hand_over("http://me:a%40b@host")
    assert [os.environ[name] for name in variables] == ["me", "a@b"]


def test_what_is_shown_of_an_address():
    for address, shown in (
        ("http://me:secret@host:5000/x", "http://host:5000/x"),
        ("https://secret@host", "https://host"),
        ("http://me:sec/ret@host", "http://host"),
        ("http://host:5000/a@b", "http://host:5000/a@b"),
        ("postgresql+psycopg2://me:se@c/ret@host/runs", "postgresql+psycopg2://me@host/runs"),
        ("mysql://host/x?user=me&password=secret&x=1", "mysql://host/x?user=me&password=&x=1"),
        ("http://host/x?token=secret&y=1", "http://host/x?token=&y=1"),
        ("mysql://host/x?passwd=a&sslpassword=b&y=1", "mysql://host/x?passwd=&sslpassword=&y=1"),
        ("mssql+pyodbc:///?odbc_connect=PWD%3Dx&y=1", "mssql+pyodbc:///?odbc_connect=&y=1"),
        ("sqlite:////data/a:b@c.db", "sqlite:////data/a:b@c.db"),
    ):
        assert without_passwords(f"see {address}, me@home") == f"see {shown}, me@home"


def test_the_end_does_not_send_to_an_mlflow_that_has_nothing(main, tiny_config):
    uri = f"http://127.0.0.1:{tiny.free_port()}"
    file = tiny_config({"tracking": {"mlflow": True, "uri": uri}, "max_steps": 1})
    done = expect(main(file), "runs/tiny is finished", "again when the tracker answers")
    assert "look  " not in done
