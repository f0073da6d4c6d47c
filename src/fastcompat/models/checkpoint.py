"""A model's files: that nothing else is loaded, their fingerprint, and the weights in them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastcompat.errors import ModelError
from fastcompat.hub import model_file
from fastcompat.wording import first_sentence


def refuse_other_files(model: str, revision: str | None) -> None:
    """ModelError where transformers would load something else than config.json and model.safetensors, or beside them.

    Neither a fingerprint nor a checkpoint's header would tell, and some of it depends on what is installed.
    """
    config = model_file(model, "config.json", revision)
    adapter = model_file(model, "adapter_config.json", revision)
    if adapter is not None or (config is None and model_file(model, "adapter_model.safetensors", revision) is not None):
        raise ModelError(
            f"{model}: holds an adapter (adapter_config.json), which transformers attaches only where peft is "
            "installed; merge it into its base model with peft (merge_and_unload, then save_pretrained into another "
            f"directory) and name that, or name the base model{_base_of(adapter)}"
        )
    if Path(model).is_dir():
        if config is None:
            raise ModelError(f"{model}: this directory has no config.json, so it is not a Hugging Face model")
        shard = next(Path(model).glob("shard-*-model-*-of-*.safetensors"), None)
        if shard is not None:
            raise ModelError(
                f"{model}: holds a distributed checkpoint ({shard.name}), which transformers loads instead of "
                "model.safetensors; save the model with save_pretrained into another directory"
            )
    others = {} if config is None else json.loads(config.read_text(encoding="utf-8"))
    if isinstance(others, dict) and others.get("configuration_files"):
        raise ModelError(
            f"{model}: config.json names other configurations for other versions of transformers "
            "(configuration_files); remove that line, and what is computed is what config.json says"
        )


def _base_of(adapter: Path | None) -> str:
    """ ", NAME" where an adapter's configuration says what it was made for."""
    try:
        base = json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"] if adapter else None
    except (OSError, ValueError, KeyError, TypeError):
        base = None
    return f", {base}" if isinstance(base, str) and base else ""


def fingerprint(model: str, revision: str | None = None) -> str:
    """SHA-256 over the content of a model's config.json and of the weights that are loaded, wherever they lie.

    A hub model is downloaded for it. Raises ModelError where there are no safetensors.
    """
    total = hashlib.sha256()
    config = model_file(model, "config.json", revision)
    assert config is not None
    for path in (config, *weight_files(model, revision)):
        # The hub's cache names a large file's blob after its SHA-256: no need to read gigabytes again.
        blob = path.resolve().name
        digest = blob if path.is_symlink() and len(blob) == 64 else _sha256(path)
        total.update(f"{path.name} {digest}\n".encode())
    return total.hexdigest()


def weight_files(model: str, revision: str | None = None) -> list[Path]:
    """The safetensors files that transformers loads: one, or the shards that an index names. ModelError without any."""
    single = model_file(model, "model.safetensors", revision)
    if single is not None:
        return [single]
    index = model_file(model, "model.safetensors.index.json", revision)
    if index is None:
        raise ModelError(_without_safetensors(model))
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{model}: {index.name} is damaged: it has no weight_map") from error
    files = {name: model_file(model, name, revision) for name in names}
    missing = [name for name, path in files.items() if path is None]
    if missing:
        raise ModelError(f"{model}: {missing[0]} is missing, which model.safetensors.index.json names")
    return [path for path in files.values() if path is not None]


def tensor_shapes(model: str, revision: str | None = None) -> dict[str, tuple[int, ...]]:
    """The names and shapes of a model's weights, from the headers of its safetensors. ModelError without any."""
    found: dict[str, tuple[int, ...]] = {}
    for path in weight_files(model, revision):
        with _opened(model, path) as file:
            found |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """Where a weight lies: `n_bytes` from `offset` on in a file, its values one after the other."""

    path: Path
    offset: int
    n_bytes: int
    shape: tuple[int, ...]
    dtype: torch.dtype | None  # None: one that is not known here


# What safetensors calls them.
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def stored_tensors(model: str, revision: str | None = None) -> dict[str, StoredTensor]:
    """All weights of a model by name, from the headers of its safetensors.

    Raises ModelError for a file that is damaged, or shorter than its header says.
    """
    found: dict[str, StoredTensor] = {}
    for path in weight_files(model, revision):
        with _opened(model, path):  # safetensors checks the header, and its ends against the file's
            pass
        with path.open("rb") as file:
            n_header = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(n_header))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            found[name] = StoredTensor(
                path=path,
                offset=8 + n_header + begin,
                n_bytes=end - begin,
                shape=tuple(entry["shape"]),
                dtype=_DTYPES.get(entry["dtype"]),
            )
    return found


def read_tensors(model: str, names: Iterable[str], revision: str | None = None) -> dict[str, torch.Tensor]:
    """Weights of a model as they are stored, on the CPU; names that it has not are left out."""
    wanted = set(names)
    found: dict[str, torch.Tensor] = {}
    for path in weight_files(model, revision):
        with _opened(model, path) as file:
            found |= {name: file.get_tensor(name) for name in wanted.intersection(file.keys())}
    return found


def have_equal_tensors(model: str, other: str, names: Iterable[str], revisions: tuple[str | None, str | None]) -> bool:
    """Whether two models store the same values under these names, bit for bit, in the same dtype."""
    with ExitStack() as stack:
        places: list[dict[str, Any]] = []
        for source, revision in zip((model, other), revisions, strict=True):
            files = [stack.enter_context(_opened(source, path)) for path in weight_files(source, revision)]
            places.append({name: file for file in files for name in file.keys()})  # noqa: SIM118
        for name in names:
            one, two = (place[name].get_tensor(name) for place in places)
            if (one.dtype, one.shape) != (two.dtype, two.shape):
                return False
            # As bytes: eight-bit floats cannot be compared.
            if not torch.equal(*(tensor.reshape(-1).view(torch.uint8) for tensor in (one, two))):
                return False
    return True


def _opened(model: str, path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ModelError(f"{model}: {path.name} is damaged: {first_sentence(error)}") from error


def _without_safetensors(model: str) -> str:
    directory = Path(model)
    if not directory.is_dir():
        return f"{model}: has no safetensors weights on the hub, or the hub cannot be reached and the cache lacks them"
    pickled = sorted(path.name for kind in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in directory.glob(kind))
    if pickled:
        return (
            f"{model}: holds only pickled weights ({pickled[0]}), which can run code when they are loaded; "
            "convert them with save_pretrained(safe_serialization=True)"
        )
    return f"{model}: this directory has no model.safetensors"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# Weights of decoder layers; old checkpoints carry buffers (rotary frequencies, causal masks) besides.
LAYER_WEIGHT = re.compile(r"(layers|\bh|blocks)\.\d+\.(?!.*(inv_freq|masked_bias|attn\.bias|attention\.bias)$)")
