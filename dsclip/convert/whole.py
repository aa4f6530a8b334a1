"""Any source as one whole model, as conversion writes it."""

from __future__ import annotations

from pathlib import Path

from dsclip.checkpoint import Checkpoint
from dsclip.convert.source import Source
from dsclip.data import load_tokenizer
from dsclip.data.decoding.tokenizer import Tokenizer
from dsclip.errors import UserError
from dsclip.model import ClipConfig


def whole_model(source: Source, tokenizer_folder: Path, tokenizer: str | None = None) -> Checkpoint:
    """The source's model. A dsclip checkpoint is that itself; of others, how they were trained isn't known.

    tokenizer_folder: where a tokenizer is written to, unless it is a checkpoint's own. tokenizer: folder or hub name, for a
    source that has none. Raises UserError for a tokenizer that doesn't fit the model.
    """
    if source.checkpoint is not None and tokenizer is None:
        return source.checkpoint
    spoken = tokenizer_of(source, tokenizer)
    config = source.config(spoken.eot_token_id)
    check_tokenizer(spoken, config, source)
    spoken.save(tokenizer_folder)
    recipe = {"data": {"train_shards": source.train_shards}} if source.train_shards else {}
    return Checkpoint(
        source.path, config, source.stored, source.scale, tokenizer_folder, 0, 0, recipe, source.logit_bias
    )


def tokenizer_of(source: Source, given: str | None) -> Tokenizer:
    """The tokenizer that was given, or the source's own. Raises UserError when there is neither."""
    if given is None and source.tokenizer_dir is None:
        raise UserError(f"{source.path} has no tokenizer with it; give the model's own with --tokenizer")
    return load_tokenizer(given or str(source.tokenizer_dir))


def check_tokenizer(tokenizer: Tokenizer, config: ClipConfig, source: Source) -> None:
    """Raises UserError when the model wasn't made for the tokenizer."""
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens and the model {config.vocab_size}; use the model's own"
        )
    if tokenizer.eot_token_id != config.eot_token_id:
        raise UserError(
            f"the tokenizer ends captions with token {tokenizer.eot_token_id} and {source.path} pools at token {config.eot_token_id}; "
            "use the model's own tokenizer (--tokenizer)"
        )
