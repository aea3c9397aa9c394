"""Export: a trained draft as serving engines load it, proven before it has its name.

The folder is written aside and read back from its files alone. The draft that `load_draft_folder` makes of them must
give the trainer's own logits and proposals to the bit, and `check_export`, which shares no code with the trainer, the
same logits on the probe that is stored beside the weights; only then is it renamed.

config.json is as the draft's engine reads it, every key written out: SGLang, speculators (vLLM), or DeepSpec's
evaluator, whose class also has the target's embedding and head from the draft's folder, or draws them at random.
Readers fall back on defaults of their own for what is left out, and one that guesses the label convention or counts the
layers from the embedding serves a draft that accepts nothing. So keys that they seek in two places stand in both.

    R rows of a cell   K layers   D hidden size   N blocks   S slots   P proposals   V vocabulary
"""

import json
import os
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from pipeline.cache import HiddenCache, Sample
from pipeline.cache.atomic import Scratch, check_free_space, clean_scratch_of, sync_file, sync_folder, write_errors
from pipeline.drafts import DRAFTS, Blocks, Cell, Draft, DraftConfig, check_servable, lay_blocks, pack
from pipeline.errors import ProofError, UsageError
from pipeline.published import CONFIG, WEIGHTS, load_draft_folder
from pipeline.published.card import CARD, Origin, card, provenance
from pipeline.published.check import PROBE, check_export, write_probe
from pipeline.published.reading import DEEPSPEC, EMBEDDING, HEAD, SHARED, TRAINED_ON
from pipeline.runs.checkpoint import load_config, load_draft
from pipeline.runs.training_data import training_config
from pipeline.target.head import TargetHead, logit_scale
from pipeline.tensors import save_tensors

PROBE_ROWS, PROBE_BLOCKS = 512, 16
KEPT_ROWS, KEPT_BLOCKS = 24, 2  # of the probe that is stored with the export
FILES = (CONFIG, WEIGHTS, PROBE, CARD)
ANCHORS = 512  # DeepSpec's own, where the run does not say
SCRATCH_LABEL, DRAFT = "export", "draft"  # where it is written until it is proven


def export(run: Path, out: Path, format: str = "sglang") -> dict:
    """Write a run's newest checkpoint, or the checkpoint `run`, to the new folder `out`, and prove it.

    Weights are stored in the type the run computed in. Returns {"tensors", "parameters", "dtype", "proof"}. Raises
    UsageError when the engine cannot serve the draft or `out` is there and differs, ProofError when what is read
    back does not compute the same.
    """
    run, out = Path(run), Path(out)
    config, (cache, origin) = load_config(run), provenance(run)
    scale = 1.0 if cache is None else logit_scale(training_config(cache.target_config))
    check_servable(config, format, origin.tokens, scale)
    rows, head, source = make_rows(config, cache)
    copies = deepspec_copies(head, cache, run) if format == "deepspec" else {}
    draft, dtype = load_draft(run, head), getattr(torch, origin.dtype)
    parameters = sum(weight.numel() for weight in draft.parameters())
    clean_scratch_of(out.parent, SCRATCH_LABEL)  # of exports that were killed, of this draft or another
    stored = parameters + sum(tensor.numel() for tensor in copies.values())
    check_free_space(out.parent, "an exported draft", stored * dtype.itemsize)
    with write_errors(out.parent, "an exported draft"):
        out.parent.mkdir(parents=True, exist_ok=True)
        with Scratch(out.parent, SCRATCH_LABEL) as scratch:
            unfinished = scratch.path / DRAFT
            _write(unfinished, published_config(config, format, origin), draft, dtype, copies)
            proof = prove(unfinished, draft, *make_probe(config, rows), source, dtype)
            kept = make_probe(config, shorter(rows), KEPT_BLOCKS)
            write_probe(unfinished, draft, *kept, source)  # with the weights as they are stored now
            difference = check_export(unfinished)["probe"]["difference"]
            proof += f"; plain arithmetic on the files gives the same within {difference:.0e}"
            (unfinished / CARD).write_text(card(config, format, origin, parameters, out.name), "utf-8")
            for file in FILES:
                sync_file(unfinished / file)
            sync_folder(unfinished)
            _rename_into_place(unfinished, out)
    weights = draft.state_dict().values()
    count = sum(weight.numel() for weight in weights)
    return {"tensors": len(weights), "parameters": count, "dtype": origin.dtype, "proof": proof}


def make_rows(config: DraftConfig, cache: HiddenCache | None) -> tuple[Sample, TargetHead, str]:
    """A cached sample, the target's head and where they are from; random states and a random head where the cache is
    gone."""
    if cache is None:
        generator = torch.Generator().manual_seed(0)
        random_VD = torch.randn(config.vocab_size, config.hidden_size, generator=generator)
        shape = len(config.target_layer_ids), 64, config.hidden_size
        ids_T = torch.randint(config.vocab_size, (64,), generator=generator)
        rows = Sample(ids_T, torch.ones(64).bool(), torch.randn(shape, generator=generator))
        return rows, TargetHead(random_VD, random_VD), "random states"
    usable = cache.samples.usable(config.target_layer_ids)
    index = next(i for i in range(len(cache)) if usable[i] and cache.samples.supervised[i])
    length = int(cache.samples.length[index])
    sample = cache.read(index, layers=config.target_layer_ids, rows=(0, min(PROBE_ROWS, length)))
    return replace(sample, aux=sample.aux.float()), cache.head(), f"sample {cache.samples.hex(index)} of the cache"


def shorter(rows: Sample) -> Sample:
    return replace(rows, ids=rows.ids[:KEPT_ROWS], mask=rows.mask[:KEPT_ROWS], aux=rows.aux[:, :KEPT_ROWS])


def make_probe(config: DraftConfig, rows: Sample, count: int = PROBE_BLOCKS) -> tuple[Cell, Blocks]:
    """Lay blocks over rows, the last ones past their end."""
    cell = pack([rows], ["probe"])
    anchors_N = torch.linspace(0, len(rows.ids) - 1, min(count, len(rows.ids))).long()
    if count == KEPT_BLOCKS:
        anchors_N = anchors_N.clamp(min=len(rows.ids) // 2)  # a first block without context would show half as much
    return cell, lay_blocks(cell, anchors_N, config)


def deepspec_copies(head: TargetHead, cache: HiddenCache | None, run: Path) -> dict[str, Tensor]:
    """Return the target's embedding and head under DeepSpec's names, for its class has no other. UsageError where the
    cache that holds them is gone, or they are not all that the target computes."""
    if cache is None:
        raise UsageError(
            f"{run}: DeepSpec reads the target's embedding and head from the draft's folder, and the cache that holds "
            "them is gone; put it back, or export with --format sglang"
        )
    if head.embed_scale != 1.0 or head.logit_softcap is not None:
        raise UsageError(
            "DeepSpec's Qwen3 class neither scales embeddings nor caps logits, as this target does; export the draft "
            "with --format sglang"
        )
    # Copies, also where the two are one: safetensors stores no tensor twice.
    return {EMBEDDING: head.embed_VD.cpu(), HEAD: head.head_VD.cpu().clone()}


def _write(folder: Path, published: dict, draft: Draft, dtype: torch.dtype, copies: dict[str, Tensor]) -> None:
    folder.mkdir()
    (folder / CONFIG).write_text(json.dumps(published, indent=2, sort_keys=True) + "\n")
    tensors = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in (draft.state_dict() | copies).items()
    }
    tensors |= {name: tensor.to("cpu", dtype) for name, tensor in draft.published_copies().items()}
    save_tensors(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def prove(folder: Path, draft: Draft, cell: Cell, blocks: Blocks, source: str, dtype: torch.dtype) -> str:
    """Read the folder back from its files alone and compare with the trainer's draft; return what was proven.

    The trainer's weights are rounded to the stored type first; then logits and proposals must be equal to the bit.
    ProofError otherwise.
    """
    try:
        opened = load_draft_folder(folder, draft.target)
    except UsageError as error:
        raise ProofError(f"the exported draft cannot be read back: {error}") from error
    if type(opened) is not type(draft):
        raise ProofError(f"the exported draft reads as {type(opened).title}, not {draft.title}; please report it")
    published = type(draft.config).model_fields.keys() - draft.config.training_only
    changed = [key for key in sorted(published) if getattr(opened.config, key) != getattr(draft.config, key)]
    if changed:
        was, now = (getattr(which.config, changed[0]) for which in (draft, opened))
        raise ProofError(f"the exported draft reads {changed[0]} = {now}, the trained one has {was}; please report it")
    exact_NSV, _ = draft.teacher_forced(cell, blocks)
    for weight in draft.state_dict().values():
        if weight.is_floating_point():
            weight.copy_(weight.to(dtype))
    (wanted_NSV, _), (read_NSV, _) = (each.teacher_forced(cell, blocks) for each in (draft, opened))
    wanted, read = (each.greedy_proposals(cell, blocks) for each in (draft, opened))
    if not torch.equal(wanted_NSV, read_NSV) or wanted != read:
        off = float((wanted_NSV - read_NSV).abs().max() / wanted_NSV.abs().max())
        raise ProofError(f"logits of the exported draft differ from the trainer's by {off:.3g}; please report it")
    exact, rounded_once = (logits_NSV[logits_NSV.isfinite()] for logits_NSV in (exact_NSV, read_NSV))
    rounding = float((exact - rounded_once).norm() / exact.norm())
    rounded = f", {rounding:.1e} off float32 by rounding" if rounding else ""
    return f"logits and proposals equal on {len(read_NSV)} blocks of {source}{rounded}"


def _rename_into_place(unfinished: Path, out: Path) -> None:
    """Give the finished folder its name. UsageError when another one has it; the same one is left as it is."""
    if not out.exists():
        os.rename(unfinished, out)
        return sync_folder(out.parent)
    there = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    if there == sorted(FILES) and all((out / name).read_bytes() == (unfinished / name).read_bytes() for name in FILES):
        return None
    raise UsageError(f"{out} is there already and differs from this draft; pass another --out, or remove it")


def published_config(config: DraftConfig, form: str, origin: Origin) -> dict:
    """Return config.json for that form."""
    common = _qwen3(config, origin)
    flat = DRAFTS[config.method].own_config(config, form, common)
    if flat is None:
        if form == "deepspec":
            flat = _deepspec(config, origin, common)
        else:
            flat = _speculators(config, origin, common) if form == "speculators" else _sglang(config, common)
    if origin.trained_on is not None:
        flat[TRAINED_ON] = origin.trained_on | ({"target": origin.target} if origin.target else {})
    return flat


def _sglang(config: DraftConfig, common: dict) -> dict:
    """Return a Qwen3 config with `dflash_config`, as z-lab and SpecForge publish it."""
    nested = {
        "block_size": config.block_size,
        "mask_token_id": config.mask_token_id,
        "target_layer_ids": list(config.target_layer_ids),
        "shift_label": config.shift_label,
    }
    top = {
        "architectures": [DRAFTS[config.method].architectures[0]],
        "num_target_layers": config.num_target_layers,
        "block_size": config.block_size,
        "sample_from_anchor": config.shift_label,
        "shift_label": config.shift_label,
    }
    own, own_nested = DRAFTS[config.method].write_options(config, "sglang")
    return common | top | own | {"dflash_config": nested | own_nested}


def _speculators(config: DraftConfig, origin: Origin, common: dict) -> dict:
    """Return the form of the speculators library, which vLLM reads: layer ids count from the embedding, 0."""
    draft = DRAFTS[config.method]
    flat = {
        "architectures": [f"{draft.title}Speculator"],
        "speculators_model_type": config.method,
        "dtype": origin.dtype,
        "tie_word_embeddings": False,
        "block_size": config.block_size,
        "aux_hidden_state_layer_ids": [index + 1 for index in config.target_layer_ids],
        "mask_token_id": config.mask_token_id,
        "draft_vocab_size": config.proposable,
        "target_hidden_size": config.hidden_size,
        "num_target_layers": config.num_target_layers,  # ours: the form has no place for it
        "sample_from_anchor": config.shift_label,
        # speculators reads it for sliding layers only, but vLLM makes every layer causal where it is false.
        "sliding_window_non_causal": "sliding_attention" not in config.layer_types,
        "transformer_layer_config": common,
        "speculators_config": {
            "algorithm": config.method,
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": config.proposals}],
            "default_proposal_method": "greedy",
            "verifier": {"name_or_path": origin.target, "architectures": list(origin.architectures)},
        },
    }
    return flat | draft.write_options(config, "speculators")[0]


def _deepspec(config: DraftConfig, origin: Origin, common: dict) -> dict:
    """Return DeepSpec's form: all at the top level, every key that its class demands (`num_anchors`, which only its
    training reads, too). Without heads it is DeepSpec's own baseline, DFlash with next-position labels."""
    heads = {"markov_rank": 0, "markov_head_type": "vanilla", "enable_confidence_head": False}
    heads |= {"confidence_head_with_markov": False}
    stated = {name: getattr(config, name) for name in config.published_options()}
    options = {name: value for name, value in stated.items() if value is not None}
    return (
        common
        | heads
        | options
        | {
            "architectures": [DEEPSPEC],
            "num_target_layers": config.num_target_layers,
            "block_size": config.block_size,
            "mask_token_id": config.mask_token_id,
            "target_layer_ids": list(config.target_layer_ids),
            "num_anchors": origin.anchors or ANCHORS,
        }
    )


def _qwen3(config: DraftConfig, origin: Origin) -> dict:
    """Return what both forms state about the decoder layers."""
    sliding, tokens = "sliding_attention" in config.layer_types, origin.tokens or {}
    scaling = config.rope_scaling.as_config() if config.rope_scaling else {}
    flat = {name: getattr(config, name) for name in (*SHARED, "head_dim", "rope_theta")} | {
        "model_type": "qwen3",
        "dtype": origin.dtype,
        "layer_types": list(config.layer_types),
        "sliding_window": config.sliding_window,
        "use_sliding_window": sliding,
        "max_window_layers": config.num_hidden_layers,
        # Twice: transformers 5, and the engines with it, read the one, older versions the other.
        "rope_scaling": scaling or None,
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"} | scaling,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "use_cache": True,
        "bos_token_id": tokens.get("bos"),
        "eos_token_id": next(iter(tokens.get("eos") or ()), None),
    }
    if not sliding:
        # Left out of a sliding draft: engines then take sliding layers as causal and the others as not, as trained.
        flat["is_causal"] = False
    return flat
