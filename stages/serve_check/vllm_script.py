"""What runs inside the engine's own Python: vLLM decodes prompts with target and draft, and every call is written down.

`PYTHON vllm_script.py REQUEST.json`, started by `pipeline/engine_process.py`; what is asked and left `engine_answer.py`
says. Imports nothing of this project but `pipeline/inside_engine/`, since the engine's environment has none of it.

The mends are named, and only what is broken is mended: each looks for its fault first. They change what this process
computes, never a file of the environment.
"""

import json
import os
import sys
from pathlib import Path

from engine_side import VLLM_ENVIRONMENT, end_with_parent, import_vllm, report

ENVIRONMENT = {**VLLM_ENVIRONMENT, "VLLM_CPU_KVCACHE_SPACE": "1"}  # GiB
SEQUENCES = 16  # decoded at once
SPARE = 8  # positions beyond prompt, reply and a block
TOTALS = {"drafts": "num_drafts", "proposed": "num_draft_tokens", "accepted": "num_accepted_tokens"}


def cpu_rms_norm_2d(ops) -> bool:
    """Mend ops.rms_norm, which on CPUs takes row 0 of a weight [layers, width] for every layer; True if it does."""
    import torch

    layers, width, eps = 3, 64, 1e-6
    generator = torch.Generator().manual_seed(0)
    x_LTD = torch.randn(layers, 5, 2, width, generator=generator)
    weight_LD = torch.rand(layers, width, generator=generator) + 0.5
    wanted = x_LTD * torch.rsqrt(x_LTD.square().mean(-1, keepdim=True) + eps) * weight_LD[:, None, None]
    found, kernel = torch.empty_like(x_LTD), ops.rms_norm
    kernel(found, x_LTD, weight_LD, eps)
    if torch.allclose(found, wanted, atol=1e-4):
        return False

    def by_layer(out, x, weight, epsilon):
        if weight.dim() < 2:
            return kernel(out, x, weight, epsilon)
        for layer in range(len(weight)):
            kernel(out[layer], x[layer].contiguous(), weight[layer].contiguous(), epsilon)

    ops.rms_norm = by_layer
    return True


def dspark_on_runner_v1() -> bool:
    """Serve DSpark on Model Runner V1, which refuses it where Runner V2 cannot run (no Triton); True if it was refused.

    Model class and weights are vLLM's own. The proposer is a stand-in that drafts as vLLM's for Runner V2 does: base
    logits of all slots, then left to right the Markov head's bias of the token before.
    """
    import torch
    from vllm.config import speculative
    from vllm.config import vllm as configuration
    from vllm.v1.spec_decode import dflash
    from vllm.v1.worker import gpu_model_runner

    class OnRunnerV1(dflash.DFlashProposer):
        def __init__(self, vllm_config, device, runner=None):
            vllm_config.speculative_config.method = "dflash"
            super().__init__(vllm_config, device, runner)

        def set_inputs_first_pass(self, *, next_token_ids, cad, **inputs):
            count = self.num_speculative_tokens
            self.num_speculative_tokens = count - 1  # the anchor's slot proposes, too: a block has `count` slots
            try:
                tokens, _, new_cad = super().set_inputs_first_pass(next_token_ids=next_token_ids, cad=cad, **inputs)
            finally:
                self.num_speculative_tokens = count
            self.anchors_B = next_token_ids.long().clone()
            return tokens, torch.arange(cad.batch_size() * count, dtype=torch.int32), new_cad

        def _greedy_sample(self, hidden_states):
            model, count = self.model, self.num_speculative_tokens
            base_BSV = model.compute_draft_logits(hidden_states).unflatten(0, (-1, count))
            last_B, chosen = self.anchors_B, []
            for base_BV in base_BSV.unbind(1):
                bias_BV = model.markov_bias(model.markov_embed(last_B))
                last_B = model.map_draft_to_target((base_BV + bias_BV).argmax(-1))
                chosen.append(last_B)
            return torch.stack(chosen, 1).flatten()

    refused = "_get_v1_model_runner_unsupported_features"
    if not hasattr(configuration.VllmConfig, refused):
        return False
    setattr(configuration.VllmConfig, refused, lambda self: [])
    speculative.SpeculativeConfig.use_dflash = lambda self: self.method in ("dflash", "dspark")
    gpu_model_runner.DFlashProposer = OnRunnerV1
    return True


def apply_mends(method: str) -> list[str]:
    """Mend what is broken for this method; return what was, in words."""
    from vllm import _custom_ops
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return []
    current_platform.import_kernels()
    mended = []
    if cpu_rms_norm_2d(_custom_ops):
        mended.append("cpu-rms-norm-2d: ops.rms_norm, which took row 0 of a weight of two dimensions for all its rows")
    if method == "dspark" and dspark_on_runner_v1():
        mended.append("dspark-on-runner-v1: a proposer for Model Runner V1, which refused DSpark")
    return mended


class Recorder:
    """Writes down what the draft computes: the states [S, D] that its proposals are read from, and the proposals.

    Hooks into vLLM's proposer, whose names may change from version to version: `missing` then says which was sought.
    """

    def __init__(self):
        self.states, self.drafts, self.features = [], [], []
        self.on, self.missing = False, ""  # on: prompts are decoded one by one
        try:
            from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer as Base

            self._hook(Base, "_greedy_sample", self._keep_proposals)
        except (ImportError, AttributeError) as error:
            self.missing = f"this vLLM has no SpecDecodeBaseProposer._greedy_sample ({error})"
            return
        try:
            from vllm.model_executor.models.qwen3_dflash import DFlashQwen3ForCausalLM as Model

            self._hook(Model, "combine_hidden_states", self._keep_features)
        except (ImportError, AttributeError):
            pass  # then only the draft's states are compared

    def _hook(self, base: type, name: str, keep) -> None:
        """Record the calls of a method of a class and of every subclass that has its own."""
        getattr(base, name)  # AttributeError where no version of it is there
        classes = [base]
        while classes:
            kind = classes.pop()
            classes += kind.__subclasses__()
            if name in vars(kind):
                setattr(kind, name, self._recorded(vars(kind)[name], keep))

    def _recorded(self, method, keep):
        recorder = self

        def recorded(self, given, *rest, **named):
            returned = method(self, given, *rest, **named)
            if recorder.on:
                keep(given, returned)
            return returned

        return recorded

    def _keep_proposals(self, hidden, drafts) -> None:
        self.states.append(hidden.detach().float().cpu().clone())
        self.drafts.append(drafts.detach().long().cpu().clone())

    def _keep_features(self, features, _) -> None:
        self.features.append(features.detach().float().cpu().clone())

    def take(self) -> dict:
        """Return what was recorded since the last call: of the features, only those of the first call, a prompt's."""
        import torch

        taken = {}
        if self.states:
            taken = {"states": torch.stack(self.states), "drafts": torch.stack(self.drafts)}
            if self.features:
                taken["features"] = self.features[0]
        self.states, self.drafts, self.features = [], [], []
        return taken


def start(request: dict):
    """Start the engine."""
    from vllm import LLM

    longest = max(map(len, request["prompts"])) + request["max_new"] + request["proposals"] + SPARE
    speculative = {
        "method": request["method"],
        "model": request["draft"],
        "num_speculative_tokens": request["proposals"],
    }
    return LLM(
        model=request["target"],
        dtype=request["dtype"],
        max_model_len=min(longest, request["positions"] or longest),
        max_num_seqs=SEQUENCES,
        enforce_eager=True,
        enable_prefix_caching=False,  # every prompt's states are computed
        disable_log_stats=False,
        seed=0,
        **({"speculative_config": speculative} if request["draft"] else {}),
    )


def decode(llm, prompts: list[list[int]], request: dict, first: int, progress: bool) -> list[dict]:
    """Decode prompts greedily; return of each the reply's ids and the tokens gained in each call of the target.

    A request's first output is the prefill's token; every later one is what a verified block gained.
    """
    from vllm import SamplingParams

    sampling = SamplingParams(
        temperature=0,
        max_tokens=request["max_new"],
        stop_token_ids=request["stops"],
        ignore_eos=True,  # only `stops`
        detokenize=False,
    )
    engine, replies = llm.llm_engine, {}
    for index, ids in enumerate(prompts):
        engine.add_request(str(first + index), {"prompt_token_ids": ids}, sampling)
    done = 0
    while engine.has_unfinished_requests():
        for output in engine.step():
            reply = replies.setdefault(int(output.request_id) - first, {"ids": [], "gains": []})
            ids = list(output.outputs[0].token_ids)
            gained, reply["ids"] = len(ids) - len(reply["ids"]), ids
            if gained:
                reply["gains"].append(gained)
            done += output.finished
            if output.finished and progress:
                report(stage="decoding", done=done, of=len(prompts))
    for reply in replies.values():
        del reply["gains"][:1]
    return [replies[index] for index in range(len(prompts))]


def totals(llm) -> dict | None:
    """Return the engine's own counts of speculative decoding, None where it shows none."""
    found = {metric.name: getattr(metric, "value", None) for metric in llm.get_metrics()}
    values = {key: found.get(f"vllm:spec_decode_{name}") for key, name in TOTALS.items()}
    return None if None in values.values() else {key: int(value) for key, value in values.items()}


def main(path: str) -> None:
    request = json.loads(Path(path).read_text())
    out = Path(request["out"])
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    end_with_parent()
    version = import_vllm()
    mends = apply_mends(request["method"]) if request["mend"] else []
    recorder = Recorder() if request["draft"] and request["states"] else None
    llm = start(request)
    replies = decode(llm, request["prompts"], request, 0, progress=True)
    counted = totals(llm) if request["draft"] else None
    tensors, recorded = {}, []
    if recorder is not None and not recorder.missing:
        recorder.on = True
        for index, ids in enumerate(request["prompts"][: request["states"]]):
            recorded += decode(llm, [ids], request, len(request["prompts"]) + index, progress=False)
            tensors |= {f"{kind}.{index}": tensor for kind, tensor in recorder.take().items()}
            report(stage="recording", done=index + 1, of=request["states"])
    if tensors:
        from safetensors.torch import save_file

        save_file(tensors, out / "states.safetensors")
    missing = "" if recorder is None else recorder.missing
    result = {"engine": version, "replies": replies, "totals": counted, "mends": mends}
    result |= {"recorded": recorded, "states_missing": missing}
    (out / "result.json").write_text(json.dumps(result))
    report(stage="done")


if __name__ == "__main__":
    main(sys.argv[1])
