"""The ids that count are tokenizer.json's, whichever class tokenizer_config.json names; all else is the class's.

Expected ids come from `tokenizers.Tokenizer.from_file`, never from the code under test.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import pkgutil
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hard_texts import HARD_TEXTS
from tokenizer_files import DIGITS, THREE_DIGITS, ids_of_the_file, make_backend, write_files
from tokenizer_makers import BACKENDS, CHATML, LLAMA3, row
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fastcompat.errors import ModelError, UsageError
from fastcompat.tokens.conversations import ConversationTokenizer, TokenizationSettings
from fastcompat.tokens.loading import load_tokenizer
from fastcompat.tokens.reward import ReadOut, RewardTokenizer

# What no class of transformers builds by itself, one for every kind of vocabulary.
ODD_PARTS: dict[str, dict[str, Any]] = {
    "byte_level": {"pre_tokenizer": DIGITS},
    "metaspace": {"normalizer": normalizers.Sequence([normalizers.Replace("--", "—"), normalizers.Replace(" ", "▁")])},
    "unigram": {"pre_tokenizer": pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), pre_tokenizers.Metaspace()])},
    "wordpiece": {"pre_tokenizer": pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.Whitespace()])},
}


def load(directory: str, context_length: int | None = None, **settings: Any) -> ConversationTokenizer:
    return ConversationTokenizer.from_pretrained(
        directory, TokenizationSettings(**settings), context_length=context_length
    )


@cache
def tokenizer_classes() -> tuple[str, ...]:
    """Every class of transformers whose backend is one of the tokenizers library."""
    import transformers.models

    found = {"PreTrainedTokenizerFast", "TokenizersBackend"}
    for module in pkgutil.walk_packages(transformers.models.__path__, "transformers.models."):
        if ".tokenization_" not in module.name:
            continue
        try:
            members = vars(importlib.import_module(module.name))
        except (ImportError, NameError):  # it needs a package that is not installed
            continue
        found |= {n for n, c in members.items() if inspect.isclass(c) and issubclass(c, PreTrainedTokenizerFast)}
    return tuple(sorted(found))


@pytest.mark.parametrize("kind", BACKENDS)
def test_every_class_gives_the_ids_of_the_file(kind: str, tmp_path: Path) -> None:
    names = tokenizer_classes()
    assert len(names) > 50
    assert {"GPT2Tokenizer", "Qwen2Tokenizer", "LlamaTokenizer", "GemmaTokenizer", "CohereTokenizer"} <= set(names)
    backend = make_backend(kind, **ODD_PARTS[kind])
    texts = [*HARD_TEXTS.values(), "a</s>b", "a</s> b", "</s>\n\n1. <s>x", "<|im_end|>7"]
    expected = [backend.encode(text, add_special_tokens=False).ids for text in texts]
    told = {}
    for name in names:
        loaded = load_tokenizer(write_files(tmp_path, backend, name))
        found = [loaded.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        assert found == expected, name
        told[name] = loaded.token_ids
    differing = [name for name, said in told.items() if "differs in" in said]
    assert len(differing) > 15
    assert told["TokenizersBackend"] == "tokenizer.json's"
    assert told["GPT2Tokenizer"].startswith("tokenizer.json's; GPT2Tokenizer differs in ")


@pytest.mark.parametrize("name", ["GPT2Tokenizer", "Qwen2Tokenizer", "LlamaTokenizer", "LlamaTokenizerFast"])
@pytest.mark.parametrize("pre_tokenizer", [DIGITS, THREE_DIGITS], ids=["digits apart", "three digits"])
def test_numbers_are_split_as_in_the_file(name: str, pre_tokenizer: Any, tmp_path: Path) -> None:
    directory = write_files(tmp_path, make_backend(pre_tokenizer=pre_tokenizer), name)
    text = "Steps:\n\n1. Mix 1234 g.\n\n2. Bake for  30 minutes, 12345678."
    tokenizer = load(directory)
    (sequence,) = tokenizer([row("What is 1234 + 8766?", text)])
    expected = ids_of_the_file(directory, f"What is 1234 + 8766?\n\n{text}</s>")
    assert sequence.input_ids.tolist() == expected
    assert tokenizer.tokenizer.decode(sequence.input_ids[sequence.scored]) == f"{text}</s>"
    if name in ("GPT2Tokenizer", "Qwen2Tokenizer"):
        as_class = load(directory, token_ids="class")
        assert as_class([row("What is 1234 + 8766?", text)])[0].input_ids.tolist() != expected
        assert as_class.token_ids == f"{name}'s"
        assert as_class.fingerprint() != tokenizer.fingerprint()
        assert re.search(
            rf"{name} differs in .*pre-tokenizer: '.*' is \d+ (tokens, not \d+|other tokens)$", tokenizer.token_ids
        )


def llama2_backend(**parts: Any) -> Tokenizer:
    template = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return make_backend("metaspace", post_processor=template, **parts)


def test_what_follows_an_end_marker_is_as_llama_2_had_it(tmp_path: Path) -> None:
    """The file puts a blank before every piece of text, before one that begins with a blank too; the class does not."""
    directory = write_files(tmp_path, llama2_backend(), "LlamaTokenizer", legacy=True)
    tokenizer = load(directory, turns="all", template="plain")
    assert "LlamaTokenizer differs in normalizer, pre-tokenizer" in tokenizer.token_ids
    conversation = row("Why?", " Because. ", " And then?", "1. Nothing.")
    text = "Why?\n\n Because. </s>\n\n And then?\n\n1. Nothing.</s>"
    (sequence,) = tokenizer([conversation])
    assert sequence.input_ids.tolist() == [0, *ids_of_the_file(directory, text)]
    surfaces = tokenizer.tokenizer.convert_ids_to_tokens(sequence.input_ids.tolist())
    end = surfaces.index("</s>")
    assert surfaces[end + 1 : end + 3] == ["▁", "\n\n"]
    scored = [surface for surface, counts in zip(surfaces, sequence.scored, strict=True) if counts]
    assert "".join(scored) == "▁Because.▁</s>1.▁Nothing.</s>"


BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False)
AS_BUILT: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT2Tokenizer": ("byte_level", {"pre_tokenizer": BYTE_LEVEL}),
    "CohereTokenizer": (
        "byte_level",
        {
            "normalizer": normalizers.Sequence([normalizers.NFC()]),
            "pre_tokenizer": pre_tokenizers.Sequence([pre_tokenizers.Digits(True), BYTE_LEVEL]),
        },
    ),
    "LlamaTokenizer": (
        "metaspace",
        {
            "normalizer": normalizers.Sequence([]),
            "pre_tokenizer": pre_tokenizers.Metaspace(prepend_scheme="first", split=False),
        },
    ),
    "GemmaTokenizer": (
        "metaspace",
        {
            "normalizer": normalizers.Replace(" ", "▁"),
            "pre_tokenizer": pre_tokenizers.Split(" ", "merged_with_previous"),
        },
    ),
    "PreTrainedTokenizerFast": ("byte_level", {"pre_tokenizer": DIGITS}),
}


@pytest.mark.parametrize("name", AS_BUILT)
def test_where_class_and_file_agree_nothing_changes(name: str, tmp_path: Path) -> None:
    """Not even the fingerprint, though the files are written in other words: no finished work is done again."""
    kind, parts = AS_BUILT[name]
    defaults = {"CohereTokenizer": {"cls_token": "<s>", "sep_token": "<s>", "mask_token": "<s>"}}.get(name, {})
    defaults |= {"mask_token": "<s>"} if name == "GemmaTokenizer" else {}
    directory = write_files(tmp_path, make_backend(kind, **parts), name, chat_template=CHATML, legacy=False, **defaults)
    by_file, by_class = load(directory), load(directory, token_ids="class")
    assert by_file.token_ids == "tokenizer.json's"
    assert by_file.fingerprint() == by_class.fingerprint()


def test_the_demos_tokenizers_are_as_they_were() -> None:
    from fastcompat.demo import model_directory, reward_model_directory

    for directory in (model_directory(), reward_model_directory()):
        by_file, by_class = load(str(directory)), load(str(directory), token_ids="class")
        assert by_file.fingerprint() == by_class.fingerprint()
        assert by_file.token_ids == "tokenizer.json's"


@pytest.mark.parametrize("option", ["ignore_merges", "unk_token"])
def test_options_of_the_model_count(option: str, tmp_path: Path) -> None:
    """Llama-3's vocabulary is looked up before merges; a class's is not. Which token is unknown matters to no byte."""
    backend = make_backend(pre_tokenizer=BYTE_LEVEL)
    content = json.loads(backend.to_str())
    content["model"][option] = True if option == "ignore_merges" else "<unk>"
    content["model"]["merges"] = [pair for pair in content["model"]["merges"] if "".join(pair) != "Ġfunction"]
    directory = write_files(tmp_path, Tokenizer.from_str(json.dumps(content)), "GPT2Tokenizer")
    tokenizer = load(directory)
    (sequence,) = tokenizer([row("Q", "the function of it")])
    assert sequence.input_ids.tolist() == ids_of_the_file(directory, "Q\n\nthe function of it</s>")
    (of_class,) = load(directory, token_ids="class")([row("Q", "the function of it")])
    is_different = option == "ignore_merges"
    assert (of_class.input_ids.tolist() != sequence.input_ids.tolist()) == is_different
    assert ("differs in ignore_merges" in tokenizer.token_ids) == is_different


def test_all_else_is_as_class_and_configuration_say(tmp_path: Path) -> None:
    """Special tokens, chat template, tokens that the configuration adds; not those that only the class adds."""
    added = {
        str(960): {"content": "<|tool|>", "lstrip": False, "rstrip": True, "normalized": False, "special": True},
        str(961): {"content": "<|plain|>", "lstrip": False, "rstrip": False, "normalized": False, "special": False},
    }
    directory = write_files(
        tmp_path,
        make_backend(pre_tokenizer=DIGITS),
        "GPT2Tokenizer",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token=None,
        pad_token=None,
        chat_template=LLAMA3,
        added_tokens_decoder={k: {"single_word": False, **token} for k, token in added.items()},
        extra_special_tokens=["<|eot_id|>", "<|late|>"],
    )
    by_class = AutoTokenizer.from_pretrained(directory)
    tokenizer = load_tokenizer(directory).tokenizer
    assert type(tokenizer) is type(by_class)
    assert tokenizer.chat_template == by_class.chat_template == LLAMA3
    assert tokenizer.bos_token_id == by_class.bos_token_id
    assert tokenizer.eos_token_id == by_class.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    in_file = Tokenizer.from_file(f"{directory}/tokenizer.json")
    n = in_file.get_vocab_size()
    assert tokenizer.get_added_vocab().keys() - in_file.get_vocab() == {"<|tool|>", "<|plain|>", "<|late|>"}
    ids = tokenizer("1<|tool|>  2<|plain|> 3<|late|>", add_special_tokens=False)["input_ids"]
    one, two, three = (in_file.encode(text, add_special_tokens=False).ids for text in ("1", "2", " 3"))
    assert ids == [*one, n, *two, n + 1, *three, n + 2]
    # <|endoftext|> is GPT2Tokenizer's own default; this vocabulary knows it as a marker, and that one does not.
    assert tokenizer.unk_token == "<|endoftext|>"


def test_a_token_that_only_the_class_adds_is_none_of_the_models(tmp_path: Path) -> None:
    content = json.loads(make_backend(pre_tokenizer=DIGITS).to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "<|endoftext|>"]
    content["model"]["vocab"]["<|unused|>"] = content["model"]["vocab"].pop("<|endoftext|>")
    backend = Tokenizer.from_str(json.dumps(content))
    directory = write_files(tmp_path, backend, "GPT2Tokenizer", unk_token=None, pad_token=None)
    assert AutoTokenizer.from_pretrained(directory).unk_token_id == backend.get_vocab_size()  # beyond the model's
    tokenizer = load(directory)
    (sequence,) = tokenizer([row("Q", "a <|endoftext|>")])
    assert sequence.input_ids.tolist() == ids_of_the_file(directory, "Q\n\na <|endoftext|></s>")
    assert sequence.input_ids.max() < backend.get_vocab_size()
    assert tokenizer.tokenizer.unk_token is None
    assert tokenizer.tokenizer.eos_token == "</s>"


def test_flags_of_added_tokens_are_the_files(tmp_path: Path) -> None:
    backend = make_backend(pre_tokenizer=DIGITS)
    index = backend.token_to_id("<|im_end|>")
    flags = {"lstrip": True, "rstrip": True, "single_word": False, "normalized": False, "special": True}
    directory = write_files(tmp_path, backend, None, added_tokens_decoder={index: {"content": "<|im_end|>", **flags}})
    tokenizer = load(directory)
    text = "a  <|im_end|>  b"
    assert load_tokenizer(directory, "class").tokenizer(text)["input_ids"] != ids_of_the_file(directory, text)
    (sequence,) = tokenizer([row("Q", text)])
    assert sequence.input_ids.tolist() == ids_of_the_file(directory, f"Q\n\n{text}</s>")
    assert "differs in added tokens" in tokenizer.token_ids


def test_special_tokens_are_split_where_the_configuration_says_so(tmp_path: Path) -> None:
    directory = write_files(tmp_path, make_backend(pre_tokenizer=DIGITS), "GPT2Tokenizer", split_special_tokens=True)
    backend = Tokenizer.from_file(f"{directory}/tokenizer.json")
    backend.encode_special_tokens = True
    expected = backend.encode("Q\n\n12</s>", add_special_tokens=False).ids
    assert expected != ids_of_the_file(directory, "Q\n\n12</s>")
    (sequence,) = load(directory)([row("Q", "12")])
    assert sequence.input_ids.tolist() == expected


@pytest.mark.parametrize("name", ["GPT2Tokenizer", "CodeLlamaTokenizer", "PreTrainedTokenizerFast", "GemmaTokenizer"])
@pytest.mark.parametrize("in_file", [False, True], ids=["no BOS in file", "BOS in file"])
@pytest.mark.parametrize("asked", [None, False, True])
def test_a_bos_is_added_where_the_file_adds_one(name: str, in_file: bool, asked: bool | None, tmp_path: Path) -> None:
    template = processors.TemplateProcessing(single="<s> $A" if in_file else "$A", special_tokens=[("<s>", 0)])
    backend = make_backend("metaspace", post_processor=template)
    directory = write_files(tmp_path, backend, name, add_bos_token=asked, mask_token="<unk>")
    tokenizer = load(directory)
    (sequence,) = tokenizer([row("Q", "A")])
    assert (sequence.input_ids[0] == 0) == in_file
    assert ("add_bos_token" in tokenizer.token_ids) == (asked is True and not in_file)
    one = load(directory, bos="one")
    assert one([row("Q", "A")])[0].input_ids[:2].tolist().count(0) == 1
    assert "add_bos_token" not in one.token_ids
    (tmp_path / "chat_template.jinja").write_text(LLAMA3)  # it writes one, so none is missing
    assert "add_bos_token" not in load(directory).token_ids


def test_a_slow_class_beside_a_file(tmp_path: Path) -> None:
    directory = write_files(tmp_path, make_backend(pre_tokenizer=DIGITS), "ByT5Tokenizer", chat_template=CHATML)
    tokenizer = load(directory, template="plain")
    (sequence,) = tokenizer([row("Q", "1234 é")])
    assert sequence.input_ids.tolist() == ids_of_the_file(directory, "Q\n\n1234 é</s>")
    assert tokenizer.token_ids.startswith("tokenizer.json's; ByT5Tokenizer differs in vocabulary")
    assert tokenizer.tokenizer.chat_template == CHATML
    (tmp_path / "tokenizer.json").unlink()
    slow = load(directory, template="plain")
    assert slow.token_ids == "ByT5Tokenizer's (no tokenizer.json)"
    (sequence,) = slow([row("Q", "12")])
    assert sequence.input_ids.tolist() == [*(byte + 3 for byte in b"Q\n\n12"), 1]


def test_reward_models_read_the_ids_of_the_file(tmp_path: Path) -> None:
    directory = write_files(tmp_path, make_backend(pre_tokenizer=DIGITS), "Qwen2Tokenizer", chat_template=LLAMA3)
    read_out = ReadOut(rule="last", pad_id=None)
    tokenizer = RewardTokenizer.from_pretrained(directory, read_out)
    by_class = RewardTokenizer.from_pretrained(directory, read_out, token_ids="class")
    response = row("How many?", "In total:\n\n1. 2024 e\u0301")
    text = tokenizer._conversations.template.render(response.messages)
    assert tokenizer([response])[0].input_ids.tolist() == ids_of_the_file(directory, text)
    assert by_class([response])[0].input_ids.tolist() != ids_of_the_file(directory, text)
    assert tokenizer.fingerprint() != by_class.fingerprint()
    assert "Qwen2Tokenizer differs in normalizer, pre-tokenizer" in tokenizer.token_ids
    with pytest.raises(UsageError, match="token_ids='neither' is not one of file, class"):
        RewardTokenizer.from_pretrained(directory, read_out, token_ids="neither")  # type: ignore[arg-type]


def test_one_of_several_versions_of_the_file_is_read(tmp_path: Path) -> None:
    directory = write_files(
        tmp_path, make_backend(pre_tokenizer=DIGITS), "GPT2Tokenizer", fast_tokenizer_files=["tokenizer.4.0.0.json"]
    )
    make_backend(pre_tokenizer=THREE_DIGITS).save(str(tmp_path / "tokenizer.4.0.0.json"))
    (sequence,) = load(directory)([row("Q", "12345")])
    versioned = Tokenizer.from_file(str(tmp_path / "tokenizer.4.0.0.json"))
    assert sequence.input_ids.tolist() == versioned.encode("Q\n\n12345</s>", add_special_tokens=False).ids


def test_a_model_in_the_hubs_cache(tmp_path: Path) -> None:
    directory = Path(write_files(tmp_path / "model", make_backend(pre_tokenizer=DIGITS), "GPT2Tokenizer"))
    cached = tmp_path / "hub" / "models--some--model"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    shutil.copytree(directory, cached / "snapshots" / ("0" * 40))
    text = "\n\n1. 2024"
    code = (
        "from fastcompat.tokens.loading import load_tokenizer\n"
        "loaded = load_tokenizer('some/model')\n"
        f"print(loaded.tokenizer({text!r}, add_special_tokens=False)['input_ids'], loaded.token_ids)"
    )
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"{ids_of_the_file(str(directory), text)} tokenizer.json's; GPT2Tokenizer differs")


def damaged(content: str) -> dict[str, tuple[str | bytes, str]]:
    newer = json.loads(content)
    newer["pre_tokenizer"] = {"type": "OfNextYear"}
    without = json.loads(content)
    del without["model"]
    return {
        "cut off": (content[: len(content) // 2], r"tokenizer.json is damaged: .*line"),
        "empty": ("", "tokenizer.json is damaged: .*line 1"),
        "not UTF-8": (content.encode().replace(b"version", b"\xff", 1), "tokenizer.json is damaged: .*utf-8"),
        "a pointer": ("version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs pull"),
        "newer": (json.dumps(newer), r"is not understood by tokenizers \d.*pip install --upgrade tokenizers"),
        "without a model": (json.dumps(without), "is not understood by tokenizers"),
        "a list": ("[]", "is not understood by tokenizers"),
    }


@pytest.mark.parametrize("name", ["GPT2Tokenizer", "PreTrainedTokenizerFast", "T5Tokenizer"])
@pytest.mark.parametrize("damage", damaged(BACKENDS["byte_level"]().to_str()))
def test_a_damaged_file_is_named(name: str, damage: str, tmp_path: Path) -> None:
    directory = write_files(tmp_path, make_backend(), name)
    content, message = damaged((tmp_path / "tokenizer.json").read_text())[damage]
    (tmp_path / "tokenizer.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ModelError, match=message) as caught:
        load(directory)
    assert directory in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_damaged_configuration_is_named(tmp_path: Path) -> None:
    directory = write_files(tmp_path, make_backend())
    for content in ("{", "[]"):
        (tmp_path / "tokenizer_config.json").write_text(content)
        with pytest.raises(ModelError, match=r"tokenizer_config\.json is damaged"):
            load(directory)
