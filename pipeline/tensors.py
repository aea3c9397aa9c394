"""Tensors into safetensors files, and errors of disk and memory told apart from bugs."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from pipeline.errors import UsageError


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write tensors of any device. Not atomic: the caller syncs and renames.

    A full disk, a quota or a size limit, which the writer of safetensors only puts into words, is raised as OSError.
    """
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(held, path, metadata=metadata)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def find_device(named: str | torch.device | None) -> torch.device:
    """Return the device asked for, or CUDA if there is one. UsageError when it is not there."""
    wanted = named or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(wanted)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError) as error:
        cause = str(error).split("\n")[0]
        raise UsageError(
            f"device {wanted}: {cause}; pass --device cpu, or leave it out to take what is there"
        ) from None
    return found


def out_of_memory(error: RuntimeError) -> bool:
    """Whether a device's memory was too small. CUDA has an exception for it, the CPU's allocator only a text."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
