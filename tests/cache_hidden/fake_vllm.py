"""What stands in for vLLM: our own decoder behind the protocol of `stages/cache_hidden/vllm_engine.py`, sound or not.

`main(REQUEST, fault)` is what `inside_vllm/capture_script.py` is, in a process; `InThisProcess` the same without one.
A fault is of the first micro-batch that is asked for, with "always " before it of every one.

    T tokens of a sample   K layers   D hidden size
"""

import json
import os
import signal
import time
from pathlib import Path

import torch
from engine_side import end_with_parent, report
from safetensors.torch import save_file

from pipeline.target.loading import load_target
from pipeline.target.model import final_norm, run_decoder, tap_layers


def ready(request: dict) -> dict:
    facts = {"engine": "fake-vllm 1.0", "torch": torch.__version__, "device": "cpu"}
    return {"stage": "ready", **facts, "layers": request["layers"], "model_class": "OurOwn"}


class Fake:
    """Computes samples one by one, and leaves files as vLLM does: ids counted from 0, the embedding, the last raw."""

    def __init__(self, request: dict, fault: str = ""):
        self.request, self.out, self.fault = request, Path(request["out"]), fault
        self.model = load_target(request["target"], device="cpu", dtype=request["dtype"])
        self.asked, self.late = 0, None
        self.compositions: list[list[int]] = []  # lengths of the samples of every micro-batch

    @torch.no_grad()
    def states(self, ids: list[int]) -> torch.Tensor:
        """Return the states [T, K, D] of a sample."""
        shift, last = int(self.fault == "one layer late"), self.model.config.num_hidden_layers - 1
        with tap_layers(self.model, [min(j - 1 + shift * (0 < j < 4), last) for j in self.request["layers"]]) as taps:
            run_decoder(self.model, torch.tensor([ids]))
        states = torch.stack([taps[layer][0] for layer in sorted(taps)], 1)
        if self.fault == "normed":
            states[:, -1] = final_norm(self.model)(states[:, -1])
        return states

    def files(self, samples: list[list[int]]) -> list[str | None]:
        """Leave the files of a micro-batch, and return them."""
        fault = self.fault.removeprefix("always ") if not self.asked or self.fault.startswith("always ") else ""
        self.compositions.append([len(ids) for ids in samples])
        if self.late is not None:  # what came one step behind
            save_file(*self.late)
            self.late = None
        files: list[str | None] = []
        for index, ids in enumerate(samples):
            states_TKD, token_ids, path = self.states(ids), list(ids), self.out / f"{self.asked}.{index}.safetensors"
            last = index == len(samples) - 1
            if last and fault == "shortened":
                states_TKD = states_TKD[1:]
            elif last and fault == "shortened with its ids":
                states_TKD, token_ids = states_TKD[1:], token_ids[1:]
            elif last and fault == "other ids":
                token_ids[0] += 1
            elif last and fault == "stale":
                states_TKD[len(ids) // 2] = states_TKD[0]
            elif last and fault == "half precision":
                states_TKD = states_TKD.half()
            tensors = {"hidden_states": states_TKD.contiguous(), "token_ids": torch.tensor(token_ids)}
            if last and fault == "late":
                self.late = tensors, path
            elif last and fault == "torn":
                path.write_bytes(b"\x10")
            elif not (last and fault in ("lost", "null")):
                save_file(tensors, path)
            files.append(None if last and fault == "null" else str(path))
        self.asked += 1
        return files


class InThisProcess:
    """In place of `EngineProcess`, for what is said and written, where how a process ends is not in question."""

    made: "list[InThisProcess]"

    def __init__(self, python, script, request, log, remedies, kept=None, fault=""):
        asked = json.loads(request.read_text())
        if fault == "no embedding":  # as vLLM gives none of a class of Hugging Face's
            asked["layers"] = asked["needed"]
        self.fake, self.ended, self._told, self._kept = Fake(asked, fault), 0, [ready(asked)], kept

    def next_stage(self, timeout: float) -> dict | None:
        return self._told.pop(0) if self._told else None

    def send(self, request: dict) -> None:
        self._told.append({"stage": "computed", "files": self.fake.files(request["samples"])})

    def keep_log(self) -> Path:
        return self._kept

    def leave(self, request: dict) -> None:
        assert request == {"samples": None}
        self.ended += 1

    def end(self) -> None:
        self.ended += 1


def main(path: str, fault: str = "") -> None:
    request = json.loads(Path(path).read_text())
    lines: list[bytes] = []
    end_with_parent(lines.append)
    print(f"pid {os.getpid()}", flush=True)
    fake = Fake(request)
    report(**ready(request))
    while True:
        while not lines:
            time.sleep(0.002)
        samples = json.loads(lines.pop(0))["samples"]
        if samples is None:
            return
        report(stage="computing")
        if fake.asked == 3 and fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if fake.asked == 3 and fault == "silent":
            time.sleep(600)
        report(stage="computed", files=fake.files(samples))
