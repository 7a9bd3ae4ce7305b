"""Rules of attention kernels that are not installed here: CPU ops of their schemas, against the rules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.nn.attention.flex_attention import flex_attention

from autotp.axes.check import check_rule
from autotp.axes.rules.context import OpContext
from autotp.axes.rules.registry import find_rule
from autotp.axes.term import Solver
from tests.axes.proof import real

LIBRARIES = [torch.library.Library(name, "FRAGMENT") for name in ("flash_attn", "xformers")]


def plain(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention on [b, s, h, d], and the softmax's denominators [b, h, s]."""
    group = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
    scores = torch.einsum("bqhd, bkhd -> bhqk", q, k) * scale
    if bias is not None:
        scores = scores + bias
    if causal:
        future = torch.ones(scores.shape[-2:]).tril(scores.shape[-1] - scores.shape[-2]) == 0
        scores = scores.masked_fill(future, float("-inf"))
    return torch.einsum("bhqk, bkhe -> bqhe", scores.softmax(-1), v), scores.logsumexp(-1)


def distances(slopes: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """ALiBi's bias, for slopes of [h] or [b, h]."""
    away = (torch.arange(q.shape[1])[:, None] - torch.arange(k.shape[1])).abs()
    return -slopes.reshape(-1, slopes.shape[-1], 1, 1) * away


def flash_forward(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int,
    window_size_right: int, softcap: float, alibi_slopes: Tensor | None, return_softmax: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    bias = None if alibi_slopes is None else distances(alibi_slopes, q, k)
    out, lse = plain(q, k, v, softmax_scale, causal, bias)
    return out, lse, q.new_empty(0), torch.zeros(2, dtype=torch.int64)


def flash_varlen_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int = -1, window_size_right: int = -1,
    softcap: float = 0.0, alibi_slopes: Tensor | None = None, return_softmax: bool = False,
    block_table: Tensor | None = None, leftpad_k: Tensor | None = None, seqused_k: Tensor | None = None,
    zero_tensors: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    ends_q, ends_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    parts = [
        plain(q[None, a:b], k[None, c:d], v[None, c:d], softmax_scale, causal)
        for a, b, c, d in zip(ends_q, ends_q[1:], ends_k, ends_k[1:], strict=False)
    ]
    out, lse = torch.cat([o[0] for o, _ in parts]), torch.cat([s[0] for _, s in parts], dim=-1)
    return out, lse, q.new_empty(0), torch.zeros(2, dtype=torch.int64)


def cutlass_forward(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None, max_seqlen_q: int | None, max_seqlen_k: int | None, dropout_p: float,
    custom_mask_type: int, compute_log_sumexp: bool = False, *, scale: float | None = None,
    seqlen_k: Tensor | None = None, window_size: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, int, int]:  # fmt: skip
    out, lse = plain(query, key, value, scale or query.shape[-1] ** -0.5, custom_mask_type == 1, bias)
    seed = torch.zeros((), dtype=torch.int64)
    return out, lse, seed, seed.clone(), query.shape[1], key.shape[1]


def define(name: str, schema: str, function: object) -> None:
    library = LIBRARIES[0 if name.startswith("flash_attn") else 1]
    if not hasattr(getattr(torch.ops, name.split("::")[0]), name.split("::")[1]):
        library.define(name.split("::")[1] + schema)
        library.impl(name.split("::")[1], function, "CompositeImplicitAutograd")


define(
    "flash_attn::_flash_attn_forward",
    "(Tensor q, Tensor k, Tensor v, float dropout_p, float softmax_scale, bool causal, int window_size_left, "
    "int window_size_right, float softcap, Tensor? alibi_slopes, bool return_softmax) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    flash_forward,
)
define(
    "flash_attn::_flash_attn_varlen_forward",
    "(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, int max_seqlen_q, int max_seqlen_k, "
    "float dropout_p, float softmax_scale, bool causal, int window_size_left=-1, int window_size_right=-1, "
    "float softcap=0.0, Tensor? alibi_slopes=None, bool return_softmax=False, Tensor? block_table=None, "
    "Tensor? leftpad_k=None, Tensor? seqused_k=None, bool zero_tensors=False) -> (Tensor, Tensor, Tensor, Tensor)",
    flash_varlen_forward,
)
define(
    "xformers::efficient_attention_forward_cutlass",
    "(Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
    "SymInt? max_seqlen_q, SymInt? max_seqlen_k, float dropout_p, int custom_mask_type, bool compute_log_sumexp=False, "
    "*, float? scale=None, Tensor? seqlen_k=None, int? window_size=None) "
    "-> (Tensor, Tensor, Tensor, Tensor, SymInt, SymInt)",
    cutlass_forward,
)


def qkv(heads: int, kv_heads: int, batch: tuple[int, ...] = (3,), q: int = 5, k: int = 7) -> tuple[Tensor, ...]:
    return real(*batch, q, heads, 4), real(*batch, k, kv_heads, 4, seed=1), real(*batch, k, kv_heads, 6, seed=2)


FORWARD = (0.0, 0.5, True, -1, -1, 0.0)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "axes"),
    [
        (5, 5, ("dim 0 of 'q' (3)", "dim 2 of 'q' (5)")),
        (5, 1, ("dim 0 of 'q' (3)", "dim 2 of 'q' (5)")),
        (15, 5, ("dim 0 of 'q' (3)", "dim 2 of 'q' (5)", "dim 2 of 'q' (3)")),  # kv heads, queries of one
    ],
)
def test_flash_attention(heads: int, kv_heads: int, axes: tuple[str, ...]) -> None:
    found = check_rule("flash_attn::_flash_attn_forward", (*qkv(heads, kv_heads), *FORWARD, None, False))
    assert found.axes == axes
    assert found.gradients and not found.summed


@pytest.mark.parametrize("slopes", [(5,), (3, 5)])
def test_slopes_go_with_their_heads(slopes: tuple[int, ...]) -> None:
    args = (*qkv(5, 5), *FORWARD, real(*slopes).abs(), False)
    found = check_rule("flash_attn::_flash_attn_forward", args)
    assert found.axes == ("dim 0 of 'q' (3)", "dim 2 of 'q' (5)")


def test_packed_sequences() -> None:
    """Positions of all sequences stand in one dim, which lengths cut; only heads pass."""
    q, k, v = qkv(10, 5, (), 9, 11)
    ends_q, ends_k = torch.tensor([0, 4, 9]), torch.tensor([0, 6, 11])
    args = (q, k, v, ends_q, ends_k, 5, 6, 0.0, 0.5, True)
    found = check_rule("flash_attn::_flash_attn_varlen_forward", args)
    assert found.axes == ("dim 1 of 'q' (5)", "dim 1 of 'q' (2)")


def test_xformers() -> None:
    args = (*qkv(5, 5), real(3, 5, 5, 7), None, None, None, None, 0.0, 0)
    found = check_rule("xformers::efficient_attention_forward_cutlass", args)
    assert found.axes == ("dim 0 of 'query' (3)", "dim 2 of 'query' (5)")
    args = (*qkv(5, 5), None, None, None, None, None, 0.0, 1, True)
    assert check_rule("xformers::efficient_attention_forward_cutlass", args).axes == found.axes


ATEN = torch.library.Library("aten", "IMPL")


def heads_second(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, causal: bool, scale: float | None):  # type: ignore[no-untyped-def]
    swapped = (x.transpose(1, 2) for x in (query, key, value))
    out, lse = plain(*swapped, scale or query.shape[-1] ** -0.5, causal, bias)
    return out.transpose(1, 2), lse


def seed() -> Tensor:
    return torch.zeros((), dtype=torch.int64)


def sdpa_flash(q, k, v, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None):  # type: ignore[no-untyped-def]
    out, lse = heads_second(q, k, v, None, is_causal, scale)
    return out, lse, seed(), seed(), q.shape[2], k.shape[2], seed(), seed(), seed()


def sdpa_efficient(q, k, v, attn_bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, *, scale=None):  # type: ignore[no-untyped-def]
    return *heads_second(q, k, v, attn_bias, is_causal, scale), seed(), seed()


def sdpa_cudnn(  # type: ignore[no-untyped-def]
    q, k, v, attn_bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None
):
    out, lse = heads_second(q, k, v, attn_bias, is_causal, scale)
    return out, lse, seed(), seed(), q.shape[2], k.shape[2], seed(), seed(), seed()


def aten_flash(q, k, v, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, debug, **kwargs):  # type: ignore[no-untyped-def]
    slopes = kwargs.get("alibi_slopes")
    bias = None if slopes is None else distances(slopes, q, k)
    out, lse = plain(q, k, v, kwargs.get("scale") or 0.5, is_causal, bias)
    return out, lse, seed(), seed(), seed()


def aten_efficient(q, k, v, bias, seq_q, seq_k, max_q, max_k, dropout_p, mask_type, lse=False, **kwargs):  # type: ignore[no-untyped-def]
    return cutlass_forward(q, k, v, bias, seq_q, seq_k, max_q, max_k, dropout_p, mask_type, lse, **kwargs)


for _name, _function in {
    "_scaled_dot_product_flash_attention": sdpa_flash,
    "_scaled_dot_product_efficient_attention": sdpa_efficient,
    "_scaled_dot_product_cudnn_attention": sdpa_cudnn,
    "_flash_attention_forward": aten_flash,
    "_efficient_attention_forward": aten_efficient,
}.items():
    ATEN.impl(_name, _function, "CPU")


def swapped(heads: int, kv_heads: int) -> tuple[Tensor, ...]:
    return tuple(x.transpose(1, 2).contiguous() for x in qkv(heads, kv_heads))


@pytest.mark.parametrize(
    ("op", "args", "kwargs"),
    [
        ("_scaled_dot_product_flash_attention", (*swapped(5, 5), 0.0, True), {}),
        ("_scaled_dot_product_efficient_attention", (*swapped(5, 5), real(3, 5, 5, 7), True), {}),
        ("_scaled_dot_product_cudnn_attention", (*swapped(5, 5), None, True, 0.0, True), {}),
    ],
)
def test_torchs_own(op: str, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
    """The kernels behind scaled_dot_product_attention: ``[b, h, s, d]``."""
    found = check_rule(f"aten::{op}.default" if "flash" in op else f"aten::{op}", args, kwargs)
    assert found.axes == ("dim 0 of 'query' (3)", "dim 1 of 'query' (5)")


@pytest.mark.parametrize(
    ("op", "args", "kwargs"),
    [
        ("_flash_attention_forward.default", (*qkv(5, 5), None, None, 5, 7, 0.0, True, False), {}),
        ("_flash_attention_forward.default", (*qkv(15, 5), None, None, 5, 7, 0.0, True, False), {"scale": 0.3}),
        ("_efficient_attention_forward", (*qkv(5, 5), real(3, 5, 5, 7), None, None, None, None, 0.0, 0), {}),
    ],
)
def test_torchs_own_below(op: str, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
    """And those below: ``[b, s, h, d]``."""
    found = check_rule(f"aten::{op}", args, kwargs)
    assert found.axes[:2] == ("dim 0 of 'query' (3)", "dim 2 of 'query' (5)")
    assert len(found.axes) == (3 if kwargs else 2)


KNOWN = """
    aten._scaled_dot_product_flash_attention aten._scaled_dot_product_efficient_attention
    aten._scaled_dot_product_cudnn_attention aten._flash_attention_forward aten._efficient_attention_forward
    torch_attn._varlen_attn flash_attn._flash_attn_forward flash_attn._flash_attn_varlen_forward flex_attention
"""


@pytest.mark.parametrize("name", KNOWN.split())
def test_built_in(name: str) -> None:
    assert find_rule(name) is not None


def test_a_wrong_rule_is_found() -> None:
    """The stand-ins can tell: positions cannot be split, and heads are where the rules say."""
    q, k, v = qkv(5, 5)
    whole = torch.ops.flash_attn._flash_attn_forward(q, k, v, *FORWARD, None, False)[0]
    assert torch.allclose(
        whole,
        F.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, v)), torch.ones(5, 7).tril(2) > 0, scale=0.5
        ).transpose(1, 2),
    )


def by_head(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return score - h * (i - j).abs()


def by_place(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return score - (i - j).abs()


def by_sequence(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return torch.where(i - j < b + 2, score, -float("inf"))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(
    ("score", "passes"), [(None, "bh"), (by_place, "bh"), (by_head, "b"), (by_sequence, "h")],
    ids=["none", "by place", "by head", "by sequence"],
)
def test_flex_attention(score: object, passes: str) -> None:
    """What asks for its head, or its sequence, needs all of them; and is what a slice of them tells from the whole."""
    q, k, v = (x.float() for x in swapped(6, 3))
    whole = flex_attention(q, k, v, score_mod=score, enable_gqa=True)  # type: ignore[arg-type]
    graph = make_fx(
        lambda *qkv: flex_attention(*qkv, score_mod=score, enable_gqa=True),  # type: ignore[arg-type]
        tracing_mode="fake",
        pre_dispatch=True,
    )(q, k, v).graph
    (node,) = (n for n in graph.nodes if str(n.target) == "flex_attention")
    solver, dims = Solver(), {}

    def consume(used: fx.Node) -> tuple[tuple[Any, ...], ...]:
        shape = used.meta["val"].shape
        return (dims.setdefault(used, tuple(solver.fresh(n) for n in shape)),)

    op = OpContext(node, solver, consume)
    rule = find_rule(node.target)
    assert rule is not None
    rule(op)
    free = [not solver.is_frozen(dim) for dim in op.dims(op.tensor("0"))]
    assert free == ["b" in passes, "h" in passes, False, False]
    assert len(op.dims(op.tensor("0"))[1]) == (2 if "h" in passes else 1)
    last = flex_attention(q[:, 2:], k[:, 1:], v[:, 1:], score_mod=score, enable_gqa=True)  # type: ignore[arg-type]
    assert torch.allclose(last, whole[:, 2:], atol=1e-5) == ("h" in passes)
    last = flex_attention(q[1:], k[1:], v[1:], score_mod=score, enable_gqa=True)  # type: ignore[arg-type]
    assert torch.allclose(last, whole[1:], atol=1e-5) == ("b" in passes)
