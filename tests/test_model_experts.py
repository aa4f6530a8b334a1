"""Routed blocks: against a dense tower and the equations token by token, cut in any way, counted, kept, and where they can't go."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dsclip.config.schema import ModelSection
from dsclip.convert.hf import hf_class
from dsclip.convert.init import fitted_weights
from dsclip.convert.openclip_export import export_openclip
from dsclip.convert.source import Source
from dsclip.convert.streamed import loaded_clip, spread_clip
from dsclip.create import create_model
from dsclip.distributed import Collectives
from dsclip.engine.expert_balance import ExpertBalance
from dsclip.errors import UserError
from dsclip.evaluate.results.protocol import weights_sha256
from dsclip.model import Clip, resolve_preset
from dsclip.model.compiled import compile_blocks
from dsclip.model.config import OF_THE_RUN
from dsclip.model.experts import BALANCE_STEP, RoutedBlock, RoutedMlp
from dsclip.model.flops import experts_last_products, forward_flops
from dsclip.model.trained import choose_trained
from dsclip.plan.memory import HEAP, Encoded, activation_bytes
from tests.test_convert import checkpoint_of
from tests.test_model_clip import SMALL, gradients, pairs
from tests.test_model_tower_options import saved_bytes

ROUTED = dict(text_experts=5, text_experts_per_token=2, text_experts_every=1)


def routed(**options) -> Clip:
    """In float64, with a router that tells tokens apart, and an uneven balance."""
    torch.manual_seed(0)
    model = create_model("demo", **SMALL, **(options or ROUTED)).double()
    for mlp in mlps(model):
        mlp.balance += torch.arange(len(mlp.balance)) * 10
        mlp.router.data *= 25
    return model


def mlps(model: Clip) -> list[RoutedMlp]:
    return [block.mlp for block in model.text.blocks if isinstance(block, RoutedBlock)]


@pytest.mark.parametrize(
    "sizes", [{}, dict(chunk_size=3, checkpointing="full"), dict(checkpointing="selective")], ids=str
)
@pytest.mark.parametrize("pool", ["end", "last"])
def test_one_expert_is_the_dense_tower(sizes, pool):
    dense = create_model("demo", **SMALL, text_pool=pool).double()
    one = create_model("demo", **SMALL, text_pool=pool, text_experts=1, text_experts_every=1).double()
    weights = {
        name.replace(".mlp.", ".mlp.experts.0.") if "text" in name else name: w
        for name, w in dense.state_dict().items()
    }
    kept = {name: w for name, w in one.state_dict().items() if name.endswith(("router", "balance"))}
    one.load_state_dict(weights | kept)
    torch.testing.assert_close(one(*pairs()), dense(*pairs()), rtol=0, atol=1e-14)
    assert gradients(dense, **sizes) is not None and gradients(one, **sizes) is not None
    found = {name.replace(".mlp.experts.0.", ".mlp."): p.grad for name, p in one.named_parameters()}
    for name, parameter in dense.named_parameters():
        torch.testing.assert_close(
            found[name], parameter.grad, rtol=1e-11, atol=1e-13, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert not found["text.blocks.0.mlp.router"].abs().max() > 1e-14, "a router without a choice learns nothing"


def token_by_token(mlp: RoutedMlp, x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """The equations of one token at a time, [B, T, W]."""
    rows, n, k = [], len(mlp.experts), mlp.per_token
    for sample, end in zip(x, ends.tolist(), strict=True):
        for place, token in enumerate(sample):
            shares = torch.exp(mlp.router @ token) / torch.exp(mlp.router @ token).sum()
            preferred = sorted(range(n), key=lambda i, s=shares: -(s[i].item() + BALANCE_STEP * mlp.balance[i].item()))[
                :k
            ]
            own = sum(n / k * shares[i] * mlp.experts[i](token) for i in preferred)
            rows.append(own if place <= end else torch.zeros_like(token))
    return torch.stack(rows).view(x.shape)


@pytest.mark.parametrize(("experts", "per_token"), [(4, 1), (5, 2), (3, 3)])
def test_a_routed_mlp_is_the_sum_of_the_equation(experts, per_token):
    torch.manual_seed(1)
    mlp = RoutedMlp(8, 12, "gelu", text_layers=2, layer_scale=0.5, experts=experts, per_token=per_token).double()
    mlp.router.data *= 30
    mlp.balance += torch.randint(-200, 200, (experts,))
    x, ends = torch.randn(3, 6, 8, dtype=torch.float64, requires_grad=True), torch.tensor([5, 0, 3])
    direction, inputs = torch.randn(3, 6, 8, dtype=torch.float64), [x, *mlp.parameters()]
    found, expected = mlp(x, ends), token_by_token(mlp, x, ends)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    ours, theirs = (torch.autograd.grad((y * direction).sum(), inputs, allow_unused=True) for y in (found, expected))
    assert all(g is not None for g in ours), "also of experts without a token"
    for g, e in zip(ours, theirs, strict=True):
        torch.testing.assert_close(g, torch.zeros_like(g) if e is None else e, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full", "offload"])
def test_chunks_and_recomputation_leave_gradients_unchanged(checkpointing):
    model = routed()
    torch.testing.assert_close(
        gradients(model, chunk_size=3, checkpointing=checkpointing), gradients(model), rtol=1e-10, atol=1e-12
    )


def test_a_caption_has_its_features_whatever_it_is_beside_and_padding_goes_to_no_expert():
    model, (_, tokens) = routed(), pairs(9)
    together = model(None, tokens, chunk_size=4)[1]
    torch.testing.assert_close(together, torch.cat([model(None, t[None])[1] for t in tokens]), rtol=1e-12, atol=1e-13)
    for mlp in mlps(model):
        mlp.counted = torch.zeros(5, dtype=torch.int64)
    model(None, tokens)
    assert [int(mlp.counted.sum()) for mlp in mlps(model)] == 2 * [2 * int(model.valid_tokens(tokens).sum())]


@pytest.mark.parametrize(
    "sizes", [{}, dict(chunk_size=2, checkpointing="full"), dict(checkpointing="selective")], ids=str
)
def test_what_backward_runs_again_is_not_counted_and_the_balance_evens_the_loads(sizes):
    model = routed()
    balance = ExpertBalance(model, Collectives.single(), torch.device("cpu"))
    before = [mlp.balance.clone() for mlp in mlps(model)]
    with balance.counting():
        image, text = model(*pairs(), **sizes)
    (image @ text.T).sum().backward()
    model(*pairs())
    counts = balance._counts.clone()
    assert counts.sum(dim=1).tolist() == 2 * [2 * int(model.valid_tokens(pairs()[1]).sum())]
    balance.step(applied=False)
    assert all(torch.equal(mlp.balance, b) for mlp, b in zip(mlps(model), before, strict=True))
    assert not balance._counts.any()
    shares = [balance.numbers()[f"expert_text.blocks.{i}"].item() for i in (0, 1)]
    assert shares == pytest.approx([(c.max() / c.sum()).item() for c in counts])
    spread = []
    for _ in range(120):
        with balance.counting(), torch.no_grad():
            model(None, pairs()[1])
        spread.append((balance._counts.amax(dim=1) / balance._counts.sum(dim=1)).max().item())
        balance.step(applied=True)
    assert spread[0] > 0.3 and sum(spread[-20:]) / 20 < 0.24, "of five experts an even share is 0.2"


def test_what_is_not_trained_keeps_its_balance_and_a_dense_model_has_none():
    model = routed()
    choose_trained(model, ModelSection(lock="text"))
    assert not ExpertBalance(model, Collectives.single(), torch.device("cpu")).numbers()
    assert not ExpertBalance(create_model("demo"), Collectives.single(), torch.device("cpu")).numbers()
    adapted = routed()
    choose_trained(adapted, ModelSection(lora_rank=4))
    assert (
        adapted.text.blocks[0].mlp.experts[3].fc1.lora is not None
        and not adapted.text.blocks[0].mlp.router.requires_grad
    )


@pytest.mark.parametrize("options", [{}, {"text_layer_scale": 0.2}], ids=str)
def test_a_dense_source_becomes_experts_that_begin_as_its_mlps(options):
    dense = create_model("demo", **SMALL, **options)
    said = {name: value for name, value in asdict(dense.config).items() if name not in OF_THE_RUN}
    source = Source(Path("dense"), said, 10.0, dense.state_dict())
    config = replace(dense.config, text_experts=3, text_experts_per_token=2)
    model = Clip(config)
    model.load_state_dict(fitted_weights(source, config)[0])
    tokens = pairs()[1]
    near, expected = model(None, tokens)[1], dense(None, tokens)[1]
    assert 1e-6 < (near - expected).abs().max() < 0.02
    model.text.blocks[1].mlp.router.data.zero_()  # indifferent: shares of a third, and gates of a half
    torch.testing.assert_close(model(None, tokens)[1], expected)
    assert any("each expert begins as a copy" in note for note in source.notes(config))
    again = replace(source, said=asdict(config), stored=model.state_dict())
    assert not any("each expert" in note for note in again.notes(config))
    with pytest.raises(UserError, match="text_experts 3 against 5"):
        fitted_weights(again, replace(config, text_experts=5))
    with pytest.raises(UserError, match="text_experts 3 against 0"):
        fitted_weights(again, dense.config)


def test_operations_are_counted():
    config = resolve_preset("demo", **SMALL, **ROUTED)
    model, tokens = Clip(config), pairs(3)[1]
    tokens[:], tokens[:, -1] = 1, 59  # no padding
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(None, tokens)
    assert counter.get_total_flops() == 3 * forward_flops(config)[1]
    dense = forward_flops(replace(config, text_experts=0, text_experts_per_token=1, text_experts_every=2))[1]
    one = forward_flops(replace(config, text_experts_per_token=1))[1]
    assert one - dense == 2 * 2 * 24 * 128 * 5, "with one expert a token, the router's products alone"
    assert experts_last_products(config) == 2 * 2 * 24 * 2 * 128 * 512


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("per_token", [1, 2])
def test_what_routed_blocks_keep_for_backward_is_in_the_plan(per_token, checkpointing):
    plain = resolve_preset("demo", vision_layers=1, text_layers=2)
    other = replace(plain, **ROUTED | dict(text_experts_per_token=per_token))
    found = {
        name: saved_bytes(config, checkpointing, torch.bfloat16)
        for name, config in (("plain", plain), ("routed", other))
    }
    planned = [
        activation_bytes(c, 8, 4, checkpointing, "cpu", 24, Encoded())[0] / HEAP[checkpointing] for c in (plain, other)
    ]
    assert found["routed"] - found["plain"] == pytest.approx(planned[1] - planned[0], rel=0.05, abs=2000)


def test_compiled_towers_run_routed_blocks_as_they_are():
    model = routed(text_experts=3)
    expected = gradients(model)
    compile_blocks(model, "eager")
    assert [type(b.forward).__name__ == "method" and "forward" in vars(b) for b in model.text.blocks] == [True, False]
    torch.testing.assert_close(gradients(model), expected, rtol=1e-10, atol=1e-12)


def test_the_balance_stays_whole_in_bf16(tmp_path):
    model = routed().float()
    stored = {name: tensor.float() for name, tensor in model.state_dict().items()}  # as checkpoints give it
    stored["text.blocks.0.mlp.balance"][0] = 1001.0  # bf16 has 1000 and 1008
    one = loaded_clip(model.config, stored.items(), torch.device("cpu"), torch.bfloat16)
    spread, _ = spread_clip(model.config, stored.items(), torch.bfloat16, tmp_path, 0.0005, gpus=False)
    for loaded in (one, spread):
        assert loaded.text.blocks[0].mlp.balance.tolist() == [1001, 10, 20, 30, 40]
    hashes = [weights_sha256(one), weights_sha256(spread, stored, torch.bfloat16)]
    assert any(value.is_meta for value in spread.state_dict().values()) and hashes[0] == hashes[1]
    tokens = pairs()[1]
    torch.testing.assert_close(spread(None, tokens)[1], one(None, tokens)[1])


def test_where_they_can_not_go_is_said(demo, tmp_path):
    model = create_model("demo", **SMALL, text_experts=2)
    with pytest.raises(
        UserError, match="model.text_experts: transformers' CLIPModel and SiglipModel have no such thing"
    ):
        hf_class(model.config)
    with pytest.raises(UserError, match="model.text_experts is 2: OpenCLIP's text towers have one MLP in each block"):
        export_openclip(checkpoint_of(model, demo), tmp_path / "out")
    for wrong, said in (
        (
            dict(text_experts=2, text_experts_per_token=3),
            "text_experts_per_token is 3, and model.text_experts 2: a token can't have more",
        ),
        (
            dict(text_experts=2, text_experts_every=3),
            "text_experts_every is 3, and model.text_layers 2: no block would be routed",
        ),
        (dict(text_experts_per_token=2), "text_experts_per_token is 2, and model.text_experts 0: no block is routed"),
        (dict(text_experts=-1), "text_experts is -1; it must be at least 0"),
    ):
        with pytest.raises(UserError, match=said):
            resolve_preset("demo", **wrong)
    assert "text_experts" in asdict(model.config)
