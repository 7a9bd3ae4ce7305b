from __future__ import annotations

import copy
import inspect
import linecache
import pickle
import traceback
from typing import Any

import pytest
import torch
from torch import nn

from autotp.errors import RewriteError
from autotp.rewrite.patch import Applied, Patch, SizeAt, Wrap, WrapArg, apply_patches
from autotp.rewrite.splice import Scaled
from autotp.trace.graph import Site
from autotp.trace.sites import forward_code
from tests.rewrite import patched
from tests.rewrite.patched import ByObject, Child, Decorated, factory, make
from tests.rewrite.record import calls_of, find

X = torch.arange(24.0).view(2, 12)


def double(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


def patch(module: nn.Module, text: str, *edits: Any, nth: int = 0, x: torch.Tensor = X) -> Applied:
    call = find(calls_of(module, lambda: module(x)), text, nth)
    made = [SizeAt.of(call, *edit) if isinstance(edit, tuple) else edit for edit in edits]
    return apply_patches(module, [Patch(call.frames, tuple(made))])


@pytest.mark.parametrize(
    ("method", "text", "edits", "shape", "shown"),
    [
        ("plain", "y.view(", [(1, 6), (2, 2)], (2, 6, 2), "y.view(B, 6, 2)"),
        (
            "starred",
            "x.view(",
            [(0, 6), (1, 2)],
            (6, 2, 2),
            "*_autotp_size_0((*shape, *x.shape[:0], -1,), {0: 6, 1: 2})",
        ),
        (
            "starred_last",
            "x.view(",
            [(1, 6), (2, 2)],
            (2, 6, 2),
            "*_autotp_size_0((self.n_head, 3), {0: 6, 1: 2})",
        ),
        (
            "variable",
            "x.view(",
            [(1, 6), (2, 2)],
            (2, 6, 2),
            "x.view(_autotp_size_0(new_shape, {1: 6, 2: 2}))",
        ),
        ("sliced", "x[:, : self.size]", [(0, 5)], (2, 4), "x[:, : 5]"),
        ("sliced", "0 : self.n_head", [(1, 3)], (2, 3), "[..., 0 : 3]"),
        ("keyword", "x.unflatten(", [(1, 6)], (2, 6, 2), "x.unflatten(dim=1, sizes=(6, -1))"),
        ("unicode", "x.view(", [(1, 6)], (1, 6, 4), "x.view(len(é), 6, -1)"),
        ("chained", "view(", [(1, 6), (2, 2)], (6, 2, 2), "6, 2)  # heads"),
        ("nested", ".view(-1", [(1, 6)], (4, 6), ".view(-1, 6)"),
        ("comprehension", "part.view(", [(1, 6)], (2, 4, 6), "part.view(-1, 6)"),
        ("local_lambda", "t.view(", [(1, 6)], (4, 6), "t.view(-1, 6)"),
        ("free_decorated", "x.view(", [(1, 6)], (2, 6, 2), "_autotp_decorated_split_0(x, self.n_head)"),
        ("dynamic", "x.view(", [(1, 6)], (2, 6, 2), "_autotp_split_heads_0(x, heads=self.n_head)"),
        ("static", "x.view(", [(1, 6)], (2, 6, 2), "_autotp_static_0(x, self.n_head)"),
        ("wrapped_helper", "x.view(", [(1, 6)], (2, 6, 2), "x.view(x.shape[0], 6, -1)"),
        ("uses_property", "self.bias.view(", [(0, 6)], (6, 2), "_autotp_table_0(self)"),
        ("checkpointed", "x.view(", [(1, 6)], (2, 6, 2), "_autotp_partial_0(_autotp_block_0, self)"),
        ("mangled", "x.view(", [(1, 6)], (4, 6), "x.view(-1, 6)"),
    ],
)
def test_size(method: str, text: str, edits: list[Any], shape: tuple[int, ...], shown: str) -> None:
    module, other = make(method), make(method)
    before = module(X)
    applied = patch(module, text, *edits)
    assert module(X).shape == shape
    assert shown in applied.diff()
    assert torch.equal(other(X), before)
    assert torch.equal(copy.deepcopy(module)(X), module(X))
    applied.undo()
    assert torch.equal(module(X), before) and "forward" not in module.__dict__
    assert not [name for name in module.__dict__ if "autotp" in name]


@pytest.mark.parametrize(
    ("method", "index", "shown"),
    [
        ("plain", 1, "y.view(B, ((self.n_head) * 6 // 4), C // self.n_head)"),
        ("variable", 1, "x.view(_autotp_size_0(new_shape, {1: (6, 4), 2: 2}))"),
        ("starred_last", 1, "x.view(-1, *_autotp_size_0((self.n_head, 3), {0: (6, 4), 1: 2}))"),
    ],
)
def test_scaled_size(method: str, index: int, shown: str) -> None:
    """A size in proportion to what the code says."""
    module = make(method)
    edits = [(index, Scaled(6, 4)), (2, 2)]
    applied = patch(module, ".view(", *edits)
    assert module(X).shape == (2, 6, 2)
    assert shown.replace("C // self.n_head", "2") in applied.diff()
    applied.undo()
    with pytest.raises(RewriteError, match=r"scaled both|both Scaled|set and scale"):
        patch(module, ".view(", *edits, (index, Scaled(1, 2)))
    with pytest.raises(RewriteError, match=r"scaled both|both Scaled|set and scale"):
        patch(module, ".view(", *edits, (index, 6))


def test_the_same_constants_give_the_same_bits() -> None:
    module = make("plain")
    before = module(X)
    patch(module, "y.view(", (1, 4), (2, 3))
    assert torch.equal(module(X), before)


def test_list_argument() -> None:
    module = make("listed")
    calls = calls_of(module, lambda: module(X))
    call = find(calls, "x.split(")
    edits = (SizeAt.of(call, 0, 5), SizeAt.of(call, 1, 7))
    applied = apply_patches(module, [Patch(call.frames, edits)])
    assert torch.equal(module(X), X) and "x.split([5, 7], dim=1)" in applied.diff()
    applied.undo()
    call = find(calls, "torch.cat(")
    apply_patches(module, [Patch(call.frames, (WrapArg(("args", 0, 1), double),))])
    assert torch.equal(module(X)[:, 4:], 2 * X[:, 4:]) and torch.equal(module(X)[:, :4], X[:, :4])


def test_nested_expressions() -> None:
    module = make("nested")
    calls = calls_of(module, lambda: module(X))
    add, mul, view = (next(c for c in calls if c.func == func) for func in ("addmm", "mul", "view"))
    before = module(X)
    with torch.no_grad():
        module.bias.fill_(1.0)
    applied = apply_patches(
        module,
        [
            Patch(mul.frames, (Wrap(double),)),
            Patch(add.frames, (Wrap(double), WrapArg(0, double))),
            Patch(view.frames, (SizeAt.of(view, 1, 6),)),
        ],
    )
    assert "_autotp_double_0(torch.addmm(_autotp_double_0(self.bias), x, _autotp_double_0(" in applied.diff()
    assert torch.allclose(module(X), (2 * (2 * before.view(-1, 12) + 2.0)).view(-1, 6))


def test_wraps_of_one_value_are_applied_in_order() -> None:
    module = make("plain")
    before = module(X)
    call = find(calls_of(module, lambda: module(X)), "y.view(")
    edits = (Wrap(double), Wrap(torch.exp), WrapArg(0, torch.neg))
    applied = apply_patches(module, [Patch(call.frames, edits), Patch(call.frames, (Wrap(torch.neg),))])
    assert torch.allclose(module(X), -torch.exp(-2 * before))
    assert "_autotp_neg_0(_autotp_exp_0(_autotp_double_0(_autotp_neg_0(y).view(B" in applied.diff()


def test_operands() -> None:
    class M(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x + x.abs()
            return -y @ x.view(12, 2)[:, 0] if (y == x).all() else y

    module = M()
    calls = calls_of(module, lambda: module(X))
    by = {call.func: call for call in calls}
    before = module(X)
    cases = [("matmul", 0, 2), ("matmul", 1, 2), ("matmul", ("args", 0), 2), ("neg", 0, 2)]
    for func, where, factor in cases:
        if func not in by:
            continue
        applied = apply_patches(module, [Patch(by[func].frames, (WrapArg(where, double),))])  # type: ignore[arg-type]
        assert torch.equal(module(X), factor * before)
        applied.undo()
    applied = apply_patches(module, [Patch(by["add"].frames, (WrapArg(1, double),))])
    assert torch.equal(module(X), X + 2 * X.abs())
    applied.undo()
    call = find(calls, "x.abs()", 0)
    apply_patches(module, [Patch(call.frames, (WrapArg(0, torch.neg), Wrap(torch.neg)))])
    assert "torch" not in type(module).__dict__


def test_augmented_assignment() -> None:
    module = make("augmented")
    y = module.proj(X) + X
    call = find(calls_of(module, lambda: module(X)), "y += x")
    applied = apply_patches(module, [Patch(call.frames, (Wrap(double),))])
    assert "y += x; _autotp_double_0(y)" in applied.diff()
    assert torch.allclose(module(X), 2 * y)
    applied.undo()
    applied = apply_patches(module, [Patch(call.frames, (WrapArg(0, double), WrapArg(1, torch.neg)))])
    assert torch.allclose(module(X), 2 * module.proj(X) - X)
    module(X).sum().backward()
    assert torch.allclose(module.proj.bias.grad, torch.full((12,), 4.0))


def test_one_call_of_a_free_function() -> None:
    module = make("free")
    x0 = patched.split_heads
    call = find(calls_of(module, lambda: module(X)), "x.view(", 1)
    applied = apply_patches(module, [Patch(call.frames, (Wrap(double),))])
    assert torch.equal(module(X), (X + 4 * X).view(2, 4, 3))
    assert patched.split_heads is x0 and torch.equal(x0(X, 4), X.view(2, 4, 3))
    assert applied.diff().count("\n+") == 4  # two files' heads, two lines


def test_helper_of_the_instance() -> None:
    module = make("helper")
    calls = calls_of(module, lambda: module(X))
    both = [
        Patch(find(calls, "x.view(", n).frames, (SizeAt.of(find(calls, "x.view("), 1, 6),)) for n in (0, 1)
    ]
    applied = apply_patches(module, both)
    assert module(X).shape == (2, 6, 2) and "_helper" in module.__dict__ and "forward" not in module.__dict__
    copied = copy.deepcopy(module)
    assert copied._helper.__self__ is copied
    applied.undo()
    apply_patches(module, [Patch(find(calls, "x.view(", 1).frames, (Wrap(double),))])
    assert torch.equal(module(X), (X + 6 * X).view(2, 4, 3)) and "_helper" not in module.__dict__


def test_decorators_are_rebuilt() -> None:
    module = Decorated()
    before = module(X)
    patch(module, "x.view(", (1, 6))
    assert module(X).shape == (2, 6, 2) and torch.equal(module(X).flatten(), before.flatten())
    assert not module(X.clone().requires_grad_()).requires_grad
    assert (
        module.forward.__wrapped__.__wrapped__.__wrapped__
        is not Decorated.forward.__wrapped__.__wrapped__.__wrapped__
    )
    assert inspect.signature(module.forward) == inspect.signature(Decorated().forward)
    assert inspect.unwrap(module.forward).__name__ == "forward"


def test_globals_stay_live(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Decorated()
    patch(module, "x.view(", (1, 6))
    monkeypatch.setattr(patched, "SCALE", 0.0)
    assert (module(X) == 0).all()


def test_overridden_method() -> None:
    module = Child()
    with torch.no_grad():
        before = module(X)
    call = find(calls_of(module, lambda: module(X), forward_code(Decorated())), "x.view(")
    applied = apply_patches(module, [Patch(call.frames, (SizeAt.of(call, 1, 6),))])
    assert module(X).shape == (2, 6) and torch.equal(module(X).sum(-1), before.sum(-1))
    assert "_autotp_forward_0(self, x).sum(-1)" in applied.diff()


def test_closure_and_super() -> None:
    module = factory(4)
    patch(module, "x.view(", (1, 6))
    assert module(X).shape == (2, 6, 2) and factory(3)(X).shape == (2, 3, 4)


def test_twice_over() -> None:
    module = make("plain")
    patch(module, "y.view(", (1, 6))
    with pytest.raises(RuntimeError):
        module(X)
    module = make("plain")
    first = patch(module, "y.view(", Wrap(double))
    second = patch(module, "y.view(", Wrap(double))
    assert torch.equal(module(X), 4 * make("plain")(X))
    with pytest.raises(RewriteError, match="patched over since"):
        first.undo()
    second.undo()
    first.undo()
    assert torch.equal(module(X), make("plain")(X))


def test_tracebacks_show_the_patched_line() -> None:
    module = make("plain")
    patch(module, "y.view(", (1, 7))
    with pytest.raises(RuntimeError) as caught:
        module(X)
    text = "".join(traceback.format_exception(caught.value))
    assert "return y.view(B, 7, C // self.n_head) + 0" in text and "<autotp patched.py #" in text
    assert caught.traceback[-1].lineno + 1 == inspect.getsourcelines(patched.Attention.plain)[1] + 3


def test_pickle_is_refused() -> None:
    module = make("plain")
    patch(module, "y.view(", (1, 4))
    with pytest.raises(RewriteError, match="cannot pickle"):
        pickle.dumps(module)
    assert copy.copy(module) is not None


@pytest.mark.parametrize(
    "method", ["plain", "variable", "free", "helper", "augmented", "uses_property", "dynamic"]
)
def test_compiles(method: str) -> None:
    module = make(method)
    texts = {"augmented": "y += x", "plain": "y.view(", "uses_property": "self.bias.view("}
    edits = (
        [Wrap(double)]
        if method == "augmented"
        else [Wrap(double), (1, 4) if method != "uses_property" else (0, 4)]
    )
    patch(module, texts.get(method, "x.view("), *edits)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    assert torch.equal(compiled(X), module(X))


def test_refusals() -> None:
    by_object = ByObject()
    code = vars(ByObject)["forward"].fn.__code__
    call = find(calls_of(by_object, lambda: by_object(X), code), "x.view(")
    with pytest.raises(RewriteError, match="no method of the ByObject instance, wrapped in a partial object"):
        apply_patches(by_object, [Patch(call.frames, (Wrap(double),))])

    scope: dict[str, Any] = {"nn": nn}
    exec("class Shell(nn.Module):\n  def forward(self, x):\n    return x.view(2, 4, -1)\n", scope)
    shell = scope["Shell"]()
    with pytest.raises(RewriteError, match="source is not available"):
        _refused(shell)

    source = "class Cell(nn.Module):\n  def forward(self, x):\n    return x.view(2, 4, -1)\n"
    linecache.cache["<cell 1>"] = (len(source), None, source.splitlines(True), "<cell 1>")
    exec(compile(source, "<cell 1>", "exec"), scope)
    cell = scope["Cell"]()
    patch(cell, "x.view(", (1, 6))
    assert cell(X).shape == (2, 6, 2)

    source = source.replace("2, 4", "2, 3")
    linecache.cache["<cell 1>"] = (len(source), None, source.splitlines(True), "<cell 1>")
    with pytest.raises(RewriteError, match="was edited since"):
        _refused(scope["Cell"]())

    module = make("listed")
    call = find(calls_of(module, lambda: module(X)), "torch.cat(")
    with pytest.raises(RewriteError, match="no argument"):
        apply_patches(module, [Patch(call.frames, (WrapArg("out", double),))])
    call = find(calls_of(module, lambda: module(X)), "x.split(")
    with pytest.raises(RewriteError, match="both 5 and 6"):
        apply_patches(module, [Patch(call.frames, (SizeAt.of(call, 0, 5), SizeAt.of(call, 0, 6)))])
    assert "forward" not in module.__dict__
    with pytest.raises(RewriteError, match="by no Python code"):
        apply_patches(module, [Patch((), (Wrap(double),))])


def _refused(module: nn.Module) -> None:
    code = type(module).forward.__code__  # type: ignore[attr-defined]
    site = Site(code.co_filename, code.co_qualname, code, 3, 3, 11, 28)
    apply_patches(module, [Patch((site,), (Wrap(double),))])
