"""Run on every rank: engine gradients of every loss with every negatives option against dense float64; one JSON file."""

import itertools
import sys
from dataclasses import replace

import torch

from dsclip.config.schema import BatchSection, LossSection, Recipe, TrainSection
from dsclip.data import Batch
from dsclip.distributed import Collectives
from dsclip.engine.contrastive import ContrastiveEngine
from dsclip.engine.whole_tensors import whole_gradients, whole_weights
from dsclip.errors import UserError
from dsclip.losses import Negatives
from dsclip.model import Clip
from tests import loss_reference
from tests.distributed.exactness_worker import (
    CONFIG,
    CONTEXT,
    GLOBAL_BATCH,
    OPTIM,
    SEED,
    ds_config,
    global_batch,
    local_part,
    relative,
)  # fmt: skip
from tests.distributed.launch import write_cases

SHALLOW = replace(CONFIG, vision_layers=1)  # a loss sees features alone, however many layers made them

OPTIONS = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "positive duplicates": {"duplicates": "positive"},
    "masked duplicates": {"duplicates": "mask"},
    "filter": {"filter_margin": -0.01},
    "reweighting": {"beta": 0.5},
    "global hard negatives": {"hard_negatives": "global"},
    "own hard negatives": {"hard_negatives": "own"},
    "queue": {"queue_size": 5, "queue_warmup_steps": 0},
    "debiased": {"debiased": 0.1, "hard_negatives": "own", "queue_size": 5, "queue_warmup_steps": 0},
    "ring": {"gather": "ring", "duplicates": "mask", "hard_negatives": "global", "queue_size": 5, "queue_warmup_steps": 0},
    "everything": {"label_smoothing": 0.1, "duplicates": "positive", "filter_margin": -0.01, "beta": 0.3,
                   "hard_negatives": "global", "queue_size": 5, "queue_warmup_steps": 0},
}  # fmt: skip


LOSSES, MICRO_BATCHES = ("softmax", "sigmoid", "filip"), (1, 3)
OF_SOFTMAX = ("debiased",)  # options that the other losses refuse
EVERY = [
    (loss, option, micro) for loss, option, micro in itertools.product(LOSSES, OPTIONS, MICRO_BATCHES)
    if loss == "softmax" or option not in OF_SOFTMAX
]  # fmt: skip


def combinations(world_size: int) -> list[tuple[str, str, int]]:
    """(loss, option, micro-batches): half of `EVERY`, on one rank and on four the one half, on two the other.

    Covered on each number of ranks: every pair of the three factors, so every loss with every option; of options that one
    loss obeys therefore both. Covered on one of them: every three together.
    """

    def chosen(loss: str, option: str, micro: int) -> bool:
        place = LOSSES.index(loss) + list(OPTIONS).index(option) + MICRO_BATCHES.index(micro)
        return option in OF_SOFTMAX or bool((place + world_size // 2) % 2)

    return [case for case in EVERY if chosen(*case)]


def captions(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 49, (count, CONTEXT), generator=generator)
    tokens[torch.arange(count), torch.randint(2, CONTEXT, (count,), generator=generator)] = 49
    return tokens


def whole_batch() -> Batch:
    counts = torch.tensor([1, 0, 2, 0, 0, 1, 1, 0, 3, 0, 0, 1])  # some ranks have few, one of four has none
    owner = torch.repeat_interleave(torch.arange(GLOBAL_BATCH), counts)
    keys = torch.tensor([1, 2, 1, 3, 4, 5, 2, 6, 7, 8, 9, 2])
    return replace(global_batch(0), keys=keys, hard_tokens=captions(len(owner), 5), hard_owner=owner)


def reference(weights: dict, name: str, options: dict, batch: Batch, queue) -> dict:
    model = Clip(SHALLOW).double()
    model.load_state_dict(weights)
    log_scale = torch.nn.Parameter(
        torch.tensor(-torch.log(torch.tensor(LossSection().init_temperature)).item()).double()
    )
    bias = torch.nn.Parameter(torch.tensor(LossSection().init_bias).double())
    token_wise = name == "filip"
    if queue is not None:
        queue_valid = queue.get("queue_text_valid")
        queue = (queue["queue_image"].double(), queue["queue_text"].double(), queue["queue_keys"])
    image, text = model(batch.images, batch.tokens, token_wise=token_wise)
    hard = hard_owner = None
    if options.get("hard_negatives", "none") != "none":
        _, hard = model(None, batch.hard_tokens, token_wise=token_wise)
        hard_owner = batch.hard_owner
    similar = loss_reference.cosine
    if token_wise:
        valid = {id(text): model.valid_tokens(batch.tokens), id(hard): model.valid_tokens(batch.hard_tokens)}
        if queue is not None:
            valid[id(queue[1])] = queue_valid

        def similar(x, y):
            everything = (torch.ones(z.shape[:2], dtype=torch.bool) for z in (x, y))
            return loss_reference.late_interaction(
                x, y, *(valid.get(id(z), e) for z, e in zip((x, y), everything, strict=True))
            )

    negatives = Negatives(
        options.get("duplicates", "negative"), "own" if options.get("hard_negatives") == "own" else "global",
        options.get("filter_margin"), options.get("beta", 0.0), options.get("label_smoothing", 0.0),
        options.get("debiased", 0.0),
    )  # fmt: skip
    keys = batch.keys if negatives.duplicates != "negative" else None
    loss = loss_reference.loss(name, image, text, log_scale, bias, negatives, similar, keys, hard, hard_owner, queue)
    loss.backward()
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    return {"loss": loss.item(), "log_scale": log_scale.grad, "bias": bias.grad, "grads": grads}


def case(name: str, options: dict, micro_batches: int, group: Collectives) -> dict:
    local = GLOBAL_BATCH // group.world_size
    recipe = Recipe(
        batch=BatchSection(GLOBAL_BATCH, -(-local // micro_batches), None if micro_batches == 1 else 2),
        optim=OPTIM, loss=LossSection(name=name, **options), train=TrainSection(seed=SEED, steps=10),
    )  # fmt: skip
    stage = 1 if group.world_size == 4 else 3  # of which four ranks take half the time
    engine = ContrastiveEngine(recipe, ds_config(stage, False, group.world_size), SHALLOW)
    batch, queue = whole_batch(), None
    if engine.queue is not None:
        generator = torch.Generator().manual_seed(11)
        shapes = [engine.queue.negatives_shape(kind) for kind in ("image", "text")]
        old = [torch.nn.functional.normalize(torch.randn(6, *s, generator=generator), dim=-1) for s in shapes]
        lengths = torch.tensor([1, 4, CONTEXT, 2, 9, 5])
        valid = torch.arange(CONTEXT) < lengths[:, None] if name == "filip" else None
        engine.queue.push(*old, torch.arange(6), Collectives.single(), valid)
        queue = {k: v.clone() for k, v in engine.queue.negatives(0).items()}
    weights = whole_weights(engine)
    ours = engine.accumulate(local_part(batch, group))
    grads = whole_gradients(engine)
    expected = reference(weights, name, options, batch, queue)
    result = {
        "gradient": relative(grads, expected["grads"]),
        "loss": abs(ours.loss.item() / expected["loss"] - 1),
        "d_log_scale": abs(float(ours.d_log_scale.double() / expected["log_scale"]) - 1),
    }
    if name == "sigmoid":
        result["d_bias"] = abs(float(ours.d_bias.double() / expected["bias"]) - 1)
    engine.deepspeed.step()
    engine.close()
    return result


def second_losses_by_chunk(group: Collectives) -> list[float]:
    """The loss of a second step, against the queue of the first, for three chunk sizes: FILIP sees real tokens alone."""
    seen = []
    for chunk in (None, 2, 1):
        recipe = Recipe(
            batch=BatchSection(GLOBAL_BATCH, None, chunk), optim=OPTIM, train=TrainSection(seed=SEED, steps=10),
            loss=LossSection(name="filip", queue_size=GLOBAL_BATCH, queue_warmup_steps=0),
        )  # fmt: skip
        engine = ContrastiveEngine(recipe, ds_config(3, False, group.world_size), SHALLOW)
        batch = whole_batch()
        batch = replace(batch, tokens=batch.tokens.clamp(max=48))
        batch.tokens[torch.arange(GLOBAL_BATCH), torch.tensor([2, 3, 12, 13, 4, 5, 10, 11, 6, 2, 3, 9])] = (
            49  # chunks of unequal length
        )
        engine.train_step(local_part(batch, group))
        seen.append(engine.train_step(local_part(batch, group)).loss)
        engine.close()
    return seen


def second_backward(group: Collectives) -> str:
    """What the engine says when somebody differentiates twice after one forward."""
    local = GLOBAL_BATCH // group.world_size
    recipe = Recipe(batch=BatchSection(GLOBAL_BATCH), optim=OPTIM, train=TrainSection(steps=10))
    engine = ContrastiveEngine(recipe, ds_config(3, False, group.world_size), SHALLOW)
    batch = local_part(whole_batch(), group)
    image, text = engine.deepspeed(batch.images, batch.tokens)
    first, second = (image * text)[: local // 2].sum(), (image * text)[local // 2 :].sum()
    engine.deepspeed.backward(first, retain_graph=True)
    try:
        engine.deepspeed.backward(second)
    except UserError as error:
        return str(error)
    return "accepted"


def cases(group: Collectives) -> list[dict]:
    results = []
    for name, option, micro_batches in combinations(group.world_size):
        result = case(name, OPTIONS[option], micro_batches, group)
        results.append({"loss_name": name, "option": option, "micro_batches": micro_batches, **result})
    results.append({"second_backward": second_backward(group), "by_chunk": second_losses_by_chunk(group)})
    return results


if __name__ == "__main__":
    write_cases(cases, sys.argv[1])
