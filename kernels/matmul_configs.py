"""How products are computed: blocks, parts of K, loads and precision, by the sizes, the dtype and the architecture."""

import torch

from .launch import arch_of

FIRST_CONFIGS = {}  # what `first_config` found, by its arguments


def first_config(M, N, K, dtype, device, batch, precision, tma, sums):
    """The best guess of `matmul_configs` for a device, remembered; as for sm_80 where there is no GPU."""
    key = (M, N, K, dtype, device, batch, precision, tma, sums)
    if key not in FIRST_CONFIGS:
        if len(FIRST_CONFIGS) >= 4096:  # lengths may grow without end
            FIRST_CONFIGS.clear()
        FIRST_CONFIGS[key] = matmul_configs(M, N, K, dtype, arch_of(device), batch, precision, tma, sums)[0]
    return FIRST_CONFIGS[key]


def dot_precision(precision, dtype, weight_dtype, device):
    """What to ask of tl.dot for x of one dtype and a weight of another, which the kernel casts to that of x.

    On sm_100 Triton takes tf32 for "ieee" where an operand is made of narrower numbers (its issue 10176), as if the
    other operand were of so few bits too: there it is "tf32x3", which has nearly all of float32.
    """
    wrong = precision == "ieee" and dtype == torch.float32 != weight_dtype and 100 <= arch_of(device) < 120
    return "tf32x3" if wrong else precision


def tma_takes(x, w):
    """Whether TMA can load blocks of x [M, K] and w [N, K], or of batches of one: rows contiguous, 16 bytes aligned."""
    if x.dtype != w.dtype:
        return False
    size = x.element_size()
    for matrix in (x, w):
        rows, columns = matrix.shape[-2:]
        step, one = matrix.stride()[-2:]
        if one != 1 or step <= 0 or step * size % 16 or matrix.data_ptr() % 16:
            return False
        if not matrix.numel() == rows * columns > 0:
            return False
    return True


def matmul_configs(M, N, K, dtype, arch, batch=1, precision="ieee", tma=False, sums=128):
    """Configurations of `matmul` for x [batch, M, K] and w [batch, N, K] on sm_`arch`, the best guess first.

    A configuration is a dict: BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, SPLIT (parts of K, combined by a second kernel), TMA
    (only where `tma` says that `tma_takes` x and w), PROGRAMS (that go over all tiles; 0: one for each tile), num_warps
    and num_stages. None asks for more shared memory or
    registers than there are. They are ordered by a model of the time: the tiles that the busiest multiprocessor
    computes, what it loads for them, and what all of them load. A thread keeps at most `sums` sums.
    """
    size = torch.empty((), dtype=dtype, device="meta").element_size()
    scalar = dtype == torch.float32 and precision == "ieee"  # no tensor cores
    # float8_e4m3 where there is no such format comes as bytes, and is float16 in registers.
    bytes_as_half = dtype == torch.uint8 or (dtype == torch.float8_e4m3fn and arch < 89)
    if dtype == torch.float8_e4m3fn and 90 <= arch < 100:
        sums //= 2  # those of 128 products each are kept beside
    # wgmma and tcgen05 read their operands from shared memory; Triton has no tcgen05 for integers before 3.9.
    from_shared = not scalar and 90 <= arch < 120 and (arch < 100 or dtype != torch.int8)
    unaligned = K * size % 16 != 0
    # By the oldest architecture that has it: multiprocessors, bytes of shared memory, and in a microsecond the bytes
    # from memory, the bytes of one multiprocessor from the L2 cache, its products in 16 bits and in plain float32.
    machines = {
        80: (108, 163 * 1024, 1.9e6, 4.5e4, 1.4e6, 0.9e5),
        86: (84, 99 * 1024, 0.9e6, 3e4, 0.9e6, 2e5),
        90: (132, 227 * 1024, 4e6, 5.5e4, 3.7e6, 2.5e5),
        100: (148, 227 * 1024, 7.5e6, 6e4, 7.6e6, 2.5e5),
        120: (170, 99 * 1024, 1.7e6, 3e4, 1.2e6, 3e5),
    }
    processors, shared, memory_rate, cache_rate, tensor_rate, scalar_rate = machines[
        max((known for known in machines if known <= arch), default=80)
    ]
    rate = (
        scalar_rate
        if scalar
        else tensor_rate * (1 if bytes_as_half else 2 / size) / (3 if precision == "tf32x3" else 1)
    )
    # BLOCK_M, BLOCK_N, bytes of BLOCK_K, warps, stages, part of the rate that is reached
    tiles = (
        [(16, 64, 128, 4, 3, 0.3), (32, 64, 64, 4, 3, 0.6), (64, 64, 64, 4, 3, 0.8), (64, 128, 64, 8, 3, 0.9)]
        if scalar
        else [
            (16, 32, 64, 4, 4, 0.05),
            (16, 32, 256, 4, 4, 0.1),
            (16, 64, 256, 4, 4, 0.15),
            (16, 128, 128, 4, 4, 0.2),
            (32, 64, 128, 4, 4, 0.25),
            (32, 128, 128, 4, 4, 0.35),
            (64, 64, 32, 4, 4, 0.3),
            (64, 64, 64, 4, 4, 0.4),
            (64, 64, 128, 4, 4, 0.5),
            (64, 128, 128, 4, 4, 0.65),
            (128, 64, 128, 4, 4, 0.65),
            (64, 256, 128, 8, 3, 0.7),
            (128, 128, 64, 8, 4, 0.75),
            (128, 128, 128, 8, 3, 0.8),
            (128, 128, 128, 4, 4, 0.85),
            (128, 128, 128, 4, 3, 0.85),  # two at once: one computes while another stores
            (128, 256, 64, 8, 4, 0.95),
            (128, 256, 128, 8, 3, 1.0),
        ]
    )
    found = []
    for block_m, block_n, depth, warps, stages, reached in tiles:
        block_k = depth // size
        if block_k < (32 if size == 1 else 16):  # what tl.dot takes
            continue
        if max(stages * (block_m + block_n) * block_k * size, block_m * block_n * 4) > shared:
            continue
        # Half of a thread's 255 registers may be sums by default; where operands are there too, of a lesser depth.
        if block_m * block_n * (1 if from_shared else depth * (2 if bytes_as_half else 1) / 64) > sums * 32 * warps:
            continue
        # Rows that are not aligned are loaded an element at a time, each with its address; others suit wide blocks.
        if unaligned:
            if block_m * block_n + 2 * (block_m + block_n) * block_k > 80 * 32 * warps:
                continue
        elif depth < (128 if from_shared else 64):
            continue
        # More than half of such a tile would be outside, and there is a smaller one.
        if (block_m > 16 and block_m >= 2 * M) or (block_n > 64 and block_n >= 2 * N):
            continue
        count = -(-M // block_m) * -(-N // block_n) * batch
        for split in (1, 2, 4, 8, 16):
            # Parts are for tiles too few to go round; tiles of half the size come first.
            if split > 1 and (
                count * split > 2 * processors or 4 * split * block_k > K or block_m * block_n > 64 * 32 * warps
            ):
                break
            busiest = -(-count * split // processors) / split
            products = busiest * block_m * block_n * K / (rate * reached)
            loads = busiest * (min(block_m, M) + min(block_n, N)) * K * size / cache_rate
            bytes_moved = batch * ((M + N) * K + M * N) * size + (split > 1) * 8 * split * batch * M * N
            time = max(products, loads, bytes_moved / memory_rate) + busiest * split + (3 if split > 1 else 0)
            names = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP_M", "SPLIT", "TMA", "PROGRAMS", "num_warps", "num_stages")
            ways = [(False, 0)]
            if tma and split == 1 and arch >= 90 and not scalar:
                ways = [(True, 0), (False, 0)]
                # A program for each multiprocessor hides the end of a tile behind the start of the next one. It keeps
                # the results in shared memory beside. Whether that is faster is for measurements to say.
                stored = stages * (block_m + block_n) * block_k * size + block_m * block_n * (2 if size == 2 else 4)
                if arch < 100 and block_m >= 64 and count > processors and stored <= shared:
                    ways.insert(1, (True, processors))
            for described, programs in ways:
                values = (block_m, block_n, block_k, 8, split, described, programs, warps, stages)
                found.append((time, dict(zip(names, values, strict=True))))
    found.sort(key=lambda pair: pair[0])
    return [config for _, config in found]
