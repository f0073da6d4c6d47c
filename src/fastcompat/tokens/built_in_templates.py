"""Templates by name: those that come along, for tokenizers that have none of their own and for who wants another
layout, and those in files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fastcompat.errors import TemplateError

# What an assistant thought stands before its text in the tags of DeepSeek-R1 and Qwen3; its calls stand after it, and
# the tools before everything, in those of Hermes, which Qwen took over.
_SAID = """\
{%- macro said(message) -%}
{%- if message['reasoning_content'] and message['role'] == 'assistant' -%}
{{- '<think>\\n' + message['reasoning_content'] + '\\n</think>\\n\\n' -}}
{%- endif -%}
{%- if message['content'] is string -%}{{- message['content'] -}}
{%- elif message['content'] is not none -%}{{- message['content'] | tojson -}}{%- endif -%}
{%- for call in message['tool_calls'] or [] -%}
{%- if message['content'] or not loop.first -%}{{- '\\n' -}}{%- endif -%}
{%- set call = call['function'] or call -%}
{{- '<tool_call>\\n{"name": ' + (call['name'] | tojson) + ', "arguments": ' -}}
{%- if call['arguments'] is string -%}{{- call['arguments'] if call['arguments'] | trim else '{}' -}}
{%- else -%}{{- call['arguments'] | tojson -}}{%- endif -%}
{{- '}\\n</tool_call>' -}}
{%- endfor -%}
{%- endmacro -%}
{%- macro listed(tools) -%}
{{- 'Functions that can be called, within <tool_call> tags:\\n<tools>' -}}
{%- for tool in tools -%}{{- '\\n' + (tool | tojson) -}}{%- endfor -%}
{{- '\\n</tools>' -}}
{%- endmacro -%}
"""

# Plain text for base models that have never seen a chat: prompt, blank line, response, end of sequence.
_PLAIN = """\
{%- for message in messages -%}
{{- message['content'] -}}
{%- if message['role'] == 'assistant' -%}{{- eos_token -}}{%- endif -%}
{%- if not loop.last or add_generation_prompt -%}{{- '\\n\\n' -}}{%- endif -%}
{%- endfor -%}
"""

# ChatML, the format of OpenAI's chat models as Qwen and others adopted it; no default system message.
_CHATML = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""

# Stanford Alpaca's prompt (github.com/tatsu-lab/stanford_alpaca). A system message takes the preamble's place.
_ALPACA = """\
{%- if messages and messages[0]['role'] == 'system' -%}
{{- messages[0]['content'] -}}
{%- else -%}
{{- 'Below is an instruction that describes a task. ' -}}
{{- 'Write a response that appropriately completes the request.' -}}
{%- endif -%}
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{{- '\\n\\n### Response:\\n' + message['content'] -}}{{- eos_token -}}
{%- elif message['role'] == 'user' -%}
{{- '\\n\\n### Instruction:\\n' + message['content'] -}}
{%- elif message['role'] != 'system' -%}
{{- '\\n\\n### Input:\\n' + message['content'] -}}
{%- elif not loop.first -%}
{{- '\\n\\n' + message['content'] -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '\\n\\n### Response:\\n' -}}{%- endif -%}
"""

_TEXTS = {"chatml": _CHATML, "alpaca": _ALPACA, "plain": _PLAIN}
# Where the tools stand: before everything, in a system turn or as text.
_TOOLS = {
    "chatml": "{%- if tools -%}{{- '<|im_start|>system\\n' + listed(tools) + '<|im_end|>\\n' -}}{%- endif -%}\n",
    **dict.fromkeys(("alpaca", "plain"), "{%- if tools -%}{{- listed(tools) + '\\n\\n' -}}{%- endif -%}\n"),
}
BUILT_IN_TEMPLATES: Mapping[str, str] = {
    name: _SAID + _TOOLS[name] + text.replace("message['content']", "said(message)") for name, text in _TEXTS.items()
}
# What a fingerprint has of them: conversations of texts alone are what they were before there was more to say.
IDENTITIES: Mapping[str, str] = {BUILT_IN_TEMPLATES[name]: text for name, text in _TEXTS.items()}


def template_source(name: str, own_template: str | None) -> tuple[str, str]:
    """Jinja text and description of `name`: auto, a built-in template, or the path of a Jinja file.

    `own_template` is the tokenizer's chat template, if it has one. Raises `TemplateError` for an unreadable file.
    """
    if name == "auto":
        if own_template is not None:
            return own_template, "the tokenizer's own chat template"
        return BUILT_IN_TEMPLATES["plain"], "plain (the tokenizer has no chat template)"
    if name in BUILT_IN_TEMPLATES:
        return BUILT_IN_TEMPLATES[name], f"{name} (built in)"
    try:
        return Path(name).read_text(encoding="utf-8"), f"the Jinja file {name}"
    except FileNotFoundError:
        choices = ", ".join(["auto", *BUILT_IN_TEMPLATES])
        raise TemplateError(f"No template {name!r}: give one of {choices}, or the path of a Jinja file.") from None
    except OSError as error:
        raise TemplateError(f"The template file {name!r} cannot be read: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise TemplateError(f"The template file {name!r} is not UTF-8 text (line {line}).") from error
