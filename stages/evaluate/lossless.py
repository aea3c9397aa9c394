"""The proof that decoding is lossless: an independent plain loop, and a verdict on every difference from it.

Two forwards of one model over the same tokens, one with a block at once and one a token at a time, round differently,
and both round more than float32 does. Where two tokens' logits are closer than that, either is the target's choice: a
near tie. Anything else is a fault.

Plain replies depend on the target and the prompt, not on the draft, and take most of the time, so they can be kept in a
file. It is a manifest with its own hash, and records what decided its replies; under any other settings it is refused,
so that a stored reply is what plain decoding would give here and now, but for near ties where a processor of another
kind decoded it. It does not record how long decoding took.

Sampled replies cannot be compared; their tokens' quantiles in the target's own distribution are tested instead.

    T tokens of a reply   V vocabulary
"""

import math
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import combinations, zip_longest
from pathlib import Path

import numpy as np
import torch
import transformers
from pydantic import ValidationError
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from pipeline.cache.atomic import process_lock, write_errors
from pipeline.cache.manifest import read_canonical, write_canonical
from pipeline.errors import CacheError, ProofError, UsageError, VersionError
from pipeline.evaluation.decode import Decoded
from pipeline.evaluation.reports import MAX_SPREADS, NearTie, SampledLossless
from pipeline.json_files import Count, Counts, Record
from pipeline.target.kv_cache import kv_argument, kv_keyword
from pipeline.target.model import float32_by_layer
from pipeline.tensors import refuse_out_of_memory

NEAR_TIE_FACTOR = 4  # a near tie's gap in logits is at most so many times the difference between valid forwards
ENTRIES_AT_ONCE = 1 << 24  # of one [T, V] tensor in float64


@torch.no_grad()
def plain_decode(
    target: PreTrainedModel, prompt_ids: Sequence[int], max_new: int, stop_ids: Collection[int] = ()
) -> Decoded:
    """Decode greedily, one token a forward, as anyone would write it. Shares nothing with `speculative_decode`."""
    start_time = time.perf_counter()
    kv, new = None, []
    input_1N = torch.tensor([list(prompt_ids)], device=target.device)
    while len(new) < max_new:
        output = target(input_ids=input_1N, **kv_argument(target, kv), logits_to_keep=1)
        kv = getattr(output, kv_keyword(target))
        token = int(output.logits[0, -1].argmax())
        new.append(token)
        if token in stop_ids:
            break
        input_1N = torch.tensor([[token]], device=target.device)
    return plain_reply(new, time.perf_counter() - start_time)


def plain_reply(ids: list[int], seconds: float) -> Decoded:
    """Return a reply that was decoded one token a forward."""
    calls = len(ids) - 1
    return Decoded(ids, [1] * calls, [0] * calls, [0] * calls, [0] * calls, seconds)


class LosslessCheck:
    """Compares speculative and plain replies; their first difference is scored again in float32 without a kv cache.

    block: tokens verified at once, of each of `batch` prompts.
    """

    def __init__(self, target: PreTrainedModel, block: int, batch: int = 1):
        self.target, self.block, self.batch = target, block, batch

    def compare(self, prompt: str, prompt_ids: Sequence[int], fast: Decoded, plain: Decoded) -> NearTie | None:
        """Compare the replies to `prompt_ids`; None for identical ones, or the near tie at which the comparison ends.

        prompt: its name in messages. Raises ProofError for any other difference.
        """
        position = first_difference(fast.ids, plain.ids)
        if position is None:
            return None
        tokens = [reply[position] if position < len(reply) else None for reply in (fast.ids, plain.ids)]
        prefix = [*prompt_ids, *plain.ids[:position]]
        exact_V = self.float32_logits(prefix)
        logits = [None if token is None else float(exact_V[token]) for token in tokens]
        if None in tokens:  # equal so far, and only one goes on: a stop token or the limit is mishandled
            raise ProofError(_fault(prompt, position, tokens, logits, "only one of the two goes on"))
        difference = self.difference(prefix, len(prompt_ids), fast.lengths, exact_V)
        if abs(logits[0] - logits[1]) > NEAR_TIE_FACTOR * difference:
            cause = f"right forwards differ by {difference:.3g} there"
            raise ProofError(_fault(prompt, position, tokens, logits, cause))
        return NearTie(prompt=prompt, position=position, tokens=tokens, logits=logits, difference=difference)

    @torch.no_grad()
    def float32_logits(self, prefix: Sequence[int]) -> Tensor:
        """Logits [V] after `prefix`: one forward in float32, a layer at a time, no kv. RoomError."""
        ids_1T = torch.tensor([list(prefix)], device=self.target.device)
        remedy = "use a larger device, or --device cpu"
        with refuse_out_of_memory("judging a difference in float32", remedy), float32_by_layer(self.target):
            return self.target(input_ids=ids_1T, use_cache=False, logits_to_keep=1).logits[0, -1]

    @torch.no_grad()
    def difference(self, prefix: Sequence[int], prompt: int, lengths: Sequence[int], exact_V: Tensor) -> float:
        """Return how much valid forwards differ in a logit after `prefix`: the largest difference between two of three.

        Two replay the true tokens after a prefill of the prompt, a number of tokens: one in blocks of the accepted
        `lengths`, each padded to a whole block and to `batch` copies as when it was verified (shapes decide rounding,
        what fills them does not), the other a token at a time. They use no draft, no verification and no crop: a fault
        there must not widen the measure that is to find it. The third is `exact_V` [V], of float32: on some processors
        the two agree by chance, and then only it shows what the target's type rounds away. At least a step of that
        type at the largest logit, since forwards that round to different numbers are a step apart.
        """
        pieces = _in_blocks(list(prefix), prompt, lengths)
        by_block_V = self._replay(pieces, self.block, self.batch)
        first = min(prompt, len(prefix) - 1)
        single = [list(prefix[:first])] * (first > 0) + [[token] for token in prefix[first:]]
        single_V = self._replay(single, 1, 1)
        pairs = combinations((by_block_V, single_V, exact_V.float()), 2)
        return max(float_step(exact_V, self.target.dtype), *(float((a_V - b_V).abs().max()) for a_V, b_V in pairs))

    def _replay(self, pieces: Sequence[list[int]], width: int, batch: int) -> Tensor:
        """Prefill the target with a text's first piece, run `batch` copies over the others, each padded to `width`.

        Returns the last logits [V] of one copy.
        """
        kv, rows = DynamicCache(), 0
        for number, piece in enumerate(pieces):
            first = number == 0
            padded = piece if first else piece + piece[-1:] * (width - len(piece))
            ids_BT = torch.tensor([padded] * (1 if first else batch), device=self.target.device)
            logits_BTV = self.target(input_ids=ids_BT, **kv_argument(self.target, kv), logits_to_keep=int(first)).logits
            rows += len(piece)
            if first:
                kv.batch_repeat_interleave(batch)
            for layer in kv.layers:
                layer.keys, layer.values = layer.keys[..., :rows, :], layer.values[..., :rows, :]
        return logits_BTV[0, -1 if len(pieces) == 1 else len(pieces[-1]) - 1].float()


def float_step(logits_V: Tensor, dtype: torch.dtype) -> float:
    """Return the distance from one number of a type to the next, at the largest of some logits."""
    _, exponent = math.frexp(float(logits_V.abs().max()))  # 2^(exponent - 1) <= it < 2^exponent
    return math.ldexp(torch.finfo(dtype).eps, exponent - 1)


def first_difference(fast: Sequence[int], plain: Sequence[int]) -> int | None:
    """Return the first index at which two replies differ, or one ends; None when they are equal."""
    pairs = enumerate(zip_longest(fast, plain))
    return next((index for index, (token, plain_token) in pairs if token != plain_token), None)


def _in_blocks(prefix: list[int], prompt: int, lengths: Sequence[int]) -> list[list[int]]:
    """Cut a text into its prompt, the accepted blocks that it has whole, and its part of the next one."""
    pieces, start = [prefix[:prompt]], prompt
    for length in lengths:
        if start + length >= len(prefix):
            break
        pieces.append(prefix[start : start + length])
        start += length
    return pieces + [prefix[start:]] * (start < len(prefix))


def _fault(prompt: str, position: int, tokens: list, logits: list, cause: str) -> str:
    texts = [
        "the end" if token is None else f"token {token} (logit {logit:.6g})"
        for token, logit in zip(tokens, logits, strict=True)
    ]
    return (
        f"{prompt}: the output is not the target's. At token {position} of the reply speculative decoding gives "
        f"{texts[0]}, plain decoding {texts[1]}, and {cause}; verification, kv or stops are broken, please report it"
    )


@torch.no_grad()
def token_quantiles(
    target: PreTrainedModel, prompt_ids: Sequence[int], ids: Sequence[int], temperature: float
) -> list[float]:
    """Return the quantile of each token of a reply in the target's own distribution, likeliest first.

    That is the chance of a likelier token, and half of that of an equally likely one. One ordinary forward over the
    whole text, without kv: it shares nothing with `speculative_decode`.
    """
    text_1T = torch.tensor([[*prompt_ids, *ids[:-1]]], device=target.device)
    logits_TV = target(input_ids=text_1T, use_cache=False, logits_to_keep=len(ids)).logits[0]
    rows, quantiles = max(1, ENTRIES_AT_ONCE // logits_TV.shape[-1]), []
    for some_TV, own_T in zip(logits_TV.split(rows), torch.tensor(ids, device=target.device).split(rows), strict=True):
        p_TV = (some_TV.double() / temperature).softmax(-1)
        own_T1 = p_TV.gather(-1, own_T[:, None])
        quantiles += (p_TV * ((p_TV > own_T1) + 0.5 * (p_TV == own_T1))).sum(-1).tolist()
    return quantiles


def check_quantiles(quantiles: Sequence[float]) -> SampledLossless:
    """Return the mean quantile of sampled tokens, and how many std it is off 1/2. ProofError beyond MAX_SPREADS.

    A token drawn from the target has a quantile of mean 1/2, whatever came before it, and it is the mean of a
    uniform number given the token. So the sum of n of them stays at least as close to n/2 as that of n uniform
    numbers: z std of sqrt(n/12) off has a chance of at most 2 exp(-z^2 / 2). A mean below 1/2 is of tokens likelier
    than the target's, one above of less likely ones.
    """
    count = len(quantiles)
    excess = sum(quantile - 0.5 for quantile in quantiles)
    spreads = excess / (count / 12) ** 0.5 if count else 0.0
    if abs(spreads) > MAX_SPREADS:
        raise ProofError(
            f"the {count} tokens drawn are not the target's own: their mean place in its distribution is "
            f"{0.5 + excess / count:.3f}, {abs(spreads):.1f} spreads off 1/2; the rule of acceptance or a draft's q is "
            "wrong, please report it"
        )
    return SampledLossless(tokens=count, place=0.5 + excess / max(count, 1), spreads=spreads)


class DecidedBy(Record):
    """What a plain reply depends on besides the prompt; threads, device and versions where two logits tie."""

    target: str  # digest of its weights
    dtype: str
    device: str
    threads: Count
    torch: str
    transformers: str
    max_new: Count
    stops: Counts


class PlainRepliesFile(Record):
    decided_by: DecidedBy
    plain_replies: dict[str, Counts]  # token ids by `digest_of` the prompt


def reply_settings(target: PreTrainedModel, digest: str, max_new: int, stops: Collection[int]) -> DecidedBy:
    """Return what decides plain replies here; digest: of the target's weights."""
    return DecidedBy(
        target=digest,
        dtype=str(target.dtype).removeprefix("torch."),
        device=_device(target.device),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        transformers=transformers.__version__,
        max_new=max_new,
        stops=sorted(stops),
    )


def _device(device: torch.device) -> str:
    """The device's type, and what of its kind chooses other kernels."""
    if device.type == "cuda":
        return f"cuda, {torch.cuda.get_device_name(device)}"
    return f"cpu, {torch.backends.cpu.get_cpu_capability()}" if device.type == "cpu" else device.type


def digest_of(prompt_ids: Sequence[int]) -> str:
    """Return the digest of a prompt's ids, the key of its reply in the file."""
    return blake2b(np.array(prompt_ids, "<i8").tobytes(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class PlainReplies:
    """A file of plain replies as it was when opened, and those decoded since. Without a path: no replies."""

    path: Path | None = None
    decided_by: DecidedBy | None = None
    stored: dict[str, list[int]] = field(default_factory=dict)
    new: dict[str, list[int]] = field(default_factory=dict)

    @staticmethod
    def open(path: Path, decided_by: DecidedBy) -> "PlainReplies":
        """Open a file, which need not exist yet. UsageError when it is damaged, or of another target or settings."""
        return PlainReplies(path, decided_by, _read(path, decided_by))

    def find(self, prompt_ids: Sequence[int]) -> Decoded | None:
        """Return the stored reply to a prompt. Its seconds are unknown, so every ratio of them is NaN."""
        ids = self.stored.get(digest_of(prompt_ids))
        return None if ids is None else plain_reply(ids, float("nan"))

    def add(self, prompt_ids: Sequence[int], plain: Decoded) -> None:
        """Remember a reply for `write`."""
        self.new[digest_of(prompt_ids)] = plain.ids

    def write(self) -> None:
        """Add the new replies to the file, and keep those that others have added since. UsageError as in `open`."""
        if self.path is None or not self.new:
            return
        folder = self.path.absolute().parent
        with write_errors(self.path, "plain replies"), process_lock(folder, self.path.name):
            replies = _read(self.path, self.decided_by) | self.new
            write_canonical(self.path, {"decided_by": self.decided_by.model_dump(), "plain_replies": replies})


def _read(path: Path, decided_by: DecidedBy) -> dict[str, list[int]]:
    if not path.exists():
        return {}
    try:
        file = PlainRepliesFile.model_validate(read_canonical(path))
    except (CacheError, VersionError) as error:
        found = str(error).removesuffix("; run `pipeline verify`")
        raise UsageError(f"--plain {found}; remove it or name another file") from error
    except ValidationError:
        raise UsageError(f"--plain {path}: the manifest of something else; remove it or name another file") from None
    for key, wanted in decided_by:
        if (found := getattr(file.decided_by, key)) != wanted:
            raise UsageError(
                f"--plain {path} has replies decoded with {key} {found}, and here it is {wanted}; name another file"
            )
    return file.plain_replies
