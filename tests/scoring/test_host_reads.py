"""What the host asks of a GPU while it scores, counted without one: a pack is one copy there and one result back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from corpora import save_small_model, save_small_reward_model
from families import VOCABULARY, small_model
from pretended_gpu import GPU, OnGpu, PretendedGpu, on_gpu, pretended_gpu

import fastcompat as fc
from fastcompat.corpus import rows_from_records
from fastcompat.models import wrap
from fastcompat.ops import AttentionPlan, OneCopy, linear_nll
from fastcompat.rows import EXTRAS, Extras
from fastcompat.rows.status import Status
from fastcompat.scoring.joint import JointModel, JointScores
from fastcompat.scoring.losses import ResponseScores
from fastcompat.scoring.packs import pack_sequences, score_all
from fastcompat.scoring.scores import Model, Scores
from fastcompat.tokens.conversations import TokenSequence

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="Triton is compiled here, its interpreter is off"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy's, where an exponential overflows
]

BUDGET = 120
RECORDS = [
    {"prompt": prompt, "response": f"{k} {response}"}
    for prompt in ("What is two plus two?", "Name a river.")
    for k in range(6)
    for response in ("It is four.", "The Danube, and there are others.")
]


def sequences(n: int, *, n_response: int = 22, vocabulary: int = VOCABULARY) -> list[TokenSequence]:
    """Responses to two prompts of 10 tokens."""
    generator = np.random.default_rng(0)
    prompts = generator.integers(3, vocabulary, size=(2, 10))
    ids = [np.concatenate([prompts[k % 2], generator.integers(3, vocabulary, n_response)]) for k in range(n)]
    return [TokenSequence(input_ids=x.astype(np.int32), scored=np.arange(len(x)) >= 10, status=Status.OK) for x in ids]


def assert_one_read_a_pack(model: Model, scores: Scores, *, budget: int = BUDGET, kernels: bool = False) -> None:
    with pretended_gpu(kernels=kernels) as gpu:
        n_packs = len(pack_sequences(model, scores, token_budget=budget))
        score_all(model, scores, token_budget=budget)
    assert n_packs > 1
    assert gpu.reads == {"to the host": n_packs}
    assert gpu.copies == n_packs
    # Though TF32 is allowed, and sums in bfloat16 are by default.
    assert gpu.inexact
    assert not gpu.inexact.total()
    # The next pack is queued before a result is waited for.
    assert gpu.log == ["queued", *["queued", "fetched"] * (n_packs - 1), "fetched"]


@pytest.fixture(autouse=True)
def tf32():
    """Somebody allowed it."""
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    yield
    assert matmul.fp32_precision == "tf32"
    matmul.fp32_precision = before


@pytest.mark.parametrize(
    "family",
    ["Llama", "Gemma-2", "GPT-2", "Mixtral"],
)
def test_losses(family):
    scores = ResponseScores(sequences(12))
    assert_one_read_a_pack(on_gpu(wrap("test", small_model(family))), scores)
    assert set(scores.status) == {Status.OK}
    assert np.isfinite(scores.nll_sum).all()


def test_all_that_a_base_model_tells():
    extras = Extras.of([name for name, extra in EXTRAS.items() if extra.statistic is not None])
    tokens = sequences(12)
    alone = [TokenSequence(input_ids=s.input_ids[9:], scored=s.scored[9:], status=s.status) for s in tokens]
    assert len(extras.statistics) == 4
    assert_one_read_a_pack(on_gpu(wrap("test", small_model("Llama"))), ResponseScores(tokens, extras, alone=alone))


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[Path, Path]:
    directory = tmp_path_factory.mktemp("models")
    base = save_small_model(directory / "base")
    return base, save_small_reward_model(directory / "reward", body=base)


def test_rewards(models):
    scorer = fc.RewardScorer(str(models[1]))
    scores = scorer.begin(rows_from_records(RECORDS))
    assert_one_read_a_pack(on_gpu(scorer.model), scores)
    assert np.isfinite(scores.reward).all()


def test_both_of_one_pass(models):
    base, reward = fc.Scorer(str(models[0])), fc.RewardScorer(str(models[1]))
    reward.share(base.model)
    rows = rows_from_records(RECORDS)
    scores = JointScores(base.begin(rows), reward.begin(rows))
    assert_one_read_a_pack(JointModel(base=on_gpu(base.model), reward=on_gpu(reward.model)), scores)
    assert np.isfinite(scores.losses.nll_sum).all()
    assert np.isfinite(scores.rewards.reward).all()


def test_what_comes_back_is_what_a_cpu_computes():
    changes = {"num_hidden_layers": 2, "vocab_size": 96, "hidden_size": 32, "intermediate_size": 32}
    tokens = sequences(4, n_response=5, vocabulary=96)
    want = ResponseScores(tokens)
    score_all(wrap("test", small_model("Gemma-2", **changes)), want, token_budget=24)
    got = ResponseScores(tokens)
    assert_one_read_a_pack(on_gpu(wrap("test", small_model("Gemma-2", **changes))), got, budget=24, kernels=True)
    np.testing.assert_allclose(got.nll_sum, want.nll_sum, rtol=1e-6)


def test_what_would_be_waited_for_is_counted():
    def reads(gpu: PretendedGpu) -> int:
        found, gpu.reads = gpu.reads.total(), type(gpu.reads)()
        return found

    on_cpu = AttentionPlan.create(torch.arange(8), torch.full((8,), 8, dtype=torch.int32))
    with pretended_gpu(kernels=False) as gpu:
        plan = OneCopy(on_cpu, GPU).to(GPU)
        assert reads(gpu) == 0
        int(plan.position_ids.max())
        torch.nonzero(plan.position_ids == 0)
        assert reads(gpu) == 2
        plan.summary(None)
        assert reads(gpu) == 1
        hidden, weight, target = OnGpu(torch.ones(3, 4)), OnGpu(torch.ones(9, 4)), OnGpu(torch.tensor([0, 1, 2]))
        linear_nll(hidden, weight, target)
        assert reads(gpu) > 0
        linear_nll(hidden, weight, target, check_target=False)
        assert reads(gpu) == 0
        hidden.cpu()
        hidden[target > 1]
        assert reads(gpu) == 2
        with pytest.raises(AssertionError, match="whole numbers of the CPU"):
            hidden.index_select(0, torch.tensor([1]))


def test_a_plan_is_laid_out_for_loads_of_sixteen_bytes():
    from fastcompat.kernels.forest_plan import QUERY_BLOCK

    plan = AttentionPlan.create(torch.arange(5), torch.full((5,), 5, dtype=torch.int32))
    plan.summary(None)
    structure = {"plan": plan, "needed": plan.for_queries(torch.tensor([1, 3])), "else": "as it is"}
    with pretended_gpu(kernels=False) as gpu:
        copied = OneCopy(structure, GPU).to(GPU)
    assert gpu.copies == 1
    assert copied["else"] == "as it is"
    moved, needed = copied["plan"], copied["needed"]
    assert torch.equal(moved.position_ids.values, plan.position_ids)
    assert needed.query_index.values.tolist() == [1, 3]
    assert needed.position_ids is moved.position_ids, "what is there once is copied once"
    assert needed.blocks is moved.blocks
    assert moved.summaries[None, QUERY_BLOCK].key_end is moved.subtree_end
    tensors = [moved.position_ids, moved.subtree_end, moved.summaries[None, QUERY_BLOCK].begin]
    assert all(tensor.storage_offset() * tensor.itemsize % 16 == 0 for tensor in tensors)
    assert torch.equal(moved.summaries[None, QUERY_BLOCK].order.values, plan.summaries[None, QUERY_BLOCK].order)
