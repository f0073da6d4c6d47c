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
{{- call['arguments'] if call['arguments'] is string else (call['arguments'] | tojson) -}}
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
_PLAIN = (
    _SAID
    + """\
{%- if tools -%}{{- listed(tools) + '\\n\\n' -}}{%- endif -%}
{%- for message in messages -%}
{{- said(message) -}}
{%- if message['role'] == 'assistant' -%}{{- eos_token -}}{%- endif -%}
{%- if not loop.last or add_generation_prompt -%}{{- '\\n\\n' -}}{%- endif -%}
{%- endfor -%}
"""
)

# ChatML, the format of OpenAI's chat models as Qwen and others adopted it; no default system message.
_CHATML = (
    _SAID
    + """\
{%- if tools -%}{{- '<|im_start|>system\\n' + listed(tools) + '<|im_end|>\\n' -}}{%- endif -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' + said(message) + '<|im_end|>' + '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
)

# Stanford Alpaca's prompt (github.com/tatsu-lab/stanford_alpaca). A system message takes the preamble's place.
_ALPACA = (
    _SAID
    + """\
{%- if messages and messages[0]['role'] == 'system' -%}
{{- messages[0]['content'] -}}
{%- else -%}
{{- 'Below is an instruction that describes a task. ' -}}
{{- 'Write a response that appropriately completes the request.' -}}
{%- endif -%}
{%- if tools -%}{{- '\\n\\n' + listed(tools) -}}{%- endif -%}
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{{- '\\n\\n### Response:\\n' + said(message) -}}{{- eos_token -}}
{%- elif message['role'] == 'user' -%}
{{- '\\n\\n### Instruction:\\n' + said(message) -}}
{%- elif message['role'] != 'system' -%}
{{- '\\n\\n### Input:\\n' + said(message) -}}
{%- elif not loop.first -%}
{{- '\\n\\n' + said(message) -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '\\n\\n### Response:\\n' -}}{%- endif -%}
"""
)

BUILT_IN_TEMPLATES: Mapping[str, str] = {"chatml": _CHATML, "alpaca": _ALPACA, "plain": _PLAIN}


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
