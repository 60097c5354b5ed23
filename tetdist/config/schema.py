"""The configuration of a run: typed, strict, from YAML plus ``key=value`` overrides.

A configuration describes one run completely; every default is written out in the run folder's
config.yaml. Keys that do not exist, values of the wrong type or range and settings that
contradict each other end in a `UserError` that names the dotted key.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field

from tetdist.config.fields import Positive, Section
from tetdist.config.sections.data import DataSection
from tetdist.config.sections.loss import LossSection
from tetdist.config.sections.model import ModelSection
from tetdist.config.sections.phase import PhaseSection
from tetdist.config.sections.tracking import TrackingSection
from tetdist.config.sections.training import (
    BatchNormSection,
    BatchSection,
    EmaSection,
    ProfileSection,
    SaveSection,
    SegmentsSection,
)


class RunConfig(Section):
    name: str
    """Name of the run and its folder, of letters, digits and . _ -; default: the file's name."""
    imports: tuple[str, ...] = ()
    """Python files of your own, beside the configuration, that register models, neurons, losses,
    optimisers, transforms or trackers; docs/extending.md. --import FILE adds one."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of all random numbers: initial weights, sample order, augmentation, dropout."""
    model: ModelSection
    data: DataSection
    batch: BatchSection
    loss: LossSection = LossSection()
    phases: Annotated[tuple[PhaseSection, ...], Field(min_length=1)]
    precision: Literal["bf16", "fp32", "tf32", "fp16", "fp64"] = "bf16"
    """Numeric precision. bf16, fp16 (GPU only): for convolutions, with float32 parameters. fp32.
    tf32 (GPU only): fp32 whose convolutions round their inputs to ten bits. fp64: for checks."""
    batch_norm: BatchNormSection = BatchNormSection()
    execution: Literal["fused", "reference"] = "fused"
    """Implementation of norms and neurons. fused: C++ and Triton kernels; reference: the
    definitions in plain torch."""
    recompute: Literal["none", "blocks"] | SegmentsSection = "none"
    """Activation memory (gradient checkpointing). blocks: keep each block's input only and compute
    the rest again; results stay bitwise identical. {timesteps: k}: the same over segments of k
    timesteps, for long T; batch norm then normalises each segment by itself, which trains another
    network."""
    gradient_clipping: Annotated[float, Field(gt=0)] | None = None
    """Limit of the gradient's norm, or of what clip_mode names; null: no clipping."""
    clip_mode: Literal["norm", "value", "agc"] = "norm"
    """Quantity that gradient_clipping limits. norm: norm of the whole gradient; value: each
    element; agc (adaptive): each filter's gradient norm relative to its weights' norm, except in
    the classifier (0.01, for instance). timm's clip_mode."""
    ema: EmaSection = EmaSection()
    non_finite_limit: Positive = 5
    """Number of steps in a row without a finite gradient after which the run ends. Such a step
    changes nothing and is counted."""
    engine: Literal["deepspeed", "torch"] = "deepspeed"
    """Training engine: deepspeed, or torch, a minimal one in PyTorch with the same results."""
    zero_stage: Literal[0, 1, 2] = 0
    """DeepSpeed's ZeRO stage. 1: the optimiser's state is divided among processes; 2: gradients,
    too."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to train on. auto: cuda if torch sees a GPU, else cpu."""
    cuda_graphs: bool = False
    """Capture each micro-batch's forward and backward pass as a CUDA graph, for micro-batches so
    small that the GPU waits for the host. Needs engine=torch and a GPU; graph memory stays reserved
    during evaluation. Not yet verified on a GPU: run tools/check_gpu.py first."""
    deterministic: bool = False
    """Use only algorithms that are bitwise repeatable on a GPU, which are slower; those on a CPU
    always are."""
    max_steps: Positive | None = None
    """Number of optimiser steps after which the run ends, for a smoke test; schedules stay those of
    the phases. Null: no limit."""
    log_every: Positive = 20
    """Number of optimiser steps between two lines of metrics."""
    plots: bool = True
    """Draw plots in RUN/plots: a second or two at the first and last evaluation and at some
    between."""
    reference: str | None = None
    """Name of a published ImageNet training, such as sew34, to compare with: its accuracy after as
    many images stands beside each evaluation in metrics and plots, and a run far below it warns. An
    unknown name lists those known; tools/compare_runs.py --reference shows more."""
    evaluate_every: Positive = 1
    """Number of epochs between two evaluations; the last epoch is always evaluated."""
    init_checkpoint: str | None = None
    """Initial weights and running statistics: a run folder (its last checkpoint), the folder of a
    checkpoint or an export, a .safetensors file (tools/convert.py makes one from other libraries'
    weights), or hf:ORG/NAME[@REVISION]. The optimiser starts anew. Null: random weights."""
    start_phase: Annotated[int, Field(ge=0)] = 0
    """Phase to begin with, from init_checkpoint, as if the phases before it were done."""
    peer_timeout: Annotated[float, Field(gt=0)] = 600.0
    """Time in seconds without progress of a process after which all others end."""
    record_samples: bool = False
    """Debugging aid: write ids and checksums of the samples of each step to samples-RANK.jsonl."""
    profile: ProfileSection | None = None
    """Profile of some steps on rank 0 by torch.profiler: RUN/profile/ gets a trace and a table of
    the costliest operations. Results stay the same. Null: none."""
    resume: Literal["auto", "never", "must"] = "auto"
    """Treatment of checkpoints in the run folder. auto: resume if there are any; must: refuse to
    start without one; never: refuse a folder that holds a run."""
    runs_dir: str = "runs"
    """Folder that holds the run's folder, and MLflow's database unless tracking.uri names
    another."""
    save: SaveSection = SaveSection()
    tracking: TrackingSection = TrackingSection()
    cluster: dict[str, Any] = {}
    """Settings of launch/slurm.py, which checks them: partition, nodes, gpus_per_node, time, ..."""

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


def phase_image_sizes(config: RunConfig, phase: PhaseSection) -> tuple[int, int]:
    """Training images' size in a phase's first epoch and in its last."""
    first = phase.image_size or config.data.image_size
    return first, phase.final_image_size or first
