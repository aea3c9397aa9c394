"""Train the bundled target: a Qwen3 of 8 layers on conversations that the generator writes.

    python data/train_target.py --out data/tiny-qwen3      # about an hour on two cores
    python data/score_target.py data/tiny-qwen3

Each phase draws fresh conversations; `--from-phase` goes on from the weights in the folder. Matrices of the layers are
trained by Muon, everything else by AdamW. Weights are kept in fp32 and multiplied in bf16, which is ten times faster on
a CPU that has the instructions; the file holds them rounded to bf16.

    B conversations   T positions
"""

import argparse
import copy
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from answer import load
from generate import draw_turns
from make_tokenizer import make_tokenizer
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM

Sample = tuple[list[int], list[int]]  # ids, and which of them are reply
SEED = 0
WINDOW = 8192  # conversations sorted by length together
LOG_EVERY = 25


@dataclass(frozen=True)
class Phase:
    """One stretch of training."""

    steps: int
    horizon: int  # the steps that the learning rate's schedule was laid for; a phase may stop short of it
    batch_tokens: int  # padding included
    lr: float
    warmup: int
    cooldown: float  # share of the horizon over which the learning rate falls to 2 %
    seed: int
    conversations: int
    shares: dict[str, float]  # of the conversations; 1 where not named


PHASES = [
    Phase(1201, 2800, 4096, 4e-3, 100, 0.4, 0, 100_000, {"arithmetic": 2.0, "copy": 1.5, "noise": 0.4}),
    Phase(800, 1200, 6144, 3e-3, 30, 0.5, 100, 90_000, {"arithmetic": 2.0, "copy": 1.5, "noise": 0.4}),
    # The eight domains were learnt by now; copying takes more practice.
    Phase(
        *(420, 420, 2 * 6144, 2.5e-3, 30, 0.5, 300, 90_000),
        {"arithmetic": 1.5, "copy": 5.0, "lists": 1.5, "python": 1.5, "noise": 0.3},
    ),
    Phase(300, 300, 2 * 6144, 2e-3, 20, 0.7, 400, 45_000, {"table": 2.0, "sequence": 1.5, "json": 1.5, "noise": 0.4}),
]


def new_model(tokenizer: PreTrainedTokenizerBase) -> Qwen3ForCausalLM:
    """Return the untrained target: 5.8 million parameters."""
    torch.manual_seed(SEED)
    config = Qwen3Config(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3ForCausalLM(config)


def tokenise(tokenizer: PreTrainedTokenizerBase, turns: list[tuple[str, str]]) -> Sample:
    """Return a conversation as ids and the mask of its replies."""
    messages = [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    out = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    return out["input_ids"], out["assistant_masks"]


def batches(pool: list[Sample], tokens: int, rng: Random) -> Iterator[list[Sample]]:
    """Yield batches of about equal length and at most TOKENS, every pass over the pool in another order."""
    while True:
        order = rng.sample(pool, len(pool))
        for first in range(0, len(order), WINDOW):
            groups: list[list[Sample]] = [[]]
            for sample in sorted(order[first : first + WINDOW], key=lambda sample: len(sample[0])):
                if (len(groups[-1]) + 1) * len(sample[0]) > tokens:
                    groups.append([])
                groups[-1].append(sample)
            rng.shuffle(groups)
            yield from groups


def padded(samples: list[Sample], pad: int) -> tuple[Tensor, Tensor]:
    """Return ids and reply mask [B, T], padded on the right: causal attention needs no more."""
    T = max(len(ids) for ids, _ in samples)
    ids_BT = torch.tensor([ids + [pad] * (T - len(ids)) for ids, _ in samples])
    mask_BT = torch.tensor([mask + [0] * (T - len(mask)) for _, mask in samples]).bool()
    return ids_BT, mask_BT


def loss_of(model: Qwen3ForCausalLM, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Return the mean cross-entropy of the replies' tokens."""
    hidden = model.model(input_ids=ids_BT, use_cache=False).last_hidden_state[:, :-1][mask_BT[:, 1:]]
    return F.cross_entropy(model.lm_head(hidden).float(), ids_BT[:, 1:][mask_BT[:, 1:]])


def optimisers(model: Qwen3ForCausalLM) -> list[torch.optim.Optimizer]:
    """Return Muon for the layers' matrices, with steps as large as AdamW's, and AdamW for the rest."""
    matrices = [weight for weight in model.model.layers.parameters() if weight.ndim == 2]
    taken = set(map(id, matrices))
    others = [weight for weight in model.parameters() if id(weight) not in taken]
    return [
        torch.optim.Muon(matrices, momentum=0.95, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def lr_at(step: int, phase: Phase) -> float:
    """Return the learning rate: warm-up, constant, and linear to 2 % of it."""
    falling = 0.02 + 0.98 * (phase.horizon - step) / (phase.cooldown * phase.horizon)
    return phase.lr * min(1.0, (step + 1) / phase.warmup, falling)


def train(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerBase, number: int, log: Path) -> None:
    """Train one phase, in place."""
    phase, began = PHASES[number], time.monotonic()
    rng = Random(phase.seed + 1)
    pool = [tokenise(tokenizer, draw_turns(rng, phase.shares)) for _ in range(phase.conversations)]
    work = copy.deepcopy(model).bfloat16()
    work.set_attn_implementation("eager")  # flash attention on a CPU is slow backwards on rows this short
    for layer in work.model.layers:
        layer.compile(dynamic=True)
    chosen, stream = optimisers(model), batches(pool, phase.batch_tokens, Random(phase.seed))
    tokens = total = 0
    for step in range(phase.steps):
        ids_BT, mask_BT = padded(next(stream), tokenizer.pad_token_id)
        loss = loss_of(work, ids_BT, mask_BT)
        loss.backward()
        update(model, work, chosen, lr_at(step, phase))
        tokens, total = tokens + ids_BT.numel(), total + loss.item()
        if (step + 1) % LOG_EVERY == 0:
            minutes = round((time.monotonic() - began) / 60, 2)
            line = {"phase": number, "step": step + 1, "loss": round(total / LOG_EVERY, 4), "tokens": tokens}
            write(log, line | {"minutes": minutes})
            total = 0


def update(model: Qwen3ForCausalLM, work: Qwen3ForCausalLM, chosen: list[torch.optim.Optimizer], lr: float) -> None:
    """Take the copy's gradients, clipped, step on the fp32 weights and hand them back to the bf16 copy."""
    torch.nn.utils.clip_grad_norm_(work.parameters(), 1.0)
    for weight, copied in zip(model.parameters(), work.parameters(), strict=True):
        weight.grad, copied.grad = copied.grad.float(), None
    for optimiser in chosen:
        optimiser.param_groups[0]["lr"] = lr
        optimiser.step()
    with torch.no_grad():
        for weight, copied in zip(model.parameters(), work.parameters(), strict=True):
            copied.copy_(weight)


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
    """Save the weights, rounded to bf16."""
    rounded = copy.deepcopy(model).bfloat16()
    rounded.config.dtype = torch.bfloat16
    rounded.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    rounded.save_pretrained(out)


def write(log: Path, line: dict) -> None:
    """Add a line to the log and show it."""
    with open(log, "a") as file:
        file.write(json.dumps(line) + "\n")
    print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("data/tiny-qwen3"))
    parser.add_argument("--from-phase", type=int, default=0, help="go on from the weights in the folder")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    log = args.out / "train.jsonl"
    if args.from_phase:
        model, tokenizer = load(args.out)
    else:
        log.unlink(missing_ok=True)
        tokenizer = make_tokenizer(SEED, PHASES[0].shares)
        tokenizer.save_pretrained(args.out)
        model = new_model(tokenizer)
    for number in range(args.from_phase, len(PHASES)):
        write(log, {"phase": number} | asdict(PHASES[number]))
        train(model, tokenizer, number, log)
        save(model, tokenizer, args.out)  # also between phases: a crash loses one


if __name__ == "__main__":
    main()
