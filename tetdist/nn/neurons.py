"""Integrate-and-fire neurons over time and their surrogate gradients: the definition.

One timestep of a neuron with membrane ``u``, input current ``I`` and threshold ``V_th``
(TET, Deng et al., ICLR 2022, equations 1 to 3):

    u[t] = decay * u_after_reset[t-1] + I[t]        (decay = 1: IF; decay < 1: LIF)
    s[t] = 1 if u[t] - V_th > 0 else 0              (a membrane at the threshold is silent, unless
                                                     fires_at_threshold: >= 0)
    u_after_reset[t] = u[t] * (1 - s[t])            (hard reset, to 0)
                     = u[t] - V_th * s[t]           (soft reset)

The spike has no useful derivative with respect to ``x = u - V_th``; the backward pass uses a
surrogate instead (surrogates.py). The fused path (fused.py) computes the same and is tested against
this file.

The files of neurons import torch where they need more than a tensor's methods, because the check
of a configuration reads only the options.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args, get_origin, get_type_hints

from tetdist.errors import UserError, WrongValue
from tetdist.plugins import Registry

if TYPE_CHECKING:
    from torch import Tensor

SurrogateName = Literal["triangle", "atan", "sigmoid", "rectangle"]


def spike(x: Tensor, config: LIF) -> Tensor:
    """Return spikes (0 or 1, in x's type) for ``x = u - V_th``, with the surrogate's gradient.

    With ``spike="sigmoid"``: values between 0 and 1 with their true gradient.
    """
    if config.spike == "sigmoid":
        return (config.surrogate_width * x).sigmoid()
    return step(x, config.surrogate, config.surrogate_width, at_threshold=config.fires_at_threshold)


def step(x: Tensor, surrogate: SurrogateName, width: float, *, at_threshold: bool) -> Tensor:
    """Return 1 where x > 0 (``at_threshold``: x >= 0), else 0, with the surrogate's gradient."""
    from tetdist.nn.surrogates import Step

    fired: Tensor = Step.apply(x, surrogate, width, at_threshold)
    return fired


def widened(x: Tensor) -> Tensor:
    """Return floating-point numbers as at least float32."""
    return x if x.dtype.itemsize > 2 else x.float()


def run(
    current: Tensor,
    config: LIF,
    membrane: Tensor | None = None,
    decay: Tensor | float | None = None,
) -> tuple[Tensor, Tensor]:
    """Run IF or LIF neurons over time.

    Args:
        current: Input current, (T, ...), T >= 1.
        membrane: Membrane after the last reset of an earlier segment, (...); None: a neuron at rest
            (0).
        decay: Replaces the configured decay, for kinds that learn it; broadcast to (...).

    Returns:
        Spikes (T, ...) of the current's type, and the membrane after the last reset, (...).
    """

    def fire(u: Tensor) -> tuple[Tensor, Tensor]:
        s = spike(u - config.threshold, config)
        s_reset = s.detach() if config.detach_reset else s
        if config.resets_to_zero:
            return s, u * (1 - s_reset)
        return s, u - config.threshold * s_reset

    return integrate(current, membrane, config.decay if decay is None else decay, fire)


def integrate(
    current: Tensor,
    membrane: Tensor | None,
    decay: Tensor | float,
    fire: Callable[[Tensor], tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor]:
    """Run neurons over time whose membrane decays and adds the current; see `run`.

    The membrane is float32 (float64 for float64 input) for any type of current: in bfloat16 the
    decayed sum would lose the bits that decide about a spike.

    Args:
        fire: Maps membranes to spikes and the membranes after the reset.
    """
    import torch

    wide = widened(current)
    u = torch.zeros_like(current[0], dtype=wide.dtype) if membrane is None else membrane
    spikes = []
    for current_t in wide:
        s, u = fire(decay * u + current_t)
        spikes.append(s)
    return torch.stack(spikes).to(current.dtype), u


# --- kinds of neuron ------------------------------------------------------------------------------

# The kinds of neurons for `model.neuron.kind`.
NEURONS: Registry[type[NeuronConfig]] = Registry("kind of neuron", "model.neuron.kind")


def option(default: Any, doc: str, **bounds: float) -> Any:
    """Declare an option of a kind of neuron.

    Args:
        doc: Description, for the list of configuration keys.
        bounds: Bounds of the value: ``gt`` (above), ``ge`` (at least), ``lt`` (below) or ``le`` (at
            most).
    """
    assert bounds.keys() <= _BOUNDS.keys(), "bounds are gt, ge, lt and le"
    return field(default=default, metadata={"doc": doc, "bounds": bounds})


_BOUNDS: dict[str, tuple[str, Callable[[float, float], bool]]] = {
    "gt": ("above", operator.gt),
    "ge": ("at least", operator.ge),
    "lt": ("below", operator.lt),
    "le": ("at most", operator.le),
}


@dataclass(frozen=True, kw_only=True)
class NeuronConfig:
    """A kind of neuron with its options; kinds are subclasses registered in `NEURONS`.

    Raises:
        WrongValue: A value is outside its range.
    """

    # Types are checked where a configuration is read: "yes" is no bool and 1.5 no int.
    __pydantic_config__: ClassVar[dict[str, Any]] = {"strict": True, "allow_inf_nan": False}

    # True if it fires, and so has a firing rate.
    spiking: ClassVar[bool] = True
    # True if spikes at t depend only on the input up to t, so that one pass at T gives all t.
    causal: ClassVar[bool] = True
    # True if it can run over segments one after another, as recompute.timesteps needs.
    segments: ClassVar[bool] = True
    # Dimension of the samples in the membrane that `run` returns.
    sample_axis: ClassVar[int] = 0
    # Parameters of any shape, such as (T, T), which `run` gets unchanged.
    over_time: ClassVar[frozenset[str]] = frozenset()

    threshold: float = option(
        1.0, "Firing threshold V_th, in units of input current (psn kinds: initial value).", gt=0
    )

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            for bound, limit in one.metadata.get("bounds", {}).items():
                words, holds = _BOUNDS[bound]
                if not holds(value, limit):
                    raise WrongValue(one.name, f"must be {words} {limit}", f"{value:g}")
            kind = get_type_hints(type(self))[one.name]
            if get_origin(kind) is Literal and value not in get_args(kind):
                known = ", ".join(get_args(kind))
                raise WrongValue(one.name, f"must be one of {known}", repr(value))

    @property
    def binary(self) -> bool:
        """True if the neuron sends only 0 or 1."""
        return self.spiking

    @property
    def levels(self) -> int | None:
        """Outputs are multiples of ``1 / levels`` that fit into a byte; None: any numbers."""
        return 1 if self.binary else None

    @property
    def highest(self) -> int:
        """The largest output, if outputs have `levels`."""
        return 1

    @property
    def has_kernels(self) -> bool:
        """True if fused kernels exist for this kind; otherwise `run` computes everywhere."""
        return False

    def parameters(self, num_channels: int) -> dict[str, Tensor]:
        """Return the initial learnt values of a layer of C channels, besides its norm's.

        Each is (C,) or (), or of any shape if named in `over_time`.
        """
        del num_channels
        return {}

    def for_kernels(self, timesteps: int, **parameters: Tensor) -> tuple[Tensor, ...]:
        """Return the learnt values as the fused kernels take them, in the parameters' type.

        It is differentiable.
        """
        del timesteps, parameters
        return ()

    def refusal(self, timesteps: int) -> str | None:
        """Return why the neurons cannot run ``timesteps`` timesteps; None if they can."""
        del timesteps
        return None

    def run(
        self, current: Tensor, membrane: Tensor | None, **parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Run the neurons over time: the definition of this kind.

        Args:
            current: Input current, (T, B, C, H, W).
            membrane: Start that `run` returned last for the same samples; None: at rest.
            parameters: Present values of `parameters`, shaped to broadcast to a timestep of
                ``current``, or unchanged if named in `over_time`.

        Returns:
            Spikes (T, ...) in the current's type, and the start of the next segment.
        """
        raise NotImplementedError  # Each kind has its own.


def class_of(kind: str) -> type[NeuronConfig]:
    """Return the class of a kind of neuron.

    Raises:
        UserError: There is no such kind, or it does not declare its options by `option`.
    """
    cls = NEURONS[kind]
    if "__dataclass_fields__" not in vars(cls):
        raise UserError(
            f"model.neuron.kind: {cls.__name__} is not a dataclass itself; put "
            "@dataclass(frozen=True, kw_only=True) above it"
        )
    if bare := [one for one in fields(cls) if "doc" not in one.metadata]:
        name, of = bare[0].name, getattr(bare[0].type, "__name__", bare[0].type)
        raise UserError(
            f"model.neuron.kind: {name} of {cls.__name__} has no description; declare it as "
            f'{name}: {of} = neurons.option({getattr(cls, name, ...)!r}, "Description.")'
        )
    return cls


def make(
    values: Mapping[str, Any] | NeuronConfig | str | None = None,
    default: NeuronConfig | None = None,
) -> NeuronConfig:
    """Make a neuron from its kind, or a mapping of kind and options; `completed` adds the others.

    Raises:
        UserError: There is no such kind.
        ValueError, TypeError: Its options are wrong.
    """
    if isinstance(values, NeuronConfig):
        return values
    values = {"kind": values} if isinstance(values, str) else dict(values or {})
    values = completed(values, default)
    return class_of(values.pop("kind"))(**values)


def kind_of(config: NeuronConfig) -> str:
    """Return the name of a neuron's kind."""
    return next(name for name, cls in NEURONS.items() if cls is type(config))


def as_dict(config: NeuronConfig) -> dict[str, Any]:
    """Return kind and options, from which `make` makes the same neuron."""
    return {"kind": kind_of(config)} | asdict(config)


def completed(values: Mapping[str, Any], default: NeuronConfig | None = None) -> dict[str, Any]:
    """Return kind and all options; some may be given, perhaps by a version that had fewer.

    Args:
        default: Neuron with the missing values, unless ``values`` has another kind, whose defaults
            apply then; None: LIF.
    """
    own = as_dict(default or LIF())
    kind = values.get("kind", own["kind"])
    if kind != own["kind"]:
        own = as_dict(class_of(kind)()) if kind in NEURONS else {}
    return own | dict(values)


@NEURONS.register("lif")
@dataclass(frozen=True, kw_only=True)
class LIF(NeuronConfig):
    """Leaky integrate-and-fire. The defaults are the paper's; ``decay=1`` is the IF neuron."""

    decay: float = option(
        0.5,
        "Fraction of the membrane potential kept from one timestep to the next; 1: an IF neuron. "
        "With kind=plif, this is the value before training.",
        gt=0,
        le=1,
    )
    reset: Literal["hard", "soft"] = option(
        "hard", "Membrane reset after a spike. hard: to 0; soft: V_th is subtracted."
    )
    detach_reset: bool = option(
        False, "Treat the reset as a constant in the backward pass; TET's paper does not."
    )
    surrogate: SurrogateName = option(
        "triangle", "Surrogate derivative of the spike in the backward pass."
    )
    surrogate_width: float = option(
        1.0, "Surrogate's half-width (triangle, rectangle) or steepness (atan, sigmoid).", gt=0
    )
    spike: Literal["step", "sigmoid"] = option(
        "step",
        "Output of a neuron. step: a spike. sigmoid: a number between 0 and 1 with its true "
        "gradient, to measure the surrogate's effect; it needs surrogate=sigmoid, and is slower.",
    )
    fires_at_threshold: bool = option(
        False,
        "Fire also if the membrane is exactly at the threshold (u >= V_th), as in spikingjelly. "
        "This matters for whole-number inputs, such as sums of spikes.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.spike == "sigmoid" and self.surrogate != "sigmoid":
            raise WrongValue(
                "spike",
                f"needs surrogate=sigmoid, not {self.surrogate}; set that, too",
            )
        if self.spike == "sigmoid" and self.fires_at_threshold:
            raise WrongValue("fires_at_threshold", "needs spike=step; set it to false")

    @property
    def resets_to_zero(self) -> bool:
        return self.reset == "hard"

    @property
    def binary(self) -> bool:
        return self.spike == "step"

    @property
    def has_kernels(self) -> bool:
        # A subclass is another neuron, which the kernels do not know.
        return type(self) is LIF and self.spike == "step"

    def run(
        self, current: Tensor, membrane: Tensor | None, **parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        return run(current, self, membrane, **parameters)


@NEURONS.register("relu")
@dataclass(frozen=True, kw_only=True)
class ReLU(NeuronConfig):
    """``max(0, I)`` at each timestep separately, in place of neurons.

    At T=1 this gives the ReLU network whose weights can initialise a spiking one.
    """

    spiking: ClassVar[bool] = False

    def run(
        self, current: Tensor, membrane: Tensor | None, **parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        del membrane, parameters
        return current.relu(), current.new_zeros(current.shape[1:])
