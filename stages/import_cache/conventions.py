"""The layer convention of a source: from an unfinished import, the options, the files, or found by value.

Two things no file says for certain: whether layers were counted from 0 (the first decoder layer's output is 0: z-lab,
SpecForge, DeepSpec) or from 1 (it is 1, and 0 is what enters it: Hugging Face's tuple, vLLM, speculators), and whether
the last state was taken after the norm or before it. With either wrong, training looks fine and no token is accepted.
So the target computes the states of a few samples again, and what the convention says has to be what it computes.

    P rows of a prefix   K layers   D hidden size   L depth of the target
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.cache.catalog import Catalog
from pipeline.errors import DataError, ProofError, UsageError
from pipeline.target.model import tap_layers
from pipeline.target.probe import BOUNDS, ROWS, relative_error
from pipeline.visible_text import print_visible, visible
from stages.import_cache.foreign_sample import ForeignSample, PartialConvention, Source, bad_file
from stages.import_cache.target import Target

# Added to the probe's bounds: other kernels round otherwise. Guesses: no foreign cache of a large target was measured.
# With the wrong convention, the bundled target's layers differ by 0.7.
EXTRA_TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 3e-2, torch.float32: 1e-3}


@dataclass(frozen=True)
class Convention:
    """`count_from`: the number of the first decoder layer's output, 0 or 1. `last`: "normed", "raw", or "none" kept."""

    count_from: int
    last: str

    def layers(self, named: tuple[int, ...]) -> list[int]:
        """Return the layers in this project's numbering, see `pipeline/target/layers.py`."""
        return [layer - self.count_from for layer in named]


@dataclass(frozen=True)
class Errors:
    """Relative errors, the worst of all samples: of each stored layer to each entry [K, L + 1], 0 being what enters
    layer 0 and L the last layer before the norm; and of the last state, "normed" and "raw"."""

    layers_KE: np.ndarray
    last: dict[str, float]


def choose_convention(
    source: Source,
    first: ForeignSample,
    named: tuple[int, ...],
    requested: PartialConvention,
    catalog: Catalog,
    target: Target,
) -> Convention:
    """Return the convention of the source, whose first sample is `first` and whose layers are `named`.

    UsageError where the options do not fit, ProofError as `find_convention`.
    """
    if not first.has_last and requested.last not in (None, "none"):
        raise UsageError(f"{first.where}: holds no last state, so it is not {requested.last}; leave out --last")
    if recorded := recorded_convention(catalog):
        count_from = recorded[0] if requested.count_from is None else requested.count_from
        convention = Convention(count_from, requested.last or recorded[1])
    elif target.proven:
        middle_and_end = {len(source.locations) // 2, len(source.locations) - 1} - {0}
        samples = [first, *(source.open(*source.locations[number]) for number in sorted(middle_and_end))]
        convention, line = find_convention(target.model, samples, named, requested.count_from, requested.last)
        print_visible(visible(f"{source.form}: {line}"), err=True)
    else:
        convention = stated_convention(source, requested, first)
    if convention.last == "raw" and not target.proven:
        raise UsageError("--last raw needs the target's norm; import without --unproven, or with --last none")
    return convention


def recorded_convention(catalog: Catalog) -> tuple[int, str] | None:
    """Return (count_from, last) as recorded in the cache, None where there is none."""
    if not catalog.exists:
        return None
    imported = catalog.identity.capture.imported
    return imported and (imported.count_from, imported.last)


def stated_convention(source: Source, requested: PartialConvention, first: ForeignSample) -> Convention:
    """Return the convention of the options or the files, with nothing computed. UsageError where one is missing."""
    count_from = source.stated.count_from if requested.count_from is None else requested.count_from
    last = (requested.last or source.stated.last) if first.has_last else "none"
    if count_from is None or last is None:
        absent = "--count-from" if count_from is None else "--last"
        raise UsageError(
            f"{first.where}: no file says what {absent} is to say, and --unproven computes nothing to find out; add "
            f"{absent}, or import without --unproven"
        )
    return Convention(count_from, last)


def find_convention(
    model: PreTrainedModel,
    samples: list[ForeignSample],
    named: tuple[int, ...],
    count_from: int | None,
    last: str | None,
) -> tuple[Convention, str]:
    """Return the convention that fits, among those that `count_from` and `last` allow, and a line with the errors.

    Raises ProofError, with the errors, when none fits.
    """
    dtype = samples[0].dtype
    bound = BOUNDS.get(dtype, BOUNDS[torch.float32]) + EXTRA_TOLERANCE[dtype]
    errors = measure_errors(model, samples)
    counted, line = _find_count_from(errors, named, count_from, bound, samples[0].where)
    if last == "none" or not samples[0].has_last:
        return Convention(counted, "none"), line
    taken, more = _find_last(errors, last, bound, samples[0].where)
    return Convention(counted, taken), f"{line}; {more}"


@torch.no_grad()
def measure_errors(model: PreTrainedModel, samples: list[ForeignSample]) -> Errors:
    """Compute prefixes with the target and compare. DataError for tokens outside of its vocabulary."""
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
            for name, wanted in (("normed", truth.hidden_states[-1][0]), ("raw", entries[-1])):
                last[name] = max(last[name], _error(last_PD, wanted))
    if not tables:
        raise bad_file(samples[0].where, "its states are not finite, nor are those of others looked at")
    return Errors(np.max(tables, axis=0), last)


def _error(stored: Tensor, truth: Tensor) -> float:
    error = relative_error(stored, truth)
    return error if np.isfinite(error) else float("inf")


def _find_count_from(
    errors: Errors, named: tuple[int, ...], given: int | None, bound: float, where: str
) -> tuple[int, str]:
    """Return the first layer's number, and a line. ProofError when neither fits, or not the one `given`."""
    table, depth = errors.layers_KE, errors.layers_KE.shape[1] - 1
    worst, right = {}, []
    for count in (0, 1):
        at = [layer + 1 - count for layer in named]
        inside = all(0 <= entry < depth for entry in at)
        layer_errors = [table[k, entry] for k, entry in enumerate(at)] if inside else [float("inf")]
        worst[count] = max(layer_errors)
        nearest = inside and all(error <= table[k].min() for k, error in enumerate(layer_errors))
        right += [count] * (nearest and worst[count] <= bound and given in (None, count))
    if right:
        count, other = right[0], worst[1 - right[0]]
        instead = f"the other way {other:.1e}" if np.isfinite(other) else "the other way names no such layer"
        figures = f"error {worst[count]:.1e}, {instead}"
        return count, f"layers {_csv(named)} are counted from {count} ({figures})"
    best, closest = table.argmin(axis=1), table.min(axis=1).max()
    if closest <= bound and best.max() < depth:
        hint = f"they are the layers {_csv(best - 1)} counted from 0: pass --layers {_csv(best - 1)} --count-from 0"
    else:
        hint = f"none fits better than {closest:.1e}: name the --model that made them, or make them again"
    both = " and ".join(f"{worst[count]:.1e} counted from {count}" for count in (0, 1) if given in (None, count))
    raise ProofError(
        f"{where}: what is named as layers {_csv(named)} differs from the target's by {both}, at most {bound:.1e} is "
        f"right; {hint}; nothing was imported"
    )


def _find_last(errors: Errors, given: str | None, bound: float, where: str) -> tuple[str, str]:
    """Return "normed" or "raw" for the last state, and a line. ProofError when neither fits, or not `given`."""
    taken, other = sorted(errors.last, key=errors.last.get)
    fits = errors.last[taken] <= bound
    if fits and given in (None, taken):
        place = {"normed": "after", "raw": "before"}[taken]
        figures = f"error {errors.last[taken]:.1e}, the other way {errors.last[other]:.1e}"
        return taken, f"the last state is that {place} the norm ({figures})"
    figures = f"{errors.last['normed']:.1e} if it is after the norm, {errors.last['raw']:.1e} if before"
    hint = f"pass --last {taken}" if fits else "make them again, or leave them out with --last none"
    raise ProofError(
        f"{where}: its last state differs from the target's by {figures}, at most {bound:.1e} is right; {hint}; "
        "nothing was imported"
    )


def _csv(layers: Iterable[int]) -> str:
    return ",".join(str(int(layer)) for layer in layers)
