"""The target's own replies, as it gives them one prompt at a time.

Prompts of about the same length share a batch, padded on the left; positions count from each prompt's own start.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from conversation import Conversation
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

LONGEST = 192  # tokens of a reply, its end included
BATCH = 256


def load(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the saved target, its bf16 weights run in fp32, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False
    )
    return model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, chats: list[list[dict]], temperature: float
) -> list[str | None]:
    """Return the next reply to each chat: greedy at temperature 0; None for one that is no usable reply."""
    prompts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) for chat in chats]
    replies: list[str | None] = [None] * len(chats)
    by_length = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    for start in range(0, len(by_length), BATCH):
        places = by_length[start : start + BATCH]
        decoded = decode(model, [prompts[place] for place in places], temperature, tokenizer.eos_token_id)
        for place, reply in zip(places, decoded, strict=True):
            replies[place] = usable(tokenizer, reply)
    return replies


@torch.inference_mode()
def decode(model: PreTrainedModel, prompts: list[list[int]], temperature: float, end: int) -> list[list[int]]:
    """Return each prompt's reply, token by token with a kv; a finished reply leaves the batch."""
    longest = max(map(len, prompts))
    ids_BT = torch.tensor([[end] * (longest - len(prompt)) + prompt for prompt in prompts])
    held_BT = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    at_BT = (held_BT.cumsum(-1) - 1).clamp(min=0)
    replies: list[list[int]] = [[] for _ in prompts]
    open_, kv = list(range(len(prompts))), DynamicCache(config=model.config)
    for _ in range(LONGEST):
        out = model(
            input_ids=ids_BT,
            attention_mask=held_BT,
            position_ids=at_BT,
            past_key_values=kv,
            use_cache=True,
            logits_to_keep=1,
        )
        token_B = sample(out.logits[:, -1], temperature)
        for row, token in zip(open_, token_B.tolist(), strict=True):
            replies[row].append(token)
        left = (token_B != end).nonzero()[:, 0]
        if not len(left):
            break
        if len(left) < len(open_):
            open_ = [open_[row] for row in left.tolist()]
            kv.batch_select_indices(left)
        ids_BT, at_BT = token_B[left, None], at_BT[left, -1:] + 1
        held_BT = F.pad(held_BT[left], (0, 1), value=1)
    return replies


def sample(logits_BV: Tensor, temperature: float) -> Tensor:
    """Return one token for each row: the likeliest at temperature 0."""
    if not temperature:
        return logits_BV.argmax(-1)
    return torch.multinomial((logits_BV / temperature).softmax(-1), 1)[:, 0]


def usable(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str | None:
    """Return the reply's text, or None if it has no end or its text would not be read back as the same tokens."""
    if tokenizer.eos_token_id not in ids:
        return None
    ids = ids[: ids.index(tokenizer.eos_token_id)]
    text = tokenizer.decode(ids)
    same = tokenizer.encode(text, add_special_tokens=False) == ids
    return text if same and not set(ids) & set(tokenizer.all_special_ids) else None


def play(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, conversations: list[Conversation], temperature: float
) -> list[list[dict] | None]:
    """Return each conversation's messages with the target's replies, earlier ones included; None if one is unusable."""
    chats: list[list[dict] | None] = [[] for _ in conversations]
    for turn in range(max(len(conversation.turns) for conversation in conversations)):
        open_ = [
            place
            for place, conversation in enumerate(conversations)
            if len(conversation.turns) > turn and chats[place] is not None
        ]
        for place in open_:
            chats[place].append({"role": "user", "content": conversations[place].turns[turn].user})
        replies = answer(model, tokenizer, [chats[place] for place in open_], temperature)
        for place, reply in zip(open_, replies, strict=True):
            if reply is None:
                chats[place] = None
            else:
                chats[place].append({"role": "assistant", "content": reply})
    return chats


def right(conversation: Conversation, chat: list[dict] | None) -> bool:
    """Return whether every reply of the chat is exactly right."""
    if chat is None:
        return False
    replies = [message["content"] for message in chat if message["role"] == "assistant"]
    return all(turn.check(reply) for turn, reply in zip(conversation.turns, replies, strict=True))
