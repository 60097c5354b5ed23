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
    """Seed of everything that is drawn: initial weights, sample order, augmentation, dropout."""
    model: ModelSection
    data: DataSection
    batch: BatchSection
    loss: LossSection = LossSection()
    phases: Annotated[tuple[PhaseSection, ...], Field(min_length=1)]
    precision: Literal["bf16", "fp32", "tf32", "fp16", "fp64"] = "bf16"
    """bf16, fp16 (GPU only): of convolutions, beside parameters in float32. tf32 (GPU only): fp32
    with the inputs of convolutions rounded to ten bits. fp64: for checks."""
    batch_norm: BatchNormSection = BatchNormSection()
    execution: Literal["fused", "reference"] = "fused"
    """reference runs the plain definitions of normalisation and neurons."""
    recompute: Literal["none", "blocks"] | SegmentsSection = "none"
    """Activation memory. blocks: keep each block's input only, compute the rest again; the same
    result to the bit. {timesteps: k}: the same over segments of k timesteps, for long T; batch
    norm then normalises each segment by itself, which is another network in training."""
    gradient_clipping: Annotated[float, Field(gt=0)] | None = None
    """Largest norm of the gradient, or what clip_mode says; null: it is not clipped."""
    clip_mode: Literal["norm", "value", "agc"] = "norm"
    """Quantity that gradient_clipping limits. norm: norm of the whole gradient; value: each
    element; agc (adaptive): norm of each filter's gradient, relative to the weights' norm,
    except for the classifier; 0.01, for instance."""
    ema: EmaSection = EmaSection()
    non_finite_limit: Positive = 5
    """Steps in a row without a finite gradient after which the run ends; until then each of them
    changes nothing and is counted."""
    engine: Literal["deepspeed", "torch"] = "deepspeed"
    """torch: a few lines of plain torch, the check on DeepSpeed's result."""
    zero_stage: Literal[0, 1, 2] = 0
    """DeepSpeed's ZeRO. 1: the optimiser's state is divided among processes; 2: gradients, too."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where torch sees a GPU, else cpu."""
    cuda_graphs: bool = False
    """Have a GPU start a micro-batch's kernels, forward and backward, all at once: for small
    micro-batches, where it would wait for the host. With engine=torch. What a micro-batch needs
    stays reserved between them, beside what an evaluation takes. Shown right on no GPU yet: run
    tools/check_gpu.py there first."""
    deterministic: bool = False
    """Only algorithms that repeat to the bit on a GPU; slower. (On a CPU they all do.)"""
    max_steps: Positive | None = None
    """End after so many optimiser steps in all, for a try; schedules stay those of the phases."""
    log_every: Positive = 20
    """Optimiser steps between two lines of metrics."""
    plots: bool = True
    """Draw the pictures in RUN/plots, which takes a second or two at the first evaluation, at the
    last and now and then between."""
    reference: str | None = None
    """A published training on ImageNet, such as sew34: its accuracy after as many images is in the
    metrics and plots beside each evaluation, and a run that is far behind warns. More by
    tools/compare_runs.py --reference; an unknown name lists those that there are."""
    evaluate_every: Positive = 1
    """Epochs between two evaluations; the last epoch is always evaluated."""
    init_checkpoint: str | None = None
    """Weights and running statistics to begin with: a run folder (its last checkpoint), the folder
    of a checkpoint or an export, a .safetensors file (tools/convert.py makes one of other
    libraries' weights), or hf:ORG/NAME[@REVISION]. The optimiser starts anew."""
    start_phase: Annotated[int, Field(ge=0)] = 0
    """Begin with this phase, from init_checkpoint, as if those before it were done."""
    peer_timeout: Annotated[float, Field(gt=0)] = 600.0
    """Seconds without any progress of a process after which all others end."""
    record_samples: bool = False
    """Debugging aid: write ids and checksums of the samples of each step to samples-RANK.jsonl."""
    profile: ProfileSection | None = None
    """Time the operations of some steps on rank 0, by torch.profiler: RUN/profile/ gets a trace and
    a table of the dearest. Results stay the same."""
    resume: Literal["auto", "never", "must"] = "auto"
    """Treatment of checkpoints in the run folder: auto resumes if there are any."""
    runs_dir: str = "runs"
    """Folder of the run's folder, and of MLflow's database unless tracking.uri says another."""
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
