"""`pipeline check-export`: a published folder checked from its files alone, ours or anyone's.

Names and shapes are those of the publications (`Draft.tensors`). The arithmetic is written a second time from them, in
plain torch as an engine runs it (`block_states`: DFlash, arXiv:2602.06036; `Draft.reference`). It shares nothing with
`backbone.py`, where blocks are grouped and gradients written out: what the two agree on is no mistake of one of them.

An export leaves a probe beside its weights: a few blocks, the logits that the trainer computes on them, and what is
needed to check the folder without its target: the states before each block, the target's embedding of every id in it, a
few columns of the target's head. 2 to 3 MB for a target of 8B parameters. It is in the layout of safetensors under a
name that ends otherwise, as engines read every `*.safetensors`, `*.bin` and `*.pt` of a folder as weights, and the
strict ones (vLLM) end on a name they do not know; tools that save again drop what is in the weights' own header.

    K layers   T context rows   D hidden size   N blocks   S slots   C columns   I ids   E head size
"""

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pipeline.cache.manifest import FileFact
from pipeline.drafts import DRAFTS, Blocks, Cell, Draft, DraftConfig
from pipeline.drafts.draft import ProbeBlock
from pipeline.errors import ProofError, UsageError, refuse_limit
from pipeline.json_files import check_regular, parse_json
from pipeline.published.reading import CONFIG
from pipeline.published.weights import WEIGHTS, Opened, open_folder
from pipeline.tensors import save_tensors

# What engines load as weights, whatever it is called (vLLM and SGLang glob these).
_LOADED = ("*.safetensors", "*.bin", "*.pt")

PROBE, FACTS = "probe.tensors", "probe"
COLUMNS = 64
MOST_BYTES = 1 << 30
# Two float32 implementations differ by 1e-6 or so; a wrong constant, order or name by far more.
TOLERANCE = 1e-4
Get = Callable[[str], Tensor]  # a tensor by its published name, in float32
_TENSORS = ("features_KTD", "anchors_N", "prev_NS", "ids_I", "embedded_ID", "columns_C", "head_CD", "logits_NSC")


def check_export(path: Path, target_layers: int | None = None) -> dict:
    """Check a published folder: every expected tensor, none surplus, shapes, finite values, ids in range, the probe.

    Returns the facts of a sound one. target_layers: the target's depth, for folders that do not state it. ProofError
    for the first thing wrong, UsageError where there is no folder.
    """
    path = Path(path)
    if not path.is_dir():
        raise UsageError(f"{path} is no folder; name one that holds a published draft")
    try:
        opened = open_folder(path, target_layers)
        config, described, shapes = opened.config, opened.described, opened.shapes
        _check_files(opened)
        dtypes = {str(tensor.dtype).removeprefix("torch.") for _, tensor in opened.own()}  # each is read, and finite
        for name in opened.names.keys() - shapes.keys():
            opened[name]  # read, and finite
        return {
            "path": str(path),
            "method": config.method,
            "form": "speculators" if described.speculators else "qwen3",
            "tensors": len(shapes),
            "parameters": sum(map(math.prod, shapes.values())),
            "dtypes": sorted(dtypes),
            "layers": list(config.target_layer_ids),
            "block_size": config.block_size,
            "proposals": config.proposals,
            "proposed_ids": described.proposed,
            "vocab_size": config.vocab_size,
            "probe": check_probe(opened),
        }
    except UsageError as error:
        raise ProofError(f"check-export: {error}") from error


def checked_table(facts: dict) -> str:
    """Return the text that `check-export` prints for a sound folder."""
    ids = f", proposes {facts['proposed_ids']:,} ids" if facts["proposed_ids"] < facts["vocab_size"] else ""
    first = (
        f"{facts['path']}: a {facts['method']} draft in the form of {facts['form']}, {facts['tensors']} tensors, "
        f"{facts['parameters']:,} parameters, {' and '.join(facts['dtypes'])}; reads layers {facts['layers']}, "
        f"{facts['proposals']} proposals in blocks of {facts['block_size']}{ids}"
    )
    probe = facts["probe"]
    if probe is None:
        return f"{first}\nno probe lies with it, so what it computes is not compared with what its trainer computed"
    return (
        f"{first}\nlogits recomputed from the files within {probe['difference']:.0e} of those stored at export, "
        f"{probe['blocks']} blocks of {probe['source']}"
    )


def _check_files(opened: Opened) -> None:
    """Refuse other files that an engine would load beside, or instead of, the weights."""
    loaded = {file.name for file in opened.weights.files}
    others = sorted({file.name for pattern in _LOADED for file in opened.path.glob(pattern)} - loaded)
    if others:
        raise UsageError(
            f"{opened.path / others[0]} lies beside {', '.join(sorted(loaded))}, and engines load every such file as "
            f"weights; leave {WEIGHTS} alone"
        )


def write_probe(folder: Path, draft: Draft, cell: Cell, blocks: Blocks, source: str) -> None:
    """Write the probe of the draft whose config and weights lie in `folder`, computed by its own modules.

    cell: of one document, from its first row on. blocks: all kept.
    """
    head = draft.target
    logits_NSV, confidence_NS = draft.teacher_forced(cell, blocks)
    ids_I = torch.cat([blocks.input_ids_NS.flatten(), blocks.prev_NS.flatten()]).unique()
    may_C = logits_NSV[0, 0].isfinite().nonzero()[:, 0]  # the ids that the draft may propose
    even_C = may_C[torch.linspace(0, len(may_C) - 1, COLUMNS, device=may_C.device).long()]
    labels_C = blocks.labels_NS.flatten()
    columns_C = torch.cat([labels_C[torch.isin(labels_C, may_C)], even_C]).unique()
    tensors = {
        "features_KTD": cell.aux_KRD.float(),
        "anchors_N": blocks.anchors_N,
        "prev_NS": blocks.prev_NS,
        "ids_I": ids_I,
        "embedded_ID": head.embed(ids_I).float(),
        "columns_C": columns_C,
        "head_CD": head.head_VD[columns_C].float(),
        "logits_NSC": logits_NSV[..., columns_C],
    }
    if confidence_NS is not None:
        tensors["confidence_NS"] = confidence_NS.float()
    files = {name: FileFact.of_file(folder / name).as_dict() for name in (CONFIG, WEIGHTS)}
    facts = {"files": files, "logit_softcap": head.logit_softcap, "source": source}
    save_tensors(tensors, folder / PROBE, metadata={FACTS: json.dumps(facts, sort_keys=True)})


def check_probe(opened: Opened) -> dict | None:
    """Recompute the probe of a folder by `Draft.reference`; return what it shows, None without a probe.

    `difference` is the largest of recomputed from stored logits, relative to the largest logit. UsageError when config
    or weights are not those it was made with, or the logits differ.
    """
    path = opened.path / PROBE
    if not path.is_file():
        return None
    facts, tensors = _read(path)
    for name, fact in facts["files"].items():
        if name not in (CONFIG, WEIGHTS) or FileFact.of_file(opened.path / name).as_dict() != fact:
            raise UsageError(f"{opened.path / name} is not what was exported: its bytes have changed; export it again")
    _check_fits(opened, path, tensors)
    differences = []
    for block, anchor in enumerate(tensors["anchors_N"].tolist()):
        logits_SC, confidence_S = _recompute(opened, tensors, block, anchor, facts["logit_softcap"])
        pairs = [(logits_SC, tensors["logits_NSC"][block])]
        if confidence_S is not None:
            pairs.append((confidence_S, tensors["confidence_NS"][block]))
        differences += [float((computed - stored).abs().max() / stored.abs().max()) for computed, stored in pairs]
    wrong = [difference for difference in differences if not difference <= TOLERANCE]  # NaN is wrong, too
    if wrong:
        raise UsageError(
            f"{opened.path}: logits recomputed from its files differ from those stored at export by {wrong[0]:.2g}, "
            f"more than {TOLERANCE:g}; export it again"
        )
    return {"blocks": len(tensors["anchors_N"]), "difference": max(differences), "source": str(facts["source"])}


def _read(path: Path) -> tuple[dict, dict[str, Tensor]]:
    try:
        if check_regular(path) > MOST_BYTES:
            raise ValueError("far larger than a probe is")
        with safe_open(path, framework="pt") as file:
            facts = parse_json((file.metadata() or {})[FACTS])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
            facts["files"], facts["logit_softcap"], facts["source"], *(tensors[name] for name in _TENSORS)
            facts["files"][WEIGHTS], facts["files"][CONFIG]
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        refuse_limit(path, error)
        raise UsageError(f"{path} is no probe of an export ({error}); export the draft again") from error
    return facts, tensors


def _check_fits(opened: Opened, path: Path, tensors: dict[str, Tensor]) -> None:
    """Refuse a probe whose shapes and ids are not the draft's, before anything is computed from them."""
    config, shapes = opened.config, {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    N, S, C = len(tensors["anchors_N"]), config.block_size, len(tensors["columns_C"])
    D, K = config.hidden_size, len(config.target_layer_ids)
    ids, T = tensors["ids_I"].tolist(), (*shapes["features_KTD"], 0, 0)[1]
    wanted = {
        "features_KTD": (K, T, D),
        "anchors_N": (N,),
        "prev_NS": (N, S),
        "ids_I": (len(ids),),
        "embedded_ID": (len(ids), D),
        "columns_C": (C,),
        "head_CD": (C, D),
        "logits_NSC": (N, S, C),
    }
    if config.has_confidence:
        wanted["confidence_NS"] = (N, S)
    integers = {"anchors_N", "prev_NS", "ids_I", "columns_C"}
    dtypes = {name: torch.int64 if name in integers else torch.float32 for name in wanted}
    wrong = next((n for n in wanted if shapes.get(n) != wanted[n] or tensors[n].dtype != dtypes[n]), None)
    known = set(ids)
    if wrong is not None or not N or not C or not set(range(T)) >= set(tensors["anchors_N"].tolist()):
        raise UsageError(f"{path}: {wrong or 'anchors_N'} is not of the draft beside it; export the draft again")
    in_range = all(0 <= index < config.vocab_size for index in known | set(tensors["columns_C"].tolist()))
    if not in_range or not known >= set(tensors["prev_NS"].flatten().tolist()) | {config.mask_token_id}:
        raise UsageError(f"{path} has no embedding of an id that the draft reads; export the draft again")


def _recompute(
    opened: Opened, tensors: dict[str, Tensor], block: int, anchor: int, softcap: float | None
) -> tuple[Tensor, Tensor | None]:
    """Return logits [S, C] and confidence [S] of one block."""
    config, prev_S = opened.config, tensors["prev_NS"][block]
    row_of = {index: row for row, index in enumerate(tensors["ids_I"].tolist())}
    slots = [int(prev_S[0])] + [config.mask_token_id] * (config.block_size - 1)
    slots_SD, prev_SD = (
        tensors["embedded_ID"][[row_of[index] for index in ids]].float() for ids in (slots, prev_S.tolist())
    )

    def get(name: str) -> Tensor:
        return opened[name].float()

    features_KTD, columns_C = tensors["features_KTD"][:, :anchor], tensors["columns_C"]
    states = partial(block_states, get, config, features_KTD, slots_SD)
    probe = ProbeBlock(get, states, features_KTD, slots_SD, prev_S, prev_SD, columns_C, tensors["head_CD"])
    logits_SC, confidence_S = DRAFTS[config.method].reference(config, probe)
    return logits_SC if softcap is None else softcap * torch.tanh(logits_SC / softcap), confidence_S


def block_states(get: Get, config: DraftConfig, features_KTD: Tensor, slots_SD: Tensor) -> Tensor:
    """Return the states [S, D] of the block after its context (rows 0 .. T - 1): the anchor is at position T.

    slots_SD: the target's embeddings of the anchor and the mask tokens.
    """
    T, S = features_KTD.shape[1], len(slots_SD)
    fused_TF = torch.cat(list(features_KTD), dim=-1)
    context_TD = _norm(get("hidden_norm.weight"), fused_TF @ get("fc.weight").T, config)
    x_SD = slots_SD
    for index, kind in enumerate(config.layer_types):
        window = config.sliding_window if kind == "sliding_attention" else None
        part = _part(get, f"layers.{index}.")
        y_SD = _norm(part("input_layernorm.weight"), x_SD, config)
        x_SD = x_SD + _attention(_part(part, "self_attn."), config, y_SD, context_TD, _visible(T, S, window))
        z_SD = _norm(part("post_attention_layernorm.weight"), x_SD, config)
        gate_SI = F.silu(z_SD @ part("mlp.gate_proj.weight").T) * (z_SD @ part("mlp.up_proj.weight").T)
        x_SD = x_SD + gate_SI @ part("mlp.down_proj.weight").T
    return _norm(get("norm.weight"), x_SD, config)


def _part(get: Get, prefix: str) -> Get:
    return lambda name: get(prefix + name)


def _norm(weight: Tensor, x: Tensor, config: DraftConfig) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * weight


def _visible(T: int, S: int, window: int | None) -> Tensor:
    """Whether slot s sees key j [S, T + S]: everything, or on a sliding layer the context in the `window` positions up
    to its own, and the slots up to itself (SpecForge's rule: inside the block there is no window)."""
    if window is None:
        return torch.ones(S, T + S, dtype=torch.bool)
    distance = (T + torch.arange(S))[:, None] - torch.arange(T + S)
    return (distance >= 0) & ((distance < window) | (torch.arange(T + S) >= T))


def _attention(get: Get, config: DraftConfig, y_SD: Tensor, context_TD: Tensor, visible: Tensor) -> Tensor:
    """Attention of the slots over the context and themselves; keys and values of both by the same weights."""
    T, E = len(context_TD), config.head_dim
    keys_LD = torch.cat([context_TD, y_SD])

    def heads(name: str, x: Tensor, normed: bool) -> Tensor:
        out = x @ get(f"{name}_proj.weight").T + (get(f"{name}_proj.bias") if config.attention_bias else 0)
        out = out.unflatten(-1, (-1, E)).transpose(0, 1)
        return _norm(get(f"{name}_norm.weight"), out, config) if normed else out

    q = _rotate(heads("q", y_SD, True), T, config)
    k, v = _rotate(heads("k", keys_LD, True), 0, config), heads("v", keys_LD, False)
    shared = len(q) // len(k)  # query heads that read the same keys
    k, v = k.repeat_interleave(shared, 0), v.repeat_interleave(shared, 0)
    scores = (q @ k.mT / E**0.5).masked_fill(~visible, -torch.inf)
    out_SA = (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)
    return out_SA @ get("o_proj.weight").T + (get("o_proj.bias") if config.attention_bias else 0)


def _rotate(x_ALE: Tensor, first: int, config: DraftConfig) -> Tensor:
    """Rotary positions first, first + 1, ...: each half of a head with the other, at that position's angles."""
    half = x_ALE.shape[-1] // 2
    speed = torch.tensor([_rotary_frequency(index, half, config) for index in range(half)])
    angle = torch.arange(first, first + x_ALE.shape[1])[:, None] * speed
    left, right = x_ALE.split(half, -1)
    rotated = torch.cat([left * angle.cos() - right * angle.sin(), right * angle.cos() + left * angle.sin()], -1)
    return rotated if config.rope_scaling is None else rotated * config.rope_scaling.attention_factor


def _rotary_frequency(pair: int, half: int, config: DraftConfig) -> float:
    """Radians a token of one pair of channels, slowed down where the config scales them: fast pairs not, slow ones by
    the factor, those between in part."""
    theta, scaling = config.rope_theta, config.rope_scaling
    speed = theta ** -(pair / half)
    if scaling is None:
        return speed
    if scaling.rope_type == "linear":
        return speed / scaling.factor
    length = scaling.original_max_position_embeddings
    if scaling.rope_type == "llama3":
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        slow = (high - length * speed / (2 * math.pi)) / (high - low)
    else:
        ends = [
            half * math.log(length / (2 * math.pi * n), theta)
            for n in (scaling.beta_fast or 32, scaling.beta_slow or 1)
        ]
        if scaling.truncate is not False:
            ends = [math.floor(ends[0]), math.ceil(ends[1])]
        start, stop = max(ends[0], 0), min(ends[1], 2 * half - 1)
        slow = (pair - start) / (stop - start if stop != start else 0.001)
    slow = min(max(slow, 0.0), 1.0)
    return speed * (1 - slow + slow / scaling.factor)
