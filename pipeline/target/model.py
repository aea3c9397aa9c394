"""Reads the states of the target, a Hugging Face decoder, and writes a cache's copy of what training needs of it.

States are counted by the convention of `pipeline/target/layers.py`.

Never used by `train-draft`. Any causal LM with one list of decoder layers will do, and the text part of a multi-modal
model: layers, norm and head are found by their kind, not by the model's name.

    B samples   T positions   D hidden size   V vocabulary
"""

import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

from pipeline.cache.atomic import process_lock, write_errors
from pipeline.cache.catalog import Catalog, has_target
from pipeline.cache.file_writer import new_target
from pipeline.cache.layout import CONFIG, HEAD, TOKENS, WEIGHTS
from pipeline.errors import UsageError
from pipeline.target.chat_template import load_tokenizer
from pipeline.target.files import complete_config, tokenizer_files
from pipeline.target.head import TargetHead, logit_scale
from pipeline.target.kv_cache import kv_argument
from pipeline.target.several_devices import same_weights, whole_weight
from pipeline.target.weights import check_weights_if_recorded, weight_facts


def _decoder(model: PreTrainedModel) -> tuple[nn.Module, nn.ModuleList]:
    """Return the module that runs the decoder layers, and their list, first to last.

    `get_decoder` of some models returns the module around it. UsageError unless there is exactly one such list.
    """
    depth, outer = model.config.get_text_config().num_hidden_layers, model.get_decoder()
    for modules in ([outer], list(outer.children())):
        found = [
            (module, child)
            for module in modules
            for child in module.children()
            if isinstance(child, nn.ModuleList) and len(child) == depth
        ]
        if found:
            break
    if len(found) != 1:
        raise UsageError(
            f"{type(model).__name__} is no plain decoder: {len(found)} lists of {depth} layers in it, wanted one; "
            "this target needs an engine of its own"
        )
    return found[0]


def decoder(model: PreTrainedModel) -> nn.Module:
    """Return the module that runs the decoder layers and the last norm. UsageError unless there is exactly one."""
    return _decoder(model)[0]


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """Return the target's decoder layers, first to last. UsageError unless there is exactly one such list."""
    return _decoder(model)[1]


def final_norm(model: PreTrainedModel) -> nn.Module | None:
    """Return the norm between the last layer and the LM head, or None where no module's class name says "norm"."""
    norms = [child for child in decoder(model).children() if "norm" in type(child).__name__.lower()]
    return norms[-1] if norms else None


@contextmanager
def tap_layers(model: PreTrainedModel, layers: Iterable[int]) -> Iterator[dict[int, Tensor]]:
    """Yield a dict that every forward in the context fills with {layer: raw residual [B, T, D]}, for these layers.

    The tensors are the model's own memory: copy what has to outlive the forward, and clear the dict. A forward raises
    UsageError where a layer returns no such state.
    """
    taps: dict[int, Tensor] = {}
    modules = decoder_layers(model)
    handles = [_tap(modules, layer, taps) for layer in layers]
    try:
        yield taps
    finally:
        for handle in handles:
            handle.remove()


def _tap(modules: nn.ModuleList, layer: int, taps: dict[int, Tensor]):
    def before(module, args, kwargs):
        taps[layer] = _residual(module, args[0] if args else kwargs["hidden_states"])

    def after(module, args, output):
        taps[layer] = _residual(module, output[0] if isinstance(output, tuple) else output)

    if layer == -1:
        return modules[0].register_forward_pre_hook(before, with_kwargs=True)
    return modules[layer].register_forward_hook(after)


def _residual(module: nn.Module, state: Tensor) -> Tensor:
    if state.ndim == 3:
        return state
    raise UsageError(
        f"{type(module).__name__} passes on states of shape {list(state.shape)}, not one residual stream of samples, "
        "positions and width; no draft here reads several streams, so this target cannot be captured"
    )


def run_decoder(model: PreTrainedModel, input_ids: Tensor, kv: Cache | None = None):
    """Run the target without its LM head; `last_hidden_state` [B, T, D] is after the last norm.

    kv: the kv cache that it reads and extends; None for none.
    """
    inner = decoder(model)
    return inner(input_ids=input_ids, **({"use_cache": False} if kv is None else kv_argument(inner, kv)))


def lm_logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Return the target's own logits [..., V] in fp32 for states after the last norm [..., D]; scaled, capped."""
    config = model.config.get_text_config()
    logits = model.get_output_embeddings()(hidden).float() * logit_scale(config.to_dict())
    cap = getattr(config, "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap


@contextmanager
def float32_by_layer(model: PreTrainedModel) -> Iterator[None]:
    """Compute in float32 within the block: a layer's weights are widened for its own forward, and then as they were.

    Takes the memory of one layer, or of the LM head, where a float32 copy of the target takes twice the target's.
    """
    layers = [*decoder_layers(model)]
    inside = {module for layer in layers for module in layer.modules()}
    parts = [(layer, True) for layer in layers]
    parts += [(module, False) for module in model.modules() if module not in inside and [*_own_tensors(module, False)]]
    kept: dict[Tensor, Tensor] = {}

    def widen(module: nn.Module, args: tuple, recurse: bool) -> None:
        for tensor in _own_tensors(module, recurse):
            if tensor.is_floating_point() and tensor.dtype != torch.float32:
                kept[tensor] = tensor.data
                tensor.data = tensor.data.float()

    def restore(module: nn.Module, args: tuple, output: object, recurse: bool) -> None:
        for tensor in _own_tensors(module, recurse):
            tensor.data = kept.pop(tensor, tensor.data)

    hooks = []
    for module, recurse in parts:
        hooks.append(module.register_forward_pre_hook(partial(widen, recurse=recurse)))
        hooks.append(module.register_forward_hook(partial(restore, recurse=recurse), always_call=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _own_tensors(module: nn.Module, recurse: bool) -> Iterator[Tensor]:
    """Yield a module's parameters and buffers, with those of the modules in it if `recurse`."""
    yield from module.parameters(recurse)
    yield from module.buffers(recurse)


def stop_tokens(model: PreTrainedModel) -> frozenset[int]:
    """Return the tokens that end a reply, from all of the target's configs; a multi-modal model has several."""
    found = (
        model.config.get_text_config().eos_token_id,
        getattr(model.config, "eos_token_id", None),
        getattr(model.generation_config, "eos_token_id", None),
    )
    return frozenset(stop for stops in found for stop in ([stops] if type(stops) is int else stops or ()))


def head_of(model: PreTrainedModel) -> TargetHead:
    """Return the target's frozen embedding and LM head with embedding scale and soft cap; a logit scale is folded in.

    Both whole, wherever the target is spread; of ranks that share it, all have to call this.
    UsageError for a head that is not one dense matrix. That nothing else changes the logits is checked by the probe.
    """
    config = model.config.get_text_config()
    embed, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or getattr(head, "bias", None) is not None:
        raise UsageError(f"{type(model).__name__}: its LM head is not one matrix without a bias; no draft can share it")
    for what, module in (("embedding", embed), ("LM head", head)):
        kind = getattr(getattr(module, "weight", None), "dtype", None)
        if kind not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            raise UsageError(f"{type(model).__name__}: its {what} is quantised ({kind}); no draft can share it")
    scale = logit_scale(config.to_dict())
    embed_VD, head_VD = whole_weight(embed), whole_weight(head)
    if same_weights(embed, head, embed_VD, head_VD):
        head_VD = embed_VD
    if scale != 1.0:
        head_VD = (head_VD.float() * scale).to(head_VD.dtype)
    softcap = getattr(config, "final_logit_softcapping", None)
    return TargetHead(embed_VD, head_VD, embed_scale=_embed_scale(model), logit_softcap=softcap)


def _embed_scale(model: PreTrainedModel) -> float:
    """Return the embedding's factor before layer 0: Gemma has it in the module, rounded; others in the config."""
    embed = model.get_input_embeddings()
    scale = getattr(embed, "embed_scale", None)
    if scale is not None:
        return float(torch.as_tensor(scale).to(embed.weight.dtype))
    config = model.config.get_text_config()
    named = (getattr(config, name, None) for name in ("embedding_multiplier", "scale_emb"))
    return float(next((value for value in named if value is not None), 1.0))


def store_target(
    catalog: Catalog, folder: Path, head: TargetHead, config: PreTrainedConfig, stops: Iterable[int]
) -> None:
    """Write the cache's `target/`, unless it exists: config, tokenizer, special tokens, head, checksums of the weights.

    stops: the tokens that end a reply. One process writes, others wait for it. UsageError when it exists and was made
    from other weights.
    """
    check_weights_if_recorded(catalog, folder)
    if has_target(catalog):
        return
    with write_errors(catalog.path, "the target's files"), process_lock(catalog.path, "target"):
        if not has_target(catalog):
            with new_target(catalog) as new_folder:
                for path in tokenizer_files(folder):
                    shutil.copyfile(path, new_folder / path.name)
                (new_folder / CONFIG).write_bytes(complete_config(folder, config))
                (new_folder / TOKENS).write_text(special_tokens(folder, stops), encoding="utf-8")
                (new_folder / WEIGHTS).write_text(json.dumps(weight_facts(folder), indent=1, sort_keys=True) + "\n")
                head.save(new_folder / HEAD)
    check_weights_if_recorded(catalog, folder)  # another process may have stored them while we waited


def special_tokens(folder: Path, stops: Iterable[int]) -> str:
    """Return the text of tokens.json: ids of mask, pad, bos, of all that end a reply, and the tokenizer's length."""
    tokenizer = load_tokenizer(folder)
    tokenizer_eos = {tokenizer.eos_token_id} - {None}
    tokens = {
        "bos": tokenizer.bos_token_id,
        "eos": sorted(tokenizer_eos | set(stops)),
        "length": len(tokenizer),
        "mask": tokenizer.mask_token_id,
        "pad": tokenizer.pad_token_id,
    }
    return json.dumps(tokens, indent=1, sort_keys=True) + "\n"
