"""Foreign files that are cut short, damaged, or made to harm: one line that names the file, and nothing taken."""

import json
import os
import resource
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from disks import mounted
from foreign_maker import compute, write_deepspec, write_specforge, write_speculators
from safetensors.torch import load_file, save_file
from tiny import save_target

from pipeline.errors import DataError, ProofError, RoomError, UsageError
from stages.import_cache.run import run
from stages.import_cache.source import load

LAYERS = [1, 3, 4]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return save_target(tmp_path_factory.mktemp("made") / "tiny-random")


@pytest.fixture(scope="module")
def samples(target):
    return compute(target, count=6)


class Runs:
    """A pickle of it, opened with `weights_only=False`, would run a command."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


class Huge:
    """Asks for 10 TB of zeros."""

    def __reduce__(self):
        return bytearray, (10**13,)


def replaced(record, **changes):
    """A SpecForge record with some entries changed, or (None) left out."""
    return {key: value for key, value in {**record, **changes}.items() if value is not None}


WRONG = {
    "a mask of another length": (lambda r: replaced(r, loss_mask=r["loss_mask"][:-1]), "rows in its loss mask"),
    "fewer states than tokens": (lambda r: replaced(r, hidden_states=r["hidden_states"][:-2]), "rows in its layers"),
    "another width": (
        lambda r: replaced(r, hidden_states=r["hidden_states"][:, :64]),
        "64 wide, 3 layers of 32 are 96",
    ),
    "no mask": (lambda r: replaced(r, loss_mask=None), "not loss_mask"),
    "no states": (lambda r: replaced(r, hidden_states=None), "not hidden_states"),
    "a mask of threes": (lambda r: replaced(r, loss_mask=3 * r["loss_mask"]), "not of zeros and ones"),
    "negative ids": (lambda r: replaced(r, input_ids=-1 - r["input_ids"]), "which no vocabulary has"),
    "ids that are no whole numbers": (lambda r: replaced(r, input_ids=r["input_ids"].float()), "wanted whole numbers"),
    "fp8 states": (
        lambda r: replaced(r, hidden_states=r["hidden_states"].to(torch.float8_e4m3fn)),
        "float8_e4m3fn; only bfloat16",
    ),
    "states of another type": (
        lambda r: replaced(r, hidden_states=r["hidden_states"].float()),
        r"last state is torch.bfloat16",
    ),
    "no last state, where others have one": (
        lambda r: replaced(r, target_last_hidden_states=None),
        "without the last one, .* not of one run",
    ),
    "another type than the others": (
        lambda r: {key: held.float() if "hidden" in key else held for key, held in r.items()},
        "torch.float32 states, .* not of one run",
    ),
    "a list": (lambda r: [r], "holds a list"),
    "text for states": (lambda r: replaced(r, hidden_states="states"), "no plain tensor"),
    "a sparse tensor": (lambda r: replaced(r, hidden_states=r["hidden_states"].to_sparse()), "no plain tensor"),
    "a tensor without memory": (
        lambda r: replaced(r, hidden_states=torch.empty(10**9, 10**6, device="meta")),
        "no plain tensor",
    ),
    "four bytes that claim 400 TB": (
        lambda r: replaced(r, hidden_states=torch.zeros(1).expand(10**8, 10**6)),
        "claims 400,000,000,000,000 bytes",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_ckpt_that_is_not_what_it_should_be_is_named(what, target, samples, tmp_path):
    change, match = WRONG[what]
    source = write_specforge(tmp_path / "sf", samples, LAYERS)
    path = source / "rows_0-5000" / "data_3.ckpt"
    torch.save(change(torch.load(path, weights_only=True)), path)

    with pytest.raises(DataError, match=match) as found:
        run(source, tmp_path / "cache", model=str(target), layers="1,3,4")

    assert str(path) in str(found.value) and "\n" not in str(found.value)
    assert any(remedy in str(found.value) for remedy in ("make that file again", "name with --layers", "capture again"))


def test_a_pickle_that_would_run_code_is_refused_and_nothing_runs(tmp_path):
    torch.save({"input_ids": Runs(tmp_path / "ran")}, tmp_path / "data_0.ckpt")
    with pytest.raises(DataError, match=r"data_0.ckpt: .* \(it names \w+.mkdir\); nothing in it was run"):
        load(tmp_path / "data_0.ckpt")
    assert not (tmp_path / "ran").exists()


def test_what_asks_for_terabytes_is_refused_within_a_gigabyte(tmp_path):
    path = tmp_path / "data_0.ckpt"
    torch.save({"input_ids": Huge()}, path)
    script = (
        "import resource, sys; import torch; from pathlib import Path;"
        "from pipeline.errors import DataError; from stages.import_cache.source import load\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try:\n    held = load(Path(sys.argv[1]))\n    kind = type(held['input_ids']).__name__\n"
        "except DataError as error:\n    kind = 'refused'\n"
        "after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "print(kind, (after - before) // 1024)"
    )
    limited = lambda: resource.setrlimit(resource.RLIMIT_AS, (64 << 30, 64 << 30))  # noqa: E731
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)], cwd=ROOT, capture_output=True, text=True, preexec_fn=limited
    )
    kind, grown = done.stdout.split()
    assert kind == "refused" and int(grown) < 1024


def test_an_archive_that_unpacks_to_more_than_it_is_is_refused(tmp_path):
    plain, packed = tmp_path / "plain.ckpt", tmp_path / "data_0.ckpt"
    torch.save({"input_ids": torch.zeros(1 << 20)}, plain)
    with zipfile.ZipFile(plain) as archive, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as bomb:
        for entry in archive.infolist():
            bomb.writestr(entry.filename, archive.read(entry))
    assert packed.stat().st_size < plain.stat().st_size / 100
    with pytest.raises(DataError, match=r"not as torch.save writes: 4,\d+,\d+ bytes in"):
        load(packed)


@pytest.mark.parametrize("keep", [0, 10, 2000, -1])
def test_a_ckpt_cut_short_is_named(keep, target, samples, tmp_path):
    source = write_specforge(tmp_path / "sf", samples, LAYERS)
    path = source / "rows_0-5000" / "data_2.ckpt"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"data_2.ckpt: cut short, or nothing .*make that file again"):
        run(source, tmp_path / "cache", model=str(target), layers="1,3,4")


def test_every_flipped_byte_of_a_pickle_is_read_or_refused_and_nothing_else(samples, tmp_path):
    source = write_specforge(tmp_path / "sf", samples[:1], LAYERS)
    path = source / "rows_0-5000" / "data_0.ckpt"
    data = path.read_bytes()
    start = data.index(b"\x80\x02")  # of the pickle
    refused = 0
    for at in range(start, start + 700, 3):
        path.write_bytes(data[:at] + bytes([data[at] ^ 0x41]) + data[at + 1 :])
        try:
            load(path)
        except DataError:
            refused += 1
    assert refused > 50


def test_packed_files_are_to_be_unpacked(target, tmp_path):
    (tmp_path / "sf").mkdir()
    (tmp_path / "sf" / "data_0.ckpt.gz").write_bytes(b"x")
    with pytest.raises(UsageError, match="gunzip"):
        run(tmp_path / "sf", tmp_path / "cache", model=str(target), layers="1,3,4")


@pytest.mark.parametrize("cut", [0, 4, 60, -1])
def test_safetensors_cut_short_are_named(cut, target, samples, tmp_path):
    source = write_speculators(tmp_path / "sp", samples, LAYERS)
    path = source / "hidden_states" / "hs_4.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(DataError, match=r"hs_4.safetensors: cut short or damaged .*make that file again"):
        run(source, tmp_path / "cache", model=str(target), layers="2,4,5")


def test_safetensors_that_claim_terabytes_are_named(target, samples, tmp_path):
    source = write_speculators(tmp_path / "sp", samples, LAYERS)
    path = source / "hidden_states" / "hs_4.safetensors"
    claim = {"hidden_states": {"dtype": "BF16", "shape": [10**6, 4, 10**6], "data_offsets": [0, 8 * 10**12]}}
    header = json.dumps(claim).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(64))
    with pytest.raises(DataError, match=r"hs_4.safetensors: cut short or damaged"):
        run(source, tmp_path / "cache", model=str(target), layers="2,4,5")


def test_masks_are_asked_for_and_have_to_be_of_the_same_tokens(target, samples, tmp_path):
    source = write_speculators(tmp_path / "sp", samples, LAYERS)
    alone = tmp_path / "alone"
    alone.mkdir()
    for path in (source / "hidden_states").iterdir():
        (alone / path.name).write_bytes(path.read_bytes())
    said = {"model": str(target), "layers": "2,4,5"}
    with pytest.raises(UsageError, match=r"name its folder, the one that holds state.json, with --masks"):
        run(alone, tmp_path / "cache", **said)
    others = write_speculators(tmp_path / "others", compute(target, count=6, seed=9), LAYERS)
    with pytest.raises(DataError, match=r"hs_0.safetensors: its tokens are not those of row 0 of .*--masks"):
        run(alone, tmp_path / "cache", **said, masks=others)
    fewer = write_speculators(tmp_path / "fewer", samples[:-1], LAYERS)
    with pytest.raises(DataError, match=r"hs_5.safetensors: .* has 5 rows, not that one"):
        run(alone, tmp_path / "cache", **said, masks=fewer)
    (tmp_path / "none").mkdir()
    with pytest.raises(UsageError, match="no saved data set"):
        run(alone, tmp_path / "cache", **said, masks=tmp_path / "none")

    assert run(alone, tmp_path / "cache", **said, masks=source).samples == 6


@pytest.mark.parametrize("write", [write_specforge, write_deepspec])
def test_masks_beside_files_that_hold_their_own_are_refused(write, target, samples, tmp_path):
    source = write(tmp_path / "source", samples, LAYERS)
    with pytest.raises(UsageError, match="source: its files hold each sample's loss mask, and --masks is for specul"):
        run(source, tmp_path / "cache", model=str(target), layers="1,3,4", masks=tmp_path)
    assert not (tmp_path / "cache").exists()


def test_safetensors_with_other_layers_than_named_are_refused(target, samples, tmp_path):
    source = write_speculators(tmp_path / "sp", samples, LAYERS)
    path = source / "hidden_states" / "hs_1.safetensors"
    held = load_file(path)
    save_file({**held, "hidden_states": held["hidden_states"][:, :2].contiguous()}, path)
    with pytest.raises(DataError, match=r"hs_1.safetensors: its hidden_states are \[\d+, 2, 32\], wanted \[tokens, 3"):
        run(source, tmp_path / "cache", model=str(target), layers="2,4,5")


def changed(source, **facts):
    path = source / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **facts}))


def shard_named(name):
    return lambda source: changed(source, shards=[{"shard_id": 0, "file_name": name}])


def index_with(at, form, value):
    """Overwrite one field of the index."""

    def change(source):
        data = bytearray((source / "samples.idx").read_bytes())
        struct.pack_into(form, data, at, value)
        (source / "samples.idx").write_bytes(data)

    return change


def cut(name, count):
    def change(source):
        path = source / name
        path.write_bytes(path.read_bytes()[:-count])

    return change


DEEPSPEC = {
    "another version": (lambda s: changed(s, version=3), "manifest.json: version 3, only 2 is read"),
    "fp8": (lambda s: changed(s, hidden_dtype="float8_e4m3fn"), "hidden_dtype is 'float8_e4m3fn'"),
    "another width": (lambda s: changed(s, hidden_size=64), "states of width 64, the target's are 32"),
    "a shard elsewhere": (shard_named("../../etc/passwd"), "out of order, or elsewhere"),
    "no such shard": (shard_named("shard-9.bin"), "shard-9.bin: missing, though the manifest names it"),
    "no JSON": (lambda s: (s / "manifest.json").write_text("{"), "manifest.json: cannot be read"),
    "a list": (lambda s: (s / "manifest.json").write_text("[" * 100_000), "manifest.json: cannot be read"),
    "no layers": (lambda s: changed(s, target_layer_ids=[]), "the manifest of something else"),
    "too many samples": (lambda s: changed(s, num_samples=7), "samples.idx: missing or cut short: 7 samples"),
    "an index cut short": (cut("samples.idx", 56), "samples.idx: missing or cut short"),
    "a shard cut short": (cut("shard-00001.bin", 1), r"shard-00001.bin, sample 5: .* cut short"),
    "another sample": (index_with(2 * 56, "<Q", 77), "its record 3 is of sample 77"),
    "a shard that is not": (index_with(2 * 56 + 8, "<I", 9), "shard 9"),
    "terabytes of tokens": (index_with(2 * 56 + 12, "<I", 2**32 - 1), "are not in the shard's"),
    "states past the end": (index_with(2 * 56 + 40, "<Q", 2**63), "are not in the shard's"),
    "padding": (index_with(2 * 56 + 24, "<Q", 0), "has padding among its tokens"),
}


@pytest.mark.parametrize("what", DEEPSPEC)
def test_a_target_cache_that_is_not_whole_is_named(what, target, samples, tmp_path):
    change, match = DEEPSPEC[what]
    source = write_deepspec(tmp_path / "ds", samples, LAYERS)
    change(source)
    with pytest.raises((DataError, UsageError), match=match) as found:
        run(source, tmp_path / "cache", model=str(target))
    assert str(source) in str(found.value) and "\n" not in str(found.value)


def test_a_manifest_of_other_layers_than_its_states_is_refused(target, samples, tmp_path):
    source = write_deepspec(tmp_path / "ds", samples, LAYERS)
    changed(source, target_layer_ids=[0, 1, 2])
    with pytest.raises(ProofError, match=r"they are the layers 1,3,4 counted from 0"):
        run(source, tmp_path / "cache", model=str(target))


def test_a_folder_of_nothing_or_of_two_forms_is_refused(target, samples, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="holds none or several of these"):
        run(tmp_path / "empty", tmp_path / "cache", model=str(target), layers="1")
    source = write_deepspec(tmp_path / "both", samples, LAYERS)
    write_specforge(source, samples, LAYERS)
    with pytest.raises(UsageError, match="holds none or several of these"):
        run(source, tmp_path / "cache", model=str(target), layers="1,3,4")
    with pytest.raises(UsageError, match="no such folder"):
        run(tmp_path / "nowhere", tmp_path / "cache", model=str(target))


def test_layers_are_asked_for_where_no_file_names_them(target, samples, tmp_path):
    source = write_specforge(tmp_path / "sf", samples, LAYERS)
    with pytest.raises(UsageError, match=r"no file of it says which layers it holds; name them .* --layers"):
        run(source, tmp_path / "cache", model=str(target))


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(target, samples, tmp_path):
    source = write_specforge(tmp_path / "sf", samples, LAYERS)
    with mounted(tmp_path / "small", "size=96k") as disk:
        with pytest.raises(RoomError, match=r"cannot write .*: No space left on device; free at least"):
            run(source, disk / "cache", model=str(target), layers="1,3,4")
        subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
        assert run(source, disk / "cache", model=str(target), layers="1,3,4").samples == 6
