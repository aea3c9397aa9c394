"""Targets of every kind, end to end, without a line of code for any: random weights, a few layers, no norm of 1.

Each is planned, captured (which probes it), verified, read back and compared with an ordinary forward of the very model
that was saved; then a draft is shaped from the cache, and decoded with the target or refused for a reason.
"""

import json
from types import SimpleNamespace

import pytest
import torch
from tiny import config, conversations, random_model, save_model, save_target, write_jsonl
from transformers import (
    AutoConfig,
    BartConfig,
    BertConfig,
    Cohere2Config,
    DeepseekV3Config,
    FalconConfig,
    FalconH1Config,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    Glm4Config,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    Lfm2Config,
    Llama4TextConfig,
    LlamaConfig,
    Mistral3Config,
    MixtralConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
    SiglipVisionConfig,
    T5Config,
    Wav2Vec2Config,
)

from pipeline.cache import HiddenCache
from pipeline.cache.verify import verify
from pipeline.drafts import DRAFTS, init_weights
from pipeline.drafts.rope import rope_theta
from pipeline.errors import ProofError, UsageError
from pipeline.evaluation.decode import decode_many, speculative_decode
from pipeline.runs.recipe import load_recipe, resolve
from pipeline.runs.training_data import training_config
from pipeline.target.files import complete_config, max_positions, read_text_config
from pipeline.target.layers import final_rows
from pipeline.target.loading import load_target
from pipeline.target.model import decoder_layers, final_norm, head_of, run_decoder, tap_layers
from stages.cache_hidden.run import plan, run
from stages.cache_hidden.settings import CaptureOptions
from stages.evaluate.lossless import plain_decode

SIZES = {
    "vocab_size": 264,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 256,
    "bos_token_id": None,
    "eos_token_id": 258,
}
WIDE = {**SIZES, "head_dim": 16}  # heads wider than H / heads
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "shared_expert_intermediate_size": 24,
}
MAMBA = {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1}
SEES = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}


def without(sizes: dict, *names: str) -> dict:
    return {key: value for key, value in sizes.items() if key not in names}


TARGETS = {
    "qwen3": config(num_hidden_layers=4),
    "llama, tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "gemma 2, soft-cap and window": Gemma2Config(
        **WIDE, sliding_window=8, query_pre_attn_scalar=16, final_logit_softcapping=3.0, attn_logit_softcapping=5.0
    ),
    "gemma 3": Gemma3TextConfig(**{**WIDE, "num_hidden_layers": 7}, sliding_window=8),
    "gemma 3 that sees": Gemma3Config(
        text_config={**WIDE, "sliding_window": 8}, vision_config=SEES, mm_tokens_per_image=4
    ),
    "mistral 3 that sees": Mistral3Config(
        text_config={**WIDE, "model_type": "mistral", "sliding_window": None},
        vision_config={**SEES, "model_type": "pixtral", "head_dim": 8},
    ),
    "qwen3 with experts": Qwen3MoeConfig(**WIDE, **EXPERTS, num_experts=4, mlp_only_layers=[1]),
    "mixtral": MixtralConfig(**WIDE, num_local_experts=4, num_experts_per_tok=2),
    "gpt-oss, sinks": GptOssConfig(**WIDE, num_local_experts=4, num_experts_per_tok=2, sliding_window=8),
    "deepseek v3": DeepseekV3Config(
        **{**SIZES, "num_key_value_heads": 4},
        **EXPERTS,
        **LATENT,
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
    ),
    "llama 4, chunks": Llama4TextConfig(**WIDE, num_local_experts=4, intermediate_size_mlp=48, attention_chunk_size=16),
    "qwen3-next, linear attention": Qwen3NextConfig(**WIDE, **EXPERTS, **LINEAR, num_experts=4),
    "falcon-h1, mamba beside attention": FalconH1Config(**WIDE, **MAMBA),
    "lfm2, convolutions": Lfm2Config(**SIZES, full_attn_idxs=[1, 3], block_auto_adjust_ff_dim=False),
    "olmo 2, norms behind": Olmo2Config(**SIZES),
    "glm 4, norms on both sides": Glm4Config(**WIDE),
    "phi 3, fused": Phi3Config(**SIZES),
    "falcon, layers that return tuples": FalconConfig(
        **without(SIZES, "intermediate_size", "num_key_value_heads"), alibi=False, new_decoder_architecture=True
    ),
    "gpt-neox, an odd norm": GPTNeoXConfig(**without(SIZES, "num_key_value_heads")),
    "granite, both scales": GraniteConfig(**SIZES, embedding_multiplier=3.0, logits_scaling=8.0),
    "cohere 2, logit scale": Cohere2Config(**SIZES, logit_scale=0.25, sliding_window=8),
}
HYBRIDS = {"qwen3-next, linear attention", "falcon-h1, mamba beside attention", "lfm2, convolutions"}


@pytest.fixture(scope="module", params=TARGETS)
def captured(request, tmp_path_factory):
    """One kind: its name, the model as it was saved, and the cache made from its folder."""
    folder = tmp_path_factory.mktemp("target")
    model = random_model(TARGETS[request.param])
    save_model(folder / "target", model)
    corpus = write_jsonl(folder / "chats.jsonl", conversations(8))
    options = CaptureOptions(layers="-1,0,1,2", max_length=256)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.cache.plan_writer.MIN_SHARDS", 2)  # four samples in each, and so in a batch
        planned = plan(str(folder / "target"), str(corpus), folder / "cache", options=options)
    done = run(str(folder / "target"), str(corpus), folder / "cache", options=options)
    assert planned["samples"] == done.samples == 8 and done.refused == 0
    return SimpleNamespace(name=request.param, model=model, cache=folder / "cache", folder=folder / "target")


def test_what_is_read_back_is_what_an_ordinary_forward_gives(captured):
    """Samples stood in padded batches, the forward has one: so no expert dropped a token, and no state saw padding."""
    assert not verify(captured.cache).damaged
    cache = HiddenCache.open(captured.cache)
    assert cache.layers == (-1, 0, 1, 2) and cache.samples.ok.all()
    assert cache.shards == 2 and len(set(cache.samples.length.tolist())) > 2, "no batch was padded"
    head = cache.head()
    for i in range(len(cache)):
        sample = cache.read(i, final=True)
        with torch.no_grad():
            alone = captured.model(sample.ids[None], output_hidden_states=True)
        for k, layer in enumerate(cache.layers):
            torch.testing.assert_close(sample.aux[k], alone.hidden_states[layer + 1][0], rtol=1e-3, atol=1e-4)
        assert sample.final_rows.tolist() == final_rows(sample.mask.numpy()).nonzero()[0].tolist()
        torch.testing.assert_close(sample.final, alone.hidden_states[-1][0, sample.final_rows], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(
            head.logits(sample.final), alone.logits[0, sample.final_rows].float(), rtol=1e-3, atol=1e-3
        )
        torch.testing.assert_close(head.embed(sample.ids), sample.aux[0], rtol=1e-5, atol=1e-5)


def test_a_missing_or_doubled_norm_would_have_been_noticed(captured):
    """What the comparison above rests on: the last norm is found, and applied again it changes the state."""
    norm, last = final_norm(captured.model), len(decoder_layers(captured.model)) - 1
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad(), tap_layers(captured.model, [last]) as taken:
        final = run_decoder(captured.model, ids).last_hidden_state
        torch.testing.assert_close(norm(taken[last]), final)
        for wrong in (taken[last], norm(final)):
            assert (wrong - final).norm() > 0.1 * final.norm()


def shaped(captured):
    """An untrained draft of the target, its shapes from the cache."""
    cache = HiddenCache.open(captured.cache)
    resolved = resolve(load_recipe(None, ("draft.block_size=4", "draft.num_hidden_layers=1")), cache)
    draft = DRAFTS[resolved.draft.method](resolved.draft, head_of(captured.model))
    init_weights(draft, 0)
    return draft.eval()


def test_a_draft_is_shaped_from_the_cache_and_decodes_or_is_refused_for_a_reason(captured):
    draft, prompt = shaped(captured), [104, 105, 10, 257, 33] * 3
    assert draft.config.num_target_layers == captured.model.config.get_text_config().num_hidden_layers
    if captured.name in HYBRIDS:
        with pytest.raises(UsageError, match=r"layers, whose memory cannot be cropped .*accept length that"):
            speculative_decode(captured.model, draft, prompt, 12)
    else:
        fast = speculative_decode(captured.model, draft, prompt, 12)
        assert fast.ids == plain_decode(captured.model, prompt, 12).ids
        prompts = [prompt, prompt[:4], prompt[3:]]
        together = decode_many(captured.model, draft, prompts, 12, batch=2)
        if "chunks" in captured.name:
            with pytest.raises(UsageError, match=r"has chunked_attention layers, .*leave --batch out"):
                next(together)
        else:
            assert {index: fast.ids for index, fast in together} == {
                index: plain_decode(captured.model, ids, 12).ids for index, ids in enumerate(prompts)
            }


def test_left_padding_would_contaminate_a_running_sum():
    """Why batches are padded behind: what stands before a sample is in the memory that its first token meets."""
    model = random_model(TARGETS["qwen3-next, linear attention"])
    ids, padding = torch.arange(60, 72)[None], torch.zeros(1, 5, dtype=torch.long)
    first = {}
    for name, row in {
        "alone": ids,
        "behind": torch.cat([ids, padding], 1),
        "before": torch.cat([padding, ids], 1),
    }.items():
        with torch.no_grad(), tap_layers(model, [0]) as taken:
            run_decoder(model, row)
        first[name] = taken[0]
    torch.testing.assert_close(first["behind"][:, :12], first["alone"])
    assert (first["before"][:, 5:] - first["alone"]).norm() > 0.01 * first["alone"].norm()


# What cannot be captured says why


@pytest.fixture
def attempt(tmp_path, tiny_corpus):
    """Return a function that saves a target and captures it."""

    def attempted(shape, **options):
        save_target(tmp_path / "target", shape)
        chosen = CaptureOptions(**{"layers": "1", "max_length": 256, "max_samples": 2, **options})
        return run(str(tmp_path / "target"), str(tiny_corpus), tmp_path / "cache", options=chosen)

    return attempted


LEARNED = {"vocab_size": 264, "hidden_size": 32, "ffn_dim": 48, "num_attention_heads": 4, "word_embed_proj_dim": 32}
IDS = {"pad_token_id": 256, "bos_token_id": None, "eos_token_id": 258}


@pytest.mark.parametrize(
    ("shape", "error", "says"),
    [
        (BertConfig(**without(SIZES, "num_key_value_heads"), is_decoder=True), UsageError, "one matrix without a bias"),
        (OPTConfig(**LEARNED, **IDS, num_hidden_layers=4, max_position_embeddings=512), ProofError, "is more added"),
    ],
    ids=["a head with a bias", "learned positions"],
)
def test_a_head_or_an_embedding_that_is_more_than_one_matrix(attempt, shape, error, says):
    with pytest.raises(error, match=says) as found:
        attempt(shape)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        (T5Config(), "an encoder-decoder's; a target is a decoder alone"),
        (BartConfig(), "an encoder-decoder's"),
        (SiglipVisionConfig(), "names no vocab_size; this is no decoder"),
        (Wav2Vec2Config(), "is a wav2vec2, which transformers has no language model with an LM head for"),
    ],
    ids=lambda case: getattr(case, "model_type", ""),
)
def test_a_model_that_is_no_decoder_is_refused_by_its_config(tmp_path, shape, says):
    shape.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=says) as found:
        read_text_config(tmp_path)
        load_target(str(tmp_path))
    assert "\n" not in str(found.value)


def test_a_model_that_transformers_does_not_know_runs_no_code_of_its_own(tmp_path):
    auto = {"auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
    (tmp_path / "config.json").write_text(json.dumps({**SIZES, **auto, "model_type": "brand_new"}))
    (tmp_path / "evil.py").write_text("raise SystemExit('was run')")
    with pytest.raises(
        UsageError, match=r"does not know this model .*code that comes with a model is never run"
    ) as found:
        load_target(str(tmp_path))
    assert "\n" not in str(found.value)


def test_a_target_without_one_list_of_layers_is_refused():
    model = random_model(config())
    model.config.num_hidden_layers = 5
    with pytest.raises(UsageError, match="0 lists of 5 layers in it, wanted one"):
        decoder_layers(model)


def test_a_target_of_several_residual_streams_is_refused():
    model = random_model(config())
    model.model.layers[1].register_forward_hook(lambda module, args, output: torch.stack([output, output]))
    with pytest.raises(UsageError, match=r"shape \[2, 1, 3, 32\], not one residual stream"), tap_layers(model, [1]):
        run_decoder(model, torch.tensor([[1, 2, 3]]))


def test_a_norm_outside_of_the_decoder_is_caught(attempt, monkeypatch):
    """`final` would then not be what the head reads."""

    def normed(*args, **kwargs):
        model = load_target(*args, **kwargs)
        model.lm_head.register_forward_pre_hook(lambda module, args: model.model.norm(args[0]))
        return model

    monkeypatch.setattr("stages.cache_hidden.capture.load_target", normed)
    with pytest.raises(ProofError, match=r"LM head gives logits that differ .*or a norm stands before it"):
        attempt(None)


# Sizes and positions


def test_more_tokens_than_the_target_has_positions(attempt, tmp_path):
    with pytest.raises(UsageError, match="--max-length 513: this target has 512 positions; pass 512 or less"):
        attempt(None, max_length=513)
    attempt(None, max_length=None)
    assert HiddenCache.open(tmp_path / "cache").identity.samples.max_length == 512
    attempt(None, max_length=None)


def test_positions_end_where_a_rotary_scaling_would_follow_the_batch():
    long = {"max_position_embeddings": 131072, "original_max_position_embeddings": 4096}
    for scaling in ({"rope_scaling": {"type": "longrope"}}, {"rope_parameters": {"rope_type": "longrope"}}):
        most, why = max_positions({**long, **scaling})
        assert most == 4096 and "longest sample of a batch" in why
    assert (
        max_positions({**long, "rope_scaling": {"rope_type": "yarn", "original_max_position_embeddings": 4096}})[0]
        == 131072
    )
    assert max_positions({}) == (None, "")


# As google/gemma-3-4b-it states itself: the rest is left to the defaults of its class.
SPARSE = {
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
}


def test_sizes_that_a_config_leaves_to_its_class_reach_the_cache(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SPARSE))
    assert read_text_config(tmp_path)["vocab_size"] == 262208
    complete = json.loads(complete_config(tmp_path, AutoConfig.from_pretrained(tmp_path)))
    assert complete["model_type"] == "gemma3" and SPARSE["text_config"].items() <= complete["text_config"].items()
    for_training = training_config(complete)
    assert [for_training[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim")] == [8, 4, 256]
    assert rope_theta(for_training) == 1e6


def test_a_config_that_lacks_nothing_is_kept_to_the_byte(tiny_target):
    shape = AutoConfig.from_pretrained(tiny_target)
    assert complete_config(tiny_target, shape) == (tiny_target / "config.json").read_bytes()
