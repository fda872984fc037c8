"""Choosing the codes of one layer: nearest, GPTQ, and cyclic coordinate descent, all on the layer's least squares.

A layer with weight W [out, k] sees quantized inputs X^ [k, n] where the FP32 network sees X. We want levels u (codes
with the zero-point subtracted) and one scale s per row that minimise || Y - s u X^ ||^2 with Y = W X: FP32 targets on
quantized inputs, so each layer also compensates for the errors of earlier layers ("asymmetric" reconstruction). Only
the Gram form is kept: H = X^ X^T [groups, k, k] and B = Y X^T [out, k]; a row's loss is s^2 u H u - 2 s u B + constant.
Centring both (subtracting the means) leaves the bias free; its best value is then mean(Y) - s u mean(X^), which is
empirical bias correction (Nagel et al. 2019, section 4.2) solved together with the rounding.

nearest  Round to nearest (RTN), the plain method.
gptq     Frantar et al. 2023, algorithm 1: columns one by one, the error spread over those left (by H's inverse).
cd       GPTQ's codes, then cyclic coordinate descent: u_j <- clip(round(u_j + r_j / H_jj)), r = B / s - u H, until no
         code moves (QuantEase, Behdin et al. 2023; CDQuant, Nair & Suggala 2024), in turn with the best scale for the
         codes, s = u B / u H u. The loss never rises. Several ranges a channel are tried side by side, at 1 and 2 bits
         with several zero-points each.
Depthwise layers are one k = 9 problem per channel, solved for all channels at once.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from network import Op
from quantization import Grid, aside, make_grid, nearest_level, round_scale

METHODS = ("nearest", "gptq", "cd")
# An input whose variance is below this share of its mean square counts as constant (rounding errors reach 2.4e-6).
CONSTANT = 1e-5
HALF_BITS = 2  # up to so many, zero-points half a step beside the range's are tried too: levels around 0, none on it
BLOCK = 32  # columns whose error is propagated at once by one matrix product


@dataclass(frozen=True)
class Moments:
    """Sums over n positions of one layer, float64: x [groups, k], y [out], xx [groups, k, k], yx [out, k], where x are
    quantized inputs and y FP32 results without bias."""

    n: int
    x: Tensor
    y: Tensor
    xx: Tensor
    yx: Tensor

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(*(getattr(self, f) + getattr(other, f) for f in ("n", "x", "y", "xx", "yx")))


def moments(op: Op, x: Tensor, y: Tensor, kernel: tuple[int, ...]) -> Moments:
    """Sums for one batch: x [N, in, h, w] the quantized inputs, y [N, out, h', w'] the FP32 results without bias."""
    if op.depthwise:
        rows = torch.cat([taps(op, x, kernel), y.contiguous().unsqueeze(2)], 2).flatten(3).flatten(0, 1)
        gram = (rows @ rows.transpose(1, 2)).unflatten(0, y.shape[:2]).double().sum(0)  # [channels, k + 1, k + 1]
        sums = rows.sum(2).unflatten(0, y.shape[:2]).double().sum(0)
        return Moments(y.numel() // y.shape[1], sums[:, :-1], sums[:, -1], gram[:, :-1, :-1], gram[:, -1, :-1])
    if y.ndim == 4:
        y = y.permute(0, 2, 3, 1).reshape(-1, y.shape[1])
        x = x if kernel == (1, 1) else taps(op, x, kernel).flatten(1, 2)
        x = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
    sums = (x.sum(0, keepdim=True), y.sum(0), (x.T @ x).unsqueeze(0), y.T @ x)
    return Moments(len(x), *(s.double() for s in sums))


def taps(op: Op, x: Tensor, kernel: tuple[int, ...]) -> Tensor:
    """[N, channels, kh * kw, h', w']: what each tap of the kernel sees at every output position."""
    pad, stride = op.padding, op.stride
    x = F.pad(x, (pad,) * 4).contiguous()
    height, width = ((side - k) // stride + 1 for side, k in zip(x.shape[2:], kernel, strict=True))
    views = [
        x[:, :, i : i + (height - 1) * stride + 1 : stride, j : j + (width - 1) * stride + 1 : stride]
        for i in range(kernel[0])
        for j in range(kernel[1])
    ]
    return torch.stack(views, 2)


@dataclass(frozen=True)
class Problem:
    """The least squares of one layer: h [groups, k, k], b [out, k], weight [out, k] (the FP32 one), all float64."""

    h: Tensor
    b: Tensor
    weight: Tensor

    def loss(self, u: Tensor, scale: Tensor) -> Tensor:
        """The squared error of each row up to a constant, [..., out]; u: [..., out, k] integers, scale: [..., out]."""
        return scale**2 * (times_h(u, self.h) * u).sum(-1) - 2 * scale * (u * self.b).sum(-1)


@dataclass(frozen=True)
class Candidates:
    """Grids of A ranges for every row, float64 [A, out]: scale, lowest and highest level in steps (zero-point taken
    off)."""

    scale: Tensor
    low: Tensor
    high: Tensor


def times_h(u: Tensor, h: Tensor) -> Tensor:
    """u H for rows u [..., out, k]: one H for all rows (groups = 1), or one each."""
    return u @ h[0] if len(h) == 1 else torch.einsum("...ck,ckj->...cj", u, h)


def make_problem(weight: Tensor, sums: Moments, centred: bool, damping: float = 0.01) -> Problem:
    """Damping adds a share of H's mean diagonal, pulling towards the FP32 weight; without it, dead inputs leave H
    singular."""
    rows = weight.flatten(1).double()
    h, b = sums.xx / sums.n, sums.yx / sums.n
    if centred:
        x, y = sums.x / sums.n, sums.y / sums.n
        # An input that varies less than float32 sums can resolve is constant: the bias absorbs it and its codes have no
        # effect.
        least = CONSTANT * h.diagonal(dim1=1, dim2=2)
        h = h - x.unsqueeze(2) * x.unsqueeze(1)
        varies = h.diagonal(dim1=1, dim2=2) > least
        h = h * varies.unsqueeze(2) * varies.unsqueeze(1)
        b = (b - y.unsqueeze(1) * x.expand(len(b), -1)) * varies
    # Subtracting the means leaves rounding errors proportional to them; these set the minimum damping.
    noise = 1e-6 * sums.xx.diagonal(dim1=1, dim2=2).sum(1) / sums.n
    pull = damping * h.diagonal(dim1=1, dim2=2).mean(1) + noise + 1e-8
    h = h + torch.diag_embed(pull.unsqueeze(1).expand(-1, h.shape[-1]))
    return Problem(h, b + pull.unsqueeze(1) * rows, rows)


def bias_correction(weight: Tensor, sums: Moments) -> Tensor:
    """[out]: what to add to the FP32 bias so that the layer's mean result is that of the FP32 network."""
    rows = weight.flatten(1).double()
    return ((sums.y - (rows * sums.x.expand(len(rows), -1)).sum(1)) / sums.n).float()


def nearest(problem: Problem, grids: Candidates) -> Tensor:
    """Codes, zero-point taken off, float64 [A, out, k]."""
    beside = aside(-grids.low.unsqueeze(2))
    u = nearest_level(problem.weight / grids.scale.unsqueeze(2), beside)
    return torch.clamp(u, grids.low.unsqueeze(2), grids.high.unsqueeze(2))


def gptq(problem: Problem, grids: Candidates) -> Tensor:
    """Codes, zero-point taken off, float64 [A, out, k]: columns by falling diagonal of H, from the optimum B H^-1.

    The error of a block of columns reaches the columns behind it in one product, as in the paper's section 3.3.
    """
    h, (count, out) = problem.h, grids.scale.shape
    k = h.shape[-1]
    order = h.diagonal(dim1=1, dim2=2).argsort(1, descending=True)  # [groups, k]
    h = h.gather(1, order.unsqueeze(2).expand(-1, -1, k)).gather(2, order.unsqueeze(1).expand(-1, k, -1))
    b = problem.b.gather(1, order.expand(out, -1))
    lower = torch.linalg.cholesky(h)
    optimum = torch.cholesky_solve(b.T.unsqueeze(0) if len(h) == 1 else b.unsqueeze(2), lower)
    optimum = optimum[0].T if len(h) == 1 else optimum.squeeze(2)
    upper = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True).float()
    w = optimum.float().expand(count, -1, -1).clone()
    scale, low, high = grids.scale.float(), grids.low.float(), grids.high.float()
    u, errors, beside = torch.empty_like(w), torch.empty_like(w), aside(-low)
    for start in range(0, k, BLOCK):
        stop = min(start + BLOCK, k)
        for j in range(start, stop):
            u[..., j] = torch.clamp(nearest_level(w[..., j] / scale, beside), low, high)
            errors[..., j] = (w[..., j] - u[..., j] * scale) / upper[:, j, j]
            w[..., j:stop] -= errors[..., j, None] * upper[:, j, j:stop]
        block = errors[..., start:stop]
        if stop < k:
            w[..., stop:] -= times_h(block, upper[:, start:stop, stop:])
    return torch.empty_like(u).scatter_(2, order.expand(count, out, -1), u).double()


def descend(problem: Problem, u: Tensor, grids: Candidates, cycles: int) -> Tensor:
    """Cyclic coordinate descent from u [A, out, k]; stops when a whole cycle moves nothing. Returns new codes."""
    h = problem.h.float()
    low, high, beside = grids.low.float(), grids.high.float(), aside(-grids.low.float())
    residual = (problem.b / grids.scale.unsqueeze(2) - times_h(u, problem.h)).float()  # r = B / s - u H
    # Columns become the first dimension, so that one code of all rows lies together: [k, A, out], H [k, k, 1, groups].
    u, residual = (t.float().permute(2, 0, 1).contiguous() for t in (u, residual))
    columns = h.permute(1, 2, 0).unsqueeze(2).contiguous()
    step = 1 / h.diagonal(dim1=1, dim2=2).T  # [k, groups]
    k = len(u)
    for _ in range(cycles):
        before = u.clone()
        for start in range(0, k, BLOCK):
            stop = min(start + BLOCK, k)
            for j in range(start, stop):
                new = torch.clamp(nearest_level(u[j] + residual[j] * step[j], beside), low, high)
                residual[start:stop].addcmul_(columns[j, start:stop], new - u[j], value=-1)
                u[j] = new
            if k > BLOCK:
                change = u[start:stop] - before[start:stop]
                for part in (slice(0, start), slice(stop, k)):
                    residual[part] -= reached(h[:, part, start:stop], change)
        if torch.equal(u, before):
            break
    return u.permute(1, 2, 0).double()


def reached(h: Tensor, change: Tensor) -> Tensor:
    """[p, A, out]: the effect on other columns of a change [b, A, out] to a block of codes; h [groups, p, b]."""
    if len(h) == 1:
        return (h[0] @ change.flatten(1)).view(-1, *change.shape[1:])
    return torch.einsum("gpb,bag->pag", h, change)


def whole(x: Tensor, shared: bool) -> Tensor:
    """x [A, out]; where all rows share one grid, their sum in place of each."""
    return x.sum(-1, keepdim=True).expand_as(x) if shared else x


def best_scale(problem: Problem, u: Tensor, grids: Candidates, shared: bool = False) -> Candidates:
    """Each row's least squares scale for its codes, where that (as float16) lowers the row's loss; shared: of all rows
    together."""
    power, along = (times_h(u, problem.h) * u).sum(-1), (u * problem.b).sum(-1)
    new = round_scale(whole(along, shared) / whole(power, shared).clamp(min=1e-30)).double()
    better = whole(problem.loss(u, new), shared) < whole(problem.loss(u, grids.scale), shared)
    return Candidates(torch.where(better, new, grids.scale), grids.low, grids.high)


def best_rows(problem: Problem, u: Tensor, grids: Candidates, shared: bool = False) -> tuple[Tensor, Candidates]:
    """For every row the candidate with the least loss, for all together where `shared`: A becomes 1."""
    best = whole(problem.loss(u, grids.scale), shared).argmin(0, keepdim=True)  # [1, out]
    chosen = Candidates(*(t.gather(0, best) for t in (grids.scale, grids.low, grids.high)))
    return u.gather(0, best.unsqueeze(2).expand(-1, -1, u.shape[2])), chosen


def round_rows(
    problem: Problem, grids: Candidates, method: str, fit_scale: bool, shared: bool = False, rounds: int = 3
) -> tuple[Tensor, Candidates]:
    """(codes with the zero-point taken off [1, out, k], grids [1, out]): the best candidate of each row, or of all rows
    where they share a grid. ValueError for a method that is none of METHODS."""
    if method not in METHODS:
        raise ValueError(f"rounding method {method!r}; expected one of {', '.join(METHODS)}")
    if method == "nearest":
        return best_rows(problem, nearest(problem, grids), grids, shared)
    u = gptq(problem, grids)
    if method == "gptq":
        return best_rows(problem, u, grids, shared)
    plain = nearest(problem, grids)
    worse = problem.loss(u, grids.scale) > problem.loss(plain, grids.scale)
    u = descend(problem, torch.where(worse.unsqueeze(2), plain, u), grids, cycles=2)
    u, grids = best_rows(problem, u, best_scale(problem, u, grids, shared) if fit_scale else grids, shared)
    for _ in range(rounds):
        u = descend(problem, u, grids, cycles=6)
        grids = best_scale(problem, u, grids, shared) if fit_scale else grids
    return u, grids


def candidates(weight: Tensor, grid: Grid, symmetric: bool, shares: tuple[float, ...]) -> Candidates:
    """`grid` and, given `shares`, grids over shrunken ranges and with other zero-points."""
    rows = weight.flatten(1) if grid.scale.ndim else weight.reshape(1, -1)
    low, high = rows.amin(1), rows.amax(1)
    grids = [grid]
    if shares:
        grids += [make_grid(grid.bits, low * share, high * share, symmetric) for share in shares]
        moves = (0.0, -0.5, 0.5) if grid.bits <= HALF_BITS and not symmetric else (0.0,)
        grids = [replace(g, zero_point=(g.zero_point + z).clamp(0, grid.highest)) for z in moves for g in grids]
    zero_points = torch.stack([g.zero_point.double().expand(len(weight)) for g in grids])
    scales = torch.stack([g.scale.double().expand(len(weight)) for g in grids])
    return Candidates(scales, -zero_points, grid.highest - zero_points)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Runs the block on one thread: in long loops of small operations on a busy machine, threads wait much longer than
    they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def round_weight(
    weight: Tensor, sums: Moments, grid: Grid, method: str, centred: bool, symmetric: bool, shares: tuple[float, ...]
) -> tuple[Tensor, Grid]:
    """(codes uint8 of weight's shape, grid) by `method`. cd also fits ranges and scales."""
    problem = make_problem(weight, sums, centred)
    grids = candidates(weight, grid, symmetric, shares if method == "cd" else ())
    with one_thread():
        u, chosen = round_rows(problem, grids, method, fit_scale=method == "cd", shared=not grid.scale.ndim)
    codes = (u[0] - chosen.low[0].unsqueeze(1)).to(torch.uint8).reshape(weight.shape)
    channels = slice(None) if grid.scale.ndim else 0
    return codes, Grid(grid.bits, chosen.scale[0, channels].float(), -chosen.low[0, channels].float())
