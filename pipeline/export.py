"""Export: a trained draft as serving engines load it, proven before it has its name.

The folder is written aside, read back by `load_draft_folder`, which knows nothing of the trainer, and must give the
trainer's own logits and proposals; only then is it renamed.

    R rows of a cell   K layers   D hidden size   N blocks   S slots   P proposals   V vocabulary
"""

import json
import os
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pipeline.cache import HiddenCache
from pipeline.cache.disk import need_room, room, sync_file, sync_folder
from pipeline.checkpoint import find_checkpoint, load_config, load_draft
from pipeline.drafts import Blocks, Cell, Draft, DraftConfig, lay_blocks, pack
from pipeline.errors import CacheError, ProofError, UsageError
from pipeline.published import CONFIG, WEIGHTS, check_servable, load_draft_folder, published_config
from pipeline.recipe import load_recipe
from pipeline.target_head import TargetHead
from pipeline.tensors import save_tensors

# What training alone reads: a published config does not hold it.
UNPUBLISHED = {"gamma", "lambda_start", "lambda_decay", "weighting", "dpace_alpha"}
UNPUBLISHED |= {"objective", "alpha_ce", "alpha_l1", "alpha_confidence"}
PROBE_ROWS, PROBE_BLOCKS = 512, 16


@dataclass(frozen=True)
class Probe:
    """A cell and blocks to compare two drafts on, and where they come from."""

    head: TargetHead
    cell: Cell
    blocks: Blocks
    source: str


@dataclass(frozen=True)
class Rows:
    """A sample made of random states."""

    ids: Tensor
    mask: Tensor
    aux: Tensor


def export(run: Path, out: Path, format: str = "sglang") -> dict:
    """Write a run's newest checkpoint, or the checkpoint `run`, to the new folder `out`, and prove it.

    Weights are stored in the type the run computed in. Returns {"tensors", "parameters", "dtype", "proof"}. Raises
    UsageError when the engine cannot serve the draft or `out` is there and differs, ProofError when what is read
    back does not compute the same.
    """
    run, out = Path(run), Path(out)
    assert format == "sglang", f"unknown format {format!r}"
    config = load_config(run)
    check_servable(config)
    cache, dtype, trained_on = _origin(run)
    probe = make_probe(config, cache)
    draft = load_draft(run, probe.head)
    published = published_config(config, str(dtype).removeprefix("torch."), cache and cache.tokens, trained_on)
    unfinished = out.parent / f"tmp-{out.name}-{uuid.uuid4().hex}"
    need_room(out.parent, "an exported draft", sum(weight.numel() * dtype.itemsize for weight in draft.parameters()))
    with room(out.parent, "an exported draft"):
        try:
            _write(unfinished, published, draft, dtype)
            proof = prove(unfinished, draft, probe, dtype)
            _put(unfinished, out)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    weights = draft.state_dict().values()
    count = sum(weight.numel() for weight in weights)
    return {"tensors": len(weights), "parameters": count, "dtype": published["dtype"], "proof": proof}


def _origin(run: Path) -> tuple[HiddenCache | None, torch.dtype, dict | None]:
    """The cache a checkpoint's run was trained on, if it is still there, the type the run computed in, and what of
    the cache it was trained on."""
    folder = find_checkpoint(run).resolve().parent.parent
    facts = folder / "run.json"
    if not facts.is_file():
        return None, torch.float32, None
    cache, train = json.loads(facts.read_text("utf-8"))["cache"], load_recipe(folder / "recipe.toml").train
    trained_on, dtype = {"cache": cache["digest"], "heldout": train.heldout}, getattr(torch, train.dtype)
    try:
        found = HiddenCache.open(cache["path"])
    except (UsageError, CacheError):  # moved, deleted or damaged since; the draft is none the worse for it
        return None, dtype, trained_on
    return (found if found.digest == cache["digest"] else None), dtype, trained_on


def make_probe(config: DraftConfig, cache: HiddenCache | None) -> Probe:
    """Lay blocks over a cached sample; over random states and a random head where the cache is gone."""
    if cache is None:
        generator = torch.Generator().manual_seed(0)
        random_VD = torch.randn(config.vocab_size, config.hidden_size, generator=generator)
        head, T = TargetHead(random_VD, random_VD), 64
        shape = len(config.target_layer_ids), T, config.hidden_size
        ids_T = torch.randint(config.vocab_size, (T,), generator=generator)
        rows, source = Rows(ids_T, torch.ones(T).bool(), torch.randn(shape, generator=generator)), "random states"
    else:
        usable = cache.samples.usable(config.target_layer_ids)
        index = next(i for i in range(len(cache)) if usable[i] and cache.samples.supervised[i])
        sample = cache.read(index, layers=config.target_layer_ids)
        rows = Rows(sample.ids[:PROBE_ROWS], sample.mask[:PROBE_ROWS], sample.aux[:, :PROBE_ROWS].float())
        head, source = cache.head(), f"sample {cache.samples.hex(index)} of the cache"
    cell = pack([rows], ["probe"])
    anchors_N = torch.linspace(0, len(rows.ids) - 1, min(PROBE_BLOCKS, len(rows.ids))).long()
    return Probe(head, cell, lay_blocks(cell, anchors_N, torch.ones_like(anchors_N).bool(), config), source)


def _write(folder: Path, published: dict, draft: Draft, dtype: torch.dtype) -> None:
    folder.mkdir(parents=True)
    (folder / CONFIG).write_text(json.dumps(published, indent=2, sort_keys=True) + "\n")
    tensors = {name: tensor.to(dtype) for name, tensor in draft.state_dict().items()}
    save_tensors(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    for name in (CONFIG, WEIGHTS):
        sync_file(folder / name)
    sync_folder(folder)


def prove(folder: Path, draft: Draft, probe: Probe, dtype: torch.dtype) -> str:
    """Read the folder back from its files alone and compare with the trainer's draft; return what was proven.

    The trainer's weights are rounded to the stored type first; then logits and proposals must be equal to the bit.
    ProofError otherwise.
    """
    try:
        opened = load_draft_folder(folder, probe.head)
    except UsageError as error:
        raise ProofError(f"the exported draft cannot be read back: {error}") from error
    hidden = DraftConfig.model_fields.keys() - UNPUBLISHED
    changed = [key for key in sorted(hidden) if getattr(opened.config, key) != getattr(draft.config, key)]
    if changed:
        was, now = (getattr(which.config, changed[0]) for which in (draft, opened))
        raise ProofError(f"the exported draft reads {changed[0]} = {now}, the trained one has {was}; please report it")
    exact_NSV, _ = _compute(draft, probe)
    for parameter in draft.parameters():
        parameter.data = parameter.data.to(dtype).float()
    wanted_NSV, wanted_NP = _compute(draft, probe)
    found_NSV, found_NP = _compute(opened, probe)
    if not (torch.equal(wanted_NSV, found_NSV) and torch.equal(wanted_NP, found_NP)):
        off = float((wanted_NSV - found_NSV).abs().max() / wanted_NSV.abs().max())
        raise ProofError(f"logits of the exported draft differ from the trainer's by {off:.3g}; please report it")
    rounding = float((exact_NSV - found_NSV).norm() / exact_NSV.norm())
    rounded = f", {rounding:.1e} off float32 by rounding" if rounding else ""
    return f"logits and proposals equal on {len(found_NP)} blocks of {probe.source}{rounded}"


@torch.no_grad()
def _compute(draft: Draft, probe: Probe) -> tuple[Tensor, Tensor]:
    """Teacher-forced logits [N, S, V] and proposals [N, P] on the probe."""
    hidden_NSD = draft.hidden(probe.cell, probe.blocks)
    anchor_ids_N = probe.cell.ids_R[probe.blocks.anchors_N]
    return draft.logits(hidden_NSD, probe.blocks.prev_NS)["final"], draft.rollout(hidden_NSD, anchor_ids_N)


def _put(unfinished: Path, out: Path) -> None:
    """Give the finished folder its name. UsageError when another one has it; the same one is left as it is."""
    if not out.exists():
        os.rename(unfinished, out)
        return sync_folder(out.parent)
    names = (CONFIG, WEIGHTS)
    there = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    if there == sorted(names) and all((out / name).read_bytes() == (unfinished / name).read_bytes() for name in names):
        return None
    raise UsageError(f"{out} is there already and differs from this draft; pass another --out, or remove it")
