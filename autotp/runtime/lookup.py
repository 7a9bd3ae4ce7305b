"""The vocab-parallel lookup as one op: rows that this rank has, zeros for the ids that other ranks have.

``torch.ops.autotp.lookup.default(weight, ids, starts, lengths, vocab, padding)`` is what a traced or compiled graph
shows; eager calls take the same steps without the dispatcher. ``padding`` is the local row without a gradient, -1
for none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from autotp.runtime.ops import _library, is_eager

Runs = Sequence[tuple[int, int]]


def lookup(weight: Tensor, ids: Tensor, rows: Runs, vocab: int, padding: int | None) -> Tensor:
    """``weight`` [rows here, m], ``ids`` [...] of the whole vocabulary → [..., m], a Partial value.

    Raises:
        IndexError: an id is outside the vocabulary, as in the unsharded lookup.
    """
    if not is_eager(weight):
        starts, lengths = [start for start, _ in rows], [length for _, length in rows]
        pad = -1 if padding is None else padding
        return cast(Tensor, torch.ops.autotp.lookup.default(weight, ids, starts, lengths, vocab, pad))
    return _lookup(weight, ids, rows, vocab, padding)


def _lookup(weight: Tensor, ids: Tensor, rows: Runs, vocab: int, padding: int | None) -> Tensor:
    local, elsewhere = localize(ids, rows, vocab)
    if weight.shape[0] == 0:
        # No rows at all. The weight stays in the graph, or this rank would miss the collectives of the backward.
        return F.embedding(local, weight.new_zeros(1, weight.shape[1])) + weight.sum()
    found = F.embedding(local, weight, padding)
    return found if elsewhere is None else found.masked_fill(elsewhere.unsqueeze(-1), 0)


def localize(ids: Tensor, rows: Runs, vocab: int) -> tuple[Tensor, Tensor | None]:
    """Ids as row numbers of the local weight (0 where another rank has the row), and which ids are elsewhere.

    An id outside the vocabulary must not pass as "elsewhere", or it would give zeros where the unsharded model raises:
    it stays outside the local rows, so that the lookup raises.
    """
    if not rows:
        elsewhere = (ids >= 0) & (ids < vocab)
        return ids.masked_fill(elsewhere, 0), elsewhere
    if len(rows) == 1:
        start, length = rows[0]
        sides = []
        if start:
            sides.append((ids >= 0) & (ids < start))
        if start + length < vocab:
            sides.append((ids >= start + length) & (ids < vocab))
        local = ids - start if start else ids
        if not sides:
            return local, None
        elsewhere = sides[0] if len(sides) == 1 else sides[0] | sides[1]
        return local.masked_fill(elsewhere, 0), elsewhere
    elsewhere = (ids >= 0) & (ids < vocab)
    local = ids.masked_fill(elsewhere, 0)
    offset = 0
    for start, length in rows:
        here = (ids >= start) & (ids < start + length)
        local = torch.where(here, ids - start + offset, local)
        elsewhere = elsewhere & ~here
        offset += length
    return local, elsewhere


def local_row(row: int, rows: Runs) -> int | None:
    """Where row number ``row`` of the whole vocabulary is in the local weight, None where another rank has it."""
    offset = 0
    for start, length in rows:
        if start <= row < start + length:
            return row - start + offset
        offset += length
    return None


def _real(
    weight: Tensor, ids: Tensor, starts: list[int], lengths: list[int], vocab: int, padding: int
) -> Tensor:
    rows = list(zip(starts, lengths, strict=True))
    return _lookup(weight, ids, rows, vocab, None if padding < 0 else padding).contiguous()


def _fake(
    weight: Tensor, ids: Tensor, starts: list[int], lengths: list[int], vocab: int, padding: int
) -> Tensor:
    return weight.new_empty((*ids.shape, weight.shape[1]))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, ids, starts, lengths, vocab, ctx.padding = inputs
    local, elsewhere = localize(ids, list(zip(starts, lengths, strict=True)), vocab)
    ctx.rows = weight.shape[0]
    ctx.save_for_backward(local, *([] if elsewhere is None else [elsewhere]))


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    local, *elsewhere = ctx.saved_tensors
    if elsewhere:
        grad = grad.masked_fill(elsewhere[0].unsqueeze(-1), 0)
    found = torch.ops.aten.embedding_dense_backward(grad, local, max(ctx.rows, 1), ctx.padding, False)
    return found[: ctx.rows], None, None, None, None, None


_library.define(
    "lookup(Tensor weight, Tensor ids, int[] starts, int[] lengths, int vocab, int padding) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.impl("lookup", _real, "CompositeExplicitAutograd")
torch.library.register_fake("autotp::lookup", _fake, lib=_library)
torch.library.register_autograd("autotp::lookup", _backward, setup_context=_setup, lib=_library)
