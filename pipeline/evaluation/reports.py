"""Evaluation reports: what `pipeline evaluate --out` writes, read strictly; seeds pooled, drafts paired.

The models are the format: their fields are a report's JSON keys, in the order they are written. Fields that have a
default are absent from reports of earlier versions.

What drafts gain differs far more from prompt to prompt than from draft to draft, so they are compared prompt by prompt:
every bootstrap resample takes the same prompts of both. Seeds are pooled; how far they differ is shown beside, since
intervals over prompts say nothing of it.

    B resamples   n prompts
"""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import FailFast, Field, ValidationError, model_validator

from pipeline.drafts import DRAFTS
from pipeline.errors import UsageError, cause_of
from pipeline.evaluation.accept_length import Figures, bootstrap, resamples
from pipeline.evaluation.reply_text import ReplyText
from pipeline.json_files import (
    MAX_BYTES,
    Count,
    Counts,
    FailFastDict,
    Number,
    Numbers,
    Record,
    damage_error,
    ends_with_checksum,
    parse_checksummed,
    read_file,
    with_checksum,
)

NUMBER_LIST = re.compile(r'\[\n[^][{}"]*\]')  # over several lines; JSON strings hold no bare newline, so none matches
QUANTILES = (0.025, 0.975)  # of a 95 % interval
MAX_SPREADS = 6.0  # for `SampledLossless.spreads`: by chance it is further off with probability 2 exp(-18) = 3e-8


class DecodedFigures(Figures):
    """Figures of replies that were decoded with the target."""

    calls_saved: Number = Field(description="1 - calls / tokens: plain decoding needs a call a token")
    engine_accept_len: Number | None = Field(None, description="accept length as vLLM counts it")


class Sample(Record):
    """One prompt's reply: the lists have an entry a target call."""

    domain: str
    prompt: str | None = Field(None, description="digest of the prompt's token ids")
    lengths: Counts = Field(description="tokens gained, the target's own included")
    matched: Counts = Field([], description="proposals kept")
    proposed: Counts = Field([], description="proposals verified")
    accepted: Counts = Field([], description="proposals the target would have said, after a stop token, too")


class DraftFacts(Record):
    """What was evaluated. Steps, seed and recipe are known of runs only, not of exported folders."""

    path: str = ""
    method: str
    block_size: Count
    proposals: Count = Field(description="proposals of a whole block")
    objective: str | None = None
    weighting: str | None = None
    steps: Count | None = None
    seed: int | None = None
    recipe: str | None = Field(None, description="digest of the recipe, its seed left out")
    parameters: Count
    label: str = ""


class Settings(Record):
    prompts: str = Field("", description="the file of prompts, or words for the cache's held-out samples")
    max_new: Count = Field(description="tokens of a reply at most")
    temperature: Count = Field(0, description="0: greedy; sampled replies have a part of their own")
    threshold: Number = Field(0.0, description="confidence below which blocks are cut; 0 cuts nothing")
    proposals: Count | None = Field(None, description="proposals verified a block; not there: all of them")
    batch: Count = Field(1, description="prompts decoded at once")
    device: str = ""
    dtype: str = ""


class Speed(Record):
    """Tokens a second on one machine, prefill included; only what was measured is there."""

    plain_tokens_s: Number | None = None
    speculative_tokens_s: Number | None = None
    speedup: Number | None = None


class Lossless(Record):
    """Greedy replies compared with plain decoding; whatever else differs is an error and makes no report."""

    prompts: Count
    identical: Count
    near_ties: Count = Field(description="equal up to two tokens whose logits are closer than rounding")
    from_file: Count = Field(0, description="plain replies that were read from the file of --plain")


class NearTie(Record):
    """Two tokens with logits closer than rounding, where the comparison of two replies ends."""

    prompt: str
    position: int = Field(description="index in the reply")
    tokens: list[int] = Field(description="of speculative and of plain decoding")
    logits: list[float] = Field(description="theirs, in float32 without a kv cache")
    difference: float = Field(description="how far valid forwards differ in a logit there")


class SampledLossless(Record):
    """How the tokens of sampled replies are distributed in the target's own distribution."""

    tokens: Count
    place: Number = Field(description="mean quantile of the tokens, likeliest first; 1/2 in expectation")
    spreads: Number = Field(description="standard deviations that it is off 1/2, at most MAX_SPREADS")


class SampledReplies(Record):
    """Replies drawn from the target, and how they were drawn."""

    temperature: Number
    draft_temperature: Number = Field(description="of the proposals; 0: the draft's likeliest tokens")
    seed: int = 0
    overall: DecodedFigures
    domains: Annotated[dict[str, DecodedFigures], FailFastDict]
    samples: Annotated[list[Sample], FailFast()]
    lossless: SampledLossless

    @property
    def temperatures(self) -> tuple[float, float]:
        """Of the target and of the draft."""
        return self.temperature, self.draft_temperature


class Agreement(Record):
    """Decoding compared with the accept length that needs no target, over the same prompts and calls."""

    prompts: Count
    equal: Count = Field(description="prompts that agree call by call")
    accept_len: Number = Field(description="decoded with the target")
    accept_len_target_free: Number


class ConfidenceCut(Record):
    """Greedy decoding with blocks cut at one confidence, measured on the cache's replies without the target."""

    threshold: Number
    calls_saved: Number | None = None
    accept_len: Number
    interval: Numbers = Field(default_factory=list)
    calls: Count | None = None
    verified: Number
    verify_rate: Number


class Report(Record):
    """What one evaluation says of one draft: greedy replies, and sampled ones where they were asked for."""

    draft: DraftFacts
    target: str
    cache: str | None = Field(None, description="digest of the cache that the prompts are from")
    settings: Settings
    overall: DecodedFigures
    domains: Annotated[dict[str, DecodedFigures], FailFastDict]
    samples: Annotated[list[Sample], FailFast()]
    speed: Speed
    lossless: Lossless
    near_ties: list[NearTie] = Field(default_factory=list)
    sampled: SampledReplies | None = None
    agreement: Agreement | None = None
    confidence: list[ConfidenceCut] | None = None
    teacher_forced: Annotated[dict[str, Number], FailFastDict] = Field(
        description="teacher-forced accept length by domain"
    )
    replies: list[ReplyText] = Field(default_factory=list, description="some of the greedy replies, as text")

    @model_validator(mode="after")
    def _replies_are_of_samples(self) -> "Report":
        for reply in self.replies:
            of = self.samples[reply.sample] if reply.sample < len(self.samples) else None
            if of is None or not len(of.lengths) == len(of.matched) == len(of.proposed):
                raise ValueError("a reply of no sample")
        return self

    @property
    def verified_proposals(self) -> int:
        """How many proposals of a block were verified."""
        return self.settings.proposals or self.draft.proposals

    def with_sampled_replies(self) -> "Report":
        """Return the report with its sampled replies in place of the greedy ones."""
        drawn = self.sampled
        return self.model_copy(update={"overall": drawn.overall, "domains": drawn.domains, "samples": drawn.samples})


def report_bytes(report: dict) -> bytes:
    """Return a report as checksummed JSON, with each list of numbers on one line, so that git diffs stay readable."""
    text = json.dumps(report, indent=1)
    return with_checksum(NUMBER_LIST.sub(lambda found: re.sub(r"\s", "", found[0]), text))


def load_reports(paths: Sequence[Path]) -> list[Report]:
    """Read what `pipeline evaluate --out` wrote, of one target and limit. UsageError for anything else."""
    reports = [load_report(Path(path)) for path in paths]
    targets = {report.target for report in reports}
    limits = {report.settings.max_new for report in reports}
    for what, found in (("targets", targets), ("limits of a reply's tokens", limits)):
        if len(found) > 1:  # a table and a plot state one
            raise UsageError(f"the reports are of several {what}, {sorted(found)}; compare those of one")
    return reports


def load_report(path: Path) -> Report:
    """Read what `pipeline evaluate --out` wrote. UsageError for what is no report, CacheError for a damaged one."""
    try:
        data = read_file(path, MAX_BYTES)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} is no report of `pipeline evaluate --out FILE` ({cause_of(error)})") from None
    try:
        record, _ = parse_checksummed(data)
    except ValueError as error:
        if ends_with_checksum(data):
            raise damage_error(path, error, "put it back as it was, or evaluate that draft again") from None
        raise UsageError(f"{path} is no report of `pipeline evaluate --out FILE` ({error})") from None
    try:
        return Report.model_validate(record)
    except ValidationError as error:
        raise UsageError(
            f"{path} is no report of `pipeline evaluate --out FILE`, or one of another version: its "
            f"`{(*error.errors()[0]['loc'], 'replies')[0]}` is absent or not as expected; evaluate that draft again"
        ) from None


def pool_seeds(reports: Sequence[Report]) -> dict[str, list[Report]]:
    """Return the reports of each draft by its name: method, variants, steps; and the run's folder for equal names.

    Reports that differ only in their seed are of one draft.
    """
    pooled = defaultdict(list)
    for report in reports:
        draft = report.draft
        conventions = draft.block_size, report.settings.proposals or draft.proposals, draft.parameters
        steps = [f"{draft.steps:,} steps"] if draft.steps else []
        name = ", ".join([draft.method, *variants(report), *steps])
        key = name, draft.recipe, report.cache, *conventions
        if any(other.draft.seed == draft.seed and other.draft.path != draft.path for other in pooled[key]):
            key += (draft.path,)  # one seed twice: what differs the report does not say, such as the states' codec
        pooled[key].append(report)
    names, drafts = Counter(name for name, *_ in pooled), {}
    for (name, *_), members in pooled.items():
        title = name if names[name] == 1 else f"{name} ({Path(members[0].draft.path).name})"
        drafts[title if title not in drafts else f"{title} {len(drafts) + 1}"] = members
    return drafts


def variants(report: Report) -> list[str]:
    """Return what sets a draft apart from others of its method: objective and weighting where they are not as
    published, how many proposals were verified, and the confidence that its blocks were cut at."""
    draft, threshold = report.draft, report.settings.threshold
    options = DRAFTS[draft.method].Config.defaults({}) if draft.method in DRAFTS else {}
    objective = draft.objective if draft.objective != options.get("objective", "ce") else None
    weighting = draft.weighting if draft.weighting != "decay" else None
    limited, cut = report.settings.proposals, f"cut at {threshold:g}" if threshold else None
    count = f"{limited} proposals" if limited not in (None, draft.proposals) else None
    return [part for part in (objective, weighting, count, cut) if part]


def accept_length(reports: Sequence[Report], domain: str | None = None) -> tuple[float, float, float] | None:
    """Return the accept length over all prompts of all seeds, and the ends of its 95 % interval; None without calls.

    A prompt that several seeds decoded is resampled as one: its replies are not independent. UsageError where seeds
    decoded other prompts.
    """
    if len(set(map(prompt_set, reports))) > 1:
        counts = ", ".join(str(len(report.samples)) for report in reports)
        raise UsageError(
            f"seeds of one recipe were evaluated on other prompts ({counts} of them), which cannot be "
            "pooled; evaluate each with the same --count, --prompts and cache"
        )
    prompts = tokens_and_calls(reports, domain)
    if not prompts:
        return None
    tokens_n, calls_n = np.stack(list(prompts.values())).T
    return (tokens_n.sum() / calls_n.sum(), *bootstrap(tokens_n, calls_n, seed=0))


def prompt_set(report: Report) -> tuple:
    """Return what identifies a report's prompts: of each its domain and digest, or the cache in reports without one."""
    return tuple((sample.domain, report.cache if sample.prompt is None else sample.prompt) for sample in report.samples)


def tokens_and_calls(reports: Sequence[Report], domain: str | None = None) -> dict[tuple[int, str], np.ndarray]:
    """Return tokens and calls [2] of every prompt with a call, by its index and domain, summed over seeds."""
    prompts = defaultdict(lambda: np.zeros(2))
    for report in reports:
        for number, sample in enumerate(report.samples):
            if sample.lengths and domain in (None, sample.domain):
                prompts[number, sample.domain] += (sum(sample.lengths), len(sample.lengths))
    return prompts


@dataclass(frozen=True)
class AcceptLengths:
    """Accept lengths of one draft: over all prompts, over those of each resample [B], and of each seed alone."""

    overall: float
    resampled_B: np.ndarray
    by_seed: dict[int | None, float]


def paired_accept_lengths(*drafts: list[Report]) -> list[AcceptLengths]:
    """Return the accept lengths of drafts that decoded the same prompts, all over the same resamples.

    Prompts that took no call of any are left out. UsageError where the prompts differ.
    """
    prompt_sets = {prompt_set(report) for reports in drafts for report in reports}
    if len(prompt_sets) > 1:
        counts = ", ".join(str(len(prompts)) for prompts in prompt_sets)
        raise UsageError(
            f"the reports are of other prompts ({counts} of them) and cannot be paired; evaluate each with the same "
            "--count, --prompts and cache"
        )
    prompts = sorted({prompt for reports in drafts for prompt in tokens_and_calls(reports)})
    weights_Bn, accept_lengths = resamples(len(prompts), seed=0), []
    for reports in drafts:
        seeds = defaultdict(list)
        for report in reports:
            seeds[report.draft.seed].append(report)
        tokens_n, calls_n = _counts(reports, prompts)
        resampled_B = (weights_Bn @ tokens_n) / np.maximum(weights_Bn @ calls_n, 1)
        by_seed = {seed: np.divide(*_counts(members, prompts).sum(1)) for seed, members in seeds.items()}
        accept_lengths.append(AcceptLengths(tokens_n.sum() / calls_n.sum(), resampled_B, by_seed))
    return accept_lengths


def _counts(reports: list[Report], prompts: Sequence[tuple[int, str]]) -> np.ndarray:
    """Tokens and calls of the prompts [2, n], seeds added up."""
    counts = tokens_and_calls(reports)
    return np.array([counts.get(prompt, (0, 0)) for prompt in prompts], float).T
