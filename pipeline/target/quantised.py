"""Checks, before any work, that a quantised target can be loaded here, and names the packages to install.

transformers needs a package for each method, and reports missing ones one at a time, when loading. Layers may be
quantised in any way that it supports; embedding and LM head have to be dense, since a draft shares them.
"""

import json
from importlib.util import find_spec
from pathlib import Path

from transformers import PreTrainedConfig
from transformers.quantizers.auto import AutoHfQuantizer

from pipeline.errors import UsageError, first_line
from pipeline.target.files import safetensors_header, weight_files

# By method: the packages to install, and the module of each, to look whether it is installed.
PACKAGES: dict[str, dict[str, str]] = {
    "aqlm": {"aqlm[gpu,cpu]": "aqlm", "accelerate": "accelerate"},
    "auto-round": {"auto-round": "auto_round"},
    "awq": {"gptqmodel": "gptqmodel", "accelerate": "accelerate"},
    "bitnet": {"accelerate": "accelerate"},
    "bitsandbytes": {"bitsandbytes": "bitsandbytes", "accelerate": "accelerate"},
    "compressed-tensors": {"compressed-tensors": "compressed_tensors"},
    "eetq": {"kernels": "kernels", "accelerate": "accelerate"},
    "fbgemm_fp8": {"fbgemm-gpu": "fbgemm_gpu", "accelerate": "accelerate"},
    "fp8": {"accelerate": "accelerate"},
    "gptq": {"optimum": "optimum", "gptqmodel": "gptqmodel", "accelerate": "accelerate"},
    "hqq": {"hqq": "hqq", "accelerate": "accelerate"},
    "mxfp4": {"accelerate": "accelerate"},
    "mxfp8": {"accelerate": "accelerate"},
    "quanto": {"optimum-quanto": "optimum.quanto", "accelerate": "accelerate"},
    "quark": {"amd-quark": "quark"},
    "torchao": {"torchao": "torchao"},
    "vptq": {"vptq": "vptq", "accelerate": "accelerate"},
}
DENSE = ("F32", "F16", "BF16")
HEAD_NAMES = ("lm_head.", "embed_tokens.", "embed_in.", "wte.", "embed_out.")  # in the names of LM heads and embeddings
USE_ORIGINAL = "or name the model as it was before it was quantised"


def quantised_by(config: PreTrainedConfig) -> str | None:
    """Return a target's quantisation method, as its config names it; None for a target that is not quantised."""
    config_entry = getattr(config, "quantization_config", None) or getattr(
        config.get_text_config(), "quantization_config", None
    )
    if not config_entry:
        return None
    if not isinstance(config_entry, dict):
        config_entry = config_entry.to_dict() if hasattr(config_entry, "to_dict") else {}
    method = config_entry.get("quant_method")
    if method is None and (config_entry.get("load_in_4bit") or config_entry.get("load_in_8bit")):
        method = "bitsandbytes"
    return str(getattr(method, "value", method))


def check_quantised(folder: Path, config: PreTrainedConfig) -> None:
    """Raise UsageError for a quantised target that cannot be loaded here, or whose head or embedding is not dense.

    A missing GPU is reported only when the target is loaded, since a plan may be made on another machine.
    """
    method = quantised_by(config)
    if method is None:
        return
    _check_head_dense(folder)
    config_entry = getattr(config, "quantization_config", None) or config.get_text_config().quantization_config
    try:
        AutoHfQuantizer.from_config(config_entry, pre_quantized=True, trust_remote_code=False).validate_environment(
            device_map=None, weights_only=True, dtype=None
        )
    except (ImportError, NameError) as error:  # NameError: from a package that is installed in part
        raise missing_package(folder, method, error) from error
    except RuntimeError as error:  # no GPU, which is reported when the target is loaded
        if {*_missing_packages(method)} - {"accelerate"}:
            raise missing_package(folder, method, error) from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UsageError(
            f"{folder} is quantised ({method[:40]}) in a way that this transformers cannot load "
            f"({first_line(error, 200)}); take a newer one, {USE_ORIGINAL}"
        ) from error


def missing_package(folder: Path | str, method: str, error: Exception) -> UsageError:
    """Return the error for a missing package, with one command that installs all that the method needs."""
    needed = _missing_packages(method) or PACKAGES.get(method)
    install = f"`pip install {' '.join(needed)}`" if needed else "install what is named"
    return UsageError(
        f"{folder} is quantised ({method[:40]}), and what loads it is not here ({first_line(error, 200)}); {install}, "
        f"{USE_ORIGINAL}"
    )


def _missing_packages(method: str) -> list[str]:
    """Return the packages of a method that are not installed."""
    return [package for package, module in PACKAGES.get(method, {}).items() if not _is_installed(module)]


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of a package inside one that is absent
        return False


def _check_head_dense(folder: Path) -> None:
    """Raise UsageError for a target whose embedding or LM head is quantised, as its files show."""
    for path in weight_files(folder):
        for name, entry in json.loads(safetensors_header(path)).items():
            if name == "__metadata__" or not any(
                part in f".{name}" for part in (f".{shared}" for shared in HEAD_NAMES)
            ):
                continue
            if name.rpartition(".")[2] not in ("weight", "bias") or entry["dtype"] not in DENSE:
                raise UsageError(
                    f"{folder}: its embedding or LM head is quantised ({name}, {entry['dtype']}), and a draft shares "
                    f"them as they are; take a target that leaves them dense, {USE_ORIGINAL}"
                )
