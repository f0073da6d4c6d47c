"""A model of any type that transformers has, small and random, scored by fastcompat and by its own class.

`figures` must either be what the model's own class gives one sequence at a time, or raise a ModelError in one sentence.
"""

from __future__ import annotations

import json
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from small_configs import small_config
from tokenizer_makers import CHATML, make_tokenizer

import fastcompat as fc
from fastcompat.corpus import rows_from_records
from fastcompat.errors import ModelError

TASKS = {"causal": "CAUSAL_LM", "reward": "SEQUENCE_CLASSIFICATION"}
_TEXT = " ".join(topics["assignment"].split())
# One prompt with five responses, a longer beginning that two share, an ordinary one, and one beyond `LENGTH` tokens.
ROWS = [{"prompt": _TEXT[:150], "response": _TEXT[60 * k : 60 * k + n]} for k, n in enumerate((20, 60, 5, 200, 100))]
ROWS += [{"prompt": _TEXT[500:540], "response": _TEXT[600:650] + end} for end in (_TEXT[650:700], "no")]
ROWS += [{"prompt": "hi", "response": _TEXT[100:500]}, {"prompt": _TEXT[40:140], "response": _TEXT[:2600]}]

# Of a state-space layer: not weights that are drawn.
_KEPT = ("A_log", "dt_bias", ".D", "time_")


def types_of(task: str) -> list[str]:
    """The types that transformers has a class for, in its order."""
    from transformers.models.auto import modeling_auto

    return list(getattr(modeling_auto, f"MODEL_FOR_{TASKS[task]}_MAPPING_NAMES"))


def build(task: str, model_type: str, directory: Path, **changes: Any) -> None:
    """Save a small model of a type there, with a tokenizer; its configuration with other weights where it has no model.

    changes: of its configuration. A part named text_config keeps its place: the model that is saved is that of the
    whole configuration.
    """
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForSequenceClassification

    tokenizer = make_tokenizer(chat_template=CHATML)
    tokenizer.pad_token = "<unk>"
    tokenizer.save_pretrained(directory)
    config_class = CONFIG_MAPPING[model_type]
    try:
        config = small_config(config_class, **changes)
    except Exception:  # its own defaults do not agree
        (directory / "config.json").write_text(json.dumps({"model_type": model_type}))
        save_file({"other.weight": torch.ones(2, 2)}, directory / "model.safetensors", {"format": "pt"})
        return
    torch.manual_seed(0)
    if task == "reward":
        config.num_labels = 1
        config.get_text_config().pad_token_id = tokenizer.pad_token_id
    auto = AutoModelForCausalLM if task == "causal" else AutoModelForSequenceClassification
    try:
        model = auto.from_config(config)
    except Exception:  # a class that its own configuration does not make, or that lacks a package
        config.save_pretrained(directory)
        save_file({"other.weight": torch.ones(2, 2)}, directory / "model.safetensors", {"format": "pt"})
        return
    _draw_weights(model)
    model.float().eval().save_pretrained(directory)
    if model.config.model_type != model_type:  # the model of a part: the checkpoint names the whole
        whole = small_config(config_class, **changes)
        whole.architectures = [type(model).__name__]
        whole.save_pretrained(directory)


@torch.no_grad()
def _draw_weights(model: Any) -> None:
    """Random weights with which attention is not flat and next-token distributions are not either."""
    draw = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point() or any(part in name for part in _KEPT):
            continue
        if parameter.ndim < 2:
            parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.1)
            continue
        fan_in = parameter.shape[-1] if parameter.ndim < 4 else parameter[0].numel()
        parameter.normal_(0, 1.3 * fan_in**-0.5, generator=draw)


def figures(task: str, directory: Path) -> np.ndarray:
    """[N] float64: fastcompat's sums of NLL, or rewards, of `ROWS`. Raises ModelError for what it refuses."""
    scorer = _scorer(task, directory)
    return np.array(scorer.score(ROWS)["nll_sum" if task == "causal" else "reward"].to_pylist(), np.float64)


@torch.no_grad()
def own_figures(task: str, directory: Path) -> np.ndarray:
    """[N] float64: the same by the model's own class and eager attention, one sequence at a time; NaN for no reward."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    auto = AutoModelForCausalLM if task == "causal" else AutoModelForSequenceClassification
    model = auto.from_pretrained(directory, attn_implementation="eager", dtype=torch.float32).eval()
    found = []
    for sequence in _scorer(task, directory).tokenizer(rows_from_records(ROWS)):
        ids = torch.from_numpy(sequence.input_ids)[None].long()
        if task == "reward" and not sequence.reads:
            found.append(float("nan"))
            continue
        logits = model(input_ids=ids, use_cache=False).logits.double()
        if task == "reward":
            found.append(float(logits.squeeze()))
        else:
            nll = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="none")
            found.append(float(nll[torch.from_numpy(sequence.scored[1:])].sum()))
    return np.array(found)


def _scorer(task: str, directory: Path) -> Any:
    return (fc.Scorer if task == "causal" else fc.RewardScorer)(str(directory), dtype="float32")


def outcome(task: str, model_type: str, directory: Path, **changes: Any) -> tuple[str, str]:
    """("exact", largest relative difference), ("wrong", the same) or ("refused", why); what is raised is a fault."""
    build(task, model_type, directory, **changes)
    try:
        found = figures(task, directory)
    except ModelError as error:
        return "refused", str(error).removeprefix(f"{directory}: ")
    wanted = own_figures(task, directory)
    scale = np.abs(wanted) if task == "causal" else np.maximum(np.abs(wanted), 1.0)
    difference = float(np.nanmax(np.abs(found - wanted) / scale))
    same_rows = np.array_equal(np.isnan(found), np.isnan(wanted))
    return ("exact" if same_rows and difference < 1e-5 else "wrong"), f"{difference:.1e}"
