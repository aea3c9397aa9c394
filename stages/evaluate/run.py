"""`pipeline evaluate`: speculative decoding measured (accept length, speed) and proven lossless."""

import errno
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pipeline.cache import HiddenCache
from pipeline.cache.atomic import write_errors, write_file
from pipeline.cache.schema import read_log
from pipeline.draft_folders import is_published, open_draft, run_of
from pipeline.drafts import Draft, DraftConfig
from pipeline.errors import RoomError, UsageError
from pipeline.evaluation.decode import SamplingOptions, decode_many, speculative_decode
from pipeline.evaluation.evaluation_table import evaluation_table
from pipeline.evaluation.prompts import cached_prompts, check_context_length, file_prompts
from pipeline.evaluation.reply_text import MOST_REPLIES
from pipeline.evaluation.reports import DraftFacts, Report, Settings, Speed, report_bytes
from pipeline.json_files import check_regular
from pipeline.matrix_products import compute_by_linear
from pipeline.published import recorded_share
from pipeline.runs.checkpoint import find_checkpoint, open_checkpoint
from pipeline.runs.folder import RUN, read_recipe, read_run
from pipeline.runs.recipe import TrainSection
from pipeline.runs.training_data import split_samples
from pipeline.target.files import find_target, target_name
from pipeline.target.loading import load_target
from pipeline.target.model import head_of, stop_tokens
from pipeline.target.weights import check_weights_if_recorded, target_digest, weights_digest
from pipeline.tensors import find_device, refuse_out_of_memory
from pipeline.visible_tables import VisibleConsole
from stages.evaluate.lossless import LosslessCheck, PlainReplies, plain_decode, reply_settings
from stages.evaluate.measure import (
    accept_figures,
    confidence_cuts,
    decode_greedily,
    decode_sampled,
    lossless_counts,
    reply_texts,
    speeds,
    target_free_agreement,
    teacher_forced,
)

__all__ = ["SamplingOptions", "run"]


def run(
    draft: Path,
    *,
    model: str | None = None,
    cache: Path | None = None,
    prompts: Path | None = None,
    count: int = 64,
    max_new: int = 64,
    device: str | None = None,
    dtype: str | None = None,
    out: Path | None = None,
    sampling: SamplingOptions | None = None,
    threshold: float = 0.0,
    plain: Path | None = None,
    batch: int = 1,
    proposals: int | None = None,
    texts: int = MOST_REPLIES,
) -> Report:
    """Evaluate a run's newest checkpoint, a checkpoint or a published folder; return the report, written to `out` too.

    Greedily, and once more with sampled replies where `sampling` is given. `threshold` cuts blocks by confidence.
    `dtype` is what target and draft compute in, by default what the cache was captured in.
    `plain` is a file that keeps plain replies from one evaluation to the next. `batch` prompts are decoded at once,
    which is faster, but no speeds are measured. `proposals` verifies only the first so many of each block. `texts`
    replies are kept as text, with the end of their prompts. Raises
    UsageError for what does not fit together, DataError for unusable prompts, CacheError for a damaged cache,
    RoomError, ProofError when an output differs from plain decoding by more than a near tie.
    """
    check_options(threshold, out, plain, prompts)
    trained = describe_draft(Path(draft))
    store = open_cache(trained, cache, prompts)
    folder, name = find_model(model, store)
    computed = dtype or (None if store is None else store.dtype)
    target = compute_by_linear(load_target(str(folder), device=find_device(device), dtype=computed))
    depth = target.config.get_text_config().num_hidden_layers
    drafter = open_draft(trained.path, head_of(target), depth, target.device).to(target.dtype)
    heldout, known, config = None, trained.heldout is not None, drafter.config
    verified = check_proposals(proposals, config)
    if store is not None:
        share = trained.heldout if known else TrainSection().heldout
        heldout = split_samples(store, config.mask_token_id, share, config.target_layer_ids).heldout
        known = known or all(store.samples.split)
    rules = {} if store is None else store.identity.samples.as_dict()
    asked = cached_prompts(store, heldout, count) if prompts is None else file_prompts(prompts, folder, count, rules)
    check_context_length(target, asked, max_new, verified)
    stops = stop_tokens(target) if store is None else frozenset(store.tokens["eos"])
    replies = PlainReplies()
    if plain is not None:
        replies = PlainReplies.open(Path(plain), reply_settings(target, weights_digest(folder), max_new, stops))
    batch = min(batch, len(asked))
    several = f"decoding {batch} prompts at once", "pass a smaller --batch"
    alone = "decoding a prompt", "use a larger device, --device cpu, or shorter prompts"
    with refuse_out_of_memory(*(several if batch > 1 else alone)):
        decode = partial(decode_many, target, drafter, [prompt.ids for prompt in asked], max_new, stops)
        decode = partial(decode, threshold=threshold, batch=batch, proposals=proposals)
        if batch == 1:  # first calls are slow, and seconds are compared
            speculative_decode(target, drafter, asked[0].ids, 2, threshold=threshold)
            plain_decode(target, asked[0].ids, 2)
        check = LosslessCheck(target, verified + 1, batch)
        outcomes = decode_greedily(check, asked, decode, max_new, stops, replies)
        sampled = None if sampling is None else decode_sampled(target, asked, decode, sampling, verified, max_new)
    # What needs no target rolls out whole blocks.
    target_free = prompts is None and store.has_final and verified == config.proposals
    report = Report(
        draft=trained.facts(drafter),
        target=name,
        cache=None if store is None else store.digest,
        settings=Settings(
            prompts=str(prompts or f"held-out samples of the cache{'' if known else ', if the draft never saw them'}"),
            max_new=max_new,
            temperature=0,
            threshold=threshold,
            proposals=proposals,
            batch=batch,
            device=str(target.device),
            dtype=str(target.dtype).removeprefix("torch."),
        ),
        **accept_figures([(outcome.prompt, outcome.fast) for outcome in outcomes], verified, max_new),
        speed=speeds(outcomes) if batch == 1 else Speed(),
        lossless=lossless_counts(outcomes),
        near_ties=[outcome.near_tie for outcome in outcomes if outcome.near_tie is not None],
        sampled=sampled,
        agreement=target_free_agreement(outcomes, drafter, store, max_new, threshold) if target_free else None,
        confidence=confidence_cuts(drafter, store, asked, max_new) if target_free and config.has_confidence else None,
        teacher_forced={} if store is None else teacher_forced(drafter, store, heldout),
        replies=reply_texts(folder, outcomes, texts),
    )
    if out is not None:
        write_report(report, Path(out))
    return report


def check_options(threshold: float, out: Path | None, plain: Path | None, prompts: Path | None) -> None:
    """Check the threshold and the output files before anything runs. UsageError, RoomError."""
    if not 0 <= threshold <= 1:
        raise UsageError(f"--threshold {threshold:g}: a confidence lies in 0..1; 0 cuts nothing")
    for option, path in (("--out", out), ("--plain", plain)):
        if path is not None:
            check_output_file(option, Path(path))
    for option, path in (("--plain", plain), ("--prompts", prompts)):
        if None not in (out, path) and Path(out).resolve() == Path(path).resolve():
            raise UsageError(f"--out {out} is the file of {option}, which the report would replace; name another file")


def check_proposals(proposals: int | None, config: DraftConfig) -> int:
    """Return how many proposals of each block are verified: as many as asked for, else all. UsageError."""
    if proposals is not None and not 1 <= proposals <= config.proposals:
        raise UsageError(
            f"--proposals {proposals}: a block of {config.block_size} of this {config.method} draft proposes "
            f"{config.proposals} tokens; pass 1..{config.proposals}, or leave it out for all"
        )
    return proposals or config.proposals


def check_output_file(option: str, path: Path) -> None:
    """Check, before anything runs, that a file can be written. UsageError, RoomError."""
    if path.is_dir():
        raise UsageError(f"{option} {path} is a folder; name a file in it, such as {path / option[2:]}.json")
    try:
        check_regular(path)
    except ValueError as error:  # /dev/null, say, which a rename would replace for everybody
        raise UsageError(f"{option} {path} cannot be a report ({error}); name another file") from error
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UsageError(f"{option} {path} is a link to itself; name another file") from error
    with write_errors(path, f"the file of {option}"):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, FileNotFoundError) as error:
            reason = f"its folder cannot be made ({error.strerror}); name another file"
            raise UsageError(f"{option} {path}: {reason}") from error
        if not os.access(path.parent, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path.parent))


def write_report(report: Report, out: Path) -> None:
    """Write a report; where the disk is full, print it before raising RoomError, since it was costly to make."""
    try:
        write_file(out, report_bytes(report.as_dict()))
    except RoomError:
        VisibleConsole(stderr=True).print(evaluation_table(report))
        raise


@dataclass(frozen=True)
class Trained:
    """A trained draft to evaluate: its path, and what its run folder or published folder records of its training."""

    path: Path
    steps: int | None = None
    seed: int | None = None
    heldout: float | None = TrainSection().heldout  # share, where the corpus does not say which; None: not known
    cache: Path | None = None
    recipe: str | None = None  # digest of all that it says but the seed

    def facts(self, draft: Draft) -> DraftFacts:
        """Return what the report says of the draft."""
        config = draft.config
        trained = f", {self.steps} steps" if self.steps is not None else ""
        if config.proposable < config.vocab_size:
            trained += f", {config.proposable:,} of {config.vocab_size:,} ids"
        return DraftFacts(
            path=str(self.path),
            **{key: getattr(config, key) for key in ("method", "block_size", "proposals", "objective", "weighting")},
            steps=self.steps,
            seed=self.seed,
            recipe=self.recipe,
            parameters=sum(weight.numel() for weight in draft.parameters()),
            label=f"{config.method} ({config.objective}), block {config.block_size}{trained}",
        )


def describe_draft(path: Path) -> Trained:
    """Return what is at `path`: a run, a checkpoint, or a published folder. UsageError for anything else."""
    if is_published(path):
        return Trained(path, heldout=recorded_share(path))
    steps, run_folder = open_checkpoint(find_checkpoint(path), ()).step, run_of(path)
    if not (run_folder / RUN).is_file():
        return Trained(path, steps)
    trained_on = read_run(run_folder).cache.path
    recipe = read_recipe(run_folder)
    train = recipe.train
    return Trained(path, steps, train.seed, train.heldout, Path(trained_on), recipe.seedless_digest())


def open_cache(trained: Trained, cache: Path | None, prompts: Path | None) -> HiddenCache | None:
    """Return the cache named, or the one the draft was trained on. None where prompts make up for a lost one."""
    if cache is not None:
        return HiddenCache.open(cache)
    if trained.cache is not None and (trained.cache.is_dir() or prompts is None):
        return HiddenCache.open(trained.cache)
    if prompts is None:
        raise UsageError(f"{trained.path} does not say which cache it was trained on; pass --cache, or --prompts FILE")
    return None


def find_model(model: str | None, store: HiddenCache | None) -> tuple[Path, str]:
    """Return the target's folder and name: the one named, or the cache's own.

    UsageError when there is none, or it is not the target that the cache was made with.
    """
    if store is None:
        if model is None:
            raise UsageError("no cache says which target this draft is for; pass --model")
        return find_target(model), target_name(model)
    wanted = store.identity.target
    if model is not None:
        folder = find_target(model)
    else:  # the folder that was captured, if it is still there
        recorded = read_log(store.path).target
        there = recorded and Path(recorded.folder).is_dir()
        folder = find_target(recorded.folder if there else wanted.name, wanted.revision or None)
    digest = target_digest(folder)
    if digest != wanted.digest:
        raise UsageError(
            f"{model or folder} has the digest {digest}, but {store.path} was made with {wanted.name}, digest "
            f"{wanted.digest}; pass --model with that target"
        )
    check_weights_if_recorded(store.catalog, folder)
    return folder, wanted.name
