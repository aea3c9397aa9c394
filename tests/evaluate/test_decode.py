"""Speculative decoding gives the target's own text, and the proof sees when it does not."""

import math
from dataclasses import replace

import pytest
import torch
from decode_cases import DRAFTED, PROMPT, make_draft
from tiny import config, random_model
from transformers import DynamicCache

from pipeline.drafts import Proposal
from pipeline.errors import ProofError, UsageError
from pipeline.evaluation import decode
from pipeline.evaluation.accept_length import accepted_tokens, cut_at_stop
from pipeline.evaluation.decode import speculative_decode
from stages.evaluate.lossless import LosslessCheck, first_difference, float_step, plain_decode


@pytest.fixture(scope="module")
def target():
    return random_model(config())


class Oracle:
    """A draft that knows the text: every `wrong`-th proposal is off by one, the others are right."""

    def __init__(self, like, text, wrong=4):
        self.config, self.text, self.wrong, self.new_kv = like.config, text, wrong, like.new_kv
        self.features = []

    def propose(self, requests, sampling, threshold):
        return [self.guess(request) for request in requests]

    def guess(self, request):
        self.features.append(request.features_KTD)
        right = [*self.text[request.start + 1 :], *[0] * self.config.proposals][: self.config.proposals]
        wrong = [token + (not (request.start + at) % self.wrong) for at, token in enumerate(right)]
        return Proposal(torch.tensor(wrong), None)


@pytest.fixture(scope="module")
def text(target):
    """What the target says, beyond any doubt of rounding."""
    whole = [*PROMPT, *plain_decode(target, PROMPT, 60).ids]
    best = target(torch.tensor([whole])).logits[0, len(PROMPT) - 1 : -1].topk(2)
    assert best.indices[:, 0].tolist() == whole[len(PROMPT) :]
    assert best.values.diff(dim=-1).abs().min() > 1e-3
    return whole


@pytest.mark.parametrize(("method", "options"), DRAFTED)
@pytest.mark.parametrize(("prompt", "new"), [(PROMPT, 20), (PROMPT[:1], 9), (PROMPT, 1), (PROMPT * 9, 5)])
def test_every_draft_gives_the_target_s_own_text_at_any_length(target, method, options, prompt, new):
    fast = speculative_decode(target, make_draft(target, method, **options), prompt, new)

    LosslessCheck(target, 5).compare(
        "a prompt", prompt, fast, plain_decode(target, prompt, new)
    )  # raises but for near ties
    assert len(fast.ids) == new
    assert sum(fast.lengths) >= new  # the prefill's token, then verifications until start reaches the limit
    assert sum(fast.lengths[:-1]) < new
    assert fast.lengths == [kept + 1 for kept in fast.matched]


@pytest.mark.parametrize("wrong", [2, 3, 5, 1000])
def test_right_guesses_are_all_kept_and_only_they(target, text, wrong):
    oracle = Oracle(make_draft(target), text, wrong)

    fast = speculative_decode(target, oracle, PROMPT, 30)

    at, expected = len(PROMPT), []
    while at < len(PROMPT) + 30:
        right = next((k for k in range(4) if not (at + k) % wrong), 4)
        expected.append(right + 1)
        at += right + 1
    assert fast.lengths == expected
    assert fast.ids == text[len(PROMPT) : len(PROMPT) + 30]


def test_the_draft_reads_the_states_of_verified_positions_only(target, text):
    oracle = Oracle(make_draft(target), text, wrong=3)

    fast = speculative_decode(target, oracle, PROMPT, 24)

    seen_KTD = torch.cat(oracle.features, dim=1)
    upto = seen_KTD.shape[1]
    hidden = target(torch.tensor([text[:upto]]), output_hidden_states=True).hidden_states
    wanted_KTD = torch.cat([hidden[layer + 1] for layer in (1, 3, 4)])
    assert upto == len(PROMPT) + sum(fast.lengths[:-1])
    torch.testing.assert_close(seen_KTD, wanted_KTD, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("proposals", [1, 2, 3])
def test_fewer_proposals_may_be_verified(target, text, proposals):
    fast = speculative_decode(target, Oracle(make_draft(target), text, 1000), PROMPT, 12, proposals=proposals)

    assert set(fast.lengths) == {proposals + 1}
    assert fast.ids == text[len(PROMPT) : len(PROMPT) + 12]


@pytest.mark.parametrize("stop_at", range(8))
def test_a_stop_token_ends_the_reply_wherever_it_falls(target, text, stop_at):
    reply = text[len(PROMPT) :]
    stop = reply[stop_at]
    first = reply.index(stop)

    fast = speculative_decode(target, Oracle(make_draft(target), text, 1000), PROMPT, 40, {stop})

    assert fast.ids == reply[: first + 1]
    assert fast.ids == plain_decode(target, PROMPT, 40, {stop}).ids
    assert sum(fast.lengths) == first  # the prefill gave the first token; nothing is counted after the stop
    assert all(length <= 5 for length in fast.lengths)


def test_gains_of_one_verification():
    def gain(proposed, chosen, stops):
        return cut_at_stop(accepted_tokens(proposed, chosen), stops)

    assert gain([5, 6, 7], [5, 6, 9, 1], ()) == (2, 3, False)
    assert gain([5, 6, 7], [5, 6, 7, 8], ()) == (3, 4, False)
    assert gain([5, 6, 7], [4, 6, 7, 8], ()) == (0, 1, False)
    assert gain([], [4], ()) == (0, 1, False)
    assert gain([], [4], {4}) == (0, 1, True)
    assert gain([5, 6, 7], [5, 6, 7, 8], {6}) == (2, 2, True)  # inside: cut there, no token after it
    assert gain([5, 6, 7], [5, 9, 7, 8], {9}) == (1, 2, True)  # the target's own
    assert gain([5, 6, 7], [5, 9, 7, 8], {7, 8}) == (1, 2, False)  # not reached
    assert gain([5, 6], [5, 6, None], {7}) == (2, 3, False)


def test_a_sliding_window_target_is_decoded_past_its_window():
    sliding = random_model(
        config(use_sliding_window=True, sliding_window=6, layer_types=["full_attention", "sliding_attention"] * 3)
    )
    fast, plain = (
        speculative_decode(sliding, make_draft(sliding), PROMPT * 4, 30),
        plain_decode(sliding, PROMPT * 4, 30),
    )
    LosslessCheck(sliding, 5).compare("a prompt", PROMPT * 4, fast, plain)  # raises but for near ties


def test_a_target_with_a_running_state_is_refused(target, monkeypatch):
    draft = make_draft(target)
    monkeypatch.setattr(target.config, "layer_types", ["linear_attention"] * 6)
    with pytest.raises(UsageError, match="linear_attention"):
        speculative_decode(target, draft, PROMPT, 4)


def prove(target, draft, new=24, stops=()):
    fast, plain = (
        speculative_decode(target, draft, PROMPT, new, stops),
        plain_decode(target, PROMPT, new, stops),
    )
    return LosslessCheck(target, draft.config.proposals + 1).compare("prompt 7", PROMPT, fast, plain)


def test_a_kv_cropped_one_row_short_is_caught(target, text, monkeypatch):
    crop = DynamicCache.crop
    monkeypatch.setattr(DynamicCache, "crop", lambda self, rows: crop(self, rows + 1) if rows < -1 else None)
    with pytest.raises(ProofError, match=r"prompt 7: .* token \d+ of the .* token \d+ \(logit .* token \d+ \(log"):
        prove(target, Oracle(make_draft(target), text, 3))


def test_a_proposal_accepted_too_many_is_caught(target, text, monkeypatch):
    def generous(proposal, logits_NV):
        tokens, proposed = decode_keep(proposal, logits_NV), proposal.ids_P.tolist()
        return proposed[: len(tokens)] if len(tokens) <= len(proposed) else tokens

    decode_keep = decode.accept_greedy
    monkeypatch.setattr(decode, "accept_greedy", generous)
    with pytest.raises(ProofError, match="is not the target's"):
        prove(target, Oracle(make_draft(target), text, 3))


def test_a_stop_token_overlooked_is_caught(target, text, monkeypatch):
    stop = text[len(PROMPT) + 7]
    monkeypatch.setattr(decode, "cut_at_stop", lambda tokens, stops: cut_at_stop(tokens, ()))
    with pytest.raises(ProofError, match=r"plain decoding the end"):
        prove(target, Oracle(make_draft(target), text, 1000), stops={stop})


def choose(monkeypatch, instead):
    """Have the target choose other tokens than its likeliest ones."""
    keep = decode.accept_greedy

    def other(proposal, logits_NV):
        for token, chosen in instead.items():
            logits_NV[logits_NV.argmax(-1) == token, chosen] = torch.inf
        return keep(proposal, logits_NV)

    monkeypatch.setattr(decode, "accept_greedy", other)


def with_a_twin(monkeypatch, dtype, weaker):
    """Return a target, its plain reply, a place in it, and a twin of the token there, which decoding now chooses.

    The twin's row of the head is the token's, its entries changed by `weaker`.
    """
    target = random_model(config()).to(dtype)
    plain = plain_decode(target, PROMPT, 24)
    token, twin = plain.ids[5], max(set(range(264)) - set(plain.ids))
    head = target.get_output_embeddings().weight
    head[twin] = weaker(head[token])
    choose(monkeypatch, {token: twin})
    return target, plain, plain.ids.index(token), twin


def move_one_entry(row_D):
    """The least that can be changed."""
    row_D = row_D.clone()
    row_D[0] *= 1 + torch.finfo(row_D.dtype).eps
    return row_D


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_tokens_the_target_cannot_tell_apart_are_a_near_tie(monkeypatch, dtype):
    target, plain, at, twin = with_a_twin(monkeypatch, dtype, move_one_entry)
    fast = speculative_decode(target, make_draft(target).to(dtype), PROMPT, 24)
    if first_difference(fast.ids, plain.ids) < at:  # in bfloat16 there may be others before it
        fast = replace(fast, ids=[*plain.ids[:at], twin], lengths=[1] * at)

    tie = LosslessCheck(target, 5).compare("prompt 7", PROMPT, fast, plain)

    assert tie.tokens == [twin, plain.ids[at]]
    assert tie.position == at
    assert abs(tie.logits[0] - tie.logits[1]) <= 4 * tie.difference < 1e5 * torch.finfo(dtype).eps
    assert target.dtype == dtype  # its layers are widened one by one, and as they were afterwards


def test_what_bfloat16_rounds_away_is_a_near_tie_even_where_block_and_single_forward_agree(monkeypatch):
    target, plain, at, twin = with_a_twin(monkeypatch, torch.bfloat16, move_one_entry)
    fast = replace(plain, ids=[*plain.ids[:at], twin])
    check = LosslessCheck(target, 1)  # blocks of one token: the very same forwards
    prefix = [*PROMPT, *plain.ids[:at]]
    exact_V = check.float32_logits(prefix)
    step = 2**-7 * 2 ** math.floor(math.log2(float(exact_V.abs().max())))

    tie = check.compare("prompt 7", PROMPT, fast, plain)

    assert abs(tie.logits[0] - tie.logits[1]) < step == float_step(exact_V, torch.bfloat16)
    assert step <= tie.difference < 16 * step
    monkeypatch.setattr(check, "_replay", lambda *_: exact_V)  # the very best forwards there can be
    assert check.difference(prefix, len(PROMPT), [1] * at, exact_V) == step


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gap_beyond_rounding_is_no_near_tie(monkeypatch, dtype):
    share = 0.999 if dtype == torch.float32 else 0.8
    target, plain, at, twin = with_a_twin(monkeypatch, dtype, lambda row_D: share * row_D)
    fast = replace(plain, ids=[*plain.ids[:at], twin])
    with pytest.raises(ProofError, match=rf"token {twin} \(logit"):
        LosslessCheck(target, 5).compare("prompt 7", PROMPT, fast, plain)


def test_in_bfloat16_replies_differ_by_near_ties_only():
    target = random_model(config()).to(torch.bfloat16)
    draft, check = make_draft(target).to(torch.bfloat16), LosslessCheck(target, 5)
    for first in range(6):
        prompt = [first, *PROMPT]
        fast, plain = speculative_decode(target, draft, prompt, 24), plain_decode(target, prompt, 24)
        tie = check.compare("prompt", prompt, fast, plain)  # raises for anything else
        assert tie is None or 0 < tie.difference < 0.5
