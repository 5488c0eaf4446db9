"""The package as a user gets it: symbols of the library, wheels, installations without it, what an import costs."""

import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import rnnfast
from kernel_build.sources import CPU_SOURCES
from rnnfast import _ext

ROOT = Path(__file__).parents[2]
# What each compiled file must be allowed to use: a file built with another's flags would crash on older machines.
MACROS = {
    "isa_avx2": "__AVX2__",
    "isa_avx2_vnni": "__AVXVNNI__",
    "isa_avx512": "__AVX512VL__",
    "isa_avx512_vnni": "__AVX512VNNI__",
    "isa_avx512_bf16": "__AVX512BF16__",
}


def run_python(program: str, cwd: Path, **environment: str) -> str:
    """The output of a program in a fresh interpreter that finds the rnnfast in `cwd`."""
    env = {**os.environ, "PYTHONPATH": str(cwd), **environment}
    done = subprocess.run([sys.executable, "-c", program], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def source_tree(tmp_path: Path) -> Path:
    """The files that an installation is made from, with empty stand-ins for the C++ sources, which take minutes."""
    tree = tmp_path / "tree"
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        tree.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tree)
    shutil.copytree(ROOT / "rnnfast", tree / "rnnfast", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copytree(ROOT / "kernel_build", tree / "kernel_build", ignore=shutil.ignore_patterns("__pycache__"))
    for source in CPU_SOURCES:
        path = tree / source.path
        path.parent.mkdir(parents=True, exist_ok=True)
        wanted = MACROS.get(path.stem)
        check = f"#ifndef {wanted}" if wanted else "#ifdef __AVX__"
        path.write_text(f"{check}\n#error wrong flags\n#endif\nint rnnfast_{path.stem}() {{ return 0; }}\n")
    return tree


def build_wheel(tree: Path, **environment: str) -> tuple[Path | None, str]:
    """The wheel built from `tree`, None if the build failed, and what the build printed."""
    command = [sys.executable, "setup.py", "-q", "bdist_wheel"]
    environ = {name: value for name, value in os.environ.items() if not name.startswith("RNNFAST_")}
    done = subprocess.run(command, cwd=tree, env={**environ, **environment}, capture_output=True, text=True)
    wheels = list(tree.glob("dist/*.whl"))
    return (wheels[0] if done.returncode == 0 else None), done.stdout + done.stderr


def test_symbols_of_the_library_are_torchs_stable_ones():
    library = Path(os.environ.get("RNNFAST_C_LIBRARY", ROOT / "rnnfast" / "_C.so"))
    if not library.exists():
        pytest.skip("rnnfast/_C.so is not built")
    if shutil.which("nm") is None:
        pytest.skip("nm (binutils) is missing")
    listing = subprocess.run(["nm", "-D", "--undefined-only", library], check=True, capture_output=True, text=True)
    symbols = [line.split()[-1].split("@")[0] for line in listing.stdout.splitlines()]
    # C++ names of torch (at::, c10::, torch::, caffe2::) change from release to release; its C functions do not.
    assert [name for name in symbols if re.match(r"_ZN?K?(St)?\d*.*(2at|3c10|5torch|6caffe2)", name)] == []
    assert any(name.startswith("aoti_torch_") for name in symbols)
    assert [name for name in symbols if name.startswith("Py")] == []


def test_wheel_serves_every_python_and_holds_the_library(source_tree):
    wheel, output = build_wheel(source_tree, RNNFAST_BUILD="1")
    assert wheel, output
    assert re.fullmatch(rf"rnnfast-{re.escape(rnnfast.__version__)}-py3-none-(linux|macosx)_\w+\.whl", wheel.name)
    names = zipfile.ZipFile(wheel).namelist()
    assert "rnnfast/_C.so" in names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"rnnfast"}
    metadata = zipfile.ZipFile(wheel).read(next(name for name in names if name.endswith("METADATA"))).decode()
    assert "Requires-Dist: torch>=2.11\n" in metadata
    assert "Requires-Python: >=3.10\n" in metadata


def test_no_compiler_still_gives_a_wheel_and_says_so(source_tree):
    wheel, output = build_wheel(source_tree, CXX="/no/such/compiler")
    assert wheel, output
    assert "rnnfast/_C.so" not in zipfile.ZipFile(wheel).namelist()
    assert "rnnfast: no compiled kernels in this build" in output
    assert "/no/such/compiler" in output


def test_a_failed_build_leaves_no_older_library_behind(source_tree):
    assert build_wheel(source_tree)[0]
    (source_tree / "csrc/cpu/kernels/isa_base.cpp").write_text("this is not C++\n")
    wheel, output = build_wheel(source_tree)
    assert wheel, output
    assert "rnnfast/_C.so" not in zipfile.ZipFile(wheel).namelist()


def test_rnnfast_build_1_fails_rather_than_falls_back(source_tree):
    wheel, output = build_wheel(source_tree, CXX="/no/such/compiler", RNNFAST_BUILD="1")
    assert wheel is None
    assert "/no/such/compiler" in output


def test_rnnfast_build_0_gives_a_wheel_for_any_platform(source_tree):
    wheel, output = build_wheel(source_tree, RNNFAST_BUILD="0")
    assert wheel and wheel.name.endswith("-py3-none-any.whl"), output
    assert "rnnfast: no compiled kernels in this build" in output


WORKS_WITHOUT_LIBRARY = """
import warnings, torch, rnnfast
warnings.simplefilter("ignore")
layer, twin = rnnfast.LSTM(3, 5), torch.nn.LSTM(3, 5)
twin.load_state_dict(layer.state_dict())
input = torch.randn(4, 2, 3)
assert torch.equal(layer(input)[0], twin(input)[0])
print(rnnfast._ext.failure)
print(rnnfast.backends())
"""


@pytest.mark.quick(0)
def test_works_without_the_library_and_says_why(tmp_path):
    package = shutil.copytree(ROOT / "rnnfast", tmp_path / "rnnfast", ignore=shutil.ignore_patterns("*.so"))
    assert package.exists()
    output = run_python(WORKS_WITHOUT_LIBRARY, tmp_path, RNNFAST_C_LIBRARY="")
    assert output.count("_C.so is missing") >= 2


def test_works_with_the_library_skipped_and_says_why():
    output = run_python(WORKS_WITHOUT_LIBRARY, ROOT, RNNFAST_SKIP_EXT="1")
    assert output.count("RNNFAST_SKIP_EXT") >= 2


def test_works_with_a_broken_library_and_says_why(tmp_path):
    shutil.copytree(ROOT / "rnnfast", tmp_path / "rnnfast", ignore=shutil.ignore_patterns("*.so"))
    (tmp_path / "rnnfast" / "_C.so").write_bytes(b"not a library")
    output = run_python(WORKS_WITHOUT_LIBRARY, tmp_path, RNNFAST_C_LIBRARY="")
    assert output.count("could not be loaded") >= 2


def test_import_is_light():
    program = "import sys, torch; before = set(sys.modules); import rnnfast; print(*sorted(set(sys.modules) - before))"
    added = run_python(program, ROOT).split()
    assert [name for name in added if name.startswith(("torch._dynamo", "torch._inductor", "numpy", "triton"))] == []


def test_library_is_loaded_where_it_is_built():
    if (ROOT / "rnnfast" / "_C.so").exists() and not os.environ.get("RNNFAST_SKIP_EXT"):
        assert _ext.failure is None


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_documented_commands_exist(page):
    targets = set(re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M).group(1).split())
    code = re.findall(r"`make [^`]*`|^\s*make .*$", (ROOT / page).read_text(), re.M)
    used = {word for line in code for word in re.findall(r"\bmake ([a-z][a-z0-9-]*)", line)}
    assert used and used <= targets


def test_a_changed_header_recompiles_what_includes_it_and_nothing_else(source_tree):
    def compiled(**environment: str) -> list[str]:
        return sorted(re.findall(r"compiling (csrc\S+)", build_wheel(source_tree, **environment)[1]))

    every = sorted(source.name for source in CPU_SOURCES if source.machine in (None, platform.machine()))
    header, source = source_tree / "csrc/cpu/layer.h", source_tree / "csrc/cpu/host/isa.cpp"
    header.write_text("#define ANSWER 1\n")
    source.write_text(f'#include "cpu/layer.h"\n{source.read_text().replace("return 0", "return ANSWER")}')
    assert compiled() == every
    assert compiled() == []
    header.write_text("#define ANSWER 2\n")
    assert compiled() == ["csrc/cpu/host/isa"]
    header.write_text("this is not C++\n")
    assert compiled() == compiled() == ["csrc/cpu/host/isa"], "a failure was taken for a success"
    header.write_text("#define ANSWER 2\n")
    assert compiled() == ["csrc/cpu/host/isa"]
    assert compiled(CXXFLAGS="-O0") == every


def test_the_source_distribution_holds_all_that_a_build_reads(source_tree):
    shutil.copy(ROOT / "MANIFEST.in", source_tree)
    header = source_tree / "csrc/common/cell.h"
    header.parent.mkdir()
    header.write_text("")
    command = [sys.executable, "setup.py", "-q", "sdist"]
    environment = {**os.environ, "RNNFAST_BUILD": "0"}  # no torch here: what is packed must not depend on one
    subprocess.run(command, cwd=source_tree, env=environment, check=True, capture_output=True)
    with tarfile.open(next((source_tree / "dist").glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"setup.py", "pyproject.toml", "kernel_build/sources.py", "csrc/common/cell.h"} <= names
    assert {source.path for source in CPU_SOURCES} <= names
