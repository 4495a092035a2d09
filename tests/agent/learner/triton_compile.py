"""Run beside test_kernels_triton: compile every kernel for a GPU that need not be there.

Prints one JSON object {kernel: number of fused multiply-adds in its PTX}.
"""

import json
import sys
from collections.abc import Iterator
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from agent.learner import compiled_triton
from agent.learner.penalty import PENALTIES

SPAN = {"start": "i64", "width": "i64", "stride": "i64", "per_run": "i64"}
NOISE = {"words": "*i32", "table": "*fp32"}
UPDATE = {
    "delta": "*fp32", "coefficients": "*fp32", **NOISE, "strength": "*fp32", "weights": "*fp32",
    "squares": "*fp64", **SPAN, "pairs": "i32",
}  # fmt: skip


def fused(kernel: Any, types: dict[str, str], constants: dict[str, Any], fuse: bool) -> int:
    signature = types | dict.fromkeys(constants, "constexpr")
    compiled = triton.compile(
        ASTSource(kernel, signature, constants),
        target=GPUTarget("cuda", 90, 32),
        options={"enable_fp_fusion": fuse},
    )
    assert compiled.asm["cubin"]
    return int(compiled.asm["ptx"].count("fma.rn"))


def cases(full: bool) -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any]]]:
    """(name, kernel, argument types, constants); without `full` one of each kernel."""
    normal = {"NORMAL": True, "BLOCKS": 128, "COLUMNS": 8}
    signs = {"NORMAL": False, "BLOCKS": 32, "COLUMNS": 128}
    leaves = {
        "out": "*i32", "words": "*i32", "start": "i64", "width": "i64", "stride": "i64",
        "count": "i64",
    }  # fmt: skip
    for runs in (False, True) if full else (True,):
        constants = {"LEAF": 1 << 16, "TILE": 1024, "RUNS": runs}
        yield f"leaves {runs}", compiled_triton.leaves, leaves, constants
    for kind, tile in {"normal": normal, "signs": signs}.items() if full else [("normal", normal)]:
        yield f"noise {kind}", compiled_triton.noise, {"out": "*fp32", **NOISE, **SPAN}, tile
        for stored in ("*fp32", "*i16", "*fp16") if full else ("*i16",):
            types = {
                "out": stored, "anchor": stored, "delta": "*fp32", "scale": "*fp32", **NOISE, **SPAN
            }  # fmt: skip
            constants = {"NOISY": True, "BF16": stored == "*i16", **tile}
            yield f"render {kind} {stored}", compiled_triton.render, types, constants
        for penalty in PENALTIES if full else ("elastic_net",):
            constants = {"PENALTY": penalty, "WEIGHTED": penalty != "none", **tile}
            yield f"update {kind} {penalty}", compiled_triton.update, UPDATE, constants


def main(full: bool) -> dict[str, int]:
    found = {}
    for name, kernel, types, constants in cases(full):
        found[name] = fused(kernel, types, constants, False)
    found["with fusion on"] = fused(kernel, types, constants, True)
    return found


if __name__ == "__main__":
    json.dump(main(full=sys.argv[1] == "full"), sys.stdout)
