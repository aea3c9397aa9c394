"""Write safetensors files, view states as stored, choose a dtype or a device, recognise out-of-memory errors, and draw
tokens by inverse CDF."""

import contextlib
import ctypes
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from pipeline.errors import RoomError, UsageError, first_line

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h
STAGED_BYTES = 64 << 10  # of pageable memory, which CUDA copies aside without a wait


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write tensors of any device to a safetensors file. Not atomic: the caller syncs and renames.

    Raises OSError for a full disk, a quota or a size limit, which safetensors reports only in an error's text.
    """
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(on_cpu, path, metadata=metadata)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def as_stored(states: Tensor) -> np.ndarray:
    """View a CPU tensor of states as the stored array: uint16 bits of bfloat16, or float32."""
    return states.view(torch.int16).numpy().view(np.uint16) if states.dtype == torch.bfloat16 else states.numpy()


def as_states(stored: np.ndarray) -> Tensor:
    """View a stored array as a tensor again; the inverse of `as_stored`."""
    if stored.dtype == np.uint16:
        return torch.from_numpy(stored.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(stored)


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype for norms, angles, softmaxes and sums: float32, or `dtype` where that is wider."""
    return torch.promote_types(dtype, torch.float32)


def product_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype that a matrix product would take this tensor in: autocast's, else its own."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype


def find_device(named: str | torch.device | None) -> torch.device:
    """Return the named device, by default CUDA if there is one, else the CPU. UsageError when it is not available."""
    wanted = named or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        cause = first_line(error, None)
        raise UsageError(
            f"device {wanted}: {cause}; pass --device cpu, or leave it out to take what is there"
        ) from None
    return device


def device_bytes(device: torch.device) -> int | None:
    """Return the memory of a GPU, None for a CPU, whose memory is others' too."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def copied_without_wait(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Return a tensor's values where `to(device, non_blocking=True)` copies them without a wait: for a GPU, a large
    one of pageable memory in pinned memory."""
    if torch.device(device).type != "cuda" or tensor.device.type != "cpu" or tensor.nbytes <= STAGED_BYTES:
        return tensor
    return tensor if tensor.is_pinned() else tensor.pin_memory()


def free_cached_memory(device: torch.device) -> None:
    """Give a GPU's memory back that torch keeps for reuse, in pieces of the wrong sizes for a second try."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def keep_freed_memory(device: torch.device) -> None:
    """On a CPU, let the process keep the memory of freed tensors for the next ones of their size.

    Else the C library gives a large tensor's memory back to the system, which hands it out again page by page, each
    cleared: about a tenth of a training step's time. Only glibc has these settings.
    """
    if device.type != "cpu" or os.name != "posix":
        return
    with contextlib.suppress(AttributeError, OSError):
        settings = ctypes.CDLL(None).mallopt
        settings(M_MMAP_MAX, 0)
        settings(M_TRIM_THRESHOLD, 2**31 - 1)


def out_of_memory(error: RuntimeError) -> str:
    """Return the first line of an out-of-memory error, which for the CPU only its text shows; raises others again."""
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return first_line(error)
    raise error


@contextlib.contextmanager
def refuse_out_of_memory(what: str, remedy: str) -> Iterator[None]:
    """Raise RoomError, naming what did not fit and the remedy, where a device runs out of memory within the block."""
    try:
        yield
    except RuntimeError as error:
        raise RoomError(f"no memory on the device for {what} ({out_of_memory(error)}); {remedy}") from error


def draw(weights_NV: Tensor, uniform_N: Tensor) -> Tensor:
    """Return one token [N] a row, drawn in proportion to its weights [N, V]: where their sum passes uniform * total.

    weights: not negative, not all 0 in a row. uniform: float64 in [0, 1). A token of weight 0 is never drawn. With
    float64 sums and one number a token, a seed gives the same text on every device, up to the rounding of the
    probabilities, where `torch.multinomial` draws differently on each.
    """
    cumulative_NV = weights_NV.double().cumsum(-1)
    threshold_N1 = uniform_N.to(cumulative_NV)[:, None] * cumulative_NV[:, -1:]
    return torch.searchsorted(cumulative_NV, threshold_N1, right=True)[:, 0]


def uniforms(count: int, generator: torch.Generator) -> Tensor:
    """Return `count` uniform float64 numbers in [0, 1), one for each token to draw."""
    return torch.rand(count, dtype=torch.float64, generator=generator, device=generator.device)
