"""The configuration of a run: typed, strict, from YAML plus ``key=value`` overrides.

A configuration describes one run completely; the run folder's config.yaml holds every default.
Unknown keys, values of a wrong type or range, and settings that contradict each other raise a
`UserError` that names the dotted key.
"""

from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BeforeValidator, Field, model_validator

from tetdist.config.fields import Positive, Section, Steps
from tetdist.config.overrides import over
from tetdist.config.sections.data import DataSection
from tetdist.config.sections.loss import LossSection
from tetdist.config.sections.model import ModelSection
from tetdist.config.sections.phase import OptimizerSection, PhaseSection
from tetdist.config.sections.tracking import TrackingSection
from tetdist.config.sections.training import (
    BatchNormSection,
    BatchSection,
    EmaSection,
    SaveSection,
    SegmentsSection,
)
from tetdist.errors import WrongValue


def _recompute(value: Any) -> Any:
    """Refuse, in one sentence for all forms, what is none of them."""
    segments = value.get("timesteps") if isinstance(value, dict) and len(value) == 1 else None
    if value not in ("none", "blocks") and not (type(segments) is int and segments > 0):
        raise ValueError("must be none, blocks or {timesteps: K} with an integer K above 0")
    return value


class RunConfig(Section):
    name: str
    """Name of the run and of its folder, of letters, digits, dots, _ and -. If unset, it is the
    configuration's file name without .yaml."""
    imports: tuple[str, ...] = ()
    """Your own Python files that register models, neurons, losses, optimisers, transforms or
    trackers (docs/extending.md). Relative paths start at the configuration file's folder. The
    option --import FILE adds a file."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of all random numbers: initial weights, sample order, augmentation, dropout."""
    model: ModelSection
    data: DataSection
    batch: BatchSection
    loss: LossSection = LossSection()
    phases: Annotated[tuple[PhaseSection, ...], Field(min_length=1)]
    precision: Literal["bf16", "fp32", "tf32", "fp16", "fp64"] = "bf16"
    """Numeric precision. bf16: bfloat16 convolutions, float32 parameters; fp16: the same in
    float16, on a GPU only; fp32: all float32; tf32: fp32 with convolution inputs rounded to ten
    mantissa bits, on a GPU only; fp64: all float64, for checks."""
    batch_norm: BatchNormSection = BatchNormSection()
    execution: Literal["fused", "reference"] = "fused"
    """Implementation of norms and neurons. fused: C++ and Triton kernels; reference: the
    definitions in plain torch."""
    recompute: Annotated[
        Literal["none", "blocks"] | SegmentsSection, BeforeValidator(_recompute)
    ] = "none"
    """Recomputation of activations, to save memory (gradient checkpointing). blocks: keep only each
    block's input and recompute the rest; results stay bitwise identical. {timesteps: k}: the same
    in segments of k timesteps, for long T; batch norm then normalises each segment separately,
    so results differ."""
    gradient_clipping: Annotated[float, Field(gt=0)] | None = None
    """Limit of the whole gradient's norm (timm's clip_grad); null: no clipping."""
    ema: EmaSection = EmaSection()
    engine: Literal["deepspeed", "torch"] = "deepspeed"
    """Training engine: deepspeed, or torch, a minimal one in PyTorch with the same results."""
    zero_stage: Literal[0, 1, 2] = 0
    """DeepSpeed's ZeRO stage. 0: off; 1: the optimiser's state is divided among processes; 2:
    gradients, too."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to train on. auto: cuda if torch sees a GPU, else cpu."""
    cuda_graphs: bool = False
    """Capture each micro-batch's forward and backward pass as a CUDA graph, for micro-batches so
    small that the GPU waits for the host. Needs engine=torch and a GPU; graph memory stays reserved
    during evaluation. Not yet verified on a GPU: run tools/check_gpu.py first."""
    deterministic: bool = False
    """Use only bitwise repeatable algorithms on a GPU, which are slower. CPU algorithms are always
    repeatable."""
    max_steps: Positive | None = None
    """Number of optimiser steps after which the run ends, for a smoke test; learning rates still
    follow the phases' full length. Null: no limit."""
    log_every: Positive = 20
    """Number of optimiser steps between two lines of metrics."""
    plots: bool = True
    """Draw plots in RUN/plots at the first, the last and some other evaluations; each time takes a
    second or two."""
    reference: str | None = None
    """Name of a published ImageNet training to compare with, such as sew34. Metrics and plots show
    its accuracy after the same number of images. An unknown name's error lists all."""
    evaluate_every: Positive = 1
    """Number of epochs between two evaluations; the last epoch is always evaluated."""
    init_checkpoint: str | None = None
    """Initial weights and running statistics: a run folder (its last checkpoint), the folder of a
    checkpoint or of an export (tools/export.py), a .safetensors file (tools/convert.py makes one
    from other libraries' weights), hf:ORG/NAME[@REVISION] on the Hugging Face hub, or tetdist:NAME,
    which comes with the package. The optimiser's state is not loaded. Null: random weights."""
    start_phase: Annotated[int, Field(ge=0, le=10**6)] = 0
    """Number of the phase to begin with, counted from 0, as if the phases before it were done.
    Above 0 it needs init_checkpoint."""
    peer_timeout: Annotated[float, Field(gt=0, le=10**6)] = 600.0
    """Number of seconds without progress of one process after which all end with an error."""
    profile: Steps | None = None
    """First and last optimiser step, such as [20, 30] or 20..30, to profile on rank 0 with
    torch.profiler, which writes a trace and a table of the costliest operations to RUN/profile/.
    Results do not change, and profiling stops at the end of the epoch. Null: none."""
    resume: Literal["auto", "never", "must"] = "auto"
    """Treatment of checkpoints in the run folder. auto: resume from the newest, if any; must:
    refuse to start without one; never: refuse a folder that holds a run."""
    runs_dir: str = "runs"
    """Parent folder of the run's folder, and of MLflow's database unless tracking.uri names
    another place."""
    save: SaveSection = SaveSection()
    tracking: TrackingSection = TrackingSection()
    cluster: dict[str, Any] = {}
    """Slurm settings, such as partition, nodes, gpus_per_node and time (docs/slurm.md); only
    launch/slurm.py reads and checks them."""

    @model_validator(mode="after")
    def _refuse_contradictions(self) -> Self:
        self._check_start()
        self._check_engine()
        return self

    def _check_start(self) -> None:
        start, last = self.start_phase, len(self.phases) - 1
        if start > last:
            has = f"phases 0 to {last}" if last else "one phase, number 0"
            raise WrongValue("start_phase", f"must be at most {last}: this run has {has}")
        if start and self.init_checkpoint is None:
            raise WrongValue(
                "start_phase",
                "skips the phases before it; set init_checkpoint to the checkpoint of a run that "
                "trained them",
                start,
            )
        for number in dict.fromkeys((0, start)):
            if self.phases[number].optimizer == "continue":
                raise WrongValue(
                    f"phases.{number}.optimizer",
                    "needs a phase before it in the same run, whose optimiser goes on, and this "
                    f"run begins with phase {number}; give the optimiser itself",
                    "continue",
                )

    def _check_engine(self) -> None:
        if self.precision == "fp64" and self.engine != "torch":
            raise WrongValue("precision", "DeepSpeed does not train in fp64; set engine=torch, too")
        if self.zero_stage and self.engine != "deepspeed":
            needed = "needs DeepSpeed; set engine=deepspeed or zero_stage=0"
            raise WrongValue("zero_stage", needed, self.zero_stage)
        if self.zero_stage and self.precision == "fp16":
            raise WrongValue(
                "precision",
                "needs zero_stage=0 (DeepSpeed never lowers its loss scale at stages 1 and 2); "
                "set zero_stage=0, or precision=bf16, which works with all stages",
                self.precision,
            )
        if self.cuda_graphs and self.engine != "torch":
            raise WrongValue(
                "cuda_graphs",
                f"needs engine=torch: engine={self.engine} does work on the host in each "
                "micro-batch, which a graph cannot repeat; set engine=torch, or cuda_graphs=false",
            )

    def loss_of(self, phase: PhaseSection) -> LossSection:
        """Return a phase's loss: the run's, with the keys that the phase sets."""
        own = phase.loss.model_dump(exclude_unset=True)
        return LossSection.model_validate(over(self.loss.model_dump(), own, "phases"))

    def losses(self) -> list[LossSection]:
        """Return the losses of all phases in order, without repetitions."""
        return [loss for loss, _ in groupby(map(self.loss_of, self.phases))]

    def optimizer_of(self, number: int) -> OptimizerSection:
        """Return a phase's optimiser, which may be that of a phase before."""
        section = self.phases[number].optimizer
        return self.optimizer_of(number - 1) if section == "continue" else section

    @property
    def run_dir(self) -> Path:
        return Path(self.runs_dir) / self.name

    @property
    def tracking_uri(self) -> str | None:
        if not self.tracking.mlflow:
            return None
        if self.tracking.uri:
            return self.tracking.uri
        return f"sqlite:///{(Path(self.runs_dir) / 'mlflow.db').resolve()}"

    def as_dict(self) -> dict[str, Any]:
        """Plain nested dictionaries and lists, as in YAML."""
        return self.model_dump(mode="json")

    def as_yaml(self) -> str:
        return yaml.safe_dump(self.as_dict(), sort_keys=False)
