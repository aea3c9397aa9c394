"""The target of an import: loaded to prove the states, or with --unproven only read from its files."""

from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel

from pipeline.cache.catalog import Catalog
from pipeline.errors import UsageError, refuse_limit
from pipeline.target.config import load_config
from pipeline.target.files import CONFIG, read_json, read_text_config, stop_ids
from pipeline.target.head import TargetHead
from pipeline.target.model import final_norm, head_of, load_target, stop_tokens, store_target
from pipeline.target.weights import weight_files
from pipeline.tensors import find_device

# Config keys that scale embedding, head or logits in a way that only the model's own code defines.
SCALES = ("embedding_multiplier", "scale_emb", "logits_scaling", "logit_scale", "lm_head_multiplier")


class Target:
    """A target's folder, and the target itself, loaded on first use."""

    def __init__(self, folder: Path, device: str | None, proven: bool):
        self.folder, self.device, self.proven = folder, device, proven

    @cached_property
    def model(self) -> PreTrainedModel:
        """The target, loaded now. Raises what `load_target` does."""
        assert self.proven, "nothing is computed of a cache that is imported unproven"
        return load_target(str(self.folder), device=find_device(self.device))

    @property
    def device_and_dtype(self) -> tuple[torch.device, torch.dtype]:
        """The target's device and dtype; the CPU and float32 when it is not loaded."""
        weight = self.model.get_input_embeddings().weight if self.proven else torch.empty(0)
        return weight.device, weight.dtype

    @property
    def norm(self) -> nn.Module:
        """The final norm, between the last layer and the head. UsageError where the target has none that is known."""
        norm = final_norm(self.model)
        if norm is None:
            raise UsageError(f"{self.folder}: its last norm does not show; leave the last states out with --last none")
        return norm

    def store(self, catalog: Catalog) -> None:
        """Write the cache's `target/`, once."""
        if self.proven:
            head, config, stops = head_of(self.model), self.model.config, stop_tokens(self.model)
        else:
            head, stops = head_from_files(self.folder), stop_tokens_from_files(self.folder)
            config = load_config(self.folder)
        store_target(catalog, self.folder, narrow_head(head), config, stops)


def narrow_head(head: TargetHead) -> TargetHead:
    """Return the head in bfloat16 where that changes no value, whatever dtype it was loaded in."""
    narrow = head.to(dtype=torch.bfloat16)
    pairs = ((narrow.embed_VD, head.embed_VD), (narrow.head_VD, head.head_VD))
    return narrow if all(torch.equal(cast.to(original.dtype), original) for cast, original in pairs) else head


def head_from_files(folder: Path) -> TargetHead:
    """Read embedding and head only, of a target that is not loaded. UsageError where they are scaled or ambiguous."""
    config = read_text_config(folder)
    scaled = [name for name in SCALES if config.get(name) not in (None, 1, 1.0)]
    if scaled or str(config.get("model_type", "")).startswith("gemma"):
        why = scaled[0] if scaled else "its embedding"
        raise UsageError(f"{folder}: scales {why} in code, which only a run shows; import without --unproven")
    found: dict[str, list[tuple[Path, str]]] = {"embed_tokens.weight": [], "lm_head.weight": [], "lm_head.bias": []}
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                names = [*file.keys()]
        except (SafetensorError, OSError) as error:
            refuse_limit(path, error)
            raise UsageError(f"{path} cannot be read ({error}); fetch it again") from error
        for end, holders in found.items():
            holders += [(path, name) for name in names if name == end or name.endswith(f".{end}")]
    embeds, heads, biases = found.values()
    tied = bool(read_json(folder / CONFIG).get("tie_word_embeddings", config.get("tie_word_embeddings", False)))
    if len(embeds) != 1 or biases or len(heads) > 1 or not (heads or tied):
        raise UsageError(
            f"{folder}: holds {len(embeds)} embeddings and {len(heads)} LM heads, wanted one of each (or a tied one) "
            "without a bias; name with --model the folder of the target that made the cache"
        )
    embed_VD = _tensor(*embeds[0])
    head_VD = embed_VD if tied else _tensor(*heads[0])
    shape = (config["vocab_size"], config["hidden_size"])
    if tuple(embed_VD.shape) != shape or head_VD.shape != embed_VD.shape:
        raise UsageError(
            f"{folder}: embedding {list(embed_VD.shape)} and head {list(head_VD.shape)}, config.json says "
            f"{list(shape)}; fetch its files again"
        )
    return TargetHead(embed_VD, head_VD, logit_softcap=config.get("final_logit_softcapping"))


def _tensor(path: Path, name: str) -> torch.Tensor:
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)


def stop_tokens_from_files(folder: Path) -> frozenset[int]:
    """Return the stop tokens that the folder's configs name."""
    stated = [config.get("eos_token_id") for config in (read_json(folder / CONFIG), read_text_config(folder))]
    named = (stop for stops in stated for stop in ([stops] if type(stops) is int else stops or ()))
    return frozenset({*named, *stop_ids(folder)})
