"""Prompts to measure a draft on: a cache's held-out samples, or lines of a JSONL file.

A line has `messages` (rendered with the target's chat template; a last reply is left out), `prompt` (text as it stands)
or `input_ids`, and may name its `domain`.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipeline.cache import HiddenCache
from pipeline.corpus.rejections import Unusable
from pipeline.errors import DataError, UsageError, cause_of, refuse_limit
from pipeline.evaluation.accept_length import reply_spans
from pipeline.json_files import parse_json, read_file
from pipeline.runs.training_data import stratified_subset
from pipeline.target.chat_template import ChatTemplate, load_tokenizer
from pipeline.target.files import TEMPLATE_DATE, max_positions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MOST_BYTES = 1 << 30  # of a file of prompts
KINDS = ("messages", "prompt", "input_ids")


@dataclass(frozen=True)
class Prompt:
    """Token ids to decode from. name: for messages. sample: its index in the cache, where it comes from one."""

    ids: list[int]
    domain: str
    name: str
    sample: int | None = None


def cached_prompts(cache: HiddenCache, heldout: np.ndarray, count: int) -> list[Prompt]:
    """Return at most `count` of the samples `heldout`, spread over domains, each up to its last turn's reply.

    UsageError when nothing is held out.
    """
    starts = {}
    for index in heldout.tolist():
        spans = reply_spans(cache.tokens_of(index)[1])
        if spans:
            starts[index] = spans[-1][0]
    if not starts:
        raise UsageError(f"{cache.path}: the corpus holds nothing out to decode; pass --prompts FILE")
    table = cache.samples
    return [
        Prompt(cache.tokens_of(index)[0][: starts[index]].tolist(), table.domain[index], table.hex(index), index)
        for index in stratified_subset(cache, np.array(sorted(starts)), count).tolist()
    ]


def file_prompts(path: Path, target: Path, count: int, rules: dict | None = None) -> list[Prompt]:
    """Return the first `count` prompts of a JSONL file; `target` is the folder of the target's tokenizer.

    rules: how a cache made its samples, with the chat template's arguments and date.

    Raises UsageError when there is no such file, DataError naming file and line for what is no prompt.
    """
    try:
        lines = read_file(Path(path), MOST_BYTES).decode().split("\n")
    except (OSError, ValueError) as error:
        refuse_limit(path, error)
        raise UsageError(f"{path} cannot be read ({cause_of(error)}); pass a JSONL file of prompts") from error
    rules, prompts = rules or {}, []
    date = rules.get("template_date", TEMPLATE_DATE)
    template = cache(lambda: ChatTemplate(target, rules.get("template_kwargs", {}), date))
    for number, line in enumerate(lines, 1):
        if line.strip() and len(prompts) < count:
            prompts.append(_parse(line, f"{path}:{number}", target, template))
    if not prompts:
        raise DataError(f"{path} holds no prompt; write one JSON object a line, with {', '.join(KINDS)}")
    return prompts


def _parse(line: str, location: str, target: Path, template: Callable[[], ChatTemplate]) -> Prompt:
    try:
        row = parse_json(line)
    except ValueError as error:
        raise DataError(f"{location} is no JSON ({error}); correct or remove the line") from error
    kinds = [kind for kind in KINDS if isinstance(row, dict) and kind in row]
    if len(kinds) != 1:
        raise DataError(f"{location} has {' and '.join(kinds) or 'none'} of {', '.join(KINDS)}; give exactly one")
    ids = _ids(kinds[0], row[kinds[0]], location, target, template)
    return _checked(ids, kinds[0], str(row.get("domain", "")), location)


def _checked(ids: Iterable[int], kind: str, domain: str, location: str) -> Prompt:
    if not ids or not all(type(token) is int and token >= 0 for token in ids):
        raise DataError(f"{location}: `{kind}` gives no list of token ids; correct or remove it")
    return Prompt(ids, domain, location)


def _ids(kind: str, given, location: str, target: Path, template: Callable[[], ChatTemplate]) -> Iterable[int]:
    if kind == "input_ids":
        return given if isinstance(given, list) else []
    if kind == "prompt":
        return _tokenizer(target)(given)["input_ids"] if isinstance(given, str) else []
    try:
        if isinstance(given, list) and given and given[-1].get("role") == "assistant":
            given = given[:-1]
        return template().prompt_ids(given)
    except (Unusable, TypeError, AttributeError) as error:
        raise DataError(f"{location}: the chat template cannot render `messages` ({error}); correct them") from error


@cache
def _tokenizer(target: Path):
    try:
        return load_tokenizer(target)
    except UsageError as error:
        raise UsageError(f"{str(error).split('; ')[0]}; or give the prompts as `input_ids`") from error


def typed_prompt(given: str | list, target: Path) -> Prompt:
    """Return the prompt that a program gives: what a user says, messages, or token ids. DataError for anything else.

    target: the folder of the target's tokenizer and chat template.
    """
    kind = "messages" if given and isinstance(given, list) and isinstance(given[0], dict) else "input_ids"
    if isinstance(given, str):
        kind, given = "messages", [{"role": "user", "content": given}]
    return _checked(_ids(kind, given, "the prompt", target, lambda: ChatTemplate(target)), kind, "", "the prompt")


def check_context_length(target: "PreTrainedModel", asked: Sequence[Prompt], max_new: int, proposals: int) -> None:
    """Refuse prompts that, with a reply and a block past its end, exceed the target's context, and unknown ids."""
    config = target.config.get_text_config()
    most, why = max_positions(config.to_dict())
    for prompt in asked:
        if most is not None and len(prompt.ids) + max_new + proposals > most:
            raise UsageError(
                f"{prompt.name}: {len(prompt.ids)} tokens, {max_new} new ones and a block of {proposals} exceed the "
                f"target's {most}{why}; lower --max-new or leave that prompt out"
            )
        if max(prompt.ids) >= config.vocab_size:
            raise UsageError(f"{prompt.name}: token {max(prompt.ids)} is outside the target's {config.vocab_size}")
