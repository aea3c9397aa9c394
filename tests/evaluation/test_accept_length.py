"""The accept length without the target is the one that decoding gives."""

import subprocess
import sys
from dataclasses import dataclass, field

import numpy as np
import pytest
from greedy import STOP, make_greedy_cache, make_learned_draft, save_stopping_target

from pipeline.cache import HiddenCache
from pipeline.drafts import DRAFTS
from pipeline.evaluation import accept_length as accept
from pipeline.evaluation.accept_length import (
    accept_spans,
    bootstrap,
    engine_accept_length,
    gains_within,
    known_reply,
    replay_decoding,
    reply_spans,
    summarise,
)
from pipeline.evaluation.decode import speculative_decode
from pipeline.target.head import NEWEST, RULES, ChunkLimit
from pipeline.target.loading import load_target


@pytest.fixture(scope="module")
def target_folder(tmp_path_factory):
    return save_stopping_target(tmp_path_factory.mktemp("target") / "stopping")


@pytest.fixture(scope="module")
def cache(target_folder, tmp_path_factory):
    return HiddenCache.open(make_greedy_cache(target_folder, tmp_path_factory.mktemp("cache") / "greedy"))


def spans_of(draft, cache, indices, threshold=0.0, **limits):
    (spans,) = accept_spans(draft, cache, indices, (threshold,), **limits)
    return spans


@pytest.fixture(scope="module")
def target(target_folder):
    return load_target(str(target_folder))


DRAFTED = [
    ("dflash", {}),
    ("domino", {}),
    ("dspark", {}),
    ("dflash", {"shift_label": True}),
    ("domino", {"shift_label": False}),
]


@pytest.fixture(scope="module", params=DRAFTED, ids=str)
def draft(request, cache):
    method, options = request.param
    return make_learned_draft(cache.path, method, **options)


@pytest.mark.parametrize("max_new", [1, 7, 30])
def test_every_verification_gains_what_decoding_gains(cache, target, draft, max_new):
    spans = spans_of(draft, cache, range(len(cache)), max_new=max_new)

    assert len(spans) == sum(len(reply_spans(cache.tokens_of(index)[1])) for index in range(len(cache)))
    whole = 0
    for span in spans:
        prompt = cache.tokens_of(span.sample)[0][: span.start].tolist()
        fast = speculative_decode(target, draft, prompt, max_new, {STOP})
        known = len(span.lengths)
        assert (span.lengths, span.matched) == (fast.lengths[:known], fast.matched[:known])
        assert span.proposed == fast.proposed[:known]
        assert known == len(fast.lengths) if span.complete else known < len(fast.lengths) or fast.ids[-1] == STOP
        whole += span.complete
    assert whole > len(spans) / 3
    assert whole < len(spans) or max_new < 30
    if max_new > 1:  # the comparison is worth something: blocks were kept whole, cut and refused
        kept = {matched for span in spans for matched in span.matched}
        assert len(kept) >= 3 and {0, draft.config.proposals} <= kept


def test_blocks_cut_by_confidence_gain_what_decoding_with_the_same_cut_gains(cache, target):
    draft = make_learned_draft(cache.path, "dspark")
    uncut = summarise(spans_of(draft, cache, range(len(cache)), max_new=16))
    for threshold in (0.48, 0.55):
        spans = spans_of(draft, cache, range(len(cache)), max_new=16, threshold=threshold)

        for span in spans:
            prompt = cache.tokens_of(span.sample)[0][: span.start].tolist()
            fast = speculative_decode(target, draft, prompt, 16, {STOP}, threshold=threshold)
            known = len(span.lengths)
            assert (span.lengths, span.proposed) == (fast.lengths[:known], fast.proposed[:known])
        assert {0, 1} < {count for span in spans for count in span.proposed}  # also plain steps
        figures = summarise(spans)
        assert figures["verify_rate"] > 1.2 * uncut["verify_rate"]
        assert 1 < figures["accept_len"] < uncut["accept_len"]


def test_several_cuts_of_the_same_blocks_are_what_each_gives_and_computed_once(cache, monkeypatch):
    draft, thresholds, calls = make_learned_draft(cache.path, "dspark"), (0.0, 0.48, 0.55), []
    wanted = [spans_of(draft, cache, range(len(cache)), max_new=16, threshold=cut) for cut in thresholds]
    rollout = draft.rollout
    monkeypatch.setattr(draft, "rollout", lambda *args: calls.append(1) or rollout(*args))
    spans_of(draft, cache, range(len(cache)), max_new=16)
    once = len(calls)

    found = accept_spans(draft, cache, range(len(cache)), thresholds, max_new=16)

    assert found == wanted and wanted[0] != wanted[1] != wanted[2]
    assert len(calls) == 2 * once > 0


def test_a_draft_without_a_confidence_head_is_not_cut(cache):
    from pipeline.errors import UsageError

    with pytest.raises(UsageError, match="without a confidence head cannot cut its blocks"):
        spans_of(make_learned_draft(cache.path, steps=0), cache, [0], threshold=0.5)


def test_cells_and_chunks_change_nothing(cache, draft, monkeypatch):
    wanted = spans_of(draft, cache, range(len(cache)))

    monkeypatch.setattr(accept, "SLOTS_AT_ONCE", 1)
    monkeypatch.setitem(RULES[NEWEST], "cpu", ChunkLimit(1))

    assert spans_of(draft, cache, range(len(cache)), context=1) == wanted
    assert spans_of(draft, cache, [5, 2], context=40) == [
        span for index in (5, 2) for span in wanted if span.sample == index
    ]
    assert spans_of(draft, cache, []) == []


def test_a_reply_is_followed_for_as_long_as_it_is_greedy():
    ids = [1, 2, 10, 11, 12, 13]
    greedy = [0, 10, 11, 12, 13, 14]

    def known(changes, start=2, stop=6, stops=()):
        reply = known_reply(ids, [changes.get(at, token) for at, token in enumerate(greedy)], start, stop, stops)
        return reply.tokens, reply.confirmed

    assert known({}) == ([10, 11, 12, 13, 14], 4)  # the choice after the last row is known too
    assert known({}, stops={13}) == ([10, 11, 12, 13], 4)
    assert known({3: 99}) == ([10, 11, 99], 2)
    assert known({1: 99}) == ([99], 0)  # the very first token is not the target's
    assert known({}, stops={11}) == ([10, 11], 2)


def test_a_replay_ends_where_the_target_s_verdict_is_not_known():
    ids, greedy = [1, 10, 11, 12, 13, 50], [10, 11, 12, 13, 14, -1]
    reply = known_reply(ids, greedy, 1, 5, ())  # 10 11 12 13, then 14 by the target
    assert (reply.tokens, reply.confirmed) == ([10, 11, 12, 13, 14], 4)
    wrong = [0, 0]
    unsure = [[11, 12], wrong, wrong, [14, 7]]
    assert replay_decoding(reply, unsure, (), None) == ([3], [2], [2], False)  # on 7 nobody knows
    assert replay_decoding(reply, unsure, (), 3) == ([3], [2], [2], True)  # and nobody asks
    assert replay_decoding(reply, [[11, 12], wrong, wrong, wrong], (), None) == ([3, 1], [2, 0], [2, 2], False)
    assert replay_decoding(reply, [[11, 9], wrong, [13, 14], wrong], (), None) == (
        [2, 3],
        [1, 2],
        [2, 2],
        False,
    )  # whole: known
    assert replay_decoding(reply, [[11, 12], wrong, wrong, wrong], (), 4) == ([3, 1], [2, 0], [2, 2], True)
    assert replay_decoding(reply, unsure, {14}, None) == ([3, 1], [2, 1], [2, 2], True)
    assert replay_decoding(reply, [], {10}, None) == ([], [], [], True)
    assert replay_decoding(reply, [[11], [], [], []], (), None) == (
        [2, 1, 1],
        [1, 0, 0],
        [1, 0, 0],
        False,
    )  # plain steps


def test_replies_without_a_prompt_are_no_spans():
    assert reply_spans(np.array([1, 1, 0, 1, 0, 0, 1, 1], bool)) == [(3, 4), (6, 8)]
    assert reply_spans(np.array([0, 0], bool)) == []


@dataclass
class FakeSpan:
    domain: str
    lengths: list
    matched: list = field(default_factory=list)
    proposed: list = field(default_factory=list)
    proposals: int = 3


def test_figures_pool_calls_and_say_how_sure_they_are():
    spans = [
        FakeSpan("a", [4, 2], [3, 1], [3, 3]),
        FakeSpan("a", [1], [0], [0]),
        FakeSpan("b", [3], [2], [2]),
        FakeSpan("b", []),
    ]

    figures = summarise(spans)

    assert figures["accept_len"] == 10 / 4
    assert (figures["prompts"], figures["calls"], figures["tokens"]) == (3, 4, 10)
    assert figures["per_slot"] == [3 / 4, 2 / 4, 1 / 4]
    assert (figures["verified"], figures["verify_rate"]) == (8 / 4, 6 / 8)
    assert figures["domains"]["a"]["accept_len"] == 7 / 3
    assert figures["domains"]["b"]["interval"] == [3.0, 3.0]
    low, high = figures["interval"]
    assert 1 <= low < 2.5 < high <= 3
    assert summarise(spans) == figures
    empty = summarise([])
    assert (empty["accept_len"], empty["interval"], empty["per_slot"], empty["domains"]) == (0.0, [0.0, 0.0], [], {})


def test_the_interval_covers_the_truth_about_95_times_in_100():
    rng, hits = np.random.default_rng(0), 0
    for trial in range(200):
        calls_n = rng.integers(1, 20, 60)
        tokens_n = np.array([rng.geometric(1 / 3, size=count).sum() for count in calls_n])
        low, high = bootstrap(tokens_n.astype(float), calls_n.astype(float), trial)
        hits += low <= 3 <= high
    assert 180 <= hits <= 198


def test_a_cache_without_final_states_says_what_to_do(cache, monkeypatch):
    draft = make_learned_draft(cache.path, steps=0)
    bare = HiddenCache.open(cache.path)
    bare.whole.pop("final")
    from pipeline.errors import UsageError

    with pytest.raises(UsageError, match="--final needed"):
        spans_of(draft, bare, [0])


def test_measuring_needs_no_transformers():
    code = "import sys, pipeline.evaluation.accept_length; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_method_is_measured(cache):
    assert {method for method, _ in DRAFTED} == set(DRAFTS)


def test_the_accept_length_as_an_engine_counts_it_differs_at_the_ends_of_replies():
    """64 tokens at most; the prefill gave one, so that 63 are to be gained."""
    whole = [8] * 7  # 7 are left
    assert gains_within([*whole, 8], 64) == [*whole, 7]
    assert gains_within([*whole, 6, 4], 64) == [*whole, 6, 1]
    assert gains_within([*whole, 7, 4], 64) == [*whole, 7]  # the reply has its 64, and ours makes one more call
    assert gains_within([3, 2], 64) == [3, 2]
    stopped, limited, more = ([3, 2], [2, 7]), ([*whole, 6, 4], [7] * 7 + [5, 3]), ([*whole, 7, 4], [7] * 7 + [6, 3])
    assert engine_accept_length([stopped], 64) == 1 + 9 / 2
    assert engine_accept_length([limited], 64) == 1 + (7 * 7 + 5 + 3) / 9
    assert engine_accept_length([stopped, more], 64) == 1 + (9 + 7 * 7 + 6) / 10
    assert engine_accept_length([([3, 2], [])], 64) is None  # reports of earlier versions
    assert engine_accept_length([([], [])], 64) is None
