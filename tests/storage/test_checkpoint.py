"""Checkpoints are whole or not there, and damage is found, named and passed over."""

import json
import logging
import os
import pickle
import shutil
import subprocess
import textwrap
from pathlib import Path

import pytest
import tiny
import torch
from torch import nn

from tetdist.errors import UserError
from tetdist.storage import checkpoint, foreign_files, selection
from tetdist.storage.checkpoint import Description


def network(width=4):
    return nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Linear(width, 2))


def trained(seed, width=4):
    """A network and an Adam with state."""
    torch.manual_seed(seed)
    model = network(width)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    model(torch.randn(5, 3)).square().sum().backward()
    optimizer.step()
    return model, optimizer


def evaluated(top1):
    return None if top1 is None else {"top1": top1, "top5": 99.0}


def save(folder, step, *, keep_last=10, top1=None, average_top1=None, seed=None):
    """Save a checkpoint, with an average of its weights if `average_top1` is given."""
    model, optimizer = trained(step if seed is None else seed)
    description = Description(
        config={}, classes=["a"], timesteps=1, step=step, validation=evaluated(top1)
    )
    average = None
    if average_top1 is not None:
        described = description.model_copy(update={"validation": evaluated(average_top1)})
        average = checkpoint.Average(model.state_dict(), described)
    return checkpoint.save(
        folder,
        model=model.state_dict(),
        optimizer=optimizer.state_dict(),
        description=description,
        state={"step": step, "result": {"top1": step / 3}},
        keep_last=keep_last,
        average=average,
    )


def step_of(path):
    return selection.step_and_repeat(path)[0]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_round_trip(tmp_path):
    model, optimizer = trained(7)
    path = save(tmp_path, 7)
    found = checkpoint.newest(tmp_path)
    assert found.path == path
    assert found.state["step"] == 7
    assert found.state["result"] == {"top1": 7 / 3}
    other, other_optimizer = trained(8)
    checkpoint.load_weights(other, found.model, path)
    other_optimizer.load_state_dict(found.optimizer)
    for key, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key
    theirs = other_optimizer.state_dict()["state"]
    for i, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(state[key], theirs[i][key]) for key in state)
    weights, description = checkpoint.load_model_file(path)
    expected = Description(config={}, classes=["a"], timesteps=1, step=7, validation=None)
    assert description == expected
    assert weights.keys() == model.state_dict().keys()


def cut(file):
    os.truncate(file, file.stat().st_size // 2)


def flip_byte(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def empty(file):
    file.write_bytes(b"")


@pytest.mark.parametrize("damage", [cut, flip_byte, empty, Path.unlink])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "state.json"])
def test_damaged_one_is_named_and_the_one_before_it_used(name, damage, tmp_path, caplog):
    save(tmp_path, 1)
    older, newer = save(tmp_path, 2), save(tmp_path, 3)
    damage(newer / name)
    with caplog.at_level(logging.WARNING):
        found = checkpoint.newest(tmp_path)
    assert found.path == older
    (record,) = caplog.records
    assert str(newer) in record.getMessage()
    assert name in record.getMessage()


@pytest.mark.parametrize("manifest", [None, '{"files": {"x": 1}}', "[" * 10**5])
def test_damaged_manifest(manifest, tmp_path, caplog):
    older, newer = save(tmp_path, 2), save(tmp_path, 3)
    if manifest is None:
        (newer / "manifest.json").unlink()
    else:
        (newer / "manifest.json").write_text(manifest)
    with caplog.at_level(logging.WARNING):
        found = checkpoint.newest(tmp_path)
    assert found.path == older
    assert "manifest.json" in caplog.text


def test_last_ones_and_the_best_are_kept(tmp_path):
    for step in range(1, 7):
        # Several are as good; the first of them counts.
        top1, average_top1 = min(step, 2) * 10.0, min(step, 3) * 10.0
        save(tmp_path, step, keep_last=2, top1=top1, average_top1=average_top1)
    assert names(tmp_path) == [f"step-{step:08}" for step in (2, 3, 5, 6)]
    # What earlier versions wrote is ignored.
    for pointer in ("last", "best", "best-ema"):
        (tmp_path / pointer).write_text("step-00000005\n")
    assert checkpoint.load_model_file(tmp_path)[1].step == 6
    assert checkpoint.load_model_file(tmp_path, "best")[1].step == 2
    save(tmp_path, 7, keep_last=2, top1=30.0, average_top1=20.0)
    assert [step_of(path) for path in selection.all_in(tmp_path)] == [3, 6, 7]
    assert checkpoint.load_model_file(tmp_path, "best")[1].step == 7
    assert checkpoint.load_model_file(tmp_path, "best", ema=True)[1].step == 3
    save(tmp_path, 8, keep_last=1, average_top1=20.0)  # between evaluations
    assert [step_of(path) for path in selection.all_in(tmp_path)] == [3, 7, 8]


def test_a_damaged_best_is_refused_and_kept(tmp_path):
    """Another one never takes its place, be the header readable or not."""
    for step, top1 in ((1, 10.0), (2, 30.0), (3, 20.0)):
        save(tmp_path, step, top1=top1, average_top1=top1)
    best = selection.best(tmp_path)
    assert step_of(best) == 2
    whole = {file.name: file.read_bytes() for file in best.iterdir()}
    for name, damage, words in (
        ("model.safetensors", flip_byte, "its checksum differs"),
        ("model.safetensors", empty, "it may be the best one"),
        ("model.safetensors", Path.unlink, "it may be the best one"),
        ("manifest.json", cut, "it may be the best one"),
    ):
        damage(best / name)
        with pytest.raises(UserError, match=f"{best} is damaged: .*{words}"):
            checkpoint.load_model_file(tmp_path, "best")
        save(tmp_path, 4, keep_last=1, average_top1=20.0)
        assert best in selection.all_in(tmp_path)
        (best / name).write_bytes(whole[name])
    (best / "ema.safetensors").unlink()
    with pytest.raises(UserError, match=r"the header of ema\.safetensors cannot be read"):
        checkpoint.load_model_file(tmp_path, "best", ema=True)


def test_of_a_step_the_last_repeat_is_the_best(tmp_path):
    """Also where a run resumed before damaged checkpoints, which it does not delete for later."""
    for step, top1 in ((1, 10.0), (2, 30.0)):
        path = save(tmp_path, step, top1=top1)
    shutil.copytree(path, path.with_name(f"{path.name}.1"))  # as a kill before the deletion leaves
    assert selection.best(tmp_path).name == "step-00000002.1"
    assert selection.last(tmp_path).name == "step-00000002.1"
    for step in (8, 9):
        save(tmp_path, step)
    path = save(tmp_path, 5, keep_last=1)
    assert [step_of(path) for path in selection.all_in(tmp_path)] == [2, 5, 8, 9]
    assert path in selection.all_in(tmp_path)


def test_same_step_again_replaces_under_its_name(tmp_path):
    """Also what kills have left; by numbers, not text: .10 comes after .9."""
    first = save(tmp_path, 1)
    for number in range(3):
        for repeat in (".9", ".10") if number == 2 else ():
            shutil.copytree(first, tmp_path / f"step-00000002{repeat}")
            assert selection.last(tmp_path).name == f"step-00000002{repeat}"
        path = save(tmp_path, 2, keep_last=2, seed=number)
        assert path.name == "step-00000002"
        found = checkpoint.newest(tmp_path)
        assert found.path == path
        assert torch.equal(found.model["0.weight"], trained(number)[0].state_dict()["0.weight"])
        assert names(tmp_path) == ["step-00000001", path.name]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), r"\(MemoryError\).*: free memory, and run"),
        (ValueError("nested"), r"\(nested\).*: correct that, or choose another runs_dir"),
    ],
)
def test_any_error_of_writing_is_one_sentence(error, words, tmp_path, monkeypatch):
    def fail(*_):
        raise error

    save(tmp_path, 1)
    monkeypatch.setattr(checkpoint.torch, "save", fail)
    with pytest.raises(UserError, match=f"step 2 could not be written to {tmp_path} {words}"):
        save(tmp_path, 2)
    assert names(tmp_path) == ["step-00000001"]


def test_leftovers_of_a_kill_are_ignored_and_then_removed(tmp_path):
    save(tmp_path, 1)
    for name in (".step-00000002.tmp", ".step-00000001.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"half")
    found = checkpoint.newest(tmp_path)
    assert found.path.name == "step-00000001"
    save(tmp_path, 2)
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KiB; skipped where it cannot be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)],
        capture_output=True,
        check=False,
        timeout=20,
    )
    if mounted.returncode:
        tiny.skip("cannot mount a tmpfs here (needs root)")
    try:
        yield folder
    finally:
        # Lazily: a model that was read from there may still be mapped.
        subprocess.run(["umount", "--lazy", str(folder)], check=True, timeout=20)


@pytest.mark.parametrize("left", [0, 4096, 12288, 16384])
def test_full_disk_leaves_the_earlier_ones(left, small_disk):
    folder = small_disk / "checkpoints"
    save(folder, 1)
    stat = os.statvfs(small_disk)
    free = stat.f_bavail * stat.f_frsize
    # However little room is left: none, or enough for the first files only.
    (small_disk / "filler").write_bytes(b"x" * (free - left))
    with pytest.raises(UserError, match="step 2") as caught:
        save(folder, 2)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    found = checkpoint.newest(folder)
    assert found.state["step"] == 1
    assert checkpoint.load_model_file(folder)[1].step == 1
    # And with room again all goes on.
    (small_disk / "filler").unlink()
    save(folder, 2)
    assert names(folder) == ["step-00000001", "step-00000002"]


def test_kill_while_saving_always_leaves_a_whole_newest_and_the_best(farm, tmp_path):
    """SIGKILL at each of the places where the state of the disk changes."""
    code = f"""
        import itertools, os, signal, sys
        sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(tiny.PROJECT / "tests")!r}]
        from pathlib import Path
        import test_checkpoint as t

        def audit(event, arguments):
            if event in ("open", "os.mkdir", "os.rename", "os.rmdir", "os.remove"):
                where = str(arguments[0])
                if str(folder) in where or event == "os.rmdir":
                    if next(calls) == at:
                        os.kill(os.getpid(), signal.SIGKILL)

        # One start for all the places: each is tried in a child of this process.
        for again, top1 in ((1, 50), (2, 50), (3, 20), (3, 50)):
            for at in range(200):
                folder = Path(sys.argv[1]) / f"{{again}}-{{top1}}-{{at}}"
                t.save(folder, 1, top1=40, average_top1=30)
                if again == 3:
                    t.save(folder, 2, top1=30, average_top1=40)
                calls = itertools.count()
                child = os.fork()
                if child == 0:
                    sys.addaudithook(audit)
                    t.save(folder, again, keep_last=1, top1=top1, average_top1=top1 / 2)
                    os._exit(0)
                _, status = os.waitpid(child, 0)
                if not os.WIFSIGNALED(status):
                    break
                newest = t.checkpoint.newest(folder)
                of_last = t.checkpoint.load_model_file(folder)[1]
                is_saved = of_last.validation["top1"] == top1
                best, of_best = t.checkpoint.load_model_file(folder, "best")
                average = t.checkpoint.load_model_file(folder, "best", ema=True)[1]
                expected = max(40, top1) if is_saved else 40
                assert of_best.validation["top1"] == expected, (at, of_best, t.names(folder))
                expected = max([30, top1 / 2][: 1 + is_saved] + [40] * (again == 3))
                assert average.validation["top1"] == expected, (at, average, t.names(folder))
                print(again, at, newest.state["step"], of_last.step, is_saved, flush=True)
                t.save(folder, 4)
                rest = t.names(folder)
                assert [n for n in rest if n.startswith(".step")] == [], rest
    """
    command = tiny.python("-c", textwrap.dedent(code), tmp_path)
    ((status, output),) = farm.side_by_side(1, command, tmp_path)
    assert status == 0, output
    lines = [line.split() for line in output.splitlines()]
    for again in ("1", "2", "3"):
        killed = [line for line in lines if line[0] == again]
        assert len(killed) > 12, output  # it was killed at as many places
        assert {is_saved for *_, is_saved in killed} == {"True", "False"}, output
        earlier = "2" if again == "3" else "1"
        assert all(newest == last in (earlier, again) for _, _, newest, last, _ in killed), output


def test_other_model_is_recognised(tmp_path):
    weights = network(4).state_dict()
    with pytest.raises(UserError, match=r"another model: .*\(4, 3\) instead of \(5, 3\)"):
        checkpoint.load_weights(network(5), weights, tmp_path)
    deeper = nn.Sequential(*network(4), nn.Linear(2, 2))
    with pytest.raises(UserError, match=r"3\.bias is missing; 3\.weight is missing"):
        checkpoint.load_weights(deeper, weights, tmp_path)
    with pytest.raises(UserError, match=r"2\.bias is not in the model"):
        checkpoint.load_weights(network(4)[:2], weights, tmp_path)
    with pytest.raises(UserError, match=r"and \d+ more"):
        checkpoint.load_weights(nn.Conv2d(3, 4, 3), weights, tmp_path)


class Bomb:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return (Path.touch, (self.file,))


def test_pickled_code_is_not_executed(tmp_path):
    path, trace = save(tmp_path / "c", 1), tmp_path / "executed"
    torch.save({"state": Bomb(trace)}, path / "optimizer.pt")
    # Even with a manifest that fits: a program that can write the one can write the other.
    files = {p.name: checkpoint._describe(p) for p in path.iterdir() if p.suffix != ".json"}
    files["state.json"] = checkpoint._describe(path / "state.json")
    (path / "manifest.json").write_text(json.dumps({"files": files}))
    assert checkpoint.verify(path) is None
    with pytest.raises((UserError, pickle.UnpicklingError)):
        checkpoint.newest(tmp_path / "c")
    assert not trace.exists()


def test_other_format_is_named(tmp_path):
    path = save(tmp_path, 1)
    (path / "state.json").write_text(json.dumps({"format": 99, "step": 1}))
    with pytest.raises(UserError, match="format 99"):
        checkpoint.read(path)


def test_model_file_by_each_of_its_names(tmp_path):
    run = tmp_path / "run"
    for step in (1, 2):
        save(run / "checkpoints", step, top1=30.0 - step)
    steps = {
        checkpoint.load_model_file(path, which)[1].step
        for path, which in [
            (run, "best"),
            (run / "checkpoints", "best"),
            (run / "checkpoints" / "step-00000001", "last"),
            (run / "checkpoints" / "step-00000001" / "model.safetensors", "last"),
        ]
    }
    assert steps == {1}
    assert checkpoint.load_model_file(run)[1].step == 2


def test_model_file_errors(tmp_path):
    from safetensors.torch import save_file

    def problem(path, which="last"):
        with pytest.raises(UserError) as caught:
            checkpoint.load_model_file(path, which)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "there is no checkpoint" in problem(tmp_path / "none")
    (tmp_path / "void").mkdir()
    assert "there is no last checkpoint" in problem(tmp_path / "void")
    (tmp_path / "it.onnx").write_bytes(b"\x08\x0a" * 9)
    assert "it.onnx is no checkpoint; give a run folder or" in problem(tmp_path / "it.onnx")
    path = save(tmp_path / "run" / "checkpoints", 1)
    assert f"holds runs; give one, such as {tmp_path / 'run'}" in problem(tmp_path)
    assert "is not a run of several" in problem(path, "best")
    file = path / "model.safetensors"
    # Others may read it, as they may its neighbours.
    assert len({other.stat().st_mode for other in path.iterdir()}) == 1
    whole = file.read_bytes()
    for length in (4, len(whole) - 1):
        file.write_bytes(whole[:length])
        assert "is part of a damaged checkpoint" in problem(file)
        # Alone, without the manifest that knows its checksum.
        (tmp_path / "alone.safetensors").write_bytes(whole[:length])
        assert "not a readable model file" in problem(tmp_path / "alone.safetensors")
        assert "model.safetensors has" in problem(path)
        assert "is damaged" in problem(tmp_path / "run")
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert "checksum" in problem(file)
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    for text in ("{}", "not json", '{"config":' * 10**5):
        save_file({"a": torch.zeros(1)}, tmp_path / "odd.safetensors", metadata={"tetdist": text})
        assert "damaged or of another version" in problem(tmp_path / "odd.safetensors")
    text = json.dumps({"config": {}, "classes": ["a"], "timesteps": -1, "step": 0})
    save_file({"a": torch.zeros(1)}, tmp_path / "odd.safetensors", metadata={"tetdist": text})
    expected = "another version of tetdist: timesteps cannot be read"
    assert expected in problem(tmp_path / "odd.safetensors")
    assert "has no description of its model" in problem(tmp_path / "foreign.safetensors")


@pytest.mark.parametrize(
    ("key", "change", "words"),
    [
        ("0.weight", lambda x: x.fill_(float("nan")), r"NaN or infinity \(in 0.weight\)"),
        ("2.bias", lambda x: x.fill_(float("inf")), r"NaN or infinity \(in 2.bias\)"),
        ("1.running_var", lambda x: x.neg(), r"a negative variance \(in 1.running_var\)"),
        ("1.running_mean", lambda x: x.to(torch.int8), r"floating-point .*1.running_mean"),
    ],
)
def test_weights_that_are_no_weights_are_named(key, change, words, tmp_path):
    model = network()
    state = model.state_dict()
    before = {name: value.clone() for name, value in state.items()}
    wrong = before | {key: change(before[key].clone())}
    with pytest.raises(UserError, match=f"file.pt holds .*{words}"):
        checkpoint.load_weights(model, wrong, Path("file.pt"))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    torch.save(wrong, tmp_path / "file.pt")
    with pytest.raises(UserError, match=f"file.pt holds .*{words}"):
        foreign_files.read(tmp_path / "file.pt")
