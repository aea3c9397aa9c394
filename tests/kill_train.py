"""Kill `train-draft` with signal 9 at random moments, let it finish, and compare every byte with a run left alone.

    python tests/kill_train.py --kills 20 --method dspark

`metrics.jsonl`, the result and the final weights must be those of the uninterrupted run. `test_train_draft.py` runs a
short form.
"""

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
COMPARED = ("metrics.jsonl", "recipe.toml", "done.json")


class Trial:
    """One cache, one recipe, an uninterrupted run, and runs that are killed."""

    def __init__(self, cache: Path, folder: Path, steps: int, seed: int, method: str = "domino"):
        self.folder, self.random = Path(folder), random.Random(seed)
        sets = [
            f"draft.method={method}",
            f"train.steps={steps}",
            "train.save_every=2",
            f"train.eval_every={max(2, steps // 3)}",
        ]
        sets += ["train.batch=4", "train.anchors=6", "train.log_every=1", "draft.block_size=4", "train.eval_samples=4"]
        self.command = [sys.executable, "-m", "pipeline", "train-draft", "--device", "cpu", "--cache", str(cache)]
        self.command += [word for entry in sets for word in ("--set", entry)]
        self.finish("straight")
        self.lines = self.count("straight")
        self.last = f"checkpoints/step-{steps:08d}/draft.safetensors"

    def start(self, name: str) -> subprocess.Popen:
        command = [*self.command, "--out", str(self.folder / name)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    def finish(self, name: str) -> None:
        process = self.start(name)
        _, said = process.communicate()
        assert process.returncode == 0, said.decode()

    def count(self, name: str) -> int:
        """Lines of metrics that a run has written."""
        return (_bytes(self.folder / name / COMPARED[0]) or b"").count(b"\n")

    def kill(self, kills: int) -> list[str]:
        """Kill so many processes; return the files that differ from the uninterrupted run's.

        A run that ends before its next kill is compared, and another one is begun.
        """
        differing, done, number = [], 0, 0
        while done < kills:
            name, number = f"killed-{number}", number + 1
            while done < kills and self.kill_once(name):
                done += 1
            self.finish(name)
            differing += self.compare(name)
            print(f"{name}: {done} of {kills} kills so far, {differing or 'identical'}", flush=True)
            shutil.rmtree(self.folder / name)
        return differing

    def kill_once(self, name: str) -> bool:
        """Start a process and kill it at a random moment; False when it had ended by itself.

        One in four dies while it starts, the others at a line of metrics still to come and up to 0.1 s later, so that
        the moments do not depend on how busy the machine is.
        """
        starting, there = self.random.random() < 0.25, self.count(name)
        line = min(there + self.random.randint(1, max(1, self.lines // 4)), self.lines)
        process = self.start(name)
        while not starting and process.poll() is None and self.count(name) < line:
            time.sleep(0.002)
        time.sleep(self.random.uniform(0, 3.0 if starting else 0.1))
        process.kill()
        _, said = process.communicate()
        assert process.returncode in (0, -9), said.decode()
        return process.returncode == -9

    def compare(self, name: str) -> list[str]:
        """Return the files of a run that differ from the uninterrupted one's."""
        one, other = self.folder / "straight", self.folder / name
        return [f"{name}/{file}" for file in (*COMPARED, self.last) if _bytes(one / file) != _bytes(other / file)]


def _bytes(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--method", default="domino")
    chosen = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from tiny import conversations, save_target, write_jsonl

    from stages.cache_hidden.run import run
    from stages.cache_hidden.settings import CaptureOptions

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        target = save_target(folder / "target")
        corpus = write_jsonl(folder / "chats.jsonl", conversations())
        run(str(target), str(corpus), folder / "cache", options=CaptureOptions(layers="1,3,4", max_length=256))
        trial = Trial(folder / "cache", folder, chosen.steps, chosen.seed, chosen.method)
        differing = trial.kill(chosen.kills)
    print(f"{chosen.kills} kills: {differing or 'identical'}")
    sys.exit(bool(differing))


if __name__ == "__main__":
    main()
