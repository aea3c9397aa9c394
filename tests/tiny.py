"""A random target small enough for any test, with everything on that could go wrong unseen.

Its norm weights are not 1 (a lost or doubled norm would else change nothing), head_dim is not H / heads, the head is
not the embedding, and its tokenizer is byte-level, so any text is tokens.
"""

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "<|im_start|>{{ message['role'] + '\n' }}"
    "{%- if message['role'] == 'assistant' -%}"
    "{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}"
    "{%- else -%}{{ message['content'] }}<|im_end|>{%- endif -%}"
    "{{ '\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>"]


def tokenizer(template: str = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of 256 bytes and four special tokens (ids 256 to 259)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={letter: at for at, letter in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        mask_token="<|mask|>",
        chat_template=template,
    )


def config(**changes) -> Qwen3Config:
    """Six layers of width 32 over 264 tokens, four of them no tokenizer knows; `changes` override."""
    sizes = {
        "vocab_size": 264,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "eos_token_id": 258,
        "pad_token_id": 256,
        "bos_token_id": None,
    }
    return Qwen3Config(**{**sizes, **changes})


def random_model(shape: PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A causal LM of that config with seeded weights, large enough to disagree with itself, norms between 0.5 and 2."""
    generator = torch.Generator().manual_seed(seed)
    loader = AutoModelForCausalLM if type(shape) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModelForImageTextToText
    model = loader.from_config(shape, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            if weight.ndim == 1:
                weight.copy_(0.5 + 1.5 * torch.rand(weight.shape, generator=generator))
            else:
                spread = 1.0 if "embed" in name else 1.5 / weight.shape[-1] ** 0.5
                weight.copy_(spread * torch.randn(weight.shape, generator=generator))
    return model.requires_grad_(False)


def save_target(folder: Path, shape: PretrainedConfig | None = None, template: str = CHAT_TEMPLATE) -> Path:
    """Write a random target and its tokenizer as `save_pretrained` does."""
    return save_model(folder, random_model(shape or config()), template)


def save_model(folder: Path, model: PreTrainedModel, template: str = CHAT_TEMPLATE) -> Path:
    """Write a model and a tokenizer beside it."""
    model.save_pretrained(folder)
    tokenizer(template).save_pretrained(folder)
    return folder


def conversations(count: int = 24, seed: int = 0) -> list[dict]:
    """Short chats in three domains, a third of them of several turns, every fourth held out."""
    rng = random.Random(seed)
    words = ["red", "green", "blue", "one", "two", "three", "up", "down", "left", "right", "sun", "moon"]

    def phrase(low: int, high: int) -> str:
        return " ".join(rng.choices(words, k=rng.randint(low, high)))

    chats = []
    for at in range(count):
        messages = []
        for _ in range(rng.choice([1, 1, 2])):
            messages += [
                {"role": "user", "content": phrase(1, 4)},
                {"role": "assistant", "content": phrase(2, 8)},
            ]
        domain = ("colours", "numbers", "places")[at % 3]
        chats.append({"messages": messages, "domain": domain, "split": "heldout" if at % 4 == 3 else "train"})
    return chats


def write_jsonl(path: Path, rows: list) -> Path:
    """Write rows as JSON lines; a row that is a string is written as it stands."""
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def corpus_of(path: Path, rows) -> str:
    """Write rows, and return the file's name as a command takes it."""
    return str(write_jsonl(path, rows))


def other_weights(folder: Path) -> None:
    """Change one bit of a target's weights."""
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-2] ^= 64
    (folder / "model.safetensors").write_bytes(weights)
