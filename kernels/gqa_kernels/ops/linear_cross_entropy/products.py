"""The three matrix products, whose number of rows is known on the device only.

The first `count_ptr` entries of `order_ptr` are the indices of the rows that are not ignored; if
both are None, no row is ignored. A program without such rows returns at once, so ignored rows cost
nothing and the host waits for no number. One program takes each sum, in one order, so a row has the
same bits in every run and in every batch.
"""

import triton
import triton.language as tl


@triton.jit
def num_left(count_ptr, first, num_rows):
    """How many rows from `first` on are not ignored; at most `num_rows`."""
    if count_ptr is not None:
        num_rows = tl.minimum(num_rows, tl.load(count_ptr) - first)
    return num_rows


@triton.jit
def named_rows(order_ptr, first, rows, mask):
    """The indices, among all tokens, of these rows of a chunk."""
    named = (first + rows).to(tl.int64)
    if order_ptr is not None:
        named = tl.load(order_ptr + named, mask=mask, other=0)
    return named


@triton.jit
def _add_product(a, b, total, part, step):
    """total + a · b. In float32, where adding thousands of terms one by one would lose digits,
    `part` accumulates the products of eight steps before they are added to the total."""
    if a.dtype == tl.float32:
        part = tl.dot(a, b, part, input_precision="ieee")
        is_last = step % 8 == 7
        total += tl.where(is_last, part, 0.0)
        part = tl.where(is_last, 0.0, part)
    else:
        total = tl.dot(a, b, total)
    return total, part


@triton.jit(do_not_specialize=("first", "num_rows"))
def rows_product_kernel(
    a_ptr,
    b_ptr,
    c_ptr,
    order_ptr,
    count_ptr,
    first,
    num_rows,
    a_stride,
    b_k_stride,
    b_n_stride,
    c_stride,
    K: tl.constexpr,
    N: tl.constexpr,
    A_WIDTH: tl.constexpr,
    C_WIDTH: tl.constexpr,
    A_NAMED: tl.constexpr,
    C_NAMED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """C[r, n] = Σ_k A[r, k] · B[k, n] for the rows r of a chunk; one program computes one tile.

    A_NAMED, C_NAMED: A or C has the rows of all tokens; otherwise it has those of the chunk.
    A_WIDTH, C_WIDTH: K and N; for logits the width of their rows in memory, which are padded with
    zeros, because accesses are wide only if the mask ends at a multiple of 16 bytes.
    Consecutive programs share their columns of B.
    """
    num_blocks = tl.cdiv(num_rows, BLOCK_M)
    rows = (tl.program_id(0) % num_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = (tl.program_id(0) // num_blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    limit = num_left(count_ptr, first, num_rows)
    if (tl.program_id(0) % num_blocks) * BLOCK_M >= limit:
        return
    row_mask, column_mask = rows < limit, columns < N
    steps = tl.arange(0, BLOCK_K)
    chunk_rows = rows.to(tl.int64)
    all_rows = named_rows(order_ptr, first, rows, row_mask)
    a_rows = all_rows if A_NAMED else chunk_rows
    a_ptrs = a_ptr + a_rows[:, None] * a_stride + steps[None, :]
    b_ptrs = b_ptr + columns[None, :] * b_n_stride + steps[:, None].to(tl.int64) * b_k_stride
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    part = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        a = tl.load(a_ptrs, mask=row_mask[:, None] & (steps < A_WIDTH - k)[None, :], other=0.0)
        b = tl.load(b_ptrs, mask=column_mask[None, :] & (steps < K - k)[:, None], other=0.0)
        total, part = _add_product(a, b, total, part, k // BLOCK_K)
        a_ptrs += BLOCK_K
        b_ptrs += BLOCK_K * b_k_stride
    total += part
    c_rows = all_rows if C_NAMED else chunk_rows
    c_ptrs = c_ptr + c_rows[:, None] * c_stride + columns[None, :]
    mask = row_mask[:, None] & (columns < C_WIDTH)[None, :]
    tl.store(c_ptrs, total.to(c_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=("first", "num_rows"))
def weight_product_kernel(
    dlogits_ptr,
    hidden_ptr,
    dweight_ptr,
    order_ptr,
    count_ptr,
    first,
    num_rows,
    dlogits_stride,
    hidden_stride,
    VOCAB: tl.constexpr,
    WIDTH: tl.constexpr,
    HIDDEN: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dweight[v, h] = Σ_r dlogits[r, v] · hidden[r, h] over the rows r of a chunk, in float32; with
    ADD, added to dweight. One program computes one tile.

    WIDTH: of the rows of dlogits in memory, which are padded with zeros.
    """
    num_blocks: tl.constexpr = (HIDDEN + BLOCK_N - 1) // BLOCK_N
    tokens = (tl.program_id(0) // num_blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = (tl.program_id(0) % num_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    limit = num_left(count_ptr, first, num_rows)
    if ADD and limit <= 0:
        return
    token_mask, column_mask = tokens < VOCAB, columns < HIDDEN
    ptrs = dweight_ptr + tokens[:, None] * HIDDEN + columns[None, :]
    mask = token_mask[:, None] & column_mask[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if ADD:
        total = tl.load(ptrs, mask=mask, other=0.0)
    part = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    steps = tl.arange(0, BLOCK_K)
    dlogits_ptrs = dlogits_ptr + steps[None, :].to(tl.int64) * dlogits_stride + tokens[:, None]
    for start in range(0, limit, BLOCK_K):
        rows = start + steps
        row_mask = rows < limit
        named = named_rows(order_ptr, first, rows, row_mask)
        dlogits = tl.load(
            dlogits_ptrs, mask=row_mask[None, :] & (tokens < WIDTH)[:, None], other=0.0
        )
        hidden = tl.load(
            hidden_ptr + named[:, None] * hidden_stride + columns[None, :],
            mask=row_mask[:, None] & column_mask[None, :],
            other=0.0,
        )
        total, part = _add_product(dlogits, hidden, total, part, start // BLOCK_K)
        dlogits_ptrs += BLOCK_K * dlogits_stride
    total += part
    tl.store(ptrs, total, mask=mask)
