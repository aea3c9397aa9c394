"""The probe: captures broken by hand, each caught before anything is kept.

On a target whose norm weights are not 1, with as many tokens as it is wide, so that a transposed head has a shape.
"""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import config, random_model
from transformers import Gemma2Config

from pipeline.cache.columns import ColumnSpec, stored_rows
from pipeline.cache.plan_writer import write_segment
from pipeline.cache.samples import PlannedSample
from pipeline.errors import ProofError
from pipeline.target.model import decoder_layers, final_norm, head_of, run_decoder, tap_layers
from pipeline.target.probe import BOUNDS, ROWS, WIDEST, ReferenceTarget, prefix_length, probe, probe_samples
from pipeline.tensors import as_stored
from stages.cache_hidden.engine import HfEngine
from stages.cache_hidden.pack import Packer

SQUARE = config(vocab_size=32, hidden_size=32, num_hidden_layers=5, pad_token_id=0, eos_token_id=1)
LAYERS = (-1, 1, 3)


def samples(lengths: list[int], prompt: int, vocab: int = 32) -> list[PlannedSample]:
    rng = np.random.default_rng(0)
    ids = [rng.integers(2, vocab, length).astype(np.int32) for length in lengths]
    masks = [np.arange(length) >= prompt for length in lengths]
    return [PlannedSample(*pair) for pair in zip(ids, masks, strict=True)]


class Stored:
    """What a right capture of one shard of a target would have stored, and the probe on it."""

    def __init__(self, model, folder, lengths=(40, 30, 24), prompt=9, dtype="float32", layers=LAYERS):
        self.model = model
        self.head = head_of(model)
        everything = write_segment(folder, samples(list(lengths), prompt), row_bytes=1, sources=[])
        self.shard = everything.shards[0]
        width = model.config.hidden_size
        self.columns = [ColumnSpec(f"aux.{layer}", dtype, width) for layer in layers]
        self.columns.append(ColumnSpec("final", dtype, width, keeps="needed"))
        self.states = {}
        for row in range(len(self.shard)):
            ids = torch.from_numpy(self.shard.ids(row).astype(np.int64))[None]
            every = range(-1, len(decoder_layers(model)))
            with torch.no_grad(), tap_layers(model, every) as taken:
                last = run_decoder(model, ids).last_hidden_state[0]
            self.states[row] = {f"aux.{layer}": taken[layer][0] for layer in every} | {"final": last}

    def read(self, column: str, row: int) -> np.ndarray:
        spec = next(spec for spec in self.columns if spec.name == column)
        return as_stored(self.states[row][column][stored_rows(self.shard, row, spec.keeps)])

    def probe(self) -> dict:
        return probe(ReferenceTarget(self.model), self.head, self.shard, self.columns, set(), self.read)

    def change(self, column: str, how) -> None:
        """Replace a column's states in every sample by what `how(states of that sample)` gives."""
        for row in self.states:
            self.states[row] = {**self.states[row], column: how(self.states[row])}


@pytest.fixture
def stored(tmp_path):
    return Stored(random_model(SQUARE), tmp_path)


def test_a_right_capture_passes_and_says_how_well(stored):
    facts = stored.probe()
    assert set(facts) == {"aux.-1", "aux.1", "aux.3", "final"}
    assert all(found["error"] < 1e-6 and len(found["samples"]) >= 1 for found in facts.values())


@pytest.mark.parametrize("layer", [1, 3])
@pytest.mark.parametrize("shift", [-1, 1])
def test_a_layer_off_by_one_is_caught_and_named(stored, layer, shift):
    stored.change(f"aux.{layer}", lambda states: states[f"aux.{layer + shift}"])
    # The raw last layer is no entry of `hidden_states`, so what is stored then resembles none.
    better = "no other layer fits" if layer + shift == 4 else f"layer {layer + shift} fits better"
    with pytest.raises(ProofError, match=rf"stored as layer {layer} .*{better}"):
        stored.probe()


def test_a_neighbour_within_the_bound_is_still_not_the_layer(tmp_path):
    """Layers that hardly change the stream: the neighbour is within the bound, but nearer to another entry."""
    model = random_model(SQUARE)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                weight.mul_(1e-6)
    stored = Stored(model, tmp_path)
    stored.probe()
    stored.change("aux.1", lambda states: states["aux.2"])
    with pytest.raises(ProofError, match="layer 2 fits better"):
        stored.probe()


def test_a_missing_norm_is_caught(stored):
    stored.change("final", lambda states: states["aux.4"])
    with pytest.raises(ProofError, match=r"`final` .*the last norm is missing"):
        stored.probe()


def test_a_norm_applied_twice_is_caught(stored):
    norm = final_norm(stored.model)
    stored.change("final", lambda states: norm(states["final"]))
    with pytest.raises(ProofError, match=r"`final` .*the last norm is applied twice"):
        stored.probe()


def test_a_norm_on_a_layer_is_caught(stored):
    norm = final_norm(stored.model)
    stored.change("aux.3", lambda states: norm(states["aux.3"]))
    with pytest.raises(ProofError, match="stored as layer 3"):
        stored.probe()


@pytest.mark.parametrize(
    "broken",
    [
        lambda head: head.T.contiguous(),
        lambda head: head.roll(1, 0),
        lambda head: head * 1.01,
        lambda head: head[:, torch.randperm(32, generator=torch.Generator().manual_seed(0))],
    ],
    ids=["transposed", "permuted", "scaled", "columns permuted"],
)
def test_a_wrong_head_is_caught(stored, broken):
    stored.head = replace(stored.head, head_VD=broken(stored.head.head_VD))
    with pytest.raises(ProofError, match=r"LM head .*transposed, permuted, scaled or capped"):
        stored.probe()


def test_a_missing_soft_cap_or_embedding_scale_is_caught(tmp_path):
    shape = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 5, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "final_logit_softcapping": 3.0}
    stored = Stored(random_model(Gemma2Config(**shape, **heads, pad_token_id=0)), tmp_path)
    stored.probe()
    right = stored.head
    stored.head = replace(right, logit_softcap=None)
    with pytest.raises(ProofError, match="capped otherwise"):
        stored.probe()
    stored.head = replace(right, embed_scale=1.0)
    with pytest.raises(ProofError, match=r"embedding .*5\.657 times it would fit"):
        stored.probe()


def test_a_target_that_sees_what_follows_is_caught(tmp_path):
    """No padded batch and no draft can do with states that depend on later tokens."""
    model = random_model(SQUARE)
    for module in model.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = False
    with pytest.raises(ProofError, match="no other layer fits"):
        Stored(model, tmp_path).probe()


def test_rows_in_another_order_are_caught(stored):
    stored.change("aux.1", lambda states: states["aux.1"].flip(0))
    with pytest.raises(ProofError, match="no other layer fits"):
        stored.probe()


def test_bfloat16_passes_within_its_bound_and_no_further(tmp_path):
    stored = Stored(random_model(SQUARE).to(torch.bfloat16), tmp_path, dtype="bfloat16")
    assert max(found["error"] for found in stored.probe().values()) < 1e-2
    stored.change("final", lambda states: states["final"] * 1.05)
    with pytest.raises(ProofError, match="at most 2e-02"):
        stored.probe()


DEEP = config(
    vocab_size=64, hidden_size=64, intermediate_size=192, num_hidden_layers=36, pad_token_id=0, eos_token_id=1
)


@pytest.fixture(scope="module")
def deep_capture(tmp_path_factory):
    """A right capture of 36 layers in bfloat16, by another attention kernel: noisier than the usual bound."""
    model = random_model(DEEP).to(torch.bfloat16)
    model.set_attn_implementation("eager")
    shape = {"lengths": (140, 130), "dtype": "bfloat16", "layers": (1, 17, 33)}
    stored = Stored(model, tmp_path_factory.mktemp("deep"), **shape)
    model.set_attn_implementation("sdpa")
    return stored


@pytest.fixture
def deep(deep_capture):
    stored = copy.copy(deep_capture)
    stored.states = dict(deep_capture.states)
    return stored


def test_a_right_capture_of_a_deep_target_is_noisier_than_the_usual_bound_and_passes(deep):
    facts = deep.probe()
    assert max(found["error"] for found in facts.values()) > BOUNDS[torch.bfloat16]
    assert max(found["error"] for found in facts.values()) < WIDEST
    assert deep.model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("layer", [1, 17, 33])
@pytest.mark.parametrize("shift", [-1, 1])
def test_a_layer_off_by_one_of_a_deep_target_is_caught(deep, layer, shift):
    deep.change(f"aux.{layer}", lambda states: states[f"aux.{layer + shift}"])
    with pytest.raises(ProofError, match=rf"stored as layer {layer} .*layer {layer + shift} fits better"):
        deep.probe()


@pytest.mark.parametrize(
    ("column", "how"),
    [
        ("final", lambda deep, states: states["aux.35"]),
        ("final", lambda deep, states: final_norm(deep.model)(states["final"])),
        ("final", lambda deep, states: states["final"] * 1.05),
        ("final", lambda deep, states: states["final"].roll(1, 0)),
        ("aux.33", lambda deep, states: final_norm(deep.model)(states["aux.33"])),
        ("aux.17", lambda deep, states: states["aux.17"] * 0.95),
        ("aux.17", lambda deep, states: states["aux.17"].flip(0)),
        (
            "aux.17",
            lambda deep, states: torch.cat([states["aux.17"][:99], states["aux.17"][:1], states["aux.17"][100:]]),
        ),
    ],
    ids=["no norm", "two norms", "scaled", "shifted", "layer normed", "layer scaled", "reversed", "a stale row"],
)
def test_a_broken_capture_of_a_deep_target_is_caught(deep, column, how):
    with torch.no_grad():
        deep.change(column, lambda states: how(deep, states))
    with pytest.raises(ProofError, match="probe: what is stored as"):
        deep.probe()


def test_a_wrong_head_of_a_deep_target_is_caught_whatever_its_noise(deep):
    for broken in (deep.head.head_VD.roll(1, 0), deep.head.head_VD * 1.03, deep.head.head_VD.T.contiguous()):
        with pytest.raises(ProofError, match="LM head"):
            probe(
                ReferenceTarget(deep.model),
                replace(deep.head, head_VD=broken),
                deep.shard,
                deep.columns,
                set(),
                deep.read,
            )


def round_by_the_largest(module, args):
    """Round a linear layer's inputs to steps of the largest in the whole batch, as per-tensor scales do; finer."""
    step = args[0].abs().max() / 2047
    return ((args[0] / step).round() * step, *args[1:])


def rounding_target(seed: int = 0):
    """A target whose layers quantise activations: in float32 its states depend on what else is in the batch."""
    model = random_model(SQUARE, seed)
    for layer in decoder_layers(model):
        for module in layer.modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_pre_hook(round_by_the_largest)
    return model


def captured_in_batches(model, folder) -> Stored:
    """What a capture stores that computes every sample beside another one."""
    stored = Stored(model, folder)
    every = range(-1, len(decoder_layers(model)))
    for row in stored.states:
        ids_T = torch.from_numpy(stored.shard.ids(row).astype(np.int64))
        with torch.no_grad(), tap_layers(model, every) as taken:
            last = run_decoder(model, torch.stack([ids_T, ids_T.roll(7)])).last_hidden_state[0]
        stored.states[row] = {f"aux.{layer}": taken[layer][0] for layer in every} | {"final": last}
    return stored


@pytest.mark.parametrize("seed", range(4))
def test_a_target_that_quantises_activations_is_bounded_by_its_own_noise(tmp_path, seed):
    errors = [found["error"] for found in captured_in_batches(rounding_target(seed), tmp_path).probe().values()]
    assert BOUNDS[torch.float32] < max(errors) < BOUNDS[torch.bfloat16]


@pytest.mark.parametrize(
    ("column", "how", "found"),
    [
        ("aux.3", lambda states: states["aux.2"], "layer 2 fits better"),
        ("aux.1", lambda states: states["aux.1"] * 1.1, "no other layer fits"),
        ("final", lambda states: states["aux.4"], "the last norm is missing"),
        ("final", lambda states: states["final"] * 1.1, "neither a missing nor a doubled norm"),
    ],
)
def test_a_broken_capture_of_such_a_target_is_caught(tmp_path, column, how, found):
    stored = captured_in_batches(rounding_target(), tmp_path)
    stored.change(column, how)
    with pytest.raises(ProofError, match=found):
        stored.probe()


def test_prefixes_are_short_but_never_without_final_rows(tmp_path):
    model = random_model(SQUARE)
    long_prompts = Stored(model, tmp_path, lengths=(200, 190), prompt=150)
    (row, *_) = probe_samples(long_prompts.shard, set())
    assert prefix_length(long_prompts.shard, row) == 166
    assert stored_rows(long_prompts.shard, row, "needed")[0] == 149 < 166
    assert long_prompts.probe()["final"]["error"] > 0
    short_prompts = Stored(model, tmp_path / "short", lengths=(200, 190), prompt=9)
    assert prefix_length(short_prompts.shard, 0) == ROWS


def test_refused_samples_are_not_probed(stored):
    assert probe_samples(stored.shard, set(range(len(stored.shard)))) == []
    assert 0 not in probe_samples(stored.shard, {0})


def test_the_engine_stores_what_an_ordinary_forward_gives(tmp_path):
    stored = Stored(random_model(SQUARE), tmp_path)
    packer = Packer(HfEngine(stored.model), stored.shard, stored.columns, stored.head, on_policy_share=1.0)
    (packed,) = packer.pack(range(len(stored.shard)))
    for spec in stored.columns:
        alone = np.concatenate([stored.read(spec.name, row) for row in packed.samples])
        np.testing.assert_allclose(packer.as_written(packed, spec), alone, rtol=1e-4, atol=1e-5)
