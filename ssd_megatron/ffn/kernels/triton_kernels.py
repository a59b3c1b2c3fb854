"""The matmuls of the sparse feed-forward network as Triton kernels.

Shapes: T tokens, H hidden, F neurons, E experts of N neurons, K experts per token, C rows (token copies sorted by
expert, triton_routing.py). A program computes one BM x BN tile of its output in steps of BK.

Token rows are gathered by the loads, biases, activations and their slopes are applied to the sums in registers, and
each expanded row is stored once. Sums are in fp32. Rows past an expert's last are computed from some valid row and
never stored. Offsets of rows are 64 bit.
"""

import triton
import triton.language as tl

from ssd_megatron.ffn.kernels.triton_tuning import DOWN, UP, WEIGHT_GRAD, tuned


@triton.jit
def _load(pointer, mask, whole: tl.constexpr):
    """Without the mask where the tiles cover the tensor exactly."""
    if whole:
        return tl.load(pointer)
    else:
        return tl.load(pointer, mask=mask, other=0.0)


@triton.jit
def _half_tanh(pre):
    """(1 + tanh(sqrt(2 / pi) (pre + 0.044715 pre^3))) / 2, as a sigmoid."""
    return tl.sigmoid(1.5957691216057308 * pre * (1.0 + 0.044715 * pre * pre))


@triton.jit
def _act(pre, ACT: tl.constexpr):
    """phi(pre)."""
    if ACT == "relu":
        return tl.maximum(pre, 0.0)
    elif ACT == "squared_relu":
        fired = tl.maximum(pre, 0.0)
        return fired * fired
    elif ACT == "gelu":
        return 0.5 * pre * (1.0 + tl.erf(pre * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        return pre * _half_tanh(pre)
    else:
        tl.static_assert(ACT == "silu")
        return pre * tl.sigmoid(pre)


@triton.jit
def _slope(kept, ACT: tl.constexpr):
    """phi'(pre) from what was kept: phi(pre) itself where that is enough, else pre."""
    if ACT == "relu":
        return tl.where(kept > 0.0, 1.0, 0.0)
    elif ACT == "squared_relu":
        return 2.0 * tl.sqrt(kept)
    elif ACT == "gelu":
        normal = 0.3989422804014327 * tl.exp(-0.5 * kept * kept)
        return 0.5 * (1.0 + tl.erf(kept * 0.7071067811865476)) + kept * normal
    elif ACT == "gelu_tanh":
        share = _half_tanh(kept)
        return share + kept * share * (1.0 - share) * 1.5957691216057308 * (1.0 + 0.134145 * kept * kept)
    else:
        tl.static_assert(ACT == "silu")
        gate = tl.sigmoid(kept)
        return gate * (1.0 + kept * (1.0 - gate))


@triton.jit
def _rows(tile, expert, first_row, tile_row, BM: tl.constexpr):
    """Rows of a tile, and which of them are the expert's."""
    row = tl.load(tile_row + tile) + tl.arange(0, BM)
    return row, row < tl.load(first_row + expert + 1)


@triton.jit
def _halves(tile):
    """The left and the right half of a tile."""
    return tl.split(tl.permute(tl.reshape(tile, (tile.shape[0], 2, tile.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def _activate(
    sums, sums_up, row, live, n0, expert, b, w_up, b_up, pre, pre_up, hidden, N: tl.constexpr, ACT: tl.constexpr
):
    """See up; for columns from n0 on."""
    n = n0 + tl.arange(0, sums.shape[1])
    offset, stored = row.to(tl.int64)[:, None] * N + n[None, :], live[:, None] & (n < N)[None, :]
    neuron = expert.to(tl.int64) * N + tl.minimum(n, N - 1)
    if b is not None:
        sums += tl.load(b + neuron).to(tl.float32)[None, :]
    if pre is not None:
        tl.store(pre + offset, sums.to(pre.dtype.element_ty), mask=stored)
    fired = _act(sums, ACT)
    if w_up is not None:
        if b_up is not None:
            sums_up += tl.load(b_up + neuron).to(tl.float32)[None, :]
        tl.store(pre_up + offset, sums_up.to(pre_up.dtype.element_ty), mask=stored)
        fired *= sums_up
    tl.store(hidden + offset, fired.to(hidden.dtype.element_ty), mask=stored)


@triton.jit
def _activate_halves(
    sums, sums_up, row, live, n0, expert, b, w_up, b_up, pre, pre_up, hidden, N: tl.constexpr, ACT: tl.constexpr
):
    half: tl.constexpr = sums.shape[1] // 2
    first, last = _halves(sums)
    up_first, up_last = first, last
    if w_up is not None:
        up_first, up_last = _halves(sums_up)
    _activate(first, up_first, row, live, n0, expert, b, w_up, b_up, pre, pre_up, hidden, N, ACT)
    _activate(last, up_last, row, live, n0 + half, expert, b, w_up, b_up, pre, pre_up, hidden, N, ACT)


@tuned(UP, rows="BM", columns="N", depth="H")
@triton.jit(do_not_specialize=["load"])
def up(
    x, w, b, w_up, b_up, pre, pre_up, hidden,
    token, first_row, tile_expert, tile_row, load,
    H: tl.constexpr, N: tl.constexpr, ACT: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """hidden = act(x w^T + b), times (x w_up^T + b_up) where there is w_up. Stores `pre`, that before act, if given."""
    tile, n0 = tl.program_id(0) // tl.cdiv(N, BN), tl.program_id(0) % tl.cdiv(N, BN) * BN
    expert = tl.load(tile_expert + tile)
    if expert >= 0:
        row, live = _rows(tile, expert, first_row, tile_row, BM)
        n, k = n0 + tl.arange(0, BN), tl.arange(0, BK)
        neuron = expert.to(tl.int64) * N + tl.minimum(n, N - 1)
        x_ptr = x + tl.load(token + row, mask=live, other=0).to(tl.int64)[:, None] * H + k[None, :]
        w_offset = neuron[None, :] * H + k[:, None]
        w_ptr, w_up_ptr = w + w_offset, w + w_offset
        sums = tl.zeros((BM, BN), tl.float32)
        sums_up = sums
        if w_up is not None:
            w_up_ptr = w_up + w_offset
        for k0 in range(0, H, BK):
            inside = k0 + k < H
            x_RK = _load(x_ptr, inside[None, :], H % BK == 0)
            sums = tl.dot(x_RK, _load(w_ptr, inside[:, None], H % BK == 0), sums, input_precision=PRECISION)
            if w_up is not None:
                sums_up = tl.dot(
                    x_RK, _load(w_up_ptr, inside[:, None], H % BK == 0), sums_up, input_precision=PRECISION
                )
                w_up_ptr += BK
            x_ptr += BK
            w_ptr += BK
        _activate_halves(sums, sums_up, row, live, n0, expert, b, w_up, b_up, pre, pre_up, hidden, N, ACT)


@triton.jit
def _through_activation(d, row, live, n0, pre, pre_up, hidden, d_pre, d_up, N: tl.constexpr, ACT: tl.constexpr):
    """See down_grad; for columns from n0 on. Returns each row's sum of d * (outputs of the neurons)."""
    n = n0 + tl.arange(0, d.shape[1])
    offset, stored = row.to(tl.int64)[:, None] * N + n[None, :], live[:, None] & (n < N)[None, :]
    kept = tl.load((hidden if pre is None else pre) + offset, mask=stored, other=0.0).to(tl.float32)
    outputs = kept if pre is None else _act(kept, ACT)
    d_fired = d
    if pre_up is not None:
        other_half = tl.load(pre_up + offset, mask=stored, other=0.0).to(tl.float32)
        tl.store(d_up + offset, (d * outputs).to(d_up.dtype.element_ty), mask=stored)
        outputs *= other_half
        d_fired = d * other_half
    if pre is not None:
        tl.store(hidden + offset, outputs.to(hidden.dtype.element_ty), mask=stored)
    tl.store(d_pre + offset, (d_fired * _slope(kept, ACT)).to(d_pre.dtype.element_ty), mask=stored)
    return tl.sum(d * outputs, 1)


@triton.jit
def _through_halves(d, row, live, n0, pre, pre_up, hidden, d_pre, d_up, N: tl.constexpr, ACT: tl.constexpr):
    half: tl.constexpr = d.shape[1] // 2
    first, last = _halves(d)
    share = _through_activation(first, row, live, n0, pre, pre_up, hidden, d_pre, d_up, N, ACT)
    return share + _through_activation(last, row, live, n0 + half, pre, pre_up, hidden, d_pre, d_up, N, ACT)


@tuned(UP, rows="BM", columns="N", depth="H")
@triton.jit(do_not_specialize=["load", "copies"])
def down_grad(
    dy, w_out, pre, pre_up, hidden, d_pre, d_up, dgate,
    token, first_row, tile_expert, tile_row, copies, load,
    H: tl.constexpr, N: tl.constexpr, ACT: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """From the gradient of y that of the pre-activations, and each row's share in its gate's gradient.

    Where `pre` was kept, `hidden` is computed from it again and stored; else it was kept, and is read.
    dgate [tiles of N, C] holds sum(dhidden * hidden) over the neurons of each tile.
    """
    tile, n_tile = tl.program_id(0) // tl.cdiv(N, BN), tl.program_id(0) % tl.cdiv(N, BN)
    expert = tl.load(tile_expert + tile)
    if expert >= 0:
        row, live = _rows(tile, expert, first_row, tile_row, BM)
        n, k = n_tile * BN + tl.arange(0, BN), tl.arange(0, BK)
        neuron = expert.to(tl.int64) * N + tl.minimum(n, N - 1)
        dy_ptr = dy + tl.load(token + row, mask=live, other=0).to(tl.int64)[:, None] * H + k[None, :]
        w_ptr = w_out + neuron[None, :] * H + k[:, None]
        d = tl.zeros((BM, BN), tl.float32)
        for k0 in range(0, H, BK):
            inside = k0 + k < H
            dy_RK = _load(dy_ptr, inside[None, :], H % BK == 0)
            d = tl.dot(dy_RK, _load(w_ptr, inside[:, None], H % BK == 0), d, input_precision=PRECISION)
            dy_ptr += BK
            w_ptr += BK
        half: tl.constexpr = BN // 2
        d_first, d_last = _halves(d)
        n0 = n_tile * BN
        share = _through_halves(d_first, row, live, n0, pre, pre_up, hidden, d_pre, d_up, N, ACT)
        share += _through_halves(d_last, row, live, n0 + half, pre, pre_up, hidden, d_pre, d_up, N, ACT)
        if dgate is not None:
            tl.store(dgate + n_tile.to(tl.int64) * copies + row, share, mask=live)


@triton.jit
def _add_product(
    sums, a, w, row, expert, n, H: tl.constexpr, N: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """sums + a[row] @ w[neurons of the expert, n]."""
    k = tl.arange(0, BK)
    a_ptr = a + row.to(tl.int64)[:, None] * N + k[None, :]
    w_ptr = w + (expert.to(tl.int64) * N + k)[:, None] * H + n[None, :]
    for k0 in range(0, N, BK):
        inside = k0 + k < N
        a_RK = _load(a_ptr, inside[None, :], N % BK == 0)
        w_KH = _load(w_ptr, inside[:, None] & (n < H)[None, :], (N % BK == 0) and (H % BN == 0))
        sums = tl.dot(a_RK, w_KH, sums, input_precision=PRECISION)
        a_ptr += BK
        w_ptr += BK * H
    return sums


@tuned(DOWN, rows="BM", columns="H", depth="N")
@triton.jit(do_not_specialize=["load"])
def down(
    a, w, a_up, w_up, out,
    first_row, tile_expert, tile_row, load,
    H: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out [C, H] = a w, plus a_up w_up where they are given; a [C, N], w the rows of the expert's neurons."""
    tile, n0 = tl.program_id(0) // tl.cdiv(H, BN), tl.program_id(0) % tl.cdiv(H, BN) * BN
    expert = tl.load(tile_expert + tile)
    if expert >= 0:
        row, live = _rows(tile, expert, first_row, tile_row, BM)
        read = tl.minimum(row, tl.load(first_row + expert + 1) - 1)
        n = n0 + tl.arange(0, BN)
        sums = tl.zeros((BM, BN), tl.float32)
        sums = _add_product(sums, a, w, read, expert, n, H, N, BN, BK, PRECISION)
        if a_up is not None:
            sums = _add_product(sums, a_up, w_up, read, expert, n, H, N, BN, BK, PRECISION)
        offset = row.to(tl.int64)[:, None] * H + n[None, :]
        tl.store(out + offset, sums.to(out.dtype.element_ty), mask=live[:, None] & (n < H)[None, :])


@tuned(WEIGHT_GRAD, rows="N", columns="H", depth="load")
@triton.jit(do_not_specialize=["load"])
def weight_grad(
    d, source, dw,
    token, first_row, load,
    H: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """dw[neurons of the expert] = d[its rows]^T source[their tokens]; zeros for an expert without rows."""
    tile, n_tiles = tl.program_id(0), tl.cdiv(H, BN)
    m_tile = tile // n_tiles
    expert = m_tile // tl.cdiv(N, BM)
    m, n = m_tile % tl.cdiv(N, BM) * BM + tl.arange(0, BM), tile % n_tiles * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    first, end = tl.load(first_row + expert), tl.load(first_row + expert + 1)
    sums = tl.zeros((BM, BN), tl.float32)
    # Tokens are read one step ahead of the rows they name: a chain of two loads would stop the pipelining.
    tokens = tl.load(token + first + k, mask=first + k < end, other=0)
    for row0 in range(first, end, BK):
        row = row0 + k
        live = (row < end)[:, None]
        d_RM = tl.load(d + row.to(tl.int64)[:, None] * N + m[None, :], mask=live & (m < N)[None, :], other=0.0)
        source_ptr = source + tokens.to(tl.int64)[:, None] * H + n[None, :]
        source_RH = tl.load(source_ptr, mask=live & (n < H)[None, :], other=0.0)
        tokens = tl.load(token + row + BK, mask=row + BK < end, other=0)
        sums = tl.dot(tl.trans(d_RM), source_RH, sums, input_precision=PRECISION)
    offset = (expert.to(tl.int64) * N + m)[:, None] * H + n[None, :]
    tl.store(dw + offset, sums.to(dw.dtype.element_ty), mask=(m < N)[:, None] & (n < H)[None, :])


@triton.jit
def bias_grad(d, db, first_row, N: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """db[neurons of the expert] = sum of d over its rows."""
    expert, n = tl.program_id(0), tl.program_id(1) * BN + tl.arange(0, BN)
    first, end = tl.load(first_row + expert), tl.load(first_row + expert + 1)
    sums = tl.zeros((BM, BN), tl.float32)
    for row0 in range(first, end, BM):
        row = row0 + tl.arange(0, BM)
        inside = (row < end)[:, None] & (n < N)[None, :]
        sums += tl.load(d + row.to(tl.int64)[:, None] * N + n[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(db + expert.to(tl.int64) * N + n, tl.sum(sums, 0).to(db.dtype.element_ty), mask=n < N)


@triton.jit
def gather_sum(expanded, row_of_copy, out, H: tl.constexpr, K: tl.constexpr, BN: tl.constexpr):
    """out[token] = sum of the rows of its copies, those computed elsewhere left out."""
    token, n = tl.program_id(0).to(tl.int64), tl.program_id(1) * BN + tl.arange(0, BN)
    sums = tl.zeros((BN,), tl.float32)
    for copy in tl.static_range(K):
        row = tl.load(row_of_copy + token * K + copy).to(tl.int64)
        sums += tl.load(expanded + row * H + n, mask=(row >= 0) & (n < H), other=0.0).to(tl.float32)
    tl.store(out + token * H + n, sums.to(out.dtype.element_ty), mask=n < H)
