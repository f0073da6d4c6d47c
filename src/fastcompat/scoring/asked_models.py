"""Which models are to score a corpus, and how, as plain values: from them any process makes the same scorers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fastcompat.errors import UsageError
from fastcompat.scoring.losses import Scorer
from fastcompat.scoring.passes import Pass, passes_of
from fastcompat.scoring.portable import absolute, names_a_file
from fastcompat.scoring.rewards import RewardScorer
from fastcompat.scoring.scorer import ModelScorer

_OF_BOTH = ("device", "dtype", "token_budget", "deterministic", "memory", "memory_limit")


@dataclass(frozen=True, kw_only=True)
class AskedModels:
    """base, reward: hub ids or directories. device, dtype, token_budget, deterministic, memory, memory_limit: of all of
    them, as of `Scorer`.

    base_settings, reward_settings: what `Scorer` and `RewardScorer` take beside these. The `output` of reward models is
    for those that have it, and one of several must. Raises UsageError where there is no model.
    """

    base: Sequence[str] = ()
    reward: Sequence[str] = ()
    device: str = "auto"
    dtype: str = "auto"
    token_budget: int | None = None
    deterministic: bool = False
    memory: str = "auto"
    memory_limit: str | int | None = None
    base_settings: Mapping[str, Any] = field(default_factory=dict)
    reward_settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.base and not self.reward:
            raise UsageError("name at least one model: --base-model ID_OR_DIR for losses, --reward-model for rewards")
        twice = sorted({*self.base_settings, *self.reward_settings} & {*_OF_BOTH})
        if twice:
            raise UsageError(f"{', '.join(twice)}: give it once for all models, not among the settings of some")

    def scorers(self) -> list[ModelScorer]:
        """One a model. Raises ModelError, TemplateError or UsageError where one of them cannot score."""
        return [*self._bases(), *self._rewards()]

    def passes(self) -> list[Pass]:
        """The passes over the corpus that they need."""
        return passes_of(self._bases(), self._rewards())

    def elsewhere(self) -> AskedModels:
        """The same where others compute: this machine, which may have no GPU, is only to know whether they can.

        Raises UsageError for a device by number.
        """
        kind, _, number = self.device.partition(":")
        if number:
            raise UsageError(f"--device {self.device}: each worker has a GPU of its own; name the kind only, {kind}")
        return replace(self, device="cpu")

    def located(self) -> AskedModels:
        """The same for a process that works in another directory."""
        base_settings = dict(self.base_settings)
        if names_a_file(template := base_settings.get("template", "auto")):
            base_settings["template"] = absolute(template)
        base, reward = ([absolute(model) for model in models] for models in (self.base, self.reward))
        return replace(self, base=base, reward=reward, base_settings=base_settings)

    @property
    def _shared(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _OF_BOTH}

    def _bases(self) -> list[Scorer]:
        return [Scorer(model, **self._shared, **self.base_settings) for model in self.base]

    def _rewards(self) -> list[RewardScorer]:
        settings = self._shared | dict(self.reward_settings)
        output = settings.pop("output", None)
        scorers: list[RewardScorer] = []
        refusals: list[UsageError] = []
        for model in self.reward:
            try:
                scorers.append(RewardScorer(model, output=output, **settings))
            except UsageError as error:
                if output is None:
                    raise
                refusals.append(error)
                scorers.append(RewardScorer(model, **settings))  # raises where an output must be chosen
        if self.reward and len(refusals) == len(self.reward):
            raise refusals[0]
        return scorers
