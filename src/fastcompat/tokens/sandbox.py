"""jinja's sandbox with short ways to what chat templates read: a message's fields, a text's methods, a loop's state.

The sandbox asks of each attribute whether it is safe, which takes half of the time of a render. For plain dicts and
texts, loops and namespaces the answer follows from the name alone; all else goes the sandbox's own way.
"""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from typing import Any

# Methods that every text has, which give texts, lists of texts, numbers or truth values and change nothing.
_OF_TEXTS = {
    *("startswith", "endswith", "strip", "lstrip", "rstrip", "split", "rsplit", "splitlines", "partition"),
    *("rpartition", "replace", "removeprefix", "removesuffix", "upper", "lower", "title", "capitalize", "find"),
    *("rfind", "index", "count", "isdigit", "isalpha", "isspace", "join"),
}
_OF_DICTS = frozenset(dir(dict))
_PLAIN = frozenset({str, int, bool, float, type(None), list, dict, tuple})
_ABSENT = object()


def compiled(source: str, variables: Mapping[str, Any]) -> Any:
    """The template that transformers compiles from `source`, with the short ways: `render(messages=..., tools=None,
    documents=None, add_generation_prompt=..., **variables)` is what `render_jinja_template` gives for messages of plain
    texts. None where it would do more, for these variables or in another version."""
    from transformers.utils import chat_template_utils

    compile_template = getattr(chat_template_utils, "_compile_jinja_template", None)
    own = signature(chat_template_utils.render_jinja_template).parameters
    if compile_template is None or variables.keys() & own.keys() or not _is_plain(dict(variables)):
        return None
    try:
        template = compile_template(source)
    except Exception:  # each row tells
        return None
    if "getattr" not in vars(template.environment):  # it keeps what it has compiled
        template.environment.getattr = _short_getattr(template.environment)
    return template


def _is_plain(value: Any) -> bool:
    """Whether transformers hands a value to a template as it is."""
    if type(value) is dict:
        return all(map(_is_plain, value)) and all(map(_is_plain, value.values()))
    return all(map(_is_plain, value)) if type(value) in (list, tuple) else type(value) in _PLAIN


def _short_getattr(environment: Any) -> Any:
    from jinja2.runtime import LoopContext
    from jinja2.utils import Namespace

    asked = environment.getattr  # of the class

    def attribute_of(value: Any, name: str) -> Any:
        kind = type(value)
        if kind is dict:
            if name not in _OF_DICTS:
                return value[name] if name in value else environment.undefined(obj=value, name=name)
        elif kind is str:
            if name in _OF_TEXTS:
                return getattr(value, name)
        elif (kind is LoopContext or isinstance(value, Namespace)) and not name.startswith("_"):
            found = getattr(value, name, _ABSENT)
            if type(found) in _PLAIN:
                return found
        return asked(value, name)

    return attribute_of
