"""Whether all is right on this machine's GPU, and how fast: `make gpu-check`, one report to paste.

Ten gates, what is right before what is fast: each prints what it found and what is expected. The bundled target, random
weights where only a shape matters. Without a GPU (`--device cpu`) the gates that need none run all the same.

 1 gru          Domino's GRU under bfloat16 autocast: cosine of its gradients to float32's on the CPU above 0.999
 2 step         one step of every method in float32: loss within 1e-5 and gradients within 1e-3 of the CPU's
 3 bfloat16     the same under autocast: loss within 2e-2
 4 capture      states of the bundled target in float32 within 1e-4 of the CPU's (relative, every column)
 5 determinism  two trainings, the second killed and resumed: the same bytes
 6 late copies  the same with the device kept busy before every step: the same bytes
 7 int8         encoded on the device: the CPU's bytes
 8 memory       with a half and a quarter of the device's memory: the losses within 1e-4
 9 evaluate     speculative and plain decoding of the trained draft give the same replies
10 two GPUs     a capture by two workers, each on its own: the bytes of one
   speed        one step of a five-layer Domino draft of Qwen3-8B, 3,072 rows: seconds, and share of bfloat16's peak
"""

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from torch.nn.functional import cosine_similarity

from pipeline.cache import HiddenCache
from pipeline.cache.codecs import CODECS
from pipeline.cache.codecs.codec import Calibration
from pipeline.drafts import DRAFTS
from pipeline.drafts.domino import PrefixGRU
from stages.cache_hidden.run import run as capture
from stages.cache_hidden.settings import CaptureOptions
from stages.evaluate.run import run as evaluate
from stages.train_draft.kernels import use_deterministic_kernels
from stages.train_draft.run import run as train
from stages.train_draft.step import Trainer
from tests.bench.step import SHAPES, Step

ROOT = Path(__file__).parents[2]
TARGET = str(ROOT / "data/tiny-qwen3")
RECIPE = ("train.steps=24", "train.batch=8", "train.anchors=32", "train.save_every=8", "train.log_every=1")
BF16_PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12, "3090": 71e12}


class Check:
    """The gates, on one device, with a scratch folder of their own."""

    def __init__(self, device: str, folder: Path):
        self.device, self.folder = torch.device(device), folder
        self.on_gpu = self.device.type == "cuda"

    @cached_property
    def corpus(self) -> Path:
        """48 of the bundled chats to train on, and 16 held out."""
        chats = (ROOT / "data/chats.jsonl").read_text().splitlines(keepends=True)
        heldout = [chat for chat in chats if json.loads(chat)["split"] == "heldout"]
        learnt = [chat for chat in chats if json.loads(chat)["split"] != "heldout"]
        path = self.folder / "chats.jsonl"
        path.write_text("".join(learnt[:48] + heldout[:16]))
        return path

    def cache(self, name: str, device: str) -> Path:
        """Capture the chats on a device, unless they are there."""
        out = self.folder / name
        if not out.exists():
            capture(TARGET, str(self.corpus), out, options=CaptureOptions(dtype="float32", device=device))
        return out

    def trained(self, name: str) -> Path:
        """Train a small Domino draft on the device, or resume it; return the run's folder."""
        return train(self.cache("cpu", device="cpu"), None, RECIPE, self.folder / name, str(self.device)).run

    def losses(self, run: Path) -> list[float]:
        return [line["loss"] for line in map(json.loads, (run / "metrics.jsonl").open()) if "loss" in line]

    def weights(self, run: Path) -> bytes:
        return (run / "checkpoints/step-00000024/draft.safetensors").read_bytes()

    def gru(self) -> tuple[bool, str]:
        torch.manual_seed(0)
        gru = PrefixGRU(4096, 1024)
        for weight in gru.parameters():
            torch.nn.init.uniform_(weight, -gru.init_bound, gru.init_bound)
        x_NPD, d_NPH = torch.randn(8, 15, 4096) * 0.03, torch.randn(8, 15, 1024) * 1e-9

        def grads(device, autocast: bool) -> list[torch.Tensor]:
            there = gru.to(device)
            there.zero_grad()
            with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=autocast):
                states_NPH, _ = there(x_NPD.to(device))
            (states_NPH.float() * d_NPH.to(device)).sum().backward()
            return [weight.grad.cpu().flatten() for weight in there.parameters()]

        exact = grads("cpu", False)
        least = min(float(cosine_similarity(a, b, 0)) for a, b in zip(grads(self.device, True), exact, strict=True))
        return least > 0.999, f"cosine {least:.5f}"

    def step(self, dtype: torch.dtype = torch.float32) -> tuple[bool, str]:
        found, right = [], True
        for method in DRAFTS:
            step = Step(method, SHAPES["tiny"], dtype)
            losses, grads = [], []
            for device in ("cpu", self.device):
                step.to(device)
                step.draft.zero_grad()
                loss = step.in_dtype(step.our_loss)
                loss.backward()
                losses.append(float(loss.detach()))
                grads.append([weight.grad.cpu().double() for weight in step.draft.parameters()])
            by = abs(losses[1] / losses[0] - 1)
            apart = max(float((b - a).norm() / a.norm().clamp_min(1e-30)) for a, b in zip(*grads, strict=True))
            right &= by < (1e-5 if dtype == torch.float32 else 2e-2) and (dtype != torch.float32 or apart < 1e-3)
            found.append(f"{method}: loss {by:.0e}, gradients {apart:.0e}")
        return right, "; ".join(found)

    def bfloat16(self) -> tuple[bool, str]:
        return self.step(torch.bfloat16)

    def capture(self) -> tuple[bool, str]:
        ours, theirs = (HiddenCache.open(self.cache(name, device=name)) for name in ("cpu", str(self.device)))
        worst = 0.0
        for index in range(len(ours)):
            a, b = (store.read(index, layers=store.layers, final=True) for store in (ours, theirs))
            pairs = [*zip(a.aux, b.aux, strict=True), (a.final, b.final)]
            worst = max([worst, *(float((y - x).norm() / x.norm()) for x, y in pairs)])
        return worst < 1e-4, f"relative error {worst:.0e}"

    def determinism(self) -> tuple[bool, str]:
        whole, step = self.trained("whole"), Trainer.step

        def killed(trainer, batch, cells):
            if batch.step == 13:
                raise KeyboardInterrupt
            return step(trainer, batch, cells)

        Trainer.step = killed
        try:
            self.trained("killed")
        except KeyboardInterrupt:
            pass
        finally:
            Trainer.step = step
        same = self.weights(self.trained("killed")) == self.weights(whole)
        return same, "the same bytes" if same else "OTHER BYTES"

    def late_copies(self) -> tuple[bool, str]:
        if not self.on_gpu:
            return True, "skipped: needs a GPU"
        step = Trainer.step

        def late(trainer, batch, cells):
            torch.cuda._sleep(50_000_000)
            return step(trainer, batch, cells)

        Trainer.step = late
        try:
            same = self.weights(self.trained("late")) == self.weights(self.trained("whole"))
        finally:
            Trainer.step = step
        return same, "the same bytes" if same else "OTHER BYTES"

    def int8(self) -> tuple[bool, str]:
        states_RD = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0)).bfloat16()
        states_RD[3, 7] = 1e4
        calibration = Calibration(np.zeros(1024, np.float32), np.ones(1024, np.float32))
        ours, theirs = (CODECS["int8"].encode(states_RD.to(place), calibration) for place in ("cpu", self.device))
        same = all(torch.equal(a, b.cpu()) for a, b in zip(ours, theirs, strict=True))
        return same, "the same bytes" if same else "OTHER BYTES"

    def memory(self) -> tuple[bool, str]:
        if not self.on_gpu:
            return True, "skipped: needs a GPU"
        wanted, worst = self.losses(self.trained("whole")), 0.0
        for share in (0.5, 0.25):
            torch.cuda.set_per_process_memory_fraction(share, self.device)
            found = self.losses(self.trained(f"memory-{share}"))
            worst = max([worst, *(abs(a / b - 1) for a, b in zip(found, wanted, strict=True))])
        torch.cuda.set_per_process_memory_fraction(1.0, self.device)
        return worst < 1e-4, f"losses apart by {worst:.0e}"

    def evaluate(self) -> tuple[bool, str]:
        report = evaluate(self.trained("whole"), device=str(self.device), count=16, max_new=32)
        return True, f"accept length {report.overall.accept_len:.2f}; lossless, or it would have ended here"

    def two_gpus(self) -> tuple[bool, str]:
        if torch.cuda.device_count() < 2:
            return True, f"skipped: {torch.cuda.device_count()} GPUs"
        one, two = self.cache(str(self.device), device=str(self.device)), self.folder / "two"
        command = [sys.executable, "-m", "pipeline", "cache-hidden", "--model", TARGET, "--corpus", str(self.corpus)]
        command += ["--dtype", "float32", "--out", str(two), "--worker"]
        workers = [subprocess.Popen([*command, f"{number}/2"], cwd=ROOT) for number in range(2)]
        ended = [worker.wait() for worker in workers]
        names = sorted(path.relative_to(one) for path in one.glob("shards/*/*/c/0/0"))
        same = all((one / name).read_bytes() == (two / name).read_bytes() for name in names)
        return ended == [0, 0] and same and bool(
            names
        ), f"{len(names)} columns, {'the same' if same else 'OTHER'} bytes"

    def speed(self) -> tuple[bool, str]:
        from fake_accelerator import ANCHORS, settings

        from pipeline.drafts import draft_config, lay_blocks, pack
        from pipeline.target.head import TargetHead
        from stages.train_draft.memory import FakeRows
        from stages.train_draft.step import make_optimizer

        config, place = draft_config(**settings("domino")), {"device": self.device, "dtype": torch.bfloat16}
        weights = [torch.randn(config.vocab_size, config.hidden_size, **place) * 0.02 for _ in range(2)]
        with self.device:
            draft = DRAFTS["domino"](config, TargetHead(*weights)).train()
        rows = FakeRows(3072, config)
        rows.aux = torch.randn(*rows.aux.shape, dtype=torch.bfloat16)
        cell = pack([rows], ["s"]).to(self.device)
        blocks = lay_blocks(cell, torch.linspace(768, 3070, ANCHORS, device=self.device).long(), config)
        optimizer, taken = make_optimizer("adamw", draft), []
        for _ in range(8):
            torch.cuda.synchronize()
            began = time.perf_counter()
            with torch.autocast("cuda", torch.bfloat16):
                loss = draft.loss(cell, blocks, {"lambda_base": 0.5}, draft.denominators(blocks))
            loss.total.backward()
            torch.nn.utils.clip_grad_norm_(draft.parameters(), 1.0)
            optimizer.step(1e-6)
            draft.zero_grad()
            torch.cuda.synchronize()
            taken.append(time.perf_counter() - began)
        seconds, name = sorted(taken[2:])[3], torch.cuda.get_device_name(self.device)
        peak = next((peak for card, peak in BF16_PEAK.items() if card in name), None)
        share = f", {76.7e12 / seconds / peak:.0%} of its peak" if peak else ""
        gib = torch.cuda.max_memory_allocated(self.device) / 2**30
        return True, f"{1e3 * seconds:.0f} ms a step{share}, {gib:.1f} GiB at most"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda")
    asked = parser.parse_args()
    if asked.device != "cpu" and not torch.cuda.is_available():
        sys.exit("error: torch sees no CUDA device; `--device cpu` runs the gates that need none")
    use_deterministic_kernels(torch.device(asked.device))
    name = torch.cuda.get_device_name(asked.device) if asked.device != "cpu" else "CPU"
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    lines, failed = [f"{name}, torch {torch.__version__}, commit {commit.strip()}"], 0
    with tempfile.TemporaryDirectory() as scratch:
        check = Check(asked.device, Path(scratch))
        gates: list[Callable] = [check.gru, check.step, check.bfloat16, check.capture, check.determinism]
        gates += [check.late_copies, check.int8, check.memory, check.evaluate, check.two_gpus]
        for number, gate in enumerate(gates + [check.speed] * check.on_gpu, 1):
            began = time.perf_counter()
            with contextlib.redirect_stdout(sys.stderr):
                right, found = gate()
            failed += not right
            lines.append(f"{number:2} {gate.__name__:12} {'ok' if right else 'FAILED':7}{found}")
            print(f"{lines[-1]} ({time.perf_counter() - began:.0f} s)", file=sys.stderr, flush=True)
    print("\n".join(lines))
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
