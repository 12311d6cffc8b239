"""What Triton makes of the kernels for each chip, and how near a card comes to its memory: tables in docs/kernels.md.

    python benchmarks/triton_table.py                      compiles for sm_75 to sm_90, no GPU needed
    python benchmarks/triton_table.py --measure            times products on this machine's card next to its bandwidth
    python benchmarks/triton_table.py --measure --tiles    other tiles too, for mixoff/kernels/triton/tiles.py

    python benchmarks/triton_table.py --hold               writes what tests hold the kernels to: triton_resources.json

`--json` prints one object, `--all` compiles every combination (minutes), `--few` some. With TRITON_INTERPRET=1,
`--measure` runs small shapes in Triton's interpreter on the CPU: a rehearsal, whose times mean nothing.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

import _interpreter
import _table
from kernel_table import cold_weights, timed
from mixoff.kernels.triton import products, strided
from mixoff.kernels.triton.tiles import ROWS, Tile, tile
from mixoff.planning.probe import device_seconds
from mixoff.quantize.layout import packed_nbytes
from mixoff.quantize.tensor import QTensor

HELD = Path(__file__).with_name("triton_resources.json")  # by release of triton, then by case
SHAPES = {"linear": (4096, 14336), "gated": (28672, 4096), "dequantize": (4096, 14336)}  # Mixtral-8x7B
STRIDED = ("strided", "strided_weights")  # kernels for the published checkpoint's layout
PARTS = ("codes", "scales", "zeros_at", "grid_scales", "grid_zeros", "numbers")  # pointers that they take
POINTERS = {"fp16": "*fp16", "bf16": "*i16", "fp32": "*fp32"}
REGISTERS = 65536  # of a multiprocessor
GB = 1e9
LAUNCHES = 50  # calls of a run on a card


@dataclass(frozen=True)
class Chip:
    """What a kernel may use of a multiprocessor (NVIDIA's programming guide), and one card (NVIDIA's data sheets)."""

    sm: int
    warps: int
    card: str
    multiprocessors: int
    clock_Hz: float
    memory_Bps: float

    @property
    def instructions_s(self) -> float:
        """Of all threads: four schedulers a multiprocessor start one instruction of a warp each, every cycle."""
        return 4 * 32 * self.multiprocessors * self.clock_Hz


CHIPS = (
    Chip(75, 32, "T4", 40, 1.59e9, 320e9),
    Chip(80, 64, "A100 40GB", 108, 1.41e9, 1555e9),
    Chip(86, 48, "RTX 3060", 28, 1.78e9, 360e9),
    Chip(89, 48, "RTX 4090", 128, 2.52e9, 1008e9),
    Chip(90, 64, "H100 SXM", 132, 1.83e9, 3350e9),
)


@dataclass(frozen=True)
class Case:
    """One kernel for one chip. wide: whole blocks whose neighbours are loaded together, the usual case; or a matrix
    across outputs that begins at a multiple of 16 bytes. each: of several experts, whose addresses are multiples of it.
    """

    sm: int
    kernel: str
    bits: int
    group: int
    rows: int
    dtype: str
    wide: bool = True
    each: int = 0


@dataclass(frozen=True)
class Cubin:
    """What was compiled. stack: bytes of spilled registers a thread; barriers, rounds: in the code, and those in every
    round of the longest loop; loads: how many of each width in bytes; per_weight: instructions of that loop for each
    weight."""

    registers: int
    shared: int
    stack: int
    barriers: int
    rounds: int
    loads: dict[int, int]
    per_weight: float | None


def every_case() -> Iterator[Case]:
    """All bits, rows and dtypes for every chip."""
    chips, dtypes = [chip.sm for chip in CHIPS], ("fp16", "bf16", "fp32")
    for sm, kernel, bits, rows, dtype in itertools.product(chips, ("linear", "gated"), (2, 3, 4, 8), ROWS, dtypes):
        yield Case(sm, kernel, bits, 64, rows, dtype)


def cases() -> Iterator[Case]:
    """What the table has."""
    for chip in CHIPS:
        dtype = "fp16" if chip.sm == 75 else "bf16"
        yield Case(chip.sm, "gated", 2, 32, 1, dtype)
        yield Case(chip.sm, "linear", 2, 32, 4, dtype)
    yield Case(75, "linear", 2, 32, 1, "fp32")
    yield from (Case(75, "linear", bits, 64, 1, "fp16") for bits in (4, 3, 8))
    yield from SPECIAL


def few_cases() -> Iterator[Case]:
    """What a test has time for: sm_75 and sm_80 above all, and one kernel for each of the others."""
    yield Case(75, "gated", 2, 32, 1, "fp16")
    yield Case(75, "linear", 3, 64, 1, "fp16")
    yield Case(80, "linear", 2, 32, 4, "bf16")
    yield from (Case(sm, "linear", 4, 64, 1, "bf16") for sm in (86, 89, 90))
    yield from SPECIAL


SPECIAL = (
    Case(75, "linear", 2, 32, 1, "bf16"),  # a dtype that the chip lacks
    Case(75, "linear", 2, 32, 1, "fp16", wide=False),
    Case(75, "gated", 2, 32, 1, "fp16", each=16),
    Case(75, "linear", 2, 32, 1, "fp32", each=16),
    Case(75, "dequantize", 2, 32, 1, "fp16"),
    Case(75, "strided", 2, 16, 1, "fp16"),  # the published checkpoint's layout: experts in 2 bits, attention in 4
    Case(80, "strided", 2, 16, 2, "bf16"),
    Case(75, "strided", 2, 16, 1, "fp16", wide=False),
    Case(75, "strided", 4, 64, 2, "fp16"),
    Case(80, "strided_weights", 2, 16, 1, "bf16"),
    *(Case(sm, "rotate", 2, 32, 1, "fp32") for sm in (75, 80, 90)),
)


# Compiling ------------------------------------------------------------------------------------------------------------


def constants(case: Case) -> tuple[dict, dict]:
    """Constants and options of a launch, as `triton_products` and `triton_strided` pass them."""
    if case.kernel == "rotate":
        return {"COUNT": products.ROTATED}, {"num_warps": 4, "enable_fp_fusion": True}
    if case.kernel in STRIDED:
        given = strided.settings(case.bits, case.group, case.rows)
        if case.kernel == "strided_weights":
            given |= {"BW": strided.WEIGHT_WORDS, "num_warps": strided.WEIGHT_WARPS}
    else:
        given = block_constants(case)
    options = {name: given.pop(name) for name in ("num_warps", "enable_fp_fusion")}
    given |= {"ROWS": case.rows, "KIND": case.dtype, "OUT": case.dtype, "WIDE": case.wide, "EACH": case.each}
    wanted = getattr(products.loops(), case.kernel).arg_names
    return {name: value for name, value in given.items() if name in wanted}, options


def block_constants(case: Case) -> dict:
    """Tile, bits, group and options of a kernel for the store's own layout."""
    outputs = SHAPES[case.kernel][0] // (2 if case.kernel == "gated" else 1)
    chosen = tile(case.sm, case.rows, outputs)
    given = products.settings(QTensor.empty((1, case.group), case.bits, case.group), chosen)
    if case.kernel == "dequantize":
        given |= {"BG": products.DEQUANTIZED_GROUPS, "num_warps": products.DEQUANTIZED_WARPS}
    return given | {"BN": chosen.BN}


def compile_case(case: Case) -> Cubin:
    """Compile without a GPU, for arguments such as those of Mixtral's shapes: multiples of 16, but for odd places."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function, (given, options) = getattr(products.loops(), case.kernel), constants(case)
    kinds = dict.fromkeys(PARTS, "*i32") | {"image": "*i64" if case.each else "*u8"}
    kinds |= {"x": "*fp32" if case.dtype == "fp32" else "*i32", "out": POINTERS[case.dtype]}
    odd = ("T", "count", "numbers", *(() if case.wide else PARTS), *(("image",) if case.each else ()))
    if case.kernel == "gated":
        kinds["out"] = "*fp32"
    signature = {name: "constexpr" if name in given else kinds.get(name, "i32") for name in function.arg_names}
    even = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(function.arg_names)
        if name not in given and name not in odd
    }
    source = ASTSource(fn=function, signature=signature, constexprs=given, attrs=even)
    compiled = triton.compile(source, target=GPUTarget("cuda", case.sm, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        usage, code = tool("cuobjdump", "-res-usage", file.name), tool("nvdisasm", "-c", file.name)
    weights = weights_of_round(case, given, 32 * options["num_warps"])
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    loop = longest_loop(code)
    counted = barriers(code.splitlines()), barriers(loop)
    per_weight = None if weights is None else round(len(loop) / weights, 2)
    return Cubin(registers, compiled.metadata.shared, stack, *counted, load_widths(code), per_weight)


def case_name(row: dict) -> str:
    """A row of the table as a key.

    >>> case_name(asdict(Case(75, "linear", 2, 32, 1, "fp16", wide=False)))
    'sm_75 linear 2-bit g32 fp16 x1 odd'
    """
    name = "sm_{sm} {kernel} {bits}-bit g{group} {dtype} x{rows}".format_map(row)
    return name + " each" * bool(row["each"]) + " odd" * (not row["wide"])


def used(row: dict) -> str:
    """What a row's kernel uses of a multiprocessor."""
    told = "{registers} registers, {stack} B spilled, {shared} B shared, {barriers} barriers, {rounds} per round"
    return told.format_map(row)


def hold(rows: Iterable[dict]) -> None:
    """Write what these kernels use into HELD, for the release of triton that is installed."""
    import triton

    held = json.loads(HELD.read_text()) if HELD.exists() else {}
    held[triton.__version__] = {case_name(row): used(row) for row in rows}
    HELD.write_text(json.dumps(held, indent=2, sort_keys=True) + "\n")


def weights_of_round(case: Case, given: dict, threads: int) -> float | None:
    """Weights that a thread computes in a round of the main loop; None of a kernel that has none."""
    if case.kernel == "strided":
        return given["P"] * given["BW"] * 32 / case.bits / threads
    return given["BG"] * given["BN"] * case.group / threads if case.kernel in ("linear", "gated") else None


def tool(name: str, *arguments: str) -> str:
    """The output of one of NVIDIA's tools that come with triton."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def load_widths(code: str) -> dict[int, int]:
    """How many loads from global memory take how many bytes a thread, in disassembled code.

    >>> load_widths("LDG.E.128.SYS R4, [R2] ; LDG.E R1, [R2] ; @P0 LDG.E.U16.SYS R1, [R2]")
    {2: 1, 4: 1, 16: 1}
    """
    widths = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
    found = Counter()
    for parts in re.findall(r"\bLDG((?:\.\w+)*)", code):
        found[next((widths[part] for part in parts.split(".") if part in widths), 4)] += 1
    return dict(sorted(found.items()))


def longest_loop(code: str) -> list[str]:
    """Instructions of the longest loop, in disassembled code: between a label and a jump back to it."""
    labels, instructions, longest = {}, [], []
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(instructions)
        if re.match(r"\s+/\*[0-9a-f]{4,}\*/", line):
            instructions.append(line)
        jump = re.search(r"\bBRA\b.*`\((\.L_\w+)\)", line)
        if jump and jump[1] in labels:
            longest = max(longest, instructions[labels[jump[1]] :], key=len)
    return longest


def barriers(lines: Iterable[str]) -> int:
    """How many of these instructions are barriers.

    >>> barriers(["/*0a0*/ BAR.SYNC.DEFER_BLOCKING 0x0 ;", "/*0b0*/ FADD R1, R2, R3 ;"])
    1
    """
    return sum(bool(re.search(r"\bBAR\.", line)) for line in lines)


def warps(cubin: Cubin, chip: Chip, of_program: int) -> int:
    """Warps that a multiprocessor holds at once: registers come in portions of 256 a warp."""
    each = -(-cubin.registers * 32 // 256) * 256
    return min(chip.warps, REGISTERS // each) // of_program * of_program


def compile_table(chosen: Iterable[Case]) -> list[dict]:
    """Compiles, prints a row each, and returns them."""
    names = ["kernel", "chip", "weights", "rows", "dtype", "registers", "warps", "shared, B", "spilled, B", "barriers"]
    print(_table.head(*names, "loads, bytes: count"))
    rows = []
    for case in chosen:
        cubin, chip = compile_case(case), next(chip for chip in CHIPS if chip.sm == case.sm)
        held = warps(cubin, chip, constants(case)[1]["num_warps"])
        rows.append(asdict(case) | asdict(cubin) | {"warps": held})
        name = case.kernel if case.wide else f"{case.kernel}, odd {'place' if case.kernel in STRIDED else 'width'}"
        name += ", several" * bool(case.each)
        cells = [name, f"sm_{case.sm}", f"{case.bits}-bit g{case.group}", case.rows, case.dtype, cubin.registers]
        cells += [f"{held} of {chip.warps}", cubin.shared, cubin.stack, cubin.barriers]
        cells += [", ".join(f"{count} of {width} B" for width, count in cubin.loads.items())]
        print(_table.line(cells), flush=True)
    return rows


def floor_table(rows: list[dict]) -> list[dict]:
    """What binds one row of activations: memory, or instructions, for an expert of Mixtral-8x7B. All modelled."""
    nbytes = packed_nbytes((28672, 4096), 2, 32) + packed_nbytes((4096, 14336), 2, 32)
    weights = 3 * 14336 * 4096
    names = ["card", "instructions per weight", "memory floor, us", "instruction floor, us", "what binds"]
    print("\n" + _table.head(*names))
    floors = []
    for chip in CHIPS:
        found = next(r for r in rows if (r["sm"], r["kernel"], r["bits"], r["rows"]) == (chip.sm, "gated", 2, 1))
        memory, issued = nbytes / chip.memory_Bps, weights * found["per_weight"] / chip.instructions_s
        binds = "memory" if memory > issued else "instructions"
        cells = [chip.card, found["per_weight"], f"{1e6 * memory:.0f}", f"{1e6 * issued:.0f}", binds]
        print(_table.line(cells))
        floors.append({"card": chip.card, "memory_floor_s": memory, "instruction_floor_s": issued, "binds": binds})
    return floors


# Measuring on a card --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bench:
    """Where products are timed and how: a card, or a rehearsal in the interpreter, with tiny shapes and no meaning."""

    device: torch.device
    name: str
    shapes: tuple[tuple[str, tuple[int, int]], ...]
    cold_nbytes: int  # weights rotate through so many bytes, more than any last cache has
    read_nbytes: int
    rows: tuple[int, ...]
    warm_up: int
    runs: int

    def seconds(self, fn: Callable[[int], object]) -> float:
        """Of the fastest of `runs` calls, after those of the warm-up; `fn` gets the number of the call.

        On a card a run is the mean of LAUNCHES calls, queued while the card spins.
        """
        count = itertools.count()
        on_card = self.device.type == "cuda"
        once = (lambda _: device_seconds(lambda: fn(next(count)), LAUNCHES)) if on_card else (lambda i: timed(fn, i))
        return _table.best(once, self.runs, self.warm_up)

    def read_Bps(self) -> float:
        """What a plain sum reads: the measured limit of products."""
        memory = torch.ones(self.read_nbytes // 4, device=self.device)
        return self.read_nbytes / self.seconds(lambda _: memory.sum())

    def nominal_Bps(self) -> float | None:
        """Bandwidth on the data sheet, from the clock and width of the memory, where torch tells them."""
        if self.device.type != "cuda":
            return None
        told = torch.cuda.get_device_properties(self.device)
        clock, width = getattr(told, "memory_clock_rate", 0), getattr(told, "memory_bus_width", 0)
        return 2 * clock * 1e3 * width / 8 or None


def bench() -> Bench:
    """This machine's card, or the rehearsal under TRITON_INTERPRET=1; exits with the way out where there is neither."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        _interpreter.mend()
        products.DEVICES = ("cpu",)
        shapes = (("linear", (16, 64)), ("gated", (256, 64)))
        return Bench(torch.device("cpu"), "Triton's interpreter, a rehearsal", shapes, 1, 1 << 20, (1,), 0, 1)
    if products.loops() is None:
        sys.exit("triton is not installed: pip install 'mixoff[triton]'")
    if not torch.cuda.is_available():
        sys.exit("no CUDA card here: run this where one is, or with TRITON_INTERPRET=1 as a rehearsal on the CPU")
    device = torch.device("cuda", torch.cuda.current_device())
    shapes = (("linear", (4096, 4096)), ("linear", (4096, 14336)), ("gated", (28672, 4096)))
    return Bench(device, torch.cuda.get_device_name(device), shapes, 256 << 20, 1 << 30, (1, 2, 4, 8), 1, 8)


def random_weights(on: Bench, shape: tuple[int, int], bits: int, group: int) -> list[QTensor]:
    """Cold weights on the device that is measured."""
    return [w.to(on.device) for w in cold_weights(shape, bits, group, on.cold_nbytes)]


def measure(every_tile: bool) -> dict:
    """Times products, prints a table, and returns all of it."""
    on = bench()
    read, nominal, chip = on.read_Bps(), on.nominal_Bps(), products.chip(on.device)
    dtype = torch.bfloat16 if chip >= 80 else torch.float16
    told = f", {nominal / GB:.0f} on its data sheet" if nominal else ""
    print(f"{on.name}, sm_{chip}: a sum reads {read / GB:.0f} GB/s (measured){told}\n")
    names = ["product", "weights", "rows", "tile", "us (measured)", "floor, us (modelled)", "GB/s"]
    print(_table.head(*names, "share of the sum's"))
    rows = []
    for (kernel, shape), (bits, group), count in itertools.product(on.shapes, ((2, 32), (4, 64)), on.rows):
        weights = random_weights(on, shape, bits, group)
        x = torch.randn(count, shape[1], device=on.device).to(dtype)
        for chosen in tiles(kernel, shape, chip, count, every_tile):
            run = products.linear if kernel == "linear" else lambda x, w: products.gated(x, w, (w.image, 0), 1)
            products.tile = lambda *_, chosen=chosen: chosen
            took = on.seconds(lambda i, run=run, x=x, ws=weights: run(x, ws[i % len(ws)]))
            row = {"product": kernel, "shape": shape, "bits": bits, "group": group, "rows": count}
            row |= {"tile": asdict(chosen), "measured_s": took, "nbytes": weights[0].nbytes}
            rows.append(row | {"modelled_floor_s": weights[0].nbytes / read})
            print(measured_row(rows[-1], read), flush=True)
    print(f"\nWeights rotate through {on.cold_nbytes >> 20} MiB; times are the best of {on.runs} runs.")
    if on.device.type != "cuda":
        print("This was a rehearsal on the CPU: its times mean nothing.")
    return {"device": on.name, "sm": chip, "read_Bps": read, "nominal_Bps": nominal, "rows": rows}


def tiles(kernel: str, shape: tuple[int, int], chip: int, count: int, every: bool) -> list[Tile]:
    """The table's tile, and its neighbours where they are asked for."""
    own = tile(chip, products.rows_together(count), shape[0] // (2 if kernel == "gated" else 1))
    if not every:
        return [own]
    shapes = [(16, 32, 4), (32, 16, 4), (64, 8, 4), (32, 32, 8), (16, 16, 2)]
    return [replace(own, BN=BN, BG=BG, warps=count, U=U) for BN, BG, count in shapes for U in (1, 2, 4)]


def measured_row(row: dict, read: float) -> str:
    """A line of the table."""
    rate, size = row["nbytes"] / row["measured_s"], "x".join(map(str, row["shape"]))
    form = " ".join(f"{name}{value}" for name, value in row["tile"].items())
    cells = [f"{row['product']} {size}", f"{row['bits']}-bit g{row['group']}", row["rows"], form]
    cells += [f"{1e6 * row['measured_s']:.0f}", f"{1e6 * row['modelled_floor_s']:.0f}", f"{rate / GB:.0f}"]
    return _table.line([*cells, f"{rate / read:.0%}"])


def main() -> None:
    """Compile or measure, and print."""
    parser = _table.parser(__doc__)
    parser.add_argument("--measure", action="store_true", help="time products on this machine's card")
    parser.add_argument("--tiles", action="store_true", help="with --measure: other tiles too")
    parser.add_argument("--all", action="store_true", help="compile every combination")
    parser.add_argument("--few", action="store_true", help="compile a few combinations, as a test does")
    parser.add_argument("--hold", action="store_true", help=f"write {HELD.name}")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    arguments = parser.parse_args()
    output = sys.stdout
    if arguments.json:
        sys.stdout = sys.stderr
    if arguments.hold:
        found = {"compiled": compile_table(dict.fromkeys((*cases(), *few_cases())))}
        hold(found["compiled"])
    elif arguments.measure:
        found = measure(arguments.tiles)
    else:
        rows = compile_table(few_cases() if arguments.few else every_case() if arguments.all else cases())
        found = {"compiled": rows, "floors": [] if arguments.all or arguments.few else floor_table(rows)}
    if arguments.json:
        print(json.dumps(found), file=output)


if __name__ == "__main__":
    main()
