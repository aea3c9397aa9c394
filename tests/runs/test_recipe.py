"""Recipes: what they say, what they refuse, and what they become on a cache."""

import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError

from pipeline.cache.schema import Identity
from pipeline.drafts import DRAFTS
from pipeline.drafts.rope import rope_theta
from pipeline.errors import UsageError
from pipeline.runs.recipe import Recipe, load_recipe, read_toml, resolve, resolve_mask_token
from pipeline.runs.training_data import training_config
from stages.train_draft.sweep_settings import read_sweep_file

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.toml"))

QWEN3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 40960,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000},
    "layer_types": ["full_attention"] * 36,
    "tie_word_embeddings": False,
    "max_window_layers": 36,
}
QWEN3_TOKENS = {"mask": None, "pad": 151643, "bos": None, "eos": [151645, 151643], "length": 151669}


def cache_of(target=QWEN3_8B, tokens=QWEN3_TOKENS, layers=(1, 9, 17, 25, 33), has_final=True, engine="transformers"):
    """What `resolve` reads of a HiddenCache."""
    return SimpleNamespace(
        target_config=target,
        tokens=tokens,
        layers=layers,
        has_final=has_final,
        dtype=torch.bfloat16,
        path=Path("hs_cache"),
        identity=Identity.model_validate({"target": {"name": "Qwen/Qwen3-8B"}, "capture": {"engine": engine}}),
    )


def draft_of(*sets: str, **cache):
    """The draft that some fields of [draft] describe."""
    return resolve(load_recipe(None, tuple(f"draft.{entry}" for entry in sets)), cache_of(**cache)).draft


def write(tmp_path, text: str) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return path


def test_no_recipe_is_the_default_one():
    assert load_recipe(None) == Recipe()
    assert Recipe().draft.method == "domino"


def test_sets_are_typed_by_toml_and_override_the_file(tmp_path):
    path = write(tmp_path, '[draft]\nmethod = "domino"\n[train]\nlr = 1e-3\n')

    recipe = load_recipe(path, ("train.lr=3e-4", "draft.method=dflash", "draft.layers=[1, 3]", "train.seed = 7"))

    assert (recipe.train.lr, recipe.draft.method, recipe.draft.layers, recipe.train.seed) == (3e-4, "dflash", (1, 3), 7)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[train]\nsetps = 5", ["`train.setps`", "did you mean `train.steps`?", "epochs"]),
        ("[draft]\nblocksize = 5", ["`draft.blocksize`", "did you mean `draft.block_size`?", "mask_token_id"]),
        ("[trian]\nsteps = 5", ["`trian`", "did you mean `train`?", "draft, train"]),
        ("[train]\nsteps = 0", ["`train.steps` = 0", "greater than 0"]),
        ("[train]\nsteps = 1.5", ["`train.steps` = 1.5", "integer"]),
        ("[train]\nseed = true", ["`train.seed` = True"]),
        ('[train]\nschedule = "linear"', ["`train.schedule`", "cosine", "wsd"]),
        ("[train]\nsteps = 5\nepochs = 2", ["train.steps = 5", "train.epochs = 2", "leave one out"]),
        ("[draft]\nlayers = []", ["`draft.layers`"]),
        ("[train\nsteps = 5", ["is not TOML"]),
        ("train = 5", ["`train` = 5"]),
    ],
)
def test_a_wrong_recipe_is_refused_in_one_line_that_names_it(tmp_path, text, named):
    with pytest.raises(UsageError) as refused:
        load_recipe(write(tmp_path, text))

    assert all(part in str(refused.value) for part in [*named, "recipe.toml"]), refused.value
    assert "\n" not in str(refused.value).strip()


@pytest.mark.parametrize(
    "entry",
    ["train.lr", "lr=3", "=3", "train.=3", ".lr=3", "train.lr=fast", "train.lr.x=3", "train.lr=inf", "draft.gamma=inf"],
)
def test_a_wrong_set_is_refused(entry):
    with pytest.raises(UsageError):
        load_recipe(None, (entry,))


def test_a_recipe_that_is_not_there_is_refused_by_its_path(tmp_path):
    with pytest.raises(UsageError, match=r"no recipe at .*nowhere\.toml"):
        load_recipe(tmp_path / "nowhere.toml")
    with pytest.raises(UsageError, match=r"recipe of a run is .*recipe\.toml"):
        load_recipe(tmp_path)


def test_a_recipe_cannot_be_changed_by_accident():
    with pytest.raises(ValidationError):
        Recipe().train.steps = 3


def test_defaults_on_an_8b_target_are_the_published_recipe():
    resolved = resolve(Recipe(), cache_of()).with_steps(20_000)
    draft, train = resolved.draft, resolved.recipe.train

    assert (draft.method, draft.block_size, draft.num_hidden_layers, draft.shift_label) == ("domino", 16, 5, True)
    assert (draft.gru_hidden_dim, draft.emb_dim, draft.pure_draft_prefix_len, draft.gamma) == (1024, 256, 1, 7)
    assert (draft.mask_token_id, draft.target_layer_ids, draft.head_dim) == (151669, (1, 9, 17, 25, 33), 128)
    assert (draft.rope_theta, draft.num_target_layers, draft.lambda_start, draft.lambda_decay) == (1e6, 36, 1, 1)
    assert (train.lr, train.warmup, train.clip, train.schedule, train.dtype) == (6e-4, 0.04, 1.0, "cosine", "bfloat16")
    assert (train.optimizer, train.steps, train.anchors, train.context, train.batch) == ("adamw", 7500, 512, 3072, 16)


def test_defaults_follow_a_small_target():
    small = QWEN3_8B | {"hidden_size": 256, "num_hidden_layers": 8, "vocab_size": 1280, "head_dim": 32}
    tokens = {"mask": 1270, "pad": 0, "bos": None, "eos": [1], "length": 1271}

    resolved = resolve(Recipe(), cache_of(small, tokens, layers=(1, 3, 5)))
    draft, train = resolved.draft, resolved.recipe.train
    published = resolve(load_recipe(None, ("train.optimizer=adamw",)), cache_of(small, tokens, layers=(1, 3, 5)))

    assert (train.optimizer, train.lr, published.recipe.train.lr) == ("muon", 5e-3, 3e-3)
    assert (draft.block_size, draft.num_hidden_layers, draft.gamma) == (8, 2, 4)
    assert (draft.gru_hidden_dim, draft.emb_dim, draft.mask_token_id) == (256, 256, 1270)
    assert draft.target_layer_ids == (1, 3, 5)


def test_dflash_is_the_published_one_and_carries_nothing_of_domino():
    recipe = load_recipe(None, ("draft.method=dflash",))
    draft = resolve(recipe, cache_of()).draft

    assert draft.shift_label is False
    assert draft.options().keys() == {"vocabulary"} and draft.vocabulary is None


def test_dspark_is_the_published_one_on_any_target():
    small = QWEN3_8B | {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    published, toy = draft_of("method=dspark"), draft_of("method=dspark", target=small)

    for draft in (published, toy):
        assert (draft.block_size, draft.proposals, draft.shift_label, draft.gamma) == (7, 7, True, 4)
        assert (draft.objective, draft.alpha_ce, draft.alpha_l1, draft.alpha_confidence) == ("dspark", 0.1, 0.9, 1.0)
        assert (draft.markov_head_type, draft.enable_confidence_head) == ("vanilla", True)
        assert draft.confidence_head_with_markov is False
        assert draft.options().keys() == DRAFTS["dspark"].Config.options().keys() and "emb_dim" not in draft.options()
    assert (published.markov_rank, toy.markov_rank) == (256, 128)


def test_tokens_alone_teach_no_confidence_head():
    draft = draft_of("method=dspark", "objective=ce", has_final=False)

    assert (draft.enable_confidence_head, draft.alpha_confidence, draft.alpha_ce) == (False, None, None)


@pytest.mark.parametrize("method", DRAFTS)
@pytest.mark.parametrize("objective", ["ce", "kl", "tv", "lk-alpha", "lk-hybrid", "dspark"])
def test_every_method_takes_every_objective(method, objective):
    draft = draft_of(f"method={method}", f"objective={objective}")

    assert draft.objective == objective
    assert (draft.alpha_ce, draft.alpha_l1) == ((0.1, 0.9) if objective == "dspark" else (None, None))


def test_tokens_are_what_is_learned_where_nothing_is_said():
    assert [draft_of(f"method={method}").objective for method in ("dflash", "domino")] == ["ce", "ce"]


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        (["method=dflash", "objective=l1"], r"objective.*'ce', 'kl'.*found 'l1'"),
        (["method=dflash", "objective=kl", "alpha_l1=0.5"], r'alpha_l1 = 0.5 .*objective "dspark"; leave it out'),
        (["method=dflash", "markov_rank=8"], "markov_rank = 8 means nothing to dflash; leave it out"),
        (["method=domino", "enable_confidence_head=true"], "enable_confidence_head = True means nothing to domino"),
        (["method=dspark", "emb_dim=8"], "emb_dim = 8 means nothing to dspark; leave it out"),
        (["method=dspark", "markov_head_type=lstm"], "markov_head_type.*'lstm': input should be 'vanilla'"),
        (["method=dspark", "shift_label=false"], "shift_label"),
        (["method=dspark", "alpha_ce=0", "alpha_l1=0"], "nothing is learned"),
        (["method=dspark", "enable_confidence_head=false", "alpha_confidence=1"], "alpha_confidence"),
        (["method=dspark", "enable_confidence_head=false", "confidence_head_with_markov=true"], "confidence_head_with"),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_line(sets, said):
    with pytest.raises(UsageError, match=said) as refused:
        draft_of(*sets)
    assert "\n" not in str(refused.value)


ADD_FINAL = "`pipeline cache-hidden --model Qwen/Qwen3-8B --out hs_cache --layers 1,9,17,25,33 --final needed`"


@pytest.mark.parametrize(
    ("sets", "why", "remedy"),
    [
        (["method=dspark"], 'objective "dspark"', 'draft.objective = "ce"'),
        (["method=dflash", "objective=tv"], 'objective "tv"', 'draft.objective = "ce"'),
        (
            ["method=dspark", "objective=ce", "enable_confidence_head=true"],
            "the confidence head",
            "draft.enable_confidence_head = false",
        ),
    ],
)
def test_a_cache_without_final_states_is_refused_with_the_command_that_adds_them(sets, why, remedy):
    with pytest.raises(UsageError) as refused:
        draft_of(*sets, has_final=False)

    said = f"hs_cache holds no final states, which {why} learns from; add them with {ADD_FINAL}, or set {remedy}"
    assert str(refused.value) == said
    assert draft_of(*sets, remedy.removeprefix("draft."), has_final=False)


def test_no_key_that_only_the_target_means_reaches_the_draft():
    strange = QWEN3_8B | {"sliding_window": 4096, "layer_types": ["sliding_attention"] * 36, "num_experts": 8}

    plain, other = resolve(Recipe(), cache_of()), resolve(Recipe(), cache_of(strange))

    assert plain == other


@pytest.mark.parametrize("method", DRAFTS)
def test_a_resolved_recipe_loads_back_equal_and_resolves_to_itself(tmp_path, method):
    sets = (f"draft.method={method}", "train.lr=1e-3", "train.warmup=0.1", "draft.gamma=0")
    resolved = resolve(load_recipe(None, sets), cache_of()).with_steps(100)

    again = load_recipe(write(tmp_path, resolved.recipe.toml()))

    assert again == resolved.recipe
    assert again.digest() == resolved.recipe.digest()
    assert resolve(again, cache_of()).with_steps(100) == resolved
    assert resolved.draft.gamma is None, "gamma 0 in a recipe means no decay"
    assert set(tomllib.loads(resolved.recipe.toml())) == {"draft", "train"}


WRITTEN_BY_0_6_0 = {
    "domino": "method objective layers num_hidden_layers block_size mask_token_id shift_label gamma weighting "
    "pure_draft_prefix_len emb_dim gru_hidden_dim lambda_start lambda_decay "
    "intermediate_size num_attention_heads num_key_value_heads head_dim layer_types",
    "dspark": "method objective alpha_ce alpha_l1 layers num_hidden_layers block_size mask_token_id shift_label gamma "
    "weighting markov_rank markov_head_type enable_confidence_head confidence_head_with_markov alpha_confidence "
    "intermediate_size num_attention_heads num_key_value_heads head_dim layer_types",
}


@pytest.mark.parametrize("method", WRITTEN_BY_0_6_0)
def test_a_recipe_is_written_in_the_order_of_earlier_versions_however_it_is_stated(tmp_path, method):
    """An export over one that an earlier version made is the same to the byte, and its card holds the recipe."""
    resolved = resolve(load_recipe(None, (f"draft.method={method}",)), cache_of()).with_steps(100).recipe
    lines = resolved.toml().splitlines()
    keys = [line.partition(" = ")[0] for line in lines[1 : lines.index("")]]
    assert keys == WRITTEN_BY_0_6_0[method].split()

    backwards = write(tmp_path, "\n".join(["[draft]", *lines[lines.index("") - 1 : 0 : -1], *lines[lines.index("") :]]))
    assert load_recipe(backwards).toml() == resolved.toml()


def test_the_digest_tells_recipes_apart():
    assert Recipe().digest() != load_recipe(None, ("train.seed=1",)).digest()


def test_steps_and_epochs_are_two_ways_to_say_the_same():
    def steps(samples, *sets):
        return resolve(load_recipe(None, sets), cache_of()).with_steps(samples).recipe.train.steps

    assert steps(1000, "train.epochs=2", "train.batch=300") == 6
    assert steps(5, "train.epochs=2") == 2, "fewer samples than a batch still make one"
    assert steps(1000, "train.steps=77") == 77


def test_layers_the_cache_lacks_are_refused_with_the_command_that_captures_them():
    with pytest.raises(UsageError) as refused:
        resolve(load_recipe(None, ("draft.layers=[1, 5, 33]",)), cache_of())

    assert "holds layers [1, 9, 17, 25, 33]; this draft also reads [5]" in str(refused.value)
    assert "`pipeline cache-hidden --model Qwen/Qwen3-8B --out hs_cache --layers 1,5,9,17,25,33`" in str(refused.value)


def test_what_an_imported_cache_lacks_is_asked_of_other_files_as_nothing_can_be_captured_into_it():
    for lacking in ({"has_final": False}, {"layers": (1, 9, 17, 25)}):
        with pytest.raises(UsageError, match="it was imported, so import files that hold them too") as refused:
            draft_of("method=dspark", "layers=[9, 33]", engine="imported", **lacking)
        assert "cache-hidden" not in str(refused.value)
    with pytest.raises(UsageError, match="finish the import with the same command"):
        draft_of(engine="imported", layers=())


def test_some_of_the_layers_may_be_read_and_no_layer_at_all_is_refused():
    assert resolve(load_recipe(None, ("draft.layers=[9, 25]",)), cache_of()).draft.target_layer_ids == (9, 25)
    with pytest.raises(UsageError, match="finish the capture"):
        resolve(Recipe(), cache_of(layers=()))


def test_an_unknown_method_is_refused_with_those_there_are():
    with pytest.raises(UsageError, match=r"`eagle`.*dflash, domino"):
        resolve(load_recipe(None, ("draft.method=eagle",)), cache_of())


def test_a_cell_holds_at_least_one_sample():
    with pytest.raises(UsageError, match=r"cell_anchors = 8 is below train\.anchors = 512"):
        resolve(load_recipe(None, ("train.cell_anchors=8",)), cache_of())


def test_the_mask_token_comes_from_the_recipe_the_tokenizer_or_past_its_end():
    tokens = {"mask": 7, "pad": 0, "bos": 1, "eos": [2, 3], "length": 90}

    assert resolve_mask_token(50, tokens, 100) == 50
    assert resolve_mask_token(None, tokens, 100) == 7
    assert resolve_mask_token(None, tokens | {"mask": None}, 100) == 90


@pytest.mark.parametrize(("stated", "said"), [(0, "pad"), (1, "bos"), (3, "eos"), (100, "outside"), (None, "outside")])
def test_a_mask_token_with_another_meaning_is_refused(stated, said):
    tokens = {"mask": None, "pad": 0, "bos": 1, "eos": [2, 3], "length": 100}

    with pytest.raises(UsageError, match=f"{said}.*set draft.mask_token_id"):
        resolve_mask_token(stated, tokens, 100)


def test_rope_theta_is_read_from_either_place_and_never_from_two_that_differ():
    assert rope_theta({"rope_theta": 5e5}) == 5e5
    assert rope_theta({"rope_parameters": {"rope_theta": 1e6}}) == 1e6
    assert rope_theta({"rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {}}}) == 1e6
    assert rope_theta({"rope_theta": 1e6, "rope_parameters": {"rope_theta": 1000000}}) == 1e6
    assert rope_theta({}) == 1e4
    with pytest.raises(UsageError, match=r"10000 and rope_parameters\.rope_theta 1e"):
        rope_theta({"rope_theta": 10000, "rope_parameters": {"rope_theta": 1e6}})


def test_the_language_part_of_a_target_that_sees_is_found():
    assert training_config({"vision_config": {}, "text_config": QWEN3_8B}) == QWEN3_8B
    with pytest.raises(UsageError, match="lacks hidden_size"):
        training_config({"vision_config": {}})


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_recipe_we_ship_resolves(path):
    if "sweep" in read_toml(path):
        file = read_sweep_file(path)
        recipes = [file.recipe(setting) for setting in file.combinations()]
    else:
        recipes = [load_recipe(path)]
    for recipe in recipes:
        captured = {"layers": recipe.draft.layers} if recipe.draft.layers else {}
        assert resolve(recipe, cache_of(**captured)).draft.method in DRAFTS
