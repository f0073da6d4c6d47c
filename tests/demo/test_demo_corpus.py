"""The demo's corpus is the same everywhere and says what it promises; the shipped model has not seen it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import fastcompat.demo
from fastcompat.demo import model_directory
from fastcompat.demo.corpus import GENERATORS, MAXIMUM_CHARACTERS, evenly_across_modules, write_corpus
from fastcompat.demo.library import HELD_OUT_MODULES, TRAINING_MODULES, Documented, documented, load

N_PROMPTS = 500


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_corpus(tmp_path_factory.mktemp("corpus"), n_prompts=N_PROMPTS)


@pytest.fixture(scope="module")
def rows(paths: list[Path]) -> dict[str, list[dict]]:
    return {path.stem: [json.loads(line) for line in path.read_text("utf-8").splitlines()] for path in paths}


def prompts(rows: list[dict]) -> list[str]:
    return [row["messages"][0]["content"] for row in rows]


def responses(rows: list[dict]) -> list[str]:
    return [row["messages"][1]["content"] for row in rows]


# --- the corpus -----------------------------------------------------------------------------------------------


def test_same_bytes_in_every_process(tmp_path: Path) -> None:
    """Of processes of their own: what other tests imported may have changed the standard library that is described."""
    written = []
    for seed in ("0", "4242"):
        code = f"from pathlib import Path; from fastcompat.demo.corpus import write_corpus; \
write_corpus(Path({str(tmp_path / seed)!r}), n_prompts={N_PROMPTS})"
        subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONHASHSEED": seed})
        written.append({path.name: path.read_bytes() for path in (tmp_path / seed).iterdir()})
    assert len(written[0]) == len(GENERATORS)
    assert written[0] == written[1]


def test_one_file_for_each_generator(paths: list[Path], rows: dict[str, list[dict]]) -> None:
    assert [path.name for path in paths] == [f"{generator}.jsonl" for generator in GENERATORS]
    for generator, of_generator in rows.items():
        for row in of_generator:
            assert row["generator"] == generator
            assert [message["role"] for message in row["messages"]] == ["user", "assistant"]


def test_every_prompt_is_answered_by_every_generator(rows: dict[str, list[dict]]) -> None:
    expected = prompts(rows["summary"])
    assert len(expected) == len(set(expected)) == N_PROMPTS
    assert all(prompts(of_generator) == expected for of_generator in rows.values())


def test_sizes(rows: dict[str, list[dict]]) -> None:
    lengths = [len(response) for of_generator in rows.values() for response in responses(of_generator)]
    assert max(lengths) <= MAXIMUM_CHARACTERS
    assert min(lengths) >= 8
    assert 250 < sum(lengths) / len(lengths) < 500  # about 100 tokens


def test_nothing_of_this_process_or_machine(rows: dict[str, list[dict]]) -> None:
    text = "\n".join(response for of_generator in rows.values() for response in responses(of_generator))
    assert not re.search(r"<[^<>]* at 0x[0-9a-fA-F]+>", text)
    assert sys.prefix not in text
    assert str(Path.home()) + os.sep not in text


def test_generators_differ_as_they_say(rows: dict[str, list[dict]]) -> None:
    full = responses(rows["full-documentation"])
    for whole, shuffled in zip(full, responses(rows["shuffled-words"]), strict=True):
        assert sorted(whole.split()) == sorted(shuffled.split())
    assert all(whole.startswith(cut) for whole, cut in zip(full, responses(rows["truncated"]), strict=True))
    assert all(mine != other for mine, other in zip(full, responses(rows["other-function"]), strict=True))
    assert all(short in long for short, long in zip(responses(rows["summary"]), responses(rows["chatty"]), strict=True))
    for code in responses(rows["source-code"]):
        assert code.startswith("```python\n")
        assert code.endswith("\n```")


def test_fewer_prompts_are_the_first_of_more(paths: list[Path], tmp_path: Path) -> None:
    for few, many in zip(write_corpus(tmp_path, n_prompts=20), paths, strict=True):
        assert many.read_bytes().startswith(few.read_bytes())
        assert len(few.read_bytes().splitlines()) == 20


def test_prompts_are_spread_over_modules() -> None:
    def thing(name: str) -> Documented:
        return Documented(name=name, module=name[0], signature="", documentation="", source="")

    order = [thing.name for thing in evenly_across_modules([thing(name) for name in ("a1", "a2", "a3", "b1", "c1")])]
    assert sorted(order[:3]) in (["a1", "b1", "c1"], ["a2", "b1", "c1"], ["a3", "b1", "c1"])
    assert sorted(order) == ["a1", "a2", "a3", "b1", "c1"]


def test_no_prompts_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="n_prompts is 0: give at least 1"):
        write_corpus(tmp_path, n_prompts=0)


def test_docstrings_survive() -> None:
    import textwrap

    (dedent,) = [thing for thing in documented(["textwrap"]) if thing.name == "textwrap.dedent"]
    assert dedent.signature == "textwrap.dedent(text)"
    # Whatever this Python indents, the words and line breaks are those of the docstring.
    assert [line.strip() for line in dedent.documentation.splitlines()] == [
        line.strip() for line in (textwrap.dedent.__doc__ or "").strip().splitlines()
    ]
    assert dedent.documentation not in dedent.source
    assert dedent.source.startswith("def dedent(text):")


def test_a_missing_module_is_passed_over() -> None:
    assert load("no_such_module_anywhere") is None
    assert documented(["no_such_module_anywhere"]) == []


def test_corpus_does_not_import_torch() -> None:
    code = "import sys, fastcompat.demo.corpus; assert not {'torch', 'transformers'} & set(sys.modules)"
    package_root = str(Path(fastcompat.demo.__file__).parents[2])
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": package_root})


# --- what is held out -----------------------------------------------------------------------------------------


def test_held_out_modules_are_no_training_modules(rows: dict[str, list[dict]]) -> None:
    held_out = {module.split(".")[0] for module in HELD_OUT_MODULES}
    assert held_out.isdisjoint(module.split(".")[0] for module in TRAINING_MODULES)
    for prompt in prompts(rows["summary"]):
        name = re.search(r"`([\w.]+)`", prompt)
        assert name is not None
        assert name[1].split(".")[0] in held_out


@pytest.mark.long
def test_training_texts_quote_no_held_out_documentation(rows: dict[str, list[dict]]) -> None:
    train = pytest.importorskip("fastcompat.demo.training.base_model")
    _, texts = train.held_out_and_training()
    everything = " ".join(" ".join(text.split()) for text in texts)
    assert len(everything) > 1_000_000
    # Every tenth, because a search through so many characters takes its time.
    shown = [" ".join(text.split("\n\n", 1)[1].split()) for text in responses(rows["full-documentation"])[::10]]
    assert [text for text in shown if text in everything] == []


# --- the shipped model ----------------------------------------------------------------------------------------


@cache
def shipped():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = model_directory()
    return AutoModelForCausalLM.from_pretrained(directory).eval().float(), AutoTokenizer.from_pretrained(directory)


def response_losses(of_generator: list[dict]) -> list[float]:
    """The mean NLL of each response's tokens, its end marker included: one conversation at a time, nothing clever."""
    import torch

    model, tokenizer = shipped()
    losses = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so small a model only waits for the second one
    for row in of_generator:
        prompt = tokenizer.apply_chat_template(row["messages"][:1], tokenize=False, add_generation_prompt=True)
        response = row["messages"][1]["content"] + tokenizer.eos_token
        prompt_ids, ids = tokenizer(prompt)["input_ids"], tokenizer(response)["input_ids"]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt_ids + ids])).logits[0, len(prompt_ids) - 1 : -1]
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(ids)).item())
    torch.set_num_threads(threads)
    return losses


def test_shipped_model_is_small_and_stands_alone() -> None:
    directory = model_directory()
    assert sum(path.stat().st_size for path in directory.iterdir()) <= 8_000_000
    model, tokenizer = shipped()
    assert model.config.model_type == "llama"
    assert model.config.vocab_size == len(tokenizer) == 4096
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (None, "<|im_end|>", "<|endoftext|>")


@pytest.mark.parametrize(
    "text",
    ["def f(x):\n\treturn x  # tabs\n\n", "  two  spaces ", "naïve — 東京 \U0001f40d", "it 's , not . cleaned", ""],
)
def test_tokenizer_round_trips(text: str) -> None:
    _, tokenizer = shipped()
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_chat_template_is_chatml() -> None:
    _, tokenizer = shipped()
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert whole == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
    prefix = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert prefix == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer(prefix)["input_ids"].count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == 2


def test_losses_are_those_of_the_training_log(rows: dict[str, list[dict]]) -> None:
    log = (model_directory() / "training_log.jsonl").read_text("utf-8").splitlines()
    stated = json.loads(log[-1])["held_out_conversation_loss"]
    mean = {
        generator: sum(losses) / len(losses)
        for generator in ("full-documentation", "summary", "shuffled-words", "repetitive")
        for losses in [response_losses(rows[generator][:30])]
    }
    # The log's figure is a mean over tokens and counts the questions too, which are easier than the answers.
    assert stated < mean["full-documentation"] < stated + 1.0
    assert mean["summary"] < 6.0  # a uniform guess costs log 4096 = 8.3
    assert mean["shuffled-words"] > mean["full-documentation"] + 1.5
    assert mean["repetitive"] < mean["full-documentation"]
