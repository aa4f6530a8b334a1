"""Data: from shards on disk to batches of uint8 images and token ids."""

from dsclip.data.batch import Batch, LoadReport
from dsclip.data.decoding.tokenizer import Tokenizer, load_tokenizer
from dsclip.data.evaluation.dataset import EvalDataset
from dsclip.data.evaluation.opening import build_eval_dataset
from dsclip.data.loader import build_loader, merge_states
from dsclip.data.shards.manifest import read_manifest
from dsclip.data.shards.specification import resolve_shards
from dsclip.data.shards.writer import ShardWriter

__all__ = [
    "Batch", "EvalDataset", "LoadReport", "ShardWriter", "Tokenizer", "build_eval_dataset", "build_loader", "load_tokenizer", "merge_states",
    "read_manifest", "resolve_shards",
]  # fmt: skip
