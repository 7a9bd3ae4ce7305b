"""Provenance integers: what they are in arithmetic, and what a trace says of the sizes in user code."""

from __future__ import annotations

import copy
import math
import pickle
from functools import lru_cache

import pytest
import torch
from torch import Tensor, nn

from autotp.trace.attributes import int_attributes, read_attribute
from autotp.trace.capture import trace
from autotp.trace.graph import Trace
from autotp.trace.provenance import Attr, Const, Op, ProvInt, Session, evaluate, expression, make
from autotp.trace.skeleton import skeleton
from tests.models import MODELS
from tests.trace.test_capture import captured

P = Attr("attn", ("n",))
Q = Attr("attn", ("m",))


def ints(session: Session | None = None) -> tuple[int, int]:
    session = session or Session()
    return make(12, P, session), make(5, Q, session)


@pytest.mark.parametrize(
    "text",
    "p+q p-q p*q p//q p%q p**2 2**q p<<q p>>1 -p abs(-p) p+1 1+p 7-p 7*p 50//p 50%p 1<<q 100>>q "
    "divmod(p,q)[1] divmod(50,p)[0] round(p) +p (p+1)*q//2 min(p,q) max(p,3) math.ceil(p)".split(),
)
def test_arithmetic_keeps_the_expression(text: str) -> None:
    p, q = ints()
    value = eval(text, {"p": p, "q": q, "math": math})
    assert value == eval(text, {"p": 12, "q": 5, "math": math})
    assert isinstance(value, ProvInt)
    changed = {P: 24, Q: 6}
    found = evaluate(value.expr, lambda module, path: changed[Attr(module, path)], lambda node, dim: -1)
    assert found == eval(text, {"p": 24, "q": 6, "math": math})


def test_what_is_not_an_int_is_plain() -> None:
    p, q = ints()
    assert type(p / q) is float
    assert type(p * 1.5) is float
    assert type(p < q) is bool
    assert type(2**-p) is float
    assert (0,) * q == (0,) * 5
    assert expression(3) == Const(3)
    assert hash(p) == hash(12)
    assert {12: "twelve"}[p] == "twelve"


def test_copies_of_an_int() -> None:
    p, _ = ints()
    assert copy.deepcopy([p])[0] is p
    assert type(pickle.loads(pickle.dumps(p))) is int
    assert torch.Size([p])[0] is p
    assert torch.Size([p, 3])[:-1][0] is p


def test_after_its_session_an_int_is_plain() -> None:
    session = Session()
    p, q = ints(session)
    session.open = False
    assert type(p + q) is int
    later = make(2, Q, Session())
    assert (later + p).expr == Op("+", (Q, Const(12)))
    assert (p * later).expr == Op("*", (Const(12), Q))


# in a trace


def sizes(found: Trace, qualname: str) -> dict[str, list[str]]:
    """For each expression of `qualname`, the ints it was called with."""
    calls = {node.meta["call"].index: node.meta["call"] for node in found.graph.nodes if node.meta["call"]}
    return {
        call.site.text: [str(expression(value)) for _, value in call.ints]
        for call in calls.values()
        if call.site is not None and call.site.qualname == qualname
    }


def test_nanogpt() -> None:
    case = MODELS["nanogpt"]
    found = captured(case.build(), case.inputs())
    calls = {node.meta["call"].index: node.meta["call"] for node in found.graph.nodes if node.meta["call"]}
    attention = [c for c in calls.values() if c.module == "transformer.h.1.attn" and c.ints]
    split, view, *_ = (c for c in attention if c.func in ("split", "view"))
    assert split.site is not None
    assert split.site.text == "self.c_attn(x).split(self.n_embd, dim=2)"
    assert split.ints == ((("args", 1), 40), (("kwargs", "dim"), 2))
    assert expression(split.ints[0][1]) == Attr("transformer.h.1.attn", ("n_embd",))
    assert view.site is not None
    assert view.site.text == "k.view(B, T, self.n_head, C // self.n_head)"
    assert str(view.site).startswith("nanogpt.py:")
    assert [path for path, _ in view.ints] == [("args", 1), ("args", 2), ("args", 3), ("args", 4)]
    b, t, heads, size = (expression(value) for _, value in view.ints)
    assert heads == Attr("transformer.h.1.attn", ("n_head",))
    assert isinstance(size, Op)
    assert size.symbol == "//"
    assert size.args[1] == heads
    x = next(c for c in found.calls if c.fqn == "transformer.h.1.attn").inputs[0].node
    assert (str(b), str(t), str(size.args[0])) == tuple(f"dim({x.name}, {d})" for d in range(3))
    value = evaluate(
        size, lambda fqn, path: {"n_head": 8}[str(path[0])], lambda node, d: node.meta["val"].shape[d]
    )
    assert value == 5


def test_frames_lead_to_the_forward_of_the_module() -> None:
    case = MODELS["llama"]
    found = captured(case.build(kv_heads=2), case.inputs())
    call = next(
        node.meta["call"]
        for node in found.graph.nodes
        if node.meta["call"] is not None
        and node.meta["call"].frames
        and "rotate_half" in node.meta["call"].frames[0].qualname
    )
    assert [site.qualname for site in call.frames] == [
        "rotate_half",
        "apply_rotary_pos_emb",
        "LlamaAttention.forward",
    ]
    assert call.frames[1].text == "rotate_half(q)"
    linear = next(node.meta["call"] for node in found.graph.nodes if node.name == "linear")
    assert (linear.module, linear.site, linear.frames) == ("model.layers.0.self_attn.q_proj", None, ())


class FromConfig(nn.Module):
    """Reads its sizes from a shared config, from a dict, from a tuple and through a helper."""

    class Config:
        def __init__(self) -> None:
            self.heads = 4
            self.causal = True

    def __init__(self, config: Config | None = None) -> None:
        super().__init__()
        self.config = config or self.Config()
        self.cfg = {"width": 8, "name": "tiny"}
        self.grid = (2, 3)
        self.lin = nn.Linear(8, 8)
        self.seen = 0

    def forward(self, x: Tensor) -> Tensor:
        b = len(x)
        self.seen = x.shape[1]
        y = self.lin(x).view(b, -1, self.config.heads, self.cfg["width"] // self.config.heads)
        y = y.reshape(x.size(0), *self.grid, *y.shape[2:])
        return y.flatten(1, 2).mean(dim=(-1, -2), keepdim=self.config.causal)


def test_configs_dicts_and_tuples() -> None:
    config = FromConfig.Config()
    model = nn.Sequential(FromConfig(config), nn.Flatten(), nn.Linear(6, 6), nn.Unflatten(1, (6, 1, 1)))
    model.append(nn.Flatten())
    first = FromConfig(config)
    found = trace(skeleton(first), (torch.zeros(5, 6, 8),))
    calls = sizes(found, "FromConfig.forward")
    view = 'self.lin(x).view(b, -1, self.config.heads, self.cfg["width"] // self.config.heads)'
    assert calls[view] == ["5", "-1", "config.heads", "(cfg.width // config.heads)"]
    reshape = calls["y.reshape(x.size(0), *self.grid, *y.shape[2:])"]
    assert reshape == ["dim(input_0, 0)", "grid.0", "grid.1", "dim(view, 2)", "dim(view, 3)"]
    assert found.notes == ()
    for module in (first, found.module):
        assert type(module.config.heads) is int
        assert type(module.seen) is int
        assert module.seen == 0
        assert module.config.causal is True
        assert type(module.grid[0]) is int
        assert type(module.cfg["width"]) is int
    paths = dict(int_attributes(first))
    assert paths["config", "heads"] == read_attribute(first, ("config", "heads")) == 4
    assert ("config", "causal") not in paths
    assert paths["grid", 1] == read_attribute(first, ("grid", 1)) == 3


@lru_cache
def doubled(n: int) -> int:
    return 2 * n


class Cached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.half = 4
        self.lin = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x).view(-1, doubled(self.half))


def test_caches_do_not_keep_provenance_integers() -> None:
    found = trace(skeleton(Cached()), (torch.zeros(3, 8),))
    assert "(2 * half)" in next(iter(sizes(found, "Cached.forward").values()))
    assert doubled.cache_info().currsize == 0
    assert type(doubled(4)) is int


class Picky(nn.Module):
    """Refuses subclasses of int."""

    def __init__(self) -> None:
        super().__init__()
        self.n = 8
        self.lin = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        if type(self.n) is not int:
            raise TypeError("an int, please")
        return self.lin(x).view(-1, self.n)


def test_where_provenance_does_harm_the_trace_goes_without() -> None:
    found = trace(skeleton(Picky()), (torch.zeros(3, 8),))
    assert "an int, please" in found.notes[0]
    assert "Picky" in found.notes[0]
