"""ShardedMultiheadAttention against nn.MultiheadAttention in all its options, and torch's transformer layers
around it.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autotp.errors import AutoTPError, RewriteError
from autotp.runtime import (
    AttentionOptions,
    LinearOptions,
    ShardedLinear,
    ShardedMultiheadAttention,
    SharedEnter,
    all_reduce,
    attention_slices,
    disable_fast_paths,
    record_collectives,
    sharded_rng,
)
from tests.dist.pool import Pool
from tests.runtime.test_modules import Slices, agree, runs_of, shard, sizes_of
from tests.runtime.test_ops import WORLDS, close, rand, start

WIDTH, HEADS = 20, 5


def split_heads(
    whole: nn.MultiheadAttention, rank: int, heads: tuple[int, ...], **options: Any
) -> tuple[Any, Slices]:
    slices = attention_slices(whole, sum(heads[:rank]), heads[rank])
    local = shard(whole, slices)
    options = {"enter": "tp"} | options
    ShardedMultiheadAttention.swap(local, AttentionOptions(group="tp", heads=heads, rank=rank, **options))
    return local, slices


def self_attention(m: nn.Module, x: Tensor, **options: Any) -> Any:
    return m(x, x, x, **options)


def cross_attention(m: nn.Module, x: Tensor, memory: Tensor, **options: Any) -> Any:
    return m(x, memory, memory, **options)


def three_inputs(m: nn.Module, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
    return m(q, k, v, **options)


def constructions() -> None:
    """Each way to build one, on self-, cross- and three-input attention, with and without weights."""
    rank, world = start()
    heads = sizes_of(HEADS, world)
    t, s, b = 3, 4, 2
    for bias, add_bias_kv, add_zero_attn, batch_first in itertools.product((True, False), repeat=4):
        torch.manual_seed(1)
        whole = nn.MultiheadAttention(
            WIDTH,
            HEADS,
            bias=bias,
            add_bias_kv=add_bias_kv,
            add_zero_attn=add_zero_attn,
            batch_first=batch_first,
        ).double()
        for p in whole.parameters():
            nn.init.normal_(p)  # biases start as zeros
        local, slices = split_heads(whole, rank, heads)
        x, memory, other = rand(b, t, WIDTH), rand(b, s, WIDTH, seed=1), rand(b, s, WIDTH, seed=2)
        if not batch_first:
            x, memory, other = (a.transpose(0, 1).contiguous() for a in (x, memory, other))
        mask = rand(t, s, seed=3)
        padding = torch.tensor([[False] * s, [False, True, False, True]])
        for need_weights in (True, False):
            options: Any = {"need_weights": need_weights}
            agree(whole, local, slices, lambda m, *a, o=options: self_attention(m, *a, **o), x)
            agree(whole, local, slices, lambda m, *a, o=options: cross_attention(m, *a, **o), x, memory)
            options |= {"attn_mask": mask > 1, "key_padding_mask": padding}
            agree(whole, local, slices, lambda m, *a, o=options: three_inputs(m, *a, **o), x, memory, other)
            options["average_attn_weights"] = False
            agree(whole, local, slices, lambda m, *a, o=options: three_inputs(m, *a, **o), x, memory, other)


@pytest.mark.parametrize("world", WORLDS)
def test_constructions(dist: Pool, world: int) -> None:
    dist.run(world, constructions)


def masks() -> None:
    rank, world = start()
    torch.manual_seed(1)
    t, b = 3, 2
    whole = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True).double()
    local, slices = split_heads(whole, rank, sizes_of(HEADS, world))
    x = rand(b, t, WIDTH)
    causal = nn.Transformer.generate_square_subsequent_mask(t, dtype=torch.float64)
    per_head = rand(b * HEADS, t, t, seed=3)
    hidden = (per_head > 0.5) & (torch.arange(t) > 0)  # each query sees at least one key
    padding = torch.tensor([[False] * t, [False, False, True]])
    float_padding = torch.zeros(b, t, dtype=torch.float64).masked_fill(padding, -7.0)
    for need_weights, options in itertools.product(
        (True, False),
        (
            {"attn_mask": causal},
            {"attn_mask": causal, "is_causal": True},
            {"attn_mask": causal != 0, "key_padding_mask": padding},
            {"attn_mask": causal, "is_causal": True, "key_padding_mask": float_padding},
            {"attn_mask": per_head},
            {"attn_mask": hidden, "key_padding_mask": padding},
            {"key_padding_mask": float_padding},
        ),
    ):
        options = {**options, "need_weights": need_weights}
        agree(whole, local, slices, lambda m, *a, o=options: self_attention(m, *a, **o), x)
        if options.keys() == {"attn_mask", "need_weights"} and options["attn_mask"].dim() == 2:
            agree(
                whole, local, slices, lambda m, x, o=options: self_attention(m, x[0], **o), x
            )  # no batch dim
    options = {"attn_mask": per_head[:HEADS], "average_attn_weights": False}
    agree(whole, local, slices, lambda m, x: self_attention(m, x[0], **options), x)
    # a mask that is trained
    for shape in ((t, t), (b * HEADS, t, t)):
        bias = rand(*shape, seed=4)
        agree(
            whole, local, slices, lambda m, x, bias: m(x, x, x, attn_mask=bias, need_weights=False), x, bias
        )
    with pytest.raises(RuntimeError, match="Need attn_mask"):
        local(x, x, x, is_causal=True)
    with pytest.raises(AutoTPError, match="nested"):
        nested = torch.nested.nested_tensor([x[0], x[1]], layout=torch.jagged)
        local(nested, nested, nested)


@pytest.mark.parametrize("world", WORLDS)
def test_masks(dist: Pool, world: int) -> None:
    dist.run(world, masks)


def other_widths() -> None:
    rank, world = start()
    torch.manual_seed(1)
    whole = nn.MultiheadAttention(WIDTH, HEADS, kdim=7, vdim=9, add_bias_kv=True, batch_first=True).double()
    local, slices = split_heads(whole, rank, sizes_of(HEADS, world))
    assert set(slices) == {f"{x}_proj_weight" for x in "qkv"} | {
        "in_proj_bias",
        "out_proj.weight",
        "bias_k",
        "bias_v",
    }
    agree(whole, local, slices, three_inputs, rand(2, 3, WIDTH), rand(2, 4, 7), rand(2, 4, 9))
    # no heads at all on one rank, and all on another
    for need_weights in (True, False):
        for same in (True, False):
            whole = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True).double()
            local, slices = split_heads(whole, rank, (0, *sizes_of(HEADS, world - 1)))
            call = self_attention if same else cross_attention
            agree(
                whole,
                local,
                slices,
                lambda m, *a, f=call, w=need_weights: f(m, *a, need_weights=w, average_attn_weights=False),
                *(rand(2, 3, WIDTH, seed=i) for i in range(1 if same else 2)),
            )


@pytest.mark.parametrize("world", WORLDS)
def test_other_widths_and_ranks_without_heads(dist: Pool, world: int) -> None:
    dist.run(world, other_widths)


def costs() -> None:
    rank, world = start()
    torch.manual_seed(1)
    whole = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True).double()
    heads = sizes_of(HEADS, world)
    local, slices = split_heads(whole, rank, heads)
    x, memory = rand(2, 3, WIDTH, grad=True), rand(2, 4, WIDTH, grad=True)
    activation = 2 * 3 * WIDTH * 8
    with record_collectives() as log:
        local(x, x, x, need_weights=False)[0].sum().backward()
    assert [(c.kind, c.bytes, c.direction) for c in log] == [
        ("all_reduce", activation, "forward"),
        ("all_reduce", activation, "backward"),
    ]
    with record_collectives() as log:
        local(x, memory, memory, need_weights=False)[0].sum().backward()
    assert log.count("all_reduce", "forward") == 1 and log.count("all_reduce", "backward") == 2
    with record_collectives() as log:
        local(x, x, x)
        local(x, x, x, average_attn_weights=False)
    assert [(c.kind, c.bytes) for c in log] == [
        ("all_reduce", activation),
        ("all_reduce", 2 * 3 * 3 * 8),
        ("all_reduce", activation),
        ("all_gather", 2 * HEADS * 3 * 3 * 8),
    ]

    # entered and reduced elsewhere
    share = SharedEnter("tp", 1)
    partial, slices = split_heads(whole, rank, heads, enter=share, reduce=False, keep=rank == world - 1)

    def call(m: nn.Module, x: Tensor) -> Tensor:
        y = m(x, x, x)[0]
        return y if m is whole else all_reduce(y, "tp")

    agree(whole, partial, slices, call, x)
    agree(whole, copy.deepcopy(partial), slices, call, x)
    with pytest.raises(RewriteError, match=r"out_proj\.weight should have"):
        wrong = copy.deepcopy(whole)
        ShardedMultiheadAttention.swap(wrong, AttentionOptions("tp", heads, rank, "tp"))


@pytest.mark.parametrize("world", WORLDS)
def test_costs_and_partial_outputs(dist: Pool, world: int) -> None:
    dist.run(world, costs)


def layers(kind: str, batch_first: bool, norm_first: bool) -> None:
    """nn.TransformerEncoder and Decoder: trained, in eval mode with gradients, and without (torch's fast
    path).
    """
    rank, world = start()
    torch.manual_seed(1)
    options: Any = {
        "batch_first": batch_first,
        "norm_first": norm_first,
        "dropout": 0.0,
        "dim_feedforward": 10,
    }
    heads, width = 6, 12
    if kind == "encoder":
        layer: nn.Module = nn.TransformerEncoderLayer(width, heads, **options)
        whole: nn.Module = nn.TransformerEncoder(
            layer, 2, enable_nested_tensor=not norm_first and batch_first
        )
    else:
        layer = nn.TransformerDecoderLayer(width, heads, **options)
        whole = nn.TransformerDecoder(layer, 2)
    whole.double()
    slices: Slices = {}
    mine, count = runs_of(10, rank, world), sizes_of(heads, world)
    for name, m in whole.named_modules():
        if isinstance(m, nn.MultiheadAttention):
            slices |= {
                f"{name}.{k}": v for k, v in attention_slices(m, sum(count[:rank]), count[rank]).items()
            }
        if name.endswith("linear1"):
            slices |= {f"{name}.weight": (0, mine), f"{name}.bias": (0, mine)}
        if name.endswith("linear2"):
            slices[f"{name}.weight"] = (1, mine)
    local = shard(whole, slices)
    for name, m in list(local.named_modules()):
        if isinstance(m, nn.MultiheadAttention):
            ShardedMultiheadAttention.swap(m, AttentionOptions("tp", count, rank, "tp"))
        if name.endswith("linear1"):
            ShardedLinear.swap(m, LinearOptions(enter="tp"))
        if name.endswith("linear2"):
            ShardedLinear.swap(m, LinearOptions(reduce="tp", bias="after"))
    disable_fast_paths(local)
    x, memory = rand(2, 3, width), rand(2, 4, width, seed=1)
    if not batch_first:
        x, memory = x.transpose(0, 1), memory.transpose(0, 1)
    inputs = (x,) if kind == "encoder" else (x, memory)
    causal = nn.Transformer.generate_square_subsequent_mask(3, dtype=torch.float64)
    for mode, mask in itertools.product((True, False), (None, causal)):
        whole.train(mode), local.train(mode)
        key = "mask" if kind == "encoder" else "tgt_mask"
        agree(whole, local, slices, lambda m, *a, o={key: mask}: m(*a, **o), *inputs)
        with torch.no_grad():
            close(local(*inputs, **{key: mask}), whole(*inputs, **{key: mask}), rtol=1e-10, atol=1e-10)
        with torch.inference_mode():
            close(local(*inputs, **{key: mask}), whole(*inputs, **{key: mask}), rtol=1e-10, atol=1e-10)
    if kind == "encoder":
        padding = torch.tensor([[False, False, False], [False, False, True]])
        with torch.no_grad():  # torch's nested tensors write zeros where there is padding: compare the rest
            a, b = (m(x, src_key_padding_mask=padding) for m in (local, whole))
            keep = ~padding if batch_first else ~padding.t()
            close(a[keep], b[keep], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("world", (2, 4))
@pytest.mark.parametrize("norm_first", (False, True))
@pytest.mark.parametrize("batch_first", (False, True))
@pytest.mark.parametrize("kind", ("encoder", "decoder"))
def test_torch_layers(dist: Pool, world: int, kind: str, batch_first: bool, norm_first: bool) -> None:
    dist.run(world, layers, kind, batch_first, norm_first)


def only_the_mlp() -> None:
    """Attention replicated, feed-forward sharded: the layer's fast path reads linear1.weight past our
    forward.
    """
    rank, world = start()
    torch.manual_seed(1)
    whole = (
        nn.TransformerEncoderLayer(12, 2, dim_feedforward=10, batch_first=True, dropout=0.0).double().eval()
    )
    mine = runs_of(10, rank, world)
    local: Any = shard(
        whole, {"linear1.weight": (0, mine), "linear1.bias": (0, mine), "linear2.weight": (1, mine)}
    )
    ShardedLinear.swap(local.linear1, LinearOptions(enter="tp"))
    ShardedLinear.swap(local.linear2, LinearOptions(reduce="tp", bias="after"))
    disable_fast_paths(local)
    x = rand(2, 3, 12)
    with torch.no_grad():
        close(local(x), whole(x), rtol=1e-10, atol=1e-10)


def test_fast_path_with_a_sharded_feed_forward(dist: Pool) -> None:
    dist.run(2, only_the_mlp)


def dropout() -> None:
    rank, world = start()
    torch.manual_seed(5)
    whole = nn.MultiheadAttention(WIDTH, HEADS, dropout=0.5, batch_first=True).double()
    local, _ = split_heads(whole, rank, sizes_of(HEADS, world))
    x = rand(2, 3, WIDTH)
    torch.manual_seed(7)
    first = local(x, x, x, need_weights=False)[0]
    after = torch.rand(3)
    torch.manual_seed(7)
    close(local(x, x, x, need_weights=False)[0], first, rtol=0, atol=0)  # reproducible from one seed
    close(
        all_reduce(after, "tp"), after * world
    )  # replicated regions go on in step, though head counts differ
    # each rank draws its own
    with sharded_rng("tp", torch.device("cpu")):
        drawn = torch.rand(4)
    with sharded_rng("tp", torch.device("cpu")):
        again = torch.rand(4)
    assert not torch.equal(drawn, again)
    everybody = [torch.empty_like(drawn) for _ in range(world)]
    torch.distributed.all_gather(everybody, drawn)
    assert len({tuple(t.tolist()) for t in everybody}) == world
    local.eval()
    assert torch.equal(local(x, x, x)[0], local(x, x, x)[0])


@pytest.mark.parametrize("world", (2, 3))
def test_dropout(dist: Pool, world: int) -> None:
    dist.run(world, dropout)
