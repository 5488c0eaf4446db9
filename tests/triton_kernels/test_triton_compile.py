"""Every configuration of rnnfast/triton/configs.py compiled for sm_80, sm_90 and sm_100, without a GPU; and plans.

A compiler bug may end its process, so it has one of its own (support/triton_compile.py). A compilation takes about
1.1 s of CPU. RNNFAST_COMPILE=one, for `make test-triton-matrix`, compiles only what needs most memory of each kernel in
each kind, and the exact float32 products of WHOLE, which LLVM has failed at, each for one of the three in turn.
"""

import json
import os
import queue
import subprocess
import sys
import threading
from pathlib import Path
from typing import NamedTuple

import pytest

import rnnfast
from kernel_build.architectures import ARCHITECTURES, RESOURCE_TESTS
from rnnfast.triton import configs, plan

COMPILER = Path(__file__).parents[1] / "support" / "triton_compile.py"
LIMITS = {sm: ARCHITECTURES[sm].shared_bytes for sm in RESOURCE_TESTS}
ONE_OF_EACH = os.environ.get("RNNFAST_COMPILE") == "one"
PROCESSES = 2
ASIDE = 16  # instructions that spill before and after the loops, see configs.py


class Row(NamedTuple):
    kind: str
    cell: str
    backward: bool
    products: str
    size: int  # H
    config: plan.Config
    kernel: str


def rows_of_tables():
    """All rows, each with the largest H that it is for."""
    for (cell, backward, products), sizes in configs.WHOLE_TILES.items():
        for size, tiles in sizes.items():
            for tile in tiles:
                yield Row("whole", cell, backward, products, size, plan.Config(16, size, size, *tile), "")
    for (cell, backward, products), sizes in configs.GROUP_TILES.items():
        for tile, size in {tile: size for size, tiles in sorted(sizes.items()) for tile in tiles}.items():
            config = plan.Config(16, tile.block_h, tile.block_k or size, *tile[2:])
            yield Row("group", cell, backward, products, size, config, "")
    for (cell, backward, products), tiles in configs.STEP_TILES.items():
        for _, *tile in tiles:
            yield Row("step", cell, backward, products, 512, plan.Config(*tile), "")
            if cell == "lstm_projected":
                extra = "lstm_unproject" if backward else "lstm_project"
                yield Row("step", cell, backward, products, 512, plan.Config(*tile), extra)


def named(row: Row) -> Row:
    cell = row.cell.split("_")[0]
    return row._replace(kernel=row.kernel or f"{cell}_{'backward' if row.backward else 'forward'}")


def name_of(row: Row) -> str:
    config = row.config
    tile = f"{config.block_b}x{config.block_h}x{config.block_k}"
    words = [row.kind, row.cell, row.kernel.split("_")[1], row.products, row.size, tile, config.warps, config.stages]
    return "-".join(map(str, words))


ROWS = {name_of(row): row for row in map(named, rows_of_tables())}


def capabilities_of_rows():
    """{name: the capabilities it is compiled for}; never those where no plan takes it."""
    most = {}
    for name in sorted(ROWS, key=lambda name: ROWS[name].config.shared):
        most[ROWS[name].kind, ROWS[name].cell, ROWS[name].kernel] = name
    largest, found = set(most.values()), {}
    for turn, (name, row) in enumerate(ROWS.items()):
        places = [capability for capability, limit in LIMITS.items() if row.config.shared <= limit]
        if row.kind == "whole" and row.config.stages == 1:
            places = [80]
        delicate = row.kind == "whole" and row.products == "ieee"
        if ONE_OF_EACH:
            places = [places[turn % len(places)]] if name in largest or delicate else []
        found[name] = places
    return found


CAPABILITIES = capabilities_of_rows()


def job_of(name: str, capability: int) -> dict:
    """As the launcher of layers.py would compile it, saving for backward, with lengths, for both directions."""
    row, config = ROWS[name], ROWS[name].config
    constants = dict(
        H=row.size, P=row.size - 8 if row.cell == "lstm_projected" else row.size, D=2, RAGGED=1, SAVE=True,
        GRAD_OUTPUT=True, RELU=False, KIND=plan.KINDS[row.kind], BLOCK_B=config.block_b, BLOCK_H=config.block_h,
        BLOCK_K=config.block_k, STAGES=config.stages, UPCAST=False,
        PRECISION="ieee" if row.products == "16-bit" else row.products,
    )  # fmt: skip
    return dict(
        name=name, kernel=row.kernel, element="bf16" if row.products == "16-bit" else "fp32", step=row.kind == "step",
        cooperative=row.kind == "group", constants=constants, warps=config.warps, stages=config.stages,
        capability=capability,
    )  # fmt: skip


def compile_in_processes(jobs: list[dict], cache: Path) -> dict:
    """{(name, capability): result}; a process that ends is replaced, and its job has an error."""
    root = Path(rnnfast.__file__).parents[1]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(root)}
    environment.pop("TRITON_INTERPRET", None)
    waiting, results = queue.SimpleQueue(), {}
    for job in jobs:
        waiting.put(job)

    def work():
        process = None
        while not waiting.empty():
            try:
                job = waiting.get_nowait()
            except queue.Empty:
                break
            if process is None:
                script = [sys.executable, str(COMPILER)]
                process = subprocess.Popen(
                    script, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                )  # fmt: skip
            print(json.dumps(job), file=process.stdin, flush=True)
            line = process.stdout.readline()
            if line:
                result = json.loads(line)
            else:
                result, process = {"error": f"the compiler's process ended with {process.wait()}"}, None
            results[job["name"], job["capability"]] = result
        if process is not None:
            process.communicate()

    threads = [threading.Thread(target=work) for _ in range(PROCESSES)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.fixture(scope="module")
def compiled(request, tmp_path_factory):
    """All configurations whose tests are to run."""
    tests = [item for item in request.session.items if getattr(item, "originalname", None) == "test_configuration"]
    names = [item.callspec.params["name"] for item in tests]
    jobs = [job_of(name, capability) for name in names for capability in CAPABILITIES[name]]
    return compile_in_processes(jobs, tmp_path_factory.mktemp("triton"))


@pytest.mark.quick(1)
@pytest.mark.parametrize("name", [name for name, places in CAPABILITIES.items() if places])
def test_configuration(name, compiled):
    row = ROWS[name]
    for capability in CAPABILITIES[name]:
        result = compiled[name, capability]
        what = f"sm_{capability}: {result}"
        assert "error" not in result, what
        assert result["shared"] <= row.config.shared <= LIMITS[capability], what
        assert result["spilled_in_loops"] == 0, what
        assert result["spilled"] <= ASIDE, what
        if row.kind == "whole" and row.config.stages > 1:
            loads = {"lstm": (4, 6), "gru": (3, 6), "rnn": (1, 2)}[row.cell.split("_")[0]][row.backward]
            assert result["prefetches"] >= loads, what
        assert result["cooperative"] == (row.kind == "group"), what
        if row.kind == "group":
            assert result["barriers"] == 1 and result["releases"] == 1, what
        else:
            assert result["barriers"] == 0, what


@pytest.mark.quick(0)
def test_the_slowest_to_compile(compiled, capsys):
    slowest = sorted(compiled.values(), key=lambda result: -result.get("seconds", 0))[:5]
    with capsys.disabled():
        total = sum(result.get("seconds", 0) for result in compiled.values())
        print(f"\n{len(compiled)} compiled in {total:.0f} s of CPU; the slowest:")
        for result in slowest:
            print(f"  {result.get('seconds')} s sm_{result['capability']} {result['name']}")


A100 = plan.Device("A100", (8, 0), LIMITS[80], 108)
L40S = plan.Device("L40S", (8, 9), 101_376, 142)
RTX_4090 = plan.Device("RTX 4090", (8, 9), 101_376, 128)
H200 = plan.Device("H200", (9, 0), 232_448, 132)
B200 = plan.Device("B200", (10, 0), 232_448, 148)
T4 = plan.Device("T4", (7, 5), 65_536, 40)
GPUS = (A100, L40S, RTX_4090, H200, B200)


@pytest.mark.parametrize(
    ("cell", "backward", "hidden_size", "output_size", "batch", "products", "kinds"),
    [
        # cell, backward, H, P, batch, products, the kind on each of GPUS
        *[("lstm", backward, size, size, 1, "16-bit", "whole " * 5) for backward in (0, 1) for size in range(1, 65, 9)],
        *[("gru", 1, size, size, 1000, "tf32", "whole " * 5) for size in (1, 15, 16, 17, 64)],
        ("lstm", 0, 65, 65, 256, "16-bit", "whole group group whole whole"),
        ("lstm", 1, 128, 128, 1000, "16-bit", "whole step step whole whole"),
        ("lstm", 0, 128, 100, 256, "16-bit", "step step step whole whole"),
        ("gru", 0, 128, 128, 256, "16-bit", "whole group group whole whole"),
        ("rnn", 1, 256, 256, 1, "16-bit", "whole group group whole whole"),
        ("rnn", 0, 128, 128, 64, "tf32", "whole " * 5),
        ("lstm", 0, 128, 128, 64, "tf32", "group " * 5),
        ("rnn", 0, 129, 129, 32, "tf32", "group " * 5),
        ("lstm", 0, 64, 64, 64, "ieee", "whole " * 5),
        ("lstm", 0, 128, 128, 64, "ieee", "step " * 5),
        ("lstm", 0, 20, 20, 64, "tf32x3", "step " * 5),
        ("lstm", 0, 256, 256, 16, "16-bit", "group " * 5),
        ("lstm", 0, 512, 512, 64, "16-bit", "step group group group group"),
        ("lstm", 0, 1024, 1024, 16, "16-bit", "step group group group group"),
        ("lstm", 0, 1024, 1024, 64, "16-bit", "step " * 5),
        ("lstm", 1, 1024, 1024, 32, "16-bit", "step group group group group"),
        ("lstm", 0, 256, 100, 16, "16-bit", "step " * 5),
        ("gru", 0, 700, 700, 1, "ieee", "step " * 5),
        ("gru", 0, 1025, 1025, 1, "16-bit", "step " * 5),
    ],
)
def test_kinds(cell, backward, hidden_size, output_size, batch, products, kinds):
    plans = [plan.plan(cell, bool(backward), hidden_size, output_size, batch, 1, products, gpu) for gpu in GPUS]
    assert [chosen.kind for chosen in plans] == kinds.split()


@pytest.mark.parametrize("products", ["16-bit", "tf32", "tf32x3", "ieee"])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("cell", ["lstm", "lstm_projected", "gru", "rnn"])
def test_plans_fit(cell, backward, products):
    for hidden_size in (1, 16, 17, 33, 64, 100, 128, 200, 256, 511, 1024, 3000):
        output_size = max(1, hidden_size // 2) if cell == "lstm_projected" else hidden_size
        for gpu in GPUS:
            for batch, directions in ((1, 1), (16, 2), (33, 1), (256, 2), (10_000, 1)):
                shape = hidden_size, output_size, batch, directions, products
                chosen = plan.plan(cell.split("_")[0], backward, *shape, gpu)
                config = chosen.config
                assert config.shared <= gpu.shared, (shape, gpu, chosen)
                reasons = {reason.split(":")[0] for reason in chosen.reasons}
                assert reasons >= {"whole": set(), "group": {"whole"}, "step": {"whole", "group"}}[chosen.kind]
                if chosen.kind == "whole":
                    assert config.block_h >= hidden_size and config.block_k >= output_size
                if chosen.kind == "group":
                    programs = -(-hidden_size // config.block_h) * -(-batch // config.block_b) * directions
                    assert programs <= gpu.processors, (shape, gpu, chosen)


def test_an_older_gpu_gets_the_reason():
    reason = plan.plan("gru", False, 20, 20, 1, 1, "16-bit", T4)
    assert reason == "the kernels need compute capability 8.0 or newer, T4 has 7.5"
