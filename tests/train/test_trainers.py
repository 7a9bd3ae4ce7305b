"""The ecosystem's tools on a sharded model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import PropertyMock, patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing import assert_close

import autotp
from autotp.errors import CheckpointError
from tests.dist.pool import Pool
from tests.models import MODELS
from tests.train.steps import STEPS, batches
from tests.train.test_toolbox import train

LOOPS = 6
EPSILON = 1e-2  # of Adam, which divides gradients that are rounding errors by themselves otherwise
DEGREE = 2


@contextmanager
def launched() -> Iterator[None]:
    """As under torchrun, with CPUs for the accelerators to which accelerate restricts tensor parallelism."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    several = dist.get_world_size() > 1
    ranks = {"RANK": dist.get_rank(), "LOCAL_RANK": dist.get_rank()}
    ranks |= {"WORLD_SIZE": dist.get_world_size(), "LOCAL_WORLD_SIZE": dist.get_world_size()}
    environment = {name: str(value) for name, value in ranks.items()} if several else {}
    os.environ |= environment
    try:
        with patch.object(Accelerator, "multi_device", PropertyMock(return_value=several)):
            yield
    finally:
        for name in environment:
            del os.environ[name]
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def by_trainer(model: Any, folder: Path) -> tuple[list[float], Any]:
    """Losses and clipped norms of the Trainer, which shuffles the data, and what it evaluates; and the Trainer."""
    import transformers

    class ShardedTrainer(transformers.Trainer):
        def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
            autotp.save_pretrained(self.model, output_dir or self.args.output_dir)

        def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
            self.gather_function = lambda rows: rows
            return super().evaluation_loop(*args, **kwargs)

    arguments = transformers.TrainingArguments(
        output_dir=str(folder), use_cpu=True, max_steps=LOOPS, per_device_train_batch_size=3, learning_rate=1e-2,
        max_grad_norm=0.5, adam_epsilon=EPSILON, gradient_accumulation_steps=2, logging_steps=1,
        logging_nan_inf_filter=False, disable_tqdm=True, report_to=[], save_steps=LOOPS, save_only_model=True,
        dataloader_pin_memory=False, seed=5,
    )  # fmt: skip
    rows = torch.cat(batches(3 * LOOPS))
    data = [{"input_ids": row, "labels": row} for row in rows]
    trainer = ShardedTrainer(
        model, arguments, train_dataset=data, eval_dataset=data[:10],
        compute_metrics=lambda found: {"rows": len(found.predictions), "sum": float(found.predictions.sum())},
    )  # fmt: skip
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    logs = [(log["loss"], log["grad_norm"]) for log in trainer.state.log_history if "grad_norm" in log]
    assert len(logs) == LOOPS
    evaluated = [trainer.evaluate()[f"eval_{name}"] for name in ("loss", "rows", "sum")]
    assert evaluated[1] == 10
    return [*(value for pair in logs for value in pair), *evaluated], trainer


def by_accelerate(model: Any) -> tuple[list[float], Any]:
    """The same of the loop that accelerate's users write; and the Accelerator."""
    import accelerate

    sizes = accelerate.ParallelismConfig(tp_size=DEGREE) if dist.get_world_size() > 1 else None
    accelerator = accelerate.Accelerator(cpu=True, parallelism_config=sizes)
    rows: Any = torch.cat(batches(LOOPS))
    data = torch.utils.data.DataLoader(rows, batch_size=3, shuffle=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=EPSILON)
    model, optimizer, data = accelerator.prepare(model, optimizer, data)
    values = []
    for ids in data:
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        values += [loss.item(), norm.item()]
    assert len(values) == 2 * LOOPS
    return values, accelerator


def trained(folder: str) -> list[tuple[list[float], dict[str, Tensor]]]:
    """On one rank unsharded, on several sharded: what the Trainer makes of a model, and accelerate's loop."""
    found = []
    for run in (by_trainer, by_accelerate):
        torch.manual_seed(11)
        model: Any = MODELS["llama"].build().train()
        if dist.get_world_size() > 1:
            autotp.parallelize(model, example_inputs={"input_ids": batches()[0]})
        with launched():
            values, tool = run(model, Path(folder)) if run is by_trainer else run(model)  # type: ignore[operator]
            if dist.get_world_size() > 1:
                saved(model, tool, Path(folder) / run.__name__)
        whole = autotp.full_state_dict(model)
        found.append((values, {name: value.clone() for name, value in whole.items()}))
    return found


def saved(model: Any, tool: Any, folder: Path) -> None:
    """Whole tensors are written, or an error says what to call."""
    import transformers
    from safetensors.torch import load_file

    with pytest.raises(CheckpointError, match="on every rank"):
        model.save_pretrained(folder)
    if isinstance(tool, transformers.Trainer):
        if dist.get_rank() == 0:
            with pytest.raises(CheckpointError, match=r"autotp.save_pretrained\(model, directory\) on every"):
                transformers.Trainer.save_model(tool, str(folder))
        folder = folder.parent / f"checkpoint-{LOOPS}"
    else:
        tool.save_model(model, folder)
        with pytest.raises(CheckpointError, match="autotp.save_training_state"):
            tool.save_state(folder / "state")
        dist.barrier()
    autotp.debug.check_sync(model)
    whole, written = autotp.full_state_dict(model), load_file(folder / "model.safetensors")
    assert set(written) == set(whole)
    for name, value in written.items():
        assert torch.equal(value, whole[name]), name


def test_trainer_and_accelerate(dist: Pool, tmp_path: Path) -> None:
    (wanted,) = dist.run(1, trained, str(tmp_path / "whole"))
    for found in dist.run(DEGREE, trained, str(tmp_path / "sharded"), one_plans=True):
        for (mine, my_weights), (theirs, their_weights) in zip(found, wanted, strict=True):
            # the models are float64, but transformers computes their loss in float32
            assert_close(torch.tensor(mine), torch.tensor(theirs), rtol=1e-5, atol=1e-5)
            for name, value in their_weights.items():
                assert_close(my_weights[name], value, rtol=1e-5, atol=1e-5)
        assert wanted[0][1]["lm_head.weight"].ne(wanted[1][1]["lm_head.weight"]).all()  # both have trained


def lora(folder: str) -> None:
    """Adapters that were added before sharding train as unsharded, and load into an unsharded model.

    For those that come after see `test_adapters`.
    """
    from peft import (
        LoraConfig,
        PeftModel,
        get_peft_model,
        get_peft_model_state_dict,
        set_peft_model_state_dict,
    )

    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)

    def build() -> Any:
        torch.manual_seed(3)
        return get_peft_model(MODELS["llama"].build(), config).double()

    ids = batches()
    reference, model, restored = build(), build(), build()
    autotp.parallelize(model, example_inputs={"input_ids": ids[0]})
    wanted, found = train(reference, ids), train(model, ids)
    assert_close(torch.tensor(found), torch.tensor(wanted), rtol=1e-9, atol=1e-9)
    assert wanted[STEPS - 1] != wanted[0]
    autotp.debug.check_sync(model)
    whole = autotp.full_state_dict(model)
    adapter = get_peft_model_state_dict(restored, state_dict=whole)
    assert adapter and all("lora" in name for name in adapter)
    set_peft_model_state_dict(restored, adapter)
    mine, theirs = (dict(m.named_parameters()) for m in (restored, reference))
    trained = [name for name in theirs if "lora" in name]
    assert trained
    for name in trained:
        assert_close(mine[name], theirs[name], rtol=1e-8, atol=1e-9)

    for save in (lambda: model.save_pretrained(folder), lambda: get_peft_model_state_dict(model)):
        with pytest.raises(CheckpointError, match=r"state_dict=autotp.full_state_dict\(model\)"):
            save()
    with pytest.raises(CheckpointError, match="it is a rank's slice"):
        model.save_pretrained(folder, state_dict=model.state_dict())
    if dist.get_rank() == 0:
        model.save_pretrained(folder, state_dict=whole)
    dist.barrier()
    loaded = PeftModel.from_pretrained(MODELS["llama"].build(), folder)
    for name, value in loaded.named_parameters():
        assert_close(value, theirs[name], rtol=1e-8, atol=1e-9)


def test_lora(dist: Pool, tmp_path: Path) -> None:
    dist.run(2, lora, str(tmp_path), one_plans=True)
