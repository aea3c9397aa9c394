"""Decode every prompt with and without the draft, and check that the replies agree."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console
from rich.progress import track
from transformers import PreTrainedModel

from pipeline.errors import ProofError, RoomError, UsageError
from pipeline.tensors import is_out_of_memory
from stages.evaluate.decode import Decoded, SamplingOptions
from stages.evaluate.losslessness import Judge, plain_decode, token_quantiles
from stages.evaluate.plain_replies import PlainReplies
from stages.evaluate.prompts import Prompt
from stages.evaluate.report import Outcome, drawn_figures

PROGRESS_SECONDS = 5.0  # seconds between lines where there is no terminal
T = TypeVar("T")
DecodeAll = Callable[..., Iterator[tuple[int, Decoded]]]  # `decode_many` of all prompts: yields them as they end


@contextlib.contextmanager
def refuse_out_of_memory(batch: int, device: torch.device) -> Iterator[None]:
    """Turn an out-of-memory error of decoding into a RoomError that says what to do."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        what, less = ("a prompt", "use a larger device, --device cpu, or shorter prompts")
        if batch > 1:
            what, less = (f"{batch} prompts at once", "pass a smaller --batch")
        raise RoomError(f"no room on {device} to decode {what}; {less}") from error


def decode_all(
    judge: Judge,
    asked: Sequence[Prompt],
    decode: DecodeAll,
    max_new: int,
    stops: frozenset[int],
    replies: PlainReplies,
) -> list[Outcome]:
    """Decode every prompt greedily with and without the draft, and judge each difference. ProofError for a real one.

    Without it only those are decoded whose plain reply is not among `replies`, and added to them, whatever ends it.
    """
    outcomes: list[Outcome | None] = [None] * len(asked)
    stored_replies = [replies.find(prompt.ids) for prompt in asked]
    try:
        for index, fast in with_progress(decode(), len(asked), "decoding"):
            prompt, plain = asked[index], stored_replies[index]
            if plain is None:
                plain = plain_decode(judge.target, prompt.ids, max_new, stops)
                replies.add(prompt.ids, plain)
            try:
                tie = judge.compare(prompt.name, prompt.ids, fast, plain)
            except ProofError as error:
                stored = None if stored_replies[index] is None else replies.path
                raise ProofError(f"{error}{_doubt(stored, judge.batch)}") from error
            outcomes[index] = Outcome(prompt, fast, plain, tie, stored_replies[index] is not None)
    except BaseException:
        with contextlib.suppress(RoomError, UsageError):  # what ended it is what has to be said
            replies.write()
        raise
    replies.write()
    return outcomes


def _doubt(stored: Path | None, batch: int) -> str:
    """What to rule out before a difference is reported."""
    without = [f"--plain (the plain reply is from {stored})"] * bool(stored) + ["--batch"] * (batch > 1)
    return f"; first evaluate without {' and without '.join(without)}" if without else ""


def draw_all(
    target: PreTrainedModel,
    asked: Sequence[Prompt],
    decode: DecodeAll,
    sampling: SamplingOptions,
    proposals: int,
) -> dict:
    """Draw a reply to every prompt with target and draft; return the report's part. ProofError for biased ones."""
    replies: list[Decoded | None] = [None] * len(asked)
    found: list[list[float]] = [[] for _ in asked]  # in the order of the prompts, not that in which they end
    for index, fast in with_progress(decode(sampling=sampling), len(asked), "drawing"):
        replies[index] = fast
        found[index] = token_quantiles(target, asked[index].ids, fast.ids, sampling.temperature)
    return drawn_figures(list(zip(asked, replies, strict=True)), [*chain(*found)], sampling, proposals)


def with_progress(ended: Iterable[T], count: int, doing: str) -> Iterator[T]:
    """Yield finished items and report progress: a bar on a terminal, a line every few seconds elsewhere."""
    console = Console(stderr=True)
    if console.is_terminal:
        yield from track(ended, doing, total=count, console=console, transient=True)
        return
    last_report = time.monotonic()
    for number, item in enumerate(ended, 1):
        yield item
        if time.monotonic() - last_report > PROGRESS_SECONDS:
            last_report = time.monotonic()
            print(f"{doing}: {number} of {count} prompts", file=sys.stderr)
