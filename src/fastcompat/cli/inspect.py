"""`fastcompat inspect`: rows of a corpus as a model's tokenizer reads them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastcompat.cli.display import console
from fastcompat.cli.options import (
    Bos,
    Carried,
    Map,
    Masks,
    MaxLength,
    ReadOutRule,
    Reasoning,
    Template,
    TemplateOption,
    TokenIds,
    Tokenizer,
    Tools,
    TurnMasks,
    Turns,
    parse_template_options,
)
from fastcompat.errors import UsageError

if TYPE_CHECKING:
    from fastcompat.cli.inspection import AnySequence, AnyTokenizer
    from fastcompat.rows.response import Response

# Rows that are tokenised at once while those of a status are looked for.
_AT_ONCE = 256


def inspect(
    inputs: Annotated[list[str], typer.Argument(metavar="INPUT...", help="Files, directories, globs or hf:// ids.")],
    base_model: Annotated[
        str | None, typer.Option("--base-model", metavar="ID_OR_DIR", help="Shows which tokens are scored.")
    ] = None,
    reward_model: Annotated[
        str | None, typer.Option("--reward-model", metavar="ID_OR_DIR", help="Shows where the reward is read.")
    ] = None,
    row: Annotated[
        list[int] | None,
        typer.Option(min=0, help="Which response, counted from 0 over all files. Repeatable.", show_default="0"),
    ] = None,
    generator: Annotated[str | None, typer.Option(metavar="NAME", help="Only this generator's responses.")] = None,
    status: Annotated[
        str | None, typer.Option(metavar="STATUS", help="Only responses of this status: ok, template, empty ...")
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="How many of those that --generator and --status leave.")] = 1,
    mapping: Map = None,
    template: Template = "auto",
    turns: Annotated[Turns, typer.Option(help="The assistant turns that are scored.")] = Turns.last,
    score_eos: Annotated[bool, typer.Option(help="Score the end-of-turn token too.")] = True,
    bos: Annotated[Bos, typer.Option(help="auto, one or none.")] = Bos.auto,
    max_length: MaxLength = None,
    template_option: TemplateOption = None,
    reasoning: Reasoning = Carried.keep,
    tools: Tools = Carried.keep,
    turn_masks: TurnMasks = Masks.honour,
    token_ids: Tokenizer = TokenIds.file,
    read_out: Annotated[
        ReadOutRule, typer.Option("--reward-read-out", help="The token at which a reward is read.")
    ] = ReadOutRule.auto,
    ids: Annotated[bool, typer.Option("--ids", help="Also list the token ids.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
) -> None:
    """Show rows, their tokens, and which of them are scored, or where a reward model reads.

    Without --row the first row, or the first --rows of those that --generator and --status leave.
    """
    from fastcompat.cli.inspection import render_inspection
    from fastcompat.corpus import iter_responses
    from fastcompat.corpus.formats import parse_overrides
    from fastcompat.rows.status import Status

    if (base_model is None) == (reward_model is None):
        raise UsageError("name one model: --base-model ID_OR_DIR or --reward-model ID_OR_DIR")
    if row and (generator is not None or status is not None):
        raise UsageError("--row names rows by number: leave out --generator and --status, or --row")
    if status is not None and status not in list(Status):
        raise UsageError(f"--status {status} is not one of {', '.join(Status)}")
    responses = iter_responses(inputs, overrides=parse_overrides(mapping or []))
    tokenizer: AnyTokenizer
    if base_model is not None:
        tokenizer = _base_tokenizer(
            base_model,
            revision,
            template=template,
            turns=turns.value,
            score_eos=score_eos,
            bos=bos.value,
            max_length=max_length,
            template_options=parse_template_options(template_option or []),
            reasoning=reasoning.value,
            tools=tools.value,
            turn_masks=turn_masks.value,
            token_ids=token_ids.value,
        )
    else:
        assert reward_model is not None
        tokenizer = _reward_tokenizer(
            reward_model,
            revision,
            read_out.value,
            bos=bos.value,
            max_length=max_length,
            reasoning=reasoning.value,
            tools=tools.value,
            token_ids=token_ids.value,
        )
    found: Iterable[tuple[Response, AnySequence]]
    if row or (generator is None and status is None):
        chosen = _numbered(responses, row or [*range(rows)], inputs)
        found = zip(chosen, _sequences(tokenizer, chosen), strict=True)
    else:
        found = islice(_fitting(responses, tokenizer, generator, status, inputs), rows)
    for number, (response, sequence) in enumerate(found):
        if number:
            console.rule(style="dim")
        console.print(render_inspection(response, sequence, tokenizer, ids=ids))


def _sequences(tokenizer: AnyTokenizer, responses: list[Response]) -> list[AnySequence]:
    return [*tokenizer(responses)]


def _numbered(responses: Iterable[Response], numbers: list[int], inputs: list[str]) -> list[Response]:
    """The rows of these numbers, in their order."""
    wanted = set(numbers)
    there = {n: response for n, response in enumerate(islice(responses, max(numbers) + 1)) if n in wanted}
    if missing := sorted(wanted - there.keys()):
        raise UsageError(f"{' '.join(inputs)} has no row {missing[0]}: rows are counted from 0")
    return [there[number] for number in numbers]


def _fitting(
    responses: Iterable[Response],
    tokenizer: AnyTokenizer,
    generator: str | None,
    status: str | None,
    inputs: list[str],
) -> Iterator[tuple[Response, AnySequence]]:
    """The rows of a generator and of a status, with their sequences. UsageError, with what there is, for none."""
    generators: Counter[str] = Counter()
    statuses: Counter[str] = Counter()
    n_found = 0
    source = iter(responses)
    while batch := list(islice(source, _AT_ONCE)):
        generators.update(response.generator for response in batch)
        own = [response for response in batch if generator in (None, response.generator)]
        for response, sequence in zip(own, _sequences(tokenizer, own), strict=True):
            statuses[str(sequence.status)] += 1
            if status in (None, str(sequence.status)):
                n_found += 1
                yield response, sequence
    if n_found:
        return
    if generator is not None and generator not in generators:
        names = ", ".join(name for name, _ in generators.most_common(8))
        raise UsageError(f"{' '.join(inputs)} has no generator {generator}; there are {names}")
    there = ", ".join(f"{name} {count:,}" for name, count in statuses.most_common())
    raise UsageError(f"{' '.join(inputs)} has no response of status {status}; there are {there or 'none'}")


def _base_tokenizer(model: str, revision: str | None, **settings: Any) -> AnyTokenizer:
    from fastcompat.models.configuration import load_config, model_lengths
    from fastcompat.tokens.conversations import ConversationTokenizer
    from fastcompat.tokens.settings import TokenizationSettings

    context_length, _ = model_lengths(load_config(model, revision))
    return ConversationTokenizer.from_pretrained(
        model, TokenizationSettings(**settings), revision=revision, context_length=context_length
    )


def _reward_tokenizer(model: str, revision: str | None, read_out: str, **settings: Any) -> AnyTokenizer:
    from fastcompat.models.configuration import load_config, model_lengths
    from fastcompat.models.loading import describe
    from fastcompat.tokens.reward import RewardTokenizer

    config = load_config(model, revision)
    head, _ = describe(model, config, revision, read_out=read_out)  # type: ignore[arg-type]  # checked by the option
    context_length, _ = model_lengths(config)
    return RewardTokenizer.from_pretrained(
        model, head.read_out, revision=revision, context_length=context_length, **settings
    )
