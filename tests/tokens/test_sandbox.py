"""The short ways through jinja's sandbox give what the sandbox gives, and refuse what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
from transformers.utils.chat_template_utils import _cached_compile_jinja_template

from fastcompat.tokens.sandbox import compiled

MESSAGES = [{"role": "user", "content": " Say {0}! "}, {"role": "assistant", "content": "<think>\n</think>\nSo."}]
EXPRESSIONS = [
    *("m.role", "m.content.strip().split('!')[0]", "m.missing is defined", "m.missing", "m.items() | list", "m.keys"),
    *("m.get('role')", "m.content.format(3)", "m.content.format_map({'0': 1})", "m['content'].upper()", "m.content.x"),
    *(
        "m.content.__class__",
        "m.__class__.__mro__",
        "m.content.encode('utf-8')",
        "m.update({'role': 'x'})",
        "loop.first",
    ),
    *(
        "m.pop('role')",
        "messages.append(1)",
        "messages.index",
        "loop.index0 ~ loop.last ~ loop.length",
        "loop.previtem",
    ),
    *(
        "loop._length",
        "loop.cycle('a', 'b')",
        "ns.seen ~ ns.absent",
        "ns.f",
        "ns._x",
        "ns.__class__",
        "bos_token.lower()",
    ),
    *(
        "'{0.__class__}'.format(m)",
        "raise_exception('no')",
        "m.content.split('</think>')[-1].lstrip('\\n')",
        "range(3)[1]",
    ),
]


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_an_expression_is_what_the_sandbox_makes_of_it(expression: str) -> None:
    source = (
        "{% set ns = namespace(seen=0, f='{0}'.format) %}{% for m in messages %}{% set ns.seen = ns.seen + 1 %}"
        "[{{ " + expression + " }}]{% endfor %}"
    )
    variables = {"bos_token": "<S>"}
    short = compiled(source, variables)
    whole = _cached_compile_jinja_template(source)
    assert "getattr" in vars(short.environment)
    assert "getattr" not in vars(whole.environment)
    assert outcome(short, variables) == outcome(whole, variables)


def outcome(template: Any, variables: dict[str, Any]) -> str:
    messages = [dict(message) for message in MESSAGES]
    try:
        text: str = template.render(messages=messages, tools=None, documents=None, **variables)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    assert messages == MESSAGES
    return text.split(" at 0x")[0]


def test_variables_that_transformers_changes_are_left_to_it() -> None:
    class Word(str):
        pass

    assert compiled("{{ messages }}", {"a": [1, {"b": None}]}) is not None
    assert compiled("{{ messages }}", {"a": Word("x")}) is None
    assert compiled("{{ messages }}", {"a": [object()]}) is None
    assert compiled("{{ messages }}", {"continue_final_message": True}) is None
