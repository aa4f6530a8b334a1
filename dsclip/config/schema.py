"""The recipe: what to train. One frozen dataclass a section; every default, bound and choice stands at its field and nowhere else.

How to run it (ZeRO stage, bf16, clipping, offload) is the DeepSpeed JSON's business: `dsclip.config.deepspeed`.
`None`, written null in a recipe, means "not set": the preset, the tokenizer or the batch decides. The sentence below a field
is its line in docs/reference.md.
"""

from __future__ import annotations

from dataclasses import field, fields
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from dsclip.config.data_section import DataSection
from dsclip.config.kinds import (
    STRICT,
    Colour,
    Count,
    Expressions,
    GroupRules,
    NotNegative,
    Positive,
    PositiveFloat,
    PositiveShare,
    ShareBelowOne,
    Weights,
)
from dsclip.config.objective_section import ObjectiveSection
from dsclip.config.train_section import TrainSection

MAX_BATCH = 1 << 24  # a hundred times the largest published; beyond it even the features of a step fill machines
MAX_LAYERS = 1000  # beyond it a typing error; building such towers, even without memory, takes minutes

# Fields of the model section that say which parameters are trained, and not what the model is.
OF_WHAT_IS_TRAINED = ("lock", "unlocked_layers", "lora_rank", "lora_alpha", "lora_targets", "lora_full")

Layers = Annotated[int, Field(gt=0, le=MAX_LAYERS)]
Checkpointing = Literal["auto", "none", "selective", "full", "offload"]
OptimizerName = Literal["adamw", "adamw_bf16", "stable_adamw", "lion", "lamb", "muon"]


@dataclass(frozen=True, config=STRICT)
class ModelSection:
    """The two towers. Every field but `preset`, `init`, `stretch` and those of what is trained (`lock`, `unlocked_layers`, `lora_…`) overrides the preset's own value."""

    preset: str = "auto"
    """`ViT-B-32`, `ViT-L-14`, … (also written `ViT-B/32`), each with `-quickgelu`; `demo`; `FILE.json`, an OpenCLIP model configuration; or `auto`: the model of `init`, `ViT-B-32` without."""
    init: str | None = None
    """Weights to start from: HuggingFace CLIP folder, OpenCLIP folder or state dict, dsclip checkpoint, or on the hub `hf:NAME`, \
`openclip:NAME`; what it says of its model and the recipe leaves open is taken over."""
    stretch: Literal["linear", "long_clip"] = "linear"
    """How the text positions of `init` become those of a longer context: `long_clip` keeps the first 20."""
    lock: Literal["none", "image", "text"] = "none"
    """The tower that keeps the weights of `init` (LiT), see [training](training.md#locked-towers); the other one is trained."""
    unlocked_layers: Count = 0
    """Last layers of the locked tower that are trained all the same: 1 its head, 2 also its last block, and so on."""
    lock_once: bool = False
    """The locked tower embeds each caption or image once, and its features stay in host memory, see [fine-tuning](finetuning.md#a-locked-tower-once)."""
    lora_rank: Count = 0
    """Rank of the adapters that are trained in place of the weights (LoRA), see [fine-tuning](finetuning.md#lora); 0: none."""
    lora_alpha: PositiveFloat | None = None
    """Adapters are multiplied by it over `lora_rank`; null: by 1."""
    lora_targets: Expressions = field(default_factory=lambda: ["blocks"])
    """Linear layers that get an adapter: those in whose name (`visual.blocks.0.attn.qkv`) one of these is found."""
    lora_full: Expressions = field(default_factory=list)
    """Parameters that are trained themselves beside the adapters: those in whose name one of these is found, such as `head`."""
    patch_dropout: ShareBelowOne | None = None
    """Share of the image patches left out in training (FLIP)."""
    vision_pool: Literal["class", "average", "attention"] | None = None
    """What an image's feature is made of: the `class` token, the `average` of the patches without a class token, or `attention` to them \
in SigLIP's image tower."""
    text_pool: Literal["end", "last"] | None = None
    """Where a caption's feature is taken: at its `end` token, in a causal tower, or at the `last` position of SigLIP's."""
    vision_registers: Count | None = None
    """Learned tokens beside the image's, whose outputs are not read; null: none."""
    vision_layer_scale: PositiveFloat | None = None
    """Where the learned factors of the image tower's branches begin, such as 1e-5; null: there are none."""
    text_layer_scale: PositiveFloat | None = None
    """The same in the text tower."""
    vision_qk_norm: bool | None = None
    """Queries and keys of the image tower's attention are normalised; null: no."""
    text_qk_norm: bool | None = None
    """The same in the text tower."""
    text_experts: Count | None = None
    """MLPs of a routed block of the text tower, a mixture of experts, see [training](training.md#experts); null: none."""
    text_experts_per_token: Positive | None = None
    """How many of them compute a token; null: 1."""
    text_experts_every: Positive | None = None
    """The last of each so many blocks of the text tower is routed; null: 2."""
    attention: Literal["auto", "flash", "cudnn", "efficient", "math"] | None = None
    """Kernels that compute attention, see [training](training.md#attention); null: `auto`, torch chooses on a GPU."""
    fp8: bool | None = None
    """Products of the image tower's blocks, but the first and the last, in fp8, see [training](training.md#fp8); null: no."""
    activation: Literal["gelu", "quick_gelu", "gelu_tanh"] | None = None
    """Of the MLPs; `quick_gelu` is that of OpenAI's weights, `gelu_tanh` SigLIP's."""
    image_size: Positive | None = None
    """Side of the square images, in pixels; a multiple of `patch_size`."""
    patch_size: Positive | None = None
    """Side of a patch, in pixels."""
    embed_dim: Positive | None = None
    """Width of the space that both towers embed into."""
    vision_width: Positive | None = None
    """Width of the image tower; a multiple of `vision_heads`."""
    vision_layers: Layers | None = None
    """Blocks of the image tower."""
    vision_heads: Positive | None = None
    """Attention heads of a block of the image tower."""
    vision_mlp_width: Positive | None = None
    """Width of the hidden layer of its MLPs."""
    text_width: Positive | None = None
    """Width of the text tower; a multiple of `text_heads`."""
    text_layers: Layers | None = None
    """Blocks of the text tower."""
    text_heads: Positive | None = None
    """Attention heads of a block of the text tower."""
    text_mlp_width: Positive | None = None
    """Width of the hidden layer of its MLPs."""
    context_length: Positive | None = None
    """Tokens of a caption at most; longer ones are cut."""
    image_mean: Colour | None = None
    """Subtracted from the red, green and blue of an image, which lie in 0 … 1."""
    image_std: Colour | None = None
    """What they are divided by after that."""

    @property
    def overrides(self) -> dict[str, Any]:
        """The fields that override the preset's, None for those that are left open."""
        own = ("preset", "init", "stretch", "lock_once", *OF_WHAT_IS_TRAINED)
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in own}

    @property
    def lora_scale(self) -> float:
        """The factor on the adapters' products."""
        return 1.0 if self.lora_alpha is None else self.lora_alpha / self.lora_rank

    @property
    def name(self) -> str:
        """What people call the model: its preset, or what it starts from."""
        return self.preset if self.preset != "auto" else self.init or "ViT-B-32"


@dataclass(frozen=True, config=STRICT)
class BatchSection:
    """Sizes in samples. The gradient is that of the whole global batch, whatever the two smaller sizes are."""

    global_batch_size: Annotated[int, Field(gt=0, le=MAX_BATCH)] = 256
    """Pairs a step, over all ranks: the negatives."""
    micro_batch_size: Positive | None = None
    """Pairs that a rank embeds in one forward; null: planned, or its whole local batch."""
    chunk_size: Positive | None = None
    """Pairs of a micro-batch that go through a block at a time; null: planned, or all of them."""
    checkpointing: Checkpointing = "auto"
    """What blocks keep for backward: `none` everything; `selective` the inputs, the attention's output and the MLP's hidden \
layer (a third of the products run again; compiled blocks keep every product's result and run none again); `full` the inputs; `offload` the inputs, in pinned host memory; `auto`: planned, \
or full once `chunk_size` is set."""
    coalesce_reduction: bool | None = None
    """ZeRO-2 and 3: reduce gradients once a step, not once a micro-batch; null: planned."""
    accumulation: Literal["auto", "manual"] = "auto"
    """`auto`: the sizes left open are planned from memory; `manual`: they have no limit."""
    memory_gb: PositiveFloat | None = None
    """What a rank may use (10⁹ bytes), for the plan; null: all of its device."""

    def sizes(self, world_size: int) -> tuple[int, int, Checkpointing]:
        """(samples of a micro-batch, samples of a chunk, checkpointing) as the engine takes them: what is open is plain."""
        local = self.global_batch_size // world_size
        micro_batch = min(self.micro_batch_size or local, local)
        chunk = min(self.chunk_size or micro_batch, micro_batch)
        if self.checkpointing == "auto":
            return micro_batch, chunk, "none" if self.chunk_size is None else "full"
        return micro_batch, chunk, self.checkpointing


@dataclass(frozen=True, config=STRICT)
class LossSection:
    """The loss over the global batch and the negatives in it; docs/negatives.md explains each option."""

    name: str = "softmax"
    """`softmax` (InfoNCE, CLIP), `sigmoid` (SigLIP), `filip` (token-wise), or one of your own."""
    plugin: str | None = None
    """Python file or module that registers your own loss."""
    temperature: Literal["learned", "fixed", "scheduled"] = "learned"
    """How the logit scale moves; `scheduled`: from `init_temperature` to `final_temperature`."""
    init_temperature: PositiveFloat = 0.07
    """The logit scale starts at its inverse (CLIP: 1/0.07)."""
    final_temperature: PositiveFloat | None = None
    """Where a scheduled one ends; its logarithm changes evenly over the run."""
    max_logit_scale: PositiveFloat = 100.0
    """The logit scale is clamped to it after each step (CLIP)."""
    init_bias: float = -10.0
    """Where the logit bias of the sigmoid loss starts (SigLIP)."""
    label_smoothing: ShareBelowOne = 0.0
    """Share of the target spread over all candidates."""
    hard_negatives: Literal["none", "global", "own"] = "none"
    """Captions made to be wrong: `global` compete for every image, `own` for their own image only."""
    duplicates: Literal["negative", "positive", "mask"] = "negative"
    """What samples with equal keys are to each other."""
    filter_margin: float | None = None
    """δ: entries with I_i·T_j > I_i·T_i − δ are left out as false negatives; null: none are."""
    beta: NotNegative = 0.0
    """Concentration of hard-negative reweighting."""
    debiased: ShareBelowOne = 0.0
    """τ⁺: of negatives drawn from the data, the share that are positives nobody marked (Chuang et al. 2020); 0: no correction."""
    queue_size: Count = 0
    """Pairs of earlier steps kept as negatives."""
    queue_warmup_steps: Count | None = None
    """Steps before the queue is used; null: until it is full."""
    queue_momentum: ShareBelowOne | None = None
    """Embed queued pairs by an average of the weights (MoCo), such as 0.999; needs `queue_size`."""
    matryoshka_dims: list[Positive] = field(default_factory=list)
    """First dimensions that are trained as features of their own, such as [64, 128]; none: the whole feature alone."""
    matryoshka_weights: Weights | None = None
    """One for each of `matryoshka_dims`; null: 1, which is that of the whole feature."""
    gather: Literal["all", "ring"] = "all"
    """Features of other ranks: `all` at once, or passed round a `ring`, one rank's at a time, twice a step."""
    wire_dtype: Literal["fp32", "bf16"] = "fp32"
    """How features travel between ranks."""


@dataclass(frozen=True, config=STRICT)
class OptimSection:
    """The optimizer, with decoupled decay on matrices only; CLIP's values for ViT."""

    name: OptimizerName = "adamw"
    """`adamw_bf16`: its moments in bf16; `stable_adamw`: with update clipping; see [training](training.md#optimizers)."""
    lr: PositiveFloat = 5e-4
    """Learning rate at the end of the warm-up."""
    beta1: ShareBelowOne = 0.9
    """Decay of the first moment; of Lion's momentum within its update."""
    beta2: ShareBelowOne = 0.98
    """Decay of the second moment; of Lion's momentum itself."""
    eps: PositiveFloat = 1e-6
    """Added to the root of the second moment."""
    momentum: ShareBelowOne | None = None
    """Of `muon`, for the blocks' matrices; null: 0.95."""
    ema: ShareBelowOne | None = None
    """Decay of a moving average of the weights, saved beside them, see [training](training.md#average-of-the-weights); null: none."""
    weight_decay: NotNegative = 0.2
    """Decoupled, of matrices only."""
    layer_decay: PositiveShare = 1.0
    """Factor on the learning rate for each layer further from the head of its tower (BEiT's); 1: none."""
    rules: GroupRules = field(default_factory=list)
    """Factor on the learning rate and decay of the parameters whose name is matched; of several, the last counts."""
    warmup_steps: Count = 2000
    """Steps in which the learning rate rises from 0; at most `train.steps`."""
    schedule: Literal["cosine", "constant", "inverse_sqrt", "wsd"] = "cosine"
    """Of the learning rate after the warm-up; `wsd`: stable, then a linear decay."""
    decay_share: PositiveShare | None = None
    """Last part of `train.steps` in which `wsd` decays; null: 0.2."""
    min_lr: NotNegative = 0.0
    """Where `cosine` and `wsd` end, and what `inverse_sqrt` does not go below; at most `lr`."""

    @property
    def muon_momentum(self) -> float:
        """Of `muon`."""
        return 0.95 if self.momentum is None else self.momentum

    @property
    def wsd_share(self) -> float:
        """Part of the run in which `wsd` decays."""
        return 0.2 if self.decay_share is None else self.decay_share


@dataclass(frozen=True, config=STRICT)
class EvalSection:
    """What is measured while training and at the end. Each task runs when its shards are set."""

    every_steps: Positive | None = None
    """Steps between evaluations; null: only at the end."""
    batch_size: Positive = 64
    """Samples a rank embeds at a time."""
    zeroshot_shards: str | list[str] | None = None
    """Shards whose samples have a `.cls` member."""
    classnames: str | list[str] | None = None
    """Names, or a file, one name a line; null: those of the shards' manifest."""
    templates: str | list[str] | None = None
    """`openai`, `cifar`, or sentences with {}; null: those of the manifest."""
    retrieval_shards: str | list[str] | None = None
    """Shards of pairs to be found in both directions."""
    hard_negatives_shards: str | list[str] | None = None
    """Shards whose samples have hard-negative captions."""
    max_samples: Positive | None = None
    """Per task; null: all."""


@dataclass(frozen=True, config=STRICT)
class Recipe:
    """A whole recipe, resolved and frozen."""

    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    batch: BatchSection = field(default_factory=BatchSection)
    loss: LossSection = field(default_factory=LossSection)
    objective: ObjectiveSection = field(default_factory=ObjectiveSection)
    optim: OptimSection = field(default_factory=OptimSection)
    train: TrainSection = field(default_factory=TrainSection)
    eval: EvalSection = field(default_factory=EvalSection)
