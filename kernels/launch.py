"""How the kernels that fxpress generates are launched: tiles and grids for a number of rows and columns."""

import torch
import triton
import triton.language as tl

TILE = 1024  # elements of a tile, where rows are short enough
LOOP = 4096  # columns of a tile that a row takes several of


def launch_tiles(kernel, rows, columns, *arguments):
    """Launch a kernel whose programs are independent of one another.

    Args:
        kernel: it takes `arguments`, and INDEX, ROWS, COLS: the type of its indices and the tile of a program.
        rows, columns: what the tiles cover.
    """
    if rows * columns == 0:
        return
    wide = min(triton.next_power_of_2(columns), TILE)
    tall = min(triton.next_power_of_2(rows), max(1, TILE // wide))
    grid = (triton.cdiv(rows, tall), triton.cdiv(columns, wide))
    kernel[grid](*arguments, INDEX=index_type(arguments), ROWS=tall, COLS=wide, num_warps=4)


def launch_rows(kernel, rows, columns, *arguments, looped=False):
    """Launch a kernel each of whose programs has whole rows, in one tile or in a loop over tiles of LOOP columns."""
    if rows == 0:
        return
    wide = triton.next_power_of_2(max(columns, 1))
    wide = min(wide, LOOP) if looped else wide
    tall = min(triton.next_power_of_2(rows), max(1, TILE // wide))
    warps = 4 if wide * tall <= 2048 else 8 if wide <= 8192 else 16
    kernel[(triton.cdiv(rows, tall),)](*arguments, INDEX=index_type(arguments), ROWS=tall, COLS=wide, num_warps=warps)


def arch_of(device):
    """The compute capability of a device, 90 for sm_90; 80 where there is no GPU."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def index_type(arguments):
    """int32 where it reaches every element of the tensors among some arguments, else int64."""
    reach = 0
    for item in arguments:
        if isinstance(item, torch.Tensor):
            reach = max(reach, sum((size - 1) * stride for size, stride in zip(item.shape, item.stride(), strict=True)))
    return tl.int32 if reach < 2**31 - 2**16 else tl.int64
