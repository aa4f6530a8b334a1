"""OpenCLIP's own training loop on the demo's pairs: its reader, order, schedule and optimizer at the demo's shapes and recipe.

A peer of tools/compare_orders.py, which starts it with the interpreter of an environment of OpenCLIP's own, since its
reader is made for an older webdataset than dsclip's:

    python -m venv PEER && PEER/bin/pip install open_clip_torch==3.3.0 webdataset==0.2.86 pandas "transformers<5"
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip_train.main import main as open_clip_main
from safetensors.torch import save_file

from dsclip.engine.cpu_bf16 import speed_up_bf16
from dsclip.model.config import PRESETS

# The demo's recipe in OpenCLIP's words: recipes/demo.yaml and the clipping of ds_configs/zero3_bf16.json.
RECIPE = (
    "--lr 2e-3 --warmup 30 --wd 0.1 --beta1 0.9 --beta2 0.98 --eps 1e-6 --grad-clip-norm 1.0 --aug-cfg scale=(0.9,1.0)"
)
NAME = "dsclip-demo"


def model_config(tokenizer: Path, vocab_size: int) -> dict[str, Any]:
    """The preset `demo` as OpenCLIP writes it."""
    demo = PRESETS["demo"]
    vision = {
        "image_size": demo.image_size, "layers": demo.vision_layers, "width": demo.vision_width,
        "head_width": demo.vision_width // demo.vision_heads, "patch_size": demo.patch_size,
    }  # fmt: skip
    text = {
        "context_length": demo.context_length, "vocab_size": vocab_size, "width": demo.text_width,
        "heads": demo.text_heads, "layers": demo.text_layers, "hf_tokenizer_name": str(tokenizer),
    }  # fmt: skip
    return {"embed_dim": demo.embed_dim, "vision_cfg": vision, "text_cfg": text}


def train(
    out: Path, shards: str, tokenizer: Path, vocab_size: int, resampled: bool, seed: int, steps: int, batch: int, precision: str
) -> None:  # fmt: skip
    """Trains and leaves in `out` what OpenCLIP and dsclip read: weights, `open_clip_config.json`, tokenizer."""
    speed_up_bf16()
    config = model_config(tokenizer, vocab_size)
    shutil.rmtree(out, ignore_errors=True)
    (out / "models").mkdir(parents=True)
    (out / "models" / f"{NAME}.json").write_text(json.dumps(config), encoding="utf-8")
    open_clip.add_model_config(out / "models")
    open_clip_main([
        "--model", NAME, "--train-data", shards, "--dataset-type", "webdataset", "--train-num-samples", str(steps * batch),
        "--epochs", "1", "--batch-size", str(batch), "--workers", "1", "--seed", str(seed), "--precision", precision,
        "--device", "cuda" if torch.cuda.is_available() else "cpu", "--logs", str(out), "--name", "log",
        "--log-every-n-steps", "10", *RECIPE.split(), *(["--dataset-resampled"] if resampled else []),
    ])  # fmt: skip
    trained = torch.load(out / "log" / "checkpoints" / "epoch_1.pt", map_location="cpu", weights_only=True)
    weights = {name.removeprefix("module."): tensor.contiguous() for name, tensor in trained["state_dict"].items()}
    save_file(weights, out / "open_clip_model.safetensors")
    for file in tokenizer.iterdir():
        shutil.copy2(file, out / file.name)
    preprocess = {
        "mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD, "interpolation": "bicubic",
    }  # fmt: skip
    written = json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}, indent=2)
    (out / "open_clip_config.json").write_text(written, encoding="utf-8")  # last: a folder with it is whole


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    train(**given | {name: Path(given[name]) for name in ("out", "tokenizer")})
