"""Which of the ways a cache was made in, found by value: the target computes a few samples again.

Two things no file says for certain: whether layers were counted from 0 (the first decoder layer's output is 0: z-lab,
SpecForge, DeepSpec) or from 1 (it is 1, and 0 is what enters it: Hugging Face's tuple, vLLM, speculators), and whether
the last state was taken after the norm or before it. Read the wrong way both train well, and nothing is accepted.

    P rows of a prefix   K layers   D hidden size   L depth of the target
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.errors import DataError, ProofError
from pipeline.target.model import tap_layers
from pipeline.target.probe import BOUNDS, ROWS, relative_error
from stages.import_cache.foreign_sample import Foreign, broken

# Added to the probe's bounds: other kernels round otherwise. Guesses: no foreign cache of a large target was measured.
# Read the wrong way, the bundled target's layers differ by 0.7.
SLACK = {torch.bfloat16: 3e-2, torch.float16: 3e-2, torch.float32: 1e-3}


@dataclass(frozen=True)
class Way:
    """`count_from` 0 or 1: what the first decoder layer's output is called. `last`: "normed", "raw", or "none" kept."""

    count_from: int
    last: str

    def layers(self, named: tuple[int, ...]) -> list[int]:
        """The layers by our convention, `pipeline/target/layers.py`."""
        return [layer - self.count_from for layer in named]


@dataclass(frozen=True)
class Errors:
    """Relative errors, the worst of all samples: of each stored layer to each entry [K, L + 1], 0 being what enters
    layer 0 and L the last layer before the norm; and of the last state, by way."""

    layers_KE: np.ndarray
    last: dict[str, float]


def settle(
    model: PreTrainedModel, samples: list[Foreign], named: tuple[int, ...], count_from: int | None, last: str | None
) -> tuple[Way, str]:
    """Return the way that fits, among those not excluded by what was said, and a line that gives the figures.

    Raises ProofError, with the figures, when none does.
    """
    dtype = samples[0].dtype
    bound = BOUNDS.get(dtype, BOUNDS[torch.float32]) + SLACK[dtype]
    errors = measure(model, samples)
    counted, line = _settle_count(errors, named, count_from, bound, samples[0].where)
    if last == "none" or not samples[0].has_last:
        return Way(counted, "none"), line
    taken, more = _settle_last(errors, last, bound, samples[0].where)
    return Way(counted, taken), f"{line}; {more}"


@torch.no_grad()
def measure(model: PreTrainedModel, samples: list[Foreign]) -> Errors:
    """Compute prefixes again and compare. DataError for tokens that the target does not know."""
    depth, device = model.config.get_text_config().num_hidden_layers, next(model.parameters()).device
    vocab = model.get_input_embeddings().weight.shape[0]
    tables, last = [], {"normed": 0.0, "raw": 0.0}
    for sample in samples:
        # Never the whole sample: see `probe.prefix_length`.
        ids_P = torch.from_numpy(sample.ids_T[: max(1, min(ROWS, len(sample.ids_T) - 1))].astype(np.int64))
        if int(ids_P.max()) >= vocab:
            raise DataError(
                f"{sample.where}: holds token {int(ids_P.max())}, outside of the target's {vocab}; name the --model "
                "that it was made with"
            )
        with tap_layers(model, [depth - 1]) as taken:
            truth = model(ids_P[None].to(device), output_hidden_states=True, use_cache=False)
        entries = [entry[0] for entry in (*truth.hidden_states[:-1], taken[depth - 1])]
        layers_PKD, last_PD = sample.rows(0, len(ids_P))
        if not all(part.isfinite().all() for part in (layers_PKD, last_PD) if part is not None):
            continue  # it will be left out, with a line of its own
        layers_PKD, last_PD = layers_PKD.to(device), None if last_PD is None else last_PD.to(device)
        tables.append([[_error(stored, entry) for entry in entries] for stored in layers_PKD.unbind(1)])
        if last_PD is not None:
            for way, wanted in (("normed", truth.hidden_states[-1][0]), ("raw", entries[-1])):
                last[way] = max(last[way], _error(last_PD, wanted))
    if not tables:
        raise broken(samples[0].where, "its states are not finite, nor are those of others looked at")
    return Errors(np.max(tables, axis=0), last)


def _error(stored: Tensor, truth: Tensor) -> float:
    error = relative_error(stored, truth)
    return error if np.isfinite(error) else float("inf")


def _settle_count(
    errors: Errors, named: tuple[int, ...], said: int | None, bound: float, where: str
) -> tuple[int, str]:
    """Return what the first layer is called, and a line. ProofError when neither way fits, or not the one `said`."""
    table, depth = errors.layers_KE, errors.layers_KE.shape[1] - 1
    worst, right = {}, []
    for count in (0, 1):
        at = [layer + 1 - count for layer in named]
        inside = all(0 <= entry < depth for entry in at)
        found = [table[k, entry] for k, entry in enumerate(at)] if inside else [float("inf")]
        worst[count] = max(found)
        nearest = inside and all(error <= table[k].min() for k, error in enumerate(found))
        right += [count] * (nearest and worst[count] <= bound and said in (None, count))
    if right:
        count, other = right[0], worst[1 - right[0]]
        instead = f"the other way {other:.1e}" if np.isfinite(other) else "the other way names no such layer"
        figures = f"error {worst[count]:.1e}, {instead}"
        return count, f"layers {_text(named)} are counted from {count} ({figures})"
    best, closest = table.argmin(axis=1), table.min(axis=1).max()
    if closest <= bound and best.max() < depth:
        hint = f"they are the layers {_text(best - 1)} counted from 0: pass --layers {_text(best - 1)} --count-from 0"
    else:
        hint = f"none fits better than {closest:.1e}: name the --model that made them, or make them again"
    both = " and ".join(f"{worst[count]:.1e} counted from {count}" for count in (0, 1) if said in (None, count))
    raise ProofError(
        f"{where}: what is named as layers {_text(named)} differs from the target's by {both}, at most {bound:.1e} is "
        f"right; {hint}; nothing was imported"
    )


def _settle_last(errors: Errors, said: str | None, bound: float, where: str) -> tuple[str, str]:
    """Return whether the last state is "normed" or "raw", and a line. ProofError when neither fits, or not `said`."""
    taken, other = sorted(errors.last, key=errors.last.get)
    fits = errors.last[taken] <= bound
    if fits and said in (None, taken):
        place = {"normed": "after", "raw": "before"}[taken]
        figures = f"error {errors.last[taken]:.1e}, the other way {errors.last[other]:.1e}"
        return taken, f"the last state is that {place} the norm ({figures})"
    figures = f"{errors.last['normed']:.1e} if it is after the norm, {errors.last['raw']:.1e} if before"
    hint = f"pass --last {taken}" if fits else "make them again, or leave them out with --last none"
    raise ProofError(
        f"{where}: its last state differs from the target's by {figures}, at most {bound:.1e} is right; {hint}; "
        "nothing was imported"
    )


def _text(layers: Iterable[int]) -> str:
    return ",".join(str(int(layer)) for layer in layers)
