"""How many kernels an operation of torch launches on a GPU.

Computed, not measured: cuDNN and cuBLAS may take a kernel more for a workspace or a split sum, and
a list of tensors may take several.
"""

from typing import Any

# They write nothing on the device, though their schema does not call their results views.
_FREE = {
    "aten._unsafe_view",
    "aten.detach",
    "aten.lift_fresh",
    "aten.empty",
    "aten.empty_like",
    "aten.empty_strided",
    "aten.empty_permuted",
    "aten.new_empty",
    "aten.new_empty_strided",
    "aten.set_",
    "aten.resize_",
    "aten.record_stream",
    "aten.is_same_size",
    "aten.is_pinned",
}


def num_launches(function: Any, arguments: tuple[Any, ...]) -> int:
    """Kernels of one call.

    Args:
        function: The overload that is called.
        arguments: Its positional arguments.
    """
    name = str(function).rpartition(".")[0]
    if name in _FREE or not str(function).startswith(("aten.", "c10d.")) or _is_view(function):
        return 0
    if name == "aten.convolution":
        return 1 if arguments[2] is None else 2
    if name == "aten.convolution_backward":
        return sum(arguments[-1])
    return 1


def _is_view(function: Any) -> bool:
    returns = function._schema.returns
    aliases = [one.alias_info for one in returns]
    return bool(aliases) and all(alias is not None and not alias.is_write for alias in aliases)


# What torch.use_deterministic_algorithms' documentation says to raise on CUDA tensors, of what a
# network for images could call; of cumsum that of floating-point numbers.
REFUSED_IF_DETERMINISTIC = {
    "_adaptive_avg_pool2d_backward",
    "_upsample_bicubic2d_aa_backward",
    "_upsample_bilinear2d_aa_backward",
    "adaptive_max_pool2d_backward",
    "cumsum",
    "grid_sampler_2d_backward",
    "histc",
    "kthvalue",
    "median",
    "put_",
    "reflection_pad2d_backward",
    "upsample_bicubic2d_backward",
    "upsample_bilinear2d_backward",
}


def is_refused_if_deterministic(name: str, result: Any) -> bool:
    """Whether a GPU refuses an operation of that name where only deterministic ones are allowed."""
    kind = name.split(".")[1]
    return kind in REFUSED_IF_DETERMINISTIC and (kind != "cumsum" or result.is_floating_point())
