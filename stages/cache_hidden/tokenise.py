"""From a conversation to samples, ids and a loss mask, by the target's own chat template.

What is supervised: the turns of the assistant that prove (`turn_proof.py`), each from the first token that the target
itself would write to the one that ends it. One sample holds a turn behind the prompt it was answered to, and with it
every earlier turn that stands in that prompt as the target wrote it. Templates that rewrite earlier turns (they drop
thoughts, say) leave those to samples of their own.

    T tokens of a sample
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from pipeline.corpus.sources import Conversation
from pipeline.corpus.tally import Unusable
from pipeline.target.chat_template import ChatTemplate
from stages.cache_hidden.dropped_text import check_each_text_rendered, check_not_encoded_twice, check_texts_rendered
from stages.cache_hidden.token_boundaries import Encoded, encode_apart, encode_many, mask_of
from stages.cache_hidden.turn_proof import Chat, Turn, TurnEnds, prove
from stages.cache_hidden.turn_refusals import Unproven


@dataclass(frozen=True)
class Sample:
    """Ids int32 [T] and loss mask bool [T] of one sample, and the kinds of its turns, the last one first."""

    ids: np.ndarray
    mask: np.ndarray
    kinds: tuple[str, ...] = ()


@dataclass
class Prepared:
    """A conversation's samples, the one of its last turn first; the turns left unsupervised, each with its reason.

    `last` counts the turns that the first sample holds, `turns` all that the samples hold.
    """

    samples: list[Sample] = field(default_factory=list)
    unproven: list[tuple[str, str]] = field(default_factory=list)
    last: int = 0
    turns: int = 0


class SampleMaker:
    """Makes samples of conversations, a batch at a time."""

    def __init__(self, template: ChatTemplate):
        self.template, self.ends = template, TurnEnds(template)
        self._shown: set[tuple] = set()  # places of messages that were proven to come out
        self._form = 0  # of tool calls, the one that the last row with calls was shown in

    def prepare(self, conversations: Sequence[Conversation], max_length: int) -> list[Prepared | Unusable]:
        """Return the samples of each conversation, or why it has none. Ids are not cut at `max_length` exactly."""
        found: list[Prepared | Unusable] = []
        texts, places = [], []
        for conversation in conversations:
            try:
                drafted = self._draft(conversation)
            except Unusable as fault:
                found.append(fault)
                continue
            found.append(drafted)
            for one in drafted.parts:
                places.append(one)
                texts.append(one.turn.text + one.turn.behind)
        for one, encoded in zip(places, encode_many(self.template, texts, max_length) if texts else [], strict=True):
            one.encoded = encoded
        return [one if isinstance(one, Unusable) else self._finish(one, max_length) for one in found]

    def _draft(self, conversation: Conversation) -> "_Draft":
        """Return the turns of a conversation and which share a sample. Raises Unusable when none proves."""
        if conversation.tokens is not None:
            return _Draft(conversation, None, [], [])
        wanted = [
            at
            for at, message in enumerate(conversation.messages)
            if message["role"] == "assistant" and message.get("supervise", True)
        ]
        if not wanted:
            raise Unusable("not to be learned", "marks every reply as not to be learned")
        fault = None
        forms = _forms(conversation.messages)
        for number in sorted(range(len(forms)), key=lambda number: number != self._form % len(forms)):
            chat = Chat(self.template, forms[number], conversation.tools, conversation.template_kwargs)
            try:
                drafted = self._turns(conversation, chat, wanted)
                self._form = number if len(forms) > 1 else self._form
                return drafted
            except Unusable as refused:
                fault = fault or refused
        raise fault

    def _turns(self, conversation: Conversation, chat: Chat, wanted: list[int]) -> "_Draft":
        turns, unproven = [], []
        for at in reversed(wanted):
            try:
                turn = prove(chat, at, self.ends)
            except Unproven as fault:
                unproven.append((fault.reason, f"message {at}: {fault.detail}"))
                continue
            except Unusable:
                if at == wanted[-1]:
                    raise
                unproven.append(("no prompt", f"message {at}: the template takes no prompt that ends before it"))
                continue
            turns.append(turn)
        if not turns:
            raise Unusable(*unproven[0])
        check_texts_rendered(chat, turns[::-1])
        for turn in turns:
            check_each_text_rendered(chat, turn.at, self._shown)
            check_not_encoded_twice(chat.messages[: turn.at + 1], turn.text)
        return _Draft(conversation, chat, _shared(turns), unproven)

    def _finish(self, drafted: "_Draft", max_length: int) -> Prepared | Unusable:
        if drafted.chat is None:
            ids, mask = drafted.conversation.tokens
            return Prepared([Sample(np.array(ids, np.int32), np.array(mask, bool), ("tokens",))], [], 1, 1)
        done, waiting = Prepared(unproven=drafted.unproven), list(drafted.parts)
        while waiting:
            part = waiting.pop(0)
            try:
                sample, apart = self._sample(drafted, part, max_length)
            except Unusable as fault:
                return fault
            held = len(sample.kinds)
            done.last = done.last or held
            done.turns += held
            done.samples.append(sample)
            waiting += [
                _Part(turn, [], encode_many(self.template, [turn.text + turn.behind], max_length)[0]) for turn in apart
            ]
        return done

    def _sample(self, drafted: "_Draft", part: "_Part", max_length: int) -> tuple[Sample, list[Turn]]:
        """Return a part as a sample, and the turns that it could not hold since a token goes across their bounds."""
        turn, encoded, message = part.turn, part.encoded, drafted.chat.messages[part.turn.at]
        kinds, apart, spans = [_kind(drafted.chat.messages, turn.at)], [], []
        start = encoded.prompt_boundary(len(turn.prompt))
        ids = encoded.ids
        if message.get("token_ids"):
            prompt_ids = encode_many(self.template, [turn.prompt], max_length)[0].ids
            _check_prompt(self.template, prompt_ids, message.get("prompt_token_ids"), turn.at)
            ids, start = [*prompt_ids, *message["token_ids"]], len(prompt_ids)
            stop = len(ids)
        elif start is None:
            prompt_ids, reply_ids = encode_apart(self.template, turn.prompt, turn.reply, max_length)
            ids, start = [*prompt_ids, *reply_ids], len(prompt_ids)
            stop = len(ids)
        else:
            stop = encoded.boundary(len(turn.text))
            if stop is None:
                raise Unusable("no end", f"message {turn.at}: a token goes on behind the end of the turn")
        spans.append((start, stop))
        for other in part.held:
            span = encoded.prompt_boundary(len(other.prompt)), encoded.boundary(len(other.text))
            written = drafted.chat.messages[other.at].get("token_ids")
            if None in span or span[1] > start or (written and ids[slice(*span)].tolist() != written):
                apart.append(other)
            else:
                spans.append(span)
                kinds.append(_kind(drafted.chat.messages, other.at))
        ids_T = np.asarray(ids[: max_length + 1], np.int32)
        return Sample(ids_T, mask_of(spans, len(ids_T)), tuple(kinds)), apart


@dataclass
class _Part:
    """A turn, and the earlier ones that its prompt holds as the target wrote them."""

    turn: Turn
    held: list[Turn]
    encoded: Encoded | None = None


@dataclass
class _Draft:
    conversation: Conversation
    chat: Chat | None
    parts: list[_Part]
    unproven: list[tuple[str, str]]


def _shared(turns: list[Turn]) -> list[_Part]:
    """Return the turns, the last first, each with those that its text holds; none is held twice."""
    parts: list[_Part] = []
    for turn in turns:
        holder = next((part for part in parts if part.turn.text.startswith(turn.text)), None)
        if holder:
            holder.held.append(turn)
        else:
            parts.append(_Part(turn, []))
    return parts


def _forms(messages: list[dict]) -> list[list[dict]]:
    """Return the messages in the forms that templates take tool calls in: with no text or an empty one beside them,
    their arguments as an object or as its JSON. The first that a template shows whole is taken.
    """
    if not any(message.get("tool_calls") for message in messages):
        return [messages]

    def form(message: dict, empty: str | None, text: bool) -> dict:
        if not message.get("tool_calls"):
            return message
        calls = message["tool_calls"]
        if text:
            calls = [_with_arguments(call, json.dumps) for call in calls]
        return {**message, "content": message["content"] or empty, "tool_calls": calls}

    return [[form(message, empty, text) for message in messages] for text in (False, True) for empty in ("", None)]


def _with_arguments(call: dict, change) -> dict:
    function = call.get("function")
    if isinstance(function, dict) and isinstance(function.get("arguments"), dict | list):
        return {**call, "function": {**function, "arguments": change(function["arguments"], ensure_ascii=False)}}
    return call


def _kind(messages: list[dict], at: int) -> str:
    """Return what kind of turn a message is, for people."""
    turn = messages[at]
    words = (
        ["calls tools"] if turn.get("tool_calls") else ["answers a tool"] if messages[at - 1]["role"] == "tool" else []
    )
    words += ["with reasoning"] * bool(turn.get("reasoning_content"))
    words = words or ["reply"]
    return " ".join(words)


def _check_prompt(template: ChatTemplate, ours: np.ndarray, engine: list[int] | None, at: int) -> None:
    """Refuse a reply that an engine gave to another prompt than ours. Raises Unusable, naming the first difference."""
    ours = ours.tolist()
    if engine is None or ours == engine:
        return
    first = next((k for k, (one, other) in enumerate(zip(ours, engine, strict=False)) if one != other), None)
    first = min(len(ours), len(engine)) if first is None else first
    here, there = (template.tokenizer.decode(ids[max(0, first - 2) : first + 6]) for ids in (ours, engine))
    raise Unusable(
        "other prompt",
        f"message {at} was answered to another prompt: from token {first} {there!r}, and this run's is {here!r}; use "
        "the chat template and --template-kwargs it was made with",
    )
