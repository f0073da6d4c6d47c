"""The whole engine through the Triton kernels, in Triton's interpreter, against the C++ extension on the same rows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from corpora import prepare_small_units, rows_of, save_small_model, save_small_reward_model, write_jsonl

import fastcompat as fc
from fastcompat.errors import Interrupted
from fastcompat.models import packed_model
from fastcompat.ops import backends
from fastcompat.rows.columns import EXTRAS
from fastcompat.scoring.engine import Progress
from fastcompat.scoring.passes import Pass, Worker, score_corpus
from fastcompat.store.run import Run

pytest.importorskip("triton")

from triton.runtime.interpreter import InterpretedFunction

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # infinity minus infinity, which is meant
    pytest.mark.skipif("native" not in backends.available("cpu"), reason="the C++ extension was not built"),
]

# Tokens of a pack: a unit is two of them.
BUDGET = 32
LAYERS = {"_rms_norm_kernel", "_rotate_kernel", "_gated_kernel", "_attention_kernel"}
HEAD = {"_target_kernel", "_range_kernel", "_merge_kernel"}


@contextlib.contextmanager
def through_triton() -> Iterator[set[str]]:
    """Every operator of a CPU is served by Triton's kernels; the names of those that were launched."""
    launched: set[str] = set()
    run = InterpretedFunction.run

    def noted(self, *args, **kwargs):
        launched.add(self.fn.__name__)
        return run(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(backends.FASTEST, "cpu", "triton")
        patch.setattr(InterpretedFunction, "run", noted)
        yield launched


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("through-triton")
    (directory / "corpus").mkdir()
    for name in ("first", "second"):
        write_jsonl(directory / "corpus" / f"{name}.jsonl", rows_of(name, n_prompts=2, words=10))
    base = save_small_model(
        directory / "base", num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, intermediate_size=64
    )
    save_small_reward_model(directory / "reward", body=base)
    return directory


def scorers(directory: Path) -> Pass:
    """A base model with everything that it can tell, and a reward model with the same body."""
    base = fc.Scorer(str(directory / "base"), dtype="float32", extras=list(EXTRAS), token_budget=BUDGET)
    return Pass(base=base, reward=fc.RewardScorer(str(directory / "reward"), dtype="float32", token_budget=BUDGET))


def score(run: Run, served: Pass, **options) -> None:
    score_corpus(run, served, token_budget=None, worker=Worker(), progress=Progress(), **options)


def new_run(directory: Path, name: str) -> Run:
    return prepare_small_units(directory / name, directory / "corpus", target_unit_chars=400)


@pytest.fixture(scope="module")
def native(directory) -> Run:
    run = new_run(directory, "native")
    score(run, scorers(directory))
    return run


@pytest.fixture(scope="module")
def models(directory) -> Pass:
    """Loaded, fused and probed through Triton."""
    with through_triton() as launched, pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed_model, "FUSION_TOKENS", 16)  # half the programs
        served = scorers(directory)
        assert served.joint is not None
    assert launched >= LAYERS | HEAD
    assert all(fusion.n_fused == fusion.n_modules > 0 for fusion in served.base.model.fusions)
    return served


@pytest.fixture(scope="module")
def triton(directory, models) -> Run:
    """In one pass for both models."""
    run = new_run(directory, "triton")
    with through_triton() as launched:
        score(run, models)
    assert launched >= LAYERS | HEAD
    return run


def parts(run: Run) -> dict[tuple[str, str], bytes]:
    return {(s.name, path.name): path.read_bytes() for s in run.scorers() for path in s.place.directory.glob("part-*")}


def test_losses_extras_and_rewards_are_those_of_the_extension(native, triton):
    wanted, got = native.scores(), triton.scores()
    assert got.column_names == wanted.column_names
    assert got.num_rows == wanted.num_rows == 8  # 4 responses, each with a loss and with a reward
    exact = {"greedy_matches", "clipped_rank_sum", "n_tokens", "unconditioned_n_tokens", "n_bytes", "token_text"}
    figures = {"loss", "nll_sum", "reward", *EXTRAS}
    assert figures <= set(got.column_names)
    for name in got.column_names:
        expected, computed = wanted[name].to_pylist(), got[name].to_pylist()
        if name not in figures - exact:
            assert computed == expected, name
            continue
        assert [x is None for x in computed] == [x is None for x in expected], name
        assert sum(x is not None for x in computed) == 4, name
        for mine, theirs in zip(computed, expected, strict=True):
            if theirs is not None:
                # A reward and a token's figures may be near 0.
                near = 0 if name in ("loss", "nll_sum", "unconditioned_nll_sum") else 2e-5
                np.testing.assert_allclose(mine, theirs, rtol=1e-6, atol=near, err_msg=name)


@pytest.mark.long
def test_a_run_that_is_interrupted_at_every_pack_ends_with_the_same_bytes(directory, models, triton):
    run = new_run(directory, "interrupted")
    n_interrupted = 0
    with through_triton():
        while any(run.pending(store) for store in run.scorers()) or not run.scorers():
            with contextlib.suppress(Interrupted):
                score(run, models, stop=lambda: True)
                break
            n_interrupted += 1
            assert n_interrupted < 50
    assert n_interrupted > len(run.units), "it was interrupted in units too"
    assert parts(run) == parts(triton)


def test_a_reward_model_alone_gives_what_it_gives_in_a_joint_pass(models, triton):
    rows = rows_of("first", n_prompts=2, words=10)
    assert models.reward is not None
    with through_triton() as launched:
        alone = models.reward.score(rows)
    assert launched >= LAYERS
    assert not launched & {"_range_kernel"}
    joint = [row for row in triton.scores().to_pylist() if row["generator"] == "first" and row["reward"] is not None]
    known = {row["row_index"]: row["reward"] for row in joint}
    for n, reward in enumerate(alone["reward"].to_pylist()):
        np.testing.assert_allclose(reward, known[n], rtol=1e-5, atol=1e-6)
