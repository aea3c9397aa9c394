"""Token boundaries found by added tokens are equal to those by the tokenizer's own offsets."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from templates import PLAIN
from tiny import tokenizer as of_bytes
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from pipeline.target.chat_template import ChatTemplate
from stages.cache_hidden.tokenise import EncodedText, encode_texts

BUNDLED = Path(__file__).parents[2] / "data" / "tiny-qwen3"
PIECES = ("<|im_start|>", "<|im_end|>", "<|im", "|>", "user\n", "assistant\n", "word", " word", " ", "\n", "\n\n", "é")
PIECES += ("e", "\u0301", "日", "🤷🏽", "\u00a0", "x" * 30)


def of_words(**added) -> PreTrainedTokenizerFast:
    """A tokenizer as Llama 2's: a space before every word, and one token for whatever it does not know."""
    vocab = {text: at for at, text in enumerate(["<unk>", "▁", *"adeinorstuw", "\n", "é", "wo", "rd", "word"])}
    merges = [("w", "o"), ("r", "d"), ("wo", "rd")]
    inner = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True))
    inner.normalizer = normalizers.NFC()
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.add_special_tokens([AddedToken(text, special=True, **added) for text in ("<|im_start|>", "<|im_end|>")])
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>", unk_token="<unk>")


TOKENIZERS = {
    "bytes": of_bytes,
    "bundled": lambda: AutoTokenizer.from_pretrained(BUNDLED),
    "words": of_words,
    "words, white space taken": lambda: of_words(rstrip=True),
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def template(request, tmp_path_factory) -> ChatTemplate:
    folder = tmp_path_factory.mktemp("tokenizer")
    made = TOKENIZERS[request.param]()
    made.chat_template = PLAIN
    made.save_pretrained(folder)
    return ChatTemplate(folder)


@given(st.lists(st.sampled_from(PIECES), max_size=24).map("".join))
def test_boundaries_by_added_tokens_equal_those_by_offsets(template, text):
    template.needs_offsets = False
    (quick,) = encode_texts(template, [text], 4096)
    encoding = template.backend.encode(text, add_special_tokens=False)
    exact = EncodedText(template, text, encoding, cut=False, offsets=True)
    assert quick.ids.tolist() == exact.ids.tolist() == encoding.ids
    places = range(len(text) + 1)
    assert [quick.prompt_boundary(at) for at in places] == [exact.prompt_boundary(at) for at in places]
    assert [quick.boundary(at) for at in places] == [exact.boundary(at) for at in places]


def test_turns_between_added_tokens_need_no_offsets(tmp_path):
    of_bytes(PLAIN).save_pretrained(tmp_path)
    template = ChatTemplate(tmp_path)
    prompt = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    (encoded,) = encode_texts(template, [f"{prompt}said<|im_end|>\n"], 4096)
    start, stop = encoded.prompt_boundary(len(prompt)), encoded.boundary(len(prompt) + len("said<|im_end|>"))
    assert template.tokenizer.decode(encoded.ids[start:stop]) == "said<|im_end|>"
    assert not template.needs_offsets
    assert encoded.boundary(len("<|im_start|>us")) == 3 and template.needs_offsets
