"""Layer scale, QK-norm and registers: against a reference of their own, through chunks, counted, and where they can go."""

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dsclip.config.schema import OptimSection
from dsclip.convert.hf import hf_class
from dsclip.create import create_model
from dsclip.errors import UserError
from dsclip.model import Clip, resolve_preset
from dsclip.model.flops import forward_flops
from dsclip.optim.groups import parameter_groups
from dsclip.plan.memory import HEAP, Encoded, activation_bytes, towers
from tests.test_model_clip import SMALL, gradients, pairs

EACH = {
    "layer scale": dict(vision_layer_scale=0.1, text_layer_scale=0.2),
    "QK-norm": dict(vision_qk_norm=True, text_qk_norm=True, layer_norm_eps=1e-3),
    "registers": dict(vision_registers=3),
    "registers beside an average": dict(vision_registers=2, vision_pool="average"),
}
ALL = EACH["layer scale"] | EACH["QK-norm"] | EACH["registers"]


def built(options) -> Clip:
    """In float64, every weight moved from where it began: ones and zeros would hide what they are multiplied with."""
    torch.manual_seed(0)
    model = create_model("demo", **SMALL, **options).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def norm(x: Tensor, w: dict, name: str, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def block(x: Tensor, w: dict, heads: int, eps: float, causal: bool) -> Tensor:
    """The equations: one head after the other, the layer scale on the branches' results."""
    width = x.shape[-1]
    head, mixed = width // heads, []
    q, k, v = (norm(x, w, "ln_1", eps) @ w["attn.qkv.weight"].T + w["attn.qkv.bias"]).split(width, dim=-1)
    for i in range(heads):
        q_i, k_i, v_i = (part[..., i * head : (i + 1) * head] for part in (q, k, v))
        if "attn.ln_q.weight" in w:
            q_i, k_i = norm(q_i, w, "attn.ln_q", eps), norm(k_i, w, "attn.ln_k", eps)
        scores = q_i @ k_i.mT / head**0.5
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores[0], dtype=torch.bool).triu(1), -torch.inf)
        mixed.append(scores.softmax(-1) @ v_i)
    branch = torch.cat(mixed, -1) @ w["attn.out.weight"].T + w["attn.out.bias"]
    x = x + w.get("attn.out.gamma", 1) * branch
    hidden = torch.nn.functional.gelu(norm(x, w, "ln_2", eps) @ w["mlp.fc1.weight"].T + w["mlp.fc1.bias"])
    return x + w.get("mlp.fc2.gamma", 1) * (hidden @ w["mlp.fc2.weight"].T + w["mlp.fc2.bias"])


def reference(model: Clip, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Unit features of both towers; every caption whole."""
    c, weights = model.config, model.state_dict()

    def part(prefix):
        return {name.removeprefix(prefix): x for name, x in weights.items() if name.startswith(prefix)}

    embed, head = part("visual.embed."), part("visual.head.")
    x = torch.nn.functional.conv2d(images, embed["patch_embedding.weight"], stride=c.patch_size).flatten(2).mT
    if c.vision_pool == "class":
        x = torch.cat([embed["class_embedding"].expand(len(x), 1, -1), x], dim=1)
    x = x + embed["position_embedding"]
    if c.vision_registers:
        x = torch.cat(
            [x, embed["registers"].expand(len(x), -1, -1)], dim=1
        )  # anywhere: tokens have no order of their own
    x = norm(x, embed, "ln_pre", c.layer_norm_eps)
    for i in range(c.vision_layers):
        x = block(x, part(f"visual.blocks.{i}."), c.vision_heads, c.layer_norm_eps, causal=False)
    x = norm(x, head, "ln_post", c.layer_norm_eps)
    image = x[:, 0] if c.vision_pool == "class" else x[:, : c.patches].mean(1)
    embed, text_head = part("text.embed."), part("text.head.")
    y = embed["token_embedding"][tokens] + embed["position_embedding"]
    for i in range(c.text_layers):
        y = block(y, part(f"text.blocks.{i}."), c.text_heads, c.layer_norm_eps, causal=True)
    y = norm(y, text_head, "ln_final", c.layer_norm_eps)[
        torch.arange(len(y)), (tokens == c.eot_token_id).int().argmax(1)
    ]
    found = (image @ head["projection.weight"].T, y @ text_head["projection.weight"].T)
    return tuple(f / f.norm(dim=1, keepdim=True) for f in found)


@pytest.mark.parametrize("options", EACH.values(), ids=EACH)
def test_features_and_gradients_are_those_of_the_equations(options):
    model = built(options)
    images, tokens = pairs(5)
    directions = [torch.randn(5, model.config.embed_dim, dtype=torch.float64) for _ in range(2)]
    images = images.double()
    found = model(images, tokens, chunk_size=2, checkpointing="full")
    sum((f * d).sum() for f, d in zip(found, directions, strict=True)).backward()
    plain = Clip(model.config).double()
    leaves = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    plain.state_dict = lambda: leaves
    expected = reference(plain, images, tokens)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    sum((f * d).sum() for f, d in zip(expected, directions, strict=True)).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.grad, leaves[name].grad, rtol=1e-8, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full", "offload"])
def test_chunks_and_recomputation_leave_gradients_unchanged(checkpointing):
    model = built(ALL)
    visible = torch.arange(7)[:, None] + torch.arange(5)
    options = dict(chunk_size=3, checkpointing=checkpointing, visible_patches=visible)
    torch.testing.assert_close(
        gradients(model, **options), gradients(model, visible_patches=visible), rtol=1e-10, atol=1e-12
    )


def test_they_are_off_by_default_and_where_they_begin():
    assert not [n for n in Clip(resolve_preset("demo")).state_dict() if "gamma" in n or "ln_q" in n or "registers" in n]
    weights = create_model("demo", **ALL).state_dict()
    assert weights["visual.blocks.0.attn.out.gamma"].unique().tolist() == [pytest.approx(0.1)]
    assert weights["text.blocks.1.mlp.fc2.gamma"].unique().tolist() == [pytest.approx(0.2)]
    assert weights["visual.embed.registers"].shape == (3, 128) and weights["text.blocks.0.attn.ln_k.weight"].shape == (
        32,
    )
    free = parameter_groups(create_model("demo", **ALL), OptimSection())[1]["params"]
    assert any(p.shape == (3, 128) for p in free), "registers do not decay"


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_operations_and_memory_are_counted(dropout):
    config = resolve_preset("demo", **ALL, patch_dropout=dropout)
    model, seen = create_model("demo", **ALL), []
    visible = None if not dropout else torch.arange(config.visible_patches).expand(2, -1)
    model.visual.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.extend(x.shape[1] for x in inputs[1:]))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(pairs(2)[0], visible_patches=visible)
    assert seen == [towers(config, None)[0].tokens] == [3 + 1 + config.visible_patches]
    assert counter.get_total_flops() == 2 * forward_flops(config)[0]


@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("option", ["layer scale", "QK-norm"])
def test_what_they_keep_for_backward_is_in_the_plan(option, checkpointing):
    """The bytes that chunks' graphs hold more than a plain model's, as autograd saves them."""
    names = dict(EACH[option])
    names.pop("layer_norm_eps", None)
    plain, other = (resolve_preset("demo", vision_layers=2, **o) for o in ({}, names))
    more = saved_bytes(other, checkpointing) - saved_bytes(plain, checkpointing)
    counts = [
        activation_bytes(c, 8, 4, checkpointing, "cpu", 24, Encoded())[0] / HEAP[checkpointing] for c in (other, plain)
    ]
    # float32 here, bf16 in the plan.
    assert more == pytest.approx(2 * (counts[0] - counts[1]), rel=0.05)


def saved_bytes(config, checkpointing, dtype=torch.float32) -> int:
    storages: dict[int, int] = {}

    def keep(x):
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    model = Clip(config).to(dtype)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    images, tokens = pairs(8)
    tokens[:] = 1
    tokens[:, -1] = config.eot_token_id  # captions that nothing is cut from
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        features = model(images, tokens, chunk_size=4, checkpointing=checkpointing)
    found = sum(size for pointer, size in storages.items() if pointer not in weights)
    del features
    return found


@pytest.mark.parametrize(
    "options", [{"vision_registers": 1}, {"text_layer_scale": 1e-5}, {"vision_qk_norm": True}], ids=str
)
def test_transformers_models_can_not_express_them(options):
    (name,) = options
    with pytest.raises(UserError, match=f"model.{name}: transformers' CLIPModel and SiglipModel have no such thing"):
        hf_class(resolve_preset("demo", **options))


def test_values_that_make_no_sense_are_refused():
    with pytest.raises(UserError, match="vision_registers is -1; it must be at least 0"):
        resolve_preset("demo", vision_registers=-1)
    for value in (0.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match="text_layer_scale is .*; it must be greater than 0"):
            resolve_preset("demo", text_layer_scale=value)
