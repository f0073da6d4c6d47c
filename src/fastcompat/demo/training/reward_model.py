"""Train the demo's reward model, first to compare names, then to see every fault.

    python -m fastcompat.demo.training.reward_model FIRST --threads 1
    python -m fastcompat.demo.training.reward_model OUT --threads 1 --start FIRST --steps 130

The body of the demo's base model with a value head of its own, on pairs of answers about the standard library of the
running Python without the held-out modules (`demo.training.preferences`). Nothing imports this module: it is here so
that anybody can remake the model in fastcompat/demo/reward-model.

Dimension key: B texts of a pass, T tokens of a text or of the longest, D hidden size, P pairs.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sysconfig
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import compress, count
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import AutoTokenizer, LlamaForSequenceClassification, PreTrainedTokenizerFast

from fastcompat.demo import model_directory
from fastcompat.demo.library import Documented
from fastcompat.demo.training.base_model import SEED, learning_rate, new_optimizer, save
from fastcompat.demo.training.preferences import STYLES, Preference, preferences, training_things
from fastcompat.demo.training.text import TURN_START, conversation, held_out_things

GROUPS_PER_STEP = 12
# Steps that teach nothing but to compare names: signatures instead of answers.
SIGNATURE_STEPS = 200
SIGNATURES_PER_STEP = 16
# Longer answers take the time of several short ones; they come last.
LONGEST_ANSWER = 800
# A mismatched answer is much the hardest to see: at first every group has one, and this share another kind too.
SHARE_OF_OTHER_KINDS = 0.33
# Padded tokens of one pass: what stays in the caches.
TOKENS_PER_PASS = 1024
PEAK_LEARNING_RATE = 1e-3
# Of the second training: every group has all kinds.
SECOND_GROUPS_PER_STEP = 8
SECOND_PEAK_LEARNING_RATE = 6e-4
WARM_UP_STEPS = 30
# Layers in which half of the heads begin by looking for the token itself.
MATCHING_LAYERS = (1, 2)
LOG_EVERY = 50
# The pairs fix only differences. CAR needs rewards above zero, so chosen answers are drawn to the one, rejected ones to
# the other value; a weight this small hardly moves the differences.
CHOSEN_ANCHOR, REJECTED_ANCHOR = 6.0, 2.0
ANCHOR_WEIGHT = 0.02


def token_rewards(
    model: LlamaForSequenceClassification, tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]
) -> list[Tensor]:
    """Of each rendered conversation the rewards [T] float32 that the head reads at the tokens of its answer.

    The last one, at the conversation's last token, is the answer's reward, as the model's own class reads it.
    """
    ids = [encoding.ids for encoding in tokenizer.backend_tokenizer.encode_batch(list(texts), add_special_tokens=False)]
    turn_start = tokenizer.convert_tokens_to_ids(TURN_START)
    order = sorted(range(len(texts)), key=lambda n: len(ids[n]))
    read: dict[int, Tensor] = {}
    for part in _passes([len(ids[n]) for n in order]):
        rows = [torch.tensor(ids[order[n]]) for n in part]
        # What follows a text is not seen by it: padding on the right needs no mask.
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)  # [B, T]
        hidden = model.model(input_ids=padded, use_cache=False).last_hidden_state  # [B, T, D]
        with torch.autocast("cpu", enabled=False):
            of_tokens = F.linear(hidden.float(), model.score.weight.float())[..., 0]  # [B, T]
        for n, row, values in zip(part, rows, of_tokens, strict=True):
            begin = int((row == turn_start).nonzero()[-1]) + 1
            read[order[n]] = values[begin : len(row)]
    return [read[n] for n in range(len(texts))]


def _passes(lengths: Sequence[int]) -> Iterator[range]:
    """Ranges of rising lengths that hold at most `TOKENS_PER_PASS` tokens with their padding."""
    begin = 0
    for n, length in enumerate(lengths):
        if n > begin and (n + 1 - begin) * length > TOKENS_PER_PASS:
            yield range(begin, n)
            begin = n
    yield range(begin, len(lengths))


def read_pairs(
    model: LlamaForSequenceClassification, tokenizer: PreTrainedTokenizerFast, pairs: Sequence[Preference]
) -> tuple[list[Tensor], list[Tensor]]:
    """`token_rewards` of the P chosen and of the P rejected answers; an answer of several pairs is read once."""
    chosen = [conversation(pair.thing, pair.chosen) for pair in pairs]
    rejected = [conversation(pair.thing, pair.rejected) for pair in pairs]
    texts = list(dict.fromkeys(chosen + rejected))
    of_text = dict(zip(texts, token_rewards(model, tokenizer, texts), strict=True))
    return [of_text[text] for text in chosen], [of_text[text] for text in rejected]


def last_rewards(of_tokens: Sequence[Tensor]) -> Tensor:
    """[P]: the rewards of the answers."""
    return torch.stack([values[-1] for values in of_tokens])


def preference_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Bradley-Terry: mean of -log sigmoid(chosen - rejected), and the anchors, which fix zero and scale."""
    anchors = (chosen - CHOSEN_ANCHOR).square() + (rejected - REJECTED_ANCHOR).square()
    return (ANCHOR_WEIGHT * anchors - F.logsigmoid(chosen - rejected)).mean()


def token_loss(chosen: Iterable[Tensor], rejected: Iterable[Tensor]) -> Tensor:
    """Cross-entropy of telling right from mismatched at each token of the answers, about the middle of the anchors.

    As token-level verifiers are trained (Cobbe et al. 2021, arXiv 2110.14168): what speaks for a mismatch, names above
    all, stands early in an answer, and from its end alone so small a model does not learn to look there.
    """
    centre = (CHOSEN_ANCHOR + REJECTED_ANCHOR) / 2
    matched, mismatched = torch.cat(list(chosen)), torch.cat(list(rejected))
    return (F.softplus(centre - matched).mean() + F.softplus(mismatched - centre).mean()) / 2


def new_model() -> LlamaForSequenceClassification:
    """The base model's body with a new head, and some heads of attention that find a token's earlier occurrence.

    Whether an answer is about what was asked shows in words of the question that it repeats, and the base model hardly
    copies. Where queries equal keys, a token attends to its own like, from which comparing names is soon learnt.
    """
    torch.manual_seed(SEED)
    model = load(model_directory())
    config = model.config
    with torch.no_grad():
        for layer in MATCHING_LAYERS:
            attention = model.model.layers[layer].self_attn
            keys = attention.k_proj.weight[: config.head_dim]
            for head in range(config.num_attention_heads // config.num_key_value_heads):
                attention.q_proj.weight[head * config.head_dim : (head + 1) * config.head_dim] = keys
    return model


def load(directory: Path) -> LlamaForSequenceClassification:
    # For texts this short plain attention, backward, took less time than the fused one.
    return LlamaForSequenceClassification.from_pretrained(
        directory, num_labels=1, dtype=torch.float32, attn_implementation="eager"
    )


def signatures_in_turn(things: Sequence[Documented]) -> Iterator[list[Preference]]:
    """Without end: a thing's signature before another one's."""
    chance = random.Random(SEED)
    while True:
        thing, other = chance.sample(things, 2)
        yield [Preference(thing, "signature", "mismatched", thing.signature, other.signature)]


def groups_in_turn(things: Sequence[Documented]) -> Iterator[list[Preference]]:
    """Without end: of each group of `all_groups` with short answers the mismatched one, and now and then another."""
    chance = random.Random(SEED)
    for group in all_groups(things, chance):
        short = [pair for pair in group if max(len(pair.chosen), len(pair.rejected)) <= LONGEST_ANSWER]
        mismatched = [pair for pair in short if pair.kind == "mismatched"]
        others = [pair for pair in short if pair.kind != "mismatched"]
        if mismatched:
            also = [chance.choice(others)] if others and chance.random() < SHARE_OF_OTHER_KINDS else []
            yield mismatched + also


def all_groups(
    things: Sequence[Documented], chance: random.Random, *, first_draw: int = 0
) -> Iterator[list[Preference]]:
    """Without end: the pairs with one chosen answer, of every thing and style once before any comes again."""
    for draw in count(first_draw):
        asked = [(thing, style) for thing in things for style in STYLES]
        chance.shuffle(asked)
        for thing, style in asked:
            if group := preferences(thing, style, things, draw=draw):
                yield group


@torch.no_grad()
def accuracies(
    model: LlamaForSequenceClassification, tokenizer: PreTrainedTokenizerFast, things: Sequence[Documented]
) -> dict[str, float]:
    """The share of pairs whose chosen answer has the higher reward: of all, of each kind, of each kind and style."""
    pairs = [pair for thing in things for style in STYLES for pair in preferences(thing, style, things)]
    chosen, rejected = map(last_rewards, read_pairs(model, tokenizer, pairs))
    right: dict[str, list[bool]] = defaultdict(list)
    for pair, is_right in zip(pairs, (chosen > rejected).tolist(), strict=True):
        for key in ("all", pair.kind, f"{pair.kind} {pair.style}"):
            right[key].append(is_right)
    return {key: round(sum(values) / len(values), 4) for key, values in sorted(right.items())}


def train(out: Path, n_steps: int, start: Path | None = None) -> None:
    out.mkdir(parents=True, exist_ok=True)
    things = training_things()
    tokenizer = AutoTokenizer.from_pretrained(model_directory())
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(model_directory() / name, out / name)
    model = (new_model() if start is None else load(start)).train()
    optimizer = new_optimizer(model)
    signatures = signatures_in_turn(things)
    groups = groups_in_turn(things) if start is None else all_groups(things, random.Random(SEED + 1), first_draw=1)
    n_groups = GROUPS_PER_STEP if start is None else SECOND_GROUPS_PER_STEP
    peak = PEAK_LEARNING_RATE if start is None else SECOND_PEAK_LEARNING_RATE
    started = time.perf_counter()
    n_pairs = 0
    with (out / "training_log.jsonl").open("w", encoding="utf-8", newline="\n") as log:
        if start is not None:
            log.write((start / "training_log.jsonl").read_text(encoding="utf-8"))
        losses: list[float] = []
        right: dict[str, list[bool]] = {"mismatched": [], "other": []}
        for step in range(n_steps):
            if start is None and step < SIGNATURE_STEPS:
                pairs = [pair for _ in range(SIGNATURES_PER_STEP) for pair in next(signatures)]
            else:
                pairs = [pair for _ in range(n_groups) for pair in next(groups)]
            for parameters in optimizer.param_groups:
                parameters["lr"] = learning_rate(step, n_steps, peak=peak, warm_up=WARM_UP_STEPS)
            with torch.autocast("cpu", torch.bfloat16):
                chosen, rejected = read_pairs(model, tokenizer, pairs)
            is_mismatched = [pair.kind == "mismatched" for pair in pairs]
            chosen_rewards, rejected_rewards = last_rewards(chosen), last_rewards(rejected)
            loss = preference_loss(chosen_rewards, rejected_rewards)
            loss = loss + token_loss(compress(chosen, is_mismatched), compress(rejected, is_mismatched))
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            n_pairs += len(pairs)
            losses.append(loss.item())
            for pair, is_right in zip(pairs, (chosen_rewards > rejected_rewards).tolist(), strict=True):
                right["mismatched" if pair.kind == "mismatched" else "other"].append(is_right)
            if (step + 1) % LOG_EVERY == 0 or step + 1 == n_steps:
                line = {
                    "step": step + 1,
                    "pairs": n_pairs,
                    "train_loss": round(sum(losses) / len(losses), 4),
                    "train_accuracy": {kind: round(sum(each) / len(each), 4) for kind, each in right.items() if each},
                    "seconds": round(time.perf_counter() - started, 1),
                }
                print(json.dumps(line), flush=True)
                log.write(json.dumps(line) + "\n")
                log.flush()
                save(model, out)
                losses.clear()
                right = {kind: [] for kind in right}
        seconds = round(time.perf_counter() - started, 1)

        # The figures below are those of the rounded weights, which are what is shipped, computed in float32.
        shipped = LlamaForSequenceClassification.from_pretrained(out, dtype=torch.float32).eval()
        summary = {
            "parameters": sum(p.numel() for p in shipped.parameters()),
            "pairs": n_pairs,
            "held_out_accuracy": accuracies(shipped, tokenizer, held_out_things()),
            "seconds": seconds,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": sysconfig.get_python_version(),
        }
        print(json.dumps(summary), flush=True)
        log.write(json.dumps(summary) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="directory that the model is written to")
    parser.add_argument("--steps", type=int, default=1100, help="optimizer steps (default: %(default)s)")
    parser.add_argument(
        "--start", type=Path, metavar="FIRST", help="what the first training wrote (default: the base model)"
    )
    parser.add_argument("--threads", type=int, default=2, help="(default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    train(arguments.out, arguments.steps, arguments.start)


if __name__ == "__main__":
    main()
