"""What the TARGET of the command line names: a transformers config, or a factory in somebody's package.

A model comes back on the meta device: no weights are made, read or fetched.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autotp.errors import AutoTPError

# The heads of transformers to try, in this order, for a config that does not say its architecture.
AUTO_CLASSES = (
    "AutoModelForCausalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForSpeechSeq2Seq",
    "AutoModelForImageTextToText",
    "AutoModelForMaskedLM",
    "AutoModelForImageClassification",
    "AutoModelForCTC",
    "AutoModelForAudioClassification",
    "AutoModel",
)


class TargetError(AutoTPError):
    """TARGET names no model that can be built."""


def load_target(target: str, *, trust_remote_code: bool = False) -> tuple[nn.Module, Any]:
    """The model that ``target`` names, and its example inputs where a factory returns them (else None)."""
    path = Path(target)
    if path.exists():
        return _from_config(_read_config(path, trust_remote_code), trust_remote_code), None
    if path.suffix == ".json":
        raise TargetError(f"no such file: {target!r}")
    if ":" in target:
        return _from_factory(target)
    return _from_config(_default_config(target), trust_remote_code), None


def _transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise TargetError("a config needs transformers: pip install 'autotp[transformers]'") from error


def _read_config(path: Path, trust_remote_code: bool) -> Any:
    if path.is_dir() and not (path / "config.json").exists():
        raise TargetError(f"{str(path)!r} has no config.json")
    try:
        return _transformers().AutoConfig.from_pretrained(
            str(path), trust_remote_code=trust_remote_code, local_files_only=True
        )
    except (ValueError, OSError, KeyError) as error:
        if "trust_remote_code" in str(error):
            raise TargetError(
                f"{str(path)!r} brings its own Python code; --trust-remote-code runs it, if you trust it"
            ) from error
        raise TargetError(f"{str(path)!r} is not a config that transformers can read: {error}") from error


def _default_config(model_type: str) -> Any:
    from_type = _transformers().CONFIG_MAPPING
    if model_type not in from_type:
        near = difflib.get_close_matches(model_type, list(from_type.keys()), n=3)
        hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
        if "/" in model_type:
            hint = "; autotp fetches nothing from a model hub: download its config.json and give the file"
        raise TargetError(
            f"{model_type!r} is no file, no directory, no model type of transformers"
            f" and no package.module:factory{hint}"
        )
    return from_type[model_type]()


def _from_config(config: Any, trust_remote_code: bool) -> nn.Module:
    transformers = _transformers()
    errors: list[str] = []
    for build in _builders(transformers, config, trust_remote_code):
        try:
            with torch.device("meta"):
                model: nn.Module = build(config)
            return model.eval()
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}")
    raise TargetError(
        f"no model of transformers could be built on the meta device from this {type(config).__name__}"
        f" ({errors[0] if errors else 'no class for it'}); a factory may build it: package.module:factory"
    )


def _builders(transformers: Any, config: Any, trust_remote_code: bool) -> Sequence[Any]:
    """Ways to build the config's model, best first: the class that it names, then the usual heads."""
    if trust_remote_code and getattr(config, "auto_map", None):
        names = [name for name in AUTO_CLASSES if name in config.auto_map]
        return [
            lambda c, name=name: getattr(transformers, name).from_config(c, trust_remote_code=True)
            for name in names
        ]
    named = [getattr(transformers, name, None) for name in config.architectures or ()]
    if any(cls is not None for cls in named):
        return [cls._from_config for cls in named if cls is not None]
    classes = [getattr(transformers, name) for name in AUTO_CLASSES]
    return [cls.from_config for cls in classes if type(config) in cls._model_mapping]


def _from_factory(target: str) -> tuple[nn.Module, Any]:
    """``package.module:factory``, called without arguments; ``factory`` may be dotted, or a module itself."""
    module_name, _, attribute = target.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")  # a console script does not look into the folder where it is called
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise TargetError(f"cannot import {module_name!r} of {target!r}: {error}") from error
    for part in attribute.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            near = difflib.get_close_matches(part, dir(found), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise TargetError(f"{module_name!r} has no {attribute!r}{hint}") from None
    if isinstance(found, nn.Module):
        return found, None
    if not callable(found):
        raise TargetError(f"{target!r} is a {type(found).__name__}, not a function that returns a model")
    made = _call_on_meta(found, target)
    model, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise TargetError(
            f"{target!r} returned a {type(model).__name__};"
            " it must return a model, or a model and example inputs"
        )
    return model, inputs


def _call_on_meta(factory: Any, target: str) -> Any:
    try:
        with torch.device("meta"):
            return factory()
    except Exception:  # constructors that look at values (.item(), numpy) cannot run on meta tensors
        try:
            return factory()
        except Exception as error:
            raise TargetError(f"{target!r} raised {type(error).__name__}: {error}") from error
