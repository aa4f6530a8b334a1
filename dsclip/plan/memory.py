"""Bytes of one rank at the peak of an optimizer step.

What tensors take is counted; what the C library's heap adds on a CPU, and what DeepSpeed's reductions take for a
moment, was measured (tests/test_plan.py compares the sum with a real step). Symbols: P parameters, W ranks, n samples
of a micro-batch, c samples of a chunk.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from dsclip.config.deepspeed import DsConfig
from dsclip.config.schema import LossSection
from dsclip.losses.tile_size import CPU_ENTRIES, CUDA_ENTRIES
from dsclip.model import ClipConfig
from dsclip.model.attention import CPU_PLAIN_TOKENS

BF16, FP32 = 2, 4
# Freed and taken again, a CPU process's heap holds more than its tensors: measured with glibc 2.36, chunks of 16.
HEAP = {"none": 1.4, "selective": 1.4, "full": 2.0, "offload": 2.0}


@dataclass(frozen=True)
class Tower:
    """What counts of a tower's blocks, for one sample."""

    layers: int
    tokens: int
    width: int
    heads: int
    mlp_width: int
    first: int  # numbers that the first layer saves
    attention: str = "auto"
    qk_norm: bool = False
    layer_scale: bool = False
    routed: int = 0  # of the layers, those with experts
    experts: int = 0
    per_token: int = 1

    def block(self, checkpointing: str, device: str) -> int:
        """Numbers that one block saves for backward. none: 8·W + 2·M a token, see `Block`; plain attention its scores."""
        if checkpointing == "none":
            numbers = 8 * self.width + 2 * self.mlp_width + self._scores(device) + self._normalised()
            return self.tokens * numbers
        if checkpointing == "selective":  # on a GPU blocks are compiled, and keep what `SELECTIVE_BUDGET` allows
            widths, extra = (5, 2 * self.heads) if device == "cuda" else (3, 0)
            return self.tokens * (widths * self.width + self.mlp_width + extra)
        return 0 if checkpointing == "offload" and device == "cuda" else self.tokens * self.width

    def _scores(self, device: str) -> int:
        """Numbers that attention itself saves a token. Fused kernels: the softmax's sums, in float32."""
        if self.attention == "math":  # in float32, and so are query, key and value
            return 2 * self.heads * self.tokens + 3 * self.width
        plain = self.attention == "auto" and device == "cpu" and self.tokens <= CPU_PLAIN_TOKENS
        return self.heads * (self.tokens if plain else 2)

    def _normalised(self) -> int:
        """Numbers that QK-norm saves a token: queries, keys and values once more, means and deviations in float32."""
        return self.qk_norm * (3 * self.width + 8 * self.heads)

    def saved(self, checkpointing: str, device: str) -> int:
        """Numbers that the tower saves for backward."""
        first = self.first if checkpointing == "none" else 0
        blocks = self.layers * self.block(checkpointing, device) + self.routed * self._experts(checkpointing)
        return blocks + first

    def _experts(self, checkpointing: str) -> int:
        """Numbers that a routed block saves more than another, for captions without padding.

        none: the router's input in float32 in the place of the experts' own, their inputs and outputs for each slot, further hidden
        layers; gates, orders and what was chosen, in float32 and int64.
        """
        k = self.per_token
        if checkpointing == "none":
            return self.tokens * (
                self.width + 2 * k * self.width + 2 * (k - 1) * self.mlp_width + 2 * self.experts + 15 * k
            )
        return self.tokens * ((k - 1) * self.mlp_width + 6 * k) if checkpointing == "selective" else 0

    def scaled_weights(self) -> int:
        """Numbers of a block's last weights times their layer scale, which a chunk's graph holds; of the largest block."""
        return self.layer_scale * self.width * (self.width + max(1, self.experts) * self.mlp_width)

    def all_scaled_weights(self) -> int:
        """The same of all blocks."""
        mlps = self.layers + self.routed * max(0, self.experts - 1)
        return self.layer_scale * self.width * (self.layers * self.width + mlps * self.mlp_width)

    def working(self, checkpointing: str, device: str) -> int:
        """Numbers that backward of one block needs beside what was saved: gradients, and what is computed again."""
        again = 0 if checkpointing == "none" else self.block("none", device) + bool(self.routed) * self._experts("none")
        offloaded = checkpointing == "offload" and device == "cuda"
        ahead = self.tokens * self.width if offloaded else 0  # the next chunk is fetched meanwhile
        slots = bool(self.routed) * 2 * (self.per_token * self.width + (self.per_token - 1) * self.mlp_width)
        return again + ahead + self.tokens * (4 * self.width + 2 * self.mlp_width + slots)


def towers(config: ClipConfig, text_tokens: int | None, locked: tuple[int, int] = (0, 0)) -> tuple[Tower, Tower]:
    """What has a graph of the image and the text tower. text_tokens: of the longest caption of a chunk; None: the context length.

    locked: so many of the first layers of each (the embedding, then blocks) have none.
    """
    c = config
    visible = c.visible_patches
    text = c.context_length if c.text_pool == "last" else min(text_tokens or c.context_length, c.context_length)
    both = (
        Tower(c.vision_layers, c.computed_tokens, c.vision_width, c.vision_heads, c.vision_mlp_width, visible * 3 * c.patch_size**2,
              c.attention, c.vision_qk_norm, c.vision_layer_scale is not None),
        Tower(c.text_layers, text, c.text_width, c.text_heads, c.text_mlp_width, 0, c.attention, c.text_qk_norm,
              c.text_layer_scale is not None, c.routed_blocks, c.text_experts, c.text_experts_per_token),
    )  # fmt: skip
    image, texts = (_above(tower, n) for tower, n in zip(both, locked, strict=True))
    return image, replace(texts, routed=sum(map(c.routed, range(c.text_layers - texts.layers, c.text_layers))))


def _above(tower: Tower, locked: int) -> Tower:
    """The tower without its first layers."""
    if not locked:
        return tower
    return replace(tower, layers=max(0, tower.layers + 1 - locked), first=0)


@dataclass(frozen=True)
class Encoded:
    """What goes through the towers for each sample: images and texts, views among them, and hard negatives."""

    images: int = 1
    texts: int = 1
    hard: int = 0

    @classmethod
    def of(cls, loss: LossSection, further_views: tuple[str, ...]) -> Encoded:
        """further_views: by name, such as image_2."""
        images = sum(view.startswith("image") for view in further_views)
        return cls(1 + images, 1 + len(further_views) - images, 0 if loss.hard_negatives == "none" else 1)


def activation_bytes(
    config: ClipConfig, micro_batch: int, chunk: int, checkpointing: str, device: str, text_tokens: int | None,
    encoded: Encoded, locked: tuple[int, int] = (0, 0),
) -> tuple[float, float]:  # fmt: skip
    """(saved for backward, working set of one block). locked: see `towers`."""
    image, text = towers(config, text_tokens, locked)
    images, texts = encoded.images, encoded.texts + encoded.hard
    saved = images * image.saved(checkpointing, device) + texts * text.saved(checkpointing, device)
    saved *= micro_batch * BF16
    # Graphs that exist at a time; each holds scaled weights of its own.
    chunked = chunk < micro_batch  # into so many images, of any view, and their share of captions
    graphs = 0 if checkpointing != "none" else math.ceil(micro_batch * images / chunk) if chunked else 1
    saved += graphs * BF16 * sum(tower.all_scaled_weights() for tower in (image, text))
    # Chunks that wait while one is at work: the layer's inputs and outputs, or the gradients of both.
    rows, captions = (chunk, chunk * texts / encoded.texts) if chunked else (chunk * images, chunk * texts)
    waiting = 2 * BF16 * max(
        (micro_batch * images - rows) * image.tokens * image.width,
        (micro_batch * texts - captions) * text.tokens * text.width,
    )  # fmt: skip
    normalised = 3 * config.image_size**2 * (2 * FP32 + BF16)
    blocks = max(
        rows * max(BF16 * image.working(checkpointing, device), normalised),
        captions * BF16 * text.working(checkpointing, device),
    )  # fmt: skip
    heap = HEAP[checkpointing] if device == "cpu" else 1
    scaled = 2 * BF16 * max(image.scaled_weights(), text.scaled_weights())  # with their gradients
    return saved * heap, waiting + (blocks + scaled) * heap


def state_bytes(
    parameters: int,
    block_parameters: int,
    ds_config: DsConfig,
    world_size: int,
    device: str,
    trained: int,
    kept: float,
) -> dict[str, float]:
    """Weights, optimizer, gradients and buckets; "reduction": what the gradients' reduction takes for a moment.

    trained: of the parameters, those that have gradients; kept: bytes of their masters and moments, of all ranks together.
    """
    zero = ds_config["zero_optimization"]
    stage, p, t, w = zero["stage"], parameters, trained, world_size
    on_host = (zero.get("offload_optimizer") or {}).get("device", "none") != "none" and device == "cuda"
    weights_on_host = (zero.get("offload_param") or {}).get("device", "none") != "none" and device == "cuda"
    grad = FP32 if ds_config.get("data_types", {}).get("grad_accum_dtype", "fp32") == "fp32" else BF16
    wire = FP32 if ds_config.get("communication_data_type", "fp32") == "fp32" else BF16
    bucket = int(zero.get("reduce_bucket_size", 5e8))
    # Buckets are allocated whole; a CPU process pays for what it touches.
    filled = min(t, bucket)
    allocated = filled if device == "cpu" else bucket
    reducers = 2 if zero.get("overlap_comm") else 1
    host_copies = 1 if device == "cpu" else 0  # gloo has no reduce-scatter of its own
    optimizer = 0 if on_host else kept / w
    if stage == 3:
        live = min(p, int(zero.get("stage3_max_live_parameters", 1e9)))
        if zero.get("stage3_param_persistence_threshold", 0) >= p:
            live = p
        live = max(live, block_parameters)
        return {
            "weights": 0 if weights_on_host else BF16 * p / w,
            "gathered_weights": BF16 * live,
            "optimizer": optimizer,
            "gradients": (0 if on_host else grad * t / w) + BF16 * min(t, live),
            "buckets": wire * allocated,
            "reduction": wire * filled * (1 + host_copies),
        }
    if stage == 2:
        return {
            "weights": BF16 * p,
            "gathered_weights": 0,
            "optimizer": optimizer,
            "gradients": 0 if on_host else grad * t / w,
            "buckets": 0 if device == "cpu" else wire * allocated * reducers,
            "reduction": (2 * wire * filled if device == "cpu" else wire * filled) + grad * t / w,
        }
    return {
        "weights": BF16 * p,
        "gathered_weights": 0,
        "optimizer": optimizer,
        "gradients": (grad + BF16) * t,
        "buckets": 0,
        "reduction": wire * filled if w > 1 else 0,
    }


def copy_bytes(
    state: dict[str, float], parameters: int, kept: float, queue: float, stage: int, world_size: int
) -> float:
    """Of rank 0's copy of a checkpoint, in host memory: the weights, masters and moments (kept: of all ranks together), averages, queue.

    state: from `state_bytes`, with the averages.
    """
    weights = BF16 * parameters / (world_size if stage == 3 else 1)
    averages = state.get("weight_average", 0) + state.get("momentum_encoder", 0) * FP32 / (FP32 + BF16)
    return weights + kept / world_size + averages + queue


def loss_bytes(
    config: ClipConfig, batch: int, world_size: int, loss: LossSection, device: str, encoded: Encoded
) -> dict[str, float]:
    """Features of the global batch, or in a ring of the two ranks that are on their way, with this rank's gradients; the
    queue, and the loss's tiles."""
    numbers = config.embed_dim * (config.context_length if loss.name == "filip" else 1)
    local, features_a_sample = batch // world_size, encoded.images + encoded.texts + encoded.hard
    in_ring = loss.gather == "ring" and world_size > 1
    others = min(2, world_size - 1) * local if in_ring else batch if world_size > 1 else 0
    features = FP32 * numbers * features_a_sample * (others + 3 * local)
    tile = min(CUDA_ENTRIES if device == "cuda" else CPU_ENTRIES, local * (local if in_ring else batch))
    return {"features": features, "queue": 2 * FP32 * numbers * loss.queue_size, "loss_tiles": 4 * FP32 * tile}


def image_bytes(config: ClipConfig, local_batch: int) -> int:
    """uint8 images of this rank's share: the batch in use, and the next one."""
    return 2 * local_batch * 3 * config.image_size**2
