"""From an exception in the traced forward to a `TraceError` that says where, why and what to do."""

from __future__ import annotations

from types import TracebackType

from autotp.errors import TraceError
from autotp.trace.graph import Site
from autotp.trace.sites import is_user_file, site_at

_DATA_DEPENDENT = {
    "DataDependentOutputException",
    "DynamicOutputShapeException",
    "GuardOnDataDependentSymNode",
}


def user_site(traceback: TracebackType | None) -> Site | None:
    """The innermost line of the user's code that the exception passed through."""
    site = None
    while traceback is not None:
        code = traceback.tb_frame.f_code
        if is_user_file(code.co_filename):
            site = site_at(code, traceback.tb_lasti)
        traceback = traceback.tb_next
    return site


def trace_error(error: Exception, module: str | None, scenario: str) -> TraceError:
    site = user_site(error.__traceback__)
    where = f"in {module!r}" if module else "in the model's forward"
    if site is not None:
        where += f", {site} ({site.filename}:{site.line})"
    kind, text = type(error).__name__, " ".join(str(error).split())[:400]
    if _needs_memory(error):
        function = f"{site.qualname}: " if site is not None else ""
        return TraceError(
            f"cannot trace scenario {scenario!r}: {where}, a kernel wants memory or a device that tensors do not have "
            f"while they are traced ({function}{kind}: {text}). If torch knows an equal op, call that "
            "(F.scaled_dot_product_attention in place of an attention kernel); else make the kernel an op, "
            "torch.library.custom_op with register_fake, and say how it shards with autotp.register_rule.",
            module,
        )
    if _is_data_dependent(error):
        return TraceError(
            f"cannot trace scenario {scenario!r}: {where}, the code depends on values of a tensor "
            f"({kind}: {text}), and none are known while tracing. Compute it without reading values "
            "(torch.where, masks, a fixed number of steps), pass what it decides as a plain argument, or "
            "switch the library to a form that can be traced (in transformers, "
            "set_experts_implementation('batched_mm') for experts).",
            module,
        )
    if "device" in text and ("meta" in text or "cuda" in text or "devices" in text):
        return TraceError(
            f"cannot trace scenario {scenario!r}: {where}, tensors of two devices meet ({kind}: {text}). "
            "Tracing runs on fake CPU tensors: make new tensors on the device of an input (device=x.device), "
            "and register constant tensors as buffers.",
            module,
        )
    return TraceError(
        f"cannot trace scenario {scenario!r}: {where}, the forward raised {kind}: {text}. Check that "
        "model(*args, **kwargs) runs with the example inputs; pass others as example_inputs.",
        module,
    )


def _is_data_dependent(error: BaseException) -> bool:
    names = {cls.__name__ for cls in type(error).__mro__}
    text = str(error)
    return (
        bool(names & _DATA_DEPENDENT)
        or "data-dependent" in text.lower()
        or "It appears that you're trying to get value out of a tracing tensor" in text
    )


def _needs_memory(error: BaseException) -> bool:
    """Whether it is a kernel's: one that is given a tensor's address, or has no form for fake CPU tensors."""
    text = str(error)
    return (
        type(error).__name__ in ("UnsupportedOperatorException", "UnsupportedFakeTensorException")
        or "Cannot access data pointer of Tensor" in text
        or "no fake impl registered" in text
        or ("only support" in text and "CUDA" in text)
        or ("not support" in text and "CPU" in text)
        or "not compiled with CUDA" in text
        or ("Could not run '" in text and "backend" in text)
    )
