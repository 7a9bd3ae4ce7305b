"""Attention, as people write it: every way to get heads out of projections, and to put them together again."""

from __future__ import annotations

from dataclasses import dataclass

from tests.fuzz.code import Code

LONGEST = 11  # positions that learned tables know


@dataclass
class Heads:
    """Sizes, and how forward says them."""

    n: int  # query heads
    kv: int
    dim: int
    said_n: str
    said_kv: str
    said_dim: str

    @property
    def group(self) -> int:
        return self.n // self.kv


def attention(c: Code, width: int, memory: int | None = None) -> None:
    """Write self-attention (or cross-attention to ``memory`` of that width) over x [b, t, width]."""
    draw = c.draw
    kv = draw.number(1, 4)
    n = kv * draw.weighted({1: 5, 2: 3, 3: 1})
    if draw.chance(0.2):
        n, kv = draw.number(2, 7), 1
    dim = draw.pick(2, 4, 6)
    said_n = c.size("num_heads", n)
    said_kv = said_n if kv == n else c.size("num_kv_heads", kv)
    heads = Heads(n, kv, dim, said_n, said_kv, c.size("head_dim", dim))
    c.batch_and_sequence()
    if memory is not None:
        c.arguments.append("memory")
        q, k, v = _separate(c, heads, width, "memory", memory)
    else:
        kinds = {
            "separate": 4.0,
            "fused": 3.0,
            "interleaved": 2.0,
            "einsum": 1.0,
            "stacked": 1.0 if kv == n else 0.0,
        }
        kind = draw.weighted(kinds)
        q, k, v = {
            "separate": lambda: _separate(c, heads, width, "x", width),
            "fused": lambda: _fused(c, heads, width),
            "interleaved": lambda: _interleaved(c, heads, width),
            "einsum": lambda: _einsum(c, heads, width),
            "stacked": lambda: _stacked(c, heads, width),
        }[kind]()
    # [b, t, heads, dim] each
    if draw.chance(0.2):
        q, k = _normed(c, heads, q, k)
    if memory is None and draw.chance(0.3):
        q, k = _rotary(c, heads, q, k)
    if draw.chance(0.08):
        q = c.let(f"{q} * {c.param('gain', n, 1)}", "q")
    out = (
        _linear_attention(c, heads, q, k, v)
        if draw.chance(0.12)
        else _core(c, heads, q, k, v, memory is not None)
    )
    if draw.chance(0.12):
        out = c.let(f"{out} * torch.sigmoid({c.linear('gate', width, n)}(x)).unsqueeze(-1)", "out")
    _output(c, heads, out, width)


# ---- projections


def _split_heads(c: Code, x: str, n: int, dim: int, said_n: str, said_dim: str, seq: str = "t") -> str:
    """x [b, t, n * dim] as [b, t, n, dim]."""
    return c.draw.pick(
        f"{x}.view(b, {seq}, {said_n}, {said_dim})",
        f"{x}.reshape(b, {seq}, {said_n}, {said_dim})",
        f"{x}.view(b, {seq}, -1, {said_dim})",
        f"{x}.view(b, {seq}, {said_n}, -1)",
        f"{x}.view(*{x}.shape[:-1], {said_n}, {said_dim})",
        f"{x}.unflatten(-1, ({said_n}, {said_dim}))",
        f"{x}.unflatten(-1, (-1, {said_dim}))",
        f"{x}.view(b, {seq}, {said_n}, {x}.shape[-1] // {said_n})",
        f"torch.reshape({x}, {x}.shape[:2] + ({said_n}, {said_dim}))",
    )


def _separate(c: Code, h: Heads, width: int, source: str, source_width: int) -> tuple[str, str, str]:
    bias = c.draw.chance(0.5)
    q = c.let(f"{c.linear('q_proj', width, h.n * h.dim, bias)}(x)", "q")
    k = c.let(f"{c.linear('k_proj', source_width, h.kv * h.dim, bias)}({source})", "k")
    v = c.let(f"{c.linear('v_proj', source_width, h.kv * h.dim, bias)}({source})", "v")
    seq = "t" if source == "x" else c.let("memory.shape[1]", "s")
    return (
        c.let(_split_heads(c, q, h.n, h.dim, h.said_n, h.said_dim), "q"),
        c.let(_split_heads(c, k, h.kv, h.dim, h.said_kv, h.said_dim, seq), "k"),
        c.let(_split_heads(c, v, h.kv, h.dim, h.said_kv, h.said_dim, seq), "v"),
    )


def _fused(c: Code, h: Heads, width: int) -> tuple[str, str, str]:
    """(q | k | v): one after the other."""
    q_size, kv_size = h.n * h.dim, h.kv * h.dim
    qkv = c.let(f"{c.linear('qkv', width, q_size + 2 * kv_size)}(x)", "qkv")
    said_q, said_kv = f"{h.said_n} * {h.said_dim}", f"{h.said_kv} * {h.said_dim}"
    if c.draw.chance(0.3):
        said_q, said_kv = c.size("q_size", q_size), c.size("kv_size", kv_size)
    said_v = f"({said_kv})"
    q, k, v = c.fresh("q"), c.fresh("k"), c.fresh("v")
    ways = [
        f"{q}, {k}, {v} = {qkv}.split([{said_q}, {said_kv}, {said_kv}], dim=-1)",
        f"{q} = {qkv}[..., : {said_q}]; {k} = {qkv}[..., {said_q} : -{said_v}]; {v} = {qkv}[..., -{said_v} :]",
        f"{q} = {qkv}[..., : {said_q}]; {k}, {v} = {qkv}[..., {said_q} :].chunk(2, dim=-1)",
        f"{q} = {qkv}.narrow(-1, 0, {said_q}); {k}, {v} = {qkv}.narrow(2, {said_q}, 2 * {said_v}).chunk(2, dim=-1)",
    ]
    if h.n == h.kv:
        ways += [
            f"{q}, {k}, {v} = {qkv}.chunk(3, dim=-1)",
            f"{q}, {k}, {v} = torch.split({qkv}, {said_q}, dim=2)",
        ] * 2
        unbound = f"{q}, {k}, {v} = {qkv}.view(b, t, 3, {h.said_n}, {h.said_dim}).unbind(2)"
        permuted = f"{q}, {k}, {v} = {qkv}.reshape(b, t, 3, {h.said_n}, -1).permute(2, 0, 1, 3, 4)"
        if c.draw.chance(0.4):
            c.do(c.draw.pick(unbound, permuted))
            return q, k, v
    c.do(c.draw.pick(*ways))
    return (
        c.let(_split_heads(c, q, h.n, h.dim, h.said_n, h.said_dim), "q"),
        c.let(_split_heads(c, k, h.kv, h.dim, h.said_kv, h.said_dim), "k"),
        c.let(_split_heads(c, v, h.kv, h.dim, h.said_kv, h.said_dim), "v"),
    )


def _interleaved(c: Code, h: Heads, width: int) -> tuple[str, str, str]:
    """By kv head: (group of q, k, v)."""
    g = h.group
    qkv = c.let(f"{c.linear('query_key_value', width, h.kv * (g + 2) * h.dim)}(x)", "qkv")
    said_g = c.size("group", g) if c.draw.chance(0.5) else f"{h.said_n} // {h.said_kv}"
    if g == 1 and c.draw.chance(0.6):
        if c.draw.chance(0.5):
            x = c.let(f"{qkv}.view(b, t, {h.said_n}, 3, {h.said_dim})", "fused")
            return tuple(c.let(f"{x}[..., {i}, :]", name) for i, name in enumerate("qkv"))  # type: ignore[return-value]
        x = c.let(f"{qkv}.view(b, t, {h.said_n}, 3 * {h.said_dim})", "fused")
        q, k, v = c.fresh("q"), c.fresh("k"), c.fresh("v")
        c.do(
            c.draw.pick(
                f"{q}, {k}, {v} = {x}.chunk(3, dim=-1)", f"{q}, {k}, {v} = {x}.split({h.said_dim}, dim=-1)"
            )
        )
        return q, k, v
    x = c.let(f"{qkv}.view(b, t, {c.draw.pick(h.said_kv, '-1')}, {said_g} + 2, {h.said_dim})", "fused")
    way = c.draw.pick("slice", "index", "split")
    if way == "slice":
        q, k, v = f"{x}[..., :-2, :]", f"{x}[..., -2, :]", f"{x}[..., -1, :]"
    elif way == "index":
        q, k, v = f"{x}[..., :-2, :]", f"{x}[..., [-2], :].squeeze(-2)", f"{x}[..., [-1], :].squeeze(3)"
    else:
        a, k, v = c.fresh("q"), c.fresh("k"), c.fresh("v")
        c.do(f"{a}, {k}, {v} = {x}.split([{said_g}, 1, 1], dim=3)")
        q, k, v = a, f"{k}.flatten(2, 3)", f"{v}.reshape(b, t, {h.said_kv}, -1)"
    q = c.let(
        f"{q}.reshape(b, t, {h.said_n}, {h.said_dim})" if c.draw.chance(0.5) else f"{q}.flatten(2, 3)", "q"
    )
    return q, c.let(k, "k"), c.let(v, "v")


def _einsum(c: Code, h: Heads, width: int) -> tuple[str, str, str]:
    """Bare parameters [width, heads, dim]."""
    out = []
    for name, n, said in (("q", h.n, h.said_n), ("k", h.kv, h.said_kv), ("v", h.kv, h.said_kv)):
        if c.draw.chance(0.6):
            w = c.param(f"w_{name}", width, n, h.dim)
            value = c.draw.pick(
                f"torch.einsum('btd,dhk->bthk', x, {w})",
                f"torch.tensordot(x, {w}, dims=1)",
                f"torch.einsum('b t d, d h k -> b h t k', x, {w}).transpose(1, 2)",
            )
        else:
            w = c.param(f"w_{name}", n * h.dim, width)
            value = c.draw.pick(
                f"F.linear(x, {w})", f"(x @ {w}.t())", f"torch.matmul(x, {w}.transpose(0, 1))"
            )
            value = f"{value}.view(b, t, {said}, {h.said_dim})"
        out.append(c.let(value, name))
    return out[0], out[1], out[2]


def _stacked(c: Code, h: Heads, width: int) -> tuple[str, str, str]:
    """One bare parameter of q, k and v."""
    size = h.n * h.dim
    if c.draw.chance(0.5):
        w = c.param("in_proj_weight", 3 * size, width)
        wq, wk, wv = c.fresh("w_q"), c.fresh("w_k"), c.fresh("w_v")
        c.do(f"{wq}, {wk}, {wv} = {w}.chunk(3)")
        pieces = [f"F.linear(x, {name})" for name in (wq, wk, wv)]
    else:
        w = c.param("w_qkv", 3, width, size)
        pieces = [f"x @ {w}[{i}]" for i in range(3)]
    flat = [c.let(piece, name) for piece, name in zip(pieces, "qkv", strict=True)]
    q, k, v = (c.let(_split_heads(c, x, h.n, h.dim, h.said_n, h.said_dim), x[0]) for x in flat)
    return q, k, v


# ---- what happens to q and k


def _normed(c: Code, h: Heads, q: str, k: str) -> tuple[str, str]:
    kind = c.draw.pick("layer_norm", "rms", "normalize", "whole")
    if kind == "layer_norm":
        return c.let(f"{c.attr('q_norm', f'nn.LayerNorm({h.dim})')}({q})", "q"), c.let(
            f"{c.attr('k_norm', f'nn.LayerNorm({h.dim})')}({k})", "k"
        )
    if kind == "rms":
        return c.let(f"rms_norm({q}, {c.param('q_gain', h.dim)})", "q"), c.let(
            f"rms_norm({k}, {c.param('k_gain', h.dim)})", "k"
        )
    if kind == "normalize":
        return c.let(f"F.normalize({q}, dim=-1)", "q"), c.let(f"F.normalize({k}, dim=-1)", "k")
    # over the whole width of all heads, as OLMo 2 does
    flat = c.let(f"{q}.flatten(2)", "flat")
    normed = c.let(f"rms_norm({flat}, {c.param('q_gain', h.n * h.dim)})", "flat")
    return c.let(f"{normed}.view({q}.shape)", "q"), k


def _rotary(c: Code, h: Heads, q: str, k: str) -> tuple[str, str]:
    made = c.draw.pick("buffer", "computed")
    if made == "buffer":
        c.init += [
            f"angles = torch.outer(torch.arange({LONGEST}.0), 1.0 / 100 ** (torch.arange(0, {h.dim}, 2) / {h.dim}))",
            "self.register_buffer('cos', angles.cos(), persistent=False)",
            "self.register_buffer('sin', angles.sin(), persistent=False)",
        ]
        cos = c.let("self.cos[:t].unsqueeze(1)", "cos")
        sin = c.let("self.sin[:t].unsqueeze(1)", "sin")
    else:
        freqs = c.let(
            f"1.0 / 100 ** (torch.arange(0, {h.said_dim}, 2, dtype=x.dtype) / {h.said_dim})", "freqs"
        )
        angles = c.let(f"torch.arange(t, dtype=x.dtype).unsqueeze(-1) * {freqs}", "angles")
        cos = c.let(f"{angles}.cos()[:, None, :]", "cos")
        sin = c.let(f"{angles}.sin()[:, None, :]", "sin")
    rotate = c.draw.pick("rotate_half", "rotate_pairs", "rotate_stacked")
    return c.let(f"{rotate}({q}, {cos}, {sin})", "q"), c.let(f"{rotate}({k}, {cos}, {sin})", "k")


# ---- the attention itself


def _to_heads_first(c: Code, x: str) -> str:
    return c.let(c.draw.pick(f"{x}.transpose(1, 2)", f"{x}.permute(0, 2, 1, 3)", f"{x}.swapaxes(1, 2)",
                             f"{x}.movedim(2, 1)", f"torch.einsum('bthk->bhtk', {x})"), x[0])  # fmt: skip


def _repeat(c: Code, h: Heads, x: str) -> str:
    """The kv heads [b, kv, s, dim], as many as there are query heads."""
    said = c.draw.pick(f"{h.said_n} // {h.said_kv}", c.size("group", h.group))
    return c.let(
        c.draw.pick(
            f"{x}.repeat_interleave({said}, dim=1)",
            f"repeat_kv({x}, {said})",
            f"{x}.unsqueeze(2).expand(-1, -1, {said}, -1, -1).flatten(1, 2)",
            f"torch.stack([{x}] * ({said}), dim=2).flatten(1, 2)",
        ),
        x[0],
    )


def _core(c: Code, h: Heads, q: str, k: str, v: str, cross: bool) -> str:
    """[b, t, n, dim] from q [b, t, n, dim] and k, v [b, s, kv, dim]."""
    draw = c.draw
    q, k, v = (_to_heads_first(c, x) for x in (q, k, v))
    grouped = h.group > 1
    bias = draw.weighted({"none": 5, "alibi": 1.5, "table": 1, "buckets": 1.5}) if not cross else "none"
    added = _position_bias(c, h, bias, k)
    fused = draw.chance(0.4)
    if grouped and not (fused and draw.chance(0.4)) and not (not fused and h.kv > 1 and draw.chance(0.3)):
        if h.kv > 1 or draw.chance(0.3):  # one kv head broadcasts by itself
            k, v = _repeat(c, h, k), _repeat(c, h, v)
            grouped = False
        else:
            grouped = fused
    if fused:
        gqa = ", enable_gqa=True" if grouped else ""
        if added is not None:
            out = f"F.scaled_dot_product_attention({q}, {k}, {v}, attn_mask={added}{gqa})"
        elif not cross and draw.chance(0.4):
            out = f"F.scaled_dot_product_attention({q}, {k}, {v}, is_causal=True{gqa})"
        elif not cross and draw.chance(0.4):
            mask = c.let("torch.ones(t, t, dtype=torch.bool).tril()", "mask")
            out = f"F.scaled_dot_product_attention({q}, {k}, {v}, attn_mask={mask}{gqa})"
        else:
            out = f"F.scaled_dot_product_attention({q}, {k}, {v}{draw.pick('', ', scale=0.3')}{gqa})"
        out = c.let(out, "out")
        return c.let(draw.pick(f"{out}.transpose(1, 2)", f"{out}.permute(0, 2, 1, 3)"), "out")
    if grouped:  # [b, kv, group, t, dim] without repeating
        q = c.let(f"{q}.reshape(b, {h.said_kv}, {h.said_n} // {h.said_kv}, t, {h.said_dim})", "q")
        scores = c.let(f"torch.einsum('bkgtd,bksd->bkgts', {q}, {k}) * {h.said_dim} ** -0.5", "scores")
        if not cross:
            scores = _masked(c, scores)
        probs = c.let(f"{scores}.softmax(-1)", "probs")
        out = c.let(f"torch.einsum('bkgts,bksd->btkgd', {probs}, {v})", "out")
        return c.let(f"{out}.reshape(b, t, {h.said_n}, {h.said_dim})", "out")
    scale = draw.pick(f"{h.said_dim} ** -0.5", f"(1.0 / math.sqrt({h.said_dim}))", f"{q}.shape[-1] ** -0.5",
                      f"(1 / {q}.size(-1))", "0.4")  # fmt: skip
    way = draw.pick("matmul", "einsum", "baddbmm" if h.n == h.kv and not cross else "matmul")
    if way == "baddbmm":
        base = c.let(f"torch.zeros(1, 1, 1, dtype=x.dtype).expand(b * {h.said_n}, t, t)", "base")
        flat = [f"{y}.reshape(b * {h.said_n}, t, {h.said_dim})" for y in (q, k)]
        scores = c.let(
            f"torch.baddbmm({base}, {flat[0]}, {flat[1]}.transpose(1, 2), alpha={scale})", "scores"
        )
        scores = c.let(f"{scores}.view(b, {h.said_n}, t, t)", "scores")
    elif way == "einsum" and not (h.kv == 1 and h.n > 1):
        scores = c.let(f"torch.einsum('bhtd,bhsd->bhts', {q}, {k}) * {scale}", "scores")
    else:
        turned = draw.pick(
            f"{k}.transpose(-2, -1)", f"{k}.mT", f"{k}.transpose(2, 3)", f"{k}.permute(0, 1, 3, 2)"
        )
        scores = c.let(
            draw.pick(f"{q} @ {turned} * {scale}", f"torch.matmul({q} * {scale}, {turned})"), "scores"
        )
    if added is not None:
        scores = c.let(f"{scores} + {added}", "scores")
    if draw.chance(0.1):
        scores = c.let(f"3.0 * torch.tanh({scores} / 3.0)", "scores")
    if not cross:
        scores = _masked(c, scores)
    probs = c.let(_probabilities(c, h, scores, cross), "probs")
    if draw.chance(0.15):
        probs = c.let(f"{c.attr('drop', 'nn.Dropout(0.1)')}({probs})", "probs")
    out = c.let(f"{probs} @ {v}", "out")
    return c.let(draw.pick(f"{out}.transpose(1, 2)", f"{out}.permute(0, 2, 1, 3)"), "out")


def _masked(c: Code, scores: str) -> str:
    kind = c.draw.pick("none", "fill", "fill_", "add", "where", "window")
    if kind == "none":
        return scores
    if kind in ("fill", "fill_"):
        mask = c.let("torch.triu(torch.ones(t, t, dtype=torch.bool), diagonal=1)", "mask")
        low = c.draw.pick("float('-inf')", "-1e4")
        return c.let(f"{scores}.masked_{kind}({mask}, {low})", "scores")
    if kind == "add":
        mask = c.let("torch.full((t, t), -1e4, dtype=x.dtype).triu(1)", "mask")
        return c.let(f"{scores} + {mask}", "scores")
    if kind == "where":
        mask = c.let("torch.tril(torch.ones(t, t)).bool()", "mask")
        return c.let(f"torch.where({mask}, {scores}, torch.finfo({scores}.dtype).min)", "scores")
    where = c.let("torch.arange(t)", "where")
    mask = c.let(f"({where}[:, None] - {where}[None, :]).abs() > 2", "mask")
    return c.let(f"{scores}.masked_fill({mask}, -1e4)", "scores")


def _probabilities(c: Code, h: Heads, scores: str, cross: bool) -> str:
    kind = c.draw.weighted({"softmax": 8, "sigmoid": 1, "sink": 1, "relu": 0.5})
    if kind == "sigmoid":
        return f"torch.sigmoid({scores})"
    if kind == "relu":
        return f"{scores}.relu() / {scores}.shape[-1]"
    if kind == "sink":  # one more column, of a learned number per head
        sink = c.let(f"{c.param('sink', h.n)}.view(1, -1, 1, 1).expand(b, -1, t, 1)", "sink")
        return f"torch.cat([{scores}, {sink}], dim=-1).softmax(-1)[..., :-1]"
    return c.draw.pick(
        f"F.softmax({scores}, dim=-1)",
        f"{scores}.softmax(dim=-1)",
        f"torch.softmax({scores}, -1, dtype=x.dtype)",
    )


def _position_bias(c: Code, h: Heads, kind: str, k: str) -> str | None:
    """[1, n, t, t] or [n, t, t]."""
    if kind == "none":
        return None
    if kind == "alibi":
        if c.draw.chance(0.5):
            c.init.append(f"self.register_buffer('slopes', 0.5 ** torch.arange(1.0, {h.n} + 1))")
            slopes = "self.slopes"
        else:
            slopes = c.let(f"0.5 ** torch.arange(1, {h.said_n} + 1, dtype=x.dtype)", "slopes")
        where = c.let("torch.arange(t)", "where")
        far = c.let(f"({where}[None, :] - {where}[:, None]).abs()", "far")
        return c.let(f"-{slopes}.view(-1, 1, 1) * {far}", "bias")
    if kind == "table":
        table = c.param("bias_table", h.n, LONGEST, LONGEST)
        return c.let(c.draw.pick(f"{table}[:, :t, :t]", f"{table}[:, :t, :t].unsqueeze(0)"), "bias")
    table = c.attr("relative_bias", f"nn.Embedding({2 * LONGEST}, {h.n})")
    where = c.let("torch.arange(t)", "where")
    distance = c.let(f"{where}[None, :] - {where}[:, None] + {LONGEST}", "distance")
    looked_up = f"{table}({distance}).permute(2, 0, 1)"
    return c.let(c.draw.pick(looked_up, f"{looked_up}.unsqueeze(0)"), "bias")


def _linear_attention(c: Code, h: Heads, q: str, k: str, v: str) -> str:
    """Without softmax: (q · Σ k v) / (q · Σ k)."""
    if h.group > 1:
        k, v = (c.let(f"{x}.repeat_interleave({h.said_n} // {h.said_kv}, dim=2)", x[0]) for x in (k, v))
    q, k = c.let(f"F.elu({q}) + 1", "q"), c.let(f"F.elu({k}) + 1", "k")
    state = c.let(f"torch.einsum('bshd,bshe->bhde', {k}, {v})", "state")
    norm = c.let(f"torch.einsum('bthd,bhd->bth', {q}, {k}.sum(1))", "norm")
    return c.let(f"torch.einsum('bthd,bhde->bthe', {q}, {state}) / {norm}.unsqueeze(-1)", "out")


def _output(c: Code, h: Heads, out: str, width: int) -> None:
    """From [b, t, n, dim] back to the width."""
    size = h.n * h.dim
    if c.draw.chance(0.12):
        w = c.param("w_o", h.n, h.dim, width)
        c.do(f"return torch.einsum('bthk,hkd->btd', {out}, {w})")
        return
    if c.draw.chance(0.1):  # heads side by side, as concatenated by hand
        flat = c.let(f"torch.cat([{out}[:, :, i] for i in range({h.said_n})], dim=-1)", "flat")
    else:
        flat = c.let(
            c.draw.pick(
                f"{out}.reshape(b, t, {h.said_n} * {h.said_dim})",
                f"{out}.contiguous().view(b, t, -1)",
                f"{out}.flatten(2)",
                f"{out}.reshape(b, t, -1)",
                f"{out}.reshape(b, t, {c.size('inner', size)})",
                f"{out}.flatten(-2)",
                f"{out}.reshape(*x.shape[:-1], -1)",
                f"{out}.reshape(x.shape)" if size == width else f"{out}.flatten(2)",
            ),
            "flat",
        )
    if c.draw.chance(0.12):
        flat = _normed_output(c, h, flat)
    if c.draw.chance(0.15):
        w = c.param("w_o", size, width)
        c.do(f"return {flat} @ {w}" + (f" + {c.param('b_o', width)}" if c.draw.chance(0.5) else ""))
        return
    c.do(f"return {c.linear('o_proj', size, width)}({flat})")


def _normed_output(c: Code, h: Heads, flat: str) -> str:
    """Over all heads, or as Mamba 2 does over those of a kv head."""
    gain = c.param("out_gain", h.n * h.dim)
    if c.draw.chance(0.4):
        return c.let(f"rms_norm({flat}, {gain})", "flat")
    x = c.let(f"{flat}.view(b, t, {h.said_kv}, -1)", "groups")
    size = c.let(f"{x}.pow(2).mean(-1, keepdim=True)", "size")
    ways = (f"{x} * torch.rsqrt({size} + 1e-6)", f"({x} / (1 + {size})).tanh()", f"{x} * torch.sigmoid({size})")
    normed = c.let(c.draw.pick(*ways), "groups")
    return c.let(f"{normed}.flatten(2) * {gain}", "flat")
