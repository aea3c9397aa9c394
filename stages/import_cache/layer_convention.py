"""The target of an import, and with it the layer convention of the source, found by value unless it is stated.

Two things no file says for certain: whether layers were counted from 0 (the first decoder layer's output is 0: z-lab,
SpecForge, DeepSpec) or from 1 (it is 1, and 0 is what enters it: Hugging Face's tuple, vLLM, speculators), and whether
the last state was taken after the norm or before it. With either wrong, training looks fine and no token is accepted.
So the target computes the states of a few samples again, and what the convention says has to be what it computes.

With --unproven nothing is computed: embedding and head are read from the target's files, and options state the rest.

    P rows of a prefix   K layers   D hidden size   E entries: what enters layer 0, then every layer's output
"""

import json
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.cache.catalog import Catalog
from pipeline.errors import DataError, ProofError, UsageError
from pipeline.target.config import load_config
from pipeline.target.files import CONFIG, read_json, read_text_config, stop_ids
from pipeline.target.head import TargetHead
from pipeline.target.loading import load_target
from pipeline.target.model import final_norm, head_of, stop_tokens, store_target, tap_layers
from pipeline.target.probe import BOUNDS, ROWS, relative_error
from pipeline.target.weights import safetensors_header, weight_files
from pipeline.tensors import find_device
from pipeline.visible_text import print_visible, visible
from stages.import_cache.source import Convention, ForeignSample, PartialConvention, Source, bad_file

# Added to the probe's bounds: other kernels round otherwise. Guesses: no foreign cache of a large target was measured.
# With the wrong convention, the bundled target's layers differ by 0.7.
EXTRA_TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 3e-2, torch.float32: 1e-3}
# Config keys that scale embedding, head or logits in a way that only the model's own code defines.
SCALES = ("embedding_multiplier", "scale_emb", "logits_scaling", "logit_scale", "lm_head_multiplier")


class Target:
    """A target's folder, and the target itself, loaded on first use."""

    def __init__(self, folder: Path, device: str | None, proven: bool):
        self.folder, self.device, self.proven = folder, device, proven

    @cached_property
    def model(self) -> PreTrainedModel:
        """The target, loaded now. Raises what `load_target` does."""
        assert self.proven, "nothing is computed of a cache that is imported unproven"
        return load_target(str(self.folder), device=find_device(self.device))

    @property
    def device_and_dtype(self) -> tuple[torch.device, torch.dtype]:
        """The target's device and dtype; the CPU and float32 when it is not loaded."""
        weight = self.model.get_input_embeddings().weight if self.proven else torch.empty(0)
        return weight.device, weight.dtype

    @torch.no_grad()
    def apply_norm(self, raw_RD: Tensor) -> Tensor:
        """Apply the target's final norm to states on the CPU. UsageError where it has none that is known."""
        norm = final_norm(self.model)
        if norm is None:
            raise UsageError(f"{self.folder}: its last norm does not show; leave the last states out with --last none")
        weight = next(norm.parameters())
        return norm(raw_RD.to(weight.device, weight.dtype)).cpu()

    def store(self, catalog: Catalog) -> None:
        """Write the cache's `target/`, once."""
        if self.proven:
            head, config, stops = head_of(self.model), self.model.config, stop_tokens(self.model)
        else:
            head, stops = head_from_files(self.folder), stop_tokens_from_files(self.folder)
            config = load_config(self.folder)
        store_target(catalog, self.folder, narrow_head(head), config, stops)


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
    if recorded := catalog.identity.capture.imported if catalog.exists else None:
        count_from = recorded.count_from if requested.count_from is None else requested.count_from
        convention = Convention(count_from, requested.last or recorded.last)
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
    errors_KE, of_last = measure_errors(model, samples)
    counted, line = _find_count_from(errors_KE, named, count_from, bound, samples[0].where)
    if last == "none" or not samples[0].has_last:
        return Convention(counted, "none"), line
    taken, more = _find_last(of_last, last, bound, samples[0].where)
    return Convention(counted, taken), f"{line}; {more}"


@torch.no_grad()
def measure_errors(model: PreTrainedModel, samples: list[ForeignSample]) -> tuple[np.ndarray, dict[str, float]]:
    """Compute prefixes with the target; return the worst relative errors of all samples.

    Of each stored layer to each entry [K, E]; and of the last state to that "normed" and "raw". DataError for tokens
    outside of the target's vocabulary.
    """
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
    return np.max(tables, axis=0), last


def _error(stored: Tensor, truth: Tensor) -> float:
    error = relative_error(stored, truth)
    return error if np.isfinite(error) else float("inf")


def _find_count_from(
    errors_KE: np.ndarray, named: tuple[int, ...], given: int | None, bound: float, where: str
) -> tuple[int, str]:
    """Return the first layer's number, and a line. ProofError when neither fits, or not the one `given`."""
    depth, worst, right = errors_KE.shape[1] - 1, {}, []
    for count in (0, 1):
        at = [layer + 1 - count for layer in named]
        inside = all(0 <= entry < depth for entry in at)
        layer_errors = [errors_KE[k, entry] for k, entry in enumerate(at)] if inside else [float("inf")]
        worst[count] = max(layer_errors)
        nearest = inside and all(error <= errors_KE[k].min() for k, error in enumerate(layer_errors))
        right += [count] * (nearest and worst[count] <= bound and given in (None, count))
    if right:
        count, other = right[0], worst[1 - right[0]]
        instead = f"the other way {other:.1e}" if np.isfinite(other) else "the other way names no such layer"
        figures = f"error {worst[count]:.1e}, {instead}"
        return count, f"layers {_csv(named)} are counted from {count} ({figures})"
    best, closest = errors_KE.argmin(axis=1), errors_KE.min(axis=1).max()
    if closest <= bound and best.max() < depth:
        hint = f"they are the layers {_csv(best - 1)} counted from 0: pass --layers {_csv(best - 1)} --count-from 0"
    else:
        hint = f"none fits better than {closest:.1e}: name the --model that made them, or make them again"
    both = " and ".join(f"{worst[count]:.1e} counted from {count}" for count in (0, 1) if given in (None, count))
    raise ProofError(
        f"{where}: what is named as layers {_csv(named)} differs from the target's by {both}, at most {bound:.1e} is "
        f"right; {hint}; nothing was imported"
    )


def _find_last(errors: dict[str, float], given: str | None, bound: float, where: str) -> tuple[str, str]:
    """Return "normed" or "raw" for the last state, and a line. ProofError when neither fits, or not `given`."""
    taken, other = sorted(errors, key=errors.get)
    fits = errors[taken] <= bound
    if fits and given in (None, taken):
        place = {"normed": "after", "raw": "before"}[taken]
        figures = f"error {errors[taken]:.1e}, the other way {errors[other]:.1e}"
        return taken, f"the last state is that {place} the norm ({figures})"
    figures = f"{errors['normed']:.1e} if it is after the norm, {errors['raw']:.1e} if before"
    hint = f"pass --last {taken}" if fits else "make them again, or leave them out with --last none"
    raise ProofError(
        f"{where}: its last state differs from the target's by {figures}, at most {bound:.1e} is right; {hint}; "
        "nothing was imported"
    )


def _csv(layers: Iterable[int]) -> str:
    return ",".join(str(int(layer)) for layer in layers)


def narrow_head(head: TargetHead) -> TargetHead:
    """Return the head in bfloat16 where that changes no value, whatever dtype it was loaded in."""
    narrow = head.to(dtype=torch.bfloat16)
    pairs = ((narrow.embed_VD, head.embed_VD), (narrow.head_VD, head.head_VD))
    return narrow if all(torch.equal(cast.to(original.dtype), original) for cast, original in pairs) else head


def head_from_files(folder: Path) -> TargetHead:
    """Read embedding and head only, of a target that is not loaded. UsageError where they are scaled or ambiguous."""
    config = read_text_config(folder)
    scaled = [name for name in SCALES if config.get(name) not in (None, 1, 1.0)]
    if scaled or str(config.get("model_type", "")).startswith("gemma"):
        why = scaled[0] if scaled else "its embedding"
        raise UsageError(f"{folder}: scales {why} in code, which only a run shows; import without --unproven")
    found: dict[str, list[tuple[Path, str]]] = {"embed_tokens.weight": [], "lm_head.weight": [], "lm_head.bias": []}
    for path in weight_files(folder):
        names = json.loads(safetensors_header(path))
        for end, holders in found.items():
            holders += [(path, name) for name in names if name == end or name.endswith(f".{end}")]
    embeds, heads, biases = found.values()
    tied = bool(read_json(folder / CONFIG).get("tie_word_embeddings", config.get("tie_word_embeddings", False)))
    if len(embeds) != 1 or biases or len(heads) > 1 or not (heads or tied):
        raise UsageError(
            f"{folder}: holds {len(embeds)} embeddings and {len(heads)} LM heads, wanted one of each (or a tied one) "
            "without a bias; name with --model the folder of the target that made the cache"
        )
    with safe_open(embeds[0][0], framework="pt") as file:
        embed_VD = head_VD = file.get_tensor(embeds[0][1])
    if not tied:
        with safe_open(heads[0][0], framework="pt") as file:
            head_VD = file.get_tensor(heads[0][1])
    shape = (config["vocab_size"], config["hidden_size"])
    if tuple(embed_VD.shape) != shape or head_VD.shape != embed_VD.shape:
        raise UsageError(
            f"{folder}: embedding {list(embed_VD.shape)} and head {list(head_VD.shape)}, config.json says "
            f"{list(shape)}; fetch its files again"
        )
    return TargetHead(embed_VD, head_VD, logit_softcap=config.get("final_logit_softcapping"))


def stop_tokens_from_files(folder: Path) -> frozenset[int]:
    """Return the stop tokens that the folder's configs name."""
    stated = [config.get("eos_token_id") for config in (read_json(folder / CONFIG), read_text_config(folder))]
    named = (stop for stops in stated for stop in ([stops] if type(stops) is int else stops or ()))
    return frozenset({*named, *stop_ids(folder)})
