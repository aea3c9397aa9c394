"""Published folders from anywhere: nothing in them runs, leads out of them, waits or takes memory that they do not
pay for."""

import json
import os
import pickle
import resource
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from forms import backbone, specforge_training, zlab_dflash

from pipeline.errors import UsageError
from pipeline.published import load_draft_folder
from pipeline.published.weights import open_folder
from pipeline.target.head import TargetHead

ROOT = Path(__file__).parents[2]
MEMORY = 3 << 30  # bytes of address space: torch itself takes half of it


@pytest.fixture
def folder(tmp_path):
    return zlab_dflash(tmp_path / "folder")


class Runs:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


class Huge:
    """Takes a terabyte when it is unpickled; `weights_only=True` would let it."""

    def __reduce__(self):
        return bytearray, (1 << 40,)


def pickled(folder, state, name="pytorch_model.bin"):
    (folder / "model.safetensors").unlink(missing_ok=True)
    torch.save(state, folder / name)


def test_weights_in_a_pickle_are_read(folder):
    pickled(folder, {name: torch.nn.Parameter(tensor) for name, tensor in backbone().items()})
    draft = load_draft_folder(folder, TargetHead(torch.ones(40, 16), torch.ones(40, 16)))
    assert torch.equal(draft.fc.weight, backbone()["fc.weight"])


@pytest.mark.parametrize("make", [Runs, Huge])
def test_what_a_pickle_would_call_is_refused_and_not_called(folder, tmp_path, make):
    hostile = Runs(tmp_path / "ran") if make is Runs else Huge()
    pickled(folder, backbone() | {"extra": hostile})
    with pytest.raises(UsageError, match="holds more than tensors"):
        open_folder(folder)
    assert not (tmp_path / "ran").exists()


def test_a_bare_pickle_is_refused_and_not_loaded(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Runs(tmp_path / "ran")))
    with pytest.raises(UsageError, match="cannot be read"):
        open_folder(folder)
    assert not (tmp_path / "ran").exists()


def test_a_pickle_that_unpacks_to_more_than_it_is_is_refused(folder):
    pickled(folder, backbone())
    file = folder / "pytorch_model.bin"
    with zipfile.ZipFile(file) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in parts.items():
            archive.writestr(name, data + bytes(1 << 20))
    with pytest.raises(UsageError, match=r"not laid out as torch\.save"):
        open_folder(folder)


def test_a_tensor_that_repeats_one_value_is_refused(folder):
    pickled(folder, backbone() | {"fc.weight": torch.zeros(1).expand(1 << 20, 1 << 20)})
    with pytest.raises(UsageError, match=r"fc\.weight is no plain tensor"):
        open_folder(folder)


def test_a_storage_that_is_not_there_is_refused(folder):
    pickled(folder, backbone())
    file = folder / "pytorch_model.bin"
    with zipfile.ZipFile(file) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in parts.items():
            archive.writestr(name, data[:8] if "/data/" in name else data)
    with pytest.raises(UsageError, match=r"cannot be read|and names more"):
        load_draft_folder(folder, TargetHead(torch.ones(40, 16), torch.ones(40, 16)))


def test_a_training_state_that_holds_objects_is_refused_with_a_way_out(tmp_path):
    folder = specforge_training(tmp_path / "folder")
    torch.save({"draft_state_dict": backbone(), "args": Path("x")}, folder / "training_state.pt")
    with pytest.raises(UsageError, match="as safetensors with the tool that made it"):
        open_folder(folder)


def header(folder, entries, data=b""):
    text = json.dumps(entries).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)


def test_a_tensor_larger_than_its_file_is_refused(folder):
    header(folder, {"fc.weight": {"dtype": "F32", "shape": [1 << 30, 1 << 30], "data_offsets": [0, 1 << 62]}})
    with pytest.raises(UsageError, match="cannot be read"):
        open_folder(folder)


def test_a_header_larger_than_its_file_is_refused(folder):
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 62) + b"{}")
    with pytest.raises(UsageError, match="cannot be read"):
        open_folder(folder)


@pytest.mark.parametrize("name", ["../out.safetensors", "/etc/passwd", "a/b.safetensors", "model.bin", 7])
def test_an_index_that_leads_elsewhere_is_refused(folder, name):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"fc.weight": name}}))
    with pytest.raises(UsageError, match="names no safetensors files beside it"):
        open_folder(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_pipe_is_not_waited_for(folder, name):
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(UsageError, match=r"cannot be read|holds no"):
        open_folder(folder)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"a":' * 100_000,
        "[]",
        "7",
        "{}",
        '{"architectures": 7}',
        '{"dflash_config": []}',
        " " * (5 << 20),
    ],
)
def test_a_config_of_any_form_is_refused_in_words(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(UsageError, match=r"config\.json"):
        open_folder(folder)


SIZES = ["vocab_size", "hidden_size", "num_hidden_layers", "block_size", "intermediate_size", "num_attention_heads"]


@pytest.mark.parametrize("key", [*SIZES, "max_position_embeddings", "head_dim"])
@pytest.mark.parametrize("value", [10**13, -1, 1.5, "16", None, [16], {}, True])
def test_no_size_that_a_config_states_is_believed(folder, key, value):
    flat = json.loads((folder / "config.json").read_text())
    (flat["dflash_config"] if key == "block_size" else flat)[key] = value
    (folder / "config.json").write_text(json.dumps(flat))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        opened = open_folder(folder)
    except UsageError:
        opened = None
    # No tensor of DFlash is as long as the vocabulary or the positions; what is absent or null follows from the rest.
    free = key in ("vocab_size", "max_position_embeddings") and value == 10**13
    absent = value is None and key in ("head_dim", "block_size")
    assert opened is None or free or absent
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # KiB


def test_a_hostile_folder_takes_no_more_memory_than_there_is(folder, tmp_path):
    """All of them again under a limit on the address space, in a process of its own, by the command that people use."""
    pickled(folder, backbone() | {"extra": Huge()})
    command = (
        f"import resource; resource.setrlimit(resource.RLIMIT_AS, ({MEMORY}, {MEMORY})); "
        f"from pipeline.cli import main; main(['check-export', {str(folder)!r}])"
    )
    done = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stderr.startswith("error: check-export:"), done.stderr
    assert "holds more than tensors (__builtin__.bytearray)" in done.stderr
