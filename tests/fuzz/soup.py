"""Arbitrary dataflow over a projected width: what no paper has written down, but somebody's model may do.

Values are [b, t, *dims]; a step picks one, does something to it, and what is left at the end is flattened and
projected back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tests.fuzz.code import Code
from tests.fuzz.feedforward import ACTS


@dataclass(frozen=True)
class Value:
    name: str
    dims: tuple[int, ...]
    computed: bool = True  # by an op whose backward does not need its result: may be changed in place

    @property
    def last(self) -> int:
        return self.dims[-1]


Step = Callable[[Code, Value], "Value | None"]


def soup(c: Code, width: int) -> None:
    """x [b, t, width] → width, by way of three to seven random steps."""
    draw = c.draw
    n = draw.pick(6, 8, 9, 10, 12, 15, 16, 18)
    c.do("b, t = x.shape[:2]")
    values = [Value(c.let(f"{c.linear('inward', width, n)}(x)"), (n,))]
    if draw.chance(0.3):
        values.append(Value(c.let(f"{c.linear('inward', width, n)}(x)"), (n,)))
    for _ in range(draw.number(3, 7)):
        value = values[-1] if draw.chance(0.7) else draw.pick(*values)
        made = None
        while made is None:
            mixed = [v for v in values if v is not value and v.dims == value.dims]
            if mixed and draw.chance(0.3):
                other = draw.pick(*mixed)
                text = draw.pick(
                    "{} + {}", "{} * {}", "torch.maximum({}, {})", "{} - 0.5 * {}", "torch.lerp({}, {}, 0.3)"
                )
                made = Value(c.let(text.format(value.name, other.name)), value.dims)
            else:
                made = draw.weighted(STEPS)(c, value)
        if made.last <= 40:
            values.append(made)
    last = values[-1]
    size = 1
    for dim in last.dims:
        size *= dim
    h = (
        last.name
        if len(last.dims) == 1
        else c.let(f"{last.name}.{draw.pick('flatten(2)', 'reshape(b, t, -1)')}")
    )
    c.do(f"return {c.linear('outward', size, width)}({h})")


def _made(c: Code, text: str, dims: tuple[int, ...], computed: bool = False) -> Value:
    return Value(c.let(text), dims, computed)


def activation(c: Code, v: Value) -> Value:
    return _made(c, f"{c.draw.pick(*ACTS)}({v.name})", v.dims)


def scaled(c: Code, v: Value) -> Value:
    w = c.param("w", v.last)
    return _made(
        c,
        c.draw.pick(
            f"{v.name} * {w}",
            f"{v.name} + {w}",
            f"{v.name} * (1 + {w}.tanh())",
            f"torch.addcmul({v.name}, {v.name}, {w})",
        ),
        v.dims,
    )


def in_place(c: Code, v: Value) -> Value | None:
    if not v.computed:
        return None
    k = c.draw.number(1, max(1, v.last - 1))
    c.do(
        c.draw.pick(
            f"{v.name} += {c.param('w', v.last)}",
            f"{v.name}.mul_(0.5)",
            f"{v.name}[..., :{k}] = 0.0",
            f"{v.name}[..., -1] *= 2.0",
            f"{v.name}[:, 0] = 0.0",
            f"{v.name}[..., :{k}].mul_(3.0)",
            f"{v.name}.masked_fill_({v.name} > 1.0, 0.0)",
        )
    )
    return _made(c, f"{v.name} * 1.5", v.dims, True)


def half_rotated(c: Code, v: Value) -> Value | None:
    if v.last % 2:
        return None
    a, g = c.fresh("a"), c.fresh("g")
    c.do(f"{a}, {g} = {v.name}.chunk(2, dim=-1)")
    return _made(
        c, c.draw.pick(f"torch.cat([-{g}, {a}], dim=-1)", f"torch.cat(({a} * {g}, {g}), -1)"), v.dims, True
    )


def sliced(c: Code, v: Value) -> Value | None:
    if v.last < 5:
        return None
    n, k = v.last, c.draw.number(1, v.last - 3)
    text, size = c.draw.pick(
        (f"{v.name}[..., :{k + 2}]", k + 2),
        (f"{v.name}[..., {k}:]", n - k),
        (f"{v.name}[..., ::2]", (n + 1) // 2),
        (f"{v.name}[..., 1::2]", n // 2),
        (f"{v.name}.narrow(-1, 1, {k + 1})", k + 1),
        (f"{v.name}[..., [2, 0, 1]]", 3),
        (f"{v.name}.index_select(-1, torch.tensor([1, 3, 2]))", 3),
        (f"{v.name}[..., -{k + 1}:]", k + 1),
    )
    return _made(c, text, (*v.dims[:-1], size))


def moved(c: Code, v: Value) -> Value:
    k = c.draw.number(1, 3)
    text = c.draw.pick(
        f"{v.name}.flip(-1)",
        f"torch.roll({v.name}, {k}, -1)",
        f"torch.roll({v.name}, 1, 1)",
        f"{v.name}.flip(1)",
        f"F.pad({v.name}, ({'0, 0, ' * len(v.dims)}1, 0))[:, :-1]",
        f"{v.name}[..., torch.arange({v.last} - 1, -1, -1)]",
        f"torch.cat([{v.name}[..., {k}:], {v.name}[..., :{k}]], dim=-1)"
        if v.last > 3
        else f"{v.name}.flip(-1)",
    )
    return _made(c, text, v.dims)


def along(c: Code, v: Value) -> Value:
    """Ops that need a dim whole, and keep it."""
    text = c.draw.pick(
        "{}.cumsum(1)",
        "{}.cumsum(-1)",
        "{}.softmax(-1)",
        "{}.softmax(1)",
        "F.normalize({}, dim=-1)",
        "{}.sort(dim=-1).values",
        "{0} - {0}.mean(-1, keepdim=True)",
        "{0} / {0}.abs().amax(-1, keepdim=True)",
        "{0} * torch.rsqrt({0}.pow(2).mean(-1, keepdim=True) + 1e-3)",
        "{0} / ({0}.std(-1, keepdim=True) + 0.1)",
        "{0} / (1 + {0}.norm(dim=-1, keepdim=True))",
        "{0} - torch.logsumexp({0}, -1, keepdim=True)",
        "{0} - {0}.sum(-1, keepdim=True) / {0}.shape[-1]",
        "{0} / (1 + {0}.var(-1, unbiased=False, keepdim=True)).sqrt()",
        "{0} * {0}.detach().abs().mean(-1, keepdim=True)",
        "F.layer_norm({0}, {0}.shape[-1:])",
    )
    return _made(c, text.format(v.name), v.dims)


def reduced(c: Code, v: Value) -> Value | None:
    if len(v.dims) < 2:
        return None
    d, gone = c.draw.pick((-1, v.dims[-1]), (-2, v.dims[-2]))
    dims = v.dims[:-1] if d == -1 else (*v.dims[:-2], v.dims[-1])
    text = c.draw.pick(
        "{}.sum({})",
        "{}.mean({})",
        "{}.amax({})",
        "{}.logsumexp({})",
        "{}.max({}).values",
        "{}.std({})",
        "{}.prod({})",
    )
    if gone == 1:
        text = "{}.sum({})"
    return _made(c, text.format(v.name, d), dims)


def grouped(c: Code, v: Value) -> Value | None:
    """One dim into two."""
    fits = [g for g in range(2, v.last) if v.last % g == 0]
    if not fits or len(v.dims) > 2:
        return None
    g = c.draw.pick(*fits)
    m = v.last // g
    said = c.draw.pick(str(g), c.size("groups", g))
    lead = "".join(f"{d}, " for d in v.dims[:-1])
    text = c.draw.pick(
        f"{v.name}.view(b, t, {lead}{said}, -1)"
        if v.computed
        else f"{v.name}.reshape(b, t, {lead}{said}, -1)",
        f"{v.name}.unflatten(-1, ({said}, {m}))",
        f"{v.name}.unflatten(-1, (-1, {m}))",
    )
    return _made(c, text, (*v.dims[:-1], g, m))


def flattened(c: Code, v: Value) -> Value | None:
    if len(v.dims) < 2:
        return None
    dims = (*v.dims[:-2], v.dims[-2] * v.dims[-1])
    return _made(c, c.draw.pick(f"{v.name}.flatten(-2)", f"{v.name}.transpose(-1, -2).flatten(-2)"), dims)


def turned(c: Code, v: Value) -> Value | None:
    if len(v.dims) < 2:
        return None
    return _made(
        c,
        c.draw.pick(f"{v.name}.transpose(-1, -2)", f"{v.name}.mT", f"{v.name}.swapdims(-2, -1)"),
        (*v.dims[:-2], v.dims[-1], v.dims[-2]),
    )


def projected(c: Code, v: Value) -> Value:
    m = c.draw.number(4, 14)
    if len(v.dims) == 2 and c.draw.chance(0.4):  # a weight for each group
        w = c.param("w", v.dims[0], v.last, m)
        return _made(
            c,
            c.draw.pick(
                f"torch.einsum('btgm,gmk->btgk', {v.name}, {w})",
                f"({v.name}.unsqueeze(-2) @ {w}).squeeze(-2)",
            ),
            (v.dims[0], m),
            True,
        )
    w = c.param("w", m, v.last)
    text = c.draw.pick(
        f"F.linear({v.name}, {w})",
        f"{v.name} @ {w}.T",
        f"torch.einsum('...n,kn->...k', {v.name}, {w})",
        f"{c.linear('proj', v.last, m)}({v.name})",
    )
    return _made(c, text, (*v.dims[:-1], m), True)


def stacked(c: Code, v: Value) -> Value | None:
    if len(v.dims) > 2:
        return None
    k = c.draw.number(2, 3)
    text, dims = c.draw.pick(
        (f"torch.stack([{v.name}, -{v.name}], dim=-1)", (*v.dims, 2)),
        (f"torch.stack([{v.name}, {v.name} * 2], dim=-1).flatten(-2)", (*v.dims[:-1], 2 * v.last)),
        (f"torch.cat([{v.name}, {v.name}.tanh()], dim=-1)", (*v.dims[:-1], 2 * v.last)),
        (
            f"torch.cat([{v.name}, {v.name}.new_ones({v.name}.shape)[..., :1]], dim=-1)",
            (*v.dims[:-1], v.last + 1),
        ),
        (f"{v.name}.repeat_interleave({k}, dim=-1)", (*v.dims[:-1], k * v.last)),
        (f"{v.name}.repeat({'1, ' * (len(v.dims) + 1)}{k})", (*v.dims[:-1], k * v.last)),
        (
            f"{v.name}.unsqueeze(-1).expand({'-1, ' * (len(v.dims) + 2)}{k}).flatten(-2)",
            (*v.dims[:-1], k * v.last),
        ),
        (f"F.pad({v.name}, (1, 2))", (*v.dims[:-1], v.last + 3)),
    )
    return _made(c, text, dims)


def pairwise(c: Code, v: Value) -> Value | None:
    """The same axis on two dims, or on both sides of a product."""
    if len(v.dims) != 1 or v.last > 6:
        x = c.let(f"{v.name}.flatten(2)", "flat") if len(v.dims) > 1 else v.name
        scores = c.let(f"({x} @ {x}.mT * 0.2).softmax(-1)", "scores")
        size = 1
        for dim in v.dims:
            size *= dim
        return _made(c, f"{scores} @ {x}", (size,), True)
    return _made(c, f"{v.name}.unsqueeze(-1) * {v.name}.unsqueeze(-2)", (v.last, v.last))


def fill(c: Code, v: Value) -> Value:
    """Constants as wide as the value."""
    text = c.draw.pick(
        "{0} + torch.arange({0}.shape[-1]) * 0.1",
        "{0} * torch.ones({0}.shape[-1], dtype={0}.dtype)",
        "{0} + torch.linspace(0, 1, {0}.size(-1), dtype={0}.dtype)",
        "{0} + torch.zeros_like({0})",
        "{0} @ torch.eye({0}.shape[-1], dtype={0}.dtype)",
        "{0} * torch.full_like({0}, 0.3)",
        "{0} @ torch.ones({0}.shape[-1], {0}.shape[-1], dtype={0}.dtype).tril()",
        "{0}.masked_fill(torch.arange({0}.shape[-1]) < 3, 0.0)",
        "torch.where({0} > 0, {0}, 0.1 * {0})",
        "{0}.clamp(-1.0, 1.0)",
        "{0}.to(torch.float64)",
        "torch.zeros_like({0}).copy_({0})",
        "{0}.clone()",
    )
    return _made(c, text.format(v.name), v.dims)


def measured(c: Code, v: Value) -> Value:
    """Numbers and branches that depend on a width: on a rank it is another one."""
    text = c.draw.pick(
        "{0} * {0}.shape[-1] ** -0.5",
        "{0} / math.sqrt({0}.size(-1))",
        "{0} / len({0}[0, 0])",
        "{0} * (2.0 if {0}.shape[-1] > 4 else 0.5)",
        "{0} * ({0}.numel() / x.numel())",
        "{0} * min({0}.shape)",
        "({0}.tanh() if {0}.shape[-1] % 2 == 0 else {0} * 2)",
        "sum({0}[..., i : i + 1] for i in range({0}.shape[-1])) * {0}",
        "{0} * (1.0 / {0}.shape[-1])",
    )
    return _made(c, text.format(v.name), v.dims)


def piecewise(c: Code, v: Value) -> Value | None:
    """A loop over pieces of the width."""
    if v.last % 2 or v.last < 4:
        return None
    k = c.draw.pick(*[k for k in range(2, v.last) if v.last % k == 0])
    pieces = c.let(f"{v.name}.split({k}, dim=-1)", "pieces")
    text = c.draw.pick(
        (f"torch.cat([p.tanh() for p in {pieces}], dim=-1)", v.last),
        (f"torch.cat([p * (i + 1) for i, p in enumerate({pieces})], dim=-1)", v.last),
        (f"sum({pieces})", k),
        (f"torch.stack({pieces}, dim=-1).sum(-1) / len({pieces})", k),
        (f"torch.cat({pieces}[::-1], dim=-1)", v.last),
    )
    return _made(c, text[0], (*v.dims[:-1], text[1]))


def picked(c: Code, v: Value) -> Value | None:
    if v.last < 4:
        return None
    text, k = c.draw.pick(
        (f"{v.name}.topk(3, dim=-1).values", 3),
        (f"{v.name}.gather(-1, {v.name}.argsort(dim=-1))", v.last),
        (f"{v.name}.kthvalue(2, dim=-1, keepdim=True).values", 1),
        (f"{v.name}.take_along_dim({v.name}.argmax(-1, keepdim=True), -1)", 1),
        (f"{v.name}.unfold(-1, 2, 1).mean(-1)", v.last - 1),
        (f"{v.name}.diff(dim=-1)", v.last - 1),
    )
    return _made(c, text, (*v.dims[:-1], k))


def without_gradient(c: Code, v: Value) -> Value:
    s = c.fresh("s")
    measure = c.draw.pick("abs().mean()", "sum(-1, keepdim=True)", "sigmoid()", "amax()")
    c.do("with torch.no_grad():", f"    {s} = {v.name}.{measure}")
    return _made(c, f"{v.name} * (0.1 + 0.1 * {s})", v.dims)


def with_input(c: Code, v: Value) -> Value:
    """The module's input, which is whole, once more."""
    return _made(
        c, f"{v.name} * x.square().mean(-1, keepdim=True)" + ".unsqueeze(-1)" * (len(v.dims) - 1), v.dims
    )


STEPS: dict[Step, float] = {
    activation: 3,
    scaled: 2,
    in_place: 3,
    half_rotated: 2,
    sliced: 3,
    moved: 1.5,
    along: 2,
    reduced: 2,
    grouped: 4,
    flattened: 1.5,
    turned: 1.5,
    projected: 3,
    stacked: 2.5,
    pairwise: 0.7,
    fill: 2,
    measured: 1.5,
    piecewise: 1.5,
    picked: 0.7,
    without_gradient: 0.8,
    with_input: 1.2,
}
