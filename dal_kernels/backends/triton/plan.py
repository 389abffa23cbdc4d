"""How a call is laid out on a GPU: one pure function of its size, to be tested without a device."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = [
    *("JOINED", "REDUCING_WARPS", "LaunchPlan"),
    *("plan_apart", "plan_backward", "plan_backward_apart", "plan_forward", "plan_statistics", "sums_at_once"),
]

NVIDIA_WARP = 32
# Programs of 8 warps that keep a large GPU (132 multiprocessors) busy.
FILLED = 256
# A row of so many float32 exponentials, with their exponents, fits the registers of 16 warps; twice as many spill.
REGISTER_CLASSES = 16384
# Of a longer row 8 warps keep the exponents alone, and take it in tiles: 128 values a lane (not in float64).
TILED_CLASSES, TILE = 32768, 2048
# The sums of so many programs are added up by the last of them: one warp reads them in four steps, each a trip to the
# cache of some hundreds of nanoseconds, which is less than a launch of its own takes. Four times as many would be more.
JOINED = 1024
# Of rows that lie apart: values whose exponentials and exponents a lane keeps, and warps that share the classes of a
# row at most, who have registers for three quarters of that. (With 48 values ptxas spills, and saves registers by it;
# with 44, two positions of 22 classes, it does where the predicted class has a term.)
KEPT_VALUES, MOST_SHARES = 42, 16
# Of the program that adds up those of more programs, or of none, in a launch of its own.
REDUCING_WARPS = 4


@dataclass(frozen=True)
class LaunchPlan:
    """Layout of one kernel.

    Attributes:
        block: columns a program handles at a time, a power of two.
        rows: rows a program handles.
        warps: per program; of 32 lanes, or 64 on AMD, where there are half as many.
        long: rows are read in blocks, and again in the backward; otherwise they stay in registers.
        splits: programs that share a long row.
        lanes: the lanes of a warp lie over the rows first, so that few of them share a row.
        tiles: blocks of a row that stay in registers together.
        kept: of a row in registers the exponentials stay there too, beside their exponents.
        vector: neighbouring rows that lie apart which a lane takes together. More than the compiler is told of it does
            not take, and no lanes share a row then.
    """

    block: int
    rows: int
    warps: int
    long: bool = False
    splits: int = 1
    lanes: bool = False
    tiles: int = 1
    kept: bool = True
    vector: int = 1


def _power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def plan_forward(rows: int, classes: int, itemsize: int, warp_size: int = NVIDIA_WARP) -> LaunchPlan:
    """The plan for statistics, loss and gradient of (rows, classes) logits of ``itemsize`` bytes."""
    wide = 2 if itemsize == 8 else 1  # float64 takes twice the registers
    block = _power_of_two(classes)
    if wide == 1 and REGISTER_CLASSES < classes <= TILED_CLASSES:
        return LaunchPlan(block=TILE, rows=1, warps=8 * 32 // warp_size, tiles=-(-classes // TILE), kept=False)
    if classes > REGISTER_CLASSES // wide:
        return plan_statistics(rows, classes, itemsize, warp_size)
    if block <= 256:
        # 32 values a lane: few lanes share a row, so its objective is computed few times over.
        return LaunchPlan(block=block, rows=min(warp_size, warp_size * 32 // wide // block), warps=1, lanes=True)
    warps = max(1, min(16, block * wide // 1024) * 32 // warp_size)
    # A tile is 16 bytes a lane: all are whole but the last, and sums run from tile to tile.
    tile = warps * warp_size * 16 // itemsize
    return LaunchPlan(block=tile, rows=1, warps=warps, tiles=-(-classes // tile))


def plan_apart(rows: int, classes: int, itemsize: int, vector: int, warp_size: int = NVIDIA_WARP) -> LaunchPlan:
    """The plan for rows that lie over the lanes as they do in memory, up to MOST_APART_ON_GPU classes of them.

    A lane has all classes of its rows, or as many warps as it takes share them. Of each tile it has few: in a wide one
    there would be room for classes that are not there, and many tiles take the compiler minutes.

    Args:
        vector: neighbouring positions that may be read at once. A lane takes 4 bytes of them where its classes leave
            room for several rows: lanes of 2 bytes would leave half of what a warp can ask memory for.
    """
    together = min(vector, max(1, 4 // itemsize))
    shares = _power_of_two(-(-classes * together // KEPT_VALUES))
    if shares >= MOST_SHARES:
        together, shares = 1, MOST_SHARES
    block = shares * max(1, _power_of_two(-(-classes // shares)) // 16)
    # More rows a program where there are so many that their programs could not be added up by the last one.
    groups = 1
    while 2 * shares * groups <= 8 and rows > FILLED * 32 * together * groups:
        groups *= 2
    lanes = 32 * shares * groups
    return LaunchPlan(
        block=block, rows=32 * together * groups, warps=max(1, lanes // warp_size), lanes=True,
        tiles=-(-classes // block), vector=together,
    )  # fmt: skip


def plan_statistics(rows: int, classes: int, itemsize: int, warp_size: int = NVIDIA_WARP) -> LaunchPlan:
    """The plan for statistics alone, which are read in blocks whatever the length."""
    wide = 2 if itemsize == 8 else 1
    block = min(_power_of_two(classes), 8192 // wide)
    warps = max(1, block * wide // 1024 * 32 // warp_size)
    splits = 1
    # Few rows would leave most of the device idle: shares of at least one block, until it is filled twice.
    while rows * splits < FILLED and 2 * splits * block <= classes:
        splits *= 2
    return LaunchPlan(block=block, rows=1, warps=warps, long=True, splits=splits)


def plan_backward(rows: int, classes: int, itemsize: int, warp_size: int = NVIDIA_WARP) -> LaunchPlan:
    """The plan for a gradient from saved coefficients: every block of a row is on its own."""
    wide = 2 if itemsize == 8 else 1
    block = min(_power_of_two(classes), 8192 // wide)
    several = max(1, min(32, 2048 // wide // block))
    warps = max(1, block * several * wide // 2048 * 32 // warp_size)
    return LaunchPlan(block=block, rows=several, warps=warps)


def plan_backward_apart(
    rows: int, classes: int, itemsize: int, vector: int, warp_size: int = NVIDIA_WARP
) -> LaunchPlan:
    """The plan for a gradient of rows that lie apart, from saved coefficients; few programs share a row."""
    together = min(vector, max(1, 4 // itemsize))
    of_program, block = 128 * together, min(_power_of_two(classes), 8)
    splits = 1
    while rows * splits < FILLED * of_program and 2 * splits * block <= classes:
        splits *= 2
    return LaunchPlan(block=block, rows=of_program, warps=128 // warp_size, splits=splits, vector=together)


def sums_at_once(warps: int) -> int:
    """How many of the programs' sums one program reads at a time: 8 a lane, whose registers its rows took before."""
    return min(JOINED, 256 * warps)
