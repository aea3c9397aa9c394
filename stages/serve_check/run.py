"""`pipeline serve-check`: an export served by a real engine on this machine, and compared with `evaluate`.

The engine is a process in an environment of its own. It decodes the prompts greedily with the exported draft; the same
prompts are evaluated here, from the same folder. Replies have to be the target's, and every call has to gain what
`evaluate` says. Where it does not, the draft's own states tell the engine's fault from the export's.
"""

import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import Field

from pipeline.cache.atomic import write_file
from pipeline.cache.manifest import read_canonical
from pipeline.drafts import DRAFTS
from pipeline.engine_process import check_python, find_python
from pipeline.errors import ProofError, UsageError
from pipeline.evaluation.prompts import Prompt
from pipeline.evaluation.reports import Report, load_report
from pipeline.json_files import Count, Number, Record, record_bytes
from pipeline.published import CONFIG, load_draft_folder
from pipeline.published.check import check_export
from pipeline.target.files import max_positions, read_text_config
from pipeline.target.loading import load_target
from pipeline.target.model import head_of
from pipeline.tensors import find_device
from stages.serve_check.compare import compare
from stages.serve_check.draft_states import DraftStates, compare_states
from stages.serve_check.engine_answer import LOG, RESULT, Answer, run_engine
from stages.serve_check.prompts import find_export_target, find_prompts, reply_stops
from stages.serve_check.verdict import Served, failed, judge

ENGINES = {"vllm": Path(__file__).with_name("vllm_script.py")}
FORM = {"vllm": "speculators"}  # an engine serves the methods that have a form of its own
AS_IT_IS, MENDED, PLAIN = "as it is", "mended", "plain"
STATES_OF = 8  # prompts whose draft states are compared
EVALUATED_AT_ONCE = 16
WRONG_EXPORT = 0.9  # of the run's accept length


class Evaluated(Record):
    """The same export and prompts by `evaluate`."""

    accept_len: Number
    engine_accept_len: Number | None = Field(description="as vLLM counts")
    calls: Count
    tokens: Count | None
    identical: Count = Field(description="replies identical to plain decoding here")


class AsTrained(Record):
    """The export against the run that it was exported from, over the prompts of both reports."""

    prompts: Count
    equal: Count = Field(description="prompts whose every call gains the same")
    accept_len: Number
    accept_len_run: Number


class ServeReport(Record):
    """What `serve-check` found."""

    draft: str
    method: str
    form: str
    target: str
    prompts: Count
    source: str = Field(description="of the prompts")
    max_new: Count
    evaluated: Evaluated
    as_trained: AsTrained | None = Field(None, description="where a report of the exported run is given")
    served: list[Served] = Field(description="the engine as it is, and mended where that was asked for")

    @property
    def agrees(self) -> bool:
        return self.served[-1].agrees


@dataclass(frozen=True)
class Options:
    """What is served, how, and with which prompts."""

    engine: str = "vllm"
    python: Path | None = None  # of the engine's environment. None: the one of `make engines`, else this one
    model: str | None = None  # None: the target that the export names
    data: Path | None = None  # JSONL of prompts. None: the bundled target's held-out chats
    count: int = 64
    max_new: int = 64
    mend: bool = False  # serve a second time, with the engine's known faults mended in its process
    timeout: float = 600.0  # seconds without progress
    logs: Path | None = None  # keep the engine's logs here. None: only those of an engine that fails
    report: Path | None = None  # of `evaluate` on the run that was exported: is the export what was trained?
    out: Path | None = None
    device: str | None = None  # of `evaluate`


def run(folder: Path, evaluate: Callable[..., Report], options: Options, script: Path | None = None) -> ServeReport:
    """Serve the export in `folder`, compare, and return the report, written to `options.out` too.

    evaluate: the stage of that name. script: another than the engine's own, which speaks the same protocol.
    UsageError for an export, target or Python that is not there or does not fit, ProofError for damaged exports and
    for engines that crash. That an engine gains otherwise is no exception here: `check_agrees`.
    """
    folder = Path(folder)
    if options.out is not None and options.out.is_dir():
        raise UsageError(f"--out {options.out} is a folder; name a file in it, such as {options.out / 'served.json'}")
    facts = check_folder(folder, options.engine)
    target, name = find_export_target(folder, options.model)
    python = find_python(options.python)
    if script is None:
        check_python(python, options.engine)
    with work_folder(options.logs) as work:
        prompts, source = find_prompts(options.data, target, options.count, work)
        print(f"evaluate: {len(prompts)} prompts, {source}", file=sys.stderr)
        check = Check(folder, facts, target, python, options, script or ENGINES[options.engine], work, prompts)
        trained = None if options.report is None else load_report(options.report)
        report, plain = check.evaluated(evaluate)
        as_trained = None if trained is None else compare_with_run(report, trained, options.report)
        served = [check.served(title, report, plain) for title in (AS_IT_IS, MENDED)[: 1 + options.mend]]
    overall = report.overall
    found = ServeReport(
        draft=str(folder),
        method=facts["method"],
        form=facts["form"],
        target=name,
        prompts=len(prompts),
        source=source,
        max_new=options.max_new,
        evaluated=Evaluated(
            accept_len=overall.accept_len,
            engine_accept_len=overall.engine_accept_len,
            calls=overall.calls,
            tokens=overall.tokens,
            identical=report.lossless.identical,
        ),
        as_trained=as_trained,
        served=served,
    )
    if options.out is not None:
        write_file(options.out, record_bytes(found.model_dump()))
    return found


def compare_with_run(report: Report, trained: Report, path: Path) -> AsTrained:
    """Compare the export's evaluation with that of the run it is from, before an engine is started.

    UsageError where they share no prompt, ProofError for an export that accepts less than WRONG_EXPORT of the run's:
    rounding to the stored type takes no such share.
    """
    if trained.settings.max_new != report.settings.max_new:
        raise UsageError(
            f"--report {path} is of {trained.settings.max_new} tokens a reply, this check of "
            f"{report.settings.max_new}; pass --max-new {trained.settings.max_new}"
        )
    known = {sample.prompt: sample.lengths for sample in trained.samples}
    pairs = [(sample.lengths, known[sample.prompt]) for sample in report.samples if known.get(sample.prompt)]
    if not pairs:
        raise UsageError(
            f"--report {path} has none of the prompts that are served; pass them to both as --data, --prompts"
        )
    export, run = (sum(map(sum, lengths)) / sum(map(len, lengths)) for lengths in zip(*pairs, strict=True))
    equal = sum(ours == theirs for ours, theirs in pairs)
    if export < WRONG_EXPORT * run:
        raise ProofError(
            f"the export is wrong, whatever serves it: over {len(pairs)} prompts its accept length is {export:.3f} "
            f"where the run of --report {path} has {run:.3f}; export it again"
        )
    return AsTrained(prompts=len(pairs), equal=equal, accept_len=export, accept_len_run=run)


def check_folder(folder: Path, engine: str) -> dict:
    """Return the facts of a sound export that the engine has a method for. UsageError, ProofError."""
    if not (folder / CONFIG).is_file():
        raise UsageError(f"{folder} is no export: it has no {CONFIG}; name a folder that `pipeline export` wrote")
    facts = check_export(folder)
    served = {name: draft.title for name, draft in DRAFTS.items() if FORM[engine] in draft.forms}
    if facts["method"] not in served:
        known = " and ".join(served.values())
        raise UsageError(
            f"{folder} is a {facts['method']} draft, and {engine} has a method for {known} only; serve it where its "
            "card says"
        )
    return facts


def check_agrees(report: ServeReport) -> None:
    """Raise ProofError unless the engine, mended where that was asked for, serves what `evaluate` measured."""
    last = report.served[-1]
    if not last.agrees:
        raise ProofError(f"{report.draft}: {last.verdict}{last.failure and ': ' + last.failure}")


@contextmanager
def work_folder(kept: Path | None) -> Iterator[Path]:
    """Yield the folder of the engine's requests, results and logs: one that is kept, or a temporary one, which is only
    kept where an engine crashed, since errors name its log."""
    if kept is not None:
        kept.mkdir(parents=True, exist_ok=True)
        yield kept
        return
    work, interrupted = Path(tempfile.mkdtemp(prefix="serve-check-")), False
    try:
        yield work
    except (KeyboardInterrupt, SystemExit):
        interrupted = True
        raise
    finally:
        crashed = [log for log in work.rglob(LOG) if not log.with_name(RESULT).is_file()]
        if interrupted or not crashed:
            shutil.rmtree(work, ignore_errors=True)


@dataclass(frozen=True)
class Check:
    """One export, one engine and one set of prompts."""

    folder: Path
    facts: dict  # of `check_export`
    target: Path
    python: Path
    options: Options
    script: Path
    work: Path
    prompts: list[Prompt]

    def evaluated(self, evaluate: Callable[..., Report]) -> tuple[Report, list[list[int]]]:
        """Return the report of `evaluate` on the same prompts, and the plain replies that it compared with."""
        lines = (json.dumps({"input_ids": prompt.ids, "domain": prompt.domain}) for prompt in self.prompts)
        asked, replies = self.work / "prompts.jsonl", self.work / "plain.json"
        asked.write_text("".join(f"{line}\n" for line in lines))
        replies.unlink(missing_ok=True)  # of an earlier check in this folder, perhaps with other settings
        report = evaluate(
            self.folder,
            model=str(self.target),
            prompts=asked,
            count=len(self.prompts),
            max_new=self.options.max_new,
            device=self.options.device,
            plain=replies,
            batch=EVALUATED_AT_ONCE,
        )
        stored = read_canonical(replies)["plain_replies"]
        return report, [stored[sample.prompt] for sample in report.samples]

    def served(self, title: str, report: Report, plain: list[list[int]]) -> Served:
        """Start the engine, as it is or mended, and return what it gained.

        An engine that fails as it is, is reported where a mended one follows. ProofError, RoomError, UsageError.
        """
        try:
            answer = self.answer(title, report)
        except ProofError as error:
            if title == MENDED or not self.options.mend:
                raise
            return failed(title, str(error))
        comparison = compare(answer.replies, answer.totals, report.samples, plain, self.options.max_new)
        own = None
        if not comparison.lossless:
            own = sum(
                with_draft["ids"] == without["ids"]
                for with_draft, without in zip(answer.replies, self.answer(PLAIN, report).replies, strict=True)
            )
        states = self.states(answer, report.settings.dtype)
        agrees, verdict = judge(comparison, states, answer.states_missing, own)
        return Served(
            title=title,
            engine=answer.engine,
            mends=answer.mends,
            comparison=comparison,
            plain_identical=own,
            states=states,
            states_missing=answer.states_missing,
            agrees=agrees,
            verdict=verdict,
        )

    def answer(self, title: str, report: Report) -> Answer:
        """Run the engine's process. ProofError, RoomError, UsageError."""
        longest, _ = max_positions(read_text_config(self.target))
        request = {
            "target": str(self.target.resolve()),
            "draft": None if title == PLAIN else str(self.folder.resolve()),
            "method": self.facts["method"],
            "proposals": self.facts["proposals"],
            "prompts": [prompt.ids for prompt in self.prompts],
            "max_new": self.options.max_new,
            "stops": reply_stops(self.target),
            "dtype": report.settings.dtype,
            "positions": longest,
            "mend": title == MENDED,
            "states": min(STATES_OF, len(self.prompts)),
        }
        folder = self.work / title.replace(" ", "-")
        return run_engine(self.python, self.script, request, folder, self.options.timeout, f"engine {title}")

    def states(self, answer: Answer, dtype: str) -> DraftStates | None:
        """Compare the states that the engine recorded with ours, None where it recorded none."""
        if answer.states is None:
            return None
        target = load_target(str(self.target), device=find_device(self.options.device), dtype=getattr(torch, dtype))
        depth = target.config.get_text_config().num_hidden_layers
        draft = load_draft_folder(self.folder, head_of(target), target.device, depth).to(target.dtype)
        prompts = [prompt.ids for prompt in self.prompts[: len(answer.recorded)]]
        return compare_states(answer.states, target, draft, prompts, answer.recorded)
