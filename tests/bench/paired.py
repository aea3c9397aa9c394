"""Whether a draft learns from recoded states what it learns from the states themselves: `python tests/bench/paired.py`.

The bundled target is captured in bfloat16, and the cache recoded to other codecs; or another cache is copied and
recoded. A recipe, by default the demo's, is trained on each with the same seeds, two runs of one thread at a time; stop
it whenever you like, the same command goes on. Every draft is measured on the raw cache's held-out samples, since that
is what a target gives it in production. A lossless codec, first seed only: the weights, byte for byte. A
lossy one: the ratio of accept lengths of each seed, their mean, Student's interval. A draft reads `final` for
objectives other than ce: `--objective kl`.
"""

import argparse
import os
import shlex
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from pipeline.cache import HiddenCache
from pipeline.cache.codecs import CODECS
from pipeline.evaluation.accept_length import accept_spans, summarise
from pipeline.runs.checkpoint import DRAFT, find_checkpoint, load_config, load_draft
from pipeline.runs.training_data import split_samples, stratified_subset

ROOT = Path(__file__).parents[2]
TARGET = ROOT / "data/tiny-qwen3"
# Student's t, 97.5 %, by degrees of freedom
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=6, choices=range(2, len(T_975) + 2))
    parser.add_argument("--methods", default="dflash,domino")
    parser.add_argument("--codecs", default="zstd,int8,int6")
    parser.add_argument("--objective", help="other than the method's published one")
    parser.add_argument("--steps", type=int, help="of training, other than the demo's")
    parser.add_argument("--prompts", type=int, default=320, help="held-out samples to measure on")
    parser.add_argument("--cache", type=Path, help="a raw cache to copy, instead of the bundled target's")
    parser.add_argument("--recipe", type=Path, default=ROOT / "configs/demo.toml")
    parser.add_argument("--more", default="", help="further options of train-draft, as in a shell")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time, of one thread each")
    parser.add_argument("--out", type=Path, default=ROOT / "build/paired")
    asked = parser.parse_args()
    methods, codecs = asked.methods.split(","), asked.codecs.split(",")
    lossy, lossless = ([codec for codec in codecs if CODECS[codec].lossy is kind] for kind in (True, False))
    caches = make_caches(asked.out, codecs, asked.cache)
    runs = [(method, seed, codec) for seed in range(asked.seeds) for codec in ("raw", *lossy) for method in methods]
    first = len(methods) * (1 + len(lossy))
    runs[first:first] = [(method, 0, codec) for codec in lossless for method in methods]
    with ThreadPoolExecutor(asked.jobs) as pool:
        folders = dict(zip(runs, pool.map(lambda run: trained(*run, caches, asked), runs), strict=True))
    store = HiddenCache.open(caches["raw"])
    for method in methods:
        for codec in lossless:
            weights = [(find_checkpoint(folders[method, 0, kind]) / DRAFT).read_bytes() for kind in ("raw", codec)]
            print(
                f"\n{method}, {codec}: the weights are {'equal' if weights[0] == weights[1] else 'NOT EQUAL'} to raw's"
            )
        plain = [accept_len(store, folders[method, seed, "raw"], asked.prompts) for seed in range(asked.seeds)]
        for codec in lossy:
            print()
            ratios = []
            for seed, raw in enumerate(plain):
                found = accept_len(store, folders[method, seed, codec], asked.prompts)
                ratios.append(found / raw)
                says = f"{raw:.3f} from raw, {found:.3f} from {codec}, {ratios[-1]:.4f}"
                print(f"{method}, seed {seed}: accept length {says}")
            mean, half = statistics.mean(ratios), T_975[len(ratios) - 2] * statistics.stdev(ratios) / len(ratios) ** 0.5
            print(
                f"{method}, {codec}: ratio {mean:.4f} [{mean - half:.4f}, {mean + half:.4f}] over {len(ratios)} seeds"
            )


def make_caches(out: Path, codecs: list[str], raw: Path | None) -> dict[str, Path]:
    """Capture once, unless a cache is given, and recode copies; what is finished stays. Returns the caches by codec."""
    caches = {codec: out / codec for codec in ("raw", *codecs)}
    if raw is not None:
        caches["raw"] = raw
    else:
        pipeline("cache-hidden", "--model", str(TARGET), "--dtype", "bfloat16", "--out", str(caches["raw"]))
    for codec in codecs:
        if not caches[codec].exists():
            unfinished = out / f"tmp-{codec}"
            shutil.rmtree(unfinished, ignore_errors=True)
            shutil.copytree(caches["raw"], unfinished)
            pipeline("recode", str(unfinished), "--codec", codec)
            unfinished.rename(caches[codec])
    return caches


def trained(method: str, seed: int, codec: str, caches: dict[str, Path], asked: argparse.Namespace) -> Path:
    """Train a draft, unless that is done; returns its run."""
    objective = f"-{asked.objective}" if asked.objective else ""
    folder = asked.out / f"{method}{objective}-{seed}-{codec}-{asked.steps or 'demo'}"
    sets = [f"draft.method={method}", f"train.seed={seed}"]
    sets += [f"train.steps={asked.steps}"] if asked.steps else []
    sets += [f"draft.objective={asked.objective}"] if asked.objective else []
    options = [part for entry in sets for part in ("--set", entry)]
    options += shlex.split(asked.more)
    pipeline("train-draft", str(asked.recipe.resolve()), *options, "--cache", str(caches[codec]), "--out", str(folder))
    return folder


def pipeline(*command: str) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "pipeline", *command], check=True, cwd=ROOT, env=environment)


def accept_len(store: HiddenCache, run: Path, count: int) -> float:
    """The draft's accept length on at most `count` of the cache's held-out samples."""
    config = load_config(run)
    heldout = split_samples(store, config.mask_token_id, 0.0, config.target_layer_ids).heldout
    draft = load_draft(run, store.head()).eval()
    return summarise(accept_spans(draft, store, stratified_subset(store, heldout, count))[0])["accept_len"]


if __name__ == "__main__":
    main()
