"""Capture a module's forward as a graph: the entry of the trace stage.

The real Python runs, under fake CPU tensors, inside `make_fx(pre_dispatch=True)`. Nothing is computed and no
weight is read, so a model on the meta device traces like any other.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.utils.stateless import _reparametrize_module

from autotp.errors import TraceError
from autotp.trace.attributes import provenance
from autotp.trace.cleanup import check_indices, remove_dead, remove_noops
from autotp.trace.constants import LARGEST, Constants
from autotp.trace.diagnose import trace_error
from autotp.trace.graph import Call, ModuleCall, Path, Port, Trace
from autotp.trace.leaves import map_tensors, tensor_leaves
from autotp.trace.library import unchecked, unmasked
from autotp.trace.makefx import current_tracer, fake_mode, make_graph, node_of
from autotp.trace.provenance import Attr, ProvInt, Session, make, rewired
from autotp.trace.recorder import RanModule, Recorder
from autotp.trace.skeleton import is_lazy
from autotp.trace.twins import Twins, twins

Run = Callable[..., Any]
"""How a scenario calls the module: `run(module, *args, **kwargs)`."""


def call_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return module(*args, **kwargs)


def trace(
    module: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    scenario: str = "forward",
    *,
    training: bool | None = None,
    run: Run = call_forward,
    watch: frozenset[Attr] = frozenset(),
    compared: set[Attr] | None = None,
) -> Trace:
    """The graph of `run(module, *args, **kwargs)`.

    `training` is the mode of the module meanwhile; by default that of eval, except for the scenario "train".
    Of the attributes in `watch`, those that the code compares or branches on are added to `compared`. The
    module is afterwards as it was. Raises `TraceError` where the forward cannot be captured.
    """
    kwargs = dict(kwargs or {})
    branch = unmasked() if scenario == "unmasked" else nullcontext()
    training = scenario == "train" if training is None else training
    with _mode(module, training), branch, unchecked() as checked, twins(module) as own:
        work = _Work(module, tuple(args), kwargs, scenario, run, own, checked)
        session = Session(watch)
        try:
            return work.attempt(session)
        except Exception as error:
            first, failed_in = error, work.failed_in
        finally:
            if compared is not None:
                compared |= session.compared
        try:
            plain = work.attempt(None)
        except Exception as error:
            raise (
                error if isinstance(error, TraceError) else trace_error(error, work.failed_in, scenario)
            ) from error
        # It was the provenance integers: do without them where they did harm, else altogether.
        culprit = type(module.get_submodule(failed_in)) if failed_in is not None else None
        note = f"traced without provenance of sizes ({type(first).__name__}: {first})"
        if culprit is not None:
            try:
                traced = work.attempt(Session(watch), frozenset((culprit,)))
                return replace(traced, notes=(*traced.notes, f"{note[:300]} in {culprit.__name__}"))
            except Exception:
                pass
        return replace(plain, notes=(*plain.notes, note[:300]))


@contextmanager
def _same_draws() -> Iterator[None]:
    """What the forward draws outside of torch (masks of SpecAugment, with NumPy) is the same in every trace, of the
    whole model and of a rank's, and the next draws are as if there had been no trace."""
    states = random.getstate(), np.random.get_state()
    random.seed(0)
    np.random.seed(0)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


@dataclass
class _Work:
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    scenario: str
    run: Run
    twins: Twins
    checked: list[torch.Tensor]
    failed_in: str | None = None

    @_same_draws()
    def attempt(self, session: Session | None, exclude: frozenset[type] = frozenset()) -> Trace:
        """Trace once; without a session, all integers are plain."""
        self.failed_in = None
        self.checked.clear()
        mode = fake_mode()
        state = _State.of(self.module)
        originals = {id(t): t for _, t in self._input_leaves()}
        with mode:
            params = [_fake(tensor) for tensor in state.tensors.values()]
            inputs = [_fake(tensor) for tensor in originals.values()]
        recorder: Recorder | None = None
        outputs: tuple[Port, ...] = ()

        def f(params: list[torch.Tensor], inputs: list[torch.Tensor]) -> list[torch.Tensor]:
            nonlocal recorder, outputs
            tracer = current_tracer()
            fakes = dict(zip(state.tensors, params, strict=True))
            given = dict(zip(originals, inputs, strict=True))
            args, kwargs = map_tensors((self.args, self.kwargs), lambda t: given[id(t)])
            buffers = {node_of(fakes[name], tracer): value for name, value in state.values.items()}
            known = {node_of(given[k], tracer): t for k, t in originals.items() if _is_known(t, True)}
            constants = Constants(
                tracer.root,
                {n: v for n, v in buffers.items() if n is not None},
                {n: v for n, v in known.items() if n is not None},
            )
            recorder = Recorder(self.module, tracer, session, constants, self.twins)
            names = {**fakes, **{alias: fakes[name] for alias, name in state.aliases.items()}}
            registered = {n: t for n, t in names.items() if n not in state.loose}
            for name, (module, attr) in state.loose.items():  # `provenance` puts the attributes back
                module.__dict__[attr] = fakes[name]
            with (
                torch.enable_grad(),
                _reparametrize_module(self.module, registered),
                recorder.modules(),
                recorder,
            ):
                out = self.run(self.module, *args, **kwargs)
            outputs = (*recorder.ports(out, ("out",)), *recorder.ports(self.checked, ("checked",)))
            return [t for _, t in tensor_leaves((out, self.checked), ()) if node_of(t, tracer) is not None]

        try:
            with provenance(self.module, session, exclude):
                gm = make_graph(f, params, inputs)
        finally:
            self.failed_in = recorder.failed_in if recorder is not None else None
        assert recorder is not None
        _refuse_lost(gm, self.scenario)
        if not outputs:
            raise TraceError(
                f"scenario {self.scenario!r} returns no tensor that depends on parameters or inputs"
            )
        names = [*state.tensors, *(f"input_{i}" for i in range(len(inputs)))]
        placeholders = _placeholders(gm.graph, names, [*params, *inputs])
        by_original = dict(zip(originals, placeholders[len(params) :], strict=True))
        ports = tuple(Port(path, by_original[id(t)]) for path, t in self._input_leaves())
        return _finish(gm, self, state, recorder, placeholders, ports, outputs)

    def _input_leaves(self) -> Iterator[tuple[Path, torch.Tensor]]:
        yield from tensor_leaves(self.args, ("args",))
        yield from tensor_leaves(self.kwargs, ("kwargs",))


def _refuse_lost(gm: fx.GraphModule, scenario: str) -> None:
    """What a transformed function (a `vmap`) computes may come out as a constant of unknown value: of a mask that is
    as good as its ops, but of numbers the way back to the weights that they depend on would be lost."""
    for node in gm.graph.find_nodes(op="get_attr"):
        value = getattr(gm, str(node.target), None)
        if isinstance(value, FakeTensor) and (value.is_floating_point() or value.is_complex()):
            users = ", ".join(str(user.meta.get("call", user.name)) for user in node.users)
            raise TraceError(
                f"cannot trace scenario {scenario!r}: {users} takes floating-point numbers that a transformed "
                "function computed (torch.vmap, torch.func), which a trace does not see into. Compute them with plain "
                "broadcasting; masks of integers or booleans may be transformed."
            )


@dataclass(frozen=True)
class _State:
    """The tensors of a module by name. `loose` are tensors that are plain attributes and have no values to
    bake in."""

    tensors: dict[str, torch.Tensor]
    aliases: dict[str, str]
    buffers: frozenset[str]
    values: dict[str, torch.Tensor]
    loose: dict[str, tuple[nn.Module, str]]

    @classmethod
    def of(cls, module: nn.Module) -> _State:
        tensors: dict[str, torch.Tensor] = {}
        aliases: dict[str, str] = {}
        names: dict[int, str] = {}
        parameters = list(module.named_parameters(remove_duplicate=False))
        buffers = list(module.named_buffers(remove_duplicate=False))
        loose: dict[str, tuple[nn.Module, str]] = {}
        plain = []
        for fqn, m in module.named_modules():
            for attr, value in m.__dict__.items():
                if isinstance(value, torch.Tensor) and value.device.type == "meta":
                    name = f"{fqn}.{attr}" if fqn else attr
                    loose[name] = (m, attr)
                    plain.append((name, value))
        for name, tensor in (*parameters, *buffers, *plain):
            if is_lazy(tensor):
                raise TraceError(
                    f"{name!r} has no shape yet: run the model once, so that its lazy modules take shape"
                )
            first = names.setdefault(id(tensor), name)
            if first == name:
                tensors[name] = tensor
            else:
                aliases[name] = first
        values = {
            name: tensor.detach()
            for name, tensor in buffers
            if name in tensors and _is_known(tensor)
        }
        loose = {name: at for name, at in loose.items() if name in tensors}
        return cls(
            tensors, aliases, frozenset(n for n, _ in (*buffers, *plain) if n in tensors), values, loose
        )


def _is_known(tensor: torch.Tensor, floating: bool = False) -> bool:
    """Whether the values are taken along: small ones, of a buffer integers alone."""
    plain = not tensor.is_complex() and (floating or not tensor.is_floating_point())
    return plain and tensor.device.type == "cpu" and tensor.numel() <= LARGEST


@contextmanager
def _mode(module: nn.Module, training: bool) -> Iterator[None]:
    before = [(m, m.training) for m in module.modules()]
    try:
        module.train(training)
        yield
    finally:
        for m, was in before:
            m.training = was


def _fake(tensor: torch.Tensor) -> torch.Tensor:
    """A CPU tensor without values, shaped as `tensor`; to be called under the fake mode."""
    if tensor.layout is not torch.strided:
        raise TraceError(f"cannot trace a tensor of layout {tensor.layout}; only strided tensors are known")
    fake = torch.empty_strided(tuple(tensor.shape), tensor.stride(), dtype=tensor.dtype, device="cpu")
    return fake.requires_grad_(tensor.requires_grad)


def _placeholders(graph: fx.Graph, names: Sequence[str], fakes: Sequence[torch.Tensor]) -> list[fx.Node]:
    nodes = [n for n in graph.nodes if n.op == "placeholder"]
    for node, name, fake in zip(nodes, names, fakes, strict=True):
        node._rename(name.replace(".", "_"))
        node.meta.update(call=None, module="", requires_grad=fake.requires_grad)
    return nodes


def _finish(
    gm: fx.GraphModule,
    work: _Work,
    state: _State,
    recorder: Recorder,
    placeholders: Sequence[fx.Node],
    inputs: tuple[Port, ...],
    outputs: tuple[Port, ...],
) -> Trace:
    """Clean the graph, and carry what was recorded over to what is left of it."""
    graph = gm.graph
    recorder.constants.root = gm
    recorder.constants.advance(recorder._unknown())
    for node in graph.nodes:
        node.meta.setdefault("call", None)
        node.meta.setdefault("module", "")
        if "requires_grad" not in node.meta:
            node.meta["requires_grad"] = any(n.meta["requires_grad"] for n in node.all_input_nodes)
    order = {node: i for i, node in enumerate([graph._root, *graph.nodes])}
    replaced = remove_noops(graph)

    def rewire(ports: tuple[Port, ...]) -> tuple[Port, ...]:
        return tuple(Port(port.path, replaced.get(port.node, port.node)) for port in ports)

    ran = [replace(r, inputs=rewire(r.inputs), outputs=rewire(r.outputs)) for r in recorder.ran]
    outputs = rewire(outputs)
    _rewire_calls(graph, replaced)
    check_indices(graph, recorder.constants.tensors())
    remove_dead(graph, (port.node for r in ran for port in (*r.inputs, *r.outputs)))
    out = graph.output_node()
    out.args = (tuple(port.node for port in outputs),)
    left = [order[node] for node in graph.nodes]

    def position(mark: fx.Node | None) -> int:
        return bisect_right(left, order[mark]) if mark is not None else len(left)

    def finished(r: RanModule) -> ModuleCall:
        return ModuleCall(r.fqn, r.index, r.inputs, r.outputs, position(r.before), position(r.end))

    here = set(graph.nodes)
    return Trace(
        graph=graph,
        module=work.module,
        scenario=work.scenario,
        params=dict(zip(state.tensors, placeholders, strict=False)),
        is_buffer=state.buffers,
        aliases=state.aliases,
        inputs=inputs,
        outputs=outputs,
        calls=tuple(finished(r) for r in ran),
        constants={n: v for n, v in recorder.constants.tensors().items() if n in here},
        notes=tuple(dict.fromkeys(recorder.notes)),
    )


def _rewire_calls(graph: fx.Graph, replaced: Mapping[fx.Node, fx.Node]) -> None:
    """Let the sizes in calls refer to the nodes that are left."""
    done: dict[int, Call] = {}
    for node in graph.nodes:
        call: Call | None = node.meta["call"]
        if call is None:
            continue
        if call.index not in done:
            ints = tuple((path, _rewire_int(value, replaced)) for path, value in call.ints)
            done[call.index] = replace(call, ints=ints)
        node.meta["call"] = done[call.index]


def _rewire_int(value: int, replaced: Mapping[fx.Node, fx.Node]) -> int:
    if not isinstance(value, ProvInt):
        return value
    expr = rewired(value.expr, replaced)
    return value if expr is value.expr else make(int(value), expr, value.session)
