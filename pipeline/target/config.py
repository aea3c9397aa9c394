"""Chooses the transformers class that loads a target, by its config alone. Works where torch cannot be imported."""

from pathlib import Path

import transformers
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from pipeline.errors import UsageError, first_line
from pipeline.os_errors import refuse_limit
from pipeline.target.files import check_config

# By the auto class that loads a target with its LM head: the model types it knows.
LOADERS = {
    "AutoModelForCausalLM": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "AutoModelForImageTextToText": MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
}


def load_config(folder: Path, model: str = "") -> PreTrainedConfig:
    """Return the config of a target, which errors call `model`. UsageError where transformers does not know it."""
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        refuse_limit(folder, error)
        cause = first_line(error, 200)
        raise UsageError(
            f"{model or folder}: transformers {transformers.__version__} does not know this model ({cause}); a "
            "newer one may, and code that comes with a model is never run"
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


def check_known(model: str, folder: Path) -> None:
    """Raise UsageError, before any work, for a target whose config shows that it cannot be loaded.

    Quantised targets are checked further by `quantised.check_quantised`, which imports torch.
    """
    check_config(folder)
    loader_of(load_config(folder, model), model)
