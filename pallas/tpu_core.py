"""What the TPU kernels know of a core."""

LANES = 128
SUBLANES = 8
# What a program may take of a core's vector memory, by our own count, which leaves out temporaries:
# v4 has 16 MiB, v5p 64 and v5e and v6e 128.
BUDGETS = (14 * 2**20, 40 * 2**20, 90 * 2**20)
VMEM_BYTES = 120 * 2**20


def round_up(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple


def largest_divisor(number: int, limit: int) -> int:
    return max(d for d in range(1, number + 1) if number % d == 0 and d <= max(limit, 1))
