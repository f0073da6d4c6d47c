"""A reward model in the real trainers of TRL: two steps with the demo's models, and what a completion may be."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

import fastcompat as fc
from fastcompat.demo import model_directory, reward_model_directory
from fastcompat.errors import UsageError

PROMPTS = ["What does `len` do?", "What does `sorted` do?"]


@pytest.fixture(scope="module")
def judge() -> fc.RewardScorer:
    return fc.RewardScorer(str(reward_model_directory()), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def trl() -> Any:
    return pytest.importorskip("trl", reason="trl is not installed")


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def assistant(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


@pytest.mark.parametrize(("trainer", "conversational"), [("GRPO", True), ("RLOO", False)])
def test_two_steps_log_what_score_gives(trl, judge, tmp_path, trainer, conversational):
    import datasets

    reward = judge.as_reward("judge")
    calls: list[tuple[list[Any], list[Any], list[float | None]]] = []

    def watched(prompts, completions, **columns):
        calls.append((prompts, completions, reward(prompts, completions, **columns)))
        return calls[-1][2]

    watched.__name__ = reward.__name__
    config = getattr(trl, f"{trainer}Config")(
        output_dir=str(tmp_path),
        use_cpu=True,
        bf16=False,
        max_steps=2,
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=6,
        generation_kwargs={"min_new_tokens": 4},  # else the demo's model says nothing
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        seed=1,
    )
    prompts = [user(text) for text in PROMPTS] if conversational else PROMPTS
    own = getattr(trl, f"{trainer}Trainer")(
        model=str(model_directory()),
        args=config,
        reward_funcs=[watched],
        train_dataset=datasets.Dataset.from_dict({"prompt": prompts}),
    )
    own.train()
    logged = [line["rewards/judge/mean"] for line in own.state.log_history if "rewards/judge/mean" in line]
    assert len(logged) == len(calls) == 2
    for mean, (prompts, completions, rewards) in zip(logged, calls, strict=True):
        assert len(prompts) == 4
        assert all(prompt == prompts[0] for prompt in prompts)
        if conversational:
            rows = [{"messages": prompt + said} for prompt, said in zip(prompts, completions, strict=True)]
        else:
            rows = [{"prompt": prompt, "response": said} for prompt, said in zip(prompts, completions, strict=True)]
        assert rewards == judge.score(rows)["reward"].to_pylist()
        assert mean == pytest.approx(sum(rewards) / 4, rel=1e-5)


def test_what_cannot_be_judged_is_none_and_not_zero(judge):
    reward = judge.as_reward()
    assert reward.__name__ == "reward-model"
    tool = [*assistant("I look."), {"role": "tool", "content": "3"}]
    prompt = [*user("a"), *assistant("an earlier answer"), *user(PROMPTS[0])]
    completions = [assistant("The length."), [], tool, assistant(""), assistant("The length.")]
    rewards = reward(prompts=[prompt] * 5, completions=completions, completion_ids=[[1]] * 5, trainer_state=None)
    assert rewards[1:4] == [None] * 3
    assert rewards[0] == rewards[4] == judge.score([{"messages": prompt + completions[0]}])["reward"][0].as_py()
    assert reward(PROMPTS, ["The length.", ""])[1] is None
    assert reward(PROMPTS, ["", ""]) == [None, None]
    assert reward([], []) == []
    with pytest.raises(UsageError, match="2 prompts but 1"):
        reward(PROMPTS, ["one"])


def test_texts_are_a_users_turn_and_the_answer(judge):
    reward = pickle.loads(pickle.dumps(judge.as_reward()))
    texts = reward(PROMPTS, ["The length.", "A list."])
    assert texts == reward([user(text) for text in PROMPTS], [assistant("The length."), assistant("A list.")])


def test_completions_of_a_prompt_share_its_pass(judge):
    packed = []
    compute = judge.begin

    def begin(rows):
        scores = compute(rows)
        packed.append(scores)
        return scores

    judge.begin = begin
    try:
        judge.as_reward()([PROMPTS[0]] * 8, [f"answer {n}" for n in range(8)])
    finally:
        del judge.begin
    from fastcompat.scoring import pack_sequences

    (scores,) = packed
    (forest,) = pack_sequences(judge.model, scores, token_budget=4096)
    shared = len(scores.sequences[0].input_ids) - 10
    assert forest.n_tokens <= sum(len(sequence.input_ids) for sequence in scores.sequences) - 7 * shared
