"""Rewards are those of Hugging Face's own classes, a conversation at a time, whatever a conversation is packed with."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from families import small_model
from reward_makers import (
    CLASSIFIERS,
    N_OBJECTIVES,
    N_QUANTILES,
    VOCABULARY,
    classifier,
    edit_config,
    edit_tensors,
    llama3_tokenizer,
    plain_gated_outputs,
    save,
    save_gated,
)
from tokenizer_makers import CHATML, GEMMA, INST, LLAMA3, make_tokenizer, row

from fastcompat.errors import ModelError, UsageError
from fastcompat.models.configuration import ModelSettings
from fastcompat.models.loading import load_reward_model
from fastcompat.ops.backends import native_levels
from fastcompat.rows.status import Status
from fastcompat.scoring.rewards import RewardScores, score_conversations
from fastcompat.tokens.forest import pack_forest, packed_reads
from fastcompat.tokens.reward import ReadOut, RewardSequence, RewardTokenizer

WITH_EXPERTS = ("Mixtral", "Qwen3-MoE", "gpt-oss (sinks)")
# An expert's rows depend on the pack; torch's own GELU, which StarCoder2 keeps, rounds a tensor's tail in another way.
WITH_OTHER_BITS = (*WITH_EXPERTS, "StarCoder2")
PAD = 2
CONVERSATIONS = [
    row("What is two plus two?", "It is four."),
    row("What is two plus two?", "It is four, as everybody knows who has ever counted the fingers of one hand."),
    row("What is two plus two?", "Five."),
    row("Hello there", "Hi!", "And now?", "Now we go on with what the function returns when the list is empty."),
    row("Hello there", "Hi!", "And now?", "Nothing."),
    row("Be brief.", "What is two plus two?", "Four", roles=("system", "user", "assistant")),
    row("What is two plus two?", " \n"),
    row("Say <|im_end|>", "Here: <|im_end|> and </s> <s>"),
]


def sequences_of_ids(read_out: ReadOut, *, n_pads: int = 0, seed: int = 0) -> list[RewardSequence]:
    """Random conversations that begin alike, one twice, one of them within another, ending in pad tokens."""
    generator = np.random.default_rng(seed)

    def draw(n: int) -> np.ndarray:
        return generator.integers(3, VOCABULARY, size=n).astype(np.int32)

    stem, pads = draw(21), np.full(n_pads, PAD, np.int32)
    found = [np.concatenate([stem, draw(int(n)), pads]) for n in generator.integers(1, 60, size=18)]
    found += [found[3], np.concatenate([found[4], draw(9), pads]), draw(130), np.concatenate([draw(30), pads])]
    return [RewardSequence(input_ids=ids, reads=(read_out.position(ids),), status=Status.OK) for ids in found]


def own_rewards(model, sequences: list[RewardSequence], dtype: torch.dtype = torch.float64) -> np.ndarray:
    """[N, K] float64, by the model's own class in float64: one conversation at a time, unpadded."""
    model = model.to(dtype)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        return np.array([model(torch.from_numpy(s.input_ids)[None].long()).logits[0].tolist() for s in sequences])


def assert_rewards(scores: RewardScores, wanted: np.ndarray) -> None:
    assert set(scores.status) == {Status.OK}
    assert wanted.std() > 0.5, "the rewards must differ for this to test anything"
    np.testing.assert_allclose(scores.reward, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


def alone(model, sequences: list[RewardSequence]) -> list[float]:
    return [float(score_conversations(model, [s], token_budget=4096).reward[0]) for s in sequences]


def test_packed_reads_are_found_on_each_path():
    sequences = sequences_of_ids(ReadOut(rule="last", pad_id=None), n_pads=2)
    generator = np.random.default_rng(1)
    reads = [tuple(generator.integers(len(s.input_ids), size=3).tolist()) for s in sequences]
    ids = [s.input_ids for s in sequences]
    (forest,) = pack_forest(ids, [np.zeros(len(x), np.bool_) for x in ids], token_budget=1 << 20)
    found = packed_reads(forest, dict(enumerate(reads)), n_reads=3)
    for k, n in enumerate(forest.sequences.tolist()):
        assert found[k].tolist() == forest.path(k)[list(reads[n])].tolist()
    some = {n: reads[n] for n in range(0, len(reads), 2)}
    rows = [k for k, n in enumerate(forest.sequences.tolist()) if n in some]
    assert packed_reads(forest, some, n_reads=3).tolist() == found[rows].tolist()
    assert packed_reads(forest, {}, n_reads=3).shape == (0, 3)


# ---- sequence classifiers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_parity_with_the_familys_own_class(family, tmp_path):
    full = classifier(family, pad_token_id=PAD)
    model = load_reward_model(save(tmp_path, full, make_tokenizer(chat_template=CHATML)))
    sequences = sequences_of_ids(model.head.read_out, n_pads=2)
    assert sequences[0].reads == (len(sequences[0].input_ids) - 3,)
    scores = score_conversations(model, sequences, token_budget=256)
    dtype = torch.float32 if family in WITH_EXPERTS else torch.float64  # torch has no grouped product in float64
    assert_rewards(scores, own_rewards(full, sequences, dtype)[:, 0])
    single = alone(model, sequences)
    np.testing.assert_allclose(scores.reward, single, rtol=1e-5, atol=1e-5 * np.abs(single).max())
    if family not in WITH_OTHER_BITS and "avx512_bf16" in native_levels():  # known of torch's products there only
        assert scores.reward.tolist() == single
        whole = score_conversations(model, sequences[::-1], token_budget=1 << 20)
        assert scores.reward.tolist() == whole.reward[::-1].tolist()


@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Gemma-2", "Mistral"])
@pytest.mark.parametrize("pad", ["none", "eos", "elsewhere"])
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_parity_of_conversations(family, pad, padding_side, tmp_path):
    template = CLASSIFIERS[family]
    tokenizer = make_tokenizer(chat_template=template, adds_bos=template != CHATML)
    tokenizer.padding_side = padding_side
    end = {CHATML: "<|im_end|>", LLAMA3: "<|eot_id|>", INST: "</s>", GEMMA: "<end_of_turn>"}[template]
    pad_id = {"none": None, "eos": tokenizer.convert_tokens_to_ids(end), "elsewhere": VOCABULARY - 1}[pad]
    full = classifier(family)
    full.config.get_text_config().pad_token_id = pad_id
    path = save(tmp_path, full, tokenizer)
    model = load_reward_model(path)
    assert model.head.read_out == ReadOut(rule="non-pad", pad_id=pad_id)
    sequences = RewardTokenizer.from_pretrained(path, model.head.read_out)(CONVERSATIONS)
    if template in (INST, GEMMA):  # they refuse system prompts
        assert sequences.pop(5).status is Status.TEMPLATE
    assert_rewards(score_conversations(model, sequences, token_budget=64), own_rewards(full, sequences)[:, 0])
    if pad == "eos" and template == LLAMA3:
        assert sequences[0].reads[0] == len(sequences[0].input_ids) - 2


def test_an_empty_turn_has_the_reward_of_its_ids_and_its_row_has_none(tmp_path):
    full = classifier("Llama")
    path = save(tmp_path, full, llama3_tokenizer())
    model = load_reward_model(path)
    tokenizer = RewardTokenizer.from_pretrained(path, model.head.read_out)
    (refused,) = tokenizer([row("Hello", "")])
    assert refused.status is Status.EMPTY
    (blank,) = tokenizer([row("Hello", " ")])  # the template trims it
    empty = llama3_tokenizer().apply_chat_template(
        [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": ""}], return_dict=False
    )
    assert blank.input_ids.tolist() == empty
    scores = score_conversations(model, [refused, blank], token_budget=64)
    assert np.isnan(scores.reward[0])
    assert scores.reward[1] == pytest.approx(own_rewards(full, [blank])[0, 0], rel=1e-5)


def test_read_out_by_option(tmp_path):
    full = classifier("Qwen2", pad_token_id=PAD)
    path = save(tmp_path, full, make_tokenizer(chat_template=CHATML))
    rewards = {}
    for choice in ("auto", "last", "non-pad"):
        model = load_reward_model(path, read_out=choice)
        sequences = sequences_of_ids(model.head.read_out, n_pads=3)
        rewards[choice] = score_conversations(model, sequences, token_budget=512).reward
    assert rewards["auto"].tolist() == rewards["non-pad"].tolist()
    full.config.pad_token_id = None  # then its own class reads the last token
    sequences = sequences_of_ids(ReadOut(rule="last", pad_id=None), n_pads=3)
    np.testing.assert_allclose(rewards["last"], own_rewards(full, sequences)[:, 0], rtol=1e-5, atol=1e-5)
    assert np.abs(rewards["last"] - rewards["auto"]).max() > 0.1
    with pytest.raises(UsageError, match="read_out='first'"):
        load_reward_model(path, read_out="first")


def test_one_of_several_labels(tmp_path):
    full = classifier("Llama", n_labels=3, pad_token_id=PAD)
    path = save(tmp_path, full, llama3_tokenizer())
    edit_config(path, id2label={"0": "helpful", "1": "safe", "2": "brief"})
    with pytest.raises(UsageError, match=r"3 labels \(0 helpful, 1 safe, 2 brief\); say which one.*--reward-output"):
        load_reward_model(path)
    for wrong in ("safety", 3, -1, "3", True):
        with pytest.raises(UsageError, match="has no output"):
            load_reward_model(path, output=wrong)
    sequences = sequences_of_ids(ReadOut(rule="non-pad", pad_id=PAD), n_pads=1)
    wanted = own_rewards(full, sequences)
    for output, column in (("safe", 1), (0, 0), ("2", 2)):
        model = load_reward_model(path, output=output)
        assert model.head.column == column
        assert_rewards(score_conversations(model, sequences, token_budget=512), wanted[:, column])


def test_a_conversation_beyond_the_rope_boundary_is_read_as_its_class_reads_it(tmp_path):
    full = classifier("Phi-3 (LongRoPE)", pad_token_id=PAD)
    model = load_reward_model(save(tmp_path, full, make_tokenizer(chat_template=CHATML)))
    assert model.rope_boundary == 64
    generator = np.random.default_rng(0)
    short = generator.integers(3, VOCABULARY, size=62).astype(np.int32)
    ids = [np.concatenate([short[:n], np.full(k, PAD, np.int32)]) for n, k in ((62, 0), (62, 9), (40, 2), (61, 9))]
    sequences = [RewardSequence(input_ids=x, reads=(model.head.read_out.position(x),), status=Status.OK) for x in ids]
    wanted = own_rewards(full, sequences)[:, 0]
    assert abs(wanted[0] - wanted[1]) > 1e-3, "the same tokens are read, with other frequencies"
    np.testing.assert_allclose(score_conversations(model, sequences, token_budget=512).reward, wanted, atol=2e-5)


def test_bfloat16_is_as_near_to_float64_as_the_own_class(tmp_path):
    full = classifier("Llama", pad_token_id=PAD).to(torch.bfloat16)
    model = load_reward_model(save(tmp_path, full, llama3_tokenizer()), ModelSettings(dtype="bfloat16"))
    assert model.dtype is torch.bfloat16
    sequences = sequences_of_ids(model.head.read_out)
    full.set_attn_implementation("eager")
    with torch.no_grad():
        own = np.array([float(full(torch.from_numpy(s.input_ids)[None].long()).logits[0, 0]) for s in sequences])
    exact = own_rewards(full, sequences)[:, 0]
    got = score_conversations(model, sequences, token_budget=512).reward
    assert np.abs(got - exact).mean() < 1.3 * np.abs(own - exact).mean()
    assert (torch.from_numpy(got).bfloat16().double() != torch.from_numpy(got)).any(), "the head rounds to bfloat16"


def test_only_the_read_tokens_are_computed_in_the_last_layer(tmp_path, monkeypatch):
    model = load_reward_model(save(tmp_path, classifier("Llama"), llama3_tokenizer()))
    sequences = sequences_of_ids(model.head.read_out)
    hidden = type(model).hidden
    plans = []
    monkeypatch.setattr(type(model), "hidden", lambda self, plan: (plans.append(plan), hidden(self, plan))[1])
    score_conversations(model, sequences, token_budget=1 << 20)
    (plan,) = plans
    assert len(plan.needed) == 21, "22 conversations, two of them the same"
    assert torch.equal(plan.last_attention.query_index.long(), plan.needed)


# ---- gated heads ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gated(tmp_path_factory):
    return {kind: save_gated(tmp_path_factory.mktemp(kind), kind) for kind in ("ArmoRM", "QRM")}


def turn_of(path: str) -> list[int]:
    text = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    return llama3_tokenizer()(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("kind", ["ArmoRM", "QRM"])
def test_gated_heads_are_their_published_definitions(kind, gated):
    path = gated[kind]
    model = load_reward_model(path)
    assert (model.head.kind.name, model.head.output) == (kind, "score")
    sequences = RewardTokenizer.from_pretrained(path, model.head.read_out)(CONVERSATIONS)
    wanted = np.array(
        [plain_gated_outputs(path, kind, s.input_ids.tolist(), turn_of(path)).tolist() for s in sequences]
    )
    scores = score_conversations(model, sequences, token_budget=64)
    assert wanted.std(axis=0).min() > 0.02
    np.testing.assert_allclose(scores.reward, wanted[:, -1], rtol=1e-5, atol=1e-5 * np.abs(wanted[:, -1]).max())
    np.testing.assert_allclose(scores.reward, alone(model, sequences), rtol=1e-5, atol=1e-6)
    for output, column in (("helpsteer-verbosity", 4), (18, 18), ("code-readability", 18)):
        model = load_reward_model(path, output=output)
        rewards = score_conversations(model, sequences, token_budget=512).reward
        np.testing.assert_allclose(rewards, wanted[:, column], rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("kind", ["ArmoRM", "QRM"])
def test_the_gate_is_read_where_two_conversations_part(kind, gated):
    """Conversations that share a prompt share the gate's token; read anywhere else, the reward is another one."""
    path = gated[kind]
    model = load_reward_model(path)
    sequences = RewardTokenizer.from_pretrained(path, model.head.read_out)(CONVERSATIONS[:3])
    scores = RewardScores(sequences)
    ids, masks = zip(*(scores.to_pack(n, None) for n in range(3)), strict=True)
    (forest,) = pack_forest(ids, masks, token_budget=1 << 20)
    reads = packed_reads(forest, {n: s.reads for n, s in enumerate(sequences)}, n_reads=2)
    assert len(set(reads[:, 0])) == 3
    assert len(set(reads[:, 1])) == 1
    eot = llama3_tokenizer().convert_tokens_to_ids("<|eot_id|>")
    assert forest.input_ids[reads[0, 1]] == eot
    rewards = model.rewards(forest, reads)
    for shift in (-1, 1):
        moved = reads + np.array([0, shift])
        assert np.abs(model.rewards(forest, moved) - rewards).min() > 1e-3
    assert np.abs(model.rewards(forest, reads[:, ::-1].copy()) - rewards).min() > 1e-3


@pytest.mark.parametrize("kind", ["ArmoRM", "QRM"])
def test_gated_heads_read_before_the_first_pad_token(kind, gated, tmp_path):
    path = str(shutil.copytree(gated[kind], tmp_path / "model"))
    edit_config(path, pad_token_id=llama3_tokenizer().convert_tokens_to_ids("<|eot_id|>"))
    model = load_reward_model(path)
    tokenizer = RewardTokenizer.from_pretrained(path, model.head.read_out)
    sequences = tokenizer(CONVERSATIONS[:5])
    assert all(reward < gate for reward, gate in (s.reads for s in sequences))
    wanted = [float(plain_gated_outputs(path, kind, s.input_ids.tolist(), turn_of(path))[-1]) for s in sequences]
    np.testing.assert_allclose(score_conversations(model, sequences, token_budget=512).reward, wanted, atol=1e-4)
    assert load_reward_model(path, read_out="last").head.read_out.rule == "last"


@pytest.mark.parametrize(
    ("kind", "removed", "added", "match"),
    [
        ("QRM", ["reward_transform_matrix"], {}, "neither ArmoRM's nor that of QRM-Llama3.1-8B"),
        ("ArmoRM", [], {"gating__layers__4__weight": torch.zeros(2, 2)}, r"gating\.layers\.4\.weight tells them apart"),
        ("ArmoRM", [], {"regression_layer__weight": torch.zeros(18, 48)}, "18 rows where 19 objectives"),
        ("QRM", [], {"gating__logit_scale": torch.tensor([float("nan")])}, r"gating\.logit_scale holds NaN"),
    ],
)
def test_a_gate_of_another_make_is_refused(kind, removed, added, match, gated, tmp_path):
    path = str(shutil.copytree(gated[kind], tmp_path / "model"))
    edit_tensors(path, *removed, **added)
    with pytest.raises(ModelError, match=match):
        load_reward_model(path)


def test_a_gate_whose_settings_are_not_known_is_refused(gated, tmp_path):
    path = str(shutil.copytree(gated["QRM"], tmp_path / "model"))
    edit_config(path, num_quantiles=None)
    with pytest.raises(ModelError, match="lacks num_quantiles"):
        load_reward_model(path)
    edit_config(path, num_quantiles=N_QUANTILES - 1)
    with pytest.raises(ModelError, match=f"{N_OBJECTIVES} objectives of {N_QUANTILES - 1} quantiles"):
        load_reward_model(path)
    edit_config(path, model_type="mistral", num_quantiles=N_QUANTILES)
    with pytest.raises(ModelError, match="known for Llama-3, not 'mistral'"):
        load_reward_model(path)


# ---- what is refused ------------------------------------------------------------------------------------------------


def refusal(path: str, **choices) -> str:
    with pytest.raises(ModelError) as refused:
        load_reward_model(path, **choices)
    message = str(refused.value)
    assert "\n" not in message
    return message


def test_a_causal_language_model_is_refused(tmp_path):
    for family, other in (("Llama", "a"), ("SmolLM2 (tied head)", "b"), ("GPT-2", "c")):
        path = save(tmp_path / other, small_model(family), make_tokenizer(chat_template=CHATML))
        message = refusal(path)
        assert "is a causal language model" in message
        assert "random numbers" in message


def test_wrong_numbers_of_labels_are_refused(tmp_path):
    path = save(tmp_path, classifier("Llama", n_labels=7), llama3_tokenizer())
    with pytest.raises(UsageError, match="its head has 7 labels"):
        load_reward_model(path)
    edit_config(path, id2label={"0": "reward"})
    assert "names 1 labels (id2label) and score.weight has 7" in refusal(path)
    edit_tensors(path, score__weight=torch.zeros(0, 48))
    assert "0 labels" in refusal(path)


@pytest.mark.parametrize("weight", ["score.weight", "model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(weight, value, tmp_path):
    full = classifier("Llama")
    full.get_parameter(weight).data.fill_(value)
    message = refusal(save(tmp_path, full, llama3_tokenizer()))
    assert "NaN or infinity" in message


def test_other_heads_and_tasks_are_refused(tmp_path):
    path = save(tmp_path / "a", classifier("Llama"), llama3_tokenizer())
    edit_config(path, architectures=["LlamaForTokenClassification"])
    assert "calls it LlamaForTokenClassification" in refusal(path)
    edit_config(path, architectures=["LlamaForSequenceClassification"])
    edit_tensors(path, score__bias=torch.zeros(1))
    assert "score.bias is a weight of a head that" in refusal(path)
    edit_tensors(path, "score.bias", "score.weight", score__0__weight=torch.zeros(4, 48))
    assert "its own weights are score.0.weight" in refusal(path)
    edit_tensors(path, "score.0.weight", v_head__weight=torch.zeros(1, 48))
    edit_config(path, architectures=["GRewardModel"])
    assert "GRewardModel has no score.weight; its own weights are v_head.weight" in refusal(path)


def test_an_encoder_and_a_model_with_code_of_its_own_are_refused(tmp_path):
    from transformers import BertConfig, BertForSequenceClassification

    shape = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=50)
    bert = BertForSequenceClassification(BertConfig(**shape, num_labels=1))
    assert "no head that fastcompat knows" in refusal(save(tmp_path / "bert", bert, make_tokenizer()))
    path = save(tmp_path / "internlm2", classifier("Llama"), llama3_tokenizer())
    edit_config(
        path,
        model_type="internlm2",
        architectures=["InternLM2ForRewardModel"],
        auto_map={"AutoConfig": "configuration_internlm2.InternLM2Config"},
    )
    assert "needs code from its own repository, which fastcompat never runs" in refusal(path)


def test_a_head_that_is_not_its_classs_own_is_refused(tmp_path, monkeypatch):
    from fastcompat.models.reward_heads import LinearHead

    path = save(tmp_path, classifier("Llama"), llama3_tokenizer())
    own = LinearHead.forward
    monkeypatch.setattr(LinearHead, "forward", lambda self, states: own(self, states) * 1.01)
    assert "its own class gives another reward" in refusal(path)
