"""`make_fx` and its private arguments and tables, all in one place. Nothing else of autotp touches them.

Written against torch 2.13; a version guard says so where an argument is gone. `record_module_stack` is not
used: it hands proxies of shared modules to the user's code, and `Recorder` knows the module path anyway.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx._lazy_graph_module import _use_lazy_graph_module
from torch.fx.experimental import proxy_tensor

_WANTED = {
    "tracing_mode": "fake",
    "pre_dispatch": True,
    "_allow_non_fake_inputs": True,
    "_disable_torch_fn_metadata_mode": True,  # newer torch only: saves time
}
_NEEDED = {"tracing_mode", "pre_dispatch", "_allow_non_fake_inputs"}


def fake_mode() -> FakeTensorMode:
    """No shape environment: a value that depends on data is an error where it is read, not a symbol in the
    graph."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def make_graph(f: Callable[..., Any], *args: Sequence[torch.Tensor]) -> fx.GraphModule:
    """Trace `f` over fake tensors into a graph of pre-dispatch ATen ops. Dead nodes are kept."""
    has = inspect.signature(proxy_tensor.make_fx).parameters
    missing = _NEEDED - has.keys()
    if missing:
        raise RuntimeError(
            f"torch {torch.__version__}: make_fx has no argument {', '.join(sorted(missing))}; "
            "this version of autotp does not know how to trace with it"
        )
    wanted: dict[str, Any] = {name: value for name, value in _WANTED.items() if name in has}
    with quiet(), _use_lazy_graph_module(True):  # the graph is read, its Python code is not
        return proxy_tensor.make_fx(f, **wanted)(*args)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the traceback that torch prints of an error under fake tensors: we report it ourselves."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def current_tracer() -> Any:
    """The fx tracer at work; only inside the function that `make_graph` traces."""
    mode = proxy_tensor.get_proxy_mode()
    if mode is None:
        raise RuntimeError("no make_fx trace is running")
    return mode.tracer


def node_of(tensor: torch.Tensor, tracer: Any) -> fx.Node | None:
    """The node that holds `tensor` now; None for a tensor that the trace did not make (a constant)."""
    slot = proxy_tensor.get_proxy_slot(tensor, tracer, None)
    proxy = getattr(slot, "proxy", slot)
    return proxy.node if isinstance(proxy, fx.Proxy) else None
