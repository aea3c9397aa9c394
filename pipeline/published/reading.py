"""config.json of a published draft, whoever wrote it, as a checked DraftConfig, and its tensors' names in ours.

Nothing is guessed. A value that is missing, stated twice and differently, or of a draft that computes something else
than ours is refused: each of these loads without an error elsewhere and accepts nothing.

Forms: z-lab's and SpecForge's (`dflash_config` inside a Qwen3 config), what SGLang reads (the same, the head's keys
lifted), DeepSpec's and Model-Optimizer's DSpark (flat), and speculators' (`transformer_layer_config`).
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pipeline.drafts import DRAFTS, DraftConfig, draft_config
from pipeline.drafts.draft import PublishedKeys, Shapes
from pipeline.drafts.rope import RopeScaling, draft_rope_scaling, rope_parameters, rope_type_of
from pipeline.errors import UsageError, cause_of, refuse_limit
from pipeline.json_files import parse_json, read_file

CONFIG = "config.json"
MOST_JSON = 4 << 20  # bytes; a config has 2 KiB
# DeepSpec's class, which keeps everything at the top level, and copies of the target's embedding and head in the
# weights; SGLang reads it, too.
DEEPSPEC = "Qwen3DSparkModel"
TRAINED_ON = "trained_on"  # our own key of config.json: {"cache": digest, "heldout": share, "target": name}
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
# Keys that make another draft of it unless they say this, or are an option of its method. Training code reads none of
# them from a draft's config.
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
# What else may stand in `dflash_config`, besides options of a method: of training, or repeated.
_NESTED = {"attention_mode", "num_anchors", "loss_decay_gamma", "mask_token", "swa_window_size", "block_size"}
_NESTED |= {"mask_token_id", "target_layer_ids", "num_target_layers", "projector_type", "shift_label"}
_NESTED |= {"sample_from_anchor", *INERT, *MASKS}
EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"
# A trainer's whole state: only what is below this is the draft.
_WRAPPERS = ("draft_model.", "dflash_module.")
_SIZES = (*SHARED[:6], "max_position_embeddings", "head_dim")
_MOST = {"num_hidden_layers": 1024, "block_size": 4096}  # far more than any draft has


@dataclass(frozen=True)
class Published:
    """What a folder's config.json states about its draft."""

    config: DraftConfig
    speculators: bool  # the form of the speculators library
    owns_copies: bool  # may hold copies of the target's embedding and head
    proposed: int  # ids that may be proposed: all, or fewer, mapped by the tensors d2t and t2d


def read_json(path: Path) -> dict:
    """Read a JSON object of a moderate size. UsageError."""
    try:
        record = parse_json(read_file(path, MOST_JSON))
    except (OSError, ValueError) as error:
        refuse_limit(path, error)
        raise UsageError(
            f"{path} cannot be read ({cause_of(error)}); name a folder that holds a published draft"
        ) from error
    if not isinstance(record, dict):
        raise UsageError(f"{path} is no JSON object; name a folder that holds a published draft")
    return record


def read_description(path: Path, target_layers: int | None = None) -> Published:
    """Return what a folder's config.json states. UsageError.

    target_layers: the target's depth, for forms that do not state it.
    """
    file = Path(path) / CONFIG
    flat = read_json(file)
    try:
        speculators = "speculators_model_type" in flat
        own = {name: fields for name, draft in DRAFTS.items() if (fields := draft.read_own_config(flat)) is not None}
        if own:
            config = _checked(file, *own.popitem())
        else:
            keys = _of_speculators(file, flat) if speculators else _of_qwen3(file, flat)
            config = _config(keys, target_layers)
        proposed = flat.get("draft_vocab_size") or config.vocab_size
        if not isinstance(proposed, int) or not 0 < proposed <= config.vocab_size:
            raise UsageError(f"{file}: draft_vocab_size is {proposed!r}, the vocabulary {config.vocab_size}")
        if config.proposable not in (proposed, config.vocab_size):
            raise UsageError(
                f"{file}: vocabulary is {config.proposable} and draft_vocab_size is {proposed}; correct the wrong one"
            )
        owns = speculators or DEEPSPEC in (flat.get("architectures") or ())
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


def _of_qwen3(file: Path, flat: dict) -> PublishedKeys:
    deepspec = DEEPSPEC in (flat.get("architectures") or ())
    nested = flat.get("dflash_config") or {} if deepspec else flat["dflash_config"]
    known = _NESTED.union(*(draft.ignored_keys.union(draft.Config.published_options()) for draft in DRAFTS.values()))
    unknown = sorted(set(nested) - known)
    if unknown:
        raise UsageError(
            f"{file}: dflash_config has {unknown[0]} = {nested[unknown[0]]!r}, which is unknown here; if it changes "
            "nothing of how the draft computes, remove it"
        )
    return PublishedKeys(file, flat, nested, deepspec)


def _of_speculators(file: Path, flat: dict) -> PublishedKeys:
    """Return the same facts as speculators states them: layers counted from the embedding, the decoder's own config
    inside."""
    method, layer = flat["speculators_model_type"], flat["transformer_layer_config"]
    known = [name for name, draft in DRAFTS.items() if "speculators" in draft.forms]
    if method not in known:
        raise UsageError(f"{file}: speculators_model_type {method!r}; only {' and '.join(known)} are known here")
    draft, backbone = DRAFTS[method], [name for name, draft in DRAFTS.items() if draft.only_backbone]
    if flat.get("projector_type") not in (None, *backbone):
        raise UsageError(
            f"{file}: projector_type {flat['projector_type']!r} in the form of speculators is unknown here"
        )
    may_keep = draft.Config.may_keep_position
    anchor = flat.get("sample_from_anchor", False if may_keep else None)
    if not may_keep and anchor is not True:
        raise UsageError(
            f"{file}: sample_from_anchor is {anchor}, so slot k may guess anchor + k, as older releases of speculators "
            f"trained it; a {draft.title} draft here guesses anchor + k + 1: state true if this one does, else train "
            "it anew"
        )
    if flat.get("shift_label") and not anchor:
        raise UsageError(
            f"{file}: shift_label is true and sample_from_anchor is not: slot k guesses anchor + k + 1 or anchor + k; "
            "correct the wrong one"
        )
    if flat.get("target_hidden_size") not in (None, layer["hidden_size"]):
        raise UsageError(f"{file}: target_hidden_size {flat['target_hidden_size']}, the draft's {layer['hidden_size']}")
    most = flat["block_size"] - (not anchor)
    counts = [proposal["speculative_tokens"] for proposal in flat["speculators_config"]["proposal_methods"]]
    if not all(1 <= count <= most for count in counts):
        raise UsageError(
            f"{file}: speculative_tokens {counts}, where a block of this draft proposes {most}; correct it"
        )
    stated = ("block_size", "mask_token_id", *draft.Config.published_options())
    nested = {key: flat[key] for key in stated if flat.get(key) is not None}
    nested |= {"projector_type": method, "sample_from_anchor": anchor}
    nested["target_layer_ids"] = [index - 1 for index in flat["aux_hidden_state_layer_ids"]]
    nested |= {key: flat[key] for key in (*INERT, *MASKS) if key in flat}
    proposed = flat.get("draft_vocab_size")
    if draft.reduces_vocabulary and type(proposed) is int and 0 < proposed < layer["vocab_size"]:
        nested["vocabulary"] = proposed
    own = {key: flat[key] for key in ("architectures", "num_target_layers") if key in flat}
    return PublishedKeys(file, layer | own, nested)


def _config(keys: PublishedKeys, target_layers: int | None) -> DraftConfig:
    file, flat = keys.file, keys.flat
    if flat["model_type"] != "qwen3" or flat.get("hidden_act", "silu") != "silu":
        raise UsageError(f"{file}: a {flat['model_type']} draft with {flat.get('hidden_act')}; only qwen3 is known")
    method = _method(keys)
    _refuse_others(keys, method)
    for key in _SIZES:
        if type(flat.get(key, 1)) not in (int, type(None)):
            raise UsageError(f"{file}: {key} is {flat[key]!r}, which is no size; correct it")
    for key, most in _MOST.items():
        if keys.find(key) > most:
            raise UsageError(f"{file}: {key} is {keys.find(key)}, and more than {most} no draft has; correct it")
    depth = keys.find("num_target_layers", target_layers)
    if depth is None:
        raise UsageError(f"{file} does not say how many layers its target has; add num_target_layers to it")
    if target_layers not in (None, depth):
        raise UsageError(f"{file}: a draft for a target of {depth} layers, this one has {target_layers}; name its own")
    fields = {
        **{name: flat[name] for name in SHARED if name in flat},
        "head_dim": flat.get("head_dim") or flat["hidden_size"] // (flat["num_attention_heads"] or 1),
        "rope_theta": _rope_theta(file, flat),
        "rope_scaling": _rope_scaling(file, flat),
        "num_target_layers": depth,
        "block_size": keys.find("block_size"),
        **_windows(keys),
        "mask_token_id": keys.find("mask_token_id"),
        "target_layer_ids": tuple(keys.find("target_layer_ids")),
        "shift_label": _shift_label(keys, method),
        **DRAFTS[method].read_options(keys),
    }
    return _checked(file, method, fields)


def _checked(file: Path, method: str, fields: dict) -> DraftConfig:
    try:
        return draft_config(method=method, **fields)
    except UsageError as error:  # which knows of no file
        raise UsageError(f"{file}: {error}") from error


def _refuse_others(keys: PublishedKeys, method: str) -> None:
    """Refuse a draft that computes something else, whose own engine would read a key that is ignored here."""
    # A draft here is causal inside a block on sliding layers, and on no others.
    causal = {kind == "sliding_attention" for kind in keys.flat.get("layer_types") or ["full_attention"]}
    for where in (keys.flat, keys.nested):
        inert = INERT.keys() - DRAFTS[method].Config.published_options()
        wrong = [key for key in INERT if key in inert and where.get(key) and where[key] != INERT[key]]
        wrong += [key for key in MASKS[:2] if where.get(key) is not None and {where[key]} != causal]
        wrong += [key for key in MASKS[2:] if where.get(key) and True in causal]
        for key in wrong:
            raise UsageError(
                f"{keys.file}: {key} is {str(where[key]).lower()}; a draft here computes otherwise, and would accept "
                "little with weights trained that way"
            )


def _method(keys: PublishedKeys) -> str:
    """Return the method of a draft: the one its projector_type names, or its architecture; else the bare backbone."""
    architectures, named = keys.architectures, keys.find("projector_type", None)
    for name in architectures:
        if not any(name in draft.architectures for draft in DRAFTS.values()):
            raise UsageError(f"{keys.file}: architecture {name}; no draft known here")
    if named not in (None, *DRAFTS):
        *others, last = DRAFTS
        raise UsageError(f"{keys.file}: projector_type {named!r} is unknown; there are {', '.join(others)} and {last}")
    possible = [name for name, draft in DRAFTS.items() if set(architectures) <= set(draft.architectures)]
    if named is not None:
        possible = [name for name in possible if name == named]
    elif len(possible) > 1:
        published = [name for name in possible if DRAFTS[name].publishes(keys)]
        possible = published or [name for name in possible if DRAFTS[name].only_backbone]
    if len(possible) != 1:
        raise UsageError(f"{keys.file}: architecture {architectures[0]} with projector_type {named!r}; correct one")
    return possible[0]


def _windows(keys: PublishedKeys) -> dict:
    """Which layers slide, and how far. A window that no layer uses means nothing: configs are often copied."""
    flat, kinds = keys.flat, tuple(keys.flat.get("layer_types") or ())
    if flat.get("use_sliding_window") and not kinds:
        raise UsageError(f"{keys.file}: use_sliding_window without layer_types; name the kind of every layer")
    window = flat.get("sliding_window") if "sliding_attention" in kinds else None
    return {"layer_types": kinds, "sliding_window": window}


def _shift_label(keys: PublishedKeys, method: str) -> bool:
    """Return the label convention: read the wrong way round, a draft accepts nothing."""
    draft, stated = DRAFTS[method], set()
    for where in (keys.flat, keys.nested):
        stated |= {where.get(key) for key in ("shift_label", "sample_from_anchor")} - {None}
    may_keep = draft.Config.may_keep_position and not keys.deepspec
    if len(stated) > 1 or (stated == {False} and not may_keep):
        raise UsageError(
            f"{keys.file}: shift_label and sample_from_anchor contradict each other or {method}; correct one"
        )
    shift = stated.pop() if stated else draft.absent(keys).get("shift_label")
    if shift is None:
        raise UsageError(
            f"{keys.file}: shift_label is missing; state whether slot k guesses anchor + k + 1 or anchor + k"
        )
    return shift


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
    scalings = []
    for stated in scaled:
        scaling, reason = draft_rope_scaling({**flat, "rope_scaling": stated})
        if scaling is None:
            raise UsageError(f"{file}: scaled rotary positions: {reason}; a draft here has others")
        scalings.append(scaling)
    plain = places[1] and rope_type_of(places[1]) == "default"
    if len(set(scalings)) > 1 or (scalings and plain):
        raise UsageError(f"{file}: rope_scaling and rope_parameters differ; state scaled rotary positions twice alike")
    return scalings[0] if scalings else None


def target_copies(config: DraftConfig, proposed: int, speculators: bool) -> Shapes:
    """Return the copies of the target's own tensors that some projects publish with a draft, and their maps of reduced
    ids."""
    D, V = config.hidden_size, config.vocab_size
    copies = {EMBEDDING: (V, D), HEAD: (proposed, D)}
    if not speculators:
        return copies
    # d2t: id of the target minus id of the draft, for each id that may be proposed; t2d: whether an id may be.
    maps = {"d2t": (proposed,), "t2d": (V,)}
    return copies | maps | {"verifier_norm.weight": (D,), "verifier_lm_head.weight": (proposed, D)}


def published_names(stored: Iterable[str]) -> dict[str, str]:
    """Map published names to the names that a file has them under; what is not the draft's own is left out.

    Other people's prefixes and names are undone, rotary buffers dropped. UsageError for two of one name.
    """
    stored = list(stored)
    renamed = {pattern: ours for draft in DRAFTS.values() for pattern, ours in draft.renamed_tensors.items()}
    wrapper = next((prefix for prefix in _WRAPPERS if any(prefix in name for name in stored)), "")
    names: dict[str, str] = {}
    for file_name in stored:
        if wrapper not in file_name or file_name.endswith("rotary_emb.inv_freq"):
            continue
        name = file_name.partition(wrapper)[2] if wrapper else file_name
        for pattern, ours in renamed.items():
            name = re.sub(pattern, ours, name)
        if name in names:
            raise UsageError(f"{names[name]} and {file_name} are both {name}; remove the one that is not the draft's")
        names[name] = file_name
    return names
