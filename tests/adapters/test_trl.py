"""The callback in the real SFTTrainer: it logs what the checkpoint gives, and the training does not notice it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

import fastcompat as fc
from fastcompat.adapters.trl import CompatibilityCallback
from fastcompat.demo import model_directory
from fastcompat.errors import UsageError

trl = pytest.importorskip("trl", reason="trl is not installed")

QUESTIONS = ["What does `len` do?", "What does `sorted` do?", "What is a list?"]
ANSWERS = {
    "docs": ["It returns the number of items of a container.", "It returns a sorted list.", "A mutable sequence."],
    "weak": ["Bananas are often yellow.", "It is what it is.", "No idea, ask somebody else."],
}
ROWS = [
    {"prompt": question, "response": ANSWERS[generator][n], "generator": generator, "reward": 1.0 + n}
    for generator in ANSWERS
    for n, question in enumerate(QUESTIONS)
]
TRAINING = [
    {"prompt": [{"role": "user", "content": "Say it."}], "completion": [{"role": "assistant", "content": text}]}
    for text in ("A list is a mutable sequence.", "A tuple is not.", "A set has no order.", "A dict has keys.")
]


def new_trainer(directory: Path, model: Any = None, *, peft_config: Any = None, **options: Any) -> Any:
    import datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if model is None:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(model_directory(), dtype=torch.float32, attention_dropout=0.1)
    config = trl.SFTConfig(
        **dict(
            output_dir=str(directory),
            use_cpu=True,
            bf16=False,
            max_steps=2,
            per_device_train_batch_size=2,
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="steps",
            save_steps=1,
            logging_steps=1,
            learning_rate=1e-3,
            report_to=[],
            disable_tqdm=True,
            seed=1,
        )
        | options
    )
    rows = datasets.Dataset.from_list(TRAINING)
    return trl.SFTTrainer(
        model=model,
        args=config,
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(model_directory()),
        peft_config=peft_config,
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Any:
    from transformers import TrainerCallback

    class Reporter(TrainerCallback):
        def __init__(self) -> None:
            self.logged: list[dict[str, float]] = []

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
            self.logged.append(dict(logs))

    trainer = new_trainer(
        tmp_path_factory.mktemp("with"),
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss/docs",
        greater_is_better=False,
    )
    trainer.add_callback(CompatibilityCallback(trainer, ROWS))
    trainer.reporter = Reporter()
    trainer.add_callback(trainer.reporter)
    trainer.train()
    return trainer


def logged(trainer: Any) -> list[dict[str, float]]:
    return [line for line in trainer.state.log_history if "eval_loss/docs" in line]


def expected(checkpoint: Path, rows: Any = ROWS, dtype: str = "float32") -> dict[str, float]:
    scored = fc.Scorer(str(checkpoint), device="cpu", dtype=dtype).score(rows)
    found = {}
    for generator in ANSWERS:
        loss = np.mean([row["loss"] for row in scored.to_pylist() if row["generator"] == generator])
        found[f"eval_loss/{generator}"] = loss
        found[f"eval_car/{generator}"] = 2.0 / (1 + 3 * loss)
    return found


def test_every_evaluation_logs_what_the_checkpoint_gives(trained):
    lines = logged(trained)
    assert [line["step"] for line in lines] == [1, 2]
    for step, line in zip((1, 2), lines, strict=True):
        figures = expected(Path(trained.args.output_dir) / f"checkpoint-{step}")
        assert {name: line[name] for name in figures} == pytest.approx(figures, rel=1e-5)
    assert abs(lines[0]["eval_loss/docs"] - lines[1]["eval_loss/docs"]) > 1e-3, "the training did something"
    assert sum("eval_car/weak" in logs for logs in trained.reporter.logged) == 2
    assert trained.state.best_metric == min(line["eval_loss/docs"] for line in lines)


def test_the_training_does_not_notice_it(trained, tmp_path):
    alone = new_trainer(tmp_path)
    alone.train()
    last = Path("checkpoint-2/model.safetensors")
    assert (tmp_path / last).read_bytes() == (Path(trained.args.output_dir) / last).read_bytes()
    of_training = [[line["loss"] for line in own.state.log_history if "loss" in line] for own in (trained, alone)]
    assert of_training[0] == of_training[1]


def test_an_evaluation_by_hand_returns_them(trained):
    metrics = trained.evaluate()
    assert metrics["eval_loss/docs"] == pytest.approx(trained.state.best_metric, rel=1e-6)


def test_bfloat16_checkpointing_and_a_table_of_several_rewards(tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_directory(), dtype=torch.bfloat16)
    trainer = new_trainer(tmp_path, model, gradient_checkpointing=True, max_steps=1)
    rows = pa.Table.from_pylist(
        [{"prompt": row["prompt"], "response": row["response"], "model": row["generator"]} for row in ROWS]
        + [{"prompt": "What?", "response": None, "model": "weak"}]
    )
    trainer.add_callback(CompatibilityCallback(trainer, rows, mapping={"generator": "model"}))
    trainer.train()
    (line,) = logged(trainer)
    figures = expected(tmp_path / "checkpoint-1", dtype="bfloat16")
    assert line["eval_loss/weak"] == pytest.approx(figures["eval_loss/weak"], rel=0.02)
    assert "eval_car/weak" not in line


def test_adapters(tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    trainer = new_trainer(tmp_path, max_steps=1, peft_config=config)
    trainer.add_callback(CompatibilityCallback(trainer, ROWS))
    trainer.train()
    (line,) = logged(trainer)
    merged = trainer.model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    trainer.processing_class.save_pretrained(tmp_path / "merged")
    figures = expected(tmp_path / "merged")
    assert {name: line[name] for name in figures} == pytest.approx(figures, rel=1e-4)


def test_what_cannot_be_scored_is_refused_before_the_training(trained):
    rows = [row | {"reward": -2.0} for row in ROWS]
    with pytest.raises(UsageError, match="reward_shift"):
        CompatibilityCallback(trained, rows)
    assert CompatibilityCallback(trained, rows, reward_shift=2.5)
    trained.is_fsdp_enabled = True
    with pytest.raises(UsageError, match="spread over processes"):
        CompatibilityCallback(trained, ROWS)
    trained.is_fsdp_enabled = False


def test_rows_of_which_none_can_be_scored_are_refused(trained):
    with pytest.raises(UsageError, match="no rows"):
        CompatibilityCallback(trained, [])
    with pytest.raises(UsageError, match="none of 1 responses can be scored: 1 empty"):
        CompatibilityCallback(trained, [{"prompt": "What?", "response": "", "generator": "docs"}])


@pytest.fixture
def untrained(tmp_path) -> Any:
    return new_trainer(tmp_path, max_steps=1, save_strategy="no")


def test_several_sets_are_one_evaluation_of_the_same_weights(untrained):
    untrained.eval_dataset = {"a": untrained.eval_dataset, "b": untrained.eval_dataset}
    untrained.add_callback(CompatibilityCallback(untrained, ROWS))
    found = untrained.evaluate()
    assert {"eval_a_loss", "eval_b_loss", "eval_loss/docs"} <= set(found)
    assert len(logged(untrained)) == 1
    with torch.no_grad():
        untrained.model.model.norm.weight.mul_(2)
    other = untrained.evaluate(untrained.eval_dataset["a"], metric_key_prefix="test")
    assert abs(other["eval_loss/docs"] - found["eval_loss/docs"]) > 1e-3
    assert len(logged(untrained)) == 2


def test_a_loss_that_is_not_finite_any_more_makes_the_mean_nan(untrained, caplog):
    callback = CompatibilityCallback(untrained, ROWS)
    untrained.add_callback(callback)
    (token,) = untrained.processing_class(" yellow", add_special_tokens=False).input_ids[:1]
    before = untrained.evaluate()
    names = {name for name in before if name.startswith(("eval_loss/", "eval_car/"))}
    with torch.no_grad():
        untrained.model.model.embed_tokens.weight[token] = float("nan")  # "weak" has it, "docs" has not
    found = untrained.evaluate()
    assert np.isnan([found["eval_loss/weak"], found["eval_car/weak"]]).all()
    with torch.no_grad():
        untrained.model.model.norm.weight.fill_(float("nan"))
    found = untrained.evaluate()
    assert len(names) == 4
    assert np.isnan([found[name] for name in names]).all()
    assert caplog.text.count("have lost their loss") == 1
