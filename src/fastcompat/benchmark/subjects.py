"""The models that are measured: shapes of real ones with random weights, or a user's own.

A speed does not depend on the weights; the comparison of losses does, so random weights are drawn wide enough that
next-token distributions are peaked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from fastcompat.errors import ModelError, UsageError
from fastcompat.models import (
    CausalLM,
    ModelSettings,
    PackedModel,
    load_causal_lm,
    load_config,
    plain_attention,
    refuse_unsupported,
    resolve_device,
    resolve_dtype,
    weight_files,
    wrap,
)
from fastcompat.scoring import free_memory
from fastcompat.wording import first_sentence

# What fastcompat makes of a transformers model.
Packed = TypeVar("Packed", bound=PackedModel)


def smollm2_135m() -> Any:
    """SmolLM2-135M's shape."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
    )


def _qwen2_5(**shape: int) -> Any:
    from transformers import Qwen2Config

    return Qwen2Config(
        vocab_size=151936,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        **shape,
    )


def qwen2_5_0_5b() -> Any:
    """Qwen2.5-0.5B's shape."""
    return _qwen2_5(
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        max_position_embeddings=32768,
    )


def qwen2_5_1_5b() -> Any:
    """Qwen2.5-1.5B's shape."""
    return _qwen2_5(
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        max_position_embeddings=131072,
    )


def llama_3_2_3b() -> Any:
    """Llama-3.2-3B's shape."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=128256,
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=131072,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    )


def gemma_2_2b() -> Any:
    """Gemma-2-2B's shape: every other layer with a window of 4,096 tokens, soft caps on attention and logits."""
    from transformers import Gemma2Config

    return Gemma2Config(
        vocab_size=256000,
        hidden_size=2304,
        intermediate_size=9216,
        num_hidden_layers=26,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=256,
        max_position_embeddings=8192,
        query_pre_attn_scalar=256,
        sliding_window=4096,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
        tie_word_embeddings=True,
    )


SHAPES: dict[str, Callable[[], Any]] = {
    "SmolLM2-135M": smollm2_135m,
    "Qwen2.5-0.5B": qwen2_5_0_5b,
    "Qwen2.5-1.5B": qwen2_5_1_5b,
    "Llama-3.2-3B": llama_3_2_3b,
    "Gemma-2-2B": gemma_2_2b,
}


def random_model(
    shape: str, *, dtype: torch.dtype = torch.bfloat16, seed: int = 0, device: torch.device | str = "cpu"
) -> Any:
    """A transformers model of a shape, with random weights whose next-token distributions are peaked."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    # Drawn where it will live: three billion normal numbers take a CPU minutes.
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(SHAPES[shape](), dtype=dtype)
    draw_weights(model)
    return model.eval()


@torch.no_grad()
def draw_weights(model: Any) -> None:
    """Fill a transformers model's matrices at random; hidden states and what a head makes of them are of order 1."""
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.normal_(0.0, parameter.shape[1] ** -0.5)
    embedding = model.get_input_embeddings().weight
    embedding.normal_(0.0, 3.0 * embedding.shape[1] ** -0.5)


@dataclass(frozen=True, kw_only=True)
class Subject(Generic[Packed]):
    """A model that can be loaded again and again, with the same weights: as transformers has it, and by fastcompat."""

    name: str
    weights: str  # "random", or "its own"
    config: Any
    device: torch.device
    dtype: torch.dtype
    load_plain: Callable[[], Any]
    load_ours: Callable[[], Packed]

    def plain(self) -> Any:
        """The transformers model, with the library's own attention: sdpa, or eager where sdpa cannot compute it."""
        model = self.load_plain()
        model.set_attn_implementation(plain_attention(model))
        return model

    def float32(self) -> Any:
        """`plain()` with the same weights, rounded to `dtype`, in float32."""
        return self.plain().float()

    def refuse_too_large(self) -> None:
        """UsageError where two copies, or one in float32, do not fit into the device's memory.

        ModelError where transformers cannot make a model of the configuration.
        """
        from transformers import AutoModelForCausalLM

        try:
            with torch.device("meta"):
                n_parameters = sum(p.numel() for p in AutoModelForCausalLM.from_config(self.config).parameters())
        except Exception as error:  # classes fail as they like, some for want of a package
            raise ModelError(
                f"{self.name}: no model can be made of its config.json: {first_sentence(error)}"
            ) from error
        needed = n_parameters * max(4, 2 * self.dtype.itemsize)
        free = free_memory(self.device)
        if needed > free:
            raise UsageError(
                f"{self.name}: bench holds two copies of its {n_parameters / 1e9:.1f} billion parameters, or one in "
                f"float32: {needed / 2**30:.1f} GiB, where {free / 2**30:.1f} GiB of memory are free on "
                f"{self.device}; choose a smaller model or --shape, or another --device"
            )


def shape_subject(shape: str, *, device: str = "auto", dtype: str = "auto") -> Subject[CausalLM]:
    """One of `SHAPES` with random weights. Raises UsageError for another name. `dtype` "auto": as `resolve_dtype`."""
    if shape not in SHAPES:
        raise UsageError(f"--shape {shape}: there are {', '.join(SHAPES)}; for a model of yours: --base-model")
    settings = ModelSettings(device=device, dtype=dtype)
    place = resolve_device(settings.device)
    config = SHAPES[shape]()
    config.dtype = torch.bfloat16  # as these models are stored
    chosen = resolve_dtype(settings.dtype, config, place)
    load = partial(random_model, shape, dtype=chosen, device=place)
    return Subject(
        name=shape,
        weights="random",
        config=config,
        device=place,
        dtype=chosen,
        load_plain=load,
        load_ours=lambda: wrap(shape, load()),
    )


def model_subject(model: str, *, device: str = "auto", dtype: str = "auto") -> Subject[CausalLM]:
    """A hub id or a directory, as `load_causal_lm` takes it. Raises ModelError where it cannot be scored."""
    settings = ModelSettings(device=device, dtype=dtype)
    config = load_config(model, settings.revision)
    refuse_unsupported(model, config)
    weight_files(model, settings.revision)
    place = resolve_device(settings.device)
    chosen = resolve_dtype(settings.dtype, config, place)
    loaded = ModelSettings(device=str(place), dtype=str(chosen).removeprefix("torch."))

    def plain() -> Any:
        from transformers import AutoModelForCausalLM

        full = AutoModelForCausalLM.from_pretrained(
            model, config=config, dtype=chosen, use_safetensors=True, trust_remote_code=False
        )
        return full.to(place).eval()

    return Subject(
        name=Path(model).resolve().name if Path(model).is_dir() else model,
        weights="its own",
        config=config,
        device=place,
        dtype=chosen,
        load_plain=plain,
        load_ours=lambda: load_causal_lm(model, loaded),
    )
