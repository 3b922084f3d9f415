"""How byte-level tokenizers split text before merging, by llama.cpp's names (`tokenizer.ggml.pre`).

Regular expressions are applied one after the other, each to the pieces that the ones before left; matches and what lies
between them are pieces. They are the ones of the models' own tokenizer.json where that is known; llama.cpp's equal them,
written without what its regular expressions lack.
"""

from __future__ import annotations

import re

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_REST_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"[^\r\n\p{L}\p{N}]?"
_TEKKEN = rf"{_WORDS}{_UPPER}*{_LOWER}+|{_WORDS}{_UPPER}+{_LOWER}*|\p{{N}}|{_REST_SLASH}"
_GPT4O = rf"{_WORDS}{_UPPER}*{_LOWER}+{_SUFFIX}?|{_WORDS}{_UPPER}+{_LOWER}*{_SUFFIX}?|\p{{N}}{{1,3}}|{_REST_SLASH}"
_DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")

_GROUPS: tuple[tuple[tuple[str, ...], str], ...] = (  # the first name is the one that is written
    ((_LLAMA3,), "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano"),
    ((_LLAMA3,), "dbrx smaug-bpe chatglm-bpe glm4"),
    ((_QWEN2,), "qwen2 deepseek-r1-qwen stablelm2 megrez kormo f2llmv2 hunyuan solar-open grok-2"),
    ((_GPT2,), "gpt-2 phi-2 mpt olmo jais trillion granite-docling exaone4 gigachat a.x-4.0 mellum"),
    ((r"\p{N}", _GPT2), "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2"),
    ((_TEKKEN,), "tekken"),
    ((_GPT4O,), "gpt-4o llama4 kanana2 minimax-m2"),
    ((r"\p{N}{1,3}", r"[一-龥぀-ゟ゠-ヿ]+", _DEEPSEEK3), "deepseek-v3 hunyuan-dense joyai-llm"),
    (_DEFAULT, "default"),
)
SPLITS: dict[str, tuple[str, ...]] = {name: regexes for regexes, names in _GROUPS for name in names.split()}
WHOLE_WORDS = {"tekken", *_GROUPS[0][1].split()}  # a piece that is a token is not merged
ADDS_BOS = WHOLE_WORDS  # … and the first token is BOS unless the file says otherwise


PHI3 = re.compile("phi-?3", re.IGNORECASE)  # in a file's name: control tokens take the white space behind them, but
PLAIN = (
    "<unk>",
    "<s>",
    "<|endoftext|>",
)  # not these, which llama.cpp does not load such a file without, nor without </s>


def name_split(regexes: tuple[str, ...], whole_words: bool = False) -> str | None:
    """llama.cpp's name of a way to split, or None."""
    found = [name for name, known in SPLITS.items() if known == regexes]
    return next((n for n in found if (n in WHOLE_WORDS) == whole_words), found[0] if found else None)
