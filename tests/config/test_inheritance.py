"""A configuration may set only its differences from another; each value's origin is printed."""

from pathlib import Path

import pytest

from tetdist.apps.cli import train
from tetdist.config.inheritance import COMMAND_LINE, DEFAULT
from tetdist.config.loading import draft, load
from tetdist.errors import UserError


def written(file, text):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return str(file)


def test_only_differences_are_written(tmp_path):
    own = written(
        tmp_path / "mine.yaml",
        "base: sew34_t4.yaml\n"
        "data: {root: here, mean: [0.1, 0.2, 0.3]}\n"
        "phases: {0: {epochs: 7, optimizer: {lr: 0.3}}}\n",
    )
    base, config = load("sew34_t4"), load(own)
    assert (config.name, config.data.root, config.data.mean) == ("mine", "here", (0.1, 0.2, 0.3))
    assert (config.phases[0].epochs, config.phases[0].optimizer.lr) == (7, 0.3)
    changed = base.as_dict()
    changed["name"] = "mine"
    changed["data"] |= {"root": "here", "mean": [0.1, 0.2, 0.3]}
    changed["phases"][0]["epochs"] = 7
    changed["phases"][0]["optimizer"]["lr"] = 0.3
    assert config.as_dict() == changed


def test_a_list_replaces_a_list(tmp_path):
    text = "base: spiking34_t4_t6\nphases:\n- {epochs: 1, timesteps: 2, optimizer: {lr: 1}}\n"
    assert len(load("spiking34_t4_t6").phases) == 2
    (only,) = load(written(tmp_path / "short.yaml", text)).phases
    assert (only.epochs, only.optimizer.momentum) == (1, 0.9)


def test_a_base_is_beside_the_file_and_may_have_a_base(tmp_path):
    written(tmp_path / "a/first.yaml", "base: quickstart\nseed: 1\nlog_every: 3\n")
    written(tmp_path / "a/b/second.yaml", "base: ../first.yaml\nseed: 2\n")
    own = written(tmp_path / "a/b/third.yaml", "base: second.yaml\nsave: {keep_last: 9}\n")
    loaded = draft(own, ["batch.micro=1"])
    config = loaded.config
    assert (config.name, config.seed, config.log_every) == ("third", 2, 3)
    keys = ("save.keep_last", "seed", "log_every", "model.name", "batch.micro", "resume")
    files = [Path(loaded.origins.get(key, DEFAULT)).name for key in keys]
    assert files == [f"{f}.yaml" for f in ("third", "second", "first", "quickstart")] + [
        *(COMMAND_LINE, DEFAULT)
    ]


def test_printed_configuration_says_where_each_value_is_from(tmp_path, capsys):
    own = written(tmp_path / "mine.yaml", "base: quickstart\nseed: 5\nphases: {0: {epochs: 4}}\n")
    data = "data={root: x, kind: images, image_size: 8, resize: 8, color_jitter: [0, 0, 0, 0.25]}"
    overrides = [data, "profile=2..3"]
    assert train.main(["--config", own, "--print-config", *overrides]) == 0
    lines = [line.partition("  # ") for line in capsys.readouterr().out.splitlines()]
    origins = {text.strip(): Path(origin).name for text, separator, origin in lines if separator}
    assert origins["seed: 5"] == origins["- epochs: 4"] == "mine.yaml"
    assert origins["name: mine"] == "mine.yaml"
    assert origins["root: x"] == origins["- 2"] == COMMAND_LINE
    assert origins["- 0.25"] == COMMAND_LINE
    assert origins["deterministic: false"] == origins["imports: []"] == DEFAULT
    # What an override replaced as a whole comes from nowhere else.
    assert origins["flip: 0.5"] == DEFAULT
    assert origins["- 0.485"] == DEFAULT


def test_arguments_are_those_of_the_named_network(tmp_path):
    same = "base: sew34_t4\nmodel: {name: sew_resnet34, num_classes: 7}\n"
    assert load(written(tmp_path / "same.yaml", same)).model.arguments == {
        "connect_function": "add"
    }
    other = load(written(tmp_path / "o.yaml", "base: sew34_t4\nmodel: {name: spiking_resnet18}\n"))
    assert other.model.arguments == {}
    assert other.model.neuron == load("sew34_t4").model.neuron


def test_files_to_be_imported_add_up(tmp_path):
    loss = (
        "from tetdist.losses import register_loss\n"
        "@register_loss('{0}')\n"
        "def {0}(logits, targets):\n    return logits.sum()\n"
    )
    written(tmp_path / "base/one.py", loss.format("of_the_base"))
    written(tmp_path / "two.py", loss.format("of_mine"))
    written(tmp_path / "base/base.yaml", "base: quickstart\nimports: [one.py]\n")
    own = written(tmp_path / "mine.yaml", "base: base/base.yaml\nimports: two.py\n")
    for kind in ("of_the_base", "of_mine"):
        config = load(own, [f"loss.kind={kind}"])
        assert [Path(one).name for one in config.imports] == ["one.py", "two.py"]


def test_a_mistake_names_the_file_that_it_is_in(tmp_path):
    written(tmp_path / "base.yaml", "base: quickstart\nlog_every: often\n")
    own = written(tmp_path / "mine.yaml", "base: base.yaml\nsede: 1\n")
    with pytest.raises(UserError) as caught:
        load(own)
    assert "base.yaml: log_every must" in str(caught.value)
    assert "mine.yaml: sede: unknown key" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("base: nowhere.yaml", "odd.yaml: base: no configuration 'nowhere.yaml'"),
        ("base: 3", "'base' must be the name of a configuration, not 3"),
        ("base: odd.yaml", "'base' leads back to this file (odd.yaml <- odd.yaml)"),
        (
            "base: quickstart\nphases: {1: {epochs: 2}}",
            "phases has 1 item, counted from 0, and no '1'; name",
        ),
        (
            "base: quickstart\nphases: [{epochs: 2}]",
            "phases.0.optimizer is missing (a list replaces",
        ),
        ("base: quickstart\nphases: {first: {epochs: 2}}", "no 'first'; name"),
    ],
)
def test_a_base_that_cannot_be_one(tmp_path, text, part):
    with pytest.raises(UserError) as caught:
        load(written(tmp_path / "odd.yaml", text))
    assert part in str(caught.value)


def test_a_chain_of_bases_ends(tmp_path):
    for number in range(99):
        written(tmp_path / f"{number}.yaml", f"base: {number + 1}.yaml\n")
    with pytest.raises(UserError, match=r"0\.yaml inherits by 'base' from more than 50 files"):
        load(str(tmp_path / "0.yaml"))
