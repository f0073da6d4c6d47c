"""A GGUF file of SmolLM2 -> a checkpoint in Hugging Face's layout, dequantised to bfloat16.

The `gguf` package reads the file and dequantises; what is left is to name the tensors, to undo what llama.cpp's
converter did to them, and to write the tokenizer whose vocabulary, merges, special tokens and chat template the file
carries. transformers reads GGUF too, but what it has read it cannot save, and it takes the pre-tokenizer for GPT-2's;
its weights are what `check_weights` compares with.

Dimension key: H heads, C head width, D hidden size.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

# A block's tensors: llama.cpp's name -> that of transformers.
BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Kinds of tokens in `tokenizer.ggml.token_type`.
NORMAL, CONTROL = 1, 3


def write_checkpoint(file: Path, directory: Path) -> dict[str, Any]:
    """Write config.json, model.safetensors and the tokenizer's files; return the file's metadata.

    Raises SystemExit where the file is not what this reads: a Llama without biases whose vocabulary is SmolLM's.
    """
    reader = gguf.GGUFReader(file)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    expected = {"general.architecture": "llama", "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm"}
    different = [name for name, value in expected.items() if metadata.get(name) != value]
    if different:
        raise SystemExit(f"{file}: {', '.join(f'{name} is {metadata.get(name)!r}' for name in different)}")
    weights = {
        tensor.name: torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy()).bfloat16()
        for tensor in reader.tensors
    }
    config = _config(metadata, is_tied="output.weight" not in weights)
    model = LlamaForCausalLM(config).bfloat16()
    # Strict: a tensor that is missing, too many or of another shape ends here.
    model.load_state_dict(_renamed(weights, config))
    model.save_pretrained(directory)
    _tokenizer(metadata).save(str(directory / "tokenizer.json"))
    text = json.dumps(_tokenizer_config(metadata), indent=2, ensure_ascii=False)
    (directory / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
    return metadata


def check_weights(file: Path, directory: Path) -> None:
    """SystemExit unless transformers reads from the GGUF file the weights that `directory` has, bit for bit."""
    theirs, ours = (
        AutoModelForCausalLM.from_pretrained(where, dtype=torch.bfloat16, **options).state_dict()
        for where, options in ((file.parent, {"gguf_file": file.name}), (directory, {}))
    )
    different = [name for name in theirs.keys() | ours.keys() if not _equal(theirs.get(name), ours.get(name))]
    if different:
        raise SystemExit(f"{directory}: transformers reads other weights from {file.name}: {', '.join(different[:5])}")


def _equal(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    return one is not None and other is not None and torch.equal(one, other)


def _config(metadata: Mapping[str, Any], *, is_tied: bool) -> LlamaConfig:
    own = {name.removeprefix("llama."): value for name, value in metadata.items() if name.startswith("llama.")}
    return LlamaConfig(
        vocab_size=len(metadata["tokenizer.ggml.tokens"]),
        hidden_size=own["embedding_length"],
        intermediate_size=own["feed_forward_length"],
        num_hidden_layers=own["block_count"],
        num_attention_heads=own["attention.head_count"],
        num_key_value_heads=own["attention.head_count_kv"],
        head_dim=own["rope.dimension_count"],
        max_position_embeddings=own["context_length"],
        # Stored as float32: 9.999999747378752e-06.
        rms_norm_eps=float(f"{own['attention.layer_norm_rms_epsilon']:.6g}"),
        rope_parameters={"rope_type": "default", "rope_theta": own["rope.freq_base"]},
        tie_word_embeddings=is_tied,
        bos_token_id=metadata["tokenizer.ggml.bos_token_id"],
        eos_token_id=metadata["tokenizer.ggml.eos_token_id"],
        pad_token_id=metadata["tokenizer.ggml.padding_token_id"],
        dtype="bfloat16",
    )


def _renamed(weights: Mapping[str, torch.Tensor], config: LlamaConfig) -> dict[str, torch.Tensor]:
    embedding = weights["token_embd.weight"]
    state = {
        "model.embed_tokens.weight": embedding,
        "model.norm.weight": weights["output_norm.weight"],
        "lm_head.weight": weights.get("output.weight", embedding),
    }
    n_heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, weight in weights.items():
        if name.startswith("blk."):
            _, layer, kind, _ = name.split(".")
            rows = halves_apart(weight, n_heads[kind]) if kind in n_heads else weight
            state[f"model.layers.{layer}.{BLOCK[kind]}.weight"] = rows
    return state


def halves_apart(weight: torch.Tensor, n_heads: int) -> torch.Tensor:
    """[H * C, D]: of each head, the rows that a rotary embedding pairs moved from neighbours to C / 2 rows apart.

    llama.cpp rotates rows 2i and 2i + 1 of a Llama's queries and keys, transformers rows i and i + C / 2
    (`LlamaModel.permute` in convert_hf_to_gguf.py; this is its inverse).
    """
    return weight.unflatten(0, (n_heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def _tokenizer(metadata: Mapping[str, Any]) -> Tokenizer:
    """tokenizer.json. The pre-tokenizer "smollm" splits digits one by one, then GPT-2's pattern applies."""
    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    assert set(kinds) <= {NORMAL, CONTROL}
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [
            AddedToken(token, normalized=False, special=True)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind == CONTROL
        ]
    )
    return tokenizer


def _tokenizer_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """As SmolLM2 publishes it: the class it names is GPT2Tokenizer, though its pre-tokenizer is not GPT-2's."""
    tokens = metadata["tokenizer.ggml.tokens"]
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    return {
        "add_prefix_space": False,
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        **{f"{role}_token": tokens[metadata[f"tokenizer.ggml.{name}_token_id"]] for role, name in names.items()},
        "chat_template": metadata["tokenizer.chat_template"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata["llama.context_length"],
        "tokenizer_class": "GPT2Tokenizer",
        "vocab_size": len(tokens),
    }
