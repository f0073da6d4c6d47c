"""A model of any type is scored as its own class scores it, or refused in one sentence: some of each kind.

`bench/every_model.py` is the same for every type that transformers has; `tests/models/test_configuration.py` reads the
configurations of all of them.
"""

from __future__ import annotations

import pytest
from every_model import outcome

_EXPERTS = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16}
# Models whose layers differ, and those that are put together in another way than the families of `families.py`.
EXACT = (
    ("causal", "gemma4", {}),
    ("causal", "gemma4_text", {"attention_k_eq_v": True, "num_global_key_value_heads": 1}),
    ("causal", "gemma4_text", _EXPERTS),
    ("causal", "gemma3n_text", {}),
    ("causal", "deepseek_v3", {}),
    ("causal", "mimo_v2_flash", {}),
    ("causal", "ministral3", {"sliding_window": 24}),
    ("causal", "opt", {}),
    ("causal", "whisper", {}),
    ("reward", "gemma3", {}),
    ("reward", "glm4", {}),
)
REFUSED = (
    ("causal", "bert", "bidirectional attention"),
    ("causal", "blt", "how many layers it has"),
    ("causal", "gemma4_assistant", "cannot be read"),
    ("causal", "hrm_text", "4 layers call attention 16 times"),
    ("causal", "llama4_text", "layers of type chunked_attention"),
    ("causal", "mllama", "no head on a body of its own"),
    ("causal", "modernbert-decoder", "between its body and its loss"),
    ("causal", "moshi", "sliding window"),
    ("causal", "mpt", "cannot be run on packed sequences"),
    ("causal", "musicgen", "encoder-decoder"),
    ("causal", "qwen3_5", "recurrent state"),
    ("causal", "xlnet", "attention by itself"),
    ("reward", "mvp", "encoder-decoder"),
    ("reward", "doge", "attention_mask"),
    ("reward", "modernbert-decoder", "no score.weight"),
)


@pytest.mark.parametrize(("task", "model_type", "changes"), EXACT)
def test_it_is_scored_as_its_own_class_scores_it(tmp_path, task, model_type, changes):
    what, difference = outcome(task, model_type, tmp_path, **changes)
    assert what == "exact", difference


@pytest.mark.parametrize(("task", "model_type", "why"), REFUSED)
def test_it_is_refused_in_one_sentence(tmp_path, task, model_type, why):
    what, sentence = outcome(task, model_type, tmp_path)
    assert what == "refused", sentence
    assert why in sentence
    assert "\n" not in sentence
