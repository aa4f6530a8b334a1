"""HuggingFace tokenizers, reduced to what training needs: captions in, fixed-length token ids out."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsclip.embedded import embedded_folder
from dsclip.errors import UserError
from dsclip.files import sha256


class Tokenizer:
    """A CLIP-style tokenizer: begin token, caption, end token, padding; the end token survives truncation."""

    def __init__(self, hf_tokenizer: Any):
        self._hf = hf_tokenizer
        backend = getattr(hf_tokenizer, "backend_tokenizer", None)
        # Each call sets these, and they are saved with the rest: what is saved must not depend on the last call.
        self._as_loaded = None if backend is None else (backend.truncation, backend.padding)

    def __call__(self, captions: list[str], context_length: int) -> Tensor:
        """Token ids [n, context_length] int64 of n captions."""
        if not captions:
            return torch.zeros(0, context_length, dtype=torch.int64)
        encoded = self._hf(captions, padding="max_length", truncation=True, max_length=context_length)
        return torch.tensor(encoded["input_ids"], dtype=torch.int64)

    @property
    def vocab_size(self) -> int:
        """Rows of the token embedding: the largest id plus one."""
        return int(max(self._hf.get_vocab().values())) + 1

    @property
    def eot_token_id(self) -> int:
        """The end token, whose position the text tower pools."""
        return int(self._hf.eos_token_id)

    def sha256(self) -> str:
        """Of the vocabulary, the merges and all that is done to a text; in slow tokenizers of the vocabulary and special tokens."""
        backend = getattr(self._hf, "backend_tokenizer", None)
        if backend is not None:
            content = json.loads(backend.to_str())
            content.update(truncation=None, padding=None)  # as the last call had them
        else:
            content = {
                "vocabulary": self._hf.get_vocab(),
                "special": {k: str(v) for k, v in self._hf.special_tokens_map.items()},
            }
        return sha256(json.dumps(content, sort_keys=True).encode())

    def save(self, folder: Path) -> None:
        """Writes a folder that `transformers` and `load_tokenizer` read; truncation and padding are those that were loaded."""
        tokenizer = self._hf
        if self._as_loaded is not None:
            tokenizer = copy.deepcopy(tokenizer)
            backend, (truncation, padding) = tokenizer.backend_tokenizer, self._as_loaded
            backend.no_truncation() if truncation is None else backend.enable_truncation(**truncation)
            backend.no_padding() if padding is None else backend.enable_padding(**padding)
        tokenizer.save_pretrained(str(folder))


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer in a local folder, of a hub model, or of the embedded data set (`demo`). Raises UserError."""
    if embedded := embedded_folder(name):
        name = str(embedded / "tokenizer")
    if not os.path.isdir(name) and (os.path.exists(name) or name.startswith((".", "/", "~")) or name.count("/") != 1):
        raise UserError(f"no tokenizer at {name}; {_ADVICE}")
    from transformers import AutoTokenizer

    try:
        hf_tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # transformers raises OSError, ValueError and whatever its hub client raises
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"tokenizer {name} can't be loaded ({reason}); {_ADVICE}") from error
    return _checked(hf_tokenizer, name)


_ADVICE = "give a folder with tokenizer.json, or a hub name such as openai/clip-vit-base-patch32 and a network"


def _checked(hf_tokenizer: Any, name: str) -> Tokenizer:
    if hf_tokenizer.eos_token_id is None:
        raise UserError(f"tokenizer {name} has no end token; CLIP's text tower pools there. Use a CLIP tokenizer.")
    if hf_tokenizer.pad_token_id is None:
        hf_tokenizer.pad_token = hf_tokenizer.eos_token
    tokenizer = Tokenizer(hf_tokenizer)
    if tokenizer.eot_token_id not in tokenizer(["a test"], 16)[0].tolist():
        raise UserError(f"tokenizer {name} does not end captions with {hf_tokenizer.eos_token}; use a CLIP tokenizer")
    return tokenizer
