"""Writes small caches in the forms of other trainers, from the descriptions of these forms: what a target of ours
computes, as they would have stored it."""

import json
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from pipeline.target.loading import load_target
from pipeline.target.model import tap_layers


@dataclass
class Computed:
    """A sample: ids int64 [T], mask [T], tuple entries [L + 1, T, D], the last layer before the norm and after it."""

    ids: Tensor
    mask: Tensor
    entries: Tensor
    raw: Tensor
    normed: Tensor

    def layers(self, named: list[int], dtype: torch.dtype) -> Tensor:
        """Layers by our convention, [T, K, D]."""
        return torch.stack([self.entries[layer + 1] for layer in named], dim=1).to(dtype)


def compute(folder: Path, count: int = 12, seed: int = 0, longest: int = 40) -> list[Computed]:
    """Samples of random tokens, the second half of each supervised, and all that the target computes for them."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(8, longest + 1, count)
    return compute_of(folder, [(rng.integers(0, 250, T), np.arange(T) >= T // 2) for T in lengths])


@torch.no_grad()
def compute_of(folder: Path, samples: list[tuple[np.ndarray, np.ndarray]]) -> list[Computed]:
    """All that the target computes for samples of ids and mask [T]."""
    model, made = load_target(str(folder)), []
    depth = model.config.num_hidden_layers
    for ids_T, mask_T in samples:
        ids = torch.from_numpy(ids_T.astype(np.int64))
        with tap_layers(model, [depth - 1]) as taken:
            truth = model(ids[None], output_hidden_states=True, use_cache=False)
        entries = torch.stack([entry[0] for entry in truth.hidden_states[:-1]])
        mask = torch.from_numpy(np.array(mask_T))
        made.append(Computed(ids, mask, entries, taken[depth - 1][0], truth.hidden_states[-1][0]))
    return made


def write_specforge(
    folder: Path, samples: list[Computed], named: list[int], *, dtype=torch.bfloat16, last="normed", eagle=False
) -> Path:
    """`rows_0-5000/data_<i>.ckpt`: the form of DFlash and DSpark, or of EAGLE-3, which has an axis of 1 before."""
    place = folder / "rows_0-5000"
    place.mkdir(parents=True)
    for number, sample in enumerate(samples):
        record = {"input_ids": sample.ids, "loss_mask": sample.mask.long()}
        wide = sample.layers(named, dtype).flatten(1)
        final = {"normed": sample.normed, "raw": sample.raw, "none": None}[last]
        if eagle:
            record |= {"aux_hidden_state": wide[None], "hidden_state": final.to(dtype)[None]}
        else:
            record["hidden_states"] = wide
            if final is not None:
                record["target_last_hidden_states"] = final.to(dtype)
        torch.save(record, place / f"data_{number}.ckpt")
    return folder


def write_speculators(
    folder: Path, samples: list[Computed], named: list[int], *, dtype=torch.bfloat16, last="raw"
) -> Path:
    """A prepared data set with `hidden_states/hs_<i>.safetensors` in it: [T, K + 1, D], the last layer behind."""
    from datasets import Dataset

    rows = [{"input_ids": sample.ids.tolist(), "loss_mask": sample.mask.long().tolist()} for sample in samples]
    Dataset.from_list(rows).save_to_disk(str(folder))
    place = folder / "hidden_states"
    place.mkdir()
    for number, sample in enumerate(samples):
        final = {"normed": sample.normed, "raw": sample.raw}[last][:, None].to(dtype)
        held = torch.cat([sample.layers(named, dtype), final], dim=1).contiguous()
        save_file({"token_ids": sample.ids, "hidden_states": held}, place / f"hs_{number}.safetensors")
    return folder


def write_deepspec(folder: Path, samples: list[Computed], named: list[int], *, last="normed", per_shard=5) -> Path:
    """A manifest, an index of 56 bytes a sample, and shards of `per_shard` samples."""
    folder.mkdir(parents=True)
    index, shards = [], []
    for number, sample in enumerate(samples):
        if number % per_shard == 0:
            shards.append(bytearray())
        final = {"normed": sample.normed, "raw": sample.raw}[last]
        parts = [
            sample.ids.numpy().astype("<i4").tobytes(),
            bytes([1]) * len(sample.ids),
            sample.mask.numpy().astype(np.uint8).tobytes(),
            bits(sample.layers(named, torch.bfloat16)),
            bits(final.bfloat16()),
        ]
        starts = []
        for part in parts:
            starts.append(len(shards[-1]))
            shards[-1] += part
        index.append(struct.pack("<QIIQQQQQ", number, len(shards) - 1, len(sample.ids), *starts))
    names = [f"shard-{number:05d}.bin" for number in range(len(shards))]
    for name, data in zip(names, shards, strict=True):
        (folder / name).write_bytes(data)
    (folder / "samples.idx").write_bytes(b"".join(index))
    manifest = {
        "version": 2,
        "num_samples": len(samples),
        "num_shards": len(shards),
        "target_layer_ids": named,
        "hidden_dtype": "bfloat16",
        "token_dtype": "int32",
        "mask_dtype": "uint8",
        "index_record_size": 56,
        "hidden_size": int(samples[0].normed.shape[1]),
        "shards": [{"shard_id": number, "file_name": name} for number, name in enumerate(names)],
        "target_model_name_or_path": "made/for-a-test",
        "max_length": 4096,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2, sort_keys=True))
    return folder


def bits(states: Tensor) -> bytes:
    return states.contiguous().view(torch.int16).numpy().tobytes()
