"""Every family: packed, shared and windowed losses are those of the plain padded Hugging Face loop on the same ids."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from families import FAMILIES, VOCABULARY, small_model

from fastcompat.errors import ModelError
from fastcompat.models.base_model import wrap
from fastcompat.models.configuration import refuse_unsupported
from fastcompat.models.probe import probe
from fastcompat.rows.status import Status
from fastcompat.scoring.losses import score_sequences
from fastcompat.tokens.conversations import TokenSequence


def sequence(ids: np.ndarray, prompt_length: int) -> TokenSequence:
    scored = np.arange(len(ids)) >= max(prompt_length, 1)
    return TokenSequence(input_ids=ids, scored=scored, status=Status.OK)


def corpus(seed: int = 0) -> list[TokenSequence]:
    """Twenty responses to one prompt, some beginning alike, one twice; other prompts; lengths 2 to 150."""
    generator = np.random.default_rng(seed)

    def draw(n: int) -> np.ndarray:
        return generator.integers(3, VOCABULARY, size=n).astype(np.int64)

    prompt, opening = draw(23), draw(9)
    responses = [draw(int(n)) for n in generator.integers(1, 60, size=20)]
    responses[3] = np.concatenate([opening, responses[3]])
    responses[4] = np.concatenate([opening, responses[4]])
    responses[5] = responses[6]
    found = [sequence(np.concatenate([prompt, response]), len(prompt)) for response in responses]
    found += [sequence(draw(150), 100), sequence(draw(2), 1), sequence(draw(70), 0), sequence(draw(40), 39)]
    return found


def plain_losses(model, sequences: list[TokenSequence], *, batch_size: int = 8) -> np.ndarray:
    """What everybody writes: padded batches, full logits, cross-entropy, each response's mean over its own tokens."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    losses = np.empty(len(sequences))
    with torch.no_grad():
        for begin in range(0, len(sequences), batch_size):
            batch = sequences[begin : begin + batch_size]
            length = max(len(s.input_ids) for s in batch)
            ids = torch.zeros(len(batch), length, dtype=torch.long)
            mask = torch.zeros(len(batch), length, dtype=torch.long)
            for row, s in enumerate(batch):
                ids[row, : len(s.input_ids)] = torch.from_numpy(s.input_ids)
                mask[row, : len(s.input_ids)] = 1
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
            nll = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
            for row, s in enumerate(batch):
                chosen = torch.from_numpy(s.scored[1:])
                losses[begin + row] = nll[row, : len(s.input_ids) - 1][chosen].double().mean()
    model.set_attn_implementation(before)
    return losses


def packed_losses(model, sequences: list[TokenSequence], *, token_budget: int = 4096) -> np.ndarray:
    scores = score_sequences(wrap("test", model), sequences, token_budget=token_budget)
    assert set(scores.status) == {Status.OK}
    return scores.nll_sum / np.array([s.n_tokens for s in sequences])


# A call of LongRoPE is long or short as a whole: the padded loop is right only when each sequence is a call of its own.
def _plain_batch(family: str) -> int:
    return 1 if "LongRoPE" in family else 8


@pytest.mark.parametrize("family", FAMILIES)
def test_float32_parity_with_the_padded_loop(family):
    model = small_model(family)
    sequences = corpus()
    wanted = plain_losses(model, sequences, batch_size=_plain_batch(family))
    assert wanted.max() > 1.5 * np.log(VOCABULARY), "the distributions must be peaked for this to test anything"
    probe(wrap(family, model))
    np.testing.assert_allclose(packed_losses(model, sequences), wanted, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_alone_packed_and_reordered(family):
    model = small_model(family, seed=1)
    sequences = corpus(1)
    packed = packed_losses(model, sequences)
    alone = np.concatenate([packed_losses(model, [s]) for s in sequences])
    np.testing.assert_allclose(packed, alone, rtol=1e-5)
    np.testing.assert_allclose(packed_losses(model, sequences, token_budget=64), alone, rtol=1e-5)
    backwards = packed_losses(model, sequences[::-1])[::-1]
    np.testing.assert_array_equal(packed, backwards)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_as_near_to_float32_as_the_padded_loop(family):
    sequences = corpus(2)
    rounded = small_model(family, seed=2, dtype=torch.bfloat16)
    # The same rounded weights in float32 are what both approximate.
    widened = small_model(family, seed=2, dtype=torch.bfloat16).float()
    exact = plain_losses(widened, sequences, batch_size=_plain_batch(family))
    plain = np.abs(plain_losses(rounded, sequences, batch_size=_plain_batch(family)) - exact)
    packed = np.abs(packed_losses(rounded, sequences) - exact)
    assert np.sqrt((packed**2).mean()) <= 2 * np.sqrt((plain**2).mean())


def test_long_rope_sequences_across_the_boundary_do_not_change_their_neighbours():
    model = small_model("Phi-3 (LongRoPE)")
    generator = np.random.default_rng(0)
    short = [sequence(generator.integers(3, VOCABULARY, size=50), 20) for _ in range(4)]
    long = [sequence(generator.integers(3, VOCABULARY, size=90), 20) for _ in range(2)]
    apart = packed_losses(model, short)
    np.testing.assert_allclose(packed_losses(model, [*short, *long])[:4], apart, rtol=1e-6)


def test_long_rope_counts_the_unscored_tail_as_the_plain_loop_does():
    model = small_model("Phi-3 (LongRoPE)")
    sequences = []
    for n_tokens, tail in ((64, 3), (65, 1), (66, 2), (70, 8)):
        ids = np.random.default_rng(n_tokens).integers(3, VOCABULARY, size=n_tokens)
        scored = (np.arange(n_tokens) >= 20) & (np.arange(n_tokens) < n_tokens - tail)
        sequences.append(TokenSequence(input_ids=ids, scored=scored, status=Status.OK))
    np.testing.assert_allclose(packed_losses(model, sequences), plain_losses(model, sequences, batch_size=1), rtol=1e-5)


def refused(model, match: str) -> None:
    with pytest.raises(ModelError, match=match):
        probe(wrap("test", model))


SHAPE = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)


def test_models_that_ignore_the_attention_interface_are_refused():
    from transformers import BloomConfig, BloomForCausalLM, FalconConfig, FalconForCausalLM, GPTJConfig, GPTJForCausalLM

    shape = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    refused(FalconForCausalLM(FalconConfig(**shape)), "attention layers went through|cannot be packed|not supported")
    refused(BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=2)), "not supported")
    refused(GPTJForCausalLM(GPTJConfig(vocab_size=64, n_embd=32, n_layer=2, n_head=2, rotary_dim=8)), "not supported")


def test_state_space_and_hybrid_models_are_refused():
    from transformers import Mamba2Config, Mamba2ForCausalLM, Qwen3NextConfig, Qwen3NextForCausalLM

    mamba = Mamba2ForCausalLM(
        Mamba2Config(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_heads=4, head_dim=16)
    )
    refused(mamba, "recurrent state")
    refused(Qwen3NextForCausalLM(Qwen3NextConfig(**SHAPE, num_experts=4)), "recurrent state")


def test_encoder_decoders_are_refused():
    from transformers import T5Config

    with pytest.raises(ModelError, match="encoder-decoder"):
        refuse_unsupported("test", T5Config())


def test_a_logit_transform_that_fastcompat_does_not_know_is_refused():
    model = small_model("Llama")
    forward = type(model).forward

    class Scaled(type(model)):
        def forward(self, *args, **kwargs):
            out = forward(self, *args, **kwargs)
            out.logits = out.logits * 0.5
            return out

    model.__class__ = Scaled
    refused(model, "between its body and its loss")


def test_nan_weights_are_reported_row_by_row():
    model = small_model("Llama")
    with torch.no_grad():
        model.get_output_embeddings().weight[7, 0] = float("nan")
    loaded = wrap("test", model)
    probe(loaded)
    scores = score_sequences(loaded, corpus(), token_budget=4096)
    assert set(scores.status) == {Status.NONFINITE}
    assert np.isnan(scores.nll_sum).all()
    assert scores.columns()["loss"].null_count == len(scores.status)


def test_token_ids_outside_the_vocabulary_fail_alone():
    model = wrap("test", small_model("Llama"))
    good = corpus()[:3]
    bad = sequence(np.array([5, 6, VOCABULARY, 7]), 1)
    scores = score_sequences(model, [*good, bad], token_budget=4096)
    assert scores.status == [Status.OK] * 3 + [Status.INVALID]
    assert "do not belong together" in scores.detail[3]


def test_a_head_with_more_words_than_are_embedded_is_probed_with_those_that_are():
    full = small_model("Llama")
    full.lm_head = torch.nn.Linear(full.config.hidden_size, 2 * VOCABULARY, bias=False)
    probe(wrap("test", full))


def test_out_of_memory_splits_the_pack_and_names_what_never_fits(monkeypatch):
    model = wrap("test", small_model("Llama"))
    sequences = corpus()
    wanted = score_sequences(model, sequences, token_budget=4096).nll_sum
    hidden = type(model).hidden

    def small_device(self, plan):
        if plan.forest.n_tokens > 100:
            raise torch.OutOfMemoryError("no room")
        return hidden(self, plan)

    monkeypatch.setattr(type(model), "hidden", small_device)
    scores = score_sequences(model, sequences, token_budget=4096)
    assert [n for n, status in enumerate(scores.status) if status == Status.OOM] == [20]  # the one of 150 tokens
    kept = np.arange(len(sequences)) != 20
    np.testing.assert_allclose(scores.nll_sum[kept], wanted[kept], rtol=1e-5)
    assert np.isnan(scores.nll_sum[20])


def test_a_response_without_a_finite_loss_spoils_no_other():
    model = small_model("Llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[VOCABULARY - 1] = float("nan")
    sequences = corpus()
    ids = sequences[7].input_ids.copy()
    ids[-2] = VOCABULARY - 1
    sequences[7] = sequence(ids, 23)
    sequences = [s for n, s in enumerate(sequences) if n == 7 or VOCABULARY - 1 not in s.input_ids]
    scores = score_sequences(wrap("test", model), sequences, token_budget=4096)
    bad = [n for n, status in enumerate(scores.status) if status == Status.NONFINITE]
    assert [VOCABULARY - 1 in sequences[n].input_ids for n in bad] == [True]
    assert np.isfinite(np.delete(scores.nll_sum, bad)).all()
