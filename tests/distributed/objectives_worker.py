"""Run on every rank: engine gradients of objectives with further views against dense float64; one JSON file."""

import math
import sys
from dataclasses import replace

import torch

from dsclip.config.objective_section import HeadSection, ObjectiveSection, TermSection
from dsclip.config.schema import BatchSection, LossSection, Recipe, TrainSection
from dsclip.data import Batch
from dsclip.distributed import Collectives
from dsclip.engine.contrastive import ContrastiveEngine
from dsclip.engine.whole_tensors import whole_gradients, whole_weights
from dsclip.errors import UserError
from dsclip.losses import Negatives
from dsclip.model import Clip
from dsclip.model.heads import add_heads
from dsclip.model.patch_dropout import view_ids, visible_patches
from tests import loss_reference, objective_reference
from tests.distributed.exactness_worker import GLOBAL_BATCH, OPTIM, SEED, ds_config, local_part, relative
from tests.distributed.launch import write_cases
from tests.distributed.negatives_worker import SHALLOW, captions, whole_batch

IMAGES = TermSection("contrast", ["image", "image_2"], 0.7, 0.1, "positive")
TEXTS = TermSection("contrast", ["text", "text_2"])
CROSSED = TermSection("contrast", ["text_2", "image"], 1.5)
PROJECTED = TermSection("contrast", ["image.projector", "image_2.projector"], 0.6, 0.2)
WORDS = TermSection("contrast", ["text_2.words", "text"], 0.8)
SWAPPED = TermSection("swav", ["image.clusters", "image_2.clusters"], 0.5)
CLASSIFIED = TermSection("cross_entropy", ["image_2.classes"], label_smoothing=0.1)
SUPERVISED = TermSection(
    "supervised_contrast", ["image.projector", "image_2.projector"], 0.5, 0.2, mixup=1.0, focal=True
)
ENDS = [
    HeadSection("clusters", "prototypes", "projector", 7), HeadSection("projector", "projector", "image", 10),
    HeadSection("classes", "classifier", "image", 4),
]  # fmt: skip
HEADS = [HeadSection("projector", "projector", "image", 10, 20), HeadSection("words", "projector", "text", 24)]
DISTILL = TermSection("distill", ["image", "text"], 0.8)
DISTILL_FEATURES = TermSection("distill_features", ["image.projector"], 1.2)
TEACHER_TEMPERATURE = 0.15
# name: (terms, heads, weight of the pairs, options of the loss section, share of patches left out)
OBJECTIVES = {
    "images": ([IMAGES], [], 1.0, {}, 0.5),
    "texts": ([TEXTS], [], 0.5, {"hard_negatives": "global"}, 0.0),
    "heads": ([SWAPPED, CLASSIFIED, SUPERVISED], ENDS, 0.4, {}, 0.0),
    "all": ([IMAGES, TEXTS, CROSSED, PROJECTED, WORDS], HEADS, 0.3, {"hard_negatives": "own"}, 0.5),
    "distilled": ([IMAGES, DISTILL, DISTILL_FEATURES], HEADS[:1], 0.6, {}, 0.5),
}


def batch_with_views() -> Batch:
    generator = torch.Generator().manual_seed(21)
    image_2 = torch.randint(0, 256, (GLOBAL_BATCH, 3, 32, 32), generator=generator, dtype=torch.uint8)
    classes = torch.randint(0, 4, (GLOBAL_BATCH,), generator=generator)
    taught = torch.nn.functional.normalize(torch.randn(2, GLOBAL_BATCH, HEADS[0].width, generator=generator), dim=-1)
    teacher = {"teacher_image": taught[0], "teacher_text": taught[1]}
    return replace(
        whole_batch(), classes=classes, views={"image_2": image_2, "text_2": captions(GLOBAL_BATCH, 22), **teacher}
    )


def reference(weights: dict, batch: Batch, name: str) -> dict:
    terms, heads, pair_weight, options, dropout = OBJECTIVES[name]
    model = Clip(SHALLOW)
    add_heads(model, ObjectiveSection(heads=heads))
    model.double()
    model.load_state_dict(weights)
    log_scale = torch.nn.Parameter(torch.tensor(-math.log(LossSection().init_temperature)).double())

    def features(view: str, rows: torch.Tensor) -> dict:
        own = [h for h in heads if view.startswith(ObjectiveSection(heads=heads).tower_of_head(h))]
        parts = rows.split([SHALLOW.embed_dim, *(h.width for h in own)], dim=1)
        return dict(zip([view, *(f"{view}.{h.name}" for h in own)], parts, strict=True))

    def image(pixels: torch.Tensor, number: int) -> torch.Tensor:
        ids = view_ids(batch.sample_ids, number)
        visible = visible_patches(ids, SHALLOW.patches, dropout, seed=SEED, step=0) if dropout else None
        return model(pixels, None, visible_patches=visible, with_named=True)[0]

    text = lambda tokens: model(None, tokens, with_named=True)[1]  # noqa: E731
    views = features("image", image(batch.images, 1)) | features("image_2", image(batch.views["image_2"], 2))
    views |= features("text", text(batch.tokens)) | features("text_2", text(batch.views["text_2"]))
    hard = options.get("hard_negatives")
    pair = loss_reference.loss(
        "softmax", views["image"], views["text"], log_scale, None, Negatives(hard=hard or "global"), loss_reference.cosine,
        None, text(batch.hard_tokens)[:, : SHALLOW.embed_dim] if hard else None, batch.hard_owner if hard else None,
    )  # fmt: skip
    others = [term for term in terms if not term.name.startswith("distill")]
    loss = pair_weight * pair + objective_reference.objective(
        views, log_scale, 0.0, others, batch.keys, batch.classes, (SEED, 0)
    )
    if name == "distilled":
        taught = {k: batch.views[f"teacher_{k}"].double() for k in ("image", "text")}
        loss = loss + DISTILL.weight * objective_reference.distill(
            views["image"], views["text"], log_scale.exp(), *taught.values(), 1 / TEACHER_TEMPERATURE
        )
        distance = objective_reference.distill_features([(views["image.projector"], taught["image"])])
        loss = loss + DISTILL_FEATURES.weight * distance
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    return {"loss": loss.item(), "pair": pair.item(), "log_scale": log_scale.grad.item(), "grads": grads}


def engine_of(name: str, micro_batches: int, stage: int, group: Collectives) -> ContrastiveEngine:
    terms, heads, pair_weight, options, dropout = OBJECTIVES[name]
    local = GLOBAL_BATCH // group.world_size
    recipe = Recipe(
        batch=BatchSection(GLOBAL_BATCH, -(-local // micro_batches), None if micro_batches == 1 else 2), optim=OPTIM,
        loss=LossSection(**options), objective=ObjectiveSection(
            pair_weight, terms, heads=heads, teacher_temperature=TEACHER_TEMPERATURE if name == "distilled" else None,
        ),
        train=TrainSection(seed=SEED, steps=10),
    )  # fmt: skip
    config = replace(SHALLOW, patch_dropout=dropout)
    return ContrastiveEngine(recipe, ds_config(stage, False, group.world_size), config)


def case(name: str, micro_batches: int, stage: int, group: Collectives) -> dict:
    engine, batch = engine_of(name, micro_batches, stage, group), batch_with_views()
    expected = reference(whole_weights(engine), batch, name)
    ours = engine.accumulate(local_part(batch, group))
    result = {
        "gradient": relative(whole_gradients(engine), expected["grads"]),
        "loss": abs(ours.loss.item() / expected["loss"] - 1),
        "pair": abs(ours.values["pair"].item() / expected["pair"] - 1),
        "d_log_scale": abs(ours.d_log_scale.item() / expected["log_scale"] - 1),
    }
    engine.deepspeed.step()
    engine.close()
    return {"objective": name, "micro_batches": micro_batches, "stage": stage, "wrong": result}


def terms_of_a_step(group: Collectives) -> dict:
    """What a whole step reports, and what is said of a batch that lacks a view or has another's shape."""
    engine, batch = engine_of("all", 2, 3, group), local_part(batch_with_views(), group)
    metrics = engine.train_step(batch)
    terms, _, pair_weight, *_ = OBJECTIVES["all"]
    total = pair_weight * metrics.terms["pair"] + sum(t.weight * metrics.terms[t.title] for t in terms)
    refused = []
    tokens = batch.views["text_2"]
    for views in ({"text_2": tokens}, {"image_2": batch.images.float(), "text_2": tokens}):
        try:
            engine.train_step(replace(batch, views=views))
        except UserError as error:
            refused.append(str(error))
    engine.close()
    return {"terms": metrics.terms, "loss": metrics.loss, "total": total, "refused": refused}


def cases(group: Collectives) -> list[dict]:
    combinations = [(name, micro, 3) for name in OBJECTIVES for micro in (1, 3)] + [("all", 3, 1), ("all", 3, 2)]
    return [*(case(*each, group) for each in combinations), terms_of_a_step(group)]


if __name__ == "__main__":
    write_cases(cases, sys.argv[1])
