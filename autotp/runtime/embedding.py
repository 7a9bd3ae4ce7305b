"""Sharded embeddings: over the vocabulary (each rank looks up its own rows) or over the embedding dim."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autotp.errors import RewriteError
from autotp.runtime import ops
from autotp.runtime.edges import Gather
from autotp.runtime.swap import Sharded, become, check_swappable

Runs = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class EmbeddingOptions:
    """``rows``: the (start, length) runs of the vocabulary that this rank holds, None where it holds all of
    it.

    ``vocab`` is the size of the whole vocabulary. With ``rows`` the output is Partial, and summed if
    ``reduce`` is given; without, the embedding dim is sharded, and gathered if ``gather`` is given.
    """

    rows: Runs | None = None
    vocab: int = 0
    reduce: str | None = None
    gather: Gather | None = None


class ShardedEmbedding(Sharded, nn.Embedding):
    """``nn.Embedding`` on this rank's rows or columns of the weight."""

    _tp: EmbeddingOptions

    @staticmethod
    def swap(module: nn.Embedding, options: EmbeddingOptions) -> None:
        """Make ``module``, whose weight is local already, a sharded one. Changes it in place."""
        check_swappable(module, nn.Embedding.forward, ("weight",))
        _refuse(module, options)
        if options.rows is not None and sum(n for _, n in options.rows) != module.weight.shape[0]:
            raise RewriteError(
                f"a vocab-parallel embedding with rows {options.rows} was given a weight of "
                f"{module.weight.shape[0]} rows."
            )
        if options.rows is not None and module.padding_idx is not None:
            module.padding_idx = _local_row(module.padding_idx, options.rows)
        become(module, ShardedEmbedding, options)
        ShardedEmbedding.refresh_sizes(module)  # type: ignore[arg-type]

    def refresh_sizes(self) -> None:
        """Set num_embeddings and embedding_dim to those of the weight."""
        self.num_embeddings, self.embedding_dim = self.weight.shape

    def forward(self, input: Tensor) -> Tensor:
        tp: EmbeddingOptions = self._tp
        if tp.rows is None:
            out = F.embedding(
                input,
                self.weight,
                self.padding_idx,
                scale_grad_by_freq=self.scale_grad_by_freq,
                sparse=self.sparse,
            )
        else:
            out = self._vocab_parallel(input, tp.rows)
        if tp.reduce is not None:
            out = ops.all_reduce(out, tp.reduce)
        if tp.gather is not None:
            out = tp.gather(out)
        return out

    def _vocab_parallel(self, ids: Tensor, rows: Runs) -> Tensor:
        """The rows of the ids that are here, zeros for those that other ranks have."""
        local, elsewhere = _localize(ids, rows, self._tp.vocab)
        if self.weight.shape[0] == 0:
            # No rows at all. The weight stays in the graph, or this rank would miss the collectives of the
            # backward.
            nothing = self.weight.new_zeros(1, self.weight.shape[1])
            return F.embedding(local, nothing) + self.weight.sum()
        found = F.embedding(local, self.weight, self.padding_idx)
        return found if elsewhere is None else found.masked_fill(elsewhere.unsqueeze(-1), 0)


def _localize(ids: Tensor, rows: Runs, vocab: int) -> tuple[Tensor, Tensor | None]:
    """Ids as row numbers of the local weight (0 where another rank has the row), and which ids are elsewhere.

    An id outside the vocabulary must not pass as "elsewhere", or it would give zeros where the unsharded
    model raises: it stays outside the local rows, so that the lookup raises.
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


def _local_row(row: int, rows: Runs) -> int | None:
    offset = 0
    for start, length in rows:
        if start <= row < start + length:
            return row - start + offset
        offset += length
    return None


def _refuse(module: nn.Embedding, options: EmbeddingOptions) -> None:
    refused = []
    if module.max_norm is not None:  # renormalises the rows that are looked up, by their whole norm, in place
        refused.append("max_norm")
    if options.rows is not None and module.scale_grad_by_freq:
        refused.append("scale_grad_by_freq")  # the ids of other ranks would count as row 0
    if module.sparse:
        refused.append("sparse")
    if refused:
        raise RewriteError(
            f"cannot shard an nn.Embedding with {' and '.join(refused)}. "
            "Replicate it in the plan, or leave that out."
        )
