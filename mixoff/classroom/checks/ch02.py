"""Exercises of notebooks/02_vram_arithmetic.ipynb."""

from mixoff.classroom.checks.machinery import Check

MIXTRAL_NUMBERS = {
    "layers": 32, "width": 4096, "expert_width": 14336, "experts": 8, "shared": 0, "heads": 32, "kv_heads": 8,
    "head_dim": 128, "vocab": 32000, "tables": 2,
}  # fmt: skip


def count(n: dict) -> tuple:
    """What is asked for."""
    experts = n["layers"] * (n["experts"] + n["shared"]) * 3 * n["width"] * n["expert_width"]
    attention = n["layers"] * 2 * n["width"] * n["head_dim"] * (n["heads"] + n["kv_heads"])
    return experts, attention, n["tables"] * n["vocab"] * n["width"]


# ten numbers from a configuration -> parameters of experts, attention, embeddings
parameters = Check(
    (
        ((MIXTRAL_NUMBERS,), (45_097_156_608, 1_342_177_280, 262_144_000)),
        ((MIXTRAL_NUMBERS | {"tables": 1},), (45_097_156_608, 1_342_177_280, 131_072_000)),
        (
            (MIXTRAL_NUMBERS | {"layers": 48, "width": 2048, "expert_width": 768, "experts": 128, "kv_heads": 4},),
            (28_991_029_248, 905_969_664, 131_072_000),
        ),
        (
            (MIXTRAL_NUMBERS | {"layers": 1, "width": 2048, "expert_width": 1408, "experts": 64, "shared": 2},),
            (570_949_632, 20_971_520, 131_072_000),
        ),
    ),
    slips={
        "Shared experts count too: E + S.": lambda n: count(n | {"shared": 0}),
        "A table of embeddings that input and output share counts once: see `tables`.": lambda n: count(
            n | {"tables": 2}
        ),
        "A head's width is head_dim: it need not be width over heads.": lambda n: count(
            n | {"head_dim": n["width"] / n["heads"]}
        ),
    },
)

# (parameters per part, bits per weight of each part) -> bytes
stored_nbytes = Check(
    (
        (((8,), (16,)), 16),
        (((10, 3), (3, 4)), 5.25),
        (((100, 20, 4), (4, 8, 16)), 78),
        (((45_097_156_608, 1_342_177_280, 262_144_000), (4.25, 4.25, 16)), 25_195_184_128),
    ),
    slips={
        "These are bits: a byte has eight.": lambda counts, bits: sum(n * b for n, b in zip(counts, bits, strict=True)),
        "Whole division drops the remainder: use `/`.": lambda counts, bits: sum(
            n * b // 8 for n, b in zip(counts, bits, strict=True)
        ),
        "Whole division drops the remainder: `/`.": lambda counts, bits: (
            sum(n * b for n, b in zip(counts, bits, strict=True)) // 8
        ),
    },
)

# (layers, key-value heads, width of a head, tokens) -> bytes in 16 bits
kv_nbytes = Check(
    (((32, 8, 128, 1), 131_072), ((32, 8, 128, 4096), 2**29), ((1, 1, 64, 10), 2560)),
    slips={
        "Half of it: keys *and* values, and two bytes per number.": lambda layers, heads, width, tokens: (
            2 * layers * heads * width * tokens
        )
    },
)
