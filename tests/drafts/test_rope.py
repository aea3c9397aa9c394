"""Scaled rotary positions: the frequencies that transformers gives the target, and what is taken over of them."""

import json
import re

import pytest
import torch
from forms import SIZES
from run_folders import METHOD_FIELDS, save_draft_run, small_head
from transformers import AutoConfig, Qwen3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from pipeline.drafts import draft_config
from pipeline.drafts.rope import RopeScaling, draft_rope_scaling, frequencies, rope_tables, rope_theta
from pipeline.errors import UsageError
from pipeline.published import check as arithmetic
from pipeline.published import export, load_draft_folder
from pipeline.published.reading import read_description

LINEAR = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
LLAMA31 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
QWEN3 = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32768}
OSS = {"rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "original_max_position_embeddings": 4096}
OSS |= {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
DEEPSEEK = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 40, "original_max_position_embeddings": 4096}
DEEPSEEK |= {"beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 0.5}
TAKEN = {
    "linear": LINEAR,
    "llama 3.1": LLAMA31,
    "llama 3.2": LLAMA31 | {"factor": 32.0},
    "qwen 3": QWEN3,
    "yarn, ends not at whole pairs": OSS,
    "yarn, with two magnitudes": DEEPSEEK,
    "yarn, one magnitude": QWEN3 | {"mscale": 0.7},
    "yarn, a magnitude of 0": QWEN3 | {"mscale": 1.0, "mscale_all_dim": 0},
    "yarn, other ends": QWEN3 | {"beta_fast": 16, "beta_slow": 2},
    "yarn, nearly all pairs alike": QWEN3 | {"original_max_position_embeddings": 8},
    "yarn, the usual attention factor": QWEN3 | {"attention_factor": 0.1 * torch.log(torch.tensor(4.0)).item() + 1},
    "yarn, no length": {key: value for key, value in QWEN3.items() if key != "original_max_position_embeddings"},
}
every_scaling = pytest.mark.parametrize("stated", TAKEN.values(), ids=TAKEN)


def target(stated: dict, **others) -> dict:
    """A target's config as its folder has it."""
    return {"head_dim": 128, "max_position_embeddings": 40960, "rope_parameters": dict(stated), **others}


@every_scaling
@pytest.mark.parametrize("head_dim", [64, 128])
def test_frequencies_are_those_of_transformers(stated, head_dim):
    config = Qwen3Config(head_dim=head_dim, max_position_embeddings=40960, rope_parameters=dict(stated))
    wanted_F, attention_factor = ROPE_INIT_FUNCTIONS[stated["rope_type"]](config, "cpu")
    scaling, reason = draft_rope_scaling(target(stated))

    assert reason is None
    found_F = frequencies(head_dim, rope_theta(target(stated)), scaling)
    torch.testing.assert_close(found_F, wanted_F, rtol=1e-6, atol=0)
    assert scaling.attention_factor == pytest.approx(attention_factor, abs=1e-9)
    assert not torch.allclose(found_F, frequencies(head_dim, stated["rope_theta"], None), rtol=1e-3)


def test_tables_are_the_angles_cosines_times_the_magnitude():
    scaling, _ = draft_rope_scaling(target(QWEN3))
    positions = torch.tensor([0, 1, 5000])
    cos, sin = rope_tables(positions, 64, 1e6, scaling)
    angles = positions[:, None] * frequencies(64, 1e6, scaling)
    assert scaling.attention_factor > 1.1
    torch.testing.assert_close(cos, angles.cos() * scaling.attention_factor)
    torch.testing.assert_close(sin, angles.sin() * scaling.attention_factor)


@every_scaling
def test_the_second_arithmetic_turns_alike(stated):
    scaling, _ = draft_rope_scaling(target(stated))
    theta = stated["rope_theta"]
    config = draft_config(
        method="domino", **{**SIZES, **METHOD_FIELDS["domino"], "rope_theta": theta, "rope_scaling": scaling}
    )
    half = config.head_dim // 2
    found = torch.tensor([arithmetic._rotary_frequency(pair, half, config) for pair in range(half)])
    torch.testing.assert_close(found, frequencies(config.head_dim, theta, scaling), rtol=1e-5, atol=0)


def test_older_and_nested_ways_to_state_a_scaling_are_read_as_transformers_reads_them():
    scaling, _ = draft_rope_scaling(target(LLAMA31))
    legacy = {"rope_theta": 5e5, "max_position_embeddings": 131072}
    older = {key: value for key, value in LLAMA31.items() if key not in ("rope_theta", "rope_type")}
    assert draft_rope_scaling({**legacy, "rope_scaling": {**older, "type": "llama3"}})[0] == scaling
    assert (
        draft_rope_scaling({**legacy, "rope_parameters": None, "rope_scaling": {**older, "rope_type": "llama3"}})[0]
        == scaling
    )
    by_kind = {"full_attention": LINEAR, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    assert draft_rope_scaling({"rope_parameters": by_kind})[0] == RopeScaling(rope_type="linear", factor=8.0)
    outside = target(QWEN3 | {"original_max_position_embeddings": 999}, original_max_position_embeddings=32768)
    assert draft_rope_scaling(outside)[0] == draft_rope_scaling(target(QWEN3))[0]
    whole = target(QWEN3 | {"factor": None}, max_position_embeddings=131072)
    assert draft_rope_scaling(whole)[0].factor == 4.0


@pytest.mark.parametrize("stated", [{}, {"rope_type": "default"}, {"type": "mrope", "mrope_section": [1, 2]}, None])
def test_plain_rotary_positions_stay_plain_and_nothing_is_said(stated):
    assert draft_rope_scaling({"rope_parameters": stated, "rope_theta": 1e4}) == (None, None)


@pytest.mark.parametrize(
    ("stated", "said"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "dynamic, which engines compute otherwise"),
        ({"type": "su", "short_factor": [1.0], "long_factor": [2.0]}, "longrope, which engines compute otherwise"),
        ({"rope_type": "proportional"}, "proportional, which engines compute otherwise"),
        ({"rope_type": "ntk-by-parts"}, "ntk-by-parts, which"),
        (QWEN3 | {"attention_factor": 1.5}, "yarn with attention_factor 1.5 where 1.13863 is usual, which SGLang"),
        ({"rope_type": "llama3", "factor": 8.0}, "llama3, but llama3 without low_freq_factor"),
        (LLAMA31 | {"high_freq_factor": 1.0}, "llama3, but high_freq_factor 1 is not above low_freq_factor"),
        (QWEN3 | {"attention_factor": "1.0"}, "yarn with attention_factor 1.0 where"),
        (
            QWEN3 | {"factor": None, "original_max_position_embeddings": "4k"},
            "yarn, but factor: .*found None|yarn, but",
        ),
        ({"rope_type": ["yarn"]}, r"\['yarn'\], which engines"),
        (LINEAR | {"factor": 0}, "linear, but factor: .*greater than 0, found 0"),
        (LINEAR | {"factor": "eight"}, "linear, but factor: .*found 'eight'"),
        (LINEAR | {"factor": float("inf")}, "linear, but factor: .*finite"),
    ],
)
def test_what_is_not_taken_over_is_said_with_the_reason(stated, said):
    scaling, reason = draft_rope_scaling(target(stated))
    assert scaling is None
    assert re.match(said, reason), reason


@every_scaling
@pytest.mark.parametrize("form", ["sglang", "speculators"])
def test_an_export_states_the_scaling_where_engines_look_and_reads_back(tmp_path, stated, form):
    scaling, _ = draft_rope_scaling(target(stated))
    theta = stated["rope_theta"]
    draft = save_draft_run(tmp_path / "run", "dflash", rope_scaling=scaling, rope_theta=theta)

    export.export(tmp_path / "run", tmp_path / "out", form)

    flat = json.loads((tmp_path / "out" / "config.json").read_text())
    layers = flat if form == "sglang" else flat["transformer_layer_config"]
    assert layers["rope_parameters"] == {"rope_theta": theta, **scaling.as_config()}
    assert layers["rope_scaling"] == scaling.as_config()
    assert all(type(layers["rope_parameters"][key]) is float for key in ("factor", "rope_theta"))
    read = Qwen3Config(**layers)  # as SGLang and vLLM read it
    wanted_F, attention_factor = ROPE_INIT_FUNCTIONS[read.rope_parameters["rope_type"]](read, "cpu")
    torch.testing.assert_close(frequencies(12, theta, scaling), wanted_F, rtol=1e-6, atol=0)
    assert attention_factor == pytest.approx(scaling.attention_factor)
    opened = load_draft_folder(tmp_path / "out", small_head(), target_layers=6)
    assert opened.config.rope_scaling == draft.config.rope_scaling


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rope_scaling": LINEAR, "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}, "differ; state"),
        ({"rope_scaling": LINEAR, "rope_parameters": LLAMA31 | {"rope_theta": 1e4}}, "differ; state"),
        ({"rope_scaling": "yarn"}, "scaled rotary positions: yarn, but factor: .*found None"),
        ({"rope_parameters": ["yarn"], "rope_theta": 1e4}, "scaled rotary positions: "),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "scaled rotary positions: dynamic, which"),
        ({"rope_scaling": LLAMA31 | {"high_freq_factor": None}}, "scaled rotary positions: llama3, but"),
    ],
)
def test_a_published_draft_with_other_scaled_positions_is_refused(tmp_path, change, said):
    save_draft_run(tmp_path / "run", "dflash")
    export.export(tmp_path / "run", tmp_path / "out")
    file = tmp_path / "out" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UsageError, match=said):
        read_description(tmp_path / "out")


def test_a_published_draft_may_state_its_scaling_once(tmp_path):
    scaling, _ = draft_rope_scaling(target(LLAMA31))
    save_draft_run(tmp_path / "run", "dflash", rope_scaling=scaling)
    export.export(tmp_path / "run", tmp_path / "out")
    file = tmp_path / "out" / "config.json"
    flat = json.loads(file.read_text())
    for gone in ("rope_scaling", "rope_parameters"):
        file.write_text(json.dumps({key: value for key, value in flat.items() if key != gone}))
        assert read_description(tmp_path / "out").config.rope_scaling == scaling
    assert AutoConfig.from_pretrained(tmp_path / "out").rope_parameters["rope_type"] == "llama3"
