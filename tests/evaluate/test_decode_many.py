"""Several texts decoded at once, each in a row of one memory, are what each is alone."""

import pytest
import torch
from decode_cases import DRAFTED, PROMPT, make_draft
from tiny import config, random_model
from transformers import Gemma4TextConfig, MistralConfig
from verify_steps import StepRecorder, diverged

from pipeline.errors import ProofError, UsageError
from pipeline.evaluation.decode import SamplingOptions, decode_many, speculative_decode
from pipeline.target import kv_cache as memory
from stages.evaluate.lossless import LosslessCheck, plain_decode

PROMPTS = [PROMPT, PROMPT[:1], PROMPT * 9, [7, *PROMPT], [9, 8], PROMPT * 3, [200, 201, 202]]
MIXED = {"use_sliding_window": True, "sliding_window": 6, "layer_types": ["full_attention", "sliding_attention"] * 3}
TARGETS = {
    "full": lambda: config(),
    "mixed": lambda: config(**MIXED),
    "sliding": lambda: config(**MIXED | {"layer_types": ["sliding_attention"] * 6}),
    "sliding without kinds": lambda: MistralConfig(
        **{name: getattr(config(), name) for name in ("vocab_size", "hidden_size", "intermediate_size", "head_dim")},
        **{name: getattr(config(), name) for name in ("num_attention_heads", "num_key_value_heads")},
        num_hidden_layers=6,
        sliding_window=6,
    ),
    "shared keys": lambda: Gemma4TextConfig(
        **{name: getattr(config(), name) for name in ("vocab_size", "hidden_size", "intermediate_size", "head_dim")},
        **{name: getattr(config(), name) for name in ("num_attention_heads", "num_key_value_heads")},
        num_hidden_layers=6,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention"] * 3,
        num_kv_shared_layers=2,  # the draft reads the first of these
        vocab_size_per_layer_input=264,
        hidden_size_per_layer_input=8,
        global_head_dim=32,
    ),
}


@pytest.fixture(scope="module")
def target():
    return random_model(config())


@pytest.fixture
def recorder(monkeypatch):
    return StepRecorder(monkeypatch)


def facts(reply):
    return reply.ids, reply.lengths, reply.matched, reply.proposed


def together(target, draft, new, stops=(), **options):
    found = [None] * len(PROMPTS)
    for index, reply in decode_many(target, draft, PROMPTS, new, stops, **options):
        assert found[index] is None, f"prompt {index} came twice"
        found[index] = facts(reply)
    return found


def together_as_alone(recorder, target, draft, new, stops=(), like=None, **options):
    """Decode all prompts at once, compare with each alone (of target `like`), and return what came of all at once."""
    found = together(target, draft, new, stops, **options)
    at_once, options = recorder.take(), options | {"batch": 1}
    alone = [facts(speculative_decode(like or target, draft, ids, new, stops, **options)) for ids in PROMPTS]
    by_rounding = {prompt for prompt, _ in diverged(at_once, recorder.take())}
    for prompt, one, other in zip(PROMPTS, found, alone, strict=True):
        assert one == other or tuple(prompt) in by_rounding
    return found


@pytest.mark.parametrize(
    "sampling",
    [None, SamplingOptions(1.0, 1.0, 3), SamplingOptions(0.8, 0.0, 4)],
    ids=["greedy", "drawn", "one-hot"],
)
@pytest.mark.parametrize(("method", "options"), DRAFTED)
def test_texts_decoded_at_once_are_what_each_is_alone(recorder, target, method, options, sampling):
    together_as_alone(recorder, target, make_draft(target, method, **options), 20, batch=3, sampling=sampling)


@pytest.mark.parametrize("batch", [2, 5, 7, 50])
def test_they_end_at_their_own_stops_and_limits(recorder, target, batch):
    draft = make_draft(target)
    stops = {plain_decode(target, ids, 9).ids[at] for ids, at in zip(PROMPTS[:3], (0, 4, 8), strict=True)}

    found = together_as_alone(recorder, target, draft, 12, stops, batch=batch)

    assert len({len(ids) for ids, *_ in found}) > 2, "all ended at one place: nothing was shown"


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.99])
def test_blocks_cut_to_different_lengths_are_verified_in_one_forward(recorder, target, threshold):
    draft = make_draft(
        target, "dspark", shift_label=True, markov_rank=8, markov_head_type="rnn", enable_confidence_head=True,
        confidence_head_with_markov=True, alpha_confidence=1.0,
    )  # fmt: skip
    for weight in (draft.confidence_head.proj.weight, draft.markov_head.markov_w1.weight):
        weight.data *= 50  # sure of some tokens, not of others

    found = together_as_alone(recorder, target, draft, 16, batch=4, threshold=threshold)

    if threshold == 0.5:
        assert len({count for *_, proposed in found for count in proposed}) > 2


@pytest.mark.parametrize("kind", TARGETS)
def test_every_kind_of_layer_sees_what_it_sees_alone(recorder, kind):
    target = random_model(TARGETS[kind]())
    draft = make_draft(target)
    together_as_alone(recorder, target, draft, 24, batch=4)
    prove(target, draft, batch=4)


def test_eager_attention_takes_the_same_masks(recorder, target):
    eager = random_model(config(attn_implementation="eager"))
    assert eager.config._attn_implementation == "eager"
    together_as_alone(recorder, eager, make_draft(eager), 16, batch=3, like=target)


def test_a_kernel_or_layers_without_such_masks_are_refused(target, monkeypatch):
    draft = make_draft(target)
    with monkeypatch.context() as patched:
        patched.setattr(target.config, "layer_types", ["chunked_attention"] * 6)
        with pytest.raises(UsageError, match=r"has chunked_attention layers, .*; leave --batch out"):
            together(target, draft, 4, batch=2)
    monkeypatch.setattr(target.config, "_attn_implementation_internal", "flash_attention_2")
    with pytest.raises(UsageError, match=r"attends by 'flash_attention_2', .*; leave --batch out"):
        together(target, draft, 4, batch=2)


def prove(target, draft, batch=3):
    """Check all prompts decoded at once; the first ends first, so that another's row has to take its place."""
    check, stops = (
        LosslessCheck(target, draft.config.proposals + 1, batch),
        {plain_decode(target, PROMPTS[0], 24).ids[3]},
    )
    for index, fast in decode_many(target, draft, PROMPTS, 24, stops, batch=batch):
        check.compare(f"prompt {index}", PROMPTS[index], fast, plain_decode(target, PROMPTS[index], 24, stops))


def keep_one_too_few(monkeypatch):
    crop = memory.BatchedKV.crop
    monkeypatch.setattr(memory.BatchedKV, "crop", lambda self, counts: crop(self, [count - 1 for count in counts]))


def leave_a_row_where_it_was(monkeypatch):
    def remove(self, text):
        self.lengths[text] = self.lengths[-1]
        self.lengths.pop()

    monkeypatch.setattr(memory.BatchedKV, "remove", remove)


def show_what_comes_later(monkeypatch):
    masks = memory.BatchedKV._masks
    monkeypatch.setattr(memory.BatchedKV, "_masks", lambda self: torch.zeros_like(masks(self)))


broken_memories = pytest.mark.parametrize("broken", [keep_one_too_few, leave_a_row_where_it_was, show_what_comes_later])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@broken_memories
def test_a_broken_memory_is_caught_and_a_sound_one_differs_by_near_ties_only(monkeypatch, broken, dtype):
    target = random_model(config()).to(dtype)
    draft = make_draft(target).to(dtype)
    prove(target, draft)  # raises for anything but near ties
    broken(monkeypatch)
    with pytest.raises(ProofError, match="is not the target's"):
        prove(target, draft)


@pytest.mark.parametrize("sampling", [None, SamplingOptions(1.0, 1.0, 3)], ids=["greedy", "drawn"])
@broken_memories
def test_rounding_is_no_excuse_for_a_broken_memory(recorder, target, monkeypatch, broken, sampling):
    stops = {plain_decode(target, PROMPTS[0], 24).ids[3]}
    broken(monkeypatch)
    with pytest.raises(AssertionError, match="rounding is at most"):
        together_as_alone(recorder, target, make_draft(target), 20, stops, batch=3, sampling=sampling)


def test_a_difference_is_measured_over_as_many_copies_as_were_decoded(target, monkeypatch):
    prefix = [*PROMPT, *plain_decode(target, PROMPT, 12).ids]
    forward, shapes = type(target).forward, []

    def seen(self, input_ids, **options):
        output = forward(self, input_ids, **options)
        shapes.append((*input_ids.shape, output.logits.shape[1]))
        return output

    monkeypatch.setattr(type(target), "forward", seen)
    check = LosslessCheck(target, 5, 3)
    exact_V = check.float32_logits(prefix)
    shapes.clear()

    difference = check.difference(prefix, len(PROMPT), [4, 2, 6], exact_V)

    assert shapes[:4] == [(1, 5, 1), (3, 5, 5), (3, 5, 5), (3, 6, 6)]
    assert set(shapes[5:]) == {(1, 1, 1)} and 0 < difference < 1e-4


def test_a_target_that_is_told_no_positions_is_refused():
    from transformers import BloomConfig, FalconConfig

    sizes = {"vocab_size": 264, "hidden_size": 32, "num_attention_heads": 4}
    for shape in (BloomConfig(n_layer=6, **sizes), FalconConfig(num_hidden_layers=6, alibi=True, **sizes)):
        with pytest.raises(UsageError, match=r"is not told positions, .*; leave --batch out"):
            memory.check_batchable(random_model(shape))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_they_differ_by_near_ties_only():
    for kind in (torch.float32, torch.bfloat16):
        target = random_model(config(**MIXED)).to("cuda", kind)
        prove(target, make_draft(target).to("cuda", kind))
