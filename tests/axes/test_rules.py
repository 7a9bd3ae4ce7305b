"""Every sharding rule against its real op: what it says (one line a sample), and that this is so."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from autotp.axes.rules.registry import Rule, make_einsum_rule, registered
from tests.axes.proof import Sample, bools, check, ints, problems, real

inf = float("inf")


def s(
    target: str, expected: str, *args: Any, unclaimed: bool = False, rtol: float = 1e-9, **kwargs: Any
) -> Sample:
    return Sample(target, expected, args, kwargs, unclaimed, rtol)


def sorted_of(x: torch.Tensor) -> torch.Tensor:
    return x.sort(-1).values


def half(*shape: int) -> torch.Tensor:
    """Random numbers of bfloat16."""
    return real(*shape).to(torch.bfloat16)


def pos(*shape: int) -> torch.Tensor:
    """Positive numbers."""
    return real(*shape).abs() + 0.1


ELEMENTWISE = [
    s("relu", "ab -> ab", real(3, 5)),
    s("gelu", "ab -> ab", real(3, 5), approximate="tanh"),
    s("silu_", "ab -> ab", real(3, 5)),
    s("neg", "ab -> ab", real(3, 5)),
    s("pow.Tensor_Scalar", "ab -> ab", real(3, 5), 2),
    s("pow.Scalar", "a -> a", 2.0, real(5)),
    s("add.Tensor", "ab, ab -> ab", real(3, 5), real(3, 5, seed=1)),
    s("add.Tensor", "ab, b -> ab", real(3, 5), real(5), alpha=2),
    s("add.Tensor", "1a, b1 -> ba", real(1, 5), real(3, 1)),
    s("add.Tensor", "ab -> ab", real(3, 5), 1.5),
    s("add.Tensor", "ab,  -> ab", real(3, 5), real()),
    s("add.Scalar", "ab -> ab", real(3, 5), 1.5),
    s("add_.Tensor", "ab, b -> ab", real(3, 5), real(5), unclaimed=True),
    s("sub.Tensor", "ab, ab -> ab", real(3, 5), real(3, 5, seed=1)),
    s("rsub.Scalar", "ab -> ab", real(3, 5), 1),
    s("rsub.Tensor", "ab, b -> ab", real(3, 5), real(5), alpha=3),
    s("mul.Tensor", "abc, 1c -> abc", real(2, 3, 5), real(1, 5)),
    s("mul.Tensor", "ab -> ab", real(3, 5), 2.0),
    s("mul.Scalar", "ab -> ab", real(3, 5), 2.0),
    s("mul_.Tensor", "ab, b -> ab", real(3, 5), real(5), unclaimed=True),
    s("div.Tensor", "ab, b -> ab", real(3, 5), pos(5)),
    s("div.Tensor", "ab -> ab", real(3, 5), 2.0),
    s("div_.Tensor", "ab, b -> ab", real(3, 5), pos(5)),
    s("div.Tensor_mode", "ab -> ab", real(3, 5), 0.3, rounding_mode="floor"),
    s("floor_divide", "ab -> ab", ints(9, 3, 5), 2),
    s("addcmul", "ab, b, ab -> ab", real(3, 5), real(5), real(3, 5, seed=3), value=0.5),
    s("addcdiv", "ab, b, ab -> ab", real(3, 5), real(5), pos(3, 5), value=0.5),
    s("lerp.Scalar", "ab, ab -> ab", real(3, 5), real(3, 5, seed=2), 0.3),
    s("lerp.Tensor", "ab, ab, b -> ab", real(3, 5), real(3, 5, seed=2), real(5)),
    s("clamp", "ab -> ab", real(3, 5), -0.5, None),
    s("clamp.Tensor", "ab, b -> ab", real(3, 5), None, real(5)),
    s("maximum", "ab, b -> ab", real(3, 5), real(5)),
    s("max.other", "ab, ab -> ab", real(3, 5), real(3, 5, seed=2)),
    s("eq.Tensor", "ab, b -> ab", ints(3, 3, 5), ints(3, 5)),
    s("le.Scalar", "ab -> ab", real(3, 5), 0.2),
    s("__and__.Tensor", "1a, b1 -> ba", bools(1, 5), bools(3, 1)),
    s("bitwise_not", "ab -> ab", bools(3, 5)),
    s("logical_not", "ab -> ab", real(3, 5)),
    s("where.self", "ab, ab, b -> ab", bools(3, 5), real(3, 5), real(5)),
    s("where.self", "ab, 1b, a1 -> ab", bools(3, 5), real(1, 5), real(3, 1)),
    s("where.ScalarOther", "a1, ab -> ab", bools(3, 1), real(3, 5), 0.0),
    s("where.ScalarOther", "a1, ab -> ab", bools(3, 1), real(3, 5), -inf, unclaimed=True),
    s("where.Scalar", "ab -> ab", bools(3, 5), 2, 0),
    s("masked_fill.Scalar", "ab, 1b -> ab", real(3, 5), bools(1, 5), 0),
    s("masked_fill.Scalar", "ab, 1b -> ab", real(3, 5), bools(1, 5), -inf, unclaimed=True),
    s("masked_fill_.Scalar", "ab, ab -> ab", real(3, 5), bools(3, 5), -inf, unclaimed=True),
    s("masked_fill.Tensor", "ab, ab,  -> ab", real(3, 5), bools(3, 5), real(), unclaimed=True),
    s("fill_.Scalar", "ab -> ab", real(3, 5), 2.0),
    s("zero_", "ab -> ab", real(3, 5), unclaimed=True),
    s("copy_", "ab, b -> ab", real(3, 5), real(5), unclaimed=True),
    s("copy_", "abc, abc -> abc", real(2, 3, 5), real(2, 3, 5, seed=1), unclaimed=True),
    s("prelu", "abc, b -> abc", real(2, 3, 5), real(3)),
    s("prelu", "abc, 1 -> abc", real(2, 3, 5), real(1)),
    s("glu", "a(b|b) -> ab", real(3, 10)),
    s("softplus", "ab -> ab", real(3, 5), 1, 20),
    s("polar", "ab, b -> ab", real(3, 5), real(5), unclaimed=True),
    s("real", "ab -> ab", torch.complex(real(3, 5), real(3, 5, seed=1))),
    s("dropout", "ab -> ab", real(3, 5), 0.5, False),
    s("dropout", "ab -> ab", real(3, 5), 0.5, True),
    s("feature_dropout", "ab** -> ab**", real(2, 3, 5, 7), 0.5, True),
    s("native_dropout", "ab -> ab, ab", real(3, 5), 0.5, True),
    s("bernoulli", "ab -> ab", real(3, 5).sigmoid()),
    s("uniform_", "ab -> ab", real(3, 5)),
    s("rand_like", "ab -> ab", real(3, 5)),
]

CONTRACTIONS = [
    s("linear", "abc, dc, d -> abd", real(2, 3, 5), real(7, 5), real(7)),
    s("linear", "a, ba -> b", real(5), real(7, 5)),
    s("linear", "ab, cb -> ac", real(3, 5), real(7, 5), None),
    s("linear", "abc, c -> ab", real(2, 3, 5), real(5)),
    s("matmul", "a, a -> ", real(5), real(5, seed=1)),
    s("matmul", "ab, b -> a", real(3, 5), real(5)),
    s("matmul", "a, ab -> b", real(5), real(5, 7)),
    s("matmul", "ab, bc -> ac", real(3, 5), real(5, 7)),
    s("matmul", "abcd, abde -> abce", real(2, 3, 5, 7), real(2, 3, 7, 4)),
    s("matmul", "a1bc, dce -> adbe", real(2, 1, 5, 7), real(3, 7, 4)),
    s("matmul", "a, bcad -> bcd", real(7), real(2, 3, 7, 4)),
    s("mm", "ab, bc -> ac", real(3, 5), real(5, 7)),
    s("bmm", "abc, acd -> abd", real(2, 3, 5), real(2, 5, 7)),
    s("mv", "ab, b -> a", real(3, 5), real(5)),
    s("dot", "a, a -> ", real(5), real(5, seed=1)),
    s("outer", "a, b -> ab", real(3), real(5)),
    s("inner", "ab, cb -> ac", real(3, 5), real(7, 5)),
    s("addmm", "a, bc, ca -> ba", real(7), real(3, 5), real(5, 7)),
    s("addmm", "1, ab, bc -> ac", real(1), real(3, 5), real(5, 7), beta=0.5, alpha=2),
    s("addmm", "ab, ac, cb -> ab", real(3, 7), real(3, 5), real(5, 7)),
    s("addmm_", "ab, a*, *b -> ab", real(3, 7), real(3, 5), real(5, 7), unclaimed=True),
    s("addmv", "a, ab, b -> a", real(3), real(3, 5), real(5)),
    s("addr", "ab, a, b -> ab", real(3, 5), real(3), real(5)),
    s("baddbmm", "abc, abd, adc -> abc", real(2, 3, 7), real(2, 3, 5), real(2, 5, 7)),
    s("baddbmm", "a1b, acd, adb -> acb", real(2, 1, 7), real(2, 3, 5), real(2, 5, 7), beta=0.5, alpha=0.25),
    s("addbmm", "ab, cad, cdb -> ab", real(3, 7), real(2, 3, 5), real(2, 5, 7)),
    s("bilinear", "ab, ac, dbc, d -> ad", real(2, 3), real(2, 5), real(7, 3, 5), real(7)),
    s("einsum", "abcde, abfde -> abcfd", "bclhn,bcshn->bclsh", [real(2, 3, 4, 5, 6), real(2, 3, 7, 5, 6)]),
    s("einsum", "abc, cbd -> ad", "abc, cbd", [real(2, 3, 5), real(5, 3, 7)]),
    s("einsum", "abc, cd -> abd", "...i,ij->...j", [real(2, 3, 5), real(5, 7)]),
    s("einsum", "a1, bc -> ab", "ij,kj->ik", [real(2, 1), real(3, 5)]),
    s("einsum", "a, b, c -> abc", "i,j,k->ijk", [real(2), real(3), real(5)]),
    s("einsum", "** -> *", "ii->i", [real(5, 5)], unclaimed=True),
    s("tensordot", "abc, cbd -> ad", real(2, 3, 5), real(5, 3, 7), [1, 2], [1, 0]),
    s(
        "linalg_solve_triangular",
        "a**, a*b -> a*b",
        real(2, 5, 5).tril() + 3 * torch.eye(5),
        real(2, 5, 7),
        upper=False,
    ),
    s("_addmm_activation", "a, b*, *a -> ba", real(7), real(3, 5), real(5, 7), use_gelu=True),
    s(
        "_grouped_mm",
        "*a, *ab, * -> *b",
        half(8, 48),
        half(2, 48, 48),
        torch.tensor([3, 8], dtype=torch.int32),
        rtol=1e-1,
    ),
    s("cdist", "ab*, ac* -> abc", real(2, 3, 5), real(2, 7, 5)),
]

NORMS = [
    s("softmax.int", "a*b -> a*b", real(3, 5, 7), 1),
    s("softmax.int", "ab* -> ab*", real(3, 5, 7), -1, torch.float64),
    s("_softmax", "ab* -> ab*", real(3, 5, 7), -1, False),
    s("log_softmax.int", "*a -> *a", real(3, 5), 0),
    s("layer_norm", "ab*, *, * -> ab*", real(2, 3, 5), [5], real(5), real(5, seed=1)),
    s("layer_norm", "a** -> a**", real(2, 3, 5), [3, 5]),
    s("layer_norm", "ab*, * -> ab*", real(2, 3, 5), [5], None, real(5)),
    s("rms_norm", "ab*, * -> ab*", real(2, 3, 5), [5], real(5), unclaimed=True),
    s("rms_norm", "ab* -> ab*", real(2, 3, 5), [5], None, 1e-5),
    s("native_layer_norm", "ab*, *, * -> ab*, ab1, ab1", real(2, 3, 5), [5], real(5), real(5, seed=1), 1e-5),
    s("group_norm", "a(b*)*, (b*), (b*) -> a(b*)*", real(2, 6, 5), 3, real(6), real(6, seed=1)),
    s("group_norm", "a(b*)*, (b*) -> a(b*)*", real(2, 6, 5), 3, None, real(6)),
    s("group_norm", "a** -> a**", real(2, 6, 5), 1),
    s("group_norm", "ab*, b, b -> ab*", real(2, 6, 5), 6, real(6), real(6, seed=1)),
    s(
        "batch_norm",
        "abc, b, b, b, b -> abc",
        real(2, 3, 5),
        real(3),
        real(3, seed=1),
        real(3, seed=2),
        pos(3),
        False,
        0.1,
        1e-5,
        False,
    ),
    s(
        "batch_norm",
        "*a*, a, a -> *a*",
        real(2, 3, 5),
        real(3),
        real(3, seed=1),
        None,
        None,
        True,
        0.1,
        1e-5,
        False,
    ),
    s("batch_norm", "*a*, a, a -> *a*", real(2, 3, 5), None, None, real(3), pos(3), True, 0.1, 1e-5, False),
    s(
        "instance_norm",
        "ab*, b, b -> ab*",
        real(2, 3, 5),
        real(3),
        real(3, seed=1),
        None,
        None,
        True,
        0.1,
        1e-5,
        False,
    ),
    s("cosine_similarity", "ab*, ab* -> ab", real(2, 3, 5), real(2, 3, 5, seed=1), -1),
    s("cosine_similarity", "a*b, 1*b -> ab", real(2, 3, 5), real(1, 3, 5, seed=1), 1),
    s("_weight_norm", "**a, 11a -> **a", real(3, 5, 7), pos(1, 1, 7), 2),
    s("_weight_norm", "***,  -> ***", real(3, 5, 7), pos(), -1),
    s("_weight_norm_interface", "a**, a11 -> a**, a11", real(3, 5, 7), pos(3, 1, 1), 0),
    s("pairwise_distance", "a*, a* -> a1", real(3, 5), real(3, 5, seed=1), 2.0, 1e-6, True),
]


def qkv(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    return real(*q), real(*k, seed=1), real(*v, seed=2)


ATTENTION = [
    s(
        "scaled_dot_product_attention",
        "abc*, ab**, ab** -> abc*",
        *qkv((2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 6)),
    ),
    s(
        "scaled_dot_product_attention",
        "ab**, ab**, ab** -> ab**",
        *qkv((2, 3, 5, 4), (2, 3, 5, 4), (2, 3, 5, 4)),
        is_causal=True,
        scale=0.3,
    ),
    s(
        "scaled_dot_product_attention",
        "ab*, a**, a**, b* -> ab*",
        *qkv((3, 5, 4), (3, 7, 4), (3, 7, 4)),
        real(5, 7),
    ),
    s("scaled_dot_product_attention", "a*, **, ** -> a*", *qkv((5, 4), (7, 4), (7, 4))),
    s(
        "scaled_dot_product_attention",
        "abc*, ab**, ab**, a1c* -> abc*",
        *qkv((2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 4)),
        real(2, 1, 5, 7),
    ),
    s(
        "scaled_dot_product_attention",
        "abc*, ab**, ab**, 1bc* -> abc*",
        *qkv((2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 4)),
        bools(1, 3, 5, 7) | True,
    ),
    # one kv head: broadcast, and with enable_gqa
    s(
        "scaled_dot_product_attention",
        "abc*, a1**, a1** -> abc*",
        *qkv((2, 3, 5, 4), (2, 1, 7, 4), (2, 1, 7, 4)),
    ),
    s(
        "scaled_dot_product_attention",
        "abc*, a1**, a1** -> abc*",
        *qkv((2, 3, 5, 4), (2, 1, 7, 4), (2, 1, 7, 4)),
        enable_gqa=True,
    ),
    # grouped queries: heads are kv heads × queries of one
    s(
        "scaled_dot_product_attention",
        "a(bc)d*, ab**, ab** -> a(bc)d*",
        *qkv((2, 6, 5, 4), (2, 3, 7, 4), (2, 3, 7, 4)),
        enable_gqa=True,
    ),
    s(
        "scaled_dot_product_attention",
        "a(bc)d*, ab**, ab**, a(bc)d* -> a(bc)d*",
        *qkv((2, 6, 5, 4), (2, 3, 7, 4), (2, 3, 7, 4)),
        real(2, 6, 5, 7),
        enable_gqa=True,
    ),
    s(
        "scaled_dot_product_attention",
        "a(bc)d*, ab**, ab**, 11d* -> a(bc)d*",
        *qkv((2, 12, 5, 4), (2, 3, 7, 4), (2, 3, 7, 4)),
        real(1, 1, 5, 7),
        enable_gqa=True,
    ),
    s(
        "scaled_dot_product_attention",
        "abc*, ab**, ab** -> abc*",
        *qkv((2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 4)),
        None,
        0.5,
    ),
    s(
        "_scaled_dot_product_flash_attention_for_cpu",
        "ab**, ab**, ab** -> ab**, ab*",
        *qkv((2, 3, 5, 4), (2, 3, 5, 4), (2, 3, 5, 4)),
        unclaimed=True,
    ),
]

REDUCTIONS = [
    s("sum", "ab -> ", real(3, 5)),
    s("sum.dim_IntList", "abc -> ac", real(2, 3, 5), [1]),
    s("sum.dim_IntList", "abc -> a11", real(2, 3, 5), [-1, 1], True),
    s("sum.dim_IntList", "ab -> ", real(3, 5), None),
    s("sum.dim_IntList", "ab -> a", bools(3, 5), [1]),
    s("nansum", "ab -> a", real(3, 5), [1], unclaimed=True),
    s("count_nonzero.dim_IntList", "ab -> a", ints(2, 3, 5), [1]),
    s("count_nonzero", "ab -> ", ints(2, 3, 5)),
    s("mean", "ab -> ", real(3, 5)),
    s("mean.dim", "abc -> ab1", real(2, 3, 5), [-1], True),
    s("mean.dim", "abc -> ac", real(2, 3, 5), [1]),
    s("amax", "ab* -> ab", real(2, 3, 5), [-1]),
    s("amax", "** -> ", real(3, 5)),
    s("max.dim", "a* -> a1, a1", real(3, 5), 1, True),
    s("max", "** -> ", real(3, 5)),
    s("aminmax", "a* -> a, a", real(3, 5), dim=1),
    s("argmax", "a* -> a", real(3, 5), -1),
    s("argmax", "** -> ", real(3, 5)),
    s("any.dim", "*a -> a", bools(3, 5), 0),
    s("all", "** -> ", bools(3, 5)),
    s("prod.dim_int", "a* -> a", real(3, 5), 1),
    s("var.correction", "a* -> a1", real(3, 5), [-1], correction=0, keepdim=True),
    s("std.dim", "a* -> a", real(3, 5), [1]),
    s("std", "** -> ", real(3, 5)),
    s("var_mean.correction", "a* -> a, a", real(3, 5), [1], unclaimed=True),
    s("norm.ScalarOpt_dim", "a* -> a", real(3, 5), 2, [1]),
    s("linalg_vector_norm", "a* -> a1", real(3, 5), 2, [-1], True),
    s("linalg_norm", "** -> ", real(3, 5)),
    s("linalg_matrix_norm.str_ord", "a** -> a", real(2, 3, 5)),
    s("logsumexp", "a* -> a", real(3, 5), [-1]),
    s("median.dim", "a* -> a, a", real(3, 5), 1),
    s("trace", "** -> ", real(5, 5)),
]

SCANS = [
    s("cumsum", "a* -> a*", real(3, 5), -1),
    s("cumsum", "*a -> *a", ints(3, 3, 5), 0),
    s("cumprod", "a* -> a*", real(3, 5), -1),
    s("logcumsumexp", "a* -> a*", real(3, 5), 1),
    s("cummax", "a* -> a*, a*", real(3, 5), 1),
    s("sort", "a* -> a*, a*", real(3, 5)),
    s("sort.stable", "*a -> *a, *a", real(3, 5), stable=True, dim=0),
    s("argsort", "a* -> a*", real(3, 5)),
    s("topk", "a* -> a*, a*", real(3, 5), 2),
    s("topk", "*a -> 1a, 1a", real(3, 5), 1, 0),
    s("flip", "a*b -> a*b", real(2, 3, 5), [1]),
    s("roll", "a*b -> a*b", real(2, 3, 5), [1], [-2]),
    s("roll", "** -> **", real(3, 5), [1]),
    s("diff", "a* -> a*", real(3, 5)),
    s("diff", "a*, a1 -> a*", ints(9, 3, 5), 1, -1, ints(7, 3, 1)),
    s("diff", "*a, *a, *a -> *a", real(3, 5), 1, 0, real(2, 5), real(4, 5)),
    s("bucketize.Tensor", "ab, * -> ab", real(3, 5), sorted_of(real(7))),
    s("searchsorted.Tensor", "*, ab -> ab", sorted_of(real(7)), real(3, 5)),
    s("multinomial", "a* -> a*", pos(3, 5), 2),
]

LOOKUPS = [
    s("embedding", "ab, cd -> cdb", real(7, 5), ints(7, 2, 3)),
    s("embedding", "ab, c -> cb", real(7, 5), ints(7, 4), 1),
    s(
        "embedding_bag.padding_idx",
        "*a, *, * -> *a, *, *, *",
        real(7, 5),
        ints(7, 6),
        torch.tensor([0, 2]),
        False,
        0,
        False,
        None,
        False,
        None,
        unclaimed=True,
    ),
    s("one_hot", "ab -> ab*", ints(7, 3, 5), 7),
    s("cross_entropy_loss", "a*, a -> a", real(3, 5), ints(5, 3), None, 0),
    s("cross_entropy_loss", "a*b, a*b, * -> ab", real(2, 3, 5), pos(2, 3, 5), pos(3), 0, unclaimed=True),
    s("cross_entropy_loss", "**, * -> ", real(3, 5), ints(5, 3)),
    s("nll_loss_nd", "a*b, ab -> ab", real(2, 3, 5), ints(3, 2, 5), None, 0, unclaimed=True),
    s("mse_loss", "ab, ab -> ab", real(3, 5), real(3, 5, seed=1), 0),
    s("mse_loss", "ab, ab -> ", real(3, 5), real(3, 5, seed=1), 2),
    s("mse_loss", "**, ** -> ", real(3, 5), real(3, 5, seed=1)),
    s(
        "binary_cross_entropy_with_logits",
        "ab, ab, b -> ab",
        real(3, 5),
        pos(3, 5),
        pos(5),
        None,
        0,
        unclaimed=True,
    ),
    s("margin_ranking_loss", "*, *, * -> ", real(5), real(5, seed=1), real(5, seed=2), 0.1),
    s("kl_div", "ab, ab -> ", real(3, 5), pos(3, 5), 2, unclaimed=True),
]

CONVOLUTIONS = [
    s("conv1d", "ab*, cb*, c -> ac*", real(2, 3, 7), real(5, 3, 2), real(5), [1], [1]),
    s("conv1d", "ab*, cb1 -> ac*", real(2, 3, 7), real(5, 3, 1)),
    s("conv1d", "a*, ba* -> b*", real(3, 7), real(5, 3, 2)),
    s("conv1d.padding", "ab*, cb*, c -> ac*", real(2, 3, 7), real(5, 3, 3), real(5), [1], "same"),
    s("conv2d", "ab**, cb**, c -> ac**", real(2, 3, 7, 6), real(5, 3, 2, 3), real(5), [2, 3]),
    s("conv3d", "ab***, cb*** -> ac***", real(2, 3, 4, 5, 6), real(5, 3, 2, 2, 2)),
    # grouped: g·i, g·o; depthwise: only groups
    s("conv1d", "a(bc)*, (bd)c*, (bd) -> a(bd)*", real(2, 6, 7), real(15, 2, 2), real(15), [1], [0], [1], 3),
    s("conv1d", "ab*, b1*, b -> ab*", real(2, 5, 7), real(5, 1, 3), real(5), [1], [2], [1], 5),
    s("conv1d", "ab*, (bc)1* -> a(bc)*", real(2, 5, 7), real(10, 1, 3), None, [1], [2], [1], 5),
    s(
        "convolution",
        "ab*, cb*, c -> ac*",
        real(2, 3, 7),
        real(5, 3, 2),
        real(5),
        [1],
        [1],
        [1],
        False,
        [0],
        1,
    ),
    s("conv_transpose1d", "ab*, bc*, c -> ac*", real(2, 3, 7), real(3, 5, 2), real(5), [2]),
    s(
        "conv_transpose2d.input",
        "a(bc)**, (bc)d**, (bd) -> a(bd)**",
        real(2, 6, 4, 5),
        real(6, 2, 2, 3),
        real(6),
        [2],
        [0],
        [0],
        3,
    ),
    s("convolution", "ab*, bc* -> ac*", real(2, 3, 7), real(3, 5, 2), None, [2], [0], [1], True, [0], 1),
    s("max_pool2d", "ab** -> ab**", real(2, 3, 6, 8), [2, 2]),
    s("max_pool2d_with_indices", "ab** -> ab**, ab**", real(2, 3, 6, 8), [2, 2]),
    s("avg_pool2d", "ab** -> ab**", real(2, 3, 6, 8), [2, 2]),
    s("avg_pool2d", "a** -> a**", real(3, 6, 8), [2, 2]),
    s("adaptive_avg_pool2d", "ab** -> ab11", real(2, 3, 6, 8), [1, 1]),
    s("adaptive_avg_pool1d", "ab* -> ab*", real(2, 3, 6), [2]),
    s("upsample_nearest2d.vec", "ab** -> ab**", real(2, 3, 4, 5), None, [2.0, 2.0]),
    s("upsample_bilinear2d", "ab** -> ab**", real(2, 3, 4, 5), [7, 9], False),
    s("upsample_bicubic2d", "ab** -> ab**", real(2, 3, 4, 5), [7, 9], False),
    s("pixel_shuffle", "a(b*)** -> ab**", real(2, 12, 3, 5), 2),
    s("pixel_unshuffle", "ab** -> a(b*)**", real(2, 3, 4, 6), 2),
    s("im2col", "ab** -> a(b*)*", real(2, 3, 4, 6), [2, 2], [1, 1], [0, 0], [1, 1]),
    s("col2im", "a(b*)* -> ab**", real(2, 12, 15), [4, 6], [2, 2], [1, 1], [0, 0], [1, 1]),
    s("grid_sampler", "ab**, acd* -> abcd", real(2, 3, 4, 5), real(2, 6, 7, 2).tanh(), 0, 0, False),
    s("fft_fft2", "a** -> a**", real(2, 3, 5)),
    s("fft_rfft", "ab* -> ab*", real(2, 3, 5), None, -1),
]

FACTORIES = [
    s("zeros", " -> ab", [3, 5], dtype=torch.float64),
    s("full", " -> ab", [3, 5], 2.5, dtype=torch.float64),
    s("full", " -> ", [], 2.5),
    s("empty.memory_format", "", [0, 5]),
    s("new_zeros", "ab -> cd", real(2, 3), [5, 7], unclaimed=True),
    s("new_ones", "ab -> c1", real(2, 3), [5, 1]),
    s("zeros_like", "ab -> ab", real(3, 5)),
    s("ones_like", "ab -> ab", real(3, 5)),
    s("full_like", "ab -> ab", real(3, 5), 2.0),
    s("arange", " -> *", 7),
    s("arange.start_step", " -> *", 1, 9, 2),
    s("linspace", " -> *", 0, 1, 5),
    s("eye", " -> **", 5),
    s("randn", " -> **", [3, 5]),
]

SAMPLES = [
    *ELEMENTWISE,
    *CONTRACTIONS,
    *NORMS,
    *ATTENTION,
    *REDUCTIONS,
    *SCANS,
    *LOOKUPS,
    *CONVOLUTIONS,
    *FACTORIES,
]


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_rule(sample: Sample) -> None:
    check(sample)


WRONG = {
    "a bias summed by every rank": (
        make_einsum_rule("...i, oi, o -> ...o", linear="mul", of=(0, 1)),
        s("linear", "", real(3, 5), real(7, 5), real(7)),
    ),
    "softmax over a sharded dim": (make_einsum_rule("ab -> ab"), s("softmax.int", "", real(3, 5), 1)),
    "a contraction that is taken for a broadcast": (
        make_einsum_rule("mk, jn -> mn", blocked="k"),
        s("mm", "", real(3, 5), real(5, 7)),
    ),
    "two axes taken for one": (make_einsum_rule("ab, ab -> ab"), s("mm", "", real(5, 5), real(5, 5, seed=1))),
    "a mean taken for a sum": (make_einsum_rule("ab -> a"), s("mean.dim", "", real(3, 5), [1])),
    "relu said to be linear": (
        make_einsum_rule("ab -> ab", linear="mul", of=(0,)),
        s("relu", "", real(3, 5)),
    ),
    "a product said to be a sum": (
        make_einsum_rule("ab, ab -> ab", linear="add"),
        s("mul.Tensor", "", real(3, 5), real(3, 5, seed=1)),
    ),
    "a sum said to be a product": (
        make_einsum_rule("ab, ab -> ab", linear="mul", of=(0, 1)),
        s("add.Tensor", "", real(3, 5), real(3, 5, seed=1)),
    ),
    "an unclaimed scaling": (make_einsum_rule("ab -> ab"), s("neg", "", real(3, 5))),
    "an unclaimed sum": (
        make_einsum_rule("ab, ab -> ab"),
        s("add.Tensor", "", real(3, 5), real(3, 5, seed=1)),
    ),
    "positions of attention": (
        make_einsum_rule("bhqd, bhkd, bhke -> bhqe", blocked="d", linear="mul", of=(2,)),
        s("scaled_dot_product_attention", "", *qkv((2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 4))),
    ),
    "a causal mask over sharded queries": (
        make_einsum_rule("bhqd, bhkd, bhke -> bhqe", blocked="dk", linear="mul", of=(2,)),
        s("scaled_dot_product_attention", "", *qkv((2, 3, 5, 4), (2, 3, 5, 4), (2, 3, 5, 4)), is_causal=True),
    ),
    "groups that a rank does not know of": (
        make_einsum_rule("ngt, gik, g -> ngt", blocked="tk", linear="mul", of=(0, 1), added=(2,)),
        s("conv1d", "", real(2, 5, 7), real(5, 1, 3), real(5), [1], [1], [1], 5),
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_rule_is_found(name: str) -> None:
    """The proof itself can fail."""
    rule: Rule
    rule, sample = WRONG[name]
    assert problems(sample, rule)


def test_the_whole_pointwise_family_has_rules() -> None:
    """Every op that torch tags pointwise has a rule, so none is forgotten when torch grows."""
    known = set(registered())
    # `equal` makes no tensor, `frexp` two of other dtypes; a forward has no backward ops
    exempt = re.compile(r"_foreach.*|special_.*|fused_.*|_.*|.*_backward|equal|frexp")
    missing = set()
    for qualified in torch._C._dispatch_get_all_op_names():
        name, _, overload = qualified.removeprefix("aten::").partition(".")
        overload = overload or "default"
        if (
            not qualified.startswith("aten::")
            or exempt.fullmatch(name)
            or overload.endswith(("out", "out_mode"))
        ):
            continue
        tags = getattr(getattr(torch.ops.aten, name), overload).tags
        if torch.Tag.pointwise in tags and not {f"aten.{name}", f"aten.{name}.{overload}"} & known:
            missing.add(f"{name}.{overload}")
    assert not missing
