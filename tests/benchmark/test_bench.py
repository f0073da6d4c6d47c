"""The benchmark: every loop computes the same losses, wrong ones show, memory is asked for before it is taken."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from corpora import save_small_model
from every_model import build
from families import small_model
from reward_makers import edit_config
from rich.console import Console
from typer.testing import CliRunner, Result

from fastcompat.benchmark import measurement
from fastcompat.benchmark.flops import (
    body_parameters,
    data_sheet_rate,
    product_rate,
    product_tokens,
    up_projection,
    useful_flops,
)
from fastcompat.benchmark.loops import PLAIN_LOOPS, Loop, by_length, length_sorted, one_by_one, padded
from fastcompat.benchmark.measurement import Settings, WrongLossError, check_losses, measure
from fastcompat.benchmark.rounds import choose_size, fastest_size, fitting_sizes, run_in_turn
from fastcompat.benchmark.subjects import SHAPES, Subject, model_subject, plain_attention
from fastcompat.benchmark.table import rendered
from fastcompat.benchmark.workloads import WORKLOADS, Lengths, Workload
from fastcompat.cli.application import app
from fastcompat.errors import ModelError, UsageError
from fastcompat.models.base_model import wrap
from fastcompat.ops import reference
from fastcompat.tokens.forest import pack_forest

ROOT = Path(__file__).parents[2]
SMALL = Workload(
    n_prompts=2,
    n_responses=3,
    prompt=Lengths(mu=2.5, sigma=0.5, low=4, high=30),
    response=Lengths(mu=3, sigma=0.5, low=2, high=60),
)
# Mean losses of some tens of nats, float32 against float64, and float32 loops against each other.
FLOAT32_NATS = 1e-4


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("model") / "small")


def bench(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["bench", *map(str, arguments)])


def refused(*arguments: object) -> str:
    result = bench(*arguments)
    assert isinstance(result.exception, UsageError), (result.exception, result.output)
    return str(result.exception)


def text_of(renderable: object) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


@torch.no_grad()
def losses_in_float64(model, sequences) -> np.ndarray:
    """One sequence at a time through the model's own logits."""
    model = model.double()
    losses = []
    for sequence in sequences:
        ids = torch.from_numpy(sequence.input_ids).long()
        nll = torch.nn.functional.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="none")
        losses.append(float(nll[torch.from_numpy(sequence.scored[1:])].mean()))
    return np.array(losses)


def test_the_command_compares_the_loops_on_a_users_model(tmp_path, model):
    file = tmp_path / "bench.json"
    options = ["--prompts", 1, "--rounds", 2, "--dtype", "float32", "--json", file]
    result = bench("--base-model", model, "--workload", "generators", "--workload", "reasoning", *options)
    assert result.exit_code == 0, (result.exception, result.output)
    assert "generators: 16 responses to 1 prompt" in result.output
    assert "reasoning: 4 responses to 1 prompt, 2,048 tokens; 4 of them cut to the model's context" in result.output
    records = json.loads(file.read_text())
    assert [record["workload"] for record in records] == ["generators", "reasoning"]
    for record in records:
        assert (record["shape"], record["weights"], record["dtype"]) == ("small", "its own", "float32")
        assert record["float32_check_nats"] < FLOAT32_NATS
        # Metadata has no local part: 2.11.0 of 2.11.0+cu130.
        versions = record["machine"]["versions"]["torch"], torch.__version__
        assert len({version.partition("+")[0] for version in versions}) == 1
        assert record["failed"] == {}
        assert set(record["scorers"]) == {
            "Hugging Face, padded batches of 8, full logits",
            "Hugging Face, length-sorted, response logits only",
            "Hugging Face, one at a time, response logits only",
            "fastcompat",
        }
        ours = record["scorers"]["fastcompat"]
        for name, entry in record["scorers"].items():
            assert name in result.output
            assert entry["largest_error_nats"] < FLOAT32_NATS
            assert entry["mean_error_nats"] <= entry["largest_error_nats"]
            assert len(entry["all_seconds"]) == 2
            assert entry["seconds"] == pytest.approx(sum(entry["all_seconds"]) / 2)
            assert entry["fastcompat_speedup"] == pytest.approx(entry["seconds"] / ours["seconds"])
            assert entry["tokens_per_second"] == pytest.approx(record["n_tokens"] / entry["seconds"])
            flops_per_second = 1e9 * record["useful_gflop"] / entry["seconds"]
            assert entry["efficiency"] == pytest.approx(flops_per_second / (1e9 * record["product_gflop_per_s"]))


def test_json_on_standard_output_is_alone_there(monkeypatch, model):
    monkeypatch.setattr("fastcompat.cli.display.PLAIN_SECONDS", 0.0)  # every line of progress
    result = bench("--base-model", model, "--prompts", 1, "--rounds", 1, "--json", "-")
    assert result.exit_code == 0, result.output
    (record,) = json.loads(result.stdout)
    assert record["n_prompts"] == 1
    assert "16 responses" in result.stderr


def test_progress_is_shown_beside_the_table(monkeypatch, model):
    monkeypatch.setattr("fastcompat.cli.display.PLAIN_SECONDS", 0.0)
    output = bench("--base-model", model, "--prompts", 1, "--rounds", 1).output
    assert "bench: preparing" in output
    assert "bench: fastcompat" in output


def test_what_is_not_there_is_named(tmp_path, model):
    assert all(shape in refused("--shape", "GPT-5") for shape in SHAPES)
    assert all(name in refused("--workload", "poetry") for name in (*WORKLOADS, "all"))
    assert "one of them" in refused("--shape", "Qwen2.5-0.5B", "--base-model", model)
    assert "no directory" in refused("--json", tmp_path / "nowhere" / "bench.json")


def test_a_model_that_does_not_fit_is_refused_before_it_is_loaded(monkeypatch, model):
    monkeypatch.setattr("fastcompat.benchmark.subjects.free_memory", lambda device: 1 << 20)
    monkeypatch.setattr("fastcompat.benchmark.subjects.Subject.plain", lambda subject: pytest.fail("it was loaded"))
    message = refused("--base-model", model)
    assert "two copies" in message
    assert "--shape" in message


def test_a_model_that_cannot_be_scored_is_one_sentence(tmp_path):
    build("causal", "mpt", tmp_path / "mpt")
    odd = save_small_model(tmp_path / "odd")
    edit_config(odd, hidden_act="unheard of")
    for directory, why in ((tmp_path / "mpt", "packed sequences"), (odd, "no model can be made of its config.json")):
        error = bench("--base-model", directory, "--prompts", 1, "--rounds", 1).exception
        assert isinstance(error, ModelError)
        assert why in str(error)
        assert "\n" not in str(error)


def test_the_help_and_the_docs_know_every_choice():
    text = CliRunner().invoke(app, ["bench", "--help"], env={"COLUMNS": "300"}).output
    assert all(name in text for name in (*SHAPES, *WORKLOADS, "all"))
    section = (ROOT / "docs" / "speed.md").read_text().partition("fastcompat bench")[2].partition("\n#")[0]
    options = set(re.findall(r"(?<=\s)--[a-z-]+", section))
    assert options
    assert all(option in text for option in options)


# Learnt positions; windows and soft caps; a scale between head and loss, either way up.
@pytest.mark.parametrize("family", ["Llama", "GPT-2", "Gemma-2", "Cohere (logit scale)", "Granite (logit scale)"])
def test_every_loop_computes_the_mean_nll(family):
    full = small_model(family)
    full.set_attn_implementation(plain_attention(full))
    sequences = SMALL.sequences(300, seed=1)
    found = {}
    for make in PLAIN_LOOPS:
        loop = make(full)
        for size in (loop.sizes[0], 1, 2, 100):
            found[f"{loop.title} {size}"] = loop.run(sequences, size)
    expected = losses_in_float64(full, sequences)
    for name, losses in found.items():
        np.testing.assert_allclose(losses, expected, rtol=0, atol=FLOAT32_NATS, err_msg=name)


def test_the_plain_model_keeps_the_soft_cap_of_its_attention_whatever_its_class_says(monkeypatch):
    def subject(family: str) -> Subject:
        full = small_model(family)
        return Subject(
            name=family,
            weights="random",
            config=full.config,
            device=torch.device("cpu"),
            dtype=torch.float32,
            load_plain=lambda: full,
            load_ours=lambda: wrap(family, full),
        )

    gemma, llama = subject("Gemma-2"), subject("Llama")
    # As in transformers 5.17.
    monkeypatch.setattr(type(gemma.load_plain()), "_supports_sdpa", True)
    assert gemma.load_plain().config.attn_logit_softcapping
    assert gemma.plain().config._attn_implementation == "eager"
    assert llama.plain().config._attn_implementation == "sdpa"


def test_batches_by_length_hold_every_sequence_once_and_the_budget():
    sequences = SMALL.sequences(300, n_prompts=8)
    for budget in (1, 40, 100, 1 << 20):
        batches = list(by_length(sequences, budget))
        assert sorted(n for batch in batches for n in batch) == list(range(len(sequences)))
        for batch in batches:
            assert len(batch) == 1 or len(batch) * max(len(sequences[n].input_ids) for n in batch) <= budget


def constant(title: str, losses: np.ndarray) -> Loop:
    return Loop(title=title, unit="sequences", sizes=(8,), run=lambda sequences, size: losses[: len(sequences)])


def test_a_fast_wrong_scorer_shows_and_one_without_losses_has_no_figure(model):
    n = 16

    def wrong(full) -> Loop:
        run = one_by_one(full).run
        return Loop(
            title="wrong", unit="sequences", sizes=(1,), run=lambda s, size: run(s, 1) + 0.2 * (np.arange(len(s)) == 3)
        )

    def exhausted(full) -> Loop:
        def run(sequences, size):
            if len(sequences) > 1:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
            return np.zeros(1)

        return Loop(title="exhausted", unit="sequences", sizes=(1,), run=run)

    missing = np.where(np.arange(n) < 2, np.nan, 1.0)
    loops = (length_sorted, wrong, exhausted, lambda full: constant("silent", missing))
    subject = model_subject(str(model), dtype="float32")
    (found,) = measure(subject, Settings(n_prompts=1, rounds=1, loops=loops))
    assert found.loops["wrong"].largest_error == pytest.approx(0.2, abs=FLOAT32_NATS)
    assert found.loops["wrong"].mean_error == pytest.approx(0.2 / n, abs=FLOAT32_NATS)
    assert found.failed == {"exhausted": "out of memory", "silent": "no finite figure for 2 of 16 responses"}
    assert set(found.record()["scorers"]) == {
        "Hugging Face, length-sorted, response logits only",
        "wrong",
        "fastcompat",
    }
    text = text_of(rendered(found))
    marked = [line for line in text.splitlines() if line.rstrip().endswith("!")]
    assert len(marked) == 1
    assert "wrong" in marked[0]
    assert re.search(r"0\.(19999|2000)", marked[0])
    assert "no finite figure for 2 of 16 responses" in text
    assert "off by more than" in text


def test_errors_of_other_kinds_are_not_taken_for_want_of_memory():
    def broken(sequences, size):
        raise RuntimeError("expected scalar type Float")

    loop = Loop(title="broken", unit="sequences", sizes=(1,), run=broken)
    sequences = SMALL.sequences(300)
    with pytest.raises(RuntimeError, match="scalar type"):
        run_in_turn(
            [loop], sequences, np.zeros(len(sequences)), torch.ones(4, 4), n_rounds=1, progress=lambda *known: None
        )


def test_wrong_figures_in_float32_end_the_run(monkeypatch, model):
    assert check_losses("m", np.array([1.0, 2.0]), {0: 1.0005, 1: 2.0}) == pytest.approx(5e-4)
    for wrong in (1.002, float("nan")):
        with pytest.raises(WrongLossError, match=r"loss of response 1 is 2\.0000"):
            check_losses("m", np.array([1.0, 2.0]), {0: 1.0, 1: 1 + wrong})
    run = measurement.packed_loop
    monkeypatch.setattr(measurement, "packed_loop", lambda *known: run(*known) + 0.01)
    with pytest.raises(WrongLossError, match="must agree"):
        next(measure(model_subject(str(model)), Settings(n_prompts=1, rounds=1)))


def test_memory_decides_the_batch_before_it_is_taken(monkeypatch):
    full = small_model("Llama")
    sequences = WORKLOADS["generators"].sequences(320, n_prompts=1, context_length=512)
    loop = padded(full)
    of_eight, of_four = (loop.peak_bytes(sequences, size) for size in (8, 4))
    longest = max(len(sequence.input_ids) for sequence in sequences)
    # Logits, their copy and cross-entropy's log-softmax, all float32 here; the body's share is small.
    logits = 8 * longest * 320 * 12
    assert logits <= of_eight
    assert loop.peak_bytes(sequences, 2) < of_four < of_eight
    assert fitting_sizes(loop, sequences, round(2 * of_eight) + 1) == [8]
    assert fitting_sizes(loop, sequences, round(2 * of_eight) - 1) == [4]
    assert fitting_sizes(loop, sequences, round(2 * of_four) - 1) == [2]
    with pytest.raises(MemoryError, match="even with batches of 1"):
        fitting_sizes(loop, sequences, 1000)
    several = Loop(title="", unit="sequences", sizes=(8, 16, 32), run=loop.run, peak_bytes=lambda s, size: size)
    assert fitting_sizes(several, sequences, 40) == [8, 16]

    monkeypatch.setattr("fastcompat.benchmark.rounds.free_memory", lambda device: round(2 * of_four) - 1)
    assert choose_size(loop, sequences, full.device) == 2
    rounds = run_in_turn(
        [loop, length_sorted(full), constant("small", np.zeros(16))],
        sequences,
        np.zeros(16),
        full.get_output_embeddings().weight.detach(),
        n_rounds=1,
        progress=lambda *known: None,
    )
    assert "Hugging Face, padded batches of 2, full logits" in rounds.results
    monkeypatch.setattr("fastcompat.benchmark.rounds.free_memory", lambda device: 1000)
    rounds = run_in_turn(
        [loop, constant("small", np.zeros(16))],
        sequences,
        np.zeros(16),
        torch.ones(8, 8),
        n_rounds=1,
        progress=lambda *known: None,
    )
    assert list(rounds.results) == ["small"]
    assert "GiB" in rounds.failed["Hugging Face, padded batches of 8, full logits"]


def test_the_fastest_size_that_does_not_run_out_of_memory():
    def seconds_of(largest: int, size: int) -> float:
        if size > largest:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {8: 3.0, 16: 1.0, 32: 2.0}.get(size, 4.0)

    sizes = (8, 16, 32, 64)
    assert fastest_size(sizes, partial(seconds_of, 100)) == 16
    assert fastest_size(sizes, partial(seconds_of, 15)) == 8
    assert fastest_size(sizes, partial(seconds_of, 3)) == 2
    assert fastest_size((5,), partial(seconds_of, 100)) == 5
    with pytest.raises(MemoryError):
        fastest_size(sizes, partial(seconds_of, 0))


def test_useful_flops_are_those_of_the_definition():
    sequences = SMALL.sequences(300)
    forests = pack_forest([s.input_ids for s in sequences], [s.scored for s in sequences], token_budget=1 << 20)
    (forest,) = forests
    position_ids, subtree_end = torch.from_numpy(forest.position_ids), torch.from_numpy(forest.subtree_end)
    every, windowed = (
        int(reference.visible(position_ids, subtree_end, sliding_window=window).sum()) for window in (None, 24)
    )
    assert windowed < every
    # D 48, MLP 80, 4 heads and 2 key heads of width 12 or 16, norms of 48; V 320.
    llama = 3 * (48 * 48 + 2 * 48 * 24 + 48 * 48 + 3 * 48 * 80 + 2 * 48) + 48
    gemma = 4 * (48 * 64 + 2 * 48 * 32 + 64 * 48 + 3 * 48 * 80 + 4 * 48) + 48
    # Two layers with a window, heads of width 16; two without, heads of width 40, one key head, which is the value too.
    of_window, whole = 48 * 64 + 2 * 48 * 32 + 64 * 48 + 2 * 16, 48 * 160 + 48 * 40 + 160 * 48 + 2 * 40
    gemma4 = 2 * (of_window + whole) + 4 * (3 * 48 * 80 + 4 * 48) + 48
    head = 320 * 48
    scored = len(forest.targets)
    for family, body, attention in (
        ("Llama", llama, 3 * every * 48),
        ("SmolLM2 (tied head)", llama, 3 * every * 48),
        ("Gemma-2", gemma, 2 * (every + windowed) * 64),
        ("Gemma-4 (a head width per layer)", gemma4, 2 * every * 160 + 2 * windowed * 64),
    ):
        model = wrap(family, small_model(family))
        assert useful_flops(model, forests) == 2 * body * forest.n_tokens + 2 * head * scored + 4 * attention, family


def test_what_data_sheets_promise(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    cuda = torch.device("cuda")
    for name, teraflops in (
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA L40", 181.0),
        ("NVIDIA L40S", 362.1),
        ("NVIDIA L4", 121.0),
    ):
        assert data_sheet_rate(cuda, torch.bfloat16) == pytest.approx(1e12 * teraflops), name
    assert data_sheet_rate(cuda, torch.float32) is None
    assert data_sheet_rate(torch.device("cpu"), torch.bfloat16) is None
    name = "NVIDIA GeForce RTX 4090"
    assert data_sheet_rate(cuda, torch.bfloat16) is None
    assert (product_tokens(cuda), product_tokens(torch.device("cpu"))) == (16384, 2048)


def test_matrices_are_found_whatever_they_are_called():
    for family, shape in (("Llama", (80, 48)), ("Phi-3", (160, 48)), ("GPT-2", (192, 48))):
        assert up_projection(small_model(family)).shape == shape, family
    assert product_rate(torch.ones(8, 16)) > 0
    gpt2 = small_model("GPT-2")
    total = sum(parameter.numel() for parameter in gpt2.parameters())
    assert body_parameters(gpt2) == total - 320 * 48 - 512 * 48
    # Two of four experts: half of their weights.
    mixtral = small_model("Mixtral")
    experts = sum(p.numel() for p in mixtral.parameters() if p.ndim == 3)
    assert experts
    left_out = 2 * 320 * 48
    assert body_parameters(mixtral) == sum(p.numel() for p in mixtral.parameters()) - left_out - experts / 2


def test_workloads_are_the_same_everywhere_and_keep_to_the_context():
    for name, workload in WORKLOADS.items():
        whole, again, cut = (
            workload.sequences(1000, n_prompts=2, context_length=length) for length in (None, None, 512)
        )
        assert len(whole) == 2 * workload.n_responses
        for first, second, short in zip(whole, again, cut, strict=True):
            assert np.array_equal(first.input_ids, second.input_ids)
            assert len(short.input_ids) <= 512
            assert short.n_tokens
            assert short.n_prompt_tokens <= 384
            assert workload.prompt.low <= first.n_prompt_tokens <= workload.prompt.high
            assert workload.response.low <= first.n_tokens <= workload.response.high
            assert first.input_ids.max() < 1000
            if len(first.input_ids) <= 512 and first.n_prompt_tokens <= 384:
                assert np.array_equal(first.input_ids, short.input_ids), name
        prompt = whole[0].input_ids[: whole[0].n_prompt_tokens]
        for sequence in whole[1 : workload.n_responses]:
            assert np.array_equal(sequence.input_ids[: len(prompt)], prompt)


@pytest.mark.parametrize(
    ("package", "name", "atol"),
    [
        ("lm_eval", "lm-evaluation-harness HFLM, batches of {}", FLOAT32_NATS),
        ("ctranslate2", "CTranslate2 score_batch, float32", FLOAT32_NATS),
        ("ctranslate2", "CTranslate2 score_batch, int8", 0.2),
    ],
)
def test_peers_compute_the_same_losses(monkeypatch, tmp_path, package, name, atol):
    pytest.importorskip(package, reason=f"{package} is not installed (make peers)")
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    from peers import ctranslate2_loop, hflm_loop

    full = small_model("Llama", vocab_size=300)
    sequences = SMALL.sequences(300)
    if package == "lm_eval":
        loop = hflm_loop(full)
    else:
        loop = ctranslate2_loop(full, directory=tmp_path, compute_type=name.rpartition(" ")[2])
    assert loop.title == name
    found = {size: loop.run(sequences, size) for size in (loop.sizes[0], 3)}
    assert loop.peak_bytes(sequences, 2) <= loop.peak_bytes(sequences, 1000)
    expected = losses_in_float64(full, sequences)
    for size, losses in found.items():
        np.testing.assert_allclose(losses, expected, rtol=0, atol=atol, err_msg=f"batches of {size}")
