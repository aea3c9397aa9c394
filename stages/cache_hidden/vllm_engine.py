"""vLLM as an engine: a process in an environment of its own, which extracts hidden states and leaves them in files.

The script, `inside_vllm/capture_script.py`, is started with a request: `target`, `dtype`, `layers` (as vLLM counts) and
those of them that are `needed`, `longest` (tokens of a sample), `tokens` and `sequences` (at most, in one step),
`options`, `device` (where the states are wanted), `kv_cache_memory_bytes` and `gpu_memory_utilization` (where the
options leave them open, the one for CPUs), `visible_device` (null: any), and `out`, a folder. When it tells the stage
`ready` (`engine`, `torch`, `device`, `model_class`, and the `layers` that it extracts), it takes lines {"samples":
lists of token ids} and tells for each the stage `computed` with `files`: of each sample a safetensors file in `out`
with `hidden_states` [T, K, D] and `token_ids` [T], or null. We remove the files. At {"samples": null} it ends.

vLLM calls j what is layer j - 1 here, and 0 what enters layer 0; the last one is raw, so the target's own last norm is
applied to it. Nothing of a file is believed: it has to have as many rows as the sample, of the tokens that were asked
for, and what enters layer 0 has to be each token's embedding, since a slot that vLLM did not write has whatever was
there before (vLLM has no layer -1 where it runs a target by Hugging Face's class, as it does where its own tells no
states). A file that has not is asked for again with the samples it was asked with, since a sample's last bits may
depend on those beside it.

    B samples   T tokens of a sample   K layers   D hidden size
"""

import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.cache.atomic import Scratch
from pipeline.cache.layout import layer_of
from pipeline.engine_process import EngineProcess, Remedies, progress_text
from pipeline.errors import PipelineError, ProofError, UsageError, first_line, refuse_limit
from pipeline.target.files import read_text_config
from pipeline.target.model import final_norm
from pipeline.target.several_devices import input_device
from pipeline.visible_text import print_visible, visible
from stages.cache_hidden.settings import CaptureSettings
from stages.cache_hidden.states_folder import LABEL, states_folder

SCRIPT = Path(__file__).parent / "inside_vllm" / "capture_script.py"
SEQUENCES = 64  # samples of a step; every one has padded blocks of vLLM's kv cache
BLOCK = 128  # tokens of such a block on a CPU, its largest
KV_FACTOR = 3  # kv of a step, in kv of its tokens: layers of several kinds take blocks of their own
SHARE_OF_FREE = 0.9  # of a GPU's memory that the target here has left, for vLLM
FILES_AT_ONCE = 4  # steps whose states the folder has to hold
STARTING_S, ANSWER_S = 3600.0, 1800.0  # of silence
TRIES = 3  # a micro-batch is asked for
SAME_TOKEN = 0.99  # least cosine of a row of layer -1 and its token's embedding: rounding leaves 0.9999
REMEDIES = Remedies(
    room="free some, give the engine less with --engine-option (gpu_memory_utilization, or kv_cache_memory_bytes on a "
    "CPU) or more devices (tensor_parallel_size), or plan a new cache with a smaller --batch-tokens",
    silence="run the same command again, which goes on from the last shard",
    crash="what it does not run, a capture without --engine in another --out does",
)


class WrongStates(Exception):
    """What vLLM left for a sample is not the sample's states."""


class VllmEngine:
    """The target in a process of vLLM; see `Engine`.

    target: the same one by Hugging Face, of which the last norm is applied and the embedding compared.
    """

    def __init__(self, settings: CaptureSettings, target: PreTrainedModel):
        """Start it. UsageError for a target or Python that does not fit, RoomError or ProofError where it ends."""
        self.device, self._norm = input_device(target), final_norm(target)
        if self._norm is None:
            raise UsageError(
                f"{type(target).__name__} has no module that is its last norm, which vLLM's last state lacks; capture "
                "it without --engine"
            )
        self._embedding = target.get_input_embeddings()
        config = target.config.get_text_config()
        captured = [layer for spec in settings.columns if (layer := layer_of(spec.name)) is not None]
        self._needed = sorted({*captured, config.num_hidden_layers - 1})
        self._layers = sorted({-1, *self._needed})
        self._width, self._dtype = config.hidden_size, getattr(torch, settings.dtype)
        self._process, self.facts = None, {}
        tokens = max(settings.batch_tokens, settings.max_length)
        need = FILES_AT_ONCE * tokens * len(self._layers) * self._width * self._dtype.itemsize
        self._folder = Scratch(states_folder(need), LABEL)
        try:
            self._folder.path.chmod(0o700)
            self.facts = self._start(settings, tokens)
        except BaseException:
            self.close()
            raise

    def _start(self, settings: CaptureSettings, tokens: int) -> dict[str, str]:
        """Start the process and wait until it is ready; return its facts."""
        request = {
            "target": str(settings.folder.resolve()),
            "dtype": settings.dtype,
            "layers": [layer + 1 for layer in self._layers],
            "needed": [layer + 1 for layer in self._needed],
            "longest": settings.max_length,
            "tokens": tokens,
            "sequences": SEQUENCES,
            "options": dict(settings.engine.options),
            "device": self.device.type,
            "kv_cache_memory_bytes": kv_bytes(settings, tokens, len(self._layers)),
            "gpu_memory_utilization": share_of_memory(self.device),
            "visible_device": visible_device(self.device, settings.engine.options, os.environ),
            "out": str(self._folder.path),
        }
        path = self._folder.path / "request.json"
        path.write_text(json.dumps(request))
        kept = Path(tempfile.gettempdir()) / f"cache-hidden-vllm-{os.getpid()}.log"
        log = self._folder.path / "engine.log"
        self._process = EngineProcess(settings.engine.found_python, SCRIPT, path, log, REMEDIES, kept)
        while (stage := self._process.next_stage(STARTING_S)) is not None:
            if stage["stage"] == "ready":
                self._layers = [layer - 1 for layer in stage["layers"]]
                facts = {name: stage[name] for name in ("torch", "device", "model_class")}
                facts |= {"engine": "vllm", "vllm": stage["engine"]}
                return facts | ({"options": options} if (options := settings.engine.options_text) else {})
            if stage["stage"] != "failed":  # which the process ends with
                print_visible(f"vllm: {progress_text(stage)}", err=True)
        raise self._ended()

    def forward(
        self, ids_BT: Tensor, lengths_B: Sequence[int], layers: Sequence[int]
    ) -> tuple[dict[int, Tensor], Tensor]:
        B, T = ids_BT.shape
        wanted = {layer: self._layers.index(layer) for layer in layers}
        shape = (B, T, self._width)
        states = {layer: torch.zeros(shape, dtype=self._dtype, device=self.device) for layer in wanted}
        final_BTD = torch.zeros(shape, dtype=self._dtype, device=self.device)
        samples = [ids_T[:length] for ids_T, length in zip(ids_BT, lengths_B, strict=True)]
        for first in range(0, B, SEQUENCES):
            for at, states_TKD in enumerate(self._ask(samples[first : first + SEQUENCES]), first):
                for layer, column in wanted.items():
                    states[layer][at, : len(states_TKD)] = states_TKD[:, column]
                final_BTD[at, : len(states_TKD)] = self._norm(states_TKD[:, -1]).to(self.device)
        return states, final_BTD

    def _ask(self, samples: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yield the states [T, K, D] of each sample, computed in one step. ProofError where they do not come."""
        wrong = ""
        for _ in range(TRIES):
            if wrong:
                print_visible(f"vllm: {visible(wrong)}; its micro-batch is asked for again", err=True)
            files = self._compute([ids_T.tolist() for ids_T in samples])
            try:
                found = [self._read(file, ids_T) for file, ids_T in zip(files, samples, strict=True)]
            except WrongStates as error:
                wrong = str(error)
                continue
            finally:
                for file in files:
                    if file is not None:
                        file.unlink(missing_ok=True)
            yield from found
            return
        raise ProofError(
            f"vLLM left wrong states {TRIES} times, the last time {visible(wrong)}; no shard has them, and "
            f"the same command goes on from there; the whole log is {self._process.keep_log()}"
        )

    def _compute(self, samples: list[list[int]]) -> list[Path | None]:
        """Have vLLM compute the states of samples; return the file of each in our folder, None where there is none."""
        self._process.send({"samples": samples})
        while (stage := self._process.next_stage(ANSWER_S)) is not None:
            if stage["stage"] == "computed":
                inside = [file and self._folder.path / Path(file).name for file in stage["files"]]
                return (inside + [None] * len(samples))[: len(samples)]
        raise self._ended()

    def _read(self, file: Path | None, ids_T: Tensor) -> Tensor:
        """Return the states [T, K, D] of a sample from its file, on the device. WrongStates unless they are its own."""
        T, size = len(ids_T), [len(ids_T), len(self._layers), self._width]
        if file is None:
            raise WrongStates(f"no file came of a sample of {T} tokens")
        try:
            with safe_open(file, framework="pt") as opened:
                tensors = {name: opened.get_tensor(name) for name in ("hidden_states", "token_ids")}
        except (OSError, SafetensorError) as error:
            refuse_limit(file, error)
            raise WrongStates(f"the file of a sample of {T} tokens cannot be read ({first_line(error)})") from error
        states_TKD, found_T = tensors["hidden_states"], tensors["token_ids"]
        if list(states_TKD.shape) != size or states_TKD.dtype != self._dtype:
            kind = f"{states_TKD.dtype} {list(states_TKD.shape)}"
            raise WrongStates(f"the states of a sample of {T} tokens are {kind}, wanted {self._dtype} {size}")
        if found_T.tolist() != ids_T.tolist():
            raise WrongStates(f"the states of a sample of {T} tokens are of {len(found_T)} other tokens")
        states_TKD = states_TKD.to(self.device)
        if self._layers[0] == -1:
            strange = other_tokens(states_TKD[:, 0], self._embedding(ids_T.to(self.device)).to(self.device))
            if strange:
                raise WrongStates(
                    f"{len(strange)} of {T} rows of a sample are not of their tokens, the first {strange[0]}"
                )
        return states_TKD

    def _ended(self) -> PipelineError:
        """Return the error for a process that ended well before it was told to."""
        return ProofError(f"the engine ended by itself; the whole log is {self._process.keep_log()}")

    def close(self) -> None:
        """End the process, and remove its files."""
        if self._process is not None and self.facts:
            self._process.leave({"samples": None})
        elif self._process is not None:
            self._process.end()
        self._folder.close()


def other_tokens(rows_TD: Tensor, embedded_TD: Tensor) -> list[int]:
    """Return the rows that do not point where their token's embedding does, whatever factor it is scaled by."""
    rows_TD, embedded_TD = rows_TD.float(), embedded_TD.float()
    product_T, norms_T = (rows_TD * embedded_TD).sum(-1), embedded_TD.norm(dim=-1)
    same_T = product_T >= SAME_TOKEN * rows_TD.norm(dim=-1) * norms_T  # False for what is not finite
    same_T &= (product_T > 0) | (norms_T == 0)
    same_T |= ~norms_T.isfinite()  # no state of such a token is; whoever stores them refuses the sample
    return (~same_T).nonzero()[:, 0].tolist()


def kv_bytes(settings: CaptureSettings, tokens: int, layers: int) -> int:
    """Return about how many bytes of kv cache one step takes, the states that vLLM keeps there included."""
    config = read_text_config(settings.folder)
    heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    a_token = 2 * config["num_hidden_layers"] * heads * size + layers * config["hidden_size"]
    return KV_FACTOR * (tokens + SEQUENCES * BLOCK) * a_token * getattr(torch, settings.dtype).itemsize


def visible_device(device: torch.device, options: Mapping, environment: Mapping[str, str]) -> str | None:
    """Return the one GPU that vLLM is to see, as CUDA_VISIBLE_DEVICES names it; None where it chooses by itself.

    Several workers of a machine have a GPU each, and vLLM begins with the first that it sees.
    """
    shared = options.get("tensor_parallel_size", 1) != 1 or options.get("pipeline_parallel_size", 1) != 1
    if device.type != "cuda" or device.index is None or shared:
        return None
    seen = environment.get("CUDA_VISIBLE_DEVICES")
    return seen.split(",")[device.index] if seen else str(device.index)


def share_of_memory(device: torch.device) -> float | None:
    """Return the share of a GPU that vLLM may take beside what is on it already; None for another device."""
    if device.type != "cuda":
        return None
    free, whole = torch.cuda.mem_get_info(device)
    return round(SHARE_OF_FREE * free / whole, 3)
