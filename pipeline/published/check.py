"""`pipeline check-export`: a published folder checked from its files alone, ours or anyone's.

Names and shapes are those of the publications, the arithmetic is written a second time (`Draft.tensors`,
`Draft.reference`); no module that trains takes part.

An export leaves a probe beside its weights: a few blocks, and the logits that the trainer computes on them. It has all
that is needed to check the folder without its target: the states before each block, the target's embedding of every id
in it, a few columns of the target's head. 2 to 3 MB for a target of 8B parameters. It is a file of its own, in the
layout of safetensors under a name that ends otherwise: engines read every `*.safetensors`, `*.bin` and `*.pt` of a
folder as weights, and the strict ones (vLLM) end on a name they do not know; in the weights' own header it would be
metadata that every reader parses, and that tools which save again drop.

    K layers   T context rows   D hidden size   N blocks   S slots   C columns   I ids
"""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pipeline.cache.manifest import FileFact
from pipeline.drafts import DRAFTS, Blocks, Cell, Draft
from pipeline.drafts.draft import ProbeBlock
from pipeline.errors import ProofError, UsageError, refuse_limit
from pipeline.json_files import check_regular, parse_json
from pipeline.published.folder import Opened, open_folder
from pipeline.published.reference import block_states
from pipeline.published.weights import CONFIG, WEIGHTS
from pipeline.tensors import save_tensors

# What engines load as weights, whatever it is called (vLLM and SGLang glob these).
_LOADED = ("*.safetensors", "*.bin", "*.pt")

PROBE, FACTS = "probe.tensors", "probe"
COLUMNS = 64
MOST_BYTES = 1 << 30
# Two float32 implementations differ by 1e-6 or so; a wrong constant, order or name by far more.
TOLERANCE = 1e-4
_TENSORS = ("features_KTD", "anchors_N", "prev_NS", "ids_I", "embedded_ID", "columns_C", "head_CD", "logits_NSC")


@dataclass(frozen=True)
class ProbeResult:
    """Result of a probe check: the largest difference of recomputed from stored logits, relative to the largest."""

    blocks: int
    difference: float
    source: str


@dataclass(frozen=True)
class Checked:
    """The facts of a sound folder."""

    opened: Opened
    tensors: int
    parameters: int
    dtypes: tuple[str, ...]
    probe: ProbeResult | None

    def as_dict(self) -> dict:
        config, described = self.opened.config, self.opened.described
        return {
            "path": str(self.opened.path),
            "method": config.method,
            "form": "speculators" if described.speculators else "qwen3",
            "tensors": self.tensors,
            "parameters": self.parameters,
            "dtypes": list(self.dtypes),
            "layers": list(config.target_layer_ids),
            "block_size": config.block_size,
            "proposals": config.proposals,
            "proposed_ids": described.proposed,
            "vocab_size": config.vocab_size,
            "probe": None if self.probe is None else vars(self.probe),
        }


def check_export(path: Path, target_layers: int | None = None) -> Checked:
    """Check a published folder: every expected tensor, none surplus, shapes, finite values, ids in range, the probe.

    target_layers: the target's depth, for folders that do not state it. ProofError for the first thing wrong,
    UsageError where there is no folder.
    """
    path = Path(path)
    if not path.is_dir():
        raise UsageError(f"{path} is no folder; name one that holds a published draft")
    try:
        opened = open_folder(path, target_layers)
        _check_files(opened)
        dtypes = {str(tensor.dtype).removeprefix("torch.") for _, tensor in opened.own()}  # each is read, and finite
        shapes = opened.shapes
        for name in opened.names.keys() - shapes.keys():
            _check_map(opened, name) if name in ("d2t", "t2d") else opened[name]
        count = sum(int(torch.Size(shape).numel()) for shape in shapes.values())
        return Checked(opened, len(shapes), count, tuple(sorted(dtypes)), check_probe(opened))
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


def _check_map(opened: Opened, name: str) -> None:
    """Refuse maps of reduced ids that leave the vocabulary, or contradict each other."""
    if not {"d2t", "t2d"} <= opened.names.keys():
        raise UsageError(f"{opened.path} holds only one of d2t and t2d; export it again")
    ids_W = opened["d2t"] + torch.arange(opened.described.proposed)
    may_V = opened["t2d"]
    vocabulary = opened.config.vocab_size
    if bool((ids_W < 0).any() or (ids_W >= vocabulary).any()):
        raise UsageError(f"{opened.path}: {name} leads outside the vocabulary of {vocabulary}; export it again")
    if not torch.equal(ids_W.sort().values, may_V.nonzero()[:, 0]):
        raise UsageError(f"{opened.path}: d2t and t2d name different ids; export it again")


def write_probe(folder: Path, draft: Draft, cell: Cell, blocks: Blocks, source: str) -> None:
    """Write the probe of the draft whose config and weights lie in `folder`, computed by its own modules.

    cell: of one document, from its first row on. blocks: all kept.
    """
    head = draft.target
    logits_NSV, confidence_NS = draft.teacher_forced(cell, blocks)
    ids_I = torch.cat([blocks.input_ids_NS.flatten(), blocks.prev_NS.flatten()]).unique()
    even_C = torch.linspace(0, head.vocab_size - 1, COLUMNS).long()
    columns_C = torch.cat([blocks.labels_NS.flatten(), even_C]).unique()
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


def check_probe(opened: Opened) -> ProbeResult | None:
    """Recompute the probe of a folder by `Draft.reference`. None without a probe.

    UsageError when config or weights are not those it was made with, or the logits differ.
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
    return ProbeResult(len(tensors["anchors_N"]), max(differences), str(facts["source"]))


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
