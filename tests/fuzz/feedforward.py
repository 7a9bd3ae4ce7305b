"""What stands between the attentions: MLPs, gates, mixtures of experts, convolutions and scans."""

from __future__ import annotations

from tests.fuzz.code import Code

ACTS = ("F.gelu", "F.relu", "F.silu", "torch.tanh", "torch.sigmoid", "F.elu", "F.softplus", "torch.sin")


def mlp(c: Code, width: int) -> None:
    draw = c.draw
    inner = draw.number(5, 20)
    kind = draw.weighted({"plain": 3, "gated": 3, "fused": 3, "sequential": 1, "bare": 1.5, "segments": 2})
    act = draw.pick(*ACTS)
    if kind == "plain":
        h = c.let(f"{c.linear('up', width, inner)}(x)")
        h = c.let(
            draw.pick(f"{act}({h})", f"{h}.relu_()", f"F.relu({h}, inplace=True)", f"{h}.relu().square()")
        )
    elif kind == "gated":
        up, gate = c.linear("up", width, inner), c.linear("gate", width, inner)
        ways = (f"{act}({gate}(x)) * {up}(x)", f"{up}(x) * {gate}(x).sigmoid()", f"{up}(x).mul({gate}(x))")
        h = c.let(draw.pick(*ways))
    elif kind == "fused":
        h = _gate_up(c, width, inner, act)
    elif kind == "sequential":
        layers = [
            f"nn.Linear({width}, {inner})",
            draw.pick("nn.GELU()", "nn.ReLU(inplace=True)", "nn.Tanh()"),
        ]
        if draw.chance(0.3):
            layers.append("nn.Dropout(0.1)")
        if draw.chance(0.3):
            layers.append(f"nn.LayerNorm({inner})")
        if draw.chance(0.3):
            layers += [f"nn.Linear({inner}, {inner})", "nn.SiLU()"]
        h = c.let(f"{c.attr('net', 'nn.Sequential(' + ', '.join(layers) + ')')}(x)")
    elif kind == "bare":
        w = c.param("w1", width, inner)
        h = c.let(
            f"{act}(x @ {w} + {c.param('b1', inner)})" if draw.chance(0.5) else f"{act}(torch.matmul(x, {w}))"
        )
    else:
        h = _segments(c, width, inner, act)
    extra = draw.weighted({"none": 5, "scale": 1, "norm": 1, "inplace": 1, "dropout": 1})
    if extra == "scale":
        h = c.let(f"{h} * {c.param('scale', inner)}")
    elif extra == "norm":
        h = c.let(
            draw.pick(
                f"{c.attr('mid_norm', f'nn.LayerNorm({inner})')}({h})",
                f"rms_norm({h}, {c.param('mid', inner)})",
            )
        )
    elif extra == "inplace":
        h = c.let(f"{h} + 0")
        c.do(f"{h} *= 0.5" if draw.chance(0.5) else f"{h} += {c.param('shift', inner)}")
    elif extra == "dropout":
        h = c.let(f"{c.attr('drop', 'nn.Dropout(0.2)')}({h})")
    down = (
        f"{c.linear('down', inner, width)}({h})" if kind != "bare" else f"{h} @ {c.param('w2', inner, width)}"
    )
    c.do(f"return {down}")


def _gate_up(c: Code, width: int, inner: int, act: str) -> str:
    said = c.size("inner", inner)
    fused = c.let(f"{c.linear('gate_up', width, 2 * inner)}(x)", "fused")
    a, g = c.fresh("a"), c.fresh("g")
    way = c.draw.pick("chunk", "split", "slice", "steps", "view", "glu", "pairs")
    if way == "glu":
        return c.let(f"F.glu({fused}, dim=-1)")
    c.do(
        {
            "chunk": f"{a}, {g} = {fused}.chunk(2, dim=-1)",
            "split": f"{a}, {g} = {fused}.split({said}, dim=-1)",
            "slice": f"{a}, {g} = {fused}[..., :{said}], {fused}[..., {said}:]",
            "steps": f"{a}, {g} = {fused}[..., ::2], {fused}[..., 1::2]",
            "view": f"{a}, {g} = {fused}.view(*x.shape[:-1], 2, {said}).unbind(-2)",
            "pairs": f"{a}, {g} = {fused}.view(x.shape[0], x.shape[1], {said}, 2).unbind(dim=3)",
        }[way]
    )
    return c.let(f"{act}({g}) * {a}")


def _segments(c: Code, width: int, inner: int, act: str) -> str:
    """(F | F | r): a small last segment that only a projection of it uses."""
    r = c.draw.number(1, 3)
    fused = c.let(f"{c.linear('in_proj', width, 2 * inner + r)}(x)", "fused")
    a, g, s = c.fresh("a"), c.fresh("g"), c.fresh("s")
    said = c.size("inner", inner)
    c.do(f"{a}, {g}, {s} = {fused}.split([{said}, {said}, {c.size('rank', r)}], dim=-1)")
    if c.draw.chance(0.5):
        s = c.let(f"F.softplus({c.linear('dt_proj', r, inner)}({s}))", "s")
    else:
        s = c.let(f"{s}.mean(-1, keepdim=True)", "s")
    return c.let(f"{act}({g}) * {a} * {s}")


def summed(c: Code, width: int) -> None:
    """Several projections of one hidden layer, some scaled, added up in some order; one is needed for itself too."""
    draw = c.draw
    inner = draw.number(5, 20)
    h = c.let(f"{draw.pick(*ACTS)}({c.linear('up', width, inner)}(x))")
    terms = [c.let(f"{c.linear('out', inner, width)}({h})", "y") for _ in range(draw.number(2, 4))]
    kept = terms[0]
    terms = [c.let(f"{y} * {draw.pick('0.5', '2.0', '-1.5')}", "y") if draw.chance(0.5) else y for y in terms]
    while len(terms) > 1:
        a, b = draw.some(terms, 2)
        terms = [*(y for y in terms if y not in (a, b)), c.let(draw.pick(f"{a} + {b}", f"{a}.sub({b})"), "y")]
    whole = f"{draw.pick(*ACTS)}({kept})"
    c.do(draw.pick(f"return {terms[0]} + {whole}", f"return torch.tanh({terms[0]}) * {whole}"))


def experts(c: Code, width: int) -> None:
    """A mixture of experts: every token through every expert, weighted by a router (zero for the unchosen)."""
    draw = c.draw
    count, inner = draw.number(2, 5), draw.number(5, 11)
    logits = c.let(f"{c.linear('router', width, count, False)}(x)", "logits")
    way = draw.pick("softmax", "topk", "scatter")
    if way == "softmax" or count < 3:
        weights = c.let(f"{logits}.softmax(-1)", "weights")
    elif way == "topk":
        kth = c.let(f"{logits}.topk(2, dim=-1).values[..., -1:]", "kth")
        weights = c.let(f"{logits}.masked_fill({logits} < {kth}, float('-inf')).softmax(-1)", "weights")
    else:
        c.do(f"top, chosen = torch.topk({logits}.softmax(-1), 2, dim=-1)")
        weights = c.let(f"torch.zeros_like({logits}).scatter(-1, chosen, top)", "weights")
    kind = draw.pick("list", "stacked", "batched")
    act = draw.pick(*ACTS)
    if kind == "list":
        one = f"nn.Sequential(nn.Linear({width}, {inner}), nn.GELU(), nn.Linear({inner}, {width}))"
        listed = c.attr("experts", f"nn.ModuleList({one} for _ in range({count}))")
        out = c.fresh("out")
        c.do(draw.pick(f"{out} = 0", f"{out} = torch.zeros_like(x)"))
        c.do(
            f"for i, expert in enumerate({listed}):",
            f"    {out} = {out} + expert(x) * {weights}[..., i : i + 1]",
        )
        c.do(f"return {out}")
        return
    up, down = c.param("w_up", count, width, inner), c.param("w_down", count, inner, width)
    if kind == "stacked":
        h = c.let(f"{act}(torch.einsum('btd,edf->btef', x, {up}))")
        if draw.chance(0.5):
            c.do(f"return torch.einsum('btef,efd,bte->btd', {h}, {down}, {weights})")
        else:
            out = c.let(f"torch.einsum('btef,efd->bted', {h}, {down})", "out")
            c.do(f"return ({out} * {weights}.unsqueeze(-1)).sum(2)")
        return
    flat = c.let(f"x.reshape(1, -1, {width}).expand({c.size('experts', count)}, -1, -1)", "flat")
    out = c.let(f"torch.bmm({act}(torch.bmm({flat}, {up})), {down})", "out")
    c.do(f"return ({out} * {weights}.reshape(-1, {count}).t().unsqueeze(-1)).sum(0).view(x.shape)")


def convolution(c: Code, width: int) -> None:
    """Channels inward, a convolution over the sequence, and back."""
    draw = c.draw
    groups, each = draw.number(1, 4), draw.number(2, 5)
    inner = groups * each
    kernel = draw.pick(1, 3)
    h = c.let(f"{c.linear('in_proj', width, inner)}(x)")
    h = c.let(draw.pick(f"{h}.transpose(1, 2)", f"{h}.permute(0, 2, 1)", f"{h}.mT"))
    kind = draw.pick("depthwise", "grouped", "full", "causal")
    count = {"depthwise": inner, "grouped": groups, "full": 1, "causal": inner}[kind]
    padding = kernel - 1 if kind == "causal" else kernel // 2
    made = (
        f"nn.Conv1d({inner}, {inner}, {kernel}, padding={padding}, groups={count}, bias={draw.chance(0.5)})"
    )
    h = c.let(f"{c.attr('conv', made)}({h})" + ("[..., :x.shape[1]]" if kind == "causal" else ""))
    if draw.chance(0.4):
        norm = draw.pick(
            f"nn.GroupNorm({groups}, {inner})", f"nn.GroupNorm({inner}, {inner})", f"nn.GroupNorm(1, {inner})"
        )
        h = c.let(f"{c.attr('norm', norm)}({h})")
    h = c.let(f"{draw.pick(*ACTS)}({h}).transpose(1, 2)")
    c.do(f"return {c.linear('out_proj', inner, width)}({h})")


def scan(c: Code, width: int) -> None:
    """A recurrence over the sequence, as a Python loop."""
    draw = c.draw
    inner = draw.number(5, 14)
    kind = draw.pick("gated", "state_space", "matrix", "cumulative")
    said = c.size("inner", inner)
    if kind == "gated":
        c.do(f"u, g = {c.linear('in_proj', width, 2 * inner)}(x).chunk(2, dim=-1)", "g = torch.sigmoid(g)")
        c.do(
            draw.pick(
                f"state = torch.zeros(x.shape[0], {said}, dtype=x.dtype)", "state = torch.zeros_like(u[:, 0])"
            )
        )
        c.do(
            "out = []", "for i in range(x.shape[1]):", "    state = g[:, i] * state + (1 - g[:, i]) * u[:, i]"
        )
        c.do("    out.append(state)", "y = torch.stack(out, dim=1)")
    elif kind == "state_space":
        n = draw.number(2, 4)
        u = c.let(f"{c.linear('in_proj', width, inner)}(x)", "u")
        source, wide = (u, inner) if draw.chance(0.5) else ("x", width)
        c.do(f"bc = {c.linear('x_proj', wide, 2 * n)}({source})")
        said_n = c.size("states", n)
        c.do(f"bb, cc = bc.split([{said_n}, {said_n}], dim=-1)")
        decay = c.let(f"torch.sigmoid({c.param('a_log', inner, n)})", "decay")
        c.do(f"state = x.new_zeros(x.shape[0], {said}, {said_n})", "out = []")
        c.do("for i in range(x.shape[1]):")
        c.do(f"    state = state * {decay} + {u}[:, i, :, None] * bb[:, i, None, :]")
        c.do("    out.append((state * cc[:, i, None, :]).sum(-1))")
        c.do(f"y = torch.stack(out, 1) + {u} * {c.param('d_skip', inner)}")
    elif kind == "matrix":
        heads, dim = draw.number(2, 5), draw.number(2, 3)
        inner = heads * dim
        for name in "rkv":
            value = f"{c.linear(name, width, inner)}(x).view(x.shape[0], x.shape[1], {c.size('heads', heads)}, {dim})"
            c.do(f"{name} = {value}")
        w = c.let(f"torch.sigmoid({c.param('w', heads, dim)})", "w")
        c.do("state = 0", "out = []", "for i in range(x.shape[1]):")
        c.do(f"    state = state * {w}.unsqueeze(-1) + k[:, i].unsqueeze(-1) @ v[:, i].unsqueeze(-2)")
        c.do(
            "    out.append((r[:, i].unsqueeze(-2) @ state).squeeze(-2))",
            "y = torch.stack(out, 1).flatten(2)",
        )
    else:
        h = c.let(f"{c.linear('in_proj', width, inner)}(x)")
        c.do(f"y = {h}.cumsum(1) / torch.arange(1, x.shape[1] + 1, dtype=x.dtype)[:, None]")
    if draw.chance(0.4):
        c.do(f"y = y * F.silu({c.linear('gate', width, inner)}(x))")
    c.do(f"return {c.linear('out_proj', inner, width)}(y)")


def library(c: Code, width: int) -> None:
    """torch.nn's own layers."""
    draw = c.draw
    fits = [n for n in range(2, 7) if width % n == 0]
    kind = draw.weighted(
        {"attention": 3 if fits else 0, "encoder": 2 if fits else 0, "lstm": 0.5, "gru": 0.5}
    )
    if kind == "attention":
        mha = c.attr("mha", f"nn.MultiheadAttention({width}, {draw.pick(*fits)}, batch_first=True)")
        mask = draw.pick(
            "", ", attn_mask=torch.triu(torch.ones(x.shape[1], x.shape[1], dtype=torch.bool), 1)"
        )
        c.do(
            draw.pick(f"return {mha}(x, x, x, need_weights=False{mask})[0]", f"out, _ = {mha}(x, x, x{mask})")
        )
        if not c.body[-1].startswith("return"):
            c.do("return out")
    elif kind == "encoder":
        first = draw.chance(0.5)
        sizes = f"{width}, {draw.pick(*fits)}, {draw.number(5, 13)}"
        made = f"nn.TransformerEncoderLayer({sizes}, 0.0, batch_first=True, norm_first={first})"
        c.do(f"return {c.attr('layer', made)}(x)")
    else:
        made = f"nn.{kind.upper()}({width}, {width}, batch_first=True)"
        c.do(f"return {c.attr('rnn', made)}(x)[0]")
