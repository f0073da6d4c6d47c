"""Train the demo's base model: `python -m fastcompat.demo.training.base_model OUT`.

A byte-level BPE tokenizer and a Llama of 3.4 million parameters, on the documentation and some of the source of the
standard library of the running Python, without the held-out modules. It took 19 minutes on two cores that others used
too. Nothing imports this module: it is here so that anybody can remake the model in fastcompat/demo/base-model.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from fastcompat.demo.corpus import digest, first_paragraph
from fastcompat.demo.library import Documented, load
from fastcompat.demo.training.text import (
    TURN_END,
    TURN_START,
    conversation,
    held_out_things,
    known_things,
    quotation_check,
    source_files,
    spaced,
)

SEED = 2411_07133
VOCABULARY = 4096
BLOCK = 512
BLOCKS_PER_STEP = 8
# The logits of two blocks stay in the caches: a pass over sixteen took six times as long as eight passes over two.
BLOCKS_PER_PASS = 2
PEAK_LEARNING_RATE = 2e-3
WARM_UP_STEPS = 100
LOG_EVERY = 100
# So many blocks of held-out conversations for the log's lines; the last line is about all of them.
HELD_OUT_BLOCKS = 32
WEIGHT_DECAY = 0.1
# The model shall know documentation well and code a little: of the source it reads each fourth file.
SOURCE_STRIDE = 4

END_OF_TEXT = "<|endoftext|>"
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def conversations(things: Sequence[Documented]) -> list[str]:
    """Each thing asked about twice: first all are answered in full, then, not to be copied from there, in short."""
    in_full = [conversation(thing, thing.text) for thing in things]
    return in_full + [conversation(thing, first_paragraph(thing)) for thing in things]


def repetitions(things: Sequence[Documented]) -> list[str]:
    """First paragraphs, each several times in a row: a model this small learns to copy only if it is taught to."""
    return [
        " ".join([spaced(first_paragraph(thing))] * (2 + digest("repetitions", thing.name) % 5)) for thing in things
    ]


def reference_topics() -> list[str]:
    """The chapters of the language reference that `help()` knows."""
    topics = getattr(load("pydoc_data.topics"), "topics", {})
    return [text for _, text in sorted(topics.items())]


def held_out_and_training() -> tuple[list[Documented], list[str]]:
    """What the model must not see, and the texts that it is trained on, shuffled."""
    held_out = held_out_things()
    sources = list(source_files())
    known = known_things(sources)
    documents = [*(thing.text for thing in known), *conversations(known), *repetitions(known), *reference_topics()]
    quotes = quotation_check(held_out)
    texts = [text for text in documents if not quotes(text)]
    texts += [source for _, source in sources[::SOURCE_STRIDE] if not quotes(source)]
    random.Random(SEED).shuffle(texts)
    return held_out, texts


def train_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE, every text round-trips; no BOS, a turn's end is the EOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT, TURN_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[TURN_START],
        chat_template=CHATML,
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )


def pack(texts: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """[blocks, BLOCK + 1] token ids: the texts end to end, each block's last token being the next one's first."""
    ids = [
        token
        for encoding in tokenizer.backend_tokenizer.encode_batch([text + END_OF_TEXT for text in texts])
        for token in encoding.ids
    ]
    n_blocks = max((len(ids) - 1) // BLOCK, 1)
    return torch.tensor(ids[: n_blocks * BLOCK + 1]).unfold(0, BLOCK + 1, BLOCK)


def new_model(
    tokenizer: PreTrainedTokenizerFast, family: str = "llama", width: int = 256, layers: int = 4
) -> PreTrainedModel:
    """The shipped model's shape, or a relative of it: heads of 64, two that share their keys."""
    torch.manual_seed(SEED)
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            family,
            vocab_size=VOCABULARY,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=width // 64,
            num_key_value_heads=max(1, width // 128),
            head_dim=64,
            max_position_embeddings=2048,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def mean_loss(model: PreTrainedModel, blocks: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy, nats, over the blocks' tokens, each given those before it in its block."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=blocks[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), blocks[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: PreTrainedModel, blocks: torch.Tensor) -> float:
    model.eval()
    losses = [mean_loss(model, part).item() * len(part) for part in torch.split(blocks, BLOCKS_PER_PASS)]
    model.train()
    return sum(losses) / len(blocks)


def new_optimizer(model: torch.nn.Module) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95))


def learning_rate(step: int, n_steps: int, *, peak: float = PEAK_LEARNING_RATE, warm_up: int = WARM_UP_STEPS) -> float:
    """Linear warm-up, then a cosine to a hundredth of the peak."""
    if step < warm_up:
        return peak * (step + 1) / warm_up
    progress = (step - warm_up) / max(n_steps - warm_up, 1)
    return peak * (0.01 + 0.99 * (1 + math.cos(math.pi * progress)) / 2)


def save(model: PreTrainedModel, out: Path) -> None:
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(out)
    (out / "generation_config.json").unlink(missing_ok=True)  # says only what config.json says


def train(out: Path, n_steps: int, family: str = "llama", width: int = 256, layers: int = 4) -> None:
    out.mkdir(parents=True, exist_ok=True)
    held_out, texts = held_out_and_training()

    tokenizer = train_tokenizer(texts)
    tokenizer.save_pretrained(out)
    blocks = pack(texts, tokenizer)
    held_out_documents = pack([thing.text for thing in held_out], tokenizer)
    held_out_conversations = pack(conversations(held_out), tokenizer)
    held_out_blocks = f"{len(held_out_documents)} + {len(held_out_conversations)}"
    print(f"{len(texts)} texts, {len(blocks)} blocks of {BLOCK}; held out {held_out_blocks}", flush=True)

    model = new_model(tokenizer, family, width, layers)
    optimizer = new_optimizer(model)
    order = torch.Generator().manual_seed(SEED)
    queue = torch.empty(0, dtype=torch.int64)
    started = time.perf_counter()
    with (out / "training_log.jsonl").open("w", encoding="utf-8", newline="\n") as log:
        recent: list[float] = []
        for step in range(n_steps):
            if len(queue) < BLOCKS_PER_STEP:
                queue = torch.cat([queue, torch.randperm(len(blocks), generator=order)])
            chosen, queue = queue[:BLOCKS_PER_STEP], queue[BLOCKS_PER_STEP:]
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, n_steps)
            for part in torch.split(blocks[chosen], BLOCKS_PER_PASS):
                loss = mean_loss(model, part) * len(part) / BLOCKS_PER_STEP
                loss.backward()  # type: ignore[no-untyped-call]
                recent.append(loss.item())
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if (step + 1) % LOG_EVERY == 0 or step + 1 == n_steps:
                line = {
                    "step": step + 1,
                    "tokens": (step + 1) * BLOCKS_PER_STEP * BLOCK,
                    "train_loss": round(sum(recent) / (step % LOG_EVERY + 1), 4),
                    "held_out_loss": round(held_out_loss(model, held_out_conversations[:HELD_OUT_BLOCKS]), 4),
                    "seconds": round(time.perf_counter() - started, 1),
                }
                recent.clear()
                print(json.dumps(line), flush=True)
                log.write(json.dumps(line) + "\n")
                log.flush()
                save(model, out)

        # The figures below are those of the rounded weights, which are what is shipped.
        model = model.to(torch.bfloat16)
        summary = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "tokens": n_steps * BLOCKS_PER_STEP * BLOCK,
            "tokens_per_epoch": len(blocks) * BLOCK,
            "held_out_documentation_loss": round(held_out_loss(model, held_out_documents), 4),
            "held_out_conversation_loss": round(held_out_loss(model, held_out_conversations), 4),
            "seconds": round(time.perf_counter() - started, 1),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": sysconfig.get_python_version(),
        }
        print(json.dumps(summary), flush=True)
        log.write(json.dumps(summary) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="directory that the model is written to")
    parser.add_argument("--steps", type=int, default=900, help="optimizer steps (default: %(default)s)")
    families = ("llama", "qwen3", "olmo2", "phi3")
    parser.add_argument("--family", choices=families, default="llama", help="(default: %(default)s)")
    parser.add_argument("--width", type=int, default=256, help="a multiple of 128 (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=4, help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="(default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    train(arguments.out, arguments.steps, arguments.family, arguments.width, arguments.layers)


if __name__ == "__main__":
    main()
