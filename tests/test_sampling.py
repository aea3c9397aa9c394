"""Drawn replies are distributed as the target's own: every continuation's exact probability is known here.

A chi-square over all replies of at most four tokens, drawn by the loop that decodes. Seeds are fixed; were they chosen
anew, a right rule would fail each of these tests once in 10,000 times (`ALARM`). Rules that are wrong in the ways
that others were wrong in must fail the very same test.

    V vocabulary   K layers   D hidden size   N rows   P proposals
"""

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import config, random_model
from torch import nn

from pipeline.drafts import DRAFTS, Proposal, draft_config
from pipeline.errors import ProofError, UsageError
from pipeline.evaluation import decode
from pipeline.evaluation.decode import SamplingOptions, prompt_generator, rejection_sample, speculative_decode
from pipeline.target.model import head_of
from pipeline.tensors import draw, uniforms
from stages.evaluate.lossless import check_quantiles, plain_decode, token_quantiles

V, MASK, STOP = 4, 2, 3
PROMPT, NEW, BLOCK = [0, 2, 1], 4, 3
DEEPEST = NEW + BLOCK  # tokens after the prompt that a verification can reach
REPLIES, ALARM = 800, 1e-4
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "vocab_size": V,
}
OPTIONS = {
    "dflash": {"shift_label": False, "block_size": BLOCK + 1},
    "domino": {"shift_label": True, "emb_dim": 8, "gru_hidden_dim": 8, "pure_draft_prefix_len": 1},
    "dspark": {"shift_label": True, "markov_rank": 8, "markov_head_type": "rnn", "confidence_head_with_markov": True},
}


class Tabled(nn.Module):
    """A random Qwen3 whose states are computed once for every text there can be, and then looked up.

    Its kv keeps the tokens themselves, so that rows cropped too many or too few make another text of it.
    """

    def __init__(self):
        super().__init__()
        model = random_model(config(**SIZES, eos_token_id=STOP, pad_token_id=None, bos_token_id=None), seed=8)
        self.config, self.head, self.device = model.config, head_of(model), torch.device("cpu")
        self.layers = nn.ModuleList(Looked() for _ in range(SIZES["num_hidden_layers"]))
        texts = torch.cartesian_prod(*[torch.arange(V)] * DEEPEST)
        whole = torch.cat([torch.tensor(PROMPT).expand(len(texts), -1), texts], dim=1)
        out = [model(part, output_hidden_states=True) for part in whole.split(2048)]
        self.states = [torch.cat([part.hidden_states[layer] for part in out]) for layer in (0, 1)]
        self.logits = torch.cat([part.logits for part in out])

    def get_decoder(self):
        return self

    def place(self, text):
        """The first of the tabled texts that begin like this one."""
        new = text[len(PROMPT) :]
        return sum(token * V ** (DEEPEST - 1 - at) for at, token in enumerate(new))

    def forward(self, input_ids, past_key_values, use_cache, logits_to_keep=0):
        fresh = input_ids.float()[:, None, :, None]
        text = past_key_values.update(fresh, fresh, 0)[0].flatten().long().tolist()
        assert text[: len(PROMPT)] == PROMPT
        place, rows = self.place(text), slice(len(text) - input_ids.shape[1], len(text))
        self.layers[0](*(states[place, rows][None] for states in self.states))
        return SimpleNamespace(logits=self.logits[place, rows][-logits_to_keep:][None])

    def chances(self):
        """The exact probability of every reply at T = 1."""
        found, open_ = {}, {(): 1.0}
        while open_:
            reply, chance = open_.popitem()
            text = [*PROMPT, *reply]
            p_V = self.logits[self.place(text), len(text) - 1].double().softmax(-1)
            for token, p in enumerate(p_V.tolist()):
                longer = (*reply, token)
                (found if token == STOP or len(longer) == NEW else open_)[longer] = chance * p
        return found


class Looked(nn.Module):
    def forward(self, before, after):
        return after


@pytest.fixture(scope="module")
def target():
    return Tabled()


def make_draft(target, method):
    """A draft with random weights large enough that each proposal depends on those before it.

    Its states are computed once for every context.
    """
    fields = {"block_size": BLOCK, "mask_token_id": MASK, "rope_theta": 1e4, "max_position_embeddings": 64}
    fields |= {"num_target_layers": 2, "target_layer_ids": (-1, 0)} | SIZES | OPTIONS[method]
    draft = DRAFTS[method](draft_config(method=method, **fields), target.head).eval()
    generator = torch.Generator().manual_seed(1)
    for name, weight in sorted(draft.named_parameters()):
        spread = 1.0 if "w1" in name or weight.ndim < 2 else 2.0 / weight.shape[-1] ** 0.5
        weight.data.normal_(0, spread, generator=generator)
    compute, known = draft.block_hidden, {}

    def block_hidden(requests):
        (request,) = requests
        new_KND = request.features_KTD
        request.kv.seen_KND = torch.cat([getattr(request.kv, "seen_KND", new_KND[:, :0]), new_KND], dim=1)
        key = request.kv.seen_KND.numpy().tobytes(), request.anchor_id
        if key not in known:
            known[key] = compute([replace(request, features_KTD=request.kv.seen_KND, kv=draft.new_kv())])
        return known[key]

    draft.block_hidden = block_hidden
    return draft


def p_value(target, draft, draft_temperature=1.0, threshold=0.0):
    """The chance that replies drawn from the target differ from what is expected by more than these do."""
    drawn, blocks = Counter(), Counter()
    for seed in range(REPLIES):
        sampling = SamplingOptions(1.0, draft_temperature, seed)
        reply = speculative_decode(target, draft, PROMPT, NEW, {STOP}, sampling=sampling, threshold=threshold)
        drawn[tuple(reply.ids)] += 1
        blocks.update(zip(reply.proposed, reply.matched, strict=True))
    expected = {reply: REPLIES * chance for reply, chance in target.chances().items()}
    assert sum(expected.values()) == pytest.approx(REPLIES) and set(drawn) <= set(expected)
    cells = [(count, drawn[reply]) for reply, count in expected.items() if count >= 5]
    cells.append((REPLIES - sum(count for count, _ in cells), REPLIES - sum(found for _, found in cells)))
    assert len(cells) > 30 and cells[-1][0] >= 5
    chi_square = sum((found - count) ** 2 / count for count, found in cells)
    half = torch.tensor([(len(cells) - 1) / 2, chi_square / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(*half)), blocks


@pytest.mark.parametrize("method", DRAFTS)
def test_what_is_drawn_is_the_target_s_own_whatever_the_draft(target, method):
    chance, blocks = p_value(target, make_draft(target, method))

    assert chance > ALARM
    assert set(blocks) == {(BLOCK, kept) for kept in range(BLOCK + 1)}  # some kept whole, some refused at each slot


def test_a_greedy_draft_is_a_one_hot_one(target):
    chance, blocks = p_value(target, make_draft(target, "domino"), draft_temperature=0.0)

    assert chance > ALARM
    assert len(blocks) == BLOCK + 1


def test_blocks_may_be_cut_by_confidence_and_drawn_at_another_temperature(target):
    chance, blocks = p_value(target, make_draft(target, "dspark"), draft_temperature=0.6, threshold=0.3)

    assert chance > ALARM
    assert {proposed for proposed, _ in blocks} == set(range(BLOCK + 1))  # also none at all: a plain step


def accept_the_likeliest(monkeypatch):
    """Keep what is the target's likeliest token, always; draw from p in place of anything else."""

    def keep(proposal, logits_NV, temperature, generator):
        tokens = decode.accept_greedy(proposal, logits_NV)
        p_NV = (logits_NV.double() / temperature).softmax(-1)
        own = draw(p_NV[len(tokens) - 1][None], uniforms(1, generator))
        return [*tokens[:-1], int(own)]

    monkeypatch.setattr(decode, "rejection_sample", keep)


def leave_the_residual_whole(monkeypatch):
    """Draw what replaces a refused proposal from p."""
    monkeypatch.setattr(decode, "residual", lambda p_V, q_V: p_V)


def take_q_of_the_next_slot(monkeypatch):
    first = decode._first

    def shifted(block, count):
        block = first(block, count)
        return Proposal(block.ids_P, block.q_PV.roll(-1, 0))

    monkeypatch.setattr(decode, "_first", shifted)


def draw_with_the_number_that_refused(monkeypatch):
    """Take a replacement with the very number that refused the proposal, which is no longer uniform."""
    monkeypatch.setattr(decode, "uniforms", lambda count, generator: uniforms(1, generator).expand(count))


def cut_by_what_was_drawn(monkeypatch):
    """Leave proposals out for what they are: that is to refuse them, without a residual."""
    monkeypatch.setattr(
        DRAFTS["dspark"],
        "confident_counts",
        lambda self, h, a, ids_NP, t: (ids_NP < 2).long().cumprod(-1).sum(-1).tolist(),
    )


@pytest.mark.parametrize(
    "broken",
    [
        accept_the_likeliest,
        leave_the_residual_whole,
        take_q_of_the_next_slot,
        draw_with_the_number_that_refused,
        cut_by_what_was_drawn,
    ],
)
def test_a_wrong_rule_is_caught(target, broken, monkeypatch):
    broken(monkeypatch)
    threshold = 0.5 if broken is cut_by_what_was_drawn else 0.0

    chance, _ = p_value(target, make_draft(target, "dspark"), threshold=threshold)

    assert chance < ALARM**2


def test_replies_depend_on_seed_and_prompt_only(target):
    draft = make_draft(target, "dspark")

    def reply(seed):
        return speculative_decode(target, draft, PROMPT, NEW, {STOP}, sampling=SamplingOptions(1.0, 1.0, seed))

    first = [reply(seed) for seed in range(20)]
    torch.manual_seed(1)
    again = [reply(seed) for seed in reversed(range(20))]
    assert [(done.ids, done.lengths) for done in first] == [(done.ids, done.lengths) for done in reversed(again)]
    assert len({tuple(done.ids) for done in first}) > 5
    one, other = (uniforms(3, prompt_generator(0, prompt)) for prompt in ([1, 2], [2, 1]))
    assert not (one == other).any()


def test_near_to_zero_a_temperature_is_greedy_and_zero_is_refused(target):
    draft, greedy = make_draft(target, "domino"), plain_greedy(target)
    cold = speculative_decode(target, draft, PROMPT, NEW, {STOP}, sampling=SamplingOptions(1e-3, 1e-3, 7))
    plain = speculative_decode(target, draft, PROMPT, NEW, {STOP})
    assert cold.ids == plain.ids == greedy
    assert (cold.lengths, cold.matched, cold.proposed) == (plain.lengths, plain.matched, plain.proposed)
    for temperature, of_draft in ((0.0, 0.0), (-1.0, 1.0), (float("nan"), 1.0), (1.0, -0.5), (1e-9, 1.0)):
        with pytest.raises(UsageError, match="0 is for greedy"):
            SamplingOptions(temperature, of_draft)
    with pytest.raises(UsageError, match="add --temperature"):
        SamplingOptions(0.0, 1.0)
    with pytest.raises(UsageError, match="wanted one of 64 bits"):
        SamplingOptions(1.0, 1.0, 2**63)


def plain_greedy(target):
    new = []
    while len(new) < NEW and new[-1:] != [STOP]:
        new.append(int(target.logits[target.place([*PROMPT, *new]), len(PROMPT) + len(new) - 1].argmax()))
    return new


# One verification


def verify(p_NV, ids_P, q_PV, seed=0):
    logits_NV, ids_P = torch.tensor(p_NV, dtype=torch.float64).log(), torch.tensor(ids_P, dtype=torch.long)
    q_PV = None if q_PV is None else torch.tensor(q_PV)
    return rejection_sample(Proposal(ids_P, q_PV), logits_NV, 1.0, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("seed", range(20))
def test_certain_cases(seed):
    p = [[0.25, 0.75, 0.0]] * 3
    assert verify(p, [0, 1], p[:2], seed)[:2] == [0, 1]  # q is p: all are kept
    assert verify(p, [2, 1], [[0.0, 0.0, 1.0]] * 2, seed) in ([0], [1])  # what the target never says is never kept
    assert verify([[0.0, 1.0, 0.0]] * 2, [1], None, seed) == [1, 1]
    assert verify([[0.0, 0.5, 0.5], [1.0, 0.0, 0.0]], [1], None, seed) in ([1, 0], [2])  # never 1 for a refused 1
    assert verify([[0.0, 1.0, 0.0]], [], None, seed) == [1]  # a plain step
    assert verify([[0.5, 0.5, 0.0]] * 2, [0], [[1.0, 0.0, 0.0]], seed) in ([0, 0], [0, 1], [1])


def test_a_residual_of_nothing_is_the_target_s_own():
    p_V = torch.tensor([0.1, 0.9, 0.0], dtype=torch.float64)
    assert decode.residual(p_V, p_V).equal(p_V)
    assert decode.residual(p_V, p_V + 1e-17).equal(p_V)  # rounded away
    assert decode.residual(p_V, torch.tensor([0.1 + 1e-12, 0.9 - 1e-12, 0.0])).argmax() == 1
    assert decode.residual(p_V, torch.tensor([0.2, 0.1, 0.7])).tolist() == [0.0, pytest.approx(0.8), 0.0]


@given(st.lists(st.sampled_from([0.0, 1e-30, 1e-9, 0.3, 1.0, 7.0]), min_size=1, max_size=9), st.integers(0, 2**53 - 1))
def test_no_token_of_weight_zero_is_drawn_and_each_by_its_share(weights, number):
    if not any(weights):
        weights[0] = 1.0
    uniform, passed = number / 2**53, np.cumsum(weights)
    for dtype in (torch.float32, torch.float64):
        token = int(draw(torch.tensor([weights], dtype=dtype), torch.tensor([uniform], dtype=torch.float64)))
        assert weights[token] > 0
        assert passed[token] >= uniform * passed[-1] * (1 - 1e-6)
        assert passed[token] - weights[token] <= uniform * passed[-1] * (1 + 1e-6) + 1e-30


# The proof at a temperature


def test_greedy_text_is_no_drawn_text():
    model = random_model(config())
    prompts = [[104, 105, first] for first in range(8)]

    def judged(ids_of):
        return check_quantiles(
            [place for prompt in prompts for place in token_quantiles(model, prompt, ids_of(prompt), 1.0)]
        )

    def drawn(prompt):
        text, generator = list(prompt), prompt_generator(3, prompt)
        for _ in range(30):
            p_V = model(torch.tensor([text])).logits[0, -1].double().softmax(-1)
            text.append(int(draw(p_V[None], uniforms(1, generator))))
        return text[len(prompt) :]

    found = judged(drawn)
    assert found.tokens == 240
    assert abs(found.spreads) < 4 and abs(found.place - 0.5) < 0.1
    with pytest.raises(ProofError, match=r"the 240 tokens drawn are not .* spreads off 1/2"):
        judged(lambda prompt: plain_decode(model, prompt, 30).ids)


def test_places_by_hand():
    model = random_model(config())
    p_V = model(torch.tensor([[5, 6, 7]])).logits[0, -1].double().div(0.8).softmax(-1)
    likeliest, least = int(p_V.argmax()), int(p_V.argmin())
    assert token_quantiles(model, [5, 6, 7], [likeliest], 0.8) == [pytest.approx(float(p_V.max()) / 2)]
    assert token_quantiles(model, [5, 6, 7], [least], 0.8) == [pytest.approx(1 - float(p_V.min()) / 2)]
    every = [token_quantiles(model, [5, 6, 7], [token], 0.8)[0] for token in range(264)]
    assert float(p_V @ torch.tensor(every, dtype=torch.float64)) == pytest.approx(0.5)
    assert check_quantiles([]).model_dump() == {"tokens": 0, "place": 0.5, "spreads": 0.0}
