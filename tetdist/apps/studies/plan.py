"""Contents of a study file: its entries, and their runs with its seeds."""

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field

from tetdist.config import identity, loading
from tetdist.config.fields import Section, Timesteps
from tetdist.config.flags import import_flags
from tetdist.config.loading import CONFIGS_DIR, Draft
from tetdist.config.messages import checked
from tetdist.config.overrides import apply_override, flatten, joined
from tetdist.config.schema import RunConfig
from tetdist.config.yaml_files import read_yaml
from tetdist.errors import UserError, script_of, typed
from tetdist.storage.files import parse_json
from tetdist.tracking import metrics_file
from tetdist.tracking.mlflow_store import check_store
from tetdist.tracking.trackers import check_names
from tetdist.wording import counted

EVALUATION_FILE = "test_timesteps.json"
TEACHER_KEY = "loss.distillation.teacher"

# Keys that a study sets itself, with remedies.
OWN_KEYS = {
    "seed": "add it to the study's seeds instead",
    "name": "leave it out, runs are named ENTRY-seedN",
    "runs_dir": "give --output DIR instead",
    "resume": "leave it out, a study always continues its runs",
    "seeds": "change the study's file",
}


class EntrySection(Section):
    """Entry of the comparison, trained once for each seed."""

    overrides: dict[str, Any] = Field(default_factory=dict)
    """Dotted keys of the configuration, after those of the study."""
    config: str | None = None
    """Configuration, if it differs from the study's."""
    control: str | None = None
    """Entry to compare with, seed by seed."""
    init: str | None = None
    """Entry that provides the initial weights, of the same seed."""
    teacher: str | None = None
    """Entry that provides the teacher of the same seed (loss.distillation.teacher)."""
    average: bool = False
    """Evaluate the moving average of the weights (ema.decay) at the end."""


class StudySection(Section):
    """Study: configurations that are compared over seeds."""

    title: str
    question: str = ""
    """Markdown for the report: the question, and what all runs have in common."""
    config: str
    """File, or its name in configs/."""
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]
    overrides: dict[str, Any] = Field(default_factory=dict)
    """Dotted keys of the configuration, for all runs."""
    test_timesteps: Annotated[tuple[Timesteps, ...], Field(min_length=1)] = ()
    """Numbers of timesteps at which every run is evaluated; default: 1 to the largest trained T."""
    exit_within: Annotated[float, Field(ge=0, le=100)] | None = None
    """Percentage points of top-1 that early exit may lose. Each run's threshold is chosen on the
    training samples that it holds out (data.held_out), then evaluated on the validation split."""
    entries: Annotated[dict[str, EntrySection], Field(min_length=1)]


# Compared by identity, so that runs can be keys of a dictionary.
@dataclass(frozen=True, eq=False)
class StudyRun:
    """Run of one entry with one seed.

    Attributes:
        arguments: Arguments of the commands train and slurm: the configuration, all ``key=value``
            and ``--import``.
    """

    entry: str
    seed: int
    arguments: tuple[str, ...]
    config: RunConfig
    study: StudySection
    init: "StudyRun | None"
    teacher: "StudyRun | None"

    @property
    def section(self) -> EntrySection:
        return self.study.entries[self.entry]

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def folder(self) -> Path:
        return self.config.run_dir

    @property
    def needs(self) -> "tuple[StudyRun, ...]":
        """Runs that must be finished before it starts."""
        return tuple(dict.fromkeys(run for run in (self.init, self.teacher) if run is not None))

    @property
    def log(self) -> Path:
        return self.folder.parent / "logs" / f"{self.name}.log"

    @property
    def timesteps(self) -> int:
        """T of evaluations at the end of training."""
        return self.config.phases[-1].most_timesteps

    @property
    def length(self) -> str:
        """Number of epochs that the run itself trains, from ``start_phase`` on, and its limit."""
        phases, most = self.config.phases[self.config.start_phase :], self.config.max_steps
        limit = f", at most {counted(most, 'step')}" if most else ""
        return counted(sum(phase.epochs for phase in phases), "epoch") + limit

    @property
    def is_evaluated_again(self) -> bool:
        """True if the run needs a separate evaluation after training."""
        beyond = self.timesteps < max(self.study.test_timesteps)
        return beyond or self.is_judged_apart or not self.shows_each

    @property
    def shows_each(self) -> bool:
        """True if one evaluation surely shows the results at all smaller T."""
        return self.config.model.neuron.causal and not self.config.model.is_own

    @property
    def is_judged_apart(self) -> bool:
        """True if the evaluations during training use other samples or weights than the result."""
        return bool(self.config.data.held_out) or self.section.average

    @property
    def train_command(self) -> "Command":
        return Command("train", self.arguments)

    @property
    def eval_command(self) -> "Command":
        study, config = self.study, self.config
        # One evaluation at the last T gives all T, and early exit up to it, whatever T was trained.
        tested = study.test_timesteps[-1:] if self.shows_each else study.test_timesteps
        words = ["--checkpoint", str(self.folder), "--timesteps", ",".join(map(str, tested))]
        words += ["--json", str(self.folder / EVALUATION_FILE)]
        words += [] if study.exit_within is None else ["--exit-within", f"{study.exit_within:g}"]
        words += ["--ema"] if self.section.average else []
        words += ["--threads", str(config.data.threads), *import_flags(config.imports)]
        return Command("eval", tuple(words))

    def next_command(self) -> "Command | None":
        """Return the next command to run, by the state on the disk; None if all is done."""
        if not is_trained(self):
            return self.train_command
        return None if evaluation(self) is not None else self.eval_command


@dataclass(frozen=True)
class Command:
    """Command of tetdist, for a process to run and for a user to type."""

    name: str
    arguments: tuple[str, ...]

    @property
    def words(self) -> list[str]:
        """Command line of the process: a script of the checkout, or the installed package."""
        script = script_of(self.name)
        program = ["-m", "tetdist_command", self.name] if script is None else [str(script)]
        return [sys.executable, *program, *self.arguments]

    def __str__(self) -> str:
        """Return the command as typed, in the folder of the checkout if there is one."""
        folder = f"{CONFIGS_DIR.parent}/" if script_of(self.name) else ""
        return typed(self.name, *(word.removeprefix(folder) for word in self.arguments))


# --- reading --------------------------------------------------------------------------------------


def read(path: Path) -> StudySection:
    """Read a study file."""
    raw = read_yaml(path)
    if "phases" in raw or "base" in raw:
        command = typed("train", "--config", path)
        raise UserError(f"{path} is a configuration, not a study; train it with `{command}`")
    study = checked(StudySection, raw, str(path))
    if len(set(study.seeds)) < len(study.seeds):
        raise UserError(f"{path}: seeds: {list(study.seeds)} has a duplicate; remove it")
    if list(study.test_timesteps) != sorted(set(study.test_timesteps)):
        raise UserError(
            f"{path}: test_timesteps: {list(study.test_timesteps)} must ascend without duplicates"
        )
    for name, entry in study.entries.items():
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", name):
            raise UserError(f"{path}: entries: rename {name!r}; use letters, digits and . _ - only")
        others = {"control": entry.control, "init": entry.init, "teacher": entry.teacher}
        for key, other in others.items():
            if other is not None and (other == name or other not in study.entries):
                known = ", ".join(known for known in study.entries if known != name) or "none"
                raise UserError(
                    f"{path}: entries.{name}.{key}: {other!r} is not another entry; choose from "
                    f"{known}"
                )
    return study


def runs_of(
    study: StudySection,
    output: Path,
    more: list[str],
    imports: Sequence[str] = (),
    check: Callable[[str, Draft], object] | None = None,
) -> list[StudyRun]:
    """Return all runs, seed by seed, each after those that it needs.

    The runs are in the folder ``output``. ``more`` are ``key=value``, applied after the study's
    own. The runs' study has test_timesteps, also by default. ``check`` may refuse a run, given its
    entry, before networks are imported, which takes seconds.
    """
    loaded = {
        (name, seed): _loaded(study, name, seed, output, more, imports, check)
        for seed in study.seeds
        for name in _in_order(study.entries)
    }
    if not study.test_timesteps:
        most = max(config.phases[-1].most_timesteps for _, config in loaded.values())
        study = study.model_copy(update={"test_timesteps": tuple(range(1, most + 1))})
    runs: dict[tuple[str | None, int], StudyRun] = {}
    for (name, seed), (arguments, config) in loaded.items():
        runs[name, seed] = StudyRun(
            entry=name,
            seed=seed,
            arguments=arguments,
            config=config,
            study=study,
            init=runs.get((study.entries[name].init, seed)),
            teacher=runs.get((study.entries[name].teacher, seed)),
        )
    for run in runs.values():
        _check(run)
    return list(runs.values())


def _in_order(entries: Mapping[str, EntrySection]) -> list[str]:
    """Return the names of the entries, each after those that it needs."""
    ordered: list[str] = []

    def add(name: str, after: tuple[str, ...] = ()) -> None:
        if name in after:
            raise UserError(
                f"entries.{name}: init and teacher form a circle: {' <- '.join((*after, name))}"
            )
        for needed in (entries[name].init, entries[name].teacher):
            if needed is not None:
                add(needed, (*after, name))
        if name not in ordered:
            ordered.append(name)

    for name in entries:
        add(name)
    return ordered


def _run_name(entry: str, seed: int) -> str:
    return f"{entry}-seed{seed}"


def _loaded(
    study: StudySection,
    name: str,
    seed: int,
    output: Path,
    more: list[str],
    imports: Sequence[str],
    check: Callable[[str, Draft], object] | None,
) -> tuple[tuple[str, ...], RunConfig]:
    """Return the arguments and the configuration of an entry's run; see `runs_of`."""
    entry = study.entries[name]
    # An entry may set its own weights or teacher, unless it names another entry for them.
    own_keys = dict(OWN_KEYS)
    own = [f"seed={seed}", f"name={_run_name(name, seed)}", f"runs_dir={output}"]
    for needed, key, field in (
        (entry.init, "init_checkpoint", "init"),
        (entry.teacher, TEACHER_KEY, "teacher"),
    ):
        if needed is not None:
            own.append(f"{key}={output / _run_name(needed, seed)}")
            own_keys[key] = f"the entry's {field} provides it ({needed}); leave out one"
    overrides = joined(as_overrides(study.overrides), as_overrides(entry.overrides), more)
    config_name = entry.config or study.config
    try:
        _refuse_own_keys(overrides, own_keys)
        values = [*overrides, *own]
        draft = loading.draft(config_name, values, imports)
        if check is not None:
            check(name, draft)
        check_names(draft.config.tracking.trackers)
        config = draft.completed()
    except UserError as error:
        raise UserError(f"entries.{name}: {error}") from error
    return ("--config", config_name, *values, *import_flags(imports)), config


def _refuse_own_keys(given: list[str], own_keys: dict[str, str]) -> None:
    """Refuse overrides of keys that only the study may set; ``own_keys`` has their remedies."""
    nested: dict[str, Any] = {}
    for override in given:
        apply_override(nested, override)
    for key in flatten(nested):
        if key in own_keys:
            raise UserError(f"overrides: the study itself sets {key}; {own_keys[key]}")


def _check(run: StudyRun) -> None:
    """Refuse a run that cannot be evaluated as requested."""
    name, config, last = run.entry, run.config, max(run.study.test_timesteps)
    if run.study.exit_within is not None and not config.data.held_out:
        raise UserError(
            f"exit_within: entries.{name} holds out no training samples for choosing a threshold; "
            "set data.held_out: 0.1 in overrides"
        )
    if run.study.exit_within is not None and not config.model.neuron.causal:
        raise UserError(
            f"exit_within: entries.{name} has neurons that see later timesteps and thus no early "
            "exit; leave out the entry or exit_within"
        )
    if run.section.average and config.ema.decay is None:
        raise UserError(
            f"entries.{name}.average: the run keeps no average; set ema.decay, such as 0.999"
        )
    for timesteps in run.study.test_timesteps:
        if (reason := config.model.neuron.refusal(timesteps)) is not None:
            raise UserError(f"test_timesteps: entries.{name}: {reason}")
    if run.is_judged_apart and last < run.timesteps:
        raise UserError(
            f"test_timesteps: entries.{name} is trained with T={run.timesteps} but evaluated up to "
            f"{counted(last, 'timestep')} only; add {run.timesteps}"
        )


def as_overrides(values: dict[str, Any]) -> list[str]:
    """Convert dotted keys and values to overrides of the command line."""
    return [f"{key}={as_text(value)}" for key, value in values.items()]


def as_text(value: Any) -> str:
    """Convert a value to the text of an override of the command line."""
    if isinstance(value, str):
        return value
    text = yaml.safe_dump(value, default_flow_style=True, width=sys.maxsize)
    return text.removesuffix("...\n").strip()


# --- what is on the disk --------------------------------------------------------------------------


def is_trained(run: StudyRun) -> bool:
    """Return whether the run has reached its end and saved its last step."""
    from tetdist.training import run_folder  # which imports torch, as few of these functions need

    return run_folder.is_trained(run.config)


def lines(run: StudyRun, kind: str) -> list[dict[str, Any]]:
    """Return the run's metrics of one kind; empty before it begins."""
    file = run.folder / "metrics.jsonl"
    metrics = metrics_file.read_metrics(file) if file.exists() else []
    return [line for line in metrics if line["kind"] == kind]


def evaluation(run: StudyRun) -> dict[str, Any] | None:
    """Return the run's last evaluation: top1, loss, samples, per_timestep_top1 and so on.

    Up to the T of training, this is the run's own evaluation. Beyond it, per_timestep_top1 is from
    the command eval. All of it is from eval if the run's own evaluation used held-out samples, or
    weights that are not averaged. None until that evaluation exists.
    """
    last = lines(run, "val")[-1]
    most = max(run.study.test_timesteps)
    if len(last["per_timestep_top1"]) >= most and not run.is_judged_apart:
        return last
    try:
        values = parse_json((run.folder / EVALUATION_FILE).read_text())
        if values["step"] != last["step"] or len(values["per_timestep_top1"]) < most:
            return None
        if not run.is_judged_apart:
            return last | {"per_timestep_top1": values["per_timestep_top1"]}
        within = values["chosen_exit"]["within"] if "chosen_exit" in values else None
        if (within, "averaged" in values) != (run.study.exit_within, run.section.average):
            return None
        # eval may have used more timesteps than the training; the result is at the latter.
        of_training = {
            key: values[f"per_timestep_{key}"][run.timesteps - 1] for key in ("top1", "loss")
        }
        return dict(values) | of_training
    except (OSError, ValueError, LookupError, TypeError):
        return None


def check_folder(run: StudyRun) -> None:
    """Refuse a folder that holds a run of another configuration."""
    file = run.folder / "config.yaml"
    if not file.exists():
        return
    earlier = loading.parse(read_yaml(file), str(file)).as_dict()
    changed = identity.differences(earlier, run.config.as_dict())
    if changed:
        raise UserError(
            f"{run.folder} holds a run of another configuration: {'; '.join(changed)}. Set it "
            "back in the study's file or by key=value, give another --output, or remove such runs"
        )


def check_inputs(runs: list[StudyRun]) -> None:
    """Check each entry's data, that they suit its network, and that MLflow can take its runs."""
    from tetdist.data.splits import open_data
    from tetdist.distributed.world import ALONE
    from tetdist.network import make_model

    for uri in {run.config.tracking_uri for run in runs}:
        if uri is not None:
            check_store(uri)
    # All seeds of an entry have the same data and network, so checking one is enough.
    for run in {run.entry: run for run in runs}.values():
        try:
            train_index, _ = open_data(run.config, ALONE)
            make_model(run.config, train_index)
        except UserError as error:
            raise UserError(f"entries.{run.entry}: {error}") from error
