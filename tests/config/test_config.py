"""A configuration is strict, and says in one sentence what is wrong with it and where."""

import json
import logging
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml

from tetdist import models
from tetdist.apps.cli import train
from tetdist.config import loading as configuration
from tetdist.config.documentation import documented_keys
from tetdist.config.identity import OPERATIONAL_KEYS, differences, flatten
from tetdist.config.loading import load, parse
from tetdist.config.overrides import joined
from tetdist.config.schema import RunConfig
from tetdist.config.sections.model import ModelSection
from tetdist.config.yaml_files import read_yaml
from tetdist.errors import UserError
from tetdist.models import QKFormer
from tetdist.nn import neurons
from tetdist.nn.integer_neurons import NILIF
from tetdist.nn.learned_decay import PLIF
from tetdist.nn.neurons import LIF, NEURONS, make

ConfigWriter = Callable[..., Path]


SET_BY_TINY = {*flatten(tiny.CONFIG)}
PHASE: dict[str, Any] = {"epochs": 1, "timesteps": 1, "optimizer": {"lr": 0.1}}


def resolved(changes: dict[str, Any] | None = None) -> RunConfig:
    return parse(tiny.changed(tiny.CONFIG, {"name": "x", "data.root": "d"} | (changes or {})), "x")


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        # The dotted key and the suggested key, at every depth.
        ({"sede": 1}, ("unknown key 'sede'", "'seed'")),
        ({"model.nuron": {}}, ("unknown key 'model.nuron'", "'model.neuron'")),
        ({"batch.globl": 8}, ("unknown key 'batch.globl'", "'batch.global'")),
        ({"phases.0.epoch": 1}, ("unknown key 'phases.0.epoch'", "'phases.0.epochs'")),
        (
            {"phases.0.optimizer.weight_dacay": 1},
            ("'phases.0.optimizer.weight_dacay'", "'phases.0.optimizer.weight_decay'"),
        ),
        ({"loss.lamda": 0.1}, ("unknown key 'loss.lamda'", "'loss.lambda'")),
        # The right word at the wrong place.
        ({"weight_decay": 0.1}, ("unknown key 'weight_decay'", "optimizer.weight_decay")),
        # Types.
        ({"seed": "one"}, ("'seed'", "integer", "'one'")),
        ({"seed": True}, ("'seed'", "integer", "True")),
        ({"deterministic": "yes"}, ("'deterministic'", "boolean", "'yes'")),
        ({"phases": {"epochs": 1}}, ("'phases'",)),
        ({"data.mean": [0.5, 0.5]}, ("'data.mean",)),
        ({"data.root": ...}, ("'data.root' is missing",)),
        ({"phases.0.optimizer": ...}, ("'phases.0.optimizer' is missing",)),
        ({"tracking.log_checkpoint": "all"}, ("'tracking.log_checkpoint'", "'none'", "'all'")),
        ({"tracking.experiment": 3}, ("'tracking.experiment'", "string", "3")),
        # Ranges.
        ({"batch.micro": 0}, ("'batch.micro'", "must be above 0, not 0")),
        *(
            (
                {"phases.0.timesteps": wrong},
                (
                    "x: 'phases.0.timesteps': must be a whole number from 1 to 10000, a list of "
                    f"such numbers, or a range of them from the smaller one on, such as "
                    f"{{from: 1, to: 4}}{shown}",
                ),
            )
            for wrong, shown in (
                (0, ", not 0"),
                (100_000_000, ", not 100000000"),
                ([2, 0], ", not [2, 0]"),
                ([], ", not []"),
                (True, ", not True"),
                ({"from": 4, "to": 1}, ""),
                ({"from": 1}, ""),
            )
        ),
        (
            {"phases.0.optimizer": "adamw"},
            ("'phases.0.optimizer' holds keys", "set phases.0.optimizer.kind"),
        ),
        ({"phases.0.optimizer": "continue"}, ("phases.0.optimizer: continue needs a phase",)),
        (
            {"phases": [PHASE, PHASE | {"optimizer": "continue"}], "start_phase": 1}
            | {"init_checkpoint": "run"},
            ("phases.1.optimizer: continue needs a phase before it in the same run",),
        ),
        ({"phases.0.loss.lamda": 1}, ("'phases.0.loss.lamda'", "'phases.0.loss.lambda'")),
        (
            {"phases.0.loss.kind": "sdt", "loss.distillation.self_weight": 1.0},
            ("phases.0.loss.distillation.self_weight: ", "set phases.0.loss.kind=tet"),
        ),
        (
            {"phases.0.loss.distillation.teacher": "timm:resnet18"},
            ("phases.0.loss.distillation.teacher: a run has one teacher",),
        ),
        (
            {"model.neuron.kind": "psn", "model.neuron.timesteps": 4, "phases.0.timesteps": [4, 2]},
            ("weights for T=4 only; set phases.0.timesteps=4, or",),
        ),
        ({"data.threads": 100_000}, ("'data.threads'", "must be 512 or less")),
        ({"data.prefetch": 100_000}, ("'data.prefetch'", "must be 64 or less")),
        ({"data.image_size": 100_000}, ("'data.image_size'", "must be 8192 or less")),
        ({"phases.0.optimizer.lr": 0.0}, ("'phases.0.optimizer.lr'", "must be above 0, not 0")),
        (
            {"phases.0.optimizer.momentum": 1.0},
            ("'phases.0.optimizer.momentum'", "must be below 1, not 1.0"),
        ),
        ({"data.flip": 1.5}, ("'data.flip'", "1.5")),
        ({"loss.label_smoothing": 1.0}, ("'loss.label_smoothing'", "must be below 1, not 1.0")),
        ({"loss.lambda": float("nan")}, ("loss.lambda",)),
        ({"phases.0.optimizer.lr": float("inf")}, ("phases.0.optimizer.lr",)),
        ({"phases": []}, ("'phases'", "at least 1")),
        ({"seed": -1}, ("x: 'seed': must be 0 or more, not -1",)),
        ({"seed": 2**63}, ("'seed'",)),
        ({"save.keep_last": 1}, ("'save.keep_last'",)),
        ({"model.num_classes": 1}, ("'model.num_classes'",)),
        ({"gradient_clipping": 0.0}, ("'gradient_clipping'",)),
        ({"phases.0.optimizer.layer_decay": 1.5}, ("layer_decay': must be 1 or less, not 1.5",)),
        # Contradictions.
        ({"cuda_graphs": True}, ("cuda_graphs", "engine=deepspeed", "engine=torch")),
        (
            {"cuda_graphs": True, "engine": "torch", "batch_norm.sync": True},
            ("cuda_graphs=true", "batch_norm.sync=true, whose averages"),
        ),
        ({"batch.micro": 3}, ("batch.global", "8", "batch.micro", "3", "6")),
        ({"batch.micro": 16}, ("batch.global", "batch.micro", "16")),
        ({"data.kind": "events"}, ("data.kind", "events", "spiking_convnet", "images")),
        ({"model": {"name": "sew_resnet43"}}, ("model.name", "did you mean sew_resnet34")),
        ({"model": {"name": "resnet50"}}, ("model.name", "not a spiking model")),
        ({"model.neuron": {"decai": 0.5}}, ("'model.neuron.decai'", "'model.neuron.decay'")),
        ({"model.neuron": {"decay": 2.0}}, ("'model.neuron.decay'", "2.0")),
        ({"model.neuron": {"surrogate": "step"}}, ("'model.neuron.surrogate'", "triangle")),
        ({"model.neuron": {"detach_reset": "false"}}, ("'model.neuron.detach_reset'",)),
        (
            {"model.arguments": {"chanels": [4]}},
            ("model.arguments.chanels", "did you mean channels?"),
        ),
        (
            {"model.neuron": {"spike": "sigmoid"}},
            ("spike=sigmoid needs surrogate=sigmoid, not triangle; set model.neuron.surrogate=",),
        ),
        ({"model.neuron": {"reset": "none"}}, ("'model.neuron.reset'", "'none'")),
        (
            {"model.neuron.kind": "psn", "model.neuron.timesteps": 1}
            | {"phases": [PHASE, PHASE | {"timesteps": 3}]},
            (
                "phases.1.timesteps: psn cannot run 3 timesteps: it has weights for T=1 only; set "
                "phases.1.timesteps=1, or model.neuron.timesteps to its only T",
            ),
        ),
        ({"model.arguments": {"num_classes": 3}}, ("model.arguments.num_classes",)),
        ({"model.arguments": {"timesteps": 3}}, ("model.arguments.timesteps",)),
        ({"data.repeats": 9}, ("data.repeats: 9", "above batch.global, 8")),
        (
            {
                "phases.0.optimizer": {
                    "kind": "timm:lamb",
                    "lr": 0.1,
                    "arguments": {"betas": [0, 0]},
                }
            },
            ("phases.0.optimizer.arguments.betas: set phases.N.optimizer.betas instead",),
        ),
        ({"tracking.trackers": ["wandb", "wandb"]}, ("tracking.trackers: wandb is listed twice",)),
        ({"data.scale": [1.0, 0.5]}, ("data.scale",)),
        ({"data.ratio": [-1.0, 0.5]}, ("data.ratio",)),
        ({"data.std": [0.5, 0.0, 0.5]}, ("data.std",)),
        ({"data.auto_augment": "randm9"}, ("'data.auto_augment'", "cifar10", "as rand-m9-")),
        (
            {"data.auto_augment": "rand-w0"},
            ("'data.auto_augment'", "consist of m, n,", "unknown: 'w0'"),
        ),
        (
            {"data.auto_augment": "rand-m9", "data.color_jitter": [0, 0, 0, 0.1]},
            ("data.color_jitter", "data.auto_augment=rand-m9"),
        ),
        ({"data.resize": 8}, ("data.resize", "8", "16")),
        (
            {"data.crop": "padded", "data.padding": 16},
            ("data.padding: 16 must be below data.image_size, 16",),
        ),
        ({"phases.0.warmup_epochs": 2.0}, ("phases.0.warmup_epochs", "2")),
        (
            {"phases.0.warmup_epochs": 1.0, "phases.0.cooldown_epochs": 1},
            ("phases.0.warmup_epochs and cooldown_epochs: 2 must be below", "2 epochs"),
        ),
        (
            {"phases.0.min_lr": 0.03, "phases.0.optimizer.lr_per": 16},
            ("phases.0.min_lr: 0.03", "not be above the peak of the learning rate, 0.025"),
        ),
        ({"name": "a/b"}, ("name", "'a/b'")),
        ({"name": ".."}, ("name", "'..'")),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_mistake_is_named(changes, parts):
    with pytest.raises(UserError) as caught:
        resolved(changes)
    text = str(caught.value)
    assert [part for part in parts if part not in text] == [], text
    assert "\n" not in text
    assert "pydantic" not in text


def test_no_such_config():
    with pytest.raises(UserError, match=r"'quickstar'.*did you mean quickstart\.yaml"):
        load("quickstar")
    with pytest.raises(UserError, match=r"'zzz'.*sew34_t4\.yaml"):
        load("zzz")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("- 1\n- 2\n", "keys and values, not a list"),
        ("a: [1\n", "valid YAML"),
        ("", "keys and values, but is empty"),
        ("seed: 1\nloss:\n  kind: tet\n  kind: sdt\n", "'kind' appears twice, in lines 3 and 4"),
    ],
)
def test_file_that_is_no_configuration(tmp_path, text, part):
    file = tmp_path / "odd.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=part) as caught:
        load(str(file))
    assert str(file) in str(caught.value)


def test_a_merged_key_may_be_overridden(tmp_path):
    file = tmp_path / "merged.yaml"
    # The second merge comes first to the deep one's keys.
    file.write_text("a: {b: {c: &x {<<: {k: 1}, k: 2}}}\nd: {<<: *x, k: 3}\n")
    assert read_yaml(file) == {"a": {"b": {"c": {"k": 2}}}, "d": {"k": 3}}


def test_unquoted_date_is_named(tiny_config):
    with pytest.raises(UserError, match="quote it"):
        load(str(tiny_config()), ["name=2026-01-01"])


@pytest.mark.parametrize("content", [b"\xff\xfe\x00name: x", b"name: \x00"])
def test_binary_file(tmp_path, content):
    file = tmp_path / "binary.yaml"
    file.write_bytes(content)
    with pytest.raises(UserError, match="not valid YAML"):
        load(str(file))


def test_overrides(tiny_config):
    config = load(
        str(tiny_config()),
        [
            "seed=7",
            "phases.0.epochs=5",
            "phases.0.optimizer.lr=1e-4",
            "phases.0.optimizer.betas=[0.8, 0.9]",
            "phases.0.optimizer.kind=adam",
            "data.resize=null",
            "data.index=",
            "model.neuron.decay=1.0",
            "save.every_steps=3",
            "loss.lambda=5E-2",
            "name=other",
        ],
    )
    assert (config.seed, config.phases[0].epochs, config.name) == (7, 5, "other")
    assert config.phases[0].optimizer.lr == 1e-4
    assert config.phases[0].optimizer.betas == (0.8, 0.9)
    assert config.data.resize is None
    assert config.data.index is None
    assert config.data.resize_side == round(16 / 0.875)
    assert config.model.neuron.decay == 1.0
    assert config.save.every_steps == 3
    assert config.loss.lambda_ == 0.05


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ({"name": "sew_resnet18"}, LIF()),
        ({"name": "qkformer_10_384"}, QKFormer.default_neuron),
        (
            {"name": "qkformer_10_384", "neuron": {"decay": 0.9}},
            replace(QKFormer.default_neuron, decay=0.9),
        ),
        ({"name": "qkformer_10_384", "neuron": {"kind": "plif"}}, PLIF()),
        ({"name": "espikeformer_s"}, NILIF()),
        # No key of a LIF alone, though the kind is not set.
        ({"name": "espikeformer_s", "neuron": {"most_spikes": 2}}, NILIF(most_spikes=2)),
    ],
)
def test_what_a_neuron_leaves_out_is_the_networks_own(model, expected):
    section = ModelSection.model_validate_json(json.dumps(model))
    assert section.neuron == expected
    assert section.model_dump(mode="json")["neuron"] == neurons.as_dict(expected)


def test_the_networks_neuron_is_written_down(caplog):
    neuron = {"most_spikes": 2, "surrogate": "atan"}
    config = resolved({"model": {"name": "espikeformer_s", "neuron": neuron}})
    assert "model.neuron.surrogate has no effect with model.neuron.kind=nilif" in caplog.text
    written = yaml.safe_load(config.as_yaml())
    assert written["model"]["neuron"] == neurons.as_dict(NILIF(most_spikes=2))
    assert parse(written, "config.yaml") == config


def test_list_item_of_a_default_can_be_overridden(tmp_path):
    # data.std is in no file here, only in the defaults.
    file = tiny.write_config(tmp_path / "c.yaml", "d")
    config = load(str(file), ["data.std=[0.1, 0.2, 0.3]", "data.std.0=0.4"])
    assert config.data.std == (0.4, 0.2, 0.3)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        # Each says whose mistake it is, and what to write instead.
        ("seed=one", "seed=one: 'seed': input should be a valid integer, not 'one'"),
        (
            "timesteps=3",
            "timesteps=3: unknown key 'timesteps'; did you mean 'model.neuron.timesteps' or",
        ),
        ("lr=3", "did you mean 'phases.0.optimizer.lr'?"),
        ("model=sew_resnet18", "set model.name, for instance"),
        ("model.neuron=lif", "set model.neuron.kind, for instance"),
        ("model.neuron.decay=2", "model.neuron.decay=2 must be 1 or less"),
        ("seed=-1", "seed=-1 must be 0 or more"),
        ("data.scale=[0.5,2]", "data.scale=[0.5,2]: 'data.scale.1': must be 1 or less, not 2"),
        ("model.neuron.spike=sigmoid", "model.neuron.spike=sigmoid needs surrogate=sigmoid, not "),
        ("batch=64", "set batch.global, for instance"),
        ("phases.0.optimizer=adam", "set phases.0.optimizer.kind, for instance"),
        ("phases=3", "phases=3: 'phases' is a list"),
        ("phases.1.epochs=1", "phases.1.epochs=1: phases has one item, phases.0"),
        ("data.mean=[0.5]", "data.mean=[0.5]: 'data.mean.1' is missing"),
        ("name=2026-01-01", "name=2026-01-01: a value is neither"),
        ("imports=3", "imports=3: 'imports' must be a list"),
        ("seed", "'seed' is not an override; write it as dotted.key=value"),
        ("=1", "'=1' is not an override; write it as dotted.key=value"),
        ("phases.x.epochs=1", "phases has one item, phases.0 (items are counted from 0)"),
        ("phases.00.epochs=2", "phases has one item, phases.0"),
        ("phases.5=1", "phases.5=1: phases has one item"),
        ("seed.x=1", "seed.x=1: seed is a single value and holds no keys"),
        ("seed=[1", "seed=[1 is not valid YAML"),
        ("sead=1", "unknown key 'sead'; did you mean 'seed'?"),
        ("seed=", "seed=: 'seed'"),
        ("neuron.decay=0.2", "did you mean 'model.neuron'?"),
        ("optimizer=adam", "did you mean 'phases.0.optimizer'?"),
        ("batch.eval=1000000000000", "batch.eval=1000000000000 must be 1048576 or less"),
        ("phases.0.epochs=100000000000000000000", "must be 1000000 or less"),
        ("log_every=10000000000", "must be 1000000000 or less"),
    ],
)
def test_a_mistaken_override_is_named_and_not_the_file(tiny_config, override, expected):
    file = str(tiny_config({"seed": 0}))
    with pytest.raises(UserError) as caught:
        load(file, ["profile=null", override])
    assert expected in str(caught.value)
    assert override in str(caught.value)
    assert file not in str(caught.value)


def test_mistakes_of_the_file_and_of_an_override_are_distinguished(tiny_config):
    file = str(tiny_config({"sede": 1}))
    with pytest.raises(UserError) as caught:
        load(file, ["log_every=x"])
    other, own = str(caught.value).split(f"; {file}: ")
    assert own == "unknown key 'sede'; did you mean 'seed'?"
    assert other.startswith("log_every=x: 'log_every'")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["seed=1", "seed=2"], "seed is given twice, as seed=1 and as seed=2"),
        (["seed=1", "log_every=2", "seed=1"], "seed is given twice"),
        (
            ["model.neuron.decay=1.0", "model.neuron={kind: lif}"],
            "model.neuron={kind: lif} would replace model.neuron.decay=1.0",
        ),
        (["data={kind: images, kind: events}"], "the key 'kind' appears twice"),
    ],
)
def test_what_would_be_undone_in_silence_is_refused(tiny_config, overrides, expected):
    with pytest.raises(UserError) as caught:
        load(str(tiny_config()), overrides)
    assert expected in str(caught.value)


def test_later_layers_of_overrides_replace_earlier_ones():
    study, entry = ["seed=1", "loss.kind=tet", "loss.phi=2"], ["loss={kind: sdt}"]
    assert joined(study, entry, ["seed=3"]) == ["loss={kind: sdt}", "seed=3"]
    assert joined(["lossy=1", "seeds=2"], ["loss=3", "seed=4"]) == [
        "lossy=1",
        "seeds=2",
        "loss=3",
        "seed=4",
    ]


def _laughs(levels: int) -> str:
    lines = ["a0: &a0 [0, 0, 0, 0, 0, 0, 0, 0, 0, 0]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: &x [*x]", "contains an alias of itself"),
        ("a: &x {b: {c: *x}}", "contains an alias of itself"),
        ("a: &x {<<: *x}", "contains an alias of itself"),
        (_laughs(40), "more than 100,000 values"),
        ("[" * 5000 + "]" * 5000, "nested too deeply"),
        ("a: " + "9" * 5000, "not valid YAML"),
        ("a: 2026-13-45", "not valid YAML"),
        ('a: "\\ud800"', "not valid YAML"),
        ("a: 2026-01-01", "quote it"),
        ("a: 1:30", "a base-60 number"),
        ("# " + "x" * 600_000, "larger than 524,288 bytes"),
    ],
    ids=[
        *("circle", "inner", "merged", "laughs", "deep", "digits", "date", "surrogate", "day"),
        *("minutes", "large"),
    ],
)
def test_yaml_without_an_end_or_a_meaning(tiny_config, tmp_path, text, expected):
    file = tmp_path / "odd.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=expected) as caught:
        read_yaml(file)
    assert str(file) in str(caught.value)
    value = text.removeprefix("a: ")
    if value != text and "<<" not in text:
        with pytest.raises(UserError, match=expected) as caught:
            load(str(tiny_config()), [f"name={value}"])
        assert "name=" in str(caught.value)


def test_what_is_written_as_an_alias_is_overridden_alone(tmp_path):
    file = tiny.write_config(tmp_path / "c.yaml", "d", {"phases": []})
    phase = "{epochs: 1, timesteps: 2, optimizer: {lr: 0.1}}"
    file.write_text(file.read_text().replace("phases: []", f"phases: [&p {phase}, *p]"))
    config = load(str(file), ["phases.1.timesteps=3"])
    assert [phase.timesteps for phase in config.phases] == [2, 3]


def test_aliases_are_the_written_names(tiny_config):
    config = load(str(tiny_config({"loss.lambda": 0.25})))
    assert (config.batch.global_, config.loss.lambda_) == (8, 0.25)
    written = yaml.safe_load(config.as_yaml())
    assert (written["batch"]["global"], written["loss"]["lambda"]) == (8, 0.25)
    assert "global_" not in written["batch"]
    assert {"batch.global", "loss.lambda", "phases.N.optimizer.lr"} <= documented_keys().keys()


@pytest.mark.parametrize("name", ["100%", "a b", "a\nb", "-x", ".x", "größe", "a;b", "'quoted'"])
def test_name_of_a_new_run_is_sound_and_earlier_ones_stay_readable(tiny_config, tmp_path, name):
    file = tiny_config({"name": name})
    with pytest.raises(
        UserError, match=r"^name: .* must consist of letters .A to Z., digits"
    ) as caught:
        load(str(file))
    assert "\n" not in str(caught.value)
    (tmp_path / "runs" / name).mkdir(parents=True)
    assert load(str(file)).name == configuration.load_written(file).name == name


def test_name_is_by_default_that_of_the_file(tiny_config):
    assert load(str(tiny_config())).name == "tiny"


@pytest.mark.parametrize("file", sorted(configuration.CONFIGS_DIR.glob("*.yaml")), ids=str)
def test_shipped_configs_load_without_a_warning(file, caplog):
    with caplog.at_level(logging.WARNING):
        config = load(file.name)
    assert caplog.records == []
    assert load(file.stem) == config
    assert config.name == file.stem


@pytest.mark.parametrize(
    ("name", "mean", "std"),
    [
        ("cifar10_resnet19", (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
        ("cifar100_resnet19", (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    ],
)
def test_recipes_of_cifar_begin_and_scale_as_the_papers_code(name, mean, std):
    config = load(name)
    assert config.model.arguments == {"init": "torch"}
    assert (config.data.mean, config.data.std) == (mean, std)


@pytest.mark.parametrize(
    ("name", "neuron", "of_kind"),
    [
        ("quickstart", (), []),
        ("spiking34_t4_t6", (), []),
        (
            "quickstart",
            ("model.neuron.kind=plif", "model.neuron.decay_input=false"),
            [
                "surrogate: sigmoid  # default of plif, in place of triangle",
                "surrogate_width: 4.0  # default of plif, in place of 1.0",
                "fires_at_threshold: true  # default of plif, in place of false",
            ],
        ),
        ("qkformer_10_384", ("model.neuron.kind=lif", "model.neuron.decay=0.9"), []),
        (
            "quickstart",
            ("model.neuron.kind=psn",),
            [
                "surrogate: atan  # default of psn, in place of triangle",
                "surrogate_width: 2.0  # default of psn, in place of 1.0",
                "timesteps: 4  # default of psn",
            ],
        ),
    ],
)
def test_printed_config_is_the_same_config(name, neuron, of_kind, tmp_path, capsys):
    assert train.main(["--config", name, "--print-config", "seed=3", *neuron]) == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(text := capsys.readouterr().out)
    config = load(str(printed))
    assert config == load(name, ["seed=3", *neuron])
    assert config.as_dict() == read_yaml(printed)
    assert differences(config.as_dict(), load(name, neuron).as_dict()) == ["seed is 0 and was 3"]
    marked = [re.sub(" +#", "  #", line.strip()) for line in text.splitlines()]
    assert [line for line in marked if "default of" in line] == of_kind


def test_forms_that_people_write_are_taken():
    def loaded(*overrides: str) -> RunConfig:
        return load("quickstart", overrides)

    for form in ("profile=20..30", "profile=[20, 30]", "profile.steps=20..30"):
        assert loaded(form).profile == (20, 30)
    for form in (
        "data.color_jitter=[0.4, 0, 0, 0.1]",
        "data.color_jitter={brightness: 0.4, hue: 0.1}",
    ):
        assert loaded(form).data.color_jitter == (0.4, 0, 0, 0.1)
    assert loaded("tracking.trackers=tensorboard").tracking.trackers == ("tensorboard",)
    assert loaded("data.transforms=[]").data.transforms == ()
    for wrong in ("20", "20-30", "[20]", "[1, 2, 3]"):
        with pytest.raises(UserError, match=r"'profile': must be the first and the last "):
            loaded(f"profile={wrong}")
    with pytest.raises(UserError, match=r"'profile.0': must be above 0, not 0"):
        loaded("profile=0..3")
    with pytest.raises(
        UserError, match=r"'tracking.trackers.0': input should be a valid string, in quotes"
    ):
        loaded("tracking.trackers=[1]")


def test_every_key_is_printed_and_explained(capsys):
    assert train.main(["--explain"]) == 0
    explained = {line.split()[0] for line in capsys.readouterr().out.splitlines()}
    assert explained == documented_keys().keys()
    printed = flatten(resolved().as_dict())
    numbered = {key.replace("phases.0.", "phases.N.") for key in printed}
    # Free mappings have entries of their own.
    numbered = {k if not k.startswith("model.arguments.") else "model.arguments" for k in numbered}
    # What is printed is one form of `recompute`, T and optimiser, and the numbers of one
    # kind of neuron.
    others = {
        f"model.neuron.{key}" for kind in NEURONS for key in neurons.as_dict(make({"kind": kind}))
    }
    others = {key for key in explained if key.startswith("model.neuron.")} & others
    other_forms = {"recompute.timesteps", "phases.N.optimizer"}
    assert numbered - others == explained - others - other_forms
    assert explained >= set(OPERATIONAL_KEYS)


def test_some_keys_are_explained(capsys):
    assert train.main(["--explain", "batch", "phases.0.epochs"]) == 0
    explained = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert explained == ["batch.global", "batch.micro", "batch.eval", "phases.N.epochs"]
    assert train.main(["--explain", "model.neuron.decay"]) == 0
    of_kinds = (
        "[number > 0 and <= 1; default 0.5]",
        "With kind=plif, the allowed values are: number > 0 and < 1.",
        "With kind=ilif or nilif, the default is 0.25.",
    )
    output = capsys.readouterr().out
    assert all(one in output for one in of_kinds)
    assert train.main(["--explain", "bach"]) == 2
    assert "no key 'bach'" in capsys.readouterr().err


def test_every_key_is_explained_with_what_it_takes(capsys):
    assert train.main(["--explain"]) == 0
    explained = {
        line.split()[0]: line.split(maxsplit=1)[1] for line in capsys.readouterr().out.splitlines()
    }
    for key, takes in {
        "seed": "[whole number >= 0 and < 9223372036854775808; default 0]",
        "model.name": f"[{models.names()[0]} | ",
        "model.num_classes": "[whole number > 1 or null; default null]",
        "model.neuron.kind": f"[{' | '.join(NEURONS)}; default: the network's own]",
        "model.neuron.surrogate": "[triangle | atan | sigmoid | rectangle; default triangle]",
        "name": "[text; default: the file's name]",
        "data.root": "[text; required]",
        "data.scale": "[list of 2: number >= 0 and <= 1; default [0.08, 1.0]]",
        "data.transforms": "[list: text; default []]",
        "loss.kind": "[sdt | tet; default tet]",
        "phases.N.optimizer.kind": "[sgd | adam | adamw; default sgd]",
        "phases.N.optimizer.nesterov": "[true or false; default false]",
        "recompute": "[none | blocks or {timesteps}; default none]",
    }.items():
        assert explained[key].startswith(takes), (key, explained[key])
    # The default that is shown is the one that a run has, and no key is without a meaning.
    values = flatten(resolved().as_dict())
    for key, (_, default, meaning) in documented_keys().items():
        assert meaning.strip(), key
        if default.startswith("default ") and key in values and key not in SET_BY_TINY:
            shown = values[key] if isinstance(values[key], str) else json.dumps(values[key])
            assert default == f"default {shown}", key


def test_differences_pass_over_what_does_not_change_the_result():
    ours = resolved()
    same = resolved({"data.threads": 3, "log_every": 7, "max_steps": 5, "resume": "must"})
    other = resolved({"phases.0.optimizer.lr": 0.1, "data.flip": 0.0, "data.device": "gpu"})
    assert differences(ours.as_dict(), same.as_dict()) == []
    assert differences(ours.as_dict(), other.as_dict()) == [
        "data.device is 'gpu' and was 'cpu'",
        "data.flip is 0.0 and was 0.5",
        "phases.0.optimizer.lr is 0.1 and was 0.05",
    ]

    def paths(written: Callable[[str], str]) -> dict[str, Any]:
        teacher = {"teacher": "timm:resnet18", "teacher_weights": written("teacher.safetensors")}
        return {"init_checkpoint": written("first"), "loss": {"distillation": teacher}}

    assert differences(paths(str), paths(lambda path: str(Path(path).absolute()))) == []
