"""Configurations of earlier versions, with keys that are gone."""

from copy import deepcopy

import pytest

from tetdist.config.loading import load, parse
from tetdist.config.retired import RETIRED, RETIRED_VALUES
from tetdist.errors import UserError

KEPT = load("quickstart").as_dict()


def with_key(key, value):
    """Return a configuration as an earlier version wrote it."""
    raw = deepcopy(KEPT)
    *place, name = key.replace(".N.", ".0.").split(".")
    section = raw
    for part in place:
        section = section[int(part)] if part.isdigit() else section.setdefault(part, {})
    section[name] = value
    return raw


@pytest.mark.parametrize("key", RETIRED)
def test_a_key_that_is_gone(key):
    place = key.replace(".N.", ".0.")
    assert parse(with_key(key, RETIRED[key]), "old.yaml", warn=False).as_dict() == KEPT
    other = with_key(key, "another")
    with pytest.raises(UserError) as raised:
        parse(other, "old.yaml", warn=False)
    assert str(raised.value).startswith(f"old.yaml: {place}='another' is gone; remove it, or use")
    if key == "model.neuron.mask":  # a trained network computes with it
        with pytest.raises(UserError, match=r"neuron.mask='another' is gone"):
            parse(other, "old.yaml", warn=False, is_trained=True)
        return
    assert parse(other, "old.yaml", warn=False, is_trained=True).as_dict() == KEPT


@pytest.mark.parametrize("key", RETIRED_VALUES)
def test_a_value_that_is_gone(key):
    values, default = RETIRED_VALUES[key]
    for value in values:
        with pytest.raises(UserError) as raised:
            parse(with_key(key, value), "old.yaml", warn=False)
        place = key.replace(".N.", ".0.")
        assert str(raised.value).startswith(f"old.yaml: '{place}': must be ")
        trained = parse(with_key(key, value), "old.yaml", warn=False, is_trained=True)
        assert trained.as_dict() == with_key(key, default)
