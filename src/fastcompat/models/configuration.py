"""What config.json says of a model: whether it is supported, how long its sequences may be, its widths, its dtype.

Nothing else in fastcompat reads a configuration of transformers. A value may be one for the whole model or another one
in every layer (a list, or transformers' `per_layer_config`, whose values raise where they are asked of the whole
model); it may be missing, None, or no number at all. Here that is a default, never an exception.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from fastcompat.errors import ModelError
from fastcompat.models.checkpoint import refuse_other_files
from fastcompat.wording import first_sentence

# What a model is loaded for: the middle of the name of transformers' mapping from configurations to classes.
Task = Literal["CAUSAL_LM", "SEQUENCE_CLASSIFICATION"]

# Quantised weights that transformers turns back into plain ones while it loads them, the same on any device. Not FP8:
# where blocks do not divide a weight it turns them back into others (docs/log.md).
DEQUANTISED = ("mxfp4",)


def load_config(model: str, revision: str | None) -> Any:
    """The model's configuration, or a ModelError that says which of the usual mistakes this is.

    Refused too is what makes transformers compute something else than config.json and the weights say: adapters, other
    files, quantised weights.
    """
    from transformers import AutoConfig

    try:
        if not Path(model).is_dir() and (model.startswith((".", "/", "~")) or model.count("/") > 1):
            raise ModelError(
                f"{model}: no such directory; give a model directory or a hub id such as Qwen/Qwen2.5-0.5B"
            )
        refuse_other_files(model, revision)
        config = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=False)
    except ModelError:
        raise
    except Exception as error:  # every class of configurations checks its values in its own way
        if "trust_remote_code" in str(error) or "custom code" in str(error):
            raise ModelError(
                f"{model}: this model needs code from its own repository, which fastcompat never runs; "
                "use a model of an architecture that transformers has"
            ) from error
        raise ModelError(f"{model}: cannot be read: {first_sentence(error)}") from error
    for part in {id(part): part for part in (config, text_config(config))}.values():
        _refuse_other_weights(model, part)
    return config


def _refuse_other_weights(model: str, config: Any) -> None:
    """ModelError for weights that lie elsewhere, or are quantised by a method that needs a package or a device.

    What a quantised layer computes depends on what is there (a GPU rounds the activations of FP8 layers, a CPU does
    not), and a fingerprint must stand for one function. `DEQUANTISED` is marked here to be undone at loading.
    """
    elsewhere = read(config, "transformers_weights")
    if elsewhere is not None:
        raise ModelError(
            f"{model}: config.json says that the weights lie in {elsewhere} (transformers_weights); call them "
            "model.safetensors and remove that line"
        )
    quantisation = read(config, "quantization_config")
    if quantisation is None:
        return
    method = quantisation.get("quant_method") if isinstance(quantisation, dict) else None
    if method not in DEQUANTISED:
        raise ModelError(
            f"{model}: its weights are quantised ({method or 'quantization_config in config.json'}), and what they "
            "compute depends on the packages and the device that are there; use the model that it was made from"
        )
    quantisation["dequantize"] = True


def refuse_unsupported(name: str, config: Any, full: Any = None, *, task: Task = "CAUSAL_LM") -> None:
    """ModelError for architectures that would be wrong when packed, told from the configuration or the class.

    full: the model, or its class; None: the class that transformers has for the configuration and the task.
    """
    kind = read(config, "model_type")
    if read(config, "is_encoder_decoder", False):
        raise ModelError(f"{name}: an encoder-decoder ({kind}) has no causal loss over one sequence")
    if full is None:
        import transformers

        mapping = getattr(transformers, f"MODEL_FOR_{task}_MAPPING")
        if type(config) not in mapping:
            what = {"CAUSAL_LM": "causal language model", "SEQUENCE_CLASSIFICATION": "sequence classifier"}[task]
            raise ModelError(f"{name}: transformers has no {what} for type {kind!r}")
        full = mapping[type(config)]
    if getattr(full, "_is_stateful", False):
        raise ModelError(
            f"{name}: {kind} carries a recurrent state (a state-space or hybrid model), which leaks from one packed "
            "sequence into the next; it is not supported"
        )
    other = {str(layer) for layer in layer_types(config)} - {"full_attention", "sliding_attention"}
    if other:
        raise ModelError(
            f"{name}: layers of type {', '.join(sorted(other))} cannot be computed over a prefix forest; not supported"
        )


def text_config(config: Any) -> Any:
    """The part of a configuration that describes the language model; all of it where there are no parts."""
    try:
        return config.get_text_config()
    except Exception:  # several parts could be meant
        return config


def plain_attention(model: Any) -> str:
    """transformers' name of the attention that computes what `model` is: sdpa where it does, else eager.

    Some versions say that Gemma-2 goes with sdpa, which leaves the soft cap of its attention out without a word.
    """
    capped = read(text_config(model.config), "attn_logit_softcapping")
    return "sdpa" if model._supports_sdpa and not capped else "eager"


def read(config: Any, name: str, default: Any = None) -> Any:
    """The value of `name` for the whole model; the default where there is none, or where layers differ in it."""
    try:
        value = getattr(config, name, None)
    except Exception:  # layers differ, or it is a property, which computes
        value = None
    return default if value is None else value


def number(config: Any, name: str, default: float) -> float:
    """The value of `name` where it is a finite number, else the default."""
    value = read(config, name)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number else default


def layers(config: Any) -> list[Any]:
    """What each layer of the language model is configured by: all by one configuration, or each by its own."""
    text = text_config(config)
    if read(text, "per_layer_attributes"):
        return list(text.per_layer_config)
    return [text] * (n_layers(text) or 0)


def largest(config: Any, *names: str) -> int | None:
    """The largest positive whole number under the first of these names that has one: of all layers, and of all parts.

    Parts are the configurations inside a configuration (of attention, of experts); they count where the language model
    itself has no such number.
    """
    text = text_config(config)
    parts = [part for name in read(text, "sub_configs") or () if hasattr(part := read(text, name), "to_dict")]
    for owners in ([text], parts):
        for name in names:
            found = [number for part in owners for number in _numbers(_values(part, name))]
            if found:
                return max(found)
    return None


def _values(config: Any, name: str) -> list[Any]:
    """What a configuration has under a name, for all layers at once or for each."""
    if name in (read(config, "per_layer_attributes") or ()):
        return [read(layer, name) for layer in layers(config)]
    return [read(config, name)]


def _numbers(value: Any) -> Iterator[int]:
    """Every positive whole number in a value, however deep in lists and dictionaries it lies."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if value > 0 and math.isfinite(value) and value == int(value):
            yield int(value)
    elif isinstance(value, Mapping):
        yield from _numbers(list(value.values()))
    elif isinstance(value, Iterable) and not isinstance(value, (str, bytes)):
        for item in value:
            yield from _numbers(item)


def n_layers(config: Any) -> int | None:
    """The language model's number of layers."""
    return next(_numbers(read(text_config(config), "num_hidden_layers")), None)


def layer_types(config: Any) -> list[Any]:
    """What each layer is, "full_attention", "sliding_attention" ...; [] where a configuration does not say."""
    kinds = read(text_config(config), "layer_types")
    return list(kinds) if isinstance(kinds, (list, tuple)) else []


def n_windowed_layers(config: Any) -> int:
    """How many layers see only a sliding window."""
    kinds = layer_types(config)
    if kinds:
        return kinds.count("sliding_attention")
    return sum(bool(read(layer, "sliding_window")) for layer in layers(config))


def windows(config: Any) -> list[int | None]:
    """The sliding window of each layer in tokens; None where it sees everything, as far as the configuration says."""
    kinds = layer_types(config)
    found: list[int | None] = [largest(layer, "sliding_window") for layer in layers(config)]
    if len(kinds) == len(found):
        found = [window if kind == "sliding_attention" else None for kind, window in zip(kinds, found, strict=True)]
    return found


def head_width(config: Any) -> int | None:
    """C of queries and keys, or of values where those are wider; the widest of all layers."""
    latent = [largest(config, f"qk_{part}_head_dim") or 0 for part in ("nope", "rope")]
    widths = [largest(config, name) or 0 for name in ("head_dim", "qk_head_dim", "v_head_dim", "swa_head_dim")]
    hidden, n_heads = largest(config, "hidden_size"), largest(config, "num_attention_heads")
    widest = max(sum(latent), *widths)
    if widest or hidden is None or n_heads is None:
        return widest or None
    return -(-hidden // n_heads)


def resolve_dtype(dtype: str, config: Any, device: torch.device) -> torch.dtype:
    """The dtype that a model is loaded in; "auto": as stored, or float32 where this device is slower in that."""
    if dtype != "auto":
        chosen: torch.dtype = getattr(torch, dtype)
        return chosen
    stored: Any = read(config, "dtype") or read(text_config(config), "dtype")
    if isinstance(stored, str):
        stored = getattr(torch, stored.removeprefix("torch."), None)
    if not isinstance(stored, torch.dtype) or stored not in (torch.bfloat16, torch.float16):
        return torch.float32
    if device.type == "cpu" and (stored == torch.float16 or (stored == torch.bfloat16 and not native_bfloat16())):
        return torch.float32  # torch's float16, and bfloat16 without the instruction, are slower than float32 on a CPU
    return stored


def native_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 natively (AVX512-BF16, AMX or Arm's BF16 extension)."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return any(flag in flags for flag in ("avx512_bf16", "amx_bf16", " bf16"))


def logit_scale(config: Any) -> float:
    """What multiplies the logits between head and loss: Cohere's `logit_scale`, one over Granite's `logits_scaling`."""
    text = text_config(config)
    divisor = number(text, "logits_scaling", 0.0)
    return number(text, "logit_scale", 0.0) or (1.0 / divisor if divisor else 1.0)


def softcap(config: Any) -> float | None:
    """Gemma-2's bound on the logits, which a tanh keeps; None where there is none."""
    return number(text_config(config), "final_logit_softcapping", 0.0) or None


def model_lengths(config: Any) -> tuple[int | None, int | None]:
    """(context length, rope boundary) of a configuration, in tokens; None where there is none.

    LongRoPE takes its long factors for the whole call once one sequence passes the original context: such a sequence
    is computed alone, as the plain loop would. Dynamic NTK keeps a state between calls, so that a length beyond the
    original context has no one value: it ends there.
    """
    text = text_config(config)
    context = largest(text, "max_position_embeddings", "n_positions", "max_target_positions", "max_seq_len")
    parameters = read(text, "rope_parameters")
    parameters = parameters if isinstance(parameters, dict) else {}
    nested = [value for value in parameters.values() if isinstance(value, dict)] or [parameters]
    kinds = {str(value.get("rope_type", "default")) for value in nested}
    original = list(_numbers([value.get("original_max_position_embeddings") for value in nested]))
    boundary = min(original) if original else largest(text, "original_max_position_embeddings") or context
    if any("dynamic" in kind for kind in kinds):
        return boundary, None
    return context, (boundary if "longrope" in kinds else None)


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """How a model is loaded. `dtype` "auto": as stored, or float32 where this device is slower in the stored one.

    deterministic: on a GPU no product is divided along what it sums over (`ops.exact_products`).
    """

    device: str = "auto"
    dtype: str = "auto"
    revision: str | None = None
    deterministic: bool = False

    def __post_init__(self) -> None:
        known = ("auto", "float32", "bfloat16", "float16")
        if self.dtype not in known:
            raise ModelError(f"dtype {self.dtype!r} is not one of {', '.join(known)}")


def resolve_device(device: str) -> torch.device:
    """The device that "auto", "cpu", "cuda:1" ... names. Raises ModelError where there is no such device."""
    if device == "auto":
        # Counted, which needs no CUDA: where a process has touched it, what it forks cannot use it.
        return torch.device("cuda" if torch.cuda.device_count() else "cpu")
    try:
        chosen = torch.device(device)
        if chosen.type not in ("cpu", "cuda", "mps", "xpu"):
            raise RuntimeError("it is not one of cpu, cuda, mps, xpu")
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"device {device!r} is not available: {first_sentence(error)}") from error
    return chosen
