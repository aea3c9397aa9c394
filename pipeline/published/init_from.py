"""Initial weights for a training run: from a published draft, a trainer's checkpoint, or a run.

Only what fits is taken: a draft that reads other layers, another mask token or other positions would load, and have to
unlearn. A DFlash draft starts a Domino or DSpark one, whose own head begins fresh.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from pipeline.drafts import Draft, DraftConfig
from pipeline.drafts.rope_scaling import RopeScaling
from pipeline.errors import UsageError
from pipeline.published.folder import open_folder
from pipeline.published.names import backbone_tensors, draft_tensors, head_tensors
from pipeline.published.weights import open_safetensors
from pipeline.runs.checkpoint import DRAFT, find_checkpoint, load_config, open_checkpoint, steps
from pipeline.target.head import TargetHead

# What the backbone's weights were trained to: with another value they compute something else, or do not fit.
BACKBONE = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "attention_bias",
    "rms_norm_eps",
    "rope_theta",
    "layer_types",
    "sliding_window",
    "num_target_layers",
    "target_layer_ids",
    "mask_token_id",
)
# The same for a whole draft of one method.
HEADS = ("shift_label", "pure_draft_prefix_len", "emb_dim", "gru_hidden_dim", "markov_rank", "markov_head_type")
HEADS += ("enable_confidence_head", "confidence_head_with_markov")


@dataclass(frozen=True)
class InitialWeights:
    """Initial weights of a draft. `fresh`: tensors still initialised at random. `summary`: one line."""

    place: Path
    tensors: dict[str, Tensor]
    fresh: tuple[str, ...]
    summary: str
    rope_scaling: RopeScaling | None  # what they were trained with, which training goes on with
    digest: str  # of names, types and values: what a run is recorded to have started with

    def load_into(self, draft: Draft) -> None:
        """Load the weights into a draft; its other tensors stay as they are."""
        missing, surplus = draft.load_state_dict(self.tensors, strict=False)
        assert not surplus and set(missing) == set(self.fresh), f"{missing} and {surplus}, expected {self.fresh}"


@dataclass(frozen=True)
class InitialDraft:
    """The draft that --init-from names. Commands that train are given it: they know of no published form."""

    place: Path

    def weights_for(self, wanted: DraftConfig, head: TargetHead | None = None) -> InitialWeights:
        """As `load_initial_weights`."""
        return load_initial_weights(self.place, wanted, head)


def load_initial_weights(place: Path, wanted: DraftConfig, head: TargetHead | None = None) -> InitialWeights:
    """Return the weights at `place` for a draft of the config `wanted`.

    place: a published folder of any form, SpecForge's training checkpoint with the draft's config.json beside it, or a
    run or checkpoint of ours. head: the target's; copies of it that the folder brings are compared with it. UsageError
    naming the first thing that does not fit, with both values.
    """
    place = Path(place)
    config, tensors, proposed = _read_run(place) if _is_run(place) else _read_published(place, wanted, head)
    _check_fits(place, config, wanted)
    same = config.method == wanted.method
    if proposed < wanted.vocab_size and head_tensors(config):
        raise UsageError(
            f"{place} proposes {proposed} of {wanted.vocab_size} ids, and its {config.method} head knows no others; "
            "start from a draft of the whole vocabulary, or from a DFlash one"
        )
    taken = {name: tensors[name] for name in (draft_tensors(wanted) if same else backbone_tensors(wanted))}
    fresh = tuple(sorted(draft_tensors(wanted).keys() - taken.keys()))
    return InitialWeights(
        place, taken, fresh, _summary(place, config, wanted, fresh), config.rope_scaling, _digest(taken)
    )


def _is_run(place: Path) -> bool:
    return (place / DRAFT).is_file() or bool(steps(place))


def _read_run(place: Path) -> tuple[DraftConfig, dict[str, Tensor], int]:
    checkpoint, config = find_checkpoint(place), load_config(place)
    open_checkpoint(checkpoint)
    weights = open_safetensors([checkpoint / DRAFT])
    return config, {name: weights[name] for name in weights.shapes}, config.vocab_size


def _read_published(place: Path, wanted: DraftConfig, head: TargetHead | None):
    opened = open_folder(place, wanted.num_target_layers)
    if head is not None:
        opened.check_copies(head.embed_VD, head.head_VD)
    return opened.config, dict(opened.own()), opened.described.proposed


def _check_fits(place: Path, config: DraftConfig, wanted: DraftConfig) -> None:
    if config.method not in (wanted.method, "dflash"):
        others = "dflash" if wanted.method == "dflash" else f"{wanted.method} or dflash"
        raise UsageError(
            f"{place} is a {config.method} draft, wanted is {wanted.method}: its backbone leans on its own head; start "
            f"from a {others} draft, or set draft.method = {json.dumps(config.method)}"
        )
    keys = BACKBONE + HEADS if config.method == wanted.method else BACKBONE
    for key in keys:
        there, here = getattr(config, key), getattr(wanted, key)
        if there != here:
            raise UsageError(
                f"{place} has {key} = {_plain(there)}, wanted is {_plain(here)}; weights trained with the one are "
                "of no use to the other: change the recipe to it, or start from another draft"
            )


def _plain(value):
    return list(value) if isinstance(value, tuple) else value


def _summary(place: Path, config: DraftConfig, wanted: DraftConfig, fresh: tuple[str, ...]) -> str:
    parts = [f"starting from the {config.method} draft {place}"]
    if fresh:
        heads = sorted({name.partition(".")[0] for name in fresh})
        parts.append(f"{', '.join(heads)} fresh, as {wanted.method} has and {config.method} has not")
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
