"""Another engine behind the protocol of `serve-check`: our own decoder in a process of its own, sound or with a fault.

`main(REQUEST, fault)` is what `vllm_script.py` is for vLLM. The faults are those that engines have: a wrong kernel,
other layers, lost proposals, replies of its own, crashes, and silence.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

MARK = "@engine "


def report(**facts) -> None:
    print(MARK + json.dumps(facts), flush=True)


def main(path: str, fault: str = "") -> None:
    request = json.loads(Path(path).read_text())
    out = Path(request["out"])
    report(stage="importing")
    if fault == "absent":
        report(stage="failed", kind="absent", what="No module named 'engine'")
        sys.exit(1)
    report(stage="starting", engine="toy 1.0")
    misbehave(fault, out)
    fault = "" if request["mend"] else fault

    import torch
    from safetensors.torch import save_file

    from pipeline.evaluation.accept_length import gains_within
    from pipeline.evaluation.decode import speculative_decode
    from pipeline.published import load_draft_folder
    from pipeline.target.loading import load_target
    from pipeline.target.model import head_of
    from stages.evaluate.lossless import plain_decode

    target = load_target(request["target"], dtype=getattr(torch, request["dtype"]))
    limit, stops, replies = request["max_new"], request["stops"], []
    if request["draft"] is None:
        replies = [{"ids": plain_decode(target, ids, limit, stops).ids, "gains": []} for ids in request["prompts"]]
        write(out, replies, None, [], {})
        return
    depth = target.config.get_text_config().num_hidden_layers
    draft = load_draft_folder(request["draft"], head_of(target), "cpu", depth).to(target.dtype)
    spoil(draft, fault)
    rolled, requests, rollout, propose = [], [], draft.rollout_logits, draft.propose

    def recorded(hidden_NSD, *rest):
        proposals_NP, logits_NPV = rollout(hidden_NSD, *rest)
        first = draft.config.first_slot
        rolled.append((hidden_NSD[0, first : first + draft.config.proposals], proposals_NP[0]))
        return (proposals_NP + 1) % 3 if fault == "other proposals" else proposals_NP, logits_NPV

    def with_requests(asked, *rest):
        requests.append(asked[0])
        return propose(asked, *rest)

    draft.rollout_logits, draft.propose = recorded, with_requests
    tensors, totals = {}, {"drafts": 0, "proposed": 0, "accepted": 0}
    for index, ids in enumerate(request["prompts"]):
        rolled.clear()
        requests.clear()
        found = speculative_decode(target, draft, ids, limit, stops)
        gains = gains_within(found.lengths, limit)
        replies.append({"ids": found.ids, "gains": gains})
        totals["drafts"] += len(gains)
        totals["accepted"] += sum(found.accepted[: len(gains)])
        totals["proposed"] += sum(found.proposed[: len(gains)])
        if rolled and index < request["states"]:
            tensors[f"states.{index}"] = torch.stack([hidden for hidden, _ in rolled])
            tensors[f"drafts.{index}"] = torch.stack([ids_P for _, ids_P in rolled])
            tensors[f"features.{index}"] = requests[0].features_KTD.transpose(0, 1).flatten(1)
        report(stage="decoding", done=index + 1, of=len(request["prompts"]))
    if fault == "other replies":
        replies = [{**reply, "ids": [*reply["ids"][:-1], 7]} for reply in replies]
    recorded_replies = [dict(reply) for reply in replies[: request["states"]]]
    if fault == "totals":
        replies = [{**reply, "gains": None} for reply in replies]
    missing = "it shows none" if "no states" in fault else ""
    if tensors and not missing:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out / "states.safetensors")
    mends = ["kernel: the norm of every layer"] if request["mend"] else []
    write(out, replies, totals, recorded_replies, {"mends": mends, "states_missing": missing})


def write(out: Path, replies: list, totals: dict | None, recorded: list, more: dict) -> None:
    result = {"engine": "toy 1.0", "replies": replies, "totals": totals, "recorded": recorded}
    (out / "result.json").write_text(json.dumps(result | {"mends": [], "states_missing": ""} | more))
    report(stage="done")


def spoil(draft, fault: str) -> None:
    """Give the draft what a wrong kernel or wrong layers give it."""
    import torch

    with torch.no_grad():
        if fault.startswith("kernel"):  # another layer's norm
            for layer in draft.layers:
                layer.self_attn.k_norm.weight.mul_(torch.linspace(0.2, 3, len(layer.self_attn.k_norm.weight)))
    if fault == "layers":
        layers = draft.config.target_layer_ids
        object.__setattr__(draft.config, "target_layer_ids", tuple(layer - 1 for layer in layers))


def misbehave(fault: str, out: Path) -> None:
    """End as engines end."""
    if fault == "crash":
        raise RuntimeError("shape '[3, 4]' is invalid for input of size 5")
    if fault == "port":
        raise OSError(98, "Address already in use")
    if fault == "memory":
        os.kill(os.getpid(), 9)
    if fault == "silent":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        (out / "pids").write_text(f"{os.getpid()} {child.pid}")
        time.sleep(600)
    if fault == "nothing":
        sys.exit(0)
