"""A base model and a generator's responses -> a tuned model in a directory, by TRL's SFTTrainer.

The trainer gets token ids and labels, made as `score` makes them: the same template, the same tokens under the loss. A
step's responses lie in one row with positions that begin anew, which is as if each were alone where attention heeds
them; that is tried on the model itself, and where it is not so each response is a row of its own.

Dimension key: T tokens of a step, N responses.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastcompat.errors import Interrupted, UsageError
from fastcompat.hub import model_file
from fastcompat.models import load_config, model_lengths, refuse_unsupported, resolve_device, weight_files
from fastcompat.rows import SCORED_STATUSES, Response
from fastcompat.study.settings import Training
from fastcompat.tokens import ConversationTokenizer, TokenizationSettings, TokenSequence

# What `train` writes beside the weights.
RECORD = "study_training.json"
# A label that is under no loss.
_IGNORED = -100
# What makes a tokenizer, as far as a model has it.
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "added_tokens.json"),
    *("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model"),
)
# Nats by which a packed response's NLL may differ from its own: far below what a neighbour that is seen changes.
_SAME_NLL = 0.02


class TrainingError(Exception):
    """A model that cannot be trained; `status` is what its cell's rows get."""

    def __init__(self, status: str, detail: str) -> None:
        super().__init__(detail)
        self.status = status


def tokenizer_of(source: str, training: Training) -> ConversationTokenizer:
    """The tokenizer with which a base model is scored, and trained. Raises what `Scorer` raises."""
    config = load_config(source, None)
    refuse_unsupported(source, config, task="CAUSAL_LM")
    weight_files(source, None)
    settings = TokenizationSettings(template=training.template, max_length=training.max_length)
    context_length, _ = model_lengths(config)
    return ConversationTokenizer.from_pretrained(source, settings, context_length=context_length)


def sequences_of(tokenizer: ConversationTokenizer, rows: Sequence[Response]) -> list[TokenSequence]:
    """Those that can be trained on, in order: a conversation that the template refuses is left out."""
    return [own for own in tokenizer(rows) if own.status in SCORED_STATUSES and own.n_tokens]


def steps_of(sequences: Sequence[TokenSequence], training: Training, seed: int) -> list[list[int]]:
    """Which responses each step is of, all epochs: in a new order every epoch, as many as `batch_tokens` hold."""
    chance = np.random.default_rng([seed, len(sequences)])
    steps: list[list[int]] = []
    for _ in range(training.epochs):
        step: list[int] = []
        filled = 0
        for n in chance.permutation(len(sequences)).tolist():
            length = len(sequences[n].input_ids)
            if step and filled + length > training.batch_tokens:
                steps.append(step)
                step, filled = [], 0
            step.append(n)
            filled += length
        steps.append(step)
    return steps


def load_trainable(source: str, device: torch.device) -> Any:
    """The base model in float32, with transformers' own attention."""
    from transformers import AutoModelForCausalLM

    be_quiet()
    return AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
    ).to(device)


def be_quiet() -> None:
    """No bars and advice of other packages for every cell."""
    import datasets
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    logging.getLogger("trl").setLevel(logging.ERROR)


def train(
    source: str,
    sequences: Sequence[TokenSequence],
    training: Training,
    seed: int,
    output: Path,
    *,
    tokenizer: ConversationTokenizer,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Train and write model, tokenizer and `RECORD` to `output`, an empty directory; the record is returned too.

    The same seed gives the same order, the same first LoRA weights and the same dropout; on a CPU the same bits.
    Raises TrainingError for a loss that is no number; Interrupted once `stop` says so; torch's own where memory ends.
    """
    from transformers import PrinterCallback, TrainerCallback, set_seed

    if not sequences:
        raise TrainingError("failed", "no response of this generator can be trained on")
    trl = _trl()
    device = resolve_device(training.device)
    if device.type == "cuda" and torch.cuda.device_count() > 1:
        raise UsageError("one process sees several GPUs: fastcompat study run --gpus all, or CUDA_VISIBLE_DEVICES=0")
    began = time.perf_counter()
    set_seed(seed)
    model = load_trainable(source, device)
    packed = are_alone_when_packed(model, sequences)
    steps = steps_of(sequences, training, seed)
    losses: list[float] = []
    ended: list[str] = []

    class Watch(TrainerCallback):  # type: ignore[misc]  # transformers has no types
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs and "loss" in logs:
                losses.append(float(logs["loss"]))
                if not math.isfinite(losses[-1]):
                    ended.append(f"the loss of step {len(losses)} is {losses[-1]}")
                    control.should_training_stop = True

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if stop():
                ended.append("")
                control.should_training_stop = True

    trainer = trl.SFTTrainer(
        model=model,
        args=_configuration(trl, training, seed, device, output, steps, packed),
        train_dataset=_dataset(sequences, steps, packed),
        processing_class=tokenizer.tokenizer,
        callbacks=[Watch()],
        peft_config=_lora(training),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    if "" in ended:
        raise Interrupted("interrupted during a training, which begins again; what was finished is kept")
    if ended:
        raise TrainingError("nonfinite", f"{ended[0]}; try a lower learning_rate")
    tuned = trainer.model.merge_and_unload() if training.lora_rank else trainer.model
    if not all(torch.isfinite(weights).all() for weights in tuned.parameters()):
        raise TrainingError("nonfinite", "a weight is no number after the last step; try a lower learning_rate")
    tuned.save_pretrained(output)
    for name in _TOKENIZER_FILES:
        path = model_file(source, name, None)
        if path is not None:
            shutil.copy(path, output / name)
    record = {
        "packed": packed,
        "steps": len(losses),
        "tokens": sum(len(sequences[n].input_ids) for step in steps for n in step),
        "tokens_under_the_loss": sum(sequences[n].n_tokens for step in steps for n in step),
        "losses": [round(loss, 6) for loss in losses],
        "seconds": round(time.perf_counter() - began, 3),
    }
    (output / RECORD).write_text(json.dumps(record) + "\n", encoding="utf-8")
    return record


def are_alone_when_packed(model: Any, sequences: Sequence[TokenSequence]) -> bool:
    """Whether responses in one row have the NLL that they have alone: tried on the three shortest."""
    some = sorted(sequences, key=lambda own: len(own.input_ids))[:3]
    if len(some) < 2:
        return True
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    try:
        with torch.no_grad():
            row = {name: value for name, value in _packed_row(some).items() if name != "labels"}
            given = {name: value.to(device) if torch.is_tensor(value) else value for name, value in row.items()}
            together = model(**given, use_cache=False).logits[0].float().log_softmax(-1)
            first, worst = 0, 0.0
            for own in some:
                ids = torch.from_numpy(own.input_ids.astype(np.int64)).to(device)
                alone = model(input_ids=ids[None], use_cache=False).logits[0].float().log_softmax(-1)
                here = together[first : first + len(ids)]
                target = ids[1:, None]
                worst = max(worst, float((alone[:-1] - here[:-1]).gather(-1, target).abs().max()))
                first += len(ids)
    except (TypeError, ValueError):  # a model that does not take positions
        return False
    finally:
        model.train(was_training)
    return worst <= _SAME_NLL


def _packed_row(sequences: Sequence[TokenSequence]) -> dict[str, Any]:
    """What TRL's collator makes of one row."""
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    collator = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    found: dict[str, Any] = collator([_row(sequences)])
    return found


def _row(sequences: Sequence[TokenSequence]) -> dict[str, list[int]]:
    ids = np.concatenate([own.input_ids for own in sequences]).astype(np.int64)
    scored = np.concatenate([own.scored for own in sequences])
    return {
        "input_ids": ids.tolist(),
        "labels": np.where(scored, ids, _IGNORED).tolist(),
        "seq_lengths": [len(own.input_ids) for own in sequences],
    }


def _dataset(sequences: Sequence[TokenSequence], steps: Sequence[Sequence[int]], packed: bool) -> Any:
    import datasets

    if packed:
        return datasets.Dataset.from_list([_row([sequences[n] for n in step]) for step in steps])
    rows = [_row([sequences[n]]) for step in steps for n in step]
    return datasets.Dataset.from_list([{k: v for k, v in row.items() if k != "seq_lengths"} for row in rows])


def _configuration(
    trl: Any,
    training: Training,
    seed: int,
    device: torch.device,
    output: Path,
    steps: Sequence[Sequence[int]],
    packed: bool,
) -> Any:
    # One row at a time: where responses are rows of their own, a step adds up as many as it has on average.
    together = 1 if packed else max(1, round(sum(map(len, steps)) / len(steps)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of names that TRL itself still uses
        return _sft_config(trl, training, seed, device, output, len(steps), packed, together)


def _sft_config(
    trl: Any,
    training: Training,
    seed: int,
    device: torch.device,
    output: Path,
    n_steps: int,
    packed: bool,
    together: int,
) -> Any:
    return trl.SFTConfig(
        output_dir=str(output),
        use_cpu=device.type == "cpu",
        bf16=device.type == "cuda",
        per_device_train_batch_size=1,
        gradient_accumulation_steps=together,
        num_train_epochs=1,  # the rows are of all epochs
        train_sampling_strategy="sequential",
        padding_free=packed,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        learning_rate=training.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=round(training.warm_up * n_steps),
        gradient_checkpointing=training.gradient_checkpointing,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=seed,
        data_seed=seed,
        dataloader_pin_memory=device.type == "cuda",
    )


def _lora(training: Training) -> Any:
    if training.lora_rank is None:
        return None
    try:
        from peft import LoraConfig
    except ImportError:
        raise UsageError('lora_rank needs peft: pip install "fastcompat[study]", or leave lora_rank away') from None
    return LoraConfig(
        r=training.lora_rank, lora_alpha=2 * training.lora_rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )


def _trl() -> Any:
    try:
        import trl
    except ImportError:
        raise UsageError('a study trains with TRL: pip install "fastcompat[study]"') from None
    return trl
