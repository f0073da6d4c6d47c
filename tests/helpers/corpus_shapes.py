"""One small corpus in every shape and container that fastcompat reads; each ends in the same normalised rows."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

Records = list[dict[str, Any]]
# (generator, ((role, content), ...)): what a row must be; the generator None stands for the file's own name.
Row = tuple[str | None, tuple[tuple[str, str], ...]]

PROMPTS = ("What is two and two?", "Übersetze „cat“ 🐈", 'Write\nthree\nlines\twith a \\ and a "quote".')
GENERATORS = ("llama-3", "Qwen/Qwen2.5")


def reply(generator: str, prompt: str) -> str:
    """The response of a generator to a prompt."""
    return f"{generator} says: {prompt[::-1]}"


PAIRS = [(prompt, generator) for prompt in PROMPTS for generator in GENERATORS]


def _rows(*, generator: Callable[[str], str | None] = lambda g: g, system: str = "") -> list[Row]:
    first = (("system", system),) if system else ()
    return [(generator(g), (*first, ("user", p), ("assistant", reply(g, p)))) for p, g in PAIRS]


def _turns(prompt: str, generator: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply(generator, prompt)}]


def _dialect(prompt: str, generator: str, human: str, machine: str) -> list[dict[str, str]]:
    return [{"from": human, "value": prompt}, {"from": machine, "value": reply(generator, prompt)}]


def _side(prompt: str, of: Callable[[str, str], Any]) -> dict[str, Any]:
    return {"chosen": of(prompt, GENERATORS[0]), "rejected": of(prompt, GENERATORS[1])}


def _text(prompt: str, generator: str) -> str:
    return reply(generator, prompt)


def _hh(prompt: str, generator: str) -> str:
    return f"\n\nHuman: {prompt}\n\nAssistant: {reply(generator, prompt)}"


def _answer_turn(prompt: str, generator: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": reply(generator, prompt)}]


def _parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text[:3]}, {"type": "text", "text": text[3:]}]


_SIDES = dict(zip(GENERATORS, ("chosen", "rejected"), strict=True))
_MODELS = dict(zip(("chosen_model", "rejected_model"), GENERATORS, strict=True))
_DASHED_MODELS = dict(zip(("chosen-model", "rejected-model"), GENERATORS, strict=True))

SHAPES: dict[str, tuple[Records, list[Row]]] = {
    "messages": ([{"messages": _turns(p, g), "model": g} for p, g in PAIRS], _rows()),
    "messages role/text": (
        [{"messages": [{"role": t["role"], "text": t["content"]} for t in _turns(p, g)]} for p, g in PAIRS],
        _rows(generator=lambda g: None),
    ),
    "messages with system column": (
        [{"system": "Be brief.", "messages": _turns(p, g), "generator": g} for p, g in PAIRS],
        _rows(system="Be brief."),
    ),
    "messages with text parts": (
        [
            {"messages": [{"role": t["role"], "content": _parts(t["content"])} for t in _turns(p, g)], "model_name": g}
            for p, g in PAIRS
        ],
        _rows(),
    ),
    "conversations": (
        [{"conversations": _dialect(p, g, "human", "gpt"), "source_model": g} for p, g in PAIRS],
        _rows(),
    ),
    "conversations with system": (
        [
            {"id": i, "system": "Sei nett.", "conversations": _dialect(p, g, "user", "chatgpt")}
            for i, (p, g) in enumerate(PAIRS)
        ],
        _rows(generator=lambda g: None, system="Sei nett."),
    ),
    "prompt + response": ([{"prompt": p, "response": reply(g, p), "generator": g} for p, g in PAIRS], _rows()),
    "prompt + completion": (
        [{"completion": reply(g, p), "prompt": p} for p, g in PAIRS],
        _rows(generator=lambda g: None),
    ),
    "question + answer": ([{"question": p, "answer": reply(g, p), "model": g} for p, g in PAIRS], _rows()),
    "prompt + completion, conversational": (
        [{"prompt": _turns(p, g)[:1], "completion": _answer_turn(p, g), "model": g} for p, g in PAIRS],
        _rows(),
    ),
    "instruction + output": ([{"instruction": p, "output": reply(g, p), "model": g} for p, g in PAIRS], _rows()),
    "instruction + input + output": (
        [
            {"instruction": p[:5], "input": p[5:], "output": reply(g, p), "system_prompt": "S", "generator": g}
            for p, g in PAIRS
        ],
        [(g, (("system", "S"), ("user", f"{p[:5]}\n\n{p[5:]}"), ("assistant", reply(g, p)))) for p, g in PAIRS],
    ),
    "instruction + empty input + response": (
        [{"instruction": p, "input": "", "response": reply(g, p), "generator": g} for p, g in PAIRS],
        _rows(),
    ),
    "completions (UltraFeedback)": (
        [
            {
                "source": "evol",
                "instruction": p,
                "models": list(GENERATORS),
                "completions": [
                    {"annotations": {"honesty": {"Rating": "4"}}, "model": g, "response": reply(g, p), "score": 7.5}
                    for g in GENERATORS
                ],
            }
            for p in PROMPTS
        ],
        _rows(),
    ),
    "generations (distilabel)": (
        [
            {
                "instruction": p,
                "generations": [reply(g, p) for g in GENERATORS],
                "generation_models": list(GENERATORS),
            }
            for p in PROMPTS
        ],
        _rows(),
    ),
    "generations of one model": (
        [{"prompt": p, "generations": [reply(g, p) for g in GENERATORS], "model_name": "m"} for p in PROMPTS],
        _rows(generator=lambda g: "m"),
    ),
    "struct per generator (Magpie zoo)": (
        [
            {"uuid": str(i), "instruction": p}
            | {g: {"content": reply(g, p), "skywork": 1.5, "armorm": 0.1, "fsfairx": -2.0} for g in GENERATORS}
            for i, p in enumerate(PROMPTS)
        ],
        _rows(),
    ),
    "chosen/rejected texts": ([{"prompt": p, **_side(p, _text)} for p in PROMPTS], _rows(generator=_SIDES.get)),
    "chosen/rejected with models": ([{"prompt": p, **_side(p, _text), **_MODELS} for p in PROMPTS], _rows()),
    "chosen/rejected conversations": ([{**_side(p, _turns), **_DASHED_MODELS} for p in PROMPTS], _rows()),
    "chosen/rejected conversations and prompt": (
        [{"prompt": p, "prompt_id": "x", "messages": _turns(p, GENERATORS[0]), **_side(p, _turns)} for p in PROMPTS],
        _rows(generator=_SIDES.get),
    ),
    "chosen/rejected answers to a conversation": (
        [{"prompt": _turns(p, "")[:1], **_side(p, _answer_turn)} for p in PROMPTS],
        _rows(generator=_SIDES.get),
    ),
    "chosen/rejected HH": ([_side(p, _hh) for p in PROMPTS], _rows(generator=_SIDES.get)),
}


# --- containers: each writes records below a directory and gives the input to name, and the generator of its file


def lines(records: Records) -> bytes:
    """JSON lines."""
    return b"".join(json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in records)


def zstd(data: bytes) -> bytes:
    """One zstd frame."""
    return bytes(pa.Codec("zstd").compress(data, asbytes=True))


def _file(name: str, content: Callable[[Records], bytes]) -> Callable[[Records, Path], tuple[str, str]]:
    def write(records: Records, directory: Path) -> tuple[str, str]:
        (directory / name).write_bytes(content(records))
        return name, name.split(".")[0]

    return write


def _arrow(records: Records, new: Any) -> bytes:
    table = pa.Table.from_pylist(records)
    sink = pa.BufferOutputStream()
    with new(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return bytes(sink.getvalue())


def arrow_file(records: Records) -> bytes:
    """Arrow IPC with a footer, two records to a batch."""
    return _arrow(records, pa.ipc.new_file)


def arrow_stream(records: Records) -> bytes:
    """Arrow IPC stream, two records to a batch."""
    return _arrow(records, pa.ipc.new_stream)


def parquet(records: Records) -> bytes:
    """Parquet with two records to a row group."""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(records), sink, row_group_size=2)
    return bytes(sink.getvalue())


def _directory(records: Records, directory: Path) -> tuple[str, str]:
    (directory / "many" / "deep").mkdir(parents=True)
    (directory / "many" / "deep" / "own.jsonl").write_bytes(lines(records))
    (directory / "many" / "README.md").write_text("not a corpus")
    (directory / "many" / ".hidden.jsonl").write_text("{}")
    (directory / "many" / "dataset_info.json").write_text("{}")
    return "many", "own"


def _glob(records: Records, directory: Path) -> tuple[str, str]:
    (directory / "a.b").mkdir()
    (directory / "a.b" / "own.jsonl.gz").write_bytes(gzip.compress(lines(records), mtime=0))
    (directory / "a.b" / "notes.txt").write_text("not a corpus")
    return "a.*/*", "own"


def saved_dataset(records: Records, directory: Path) -> None:
    """What `datasets.Dataset.save_to_disk` leaves: streams, their list, bookkeeping and a cache of something else."""
    directory.mkdir(parents=True)
    middle = len(records) // 2
    names = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    for name, part in zip(names, (records[:middle], records[middle:]), strict=True):
        (directory / name).write_bytes(arrow_stream(part))
    (directory / "cache-0123456789abcdef.arrow").write_bytes(arrow_stream([{"tokens": 1}]))
    (directory / "dataset_info.json").write_text('{"features": {}}')
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "f", "_split": None}
    (directory / "state.json").write_text(json.dumps(state))


def _saved_dataset(records: Records, directory: Path) -> tuple[str, str]:
    saved_dataset(records, directory / "own")
    return "own", "own"


def _saved_splits(records: Records, directory: Path) -> tuple[str, str]:
    # Names that sort in the order of the records; a split that is just "train" names no generator.
    saved_dataset(records[: len(records) // 2 + 1], directory / "own" / "test")
    saved_dataset(records[len(records) // 2 + 1 :], directory / "own" / "train")
    (directory / "own" / "dataset_dict.json").write_text('{"splits": ["test", "train"]}')
    return "own", "own"


CONTAINERS: dict[str, Callable[[Records, Path], tuple[str, str]]] = {
    "jsonl": _file("own.jsonl", lines),
    "jsonl, escaped, with BOM and CRLF": _file(
        "own.jsonl",
        lambda records: b"\xef\xbb\xbf" + b"\r\n\r\n".join(json.dumps(record).encode() for record in records),
    ),
    "ndjson": _file("own.ndjson", lines),
    "jsonl.gz": _file("own.jsonl.gz", lambda records: gzip.compress(lines(records), mtime=0)),
    "jsonl.gz of several members": _file(
        "own.jsonl.gz",
        lambda records: b"".join(gzip.compress(lines([record]), mtime=0) for record in records) + b"\0" * 512,
    ),
    "jsonl.zst": _file("own.jsonl.zst", lambda records: zstd(lines(records))),
    "jsonl.zst of several frames": _file("own.jsonl.zst", lambda records: b"".join(zstd(lines([r])) for r in records)),
    "gzip named jsonl": _file("own.jsonl", lambda records: gzip.compress(lines(records), mtime=0)),
    "json array": _file("own.json", lambda records: json.dumps(records, ensure_ascii=False).encode()),
    "json array, indented": _file("own.json", lambda records: json.dumps(records, indent=2).encode()),
    "json array, gz": _file(
        "own.json.gz", lambda records: gzip.compress(json.dumps(records, indent=1).encode(), mtime=0)
    ),
    "json array named jsonl": _file("own.jsonl", lambda records: json.dumps(records).encode()),
    "json objects, indented": _file(
        "own.json", lambda records: b"\n".join(json.dumps(record, indent=2).encode() for record in records)
    ),
    "json lines named json": _file("own.json", lines),
    "parquet": _file("own.parquet", parquet),
    "parquet named arrow": _file("own.arrow", parquet),
    "arrow file": _file("own.arrow", arrow_file),
    "arrow stream": _file("own.arrow", arrow_stream),
    "feather": _file("own.feather", arrow_file),
    "directory": _directory,
    "glob": _glob,
    "datasets directory": _saved_dataset,
    "datasets directory with splits": _saved_splits,
}
