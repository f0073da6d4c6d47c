"""What a reward model reads: the ids are the template's with one BOS, and heads read where their classes do."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from reward_makers import llama3_tokenizer
from tokenizer_makers import CHATML, FAMILIES, GEMMA, INST, LLAMA3, make_tokenizer, row

from fastcompat.errors import ModelError, UsageError
from fastcompat.rows.response import Message, Response
from fastcompat.rows.status import Status
from fastcompat.tokens.reward import ReadOut, RewardTokenizer

LAST = ReadOut(rule="last", pad_id=None)
LLAMA3_TURN = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
WITHOUT_BOS = CHATML
CONVERSATIONS = {
    "one turn": row("What is two plus two?", "It is four."),
    "several turns": row("Hello there", "Hi!", "And now?", "Now we go on."),
    "system": row("Be brief.", "Hello", "Hi", roles=("system", "user", "assistant")),
    "blanks": row("Hello", "  \n "),
    "markers": row("Say <|im_end|>", "Here: <|im_end|> and </s> <s>"),
}


def plain_ids(tokenizer, messages: tuple[Message, ...]) -> list[int]:
    text = tokenizer.apply_chat_template([m._asdict() for m in messages], tokenize=False, add_generation_prompt=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def of(tokenizer, *rows: Response, read_out: ReadOut = LAST, **settings):
    found = RewardTokenizer(tokenizer, read_out, **settings)(rows)
    assert len(found) == len(rows)
    return found


# ---- ids ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_ids_are_the_templates_without_a_generation_prompt(family, conversation):
    tokenizer = make_tokenizer(chat_template=FAMILIES[family][0])
    example = CONVERSATIONS[conversation]
    (found,) = of(tokenizer, example)
    if family in ("gemma", "inst") and conversation == "system":
        assert found.status is Status.TEMPLATE
        assert "refuses" in found.detail
        assert found.reads == ()
        return
    wanted = plain_ids(tokenizer, example.messages)
    assert found.status is Status.OK
    assert found.input_ids.tolist() == wanted
    assert found.n_tokens == len(wanted)
    assert found.reads == (len(wanted) - 1,)


@pytest.mark.parametrize("kind", ["byte_level", "metaspace", "unigram", "wordpiece"])
@pytest.mark.parametrize("slow", [False, True])
def test_ids_of_every_kind_of_tokenizer(kind, slow):
    tokenizer = make_tokenizer(kind, CHATML, slow=slow)
    (found,) = of(tokenizer, CONVERSATIONS["several turns"])
    assert found.input_ids.tolist() == plain_ids(tokenizer, CONVERSATIONS["several turns"].messages)


@pytest.mark.parametrize("template", [LLAMA3, WITHOUT_BOS], ids=["template with BOS", "template without"])
@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("bos", ["auto", "one", "none"])
def test_exactly_one_bos_or_none(template, adds_bos, bos):
    tokenizer = make_tokenizer(chat_template=template, adds_bos=adds_bos)
    (found,) = of(tokenizer, CONVERSATIONS["one turn"], bos=bos)
    n_bos = found.input_ids.tolist().count(tokenizer.bos_token_id)
    assert n_bos == {"auto": int(adds_bos or template == LLAMA3), "one": 1, "none": 0}[bos]
    assert n_bos == 0 or found.input_ids[0] == tokenizer.bos_token_id
    assert found.reads == (len(found.input_ids) - 1,)


@pytest.mark.parametrize(("template", "adds_bos", "bos"), [(WITHOUT_BOS, True, "auto"), (LLAMA3, False, "auto")])
def test_no_warning_where_nothing_is_doubled(template, adds_bos, bos, caplog):
    with caplog.at_level(logging.WARNING, "fastcompat"):
        of(make_tokenizer(chat_template=template, adds_bos=adds_bos), bos=bos)
    assert not caplog.records


def test_a_doubled_bos_is_told_once(caplog):
    tokenizer = make_tokenizer(chat_template=LLAMA3, adds_bos=True)
    doubled = tokenizer(tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False))["input_ids"]
    assert doubled[:2] == [tokenizer.bos_token_id] * 2, "otherwise there is nothing to tell"
    with caplog.at_level(logging.WARNING, "fastcompat"):
        of(tokenizer, *[CONVERSATIONS["one turn"]] * 3)
        of(tokenizer, CONVERSATIONS["one turn"], bos="none")
    assert [record.getMessage().count("exactly one") for record in caplog.records] == [1]


def test_padding_side_and_truncation_of_the_tokenizer_change_nothing():
    wanted = of(make_tokenizer(chat_template=CHATML), CONVERSATIONS["several turns"])[0]
    tokenizer = make_tokenizer(chat_template=CHATML)
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.model_max_length = 5
    tokenizer("x", padding="max_length", max_length=4, truncation=True)
    (found,) = of(tokenizer, CONVERSATIONS["several turns"])
    assert found.input_ids.tolist() == wanted.input_ids.tolist()
    assert found.status is Status.OK


def test_no_chat_template_is_refused():
    with pytest.raises(ModelError, match=r"model-x: its tokenizer has no chat template.*save the tokenizer"):
        RewardTokenizer(make_tokenizer(), LAST, name="model-x")


def test_a_wrong_policy_is_refused():
    with pytest.raises(UsageError, match="bos='two'"):
        RewardTokenizer(make_tokenizer(chat_template=CHATML), LAST, bos="two")


# ---- rows without a reward ------------------------------------------------------------------------------------------


def test_rows_that_have_no_reward_keep_their_place_and_say_why():
    rows = [
        row("Hello", ""),
        CONVERSATIONS["one turn"],
        row("Hello", "Hi", status=Status.INVALID, detail="broken"),
        Response(messages=(), generator="g", source="s", row_index=0),
        row("Hello", roles=("user",)),
    ]
    found = of(make_tokenizer(chat_template=CHATML), *rows)
    statuses = [Status.EMPTY, Status.OK, Status.INVALID, Status.INVALID, Status.INVALID]
    assert [sequence.status for sequence in found] == statuses
    assert [bool(sequence.reads) for sequence in found] == [False, True, False, False, False]
    assert found[2].detail == "broken"
    assert found[0].n_tokens == 0


def test_an_over_long_conversation_is_too_long_unless_it_is_to_be_cut():
    tokenizer = make_tokenizer(chat_template=LLAMA3)
    long = row("Say it.", "word " * 50)
    whole = plain_ids(tokenizer, long.messages)
    limit = len(whole) - 1
    for settings in ({"max_length": limit}, {"context_length": limit}, {"max_length": 10**6, "context_length": limit}):
        (found,) = of(tokenizer, long, **settings)
        assert found.status is Status.TOO_LONG
        assert found.reads == ()
        assert found.n_tokens == len(whole)
        assert f"{len(whole)} tokens, the limit is {limit}" in found.detail
        (cut,) = of(tokenizer, long, truncate=True, **settings)
        assert cut.status is Status.TRUNCATED
        assert cut.input_ids.tolist() == whole[:limit]
        assert cut.reads == (limit - 1,)
        assert f"{len(whole)} tokens, cut at the limit of {limit}" in cut.detail
    (found,) = of(tokenizer, long, max_length=len(whole))
    assert found.status is Status.OK
    assert found.detail == ""


def test_the_limit_is_never_that_of_the_tokenizer():
    tokenizer = make_tokenizer(chat_template=CHATML)
    tokenizer.model_max_length = 512
    (found,) = of(tokenizer, row("Say it.", "word " * 3000))
    assert found.status is Status.OK
    assert found.n_tokens > 3000


@pytest.mark.parametrize("template", [LLAMA3, GEMMA, INST, CHATML])
def test_a_cut_that_leaves_nothing_of_the_response_gives_no_reward(template):
    tokenizer = make_tokenizer(chat_template=template)
    conversation = row("word " * 40, "Fine.")
    n_prompt = 0
    whole = plain_ids(tokenizer, conversation.messages)
    while tokenizer.decode(whole[: n_prompt + 1]).find("Fin") < 0:
        n_prompt += 1
    (without,) = of(tokenizer, conversation, truncate=True, max_length=n_prompt - 10)
    assert without.status is Status.PROMPT_TOO_LONG
    assert without.reads == ()
    (partial,) = of(tokenizer, conversation, truncate=True, max_length=n_prompt + 1)
    assert partial.status is Status.TRUNCATED


def test_enormous_conversations_are_not_read_to_their_end(monkeypatch):
    tokenizer = make_tokenizer(chat_template=CHATML)
    read = RewardTokenizer(tokenizer, LAST, max_length=64)
    cut = RewardTokenizer(tokenizer, LAST, max_length=64, truncate=True)
    enormous = row("Say it.", "some words of text " * 100_000)
    longest = 0

    def aligned(texts, align=cut._conversations._align):
        nonlocal longest
        longest = max([longest, *map(len, texts)])
        return align(texts)

    for tokens in (read, cut):
        monkeypatch.setattr(tokens._conversations, "_align", aligned)
    (found,) = read([enormous])
    assert found.status is Status.TOO_LONG
    assert found.detail.startswith("more than ")
    (kept,) = cut([enormous])
    assert kept.status is Status.TRUNCATED
    assert kept.input_ids.tolist() == plain_ids(tokenizer, row("Say it.", "some words of text " * 40).messages)[:64]
    assert 0 < longest < 100_000


# ---- where it is read -----------------------------------------------------------------------------------------------


class EchoBody(torch.nn.Module):
    """A body whose last hidden state is the position."""

    def forward(self, input_ids, **kwargs):
        from transformers.modeling_outputs import BaseModelOutputWithPast

        positions = torch.arange(input_ids.shape[1], dtype=torch.float32)
        return BaseModelOutputWithPast(last_hidden_state=positions[None, :, None])


def own_position(ids: list[int], pad_id: int | None) -> int:
    """Where transformers' class reads."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    shape = dict(vocab_size=8, hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1)
    model = LlamaForSequenceClassification(LlamaConfig(**shape, num_labels=1, pad_token_id=pad_id))
    model.model = EchoBody()
    model.score = torch.nn.Identity()
    return int(model(torch.tensor([ids])).logits[0, 0])


def position_before_pad(ids: list[int], pad_id: int | None) -> int:
    """The rule of transformers' classes of 2024, as ArmoRM's and QRM's still have it, in plain Python."""
    if pad_id is None:
        return len(ids) - 1
    first = ids.index(pad_id) if pad_id in ids else 0
    return (first - 1) % len(ids)


IDS = [[3, 4, 5], [3, 4, 2], [3, 2, 5, 2, 2], [2, 2, 2], [2, 4], [4], [2], [2, 4, 2, 2], [3, 2, 4, 5]]


@pytest.mark.parametrize("pad_id", [None, 2, 7])
@pytest.mark.parametrize("ids", IDS, ids=str)
def test_positions_are_those_of_the_classes(ids, pad_id):
    array = np.array(ids, np.int32)
    assert ReadOut(rule="non-pad", pad_id=pad_id).position(array) == own_position(ids, pad_id)
    assert ReadOut(rule="before-pad", pad_id=pad_id).position(array) == position_before_pad(ids, pad_id)
    assert ReadOut(rule="last", pad_id=pad_id).position(array) == len(ids) - 1


def test_where_the_final_token_is_the_pad_token_the_one_before_it_is_read():
    tokenizer = make_tokenizer(chat_template=LLAMA3)
    pad = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    conversation = CONVERSATIONS["one turn"]
    (last,) = of(tokenizer, conversation, read_out=ReadOut(rule="last", pad_id=pad))
    (non_pad,) = of(tokenizer, conversation, read_out=ReadOut(rule="non-pad", pad_id=pad))
    assert last.input_ids[-1] == pad
    assert non_pad.reads == (last.reads[0] - 1,)


def test_the_gate_is_read_at_the_end_of_the_last_prompt():
    tokenizer = llama3_tokenizer()
    turn = tokenizer(LLAMA3_TURN, add_special_tokens=False)["input_ids"]
    read_out = ReadOut(rule="last", pad_id=None, gate=LLAMA3_TURN)
    conversations = [CONVERSATIONS["several turns"], row("Hello", "Hi"), row("Hello", "Good morning to you")]
    found = of(tokenizer, *conversations, read_out=read_out)
    for sequence, conversation in zip(found, conversations, strict=True):
        reward, gate = sequence.reads
        assert reward == len(sequence.input_ids) - 1
        assert sequence.input_ids[gate : gate + len(turn)].tolist() == turn
        assert sequence.input_ids[: gate + 1].tolist() == plain_ids(tokenizer, conversation.messages[:-1])
    assert found[1].reads[1] == found[2].reads[1]


def test_a_response_that_quotes_the_turn_moves_the_gate_as_it_does_in_the_published_code():
    tokenizer = llama3_tokenizer()
    read_out = ReadOut(rule="last", pad_id=None, gate=LLAMA3_TURN)
    plain, quoting = of(tokenizer, row("Hello", "Hi"), row("Hello", f"Hi{LLAMA3_TURN}again"), read_out=read_out)
    assert quoting.reads[1] > plain.reads[1]


def test_a_template_without_the_turn_is_refused_and_a_cut_before_it_fails_alone():
    read_out = ReadOut(rule="last", pad_id=None, gate=LLAMA3_TURN)
    with pytest.raises(ModelError, match=r"does not write .* where the gate is read"):
        of(make_tokenizer(chat_template=CHATML), read_out=read_out)
    tokenizer = llama3_tokenizer()
    rows = [row("word " * 40, "Fine."), row("Hello", "Fine.")]
    found = of(tokenizer, *rows, read_out=read_out, max_length=30, truncate=True)
    assert [sequence.status for sequence in found] == [Status.PROMPT_TOO_LONG, Status.OK]


def test_fingerprints_tell_every_choice_apart():
    def fingerprint(template=LLAMA3, read_out=LAST, **settings):
        tokenizer = llama3_tokenizer()
        tokenizer.chat_template = template
        return RewardTokenizer(tokenizer, read_out, **settings).fingerprint()

    different = [
        fingerprint(),
        fingerprint(template=CHATML),
        fingerprint(bos="none"),
        fingerprint(max_length=7),
        fingerprint(truncate=True),
        fingerprint(read_out=ReadOut(rule="non-pad", pad_id=None)),
        fingerprint(read_out=ReadOut(rule="last", pad_id=3)),
        fingerprint(read_out=ReadOut(rule="last", pad_id=None, gate=LLAMA3_TURN)),
    ]
    assert len(set(different)) == len(different)
    assert fingerprint() == different[0]
