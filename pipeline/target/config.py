"""What a target's config decides: which transformers class loads it, and whether a quantised one can be loaded here.

transformers needs a package for each method of quantising, and reports missing ones one at a time, when loading; here
they are named before any work. Layers may be quantised in any way that it supports; embedding and LM head have to be
dense, since a draft shares them. Only `check_quantised` needs torch: all else works where it cannot be imported.
"""

import json
from importlib.util import find_spec
from pathlib import Path

import transformers
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from pipeline.errors import UsageError, first_line, refuse_limit
from pipeline.target.files import check_config
from pipeline.target.weights import safetensors_header, weight_files

# By the auto class that loads a target with its LM head: the model types it knows.
LOADERS = {
    "AutoModelForCausalLM": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "AutoModelForImageTextToText": MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
}
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


def load_config(folder: Path, model: str = "") -> PreTrainedConfig:
    """Return the config of a target, which errors call `model`. UsageError where transformers does not know it."""
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        refuse_limit(folder, error)
        raise UsageError(
            f"{model or folder}: transformers {transformers.__version__} does not know this model "
            f"({first_line(error, 200)}); a newer one may, and code that comes with a model is never run"
        ) from error


def loader_of(config: PreTrainedConfig, model: str) -> str:
    """Return the name of the class that loads a target with its LM head. UsageError where there is none."""
    found = next((name for name, types in LOADERS.items() if config.model_type in types), None)
    if found is None:
        raise UsageError(
            f"{model} is a {config.model_type}, which transformers has no language model with an LM head for; "
            "a target is a decoder that writes text"
        )
    return found


def loader_class(config: PreTrainedConfig, model: str) -> type:
    """Return the class that loads a target with its LM head. UsageError where there is none."""
    return getattr(transformers, loader_of(config, model))


def check_known(model: str, folder: Path) -> None:
    """Raise UsageError, before any work, for a target whose config shows that it cannot be loaded."""
    check_config(folder)
    loader_of(load_config(folder, model), model)


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
    from transformers.quantizers.auto import AutoHfQuantizer  # imports torch

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
            if name == "__metadata__" or not any(f".{part}" in f".{name}" for part in HEAD_NAMES):
                continue
            if name.rpartition(".")[2] not in ("weight", "bias") or entry["dtype"] not in DENSE:
                raise UsageError(
                    f"{folder}: its embedding or LM head is quantised ({name}, {entry['dtype']}), and a draft shares "
                    f"them as they are; take a target that leaves them dense, {USE_ORIGINAL}"
                )
