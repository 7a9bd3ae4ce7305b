"""Adapters, and whatever else with parameters, that are put into a model after it was sharded."""

from __future__ import annotations

import copy
import pickle
from types import MethodType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

import autotp
from autotp.errors import AutoTPError, CheckpointError
from autotp.rewrite.state import dims_by_id, gather, sharding_of
from autotp.runtime.record import record_collectives
from autotp.runtime.sharded_gradient import ShardedGradient, local_gradient
from tests.dist.pool import Pool
from tests.models import MODELS
from tests.train.steps import batches, loss_of

STEPS = 8
LORA = ["q_proj", "v_proj", "o_proj", "down_proj"]  # columns and rows


def sharded(name: str = "llama") -> tuple[Any, Any]:
    """A model of the table, unsharded and sharded."""
    model = MODELS[name].build()
    autotp.parallelize(model, example_inputs={"input_ids": batches()[0]})
    return MODELS[name].build(), model


def with_lora(model: Any, targets: list[str], seed: int = 5) -> Any:
    """Adapters are drawn by each process for itself."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    return get_peft_model(model, LoraConfig(r=4, target_modules=targets, init_lora_weights=False)).double()


def whole_gradients(model: nn.Module) -> dict[str, Tensor]:
    """The whole gradient of each parameter, of a model that is sharded or wraps a sharded one."""
    known = {}
    for root in model.modules():
        if (sharding := sharding_of(root)) is not None:
            known = {key: (dims, sharding.rank) for key, dims in dims_by_id(root, sharding.dims).items()}
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            local = local_gradient(parameter.grad)
            found[name] = gather(local, *known[id(parameter)]) if id(parameter) in known else local
    return found


def same(reference: Any, model: Any, rtol: float = 1e-10) -> None:
    """Logits, and the gradient of every parameter."""
    ids = batches()[1]
    wanted, found = reference(ids).logits, model(ids).logits
    assert_close(found, wanted, rtol=rtol, atol=rtol)
    for m, logits in ((reference, wanted), (model, found)):
        m.zero_grad()
        nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()
    theirs, mine = whole_gradients(reference), whole_gradients(model)
    assert theirs and set(mine) == set(theirs)
    for name, value in theirs.items():
        assert_close(mine[name], value, rtol=rtol, atol=rtol)
    for m in (reference, model):
        m.zero_grad()


def lora(folder: str) -> None:
    """LoRA around columns and rows, drawn otherwise on each rank: taken in at the first forward."""
    from peft import PeftModel, get_peft_model_state_dict

    ids = batches()
    base, model = sharded()
    direct = model.forward(ids[1]).logits  # past all hooks
    assert_close(direct, base(ids[1]).logits, rtol=1e-10, atol=1e-10)
    kept = model.lm_head.weight
    reference, model = with_lora(base, LORA), with_lora(model, LORA, seed=5 + dist.get_rank())
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2, eps=1e-2) for m in (reference, model)]
    for m in (reference, model):
        m.get_input_embeddings().weight.requires_grad_(True)
    same(reference, model)
    assert model.lm_head.weight is kept

    loss = loss_of(model, ids[0])  # settles where optimizers and hooks are
    with record_collectives() as log:
        loss = model(ids[0]).logits.square().mean()
        loss.backward()
    activation = ids[0].numel() * 40 * 8
    assert log.count("all_reduce", "forward") == 5 and log.count("all_gather", "forward") == 1
    assert log.bytes("all_reduce", "forward") == 5 * activation
    backward = log.select("all_reduce", "backward")
    adapters = 2 * 4 * 4 * 40 * 8  # A of the columns and B of the rows, in both layers, all at once
    assert [c.bytes for c in backward] == [activation] * 5 + [adapters] and len(log) == 12
    model.zero_grad()

    for step in range(STEPS):
        for m, optimizer in zip((reference, model), optimizers, strict=True):
            loss_of(m, ids[step]).backward()
            torch.nn.utils.clip_grad_norm_(m.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    same(reference, model, rtol=1e-8)

    whole = autotp.full_state_dict(model)
    assert list(whole) == list(reference.state_dict())
    for save in (lambda: model.save_pretrained(folder), lambda: get_peft_model_state_dict(model)):
        with pytest.raises(CheckpointError, match=r"state_dict=autotp.full_state_dict\(model\)"):
            save()
    with pytest.raises(AutoTPError, match="a PeftModel around a sharded LlamaForCausalLM"):
        autotp.save_pretrained(model, folder)
    if dist.get_rank() == 0:
        model.save_pretrained(folder, state_dict=whole)
    dist.barrier()
    plain = MODELS["llama"].build()
    plain.get_input_embeddings().weight.data = whole["base_model.model.model.embed_tokens.weight"]
    loaded = PeftModel.from_pretrained(plain, folder)
    assert_close(loaded(ids[1]).logits, model(ids[1]).logits, rtol=1e-10, atol=1e-10)

    options: dict[str, Any] = {"input_ids": ids[0][:, :3], "max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(**options), reference.generate(**options))
    with model.disable_adapter(), reference.disable_adapter():
        assert_close(model(ids[1]).logits, reference(ids[1]).logits, rtol=1e-8, atol=1e-8)
    merged, theirs = model.merge_and_unload(), reference.merge_and_unload()
    assert_close(merged(ids[1]).logits, theirs(ids[1]).logits, rtol=1e-8, atol=1e-8)
    assert not any("lora" in name for name in autotp.full_state_dict(merged))


def test_lora(dist: Pool, tmp_path: Any) -> None:
    dist.run(2, lora, str(tmp_path), one_plans=True)


def transposed() -> None:
    """Layers that do not say their sizes: GPT-2's, with fused q, k and v; eight heads on three ranks."""
    base, model = sharded("gpt2")
    targets = ["c_attn", "c_proj", "c_fc"]
    reference, model = with_lora(base, targets), with_lora(model, targets, seed=5 + dist.get_rank())
    assert autotp.parallelize(model) is model  # at once
    same(reference, model)


def test_transposed(dist: Pool) -> None:
    dist.run(3, transposed, one_plans=True)


# --- any module ---


class Adapter(nn.Module):
    """Around a linear layer; ``wrong`` goes by the weight that it sees."""

    def __init__(self, base: Any, rank: int = 3, wrong: bool = False) -> None:
        super().__init__()
        wide, high = base.weight.shape[::-1] if wrong else (base.in_features, base.out_features)
        self.base = base
        self.a, self.b = nn.Linear(wide, rank, bias=False).double(), nn.Linear(rank, high, bias=False).double()
        self.other = nn.Linear(wide, high).double()
        self.use_other = False

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + (self.other(x) if self.use_other else self.b(self.a(x)))  # type: ignore[no-any-return]


X = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def mlps(plan: Any = None, mesh: Any = None) -> tuple[Any, Any]:
    torch.manual_seed(1)
    whole = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6)).double()
    model = copy.deepcopy(whole)
    autotp.parallelize(model, mesh, example_inputs=(X,), plan=plan)
    return whole, model


def adapt(*models: Any, **options: Any) -> None:
    for model in models:
        torch.manual_seed(2)
        model[0], model[2] = Adapter(model[0], **options), Adapter(model[2], **options)


def alike(whole: Any, model: Any) -> None:
    assert_close(model(X), whole(X))
    assert_close(model.forward(X), whole(X))
    for m in (whole, model):
        m.zero_grad()
        m(X).square().sum().backward()
    theirs, mine = whole_gradients(whole), whole_gradients(model)
    assert set(mine) == set(theirs)
    for name, value in theirs.items():
        assert_close(mine[name], value)


def others() -> None:
    whole, model = mlps()
    model = pickle.loads(pickle.dumps(model))
    adapt(whole, model)
    alike(whole, pickle.loads(pickle.dumps(model)))
    alike(whole, copy.deepcopy(model))
    held = model[0].b.weight
    before = torch.get_rng_state()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        model(X)
    assert torch.equal(torch.get_rng_state(), before)
    alike(whole, model)
    assert model[0].b.weight is held and held.shape[0] < 8 and type(held.grad) is ShardedGradient
    alike(whole, pickle.loads(pickle.dumps(model)))
    alike(whole, copy.deepcopy(model))

    # another branch than was planned
    for m in (whole, model):
        m[0].use_other = True
    with pytest.raises(AutoTPError, match=r"'0.other' did not run when the model was planned.*parallelize\(model\)"):
        model(X)
    alike(whole, autotp.parallelize(model))
    with pytest.raises(AutoTPError, match="'0.a' did not"):  # and still, when the model is planned for another reason
        model[0].use_other = False
        model(X)
    model[0].use_other = True
    model[1] = nn.ReLU()
    alike(whole, model)
    with pytest.raises(AutoTPError, match="'0.a' did not"):
        model[0].a(X)
    _, another = mlps()
    another[2] = model[2].base
    with pytest.raises(AutoTPError, match="'2' was sharded by another plan"):
        another(X)

    # taken out again, and something else in the place of a layer
    for m in (whole, model):
        m[0], m[2] = m[0].base, m[2].base
    alike(whole, model)
    for m in (whole, model):
        m[1] = nn.Softmax(-1)
    alike(whole, model)
    for m in (whole, model):
        torch.manual_seed(4)
        m[1] = nn.Sequential(m[1], nn.LayerNorm(8).double())
        m[2].register_parameter("extra", nn.Parameter(torch.zeros(1)))
    alike(whole, model)
    assert list(model.state_dict()) == list(whole.state_dict())
    model.forward = MethodType(model.forward, model)  # as accelerate leaves it when it takes its wrapper off
    assert_close(model(X), whole(X))

    # an adapter of a layer that is whole is cut along its own rank: what it adds to a weight is partial
    whole, model = mlps()
    adapt(whole, model)
    autotp.parallelize(model, plan={"modules": {"*.base": "replicate", "*.other": "replicate"}})
    alike(whole, model)
    with pytest.raises(AutoTPError, match="cannot take '0' out of its Adapter"):
        model[0] = model[0].base


@pytest.mark.parametrize("world", [2, 3])
def test_any_module(dist: Pool, world: int) -> None:
    dist.run(world, others)


def refused() -> None:
    """Before anything is changed, on every rank; taken out again, the model is as it was."""
    whole, model = mlps()
    wanted = whole(X)
    first = model[0]
    model[0] = Adapter(first, wrong=True)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(AutoTPError, match="has to be planned anew before this Adapter runs"):
        model[0](X)
    said = r"'0.a', with parameters .* which failed: cannot trace .*\s.*take out what was put in"
    for call in (model, model.forward, autotp.full_state_dict, autotp.parallelize):
        with pytest.raises(AutoTPError, match=said):
            call(X if call in (model, model.forward) else model)  # type: ignore[operator]
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])
    model[0] = first
    assert_close(model(X), wanted)
    nn.utils.parametrize.register_parametrization(model[2], "weight", nn.Linear(4, 4).double())
    with pytest.raises(AutoTPError, match="2 is not as it was left when it was sharded: its class is now Parametrized"):
        model(X)

    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
    for wrap in (
        lambda m: DistributedDataParallel(m, process_group=mesh["dp"].get_group()),
        lambda m: fully_shard(m, mesh=mesh["dp"]),
    ):
        whole, model = mlps(mesh=mesh["tp"])
        adapt(whole, model)
        with pytest.raises(AutoTPError, match=r"wrapped in .* before. Call autotp.parallelize\(model\) once more"):
            wrap(model)(X)
        whole, model = mlps(mesh=mesh["tp"])
        adapt(whole, model)
        for m in (whole, model):
            m[0].base.weight.requires_grad_(False)
        autotp.parallelize(model)
        wrapped = wrap(nn.Sequential(model))  # which may be around the sharded model
        norms = []
        for m in (whole, wrapped):
            assert_close(m(X), whole(X))
            m(X).square().sum().backward()
            norm = torch.nn.utils.clip_grad_norm_(m.parameters(), 1.0)
            norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        assert_close(norms[1], norms[0])


def test_refused(dist: Pool) -> None:
    dist.run(2, refused)
