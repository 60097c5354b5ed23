"""Reads somebody's file of weights without executing any of it."""

import argparse
import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tetdist.errors import UserError
from tetdist.storage.files import open_file
from tetdist.wording import and_more

# The keys under which training programs put a state dict, in the order of preference.
_WRAPPERS = ("state_dict", "model", "model_state_dict", "net", "best_net")


def read(path: Path) -> dict[str, Tensor]:
    """The state dict in somebody's file, .safetensors or torch's, without executing any of it.

    Raises:
        UserError: It cannot be read so, or holds no state dict.
    """
    try:
        content = _load(path)
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f"{found[1]}, which is code" if found else "something else"
        raise UserError(
            f"{path} holds more than weights ({what}) and is not read, since that could execute "
            "anything; ask its author for a plain state_dict or a .safetensors file"
        ) from error
    except Exception as error:  # of damaged bytes torch's reader may raise anything
        if "TorchScript" in str(error):
            # torch's own message advises to load the code.
            raise UserError(
                f"{path} is a TorchScript program, which is code, and is not read; ask its author "
                "for a plain state_dict or a .safetensors file"
            ) from error
        says = isinstance(error, OSError | RuntimeError | ValueError) and str(error)
        reason = says.partition("\n")[0] if says else "neither torch's nor safetensors' format"
        raise UserError(f"{path} is not a readable file of weights ({reason})") from error
    state = _unwrap(content)
    if state is None:
        raise UserError(
            f"{path} holds no state dict: neither tensors by name, nor that under "
            f"{', '.join(_WRAPPERS)}"
        )
    for prefix in ("module.", "_orig_mod.", "module."):
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    odd = [key for key, value in state.items() if not _is_plain(value)]
    if odd:
        raise UserError(
            f"{path} holds other than plain numbers (in {odd[0]}{and_more(odd)}): sparse, complex, "
            "expanded from fewer values or without values; save it as an ordinary state dict"
        )
    broken = [key for key, value in state.items() if not value.isfinite().all()]
    if broken:
        raise UserError(
            f"{path} holds numbers that are not finite (in {broken[0]}{and_more(broken)}): its "
            "training went wrong; take an earlier file"
        )
    return state


def _is_plain(value: Tensor) -> bool:
    """Return whether a tensor has each of its numbers stored, so that it is no larger than its file
    seems."""
    if value.layout != torch.strided or value.is_meta or value.is_complex():
        return False
    return value.numel() * value.element_size() <= value.untyped_storage().nbytes()


def _load(path: Path) -> Any:
    open_file(path).close()  # a pipe or a device would be read without an end
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(str(error)) from error
    # Many training programs save their options beside the weights: plain values in a class without
    # behaviour.
    with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a TorchScript program, which is refused below
        return torch.load(path, map_location="cpu", weights_only=True)


def _unwrap(content: Any) -> dict[str, Tensor] | None:
    if not isinstance(content, Mapping):
        return None
    for wrapper in _WRAPPERS:
        if isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
            break
    is_state = content and all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()
    )
    return dict(content) if is_state else None
