"""Scenarios: the ways to run a model that run other code, each traced on its own.

"forward" is one call in eval mode. "train" is the same in train mode, where that makes another graph.
"decode" is what `generate` does: fill a KV cache from a prompt, then one step with it; both calls in one
graph.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import CodeType
from typing import Any

import torch
from torch import nn

from autotp.errors import TraceError
from autotp.trace.attributes import fields, is_config
from autotp.trace.capture import Run, call_forward, trace
from autotp.trace.config import vocabulary
from autotp.trace.fold import Folds, fold
from autotp.trace.graph import Trace
from autotp.trace.inputs import (
    BATCH,
    DECODER_SEQ,
    ENCODER_STATES,
    SEQ,
    Arguments,
    as_arguments,
    encoder_states,
    example_inputs,
    token_ids,
)
from autotp.trace.library import is_transformers
from autotp.trace.media import media_inputs
from autotp.trace.skeleton import skeleton
from autotp.trace.twins import Switch, registered, replaced, switches

_CACHES = ("past_key_values", "cache_params", "state")


@dataclass(frozen=True)
class Scenario:
    name: str
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    training: bool = False
    run: Run = call_forward


def scenarios(
    model: nn.Module, given: Sequence[Any] | Mapping[str, Any] | torch.Tensor | None = None
) -> tuple[Scenario, ...]:
    """The scenarios of `model`; the first is "forward", called with what the user gave or with
    `example_inputs`."""
    args, kwargs = _found_inputs(model) if given is None else as_arguments(given)
    found = [Scenario("forward", args, kwargs)]
    if given is None and (alone := {k: v for k, v in kwargs.items() if k not in ENCODER_STATES}).keys() < kwargs.keys():
        found.append(Scenario("alone", args, alone))
    if trains_differently(model):
        found.append(Scenario("train", args, kwargs, training=True))
    decoding = _decode(model)
    if decoding is not None:
        found.append(decoding)
    return tuple(found)


def _found_inputs(model: nn.Module) -> Arguments:
    """With images or sounds, or an encoder's states, where the model takes them beside text and can be traced so."""
    args, kwargs = example_inputs(model)
    for more in itertools.chain(media_inputs(model), encoder_states(model)):
        with_more = {**kwargs, **more}
        try:
            trace_model(model, [Scenario("forward", args, with_more)])
        except TraceError:
            continue
        return args, with_more
    return args, kwargs


def trace_model(
    model: nn.Module, wanted: Sequence[Scenario], *, folded: bool = True
) -> tuple[tuple[Trace, ...], Folds]:
    """Trace a skeleton of `model` in each scenario; all traces share the skeleton. Repeated layers are folded
    where that is possible and right. Kernels that cannot be traced are traced as their twins.

    A scenario other than the first that cannot be traced is left out, and the first trace says so in its
    notes.
    """
    first: TraceError | None = None
    best: tuple[tuple[Trace, ...], Folds, int] | None = None
    for switch in switches(model):
        try:
            traces, folds, failed = _traced(model, wanted, switch, folded)
        except TraceError as error:
            first, last, tried = first or error, error, switch
            continue
        if best is None or len(failed) < best[2]:
            best = (_twins_noted(traces[0], model, first), *traces[1:]), folds, len(failed)
        if not failed:
            break
        first = first or failed[0]
    if best is not None:
        return best[:2]
    assert first is not None
    if str(first) == str(last):
        raise last
    raise _no_twin(model, tried, first, last) from last


def _traced(
    model: nn.Module, wanted: Sequence[Scenario], switch: Switch, folded: bool
) -> tuple[tuple[Trace, ...], Folds, list[TraceError]]:
    """The traces with these twins, and why others are missing."""
    if folded:
        bare = skeleton(model, switch)
        folds = fold(bare)
        if folds:
            traces, failed = _each(bare, wanted, folds)
            if wanted[0].name in traces and not folds.suspect:
                # what fails folded (a loop over range(num_layers), say) may be fine in the whole model
                again = [scenario for scenario in wanted if scenario.name in failed]
                if not _each(skeleton(model, switch), again, Folds())[0]:
                    return _noted(traces, failed), folds, list(failed.values())
    traces, failed = _each(skeleton(model, switch), wanted, Folds())
    if wanted[0].name in failed:
        raise failed[wanted[0].name]
    return _noted(traces, failed), Folds(), list(failed.values())


def _twins_noted(trace: Trace, model: nn.Module, error: TraceError | None) -> Trace:
    """A note for each function of the user's that a twin stands in for: that it fits is the user's to know."""
    if error is None:
        return trace
    notes = tuple(
        f"{chosen!r} cannot be traced on a CPU and was planned as {twin!r}: it is called with each rank's own heads "
        f"or width and has to treat them one by one ({error})"
        for chosen, twin in replaced(trace.module)
        if chosen in registered(model)
    )
    return replace(trace, notes=(*trace.notes, *notes))


def _no_twin(model: nn.Module, switch: Switch, first: TraceError, last: TraceError) -> TraceError:
    pairs = replaced(skeleton(model, switch))
    names = " and ".join(f"{chosen!r} (nor {twin!r} in its place)" for chosen, twin in pairs)
    return TraceError(
        f"cannot trace the model with {names or 'its kernels'}: {last}"
        f" Before that: {first}"
        " Make the kernel an op (torch.library.custom_op with register_fake) and give it a rule "
        "(autotp.register_rule), or load the model with attn_implementation='sdpa' or 'eager'.",
        last.module,
    )


def _each(
    bare: nn.Module, wanted: Sequence[Scenario], folds: Folds
) -> tuple[dict[str, Trace], dict[str, TraceError]]:
    """The traces, and the errors where there is none, by the scenario's name. Without "forward" there is no
    use in others."""
    traces: dict[str, Trace] = {}
    failed: dict[str, TraceError] = {}
    for scenario in wanted:
        try:
            traces[scenario.name] = _trace(bare, scenario, folds)
        except TraceError as error:
            failed[scenario.name] = error
            if scenario.name == "forward":
                break
    return traces, failed


def _noted(traces: Mapping[str, Trace], failed: Mapping[str, TraceError]) -> tuple[Trace, ...]:
    first, *others = traces.values()
    notes = tuple(f"not traced: {error}" for error in failed.values())
    return replace(first, notes=(*first.notes, *notes)), *others


def _trace(bare: nn.Module, scenario: Scenario, folds: Folds) -> Trace:
    return trace(
        bare,
        scenario.args,
        scenario.kwargs,
        scenario.name,
        training=scenario.training,
        run=scenario.run,
        watch=folds.watched,
        compared=folds.suspect,
    )


# train mode


def trains_differently(model: nn.Module) -> bool:
    """Whether train mode makes another graph: dropout of some probability, statistics of a batch norm, or
    code of the model's author that reads `self.training`. In doubt, yes."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            if module.p > 0:
                return True
        elif isinstance(module, nn.modules.batchnorm._NormBase):
            if module.track_running_stats:
                return True
        elif _reads_training(type(module)) and (_drops(module) or not _of_a_library(type(module))):
            return True
    return False


def _of_a_library(cls: type) -> bool:
    """Whether the probabilities of dropout are attributes; other people write them as literals, too."""
    return cls.__module__.split(".")[0] in ("torch", "transformers")


def _reads_training(cls: type) -> bool:
    if cls.__module__.split(".")[0] == "torch":
        return cls in (nn.MultiheadAttention, nn.LSTM, nn.GRU, nn.RNN)
    codes = [value.__code__ for value in vars(cls).values() if inspect.isfunction(value)]
    return any(_mentions(code, "training") for code in codes)


def _mentions(code: CodeType, name: str) -> bool:
    inner = (c for c in code.co_consts if isinstance(c, CodeType))
    return name in code.co_names or any(_mentions(c, name) for c in inner)


def _drops(module: nn.Module) -> bool:
    """Whether an attribute of the module or of its config is a probability to drop something."""
    for name, value in module.__dict__.items():
        held = fields(value) if is_config(name, value) else {name: value}
        for key, item in held.items():
            if isinstance(item, float) and item > 0 and ("drop" in str(key) or "pdrop" in str(key)):
                return True
    return False


# decoding


def _decode(model: nn.Module) -> Scenario | None:
    """Prefill and one step, for a transformers model that generates with a cache."""
    if not is_transformers(model):
        return None
    library: Any = model
    takes = inspect.signature(model.forward).parameters
    cache = next((name for name in _CACHES if name in takes), None)
    if cache is None or not library.can_generate():
        return None
    size = vocabulary(model)
    if library.config.is_encoder_decoder:
        _, inputs = example_inputs(model)
        main = inputs[library.main_input_name]
        kwargs = {"main": main, "prompt": token_ids(DECODER_SEQ, size), "token": token_ids(1, size)}
        return Scenario("decode", (), kwargs, run=_DecodeAfterEncoder(library.main_input_name))
    if library.main_input_name != "input_ids":
        return None
    kwargs = {"prompt": token_ids(SEQ, size), "token": token_ids(1, size)}
    if "attention_mask" in takes:
        kwargs["mask"] = torch.ones(BATCH, SEQ + 1, dtype=torch.long)
    return Scenario("decode", (), kwargs, run=_Decode(cache))


@dataclass(frozen=True)
class _Decode:
    cache: str

    def __call__(
        self, model: nn.Module, prompt: torch.Tensor, token: torch.Tensor, mask: torch.Tensor | None = None
    ) -> Any:
        masks = ({"attention_mask": mask[:, :-1]}, {"attention_mask": mask}) if mask is not None else ({}, {})
        filled = model(input_ids=prompt, use_cache=True, **masks[0])
        step = model(input_ids=token, use_cache=True, **{self.cache: filled[self.cache]}, **masks[1])
        return filled["logits"], step["logits"]


@dataclass(frozen=True)
class _DecodeAfterEncoder:
    main_input: str

    def __call__(self, model: Any, main: torch.Tensor, prompt: torch.Tensor, token: torch.Tensor) -> Any:
        encoded = model.get_encoder()(**{self.main_input: main})
        filled = model(encoder_outputs=encoded, decoder_input_ids=prompt, use_cache=True)
        past = filled["past_key_values"]
        step = model(encoder_outputs=encoded, decoder_input_ids=token, past_key_values=past, use_cache=True)
        return filled["logits"], step["logits"]
