"""The loss over a sharded vocabulary is the loss over the whole one, and the logits are never gathered for it."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

import autotp
from autotp.errors import AutoTPError
from autotp.runtime import mesh
from autotp.runtime.lazy_gather import LazyGather, gather_when_needed
from autotp.runtime.record import record_collectives
from tests.dist.pool import Pool
from tests.models import MODELS
from tests.train.steps import batches

SIZES = (5, 4, 2)  # a vocabulary of 11 on three ranks


class Logits:
    """The same logits whole, and gathered from the ranks' parts when needed; both with a gradient to compare."""

    def __init__(self, *shape: int, dim: int = -1, dtype: torch.dtype = torch.float64) -> None:
        self.prefix = mesh.connect(mesh.default_mesh("cpu"), {"": (tuple(range(len(SIZES))),)})
        self.rank = torch.distributed.get_rank()
        self.dim = dim
        whole = 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        self.whole = whole.to(dtype).requires_grad_()
        self.local = self.part(self.whole.detach()).clone().requires_grad_()

    def part(self, x: Tensor) -> Tensor:
        return x.split(SIZES, self.dim)[self.rank]

    def lazy(self) -> Tensor:
        return gather_when_needed(self.local, self.dim, SIZES, (), (), self.prefix)

    def check(self, fn: Any, collectives: int, rtol: float = 1e-12) -> Tensor:
        """``fn`` gives the same value and gradient of both, with so many collectives."""
        self.whole.grad = self.local.grad = None
        wanted = fn(self.whole)
        with record_collectives() as log:
            found = fn(self.lazy())
            assert_close(_plain(found), wanted, rtol=rtol, atol=rtol)
            up = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(2), dtype=wanted.dtype)
            (found * up).sum().backward()
        assert len(log) == collectives, log
        (wanted * up).sum().backward()
        assert_close(self.local.grad, self.part(self.whole.grad), rtol=rtol, atol=rtol)
        return found  # type: ignore[no-any-return]


def _plain(x: Tensor) -> Tensor:
    return x + 0 if isinstance(x, LazyGather) else x


def losses() -> None:
    flat = Logits(7, 11)
    targets = torch.tensor([0, 10, 4, 5, -100, 8, 9])
    weights = torch.rand(11, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for reduction, smoothing, weight in itertools.product(
        ("mean", "sum", "none"), (0.0, 0.3, 1.0), (None, weights)
    ):
        options = {"weight": weight, "reduction": reduction, "label_smoothing": smoothing}
        flat.check(lambda x, o=options: F.cross_entropy(x, targets, **o), 2)
    flat.check(lambda x: nn.CrossEntropyLoss(ignore_index=8)(x, targets.clamp(0)), 2)
    for chunk in (1, 3, 100):
        flat.check(lambda x, c=chunk: autotp.cross_entropy(x, targets, label_smoothing=0.1, chunk=c), 2)
    assert_close(  # of whole logits it is torch's
        autotp.cross_entropy(flat.whole, targets), F.cross_entropy(flat.whole, targets), rtol=0, atol=0
    )
    none = torch.full((7,), -100)
    assert F.cross_entropy(flat.lazy(), none).isnan()
    flat.check(lambda x: F.cross_entropy(x, none, reduction="sum"), 2)
    with pytest.raises(IndexError, match="Target 11 is out of bounds"):
        F.cross_entropy(flat.lazy(), torch.full((7,), 11))

    deep = Logits(2, 5, 11)
    ids = torch.randint(11, (2, 5), generator=torch.Generator().manual_seed(4))
    keep = torch.tensor([[True, False, True, True, False]] * 2)
    for fn in (
        lambda x: F.cross_entropy(x[:, :-1].flatten(0, 1), ids[:, 1:].flatten()),
        lambda x: F.cross_entropy(x[..., :-1, :].contiguous().view(-1, 11), ids[..., 1:].reshape(-1)),
        lambda x: F.cross_entropy(x.transpose(1, 2), ids),
        lambda x: F.cross_entropy(x.permute(0, 2, 1) / 3, ids, reduction="none"),
        lambda x: F.cross_entropy(x[keep], ids[keep]),
        lambda x: F.cross_entropy(x[0, 1], ids[0, 1]),
        lambda x: F.cross_entropy(x[:, -1, :], ids[:, -1]),
        lambda x: F.cross_entropy(2 * x.float().double().reshape(-1, x.size(-1)), ids.view(-1)),
    ):
        deep.check(fn, 2, 1e-6)
    images = Logits(2, 11, 3, 3, dim=1)
    images.check(lambda x: F.cross_entropy(x, torch.ones(2, 3, 3, dtype=torch.long)), 2)
    narrow = Logits(7, 11, dtype=torch.bfloat16)
    narrow.check(lambda x: F.cross_entropy(x.float(), targets), 2, 1e-2)
    with torch.autocast("cpu", torch.bfloat16):
        assert F.cross_entropy(narrow.lazy(), targets).dtype is torch.float32


def looked_at() -> None:
    """Whatever wants the whole has it, after one all-gather, with the right gradient."""
    deep = Logits(2, 5, 11)
    ids = torch.randint(11, (2, 5), generator=torch.Generator().manual_seed(4))
    for fn in (
        lambda x: x + 1,
        lambda x: x.softmax(-1),
        lambda x: x[..., 3:8].sum(),
        lambda x: x.view(5, 22),
        lambda x: torch.cat([x, x], 1),
        lambda x: x.unbind(2)[4],
        lambda x: F.cross_entropy(x.flatten(0, 1), F.one_hot(ids.flatten(), 11).double()),  # probabilities
    ):
        deep.check(fn, 1)
    deep.check(lambda x: F.cross_entropy(x.view(2 * 5, 11), ids.view(-1)) + x.max(), 3)
    x = deep.lazy()
    with record_collectives() as log:
        assert x.shape == (2, 5, 11) and x.size(-1) == 11 and x.dtype == torch.float64 and x.dim() == 3
        assert x.requires_grad and len(x) == 2 and x.numel() == 110 and isinstance(x.grad_fn, object)
    assert not log
    assert_close(x.detach() + 0, deep.whole.detach())
    assert_close(torch.from_numpy(x.detach().numpy()), deep.whole.detach())
    assert_close(pickle.loads(pickle.dumps(x.detach())) + 0, deep.whole.detach())
    assert_close(copy.deepcopy(deep.lazy().detach()) + 0, deep.whole.detach())
    assert repr(deep.lazy().detach()) == repr(deep.whole.detach())

    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            return 2 * grads[0]

    deep.check(Doubled.apply, 1)  # what torch's functions do not see

    def written(x: Tensor) -> Tensor:
        y = x * 1 if not isinstance(x, LazyGather) else x
        y[:, :, 3] = 0.0
        return F.cross_entropy(y.flatten(0, 1), ids.flatten())

    deep.check(written, 1)
    x = deep.lazy()
    view = x.flatten(0, 1)
    with pytest.raises(AutoTPError, match="written to in place"):
        x.mul_(2)
    assert view.shape == (10, 11)


@pytest.mark.parametrize("case", [losses, looked_at], ids=lambda f: f.__name__)
def test_of_parts(dist: Pool, case: object) -> None:
    dist.run(len(SIZES), case)


# --- in models ---


def models(names: list[str]) -> None:
    for name in names:  # nanogpt is traced with its targets, the others without
        case = MODELS[name]
        whole, model = case.build(), case.build()
        autotp.parallelize(model, example_inputs=case.inputs(0))
        inputs = dict(case.inputs(0))
        (first,) = [k for k in ("input_ids", "idx") if k in inputs][:1]
        labels = inputs[first].clone()
        labels[0, 2] = -1 if name == "nanogpt" else -100
        word = "targets" if name == "nanogpt" else "labels"
        outs = []
        with record_collectives() as log:
            for m in (model, whole):
                out = m(**{**inputs, word: labels})
                loss = out[1] if name == "nanogpt" else out.loss
                loss.backward()
                outs.append((loss, out[0] if name == "nanogpt" else out.logits))
        vocabulary = outs[1][1].shape[-1]
        assert not [c for c in log if c.kind == "all_gather" and c.shape[-1] == vocabulary], name
        assert_close(outs[0][0], outs[1][0], rtol=1e-6, atol=0)  # transformers takes the loss in float32
        for (k, p), q in zip(model.named_parameters(), whole.parameters(), strict=True):
            if p.shape == q.shape and p.grad is not None:
                assert_close(_local(p.grad), q.grad, rtol=1e-5, atol=1e-7, msg=lambda m, k=(name, k): f"{k}: {m}")
        assert_close(_plain(outs[0][1]), outs[1][1], rtol=1e-8, atol=1e-10)  # looked at after all
        if name == "llama":
            assert type(model(**inputs)[0]) is Tensor  # no loss: gathered as it returns
            outside(model)


def _local(grad: Tensor) -> Tensor:
    return getattr(grad, "_tp_local", grad)


def test_labels(dist: Pool) -> None:
    dist.run(2, models, ["llama", "gemma2", "nanogpt"], one_plans=True)


def outside(model: nn.Module) -> None:
    """A loss outside of the model: gathered as ever, or under loss_parallel from the parts."""
    ids = batches(1)[0]
    found = []
    for how in (None, F.cross_entropy, autotp.cross_entropy):
        model.zero_grad()
        with record_collectives() as log:
            if how is None:
                loss = F.cross_entropy(model(ids).logits.flatten(0, 1), ids.flatten())
            else:
                with autotp.loss_parallel():
                    loss = how(model(ids).logits.flatten(0, 1), ids.flatten())
            loss.backward()
        found.append((loss, _local(model.get_parameter("model.layers.0.mlp.up_proj.weight").grad)))
        assert log.count("all_gather") == (1 if how is None else 0)
    for other in found[1:]:
        assert_close(other, found[0], rtol=1e-10, atol=1e-12)
