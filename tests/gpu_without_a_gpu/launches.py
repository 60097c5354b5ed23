"""How many kernels an operation of torch launches on a GPU, by what its CUDA sources do.

Computed, not measured: cuDNN and cuBLAS may take a kernel more for a workspace or a split sum.
"""

from typing import Any

from torch import Tensor

# One launch goes through so many tensors of 1, 2, ... lists where the driver takes arguments of 4
# KB (CUDA before 12.1); newer ones take seven times as many.
TENSORS_OF_LISTS = (110, 64, 48, 36, 30)
CAT_BATCH = 128

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

# Lists of tensors that a fused or foreach kernel goes through, where it is not all of its own.
_EXTRA_LAUNCHES = {"aten._foreach_norm": 2}  # zeros for the parts, and what adds them up


def num_launches(function: Any, arguments: tuple[Any, ...], result: Any) -> int:
    """Kernels of one call.

    Args:
        function: The overload that is called.
        arguments: Its positional arguments.
        result: What it returned.
    """
    name = str(function).rpartition(".")[0]
    if name in _FREE or not str(function).startswith(("aten.", "c10d.")):
        return 0
    if name.startswith(("aten._foreach_", "aten._fused_")):
        return _of_lists(name, arguments, result) + _EXTRA_LAUNCHES.get(name, 0)
    if _is_view(function):
        return 0
    if name == "aten.cat":
        return _of_cat(arguments[0])
    if name == "aten.convolution":
        return 1 if arguments[2] is None else 2
    if name == "aten.convolution_backward":
        return sum(arguments[-1])
    return 1


def _is_view(function: Any) -> bool:
    returns = function._schema.returns
    aliases = [one.alias_info for one in returns]
    return bool(aliases) and all(alias is not None and not alias.is_write for alias in aliases)


def _of_lists(name: str, arguments: tuple[Any, ...], result: Any) -> int:
    """Launches of multi_tensor_apply, or one a tensor where the fast route is not open."""
    lists = [x for x in arguments if _are_tensors(x)]
    lists = [x for x in lists if len(x) == len(lists[0])]
    if name.startswith("aten._fused_"):
        # A step that each tensor counts is no list that the kernel goes through.
        lists = [x for x in lists if x[0].numel() == lists[0][0].numel()]
    elif _are_tensors(result) and name != "aten._foreach_norm":
        lists.append(result)
    one_type = name != "aten._foreach_copy_"
    if not all(_alike(same, one_type=one_type) for same in zip(*lists, strict=True)):
        return len(lists[0])
    most = TENSORS_OF_LISTS[min(len(lists), len(TENSORS_OF_LISTS)) - 1]
    return -(-len(lists[0]) // most)


def _are_tensors(value: Any) -> bool:
    """Whether it is a list of tensors."""
    return isinstance(value, (list, tuple)) and bool(value) and isinstance(value[0], Tensor)


def _alike(same: tuple[Tensor, ...], *, one_type: bool) -> bool:
    first = same[0]
    return all(
        (x.device, x.shape, x.stride()) == (first.device, first.shape, first.stride())
        and (x.dtype == first.dtype or not one_type)
        for x in same
    )


def _of_cat(tensors: list[Tensor]) -> int:
    if all(x.is_contiguous() and x.dtype == tensors[0].dtype for x in tensors):
        return -(-len(tensors) // CAT_BATCH)
    return len(tensors)


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
