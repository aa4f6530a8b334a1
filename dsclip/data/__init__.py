"""Data: from shards on disk to batches of uint8 images and token ids."""

from dsclip.data.eval_dataset import EvalDataset, build_eval_dataset
from dsclip.data.loader import build_loader, merge_states
from dsclip.data.shards import ShardWriter, read_manifest, resolve_shards
from dsclip.data.tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "EvalDataset", "ShardWriter", "Tokenizer", "build_eval_dataset", "build_loader", "load_tokenizer", "merge_states",
    "read_manifest", "resolve_shards",
]  # fmt: skip
