"""How much sooner `pipeline regenerate --model` is done than a plain loop of `transformers.generate`.

    python tests/bench/regenerate.py                  the bundled target, 96 of its prompts, on the CPU
    python tests/bench/regenerate.py --rounds 1 --prompts 8      to see that it runs

Both answer the same first turns greedily, one thread, loading left out. A round runs one after the other, and which
comes first alternates; the ratio is that of CPU seconds, which other programs on the machine disturb least, and the
median of the rounds is what counts. Both have to write the same tokens; how many prompts differ, by a tie, is shown.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from pipeline.target.files import TEMPLATE_DATE, find_target
from stages.regenerate.local_engine import LocalEngine
from stages.regenerate.prompts import Job, Options, Renderer, read_prompts

DATA = Path(__file__).parents[2] / "data"


def first_turns(corpus: Path, count: int, folder: Path) -> Path:
    """Write the first user message of each of so many rows, from all over the corpus."""
    lines = corpus.read_text().splitlines()
    chosen = lines[:: max(len(lines) // count, 1)][:count]
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps({"messages": json.loads(line)["messages"][:1]}) + "\n" for line in chosen))
    return path


def ours(engine: LocalEngine, options: Options, renderer: Renderer) -> dict[str, list[int]]:
    """Answer all prompts in batches."""
    found = {}

    def on_reply(job, reply):
        job.replies.append(reply)
        found[job.row.key] = reply.token_ids

    engine.ask((Job(row) for row in read_prompts(options.corpus)), renderer, on_reply, print)
    return found


@torch.inference_mode()
def plain(engine: LocalEngine, options: Options, renderer: Renderer) -> dict[str, list[int]]:
    """Answer all prompts one by one."""
    found = {}
    for row in read_prompts(options.corpus):
        ids_1T = torch.tensor([renderer.prompt_ids(Job(row).messages(), None, None)])
        out = engine.target.generate(
            ids_1T, attention_mask=torch.ones_like(ids_1T), max_new_tokens=options.max_new, do_sample=False
        )
        found[row.key] = out[0, ids_1T.shape[1] :].tolist()
    return found


def timed(work, *args) -> tuple[float, dict[str, list[int]]]:
    start = time.process_time()
    found = work(*args)
    return time.process_time() - start, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(DATA / "tiny-qwen3"))
    parser.add_argument("--corpus", type=Path, default=DATA / "chats.jsonl")
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=64)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    ratios = []
    with tempfile.TemporaryDirectory() as place:
        corpus = first_turns(chosen.corpus, chosen.prompts, Path(place))
        options = Options(str(corpus), Path(place) / "out.jsonl", model=chosen.model, max_new=192, batch=chosen.batch)
        folder = find_target(chosen.model)
        engine, renderer = LocalEngine(options, folder), Renderer(folder, {}, TEMPLATE_DATE)
        for number in range(chosen.rounds):
            order = [ours, plain] if number % 2 == 0 else [plain, ours]
            taken = {work: timed(work, engine, options, renderer) for work in order}
            (here, mine), (loop, theirs) = taken[ours], taken[plain]
            differ, tokens = sum(mine[key] != theirs[key] for key in theirs), sum(map(len, mine.values()))
            ratios.append(loop / here)
            print(
                f"round {number + 1}: {len(mine)} prompts, {tokens:,} tokens; regenerate {here:.1f} s, "
                f"generate one by one {loop:.1f} s, ratio {ratios[-1]:.2f}; {differ} differ"
            )
    print(f"regenerate is done {statistics.median(ratios):.2f} times as soon (median of {chosen.rounds})")


if __name__ == "__main__":
    main()
