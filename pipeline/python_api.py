"""What notebooks and scripts of yours import from `pipeline` itself.

from pipeline import HiddenCache, load_draft, accept_length

cache = HiddenCache.open("hs_cache")
draft = load_draft("runs/domino-…", cache)
accept_length(draft, cache).accept_len

K layers   T rows of a sample
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel

from pipeline.cache import HiddenCache
from pipeline.draft_folders import is_published, open_draft, run_of
from pipeline.drafts import Draft
from pipeline.errors import DataError, UsageError
from pipeline.evaluation.accept_length import accept_spans, replies_of, summarise
from pipeline.evaluation.decode import decode_calls
from pipeline.evaluation.prompts import check_context_length, typed_prompt
from pipeline.evaluation.reply_text import TokenTexts
from pipeline.published.reading import recorded_share
from pipeline.runs.folder import RUN, Evaluation, chunk_rule, read_recipe, read_run
from pipeline.runs.recipe import TrainSection
from pipeline.runs.training_data import split_samples, stratified_subset, training_config
from pipeline.target.chat_template import load_tokenizer
from pipeline.target.files import find_target
from pipeline.target.loading import load_target
from pipeline.target.model import head_of, stop_tokens
from pipeline.tensors import find_device

__all__ = ["TargetCall", "accept_length", "decode", "load_draft", "load_target"]


def load_draft(
    path: Path | str,
    cache_or_target: HiddenCache | PreTrainedModel | Path | str | None = None,
    device: str | None = None,
) -> Draft:
    """Load a trained draft, ready to measure or to decode with.

    path: a run, of which the newest checkpoint is taken, a checkpoint, or a published folder of any form (`pipeline
    export`'s, z-lab's, SGLang's, speculators', ...). cache_or_target: whose frozen embedding and head it shares: a
    cache, opened or as a path, or what `load_target` returned; None: the cache that the run was trained from. device:
    by default the target's own; with a cache cuda where there is one.

    With a cache the draft computes in float32, with a target in the target's type. It remembers as `heldout` the share
    of prompts that its training held out, where run or export says so. Raises UsageError where no draft is there, it
    was made for another target, or the run's cache is another one by now; CacheError for damaged files.
    """
    path = Path(path)
    run = None if is_published(path) or not (run_of(path) / RUN).is_file() else run_of(path)
    draft = _open(path, run, cache_or_target, device)
    draft.heldout = recorded_share(path) if is_published(path) else run and read_recipe(run).train.heldout
    return draft


def _open(
    path: Path, run: Path | None, cache_or_target: HiddenCache | PreTrainedModel | Path | str | None, device: str | None
) -> Draft:
    """As `load_draft`. run: the folder of the run that the draft at `path` is of, None for others."""
    if isinstance(cache_or_target, PreTrainedModel):
        target = cache_or_target
        depth = target.config.get_text_config().num_hidden_layers
        return open_draft(path, head_of(target), depth, device or target.device).to(target.dtype)
    cache = _opened(cache_or_target) if cache_or_target is not None else _cache_of(path, run)
    depth, on = training_config(cache.target_config)["num_hidden_layers"], find_device(device)
    draft = open_draft(path, cache.head(str(on)), depth, on)
    if run is not None:
        draft.chunk_rule = chunk_rule(run)
    return draft


def _cache_of(path: Path, run: Path | None) -> HiddenCache:
    """Return the cache that a run was trained from. UsageError where nothing says which, or another is there now."""
    if run is None:
        raise UsageError(f"{path} does not say which cache it was trained on; pass a cache or a target to load_draft")
    record = read_run(run).cache
    cache = HiddenCache.open(record.path)
    if cache.digest != record.digest:
        raise UsageError(
            f"{run} was trained on a cache of digest {record.digest}, and {record.path} has {cache.digest} now; "
            "pass the cache to measure on as cache_or_target="
        )
    return cache


def _opened(cache: HiddenCache | Path | str) -> HiddenCache:
    return cache if isinstance(cache, HiddenCache) else HiddenCache.open(cache)


def accept_length(
    draft: Draft,
    cache: HiddenCache | Path | str,
    samples: int | Iterable[int] | None = None,
    *,
    max_new: int | None = None,
    heldout: float | None = None,
) -> Evaluation:
    """Measure a draft's accept length on cached replies: exact, and without the target.

    samples: indices into the cache; or how many of the held-out samples, spread over domains; None: all held-out ones.
    max_new: tokens of a reply at most. heldout: where the corpus does not say what is held out, the share of prompts
    that is; None: what the draft's training held out (`draft.heldout`), where that is not known a recipe's default.

    Returns what `train-draft` reports after an evaluation: `accept_len`, its 95 % `interval`, `calls`, `tokens`,
    `per_slot`, of each of `domains` the same, and `replies` [sample, first row, tokens, calls]. Only what the target
    itself would have said can be measured: `calls` is 0 where no reply is.

    Raises UsageError where the cache lacks a layer that the draft reads, or `final`; DataError where nothing is held
    out; IndexError for a sample that is not there; CacheError for damage.
    """
    cache = _opened(cache)
    if samples is None or isinstance(samples, int):
        config, share = draft.config, draft.heldout if heldout is None else heldout
        share = TrainSection().heldout if share is None else share
        there = split_samples(cache, config.mask_token_id, share, config.target_layer_ids).heldout
        samples = there if samples is None else stratified_subset(cache, there, samples)
        if not len(there):
            raise DataError(f"{cache.path}: the corpus holds nothing out; pass the samples to measure on")
    spans = accept_spans(draft, cache, np.asarray(list(samples), int).tolist(), max_new=max_new)[0]
    return Evaluation(**summarise(spans), replies=replies_of(spans))


@dataclass(frozen=True)
class TargetCall:
    """What one call of the target gained.

    ids: the tokens, of which the first `matched` are the draft's proposals and the rest, one, the target's own; after a
    stop token there is none. texts: of each token, "" for one that ends within a character. proposed: proposals that
    the call verified.
    """

    ids: list[int]
    texts: list[str]
    matched: int
    proposed: int

    @property
    def text(self) -> str:
        return "".join(self.texts)


def decode(draft: Draft, target: PreTrainedModel, prompt: str | list, max_new: int = 64) -> Iterator[TargetCall]:
    """Decode a prompt greedily with target and draft, and yield each call of the target as it is done.

    draft: of `load_draft(path, target)`. target: of `load_target`. prompt: what a user says, put into the chat
    template; or messages [{"role": ..., "content": ...}, ...]; or token ids. The first call reads the prompt and gains
    one token. The reply, at most `max_new` tokens, is the target's own, whatever the draft proposes.

    Raises UsageError for a reply that exceeds the target's context, DataError for what is no prompt.
    """
    folder = find_target(target.name_or_path)
    asked = typed_prompt(prompt, folder)
    check_context_length(target, [asked], max_new, draft.config.proposals)
    texts = TokenTexts(load_tokenizer(folder))
    for ids, matched, proposed in decode_calls(target, draft, asked.ids, max_new, stop_tokens(target)):
        yield TargetCall(ids, [texts.next(token) for token in ids], matched, proposed)
