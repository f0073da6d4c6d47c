"""Files of chosen responses: the conversations in input order, whole or not at all, read by trainers; their card."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command_line import succeed
from corpora import prepare_small_units, save_small_model, write_corpus, write_jsonl

from fastcompat.decisions.selection import selection, training_file
from fastcompat.decisions.selection.selection import METADATA_KEY, select
from fastcompat.decisions.selection.training_file import write_selection
from fastcompat.errors import RunError, UsageError
from fastcompat.rows.message import Message
from fastcompat.rows.response import from_table
from fastcompat.store.run import Run, open_run

N_PROMPTS = 30


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    """Several shards and units; a system turn, two languages, an empty response, duplicates and a bare response."""
    directory = tmp_path_factory.mktemp("selection")
    rows = []
    for p in range(N_PROMPTS):
        turns = [{"role": "system", "content": "Be “brief”.\u2028"}] if p % 3 == 0 else []
        turns.append({"role": "user", "content": f"Frage {p}: was heißt 猫? {'x' * (p * 37 % 211)}"})
        for g in range(4):
            answer = "" if (p, g) == (3, 0) else f'Antwort {p}-{min(g, 2)}\n\t"Katze" 🐈 {"y" * (p * g * 53 % 307)}'
            if g == 3:
                answer = rows[-1]["messages"][-1]["content"]
            rows.append({"messages": [*turns, {"role": "assistant", "content": answer}], "generator": f"g|{g}"})
    for k in range(3):
        write_jsonl(directory / f"part-{k}.jsonl", rows[k * 40 : (k + 1) * 40])
    run = prepare_small_units(directory / "run", directory, target_unit_chars=1500)
    assert len(run.units) > 3
    return run


@pytest.fixture(scope="module")
def scores(run) -> pa.Table:
    """Figures for the run's rows, in another order than they lie in its shards."""
    rows = [row for unit in run.units for row in from_table(run.unit_rows(unit))]
    rows.sort(key=lambda row: (row.source, row.row_index))
    draw = np.random.default_rng(0)
    loss = draw.integers(1, 6, len(rows)) / 2
    bad = [row.status != "ok" for row in rows]
    return pa.table(
        {
            "row_key": [row.row_key for row in rows],
            "prompt_id": [row.prompt_id for row in rows],
            "generator": [row.generator for row in rows],
            "base_model": ["org/base"] * len(rows),
            "reward_model": ["org/judge"] * len(rows),
            "n_tokens": pa.array([len(row.messages[-1].content) if row.messages else 0 for row in rows], pa.int32()),
            "loss": pa.array(loss, mask=np.array(bad)),
            "reward": pa.array(draw.integers(1, 9, len(rows)).astype(float), mask=np.array(bad)),
            "status": [str(row.status) for row in rows],
        }
    )


def messages_of(run: Run) -> dict[str, list[dict]]:
    return {
        row.row_key: [message.fields for message in row.messages]
        for unit in run.units
        for row in from_table(run.unit_rows(unit))
    }


def read_back(path: Path) -> list[dict]:
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in data.decode().split("\n")[:-1]]


@pytest.mark.parametrize("name", ["best.jsonl", "best.jsonl.gz", "best.parquet"])
@pytest.mark.parametrize("rows_at_once", [7, 20_000])
def test_a_file_has_the_conversations_in_input_order(tmp_path, run, scores, monkeypatch, name, rows_at_once):
    monkeypatch.setattr(training_file, "ROWS_AT_ONCE", rows_at_once)
    chosen = select(scores, top=2, drop_duplicates=False)
    path = tmp_path / "new" / name
    card = write_selection(run, chosen, path)
    assert sorted(file.name for file in path.parent.iterdir()) == sorted([name, f"{name}.md"])
    assert card == path.with_name(f"{name}.md")
    written, texts = read_back(path), messages_of(run)
    assert [row["row_key"] for row in written] == chosen["row_key"].to_pylist()
    for row, origin in zip(written, chosen.to_pylist(), strict=True):
        assert row["messages"] == texts[row["row_key"]]
        assert set(row) == {
            "messages", "prompt_id", "generator", "row_key", "n_tokens", "loss", "reward", "car", "rank"
        }  # fmt: skip
        assert all(row[column] == origin[column] for column in row if column != "messages")
    assert len(written) == 2 * N_PROMPTS


def test_a_run_tells_duplicates_by_its_texts(run, scores, monkeypatch):
    monkeypatch.setattr(Run, "scores", lambda self: scores)
    chosen = select(run, top=4)
    assert json.loads(chosen.schema.metadata[METADATA_KEY])["left_out"] == {
        "not scored: empty": 1,
        "equal to a better response to its prompt": N_PROMPTS,
    }
    texts = messages_of(run)
    responses = [(key, texts[key][-1]["content"]) for key in chosen["row_key"].to_pylist()]
    by_prompt = list(zip(chosen["prompt_id"].to_pylist(), (text for _, text in responses), strict=True))
    assert len(set(by_prompt)) == len(by_prompt)
    monkeypatch.setattr(selection, "_run_responses", None)  # not asked where one of a prompt is chosen
    assert select(run).num_rows == N_PROMPTS


def test_a_scored_run_from_files_to_training_data(tmp_path):
    """No figure is made up here: the losses are a model's, the run is that of the command line."""
    write_corpus(tmp_path / "corpus", generators=3, n_prompts=8)
    model = save_small_model(tmp_path / "model")
    succeed("score", tmp_path / "corpus", "-o", tmp_path / "run", "--base-model", model)
    run = open_run(tmp_path / "run")
    losses: dict[str, list[float]] = {}
    for row in run.scores().to_pylist():
        losses.setdefault(row["prompt_id"], []).append(row["loss"])
    card = write_selection(run, select(run, by="loss", top=2), tmp_path / "best.jsonl")
    rows = read_back(tmp_path / "best.jsonl")
    assert len(rows) == 16
    for row in rows:
        assert row["loss"] == sorted(losses[row["prompt_id"]])[row["rank"] - 1]
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
    assert f"base model: `{run.scores()['base_model'][0].as_py()}`" in card.read_text()
    with pytest.raises(UsageError, match=r"car needs reward: `fastcompat score .* --reward-model"):
        select(run)


def test_the_card_says_what_was_chosen_and_how(tmp_path, run, scores):
    chosen = select(scores, top=2, drop_duplicates=False, reward_shift=0.5, max_tokens=10_000)
    text = write_selection(run, chosen, tmp_path / "best.jsonl").read_text()
    for g in range(4):
        n = chosen["generator"].to_pylist().count(f"g|{g}")
        assert f"| g\\|{g} | 30 | {29 if g == 0 else 30} | {n} | {n / chosen.num_rows:.1%} |" in text
    for part in (
        "60 responses to 30 prompts, chosen of 120 responses to 30 prompts by fastcompat",
        "(reward + 0.5) / (1 + 3 x loss)",
        "base model: `org/base`",
        "reward model: `org/judge`",
        "max_tokens: 10000",
        "| not scored: empty | 1 |",
        "| not among the best 2 of its prompt | 59 |",
        run.generations[0].fingerprint,
        '"json", data_files="best.jsonl"',
    ):
        assert part in text, part
    assert "by turns" not in text
    assert "not scored yet" not in text
    blocks = text.split("```")
    (entry,) = (block.removeprefix("json") for block in blocks if block.startswith("json"))
    assert json.loads("{" + entry + "}")["best"]["columns"] == {"messages": "messages"}


def test_conversations_that_are_not_by_turns_are_counted():
    def conversation(roles: str) -> list[dict]:
        names = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
        return [{"role": names[role], "content": "x"} for role in roles]

    usual, unusual = ["ua", "sua", "uaua", "suaua"], ["a", "sa", "uua", "", "s", "uta", "uas", "ssua", "u", "aua"]
    type_ = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    table = pa.array([conversation(roles) for roles in [*usual, *unusual, *usual]], type_)
    assert training_file._count_unusual(table) == len(unusual)
    assert training_file._count_unusual(table.slice(2, 5)) == 3


def test_only_rows_of_the_run_that_select_chose_are_written(tmp_path, run, scores):
    chosen = select(scores)
    alien = pa.table({"row_key": ["other#0"], "prompt_id": ["p"], "loss": [1.0], "reward": [1.0]})
    numbered = chosen.set_column(chosen.column_names.index("row_key"), "row_key", pa.array(range(chosen.num_rows)))
    for rows, path, message in (
        (numbered, "best.jsonl", "'0' is no row of it"),
        (chosen, "best.csv", "must end in .jsonl, .jsonl.gz or .parquet"),
        (scores, "best.jsonl", "not chosen by select"),
        (chosen.slice(0, 0), "best.jsonl", "nothing to write"),
        (pa.concat_tables([chosen, chosen.slice(0, 1)]), "best.jsonl", "more than once"),
        (select(alien), "best.jsonl", "'other#0' is no row of it"),
    ):
        with pytest.raises(UsageError, match=message):
            write_selection(run, rows, tmp_path / path)
    assert not list(tmp_path.iterdir())
    some = chosen.filter(pa.array([k % 2 == 0 for k in range(chosen.num_rows)]))
    write_selection(run, some, tmp_path / "best.jsonl")
    assert len(read_back(tmp_path / "best.jsonl")) == some.num_rows


def test_a_path_may_be_text(tmp_path, run, scores):
    card = write_selection(run, select(scores), str(tmp_path / "best.parquet"))
    assert card == tmp_path / "best.parquet.md"
    assert pq.read_table(tmp_path / "best.parquet").num_rows == N_PROMPTS
    with pytest.raises(UsageError, match=r"best\.csv: the name must end in"):
        write_selection(run, select(scores), "best.csv")


def test_the_card_names_the_reference_and_counts_what_ifd_leaves_out(tmp_path, run, scores):
    other = scores.set_column(
        scores.column_names.index("base_model"), "base_model", pa.array(["org/ref"] * len(scores))
    )
    chosen = select(pa.concat_tables([scores, other]), by="excess_loss", base_model="org/base")
    text = write_selection(run, chosen, tmp_path / "excess.jsonl").read_text()
    assert "- base model: `org/base`" in text
    assert "- reference of `excess_loss`: `org/ref`" in text
    assert "excess_loss" in read_back(tmp_path / "excess.jsonl")[0]
    alone = pa.array([10.0] * len(scores))  # 1 nat a token: every loss above 1 is made harder by its prompt
    table = scores.append_column("unconditioned_nll_sum", alone)
    table = table.append_column("unconditioned_n_tokens", pa.array([10] * len(scores)))
    text = write_selection(run, select(table, by="ifd_ppl"), tmp_path / "ifd.jsonl").read_text()
    n = sum(loss is not None and loss > 1 for loss in scores["loss"].to_pylist())
    assert f"| ifd_ppl above 1: the prompt makes the response harder | {n} |" in text
    assert "reference of" not in text


@pytest.mark.parametrize("name", ["best.jsonl", "best.parquet"])
def test_what_cannot_be_written_whole_is_not_there(tmp_path, run, scores, monkeypatch, name):
    path = tmp_path / name
    path.write_text("before")

    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(training_file, "dataset_card", full_disk)
    with pytest.raises(RunError, match="No space left"):
        write_selection(run, select(scores), path)
    assert [file.name for file in tmp_path.iterdir()] == [name]
    assert path.read_text() == "before"


@pytest.mark.parametrize("name", ["best.jsonl", "best.jsonl.gz", "best.parquet"])
def test_datasets_reads_the_file(tmp_path, run, scores, name):
    chosen = select(scores)
    write_selection(run, chosen, tmp_path / name)
    kind = "parquet" if name.endswith("parquet") else "json"
    rows = datasets.load_dataset(
        kind, data_files=str(tmp_path / name), split="train", cache_dir=str(tmp_path / "cache")
    )
    texts = messages_of(run)
    assert [row["messages"] for row in rows] == [texts[key] for key in chosen["row_key"].to_pylist()]


def test_trl_trains_on_the_file_and_on_the_tokens_that_are_scored(tmp_path, run, scores):
    """`SFTTrainer` as the card says: its tokens of each conversation are those that a base model's loss is of."""
    import trl

    from fastcompat.demo import model_directory
    from fastcompat.tokens.conversations import ConversationTokenizer
    from fastcompat.tokens.settings import TokenizationSettings

    path = tmp_path / "best.jsonl"
    chosen = select(scores, budget=6)
    write_selection(run, chosen, path)
    rows = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    options = {"max_steps": 1, "use_cpu": True, "report_to": [], "save_strategy": "no", "max_length": None}
    arguments = trl.SFTConfig(output_dir=str(tmp_path / "trained"), per_device_train_batch_size=2, **options)
    trainer = trl.SFTTrainer(model=str(model_directory()), args=arguments, train_dataset=rows)
    by_key = {row.row_key: row for unit in run.units for row in from_table(run.unit_rows(unit))}
    tokenizer = ConversationTokenizer.from_pretrained(str(model_directory()), TokenizationSettings())
    sequences = tokenizer([by_key[key] for key in chosen["row_key"].to_pylist()])
    for row, own in zip(trainer.train_dataset, sequences, strict=True):
        assert row["input_ids"][: len(own.input_ids)] == own.input_ids.tolist()
        # The template's line break after the end of the turn: nothing is scored behind the marker.
        assert tokenizer.tokenizer.decode(row["input_ids"][len(own.input_ids) :]) in ("", "\n")
    assert np.isfinite(trainer.train().training_loss)


def test_the_card_notes_what_a_reader_might_miss(tmp_path, run, scores):
    status = ["truncated" if status == "ok" else status for status in scores["status"].to_pylist()]
    some = scores.set_column(scores.column_names.index("status"), "status", pa.array(status)).slice(0, 100)
    text = write_selection(run, select(some, by="loss", budget=3), tmp_path / "best.parquet").read_text()
    assert "20 responses of the run were not scored yet" in text
    assert "3 chosen responses were longer than the scorer's limit" in text
    assert "`loss` (lower is better)" in text
    assert "beta" not in text


def test_keys_of_turns_have_one_type_in_parquet() -> None:
    kinds = [
        training_file._common(None, 1),
        training_file._common(pa.int64(), 0.5),
        training_file._common(pa.bool_(), 1),
    ]
    assert kinds == [pa.int64(), pa.float64(), pa.string()]
    assert training_file._common(None, 2**70) == pa.string()
    assert training_file._common(pa.string(), {"a": 1}) == pa.string()
    form = training_file._ParquetForm(
        turn=pa.struct([("role", pa.string()), ("content", pa.string()), ("n", pa.string())]), has_tools=False
    )
    assert form._fields(Message("user", "a", '{"n":{"x":1}}')) == {"role": "user", "content": "a", "n": '{"x": 1}'}
    assert form._fields(Message("user", "a", '{"n":"t"}')) == {"role": "user", "content": "a", "n": "t"}
