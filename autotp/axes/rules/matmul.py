"""Rules of contractions: linear layers, matrix products, einsum.

A bias is *added*: where the contracted axis is sharded it enters once, after the sum (or on one rank only).
"""

from __future__ import annotations

from functools import cache

from autotp.axes.rules.dims import in_place
from autotp.axes.rules.registry import OpContext, Rule, block_everything, einsum_rule, make_einsum_rule, rule
from autotp.errors import RuleError

GROUPED_MM_BYTES = 16

einsum_rule(["aten.mm"], "mk, kn -> mn", linear="mul", of=(0, 1))
einsum_rule(["aten.bmm"], "bmk, bkn -> bmn", linear="mul", of=(0, 1))
einsum_rule(["aten.mv"], "mk, k -> m", linear="mul", of=(0, 1))
einsum_rule(["aten.dot", "aten.vdot"], "k, k -> ", linear="mul", of=(0, 1))
einsum_rule(["aten.outer", "aten.ger"], "i, j -> ij", linear="mul", of=(0, 1))
einsum_rule(["aten.bilinear"], "...i, ...j, oij, o -> ...o", linear="mul", of=(0, 1, 2), added=(3,))


@cache
def _product(text: str, factors: tuple[int, ...], added: tuple[int, ...] = ()) -> Rule:
    return make_einsum_rule(text, linear="mul", of=factors, added=added)


@rule("aten.linear")
def linear(op: OpContext) -> None:
    """A weight of one dim makes one feature, without a dim of its own."""
    vector = len(op.args["weight"].meta["val"].shape) == 1
    if vector:
        _product("...i, i -> ...", (0, 1))(op)
    else:
        _product("...i, oi, o -> ...o", (0, 1), (2,))(op)


@rule("aten.inner")
def inner(op: OpContext) -> None:
    """Contracts the last dims."""
    ranks = [len(op.args[name].meta["val"].shape) for name in ("self", "other")]
    if 0 in ranks:  # a product with a number
        op.out(op.broadcast(op.all_tensors()))
        return
    left, right = "abcdefg"[: ranks[0] - 1], "nopqrst"[: ranks[1] - 1]
    _product(f"{left}k, {right}k -> {left}{right}", (0, 1))(op)


@rule("aten.matmul", "aten.__matmul__")
def matmul(op: OpContext) -> None:
    """Vectors have no row (or column) dim; the leading dims of batches broadcast."""
    left = "k" if len(op.args["self"].meta["val"].shape) == 1 else "...mk"
    right = "k" if len(op.args["other"].meta["val"].shape) == 1 else "...kn"
    out = (
        ("..." if "..." in left + right else "")
        + ("m" if "m" in left else "")
        + ("n" if "n" in right else "")
    )
    _product(f"{left}, {right} -> {out}", (0, 1))(op)


def _plus_product(op: OpContext, left: str, right: str, out: str) -> None:
    """``beta · self + alpha · (left @ right)``, where `self` broadcasts to the product."""
    rank = len(op.args["self"].meta["val"].shape)
    text = f"{out[len(out) - rank :]}, {left}, {right} -> {out}"
    if in_place(op):  # the operand that is written cannot be masked, so nothing may be Partial here
        make_einsum_rule(text, blocked="".join((set(left) | set(right)) - set(out)))(op)
    else:
        _product(text, (1, 2), (0,))(op)


@rule("aten.addmm", "aten.addmm_")
def addmm(op: OpContext) -> None:
    """``self + mat1 @ mat2``; transformers' Conv1D is one."""
    _plus_product(op, "mk", "kn", "mn")


@rule("aten._addmm_activation")
def addmm_activation(op: OpContext) -> None:
    """An activation behind the sum: the contracted axis is needed whole."""
    make_einsum_rule("n, mk, kn -> mn", blocked="k")(op)


@rule("aten.addmv", "aten.addmv_")
def addmv(op: OpContext) -> None:
    """``self + mat @ vec``."""
    _plus_product(op, "mk", "k", "m")


@rule("aten.addr", "aten.addr_")
def addr(op: OpContext) -> None:
    """``self + vec1 ⊗ vec2``."""
    _plus_product(op, "m", "n", "mn")


@rule("aten.baddbmm", "aten.baddbmm_")
def baddbmm(op: OpContext) -> None:
    """``self + batch1 @ batch2`` by batch; BLOOM adds its position bias so."""
    _plus_product(op, "bmk", "bkn", "bmn")


@rule("aten.addbmm", "aten.addbmm_")
def addbmm(op: OpContext) -> None:
    """``self + sum over b of batch1[b] @ batch2[b]``: two contracted axes."""
    _plus_product(op, "bmk", "bkn", "mn")


@rule("aten.einsum")
def einsum(op: OpContext) -> None:
    """The equation is the rule. A letter twice in a term (a diagonal) or ``...`` not in front is not
    known.
    """
    equation = "".join(str(op.args["equation"]).split())
    left, arrow, right = equation.partition("->")
    if not arrow:
        letters = left.replace(".", "").replace(",", "")
        right = ("..." if "..." in left else "") + "".join(
            c for c in sorted(set(letters)) if letters.count(c) == 1
        )
    terms = left.split(",")
    plain = all(
        len(set(t.replace(".", ""))) == len(t.replace(".", "")) and "..." not in t[1:]
        for t in [*terms, right]
    )
    if not plain or ("..." in left) != ("..." in right):
        block_everything(op)
        return
    try:
        _product(f"{left}->{right}", tuple(range(len(terms))))(op)
    except RuleError:
        block_everything(op)


@rule("aten.tensordot")
def tensordot(op: OpContext) -> None:
    """Contracts ``dims_self`` with ``dims_other``, in order."""
    a, b = op.tensor("self"), op.tensor("other")
    in_a = [int(d) % op.rank(a) for d in op.args["dims_self"]]
    in_b = [int(d) % op.rank(b) for d in op.args["dims_other"]]
    letters = iter("abcdefghijklmnopqrstuvwxyz")
    left, right = [next(letters) for _ in range(op.rank(a))], [next(letters) for _ in range(op.rank(b))]
    for d, e in zip(in_a, in_b, strict=True):
        right[e] = left[d]
    out = [c for d, c in enumerate(left) if d not in in_a] + [c for d, c in enumerate(right) if d not in in_b]
    _product(f"{''.join(left)}, {''.join(right)} -> {''.join(out)}", (0, 1))(op)


@rule("aten._grouped_mm", "transformers.grouped_mm_fallback")
def grouped_mm(op: OpContext) -> None:
    """Rows (or columns, or the inner dim) in groups that end at ``offs``: the grouped dim and the groups are
    blocked.

    The kernel (``grouped_mm_fallback`` stands in for it in a trace) wants the strides of both matrices in whole
    units of 16 bytes, so a rank's share of the dim that lies contiguous in memory has to be some of them.
    """
    matrices = ("self", "mat2") if "mat2" in op.args else ("input", "weight")
    a, b = (len(op.args[name].meta["val"].shape) for name in matrices)
    text, blocked = {
        (2, 3): ("tk, ekn, e, n -> tn", "te"),
        (3, 2): ("etk, kn, e, n -> tn", "ne"),
        (3, 3): ("etk, ekn, e, n -> etn", "e" if op.has("offs") else ""),
        (2, 2): ("mk, kn, e, n -> emn", "ke"),
    }[a, b]
    has_bias = "bias" in op.args
    text = text if has_bias else text.replace(", n ->", " ->")
    make_einsum_rule(text, blocked=blocked, linear="mul", of=(0, 1), added=(3,) if has_bias else ())(op)
    for name in matrices:
        i, value = op.tensor(name), op.args[name].meta["val"]
        inner = next((d for d in range(value.dim()) if value.stride(d) == 1), None)
        if inner is not None:
            op.in_units(op.dims(i)[inner], max(GROUPED_MM_BYTES // value.element_size(), 1))


@rule("aten.linalg_solve_triangular", "aten.linalg_solve")
def solve(op: OpContext) -> None:
    """Batches and the columns of B pass; linear in B."""
    a, b = op.tensor("self" if "self" in op.args else "A"), op.tensor("B")
    if op.rank(b) != op.rank(a) or op.rank(b) < 2:
        block_everything(op)
        return
    left = bool(op.args.get("left", True))
    for i in (a, b):
        for d in (-2, -1):
            if i == a or (d == -2) == left:
                op.block(i, op.rank(i) + d)
    lead = [op.join([(a, d), (b, d)]) for d in range(op.rank(b) - 2)]
    dims = op.dims(b)
    rows = op.whole(op.shape(b)[-2]) if left else dims[-2]
    columns = dims[-1] if left else op.whole(op.shape(b)[-1])
    op.out([*lead, rows, columns])
    op.linear("mul", [b])


@rule("aten.cdist", "aten._cdist_forward")
def cdist(op: OpContext) -> None:
    """Distances between rows: the coordinates are needed whole."""
    make_einsum_rule("...pm, ...rm -> ...pr", blocked="m")(op)
