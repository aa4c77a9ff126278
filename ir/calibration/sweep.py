"""Replacing a weight column by column while the columns to come make up for the error (Frantar and Alistarh, 2022).

A linear layer's output error for inputs x with gram = sum x^T x is tr((W - Q) gram (W - Q)^T). Once a column is
replaced, the best the later ones can do is known in closed form; it only takes the Cholesky factor of the inverse gram
matrix (Frantar et al., 2023). What a column is replaced by is the caller's: integers (GPTQ), zeros (SparseGPT) or both.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_LARGEST_DAMP = 1.0

Project = Callable[[Tensor, int], Tensor]
Enter = Callable[[Tensor, Tensor, Tensor], None]


def sweep(
    weight: Tensor,
    gram: Tensor,
    project: Project,
    *,
    enter: Enter | None = None,
    order: Tensor | None = None,
    damp: float = 0.01,
    block: int = 128,
) -> Tensor:
    """The projected weight, [N, K], with every column chosen in the light of the errors before it.

    Columns are visited in blocks; within one, an error reaches the columns of the block at once, the others when the
    block is left.

    Args:
        weight: [N, K], fp32 or fp64.
        gram: [K, K], sum x^T x over inputs x. A column whose input is always zero is projected and influences nothing.
        project: from a column [N] as it is now and its index to what replaces it.
        enter: is shown the columns [N, B] of a block as they are now, their pivots [B] and indices [B], before the
            first of them is projected. Replacing w by q costs (w - q)^2 / pivot^2 (the saliency of SparseGPT).
        order: [K], the indices in the order of the visits; None for 0, 1, ...
        damp: what is added to the diagonal, in units of its mean; ten times as much is tried as long as the matrix is
            not positive definite.
        block: columns of a block.

    Raises:
        ValueError: the gram matrix has another shape, holds NaN or infinity, or is far from positive semidefinite.
    """
    columns = weight.shape[1]
    if order is None:
        order = torch.arange(columns, device=weight.device)
    factor = inverse_factor(checked_gram(gram, columns)[order][:, order], damp).to(weight)
    source = weight[:, order]
    result = torch.empty_like(source)
    indices = order.tolist()
    for start in range(0, columns, block):
        end = min(start + block, columns)
        current = source[:, start:end].clone()
        local = factor[start:end, start:end]
        errors = torch.empty_like(current)
        if enter is not None:
            enter(current, local.diagonal(), order[start:end])
        for offset in range(end - start):
            column = current[:, offset].clone()
            projected = project(column, indices[start + offset])
            result[:, start + offset] = projected
            errors[:, offset] = (column - projected) / local[offset, offset]
            current[:, offset + 1 :] -= torch.outer(errors[:, offset], local[offset, offset + 1 :])
        source[:, end:] -= errors @ factor[start:end, end:]
    unsorted = torch.empty_like(result)
    unsorted[:, order] = result
    return unsorted


def inverse_factor(gram: Tensor, damp: float) -> Tensor:
    """The upper triangular U, [K, K] in fp64, with U^T U the inverse of the damped gram matrix; see `sweep`."""
    matrix = gram.double().clone()
    diagonal = matrix.diagonal()  # a view
    live = diagonal > 0
    mean = diagonal[live].mean() if bool(live.any()) else diagonal.new_ones(())
    diagonal[~live] = mean
    while damp <= _LARGEST_DAMP:
        damped = matrix.clone()
        damped.diagonal().add_(damp * mean)
        # With J the reversal of all indices and J gram J = L L^T, R = J L J is upper triangular and gram = R R^T:
        # so U = R^-1, without ever forming the inverse of gram.
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not failed:
            identity = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
            factor: Tensor = torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
            return factor
        damp = max(10 * damp, 1e-8)
    raise ValueError(f"gram is not positive semidefinite: Cholesky fails with damping {damp / 10:g} of its diagonal")


def checked_gram(gram: Tensor, columns: int) -> Tensor:
    """The gram matrix [K, K] of `columns` inputs as it is.

    Raises:
        ValueError: another shape, NaN or infinity, or a negative number on the diagonal.
    """
    if gram.shape != (columns, columns):
        raise ValueError(f"gram is {list(gram.shape)}, expected {[columns, columns]}")
    if not bool(gram.isfinite().all()):
        raise ValueError("gram has NaN or infinity")
    if bool((gram.diagonal() < 0).any()):
        raise ValueError("gram is not positive semidefinite: its diagonal has negative numbers")
    return gram


def output_error(difference: Tensor, gram: Tensor) -> Tensor:
    """The summed squared error of each output, [N], when the weight is off by `difference` [N, K]: d gram d^T."""
    return (difference @ gram.to(difference) * difference).sum(-1)
