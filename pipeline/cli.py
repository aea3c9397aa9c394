"""The command line: one command a stage, in workflow order.

It imports the stages inside command bodies, so that `--help` is quick and imports no torch.
"""

import contextlib
import json
import sys
from pathlib import Path

import click
from click import Choice, IntRange, argument, option

from pipeline import __version__
from pipeline.command_line import InWorkflowOrder, run_and_exit
from pipeline.errors import CacheError, ProofError, UsageError
from pipeline.options import (
    CACHE,
    DEVICE,
    DEVICE_MAP,
    FOLDER,
    HELP,
    PATH,
    REPORT,
    CodecOption,
    capture_options,
    doctor_options,
    evaluate_options,
    import_options,
    plan_options,
    regenerate_options,
    serve_check_options,
    sweep_options,
    verify_options,
)
from pipeline.visible_text import VisibleConsole, print_visible, visible


@click.group(cls=InWorkflowOrder, context_settings=HELP)
@click.version_option(__version__, prog_name="pipeline")
@option("--debug", is_flag=True, help="Show the whole trace of an error.")
def commands(debug: bool):
    """Train draft models for speculative decoding from a cache of the target's hidden states.

    \b
    pipeline cache-hidden --model Qwen/Qwen3-8B      the target runs once, on the GPU
    pipeline train-draft  --cache ./hs_cache         from the cache alone, as often as you like
    """


@commands.command()
@regenerate_options
def regenerate(template_kwargs, template_date, no_token_ids, as_json, **chosen):
    """Have the target answer a corpus' prompts in its own words.

    Through a server with --endpoint, or decoded here with --model. What the assistant said in CORPUS is replaced, turn
    by turn. Stop it whenever you like: the same command asks only for what has no reply yet, and once all have one it
    asks nothing. It goes on from a journal beside OUT (chats.journal beside chats.jsonl), which may be removed once OUT
    is complete.
    """
    from pipeline.target.files import template_arguments
    from stages.regenerate.prompts import Options
    from stages.regenerate.run import check_failed, run, table

    arguments = template_arguments(template_kwargs, template_date)
    options = Options(**arguments, token_ids=not no_token_ids, **chosen)
    report = run(options)
    show(report, as_json, table)
    check_failed(report, options.out)


@commands.command()
@capture_options
@plan_options
def plan(model, corpus, out, probe, train, device_memory, as_json, **chosen):
    """Tokenise the corpus and price what a capture will hold.

    With --budget it leaves out what nobody reads, chooses a codec, takes a part of the samples, and says so, each only
    as far as it has to. What is captured later keeps to that plan; until then another budget makes another plan.
    """
    from pipeline.options import size_bytes
    from stages.cache_hidden.run import plan, plan_samples, plan_table
    from stages.cache_hidden.settings import CaptureOptions
    from stages.train_draft.planned_memory import PlannedTraining

    size = size_bytes(device_memory, "--device-memory") if device_memory else None
    training = PlannedTraining(train, size)
    report = plan(model, corpus, out, options=CaptureOptions(**chosen), probe=probe, device_bytes=size)
    report |= training.of(report, model, chosen["revision"])
    show(report, as_json, plan_table)
    if not as_json:
        show(report, as_json, plan_samples)
        print_visible(f"next: {visible(report['command'])}")


@commands.command("cache-hidden")
@capture_options
@option("--worker", default=None, metavar="I/N", help="Capture every N-th shard from I on: 0/4, 1/4, 2/4, 3/4.")
@option(
    "--tensor-parallel", type=IntRange(1), default=1, metavar="N", help="Share the target among N ranks of torchrun."
)
@DEVICE_MAP
def cache_hidden(model, corpus, out, **chosen):
    """Run the target once and keep its hidden states.

    Stop it whenever you like: the same command goes on after the last finished shard.

    Several workers share one cache: start the same command with --worker I/N, under torchrun, or as a SLURM array or
    srun step, which say I and N (and by LOCAL_RANK or SLURM_LOCALID, the GPU). Whatever a worker left, a run with any
    other N captures.

    A target larger than one GPU: `torchrun --nproc-per-node N -m pipeline cache-hidden ... --tensor-parallel N` has N
    ranks work as one; one process with --device-map auto has several GPUs, host memory and disk.

    With `--engine vllm --python V/bin/python` a process of vLLM's, in an environment of its own, runs the target. The
    same probe compares what is stored with Hugging Face's states.

    More corpus: the same command with another --corpus and --append. What is there stays as it is, samples that are
    there already are not captured again, and the new ones get every layer the cache has.
    """
    from stages.cache_hidden.run import run
    from stages.cache_hidden.settings import CaptureOptions

    run(model, corpus, out, options=CaptureOptions(**chosen))


@commands.command()
@CACHE
@option("--sample", type=int, help="Show this sample, its supervised tokens coloured.")
@option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def inspect(cache, sample, as_json):
    """Say what a cache is and holds."""
    from pipeline.cache.inspect import cache_table, coloured_sample, describe, sample_view

    if sample is None:
        return show(describe(cache), as_json, cache_table)
    show(sample_view(cache, sample), as_json, lambda view: coloured_sample(cache, view))


@commands.command()
@verify_options
def verify(cache, repair, deep, complete, model, as_json, **where):
    """Check every byte of a cache. Ends with 4 when something is damaged, and names it.

    So it does when columns are lacking in some shards and nobody is capturing them; with --complete also while somebody
    is, and where nothing is captured yet.

    With --repair it captures exactly the damaged columns of the damaged shards again, and what follows from the rest
    it writes again; what is sound is not touched.
    """
    from pipeline.cache.inspect import verify_table
    from stages.cache_hidden.repair import check_incomplete, suggest_repair, verify_and_repair

    report = verify_and_repair(cache, repair, deep, model, **where)
    show(report.as_dict(), as_json, verify_table)
    if report.damaged:
        first, what_to_do = report.damaged[0], suggest_repair(cache, model, repair)
        raise CacheError(f"{cache}: {len(report.damaged)} damaged, the first {first.file} ({first.what}); {what_to_do}")
    check_incomplete(cache, report, model, complete)


@commands.command()
@CACHE
@option("--codec", required=True, cls=CodecOption, help="or such as aux=int8,final=zstd.")
def recode(cache, codec):
    """Write columns of a cache in another codec.

    From the states that are there, without the target. Stop it whenever you like: every shard stays readable, and the
    same command goes on. No training may read CACHE meanwhile.
    """
    from stages.recode.run import run

    run(cache, codec)


@commands.command("import-cache")
@import_options
def import_cache(source, out, **chosen):
    """Import the states that another trainer cached.

    SOURCE is a folder of SpecForge's *.ckpt, of speculators' hs_<i>.safetensors, or DeepSpec's target cache. The target
    computes a few samples again, which shows how layers were counted and whether the last state was normed; what is not
    this target's is refused. The same command goes on after any stop.
    """
    from stages.import_cache.run import run

    run(source, out, **chosen)


@commands.command("train-draft")
@argument("recipe", type=PATH, required=False)
@option("--cache", type=FOLDER, default="hs_cache", help="The cache to train from.")
@option("--set", "sets", multiple=True, metavar="A.B=C", help="Change one field of the recipe.")
@option("--out", type=FOLDER, help="The run's folder.  [default: runs/METHOD-DIGEST]")
@DEVICE
@option("--init-from", type=FOLDER, help="Begin with the weights of this draft: a published one, or a run.")
@option(
    "--shard/--no-shard",
    "sharded",
    default=None,
    help="Under torchrun: divide the draft among the ranks.  [default: where a device does not hold it]",
)
def train_draft(recipe, cache, sets, out, device, init_from, sharded):
    """Train a draft from a cache; the target is never loaded.

    RECIPE is a TOML file that states what differs from the defaults. The same command goes on after any stop.

    On many devices: `torchrun --nproc-per-node 8 -m pipeline train-draft ...`, on one machine or several that share the
    cache and the run's folder. What is trained does not depend on their number, and a run may go on with another one.
    """
    from stages.train_draft.run import run

    run(cache, recipe, sets, out, device, initial_draft(init_from), sharded)


@commands.command()
@sweep_options
def sweep(recipe, as_json, init_from, **chosen):
    """Train every combination of a recipe's lists.

    The lists are those of RECIPE's [sweep] table; the runs follow one another on each device there is, and one table
    ends them. All are checked before the first begins. The same command goes on after any stop; finished runs stay as
    they are.
    """
    from pipeline.evaluation.tables import sweep_table
    from stages.train_draft.sweep import sweep

    with contextlib.redirect_stdout(sys.stderr if as_json else sys.stdout):
        report = sweep(recipe=recipe, init_from=initial_draft(init_from), **chosen)
    show(report, as_json, sweep_table)
    failed = [run for run in report["runs"] if run["failed"]]
    if failed:
        raise ProofError(f"{len(failed)} of {len(report['runs'])} runs failed, the first {failed[0]['run']}")


@commands.command()
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


@commands.command()
@option("--draft", type=PATH, required=True, help="A run's folder or a checkpoint.")
@option("--out", type=FOLDER, required=True, help="The folder to write.")
@option(
    "--format",
    "form",
    type=Choice(["sglang", "speculators", "deepspec"]),
    default="sglang",
    help="sglang; speculators, which vLLM reads; deepspec, for its evaluator. What has no method for it is refused.",
)
def export(draft, out, form):
    """Write a draft as serving engines load it, and prove it.

    What was written is opened again and has to compute the same. A probe for `check-export` and a model card go with
    it.
    """
    from pipeline.published.export import export

    done = export(draft, out, form)
    print_visible(visible(f"{out}: {done['tensors']} tensors, {done['parameters']:,} parameters, {done['proof']}"))


@commands.command("check-export")
@argument("folder", type=PATH)
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


@commands.command("serve-check")
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


@commands.command()
@argument("reports", type=REPORT, nargs=-1, required=True)
@option("--markdown", is_flag=True, help="Print the table as Markdown.")
@option("--forced", is_flag=True, help="Add the teacher-forced accept lengths.")
@option("--plot", "drawing", type=PATH, metavar="FILE", help="Draw accept length by training steps, too: .svg or .png.")
@option("--against", multiple=True, type=REPORT, help="Compare with this one, prompt by prompt; one a seed.")
def report(reports, markdown, forced, drawing, against):
    """Put evaluation reports of one target side by side.

    Runs that differ only in their seed become one column, and one mark of a plot. With --against a draft is a row: how
    far it is ahead of that baseline over the same prompts, and after how many steps it would have reached it.
    """
    from pipeline.evaluation.tables import against_baseline, comparison

    if against and forced:
        raise UsageError("--forced adds rows to the table of domains, which --against replaces; leave one out")
    table = against_baseline(reports, against, markdown) if against else comparison(reports, markdown, forced)
    if drawing:
        from pipeline.evaluation.plot import plot

        plot(reports, drawing)
    print_visible(table) if markdown else VisibleConsole().print(table)


@commands.command()
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


def initial_draft(place):
    """Return the draft that --init-from names, None without one. Training knows of no published form."""
    if place is None:
        return None
    from pipeline.published.init_from import InitialDraft

    return InitialDraft(place)


def show(report: dict, as_json: bool, table) -> None:
    """Print a report as JSON, or as the table that `table(report)` returns."""
    if as_json:
        print_visible(json.dumps(report, indent=2, default=str).replace("\x7f", "\\u007f"))  # JSON does not escape DEL
    else:
        VisibleConsole().print(table(report))


def main(arguments: list[str] | None = None) -> None:
    """Run a command and exit: 0 done, 1 a bug or a failed proof, 2-5 typed errors, 129 / 130 / 143 stopped."""
    run_and_exit(commands, sys.argv[1:] if arguments is None else arguments)
