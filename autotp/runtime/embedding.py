"""Sharded embeddings: over the vocabulary (each rank looks up its own rows) or over the embedding dim."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from autotp.errors import RewriteError
from autotp.runtime import ops
from autotp.runtime.edges import Gather
from autotp.runtime.lookup import local_row, lookup
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
    """``nn.Embedding`` on this rank's rows or columns of the weight. Its sizes go on saying the whole."""

    _tp: EmbeddingOptions

    @staticmethod
    def swap(module: nn.Embedding, options: EmbeddingOptions) -> None:
        """Make ``module``, whose weight is local already, a sharded one. Changes it in place.

        A subclass with a forward of its own keeps that; where it calls ``super().forward`` it meets the sharded lookup.
        """
        own = type(module).forward is not nn.Embedding.forward
        check_swappable(module, None if own else nn.Embedding.forward, ("weight",))
        _refuse(module, options)
        if options.rows is not None and sum(n for _, n in options.rows) != module.weight.shape[0]:
            raise RewriteError(
                f"a vocab-parallel embedding with rows {options.rows} was given a weight of "
                f"{module.weight.shape[0]} rows."
            )
        if options.rows is not None and module.padding_idx is not None:
            module.padding_idx = local_row(module.padding_idx, options.rows)
        become(module, ShardedEmbedding, options, inner=own)

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
            out = lookup(self.weight, input, tp.rows, tp.vocab, self.padding_idx)
        if tp.reduce is not None:
            out = ops.all_reduce(out, tp.reduce)
        if tp.gather is not None:
            out = tp.gather(out)
        return out


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
