"""Turns a conversation into samples, ids and a loss mask, with the target's own chat template.

Supervised are the assistant turns that are proven (`turn_proof.py`), each from the first token that the target itself
would generate through the one that ends it. A sample holds a turn after its prompt, and supervises every earlier turn
that this prompt contains as the target wrote it. Earlier turns that the template rewrites (it drops their reasoning,
say) get samples of their own.

    T tokens of a sample
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from pipeline.corpus.rejections import Unusable
from pipeline.corpus.sources import Conversation
from pipeline.target.chat_template import ChatTemplate
from stages.cache_hidden.rendered_chat import (
    ProvenTurn,
    RenderedChat,
    check_each_text_rendered,
    check_not_encoded_twice,
    check_texts_rendered,
)
from stages.cache_hidden.token_boundaries import EncodedText, encode_separately, encode_texts, mask_of
from stages.cache_hidden.turn_proof import TurnEnds, Unproven, prove_turn


@dataclass(frozen=True)
class Sample:
    """Ids int32 [T] and loss mask bool [T] of one sample, and the kinds of its supervised turns, the last one first."""

    ids: np.ndarray
    mask: np.ndarray
    kinds: tuple[str, ...] = ()


@dataclass
class PreparedConversation:
    """A conversation's samples, the one of its last turn first, and its unproven turns as (reason, detail).

    turns: how many are supervised in all samples, last_turns: in the first one.
    """

    samples: list[Sample] = field(default_factory=list)
    unproven: list[tuple[str, str]] = field(default_factory=list)
    last_turns: int = 0
    turns: int = 0


class SampleMaker:
    """Makes samples from conversations, a batch at a time."""

    def __init__(self, template: ChatTemplate):
        self.template, self.ends = template, TurnEnds(template)
        self._verified: set[tuple] = set()  # see `check_each_text_rendered`
        self._last_form = 0  # the form of `_tool_call_forms` that the last row with tool calls was rendered in

    def prepare(self, conversations: Sequence[Conversation], max_length: int) -> list[PreparedConversation | Unusable]:
        """Return the samples of each conversation, or why it has none. Ids may be longer than `max_length`."""
        found: list[PreparedConversation | Unusable] = []
        texts, pending = [], []
        for conversation in conversations:
            try:
                proven = self._prove(conversation)
            except Unusable as fault:
                found.append(fault)
                continue
            found.append(proven)
            for group in proven.groups:
                pending.append(group)
                texts.append(group.turn.text + group.turn.suffix)
        for entry, encoded in zip(
            pending, encode_texts(self.template, texts, max_length) if texts else [], strict=True
        ):
            entry.encoded = encoded
        return [entry if isinstance(entry, Unusable) else self._make_samples(entry, max_length) for entry in found]

    def _prove(self, conversation: Conversation) -> "_ProvenConversation":
        """Return the proven turns of a conversation and which share a sample. Raises Unusable when there is none."""
        if conversation.tokens is not None:
            return _ProvenConversation(conversation, None, [], [])
        wanted = [
            at
            for at, message in enumerate(conversation.messages)
            if message["role"] == "assistant" and message.get("supervise", True)
        ]
        if not wanted:
            raise Unusable("not to be learned", "marks every reply as not to be learned")
        fault = None
        forms = _tool_call_forms(conversation.messages)
        for number in sorted(range(len(forms)), key=lambda number: number != self._last_form % len(forms)):
            chat = RenderedChat(self.template, forms[number], conversation.tools, conversation.template_kwargs)
            try:
                proven = self._prove_turns(conversation, chat, wanted)
                self._last_form = number if len(forms) > 1 else self._last_form
                return proven
            except Unusable as refused:
                fault = fault or refused
        raise fault

    def _prove_turns(self, conversation: Conversation, chat: RenderedChat, wanted: list[int]) -> "_ProvenConversation":
        turns, unproven = [], []
        for at in reversed(wanted):
            try:
                turn = prove_turn(chat, at, self.ends)
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
            check_each_text_rendered(chat, turn.at, self._verified)
            check_not_encoded_twice(chat.messages[: turn.at + 1], turn.text)
        return _ProvenConversation(conversation, chat, _group_turns(turns), unproven)

    def _make_samples(self, proven: "_ProvenConversation", max_length: int) -> PreparedConversation | Unusable:
        if proven.chat is None:
            ids, mask = proven.conversation.tokens
            return PreparedConversation([Sample(np.array(ids, np.int32), np.array(mask, bool), ("tokens",))], [], 1, 1)
        prepared, waiting = PreparedConversation(unproven=proven.unproven), list(proven.groups)
        while waiting:
            group = waiting.pop(0)
            try:
                sample, separate = self._make_sample(proven, group, max_length)
            except Unusable as fault:
                return fault
            turns = len(sample.kinds)
            prepared.last_turns = prepared.last_turns or turns
            prepared.turns += turns
            prepared.samples.append(sample)
            waiting += [
                _TurnGroup(turn, [], encode_texts(self.template, [turn.text + turn.suffix], max_length)[0])
                for turn in separate
            ]
        return prepared

    def _make_sample(
        self, proven: "_ProvenConversation", group: "_TurnGroup", max_length: int
    ) -> tuple[Sample, list[ProvenTurn]]:
        """Return a group as a sample, and its turns that need another one since a token crosses their boundary."""
        turn, encoded, message = group.turn, group.encoded, proven.chat.messages[group.turn.at]
        kinds, separate, spans = [_turn_kind(proven.chat.messages, turn.at)], [], []
        start = encoded.prompt_boundary(len(turn.prompt))
        ids = encoded.ids
        if message.get("token_ids"):
            prompt_ids = encode_texts(self.template, [turn.prompt], max_length)[0].ids
            _check_prompt(self.template, prompt_ids, message.get("prompt_token_ids"), turn.at)
            ids, start = [*prompt_ids, *message["token_ids"]], len(prompt_ids)
            stop = len(ids)
        elif start is None:
            prompt_ids, reply_ids = encode_separately(self.template, turn.prompt, turn.reply, max_length)
            ids, start = [*prompt_ids, *reply_ids], len(prompt_ids)
            stop = len(ids)
        else:
            stop = encoded.boundary(len(turn.text))
            if stop is None:
                raise Unusable("no end", f"message {turn.at}: a token goes on behind the end of the turn")
        spans.append((start, stop))
        for other in group.earlier:
            span = encoded.prompt_boundary(len(other.prompt)), encoded.boundary(len(other.text))
            engine_ids = proven.chat.messages[other.at].get("token_ids")
            if None in span or span[1] > start or (engine_ids and ids[slice(*span)].tolist() != engine_ids):
                separate.append(other)
            else:
                spans.append(span)
                kinds.append(_turn_kind(proven.chat.messages, other.at))
        ids_T = np.asarray(ids[: max_length + 1], np.int32)
        return Sample(ids_T, mask_of(spans, len(ids_T)), tuple(kinds)), separate


@dataclass
class _TurnGroup:
    """The turns of one sample: the last one, and the earlier ones that its prompt contains as the target wrote them."""

    turn: ProvenTurn
    earlier: list[ProvenTurn]
    encoded: EncodedText | None = None


@dataclass
class _ProvenConversation:
    """A conversation with its proven turns, grouped by sample. chat: None for a row that came as tokens."""

    conversation: Conversation
    chat: RenderedChat | None
    groups: list[_TurnGroup]
    unproven: list[tuple[str, str]]


def _group_turns(turns: list[ProvenTurn]) -> list[_TurnGroup]:
    """Group turns, given last first, by sample: a turn joins the first group whose text starts with its own."""
    groups: list[_TurnGroup] = []
    for turn in turns:
        holder = next((group for group in groups if group.turn.text.startswith(turn.text)), None)
        if holder:
            holder.earlier.append(turn)
        else:
            groups.append(_TurnGroup(turn, []))
    return groups


def _tool_call_forms(messages: list[dict]) -> list[list[dict]]:
    """Return the messages in the forms that templates expect tool calls in; the first that is rendered in full is used.

    With "" or None as the text beside them, and their arguments as an object or as its JSON.
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


def _turn_kind(messages: list[dict], at: int) -> str:
    """Return what kind of turn a message is, in words, for the plan's report."""
    turn = messages[at]
    words = (
        ["calls tools"] if turn.get("tool_calls") else ["answers a tool"] if messages[at - 1]["role"] == "tool" else []
    )
    words += ["with reasoning"] * bool(turn.get("reasoning_content"))
    words = words or ["reply"]
    return " ".join(words)


def _check_prompt(template: ChatTemplate, ours: np.ndarray, engine: list[int] | None, at: int) -> None:
    """Raise Unusable, naming the first difference, for a reply that an engine gave to another prompt than ours."""
    ours = ours.tolist()
    if engine is None or ours == engine:
        return
    first = next((k for k, (entry, other) in enumerate(zip(ours, engine, strict=False)) if entry != other), None)
    first = min(len(ours), len(engine)) if first is None else first
    here, there = (template.tokenizer.decode(ids[max(0, first - 2) : first + 6]) for ids in (ours, engine))
    raise Unusable(
        "other prompt",
        f"message {at} was answered to another prompt: from token {first} {there!r}, and this run's is {here!r}; use "
        "the chat template and --template-kwargs it was made with",
    )
