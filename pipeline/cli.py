"""The command line: one command a stage, in workflow order.

It imports the stages inside command bodies, so that `--help` is quick and imports no torch.
"""

import dataclasses
import os
import sys

import click
from click import IntRange, argument, option

from pipeline import __version__
from pipeline.command_line import InWorkflowOrder, only_json, run_and_exit, show
from pipeline.draft_commands import DRAFT_COMMANDS
from pipeline.errors import CacheError, ProofError
from pipeline.option_types import CACHE_FOLDER, FOLDER, RECIPE, CodecOption
from pipeline.options import (
    AS_JSON,
    CACHE,
    DEVICE,
    DEVICE_MAP,
    HELP,
    SET,
    capture_options,
    import_options,
    plan_options,
    recipe_options,
    regenerate_options,
    sweep_options,
    verify_options,
)
from pipeline.visible_text import print_visible, visible


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
@AS_JSON
def cache_hidden(model, corpus, out, as_json, **chosen):
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

    with only_json(as_json):
        done = run(model, corpus, out, options=CaptureOptions(**chosen))
    if as_json and done is not None:  # a rank that follows another has no figures
        show({"cache": str(out), **dataclasses.asdict(done)}, as_json, None)


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
    """Check every byte of a cache, and name what is damaged.

    Ends with 4 when something is. So it does when columns are lacking in some shards and nobody is capturing them; with
    --complete also while somebody is, and where nothing is captured yet.

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
@AS_JSON
def recode(cache, codec, as_json):
    """Write columns of a cache in another codec.

    From the states that are there, without the target. Stop it whenever you like: every shard stays readable, and the
    same command goes on. No training may read CACHE meanwhile.
    """
    from stages.recode.run import run

    with only_json(as_json):
        done = run(cache, codec)
    if as_json:
        show({"cache": str(cache), **dataclasses.asdict(done)}, as_json, None)


@commands.command("import-cache")
@import_options
def import_cache(source, out, as_json, **chosen):
    """Import the states that another trainer cached.

    SOURCE is a folder of SpecForge's *.ckpt, of speculators' hs_<i>.safetensors, or DeepSpec's target cache. The target
    computes a few samples again, which shows how layers were counted and whether the last state was normed; what is not
    this target's is refused. The same command goes on after any stop.
    """
    from stages.import_cache.run import run

    with only_json(as_json):
        done = run(source, out, **chosen)
    if as_json:
        show({"cache": str(out), **dataclasses.asdict(done)}, as_json, None)


@commands.command("train-draft")
@argument("recipe", type=RECIPE, required=False)
@option("--cache", type=CACHE_FOLDER, default="hs_cache", help="The cache to train from.")
@SET
@option("--out", type=FOLDER, help="The run's folder.  [default: runs/METHOD-DIGEST]")
@DEVICE
@option("--init-from", type=FOLDER, help="Begin with the weights of this draft: a published one, or a run.")
@option(
    "--shard/--no-shard",
    "sharded",
    default=None,
    help="Under torchrun: divide the draft among the ranks.  [default: where a device does not hold it]",
)
@AS_JSON
def train_draft(recipe, cache, sets, out, device, init_from, sharded, as_json):
    """Train a draft from a cache; the target is never loaded.

    RECIPE is a TOML file that states what differs from the defaults, or the name of a bundled one, such as demo. The
    same command goes on after any stop.

    On many devices: `torchrun --nproc-per-node 8 -m pipeline train-draft ...`, on one machine or several that share the
    cache and the run's folder. What is trained does not depend on their number, and a run may go on with another one.
    """
    from stages.train_draft.run import run

    with only_json(as_json):
        done = run(cache, recipe, sets, out, device, initial_draft(init_from), sharded)
    if as_json and os.environ.get("RANK", "0") == "0":  # of all of torchrun's ranks the first prints
        show(done.as_dict(), as_json, None)


@commands.command()
@sweep_options
def sweep(recipe, as_json, init_from, **chosen):
    """Train every combination of lists, or search among them.

    The lists are those of RECIPE's [sweep] table; with search = "optuna" in it runs are chosen by what those before
    gained. They follow one another on each device there is, and one table ends them; sweep.json and sweep.csv in --out
    hold it. A run that fails ends no other. The same command goes on after any stop; finished runs stay as they are.
    """
    from pipeline.evaluation.sweep_table import sweep_table
    from stages.train_draft.sweep import sweep

    with only_json(as_json):
        report = sweep(recipe=recipe, init_from=initial_draft(init_from), **chosen)
    show(report, as_json, sweep_table)
    failed = [run for run in report["runs"] if run["failed"]]
    if failed:
        first = failed[0]
        raise ProofError(
            f"{len(failed)} of {len(report['runs'])} runs failed, the first {first['run']}: {first['failed']}"
        )


@commands.group()
def recipe():
    """Show a recipe completed, or the schema of recipes."""


@recipe.command("show")
@recipe_options
def show_recipe(recipe, sets, cache, as_json):
    """Show a recipe as `train-draft` completes it, and where each value comes from.

    As TOML, which is a recipe again. Without a cache, what it would decide is left open.
    """
    from pipeline.runs.recipe_origins import origins_toml
    from stages.train_draft.show_recipe import show_recipe

    found = show_recipe(recipe, sets, cache)
    if as_json:
        return show(found, as_json, None)
    print_visible(origins_toml(found).rstrip())


@recipe.command("schema")
@option("--sweep", "of_sweep", is_flag=True, help="Of a sweep's recipe, with its [sweep] table.")
def schema(of_sweep):
    """Print the JSON schema of a recipe, for editors.

    The first line of a recipe names the file: `#:schema ./recipe.schema.json`, as in configs/.
    """
    from pipeline.runs.recipe_schema import recipe_schema, sweep_schema

    show(sweep_schema() if of_sweep else recipe_schema(), True, None)


def initial_draft(place):
    """Return the draft that --init-from names, None without one. Training knows of no published form."""
    if place is None:
        return None
    from pipeline.published.init_from import InitialDraft

    return InitialDraft(place)


for command in DRAFT_COMMANDS:
    commands.add_command(command)


def main(arguments: list[str] | None = None) -> None:
    """Run a command and exit: 0 done, 1 a bug or a failed proof, 2-5 typed errors, 129 / 130 / 143 stopped."""
    run_and_exit(commands, sys.argv[1:] if arguments is None else arguments)
