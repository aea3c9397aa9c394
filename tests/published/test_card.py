"""The card of an export: what it tells of a run, and what it says when it does not know."""

import json

import pytest
from forms import deepspec_dspark, target

from pipeline.cache.inspect import describe
from pipeline.drafts import DRAFTS, DraftConfig, draft_config, init_weights
from pipeline.evaluation.decode import SamplingOptions
from pipeline.json_files import parse_checksummed
from pipeline.published.card import Origin, card, evaluations, serve_command
from pipeline.published.check import check_export
from pipeline.published.export import export
from pipeline.published.init_from import InitialDraft
from pipeline.published.reading import read_description
from pipeline.runs import checkpoint
from pipeline.target.head import TargetHead
from stages.evaluate.run import run as evaluate
from stages.train_draft.run import run as train

SETS = ("train.batch=4", "train.anchors=6", "draft.block_size=4", "train.steps=2", "draft.method=dspark")


@pytest.fixture(scope="module")
def trained(tiny_cache, tmp_path_factory):
    """A finished run of DSpark, evaluated greedily and by drawing."""
    run = train(tiny_cache, None, SETS, tmp_path_factory.mktemp("card") / "run", "cpu").run
    evaluate(
        run,
        count=3,
        max_new=6,
        device="cpu",
        out=run / "evaluation.json",
        sampling=SamplingOptions(1.0, 1.0, 0),
    )
    return run


@pytest.fixture(scope="module", params=["sglang", "speculators"])
def out(request, trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports") / "draft"
    export(trained, folder, request.param)
    return folder


def test_the_card_says_where_the_draft_comes_from(out, trained, tiny_cache):
    card, cache = (out / "README.md").read_text(), describe(tiny_cache)
    gauge = cache["gauge"]
    for wanted in (
        "# DSpark draft for tiny-random",
        f"| cache's digest | {cache['digest']} |",
        f"| target's digest | {cache['identity']['target']['digest']} |",
        f"| corpus | chats.jsonl, {cache['plan']['sources'][0]['xxh3']} |",
        f"greedy token in {gauge['agreement']:.1%} of {gauge['rows']:,} supervised rows",
        (trained / "recipe.toml").read_text().strip(),
        "| steps | 2 |",
        "its licence and the corpus's terms decide",
    ):
        assert wanted in card
    assert str(trained) not in card and str(tiny_cache) not in card  # nobody's disk


def test_the_card_has_accept_lengths_by_domain_and_slot_however_they_were_measured(out, trained):
    card, report = (out / "README.md").read_text(), json.loads((trained / "evaluation.json").read_text())
    for part in (report, report["sampled"]):
        row = part["overall"]
        low, high = row["interval"]
        slots = " | ".join(f"{share:.0%}" for share in row["per_slot"])
        assert f"| all | {row['prompts']} | {row['accept_len']:.2f} | {low:.2f} - {high:.2f} | {slots} |" in card
        for name, row in part["domains"].items():
            assert f"| {name} | {row['prompts']} | {row['accept_len']:.2f} |" in card
    assert card.count("| domain | prompts | accept length | 95 % | +1 | +2 | +3 | +4 |") == 2
    assert "Decoded greedily with the target, 6 tokens" in card and "drawn from the target at T = 1, 6 tokens" in card


def test_the_card_has_both_conventions_of_accept_length(out, trained):
    card, report = (out / "README.md").read_text(), json.loads((trained / "evaluation.json").read_text())
    for part in (report, report["sampled"]):
        assert f"\n\nAs vLLM counts: {part['overall']['engine_accept_len']:.3f}.\n" in card
    assert "it counts accepted proposals beyond the end of a reply, and makes no call once" in card


def test_an_accept_length_of_cut_blocks_says_so(trained, tmp_path):
    report, _ = parse_checksummed((trained / "evaluation.json").read_bytes())
    report["settings"]["threshold"] = 0.4
    (tmp_path / "cut.json").write_text(json.dumps(report))
    titles = [found.title for found in evaluations(tmp_path, 2)]
    assert len(titles) == 2 and all(
        title.endswith("6 tokens at most, blocks cut at confidence 0.4") for title in titles
    )


def test_the_card_says_how_the_draft_is_served_and_no_engine_reads_it(out):
    card, config = (out / "README.md").read_text(), json.loads((out / "config.json").read_text())
    if "speculators_model_type" in config:
        chosen = '\'{"method": "dspark", "model": "./draft", "num_speculative_tokens": 4}\''
        assert f"vllm serve tiny-random --speculative-config {chosen}" in card
        assert config["speculators_config"]["verifier"] == {
            "name_or_path": "tiny-random",
            "architectures": ["Qwen3ForCausalLM"],
        }
    else:
        assert "--speculative-algorithm DSPARK --speculative-draft-model-path ./draft" in card
        assert "--speculative-num-draft-tokens 5" in card  # the anchor is verified, too
    assert check_export(out)["probe"]["source"].startswith("sample ")


def small(method: str, **changes) -> DraftConfig:
    own = {"dflash": {"shift_label": False}, "dspark": {"shift_label": True, "markov_rank": 4}}
    own["domino"] = {"shift_label": True, "pure_draft_prefix_len": 1, "emb_dim": 4, "gru_hidden_dim": 8}
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "head_dim": 12, "vocab_size": 40, "rope_theta": 1e4}
    sizes |= {"max_position_embeddings": 64, "num_target_layers": 6, "target_layer_ids": (1, 3), "block_size": 4}
    return draft_config(method=method, mask_token_id=39, **sizes, **own[method], **changes)


@pytest.mark.parametrize(("method", "most"), [("dflash", 4), ("domino", 4)])
def test_dflash_and_domino_are_served_by_the_same_algorithm(method, most):
    command = serve_command(small(method), "sglang", Origin("bfloat16", "org/target", "abc"), "draft")
    assert command == (
        "python -m sglang.launch_server --model-path org/target --revision abc --speculative-algorithm DFLASH "
        f"--speculative-draft-model-path ./draft --speculative-num-draft-tokens {most}"
    )


@pytest.mark.parametrize(
    ("config", "form", "said"),
    [
        (small("domino"), "sglang", "3 proposals a block, where the figures below have 4"),
        (small("dspark"), "speculators", "the same draft exported with `--format sglang`"),
        (small("dspark", objective="ce"), "sglang", "default, static verify mode only"),
    ],
)
def test_the_card_says_where_an_engine_serves_otherwise_than_was_measured(config, form, said):
    origin = Origin("bfloat16", "org/target")
    assert said in card(config, form, origin, 1, "draft")
    assert said not in card(small("dflash"), form, origin, 1, "draft")


def test_a_checkpoint_alone_says_what_is_not_known(tmp_path):
    folder = deepspec_dspark(tmp_path / "folder")
    config = read_description(folder).config
    draft = DRAFTS[config.method](config, TargetHead(target(), target()))
    init_weights(draft, 0)
    InitialDraft(folder).weights_for(config).load_into(draft)
    checkpoint.save(tmp_path / "run", 1, draft, {}, {}, 1)
    export(tmp_path / "run", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| target | not recorded |" in card and "Not measured: no evaluation lies with the run." in card
    assert "on-policy gauge | not recorded" in card and "Not recorded: a checkpoint without its run." in card
