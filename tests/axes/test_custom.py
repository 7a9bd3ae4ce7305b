"""Rules for ops of users: products and sizes in the notation, what is refused, and what `check_rule` finds."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autotp
from autotp.axes.rules.registry import find_rule
from tests.axes.proof import real

NAMESPACE = "autotp_custom"


@torch.library.custom_op(f"{NAMESPACE}::attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    scores = q @ k.transpose(-1, -2)
    return torch.softmax(scores if bias is None else scores + bias, -1) @ v


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs[:3])


def _attention_backward(ctx: Any, grad: Tensor) -> Any:
    q, k, v = ctx.saved_tensors
    p = torch.softmax(q @ k.transpose(-1, -2), -1)
    dp = grad @ v.transpose(-1, -2)
    ds = p * (dp - (dp * p).sum(-1, keepdim=True))
    return ds @ k, ds.transpose(-1, -2) @ q, p.transpose(-1, -2) @ grad, None


attention.register_fake(lambda q, k, v, bias=None: q.new_empty(*q.shape[:-1], v.shape[-1]))
attention.register_autograd(_attention_backward, setup_context=_save)


@torch.library.custom_op(f"{NAMESPACE}::head_norm", mutates_args=())
def head_norm(x: Tensor, scale: Tensor, shift: Tensor, num_heads: int) -> Tensor:
    heads = x.unflatten(-1, (num_heads, -1))
    return (heads * torch.rsqrt(heads.pow(2).mean(-1, keepdim=True) + 1e-6) * scale).flatten(-2) + shift


def _norm_backward(ctx: Any, grad: Tensor) -> Any:
    x, scale, shift = (t.detach().requires_grad_() for t in ctx.saved_tensors)
    with torch.enable_grad():
        heads = x.unflatten(-1, (ctx.num_heads, -1))
        y = (heads * torch.rsqrt(heads.pow(2).mean(-1, keepdim=True) + 1e-6) * scale).flatten(-2) + shift
        return *torch.autograd.grad(y, (x, scale, shift), grad), None


def _save_norm(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.num_heads = inputs[3]


head_norm.register_fake(lambda x, scale, shift, num_heads: torch.empty_like(x))
head_norm.register_autograd(_norm_backward, setup_context=_save_norm)


@torch.library.custom_op(f"{NAMESPACE}::linear", mutates_args=())
def linear(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    return x @ w.T + (0 if b is None else b)


@torch.library.custom_op(f"{NAMESPACE}::linear_bad_backward", mutates_args=())
def linear_bad_backward(x: Tensor, w: Tensor) -> Tensor:
    return x @ w.T


def _bad(ctx: Any, grad: Tensor) -> Any:
    """Divides the weight's gradient by how many outputs there are: a local count on a shard."""
    x, w = ctx.saved_tensors
    return grad @ w, grad.flatten(0, -2).T @ x.flatten(0, -2) / w.shape[0]


linear_bad_backward.register_autograd(
    _bad, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
)


@torch.library.custom_op(f"{NAMESPACE}::shift_", mutates_args=("x",))
def shift_(x: Tensor, by: Tensor) -> None:
    x.add_(by)


@torch.library.custom_op(f"{NAMESPACE}::noise", mutates_args=())
def noise(x: Tensor) -> Tensor:
    return x + torch.randn_like(x)


@torch.library.custom_op(f"{NAMESPACE}::halves", mutates_args=())
def halves(xs: list[Tensor]) -> list[Tensor]:
    return [x / 2 for x in xs]


QKV = (real(2, 5, 7, 3), real(2, 5, 11, 3), real(2, 5, 11, 4))
ATTENTION = "b h q d, b h k d, b h k e -> b h q e"
NORM = "b t (h d), d, (h d) -> b t (h d)"
NORM_ARGS = (real(2, 7, 15), real(3), real(15), 5)


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    """No rule outlives its test."""
    yield
    for op in (attention, head_norm, linear, linear_bad_backward, shift_, noise, halves):
        if find_rule(op._opoverload) is not None:
            autotp.unregister_rule(op)


def axes_of(op: Any, args: tuple[Any, ...], *rule: Any, **options: Any) -> autotp.RuleCheck:
    autotp.register_rule(op, *rule, **options)
    return autotp.check_rule(op, args)


# ---- what is right


def test_a_line_of_text() -> None:
    found = axes_of(attention, QKV, ATTENTION, blocked="k d", linear="mul", of=(2,))
    assert found.axes == ("dim 0 of 'q' (2)", "dim 1 of 'q' (5)", "dim 2 of 'q' (7)", "dim 3 of 'v' (4)")
    assert found.summed == ()
    assert found.gradients


def test_an_optional_operand_keeps_its_term() -> None:
    autotp.register_rule(attention, "b h q d, b h k d, b h k e, b h q k -> b h q e", blocked="kd")
    assert len(autotp.check_rule(attention, QKV).axes) == 4
    assert len(autotp.check_rule(attention, (*QKV, real(1, 5, 7, 11))).axes) == 4


def test_products_and_sizes() -> None:
    found = axes_of(head_norm, NORM_ARGS, NORM, blocked="d", sizes={"h": "num_heads"})
    assert found.axes == ("dim 0 of 'x' (2)", "dim 1 of 'x' (7)", "dim 2 of 'x' (5)")
    assert found.gradients


def test_the_size_of_a_product_that_another_dim_tells() -> None:
    """h is 15 / 3; but without `sizes` a rank would be told the global number of heads."""
    with pytest.raises(autotp.RuleError, match=r"over dim 2 of 'x' \(5\), 2 ranks: rank 0's call fails"):
        axes_of(head_norm, NORM_ARGS, NORM, blocked="d")


def test_sums_and_what_is_added() -> None:
    rule = "... i, o i, o -> ... o"
    found = axes_of(linear, (real(3, 7), real(5, 7), real(5)), rule, linear="mul", of=(0, 1), added=(2,))
    assert found.summed == ("dim 1 of 'x' (7)",)
    assert not found.gradients
    assert "(summed)" in str(found) and "no gradients" in str(found)


def test_lists_have_a_term_for_each() -> None:
    found = axes_of(halves, ([real(3, 5), real(5)],), "a b, b -> a b, b", linear="add", of=(0, 1))
    assert found.axes == ("dim 0 of 'xs'[0] (3)", "dim 1 of 'xs'[0] (5)")


def test_a_random_op_is_compared_by_shape() -> None:
    assert axes_of(noise, (real(3, 5),), "a b -> a b", random=True).axes == (
        "dim 0 of 'x' (3)",
        "dim 1 of 'x' (5)",
    )


def test_an_op_that_writes_says_so_in_its_schema() -> None:
    """What was written is compared as a result is."""
    assert axes_of(shift_, (real(3, 5), real(5)), "a b, b ->").axes == (
        "dim 0 of 'x' (3)",
        "dim 1 of 'x' (5)",
    )
    autotp.unregister_rule(shift_)
    with pytest.raises(autotp.RuleError, match="rank 0's call fails|is not the slice"):
        axes_of(shift_, (real(5, 5), real(5)), "a b, a ->")


def test_a_function() -> None:
    def rule(op: autotp.OpContext) -> None:
        x = op.tensor("x")
        for name in ("scale", "shift"):
            op.block(op.tensor(name), 0)
        op.block(x, -1)
        op.out([*op.dims(x)[:-1], op.whole(op.shape(x)[-1])])

    assert axes_of(head_norm, NORM_ARGS, rule).axes == ("dim 0 of 'x' (2)", "dim 1 of 'x' (7)")


@pytest.mark.parametrize("op", [f"{NAMESPACE}::attention", f"{NAMESPACE}::attention.default"])
def test_names(op: str) -> None:
    autotp.register_rule(op, ATTENTION, blocked="k d")
    assert autotp.check_rule(op, QKV).op == f"{NAMESPACE}::attention.default"
    assert autotp.check_rule(torch.ops.autotp_custom.attention.default, QKV).gradients
    autotp.unregister_rule(op)
    assert find_rule(attention._opoverload) is None


# ---- what is wrong


@pytest.mark.parametrize(
    ("op", "args", "rule", "options", "said"),
    [
        (
            attention,
            QKV,
            ATTENTION,
            {"blocked": "d"},
            "dim 2 of 'k' (11), 2 ranks: the results 0 of the ranks do not add",
        ),
        (
            attention,
            QKV,
            ATTENTION,
            {"blocked": "k"},
            "dim 3 of 'q' (3), 2 ranks: the results 0 of the ranks do not add",
        ),
        (
            attention,
            QKV,
            ATTENTION,
            {"blocked": "k d", "linear": "mul", "of": (0,)},
            "it says that the op is linear in 'q', and result 0 is not",
        ),
        (
            linear,
            (real(3, 7), real(5, 7), real(5)),
            "b i, o i, o -> b o",
            {},
            "dim 1 of 'x' (7), 2 ranks: the results 0 of the ranks do not add up",
        ),
        (
            linear,
            (real(3, 7), real(5, 7), real(5)),
            "b i, o i, o -> b o",
            {"linear": "add", "of": (0, 1), "added": (2,)},
            "it says that the op is a sum of its operands, and result 0 is not",
        ),
        (
            head_norm,
            NORM_ARGS,
            NORM,
            {"sizes": {"h": "num_heads"}},
            "over dim 2 of 'x' (3), 2 ranks: result 0 of rank 0 is not the slice",
        ),
        (
            linear_bad_backward,
            (real(3, 7), real(5, 7)),
            "b i, o i -> b o",
            {},
            "over dim 0 of 'w' (5), 2 ranks: the gradient of 'w' on rank 0 is not the slice of the whole one",
        ),
    ],
)
def test_a_wrong_rule_is_found(op: Any, args: Any, rule: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(autotp.RuleError, match=re.escape(said)):
        axes_of(op, args, rule, **options)


@pytest.mark.parametrize(
    ("op", "rule", "options", "said"),
    [
        ("attention", "ab -> ab", {}, "is not the name of an op"),
        (f"{NAMESPACE}::nothing", "ab -> ab", {}, "torch knows no op 'autotp_custom::nothing'"),
        (f"{NAMESPACE}::attention.other", "ab -> ab", {}, "torch knows no op"),
        ("aten::linear", "i -> i", {}, "aten::linear has a sharding rule already, of autotp's own"),
        ("aten::linear.default", "i -> i", {}, "has a sharding rule already, of autotp's own"),
        (attention, 3, {}, "is a int, not text or a function"),
        (attention, "ab", {}, "expected exactly one '->'"),
        (attention, "a b) -> a", {}, "cannot read the term"),
        (attention, "ab -> ac", {}, "['c'] on the right but not on the left"),
        (attention, "a -> ... a", {}, "'...' on the right but not on the left"),
        (attention, "ab -> ab", {"blocked": "c"}, "blocked letters ['c'] do not occur"),
        (attention, "ab -> ab", {"of": (1,)}, "of=[1] counts terms, of which there are 1"),
        (attention, "ab -> ab", {"sizes": {"c": "n"}}, "sizes of ['c'] do not occur"),
        (head_norm, NORM, {"sizes": {"h": "heads"}}, "has no argument 'heads'"),
        (attention, lambda op: None, {"blocked": "k"}, "is a function, which says all of it"),
    ],
)
def test_refused_at_once(op: Any, rule: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(autotp.RuleError, match=re.escape(said)):
        autotp.register_rule(op, rule, **options)


@pytest.mark.parametrize(
    ("op", "args", "rule", "options", "said"),
    [
        (attention, QKV, "b h q d, b h k d, b k e -> b h q e", {}, "operand 2 has 4 dims"),
        (attention, QKV, "a, b, c, d, e -> a", {}, "it has 5 terms on the left, and the op 4 tensors"),
        (
            attention,
            QKV,
            "b h q d, b h k d, b h k e -> b h e q",
            {"blocked": "kd"},
            "its rule makes results of shapes",
        ),
        (
            head_norm,
            NORM_ARGS,
            "b t (h d), e, (f g) -> b t (h d)",
            {"blocked": "hdefg"},
            "nothing says how large",
        ),
        (attention, QKV, lambda op: None, {}, "it does not say what the results are"),
    ],
)
def test_rules_that_do_not_fit_their_op(
    op: Any, args: Any, rule: Any, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(autotp.RuleError, match=re.escape(said)):
        axes_of(op, args, rule, **options)


def test_twice_and_never() -> None:
    with pytest.raises(autotp.RuleError, match="has no sharding rule; register one"):
        autotp.check_rule(attention, QKV)
    with pytest.raises(autotp.RuleError, match="has no rule from register_rule"):
        autotp.unregister_rule(attention)
    with pytest.raises(autotp.RuleError, match="its rule is autotp's own"):
        autotp.unregister_rule("aten::linear")
    autotp.register_rule(attention, ATTENTION, blocked="k d")
    with pytest.raises(
        autotp.RuleError, match="already, by register_rule: call autotp.unregister_rule first"
    ):
        autotp.register_rule(attention, ATTENTION, blocked="k d")
    with pytest.raises(autotp.RuleError, match="several overloads, name one of"):
        autotp.check_rule("aten::add", (real(2), real(2)))


def test_autotps_own_rules_can_be_checked() -> None:
    found = autotp.check_rule("aten::linear.default", (real(2, 7), real(5, 7), real(5)))
    assert found.summed == ("dim 1 of 'input' (7)",) and found.gradients


# ---- in a model


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 6
        self.up = nn.Linear(10, 30)
        self.scale, self.shift = nn.Parameter(torch.ones(5)), nn.Parameter(torch.zeros(30))
        self.down = nn.Linear(30, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(
            torch.ops.autotp_custom.head_norm(self.up(x), self.scale, self.shift, self.num_heads)
        )


def test_a_plan_shards_through_the_op() -> None:
    unknown = autotp.plan(Model(), 2, example_inputs=(torch.zeros(3, 7, 10),))
    assert any("no sharding rule is known for this op" in note for note in unknown.notes)
    autotp.register_rule(head_norm, NORM, blocked="d", sizes={"h": "num_heads"})
    known = autotp.plan(Model(), 2, example_inputs=(torch.zeros(3, 7, 10),))
    assert known.notes == ()
    placed = {e.name: e.placement for e in known.entries}
    assert placed["up.weight"] == "column" and placed["down.weight"] == "row"
    assert [c.kind for c in known.collectives if c.phase == "forward"] == ["all_reduce"]
