"""Generators that are left out of a run, unit by unit: nothing of them is computed, and whoever wants it later gets the
bytes of a run that never left anything out."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_model import FakeModel, fake_tokenizer
from fake_runs import new_run, part_path, parts, score
from left_out_runs import A, B, four_generators, without

import fastcompat as fc
from fastcompat.errors import Interrupted, RunError
from fastcompat.rows.response import Response, from_table
from fastcompat.scoring import engine
from fastcompat.store.parts import ScorerStore, Unit
from fastcompat.store.places import Disk
from fastcompat.store.run import Run
from fastcompat.store.verification import find_damage, pending_rows, scorer_progress
from fastcompat.tokens.conversations import TokenSequence


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return four_generators(tmp_path_factory.mktemp("corpus"))


def tokenizer(rows: list[Response]):
    """`fake_tokenizer`, and nothing of a row that says so itself."""
    found = fake_tokenizer(rows)
    return [
        sequence
        if row.status == "ok"
        else TokenSequence(
            input_ids=sequence.input_ids[:0], scored=sequence.scored[:0], status=row.status, detail=row.detail
        )
        for row, sequence in zip(rows, found, strict=True)
    ]


@pytest.fixture
def whole(tmp_path, corpus) -> dict[str, bytes]:
    """The parts of a run that left nothing out."""
    run, store = new_run(tmp_path / "whole", corpus)
    score(run, store, FakeModel(), tokenizer)
    assert not store.leaves_out
    assert all(pq.read_schema(path).metadata == {b"scorer": b"fake"} for path in store.place.directory.glob("part-*"))
    return parts(store)


def work_off(run: Run, store: ScorerStore, model: FakeModel, *names: str, seen: list[str] | None = None, **options):
    """What is pending when these are left out; `seen` gets the generator of each row that is tokenised."""

    def seeing(rows):
        if seen is not None:
            seen.extend(row.generator for row in rows if row.status == "ok")
        return tokenizer(rows)

    leave_out = options.pop("leave_out", without(*names))
    units = options.pop("units", run.pending(store, leave_out=leave_out))
    return score(run, store, model, seeing, units=units, leave_out=leave_out, **options)


def unit_of_all(run: Run) -> Unit:
    """One in which every generator has something to score."""
    return next(
        unit
        for unit in run.units
        if len({row.generator for row in from_table(run.unit_rows(unit)) if row.status == "ok"}) == 4
    )


def statuses(run: Run) -> dict[tuple[str, str], int]:
    counts: dict[tuple[str, str], int] = {}
    for row in run.scores().to_pylist():
        counts[row["generator"], row["status"]] = counts.get((row["generator"], row["status"]), 0) + 1
    return counts


# --- what a part with rows left out is


def test_rows_left_out_are_not_tokenised_and_say_why(tmp_path, corpus, whole):
    run, store = new_run(tmp_path / "run", corpus)
    seen: list[str] = []
    progress = work_off(run, store, FakeModel(), A, seen=seen)
    assert A not in seen
    assert len(seen) == 3 * 39
    for unit in run.units:
        rows = store.read(unit, ["generator", "status"]).to_pylist()
        names = {A} if {"generator": A, "status": "left_out"} in rows else set()
        assert store.left_out(unit) == names
        assert json.loads(pq.read_metadata(part_path(store, unit)).metadata.get(b"left_out", "[]")) == sorted(names)
    by_key = {row["row_key"]: row for row in final_rows(tmp_path / "whole")}
    for row in run.scores().to_pylist():
        final = by_key[row["row_key"]]
        if row["generator"] == A and final["status"] == "ok":
            assert (row["status"], row["detail"]) == ("left_out", f"{A} is not asked for")
            assert all(row[name] is None for name in ("n_tokens", "n_prompt_tokens", "nll_sum", "loss"))
        else:
            assert {name: row[name] for name in final} == final
    assert statuses(run)[A, "empty"] == 1
    assert (progress.n_rows, progress.n_rows_skipped, progress.n_rows_left_out) == (3 * 40 + 1, 39, 39)
    assert find_damage(run) == []
    known = scorer_progress(run, store)
    assert (known.n_rows, known.statuses["left_out"]) == (121, 39)
    assert known.examples["left_out"].endswith(f"{A} is not asked for")
    assert (pending_rows(run, store).n_rows, pending_rows(run, store).n_split_prompts) == (39, 0)
    assert store.finished() == {unit.name for unit in run.units}


def final_rows(directory: Path) -> list[dict]:
    return [
        {name: row[name] for name in ("row_key", "generator", "status", "detail", "n_tokens", "nll_sum", "loss")}
        for row in fc.open_run(directory).scores().to_pylist()
    ]


@pytest.mark.parametrize("ahead", [0, 1])
def test_completed_a_run_has_the_bytes_of_one_that_left_nothing_out(tmp_path, corpus, whole, ahead):
    run, store = new_run(tmp_path / "run", corpus)
    work_off(run, store, FakeModel(), A, B, ahead=ahead)
    seen: list[str] = []
    progress = work_off(run, store, FakeModel(), A, seen=seen, ahead=ahead, units=run.units)
    assert set(seen) == {B}
    assert (progress.n_rows, progress.n_rows_skipped) == (39, run.n_rows - 39)
    assert {row["detail"] for row in run.scores().to_pylist() if row["status"] == "left_out"} == {
        f"{A} is not asked for"
    }
    seen.clear()
    progress = work_off(run, store, FakeModel(), seen=seen, ahead=ahead, units=run.units)
    assert set(seen) == {A}
    assert (progress.n_rows, progress.n_rows_skipped, progress.n_rows_left_out) == (39, run.n_rows - 39, 0)
    assert parts(store) == whole
    assert run.pending(store) == []
    assert find_damage(run) == []
    assert pending_rows(run, store).n_rows == 0


def test_a_figure_that_is_there_is_not_taken_away(tmp_path, corpus, whole):
    run, store = new_run(tmp_path / "run", corpus)
    work_off(run, store, FakeModel())
    assert run.pending(store, leave_out=without(A, B)) == []
    progress = work_off(run, store, FakeModel(), A, B, units=run.units)
    assert (progress.n_rows, progress.n_rows_skipped) == (0, run.n_rows)
    assert parts(store) == whole
    assert not store.leaves_out


def test_who_is_left_out_may_change_from_unit_to_unit(tmp_path, corpus, whole):
    run, store = new_run(tmp_path / "run", corpus)
    later = set(run.units[2:])

    def leave_out(unit: Unit) -> dict[str, str]:
        return {A: "out of the race"} if unit in later else {}

    work_off(run, store, FakeModel(), leave_out=leave_out)
    assert [store.left_out(unit) for unit in run.units] == [set(), set()] + [{A}] * len(later)
    assert {name: data for name, data in parts(store).items() if whole[name] == data}.keys() == {
        part_path(store, unit).name for unit in run.units[:2]
    }
    assert run.pending(store, leave_out=leave_out) == []
    assert run.pending(store) == run.units[2:]
    assert run.pending(store, units=run.units[::-1], worker=1, n_workers=2) == [
        unit for unit in run.units[::-1][1::2] if unit in later
    ]
    work_off(run, store, FakeModel())
    assert parts(store) == whole


def test_a_unit_of_which_everything_is_left_out_is_committed(tmp_path, corpus, whole):
    run, store = new_run(tmp_path / "run", corpus)
    model = FakeModel()
    progress = work_off(run, store, model, *(f"generator-{k}" for k in range(4)))
    assert not model.sizes
    assert (progress.n_rows, progress.n_rows_left_out) == (4, 156)
    assert scorer_progress(run, store).statuses == {"left_out": 156, "empty": 4}
    work_off(run, store, FakeModel())
    assert parts(store) == whole


def test_units_are_worked_off_in_the_order_given(tmp_path, corpus, whole):
    run, store = new_run(tmp_path / "run", corpus)
    work_off(run, store, FakeModel(), units=run.units[::-1][:3])
    assert [unit.name in store.finished() for unit in run.units] == [False] * (len(run.units) - 3) + [True] * 3


# --- interruptions, and other processes


def test_interrupted_while_leaving_out_it_goes_on_with_the_same_packs(tmp_path, corpus):
    straight, straight_store = new_run(tmp_path / "straight", corpus, target_unit_chars=1 << 20)
    model = FakeModel()
    work_off(straight, straight_store, model, A)
    n_packs = len(model.sizes)
    run, store = new_run(tmp_path / "run", corpus, target_unit_chars=1 << 20)
    for k in (1, 2, 3):
        model = FakeModel()
        with pytest.raises(Interrupted):
            work_off(run, store, model, A, stop=lambda model=model, k=k: len(model.sizes) >= k)
        assert find_damage(run) == []
        left_out = scorer_progress(run, store).statuses["left_out"]
        assert left_out > 0
        assert pending_rows(run, store).n_rows == run.n_rows - scorer_progress(run, store).n_rows
    model = FakeModel()
    work_off(run, store, model, A)
    assert len(model.sizes) == n_packs - 6
    assert parts(store) == parts(straight_store)


@pytest.mark.parametrize("names", [(), (B,), (A, B)])
def test_what_was_begun_without_others_is_not_taken_up(tmp_path, corpus, names):
    straight, straight_store = new_run(tmp_path / "straight", corpus)
    work_off(straight, straight_store, FakeModel(), *names)
    run, store = new_run(tmp_path / "run", corpus)
    model = FakeModel()
    with pytest.raises(Interrupted):
        work_off(run, store, model, A, stop=lambda: len(model.sizes) >= 2)
    assert store.begun() - store.finished()
    for path in store.place.directory.glob("part-*"):
        path.unlink()
    work_off(run, store, FakeModel(), *names)
    assert parts(store) == parts(straight_store)
    assert find_damage(run) == []


@pytest.mark.parametrize("keep_seconds", [30.0, -1.0])
def test_interrupted_while_completing_it_loses_a_unit_at_most(tmp_path, corpus, whole, monkeypatch, keep_seconds):
    monkeypatch.setattr(engine, "KEEP_SECONDS", keep_seconds)
    run, store = new_run(tmp_path / "run", corpus)
    work_off(run, store, FakeModel(), A, B)
    for k in (1, 4, 7):
        model = FakeModel()
        with pytest.raises(Interrupted):
            work_off(run, store, model, stop=lambda model=model, k=k: len(model.sizes) >= k)
        assert not store.begun()
        assert find_damage(run) == []
    n_left = len(run.pending(store))
    assert 0 < n_left < len(run.units)
    work_off(run, store, FakeModel())
    assert parts(store) == whole


@pytest.mark.parametrize("error", [RuntimeError("a kernel failed"), KeyboardInterrupt()], ids=repr)
def test_a_completing_session_that_breaks_leaves_every_part_whole(tmp_path, corpus, whole, error):
    run, store = new_run(tmp_path / "run", corpus)
    work_off(run, store, FakeModel(), A)
    before = parts(store)

    def breaks(forest):
        if len(model.sizes) > 5:
            raise error

    model = FakeModel(breaks)
    with pytest.raises(type(error)):
        work_off(run, store, model)
    now = parts(store)
    assert all(data in (before[name], whole[name]) for name, data in now.items())
    work_off(run, store, FakeModel())
    assert parts(store) == whole


def test_two_that_complete_a_part_at_once_both_have_their_rows_in_it(tmp_path, corpus, whole):
    run, store = new_run(tmp_path / "run", corpus)
    work_off(run, store, FakeModel(), A, B)
    unit = unit_of_all(run)

    def another_completes_it(forest):
        if len(model.sizes) == 1:
            work_off(run, store, FakeModel(), A, units=[unit])

    model = FakeModel(another_completes_it)
    work_off(run, store, model, B, units=[unit], ahead=0)
    assert store.left_out(unit) == frozenset()
    assert part_path(store, unit).read_bytes() == whole[part_path(store, unit).name]


def test_rows_that_another_process_overwrote_are_scored_again(tmp_path, corpus, whole):
    run, store = new_run(tmp_path / "run", corpus)
    work_off(run, store, FakeModel(), A, B)
    unit = unit_of_all(run)
    work_off(run, store, FakeModel(), A, units=[unit])
    of_b = part_path(store, unit).read_bytes()
    for other in run.units:
        part_path(store, other).unlink()
    work_off(run, store, FakeModel())
    part_path(store, unit).write_bytes(of_b)  # renamed over one that was whole
    assert run.pending(store) == [unit]
    work_off(run, store, FakeModel())
    assert parts(store) == whole


def test_a_unit_that_another_process_finishes_is_left_as_it_is(tmp_path, corpus, whole):
    run, store = new_run(tmp_path / "run", corpus)
    unit = run.units[0]

    def another_finishes_it(forest):
        part_path(store, unit).write_bytes(whole[part_path(store, unit).name])

    work_off(run, store, FakeModel(another_finishes_it), A, units=[unit], ahead=0)
    assert part_path(store, unit).read_bytes() == whole[part_path(store, unit).name]


def test_a_kill_between_the_mark_and_the_part_costs_nothing(tmp_path, corpus, whole, monkeypatch):
    run, store = new_run(tmp_path / "run", corpus)
    with monkeypatch.context() as patch:

        def killed(*_):
            raise KeyboardInterrupt

        patch.setattr(Disk, "put_new_table", killed)
        with pytest.raises(KeyboardInterrupt):
            work_off(run, store, FakeModel(), A)
    assert store.leaves_out
    assert not store.finished()
    work_off(run, store, FakeModel())
    assert run.pending(store) == []
    assert parts(store) == whole


def test_no_footer_is_read_where_nothing_was_left_out(tmp_path, corpus, whole, monkeypatch):
    run, store = new_run(tmp_path / "run", corpus)
    work_off(run, store, FakeModel())
    monkeypatch.setattr(Disk, "read_footer", lambda place, name: pytest.fail("a footer was read"))
    assert run.pending(store) == []
    assert pending_rows(run, store).n_rows == 0
    assert not any(store.left_out(unit) for unit in run.units)


# --- what does not fit


def test_verify_tells_a_part_whose_metadata_does_not_fit(tmp_path, corpus):
    run, store = new_run(tmp_path / "run", corpus)
    work_off(run, store, FakeModel(), A)
    unit = unit_of_all(run)
    path = part_path(store, unit)
    good = path.read_bytes()
    table = pq.read_table(path)
    for names in (None, "[]", json.dumps([B]), json.dumps([A, B])):
        pq.write_table(table.replace_schema_metadata({"scorer": "fake"} | ({"left_out": names} if names else {})), path)
        (line,) = find_damage(run)
        assert line.startswith(f"{path} leaves out other rows than it says")
    for names in ("{", "3"):
        pq.write_table(table.replace_schema_metadata({"scorer": "fake", "left_out": names}), path)
        with pytest.raises(RunError, match="is damaged"):
            store.left_out(unit)
        assert len(find_damage(run)) == 1
    path.write_bytes(good)
    assert find_damage(run) == []
    n_parts = sum(bool(store.left_out(unit)) for unit in run.units)
    (store.place.directory / "left_out.json").unlink()
    assert len(find_damage(run)) == n_parts > 3


def test_a_scorer_with_more_columns_does_not_hide_what_only_the_other_has_scored(tmp_path, corpus):
    run, store = new_run(tmp_path / "run", corpus)
    work_off(run, store, FakeModel(), B)
    richer = run.scorer(
        "richer", {"kind": "base_model", "extras": ["n_bytes"]}, lambda: {"model": "fake", "token_budget": 64}
    )

    def commit(*left_out: str) -> None:
        for unit in run.units:
            table = store.read(unit)
            hidden = [name in left_out for name in table["generator"].to_pylist()]
            columns = {name: table[name].to_pylist() for name in table.column_names}
            columns["status"] = [
                "left_out" if out and own == "ok" else own for out, own in zip(hidden, columns["status"], strict=True)
            ]
            columns["n_bytes"] = [1] * table.num_rows
            richer.commit(
                unit,
                pa.table(columns, schema=richer.schema),
                completes=part_path(richer, unit).exists(),
            )

    commit(A)
    assert {own.name for own in run.current_scorers()} == {"fake", "richer"}
    commit()  # B is left out by both
    assert [own.name for own in run.current_scorers()] == ["richer"]
