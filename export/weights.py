"""Weights in files → a module: read without running what a file may hold, checked key by key, loaded without a copy."""

import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..messages import one_line, printable, some

State = dict[str, Tensor]


def read_weights(files: Sequence[Path], dtype: torch.dtype | None = None) -> State:
    """The tensors of `.safetensors` files, or of pickles (`.bin`, `.ckpt`, `.pth`, `.pt`) that hold only weights.

    They are mapped into memory where the format allows it: what is never used is never read.

    Args:
        files: one file, or the shards of one module.
        dtype: what the weights will be: those of a `.safetensors` in another type are read and converted one by one, so
            that the file is never in memory as a whole.

    Raises:
        UserError: a file is missing, cut off, or holds something else, or two files hold the same weight.
    """
    state: State = {}
    for file in files:
        read = _read(file, dtype)
        if twice := state.keys() & read.keys():
            earlier = ", ".join(printable(f.name, 80) for f in files[: files.index(file)][:3])
            raise UserError(
                f"{some(twice)} {'stands' if len(twice) == 1 else 'stand'} in {printable(file)} and in {earlier}: the "
                "shards do not belong together; download them again"
            )
        state |= read
    return state


def read_pickle(file: Path) -> Any:
    """What a pickle holds, by PyTorch's unpickler that makes tensors and plain containers only.

    Raises:
        UserError: As `read_weights`.
    """
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as e:
        if "mmap can only be used" not in str(e):
            raise _unreadable(file, e) from None
    except Exception as e:  # the unpickler raises whatever a damaged file makes it raise
        raise _unreadable(file, e) from None
    try:  # the format of PyTorch before 1.6, which cannot be mapped
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as e:
        raise _unreadable(file, e) from None


def make_empty(make: Callable[[], nn.Module]) -> nn.Module:
    """A module without its weights: parameters on the meta device, buffers real."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        return make()


def check_weights(module: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Whether these are the weights of `module`: every one of them, of its own shape, and no others.

    Raises:
        UserError: weights are missing, left over or of another shape; the message counts and names them.
    """
    wanted = module.state_dict()
    missing = [key for key in wanted if key not in state]
    extra = [key for key in state if key not in wanted]
    if missing:
        found = f", {some(extra)} {'is' if len(extra) == 1 else 'are'} there instead" if extra else ""
        raise UserError(
            f"{what} lacks {len(missing)} of its {len(wanted)} weights: {some(missing)}{found}; "
            "it is of another architecture than its config.json says, or incomplete"
        )
    if extra:
        count = "a weight" if len(extra) == 1 else f"{len(extra)} weights"
        raise UserError(
            f"{what} has {count} that its config.json knows nothing of: {some(extra)}; is it of another architecture?"
        )
    for key, tensor in wanted.items():
        if tensor.shape != state[key].shape:
            raise UserError(
                f"{what} has {key} of shape {list(state[key].shape)}, its config.json says {list(tensor.shape)}: "
                "they do not belong together"
            )
        if tensor.is_floating_point() != state[key].is_floating_point() or state[key].is_complex():
            raise UserError(
                f"{what} has {key} as {str(state[key].dtype).removeprefix('torch.')}: quantized weights cannot be "
                "exported, get them in float32 or float16"
            )


def check_finite(state: Mapping[str, Tensor], what: str) -> None:
    """Whether every number is one. Reads all of them: 0.3 s a gigabyte in float32 and 0.8 s in float16 from memory.

    Raises:
        UserError: a weight has NaN or Inf; the message names it.
    """
    for key, tensor in state.items():
        if tensor.is_floating_point() and tensor.numel():
            # Without a copy; NaN makes both ends NaN. float8 has no comparison of its own.
            ends = torch.aminmax(tensor if tensor.element_size() > 1 else tensor.float())
            if not bool(torch.isfinite(ends.min.float() + ends.max.float())):
                raise UserError(f"{what} has NaN or Inf in {printable(key)}: it is damaged, get it again")


def load_weights(module: nn.Module, state: Mapping[str, Tensor], what: str, dtype: torch.dtype) -> nn.Module:
    """Gives `module`, made empty, its weights.

    Tensors of `dtype` are taken as they are, mapped files included; the others are converted one by one.

    Returns:
        `module`, for inference.

    Raises:
        UserError: As `check_weights`.
    """
    check_weights(module, state, what)
    typed = {key: t.to(dtype) if t.is_floating_point() else t for key, t in state.items()}
    module.load_state_dict(typed, assign=True)
    # What is not saved (buffers that are computed) follows; diffusers' own `to` has something to say of every call.
    return nn.Module.to(module, dtype).eval().requires_grad_(False)


def require_plain(tensor: Tensor, key: str, file: Path) -> None:
    """Checks that a pickle's tensor is dense, contiguous in memory and on the CPU.

    Raises:
        UserError: the tensor has another form.
    """
    odd = tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested or tensor.device.type != "cpu"
    if odd or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise UserError(f"{printable(file)} holds {printable(key)} in a form that is no plain tensor: get another")


def _read(file: Path, dtype: torch.dtype | None) -> State:
    if not file.is_file():
        raise UserError(f"there is no {printable(file)}: check the path, or download it again")
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        try:
            state: State = load_file(file)
            for key, tensor in state.items() if dtype else ():
                if tensor.is_floating_point() and tensor.dtype != dtype:
                    state[key] = _converted(file, key, dtype)
        except Exception as e:  # safetensors' own exceptions and the file system's share no base class
            raise _unreadable(file, e) from None
        return state
    content = read_pickle(file)
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    named = content.items() if isinstance(content, dict) else ()
    tensors = {key: t for key, t in named if isinstance(key, str) and isinstance(t, Tensor)}
    if not tensors:
        raise UserError(f"{printable(file)} holds no weights: a table of tensors is expected")
    for key, tensor in tensors.items():
        require_plain(tensor, key, file)
    return tensors


def _converted(file: Path, key: str, dtype: torch.dtype | None) -> Tensor:
    """Mapped by itself: what was read of a mapping stays in memory for as long as any of its tensors lives."""
    from safetensors import safe_open

    with safe_open(file, "pt") as content:
        tensor: Tensor = content.get_tensor(key).to(dtype)
    return tensor


def _unreadable(file: Path, error: Exception) -> UserError:
    if isinstance(error, pickle.UnpicklingError) and "weights_only" in str(error).lower() and _is_archive(file):
        return UserError(
            f"{printable(file)} holds more than weights, code that would run: it is not loaded; "
            "get a .safetensors of it"
        )
    return UserError(
        f"{printable(file)} is cut off or damaged, or is no file of weights ({one_line(error, 120)}): download it again"
    )


def _is_archive(file: Path) -> bool:
    """Whether a pickle's container is whole: what cannot be read then is what it holds."""
    import zipfile

    return zipfile.is_zipfile(file) or file.read_bytes()[:1] == b"\x80"
