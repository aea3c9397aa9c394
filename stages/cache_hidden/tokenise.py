"""Turns a conversation into samples, ids and a loss mask, with the target's own chat template.

Supervised are the assistant turns that are proven (`turn_proof.py`), each from the first token that the target itself
would generate through the one that ends it. A sample holds a turn after its prompt, and supervises every earlier turn
that this prompt contains as the target wrote it. Earlier turns that the template rewrites (it drops their reasoning,
say) get samples of their own.

    T tokens of a sample
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

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
    tool_call_forms,
    turn_kind,
)
from stages.cache_hidden.turn_proof import TurnEnds, Unproven, prove_turn

CHARACTERS_A_TOKEN = 16  # of a long text so many are encoded first, and more where these give too few tokens


@dataclass(frozen=True)
class Sample:
    """Ids int32 [T] and loss mask bool [T] of one sample, and the kinds of its supervised turns, the last one first."""

    ids: np.ndarray
    mask: np.ndarray
    kinds: tuple[str, ...] = ()


@dataclass
class PreparedConversation:
    """A conversation's samples, the one of its last turn first, and its unproven turns as (reason, detail)."""

    samples: list[Sample]
    unproven: list[tuple[str, str]]

    @property
    def last_turns(self) -> int:
        """How many turns the first sample supervises."""
        return len(self.samples[0].kinds)

    @property
    def turns(self) -> int:
        """How many turns all samples supervise."""
        return sum(len(sample.kinds) for sample in self.samples)


class SampleMaker:
    """Makes samples from conversations, a batch at a time."""

    def __init__(self, template: ChatTemplate):
        self.template, self.ends = template, TurnEnds(template)
        self._verified: set[tuple] = set()  # see `check_each_text_rendered`
        self._last_form = 0  # the form of `tool_call_forms` that the last record with tool calls was rendered in

    def prepare(self, conversations: Sequence[Conversation], max_length: int) -> list[PreparedConversation | Unusable]:
        """Return the samples of each conversation, or why it has none. Ids may be longer than `max_length`."""
        found: list[_ProvenConversation | Unusable] = []
        for conversation in conversations:
            try:
                found.append(self._prove(conversation))
            except Unusable as fault:
                found.append(fault)
        groups = [group for proven in found if isinstance(proven, _ProvenConversation) for group in proven.groups]
        texts = [group.turn.text + group.turn.suffix for group in groups]
        for group, encoded in zip(groups, encode_texts(self.template, texts, max_length), strict=True):
            group.encoded = encoded
        return [proven if isinstance(proven, Unusable) else self._make_samples(proven, max_length) for proven in found]

    def _prove(self, conversation: Conversation) -> "_ProvenConversation":
        """Return the proven turns of a conversation and which share a sample. Raises Unusable when there is none."""
        if conversation.tokens is not None:
            return _ProvenConversation(conversation, None, [], [])
        roles = [message.get("supervise", True) and message["role"] for message in conversation.messages]
        wanted = [at for at, role in enumerate(roles) if role == "assistant"]
        if not wanted:
            raise Unusable("not to be learned", "marks every reply as not to be learned")
        fault = None
        forms = tool_call_forms(conversation.messages)
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
            return PreparedConversation([Sample(np.array(ids, np.int32), np.array(mask, bool), ("tokens",))], [])
        prepared, waiting = PreparedConversation([], proven.unproven), list(proven.groups)
        try:
            for group in waiting:
                sample, separate = self._make_sample(proven, group, max_length)
                prepared.samples.append(sample)
                for turn in separate:
                    encoded = encode_texts(self.template, [turn.text + turn.suffix], max_length)[0]
                    waiting.append(_TurnGroup(turn, [], encoded))
        except Unusable as fault:
            return fault
        return prepared

    def _make_sample(
        self, proven: "_ProvenConversation", group: "_TurnGroup", max_length: int
    ) -> tuple[Sample, list[ProvenTurn]]:
        """Return a group as a sample, and its turns that need another one since a token crosses their boundary."""
        turn, encoded, message = group.turn, group.encoded, proven.chat.messages[group.turn.at]
        kinds, separate = [turn_kind(proven.chat.messages, turn.at)], []
        ids, start = encoded.ids, encoded.prompt_boundary(len(turn.prompt))
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
        spans = [(start, stop)]
        for other in group.earlier:
            span = encoded.prompt_boundary(len(other.prompt)), encoded.boundary(len(other.text))
            engine_ids = proven.chat.messages[other.at].get("token_ids")
            if None in span or span[1] > start or (engine_ids and ids[slice(*span)].tolist() != engine_ids):
                separate.append(other)
            else:
                spans.append(span)
                kinds.append(turn_kind(proven.chat.messages, other.at))
        ids_T = np.asarray(ids[: max_length + 1], np.int32)
        mask_T = np.zeros(len(ids_T), bool)
        for start, stop in spans:
            mask_T[start:stop] = True
        return Sample(ids_T, mask_T, tuple(kinds)), separate


@dataclass
class _TurnGroup:
    """The turns of one sample: the last one, and the earlier ones that its prompt contains as the target wrote them."""

    turn: ProvenTurn
    earlier: list[ProvenTurn]
    encoded: "EncodedText | None" = None


@dataclass
class _ProvenConversation:
    """A conversation with its proven turns, grouped by sample. chat: None for a record that came as tokens."""

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


def _check_prompt(template: ChatTemplate, ours: np.ndarray, engine: list[int] | None, at: int) -> None:
    """Raise Unusable, naming the first difference, for a reply that an engine gave to another prompt than ours."""
    ours = ours.tolist()
    if engine is None or ours == engine:
        return
    first = next(k for k, (entry, other) in enumerate(zip_longest(ours, engine)) if entry != other)
    here, there = (template.tokenizer.decode(ids[max(0, first - 2) : first + 6]) for ids in (ours, engine))
    raise Unusable(
        "other prompt",
        f"message {at} was answered to another prompt: from token {first} {there!r}, and this run's is {here!r}; use "
        "the chat template and --template-kwargs it was made with",
    )


class EncodedText:
    """A text's ids, int32 [T], perhaps of its beginning only (`cut`), with a map from characters to tokens.

    Tokenizers split text at added tokens first, so these mostly show where turns begin and end. Only where they do not
    are the tokenizer's own offsets computed, which adds a quarter to the time of encoding.
    """

    def __init__(self, template: ChatTemplate, text: str, encoding, *, cut: bool, offsets: bool):
        self.template, self.text, self.cut = template, text, cut
        self.ids = np.array(encoding.ids, np.int32)
        self._with_offsets = encoding if offsets else None
        self._added = None if offsets else added_token_spans(template, text, self.ids)

    def boundary(self, character: int) -> int | None:
        """Return how many tokens end at or before a character position, None where a token crosses it.

        Beyond the encoded part of a cut text, the number of all tokens.
        """
        if character >= len(self.text):
            return len(self.ids)
        for start, stop, token in self._added or ():
            if character in (start, stop):
                return token + (character == stop)
        token = self._offsets.char_to_token(character)
        while token is None and character < len(self.text) - 1:  # a space that belongs to no token's range
            character += 1
            token = self._offsets.char_to_token(character)
        if token is None:
            return len(self.ids)
        while token and self._offsets.token_to_chars(token - 1) == self._offsets.token_to_chars(token):
            token -= 1  # the first of the tokens that share one character
        began, _ = self._offsets.token_to_chars(token)
        return token if began == character else None

    def prompt_boundary(self, character: int) -> int | None:
        """Return how many tokens the first `character` characters have, None if encoded on their own they differ.

        Only what follows the last added token among them can differ.
        """
        if self.cut and character >= len(self.text):
            return self.boundary(character)
        if self._added is not None:
            before = [(start, token) for start, stop, token in self._added if stop <= character]
            began, start = before[-1] if before else (0, 0)
            alone = _encode_alone(self.template, self.text[began:character])
            stop = start + len(alone)
            if self.ids[start:stop].tolist() == alone and self.template.unknown_id not in alone:
                return stop  # equal tokens mean equal text, except for the unknown token
        stop = self.boundary(character)
        if stop is None:
            return None
        start = max(np.flatnonzero(self.template.is_added[self.ids[:stop]]), default=-1)
        began = self._offsets.token_to_chars(start)[0] if start >= 0 else 0
        alone = _encode_alone(self.template, self.text[began:character])
        return stop if alone == self.ids[max(start, 0) : stop].tolist() else None

    @property
    def _offsets(self):
        """The encoding with character offsets, computed on first use."""
        if self._with_offsets is None:
            self._with_offsets = self.template.backend.encode(self.text, add_special_tokens=False)
            self.template.needs_offsets = True
        return self._with_offsets


def added_token_spans(template: ChatTemplate, text: str, ids: np.ndarray) -> list[tuple[int, int, int]] | None:
    """Return the added tokens of a text as (first character, the one after the last, index into ids).

    None where the text does not show it: some take the white space around them, or match text that only looks alike.
    """
    if not template.added_tokens_are_plain:
        return None
    at = np.flatnonzero(template.is_added[ids]).tolist()
    present = [template.added[i] for i in ids[at].tolist()]
    found = [*template.matcher(frozenset(present)).finditer(text)] if present else []
    if [match[0] for match in found] != present:
        return None
    return [(*match.span(), token) for match, token in zip(found, at, strict=True)]


def encode_texts(template: ChatTemplate, texts: list[str], max_length: int) -> list[EncodedText]:
    """Encode the texts in one batch, each only as far as needed for `max_length` tokens."""
    limit = CHARACTERS_A_TOKEN * max_length + 1024
    offsets, template.needs_offsets = template.needs_offsets, False  # if the previous batch needed them
    encode = template.backend.encode_batch if offsets else template.backend.encode_batch_fast
    encodings = encode([text[:limit] for text in texts], add_special_tokens=False)
    return [
        EncodedText(template, text, encoding, cut=False, offsets=offsets)
        if len(text) <= limit
        else _encode_long(template, text, limit, len(encoding.ids), max_length)
        for text, encoding in zip(texts, encodings, strict=True)
    ]


def _encode_long(template: ChatTemplate, text: str, limit: int, count: int, max_length: int) -> EncodedText:
    """Encode more of a text until there are enough tokens, without the last ones before the cut, which may be wrong.

    count: how many tokens its first `limit` characters have.
    """
    while count < max_length + 64 and limit < len(text):
        limit *= 4
        count = len(template.backend.encode_batch_fast([text[:limit]], add_special_tokens=False)[0].ids)
    encoding = template.backend.encode(text[:limit], add_special_tokens=False)
    return EncodedText(template, text[:limit], encoding, cut=limit < len(text), offsets=True)


def encode_separately(
    template: ChatTemplate, prompt: str, reply: str, max_length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids of a prompt and of its reply, for texts that together have a token across their boundary.

    The reply is encoded after an added token, since a tokenizer may put a space before the first word of a text.
    """
    prompt_ids = encode_texts(template, [prompt], max_length)[0].ids
    last = template.added_token_pattern.findall(prompt)[-1:]
    return prompt_ids, encode_texts(template, ["".join(last) + reply], max_length)[0].ids[len(last) :]


def _encode_alone(template: ChatTemplate, text: str) -> list[int]:
    """Return the ids of a text on its own; cached, since prompts have few different endings."""
    known = template.cached_ids
    if text not in known:
        if len(known) > 4096:
            known.clear()
        known[text] = template.backend.encode(text, add_special_tokens=False).ids
    return known[text]
