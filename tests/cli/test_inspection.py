"""What `inspect` prints marks exactly the scored tokens, in colour and without, and runs no escape sequence."""

from __future__ import annotations

import io
import json
import re
from typing import Any

import pytest
from rich.console import Console
from tokenizer_makers import BACKENDS, CHATML, LLAMA3, make_tokenizer
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

from fastcompat.cli.inspection import render_inspection, token_pieces, visible
from fastcompat.rows.response import Message, Response
from fastcompat.rows.status import Status
from fastcompat.tokens.conversations import ConversationTokenizer
from fastcompat.tokens.reward import ReadOut, RewardTokenizer
from fastcompat.tokens.settings import TokenizationSettings

TEXT = "Two  words\n\tand 東京 👩‍👧 [bold]done"


def shown(
    text: str, *, kind: str = "byte_level", slow: bool = False, colour: bool = False, ids: bool = False, **kwargs: Any
) -> str:
    row = Response(
        messages=(Message("user", "What [red]is\x1b[31m it?"), Message("assistant", text)),
        generator="some model",
        source="file.jsonl",
        row_index=7,
    )
    settings = TokenizationSettings(**kwargs)
    tokenizer = ConversationTokenizer(make_tokenizer(kind, CHATML, slow=slow), settings, context_length=500)
    (sequence,) = tokenizer([row])
    console = Console(file=io.StringIO(), width=400, force_terminal=colour, color_system="standard" if colour else None)
    console.print(render_inspection(row, sequence, tokenizer, ids=ids))
    return console.file.getvalue()


@pytest.mark.parametrize("slow", [False, True], ids=["fast", "slow"])
def test_scored_runs_are_marked_without_colour(slow: bool) -> None:
    output = shown(TEXT, slow=slow)
    (run,) = re.findall("⟦(.*?)⟧", output, flags=re.DOTALL)
    assert run.replace("↵\n", "↵") == visible(TEXT + "<|im_end|>").replace("↵\n", "↵")
    assert "\x1b" not in output
    assert "What·[red]is␛[31m·it?<|im_end|>" in output


@pytest.mark.parametrize("kind", BACKENDS)
def test_every_vocabulary_shows_the_response_as_scored(kind: str) -> None:
    (run,) = re.findall("⟦(.*?)⟧", shown("It is a call.", kind=kind), flags=re.DOTALL)
    assert re.sub("##|·", "", run) == "Itisacall.<|im_end|>"


def test_colour_tells_scored_tokens_from_the_others() -> None:
    output = shown("One two", colour=True)
    on_green = re.findall(r"\x1b\[1;30;(?:42|102)m(.*?)\x1b\[0m", output)
    assert "".join(on_green) == "One·two<|im_end|>"
    assert "\x1b[31m" not in output.replace("\x1b[0m", "")  # the prompt's own escape sequence is not passed on


def test_header_and_counts() -> None:
    lines = dict(re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in shown("One").splitlines()[:7])
    assert lines["row"] == "file.jsonl#7"
    assert lines["generator"] == "some model"
    assert lines["template"] == "the tokenizer's own chat template"
    assert lines["token ids"] == "the given tokenizer's"
    assert lines["length limit"] == "500 tokens"
    assert re.fullmatch(r"\d+ before the response, \d+ scored, 1 others", lines["tokens"])
    assert lines["status"] == "ok"


def test_a_row_that_cannot_be_scored_shows_its_reason() -> None:
    output = shown("")
    assert "empty: the response has no characters" in output
    assert "⟦" not in output
    assert "prompt_too_long: the length limit of 5 tokens" in shown("One", max_length=5)


def test_all_turns_are_marked_one_by_one() -> None:
    messages = [Message(role, content) for role, content in zip(["user", "assistant"] * 2, "QAPB", strict=True)]
    row = Response(messages=tuple(messages), generator="g", source="s", row_index=0, status=Status.OK)
    tokenizer = ConversationTokenizer(
        make_tokenizer("byte_level", LLAMA3), TokenizationSettings(turns="all"), context_length=None
    )
    (sequence,) = tokenizer([row])
    console = Console(file=io.StringIO(), width=400)
    console.print(render_inspection(row, sequence, tokenizer))
    assert re.findall("⟦(.*?)⟧", console.file.getvalue()) == ["A<|eot_id|>", "B<|eot_id|>"]


def test_id_table_has_every_token() -> None:
    output = shown("One 東", ids=True)
    table = output[output.index("index") :].splitlines()[1:]
    tokenizer = make_tokenizer("byte_level", CHATML)
    rows = [line.split() for line in table if line.strip()]
    assert [int(cells[0]) for cells in rows] == list(range(len(rows)))
    scored = [int(cells[1]) for cells in rows if cells[2:3] == ["yes"]]
    assert tokenizer.decode(scored) == "One 東<|im_end|>"
    assert any(cells[-1].startswith("<0x") for cells in rows)  # a part of a character has no text of its own


@pytest.mark.parametrize("slow", [False, True], ids=["fast", "slow"])
@pytest.mark.parametrize("text", [TEXT, "\ufffd é\u0301", "a\x00b", "</s>!"])
def test_pieces_joined_are_the_text(text: str, slow: bool) -> None:
    tokenizer = make_tokenizer(slow=slow)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = list(token_pieces(tokenizer, ids))
    assert "".join(piece.text for piece in pieces) == text
    assert sum(piece.n_tokens for piece in pieces) == len(ids)
    truncated = list(token_pieces(make_tokenizer(), make_tokenizer()("東", add_special_tokens=False)["input_ids"][:1]))
    assert truncated[-1].text == "\ufffd"


def test_what_stands_beside_texts_is_named_and_a_refused_row_shows_its_turns() -> None:
    call = '{"tool_calls":[{"function":{"name":"weather\\u001b[31m"}}],"weight":1}'
    row = Response(
        messages=(Message("user", "How warm?"), Message("assistant", "Let me look.", call)),
        generator="g",
        source="s",
        row_index=0,
        tools='[{"name":"weather"}]',
    )
    tokenizer = ConversationTokenizer(make_tokenizer("byte_level", CHATML), TokenizationSettings(), context_length=500)
    (sequence,) = tokenizer([row])
    console = Console(file=io.StringIO(), width=400)
    console.print(render_inspection(row, sequence, tokenizer))
    output = console.file.getvalue()
    assert re.search(r"beside texts +turn 1: tool_calls, weight · tools: 1", output)
    assert "template: the chat template leaves out tool call 0 of turn 1" in output
    assert "user: How·warm?" in output
    assert "assistant: Let·me·look." in output
    assert "\x1b" not in output


def test_a_reward_models_row_marks_where_the_head_reads() -> None:
    row = Response(messages=(Message("user", "Q"), Message("assistant", "A")), generator="g", source="s", row_index=0)
    tokenizer = RewardTokenizer(make_tokenizer("byte_level", CHATML), ReadOut(rule="last", pad_id=None))
    (sequence,) = tokenizer([row])
    console = Console(file=io.StringIO(), width=400)
    console.print(render_inspection(row, sequence, tokenizer, ids=True))
    output = console.file.getvalue()
    assert "A<|im_end|>⟦↵\n⟧" in output
    n = len(sequence.input_ids)
    assert re.search(rf"tokens +{n}, read at {n - 1}", output)
    assert len(re.findall(r"^ +\d+ +\d+ +yes", output, flags=re.MULTILINE)) == 1


def test_runs_of_blanks_that_are_added_tokens_are_shown_as_blanks() -> None:
    """Gemma's: merges make the same token from blanks. A special token that is written with the mark is shown so."""
    tokenizer = make_tokenizer("metaspace")
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    run, marker = (max(content["model"]["vocab"].values()) + n for n in (1, 2))
    content["model"]["vocab"] |= {"▁▁": run, "<begin▁of>": marker, "<0xZZ>": marker + 1}
    content["model"]["merges"].insert(0, ["▁", "▁"])
    backend = Tokenizer.from_str(json.dumps(content))
    backend.add_tokens([AddedToken("▁▁", normalized=False)])
    backend.add_special_tokens(["<begin▁of>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
    ids = [run, *tokenizer("<begin▁of>x", add_special_tokens=False)["input_ids"], marker + 1]
    assert ids[1] == marker
    assert "".join(piece.text for piece in token_pieces(tokenizer, ids)) == "  <begin▁of> x<0xZZ>"
