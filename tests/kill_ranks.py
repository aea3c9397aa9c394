"""Kill random ranks of a `train-draft` under torchrun, which restarts it, and compare with a run left alone.

    python tests/kill_ranks.py --kills 20 --ranks 2 --sharded

`metrics.jsonl`, the result and the final weights must be those of an undisturbed run on as many ranks.
`test_ranks.py` runs a short form.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from kill_train import ROOT, Trial

TORCHRUN = ["-m", "torch.distributed.run", "--standalone"]
PATIENCE_S = 120
# The mask token is one that no reply of the tiny target has; two batches are measured, so that ranks share them.
MEASURED = ("--set", "draft.mask_token_id=261", "--set", "train.eval_samples=16")


def workers(launcher: subprocess.Popen) -> dict[int, int]:
    """The processes that torchrun has started and that have not ended, by their rank."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            environment = (folder / "environ").read_bytes().split(b"\0") if parent == launcher.pid else ()
        except OSError:  # it has ended
            continue
        found |= {int(entry[5:]): int(folder.name) for entry in environment if entry.startswith(b"RANK=")}
    return found


class RankTrial(Trial):
    """A `Trial` on several ranks, of which single ones are killed; torchrun restarts them all.

    What a run has printed is in NAME.log. more: further arguments of every command.
    """

    def __init__(self, cache: Path, folder: Path, steps: int, seed: int, ranks: int, more: tuple[str, ...] = (), **own):
        self.ranks, self.more, self.gone = ranks, more, set()
        super().__init__(cache, folder, steps, seed, **own)

    def start(self, name: str, restarts: int = 0, ranks: int | None = None) -> subprocess.Popen:
        arguments = [*self.command[3:], "--set", "train.cells=4", *self.more, "--out", str(self.folder / name)]
        launcher = [sys.executable]
        if (ranks or self.ranks) > 1:
            launcher += [*TORCHRUN, "--nproc-per-node", str(ranks or self.ranks), "--max-restarts", str(restarts)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with open(self.log(name), "ab") as log:
            return subprocess.Popen(
                [*launcher, "-m", "pipeline", *arguments], cwd=ROOT, env=environment, stdout=log, stderr=log
            )

    def finish(self, name: str, ranks: int | None = None) -> None:
        assert self.start(name, ranks=ranks).wait(PATIENCE_S) == 0, self.printed(name)

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def printed(self, name: str) -> str:
        return self.log(name).read_text()

    def kill(self, kills: int) -> list[str]:
        """As `Trial.kill`, one rank at a time; every kill is one restart by torchrun."""
        differing, done, number = [], 0, 0
        while done < kills:
            name, number = f"killed-{number}", number + 1
            launcher = self.start(name, kills)
            while done < kills and self.kill_rank(launcher, name):
                done += 1
            assert launcher.wait(PATIENCE_S) == 0, self.printed(name)
            differing += self.compare(name)
            print(f"{name}: {done} of {kills} kills so far, {differing or 'identical'}", flush=True)
            shutil.rmtree(self.folder / name)
        return differing

    def kill_rank(self, launcher: subprocess.Popen, name: str) -> bool:
        """Kill a random rank at a random moment; False where the run had ended by itself.

        One in four dies while it starts, the others at a line of metrics still to come and up to 0.1 s later.
        """
        starting, there = self.random.random() < 0.25, self.count(name)
        line = min(there + self.random.randint(1, max(1, self.lines // 4)), self.lines)
        while launcher.poll() is None and (len(self.alive(launcher)) < self.ranks or self.count(name) < line):
            if starting and len(self.alive(launcher)) == self.ranks:
                break
            time.sleep(0.005)
        time.sleep(self.random.uniform(0, 3.0 if starting else 0.1))
        alive = self.alive(launcher)
        if len(alive) < self.ranks:
            return False
        self.gone |= set(alive.values())
        os.kill(alive[self.random.randrange(self.ranks)], signal.SIGKILL)
        return True

    def alive(self, launcher: subprocess.Popen) -> dict[int, int]:
        """The ranks' processes since the last kill, by rank."""
        return {rank: process for rank, process in workers(launcher).items() if process not in self.gone}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--sharded", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--method", default="domino")
    chosen = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from rewritten_caches import with_greedy_replies, with_most_held_out
    from tiny import conversations, save_target, write_jsonl

    from stages.cache_hidden.run import run
    from stages.cache_hidden.settings import CaptureOptions

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        target = save_target(folder / "target")
        corpus = write_jsonl(folder / "chats.jsonl", conversations())
        run(str(target), str(corpus), folder / "captured", options=CaptureOptions(layers="1,3,4", max_length=256))
        cache = with_most_held_out(
            with_greedy_replies(folder / "captured", target, folder / "greedy"), folder / "cache"
        )
        more = (*MEASURED, *["--shard"] * chosen.sharded)
        trial = RankTrial(cache, folder, chosen.steps, chosen.seed, chosen.ranks, more, method=chosen.method)
        differing = trial.kill(chosen.kills)
    print(f"{chosen.kills} kills of one of {chosen.ranks} ranks: {differing or 'identical'}")
    sys.exit(bool(differing))


if __name__ == "__main__":
    main()
