"""The recipe: what to train. One frozen dataclass a section; every default lives here and nowhere else.

How to run it (ZeRO stage, bf16, clipping, offload) is the DeepSpeed JSON's business: `dsclip.config.deepspeed`.
`None` means "not set": the preset, the tokenizer or the batch decides.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class ModelSection:
    """The two towers. Every field but `preset` and `init` overrides the preset's own value."""

    preset: str = "ViT-B-32"
    init: str | None = None  # HF CLIP folder, OpenCLIP state dict or dsclip checkpoint to start from
    patch_dropout: float | None = None  # share of image patches dropped in training (FLIP)
    activation: str | None = None  # gelu | quick_gelu
    image_size: int | None = None
    patch_size: int | None = None
    embed_dim: int | None = None
    vision_width: int | None = None
    vision_layers: int | None = None
    vision_heads: int | None = None
    vision_mlp_width: int | None = None
    text_width: int | None = None
    text_layers: int | None = None
    text_heads: int | None = None
    text_mlp_width: int | None = None
    context_length: int | None = None
    image_mean: list[float] | None = None
    image_std: list[float] | None = None


@dataclass(frozen=True)
class DataSection:
    """Where samples come from. `demo` stands for the embedded data set and its tokenizer."""

    train_shards: str | list[str] = "demo"
    weights: list[float] | None = None  # of each entry of train_shards, which are then mixed by draws; None: one set
    tokenizer: str = "demo"  # `demo`, a local folder, or a hub name
    workers: int = 2  # loader processes a rank; 0 decodes in the training process
    streams: int | None = None  # ranks · workers must divide them; None: the largest divisor of the batch up to 1024
    shuffle_window: int = 512  # samples of a stream that are shuffled among themselves
    shuffle_unit: int | None = None  # neighbours that stay together in an epoch; None: 1, or shards beyond 2 M samples
    resampled: bool = False  # windows drawn with replacement, as OpenCLIP's --dataset-resampled; no epochs
    decoder: str = "fast"  # fast (JPEG scaled while decoding, resized in uint8) | exact (PIL, as CLIP's preprocessing)
    crop_scale: list[float] = field(default_factory=lambda: [0.9, 1.0])  # share of the area kept (CLIP, OpenCLIP)
    flip: bool = False  # horizontal flips; wrong for captions that say left or right
    color_jitter: list[float] | None = None  # brightness, contrast, saturation, hue, such as [0.32, 0.32, 0.32, 0.08]
    color_jitter_probability: float = 0.8
    grayscale: float = 0.0  # share of the images that lose their colour
    caption_key: str = "caption"  # key of the caption (string or list of strings) in `.json` members
    negative_key: str = "negatives"  # key of hard-negative captions in `.json`; or a `.neg.txt` member, one a line
    max_negatives: int = 4  # hard-negative captions used of one sample
    group_key: str | None = None  # key in `.json` whose equal values mark duplicates; None: equal captions do
    max_bad_fraction: float = 0.1  # the run stops when more of the samples read can't be used
    max_image_pixels: int = 64_000_000  # checked on the header, before decoding
    max_sample_bytes: int = 1 << 26  # of a sample in its shard; larger ones are not read
    retries: int = 5  # further attempts at a remote read, after pauses that double
    read_ahead_mb: int = 512  # of remote shards, read and not yet used by a worker
    on_unreadable: str = "stop"  # stop | skip (its samples count as bad, data_journal.jsonl names it)
    trusted_hosts: list[str] = field(default_factory=list)  # host or host:port that may be private or plain http


@dataclass(frozen=True)
class BatchSection:
    """Sizes in samples. The gradient is that of the whole global batch, whatever the two smaller sizes are."""

    global_batch_size: int = 256
    micro_batch_size: int | None = None  # of a rank, embedded in one forward; None: planned, or its whole local batch
    chunk_size: int | None = None  # samples that go through a block together; None: planned, or micro_batch_size
    checkpointing: str = "auto"  # none | selective | full | offload | auto: planned, or full once chunk_size is set
    coalesce_reduction: bool | None = None  # ZeRO-2/3: reduce once a step, not a micro-batch; None: planned
    accumulation: str = "auto"  # auto: the sizes left open are planned from memory | manual: they have no limit
    memory_gb: float | None = None  # what a rank may use, for the plan; None: all of its device

    def sizes(self, world_size: int) -> tuple[int, int, str]:
        """(samples of a micro-batch, samples of a chunk, checkpointing) as the engine takes them: what is open is plain."""
        local = self.global_batch_size // world_size
        micro_batch = min(self.micro_batch_size or local, local)
        chunk = min(self.chunk_size or micro_batch, micro_batch)
        checkpointing = self.checkpointing
        if checkpointing == "auto":
            checkpointing = "none" if self.chunk_size is None else "full"
        return micro_batch, chunk, checkpointing


@dataclass(frozen=True)
class LossSection:
    """The loss over the global batch and the negatives in it; docs/negatives.md explains each option."""

    name: str = "softmax"  # softmax (InfoNCE, CLIP) | sigmoid (SigLIP) | filip (token-wise) | one of your own
    plugin: str | None = None  # Python file or module that registers your own loss
    temperature: str = "learned"  # learned | fixed | scheduled
    init_temperature: float = 0.07  # logit scale starts at 1/0.07 (CLIP)
    final_temperature: float | None = None  # where a scheduled one ends; its logarithm changes evenly over the run
    max_logit_scale: float = 100.0  # clamp after each step (CLIP)
    init_bias: float = -10.0  # logit bias of the sigmoid loss (SigLIP)
    label_smoothing: float = 0.0  # share of the target spread over all candidates
    hard_negatives: str = "none"  # none | global (compete for every image) | own (for their own image only)
    duplicates: str = "negative"  # samples with equal keys: negative | positive | mask
    filter_margin: float | None = None  # δ: entries with I_i·T_j > I_i·T_i − δ are left out as false negatives
    beta: float = 0.0  # concentration of hard-negative reweighting
    queue_size: int = 0  # pairs of earlier steps kept as negatives
    queue_warmup_steps: int | None = None  # steps before the queue is used; None: until it is full
    queue_momentum: float | None = None  # embed queued pairs by an average of the weights (MoCo), such as 0.999
    wire_dtype: str = "fp32"  # fp32 | bf16: how features travel between ranks


@dataclass(frozen=True)
class OptimSection:
    """AdamW with decoupled decay on matrices only; CLIP's values for ViT."""

    lr: float = 5e-4
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-6
    weight_decay: float = 0.2
    warmup_steps: int = 2000
    schedule: str = "cosine"  # cosine | constant, after the linear warm-up
    min_lr: float = 0.0


@dataclass(frozen=True)
class TrainSection:
    """The run: its length, its folder and how often it reports."""

    name: str = "run"
    output: str = "runs"
    steps: int = 10_000
    seed: int = 0
    log_every: int = 10  # steps between lines of metrics.jsonl and TensorBoard scalars
    save_every: int | None = None  # steps between checkpoints; the last step always saves
    save_minutes: float | None = (
        30.0  # minutes between checkpoints, looked at when metrics are logged; null: by steps only
    )
    keep_checkpoints: int = 3
    compile: str = "auto"  # torch.compile of the blocks: on | off | auto (on a GPU)
    export_hf: bool = True  # convert the last checkpoint to a HuggingFace folder


@dataclass(frozen=True)
class EvalSection:
    """What is measured while training and at the end. Each task runs when its shards are set."""

    every_steps: int | None = None  # None: only at the end
    batch_size: int = 64
    zeroshot_shards: str | list[str] | None = None  # samples with a `.cls` member
    classnames: str | list[str] | None = None  # None: those of the shards' manifest; or a file, one name a line
    templates: str | list[str] | None = None  # None: those of the manifest; `openai`, `cifar`, or sentences with {}
    retrieval_shards: str | list[str] | None = None
    hard_negatives_shards: str | list[str] | None = None  # samples with hard-negative captions
    max_samples: int | None = None  # per task; None: all


@dataclass(frozen=True)
class Recipe:
    """A whole recipe, resolved and frozen."""

    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    batch: BatchSection = field(default_factory=BatchSection)
    loss: LossSection = field(default_factory=LossSection)
    optim: OptimSection = field(default_factory=OptimSection)
    train: TrainSection = field(default_factory=TrainSection)
    eval: EvalSection = field(default_factory=EvalSection)
