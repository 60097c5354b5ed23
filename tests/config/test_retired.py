"""Configurations of earlier versions, with keys that are gone."""

import pytest

from tetdist.config.loading import load, parse
from tetdist.config.retired import RETIRED
from tetdist.errors import UserError


def with_key(key, value):
    """Return a configuration as an earlier version wrote it."""
    raw = load("quickstart").as_dict()
    *place, name = key.replace(".N.", ".0.").split(".")
    section = raw
    for part in place:
        section = section[int(part)] if part.isdigit() else section.setdefault(part, {})
    section[name] = value
    return raw


@pytest.mark.parametrize("key", RETIRED)
def test_a_key_that_is_gone(key, caplog):
    caplog.set_level("INFO")
    place, kept = key.replace(".N.", ".0."), load("quickstart").as_dict()
    assert parse(with_key(key, RETIRED[key].default), "old.yaml", warn=False).as_dict() == kept
    assert f"old.yaml: dropped keys of an earlier version: {place}" in caplog.text
    other = with_key(key, "another")
    with pytest.raises(UserError) as raised:
        parse(other, "old.yaml", warn=False)
    assert str(raised.value) == f"old.yaml: {place}='another' is gone; {RETIRED[key].instead}"
    assert parse(other, "old.yaml", warn=False, is_trained=True).as_dict() == kept
