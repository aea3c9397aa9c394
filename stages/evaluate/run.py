"""`pipeline evaluate`: speculative decoding measured (accept length, speed) and proven lossless."""

import errno
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel

from pipeline.cache import HiddenCache
from pipeline.cache.atomic import write_errors, write_file
from pipeline.cache.schema import read_log
from pipeline.draft_folders import is_published, open_draft, run_of
from pipeline.drafts import Draft, DraftConfig
from pipeline.errors import RoomError, UsageError
from pipeline.evaluation.decode import SamplingOptions, decode_many, speculative_decode
from pipeline.evaluation.evaluation_table import evaluation_table
from pipeline.evaluation.prompts import Prompt, cached_prompts, check_context_length, file_prompts
from pipeline.evaluation.reply_text import MOST_REPLIES
from pipeline.evaluation.reports import DraftFacts, Report, SampledReplies, Settings, Speed, report_bytes
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
    Outcome,
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


@dataclass(frozen=True)
class Options:
    """How a draft is evaluated.

    model: the target, by default the cache's. cache: by default the one that the draft was trained on. prompts: a file
    of them, by default held-out samples of the cache. count: prompts. max_new: tokens of a reply. dtype: what target
    and draft compute in, by default what the cache was captured in. sampling: how replies are drawn once more.
    threshold: confidence that blocks are cut by. plain: a file that keeps plain replies from one evaluation to the
    next. batch: prompts decoded at once, which is faster, but no speeds are measured then. proposals: verified of each
    block. texts: replies kept as text, with the end of their prompts. out: the report's file.
    """

    model: str | None = None
    cache: Path | None = None
    prompts: Path | None = None
    count: int = 64
    max_new: int = 64
    device: str | None = None
    dtype: str | None = None
    out: Path | None = None
    sampling: SamplingOptions | None = None
    threshold: float = 0.0
    plain: Path | None = None
    batch: int = 1
    proposals: int | None = None
    texts: int = MOST_REPLIES


@dataclass(frozen=True)
class Opened:
    """A draft with its target and prompts. store: the cache, where there is one. folder, name: the target's. heldout:
    samples of the cache that the draft did not learn from; known: whether it is known which these are."""

    trained: "Trained"
    store: HiddenCache | None
    folder: Path
    name: str
    target: PreTrainedModel
    draft: Draft
    heldout: np.ndarray | None
    known: bool
    prompts: list[Prompt]


@dataclass(frozen=True)
class Replies:
    """What was decoded: greedy outcomes, and sampled replies where these were asked for. batch: prompts at once."""

    outcomes: list[Outcome]
    sampled: SampledReplies | None
    batch: int


def run(draft: Path, **chosen) -> Report:
    """Evaluate a run's newest checkpoint, a checkpoint or a published folder; return the report, written to `out` too.

    chosen: fields of `Options`. Raises UsageError for what does not fit together, DataError for unusable prompts,
    CacheError for a damaged cache, RoomError, ProofError when an output differs from plain decoding by more than a near
    tie.
    """
    options = Options(**chosen)
    check_options(options.threshold, options.out, options.plain, options.prompts)
    opened = open_all(Path(draft), options)
    verified = check_proposals(options.proposals, opened.draft.config)
    check_context_length(opened.target, opened.prompts, options.max_new, verified)
    report = report_of(opened, decode_replies(opened, options, verified), options, verified)
    if options.out is not None:
        write_report(report, Path(options.out))
    return report


def open_all(path: Path, options: Options) -> Opened:
    """Open the draft at `path` with its target, and find the prompts. UsageError, DataError, CacheError."""
    trained = describe_draft(path)
    store = open_cache(trained, options.cache, options.prompts)
    folder, name = find_model(options.model, store)
    computed = options.dtype or (None if store is None else store.dtype)
    target = compute_by_linear(load_target(str(folder), device=find_device(options.device), dtype=computed))
    depth = target.config.get_text_config().num_hidden_layers
    draft = open_draft(trained.path, head_of(target), depth, target.device).to(target.dtype)
    heldout, known, rules = None, trained.heldout is not None, {}
    if store is not None:
        share = trained.heldout if known else TrainSection().heldout
        heldout = split_samples(store, draft.config.mask_token_id, share, draft.config.target_layer_ids).heldout
        known, rules = known or all(store.samples.split), store.identity.samples.as_dict()
    if options.prompts is None:
        prompts = cached_prompts(store, heldout, options.count)
    else:
        prompts = file_prompts(options.prompts, folder, options.count, rules)
    return Opened(trained, store, folder, name, target, draft, heldout, known, prompts)


def decode_replies(opened: Opened, options: Options, verified: int) -> Replies:
    """Decode all prompts, greedily with and without the draft, then drawn. verified: proposals of a block.

    Raises ProofError where a reply is not the target's own, RoomError where the device's memory does not suffice.
    """
    target, draft, max_new = opened.target, opened.draft, options.max_new
    stops = stop_tokens(target) if opened.store is None else frozenset(opened.store.tokens["eos"])
    plain = PlainReplies()
    if options.plain is not None:
        settings = reply_settings(target, weights_digest(opened.folder), max_new, stops)
        plain = PlainReplies.open(Path(options.plain), settings)
    asked, batch = opened.prompts, min(options.batch, len(opened.prompts))
    several = f"decoding {batch} prompts at once", "pass a smaller --batch"
    alone = "decoding a prompt", "use a larger device, --device cpu, or shorter prompts"
    with refuse_out_of_memory(*(several if batch > 1 else alone)):
        decode = partial(decode_many, target, draft, [prompt.ids for prompt in asked], max_new, stops)
        decode = partial(decode, threshold=options.threshold, batch=batch, proposals=options.proposals)
        if batch == 1:  # first calls are slow, and seconds are compared
            speculative_decode(target, draft, asked[0].ids, 2, threshold=options.threshold)
            plain_decode(target, asked[0].ids, 2)
        outcomes = decode_greedily(LosslessCheck(target, verified + 1, batch), asked, decode, max_new, stops, plain)
        sampled = options.sampling and decode_sampled(target, asked, decode, options.sampling, verified, max_new)
    return Replies(outcomes, sampled, batch)


def report_of(opened: Opened, replies: Replies, options: Options, verified: int) -> Report:
    """Return the report of what was decoded, with what the cache tells without the target."""
    store, draft, outcomes = opened.store, opened.draft, replies.outcomes
    # What needs no target rolls out whole blocks.
    target_free = options.prompts is None and store.has_final and verified == draft.config.proposals
    agreement = confidence = None
    if target_free:
        agreement = target_free_agreement(outcomes, draft, store, options.max_new, options.threshold)
    if target_free and draft.config.has_confidence:
        confidence = confidence_cuts(draft, store, opened.prompts, options.max_new)
    unsure = "" if opened.known else ", if the draft never saw them"
    return Report(
        draft=opened.trained.facts(draft),
        target=opened.name,
        cache=None if store is None else store.digest,
        settings=Settings(
            prompts=str(options.prompts or f"held-out samples of the cache{unsure}"),
            max_new=options.max_new,
            temperature=0,
            threshold=options.threshold,
            proposals=options.proposals,
            batch=replies.batch,
            device=str(opened.target.device),
            dtype=str(opened.target.dtype).removeprefix("torch."),
        ),
        **accept_figures([(outcome.prompt, outcome.fast) for outcome in outcomes], verified, options.max_new),
        speed=speeds(outcomes) if replies.batch == 1 else Speed(),
        lossless=lossless_counts(outcomes),
        near_ties=[outcome.near_tie for outcome in outcomes if outcome.near_tie is not None],
        sampled=replies.sampled,
        agreement=agreement,
        confidence=confidence,
        teacher_forced={} if store is None else teacher_forced(draft, store, opened.heldout),
        replies=reply_texts(opened.folder, outcomes, options.texts),
    )


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
