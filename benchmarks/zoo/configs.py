"""Tiny models of every architecture: configs shrunk by what their sizes are called, so that their relations hold."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.models.auto import modeling_auto as auto

from autotp.trace.inputs import example_inputs
from autotp.trace.scenario import scenarios

from .sizes import DEPTHS, FOLLOWS, LARGEST_STAGE, RESNET, SMALL, SPECIAL, STAGED, TABLES, TAPS

#: task → the mappings of the auto classes that are swept
TASKS: dict[str, tuple[str, ...]] = {
    "causal-lm": ("MODEL_FOR_CAUSAL_LM_MAPPING",),
    "masked-lm": ("MODEL_FOR_MASKED_LM_MAPPING",),
    "seq2seq": ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",),
    "image": (
        "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING",
        "MODEL_FOR_OBJECT_DETECTION_MAPPING",
        "MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING",
        "MODEL_FOR_DEPTH_ESTIMATION_MAPPING",
    ),
    "audio": (
        "MODEL_FOR_CTC_MAPPING",
        "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING",
        "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING",
    ),
    "multimodal": (
        "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
        "MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING",
    ),
}

MOST_PARAMETERS = 40_000_000


def architectures(task: str) -> list[tuple[str, type]]:
    """(model type, class), each class once."""
    found: dict[str, type] = {}
    for name in TASKS[task]:
        for config_class, classes in getattr(auto, name).items():
            for cls in classes if isinstance(classes, tuple) else (classes,):
                if cls not in found.values():
                    model_type = config_class.model_type
                    found[model_type if model_type not in found else f"{model_type}:{cls.__name__}"] = cls
    return sorted(found.items())


def shrunk(
    default: PretrainedConfig, sizes: Mapping[str, Any], special: Mapping[str, Any] | None = None
) -> PretrainedConfig:
    """A config like ``default`` with every size that it has by a known name made small, its parts as well.

    ``special`` has values for this config and, by dotted names, for its parts.
    """
    special = {**SPECIAL.get(default.model_type, {}), **(special or {})}
    values = _chosen(default)
    staged = isinstance(_read(default, "depths"), (list, tuple))
    for name, value in sizes.items():
        own = _read(default, name, otherwise=value)
        if _derived(default, name) or (staged and name in DEPTHS):
            continue
        if own is not None and isinstance(own, (int, float)) == isinstance(value, (int, float)):
            values[name] = value
    for name, follower, value in FOLLOWS:
        if name in values and follower in values:
            values[follower] = values[value] if isinstance(value, str) else value
    if "hidden_sizes" in sizes or "dims" in sizes:
        values |= _narrow_stages(default)
        heads = _read(default, "num_heads")
        if staged and isinstance(heads, (list, tuple)) and "embed_dim" in values:
            values["embed_dim"] = 16 * heads[0]  # doubled from stage to stage
            values["depths"] = [min(2, depth) for depth in default.depths]
            values.pop("hidden_size", None)
    _tapped(default, values)
    for name, part in list(vars(default).items()):
        if isinstance(part, PretrainedConfig):
            its = {
                k.partition(".")[2]: v for k, v in special.items() if k.partition(".")[0] == name and "." in k
            }
            values[name] = _part(part, sizes, its)
    values |= {name: value for name, value in special.items() if "." not in name}
    return _accepted(type(default), {name: value for name, value in values.items() if value is not None})


def _part(part: PretrainedConfig, sizes: Mapping[str, Any], special: Mapping[str, Any]) -> dict[str, Any]:
    if part.model_type == "timm_backbone":
        last = len(RESNET["depths"])
        taken = len(_read(part, "out_indices") or [last])
        return {**RESNET, "out_indices": list(range(last - min(taken, last) + 1, last + 1))}
    return shrunk(part, sizes, special).to_dict()


def _derived(config: PretrainedConfig, name: str) -> bool:
    found = getattr(type(config), name, None)
    return isinstance(found, property) and found.fset is None


def _read(config: PretrainedConfig, name: str, otherwise: Any = None) -> Any:
    """``otherwise`` where the value differs by layer."""
    try:
        return getattr(config, name, None)
    except Exception:
        return otherwise


def _chosen(config: PretrainedConfig) -> dict[str, Any]:
    """What the config that this one is a part of has set otherwise than its class does."""
    usual = vars(type(config)())
    values = {
        name: value
        for name, value in vars(config).items()
        if isinstance(value, (bool, int, float, str))
        and not name.startswith("_")
        and usual.get(name) != value
    }
    for name in ("out_indices", "out_features"):
        if _read(config, name) and hasattr(config, "stage_names"):
            values[name] = list(_read(config, name))
            break
    return values


def _narrow_stages(config: PretrainedConfig) -> dict[str, Any]:
    """All widths of stages divided by the one power of two that makes them small."""
    lists = {name: _read(config, name) for name in STAGED}
    widths = {
        name: list(value)
        for name, value in lists.items()
        if isinstance(value, (list, tuple)) and value and all(isinstance(width, int) for width in value)
    }
    divisor = 1
    while max((max(value) for value in widths.values()), default=0) // divisor > LARGEST_STAGE and all(
        width % (divisor * 2) == 0 for value in widths.values() for width in value
    ):
        divisor *= 2
    return {name: [width // divisor for width in value] for name, value in widths.items()}


def _tapped(config: PretrainedConfig, values: dict[str, Any]) -> None:
    """As many layers as outputs of layers are used, and the outputs of those."""
    depth = next((name for name in DEPTHS if name in values and isinstance(_read(config, name), int)), None)
    for name in TAPS:
        taps = values.get(name) or _read(config, name)
        if depth is None or not isinstance(taps, (list, tuple)) or not taps:
            continue
        values[depth] = max(values[depth], len(taps))
        first = 1 if name == "out_indices" and hasattr(config, "stage_names") else 0
        last = values[depth] + first
        values[name] = list(range(last - len(taps), last))
        values.pop("out_features", None)
    if depth is not None and "out_features" in values:
        layers = [feature for feature in values["out_features"] if feature.startswith("stage")]
        values[depth] = max(values[depth], len(layers))
        first = values[depth] - len(layers) + 1
        values["out_features"] = [f"stage{i}" for i in range(first, values[depth] + 1)]


def _accepted(config_class: type[PretrainedConfig], values: dict[str, Any]) -> PretrainedConfig:
    """Leaves out one value after the other where the config's own checks do not take them all."""
    first: Exception | None = None
    for without in (None, "head_dim", "num_key_value_heads", "num_hidden_layers"):
        try:
            return config_class(**{k: v for k, v in values.items() if k != without})
        except Exception as error:
            first = first or error
    assert first is not None
    raise first


def _fit_sections(config: PretrainedConfig) -> None:
    """The parts that a rotary embedding of several positions divides a head into, as large as the head now is."""
    for part in vars(config).values():
        if isinstance(part, PretrainedConfig):
            _fit_sections(part)
    for name in ("rope_parameters", "rope_scaling"):
        rope = _read(config, name)
        heads = _read(config, "num_attention_heads")
        if not isinstance(rope, dict) or not heads:
            continue
        if "mrope_section" in (_read(config, "ignore_keys_at_rope_validation") or ()) and "rope_type" in rope:
            rope.setdefault("mrope_section", [16, 24, 24])
        if not isinstance(rope.get("mrope_section"), list):
            continue
        head = _read(config, "head_dim") or config.hidden_size // heads
        rotary = int(head * (rope.get("partial_rotary_factor") or 1)) // 2
        sections = rope["mrope_section"]
        cuts = [round(sum(sections[: i + 1]) * rotary / sum(sections)) for i in range(len(sections))]
        rope["mrope_section"] = [b - a for a, b in zip([0, *cuts], cuts, strict=False)]


def build(model_type: str, cls: Any, options: Mapping[str, Any]) -> tuple[torch.nn.Module, dict[str, Any]]:
    """A model in eval mode that runs, every parameter a function of the seed, and inputs for it.

    In float64, or in float32 where its code takes nothing wider. Raises the first table's error where no table of sizes
    gives one that runs.
    """
    first: Exception | None = None
    for table in TABLES:
        sizes = {name: SMALL.get(name) for name in table}
        try:
            config = _config(model_type, cls, {**sizes, **options})
            for dtype in (torch.float64, torch.float32):
                model = _filled(cls, config, dtype)
                plain = example_inputs(model)[1]
                media = scenarios(model)[0].kwargs
                for inputs in (media, plain) if media.keys() > plain.keys() else (plain,):
                    inputs = drawn(inputs)
                    torch.manual_seed(3)
                    try:
                        with torch.no_grad():
                            copy.deepcopy(model)(**inputs)  # some keep what their first forward computed
                        return model, inputs
                    except Exception as error:
                        first = first or error
        except ImportError:
            raise
        except Exception as error:
            first = first or error
    assert first is not None
    raise first


def drawn(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Example inputs with random numbers in place of zeros."""
    generator = torch.Generator().manual_seed(2)

    def fresh(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return torch.rand(value.shape, generator=generator, dtype=value.dtype)
        return value

    return {key: fresh(value) for key, value in inputs.items()}


def _default(config_class: type[PretrainedConfig]) -> PretrainedConfig:
    try:
        return config_class()
    except Exception:  # its own defaults do not fit each other
        values: dict[str, Any] = {}
        for name, value in SPECIAL.get(config_class.model_type, {}).items():
            part, _, own = name.rpartition(".")
            (values.setdefault(part, {}) if part else values)[own] = value
        return config_class(**values)


def _config(model_type: str, cls: Any, sizes: Mapping[str, Any]) -> PretrainedConfig:
    config = shrunk(
        _default(cls.config_class), sizes, SPECIAL.get(f"{model_type.partition(chr(58))[0]}:{cls.__name__}")
    )
    _fit_sections(config)
    if hasattr(config, "is_decoder") and "CausalLM" in cls.__name__:
        config.is_decoder = True
    with torch.device("meta"):
        count = sum(p.numel() for p in cls(config).parameters())
    if count > MOST_PARAMETERS:
        raise ValueError(f"{count / 1e6:.0f} million parameters are too many for this sweep")
    return config


def _filled(cls: Any, config: PretrainedConfig, dtype: torch.dtype) -> torch.nn.Module:
    torch.manual_seed(0)
    model: torch.nn.Module = cls(config).to(dtype).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.05 * noise.to(parameter.dtype))
    if hasattr(model, "set_experts_implementation"):
        with suppress(Exception):  # no experts in it
            model.set_experts_implementation("batched_mm")
    return model


__all__ = ["TASKS", "architectures", "build"]
