"""Contestants take turns: each answer is that of the last request, and the better one competes."""

import argparse

import pytest

from tetdist.apps.benchmarks import turns


class Pretended:
    """A process, from given numbers: a step takes 2 s asleep, or ``spinning`` seconds."""

    spinning = 1.0
    alive: list["Pretended"] = []  # noqa: RUF012  # shared on purpose

    def __init__(self, _module, _options, **environment):
        self.a_step = 2.0 if environment["OMP_WAIT_POLICY"] == "PASSIVE" else self.spinning
        self.unanswered = []
        self.steps = 0
        self.alive.append(self)

    def send(self, line):
        assert not self.unanswered, "sent before it has answered"
        self.unanswered.append(int(line))

    def seconds(self):
        self.steps += self.unanswered.pop()
        return self.a_step

    def end(self):
        assert not self.unanswered
        self.alive.remove(self)


def test_ours_waits_as_its_commands_do(monkeypatch):
    monkeypatch.setattr(turns, "TimedProcess", Pretended)
    with turns.contestants(["tetdist, none"], argparse.Namespace()) as found:
        assert [one.waiting for one in found.values()] == ["asleep"]


@pytest.mark.parametrize(("spinning", "better"), [(1.0, "spinning"), (3.0, "asleep")])
def test_the_better_way_of_waiting_competes(monkeypatch, spinning, better):
    monkeypatch.setattr(turns, "TimedProcess", Pretended)
    monkeypatch.setattr(Pretended, "spinning", spinning)
    with turns.contestants(["one", "other"], argparse.Namespace()) as found:
        # Of each the better process is left, which has answered every command.
        assert len(Pretended.alive) == 2
        for one in found.values():
            assert one.waiting == better
            assert one.warm_up == 4.0
            before = [process.steps for process in Pretended.alive]
            assert one.step() == min(spinning, 2.0)
            assert sum(p.steps for p in Pretended.alive) == sum(before) + 1
            assert not any(process.unanswered for process in Pretended.alive)
    assert not Pretended.alive
