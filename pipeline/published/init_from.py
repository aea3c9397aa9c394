"""The weights that a training begins with: of a published draft, or of a run (`train-draft --init-from`)."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from pipeline.drafts import DRAFTS, Draft, DraftConfig
from pipeline.drafts.rope import RopeScaling
from pipeline.drafts.vocabulary import MAPS, carry_rows, ids_of
from pipeline.errors import UsageError
from pipeline.published.weights import open_folder, open_safetensors
from pipeline.runs.checkpoint import DRAFT, find_checkpoint, load_config, open_checkpoint, steps
from pipeline.target.head import TargetHead

# What a backbone's weights do not depend on, besides options of its method and what training alone reads.
OTHERS = {
    "method",
    "max_position_embeddings",
    "initializer_range",
    "rope_scaling",
    "block_size",
    "shift_label",
    "vocabulary",
}


@dataclass(frozen=True)
class InitialWeights:
    """Initial weights of a draft. `fresh`: tensors still initialised at random. `summary`: one line."""

    path: Path
    tensors: dict[str, Tensor]
    fresh: tuple[str, ...]
    summary: str
    rope_scaling: RopeScaling | None  # what they were trained with, which training goes on with
    digest: str  # of names, types and values: what a run is recorded to have started with
    ids_W: Tensor | None = None  # the target's id of each row of the method's `rows_of_ids`; None: they have all

    def load_into(self, draft: Draft) -> None:
        """Load the weights into a draft; its other tensors, and rows of ids that these have not, stay as they are."""
        tensors = dict(self.tensors)
        for name in tensors.keys() & set(draft.rows_of_ids):
            ids_X = draft.target_ids(torch.arange(draft.config.proposable, device=draft.device))
            tensors[name] = carry_rows(self.ids_W, tensors[name], ids_X, draft.state_dict()[name])
        missing, surplus = draft.load_state_dict(tensors, strict=False)
        wanted = set(missing) - MAPS  # those are counted anew
        assert not surplus and wanted == set(self.fresh), f"{missing} and {surplus}, expected {self.fresh}"


@dataclass(frozen=True)
class InitialDraft:
    """The draft that --init-from names. Commands that train are given it: they know of no published form.

    path: a published folder of any form, SpecForge's training checkpoint with the draft's config.json beside it, or a
    run or checkpoint of ours.
    """

    path: Path

    def weights_for(self, wanted: DraftConfig, head: TargetHead | None = None) -> InitialWeights:
        """Return its weights for a draft of the config `wanted`. Only what fits is taken: a draft that reads other
        layers, another mask token or other positions would load, and have to unlearn. The bare backbone starts a draft
        of any method on it, whose own head begins random; so do rows of ids that a reduced draft could not propose.

        head: the target's; copies of it that the folder brings are compared with it. UsageError naming the first thing
        that does not fit, with both values.
        """
        path = self.path
        if (path / DRAFT).is_file() or steps(path):
            config, checkpoint = load_config(path), find_checkpoint(path)
            open_checkpoint(checkpoint)
            tensors, proposed = open_safetensors([checkpoint / DRAFT]), config.proposable
        else:
            opened = open_folder(path, wanted.num_target_layers)
            if head is not None:
                opened.check_copies(head.embed_VD, head.head_VD)
            config, tensors, proposed = opened.config, dict(opened.own()), opened.described.proposed
        _check_fits(path, config, wanted)
        method, source = DRAFTS[wanted.method], DRAFTS[config.method]
        if proposed < wanted.vocab_size and not (source.only_backbone or source.reduces_vocabulary):
            bare = " or ".join(draft.title for draft in DRAFTS.values() if draft.only_backbone)
            raise UsageError(
                f"{path} proposes {proposed} of {wanted.vocab_size} ids, and its {config.method} head knows no others; "
                f"start from a draft of the whole vocabulary, or from a {bare} one"
            )
        taken = {name: tensors[name] for name in method.starting_tensors(wanted, source)}
        fresh = tuple(sorted(method.tensors(wanted).keys() - taken.keys() - MAPS))
        rows = taken.keys() & set(method.rows_of_ids)
        ids_W = ids_of(tensors["d2t"]) if rows and config.proposable < config.vocab_size else None
        summary = _summary(path, config, wanted, fresh, () if ids_W is None else sorted(rows))
        digest = _digest(taken if ids_W is None else taken | {"ids": ids_W})
        return InitialWeights(path, taken, fresh, summary, config.rope_scaling, digest, ids_W)


def _check_fits(path: Path, config: DraftConfig, wanted: DraftConfig) -> None:
    method = DRAFTS[wanted.method]
    if method.starting_tensors(wanted, DRAFTS[config.method]) is None:
        able = [name for name, draft in DRAFTS.items() if method.starting_tensors(wanted, draft)]
        others = " or ".join(dict.fromkeys([wanted.method, *able]))
        raise UsageError(
            f"{path} is a {config.method} draft, wanted is {wanted.method}: its backbone leans on its own head; start "
            f"from a {others} draft, or set draft.method = {json.dumps(config.method)}"
        )
    # With another value the backbone's weights compute something else, or do not fit.
    keys = [name for name in DraftConfig.model_fields if name not in DraftConfig.training_only | OTHERS]
    if config.method == wanted.method:
        keys += ["shift_label", *(name for name in wanted.published_options() if name not in OTHERS)]
    for key in keys:
        there, here = ([*value] if isinstance(value := getattr(of, key), tuple) else value for of in (config, wanted))
        if there != here:
            raise UsageError(
                f"{path} has {key} = {there}, wanted is {here}; weights trained with the one are "
                "of no use to the other: change the recipe to it, or start from another draft"
            )


def _summary(
    path: Path, config: DraftConfig, wanted: DraftConfig, fresh: tuple[str, ...], partial: Sequence[str]
) -> str:
    """partial: tensors with rows of some ids only."""
    parts = [f"starting from the {config.method} draft {path}"]
    if fresh:
        heads = ", ".join(sorted({name.partition(".")[0] for name in fresh}))
        parts.append(f"{heads} fresh, as {wanted.method} has and {config.method} has not")
    if partial:
        parts.append(f"fresh in {' and '.join(partial)} the rows of ids that it did not propose")
    if config.shift_label != wanted.shift_label:
        slots = ("anchor + k", "anchor + k + 1")
        parts.append(f"slot k, which guessed {slots[config.shift_label]}, now learns {slots[wanted.shift_label]}")
    if config.block_size != wanted.block_size:
        parts.append(f"blocks of {wanted.block_size}, which were {config.block_size}")
    return "; ".join(parts)


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()
