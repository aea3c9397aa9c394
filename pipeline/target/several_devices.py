"""A target larger than one device: a part of every layer on each of several ranks, or its layers on several devices.

Tensor parallelism: N processes hold a part of every layer each, as the model's own plan in transformers has it
(`tp_plan="auto"`), and exchange sums in every forward. A device map: one process has whole layers on several GPUs, in
host memory or on disk, from where accelerate brings them for their own forward.

A target that is on one device is spread over it alone: every function here takes it, too.
"""

import atexit
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from pipeline.errors import UsageError
from pipeline.target.files import read_text_config

DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
HEADS = ("num_attention_heads", "num_key_value_heads")
RESERVED_BYTES = 2 << 30  # of the first GPU, for the states of a micro-batch; a guess


def parse_device_map(text: str) -> str | dict[str, Any]:
    """Return a device map: one of the names in DEVICE_MAPS, or a JSON object of devices by module. UsageError."""
    if text in DEVICE_MAPS:
        return text
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict) or not all(isinstance(device, str | int) for device in found.values()):
        raise UsageError(
            f"--device-map {text[:80]}: wanted {', '.join(DEVICE_MAPS)}, or a JSON object of devices (a GPU's number, "
            "cpu, disk) by module"
        )
    return found


def check_ranks(folder: Path, loader: type, config: PreTrainedConfig, ranks: int) -> None:
    """Raise UsageError for a target that so many ranks cannot share: it has no plan for that, or an odd head is left.

    folder: the target's, which the error names. loader: the class that loads it.
    """
    with torch.device("meta"):
        model = loader.from_config(config, trust_remote_code=False)
    if not any("*" in name for name in getattr(model, "_tp_plan", None) or {}):  # of its layers, not the head alone
        raise UsageError(
            f"--tensor-parallel {ranks}: transformers {transformers.__version__} has no plan to share "
            f"{type(model).__name__} among ranks; spread its layers with --device-map auto and one process"
        )
    sizes = read_text_config(folder)
    heads = [sizes[name] for name in HEADS if isinstance(sizes.get(name), int)]
    fitting = [count for count in range(2, max(heads, default=1) + 1) if not any(size % count for size in heads)]
    if ranks not in fitting:
        counts = " or ".join(map(str, fitting)) or "no number of ranks can"
        raise UsageError(
            f"--tensor-parallel {ranks}: the target's {' and '.join(map(str, heads))} attention and key-value heads "
            f"are not shared evenly by {ranks} ranks; pass {counts}, or --device-map auto with one process"
        )


def loading_arguments(config: PreTrainedConfig, ranks: int, device_map: str | dict | None) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that spread a target; none for one device.

    ranks: of the process group, which exists. config: the target's. UsageError without what this needs.
    """
    if ranks > 1:
        return {"distributed_config": _distributed_config(ranks)}
    if device_map is None:
        return {}
    limits = {} if isinstance(device_map, dict) else {"max_memory": _max_memory(config.get_text_config())}
    folder = tempfile.mkdtemp(prefix="pipeline-offload-")  # for weights that are not as they are in the files
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return {"device_map": device_map, "offload_folder": folder, **limits}


def _distributed_config(ranks: int):
    from transformers.distributed import DistributedConfig

    try:
        return DistributedConfig(tp_size=ranks, tp_plan="auto")
    except TypeError as error:
        raise UsageError(
            f"--tensor-parallel: transformers {transformers.__version__} is too old for it; take 5.23 or newer"
        ) from error


def _max_memory(config: PreTrainedConfig) -> dict:
    """Return how much of each device the target's layers may take: the first GPU also has whole head and embedding."""
    from accelerate.utils import get_max_memory

    limits = get_max_memory()
    if 0 in limits:
        whole = 2 * config.vocab_size * config.hidden_size * 2
        limits[0] = max(limits[0] // 4, limits[0] - whole - RESERVED_BYTES)
    return limits


def input_device(model: PreTrainedModel) -> torch.device:
    """Return the device that token ids have to be on: where the embedding is computed, wherever its weights lie."""
    embed = model.get_input_embeddings()
    named = getattr(getattr(embed, "_hf_hook", None), "execution_device", None)
    return embed.weight.device if named is None else torch.device(named)


def whole_weight(module: nn.Module) -> Tensor:
    """Return a module's weight, whole and frozen.

    Of ranks that share it, all have to call this, and each gets a copy. Read from host memory or from the weights'
    files where it is offloaded, onto the CPU.
    """
    weight = module.weight.detach()
    if hasattr(weight, "full_tensor"):
        return weight.full_tensor()
    if weight.device.type != "meta":
        return weight
    from accelerate.utils import align_module_device

    with align_module_device(module, torch.device("cpu")):
        return module.weight.detach().clone()


def same_weights(embed: nn.Module, head: nn.Module, embed_VD: Tensor, head_VD: Tensor) -> bool:
    """Return whether embedding and LM head are one tied weight: by their memory, or by value where one is spread.

    embed_VD, head_VD: as `whole_weight` returns them.
    """
    storages = [weight_VD.untyped_storage()._cdata for weight_VD in (embed_VD, head_VD)]
    if storages[0] == storages[1] and embed_VD.storage_offset() == head_VD.storage_offset():
        return True
    weights = (embed.weight, head.weight)
    spread = any(hasattr(weight, "full_tensor") or weight.device.type == "meta" for weight in weights)
    several = spread or embed_VD.device != head_VD.device
    return several and embed_VD.shape == head_VD.shape and torch.equal(embed_VD, head_VD.to(embed_VD.device))
