"""Rules of convolutions, pooling and resampling: positions are blocked, samples pass, channels are what
matters.

Channels read ``groups · rest``. Input channels of a group are contracted, groups pass (a depthwise
convolution has nothing else), and a rank calls the op with its own number of groups.
"""

from __future__ import annotations

from autotp.axes.rules.dims import aten, frozen_part, pass_but, split_groups, whole_dims
from autotp.axes.rules.registry import OpContext, make_einsum_rule, rule
from autotp.axes.term import CannotUnify, Dim


@rule(
    *aten(
        """
        conv1d conv2d conv3d convolution _convolution cudnn_convolution mkldnn_convolution conv_transpose1d
        conv_transpose2d conv_transpose3d
        """
    )
)
def convolution(op: OpContext) -> None:
    """``[n, g·i, ...], [g·o, i, ...], [g·o] -> [n, g·o, ...]``; a transposed weight is ``[g·i, o, ...]``."""
    x, weight = op.tensor("input" if "input" in op.args else "self"), op.tensor("weight")
    bias = op.tensor("bias") if op.has("bias") else None
    groups = int(op.args.get("groups", 1))
    transposed = "transpose" in str(op.node.target) or bool(op.args.get("transposed", False))
    channel = op.rank(x) - (op.rank(weight) - 2) - 1  # 0 without a batch dim
    pass_but(op, x, range(channel + 1, op.rank(x)))
    pass_but(op, weight, range(2, op.rank(weight)))
    inputs = op.shape(x)[channel] // groups
    outputs = op.out_shapes()[0][channel] // groups
    # (operand, dim, whether it holds groups, role of the rest)
    uses = [
        (x, channel, True, "i"),
        (weight, 0, True, "i" if transposed else "o"),
        (weight, 1, False, "o" if transposed else "i"),
    ]
    uses += [] if bias is None else [(bias, 0, True, "o")]
    axes = _axes(op, uses, groups, {"i": inputs, "o": outputs})
    group, i_axis, o_axis = axes
    if i_axis:
        op.contract(i_axis)
    shape = op.out_shapes()[0]
    out = [op.dims(x)[0]] * channel + [(*group, *o_axis)] + [op.whole(n) for n in shape[channel + 1 :]]
    op.out(out)
    op.linear("mul", [x, weight])
    if bias is not None:
        op.added(bias)
    if groups > 1:
        op.local("groups", lambda size: size(group))


def _axes(
    op: OpContext, uses: list[tuple[int, int, bool, str]], groups: int, rest: dict[str, int]
) -> tuple[Dim, Dim, Dim]:
    """Unify the groups and the rests over all uses; blocks all of them where that fails."""
    mark = op.solver.mark()
    try:
        group: Dim | None = None
        axis: dict[str, Dim] = {}
        for i, d, grouped, role in uses:
            own_group, own = _split(op, op.dims(i)[d], groups, rest[role]) if grouped else ((), op.dims(i)[d])
            if grouped:
                if group is not None:
                    op.solver.unify(group, own_group)
                group = own_group if group is None else group
            if role in axis:
                op.solver.unify(axis[role], own)
            axis.setdefault(role, own)
        return group or (), axis["i"], axis["o"]
    except CannotUnify:
        op.solver.undo(mark)
        group, i_axis, o_axis = (frozen_part(op, n) for n in (groups, rest["i"], rest["o"]))
        for i, d, grouped, role in uses:
            op.consume_as(i, d, (group if grouped else ()) + (i_axis if role == "i" else o_axis))
        return group, i_axis, o_axis


def _split(op: OpContext, dim: Dim, groups: int, rest: int) -> tuple[Dim, Dim]:
    if groups == 1:
        return (), dim
    if rest == 1:
        return dim, ()
    major, minor = op.solver.split(dim, [groups, rest])
    return major, minor


@rule(
    *aten(
        """
        max_pool1d max_pool2d max_pool3d max_pool1d_with_indices max_pool2d_with_indices
        max_pool3d_with_indices adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d
        """
    )
)
def pooling(op: OpContext) -> None:
    """Samples and channels pass; so in everything that resamples positions."""
    _by_position(op)


@rule(
    *aten(
        """
        avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d
        _adaptive_avg_pool2d _adaptive_avg_pool3d upsample_nearest1d upsample_nearest2d upsample_nearest3d
        _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d upsample_linear1d
        upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d _upsample_bilinear2d_aa
        _upsample_bicubic2d_aa
        """
    )
)
def linear_pooling(op: OpContext) -> None:
    """Averages and interpolations are linear."""
    op.linear("mul", [_by_position(op)])


def _by_position(op: OpContext) -> int:
    name = str(op.node.target).split(".")[1]
    spatial = next(n for n in (1, 2, 3) if f"{n}d" in name)
    i = op.tensor("self" if "self" in op.args else "input")
    keep = op.rank(i) - spatial
    passing = pass_but(op, i, range(keep, op.rank(i)))[:keep]
    op.outs([[*passing, *whole_dims(op, k)[keep:]] for k in range(len(op.out_shapes()))])
    return i


@rule("aten.pixel_shuffle", "aten.pixel_unshuffle")
def pixel_shuffle(op: OpContext) -> None:
    """``c·r·r`` channels become r × r pixels: c passes."""
    i = op.tensor("self")
    at = op.rank(i) - 3
    out = pass_but(op, i, [at + 1, at + 2])
    shape = op.out_shapes()[0]
    if "unshuffle" in str(op.node.target):
        inner = frozen_part(op, int(op.args["downscale_factor"]) ** 2)
        out[at] = (*out[at], *inner)
    else:
        squared = int(op.args["upscale_factor"]) ** 2
        channel, _ = split_groups(op, i, at, op.shape(i)[at] // squared)
        inner = frozen_part(op, squared)
        op.consume_as(i, at, (*channel, *inner))
        out[at] = channel
    out[at + 1 :] = [op.whole(n) for n in shape[at + 1 :]]
    op.out(out)
    op.linear("mul", [i])


@rule("aten.im2col", "aten.col2im")
def im2col(op: OpContext) -> None:
    """Channels read ``c · window`` on one side: c passes."""
    i = op.tensor("self")
    kernel = [int(k) for k in op.args["kernel_size"]]
    window = kernel[0] * kernel[1]
    shape = op.out_shapes()[0]
    if "im2col" in str(op.node.target):
        at = op.rank(i) - 3
        pass_but(op, i, range(at + 1, op.rank(i)))
        channel = (*op.dims(i)[at], *frozen_part(op, window))
    else:
        at = op.rank(i) - 2
        pass_but(op, i, [at + 1])
        channel, _ = split_groups(op, i, at, op.shape(i)[at] // window)
        op.consume_as(i, at, (*channel, *frozen_part(op, window)))
    op.out([*op.dims(i)[:at], channel, *(op.whole(n) for n in shape[at + 1 :])])
    op.linear("mul", [i])


@rule("aten.grid_sampler", "aten.grid_sampler_2d", "aten.grid_sampler_3d")
def grid_sampler(op: OpContext) -> None:
    """Samples and channels pass."""
    positions = len(op.args["input"].meta["val"].shape) - 2
    at, to = "hwd"[:positions], "xyz"[:positions]
    make_einsum_rule(f"nc{at}, n{to}t -> nc{to}", blocked=at + "t", linear="mul", of=(0,))(op)


@rule(
    *aten(
        """
        fft_fft fft_ifft fft_fft2 fft_ifft2 fft_fftn fft_ifftn fft_rfft fft_irfft fft_rfft2 fft_irfft2
        fft_rfftn fft_irfftn fft_hfft fft_ihfft fft_fftshift fft_ifftshift
        """
    )
)
def fft(op: OpContext) -> None:
    """Transforms some dims whole; linear."""
    i = op.tensor("self")
    given = op.args.get("dim", -1)
    sizes = op.args.get("s")
    dims = (
        list(range(op.rank(i)))
        if given is None
        else list(given)
        if isinstance(given, (list, tuple))
        else [given]
    )
    if given is None and sizes is not None:
        dims = dims[-len(sizes) :]
    at = {int(d) % op.rank(i) for d in dims}
    out = pass_but(op, i, at)
    shape = op.out_shapes()[0]
    op.out([op.whole(shape[d]) if d in at else dim for d, dim in enumerate(out)])
    op.linear("mul", [i])
