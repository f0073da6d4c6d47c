"""What can be said of a model before its weights are loaded: whether it is supported, its limits, its fingerprint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from fastcompat.errors import ModelError

# What a model is loaded for: the middle of the name of transformers' mapping from configurations to classes.
Task = Literal["CAUSAL_LM", "SEQUENCE_CLASSIFICATION"]


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """How a model is loaded. `dtype` "auto": as stored, or float32 where this device is slower in the stored one."""

    device: str = "auto"
    dtype: str = "auto"
    revision: str | None = None

    def __post_init__(self) -> None:
        known = ("auto", "float32", "bfloat16", "float16")
        if self.dtype not in known:
            raise ModelError(f"dtype {self.dtype!r} is not one of {', '.join(known)}")


def load_config(model: str, revision: str | None) -> Any:
    """The model's configuration, or a ModelError that says which of the usual mistakes this is."""
    from transformers import AutoConfig

    if not Path(model).is_dir() and (model.startswith((".", "/", "~")) or model.count("/") > 1):
        raise ModelError(f"{model}: no such directory; give a model directory or a hub id such as Qwen/Qwen2.5-0.5B")
    if Path(model).is_dir() and not (Path(model) / "config.json").is_file():
        raise ModelError(f"{model}: this directory has no config.json, so it is not a Hugging Face model")
    try:
        return AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        if "trust_remote_code" in str(error) or "custom code" in str(error):
            raise ModelError(
                f"{model}: this model needs code from its own repository, which fastcompat never runs; "
                "use a model of an architecture that transformers has"
            ) from error
        raise ModelError(f"{model}: cannot be read: {first_sentence(error)}") from error


def refuse_unsupported(name: str, config: Any, full: Any = None, *, task: Task = "CAUSAL_LM") -> None:
    """ModelError for architectures that would be wrong when packed, told from the configuration or the class.

    full: the model, or its class; None: the class that transformers has for the configuration and the task.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{name}: an encoder-decoder ({config.model_type}) has no causal loss over one sequence")
    text = config.get_text_config()
    if full is None:
        import transformers

        mapping = getattr(transformers, f"MODEL_FOR_{task}_MAPPING")
        if type(config) not in mapping:
            kind = {"CAUSAL_LM": "causal language model", "SEQUENCE_CLASSIFICATION": "sequence classifier"}[task]
            raise ModelError(f"{name}: transformers has no {kind} for type {config.model_type!r}")
        full = mapping[type(config)]
    if getattr(full, "_is_stateful", False):
        raise ModelError(
            f"{name}: {config.model_type} carries a recurrent state (a state-space or hybrid model), which leaks from "
            "one packed sequence into the next; it is not supported"
        )
    other = set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if other:
        raise ModelError(
            f"{name}: layers of type {', '.join(sorted(other))} cannot be computed over a prefix forest; not supported"
        )


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
    names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
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
            if one.dtype != two.dtype or not torch.equal(one, two):
                return False
    return True


def _opened(model: str, path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ModelError(f"{model}: {path.name} is damaged: {first_sentence(error)}") from error


def model_file(model: str, name: str, revision: str | None) -> Path | None:
    """One file of a model directory, or of a hub model, downloaded if need be; None where there is none."""
    if Path(model).is_dir():
        path = Path(model) / name
        return path if path.is_file() else None
    from transformers.utils import cached_file

    found = cached_file(
        model,
        name,
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else Path(found)


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


def first_sentence(error: BaseException) -> str:
    """The first line of a library's error, without its trailing explanation."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(". ")


def resolve_device(device: str) -> torch.device:
    """The device that "auto", "cpu", "cuda:1" ... names. Raises ModelError where there is no such device."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        if chosen.type not in ("cpu", "cuda", "mps", "xpu"):
            raise RuntimeError("it is not one of cpu, cuda, mps, xpu")
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"device {device!r} is not available: {first_sentence(error)}") from error
    return chosen


def resolve_dtype(dtype: str, config: Any, device: torch.device) -> torch.dtype:
    """The dtype that a model is loaded in; "auto": as stored, or float32 where this device is slower in that."""
    if dtype != "auto":
        chosen: torch.dtype = getattr(torch, dtype)
        return chosen
    stored = config.dtype
    if isinstance(stored, str):
        stored = getattr(torch, stored)
    stored = stored or torch.float32
    if device.type == "cpu" and (stored == torch.float16 or (stored == torch.bfloat16 and not native_bfloat16())):
        return torch.float32  # torch's float16, and bfloat16 without the instruction, are slower than float32 on a CPU
    return stored if isinstance(stored, torch.dtype) else torch.float32


def native_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 natively (AVX512-BF16, AMX or Arm's BF16 extension)."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return any(flag in flags for flag in ("avx512_bf16", "amx_bf16", " bf16"))


def logit_scale(config: Any) -> float:
    """What multiplies the logits between head and loss: Cohere's `logit_scale`, one over Granite's `logits_scaling`."""
    if getattr(config, "logit_scale", None):
        return float(config.logit_scale)
    if getattr(config, "logits_scaling", None):
        return 1.0 / float(config.logits_scaling)
    return 1.0


def model_lengths(config: Any) -> tuple[int | None, int | None]:
    """(context length, rope boundary) of a configuration, in tokens; None where there is none.

    LongRoPE takes its long factors for the whole call once one sequence passes the original context: such a sequence
    is computed alone, as the plain loop would. Dynamic NTK keeps a state between calls, so that a length beyond the
    original context has no one value: it ends there.
    """
    config = config.get_text_config()
    context = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)] or [parameters]
    kinds = {str(value.get("rope_type", "default")) for value in nested}
    original = [value.get("original_max_position_embeddings") for value in nested]
    original += [getattr(config, "original_max_position_embeddings", None), context]
    boundary = next((int(value) for value in original if value), None)
    if any("dynamic" in kind for kind in kinds):
        return boundary, None
    return (int(context) if context else None), (boundary if "longrope" in kinds else None)
