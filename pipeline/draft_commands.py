"""The commands for a draft that is trained: measured, published, served, compared; and those that help with all others.

Like `cli.py`, which adds them to its own, this imports the stages inside command bodies.
"""

import sys
from pathlib import Path

import click
from click import IntRange, argument, option

from pipeline.command_line import CacheCommand, show
from pipeline.completion import SHELLS, complete_methods, script
from pipeline.errors import UsageError
from pipeline.option_types import DRAFT, EXISTING, FOLDER, PATH, PUBLISHED, REPORT, Choice
from pipeline.options import (
    AS_JSON,
    doctor_options,
    evaluate_options,
    serve_check_options,
    watch_options,
)
from pipeline.visible_text import print_visible, visible


@click.command(cls=CacheCommand)
@evaluate_options
def evaluate(draft, as_json, temperature, draft_temperature, seed, **chosen):
    """Measure a draft's accept length, and prove it lossless.

    Decodes held-out prompts greedily, with target and draft and with the target alone; with --temperature also by
    drawing, reported apart. With --plain the target's own replies are decoded once for all drafts: where the file has
    them they are taken from it, and no speeds are compared. With --batch it is sooner done, and no speeds are measured.
    """
    from pipeline.evaluation.evaluation_table import evaluation_table
    from stages.evaluate.run import SamplingOptions, run

    of_draft = temperature if draft_temperature is None else draft_temperature
    sampling = SamplingOptions(temperature, of_draft, seed) if temperature or of_draft else None
    report = run(draft, sampling=sampling, **chosen)
    show(report.as_dict(), as_json, lambda _: evaluation_table(report))


@click.command(cls=CacheCommand)
@option("--draft", type=DRAFT, required=True, help="A run's folder or a checkpoint.")
@option("--out", type=FOLDER, required=True, help="The folder to write.")
@option(
    "--format",
    "form",
    type=Choice(["sglang", "speculators", "deepspec"]),
    default="sglang",
    help="sglang; speculators, which vLLM reads; deepspec, for its evaluator. What has no method for it is refused.",
)
@AS_JSON
def export(draft, out, form, as_json):
    """Write a draft as serving engines load it, and prove it.

    What was written is opened again and has to compute the same. A probe for `check-export` and a model card go with
    it.
    """
    from pipeline.published.export import export

    done = export(draft, out, form)
    if as_json:
        return show({"folder": str(out), "format": form, **done}, as_json, None)
    print_visible(visible(f"{out}: {done['tensors']} tensors, {done['parameters']:,} parameters, {done['proof']}"))


@click.command("check-export", cls=CacheCommand)
@argument("folder", type=PUBLISHED)
@option("--target-layers", type=IntRange(1), help="The target's depth, where the folder does not say it.")
@option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def check_export(folder, target_layers, as_json):
    """Check a published draft, ours or anyone's, from its files.

    Every tensor that its config.json asks for is there and no other, of the right shape, finite, all ids in range; and
    the logits stored at export come out again by arithmetic that shares no code with the training. Ends with 1 when
    something is wrong, and says what.
    """
    from pipeline.published.check import check_export, checked_table

    show(check_export(folder, target_layers), as_json, checked_table)


@click.command("serve-check", cls=CacheCommand)
@serve_check_options
def serve_check(folder, as_json, **chosen):
    """Serve an export with a real engine, and compare.

    The engine is started on this machine, in an environment of its own, with the target and the draft. Its replies have
    to be those of plain decoding, and each of its calls has to gain what `evaluate` says of the same prompts. Where it
    does not, the states of its draft tell a wrong kernel from a wrong export. Ends with 1 where it does not agree.
    """
    from stages.evaluate.run import run as evaluate
    from stages.serve_check.run import Options, check_agrees, run
    from stages.serve_check.table import serve_table

    report = run(folder, evaluate, Options(**chosen))
    show(report.model_dump(), as_json, lambda _: serve_table(report))
    check_agrees(report)


@click.command(cls=CacheCommand)
@argument("paths", type=EXISTING, nargs=-1, required=True)
@option("--page", type=PATH, metavar="FILE", help="Write an HTML page of it all.  [default: report.html for folders]")
@option("--markdown", is_flag=True, help="Print the table as Markdown.")
@option("--forced", is_flag=True, help="Add the teacher-forced accept lengths.")
@option("--plot", "drawing", type=PATH, metavar="FILE", help="Draw accept length by training steps, too: .svg or .png.")
@option("--against", multiple=True, type=REPORT, help="Compare with this one, prompt by prompt; one a seed.")
@AS_JSON
def report(paths, page, markdown, forced, drawing, against, as_json):
    """Put drafts of one target side by side.

    PATHS are reports of `evaluate --out`, runs, sweeps and caches. Reports make a table: runs that differ only in their
    seed become one column, and one mark of a plot. With --against a draft is a row: how far it is ahead of that
    baseline over the same prompts, and after how many steps it would have reached it. The page shows reports and what
    they are of: training, samples of replies, the cache. It is one file, which needs no network and runs no script.
    """
    reports = [path for path in paths if not path.is_dir()]
    check_report_options(reports, markdown, forced, drawing, against, as_json)
    shown = table_of(reports, markdown, forced, against, as_json) if reports else None
    if drawing:
        from pipeline.evaluation.plot import plot

        plot(reports, drawing)
    if page or len(reports) < len(paths):
        from pipeline.report_page import write_page

        page = page or Path("report.html")
        write_page(paths, page, against, ["pipeline", *sys.argv[1:]])
    if as_json:
        return show(shown | {"page": str(page)} if page else shown, as_json, None)
    if shown is not None:
        print_visible(shown) if markdown else show({}, False, lambda _: shown)
    if page:
        print_visible(f"page: {visible(page)}")


def check_report_options(reports, markdown, forced, drawing, against, as_json) -> None:
    """Refuse options of `report` that do not fit together. UsageError."""
    if not reports and (markdown or forced or drawing or against or as_json):
        raise UsageError("--markdown, --forced, --plot, --against, --json are of reports of `evaluate --out`; name one")
    if against and forced:
        raise UsageError("--forced adds rows to the table of domains, which --against replaces; leave one out")
    if as_json and (markdown or forced):
        raise UsageError("--markdown and --forced are of tables, and --json prints none; leave one out")


def table_of(reports, markdown, forced, against, as_json):
    """Return what `report` prints of evaluations: JSON values, Markdown, or a table for a terminal."""
    from pipeline.evaluation.report_json import report_figures
    from pipeline.evaluation.tables import against_baseline, comparison

    if as_json:
        return report_figures(reports, against)
    return against_baseline(reports, against, markdown) if against else comparison(reports, markdown, forced)


@click.command(cls=CacheCommand)
@doctor_options
def doctor(run, cache, python, target, export, device_memory, as_json):
    """Examine this machine, or a run that does badly.

    Without RUN: what will be used here and why, what is missing and what that costs. RUN is a run's folder, a report of
    `evaluate --out` or a cache: the likely causes of what is seen (little acceptance, slow reading, out of memory) are
    checked in order, and the first that is found is named. Every check has a limit of time. Ends with 1 where something
    hinders, or a cause was found.
    """
    from pipeline.options import size_bytes
    from stages.doctor.run import check_well, examine_machine, examine_run, machine_table, symptoms_table
    from stages.train_draft.planned_memory import fit_on

    if run is None and (target or export or device_memory):
        raise UsageError("--target, --export and --device-memory are compared with a run; name its folder")
    if run is None:
        report, table = examine_machine(cache or Path("hs_cache"), python), machine_table
    else:
        memory = size_bytes(device_memory, "--device-memory") if device_memory else None
        report = examine_run(run, cache=cache, target=target, export=export, memory=memory, fit_on=fit_on)
        table = symptoms_table
    show(report, as_json, table)
    check_well(report)


@click.command(cls=CacheCommand)
@watch_options
def watch(path, every, once, as_json):
    """Show the progress of a run, a sweep or a capture.

    PATH is the folder of a run, of a sweep's runs, or a cache that is being captured; it may come to be there later.
    Call it in another terminal, or on another machine that shares the disk: nothing is written and no lock is taken.
    Ends with 0 once all is finished.
    """
    from stages.watch.run import Watched
    from stages.watch.run import watch as watch_until_finished

    if as_json:
        return show(Watched(path).facts(), as_json, None)
    watch_until_finished(path, every, once)


@click.command(cls=CacheCommand)
@argument("shell", type=Choice(SHELLS))
def completion(shell):
    """Print the script that completes our commands in a shell.

    Commands, options, files, codecs and methods.

    \b
    bash  source <(pipeline completion bash)    in ~/.bashrc
    zsh   source <(pipeline completion zsh)     in ~/.zshrc, behind compinit
    fish  pipeline completion fish | source     in ~/.config/fish/config.fish
    """
    click.echo(script(click.get_current_context().parent.command, shell))


@click.command(cls=CacheCommand)
@option("--out", type=FOLDER, default="quickstart", help="The folder for all of it.")
@option(
    "--methods",
    shell_complete=complete_methods,
    help="Drafts to train, such as dflash,domino.  [default: all]",
)
@AS_JSON
def quickstart(out, methods, as_json):
    """Go the whole way on the bundled target, in minutes.

    Without a GPU or a network: plan, cache, verify, train a draft of each method, evaluate them, and put them side by
    side in a table and on a page. Every command is printed as you would type it. Stop it whenever you like: the same
    command goes on.
    """
    from stages.quickstart.run import run

    run(out, methods, as_json)


DRAFT_COMMANDS = (evaluate, export, check_export, serve_check, report, watch, doctor, quickstart, completion)
