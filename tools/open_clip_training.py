"""OpenCLIP's own training loop on the demo's pairs: its reader, order, schedule and optimizer at the demo's shapes and recipe.

A peer of tools/compare_orders.py, which starts it with the interpreter of an environment of OpenCLIP's own, since its
reader is made for an older webdataset than dsclip's:

    python -m venv PEER && PEER/bin/pip install open_clip_torch==3.3.0 webdataset==0.2.86 pandas "transformers<5"
    PYTHONPATH=. PEER/bin/python tools/open_clip_training.py OUT --shards 'DIR/{00000..00007}.tar' --tokenizer DIR
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from dsclip.command_line import parser, run_tool

# The demo's recipe in OpenCLIP's words: recipes/demo.yaml and the clipping of ds_configs/zero3_bf16.json.
RECIPE = (
    "--lr 2e-3 --warmup 30 --wd 0.1 --beta1 0.9 --beta2 0.98 --eps 1e-6 --grad-clip-norm 1.0 --aug-cfg scale=(0.9,1.0)"
)
NAME = "dsclip-demo"


def model_config(tokenizer: Path) -> dict[str, Any]:
    """The preset `demo` as OpenCLIP writes it, with the tokenizer's vocabulary."""
    from transformers import AutoTokenizer

    from dsclip.model.presets import PRESETS

    demo = PRESETS["demo"]
    vision = {
        "image_size": demo.image_size, "layers": demo.vision_layers, "width": demo.vision_width,
        "head_width": demo.vision_width // demo.vision_heads, "patch_size": demo.patch_size,
    }  # fmt: skip
    text = {
        "context_length": demo.context_length, "vocab_size": len(AutoTokenizer.from_pretrained(tokenizer)),
        "width": demo.text_width, "heads": demo.text_heads, "layers": demo.text_layers, "hf_tokenizer_name": str(tokenizer),
    }  # fmt: skip
    return {"embed_dim": demo.embed_dim, "vision_cfg": vision, "text_cfg": text}


def train(a: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Trains and leaves in a.out what OpenCLIP and dsclip read: weights, `open_clip_config.json`, tokenizer."""
    import open_clip
    import torch
    from open_clip_train.main import main as open_clip_main
    from safetensors.torch import save_file

    from dsclip.engine.cpu_bf16 import speed_up_bf16

    speed_up_bf16()
    config, out = model_config(a.tokenizer), a.out
    shutil.rmtree(out, ignore_errors=True)
    (out / "models").mkdir(parents=True)
    (out / "models" / f"{NAME}.json").write_text(json.dumps(config), encoding="utf-8")
    open_clip.add_model_config(out / "models")
    open_clip_main([
        "--model", NAME, "--train-data", a.shards, "--dataset-type", "webdataset", "--train-num-samples", str(a.steps * a.batch),
        "--epochs", "1", "--batch-size", str(a.batch), "--workers", "1", "--seed", str(a.seed), "--precision", a.precision,
        "--device", "cuda" if torch.cuda.is_available() else "cpu", "--logs", str(out), "--name", "log",
        "--log-every-n-steps", "10", *RECIPE.split(), *(["--dataset-resampled"] if a.resampled else []),
    ])  # fmt: skip
    trained = torch.load(out / "log" / "checkpoints" / "epoch_1.pt", map_location="cpu", weights_only=True)
    weights = {name.removeprefix("module."): tensor.contiguous() for name, tensor in trained["state_dict"].items()}
    save_file(weights, out / "open_clip_model.safetensors")
    for file in a.tokenizer.iterdir():
        shutil.copy2(file, out / file.name)
    preprocess = {
        "mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD, "interpolation": "bicubic",
    }  # fmt: skip
    written = json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}, indent=2)
    (out / "open_clip_config.json").write_text(written, encoding="utf-8")  # last: a folder with it is whole
    return {"out": str(out)}, f"{out} is an OpenCLIP model"


def main() -> None:
    """Parses, trains, exits."""
    p = parser(
        "Trains the demo's model with OpenCLIP's own loop.",
        "PYTHONPATH=. PEER/bin/python tools/open_clip_training.py OUT --shards 'DIR/{00000..00007}.tar' --tokenizer DIR",
    )
    p.add_argument("out", metavar="OUT", type=Path, help="folder to write; what is in it goes")
    p.add_argument("--shards", required=True, help="as OpenCLIP's --train-data")
    p.add_argument("--tokenizer", required=True, type=Path, help="folder of the demo's tokenizer")
    p.add_argument("--resampled", action="store_true", help="OpenCLIP's --dataset-resampled")
    p.add_argument("--seed", type=int, default=0, help="(default: 0)")
    p.add_argument("--steps", type=int, default=500, help="(default: 500)")
    p.add_argument("--batch", type=int, default=256, help="(default: 256)")
    p.add_argument("--precision", choices=["fp32", "amp_bf16"], default="fp32", help="(default: fp32)")
    sys.exit(run_tool(train, p.parse_args()))


if __name__ == "__main__":
    main()
