"""The settings of a study: one TOML file of some fifteen lines, strictly read.

    run = "my-run"                      # or inputs = ["answers"], files as of `fastcompat score`
    base_models = ["Qwen/Qwen2.5-0.5B"]
    generators = "all"                  # or names
    examples = 500                      # responses of each generator to train on, all to the same prompts
    held_out = 100                      # prompts that nothing is trained on
    seeds = [0, 1, 2]

    [training]
    epochs = 2
    learning_rate = 1e-5

    [[evaluations]]
    name = "reward"
    reward_model = "Skywork/Skywork-Reward-V2-Qwen3-0.6B"

Paths are those of the working directory, as of every command.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from fastcompat.errors import UsageError

OWN, ALL, EACH = "own", "all", "each"


@dataclass(frozen=True, kw_only=True)
class Training:
    """How every cell is trained. batch_tokens: of a step, at most, as long as no response is longer; max_length: longer
    responses are cut; lora_rank: None trains every weight; warm_up: share of the steps before the rate falls linearly;
    template: as of `Scorer`."""

    epochs: int = 1
    learning_rate: float = 1e-5
    batch_tokens: int = 8192
    max_length: int = 2048
    lora_rank: int | None = None
    warm_up: float = 0.03
    gradient_checkpointing: bool = False
    template: str = "auto"
    device: str = "auto"


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One evaluation: `name` is that of the table (`evaluations.EVALUATIONS`), `label` what outcomes call it.

    reward_model: of reward and win_rate. reference: the generator that win_rate compares with. on: whose held-out
    responses held_out_loss is of: "all", "own", "each" (an outcome a generator), or a generator; file: instead of them
    a reference set, or what exact_match asks. task, metric, limit: of lm_eval. max_new_tokens: of an answer.
    """

    name: str
    label: str = ""
    reward_model: str | None = None
    reference: str | None = None
    on: str | None = None
    file: str | None = None
    task: str | None = None
    metric: str | None = None
    limit: int | None = None
    max_new_tokens: int = 256


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A study's settings."""

    base_models: tuple[str, ...]
    examples: int
    held_out: int
    seeds: tuple[int, ...]
    evaluations: tuple[Evaluation, ...]
    run: str | None = None
    inputs: tuple[str, ...] = ()
    generators: tuple[str, ...] | None = None
    training: Training = field(default_factory=Training)


# What each evaluation needs, and may have beside `name` and `label`.
_ANSWERS = ("max_new_tokens",)
TAKES: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "reward": (("reward_model",), _ANSWERS),
    "win_rate": (("reward_model", "reference"), _ANSWERS),
    "held_out_loss": ((), ("on", "file")),
    "exact_match": (("file",), _ANSWERS),
    "constraints": ((), _ANSWERS),
    "lm_eval": (("task", "metric"), ("limit",)),
}


def read_settings(path: str | os.PathLike[str]) -> Settings:
    """Read a file of settings. UsageError for what is not known, with what is nearest, and for what lacks."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}); a study needs a file of settings") from error
    return settings_of(text, str(path))


def settings_of(text: str, path: str) -> Settings:
    """The settings that a text says; `path` is what messages call it."""
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path} is no TOML: {error}") from error
    for name in ("base_models", "seeds", "inputs"):
        if name in values and not isinstance(values[name], list):
            raise UsageError(f"{path}: {name} is a list, for example {name} = [{values[name]!r}]")
    evaluations = values.get("evaluations", [])
    if not isinstance(evaluations, list) or not evaluations:
        raise UsageError(f"{path}: no evaluation; write [[evaluations]] and a name: {', '.join(TAKES)}")
    training = values.get("training", {})
    if not isinstance(training, dict):
        raise UsageError(f"{path}: training is a table: [training], then epochs = 1 and so on")
    generators = values.get("generators", ALL)
    if isinstance(generators, str):
        generators = None if generators == ALL else [generators]
    settings = _read(
        Settings,
        values
        | {
            "training": _read(Training, training, f"{path}: [training]"),
            "evaluations": [_evaluation(item, f"{path}: evaluation {k}") for k, item in enumerate(evaluations, 1)],
            "generators": generators,
        },
        path,
    )
    _check(settings, path)
    return settings


def differences(old: Settings, new: Settings) -> list[str]:
    """What is not the same, a line each."""
    return [
        f"{one.name}: {getattr(old, one.name)!r}, now {getattr(new, one.name)!r}"
        for one in fields(Settings)
        if getattr(old, one.name) != getattr(new, one.name)
    ]


def _evaluation(item: Any, where: str) -> Evaluation:
    if not isinstance(item, dict):
        raise UsageError(f'{where} is a table: [[evaluations]], then name = "reward"')
    name = item.get("name")
    if not isinstance(name, str) or name not in TAKES:
        raise UsageError(f"{where}: {name!r} is none of {', '.join(TAKES)}{_nearest(str(name), TAKES)}")
    needed, allowed = TAKES[name]
    for key in item:
        if key not in (*needed, *allowed, "name", "label"):
            known = [*needed, *allowed, "label"]
            raise UsageError(f"{where}: {name} has no setting {key}; it has {', '.join(known)}{_nearest(key, known)}")
    if lacking := [key for key in needed if key not in item]:
        raise UsageError(f"{where}: {name} needs {', '.join(lacking)}")
    if "on" in item and "file" in item:
        raise UsageError(f"{where}: held_out_loss is on a generator's responses or on a file's: give one of them")
    if name == "held_out_loss" and "file" not in item:
        item = {"on": ALL} | item
    return _read(Evaluation, {"label": name} | item, where)


_Kind = TypeVar("_Kind", Settings, Training, Evaluation)
_NUMBERS: Mapping[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "int | None": (int,)}


def _read(kind: type[_Kind], values: Mapping[str, Any], where: str) -> _Kind:
    """A dataclass of a table's values, with their types checked."""
    known = {one.name: one for one in fields(kind)}
    for key in values:
        if key not in known:
            raise UsageError(f"{where}: no setting {key}; there are {', '.join(known)}{_nearest(key, known)}")
    made: dict[str, Any] = {}
    for name, one in known.items():
        if name not in values:
            if one.default is MISSING and one.default_factory is MISSING:
                raise UsageError(f"{where}: {name} is lacking")
            continue
        value, type_ = values[name], str(one.type)
        if value is None:
            continue
        if type_ in _NUMBERS:
            if isinstance(value, bool) or not isinstance(value, _NUMBERS[type_]):
                raise UsageError(f"{where}: {name} is {value!r}, not a number")
            value = float(values[name]) if type_ == "float" else value
        elif type_ == "bool" and not isinstance(value, bool):
            raise UsageError(f"{where}: {name} is {value!r}, not true or false")
        elif type_.startswith("str") and not isinstance(value, str):
            raise UsageError(f"{where}: {name} is {value!r}, not a text")
        elif type_.startswith("tuple"):
            inner = {"tuple[int": int, "tuple[str": str}.get(type_.partition(",")[0])
            wrong = [item for item in value if inner and (isinstance(item, bool) or not isinstance(item, inner))]
            if wrong:
                raise UsageError(f"{where}: {name} has {wrong[0]!r}")
            value = tuple(value)
        made[name] = value
    return kind(**made)


def _check(settings: Settings, path: str) -> None:
    if (settings.run is None) == (not settings.inputs):
        raise UsageError(f"{path}: a study is of a run or of inputs: give one of them")
    for name, values in (("base_models", settings.base_models), ("seeds", settings.seeds)):
        if not values or len(set(values)) < len(values):
            raise UsageError(f"{path}: {name} needs one or more, each once, got {list(values)}")
    if settings.generators is not None and len(set(settings.generators)) < max(2, len(settings.generators)):
        raise UsageError(f"{path}: generators needs two or more, each once, got {list(settings.generators)}")
    positive: Sequence[tuple[str, float]] = (
        ("examples", settings.examples),
        ("held_out", settings.held_out),
        ("epochs", settings.training.epochs),
        ("learning_rate", settings.training.learning_rate),
        ("batch_tokens", settings.training.batch_tokens),
        ("max_length", settings.training.max_length),
        ("lora_rank", 1 if settings.training.lora_rank is None else settings.training.lora_rank),
        *((f"max_new_tokens of {one.label}", one.max_new_tokens) for one in settings.evaluations),
    )
    for name, number in positive:
        if not number > 0:
            raise UsageError(f"{path}: {name} must be above 0, got {number}")
    labels = [one.label for one in settings.evaluations]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise UsageError(f"{path}: two evaluations are called {twice}; give one a label")


def _nearest(name: str, known: Any) -> str:
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {found[0]}?" if found else ""
