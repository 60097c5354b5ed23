"""Branches of a tensor, whose gradients one kernel adds.

Autograd adds the gradients of a tensor's branches one by one, each in a kernel that reads two
tensors and writes a third. A fused operation (fast/fused.py) returns the tensor several times
instead. Each branch takes one of these, so the operation's backward pass gets all gradients at
once. A branch that finds none left takes the tensor itself, whose gradients autograd adds.
"""

from collections.abc import Iterable

from torch import Tensor


def fork(x: Tensor, copies: Iterable[Tensor]) -> None:
    """Attach copies of a tensor, for autograd different ones, to it for its branches."""
    if copies := [*_left(x), *copies]:
        x.branches = (copies, version(x))  # type: ignore[attr-defined]  # ours


def branch(x: Tensor) -> Tensor:
    """Return a tensor for a branch of ``x``: a copy that no other branch has, or ``x``."""
    left = _left(x)
    return left.pop() if left else x


def lead_around(spikes: Tensor, current: Tensor) -> None:
    """Attach a copy of the neurons' current to their spikes, for branches around the neurons.

    It would be simpler to attach it to the current itself, but the copy refers to that, in a way
    that Python's garbage collection does not see.
    """
    spikes.current = (current, version(current))  # type: ignore[attr-defined]  # ours


def around(spikes: Tensor, current: Tensor) -> Tensor:
    """Return the current for a branch around the neurons that made the spikes of it."""
    copy, known = getattr(spikes, "current", (current, 0))
    return copy if known == version(copy) else current


def _left(x: Tensor) -> list[Tensor]:
    copies, known = getattr(x, "branches", ([], 0))
    return copies if known == version(x) else []


def version(x: Tensor) -> int:
    """Return a number that each write into a tensor changes."""
    # Tensors of inference_mode have no version counter.
    return 0 if x.is_inference() else x._version
