"""A configuration is strict, and says in one sentence what is wrong with it and where."""

import json
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml

from tetdist.apps.cli import train
from tetdist.config import loading as configuration
from tetdist.config.documentation import documented_keys
from tetdist.config.identity import OPERATIONAL_KEYS, differences
from tetdist.config.loading import load, parse
from tetdist.config.overrides import flatten, joined
from tetdist.config.schema import RunConfig
from tetdist.config.yaml_files import read_yaml
from tetdist.errors import UserError
from tetdist.losses import LOSSES
from tetdist.models import QKFormer
from tetdist.nn import neurons
from tetdist.nn.integer_neurons import NILIF
from tetdist.nn.learned_decay import PLIF
from tetdist.nn.neurons import LIF, NEURONS, make
from tetdist.optimizers import OPTIMIZERS

SET_BY_TINY = {*flatten(tiny.CONFIG)}


def resolved(changes: dict[str, Any] | None = None) -> RunConfig:
    return parse(tiny.changed(tiny.CONFIG, {"name": "x", "data.root": "d"} | (changes or {})), "x")


def refusal(make: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        make()
    text = str(caught.value)
    assert "\n" not in text
    assert "pydantic" not in text
    return text


IS_T = (
    "must be an integer from 1 to 10000, a list of such numbers, or a "
    "range of them from the smaller one on, such as {from: 1, to: 4}"
)
# A mistaken override, and what is said of it.
MISTAKEN = {
    # The right key, at every depth; the right word at the wrong place.
    "sede=1": "sede=1: unknown key; did you mean 'seed'?",
    "epocs=1": "unknown key; did you mean 'phases.0.epochs'?",
    "model.timestep=4": "model.timestep=4: unknown key; set phases.0.timesteps",
    "phases={0: {epochs: 1}}": "must be a list; to change a key of an item, set phases.0.epochs=1",
    "loss.power=3": "unknown key; did you mean loss.arguments.power? known keys: kind",
    "model.neuron.rise=0.2": "unknown key; known keys: threshold, decay",  # not reset
    "save.every=3": "unknown key; did you mean 'save.every_steps'?",
    "checkpoint.every=3": "checkpoint: unknown key; did you mean 'log_every'?",
    "optimizer=sgd": "unknown key; did you mean 'phases.0.optimizer.kind'?",
    "optimizer={kind: sgd}": "unknown key; did you mean 'phases.0.optimizer.kind'?",
    "loss={kind:sdt}": "loss.kind:sdt: unknown key; write a space after each colon",
    "phases.0.loss.lamda=1": "unknown key; did you mean 'phases.0.loss.lambda'?",
    "model.neuron={decai: 0.5}": "model.neuron.decai: unknown key; did you mean",
    "Batch.Global=3": "Batch: unknown key; did you mean 'batch.global'?",
    "modle={name: x}": "unknown key; did you mean 'model.name'?",
    "model.neuron={kind: ilif, most_spike: 2}": "did you mean 'model.neuron.most_spikes'?",
    "batch-size=3": "unknown key; set batch.global",
    "neuron.decay=0.2": "neuron: unknown key; did you mean 'model.neuron.decay'?",
    "train.epochs=2": "train: unknown key; did you mean 'phases.0.epochs'?",
    "trackin.zzz=x": "trackin: unknown key; did you mean 'tracking'?",
    "phases.0.optimizer=adamw": "not 'adamw'; set phases.0.optimizer.kind, for instance",
    # Types.
    "seed=1.5": "seed=1.5: must be a valid integer",
    "loss.lambda=abc": "loss.lambda=abc: must be a valid number",
    "model.neuron={detach_reset: 'false'}": "must be a valid boolean, not 'false'",
    "phases=3": "phases=3: must be a list, in brackets",
    "phases.0.schedule=step": "phases.0.schedule=step: must be 'cosine' or 'constant'",
    "data.scale=0.5": "data.scale=0.5: must be a list, in brackets",
    "phases.0.optimizer={kind: sgd}": "phases.0.optimizer.lr is missing",
    "tracking.log_checkpoint=all": "tracking.log_checkpoint=all: must be 'none', 'last' or",
    "tracking.experiment=3": "tracking.experiment=3: must be text, in quotes",
    "loss.kind=": "loss.kind=: has no value; give one, or leave it out",
    "profile=20": "must be the first and the last step, such as [20, 30] or 20..30",
    # Ranges.
    "batch.micro=0": "batch.micro=0: must be greater than 0",
    "phases.0.timesteps=0": IS_T,
    "phases.0.timesteps={from: 4, to: 1}": IS_T,
    "phases.0.optimizer.lr=0.0": "must be greater than 0",
    "data.color_jitter=[0, 0, 0, 1]": "jitter.3 must be less than or equal to 0.5, not 1",
    "seed=-1": "seed=-1: must be greater than or equal to 0",
    "profile=[6,4]": "must be the first and the last step, in this order",
    "profile=[1,101]": "must be at most 100 steps, ",
    "model.neuron.decay=2": "model.neuron.decay=2: must be at most 1",
    "peer_timeout=99999999999999999999999999": "must be less than or equal to 1000000",
    "data.auto_augment=randm9": "or RandAugment, such as rand-m9-mstd0.5-inc1",
    "data.auto_augment=rand-w0": "must consist of m, n, p, mstd, mmax and inc",
    # Contradictions within a section.
    "model.neuron.spike=sigmoid": "model.neuron.spike=sigmoid: needs surrogate=sigmoid, not ",
    "model.name=sew_resnet43": "43: there is no spiking network 'sew_resnet43'; did you mean",
    "model.name=my_network": "'my_network'; `tetdist list networks` lists tetdist's (for your own",
    "phases.0.optimizer.arguments={eps: 1}": "kind=sgd takes none; set them to {}, or kind=timm",
    "model.arguments.chanels=[4]": "no such argument; did you mean channels?",
    "model.arguments.num_classes=3": "model.arguments.num_classes=3: set model.num_classes instead",
    "model.arguments.in_chans=1": "model.arguments.in_chans=1: the data give it, 3 for images and",
    "model.arguments.timesteps=3": "model.arguments.timesteps=3: set phases.N.timesteps instead",
    "phases.0.optimizer={kind: timm:lamb, lr: 1, arguments: {betas: [0, 0]}}": (
        "phases.0.optimizer.arguments.betas: set phases.N.optimizer.betas instead"
    ),
    "data.scale=[1.0, 0.5]": "data.scale=[1.0, 0.5]: must ascend and end above 0",
    "data.images_as_events.ratio=1.0": "data.images_as_events.ratio=1.0: must be less than 1",
    "data=/data": "not '/data'; set data.root, for instance",
    "data.images_as_events=true": "set data.images_as_events.ratio, for instance",
    "data.resize=8": "data.resize=8: is smaller than data.image_size, 16",
    # What is no override.
    "seed": "'seed' is not of the form key=value; write it without spaces, as in seed=1",
    "phases[0].timesteps=2": "write the key with dots, as in phases.0.timesteps=2",
    "seed=[1": "seed=[1 is not valid YAML",
    "seed.x=1": "seed must be a valid integer",
    "phases.1.epochs=1": "phases has 1 item, counted from 0, and no '1'; name one by its number",
    "phases.optimizer.lr=1": "and no 'optimizer'; name one by its number, as in phases.0, or",
    # Another project's names, and a contradiction with a key of the file.
    "model.neuron={tau: 2.0}": "model.neuron.tau: unknown key; set model.neuron.decay to 1 - 1/tau",
    "batch.micro=3": "set batch.micro=2 or batch.global=6",
}


@pytest.mark.parametrize("override", MISTAKEN)
def test_a_mistaken_override_is_named_and_not_the_file(tiny_config, override):
    file = str(tiny_config({"seed": 0}))
    text = refusal(lambda: load(file, ["plots=false", override]))
    assert MISTAKEN[override] in text
    assert override in text
    assert file not in text


LR = "phases.0.optimizer={lr: 0.05, lr_per: 16}"
PSN = "model.neuron={kind: psn, timesteps: 4}"
ONE = "phases=[{epochs: 1, timesteps: 4, optimizer: {lr: 0.1}}, "
ON, NEW = (f"{{epochs: 1, timesteps: 3, optimizer: {of}}}]" for of in ("continue", "{lr: 0.1}"))
# Overrides, each fine on its own, and what is said of them together.
CONTRADICTIONS = (
    (
        "batch.global: 8 is not a multiple of batch.micro, 3; set batch.micro=2 or batch.global=6",
        "batch.micro=3",
    ),
    ("batch.micro=1: leaves data.mixup", "batch.micro=1", "data.mixup=0.1"),
    ("cuda_graphs=true: needs engine=torch: engine=deepspeed", "cuda_graphs=true"),
    ("batch_norm.sync=true, whose", "cuda_graphs=true", "engine=torch", "batch_norm.sync=true"),
    ("precision=fp16: needs a GPU; set device=cuda, or", "precision=fp16", "device=cpu"),
    ("data.device=gpu: needs a GPU; set device=cuda, or", "data.device=gpu", "device=cpu"),
    ("precision=fp64: DeepSpeed does not train in fp64", "precision=fp64"),
    ("zero_stage=1: needs DeepSpeed", "zero_stage=1", "engine=torch"),
    ("precision=fp16: needs zero_stage=0", "zero_stage=1", "precision=fp16"),
    ("zero_stage=1: does not suit", "zero_stage=1", "phases.0.optimizer.kind=timm:lamb"),
    ("data.kind: model.name=vggsnn takes events, not images", "model={name: vggsnn}"),
    ("data.device=cpu, not gpu", "data.transforms=[negate]", "data.device=gpu"),
    ("{}: needs data.kind=images", "data.images_as_events={}", "data.kind=events"),
    ("phases.0.timesteps=9: exc", "data.images_as_events={}", "phases.0.timesteps=9"),
    ("probability=0.5: cannot", "data.images_as_events={}", "data.erasing.probability=0.5"),
    ("data.repeats=9: is above batch.global, 8", "data.repeats=9"),
    ("0.1]: cannot go", "data.auto_augment=rand-m9", "data.color_jitter=[0, 0, 0, 0.1]"),
    ("=16: is not below data.image_size, 16", "data.crop=padded", "data.padding=16"),
    ("phases.0.warmup_epochs=2.0: 2 must be below the schedule's 2", "phases.0.warmup_epochs=2.0"),
    (
        "1 and cooldown_epochs, 1, must be",
        "phases.0.warmup_epochs=1.0",
        "phases.0.cooldown_epochs=1",
    ),
    ("min_lr=0.03: is above the peak of", "phases.0.min_lr=0.03", LR),
    ("start_phase=1: must be at most 0: this run has one phase, number 0", "start_phase=1"),
    (
        "phases.0.optimizer=continue: needs a phase before it",
        "phases.0.optimizer=continue",
    ),
    ("phases.1.optimizer: continue needs", ONE + ON, "start_phase=1", "init_checkpoint=run"),
    (
        "start_phase=1: skips the phases before it; set init_checkpoint",
        ONE + NEW,
        "start_phase=1",
    ),
    (
        "phases.1.timesteps: psn cannot run 3 timesteps: it has weights for T=4 only; set "
        "phases.1.timesteps=4, or model.neuron.timesteps to its only T",
        *(ONE + ON, PSN),
    ),
    ("weights for T=4 only; set phases.0.timesteps=4, or", "phases.0.timesteps=[4, 2]", PSN),
    (
        "phases.0.loss.distillation.self_weight: timesteps cannot learn from their mean",
        *("phases.0.loss.kind=sdt", "loss.distillation.self_weight=1.0"),
    ),
    (".teacher=timm:x: a run has one", "phases.0.loss.distillation.teacher=timm:x"),
    ("teacher_weights=file: needs a timm teacher", "loss.distillation.teacher_weights=file"),
    (
        "loss.distillation.self_target: correct_mean needs samples of one class",
        *("loss.distillation={self_weight: 1.0, self_target: correct_mean}", "data.mixup=0.2"),
    ),
    (
        "phases.0.loss.operations=0.1: needs spikes, and",
        *("phases.0.loss.operations=0.1", "model.neuron.kind=relu"),
    ),
    ("loss.arguments.power=2: loss.kind=tet has no such argument", "loss.arguments.power=2"),
    ("there is no loss 'ce'; there are sdt, tet, tet_of_means; sdt is the", "loss.kind=ce"),
    (
        "most_spikes has no effect with model.neuron.kind=plif; remove it, or set "
        "model.neuron.kind=ilif or nilif",
        *("model.neuron.kind=plif", "model.neuron.most_spikes=2"),
    ),
    ("name: 'a/b' must consist of letters", "name=a/b"),
    ("digits and . _ -, at most 200, and", f"name={201 * 'n'}"),
    # What would be undone in silence.
    ("seed is given twice, as seed=1 and as seed=2", "seed=1", "seed=2"),
    ("neuron is given twice, as model", "model.neuron.decay=1.0", "model.neuron={kind: lif}"),
    ("the key 'kind' appears twice", "data={kind: images, kind: events}"),
)


@pytest.mark.parametrize("row", CONTRADICTIONS, ids=lambda row: row[0])
def test_a_contradiction_is_named(tiny_config, row):
    expected, *overrides = row
    assert expected in refusal(lambda: load(str(tiny_config()), overrides))


def test_what_has_no_weight_contradicts_nothing():
    unused = {"teacher_alignment": "error_aware", "self_target": "correct_mean"}
    assert resolved({"loss.distillation": unused, "data.mixup": 0.2}).data.mixup == 0.2


def test_mistakes_of_the_file_and_of_an_override_are_distinguished(tiny_config):
    file = str(tiny_config({"sede": 1, "name": "1e3"}))
    other, own = refusal(lambda: load(file, ["log_every=x"])).split(f"; {file}: ")
    assert own == "sede: unknown key; did you mean 'seed'?"
    assert other == "log_every=x: must be a valid integer"


def test_no_such_config(tmp_path):
    (tmp_path / "q.yaml").touch()
    for name in ("quickstar", "tetdist:quikstart", f"{tmp_path}/quikstart.yaml"):
        with pytest.raises(UserError, match=rf"'{name}'.*did you mean quickstart\?"):
            load(name)
    (tmp_path / "config.yaml").touch()
    with pytest.raises(UserError, match=rf"did you mean {tmp_path}/config.yaml\?"):
        load(str(tmp_path))
    with pytest.raises(UserError, match=rf"did you mean {tmp_path}/config.yaml\?"):
        load(str(tmp_path / "confg.yaml"))
    with pytest.raises(UserError, match=r"'zzz'.*in configs/; `tetdist list` lists those"):
        load("zzz")
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "link.yaml").symlink_to("nowhere")
    for name in ("pipe.yaml", "link.yaml"):
        with pytest.raises(UserError, match="a pipe or a link to nothing, and must be a regular"):
            load(str(tmp_path / name))


IS_LARGE = "more than 200,000 characters, 20,000 values .* or 50 levels; make it smaller"
# 10 to the power of 9 values.
BOMB = "a0: &a0 [1]\n", *(f"a{n}: &a{n} [{9 * f'*a{n - 1}, '}*a{n - 1}]\n" for n in range(1, 10))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("- 1\n- 2\n", "keys and values, not a list"),
        ("a: [1\n", "valid YAML: line 1: expected ',' or ']'"),
        ("seed: 1\nloss:\n\tkind: tet\n", "valid YAML: line 3: .*; indent by spaces"),
        ("", "keys and values, but is empty"),
        ("seed: 1\nloss:\n  kind: tet\n  kind: sdt\n", "'kind' appears twice, in lines 3 and 4"),
        (b"\xff\xfe\x00name: x", "not valid YAML"),
        ("a: &x [*x]", IS_LARGE),
        ("".join(BOMB), IS_LARGE),
        (f"a: {99 * '['}{99 * ']'}", IS_LARGE),
        (f"a: {999 * '{b: '}1{999 * '}'}", IS_LARGE),
        (f"a: '{200_000 * ' '}'", IS_LARGE),
        ("".join(f"k{number}: 1\n" for number in range(99)), "k45: (?!.*k46: )"),
        ("seed: 010", "odd.yaml: 010 is 8 in YAML; write a decimal number without a leading 0"),
        ("seed: -0x10", "odd.yaml: -0x10 is -16 in YAML; write a decimal number"),
        ("name: x\nbatch.micro: 16\n", "in a file write `batch: {micro: 16}`; dotted keys"),
        ("a: !!set {b, c}", "not valid YAML"),
    ],
)
def test_file_that_is_no_configuration(tiny_config, tmp_path, text, expected):
    file = tmp_path / "odd.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=expected) as caught:
        load(str(file))
    assert str(file) in str(caught.value)
    if isinstance(text, str) and text.startswith("a: "):
        with pytest.raises(UserError, match=expected) as caught:
            load(str(tiny_config()), [f"name={text.removeprefix('a: ')}"])
        assert "name=" in str(caught.value)


# An override, and the value that it gives.
TAKEN = {
    "seed=7": 7,
    "phases.0.epochs=5": 5,
    "phases.0.optimizer.lr=1e-4": 1e-4,
    "phases.0.optimizer.betas=[8e-1, 0.9]": [0.8, 0.9],
    "data.resize=null": None,
    "data.index=": None,
    "model.neuron.decay=1.0": 1.0,
    "loss.lambda=5E-2": 0.05,
    "name='1e3'": "1e3",
    "name=2026-01-01": "2026-01-01",
    "tracking.experiment=1:30": "1:30",
    "profile=20..30": [20, 30],
    "profile=[20, 30]": [20, 30],
    "data.color_jitter=[0.4, 0, 0, 0.1]": [0.4, 0, 0, 0.1],
    "tracking.trackers=tensorboard": ["tensorboard"],
    "data.transforms=[]": [],
}


@pytest.mark.parametrize("override", TAKEN)
def test_forms_that_people_write_are_taken(override):
    key = override.partition("=")[0]
    assert flatten(load("quickstart", [override]).as_dict())[key] == TAKEN[override]


def test_list_item_of_a_default_can_be_overridden(tiny_config):
    config = load(str(tiny_config()), ["data.std=[0.1, 0.2, 0.3]", "data.std.0=0.4"])
    assert config.data.std == (0.4, 0.2, 0.3)
    assert config.data.resize_side == 16


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
    section = resolved({"model": model}).model
    assert section.neuron == expected
    assert section.model_dump(mode="json")["neuron"] == neurons.as_dict(expected)


def test_the_networks_neuron_is_written_down():
    neuron = {"most_spikes": 2}
    config = resolved({"model": {"name": "espikeformer_s", "neuron": neuron}})
    written = yaml.safe_load(config.as_yaml())
    assert written["model"]["neuron"] == neurons.as_dict(NILIF(most_spikes=2))
    assert parse(written, "config.yaml") == config


def test_a_neuron_that_is_chosen_later_needs_no_key_of_the_file(tiny_config):
    file = tiny_config({"model.neuron": {"kind": "ilif", "most_spikes": 3}})
    assert load(str(file), ["model.neuron.kind=plif"]).model.neuron == PLIF()
    own = file.with_name("own.yaml")
    own.write_text(f"base: {file.name}\nmodel: {{neuron: {{kind: plif}}}}\n")
    assert load(str(own)).model.neuron == PLIF()
    own.write_text(f"base: {file.name}\nmodel: {{neuron: {{kind: plif, most_spikes: 2}}}}\n")
    assert "most_spikes has no effect" in refusal(lambda: load(str(own)))


def test_later_layers_of_overrides_replace_earlier_ones():
    study, entry = ["seed=1", "loss.kind=tet", "loss.phi=2"], ["loss={kind: sdt}"]
    assert joined(study, entry, ["seed=3"]) == ["loss={kind: sdt}", "seed=3"]
    assert joined(["lossy=1"], ["loss=3"]) == ["lossy=1", "loss=3"]


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


@pytest.mark.parametrize("name", ["100%", "a b", "a\nb", "-x", ".x", "größe", "a;b", "'quoted'"])
def test_name_of_a_run_is_sound(tiny_config, name):
    file = tiny_config({"name": name})
    with pytest.raises(
        UserError, match=r"^name: .* must consist of letters .A to Z., digits"
    ) as caught:
        load(str(file))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", sorted(configuration.CONFIGS_DIR.glob("*.yaml")), ids=str)
def test_shipped_configs_load_without_a_warning(file, caplog):
    with caplog.at_level(logging.WARNING):
        config = load(file.name)
    assert caplog.records == []
    assert load(file.stem) == config
    assert config.name == file.stem


@pytest.mark.parametrize(
    ("name", "neuron"),
    [
        ("spiking34_t4_t6", ()),
        ("qkformer_10_384", ("model.neuron.kind=lif", "model.neuron.decay=0.9")),
        ("quickstart", ("model.neuron.kind=psn", "model.neuron.surrogate_width=3.0")),
    ],
)
def test_printed_config_is_the_same_config(name, neuron, tmp_path, capsys):
    assert train.main(["--config", name, "--print-config", "seed=3", *neuron]) == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(text := capsys.readouterr().out)
    of_kind = "surrogate: atan # default of psn, in place of triangle"
    assert (of_kind in " ".join(text.split())) == (name == "quickstart")
    config = load(str(printed))
    assert config == load(name, ["seed=3", *neuron])
    assert config.as_dict() == read_yaml(printed)
    assert differences(config.as_dict(), load(name, neuron).as_dict()) == ["seed is 0 and was 3"]


def test_every_key_is_printed_and_explained():
    explained = documented_keys().keys()
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
    other_forms = {"recompute.timesteps", "phases.N.optimizer", "data.images_as_events.ratio"}
    assert numbered - others == explained - others - other_forms
    assert explained >= set(OPERATIONAL_KEYS)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["quickstart.yaml"], "--config is missing; write --config quickstart.yaml"),
        (["--config", "a", "--config", "b"], "--config is given twice, as a and as b; leave out"),
        (["--pint-config"], "did you mean --print-config?"),
        (["--batch-size", "3"], "have no --; set batch.global"),
        (["--batch.global=32"], "have no --; did you mean batch.global=VALUE?"),
        (["--resume"], "have no --; leave it out: the same command continues a stopped run"),
        (["--epocs", "3"], "have no --; did you mean phases.0.epochs=VALUE?"),
    ],
)
def test_mistaken_flags_are_one_line(arguments, expected, capsys):
    with pytest.raises(SystemExit):
        train.main(arguments)
    error = capsys.readouterr().err
    assert (expected in error, error.count("\n")) == (True, 1), error


def test_some_keys_are_explained(capsys, monkeypatch):
    assert train.main(["--explain", "base", "batch", "phases.0.epochs", "lr"]) == 0
    explained = " ".join(line.split()[0] for line in capsys.readouterr().out.splitlines())
    keys = "base batch.global batch.micro batch.eval phases.N.epochs phases.N.optimizer.lr"
    assert explained == keys
    assert train.main(["--explain", "model.neuron.decay"]) == 0
    of_kinds = (
        "[number > 0 and <= 1; default 0.5]",
        "With kind=plif, the allowed values are: number > 0 and < 1.",
        "With kind=ilif or nilif, the default is 0.25.",
    )
    output = capsys.readouterr().out
    assert all(one in output for one in of_kinds)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")
    assert train.main(["--explain", "model.neuron.decay"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert (max(map(len, lines)) <= 60, " ".join(map(str.strip, lines))) == (True, output.strip())
    for word, answer in {
        "bach": "no key 'bach'; did you mean 'batch'?",
        "checkpoint": "no key 'checkpoint'; see save.every_steps, or init_checkpoint (",
        "learning_rate": "no key 'learning_rate'; see phases.N.optimizer.lr (",
        "los.kind": "did you mean 'loss.kind'?",
        "phases.timesteps": "no key 'phases.timesteps'; see phases.N.timesteps",
    }.items():
        assert train.main(["--explain", word]) == 2
        assert answer in capsys.readouterr().err


def test_every_key_is_explained_with_what_it_takes(capsys):
    assert train.main(["--explain"]) == 0
    explained = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert explained.keys() == {"base"} | documented_keys().keys()
    for key, takes in {
        "seed": "[integer >= 0 and < 9223372036854775808; default 0]",
        "model.name": "[text; required] Name of the network: one of `tetdist list networks`, ",
        "model.num_classes": "[integer > 1 and <= 1000000 or null; default null]",
        "model.neuron.kind": f"[{' | '.join(NEURONS)}; default: the network's own]",
        "model.neuron.surrogate": "[triangle | atan | sigmoid | rectangle; default triangle]",
        "name": "[text; default: the file's name]",
        "data.root": "[text; required]",
        "data.scale": "[list of 2 numbers >= 0 and <= 1; default [0.08, 1.0]]",
        "loss.kind": f"[{' | '.join(LOSSES)}; default tet]",
        "phases.N.optimizer.kind": f"[{' | '.join(OPTIMIZERS)}; default sgd]",
        "recompute": "[none | blocks or {timesteps}; default none]",
    }.items():
        assert explained[key].startswith(takes), (key, explained[key])
    # The default that is shown is the one that a run has, and no key is without a meaning.
    values = flatten(resolved().as_dict())
    for key, (takes, default, meaning) in documented_keys().items():
        assert meaning.strip(), key
        # C libraries handle integers of any size badly.
        assert "integer" not in takes or " <" in takes, key
        if default.startswith("default ") and key in values and key not in SET_BY_TINY:
            shown = values[key] if isinstance(values[key], str) else json.dumps(values[key])
            assert default == f"default {shown}", key


def test_differences_pass_over_what_does_not_change_the_result():
    ours = resolved()
    same = resolved({"data.threads": 3, "log_every": 7, "max_steps": 5, "resume": "must"})
    other = resolved({"phases.0.optimizer.lr": 0.1, "data.flip": 0.0, "data.device": "gpu"})
    own = {"loss": {"arguments": {}}}, {"loss": {"arguments": {"gamma": 3}}}
    assert differences(*own) == ["loss.arguments.gamma is 3 and was None"]
    assert differences(ours.as_dict(), same.as_dict()) == []
    assert differences(ours.as_dict(), other.as_dict()) == [
        "data.device is 'gpu' and was 'cpu'",
        "data.flip is 0.0 and was 0.5",
        "phases.0.optimizer.lr is 0.1 and was 0.05",
    ]

    # A key that is free at a resume is so on purpose.
    free = [one for one in documented_keys() if not differences({one: "1"}, {one: "2"})]
    assert " ".join(sorted(free)) == (
        "batch.eval cluster cuda_graphs data.index data.prefetch data.root data.threads device "
        "engine imports log_every max_steps model.mixes_samples peer_timeout plots profile "
        "recompute reference resume runs_dir save.every_steps save.keep_last tracking.experiment "
        "tracking.log_checkpoint tracking.mlflow tracking.trackers tracking.uri zero_stage"
    )

    def paths(written: Callable[[str], str]) -> dict[str, Any]:
        teacher = {"teacher": "timm:resnet18", "teacher_weights": written("teacher.safetensors")}
        return {"init_checkpoint": written("first"), "loss": {"distillation": teacher}}

    assert differences(paths(str), paths(lambda path: str(Path(path).absolute()))) == []
