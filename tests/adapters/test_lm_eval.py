"""The back end inside of the real lm-evaluation-harness, beside its own: the same figures from far fewer tokens."""

from __future__ import annotations

import importlib
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastcompat.demo import model_directory
from fastcompat.errors import ModelError, UsageError

lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: make test-adapters")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.model import CachingLM  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from fastcompat.adapters import lm_eval as adapter  # noqa: E402
from fastcompat.adapters.lm_eval import FastcompatLM  # noqa: E402
from fastcompat.models import CausalLM  # noqa: E402

MODEL = str(model_directory())
# Nats, of a whole continuation or text.
TOLERANCE = 1e-4
WORDS = ("list", "queue", "file", "module", "text", "object", "default", "value", "error", "path", "class", "stream")
TASKS = ["local_letters", "local_endings", "local_text"]

TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {directory}/{name}.jsonl, dev: {directory}/{name}.jsonl}}
  cache_dir: {directory}/cache
test_split: test
"""
CHOICE = """
output_type: multiple_choice
fewshot_split: dev
fewshot_config: {{sampler: first_n}}
num_fewshot: {shots}
doc_to_text: "{{{{question}}}}"
doc_to_choice: {choices}
doc_to_target: answer
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
TEXT = """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: text
metric_list: [{metric: word_perplexity}]
"""


def sentence(draw: random.Random, n_words: int) -> str:
    return " ".join(draw.choices(WORDS, k=n_words)).capitalize() + "."


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    """Three tasks: letters to 40 questions after five others, long endings, and the perplexity of texts."""
    directory = tmp_path_factory.mktemp("tasks")
    draw = random.Random(20)
    letters, endings = [], []
    for n in range(40):
        options = [sentence(draw, 4) for _ in range(4)]
        listed = "\n".join(f"{letter}. {option}" for letter, option in zip("ABCD", options, strict=True))
        asked = f"{sentence(draw, 12 if n >= 5 else 24)}\n{listed}\nAnswer:"
        letters.append({"question": asked, "answer": draw.randrange(4)})
        endings.append(
            {
                "question": sentence(draw, 20),
                "choices": [sentence(draw, draw.randrange(1, 25)) for _ in range(4)],
                "answer": draw.randrange(4),
            }
        )
    # One is longer than the context of 2,048 tokens, so that windows roll over it.
    texts = [{"text": " ".join(sentence(draw, 30) for _ in range(1 + 60 * (n == 3)))} for n in range(6)]
    for name, rows, own in (
        ("local_letters", letters, CHOICE.format(shots=5, choices='["A", "B", "C", "D"]')),
        ("local_endings", endings, CHOICE.format(shots=2, choices='"{{choices}}"')),
        ("local_text", texts, TEXT),
    ):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (directory / f"{name}.yaml").write_text(TASK.format(name=name, directory=directory) + own)
    return directory


def new_model(**options: Any) -> FastcompatLM:
    return FastcompatLM(MODEL, device="cpu", dtype="float32", **options)


@pytest.fixture(scope="module")
def ours() -> FastcompatLM:
    return new_model()


@pytest.fixture(scope="module")
def theirs() -> HFLM:
    return HFLM(MODEL, device="cpu", dtype="float32", batch_size=8)


def evaluated(model: Any, tasks: Path, names: list[str], **options: Any) -> dict[str, Any]:
    found = lm_eval.simple_evaluate(
        model=model,
        tasks=names,
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
        **options,
    )
    assert found is not None
    return found


def figures(results: dict[str, Any]) -> dict[str, list[list[Any]]]:
    """Of each task, what the model answered to each document, [log-likelihood, is greedy] or a log-likelihood."""
    return {
        name: [sample["resps"] for sample in sorted(samples, key=lambda sample: sample["doc_id"])]
        for name, samples in results["samples"].items()
    }


def flat(values: Any) -> list[float]:
    return [x for value in values for x in flat(value)] if isinstance(values, list | tuple) else [float(values)]


class Tokens:
    """Tokens that a model is given: those of our packs, and those of HFLM's batches."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ours = self.theirs = self.passes = 0
        hidden, call = CausalLM.hidden, HFLM._model_call

        def counted(model: Any, plan: Any) -> Any:
            self.ours += plan.input_ids.numel()
            self.passes += 1
            return hidden(model, plan)

        def called(model: Any, inps: Any, *args: Any, **options: Any) -> Any:
            self.theirs += inps.numel()
            return call(model, inps, *args, **options)

        monkeypatch.setattr(CausalLM, "hidden", counted)
        monkeypatch.setattr(HFLM, "_model_call", called)


@pytest.fixture
def tokens(monkeypatch) -> Iterator[Tokens]:
    return Tokens(monkeypatch)


@pytest.fixture(scope="module")
def both(ours, theirs, tasks) -> tuple[dict[str, Any], dict[str, Any]]:
    return evaluated(ours, tasks, TASKS), evaluated(theirs, tasks, TASKS)


def test_figures_and_accuracies_are_those_of_hf(both):
    own, other = (figures(results) for results in both)
    for name in TASKS:
        assert flat(own[name]) == pytest.approx(flat(other[name]), abs=TOLERANCE, rel=1e-7)
        for metric, value in both[1]["results"][name].items():
            if metric.startswith("acc"):
                assert both[0]["results"][name][metric] == value
    assert len(own["local_letters"]) == 40
    greedy = [answer[0][1] for answers in other["local_endings"] for answer in answers]
    assert len(greedy) == 160
    assert both[0]["config"]["model_num_parameters"] == both[1]["config"]["model_num_parameters"]


@pytest.fixture(scope="module")
def asked(both) -> dict[str, list[Instance]]:
    """The requests of each task."""
    return {
        name: [
            Instance("loglikelihood", {}, tuple(given), n)
            for sample in sorted(both[0]["samples"][name], key=lambda sample: sample["doc_id"])
            for n, given in enumerate(sample["arguments"])
        ]
        for name in TASKS
    }


def answers(model: Any, asked: dict[str, list[Instance]]) -> list[float]:
    """Of all tasks, as bits."""
    choices = asked["local_letters"] + asked["local_endings"]
    return flat([model.loglikelihood(choices), model.loglikelihood_rolling(asked["local_text"])])


def test_a_fifth_of_the_tokens(ours, theirs, asked, tokens):
    ours.loglikelihood(asked["local_letters"])
    assert tokens.theirs == 0
    theirs.loglikelihood(asked["local_letters"])
    assert 0 < 5 * tokens.ours <= tokens.theirs


@pytest.mark.parametrize("batch_size", [64, "auto:4"])
def test_bits_do_not_depend_on_the_batch_size(ours, asked, monkeypatch, batch_size):
    monkeypatch.setattr(HFLM, "_detect_batch_size", lambda *_, **__: pytest.fail("a batch size is looked for"))
    assert ours.batch_size == 1
    assert answers(new_model(batch_size=batch_size), asked) == answers(ours, asked)


def test_bits_do_not_depend_on_slices_or_packs(ours, asked, monkeypatch):
    whole = answers(ours, asked)
    monkeypatch.setattr(adapter, "SLICE_TOKENS", 3000)
    assert answers(new_model(token_budget=600), asked) == whole


def test_an_interrupted_evaluation_goes_on_from_its_cache(ours, asked, tmp_path, tokens, monkeypatch):
    whole = ours.loglikelihood(asked["local_endings"])
    model = new_model(token_budget=1024)
    tokens.ours = tokens.passes = 0
    model.loglikelihood(asked["local_endings"])
    alone = tokens.ours
    cached = CachingLM(model, str(tmp_path / "answers.db"))  # what `use_cache` puts around a model
    counted = CausalLM.hidden
    tokens.ours = tokens.passes = 0

    def stopping(own: Any, plan: Any) -> Any:
        if tokens.passes == 2:
            raise KeyboardInterrupt
        return counted(own, plan)

    with monkeypatch.context() as patch:
        patch.setattr(CausalLM, "hidden", stopping)
        with pytest.raises(KeyboardInterrupt):
            cached.loglikelihood(asked["local_endings"])
    tokens.ours = 0
    assert cached.loglikelihood(asked["local_endings"]) == whole
    assert tokens.ours < alone - 1024, "what was done is not done again"
    tokens.ours = 0
    assert cached.loglikelihood(asked["local_endings"]) == whole
    assert tokens.ours == 0


def requests(*pairs: tuple[str, str]) -> list[Instance]:
    return [Instance("loglikelihood", {}, pair, n) for n, pair in enumerate(pairs)]


def test_long_contexts_are_cut_on_the_left(caplog):
    draw = random.Random(3)
    context = sentence(draw, 90)
    asked = requests((context, " index"), (context, " " + sentence(draw, 8)), (context[-60:], " a value"))
    own = new_model(max_length=32).loglikelihood(asked)
    other = HFLM(MODEL, device="cpu", dtype="float32", max_length=32).loglikelihood(asked)
    assert flat(own) == pytest.approx(flat(other), abs=TOLERANCE)
    whole = new_model().loglikelihood(asked)
    assert abs(whole[0][0] - own[0][0]) > 10 * TOLERANCE
    with pytest.raises(UsageError, match="32 at most"):
        new_model(max_length=32).loglikelihood(requests(("What?", sentence(draw, 90))))


def test_as_many_tokens_as_the_model_reads():
    """The last one is only predicted: the model is given 2,048."""
    text = sentence(random.Random(5), 3000)
    asked = requests((text, " index"))
    own = new_model()
    assert len(own.tok_encode(text)) > own.max_length == 2048
    other = HFLM(MODEL, device="cpu", dtype="float32")
    assert flat(own.loglikelihood(asked)) == pytest.approx(flat(other.loglikelihood(asked)), abs=TOLERANCE)


def test_empty_contexts_and_equal_requests(ours):
    # With its cache of logits HFLM takes the first token's for the last one's where a text is parted in two places.
    theirs = HFLM(MODEL, device="cpu", dtype="float32", logits_cache=False)
    pairs = [("", "The list"), ("The list", " of files"), ("", "The list"), ("The list of", " files")]
    asked = requests(*pairs)
    own, other = ours.loglikelihood(asked), theirs.loglikelihood(asked)
    assert flat(own) == pytest.approx(flat(other), abs=TOLERANCE)
    assert own[0] == own[2]
    assert ours.loglikelihood([]) == []
    with pytest.raises(UsageError, match="no token of its own"):
        ours._loglikelihood_tokens([(("a", ""), [5], [])])


def test_what_greedy_decoding_gives_is_greedy(ours, theirs):
    generated = theirs.generate_until([Instance("generate_until", {}, ("def", {"max_gen_toks": 3, "until": ["@"]}), 0)])
    for model in (ours, theirs):
        ((_, greedy), (_, other)) = model.loglikelihood(requests(("def", generated[0]), ("def", " zebra")))
        assert (greedy, other) == (True, False)


def test_chat_templates(ours, theirs, tasks):
    options = {
        "apply_chat_template": True,
        "fewshot_as_multiturn": True,
        "system_instruction": "Be short.",
        "limit": 10,
    }
    own, other = (evaluated(model, tasks, ["local_endings"], **options) for model in (ours, theirs))
    context = own["samples"]["local_endings"][0]["arguments"][0][0]
    assert "Be short." in context
    assert context == other["samples"]["local_endings"][0]["arguments"][0][0]
    assert flat(figures(own)["local_endings"]) == pytest.approx(flat(figures(other)["local_endings"]), abs=TOLERANCE)


def test_generation_is_theirs(ours, theirs):
    asked = [
        Instance("generate_until", {}, (text, {"max_gen_toks": 8, "until": ["\n\n"]}), n)
        for n, text in enumerate(["What does len do?", "A list is"])
    ]
    before = ours.loglikelihood(requests(("A list is", " a value")))
    assert ours.generate_until(asked) == theirs.generate_until(asked)
    assert ours.loglikelihood(requests(("A list is", " a value"))) == before


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"peft": "adapter"}, "merge the two"),
        ({"parallelize": True}, "one device"),
        ({"load_in_8bit": True}, "quantised"),
        ({"gguf_file": "model.gguf"}, "quantised"),
        ({"trust_remote_code": True}, "never run"),
        ({"softmax_dtype": "float32"}, "float32"),
        ({"backend": "seq2seq"}, "encoder-decoder"),
        ({"attn_implementation": "eager"}, "no such option"),
        ({"max_length": 4096}, "reads 2048 tokens at most"),
        ({"token_budget": 0}, "at least 1"),
    ],
)
def test_what_it_has_not_is_refused(options, why):
    with pytest.raises(UsageError, match=why):
        new_model(**options)


def test_options_that_are_not_wanted_will_do():
    options = {"peft": None, "parallelize": False, "trust_remote_code": False, "add_bos_token": False}
    assert new_model(**options, logits_cache=False).loglikelihood(requests(("A list", " is")))


def test_the_command_line(tasks, both, tmp_path):
    command = [sys.executable, "-m", "fastcompat.adapters.lm_eval"]
    command += ["--model_args", f"pretrained={MODEL},dtype=float32", "--batch_size", "auto"]
    command += ["--tasks", "local_letters", "--include_path", str(tasks), "--output_path", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "fastcompat" in done.stdout
    assert "local_letters" in done.stdout
    (written,) = tmp_path.rglob("results_*.json")
    results = json.loads(written.read_text())["results"]["local_letters"]
    assert results["acc,none"] == both[0]["results"]["local_letters"]["acc,none"]


def test_the_command_line_names_the_model_and_says_mistakes_in_a_sentence(monkeypatch, capsys):
    monkeypatch.setattr(importlib.import_module("lm_eval.__main__"), "cli_evaluate", lambda: new_model(peft="adapter"))
    for given, expected in (
        (["--tasks", "mmlu"], ["--tasks", "mmlu", "--model", "fastcompat"]),
        (["--model=hf", "--tasks", "mmlu"], ["--model=hf", "--tasks", "mmlu"]),
        (["ls", "tasks"], ["ls", "tasks"]),
    ):
        monkeypatch.setattr(sys, "argv", ["lm_eval", *given])
        with pytest.raises(SystemExit) as stopped:
            adapter.main()
        assert stopped.value.code == 2
        assert sys.argv[1:] == expected
        assert capsys.readouterr().err.splitlines()[-1].startswith("peft=adapter: merge the two")


def test_a_device_among_the_model_arguments():
    common = {"batch_size": 2, "max_batch_size": None, "device": "cuda:0"}
    own = FastcompatLM.create_from_arg_string(f"pretrained={MODEL},dtype=float32,device=cpu", common)
    assert (str(own.device), own.batch_size) == ("cpu", 2)
    assert FastcompatLM.create_from_arg_obj({"pretrained": MODEL, "device": "cpu", "batch_size": 3}).batch_size == 3


def test_a_model_that_is_not_there_is_told_as_everywhere():
    with pytest.raises(ModelError, match="no such directory; give a model directory"):
        FastcompatLM("/no/such/model", device="cpu")


def test_the_last_token_does_not_choose_the_rotary_frequencies(tmp_path):
    """It is only predicted: a context of exactly the original length is a short one."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    length = 64
    rope = {"rope_type": "longrope", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": length}
    rope |= {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=4 * length,
        rope_parameters=rope,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    own = FastcompatLM(str(tmp_path), device="cpu", dtype="float32")
    other = HFLM(str(tmp_path), device="cpu", dtype="float32")
    ids = tokenizer.encode(sentence(random.Random(1), 200))
    for n in (length, length + 1, length + 2):
        asked = [(("a", "b"), ids[: n - 2], ids[n - 2 : n])]
        found = own._loglikelihood_tokens(asked, disable_tqdm=True)
        assert flat(found) == pytest.approx(flat(other._loglikelihood_tokens(asked, disable_tqdm=True)), abs=TOLERANCE)
