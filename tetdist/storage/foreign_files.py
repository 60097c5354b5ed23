"""Reading of untrusted weight files without executing code, and the check of all weights read."""

import argparse
import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tetdist.errors import UserError
from tetdist.storage.files import open_file
from tetdist.wording import and_more

# Usual keys of the state dict in a checkpoint, in order of preference.
_WRAPPERS = ("state_dict", "model", "model_state_dict", "net", "best_net")

_REAL = ("weight", "bias", "running_mean", "running_var")
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def read(path: Path) -> dict[str, Tensor]:
    """Read the state dict of an untrusted file, .safetensors or torch's, without executing code."""
    try:
        content = _load(path)
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        what = f"{code[1]}, which is code" if code else "something else"
        raise UserError(
            f"{path} holds more than weights ({what}) and is not read, since that could execute "
            "any code; get a plain state_dict or a .safetensors file from its author"
        ) from error
    except Exception as error:  # torch raises many kinds for damaged files
        if "TorchScript" in str(error):
            # torch's own message recommends loading the code.
            raise UserError(
                f"{path} is a TorchScript program, which is code, and is not read; get a plain "
                "state_dict or a .safetensors file from its author"
            ) from error
        text = isinstance(error, OSError | RuntimeError | ValueError) and str(error)
        reason = text.partition("\n")[0] if text else "neither torch's nor safetensors' format"
        raise UserError(f"{path} is not a readable weight file ({reason})") from error
    state = _unwrap(content)
    if state is None:
        raise UserError(
            f"{path} holds no state dict: it must be a dict of tensors, or hold one under the key "
            f"{', '.join(_WRAPPERS)}"
        )
    for prefix in ("module.", "_orig_mod.", "module."):
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    odd = [key for key, value in state.items() if not _is_plain(value)]
    if odd:
        raise UserError(
            f"{path} holds a sparse, complex, expanded or meta tensor ({odd[0]}{and_more(odd)}); "
            "save an ordinary state dict of dense, real tensors"
        )
    check_values(state, path)
    return state


def check_values(
    state: Mapping[str, Tensor], source: Path, own: Mapping[str, Tensor] | None = None
) -> None:
    """Check weights and statistics from a file; every reader of weights calls this.

    Args:
        own: The state of the model that takes them, which has the same keys; None: not known yet.

    Raises:
        UserError: They are not finite, no floating-point numbers, or a negative variance.
    """

    def refuse(bad: list[str], what: str, advice: str) -> None:
        if bad:
            raise UserError(f"{source} holds {what} (in {bad[0]}{and_more(bad)}), {advice}")

    real = [k for k in state if (k.endswith(_REAL) if own is None else own[k].is_floating_point())]
    odd = [k for k in real if state[k].dtype not in _FLOATS]
    refuse(odd, "other than floating-point numbers", "so save it again in float32")
    # A number of float64 may be infinite in the model.
    taken = {k: v if own is None else v.to(own[k].dtype) for k, v in state.items()}
    broken = [k for k, value in taken.items() if not value.isfinite().all()]
    diverged = "since its training diverged; use an earlier checkpoint"
    refuse(broken, "NaN or infinity", diverged)
    negative = [k for k in real if k.endswith("running_var") and (state[k] < 0).any()]
    refuse(negative, "a negative variance", "so it is damaged; use another checkpoint")


def _is_plain(value: Tensor) -> bool:
    """Return whether each number of a tensor is stored, so that a small file cannot expand."""
    if value.layout != torch.strided or value.is_meta or value.is_complex():
        return False
    return value.numel() * value.element_size() <= value.untyped_storage().nbytes()


def _load(path: Path) -> Any:
    open_file(path).close()  # refuses a pipe or a device, which may never end
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(str(error)) from error
    # Many training programs save their options beside the weights, as plain values in a Namespace.
    with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about a TorchScript program, which is refused below
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
