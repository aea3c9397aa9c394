"""The page of `pipeline report --page`: its figures are those of the files, and no name and no reply can act."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from reports import evaluation
from tiny import conversations, save_target, write_jsonl

from pipeline.cache import HiddenCache
from pipeline.cli import main
from pipeline.errors import CacheError, UsageError
from pipeline.evaluation.reports import load_report, report_bytes
from pipeline.report_page import write_page
from pipeline.report_page.coloured_replies import replies
from pipeline.report_page.contents import Run, find_contents
from pipeline.report_page.draft_charts import by_domain, compared, of_reports
from pipeline.runs.folder import read_result, read_run, write_run
from pipeline.runs.sweep_record import SweepRecord, write_sweep
from pipeline.visible_text import visible_lines

CANARIES = [
    "<script>document.title='canary'</script>",
    '"><img src=x onerror="document.title=\'canary\'">',
    "</style></title><script>document.title='canary'</script>",
    "'onmouseover=document.title='canary'//",
    "{{ 7 * 191 }} ]]>--></text><script>document.title='canary'</script>",
]
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NO_NETWORK = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND",
]  # fmt: skip
EMPTY = ("meta", "br", "hr", "img", "link", "input")  # elements without an end


class Page(HTMLParser):
    """A page's elements, as (name, attributes), and its text."""

    def __init__(self, path: Path):
        super().__init__()
        self.source, self.elements, self.text, self.open = path.read_text(), [], "", []
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, (tag, self.open)

    def handle_data(self, data):
        self.text += data


def run_all(*commands) -> None:
    for words in commands:
        try:
            main([*map(str, words)])
        except SystemExit as stop:
            assert not stop.code, words


def training(cache, out, **sets) -> list:
    stated = {
        "train.batch": 4,
        "train.anchors": 6,
        "draft.block_size": 4,
        "train.steps": 2,
        "train.eval_every": 1,
    } | sets
    return ["train-draft", "--cache", cache, "--out", out, "--device", "cpu"] + [
        word for key, value in stated.items() for word in ("--set", f"{key}={value}")
    ]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A page whose target, domains, texts and folders are canaries."""
    folder = tmp_path_factory.mktemp("hostile")
    rows = conversations()
    for at, row in enumerate(rows):
        row |= {"domain": CANARIES[at % len(CANARIES)], "split": "heldout" if at % 3 == 0 else "train"}
        row["messages"][0]["content"] += CANARIES[at % len(CANARIES)]
    target = save_target(folder / "<img src=x onerror=alert(1)>")
    corpus, cache, run = write_jsonl(folder / "<b>.jsonl", rows), folder / "<i>cache", folder / "<u>run"
    report, page = folder / "report.json", folder / "page.html"
    run_all(
        ["cache-hidden", "--model", target, "--corpus", corpus, "--out", cache, "--layers", "1,3"],
        training(cache, run, **{"draft.method": "dflash"}),
        ["evaluate", "--draft", run, "--count", "8", "--max-new", "6", "--temperature", "1", "--out", report],
        ["report", report, "--page", page],
    )
    return page


@pytest.fixture(scope="module")
def trained(greedy_cache, tmp_path_factory):
    """The folders of two runs on replies of the target's own, so that accept lengths are measured."""
    folder, cache = tmp_path_factory.mktemp("trained"), HiddenCache.open(greedy_cache)
    said = {int(token) for number in range(len(cache)) for token in cache.tokens_of(number)[0]}
    mask = max({*range(cache.target_config["vocab_size"])} - said)
    for method in ("dflash", "domino"):
        sets = {"draft.method": method, "draft.mask_token_id": mask}
        run_all(training(greedy_cache, folder / method, **sets))
    return [folder / "dflash", folder / "domino"]


def test_no_name_and_no_reply_makes_markup(hostile):
    page = Page(hostile)
    assert page.open == [], "every element ends"
    names = {name for name, _ in page.elements}
    assert not names & {"script", "img", "iframe", "object", "link", "form", "foreignobject", "b", "i", "u"}
    attributes = {key for _, given in page.elements for key in given}
    assert not {key for key in attributes if key.startswith("on")} | (attributes & {"src", "srcset", "xlink:href"})
    assert all(given["href"].startswith("#") for name, given in page.elements if name == "a")
    (policy,) = (given["content"] for _, given in page.elements if "Content-Security" in given.get("http-equiv", ""))
    assert policy.startswith("default-src 'none'") and "script" not in policy
    for canary in CANARIES:
        assert canary in page.text
    assert "1337" not in page.text, "no template in a name is filled in"
    assert "url(http" not in page.source and "@import" not in page.source
    ids = [given["id"] for _, given in page.elements if "id" in given]
    assert len(ids) == len(set(ids))


@pytest.mark.skipif(BROWSER is None, reason="no Chromium to open the page in")
def test_no_canary_acts_in_a_browser(hostile, tmp_path):
    """The page as the browser has it once it is loaded; then that this browser would have let a canary act."""

    def title(path: Path) -> str:
        command = [BROWSER, *NO_NETWORK, f"--user-data-dir={tmp_path / path.stem}", "--dump-dom", path.as_uri()]
        shown = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
        return re.search(r"<title>(.*?)</title>", shown, re.DOTALL)[1]

    assert title(hostile) == "Drafts for &lt;img src=x onerror=alert(1)&gt;"
    bare = tmp_path / "bare.html"
    bare.write_text(f"<!DOCTYPE html><html><head><title>x</title></head><body>{CANARIES[0]}</body></html>")
    assert title(bare) == "canary"


def test_a_page_has_the_figures_of_its_reports(hostile):
    page, report = Page(hostile), load_report(hostile.parent / "report.json")
    (draft,) = of_reports([report])["greedy"]
    value, low, high = draft.total
    assert value == pytest.approx(report.overall.accept_len)
    assert f"{value:.2f} [{low:.2f}, {high:.2f}]" in page.text
    assert [share for share, *_ in draft.slots] == pytest.approx(report.overall.per_slot)
    assert all(low <= share <= high for share, low, high in draft.slots)
    assert len(report.replies) == min(12, len(report.samples))
    assert "Sample replies" in page.text and "Training" in page.text and "Cache" in page.text, "of the draft's run"


def test_a_reply_is_shown_call_by_call(hostile):
    report = load_report(hostile.parent / "report.json")
    for reply, kept in zip(replies(report, 100), report.replies, strict=True):
        sample = report.samples[kept.sample]
        prefill, *calls = reply.calls
        assert [token.kind for token in prefill.tokens] == ["first"]
        assert sum(len(call.tokens) for call in calls) == len(kept.tokens) - 1
        assert sum(sample.lengths[: len(calls)]) >= len(kept.tokens) - 1, "what the limit cut off has no call"
        for call, length, matched in zip(calls, sample.lengths, sample.matched, strict=False):
            proposals = [token for token in call.tokens if token.slot]
            assert [token.slot for token in proposals] == [*range(1, min(len(call.tokens), matched) + 1)]
            assert len(call.tokens) <= length and (len(call.tokens) - len(proposals)) in (0, 1)
        shown = [token.text for call in reply.calls for token in call.tokens]
        assert shown == [visible_lines(text) for text in kept.tokens]


def test_runs_are_shown_with_their_recipe_cache_and_accept_lengths(trained, tmp_path):
    write_page(trained, tmp_path / "page.html")
    page = Page(tmp_path / "page.html")
    for run in trained:
        result = read_result(run)
        assert f"{result.accept_len:.2f} [" in page.text and f"{result.parameters:,}" in page.text
        assert (run / "recipe.toml").read_text().strip() in page.text
    for title in ("Accept length by optimiser steps", "by hours", "Where the time went", "Lambda, the weight"):
        assert title in page.text
    assert "dflash: loss and its terms" in page.text and "probe error" in page.text
    assert len(page.source) < 3 << 20


def test_hours_go_on_over_a_restart(trained, tmp_path):
    run = shutil.copytree(trained[0], tmp_path / "run")
    starts = ((5, 0, 100.0), (10, 0, 200.0), (15, 10, 50.0), (20, 10, 90.0))
    lines = [{"step": step, "since": since, "seconds": seconds} for step, since, seconds in starts]
    (run / "timing.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    hours = Run(run, "run").hours_after
    assert [hours(step) for step in (5, 10, 15, 20)] == pytest.approx([100 / 3600, 200 / 3600, 250 / 3600, 290 / 3600])
    assert hours(21) is None


def test_a_sweep_is_shown_with_its_settings(trained, tmp_path):
    runs = [
        {
            "setting": {"draft.method": run.name, "train.seed": 0}, "run": str(run), "state": "finished", "steps": 2,
            "parameters": 9, "accept_len": length, "interval": [length - 0.1, length + 0.1], "calls": 9, "failed": None,
            "data": "abcdef0123", "heldout": "00", "seconds": 12.0,
        }
        for run, length in zip(trained, (1.25, 1.5), strict=True)
    ]  # fmt: skip
    pooled = [
        {"setting": {"draft.method": run["setting"]["draft.method"]}, "runs": 1, "measured": 1}
        | {"accept_len": run["accept_len"], "interval": run["interval"], "seeds": [run["accept_len"]]}
        for run in reversed(runs)
    ]
    runs.append(runs[0] | {"state": "failed", "failed": "<b>loss is not finite", "run": "gone", "accept_len": None})
    ratio = {
        "setting": pooled[1]["setting"], "to": pooled[0]["setting"], "differs": ["draft.method"], "value": 0.833,
        "interval": [0.8, 0.9], "by_seed": [0.833], "replies": 7, "same_data": True,
    }  # fmt: skip
    facts = {
        "version": "1", "command": ["pipeline", "sweep", "a b"], "cache": "c", "cache_digest": "d", "target": "tiny",
        "recipe": "sweep.toml", "init_from": None, "search": None, "runs": runs, "pooled": pooled, "ratios": [ratio],
        "warnings": ["<i>other samples"],
    }  # fmt: skip
    write_sweep(tmp_path, SweepRecord.model_validate(facts))
    write_page([tmp_path], tmp_path / "page.html")
    page = Page(tmp_path / "page.html")
    for text in ("1.50 [1.40, 1.60]", "0.833 [0.800, 0.900]", "failed: <b>loss is not finite", "<i>other samples"):
        assert text in page.text
    assert "pipeline sweep 'a b'" in page.text and "Where the time went" in page.text


def test_what_is_nothing_of_ours_and_damage_are_refused(trained, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="is none of evaluation reports, runs, sweeps and caches"):
        find_contents([tmp_path / "empty"])
    with pytest.raises(UsageError, match="is a folder; name a file in it"):
        write_page(trained, tmp_path)
    run = shutil.copytree(trained[0], tmp_path / "run")
    log = run / "metrics.jsonl"
    log.write_bytes(log.read_bytes().replace(b'"loss": ', b'"loss": 1', 1))
    with pytest.raises(CacheError, match=r"metrics\.jsonl: damaged"):
        write_page([run], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_the_command_says_where_the_page_is(trained, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    report = evaluation(tmp_path / "a.json", samples=[("a", [3, 4]), ("b", [1, 2])])
    run_all(["report", trained[0]])
    assert capfd.readouterr().out == "page: report.html\n" and Page(tmp_path / "report.html").open == []
    run_all(["report", report, "--page", "made/here.html", "--json"])
    found = json.loads(capfd.readouterr().out)
    assert found["page"] == "made/here.html" and found["drafts"][0]["greedy"]["accept_length"] == 2.5
    with pytest.raises(SystemExit, match="2"):
        main(["report", str(trained[0]), "--json"])


def test_a_page_never_replaces_a_file_that_is_none(tmp_path, capfd):
    """The word behind --page may be meant as a report to read."""
    first, second = (evaluation(tmp_path / f"{name}.json", samples=[("a", [3, 4])], method=name) for name in ("x", "y"))
    before = first.read_bytes()
    with pytest.raises(SystemExit, match="2"):
        main(["report", "--page", str(first), str(second)])
    assert first.read_bytes() == before and "is no page of ours" in capfd.readouterr().err
    for _ in range(2):
        run_all(["report", first, "--page", tmp_path / "page.html"])


def drafts(tmp_path, **changes) -> list:
    """Return the reports of two drafts of one name, told apart by their recipes."""
    made = [
        evaluation(tmp_path / f"{name}.json", samples=samples, path=f"runs/{name}", recipe=name, **changes)
        for name, samples in (("a", [("d", [4, 4]), ("e", [2])]), ("b", [("d", [2, 2]), ("e", [2])]))
    ]
    return [load_report(path) for path in made]


def test_a_baseline_is_its_reports_and_not_its_name(tmp_path):
    one, other = drafts(tmp_path)
    chart = compared("pairs", [one, other])
    assert [row[0] for row in chart.rows] == ["domino, 700 steps (b)"] and "(a)" in chart.title
    chart = compared("pairs", [one], [other])
    ((name, ratio, _),) = chart.rows
    assert name == "domino, 700 steps (a)" and ratio.startswith("1.667 [")
    assert compared("pairs", [one]) is None


def test_a_domain_called_as_the_total_does_not_replace_it(tmp_path):
    samples = [("all", [1, 1]), ("\x1bx", [5, 5]), ("\\x1bx", [3, 3]), ("", [3, 3])]
    (draft,) = of_reports([load_report(evaluation(tmp_path / "a.json", samples=samples))])["greedy"]
    assert draft.total[0] == 3.0
    rows = {row[0]: row[1] for row in by_domain("x", [draft], "greedy").rows}
    assert len(rows) == 5 and rows["all"].startswith("3.00") and rows["all*"].startswith("1.00")
    assert {rows["\\x1bx"][0], rows["\\x1bx*"][0]} == {"5", "3"}


def test_many_domains_and_long_replies_leave_the_page_small(tmp_path):
    samples = [(f"source {number}", [2] * 400) for number in range(1500)]
    path = evaluation(tmp_path / "a.json", samples=samples)
    report = json.loads(path.read_text())
    for sample in report["samples"][:12]:
        sample |= {"matched": [1] * 400, "proposed": [7] * 400}
    report["replies"] = [{"sample": at, "prompt": "p" * 600, "tokens": ["word"] * 801} for at in range(12)]
    paths = []
    for method in ("dflash", "domino", "dspark", "w", "x", "y", "z"):
        report["draft"]["method"] = method
        paths.append(tmp_path / f"{method}.json")
        paths[-1].write_text(json.dumps(report))
    write_page(paths, tmp_path / "page.html")
    page = Page(tmp_path / "page.html")
    assert len(page.source) < 3 << 20
    assert "of 1500 domains with the most target calls" in page.text and "the first" in page.text


def test_a_name_that_no_xml_may_hold_is_drawn(tmp_path):
    path = evaluation(tmp_path / "a.json", samples=[("a\uffffb\ufffe", [3, 4]), ("c", [1])])
    write_page([path], tmp_path / "page.html")
    assert "a\\uffffb\\ufffe" in Page(tmp_path / "page.html").text


def test_a_reply_of_no_sample_makes_no_report(tmp_path):
    path = evaluation(tmp_path / "a.json", samples=[("a", [3])])
    report = json.loads(path.read_text()) | {"replies": [{"sample": 7, "prompt": "", "tokens": ["x"]}]}
    path.write_text(json.dumps(report))
    with pytest.raises(UsageError, match="is no report"):
        load_report(path)


def test_runs_are_told_apart_and_what_cannot_be_compared_is_said(trained, tmp_path):
    copy = shutil.copytree(trained[0], tmp_path / "dflash")
    (tmp_path / "twice").mkdir()
    names = [run.name for run in find_contents([trained[0], copy]).runs]
    assert len(set(names)) == 2 and all(name.startswith("dflash (") for name in names)
    record = read_run(copy)
    other = record.model_copy(update={"cache": record.cache.model_copy(update={"digest": "f" * 32})})
    write_run(copy, other, (copy / "recipe.toml").read_text())
    (warning,) = find_contents([trained[0], copy]).warnings
    assert "2 different caches" in warning
    write_run(copy, record.model_copy(update={"target": "another"}), (copy / "recipe.toml").read_text())
    with pytest.raises(UsageError, match="of several targets"):
        find_contents([trained[0], copy])


def test_a_report_leads_to_its_own_run_only(hostile, tmp_path):
    report = load_report(hostile.parent / "report.json")
    assert len(find_contents([hostile.parent / "report.json"]).runs) == 1
    changed = report.model_copy(update={"draft": report.draft.model_copy(update={"recipe": "another"})})
    (tmp_path / "a.json").write_bytes(report_bytes(changed.as_dict()))
    assert find_contents([tmp_path / "a.json"]).runs == []


def test_a_followed_cache_that_is_damaged_is_left_out_with_a_warning(trained, greedy_cache, tmp_path):
    cache = shutil.copytree(greedy_cache, tmp_path / "cache")
    run = shutil.copytree(trained[0], tmp_path / "run")
    record = read_run(run)
    moved = record.model_copy(update={"cache": record.cache.model_copy(update={"path": str(cache)})})
    write_run(run, moved, (run / "recipe.toml").read_text())
    manifest = next(cache.glob("shards/*/final.json"))
    manifest.write_bytes(manifest.read_bytes().replace(b'"rows"', b'"sows"'))
    write_page([run], tmp_path / "page.html")
    assert f"the cache {cache} is left out" in Page(tmp_path / "page.html").text
    with pytest.raises(CacheError):
        write_page([cache], tmp_path / "page.html")


def test_a_report_keeps_as_many_texts_as_were_asked_for(hostile, tmp_path):
    run = hostile.parent / "<u>run"
    for count in (0, 1):
        out = tmp_path / f"{count}.json"
        run_all(["evaluate", "--draft", run, "--count", 3, "--max-new", 4, "--texts", count, "--out", out])
        assert len(load_report(out).replies) == count
