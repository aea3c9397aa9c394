"""config.json of a published draft, whoever wrote it, as a checked DraftConfig: its inference, not its training.

Nothing is guessed. A value that is missing, stated twice and differently, or of a draft that computes something else
than ours is refused: each of these loads without an error elsewhere and accepts nothing.

Forms: z-lab's and SpecForge's (`dflash_config` inside a Qwen3 config), what SGLang reads (the same, the head's keys
lifted), DeepSpec's and Model-Optimizer's DSpark (flat), and speculators' (`transformer_layer_config`).
"""

from dataclasses import dataclass
from pathlib import Path

from pipeline.drafts import DraftConfig
from pipeline.drafts.rope_scaling import RopeScaling, draft_rope_scaling, rope_parameters, rope_type_of
from pipeline.errors import UsageError
from pipeline.published.weights import CONFIG, read_json

# Architectures, and the method each can only be; None: the projector_type says.
ARCHITECTURES = {
    "DFlashDraftModel": None,
    "DominoDraftModel": "domino",
    "DSparkDraftModel": "dspark",
    "Qwen3DSparkModel": "dspark",
    "DFlashSpeculator": "dflash",
    "DSparkSpeculator": "dspark",
}
# DeepSpec's own, which keeps everything at the top level, and copies of the target's embedding and head in the weights.
FLAT = "Qwen3DSparkModel"
TRAINED_ON = "trained_on"  # our own key of config.json: {"cache": digest, "heldout": share}
# Fields of DraftConfig that stand at the top level of a Qwen3 config under their own name.
SHARED = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "rms_norm_eps",
    "max_position_embeddings",
    "attention_bias",
    "initializer_range",
)
DSPARK_KEYS = ("markov_rank", "markov_head_type", "enable_confidence_head", "confidence_head_with_markov")
# Keys that make another draft of it unless they say this. Training code reads none of them from a draft's config.
INERT = {
    "use_swa": False,
    "partial_rotary_factor": 1.0,
    "logit_scale": 1.0,
    "output_multiplier": 1.0,
    "final_logit_softcapping": 0.0,
    "attention_sink_bias": False,
    "attention_value_scale": 1.0,
    "conv_kernel_size": 0,
    "selector_rank": 0,
    "quantization_config": {},
}
# Flags by which engines mask a block: the first two of every layer, the third of sliding ones.
MASKS = ("is_causal", "causal", "sliding_window_non_causal")
# What else may stand in `dflash_config`: of training, or said again.
_NESTED = {
    "attention_mode",
    "confidence_head_alpha",
    "num_anchors",
    "loss_decay_gamma",
    "mask_token",
    "swa_window_size",
}
_NESTED |= {"block_size", "mask_token_id", "target_layer_ids", "num_target_layers", "projector_type", "shift_label"}
_NESTED |= {"sample_from_anchor", "emb_dim", "gru_hidden_dim", "pure_draft_prefix_len"}
_NESTED |= {*DSPARK_KEYS, *INERT, *MASKS, "use_confidence_head"}
_SIZES = (*SHARED[:6], "max_position_embeddings", "head_dim")
_MOST = {"num_hidden_layers": 1024, "block_size": 4096}  # far more than anyone has; a file may say anything


@dataclass(frozen=True)
class Published:
    """What a folder's config.json says of its draft."""

    config: DraftConfig
    speculators: bool  # the form of the speculators library
    owns_copies: bool  # may hold copies of the target's embedding and head
    proposed: int  # ids that may be proposed: all, or fewer, mapped by the tensors d2t and t2d


@dataclass(frozen=True)
class _Stated:
    """A config taken apart: top level, `dflash_config`, and the file for messages."""

    file: Path
    flat: dict
    nested: dict

    def find(self, key: str, *otherwise):
        """The value of a key that releases keep in one of two places. KeyError, or `otherwise`, where in neither."""
        flat, nested = self.flat, self.nested
        if key in flat and key in nested and flat[key] != nested[key]:
            raise UsageError(
                f"{self.file}: {key} is {flat[key]} and, in dflash_config, {nested[key]}; correct the wrong one"
            )
        found = nested.get(key, flat.get(key))
        if found is not None:
            return found
        if otherwise:
            return otherwise[0]
        raise KeyError(key)


def read_published(path: Path, target_layers: int | None = None) -> DraftConfig:
    """Return the draft that a folder's config.json describes. UsageError.

    target_layers: the target's depth, for forms that do not state it.
    """
    return read_description(path, target_layers).config


def read_description(path: Path, target_layers: int | None = None) -> Published:
    """The same, with what else the folder may hold."""
    file = Path(path) / CONFIG
    flat = read_json(file)
    try:
        speculators = "speculators_model_type" in flat
        stated = _of_speculators(file, flat) if speculators else _of_qwen3(file, flat)
        config = _config(stated, target_layers)
        proposed = flat.get("draft_vocab_size") or config.vocab_size
        if not isinstance(proposed, int) or not 0 < proposed <= config.vocab_size:
            raise UsageError(f"{file}: draft_vocab_size is {proposed!r}, the vocabulary {config.vocab_size}")
        owns = speculators or FLAT in (flat.get("architectures") or ())
        return Published(config, speculators, owns, proposed)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else f"a value in it is malformed ({error})"
        raise UsageError(f"{file}: {what}; no draft of a kind that is known here") from error


def recorded_share(path: Path) -> float | None:
    """Return the share of prompts that training held out where the corpus did not say which; None: not known."""
    try:
        share = read_json(Path(path) / CONFIG)[TRAINED_ON]["heldout"]
    except (UsageError, KeyError, TypeError):
        return None  # another trainer's, or unreadable: then opening it says so
    return share if isinstance(share, float) and 0 <= share < 1 else None


def _of_qwen3(file: Path, flat: dict) -> _Stated:
    architectures = flat.get("architectures") or ()
    nested = flat.get("dflash_config") or {} if FLAT in architectures else flat["dflash_config"]
    unknown = sorted(set(nested) - _NESTED)
    if unknown:
        raise UsageError(
            f"{file}: dflash_config has {unknown[0]} = {nested[unknown[0]]!r}, which is unknown here; if it changes "
            "nothing of how the draft computes, remove it"
        )
    return _Stated(file, flat, nested)


def _of_speculators(file: Path, flat: dict) -> _Stated:
    """The same facts as speculators states them: layers counted from the embedding, the decoder's own config inside."""
    kind, layer = flat["speculators_model_type"], flat["transformer_layer_config"]
    if kind not in ("dflash", "dspark"):
        raise UsageError(f"{file}: speculators_model_type {kind!r}; only dflash and dspark are known here")
    if flat.get("projector_type", "dflash") != "dflash":
        raise UsageError(
            f"{file}: projector_type {flat['projector_type']!r} in the form of speculators is unknown here"
        )
    anchor = flat.get("sample_from_anchor", False if kind == "dflash" else None)
    if kind == "dspark" and anchor is not True:
        raise UsageError(
            f"{file}: sample_from_anchor is {anchor}, so slot k may guess anchor + k, as older releases of speculators "
            "trained it; a DSpark draft here guesses anchor + k + 1: state true if this one does, else train it anew"
        )
    if flat.get("shift_label") and not anchor:
        raise UsageError(
            f"{file}: shift_label is true and sample_from_anchor is not: slot k guesses anchor + k + 1 or anchor + k; "
            "correct the wrong one"
        )
    if flat.get("target_hidden_size") not in (None, layer["hidden_size"]):
        raise UsageError(f"{file}: target_hidden_size {flat['target_hidden_size']}, the draft's {layer['hidden_size']}")
    most = flat["block_size"] - (not anchor)
    asked = [method["speculative_tokens"] for method in flat["speculators_config"]["proposal_methods"]]
    if not all(1 <= count <= most for count in asked):
        raise UsageError(f"{file}: speculative_tokens {asked}, where a block of this draft proposes {most}; correct it")
    nested = {key: flat[key] for key in ("block_size", "mask_token_id", *DSPARK_KEYS) if flat.get(key) is not None}
    nested |= {"projector_type": kind, "sample_from_anchor": anchor}
    nested["target_layer_ids"] = [index - 1 for index in flat["aux_hidden_state_layer_ids"]]
    nested |= {key: flat[key] for key in (*INERT, *MASKS) if key in flat}
    own = {key: flat[key] for key in ("architectures", "num_target_layers") if key in flat}
    return _Stated(file, layer | own, nested)


def _config(stated: _Stated, target_layers: int | None) -> DraftConfig:
    file, flat = stated.file, stated.flat
    if flat["model_type"] != "qwen3" or flat.get("hidden_act", "silu") != "silu":
        raise UsageError(f"{file}: a {flat['model_type']} draft with {flat.get('hidden_act')}; only qwen3 is known")
    _refuse_others(stated)
    for key in _SIZES:
        if type(flat.get(key, 1)) not in (int, type(None)):
            raise UsageError(f"{file}: {key} is {flat[key]!r}, which is no size; correct it")
    for key, most in _MOST.items():
        if stated.find(key) > most:
            raise UsageError(f"{file}: {key} is {stated.find(key)}, and more than {most} no draft has; correct it")
    depth = stated.find("num_target_layers", target_layers)
    if depth is None:
        raise UsageError(f"{file} does not say how many layers its target has; add num_target_layers to it")
    if target_layers not in (None, depth):
        raise UsageError(f"{file}: a draft for a target of {depth} layers, this one has {target_layers}; name its own")
    method = _method(stated)
    fields = {
        **{name: flat[name] for name in SHARED if name in flat},
        "head_dim": flat.get("head_dim") or flat["hidden_size"] // (flat["num_attention_heads"] or 1),
        "rope_theta": _rope_theta(file, flat),
        "rope_scaling": _rope_scaling(file, flat),
        "num_target_layers": depth,
        "block_size": stated.find("block_size"),
        **_windows(stated),
        "mask_token_id": stated.find("mask_token_id"),
        "target_layer_ids": tuple(stated.find("target_layer_ids")),
        "shift_label": _shift_label(stated, method),
        **_head(stated, method),
    }
    try:
        return DraftConfig(method=method, **fields)
    except UsageError as error:  # which knows of no file
        raise UsageError(f"{file}: {error}") from error


def _refuse_others(stated: _Stated) -> None:
    """Refuse a draft that computes something else, whose own engine would heed a key that we would pass over."""
    # A draft here is causal inside a block on sliding layers, and on no others.
    causal = {kind == "sliding_attention" for kind in stated.flat.get("layer_types") or ["full_attention"]}
    for where in (stated.flat, stated.nested):
        wrong = [key for key, inert in INERT.items() if where.get(key) and where[key] != inert]
        wrong += [key for key in MASKS[:2] if where.get(key) is not None and {where[key]} != causal]
        wrong += [key for key in MASKS[2:] if where.get(key) and True in causal]
        for key in wrong:
            raise UsageError(
                f"{stated.file}: {key} is {str(where[key]).lower()}; a draft here computes otherwise, and would accept "
                "little with weights trained that way"
            )


def _method(stated: _Stated) -> str:
    architectures = stated.flat.get("architectures") or ()
    unknown = [name for name in architectures if name not in ARCHITECTURES]
    if unknown:
        raise UsageError(f"{stated.file}: architecture {unknown[0]}; no draft known here")
    named = stated.find("projector_type", None)
    if named not in (None, "dflash", "domino", "dspark"):
        raise UsageError(f"{stated.file}: projector_type {named!r} is unknown; there are dflash, domino and dspark")
    only = {ARCHITECTURES[name] for name in architectures} - {None}
    if FLAT in architectures and named != "dspark" and not (stated.find("markov_rank", 1) or _confidence(stated)):
        only = {"dflash"}  # DeepSpec's own baseline: no head at all
    if len(only | {named} - {None}) > 1:
        raise UsageError(f"{stated.file}: architecture {architectures[0]} with projector_type {named!r}; correct one")
    return named or next(iter(only), "dflash")


def _windows(stated: _Stated) -> dict:
    """Which layers slide, and how far. A window that no layer uses means nothing: configs are often copied."""
    flat, kinds = stated.flat, tuple(stated.flat.get("layer_types") or ())
    if flat.get("use_sliding_window") and not kinds:
        raise UsageError(f"{stated.file}: use_sliding_window without layer_types; name the kind of every layer")
    window = flat.get("sliding_window") if "sliding_attention" in kinds else None
    return {"layer_types": kinds, "sliding_window": window}


def _head(stated: _Stated, method: str) -> dict:
    """What the method's own modules are."""
    if method == "domino":
        sizes = {key: stated.find(key) for key in ("emb_dim", "gru_hidden_dim")}
        default = (0,) if _by_specforge(stated) else ()
        return sizes | {"pure_draft_prefix_len": stated.find("pure_draft_prefix_len", *default)}
    if method != "dspark":
        return {}
    confidence = _confidence(stated)
    # Model-Optimizer's confidence head always reads the token before, and has no key that says so.
    with_markov = bool(stated.find("use_confidence_head", False))
    rank = stated.find("markov_rank")
    return {
        "markov_rank": rank,
        "markov_head_type": "vanilla" if rank == 0 else stated.find("markov_head_type"),  # of no head it says nothing
        "enable_confidence_head": confidence,
        "confidence_head_with_markov": stated.find("confidence_head_with_markov", with_markov) and confidence,
    }


def _confidence(stated: _Stated) -> bool:
    """Whether there is a confidence head; SpecForge once let the weight of its loss say so."""
    alpha = stated.find("confidence_head_alpha", 0)
    return stated.find("enable_confidence_head", stated.find("use_confidence_head", bool(alpha)))


def _by_specforge(stated: _Stated) -> bool:
    """Whether the file is SpecForge's own Domino class, whose defaults for left-out keys are known."""
    return stated.flat.get("architectures") == ["DominoDraftModel"]


def _shift_label(stated: _Stated, method: str) -> bool:
    """The label convention. Only plain DFlash may leave it out: read the wrong way round a draft accepts nothing.

    DSpark has only one, and so has DeepSpec's DFlash: slot k guesses anchor + k + 1.
    """
    places, keys = (stated.flat, stated.nested), ("shift_label", "sample_from_anchor")
    said = {where.get(key) for where in places for key in keys} - {None}
    deepspec = FLAT in (stated.flat.get("architectures") or ())
    if len(said) > 1 or (said == {False} and (method == "dspark" or deepspec)):
        raise UsageError(
            f"{stated.file}: shift_label and sample_from_anchor contradict each other or {method}; correct one"
        )
    if not said and method == "domino" and not _by_specforge(stated):
        raise UsageError(
            f"{stated.file}: shift_label is missing; state whether slot k guesses anchor + k + 1 or anchor + k"
        )
    return said.pop() if said else method == "dspark" or deepspec


def _rope_theta(file: Path, flat: dict) -> float:
    parameters = rope_parameters({"rope_scaling": flat.get("rope_parameters")})
    stated = {float(theta) for theta in (flat.get("rope_theta"), parameters.get("rope_theta")) if theta is not None}
    if len(stated) != 1:
        raise UsageError(f"{file}: rope_theta is {sorted(stated) or 'missing'}; state it once, or twice alike")
    return stated.pop()


def _rope_scaling(file: Path, flat: dict) -> RopeScaling | None:
    """The scaling that is stated, once or twice alike, and that engines compute as we do. UsageError for any other."""
    places = [rope_parameters({"rope_scaling": flat.get(key)}) for key in ("rope_scaling", "rope_parameters")]
    scaled = [stated for stated in places if rope_type_of(stated) != "default"]
    found = []
    for stated in scaled:
        scaling, reason = draft_rope_scaling({**flat, "rope_scaling": stated})
        if scaling is None:
            raise UsageError(f"{file}: scaled rotary positions: {reason}; a draft here has others")
        found.append(scaling)
    plain = places[1] and rope_type_of(places[1]) == "default"
    if len(set(found)) > 1 or (found and plain):
        raise UsageError(f"{file}: rope_scaling and rope_parameters differ; state scaled rotary positions twice alike")
    return found[0] if found else None
