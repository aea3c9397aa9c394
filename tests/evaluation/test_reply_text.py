"""Replies as text: every token's own part of it, also where a character is several tokens."""

from pathlib import Path

from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers import decoders as tokenizer_decoders
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from pipeline.evaluation.reply_text import PROMPT_CHARACTERS, reply_text, spread_over_domains, token_texts
from pipeline.target.chat_template import load_tokenizer

TINY = Path("data/tiny-qwen3")


def bytes_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer in which every byte of UTF-8 is a token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizer_decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@given(st.text(st.characters(exclude_categories=("Cs",)), max_size=30))
def test_the_texts_of_all_tokens_are_the_text(text):
    tokenizer = bytes_tokenizer()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) == len(text.encode())
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids)
    assert "".join(texts) == text


def test_a_character_of_several_tokens_is_with_its_last():
    tokenizer = bytes_tokenizer()
    assert token_texts(tokenizer, tokenizer("aé\n", add_special_tokens=False)["input_ids"]) == ["a", "", "é", "\n"]


def test_a_tokenizer_written_in_python_gives_texts_too():
    tokenizer = ByT5Tokenizer()
    ids = tokenizer("aé</s>", add_special_tokens=False)["input_ids"]
    assert not tokenizer.is_fast and token_texts(tokenizer, ids) == ["a", "", "é", "</s>"]


def test_special_tokens_are_shown_and_a_prompt_keeps_its_end():
    tokenizer = load_tokenizer(TINY)
    prompt = tokenizer("A sentence. " * 200 + "<|im_end|>", add_special_tokens=False)["input_ids"]
    ids = tokenizer("Some words here.<|im_end|>", add_special_tokens=False)["input_ids"]
    shown = reply_text(3, tokenizer, prompt, ids)
    assert (shown.sample, len(shown.tokens)) == (3, len(ids))
    assert "".join(shown.tokens) == "Some words here.<|im_end|>"
    assert shown.prompt.endswith("sentence. <|im_end|>")
    assert len(shown.prompt) == PROMPT_CHARACTERS


def test_every_domain_is_shown_before_a_second_of_any():
    assert spread_over_domains(["a", "a", "a", "b", "c"], 4) == [0, 1, 3, 4]
    assert spread_over_domains(["a", "b"], 12) == [0, 1]


def fallback_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer that falls back to bytes, as those of Gemma and Llama."""
    words = ["<unk>", "▁a", "b", ".", *(f"<0x{byte:02X}>" for byte in range(256))]
    model = models.BPE(
        vocab={word: at for at, word in enumerate(words)}, merges=[], unk_token="<unk>", byte_fallback=True
    )
    tokenizer = Tokenizer(model)
    replaced = tokenizer_decoders.Replace("▁", " ")
    tokenizer.decoder = tokenizer_decoders.Sequence(
        [replaced, tokenizer_decoders.ByteFallback(), tokenizer_decoders.Fuse()]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@given(st.lists(st.integers(0, 259), max_size=12))
@example([1, 4 + 0x0A, 4 + 0xE5, 3])
def test_any_tokens_have_texts_also_where_bytes_are_no_utf8(ids):
    texts = token_texts(fallback_tokenizer(), ids)
    assert len(texts) == len(ids)
