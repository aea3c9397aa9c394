"""The layer convention: which hidden state a layer number means, everywhere in this project; the part of a target's
config.json that describes its layers. Imports nothing heavy.

**Layer i** is the raw residual output of decoder layer i, counted from 0: what enters layer i + 1. Layer -1 is what
enters layer 0, after any embedding scale. In Hugging Face's `hidden_states` tuple that is entry i + 1.
The last layer, L - 1, is never an auxiliary layer: serving engines cannot hook it, and Hugging Face's tuple has it
normed. **final** is what the LM head reads, after the last norm.
Engines that count otherwise (from 1, or by a layer's input) translate to this convention; no other code does.

    L depth of the target   K taps, the captured layers   T rows of a sample
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from pipeline.errors import UsageError


def text_config(config: dict) -> dict:
    """Return the part of a target's config that describes the decoder, which multimodal targets nest."""
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) and nested else config


def default_layers(depth: int, taps: int) -> list[int]:
    """Return the K layers a draft reads by default: evenly spaced from 1 to L - 3, fewer where they coincide.

    The formula of z-lab's and SpecForge's `build_target_layer_ids`, with Python's rounding (ties to even; they occur),
    because served checkpoints were trained with exactly these. Raises UsageError below four layers.
    """
    if depth < 4:
        raise UsageError(
            f"the target has {depth} layers, too few to place taps by rule; name the layers with `--layers`"
        )
    if taps < 1:
        raise UsageError(f"{taps} taps asked for; a draft reads at least one layer")
    if taps == 1:
        return [depth // 2]
    placed = [round(1 + j * (depth - 4) / (taps - 1)) for j in range(taps)]
    return sorted(set(placed))


def default_taps(depth: int) -> int:
    """Return how many layers are captured by default: five, or every second one of a shallow target (8: three)."""
    return max(1, min(5, (depth - 2) // 2))


def check_layers(layers: Sequence[int], depth: int) -> None:
    """Raise UsageError for layers that are not strictly increasing or not within -1 .. depth - 2."""
    layers = list(layers)
    if not layers:
        raise UsageError("no layer is named; a draft reads at least one")
    if any(after <= before for before, after in pairwise(layers)):
        raise UsageError(f"layers {layers} are not strictly increasing; write {sorted(set(layers))}")
    outside = [layer for layer in layers if not -1 <= layer <= depth - 2]
    if outside:
        raise UsageError(
            f"layers {outside} do not exist or cannot be captured: the target has {depth} layers, so -1 (what enters "
            f"layer 0) to {depth - 2} can be kept; the last layer's state is kept as `final`, after the norm"
        )


def final_rows(mask_T: np.ndarray) -> np.ndarray:
    """Return which rows of `final` are stored, bool [T]: row r iff the loss mask is set at r-1, r or r+1.

    Enough for every known method: the target's distribution for the label at t is at row t - 1; EAGLE-family losses
    read the row itself or the next.
    """
    mask_T = np.asarray(mask_T, dtype=bool)
    kept_T = mask_T.copy()
    kept_T[1:] |= mask_T[:-1]
    kept_T[:-1] |= mask_T[1:]
    return kept_T
