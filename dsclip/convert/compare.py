"""What was written, compared with what it was made from: bit for bit where dsclip reads it, and by embeddings elsewhere."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate.utils import get_max_memory
from torch import Tensor

from dsclip.checkpoint import Checkpoint
from dsclip.convert.probe import probe_inputs
from dsclip.convert.source import open_source
from dsclip.convert.streamed import loaded_clip, spread_clip
from dsclip.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_read_back(model: Checkpoint, out: Path, dtype: torch.dtype) -> None:
    """Raises UserError when dsclip reads another configuration or another number from `out` than was written."""
    source = open_source(out)
    said = {name: getattr(model.config, name) for name in source.said}
    if source.said != said:
        raise UserError(f"{out}: its configuration reads back as {source.said}, not {said}; don't use it")
    for name, tensor in source.weights():
        if not torch.equal(tensor, model.state_dict[name].to(dtype)):
            raise UserError(f"{out}: {name} reads back otherwise than it was written; don't use it")
    scalars = (("logit scale", math.log(source.scale), math.log(model.logit_scale)), ("logit bias", source.logit_bias, model.logit_bias))  # fmt: skip
    for what, read, written in scalars:
        if _float32(read) != _float32(written):
            raise UserError(f"{out}: its {what} reads back as {read}, not {written}; don't use it")


def _float32(value: float | None) -> float | None:
    return None if value is None else float(torch.tensor(value))


@torch.no_grad()
def difference_in_transformers(model: Checkpoint, folder: Path, samples: int = 2) -> float:
    """Largest absolute difference between dsclip's float32 embeddings and those of the folder in `transformers`.

    One of the two models is in memory at a time, and only what fits of it.
    """
    c = model.config
    images, tokens = probe_inputs(c, c.eot_token_id, samples)  # with eos_token_id 2 it pools at the largest id
    with tempfile.TemporaryDirectory(prefix="dsclip-offload-") as offload:
        ours, _ = spread_clip(c, model.state_dict.items(), torch.float32, Path(offload) / "ours", gpus=False)
        image, text = ours(images, tokens)
        del ours
        theirs = _in_transformers(folder, Path(offload) / "theirs")
        output = theirs(input_ids=tokens, pixel_values=images)
    return _largest((image, output.image_embeds), (text, output.text_embeds))


def _in_transformers(folder: Path, offload: Path) -> PreTrainedModel:
    from transformers import AutoModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    memory = {"cpu": get_max_memory()["cpu"]}
    return AutoModel.from_pretrained(
        folder, dtype=torch.float32, device_map="auto", max_memory=memory, offload_folder=str(offload)
    ).eval()


@torch.no_grad()
def difference_in_openclip(model: Checkpoint, folder: Path, samples: int = 2) -> float | None:
    """Largest absolute difference between dsclip's float32 embeddings and those of the folder in OpenCLIP; None without it."""
    try:
        import open_clip
    except ImportError:
        return None
    c = model.config
    images, tokens = probe_inputs(c, c.eot_token_id, samples)  # OpenCLIP may pool at the largest id
    ours = loaded_clip(c, model.state_dict.items(), torch.device("cpu"), torch.float32)
    image, text = ours(images, tokens)
    del ours
    theirs = open_clip.create_model(f"local-dir:{folder}", precision="fp32").eval()
    return _largest(
        (image, theirs.encode_image(images, normalize=True)), (text, theirs.encode_text(tokens, normalize=True))
    )


def _largest(*pairs: tuple[Tensor, Tensor]) -> float:
    return max(float((ours - theirs).abs().max()) for ours, theirs in pairs)
