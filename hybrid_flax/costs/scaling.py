"""How a training step's time would grow from few chips to many: on paper, nothing is measured.

A step of data-parallel training is modelled from what its compiled program counts: operations,
bytes to and from memory, and the bytes of gradients that all chips add up. The rest is assumed:

- The chips reach a fixed share of their datasheet's speeds (`Assumed`), at any batch.
- Operations and memory traffic overlap fully, so that the slower of the two counts; communication
  overlaps with neither.
- Per step, memory traffic has a part that is the same for any batch (the state is read and
  written, float32 gradients likewise) and one that is proportional to the images.
- Gradients are added up by reduce-scatter and all-gather around rings that use every link of a
  chip at once; between slices each chip passes on its own share. No latency is counted.
- The input pipeline keeps up, and a batch that memory does not hold is accumulated at no cost.
"""

from typing import Any, NamedTuple

from hybrid_flax.costs.chips import CHIPS, Chip

GIGABIT = 1e9 / 8


class Network(NamedTuple):
    """Datasheet figures of what connects chips, in bytes per second that one chip can send."""

    within: float  # a slice: ICI, NVLink
    between: float | None  # slices, a chip's share of its host's network; None: not published
    chips: int  # of the largest slice
    source: str


_GOOGLE = "docs.cloud.google.com/tpu/docs/"
NETWORKS = {
    "v4": Network(2400 * GIGABIT, None, 4096, "arXiv:2304.01433: six links of 50 GB/s"),
    "v5e": Network(1600 * GIGABIT, 6400 * GIGABIT / 256, 256, _GOOGLE + "v5e"),
    "v5p": Network(4800 * GIGABIT, 50 * GIGABIT, 6144, _GOOGLE + "v5p"),
    "v6e": Network(3200 * GIGABIT, 25600 * GIGABIT / 256, 256, _GOOGLE + "v6e"),
    "h200": Network(450e9, 400 * GIGABIT, 8, "NVIDIA DGX H200: NVLink and one NIC for each GPU"),
}


class Assumed(NamedTuple):
    """Shares of datasheet speeds that programs are assumed to reach."""

    flops: float = 0.5
    memory: float = 0.8
    network: float = 0.8


ASSUMED = Assumed()


class Work(NamedTuple):
    """A training step's work, counted in its program."""

    flops_per_image: float
    bytes_per_image: float  # to and from memory
    bytes_per_step: float  # to and from memory, on each chip, for any batch
    reduced_bytes: float  # gradients and statistics that all chips add up


class Times(NamedTuple):
    """Seconds of a step."""

    compute: float
    memory: float
    within: float  # slices
    between: float

    @property
    def step(self) -> float:
        return max(self.compute, self.memory) + self.within + self.between


def work_of(found: dict[str, Any]) -> Work:
    """Derives it from the figures of `plan` for one slice that only splits the images."""
    images, state = found["batch_per_chip"], found["bytes_of_state"]
    fixed = 2 * sum(state.values()) + 2 * state["params"]
    reduced = found["collectives"].get("within", {}).get("all-reduce", {"bytes": 0})
    return Work(
        flops_per_image=found["flops_per_chip"] / images,
        bytes_per_image=max(0, found["memory_traffic"] - fixed) / images,
        bytes_per_step=fixed,
        reduced_bytes=reduced["bytes"],
    )


def step_times(
    work: Work,
    chips: int,
    images_per_chip: float,
    chip: Chip,
    network: Network,
    assumed: Assumed = ASSUMED,
) -> Times | None:
    """Models a step; None where the network between slices would be needed and is not known."""
    slices = -(-chips // network.chips)
    inner = chips / slices
    within = 2 * (inner - 1) / inner * work.reduced_bytes / network.within
    between = 0.0
    if slices > 1:
        if network.between is None:
            return None
        share = work.reduced_bytes / inner
        between = 2 * (slices - 1) / slices * share / network.between
    return Times(
        compute=images_per_chip * work.flops_per_image / (assumed.flops * chip.flops),
        memory=(images_per_chip * work.bytes_per_image + work.bytes_per_step)
        / (assumed.memory * chip.bandwidth),
        within=within / assumed.network,
        between=between / assumed.network,
    )


def scale(
    work: Work, batch_size: int, images_per_chip: int, chip: Chip, network: Network
) -> dict[str, list[dict[str, float]]]:
    """Tabulates {"strong", "weak"} scaling: a row for 8, 16, … 1024 chips.

    Strong scaling keeps `batch_size`, down to one image per chip; weak `images_per_chip`.
    `efficiency` is images per second and chip, beside those of 8 chips.
    """
    counts = [2**power for power in range(3, 11)]
    strong = [(n, batch_size / n) for n in counts if n <= batch_size]
    weak = [(n, float(images_per_chip)) for n in counts]
    return {
        name: _rows(work, cases, chip, network)
        for name, cases in (("strong", strong), ("weak", weak))
    }


def of_plan(found: dict[str, Any], chip: str) -> dict[str, list[dict[str, float]]]:
    """Calls `scale` with the figures of `plan`; `chip` is "v5e", "h200" or another of NETWORKS."""
    kind = "NVIDIA H200" if chip == "h200" else f"TPU {chip}"
    batch, each = found["batch_size"], found["batch_per_chip"]
    return scale(work_of(found), batch, each, CHIPS[kind], NETWORKS[chip])


def _rows(
    work: Work, cases: list[tuple[int, float]], chip: Chip, network: Network
) -> list[dict[str, float]]:
    rows: list[dict[str, float]] = []
    for chips, images in cases:
        if (times := step_times(work, chips, images, chip, network)) is None:
            break
        speed = images / times.step
        first = rows[0]["images_per_second"] / rows[0]["chips"] if rows else speed
        rows.append(
            {
                "chips": chips,
                "slices": -(-chips // network.chips),
                "images_per_chip": images,
                "step_milliseconds": times.step * 1e3,
                "exchange_milliseconds": (times.within + times.between) * 1e3,
                "images_per_second": speed * chips,
                "efficiency": speed / first,
            }
        )
    return rows
