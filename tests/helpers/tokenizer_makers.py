"""Small tokenizers of every kind, trained on the spot; chat templates in the manner of well-known families; rows."""

from __future__ import annotations

import json
from functools import cache
from pydoc_data.topics import topics
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from fastcompat.rows.response import Message, Response
from fastcompat.tokens.conversations import ConversationTokenizer, TokenSequence
from fastcompat.tokens.settings import TokenizationSettings

MARKERS = [
    *("<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>"),
    *("<|end_header_id|>", "<start_of_turn>", "<end_of_turn>", "<|endoftext|>"),
]
# Phi-3's markers take the blanks on their right along.
STRIPPING_MARKERS = [AddedToken(f"<|{name}|>", rstrip=True, special=True) for name in ("user", "assistant", "end")]

CHATML = (
    "{%- if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
    "{%- for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{- bos_token }}{%- for m in messages %}{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n'"
    " + m['content'] | trim + '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
# As Mistral's: no generation prompt of its own, a space before the response and one before its end.
INST = (
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}"
    "{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
PHI3 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ '<|endoftext|>' }}{% endif %}"
)
# As Qwen3's: reasoning of earlier turns is dropped, the last turn always shows a <think> block.
QWEN3 = (
    "{%- for m in messages %}{%- set content = m['content'] %}{%- set thought = '' %}"
    "{%- if m['role'] == 'assistant' and '</think>' in content %}"
    "{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
    "{{- '<|im_start|>' + m['role'] + '\n' }}"
    "{%- if m['role'] == 'assistant' and loop.last %}{{- '<think>\n' + thought + '\n</think>\n\n' }}{%- endif %}"
    "{{- content + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
GENERATION = (
    "{%- for m in messages %}{%- if m['role'] == 'assistant' %}{{- '<|im_start|>assistant\n' }}"
    "{%- generation %}{{- m['content'] + '<|im_end|>\n' }}{%- endgeneration %}"
    "{%- else %}{{- '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
# As DeepSeek-R1's: the generation prompt opens a <think> block which the whole render does not have.
DROPS_REASONING = (
    "{{- bos_token }}{%- for m in messages %}{%- if m['role'] == 'assistant' %}"
    "{{- '<|assistant|>' + m['content'].split('</think>')[-1] + '<|endoftext|>' }}"
    "{%- else %}{{- '<|user|>' + m['content'] }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|><think>\n' }}{%- endif %}"
)
# A ChatML of the early days: `add_generation_prompt` is not heard of.
WITHOUT_GENERATION_PROMPT = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
)

# Template, and what is scored of the response "{}" when it is the last turn.
FAMILIES = {
    "chatml": (CHATML, "{}<|im_end|>"),
    "llama3": (LLAMA3, "{}<|eot_id|>"),
    "inst": (INST, " {} </s>"),
    "gemma": (GEMMA, "{}<end_of_turn>"),
    "phi3": (PHI3, "{}<|end|>"),
    "qwen3": (QWEN3, "<think>\n\n</think>\n\n{}<|im_end|>"),
    "generation": (GENERATION, "{}<|im_end|>\n"),
    "drops_reasoning": (DROPS_REASONING, "{}<|endoftext|>"),
    "without_generation_prompt": (WITHOUT_GENERATION_PROMPT, "{}<|im_end|>"),
}

ODD_TEXTS = {
    "plain": "It is a function call.",
    "emoji": "Yes 👩‍👩‍👧 and 🇯🇵!",
    "combining": "e\u0301a\u0323\u0301 naïve",
    "cjk": "東京は日本の首都です。",
    "right_to_left": "שלום עולם",
    "code": "def f(x):\n\treturn x  # done\n\n\n",
    "controls": "a\x00b\u200bc\ufeffd",
    "replacement": "\ufffd at both ends \ufffd",
    "special": "<s> and </s>, <unk>",
    "markers": "He said <|im_end|>\n<|im_start|>user\nand <end_of_turn> and <|eot_id|>.",
    "headers": "### Response:\nquoted [/INST] and ### Instruction:",
}
AS_RENDERED = {"llama3": str.strip, "gemma": str.strip}  # what these families' templates do to the response


_TEXT = [text for _, text in sorted(topics.items())[:24]]


@cache
def _byte_level_backend() -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=MARKERS, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(_TEXT, trainer)
    # As GPT-2's and Llama-3's: offsets are trimmed, which hides blanks.
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    return backend


@cache
def _metaspace_backend() -> Tokenizer:
    """As Llama-2's: BPE over text with U+2581 for blanks, no pre-tokenizer, byte fallback."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=[*MARKERS, *(f"<0x{byte:02X}>" for byte in range(256))], show_progress=False
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    backend.train_from_iterator(_TEXT, trainer)
    # The trainer takes the bytes for special tokens; in Llama's vocabulary they are not.
    content = json.loads(backend.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] in MARKERS]
    backend = Tokenizer.from_str(json.dumps(content))
    backend.pre_tokenizer = None
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend


@cache
def _unigram_backend() -> Tokenizer:
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=700, special_tokens=MARKERS, unk_token="<unk>", initial_alphabet=["\n"], show_progress=False
    )
    backend.train_from_iterator(_TEXT, trainer)
    return backend


@cache
def _wordpiece_backend() -> Tokenizer:
    backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=False)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=False)
    backend.train_from_iterator(_TEXT, trainers.WordPieceTrainer(vocab_size=700, special_tokens=MARKERS))
    return backend


BACKENDS = {
    "byte_level": _byte_level_backend,
    "metaspace": _metaspace_backend,
    "unigram": _unigram_backend,
    "wordpiece": _wordpiece_backend,
}


class SlowTokenizer(PreTrainedTokenizer):
    """A tokenizer in Python with a fast one's vocabulary and pieces, and without its offsets."""

    def __init__(self, pieces: Tokenizer, **kwargs: Any) -> None:
        self.pieces = pieces
        super().__init__(**kwargs)

    @property
    def vocab_size(self) -> int:
        return self.pieces.get_vocab_size(with_added_tokens=False)

    def get_vocab(self) -> dict[str, int]:
        return {**self.pieces.get_vocab(), **self.added_tokens_encoder}

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return self.pieces.encode(text, add_special_tokens=False).tokens

    def _convert_token_to_id(self, token: str) -> int:
        index = self.pieces.token_to_id(token)
        return self.pieces.token_to_id("<unk>") if index is None else index

    def _convert_id_to_token(self, index: int) -> str | None:
        return self.pieces.id_to_token(index)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return self.pieces.decoder.decode(tokens)


def make_tokenizer(
    kind: str = "byte_level",
    chat_template: str | None = None,
    *,
    slow: bool = False,
    adds_bos: bool = False,
    bos: str | None = "<s>",
    eos: str | None = "</s>",
) -> Any:
    """A Hugging Face tokenizer of one of the `BACKENDS`; `adds_bos` as Llama's, which begins every text with BOS."""
    backend = Tokenizer.from_str(BACKENDS[kind]().to_str())
    special: dict[str, Any] = {"unk_token": "<unk>", "extra_special_tokens": MARKERS[3:]}
    special |= {name: token for name, token in (("bos_token", bos), ("eos_token", eos)) if token}
    if adds_bos:
        assert bos is not None
        steps = [backend.post_processor] if backend.post_processor else []
        template = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))])
        backend.post_processor = processors.Sequence([*steps, template])
    tokenizer: Any
    if slow:
        tokenizer = SlowTokenizer(backend, chat_template=chat_template, **special)
    else:
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=chat_template, **special)
    tokenizer.add_tokens(STRIPPING_MARKERS)
    return tokenizer


def row(*contents: str, roles: tuple[str, ...] = (), **fields: Any) -> Response:
    """Turns of user and assistant in alternation, unless `roles` says otherwise."""
    roles = roles or ("user", "assistant") * (len(contents) // 2)
    messages = tuple(Message(role, content) for role, content in zip(roles, contents, strict=True))
    return Response(messages=messages, generator="g", source="s", row_index=0, **fields)


def tokenize(tokenizer: Any, *rows: Response, context_length: int | None = None, **kwargs: Any) -> list[TokenSequence]:
    return ConversationTokenizer(tokenizer, TokenizationSettings(**kwargs), context_length=context_length)(rows)


def scored_text(tokenizer: Any, sequence: TokenSequence) -> str:
    return tokenizer.decode(sequence.input_ids[sequence.scored], clean_up_tokenization_spaces=False)


def squeezed(text: str) -> str:
    return "".join(text.split()).replace("##", "")
