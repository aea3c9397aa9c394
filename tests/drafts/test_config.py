"""A draft's configuration: what is filled in, and what is refused before any work."""

import pytest
from draft_cases import OWN, V, fields

from pipeline.drafts import draft_config
from pipeline.drafts.config import default_gamma
from pipeline.errors import UsageError


def test_defaults_are_filled_and_counts_follow_the_labels():
    config = draft_config(**fields("domino"))
    assert (config.lambda_start, config.lambda_decay) == (1.0, 1.0)
    assert config.layer_types == ("full_attention",) * 2
    assert (config.proposals, config.first_slot) == (5, 0)
    same = draft_config(**fields("dflash", shift=False))
    assert (same.proposals, same.first_slot) == (4, 1)
    assert not hasattr(same, "lambda_start")
    assert draft_config(**config.model_dump()) == config


def test_dspark_s_defaults_are_the_published_ones_and_plain_cross_entropy_trains_no_confidence():
    bare = {key: value for key, value in fields("dspark").items() if key not in OWN["dspark"]}
    config = draft_config(**bare)
    assert (config.markov_rank, config.markov_head_type, config.objective) == (256, "vanilla", "dspark")
    assert (config.alpha_ce, config.alpha_l1, config.alpha_confidence) == (0.1, 0.9, 1.0)
    assert (config.enable_confidence_head, config.confidence_head_with_markov, config.proposals) == (True, False, 5)
    hard = draft_config(**bare, objective="ce")
    assert (hard.enable_confidence_head, hard.alpha_confidence, hard.alpha_ce) == (False, None, None)
    for each in (config, hard, draft_config(**fields("domino"), objective="dspark")):
        assert draft_config(**each.model_dump()) == each
    domino = draft_config(**fields("domino"))
    assert domino.objective == "ce" and not hasattr(domino, "markov_rank")


def test_options_of_other_methods_may_be_null_as_version_0_5_0_wrote_them():
    null = dict.fromkeys([*draft_config(**fields("domino")).options(), *draft_config(**fields("dspark")).options()])
    for method in ("dflash", "domino", "dspark"):
        assert draft_config(**null | fields(method)) == draft_config(**fields(method))


def test_default_gamma_is_the_published_table():
    assert [default_gamma(b) for b in (16, 10, 8, 7)] == [7, 5, 4, 4]
    assert (default_gamma(32), default_gamma(4)) == (7, 4)


@pytest.mark.parametrize(
    "method, changes, message",
    [
        ("dflash", {"target_layer_ids": (3, 1)}, "strictly increasing"),
        ("dflash", {"target_layer_ids": (1, 1)}, "strictly increasing"),
        ("dflash", {"target_layer_ids": ()}, "at least one"),
        ("dflash", {"target_layer_ids": (1, 7)}, r"-1\.\.6"),
        ("dflash", {"target_layer_ids": (-2, 1)}, r"-1\.\.6"),
        ("dflash", {"mask_token_id": V}, "vocabulary of 64"),
        ("dflash", {"mask_token_id": -1}, "mask_token_id"),
        ("dflash", {"block_size": 1}, r"block_size: Input should be greater than or equal to 2, found 1; correct"),
        ("dflash", {"gamma": 0.0}, r"gamma: Input should be greater than 0, found 0\.0"),
        ("dflash", {"dpace_alpha": 1.5}, r"dpace_alpha: Input should be less than or equal to 1, found 1\.5"),
        ("dflash", {"weighting": "dpase"}, "weighting"),
        ("dflash", {"num_attention_heads": 3}, "multiple"),
        ("dflash", {"head_dim": 7}, "even"),
        ("dflash", {"hidden_size": 0}, "hidden_size"),
        ("dflash", {"hiden_size": 4}, "hiden_size"),
        ("dflash", {"layer_types": ("full_attention",)}, "one a layer"),
        ("dflash", {"layer_types": ("full_attention", "linear_attention")}, "linear_attention"),
        ("dflash", {"layer_types": ("full_attention", "sliding_attention")}, "sliding_window is not set"),
        ("dflash", {"sliding_window": 8}, "no layer slides"),
        ("dflash", {"emb_dim": 8}, "leave it out"),
        ("dflash", {"lambda_start": 1.0}, "leave it out"),
        ("domino", {"emb_dim": None}, "needs emb_dim"),
        ("domino", {"gru_hidden_dim": None}, "needs gru_hidden_dim"),
        ("domino", {"pure_draft_prefix_len": None}, "needs pure_draft_prefix_len"),
        ("domino", {"pure_draft_prefix_len": 5}, r"use 0\.\.4"),
        ("domino", {"pure_draft_prefix_len": 4, "shift_label": False}, r"use 0\.\.3"),
        ("domino", {"pure_draft_prefix_len": -1}, "pure_draft_prefix_len"),
        ("domino", {"lambda_start": 1.1}, "lambda_start"),
        ("domino", {"lambda_decay": -0.1}, "lambda_decay"),
        ("domino", {"markov_rank": 8}, "leave it out"),
        ("dspark", {"emb_dim": 8}, "leave it out"),
        ("dspark", {"shift_label": False}, "next-position"),
        ("dspark", {"markov_head_type": "lstm"}, "markov_head_type"),
        ("dspark", {"markov_rank": -1}, "markov_rank"),
        ("dspark", {"markov_rank": 0, "markov_head_type": "rnn"}, "means nothing with markov_rank 0"),
        (
            "dspark",
            {"markov_rank": 0, "markov_head_type": "vanilla", "confidence_head_with_markov": True},
            "no table to read",
        ),
        ("dspark", {"alpha_confidence": 0.0}, "untrained"),
        ("dspark", {"alpha_confidence": -1.0}, "untrained"),
        ("dspark", {"enable_confidence_head": False, "confidence_head_with_markov": True}, "without a confidence head"),
        ("dspark", {"enable_confidence_head": False, "alpha_confidence": 1.0}, "without a confidence head"),
        ("dspark", {"alpha_ce": 0.0, "alpha_l1": 0.0}, "nothing is learned"),
        ("dspark", {"alpha_l1": -0.1}, r"alpha_l1: Input should be greater than or equal to 0"),
        ("dspark", {"objective": "kl", "alpha_ce": 0.1}, "leave it out"),
        ("dflash", {"objective": "kll"}, "objective"),
        ("dflash", {"alpha_ce": 0.1}, 'of objective "dspark"'),
    ],
)
def test_a_draft_that_cannot_work_is_refused_before_any_work(method, changes, message):
    with pytest.raises(UsageError, match=message) as refused:
        draft_config(**(fields(method) | changes))
    assert "\n" not in str(refused.value)


def test_an_unknown_method_and_a_missing_label_convention_are_refused():
    with pytest.raises(UsageError, match="dflash, domino"):
        draft_config(**(fields("dflash") | {"method": "domimo"}))
    with pytest.raises(UsageError, match="shift_label"):
        draft_config(**{key: value for key, value in fields("dflash").items() if key != "shift_label"})


@pytest.mark.parametrize("prefix, shift", [(4, True), (3, False), (0, True), (0, False)])
def test_the_longest_and_shortest_prefix_are_allowed(prefix, shift):
    config = draft_config(**fields("domino", shift, pure_draft_prefix_len=prefix))
    assert config.pure_draft_prefix_len == prefix
