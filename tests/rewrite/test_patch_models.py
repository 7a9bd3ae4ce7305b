"""Patches in the code of real models."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from autotp.errors import RewriteError
from autotp.rewrite.patch import Patch, SizeAt, Wrap, WrapArg, apply_patches
from autotp.trace.capture import trace
from autotp.trace.graph import Call
from autotp.trace.leaves import tensor_leaves
from tests.models import MODELS, call
from tests.rewrite.record import calls_of

UNPATCHABLE = (
    "GeLUFunction",  # called by autograd
    "'_stacklevel'",  # an argument that torch adds
    "which side is the number",  # x = 0; x += tensor
    "and_mask",  # a closure that is gone
    "DynamicCache",  # a constructor
    "called inside it",  # super().forward(), of a module of torch
)


def same(value: torch.Tensor) -> torch.Tensor:
    return value


def traced_calls(model: nn.Module, inputs: Any) -> list[Call]:
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
    calls = (n.meta.get("call") for n in trace(model, args, kwargs).graph.nodes)
    return list({c.index: c for c in calls if c is not None}.values())


def apply_what_can_be(module: nn.Module, patches: list[Patch]) -> list[Patch]:
    """Apply all patches, or else all but those that are refused for a known reason."""
    patches = [patch for patch in patches if patch.frames]
    try:
        apply_patches(module, patches)
        return patches
    except RewriteError:
        good = []
    for patch in patches:
        try:
            apply_patches(module, [patch]).undo()
            good.append(patch)
        except RewriteError as error:
            assert any(reason in str(error) for reason in UNPATCHABLE), error
    assert len(good) < len(patches)
    apply_patches(module, good)
    return good


@pytest.mark.parametrize("name", [name for name in MODELS if not name.startswith("torch_")])
def test_every_expression_with_its_own_value(name: str) -> None:
    """All sizes replaced by what they are, all values passed through a function: the same bits come out."""
    case = MODELS[name]
    model, inputs = case.build(), case.inputs()
    with torch.no_grad():
        before = [t for _, t in tensor_leaves(call(model, inputs), ())]
    modules: dict[str, list[Patch]] = defaultdict(list)
    for c in traced_calls(model, inputs):
        edits = [Wrap(same), *(SizeAt.of(c, i, int(value)) for i, (_, value) in enumerate(c.ints))]
        modules[c.module] += [Patch(c.frames, (edit,)) for edit in edits]
    patched = sum(len(apply_what_can_be(model.get_submodule(m), patches)) for m, patches in modules.items())
    with torch.no_grad():
        after = [t for _, t in tensor_leaves(call(model, inputs), ())]
        copied = [t for _, t in tensor_leaves(call(copy.deepcopy(model), inputs), ())]
    assert len(before) == len(after) == len(copied) > 0
    assert all(torch.equal(x, y) and torch.equal(x, z) for x, y, z in zip(before, after, copied, strict=True))
    assert patched or name in ("linear", "mlp")


def _attention(config: str, attention: str, module: str, **arguments: Any) -> tuple[nn.Module, nn.Module]:
    """Two instances of an attention module with the same weights."""
    transformers = pytest.importorskip("transformers")
    import importlib

    made = getattr(transformers, config)(**arguments)
    made._attn_implementation = "eager"
    cls = getattr(importlib.import_module(f"transformers.models.{module}"), attention)
    takes_layer = "layer_idx" in cls.__init__.__code__.co_varnames
    torch.manual_seed(0)
    first = cls(made, layer_idx=0) if takes_layer else cls(made)
    return first.double().eval(), copy.deepcopy(first.double().eval())


X = torch.linspace(-1, 1, 2 * 5 * 32, dtype=torch.float64).view(2, 5, 32)
POSITIONS = torch.arange(5)[None]


def _gptj() -> tuple[tuple[nn.Module, nn.Module], Callable[[nn.Module], Any]]:
    pair = _attention(
        "GPTJConfig", "GPTJAttention", "gptj.modeling_gptj", n_embd=32, n_head=4, n_layer=1, rotary_dim=4
    )
    return pair, lambda m: m(X, position_ids=POSITIONS)[0]


def _codegen() -> tuple[tuple[nn.Module, nn.Module], Callable[[nn.Module], Any]]:
    pair = _attention(
        "CodeGenConfig", "CodeGenAttention", "codegen.modeling_codegen", n_embd=32, n_head=4, rotary_dim=4
    )
    return pair, lambda m: m(X, position_ids=POSITIONS)[0]


def _olmo2() -> tuple[tuple[nn.Module, nn.Module], Callable[[nn.Module], Any]]:
    pair = _attention(
        "Olmo2Config", "Olmo2Attention", "olmo2.modeling_olmo2", hidden_size=32, num_attention_heads=4
    )
    table = torch.ones(1, 5, 8, dtype=torch.float64)
    return pair, lambda m: m(X, (table, 0.5 * table), None)[0]


def _vit() -> tuple[tuple[nn.Module, nn.Module], Callable[[nn.Module], Any]]:
    pair = _attention("ViTConfig", "ViTAttention", "vit.modeling_vit", hidden_size=32, num_attention_heads=4)
    return pair, lambda m: m(X)[0]


def _bloom() -> tuple[tuple[nn.Module, nn.Module], Callable[[nn.Module], Any]]:
    pair = _attention("BloomConfig", "BloomAttention", "bloom.modeling_bloom", hidden_size=32, n_head=4)
    alibi = torch.zeros(8, 1, 5, dtype=torch.float64)
    mask = torch.zeros(2, 1, 5, 5, dtype=torch.float64)
    return pair, lambda m: m(X, torch.zeros_like(X), alibi, mask)[0]


ATTENTION = {"gptj": _gptj, "codegen": _codegen, "olmo2": _olmo2, "vit": _vit, "bloom": _bloom}


@pytest.mark.parametrize("name", ATTENTION)
def test_one_instance_of_an_attention(name: str) -> None:
    (module, other), run = ATTENTION[name]()
    with torch.no_grad():
        before = run(module)
    calls = calls_of(module, lambda: run(module))
    sizes = [
        Patch(c.frames, (SizeAt.of(c, i, v),))
        for c in calls
        for i, (p, v) in enumerate(c.ints)
        if c.func in ("view", "reshape", "split", "expand") and p[0] == "args"
    ]
    assert sizes
    applied = apply_patches(module, sizes)
    with torch.no_grad():
        assert torch.equal(run(module), before)
        assert torch.equal(run(copy.deepcopy(module)), before)
    assert applied.diff().startswith("--- ") and f"modeling_{name}.py" in applied.diff()
    assert not [key for key in other.__dict__ if "autotp" in key or key == "forward"]

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.allclose(compiled(module), before)
    applied.undo()

    # A constant that is not what it was shows in this instance alone.
    wrong = next(c for c in reversed(calls) if c.func in ("view", "reshape") and c.ints)
    applied = apply_patches(module, [Patch(wrong.frames, (SizeAt.of(wrong, len(wrong.ints) - 1, 7),))])
    with torch.no_grad():
        with pytest.raises(RuntimeError):
            run(module)
        assert torch.equal(run(other), before)
        applied.undo()
        assert torch.equal(run(module), before)


def test_olmo2_mean_of_squares() -> None:
    """What sharded q/k norms need: the mean inside the norm replaced."""
    (module, _), run = _olmo2()
    norm = module.q_norm
    c = next(c for c in calls_of(norm, lambda: norm(X)) if c.func == "mean")
    applied = apply_patches(norm, [Patch(c.frames, (Wrap(torch.zeros_like),))])
    assert "_autotp_zeros_like_0(hidden_states.pow(2).mean(-1, keepdim=True))" in applied.diff()
    assert torch.allclose(norm(X), X / norm.variance_epsilon**0.5)
    assert not torch.allclose(module.k_norm(X), norm(X))
    with torch.no_grad():
        run(module)


def test_decorated_model_forward() -> None:
    """transformers wraps forward in `can_return_tuple`, `merge_with_config_defaults`, `capture_outputs`."""
    case = MODELS["llama"]
    model, other, inputs = case.build(), case.build(), case.inputs()
    for name in ("", "model"):
        module = model.get_submodule(name)
        c = next(c for c in calls_of(module, lambda: call(model, inputs)) if len(c.frames) == 1)
        apply_patches(module, [Patch(c.frames, (Wrap(same), WrapArg(0, same)))])
        assert "forward" in module.__dict__
    with torch.no_grad():
        assert torch.equal(call(model, inputs).logits, call(other, inputs).logits)
        hidden = model(**inputs, output_hidden_states=True).hidden_states
        assert isinstance(model(**inputs, return_dict=False), tuple)
    expected = other(**inputs, output_hidden_states=True).hidden_states
    assert len(hidden) == len(expected) and all(
        torch.equal(x, y) for x, y in zip(hidden, expected, strict=True)
    )
    assert model.generate(inputs["input_ids"], max_new_tokens=3, do_sample=False).shape[1] == 8
