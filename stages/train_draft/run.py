"""`pipeline train-draft`: train a draft from a cache. Nothing here, or in what it imports, can load a target."""

import os
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from pipeline import tensors
from pipeline.cache import HiddenCache
from pipeline.console import VisibleConsole
from pipeline.drafts import DRAFTS, Draft, init_weights
from pipeline.drafts.rope import draft_rope_scaling
from pipeline.drafts.serving import unservable
from pipeline.errors import RoomError, first_line
from pipeline.runs.cache_requirements import check_complete, how_to_add, logit_scale, partial_text, text_config
from pipeline.runs.folder import (
    Result,
    chunk_rule,
    create_or_check,
    default_folder,
    read_result,
    run_lock,
    with_recorded_rope,
    write_result,
)
from pipeline.runs.recipe import Resolved, load_recipe, resolve
from pipeline.runs.split import Split, split_samples
from pipeline.visible_text import visible
from stages.train_draft.logs import Display
from stages.train_draft.loop import GracefulStop, TrainingRun, evaluation_text, use_deterministic_kernels

if TYPE_CHECKING:
    from pipeline.published.init_from import InitialDraft, InitialWeights


@dataclass(frozen=True)
class TrainResult:
    """A finished run. `accept_len` is None where no held-out reply is the target's own greedy one, or the cache holds
    no final states."""

    run: Path
    steps: int
    accept_len: float | None


def run(
    cache: Path,
    recipe: Path | None = None,
    sets: tuple[str, ...] = (),
    out: Path | None = None,
    device: str | None = None,
    init_from: "InitialDraft | None" = None,
) -> TrainResult:
    """Train the draft that the recipe describes, from the newest checkpoint if there is one.

    init_from: a checkpoint, run or published draft whose weights are the initial ones.

    Raises UsageError for a recipe or run folder that does not fit, DataError when no sample can train, CacheError for
    damage, RoomError, ProofError for a loss that is not finite; SystemExit(143) or KeyboardInterrupt when stopped,
    after a checkpoint is saved.
    """
    store = HiddenCache.open(cache)
    torch_device = find_device(device)
    stated = load_recipe(recipe, tuple(sets))
    check_complete(store, stated.draft.layers)
    resolved = resolve(stated, store)
    split = split_for(resolved, store)
    resolved = resolved.with_steps(len(split.train))
    start = init_from and init_from.weights_for(resolved.draft, store.head(dtype=store.dtype))
    if start is not None:
        resolved = resolved.with_rope_scaling(start.rope_scaling)
    folder = out or default_folder(resolved, store, split, start)
    return train_resolved(folder, store, split, resolved, torch_device, start)


def split_for(resolved: Resolved, store: HiddenCache) -> Split:
    """Return which samples train the draft and which are held out; it depends on the columns that the loss reads."""
    draft, heldout = resolved.draft, resolved.recipe.train.heldout
    return split_samples(store, draft.mask_token_id, heldout, draft.target_layer_ids, draft.needs_final_states)


def train_resolved(
    path: Path,
    store: HiddenCache,
    split: Split,
    resolved: Resolved,
    device: torch.device,
    start: "InitialWeights | None" = None,
) -> TrainResult:
    """Train one resolved recipe in the folder `path`, or resume it there; print the result. Raises what `run` does."""
    screen = VisibleConsole()

    def say(line: str) -> None:
        screen.print(line, markup=False, soft_wrap=True)

    with run_lock(path):
        differs = create_or_check(path, resolved, store, split, machine_facts(device), start)
        resolved = with_recorded_rope(path, resolved)
        result = read_result(path)
        if result is not None:
            say(f"{visible(path)} is finished: nothing to do")
        else:
            for line in run_description(path, store, split, resolved, device):
                say(line)
            if start is not None:
                say(visible(start.summary))
            if differs:
                began = visible("; ".join(differs))
                say(f"began with {began}: the run goes on, its last digits may differ")
            use_deterministic_kernels(device)
            samples = (store.tokens_of(int(index))[0] for index in split.train)
            draft = make_draft(resolved, store, device, start, samples)
            draft.chunk_rule = chunk_rule(path)
            parameters, steps = sum(weight.numel() for weight in draft.parameters()), resolved.recipe.train.steps
            training = TrainingRun(path, store, split, resolved, draft)
            first = training.resume()
            with GracefulStop() as stop, Display(screen, first, steps) as display:
                begun = f"going on after step {first}" if first else "starting at step 0"
                display.print_line(f"{parameters:,} parameters; {begun} of {steps}")
                figures = training.fit(display, stop)
            accept_len = figures.accept_len if figures and figures.calls else None
            result = Result(steps=steps, parameters=parameters, accept_len=accept_len, eval=figures)
            write_result(path, result)
    say(summary(path, store, result))
    return TrainResult(path, result.steps, result.accept_len)


def run_description(
    path: Path, store: HiddenCache, split: Split, resolved: Resolved, device: torch.device
) -> Iterator[str]:
    """Yield the lines printed before a run starts, the whole recipe first."""
    yield resolved.recipe.toml()
    yield (
        f"{len(split.train)} samples to train on, {len(split.heldout)} held out, {split.unusable} unusable; "
        f"target {visible(store.identity.target.name)}, on {device}; run {visible(path)}"
    )
    context = resolved.recipe.train.context
    longer = int((store.samples.length[split.train] > context).sum())
    if longer:
        yield f"{longer} samples are longer than train.context = {context} rows: each gives one window an epoch"
    if store.catalog.partial:
        yield f"the cache is incomplete: {partial_text(store)}; layers {list(resolved.draft.target_layer_ids)} are read"
    if resolved.draft.gamma is None and resolved.draft.weighting == "decay":
        yield "gamma is 0, so late slots weigh as much as early ones; published recipes let the weight decay"
    yield from rope_messages(resolved, store)
    reason = unservable(resolved.draft, store.tokens, logit_scale(text_config(store.target_config)))
    if reason is not None:
        yield f"no engine will serve this draft, `pipeline export` refuses it: {reason}"


def rope_messages(resolved: Resolved, store: HiddenCache) -> Iterator[str]:
    """Yield how the draft's rotary positions relate to the target's scaled ones; nothing where both are plain."""
    scaling, reason = draft_rope_scaling(text_config(store.target_config))
    trained = resolved.draft.rope_scaling
    if trained is not None and trained == scaling:
        yield f"rotary positions are scaled as the target scales them: {trained}"
    elif trained != scaling:
        yield (
            f"the target scales its rotary positions ({scaling or 'not at all'}), the draft goes on as it began: "
            f"{trained or 'plain ones'}"
        )
    elif reason is not None:
        yield f"the target scales its rotary positions by {reason}: the draft is trained, and served, with plain ones"


def make_draft(
    resolved: Resolved,
    store: HiddenCache,
    device: torch.device,
    start: "InitialWeights | None" = None,
    samples: Iterable[np.ndarray] = (),
) -> Draft:
    """Return a draft in training mode on its device: float32 weights, random where `start` has none, and the
    target's frozen head in the dtype of the arithmetic. samples: ids of the training samples, which a method may count.

    Raises RoomError when memory is too small.
    """
    dtype = torch.bfloat16 if resolved.recipe.train.dtype == "bfloat16" else torch.float32
    try:
        draft = DRAFTS[resolved.draft.method](resolved.draft, store.head(str(device), dtype))
        init_weights(draft, resolved.recipe.train.seed)
        draft.before_training(samples)
        if start is not None:
            start.load_into(draft)
        return draft.to(device).train()
    except RuntimeError as error:
        if not tensors.is_out_of_memory(error):
            raise
        cause = first_line(error)
        raise RoomError(f"the draft does not fit into memory ({cause}); make its sizes in [draft] smaller") from error


def find_device(device: str | None) -> torch.device:
    """Return the device asked for, else CUDA if there is one. Raises UsageError for one that is not there."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with this
    return tensors.find_device(device)


def machine_facts(device: torch.device) -> dict[str, str]:
    """Return what a run's exact bits depend on besides versions: the device, and on a CPU the number of threads."""
    if device.type == "cuda":
        return {"device": torch.cuda.get_device_name(device)}
    return {"device": device.type, "threads": str(torch.get_num_threads())}


def summary(path: Path, store: HiddenCache, result: Result) -> str:
    """Return the closing lines: where the run is, its accept length, and the command to run next."""
    if not store.has_final:
        measured = f"no accept length: the cache holds no final states; {how_to_add(store, store.layers, 'needed')}"
    elif result.eval is None:
        measured = "no accept length: the corpus holds nothing out"
    else:
        measured = evaluation_text(result.eval)
    command = visible(shlex.join(["pipeline", "evaluate", "--draft", str(path)]))
    return f"{visible(path)}: {result.steps} steps, {measured}\nnext: {command}"
