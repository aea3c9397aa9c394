"""Evaluation as a user meets it: a trained run in, a report out, and nothing believed that was not checked."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from greedy import STOP, make_greedy_cache, save_stopping_target
from rich.console import Console
from run_folders import with_recipe
from tiny import config, save_target, write_jsonl

from pipeline import cli
from pipeline.cache import HiddenCache
from pipeline.errors import DataError, ProofError, RoomError, UsageError
from pipeline.evaluation import decode, prompts
from pipeline.evaluation.accept_length import engine_accept_length
from pipeline.evaluation.decode import Decoded, SamplingOptions, accept_greedy
from pipeline.evaluation.evaluation_table import evaluation_table
from pipeline.evaluation.reports import Lossless, load_report, report_bytes
from pipeline.json_files import parse_checksummed
from pipeline.published.export import export
from stages.evaluate import run as evaluation
from stages.evaluate.measure import Prompt, accept_figures
from stages.evaluate.run import run


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return save_stopping_target(tmp_path_factory.mktemp("target") / "stopping")


@pytest.fixture(scope="module")
def cache(target, tmp_path_factory):
    return make_greedy_cache(target, tmp_path_factory.mktemp("cache") / "greedy")


@pytest.fixture(scope="module")
def trained(cache, tmp_path_factory):
    """A Domino run of 40 steps."""
    from stages.train_draft.run import run as train

    out = tmp_path_factory.mktemp("runs") / "domino"
    small = ("draft.block_size=4", "draft.emb_dim=8", "draft.gru_hidden_dim=16", "draft.intermediate_size=48")
    train(cache, None, (*small, "train.steps=40", "train.batch=6", "train.seed=3", "train.save_every=40"), out, "cpu")
    return out


@pytest.fixture(scope="module")
def report(trained, tmp_path_factory):
    out = tmp_path_factory.mktemp("report") / "report.json"
    found = run(trained, count=5, max_new=12, device="cpu", out=out, sampling=SamplingOptions(1.0, 0.7, 3))
    assert load_report(out) == found
    return found


def test_target_and_draft_compute_in_the_type_that_is_asked_for(trained, report):
    found = run(trained, count=3, max_new=8, device="cpu", dtype="bfloat16")

    assert (report.settings.dtype, found.settings.dtype) == ("float32", "bfloat16")
    assert found.overall.accept_len >= 1 and found.lossless.identical + found.lossless.near_ties == 3


def test_runs_of_one_recipe_and_other_seeds_are_known_as_such(report, trained, tmp_path):
    found = []
    for name, line, other in (("seed", "seed = 3", "seed = 4"), ("anchors", "anchors = ", "anchors = 1")):
        copy = with_recipe(trained, tmp_path / name, line, other)
        found.append(evaluation.describe_draft(copy).recipe == report.draft.recipe)
    assert found == [True, False]


def test_a_report_says_what_was_measured_and_how(report, trained, cache):
    store = HiddenCache.open(cache)
    draft, settings = report.draft, report.settings
    assert (draft.method, draft.block_size, draft.proposals) == ("domino", 4, 4)
    assert (draft.steps, draft.seed) == (40, 3)
    assert (report.target, report.cache) == ("stopping", store.digest)
    assert (settings.temperature, settings.max_new, settings.dtype) == (0, 12, "float32")
    assert report.overall.prompts <= len(report.samples) == 5
    gained = [length for sample in report.samples for length in sample.lengths]
    assert report.overall.accept_len == sum(gained) / len(gained)
    assert report.overall.calls == len(gained)
    assert sum(report.overall.per_slot) == pytest.approx(sum(gained) / len(gained) - 1, abs=1)
    low, high = report.overall.interval
    assert low <= report.overall.accept_len <= high
    assert set(report.domains) == {sample.domain for sample in report.samples} == {"a", "b", "sampled"}
    assert sum(of.tokens for of in report.domains.values()) == report.overall.tokens
    assert report.lossless == Lossless(prompts=5, identical=5, near_ties=0, from_file=0)
    assert report.agreement.equal == report.agreement.prompts > 0
    assert report.agreement.accept_len == report.agreement.accept_len_target_free
    assert set(report.teacher_forced) == {"a", "b", "sampled"}
    assert all(1 <= forced <= 5 for forced in report.teacher_forced.values())
    assert report.speed.speedup > 0


def test_drawn_replies_are_reported_apart_with_what_they_were_drawn_with(report):
    drawn = report.sampled
    assert (drawn.temperature, drawn.draft_temperature, drawn.seed) == (1.0, 0.7, 3)
    gained = [length for sample in drawn.samples for length in sample.lengths]
    assert drawn.overall.accept_len == sum(gained) / len(gained) != report.overall.accept_len
    low, high = drawn.overall.interval
    assert low <= drawn.overall.accept_len <= high
    assert set(drawn.domains) == {"a", "b", "sampled"}
    matched, proposed = (sum(sum(getattr(of, key)) for of in drawn.samples) for key in ("matched", "proposed"))
    assert drawn.overall.verify_rate == matched / proposed
    assert drawn.overall.verified == proposed / len(gained) == report.draft.proposals
    assert 5 <= drawn.lossless.tokens <= 60 and abs(drawn.lossless.spreads) < 6


def test_a_reply_that_is_drawn_does_not_depend_on_the_other_prompts(trained, tmp_path):
    rows = [{"input_ids": [104, first]} for first in range(5)]

    def lengths(rows):
        path = write_jsonl(tmp_path / "prompts.jsonl", rows)
        drawn = run(trained, prompts=path, max_new=9, device="cpu", sampling=SamplingOptions(1.0, 1.0)).sampled
        return [of.lengths for of in drawn.samples]

    whole = lengths(rows)
    assert lengths(rows[:1:-1]) == whole[:1:-1]
    assert len({tuple(of) for of in whole}) > 1


def test_replies_that_are_not_drawn_are_a_failed_proof(trained, monkeypatch):
    monkeypatch.setattr(
        decode, "rejection_sample", lambda proposal, logits_NV, **how: accept_greedy(proposal, logits_NV)
    )
    with pytest.raises(ProofError, match=r"tokens drawn are not the target's own: their mean place .* is 0\.[0-3]"):
        run(trained, count=6, max_new=25, device="cpu", sampling=SamplingOptions(1.0, 1.0))


@pytest.fixture(scope="module")
def confident(cache, tmp_path_factory):
    """A DSpark run of 30 steps."""
    from stages.train_draft.run import run as train

    out = tmp_path_factory.mktemp("runs") / "dspark"
    small = ('draft.method="dspark"', "draft.block_size=4", "draft.markov_rank=8", "draft.intermediate_size=48")
    train(cache, None, (*small, "train.steps=30", "train.batch=6", "train.save_every=30"), out, "cpu")
    return out


def test_a_confidence_head_is_judged_by_the_blocks_it_cuts(confident):
    found = run(confident, count=4, max_new=12, device="cpu")

    cuts = found.confidence
    assert [of.threshold for of in cuts] == [0.0, 0.2, 0.4, 0.6, 0.8]
    assert cuts[0].verified == found.draft.proposals == 4
    assert cuts[0].accept_len == found.agreement.accept_len
    assert [of.verified for of in cuts] == sorted((of.verified for of in cuts), reverse=True)
    assert cuts[-1].verified < 4
    console = Console(width=200)
    with console.capture() as shown:
        console.print(evaluation_table(found))
    _, *lines = (line.split() for line in shown.get().partition("cut below")[2].split("\n", 6)[:6])
    assert [line[0] for line in lines] == ["uncut", "0.2", "0.4", "0.6", "0.8"]
    cut, (low, high) = cuts[2], cuts[2].interval
    assert lines[2][1:4] == [f"{cut.verified:.2f}", f"{cut.verify_rate:.0%}", f"{cut.accept_len:.2f}"]
    assert lines[2][4:] == [f"{low:.2f}", "-", f"{high:.2f}", f"{1 - 1 / cut.accept_len:.0%}"]


def test_cut_blocks_are_lossless_and_agree_with_the_replay(confident):
    middle = 0.35
    found = run(confident, count=4, max_new=12, device="cpu", threshold=middle, sampling=SamplingOptions(0.8, 0.0))
    assert found.settings.threshold == middle
    assert found.lossless.identical == 4
    assert found.agreement.equal == found.agreement.prompts > 0
    assert found.overall.verified < 4


def test_a_draft_without_confidence_is_not_cut(trained):
    with pytest.raises(UsageError, match="without a confidence head cannot cut its blocks at"):
        run(trained, count=1, max_new=4, device="cpu", threshold=0.5)


@pytest.mark.parametrize("threshold", [-0.1, 1.1, float("nan")])
def test_a_threshold_that_is_no_confidence_is_refused(trained, threshold):
    with pytest.raises(UsageError, match=r"a confidence lies in 0\.\.1"):
        run(trained, threshold=threshold, device="cpu")


def test_a_report_that_cannot_be_written_is_refused_before_anything_runs(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "load_target", lambda *_, **__: pytest.fail("the target was loaded"))
    file = tmp_path / "file"
    file.write_text("")
    for out, said in (
        (tmp_path, "is a folder; name a file in it"),
        (file / "report.json", "its folder cannot be made"),
    ):
        with pytest.raises(UsageError, match=said):
            run(trained, device="cpu", out=out)


@pytest.mark.parametrize("option", ["plain", "prompts"])
def test_a_report_replaces_no_file_that_the_same_command_reads(trained, option, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(UsageError, match=f"--out one.json is the file of --{option}, which the report would replace"):
        run(trained, device="cpu", out=Path("one.json"), **{option: tmp_path / "link" / "one.json"})
    assert not (tmp_path / "one.json").exists()


def test_a_report_that_the_disk_has_no_room_for_is_shown(report, tmp_path, monkeypatch, capsys):
    def full(path, data):
        raise RoomError("no room")

    monkeypatch.setattr(evaluation, "write_file", full)
    with pytest.raises(RoomError):
        evaluation.write_report(report, tmp_path / "report.json")
    assert "accept length" in capsys.readouterr().err


def test_a_list_of_numbers_takes_one_line_of_the_report_and_texts_stay_as_they_are():
    texts = ["[\n 1,\n 2\n]", "a [", "]"]
    report = {"samples": [{"domain": "[\n1, 2]", "lengths": [8, 1, 2]}, {"lengths": []}], "texts": texts}
    report |= {"interval": [1.5, -1e-9], "confidence": None, "nested": [[1, 2], [3, None]]}

    written = report_bytes(report).decode()

    assert parse_checksummed(written.encode())[0] == report
    lines = [line.strip() for line in written.splitlines()]
    assert {'"lengths": [8,1,2]', '"interval": [1.5,-1e-09],', "[1,2],", "[3,null]"} <= {*lines}


def test_calls_saved_are_those_of_a_plain_loop_over_the_same_tokens():
    reply = Decoded([], [4, 2, 1], [3, 1, 0], [3, 3, 0], [3, 1, 0], 1.0)
    done = [(Prompt([1], name, name), reply) for name in "ab"]
    done.append((Prompt([1], "c", "c"), Decoded([], [], [], [], [], 1.0)))  # the prefill gave a stop

    found = accept_figures(done, 3, max_new=64)
    overall, domains = found["overall"], found["domains"]

    assert (overall.verified, overall.verify_rate) == (2, 4 / 6)
    assert (overall.calls, overall.tokens, overall.calls_saved) == (6, 14, 1 - 6 / 14)
    assert domains["a"].calls_saved == 1 - 3 / 7
    assert domains["c"].calls_saved == 0


def test_proposals_beyond_a_stop_token_count_for_an_engine_and_not_for_a_reply(report):
    beyond = 0
    for sample in report.samples:
        assert len(sample.accepted) == len(sample.matched)
        assert all(map(int.__ge__, sample.accepted, sample.matched))
        assert sample.accepted[:-1] == sample.matched[:-1]
        beyond += sum(sample.accepted) - sum(sample.matched)
    replies = [(sample.lengths, sample.accepted) for sample in report.samples]
    assert report.overall.engine_accept_len == engine_accept_length(replies, 12)
    assert f"as vLLM counts: {report.overall.engine_accept_len:.3f} where we say" in shown(report)


def test_fewer_proposals_of_a_block_are_measured_as_such_and_named(trained, report):
    fewer = run(trained, count=5, max_new=12, device="cpu", proposals=3)
    assert fewer.settings.proposals == 3 and fewer.draft.proposals == 4
    assert {count for sample in fewer.samples for count in sample.proposed} == {3}
    assert len(fewer.overall.per_slot) == 3 and max(map(max, (of.lengths for of in fewer.samples if of.lengths))) <= 4
    assert fewer.agreement is None  # which rolls out whole blocks
    assert fewer.lossless.identical == 5
    assert "3 of 4 proposals a block (b - 1 of a block of b, as SpecForge and SGLang draft)" in shown(fewer)
    assert "4 proposals a block" in shown(report)


@pytest.mark.parametrize("count", [0, 5])
def test_more_proposals_than_a_block_has_are_refused(trained, count):
    with pytest.raises(UsageError, match=rf"--proposals {count}: a block of 4 .* proposes 4 tokens; pass 1\.\.4"):
        run(trained, count=1, max_new=2, device="cpu", proposals=count)


def shown(report) -> str:
    """Return the table that `evaluate` prints, on one line."""
    console = Console(width=200)
    with console.capture() as printed:
        console.print(evaluation_table(report))
    return " ".join(printed.get().split())


def test_prompts_end_where_the_last_reply_begins(cache, trained):
    store = HiddenCache.open(cache)
    heldout = torch.tensor([index for index, split in enumerate(store.samples.split) if split == "heldout"]).numpy()
    for prompt in evaluation.cached_prompts(store, heldout, 100):
        ids, mask = store.tokens_of(prompt.sample)
        assert prompt.ids == ids[: len(prompt.ids)].tolist()
        assert not mask[len(prompt.ids) - 1] and mask[len(prompt.ids) :].all()


def test_the_table_shows_every_domain_and_the_proof(report):
    console = Console(width=150)
    with console.capture() as shown:
        console.print(evaluation_table(report))
    text = shown.get()
    wanted_all = [
        "domino (ce), block 4, 40 steps",
        "4 proposals",
        "sampled",
        "all",
        "T = 0",
        "5 of 5 replies identical",
    ]
    for wanted in (*wanted_all, "T = 1", "seed 3, proposals drawn at T = 0.7", "spreads off 1/2"):
        assert wanted in text


def test_an_exported_folder_evaluates_as_its_run(report, trained, cache, tmp_path):
    done = export(trained, tmp_path / "out")
    assert "logits and proposals equal" in done["proof"] and "of the cache" in done["proof"]

    again = run(tmp_path / "out", cache=cache, count=5, max_new=12, device="cpu")

    for same in ("target", "cache", "overall", "domains", "samples", "agreement", "teacher_forced"):
        assert getattr(again, same) == getattr(report, same)
    assert again.draft.steps is None


def test_weights_stored_in_bfloat16_are_proven_against_the_rounded_ones(trained, tmp_path):
    copy = with_recipe(trained, tmp_path / "copy", 'dtype = "float32"', 'dtype = "bfloat16"')

    done = export(copy, tmp_path / "out")

    assert done["dtype"] == "bfloat16"
    assert "off float32 by rounding" in done["proof"]


def test_another_target_is_refused_with_both_digests(trained, cache, tmp_path):
    other = save_target(tmp_path / "other", config(num_hidden_layers=5))
    wanted = HiddenCache.open(cache).identity.target.digest
    with pytest.raises(UsageError, match=f"has the digest .* digest {wanted}"):
        run(trained, model=str(other), device="cpu")


def test_a_draft_of_another_target_is_refused(trained, tmp_path):
    export(trained, tmp_path / "out")
    other = save_target(tmp_path / "other", config(num_hidden_layers=8))
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"input_ids": [1, 2]}])
    with pytest.raises(UsageError, match="6 layers, this one has 8"):
        run(tmp_path / "out", model=str(other), prompts=prompts, device="cpu")


def test_a_published_draft_alone_needs_a_cache_or_prompts_and_a_model(trained, tmp_path):
    export(trained, tmp_path / "out")
    with pytest.raises(UsageError, match="pass --cache, or --prompts"):
        run(tmp_path / "out", device="cpu")
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"input_ids": [1, 2]}])
    with pytest.raises(UsageError, match="pass --model"):
        run(tmp_path / "out", prompts=prompts, device="cpu")


def test_an_exported_draft_knows_what_was_held_out_from_it(trained, cache, tmp_path):
    with_recipe(trained, tmp_path / "run", "heldout = 0.05", "heldout = 0.25")
    export(tmp_path / "run", tmp_path / "out")
    known = evaluation.describe_draft(tmp_path / "out")
    flat = json.loads((tmp_path / "out" / "config.json").read_text())

    assert known.heldout == 0.25
    assert flat.pop("trained_on") == {"cache": HiddenCache.open(cache).digest, "heldout": 0.25, "target": "stopping"}
    (tmp_path / "out" / "config.json").write_text(json.dumps(flat))
    assert evaluation.describe_draft(tmp_path / "out").heldout is None, "another trainer's says nothing"
    found = run(tmp_path / "out", cache=cache, count=2, max_new=4, device="cpu")
    assert found.settings.prompts == "held-out samples of the cache", "here the corpus says which"


def test_prompts_may_be_messages_text_or_ids(trained, target, tmp_path):
    messages = [{"role": "user", "content": "red"}]
    rows = [
        {"messages": messages, "domain": "chat"},
        {"messages": [*messages, {"role": "assistant", "content": "blue"}]},
        {"prompt": "one two"},
        {"input_ids": [104, 105]},
        {"input_ids": [7]},
    ]
    path = write_jsonl(tmp_path / "prompts.jsonl", rows)

    asked = evaluation.file_prompts(path, target, 4)

    from tiny import tokenizer

    known = tokenizer()
    chat = known.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert [prompt.ids for prompt in asked] == [chat, chat, known("one two")["input_ids"], [104, 105]]
    assert [prompt.domain for prompt in asked] == ["chat", "", "", ""]
    found = run(trained, prompts=path, count=4, max_new=5, device="cpu")
    assert found.lossless == Lossless(prompts=4, identical=4, near_ties=0, from_file=0)
    assert found.agreement is None


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "2 is no JSON"),
        ("[]", "has none of"),
        ('{"prompt": "a", "input_ids": [1]}', "prompt and input_ids"),
        ('{"input_ids": []}', "no list of token ids"),
        ('{"input_ids": [1, -1]}', "no list of token ids"),
        ('{"input_ids": [true]}', "no list of token ids"),
        ('{"messages": [{"content": "x"}]}', "no list of token ids|cannot render"),
        ('{"messages": "hello"}', "cannot render"),
    ],
)
def test_a_line_that_is_no_prompt_is_named(target, tmp_path, line, message):
    path = write_jsonl(tmp_path / "prompts.jsonl", [{"input_ids": [1]}, line])
    with pytest.raises(DataError, match=message):
        evaluation.file_prompts(path, target, 9)


def test_prompts_that_do_not_fit_the_target_are_refused(trained, tmp_path):
    long = write_jsonl(tmp_path / "long.jsonl", [{"input_ids": [1] * 500}])
    with pytest.raises(UsageError, match=r"500 tokens, 20 new ones and a block of . exceed the target's 512"):
        run(trained, prompts=long, max_new=20, device="cpu")
    foreign = write_jsonl(tmp_path / "foreign.jsonl", [{"input_ids": [264]}])
    with pytest.raises(UsageError, match="token 264 is outside the target's 264"):
        run(trained, prompts=foreign, device="cpu")


def test_nothing_there_is_said_in_one_line(tmp_path):
    with pytest.raises(UsageError, match="no run with a checkpoint"):
        run(tmp_path, device="cpu")


def test_stop_tokens_come_from_the_target_where_there_is_no_cache(target):
    from pipeline.target.loading import load_target

    assert evaluation.stop_tokens(load_target(str(target))) == {STOP}


def test_a_difference_is_a_failed_proof_of_exit_code_1(trained, monkeypatch):
    keep = decode.accept_greedy
    monkeypatch.setattr(decode, "accept_greedy", lambda block, logits_NV: keep(block, logits_NV.roll(1, -1)))
    with pytest.raises(ProofError, match="is not the target's") as failure:
        run(trained, count=1, max_new=4, device="cpu")
    assert failure.value.code == 1


def test_a_prompt_past_what_the_target_s_scaling_holds_for_is_refused(target, monkeypatch):
    from pipeline.target.loading import load_target

    model, prompt = load_target(str(target)), prompts.Prompt([7] * 20, "sql", "prompt 3")
    prompts.check_context_length(model, [prompt], 8, 4)
    scaling = {"rope_type": "longrope", "original_max_position_embeddings": 31}
    monkeypatch.setattr(model.config, "rope_parameters", model.config.rope_parameters | scaling)
    with pytest.raises(UsageError, match=r"prompt 3: 20 tokens, 8 new .* exceed the target's 31, beyond which"):
        prompts.check_context_length(model, [prompt], 8, 4)


def test_the_command_prints_the_report_as_json(trained):
    options = ["evaluate", "--draft", str(trained), "--count", "1", "--max-new", "3", "--device", "cpu", "--json"]
    done = CliRunner().invoke(cli.commands, options)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["lossless"]["identical"] == 1 and found["sampled"] is None
    done = CliRunner().invoke(cli.commands, [*options, "--temperature", "1.5", "--draft-temperature", "0"])
    assert done.exit_code == 0, done.output
    drawn = json.loads(done.stdout)["sampled"]
    assert (drawn["temperature"], drawn["draft_temperature"], drawn["seed"]) == (1.5, 0.0, 0)
    done = CliRunner().invoke(cli.commands, [*options, "--count", "3", "--batch", "2"])
    found = json.loads(done.stdout)
    assert found["settings"]["batch"] == 2 and found["speed"] == {} and found["lossless"]["identical"] == 3
    done = CliRunner().invoke(cli.commands, [*options, "--draft-temperature", "1"])
    assert isinstance(done.exception, UsageError) and "add --temperature" in str(done.exception)
