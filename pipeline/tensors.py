"""Tensors into safetensors files, and errors of disk and memory told apart from bugs."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


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


def out_of_memory(error: RuntimeError) -> bool:
    """Whether a device's memory was too small. CUDA has an exception for it, the CPU's allocator only a text."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
