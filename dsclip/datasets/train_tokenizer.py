"""Trains a small byte-pair tokenizer of CLIP's kind on captions, for data without a tokenizer of their own."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from dsclip.errors import UserError

BEGIN, END = "<|startoftext|>", "<|endoftext|>"
BASE_TOKENS = 2 * 256 + 2  # each byte within a word and at its end, begin and end token


def train_tokenizer(sentences: Iterable[str], folder: Path, vocab_size: int) -> None:
    """Writes a folder that `transformers` loads as CLIPTokenizer; the same for the same set of sentences.

    The vocabulary is laid out as CLIP's: bytes, bytes that end a word, merges, begin, end. Every text can be encoded.
    """
    from tokenizers import pre_tokenizers
    from transformers import CLIPTokenizer

    if vocab_size < BASE_TOKENS:
        raise UserError(
            f"a vocabulary of {vocab_size} tokens is too small; {BASE_TOKENS} are needed to encode every text"
        )
    # The trainer alone leaves out bytes that no training word ends with, and encodes those as the end token.
    trained = CLIPTokenizer().train_new_from_iterator(sorted(set(sentences)), vocab_size, show_progress=False)
    merges = [tuple(pair) for pair in json.loads(trained.backend_tokenizer.to_str())["model"]["merges"]]
    merges = merges[: vocab_size - BASE_TOKENS]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [
        *alphabet,
        *(letter + "</w>" for letter in alphabet),
        *dict.fromkeys(a + b for a, b in merges),
        BEGIN,
        END,
    ]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    CLIPTokenizer(vocab=vocabulary, merges=merges).save_pretrained(str(folder))
