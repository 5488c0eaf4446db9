"""Compiles Triton kernels without a GPU: a JSON job per line of stdin, its result on stdout; test_triton_compile.py.

A process of its own, without TRITON_INTERPRET: LLVM ends a process where it fails. Job: kernel ("lstm_forward"),
element ("bf16", "fp32"), step (whether one launch does one step), cooperative (its launch), constants (its constexpr
arguments), warps, stages, capability (80). Result: the job and `shared` bytes, `cooperative`, `registers` of a thread,
`spilled`, the loads from and stores to local memory in the machine code, `spilled_in_loops` of them, `prefetches`, the
asynchronous copies in the time loop, `barriers`, the loops that poll with an acquire, `releases`, and `seconds` of CPU;
or `error`.
"""

import importlib
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# The kernels' modules need nothing of rnnfast/__init__.py, which imports torch: 3.5 s of CPU for every process.
sys.modules["rnnfast"] = package = types.ModuleType("rnnfast")
package.__path__ = [str(Path(__file__).resolve().parents[2] / "rnnfast")]

TOOLS = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
FLOAT32 = {"c_saved", "carry_state"}  # whatever the element is
STATES = {"cx", "c_n", "grad_c_n", "grad_cx"}  # float32 where one launch does one step
INTEGERS = {"lengths": "*i64", "offsets": "*i64", "arrivals": "*i32"}
SIZES = {"steps", "batch", "rows", "first", "last", "s"}


def signature(kernel, job):
    """(types, constants, attributes) of a kernel's arguments as the launcher has them: pointers are 16-byte aligned."""
    types, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        name = parameter.name
        if parameter.is_constexpr:
            types[name], constants[(i,)] = "constexpr", job["constants"][name]
        elif name in SIZES:
            types[name] = "i32"
        else:
            wide = name in FLOAT32 or (job["step"] and name in STATES)
            types[name] = INTEGERS.get(name, "*fp32" if wide else "*" + job["element"])
            attributes[(i,)] = [["tt.divisibility", 16]]
    return types, constants, attributes


def loops(assembly: str) -> list[str]:
    """The loops of PTX: from a label to the last branch back to it."""
    lines = assembly.splitlines()
    labels = {line.split(":")[0].strip(): i for i, line in enumerate(lines) if re.match(r"\s*\$L\w+:", line)}
    ends = {}
    for i, line in enumerate(lines):
        target = re.search(r"\bbra(?:\.uni)?\s+(\$L\w+)", line)
        if target and labels.get(target[1], i) < i:
            ends[target[1]] = i
    return ["\n".join(lines[labels[label] : end]) for label, end in ends.items()]


def tool(name: str, *arguments: str) -> str:
    return subprocess.run([os.path.join(TOOLS, name), *arguments], capture_output=True, text=True, check=True).stdout


def machine_code(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = re.search(r"REG:(\d+) STACK:(\d+)", tool("cuobjdump", "-res-usage", file.name))
        local, looped = [], []
        if int(usage[2]):  # a stack may hold other things too
            code = re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", tool("cuobjdump", "-sass", file.name))
            local = [int(at, 16) for at, text in code if re.search(r"\b(?:LDL|STL)\b", text)]
            branches = [(int(at, 16), re.search(r"\bBRA\b.*0x([0-9a-f]+)", text)) for at, text in code]
            back = [(int(to[1], 16), at) for at, to in branches if to and int(to[1], 16) < at]
            looped = [at for at in local if any(start <= at <= end for start, end in back)]
    return {"registers": int(usage[1]), "spilled": len(local), "spilled_in_loops": len(looped)}


def compiled(job) -> dict:
    cell = job["kernel"].split("_")[0]
    kernel = getattr(importlib.import_module(f"rnnfast.triton.{cell}"), job["kernel"])
    types, constants, attributes = signature(kernel, job)
    source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=attributes)
    options = {"num_warps": job["warps"], "num_stages": job["stages"], "enable_fp_fusion": True}
    options |= {"launch_cooperative_grid": True} if job["cooperative"] else {}
    before = seconds()
    result = triton.compile(source, target=GPUTarget("cuda", job["capability"], 32), options=options)
    spent = seconds() - before
    found = loops(result.asm["ptx"])
    polling = [loop for loop in found if "acquire" in loop]
    return {
        "shared": result.metadata.shared,
        "cooperative": result.metadata.launch_cooperative_grid,
        **machine_code(result.asm["cubin"]),
        "prefetches": max((loop.count("cp.async.c") for loop in found), default=0),
        "barriers": sum(not any(other in loop and other != loop for other in polling) for loop in polling),
        "releases": result.asm["ptx"].count(".release."),
        "seconds": round(spent, 2),
    }


def seconds() -> float:
    both = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return sum(usage.ru_utime + usage.ru_stime for usage in both)


if __name__ == "__main__":
    for line in sys.stdin:
        job = json.loads(line)
        try:
            result = compiled(job)
        except Exception as error:
            result = {"error": f"{type(error).__name__}: {error}"[:500]}
        print(json.dumps({**job, **result}), flush=True)
