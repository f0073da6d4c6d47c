"""Races over runs: the same looks and parts whoever works on them, what users see, and every way on from a stop."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from command_line import fail, invoke, succeed
from corpora import rows_of, save_small_model, save_small_reward_model, write_jsonl

import fastcompat as fc
from fastcompat.cli.racing import race_asked, race_at
from fastcompat.errors import Interrupted, RunError, UsageError
from fastcompat.scoring.asked_models import AskedModels
from fastcompat.store.preparing import CorpusSettings, prepare_run

N_PROMPTS = 420
# Averaged over tokens the rewards are not known beforehand, so that a race takes several looks.
TOKENS = ("--average", "token")
WINNER = ("--until", "winner", *TOKENS)
# Far ones leave at the first look, and the others go on to the end.
RANKING = ("--until", "ranking", "--margin", 0, *TOKENS)
GENERATORS = {"best": 4.0, "close": 3.88, "far": 2.0, "farther": 1.0}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("models")
    save_small_model(directory / "base")
    save_small_reward_model(directory / "judge", seed=1)
    return directory


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Four generators whose rewards come along, far apart."""
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "corpus.jsonl", rewarded(GENERATORS))


def rewarded(means: dict[str, float], *, n_prompts: int = N_PROMPTS) -> list[dict]:
    draw = np.random.default_rng(0)
    hardness = draw.normal(size=n_prompts)
    return [
        row | {"reward": round(float(mean + hardness[k] + draw.normal()), 3)}
        for name, mean in means.items()
        for k, row in enumerate(rows_of(name, n_prompts=n_prompts, words=6))
    ]


def of(run: Path) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """(looks, parts) of a run, by name."""
    looks = {str(path.relative_to(run)): path.read_bytes() for path in sorted(run.glob("race/*/*.json"))}
    return looks, {path.name: path.read_bytes() for path in sorted(run.glob("scores/*/part-*.parquet"))}


def ranked(run: Path, *options: object) -> list[dict]:
    """The ranking as JSON; what is not scored yet is told beside it."""
    return json.loads(invoke("rank", run, *options, "--format", "json").stdout)


@pytest.fixture(scope="module")
def raced(tmp_path_factory, models, corpus) -> tuple[Path, str]:
    """A race to its end, and what it printed."""
    run = tmp_path_factory.mktemp("raced") / "run"
    return run, succeed("score", corpus, "--base-model", models / "base", *WINNER, "-o", run)


def test_the_winner_is_found_before_the_corpus_ends(raced):
    run, output = raced
    assert "race for the best by CAR, beta 3, 1% counts as equal: 4 generators, 420 prompts in random order" in output
    assert "2 out: far, farther · 2 still in · best leads close by" in output
    assert "winner: best, at most 1% below close, after" in output
    assert "the same command without --until" in output
    (store,) = fc.open_run(run).scorers()
    assert sum(pq.read_metadata(path).num_rows for path in store.place.directory.glob("part-*")) < 4 * N_PROMPTS


def test_a_finished_race_says_so_when_it_is_asked_again(raced, models):
    run, _ = raced
    before = of(run)
    assert "winner: best" in succeed("score", "--base-model", models / "base", *WINNER, "-o", run)
    assert of(run) == before


def test_the_ranking_of_a_stopped_run_shows_what_the_race_claims(raced):
    run, _ = raced
    rows = ranked(run, *TOKENS)
    assert [row["generator"] for row in rows][:2] == ["best", "close"]
    assert {row["interval"] for row in rows} == {"repeated"}
    assert {row["p_best"] for row in rows} == {None}
    by_name = {row["generator"]: row for row in rows}
    assert by_name["best"]["rank"] == 1
    assert by_name["best"]["claim"] == "the winner"
    assert by_name["farther"]["rank"] > 1
    assert "out of the race after" in by_name["farther"]["claim"]
    assert by_name["farther"]["stopped_after"] == by_name["farther"]["n_prompts"] < by_name["best"]["stopped_after"]
    text = succeed("rank", run, *TOKENS)
    assert "any false claim: 1% on the way, below 5% in all" in text
    assert "bootstrap" not in text
    assert "race for the best by CAR" in text
    assert "race for the best by CAR" in succeed("status", run)


def test_repeated_intervals_are_wider_than_those_of_the_same_rows(raced):
    run, _ = raced
    best = {row["generator"]: row for row in fc.rank(fc.open_run(run)).to_pylist()}["best"]
    (look, *_) = [json.loads(path.read_text()) for path in sorted(run.glob("race/*/look-*.json"))][::-1]
    rows = fc.open_run(run).scores()
    ids = sorted(set(rows["prompt_id"].to_pylist()))[: look["n_prompts"]]
    plain = fc.rank(rows.filter(pc.is_in(rows["prompt_id"], value_set=pa.array(ids)))).to_pylist()
    (same,) = [row for row in plain if row["generator"] == "best"]
    assert best["car"] == same["car"]
    # z of 2.3 for 1.96: looks this close together see nearly the same
    assert 1.15 < (best["car_high"] - best["car_low"]) / (same["car_high"] - same["car_low"]) < 1.6


def test_other_questions_of_a_stopped_run_are_ranked_without_claims(raced):
    run, _ = raced
    for arguments in (("--beta", 1, *TOKENS), ("--sort", "loss", *TOKENS), ("--average", "response")):
        rows = ranked(run, *arguments)
        assert {row["interval"] for row in rows} == {"repeated"}
        assert {row["claim"] for row in rows} == {None}


def finish(run: Path, models: Path) -> None:
    succeed("score", "--base-model", models / "base", "-o", run)


def test_every_way_on_from_a_stop(tmp_path, models, corpus):
    run, whole = tmp_path / "run", tmp_path / "whole"
    model = ("--base-model", models / "base")
    succeed("score", corpus, *model, *RANKING, "-o", run)
    assert "left_out" in succeed("status", run)
    refusal = fail(UsageError, "select", run, "-o", tmp_path / "best.jsonl")
    assert "without --until" in refusal
    assert "--only" in refusal
    assert "not a generator" in fail(UsageError, "score", *model, "--only", "nobody", "-o", run)
    succeed("score", *model, "--only", "best", "-o", run)
    assert "not all responses" in fail(UsageError, "select", run, "-o", tmp_path / "best.jsonl")
    succeed("select", run, "--generator", "best", "--by", "reward", "-o", tmp_path / "best.jsonl")
    chosen = [json.loads(line) for line in (tmp_path / "best.jsonl").open()]
    assert len(chosen) == N_PROMPTS
    # The rest: every part is then what it would have been without a race, and so is the ranking.
    finish(run, models)
    succeed("score", corpus, *model, "-o", whole)
    assert of(run)[1] == of(whole)[1]
    assert fc.rank(fc.open_run(run)).equals(fc.rank(fc.open_run(whole)))
    succeed("select", run, "--by", "loss", "-o", tmp_path / "all.jsonl")
    assert "whole:" in succeed("verify", run)


@contextmanager
def dying_after(monkeypatch, n_packs: int) -> Iterator[None]:
    """`score` stops after so many packs, as a signal would stop it."""

    @contextmanager
    def stopping():
        asked = count(1)
        yield lambda: next(asked) > n_packs

    with monkeypatch.context() as patch:
        patch.setattr("fastcompat.cli.working.stopping", stopping)
        yield


@pytest.fixture(scope="module")
def whole_race(tmp_path_factory, models, corpus) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """Looks and parts of a race through the corpus, by one process that nobody disturbs."""
    run = tmp_path_factory.mktemp("whole") / "run"
    succeed("score", corpus, "--base-model", models / "base", *RANKING, "-o", run)
    looks, parts = of(run)
    assert len(looks) == 8  # race.json too
    assert any(b"left_out" in part for part in parts.values())
    return looks, parts


def test_kills_change_nothing(tmp_path, monkeypatch, models, corpus, whole_race):
    run, model = tmp_path / "run", ("--base-model", models / "base")
    killed = 0
    for n_packs in [1, 2, 1, 1, 2, 1, 1, 2, 1, 3, 2, 1, 1, 2, 1, 1, 2, 3, 1, 2, 100]:
        with dying_after(monkeypatch, n_packs):
            result = invoke("score", corpus, *model, *RANKING, "-o", run, "--token-budget", 512)
        killed += isinstance(result.exception, Interrupted)
        if result.exception is None:
            break
        if killed % 4 == 0 and (run / "manifest.json").exists():
            invoke("rank", run)  # whoever looks on the way changes nothing either
    assert killed >= 20
    assert of(run) == whole_race  # nor does the token budget, here


@pytest.mark.parametrize("n_workers", [2, 8])
def test_workers_change_nothing(tmp_path, models, corpus, whole_race, n_workers):
    run, model = tmp_path / "run", ("--base-model", models / "base")
    # One after the other: the first helps with what the others have not begun, and they find everything done.
    for worker in (n_workers, 1):
        succeed("score", corpus, *model, *RANKING, "-o", run, "--worker", f"{worker}/{n_workers}")
    assert of(run) == whole_race


def test_a_worker_elsewhere_holds_the_same_race(tmp_path, models, corpus, whole_race):
    """One that is handed all it needs as plain values, in the middle of a race."""
    run, model = tmp_path / "run", str(models / "base")
    prepare_run(run, [str(corpus)], CorpusSettings())
    asked = race_asked("ranking", only=None, margin="0", average="token")
    assert asked is not None
    with pytest.raises(Interrupted):
        race_at(str(run), AskedModels(base=[model]), asked, lambda: any(run.glob("scores/*/part-*")))
    assert of(run) != whole_race
    race_at(str(run), AskedModels(base=[model]), asked, lambda: False)
    assert of(run) == whole_race


def test_a_whole_ranking_and_a_precision(tmp_path, models, corpus):
    model = ("--base-model", models / "base")
    output = succeed("score", corpus, *model, *RANKING, "-o", tmp_path / "run")
    assert "the whole ranking by CAR, beta 3: 4 generators" in output
    rows = ranked(tmp_path / "run", *TOKENS)
    assert [row["generator"] for row in rows][:2] == ["best", "close"]
    output = succeed("score", *model, "--until", "precision=8%", "-o", tmp_path / "run")
    assert "every generator's CAR, beta 3 to within 8% of it" in output


def test_a_race_by_loss_alone_and_one_for_each_reward(tmp_path, models):
    plain = [{k: v for k, v in row.items() if k != "reward"} for row in rewarded({"a": 1, "b": 2}, n_prompts=240)]
    corpus = write_jsonl(tmp_path / "plain.jsonl", plain)
    output = succeed("score", corpus, "--base-model", models / "base", "--until", "winner", "-o", tmp_path / "loss")
    assert "the best by loss" in output
    options = ("--base-model", models / "base", "--reward-model", models / "judge", "--reward-shift", 9)
    output = succeed("score", corpus, *options, "--until", "winner", "-o", tmp_path / "judged")
    assert "judge · rewards" in output
    (race,) = (json.loads(path.read_text()) for path in (tmp_path / "judged").glob("race/*/race.json"))
    assert race["reward_model"].startswith("judge-")


def test_every_reward_of_the_corpus_has_its_race(tmp_path, models):
    rows = [row | {"score": 9 - row["reward"]} for row in rewarded({"a": 5.0, "b": 3.0})]
    corpus = write_jsonl(tmp_path / "both.jsonl", rows)
    options = ("--base-model", models / "base")
    output = succeed("score", corpus, *options, "--until", "winner", "-o", tmp_path / "run")
    assert "2 races, one for each pair of models" in output
    ends = [line for line in output.splitlines() if "winner: " in line]
    assert ["winner: a" in ends[0], "winner: b" in ends[1]] == [True, True]


def test_a_race_goes_on_over_what_extend_adds(tmp_path, models, corpus):
    run, model = tmp_path / "run", ("--base-model", models / "base")
    succeed("score", corpus, *model, "--until", "winner", "-o", run)
    added = write_jsonl(tmp_path / "more.jsonl", rewarded({"newcomer": 9.0, "far": 9.0}, n_prompts=300))
    output = succeed("score", added, *model, "--extend", "--until", "winner", "-o", run)
    assert "winner: newcomer" in output  # far stays out: that was claimed
    records = [json.loads(path.read_text()) for path in run.glob("race/*/race.json")]
    (second,) = [record for record in records if len(record["corpus"]) == 2]
    assert set(second["before"]) >= {"far", "farther"}
    finish(run, models)
    assert {row["interval"] for row in fc.rank(fc.open_run(run)).to_pylist()} == {"plain"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--until", "best"), "write winner, ranking or precision"),
        (("--until", "precision"), "precision=X"),
        (("--until", "precision=0"), "between 0 and 1"),
        (("--until", "winner", "--margin", "x"), "write a share"),
        (("--until", "winner", "--margin", "200%"), "below 1"),
        (("--margin", "1%"), "--until winner"),
        (("--beta", "2"), "--until winner"),
        (("--until", "winner", "--only", "best"), "without --until"),
        (("--until", "winner", "--beta", "-1"), "beta"),
    ],
)
def test_what_a_race_cannot_be_asked(tmp_path, models, corpus, options, message):
    assert message in fail(UsageError, "score", corpus, "--base-model", models / "base", *options, "-o", tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_a_race_needs_two_generators_and_what_it_compares(tmp_path, models):
    one = write_jsonl(tmp_path / "one.jsonl", rows_of("a", n_prompts=20))
    options = ("--base-model", models / "base", "--until", "winner")
    assert "two generators" in fail(UsageError, "score", one, *options, "-o", tmp_path / "one")
    two = write_jsonl(tmp_path / "two.jsonl", rows_of("a", n_prompts=20) + rows_of("b", n_prompts=20))
    assert "needs rewards" in fail(UsageError, "score", two, *options, "--sort", "car", "-o", tmp_path / "two")


def test_an_unfinished_run_is_not_ranked_as_if_one_had_looked_once(tmp_path, monkeypatch, models, corpus):
    run, model = tmp_path / "run", ("--base-model", models / "base")
    with dying_after(monkeypatch, 12):
        invoke("score", corpus, *model, "-o", run, "--token-budget", 512)
    rows = ranked(run)
    assert {row["interval"] for row in rows} == {"repeated"}
    assert "at every look at an unfinished run" in succeed("rank", run)
    finish(run, models)
    assert {row["interval"] for row in fc.rank(fc.open_run(run)).to_pylist()} == {"plain"}


def test_what_extend_adds_is_raced_over_by_all_whose_place_was_only_known(tmp_path, models, corpus):
    run, model = tmp_path / "run", ("--base-model", models / "base")
    ask = ("--until", "ranking", "--margin", 0)
    succeed("score", corpus, *model, *ask, "-o", run)
    added = write_jsonl(tmp_path / "more.jsonl", rewarded({"newcomer": 3.0}))
    succeed("score", added, *model, "--extend", *ask, "-o", run)
    rows = ranked(run)
    assert [row["generator"] for row in rows] == ["best", "close", "newcomer", "far", "farther"]
    assert rows[2]["rank"] == 3
    # The race over less of the corpus says nothing of this one.
    assert rows[0]["n_prompts_total"] == N_PROMPTS
    assert "over the corpus before --extend" in succeed("status", run)


def test_a_precision_race_claims_nothing_of_who_is_better(tmp_path, models, corpus):
    run = tmp_path / "run"
    succeed("score", corpus, "--base-model", models / "base", "--until", "precision=3%", "-o", run)
    rows = ranked(run)
    cars = [row["car"] for row in rows]
    assert cars == sorted(cars, reverse=True)
    assert [row["rank"] for row in rows[2:]] == [3, 4]


def test_who_has_too_little_to_be_known_by_does_not_hold_the_race_up(tmp_path, models):
    rows = rewarded({"a": 5.0, "b": 1.0}, n_prompts=260) + rewarded({"few": 3.0}, n_prompts=7)
    rows += [{k: v for k, v in row.items() if k != "reward"} for row in rewarded({"unjudged": 1.0}, n_prompts=260)]
    corpus = write_jsonl(tmp_path / "c.jsonl", rows)
    output = succeed("score", corpus, "--base-model", models / "base", "--until", "winner", "-o", tmp_path / "run")
    assert "few: not in the race: 7 prompts with figures to compare, 10 are needed" in output
    assert "unjudged: not in the race: 0 prompts" in output
    assert "winner: a, after 1" in output or "winner: a, after 2" in output
    assert "not in the race" in {row["generator"]: row for row in ranked(tmp_path / "run")}["few"]["claim"]


def test_damage_is_named_with_what_to_do(tmp_path, models, corpus):
    run, model = tmp_path / "run", ("--base-model", models / "base")
    succeed("score", corpus, *model, *WINNER, "-o", run)
    (race,) = run.glob("race/*")
    looks = of(run)[0]
    for name, text in (("look-0001.json", "{}"), ("race.json", "{}"), ("race.json", "{"), ("race.json", None)):
        kept = (race / name).read_bytes()
        if text is None:
            (race / name).unlink()
        else:
            (race / name).write_text(text)
        for command in (("rank", run), ("status", run), ("score", *model, *WINNER, "-o", run)):
            assert f"delete {race} to hold the race again" in fail(RunError, *command)
        assert invoke("verify", run).exit_code != 0
        (race / name).write_bytes(kept)
    for path in race.iterdir():
        path.unlink()
    race.rmdir()
    succeed("score", *model, *WINNER, "-o", run)
    assert of(run)[0] == looks


def test_a_part_that_is_lost_is_scored_again(tmp_path, models, corpus):
    run, model = tmp_path / "run", ("--base-model", models / "base")
    succeed("score", corpus, *model, *WINNER, "-o", run)
    before = of(run)
    sorted(run.glob("scores/*/part-*"))[1].unlink()
    succeed("score", *model, *WINNER, "-o", run)
    assert of(run) == before


def test_races_that_look_at_different_times_take_each_look_at_its_own(tmp_path, monkeypatch, models, corpus):
    """A race begun where models fit into memory together, and one begun where they take turns."""
    run = tmp_path / "run"
    save_small_model(tmp_path / "second", seed=7)
    with dying_after(monkeypatch, 60):
        invoke("score", corpus, "--base-model", models / "base", *RANKING, "-o", run, "--token-budget", 512)
    both = ("--base-model", models / "base", "--base-model", tmp_path / "second")
    monkeypatch.setattr("fastcompat.scoring.passes.fit_together", lambda passes: False)
    succeed("score", *both, *RANKING, "-o", run)
    found = {}
    for path in run.glob("race/*/race.json"):
        looks = [json.loads(look.read_text())["n_prompts"] for look in sorted(path.parent.glob("look-*"))]
        shares = json.loads(path.read_text())["shares"]
        found[len(shares)] = looks
        # Hashes are random: about so many prompts lie below each threshold.
        assert looks == pytest.approx([share * N_PROMPTS for share in shares[: len(looks)]], abs=25)
        assert len(looks) > 1
    assert set(found) == {7, 3}


def test_beta_is_not_spoken_of_where_the_figures_are_of_few_prompts(raced):
    assert "whatever beta is" not in succeed("rank", raced[0], *TOKENS)
