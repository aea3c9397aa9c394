"""The published form of a draft: config.json and model.safetensors in one flat folder, as z-lab and SpecForge write it.

`published_config` writes it from a checked DraftConfig, so nothing can be found missing after the training.
`load_draft_folder` reads it from the files alone, those of other trainers too, and guesses nothing.
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from pipeline.drafts import DRAFTS, Draft, DraftConfig
from pipeline.errors import UsageError
from pipeline.target_head import TargetHead

CONFIG, WEIGHTS = "config.json", "model.safetensors"
ARCHITECTURES = {"DFlashDraftModel": None, "DominoDraftModel": "domino"}  # and the method it can only be
PROJECTORS = {None: "dflash", "dflash": "dflash", "domino": "domino"}
TRAINED_ON = "trained_on"  # our own key of config.json: {"cache": digest, "heldout": share}
DOMINO_KEYS = ("emb_dim", "gru_hidden_dim", "pure_draft_prefix_len")
# Fields of DraftConfig that stand in config.json under their own name.
_SHARED = {
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "rms_norm_eps",
    "rope_theta",
    "max_position_embeddings",
    "attention_bias",
    "initializer_range",
    "num_target_layers",
    "block_size",
}


def check_servable(config: DraftConfig) -> None:
    """Refuse a draft that SGLang cannot serve, with the reason. UsageError."""
    if config.method == "domino" and not (config.shift_label and config.pure_draft_prefix_len == 1):
        raise UsageError(
            f"SGLang serves Domino with shift_label true and pure_draft_prefix_len 1 only, this draft has "
            f"{str(config.shift_label).lower()} and {config.pure_draft_prefix_len}; train one with these"
        )
    if config.method == "dflash" and config.shift_label:
        raise UsageError(
            "SGLang reads DFlash with same-position labels only and would accept nothing from this draft, whose "
            "shift_label is true; train one with draft.shift_label = false"
        )


def published_config(
    config: DraftConfig, dtype: str, tokens: dict | None = None, trained_on: dict | None = None
) -> dict:
    """Return config.json as published checkpoints have it, keys that readers seek in two places in both.

    dtype: of the stored weights, "float32" or "bfloat16". tokens: the target's bos and eos ids, where known.
    trained_on: the cache's digest and the share of prompts held out, which no engine reads and `evaluate` does.
    """
    sliding = "sliding_attention" in config.layer_types
    tokens = tokens or {}
    nested = {
        "block_size": config.block_size,
        "mask_token_id": config.mask_token_id,
        "target_layer_ids": list(config.target_layer_ids),
        "shift_label": config.shift_label,
    }
    if config.method != "dflash":
        nested["projector_type"] = config.method
        nested |= {key: getattr(config, key) for key in DOMINO_KEYS}
    shared = {name: getattr(config, name) for name in DraftConfig.model_fields if name in _SHARED}
    flat = shared | {
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        "dtype": dtype,
        "layer_types": list(config.layer_types),
        "sliding_window": config.sliding_window,
        "use_sliding_window": sliding,
        "max_window_layers": config.num_hidden_layers,
        "rope_scaling": None,
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "use_cache": True,
        "bos_token_id": tokens.get("bos"),
        "eos_token_id": next(iter(tokens.get("eos") or ()), None),
        "sample_from_anchor": config.shift_label,
        "shift_label": config.shift_label,
        "dflash_config": nested,
    }
    if config.emb_dim is not None:
        flat["emb_dim"] = config.emb_dim
    if trained_on is not None:
        flat[TRAINED_ON] = trained_on
    if not sliding:
        # Left out of a sliding draft: engines then take sliding layers as causal and the others as not, as trained.
        flat["is_causal"] = False
    return flat


def load_draft_folder(path: Path, head: TargetHead, device: str | torch.device = "cpu") -> Draft:
    """Open a published draft, in float32 and evaluation mode. Nothing is guessed and nothing is left over.

    UsageError for an unknown kind of draft, a missing, contradictory or unknown value, and for tensors that are
    missing, surplus, of another shape or not finite.
    """
    path = Path(path)
    config = read_published(path)
    draft = DRAFTS[config.method](config, head)
    wanted = {name: tuple(tensor.shape) for name, tensor in draft.state_dict().items()}
    try:
        tensors = load_file(path / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{path / WEIGHTS} cannot be read ({error}); fetch the draft again") from error
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for what, names in (("lacks", wanted.keys() - found.keys()), ("has surplus", found.keys() - wanted.keys())):
        if names:
            raise UsageError(
                f"{path / WEIGHTS} {what} {', '.join(sorted(names)[:4])} ({len(names)} in all) for the {config.method} "
                f"draft that its {CONFIG} describes; fetch or export it again"
            )
    for name in sorted(wanted):
        if wanted[name] != found[name]:
            raise UsageError(f"{path}: {name} is {list(found[name])}, its {CONFIG} says {list(wanted[name])}")
        if not tensors[name].isfinite().all():
            raise UsageError(f"{path}: {name} holds values that are not finite; train or fetch it again")
    draft.load_state_dict(tensors)
    return draft.to(device).eval()


def read_published(path: Path) -> DraftConfig:
    """Return the draft that a folder's config.json describes: its inference, not its training. UsageError."""
    file = path / CONFIG
    try:
        flat = json.loads(file.read_text("utf-8"))
        nested = flat["dflash_config"]
        if flat["model_type"] != "qwen3" or flat.get("hidden_act", "silu") != "silu":
            raise UsageError(f"{file}: a {flat['model_type']} draft with {flat.get('hidden_act')}; only qwen3 is known")
        shared = {name: flat[name] for name in _SHARED - {"rope_theta", "block_size", "head_dim"} if name in flat}
        return DraftConfig(
            method=_method(file, flat, nested),
            **shared,
            head_dim=flat.get("head_dim") or flat["hidden_size"] // flat["num_attention_heads"],
            rope_theta=_rope_theta(file, flat),
            block_size=_either(file, flat, nested, "block_size"),
            **_windows(file, flat, nested),
            mask_token_id=nested["mask_token_id"],
            target_layer_ids=tuple(nested["target_layer_ids"]),
            shift_label=_shift_label(file, flat, nested),
            **(_domino_sizes(file, flat, nested) if _method(file, flat, nested) == "domino" else {}),
        )
    except (OSError, ValueError) as error:
        raise UsageError(f"{file} cannot be read ({error}); name a folder that holds a published draft") from error
    except (KeyError, TypeError) as error:
        raise UsageError(f"{file}: {error} is missing or malformed; no draft of a kind that is known here") from error


def recorded_share(path: Path) -> float | None:
    """Return the share of prompts that training held out where the corpus did not say which; None: not known."""
    try:
        share = json.loads((path / CONFIG).read_text("utf-8"))[TRAINED_ON]["heldout"]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # another trainer's, or unreadable: then opening it says so
    return share if isinstance(share, float) and 0 <= share < 1 else None


def _method(file: Path, flat: dict, nested: dict) -> str:
    named = nested.get("projector_type")
    if named not in PROJECTORS:
        raise UsageError(f"{file}: projector_type {named!r} is unknown; there are dflash and domino")
    method = PROJECTORS[named]
    for architecture in flat.get("architectures") or ():
        if ARCHITECTURES.get(architecture, "unknown") not in (None, method):
            raise UsageError(f"{file}: architecture {architecture} with projector_type {named!r}; no draft known here")
    return method


def _windows(file: Path, flat: dict, nested: dict) -> dict:
    """Which layers slide, and how far. A window that no layer uses means nothing: configs are often copied."""
    kinds = tuple(flat.get("layer_types") or ())
    stated = {key: where[key] for where in (flat, nested) for key in ("is_causal", "causal") if where.get(key)}
    if stated:
        raise UsageError(f"{file}: {next(iter(stated))} is true; full layers of a draft here see their whole block")
    if nested.get("use_swa") and "sliding_attention" not in kinds:
        raise UsageError(f"{file}: use_swa without sliding layers in layer_types; name the kind of every layer")
    if flat.get("use_sliding_window") and not kinds:
        raise UsageError(f"{file}: use_sliding_window without layer_types; name the kind of every layer")
    return {
        "layer_types": kinds,
        "sliding_window": flat.get("sliding_window") if "sliding_attention" in kinds else None,
    }


def _by_specforge(flat: dict) -> bool:
    """Whether the file is SpecForge's own Domino class, whose defaults for left-out keys are known."""
    return flat.get("architectures") == ["DominoDraftModel"]


def _domino_sizes(file: Path, flat: dict, nested: dict) -> dict:
    """The causal head's sizes; releases also write them at the top level."""
    sizes = {key: _either(file, flat, nested, key) for key in ("emb_dim", "gru_hidden_dim")}
    prefix = "pure_draft_prefix_len"
    return sizes | {prefix: nested.get(prefix, 0) if _by_specforge(flat) else nested[prefix]}


def _either(file: Path, flat: dict, nested: dict, key: str):
    """The value of a key that releases keep in one of two places, the nested one first. KeyError for neither."""
    if key in flat and key in nested and flat[key] != nested[key]:
        raise UsageError(f"{file}: {key} is {flat[key]} and, in dflash_config, {nested[key]}; correct the wrong one")
    return nested[key] if key in nested else flat[key]


def _shift_label(file: Path, flat: dict, nested: dict) -> bool:
    """The label convention. Only plain DFlash may leave it out: read the wrong way round a draft accepts nothing."""
    stated = {where.get(key) for where in (flat, nested) for key in ("shift_label", "sample_from_anchor")} - {None}
    if len(stated) > 1:
        raise UsageError(f"{file}: shift_label and sample_from_anchor contradict each other; correct the wrong one")
    if not stated and _method(file, flat, nested) != "dflash" and not _by_specforge(flat):
        raise UsageError(f"{file}: shift_label is missing; state whether slot k guesses anchor + k + 1 or anchor + k")
    return bool(stated and stated.pop())


def _rope_theta(file: Path, flat: dict) -> float:
    parameters = flat.get("rope_parameters") or {}
    if flat.get("rope_scaling") or parameters.get("rope_type", "default") != "default":
        raise UsageError(f"{file}: scaled rotary positions; a draft here has plain ones")
    stated = {float(theta) for theta in (flat.get("rope_theta"), parameters.get("rope_theta")) if theta is not None}
    if len(stated) != 1:
        raise UsageError(f"{file}: rope_theta is {sorted(stated) or 'missing'}; state it once, or twice alike")
    return stated.pop()
