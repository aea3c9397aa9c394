"""Loads the target, a Hugging Face decoder, from files that are checked first. `trust_remote_code` is never on."""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from pipeline.errors import RoomError, UsageError, first_line, refuse_limit
from pipeline.target.config import check_quantised, load_config, loader_class, missing_package, quantised_by
from pipeline.target.files import check_config, find_target
from pipeline.target.several_devices import input_device, loading_arguments
from pipeline.target.weights import weight_files, weight_shapes
from pipeline.tensors import find_device
from pipeline.torchrun import lost_rank

READ_IN_TURN = "HF_DEACTIVATE_ASYNC_LOAD"  # transformers' variable


def load_target(
    model: str,
    *,
    device: str = "cpu",
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
    device_map: str | dict | None = None,
    ranks: int = 1,
) -> PreTrainedModel:
    """Load the target in eval mode, frozen. dtype None: float32 on a CPU, else the one its config names.

    device_map: spreads its layers over devices. ranks: of the process group, each of which calls this and gets its part
    of every layer. `pipeline/target/several_devices.py` has both.
    Its files are mapped: their pages take no memory that others need, and on a CPU a weight whose dtype is not changed
    is such pages. Beside them the host holds what is converted, less than the largest file in practice, and on a CPU
    the converted weights.
    Raises UsageError when there is no such model, it is no decoder, or its files are damaged or incomplete, RoomError
    when the device has too little memory.
    """
    folder = find_target(model, revision)
    check_config(folder)
    config = load_config(folder, model)
    loader = loader_class(config, model)
    check_quantised(folder, config)
    weight_files(folder)  # raises where other files would be loaded than are digested
    _check_size(folder, loader, config)
    device = find_device(device)
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else "auto"
    transformers_logging.disable_progress_bar()
    method = quantised_by(config)
    arguments = loading_arguments(config, ranks, device_map)
    if device.type != "cpu" and not arguments:
        # Straight to the device, a file at a time, by accelerate; some quantised models could not be moved later.
        arguments = {"device_map": {"": device}}
    try:
        with _one_weight_at_a_time(device.type == "cpu" and not arguments):
            target, report = loader.from_pretrained(
                folder,
                dtype=dtype,
                local_files_only=True,
                output_loading_info=True,
                trust_remote_code=False,
                **arguments,
            )
        if method is not None:
            _unpack(target)
    except ImportError as error:
        if method is None:
            raise
        raise missing_package(model, method, error) from error
    except torch.OutOfMemoryError as error:
        raise RoomError(
            f"{model} does not fit on {device} ({first_line(error, 200)}); use a larger device, or several: "
            "`pipeline cache-hidden` has --tensor-parallel and --device-map"
        ) from error
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        refuse_limit(model, error)
        if lost_rank(error):
            raise
        remedy = "fetch its files again"
        if method is not None:
            remedy = f"it is quantised ({method}): use a GPU that can, or name the model as it was before"
        elif device_map is not None:
            remedy = "name a device that is there for every module, or pass --device-map auto"
        raise UsageError(f"{model} cannot be loaded ({first_line(error, 200)}); {remedy}") from error
    missing_weights = sorted({*report["missing_keys"], *(str(entry[0]) for entry in report.get("mismatched_keys", ()))})
    if missing_weights:
        raise UsageError(
            f"{model}: {len(missing_weights)} weights are missing or of another shape, {missing_weights[0]} for one; "
            "fetch its files again"
        )
    return target.eval().requires_grad_(False)


@contextmanager
def _one_weight_at_a_time(asked: bool) -> Iterator[None]:
    """Within the block, transformers reads a weight when it is its turn; else four threads read ahead of it.

    On a CPU these leave every expert that becomes a part of a larger weight in memory twice: freed, but in pieces that
    the larger weights do not fit. Four threads are faster to a GPU. transformers has no argument for it.
    """
    before = os.environ.get(READ_IN_TURN)
    if asked:
        os.environ[READ_IN_TURN] = "1"
    try:
        yield
    finally:
        if asked and before is None:
            del os.environ[READ_IN_TURN]
        elif asked:
            os.environ[READ_IN_TURN] = before


@torch.no_grad()
def _unpack(target: PreTrainedModel) -> None:
    """Run a quantised target on one token: some methods unpack weights in the model's first forward, not its decoder's.

    So a kernel that cannot run here, or not in this dtype, is found now, too.
    """
    target(torch.zeros(1, 1, dtype=torch.long, device=input_device(target)), use_cache=False)


def _check_size(folder: Path, loader: type, config: PreTrainedConfig) -> None:
    """Raise UsageError when config.json describes a much larger model than its files hold, before allocating it.

    A config without sizes gets the defaults of its class, often billions of parameters, and weights that no file holds
    would be initialised at random. Quantised models are not checked, since their weights are packed.
    """
    if getattr(config, "quantization_config", None):
        return
    with torch.device("meta"):
        described = sum(weight.numel() for weight in loader.from_config(config, trust_remote_code=False).parameters())
    in_files = sum(math.prod(shape) for path in weight_files(folder) for shape in weight_shapes(path))
    if described > 2 * in_files:
        raise UsageError(
            f"{folder}: config.json describes a model of {described:,} parameters, its files hold {in_files:,}; "
            "fetch its files again"
        )
