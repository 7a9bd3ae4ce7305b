"""Rules of pointwise ops: every dim passes, operands broadcast against each other.

The families differ only in how a Partial operand passes:

* a sum (``add``, ``where``) takes Partial operands next to whole ones, which then count on one rank only;
* a product (``mul``, ``div`` by a number) is linear in each factor; ``x + 1``, ``relu`` and the rest are
  not linear.

An op in place is linear only where it scales the operand it writes into: masking that operand would change
it for all who see it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from autotp.axes.rules.dims import aten, in_place, pass_but
from autotp.axes.rules.registry import OpContext, is_tensor_node, rule
from autotp.axes.term import CannotUnify

NONLINEAR = """
    abs absolute acos arccos acosh arccosh angle asin arcsin asinh arcsinh atan arctan atanh arctanh atan2
    arctan2 bitwise_and bitwise_left_shift bitwise_not bitwise_or bitwise_right_shift bitwise_xor __and__
    __or__ __xor__ __lshift__ __rshift__ __iand__ __ior__ __ixor__ __ilshift__ __irshift__ ceil celu clamp
    clamp_max clamp_min clip copysign cos cosh digamma elu eq erf erfc erfinv exp exp2 expm1 fix float_power
    floor floor_divide fmax fmin fmod frac gcd ge greater greater_equal gelu gt hardshrink hardsigmoid
    hardswish hardtanh heaviside hypot i0 igamma igammac isclose isfinite isinf isnan isneginf isposinf
    isreal lcm ldexp le leaky_relu less less_equal lgamma log log10 log1p log2 log_sigmoid logaddexp
    logaddexp2 logical_and logical_not logical_or logical_xor logit lt maximum minimum mish mvlgamma
    nan_to_num ne nextafter not_equal polar polygamma pow reciprocal relu relu6 remainder round rsqrt selu
    sgn sigmoid sign signbit silu sin sinc sinh softplus softshrink sqrt square special_erf special_erfc
    special_exp2 special_expit special_expm1 special_i0 special_log1p tan tanh tanhshrink threshold trunc
    xlogy xor max.other min.other
""".split()

LINEAR_UNARY = (
    "neg negative positive conj_physical _conj _conj_physical conj resolve_conj resolve_neg real imag".split()
)
LINEAR_UNARY += "deg2rad rad2deg".split()


def _targets(names: Iterable[str]) -> list[str]:
    """Each op and its in-place variant."""
    found = []
    for name in names:
        base, dot, overload = name.partition(".")
        found += [f"aten.{name}", *([] if dot else [f"aten.{base}_"])]
    return found


def pointwise(op: OpContext) -> None:
    """Every dim passes; nothing is linear."""
    in_place(op)
    operands = op.all_tensors()
    op.out(op.broadcast(operands))


rule(*_targets(NONLINEAR))(pointwise)


@rule(*_targets(LINEAR_UNARY))
def linear_unary(op: OpContext) -> None:
    """Linear in the only operand."""
    pointwise(op)
    op.linear("mul", [op.tensor("self")])


@rule(*_targets(["add", "sub", "subtract", "rsub"]))
def additive(op: OpContext) -> None:
    """``self + alpha · other``: a sum of two tensors passes Partial operands; adding a number does not."""
    pointwise(op)
    if op.has("self") and op.has("other") and op.mutated is None:
        op.linear("add", [op.tensor("self"), op.tensor("other")])


@rule(*_targets(["mul", "multiply"]))
def multiplicative(op: OpContext) -> None:
    """Linear in each factor; in place, in the one that is written."""
    pointwise(op)
    factors = ["self"] if op.mutated is not None else [n for n in ("self", "other") if op.has(n)]
    op.linear("mul", [op.tensor(n) for n in factors])


@rule(*_targets(["div", "divide", "true_divide"]))
def quotient(op: OpContext) -> None:
    """Linear in the numerator, unless the quotient is rounded."""
    pointwise(op)
    if op.args.get("rounding_mode") is None and op.has("self"):
        op.linear("mul", [op.tensor("self")])


def _pure_scaling(name: str, weight: str) -> Any:
    def apply(op: OpContext) -> None:
        pointwise(op)
        if op.mutated is None:
            op.linear("mul", [op.tensor(n) for n in (name, weight) if op.has(n)])
            op.added(op.tensor("self"))

    return apply


# self + value · tensor1 · tensor2, self + value · tensor1 / tensor2: `self` enters like a bias
rule(*_targets(["addcmul"]))(_pure_scaling("tensor1", "tensor2"))
rule(*_targets(["addcdiv"]))(_pure_scaling("tensor1", ""))


@rule(*_targets(["lerp"]))
def lerp(op: OpContext) -> None:
    """``self + weight · (end - self)`` is a sum of the two ends, whatever the weight."""
    pointwise(op)
    if op.mutated is None:
        op.linear("add", [op.tensor("self"), op.tensor("end")])


def _is_zero(value: Any) -> bool:
    return not is_tensor_node(value) and isinstance(value, (int, float)) and value == 0


@rule(
    *aten(
        """
        where.self where.ScalarOther where.ScalarSelf where.Scalar
        """
    )
)
def where(op: OpContext) -> None:
    """A choice between two tensors is a sum of both, each with zeros; with a zero it is a scaling."""
    pointwise(op)
    chosen = [n for n in ("self", "other") if op.has(n)]
    if len(chosen) == 2:
        op.linear("add", [op.tensor(n) for n in chosen])
    elif chosen and _is_zero(op.args["other" if chosen == ["self"] else "self"]):
        op.linear("mul", [op.tensor(chosen[0])])


@rule(*_targets(["masked_fill"]))
def masked_fill(op: OpContext) -> None:
    """Filling with zeros is a scaling; filling with anything else (``-inf`` above all) needs the whole sum
    first.
    """
    pointwise(op)
    if _is_zero(op.args["value"]):
        op.linear("mul", [op.tensor("self")])


@rule("aten.fill_", "aten.zero_", "aten.fill")
def fill(op: OpContext) -> None:
    """Overwrites every element: dims are those of `self`, a tensor `value` has none."""
    in_place(op)
    i = op.tensor("self")
    if op.has("value"):
        op.tensor("value")
    op.out(op.dims(i))


@rule("aten.copy_")
def copy(op: OpContext) -> None:
    """Overwrites `self` with `src`, which broadcasts."""
    in_place(op)
    i, k = op.tensor("self"), op.tensor("src")
    op.broadcast([i, k])
    op.out(op.dims(i))


@rule("aten.prelu", "aten._prelu_kernel")
def prelu(op: OpContext) -> None:
    """One slope, or one for each channel (dim 1)."""
    x, weight = op.tensor("self"), op.tensor("weight")
    if op.rank(weight) == 1 and op.rank(x) >= 2:
        channel = op.join([(x, 1), (weight, 0)])
        op.out([dim if d != 1 else channel for d, dim in enumerate(op.dims(x))])
    else:
        op.out(op.broadcast([x, weight]))


@rule("aten.glu")
def glu(op: OpContext) -> None:
    """``a · sigmoid(b)`` of the two halves of a dim: the dim reads ``(F | F)``, and ``F`` passes."""
    i = op.tensor("self")
    d = int(op.args["dim"]) % op.rank(i)
    dims = op.dims(i)
    half = op.shape(i)[d] // 2
    mark = op.solver.mark()
    try:
        first, second = op.solver.cut(dims[d], [half, half])
        op.unify(first, second)
        dims[d] = first
    except CannotUnify:
        op.solver.undo(mark)
        op.block(i, d)
        dims[d] = op.whole(half)
    op.out(dims)


# ---- random ops


@rule(
    *aten(
        """
        dropout dropout_ alpha_dropout alpha_dropout_
        """
    )
)
def dropout(op: OpContext) -> None:
    """Random in training. Linear: all ranks draw one mask for a value that is not sharded."""
    in_place(op)
    i = op.tensor("input" if "input" in op.args else "self")
    op.out(op.dims(i))
    active = bool(op.args["train"]) and op.args["p"] != 0
    if "alpha" not in str(op.node.target) or not active:
        op.linear("mul", [i])
    if active:
        op.random()


@rule("aten.native_dropout")
def native_dropout(op: OpContext) -> None:
    """The result, and the mask."""
    i = op.tensor("input")
    op.outs([op.dims(i), op.dims(i)])
    if op.args["train"] is not False and op.args["p"] != 0:
        op.random()


@rule(
    *aten(
        """
        feature_dropout feature_dropout_ feature_alpha_dropout feature_alpha_dropout_
        """
    )
)
def feature_dropout(op: OpContext) -> None:
    """Drops whole channels (dims 0 and 1): the ranks of one channel have to agree, so the other dims are
    blocked.
    """
    i = op.tensor("input" if "input" in op.args else "self")
    active = bool(op.args["train"]) and op.args["p"] != 0
    in_place(op)
    op.out(pass_but(op, i, range(2, op.rank(i))) if active else op.dims(i))
    if "alpha" not in str(op.node.target) or not active:
        op.linear("mul", [i])
    if active:
        op.random()


@rule(
    *aten(
        """
        bernoulli bernoulli_ rand_like randn_like randint_like uniform_ normal_ exponential_ random_
        geometric_ cauchy_ log_normal_ poisson rrelu rrelu_ normal.Tensor_float normal.float_Tensor
        normal.Tensor_Tensor normal_functional
        """
    )
)
def random_pointwise(op: OpContext) -> None:
    """Each element is drawn on its own."""
    pointwise(op)
    op.random()
