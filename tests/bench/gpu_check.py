"""Whether all is right on this machine's GPU, and how fast: `make gpu-check`, one report to paste.

Ten gates, what is right before what is fast: each prints what it found and what is expected. The bundled target, random
weights where only a shape matters. Without a GPU (`--device cpu`) the gates that need none run all the same.

 1 gru          Domino's GRU under bfloat16 autocast: cosine of its gradients to float32's on the CPU above 0.999
 2 step         one step of every method in float32: loss within 1e-5 and gradients within 1e-3 of the CPU's
 3 bfloat16     the same under autocast: loss within 2e-2
 4 capture      states of the bundled target in float32 within 1e-4 of the CPU's (relative, every column)
 5 determinism  two trainings, the second killed and resumed: the same bytes
 6 late copies  the same with the device kept busy before every step, and before every copy to it; a capture likewise:
                the same bytes
 7 lossy        int8 and int6 encoded on the device: the CPU's bytes; and decoded there: the CPU's values
 8 memory       within a half and a quarter of the device, and of what a step takes beyond weights and gradients: in
                parts, and the losses within 1e-4
 9 evaluate     speculative and plain decoding of the trained draft give the same replies
10 two GPUs     a capture by two workers, each on its own: the bytes of one
   speed        one step of a five-layer Domino draft of Qwen3-8B, 3,072 rows: seconds, share of the card's bfloat16
                peak, and what deterministic kernels cost

A gate that fails, or ends in an error, does not end the others; one that this machine cannot answer says "skipped".
"""

import argparse
import contextlib
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from statistics import median
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
import transformers
from torch.nn.functional import cosine_similarity
from torch.utils.flop_counter import FlopCounterMode

from pipeline.cache import HiddenCache
from pipeline.cache.codecs import CODECS
from pipeline.cache.codecs.codec import Calibration
from pipeline.drafts import DRAFTS
from pipeline.drafts.domino import PrefixGRU
from stages.cache_hidden.engine import HfEngine
from stages.cache_hidden.run import run as capture
from stages.cache_hidden.settings import CaptureOptions
from stages.evaluate.run import run as evaluate
from stages.train_draft.copy_stream import CopyStream
from stages.train_draft.kernels import use_deterministic_kernels
from stages.train_draft.run import run as train
from stages.train_draft.step import Trainer
from tests.bench.step import SHAPES, Step

ROOT = Path(__file__).parents[2]
TARGET = str(ROOT / "data/tiny-qwen3")
RECIPE = ("train.steps=24", "train.batch=8", "train.anchors=32", "train.save_every=8", "train.log_every=1")
# Dense FLOP/s with sums in float32, SXM where there are several.
BF16_PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12, "3090": 71e12}
Gates = tuple[bool | None, str]  # whether all is right, None where it cannot be asked here; what was found
ROUNDS = 5  # of what is timed, after two that are not


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

    def gru(self) -> Gates:
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

    def step(self, dtype: torch.dtype = torch.float32) -> Gates:
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

    def bfloat16(self) -> Gates:
        return self.step(torch.bfloat16)

    def capture(self) -> Gates:
        ours, theirs = (HiddenCache.open(self.cache(name, device=name)) for name in ("cpu", str(self.device)))
        worst = 0.0
        for index in range(len(ours)):
            a, b = (store.read(index, layers=store.layers, final=True) for store in (ours, theirs))
            pairs = [*zip(a.aux, b.aux, strict=True), (a.final, b.final)]
            worst = max([worst, *(float((y - x).norm() / x.norm()) for x, y in pairs)])
        return worst < 1e-4, f"relative error {worst:.0e}"

    def determinism(self) -> Gates:
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
        return same, _bytes(same)

    def late_copies(self) -> Gates:
        if not self.on_gpu:
            return None, "needs a GPU"
        whole = self.weights(self.trained("whole"))
        with everything_late():
            trained = self.weights(self.trained("late")) == whole
            late = self.cache("late-capture", device=str(self.device))
        captured = self.same_shards(self.cache(str(self.device), device=str(self.device)), late)
        return trained and captured, f"training: {_bytes(trained)}; capture: {_bytes(captured)}"

    def same_shards(self, one: Path, two: Path) -> bool:
        """Whether two caches have the same columns, and the same bytes in them."""
        names, others = (
            sorted(path.relative_to(cache) for path in cache.glob("shards/*/*/c/0/0")) for cache in (one, two)
        )
        return (
            bool(names)
            and names == others
            and all((one / name).read_bytes() == (two / name).read_bytes() for name in names)
        )

    def lossy(self) -> Gates:
        states_RD = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0)).bfloat16()
        states_RD[3, 7] = 1e4
        calibration = Calibration(np.zeros(1024, np.float32), np.ones(1024, np.float32))
        same = True
        for codec in (CODECS["int8"], CODECS["int6"]):
            found = []
            for place in ("cpu", self.device):
                *arrays, outliers = codec.encode(states_RD.to(place), calibration)
                decoded_RD = torch.empty(states_RD.shape, dtype=states_RD.dtype, device=place)
                codec.decode(tuple(arrays), calibration, decoded_RD)
                found.append([tensor.cpu() for tensor in (*arrays, outliers, decoded_RD)])
            same &= all(torch.equal(one, other) for one, other in zip(*found, strict=True))
        return same, _bytes(same)

    def memory(self) -> Gates:
        if not self.on_gpu:
            return None, "needs a GPU"
        wanted, worst = self.losses(self.trained("whole")), 0.0
        total = torch.cuda.get_device_properties(self.device).total_memory
        whole, _ = self.loss_of_a_step(None)
        peak, found = torch.cuda.max_memory_allocated(self.device), []
        try:
            for share in (0.5, 0.25):
                torch.cuda.set_per_process_memory_fraction(share, self.device)
                losses = self.losses(self.trained(f"memory-{share}"))
                worst = max([worst, *(abs(a / b - 1) for a, b in zip(losses, wanted, strict=True))])
                loss, parts = self.loss_of_a_step(
                    lambda static, share=share: (static + share * (peak - static)) / total
                )
                worst = max(worst, abs(loss / whole - 1))
                found.append(parts)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, self.device)
        in_parts = all(found)  # else the limit was none, and nothing is shown
        return worst < 1e-4 and in_parts, f"losses apart by {worst:.0e}; blocks at once {found}"

    def loss_of_a_step(self, limit: Callable[[int], float] | None) -> tuple[float, int | None]:
        """Return the loss of a Domino step, and how many blocks were computed together, None for all.

        limit: the fraction of the device that the step may use, given the bytes of weights, gradients and batch.
        """
        step = Step("domino", SHAPES["mid"], torch.float32)
        step.to(self.device)
        section = SimpleNamespace(steps=10, log_every=1, lr=1e-6, warmup=0.0, schedule="wsd", clip=1.0, dtype="float32")
        section.context = len(step.cell.ids_R)
        loader = SimpleNamespace(sampler=SimpleNamespace(train=section), read_all=lambda batch: [step.cell])
        trainer = Trainer(step.draft, SimpleNamespace(step=lambda lr: None), loader)  # moments are nothing to halve
        for weight in step.draft.parameters():
            weight.grad = torch.zeros_like(weight)  # the allocator keeps their memory for the step's
        batch = SimpleNamespace(step=0, epoch=0, blocks=[step.blocks], names=("s",))
        if self.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
            if limit is not None:
                held = torch.cuda.memory_reserved(self.device)
                torch.cuda.set_per_process_memory_fraction(min(1.0, limit(held)), self.device)
        loss = trainer.step(batch, [step.cell])["loss"]
        return loss, trainer.blocks_per_pass

    def evaluate(self) -> Gates:
        report = evaluate(self.trained("whole"), device=str(self.device), count=16, max_new=32)
        return True, f"accept length {report.overall.accept_len:.2f}; lossless, or it would have ended here"

    def two_gpus(self) -> Gates:
        if torch.cuda.device_count() < 2:
            return None, f"needs two GPUs, found {torch.cuda.device_count()}"
        one, two = self.cache(str(self.device), device=str(self.device)), self.folder / "two"
        command = [sys.executable, "-m", "pipeline", "cache-hidden", "--model", TARGET, "--corpus", str(self.corpus)]
        command += ["--dtype", "float32", "--out", str(two), "--worker"]
        workers = [subprocess.Popen([*command, f"{number}/2"], cwd=ROOT, stdout=sys.stderr) for number in range(2)]
        ended = [worker.wait() for worker in workers]
        same = ended == [0, 0] and self.same_shards(one, two)
        return same, f"exit statuses {ended}, {_bytes(same)}"

    def speed(self) -> Gates:
        """One step of a published shape. Never wrong: figures, with deterministic kernels on and off in turn."""
        step, rows = self.large_step()
        with FlopCounterMode(display=False) as counter:
            step()
        flop, taken = counter.get_total_flops(), {True: [], False: []}
        strict = torch.are_deterministic_algorithms_enabled()
        try:
            for _ in range(ROUNDS + 2):
                for kind, times in taken.items():
                    torch.use_deterministic_algorithms(kind)
                    torch.cuda.synchronize(self.device)
                    began = time.perf_counter()
                    step()
                    torch.cuda.synchronize(self.device)
                    times.append(time.perf_counter() - began)
        finally:
            torch.use_deterministic_algorithms(strict)
        seconds, free = (median(times[2:]) for times in taken.values())
        name = torch.cuda.get_device_name(self.device)
        peak = next((peak for card, peak in BF16_PEAK.items() if card in name), None)
        share = f"{flop / seconds / peak:.0%} of {peak / 1e12:.0f} TFLOP/s" if peak else f"no peak known of {name}"
        gib = torch.cuda.max_memory_allocated(self.device) / 2**30
        return True, (
            f"{1e3 * seconds:.0f} ms a step of {rows:,} rows, {flop / 1e12:.1f} TFLOP, {share}, {gib:.1f} GiB at most; "
            f"kernels of any order {1e3 * free:.0f} ms: deterministic ones cost {seconds / free - 1:+.1%}"
        )

    def large_step(self, rows: int = 3072) -> tuple[Callable[[], None], int]:
        """Return a function that does one step of a five-layer Domino draft of Qwen3-8B, and its rows."""
        from fake_accelerator import ANCHORS, settings

        from pipeline.drafts import draft_config, lay_blocks, pack
        from pipeline.target.head import TargetHead
        from stages.train_draft.memory import FakeRows
        from stages.train_draft.optimizers import make_optimizer

        config, place = draft_config(**settings("domino")), {"device": self.device, "dtype": torch.bfloat16}
        weights = [torch.randn(config.vocab_size, config.hidden_size, **place) * 0.02 for _ in range(2)]
        with self.device:
            draft = DRAFTS["domino"](config, TargetHead(*weights)).train()
        sample = FakeRows(rows, config)
        sample.aux = torch.randn(*sample.aux.shape, dtype=torch.bfloat16)
        cell = pack([sample], ["s"])
        blocks = lay_blocks(cell, torch.linspace(rows // 4, rows - 2, ANCHORS).long(), config).to(self.device)
        cell, optimizer = cell.to(self.device), make_optimizer("adamw", draft)

        def step() -> None:
            draft.zero_grad()
            with torch.autocast(self.device.type, torch.bfloat16):
                loss = draft.loss(cell, blocks, {"lambda_base": 0.5}, draft.denominators(blocks))
            loss.total.backward()
            torch.nn.utils.clip_grad_norm_(draft.parameters(), 1.0)
            optimizer.step(1e-6)

        return step, rows


@contextlib.contextmanager
def everything_late() -> Iterator[None]:
    """Within the block, the device is kept busy before every step of a training, every forward of a capture, and, on
    the stream that copies, every copy of a cell; some 30 ms, which all that is queued behind waits for."""
    step, forward, copy = Trainer.step, HfEngine.forward, CopyStream.copy

    def late_after(function: Callable) -> Callable:
        def late(*args):
            torch.cuda._sleep(50_000_000)
            return function(*args)

        return late

    def late_copy(copies, cell):
        with torch.cuda.stream(copies.stream):  # for the sleep alone: the copy waits for the stream it is asked on
            torch.cuda._sleep(50_000_000)
        return copy(copies, cell)

    Trainer.step, HfEngine.forward, CopyStream.copy = late_after(step), late_after(forward), late_copy
    try:
        yield
    finally:
        Trainer.step, HfEngine.forward, CopyStream.copy = step, forward, copy


def _bytes(same: bool) -> str:
    return "the same bytes" if same else "OTHER BYTES"


def machine(device: torch.device) -> list[str]:
    """Return what the report is about: hardware, driver, versions, commit."""

    def asked(*command: str) -> str:
        try:
            return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return ""

    commit = asked("git", "rev-parse", "--short", "HEAD") or "unknown"
    changed = ", changed since" if asked("git", "status", "--porcelain") else ""
    versions = f"python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    if device.type == "cpu":
        return [f"CPU, {torch.get_num_threads()} threads", f"{versions}, commit {commit}{changed}"]
    facts, count = torch.cuda.get_device_properties(device), torch.cuda.device_count()
    driver = asked("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()
    return [
        f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB, sm_{facts.major}{facts.minor}, of {count} here; "
        f"driver {driver[0] if driver else 'unknown'}, CUDA {torch.version.cuda}, "
        f"cuDNN {torch.backends.cudnn.version()}",
        f"{versions}, commit {commit}{changed}",
    ]


def answer(gate: Callable[[], Gates]) -> tuple[str, str]:
    """Run a gate; return "ok", "skipped" or "FAILED", and what it found or how it ended."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            right, found = gate()
    except (Exception, SystemExit) as error:  # the others are still to be asked
        lines = str(error).strip().splitlines()
        return "FAILED", f"{type(error).__name__}: {lines[0][:300] if lines else ''}"
    return {True: "ok", False: "FAILED", None: "skipped"}[right], found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda")
    asked = parser.parse_args()
    if asked.device != "cpu" and not torch.cuda.is_available():
        sys.exit("error: torch sees no CUDA device; `--device cpu` runs the gates that need none")
    use_deterministic_kernels(torch.device(asked.device))
    lines, ended = machine(torch.device(asked.device)), []
    with tempfile.TemporaryDirectory() as scratch:
        check = Check(asked.device, Path(scratch))
        gates: list[Callable] = [check.gru, check.step, check.bfloat16, check.capture, check.determinism]
        gates += [check.late_copies, check.lossy, check.memory, check.evaluate, check.two_gpus]
        for number, gate in enumerate(gates + [check.speed] * check.on_gpu, 1):
            began = time.perf_counter()
            how, found = answer(gate)
            ended.append(how)
            lines.append(f"{number:2} {gate.__name__:12}{how:8} {found} ({time.perf_counter() - began:.0f} s)")
            print(lines[-1], file=sys.stderr, flush=True)
    print("\n".join([*lines, ", ".join(f"{ended.count(how)} {how}" for how in ("ok", "skipped", "FAILED"))]))
    sys.exit("FAILED" in ended)


if __name__ == "__main__":
    main()
