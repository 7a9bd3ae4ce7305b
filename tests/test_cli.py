"""The command line: usage errors, what TARGET may name, exit codes, and what goes to which stream."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from torch import nn

from autotp import cli
from autotp.errors import AutoTPError
from autotp.target import TargetError, load_target

CONFIGS = Path(__file__).parents[1] / "examples" / "configs"

FACTORIES = """
import torch
from torch import nn

def mlp():
    return nn.Sequential(nn.Linear(28, 52), nn.ReLU(), nn.Linear(52, 20))

def with_inputs():
    return mlp(), (torch.zeros(3, 28),)

def looks_at_values():  # cannot run on the meta device
    return nn.Linear(int(torch.tensor(28).item()), 44)

def broken():
    raise RuntimeError("no such luck")

def wrong():
    return "a model"

model = mlp()
number = 7
"""


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.main, arguments)


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_factories.py").write_text(FACTORIES)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_factories", raising=False)
    return "my_factories"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["plan"], "Missing argument 'TARGET'"),
        (["plan", "llama"], "Missing option '--tp'"),
        (["plan", "llama", "--tp", "0"], "0 is not in the range x>=1"),
        (["plan", "llama", "--tp", "two"], "'two' is not a valid integer range"),
        (["plan", "llama", "--tp", "2", "--format", "xml"], "'xml' is not one of"),
        (["plan", "llama", "--tp", "2", "--override", "missing.yaml"], "'missing.yaml' does not exist"),
        (["plan", "llama", "--tpp", "2"], "No such option"),
        (["plam"], "No such command 'plam'"),
    ],
)
def test_bad_usage_is_2_and_on_stderr(arguments: list[str], said: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert said.lower() in result.stderr.lower()
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("lama", "did you mean 'llama'"),
        ("missing/config.json", "no such file: 'missing/config.json'"),
        ("meta-llama/Llama-3.1-8B", "autotp fetches nothing from a model hub"),
        ("no_such_package:factory", "cannot import 'no_such_package'"),
        ("my_factories:mlq", "has no 'mlq'; did you mean 'mlp'?"),
        ("my_factories:number", "is a int, not a function"),
        ("my_factories:broken", "raised RuntimeError: no such luck"),
        ("my_factories:wrong", "returned a str; it must return a model"),
    ],
)
def test_bad_target_is_2_and_says_what_to_do(factories: str, target: str, said: str) -> None:
    result = run("plan", target, "--tp", "2")
    assert result.exit_code == 2
    assert said in result.stderr
    assert result.stdout == ""
    with pytest.raises(TargetError):
        load_target(target)


def test_a_directory_without_config(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"has no config\.json"):
        load_target(str(tmp_path))


def test_a_config_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no-such-type"}')
    with pytest.raises(TargetError, match="is not a config that transformers can read"):
        load_target(str(tmp_path))


def test_code_of_a_config_does_not_run_unasked(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "mine.MineConfig"}})
    )
    (tmp_path / "mine.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass MineConfig: pass\n")
    with pytest.raises(TargetError, match="--trust-remote-code"):
        load_target(str(tmp_path))
    assert not ran.exists()


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama-3.1-405b", 405_853_388_800),
        ("llama-3.1-70b", 70_553_706_496),
        ("llama-3.1-8b", 8_030_261_248),
        ("mixtral-8x7b", 46_702_792_704),
        ("falcon-7b", 6_921_720_704),
        ("gpt2", 124_439_808),
    ],
)
def test_shipped_configs_have_the_published_sizes_and_no_weights(name: str, parameters: int) -> None:
    model, inputs = load_target(str(CONFIGS / f"{name}.json"))
    assert inputs is None
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_model_types_find_their_usual_head() -> None:
    names = {kind: type(load_target(kind)[0]).__name__ for kind in ("gpt2", "t5", "vit")}
    assert names == {
        "gpt2": "GPT2LMHeadModel",
        "t5": "T5ForConditionalGeneration",
        "vit": "ViTForImageClassification",
    }


def test_factories(factories: str) -> None:
    model, inputs = load_target("my_factories:mlp")
    assert isinstance(model, nn.Sequential) and inputs is None
    assert model[0].weight.device.type == "meta"
    _, inputs = load_target("my_factories:with_inputs")
    assert inputs[0].shape == (3, 28)
    assert load_target("my_factories:looks_at_values")[0].out_features == 44
    assert isinstance(load_target("my_factories:model")[0], nn.Module)


def test_a_refusal_is_2_and_its_message_is_on_stderr(factories: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from autotp import api

    def refuse(*_: object, **__: object) -> None:
        raise AutoTPError("cannot shard 'fc1' over tp=2: model.py:41")

    monkeypatch.setattr(api, "plan", refuse)
    result = run("plan", "my_factories:mlp", "--tp", "2")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.endswith("Error: cannot shard 'fc1' over tp=2: model.py:41\n")


def test_formats(factories: str) -> None:
    results = {
        form: run("plan", "my_factories:with_inputs", "--tp", "2", "--format", form) for form in FORMATS
    }
    assert {form: result.exit_code for form, result in results.items()} == dict.fromkeys(FORMATS, 0)
    assert results["table"].stdout.startswith("tp=2: ")
    assert "0-2" not in results["table"].stdout  # two different Linears do not fold into one row
    assert yaml.safe_load(results["yaml"].stdout) == json.loads(results["json"].stdout)
    assert all("planned in" in result.stderr for result in results.values())


FORMATS = ("table", "yaml", "json")


def test_meta_is_not_left_as_the_default_device(factories: str) -> None:
    load_target("my_factories:mlp")
    assert torch.empty(1).device.type == "cpu"
