"""llama.cpp itself, from the wheel of xllamacpp, whose library exports llama.cpp's C functions.

Its structures of parameters change from version to version. They are taken as llama.cpp fills them in, and a few fields are
set at their offsets; defaults that are not at their places mean another layout, and an error instead of a crash.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from planish.errors import InputError
from planish.rounding.ggml import TESTED, open_library

# llama_context_params: field → (offset, default)
FIELDS = {
    "n_ctx": (0, 512), "n_batch": (4, 2048), "n_ubatch": (8, 512), "n_seq_max": (12, 1), "n_threads": (28, 4),
    "n_threads_batch": (32, 4), "attention_type": (48, -1), "flash_attn_type": (52, -1), "type_k": (104, 1), "type_v": (108, 1),
}  # fmt: skip
OFF, ON, NO_VOCABULARY = 0, 1, 0
CACHES = {
    "f32": 0,
    "f16": 1,
    "q4_0": 2,
    "q4_1": 3,
    "q5_0": 6,
    "q5_1": 7,
    "q8_0": 8,
    "iq4_nl": 20,
}  # numbers of ggml's types


class Parameters(ctypes.Structure):
    """Room for llama_model_params or llama_context_params; both are passed in memory, so that what lies behind is ignored."""

    _fields_ = (("data", ctypes.c_int32 * 128),)


class Batch(ctypes.Structure):
    """llama_batch"""

    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.POINTER(ctypes.c_float)),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


_Log = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_ERROR, _SAID = 4, list[str]()  # what llama.cpp says of what failed
_LISTEN = _Log(lambda level, text, data: _SAID.append(text.decode(errors="replace")) if level == _ERROR else None)
_HANDLE = ctypes.c_void_p
SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "llama_log_set": (None, [_Log, ctypes.c_void_p]),
    "llama_backend_init": (None, []),
    "llama_model_default_params": (Parameters, []),
    "llama_context_default_params": (Parameters, []),
    "llama_model_load_from_file": (_HANDLE, [ctypes.c_char_p, Parameters]),
    "llama_model_free": (None, [_HANDLE]),
    "llama_model_get_vocab": (_HANDLE, [_HANDLE]),
    "llama_model_meta_val_str": (ctypes.c_int32, [_HANDLE, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t]),
    "llama_init_from_model": (_HANDLE, [_HANDLE, Parameters]),
    "llama_free": (None, [_HANDLE]),
    "llama_get_memory": (_HANDLE, [_HANDLE]),
    "llama_memory_clear": (None, [_HANDLE, ctypes.c_bool]),
    "llama_batch_init": (Batch, [ctypes.c_int32] * 3),
    "llama_batch_free": (None, [Batch]),
    "llama_decode": (ctypes.c_int32, [_HANDLE, Batch]),
    "llama_get_logits": (ctypes.POINTER(ctypes.c_float), [_HANDLE]),
    "llama_vocab_n_tokens": (ctypes.c_int32, [_HANDLE]),
    "llama_vocab_type": (ctypes.c_int32, [_HANDLE]),
    "llama_tokenize": (
        ctypes.c_int32,
        [
            _HANDLE,
            ctypes.c_char_p,
            ctypes.c_int32,
            ctypes.POINTER(ctypes.c_int32),
            ctypes.c_int32,
            ctypes.c_bool,
            ctypes.c_bool,
        ],
    ),
}


@cache
def load_library() -> Any:
    """The functions of llama.cpp, their signatures set."""
    library = open_library()
    try:
        for name, (result, arguments) in SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except AttributeError as error:
        raise InputError(
            f"xllamacpp holds no llama.cpp that can be called here ({error}); tested with {TESTED}"
        ) from None
    defaults = library.llama_context_default_params()
    if any(defaults.data[at // 4] != default for at, default in FIELDS.values()):
        raise InputError(f"this xllamacpp has parameters in another order; use xllamacpp=={TESTED}")
    library.llama_log_set(_LISTEN, None)
    library.llama_backend_init()
    return library


class LlamaCpp:
    """A GGUF file in llama.cpp. `cache`: type of keys and values, as of `-ctk` and `-ctv`; rounded ones need heads of a multiple of
    32 dimensions, and flash attention, which is off elsewhere."""

    tolerance = 1e-4  # of the largest logit, in fp32
    routed = False  # activations that a router reads are rounded

    def __init__(self, file: Path, context: int, threads: int = 1, cache: str = "f32"):
        self.library = load_library()
        _SAID.clear()
        self.model = self.library.llama_model_load_from_file(
            str(file).encode(), self.library.llama_model_default_params()
        )
        if not self.model:
            raise InputError(f"llama.cpp cannot load {file}: {_SAID[0].strip() if _SAID else 'it does not say why'}")
        self.vocabulary = self.library.llama_model_get_vocab(self.model)
        parameters = self.library.llama_context_default_params()
        settings = dict.fromkeys(("n_ctx", "n_batch", "n_ubatch"), context)
        settings |= dict.fromkeys(("n_threads", "n_threads_batch"), threads)
        flash = OFF if cache in ("f32", "f16") else ON
        settings |= {"flash_attn_type": flash, "type_k": CACHES[cache], "type_v": CACHES[cache]}
        for name, value in settings.items():
            parameters.data[FIELDS[name][0] // 4] = value
        self.context = self.library.llama_init_from_model(self.model, parameters)
        if not self.context:
            self.library.llama_model_free(self.model)
            raise InputError(f"llama.cpp cannot run {file} with a cache in {cache}")
        self.batch = self.library.llama_batch_init(context, 0, 1)
        self.size = self.library.llama_vocab_n_tokens(self.vocabulary)
        self.has_vocabulary = self.library.llama_vocab_type(self.vocabulary) != NO_VOCABULARY

    def __del__(self) -> None:
        if getattr(self, "context", None):
            self.library.llama_batch_free(self.batch)
            self.library.llama_free(self.context)
            self.library.llama_model_free(self.model)

    def metadata(self, key: str) -> str | None:
        """A value of the file's metadata as text."""
        text = ctypes.create_string_buffer(1 << 16)
        length = self.library.llama_model_meta_val_str(self.model, key.encode(), text, len(text))
        return None if length < 0 else text.value.decode()

    def decode(self, ids: list[int], at: int, last: bool = False) -> np.ndarray:
        """Logits (tokens, vocabulary) of ids at positions `at` and after, or (1, vocabulary) of the last one only."""
        batch = self.batch
        batch.n_tokens = len(ids)
        for n, token in enumerate(ids):
            batch.token[n], batch.pos[n], batch.n_seq_id[n] = token, at + n, 1
            batch.logits[n] = not last or n == len(ids) - 1
            batch.seq_id[n][0] = 0
        if status := self.library.llama_decode(self.context, batch):
            raise InputError(f"llama.cpp cannot run {len(ids)} tokens at position {at} (status {status})")
        rows = self.library.llama_get_logits(self.context)
        return np.ctypeslib.as_array(rows, shape=(1 if last else len(ids), self.size)).copy()

    def reset(self) -> None:
        """Forget all tokens."""
        self.library.llama_memory_clear(self.library.llama_get_memory(self.context), True)

    def logits(self, ids: Tensor) -> Tensor:
        """(tokens, vocabulary) fp32 for ids (tokens,)."""
        self.reset()
        return torch.from_numpy(self.decode(ids.tolist(), 0))

    def greedy(self, ids: Tensor, new_tokens: int) -> list[int]:
        """The next tokens, each the most likely one."""
        tokens = [int(self.logits(ids)[-1].argmax())]
        while len(tokens) < new_tokens:
            tokens.append(int(self.decode(tokens[-1:], len(ids) + len(tokens) - 1)[0].argmax()))
        return tokens

    def encode(self, text: str, special: bool = False, add: bool = False) -> list[int] | None:
        """Token ids, or None without a tokenizer. `special`: names of special tokens are these tokens; `add`: with what the
        tokenizer puts around a text."""
        if not self.has_vocabulary:
            return None
        raw = text.encode()
        ids = (ctypes.c_int32 * (len(raw) + 16))()
        count = self.library.llama_tokenize(self.vocabulary, raw, len(raw), ids, len(ids), add, special)
        return list(ids[:count])
