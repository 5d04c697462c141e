# SPDX-License-Identifier: Apache-2.0
"""What an installation may and may not bring along: names, weak symbols, libraries, pins."""

import importlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PATH = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))


def run(*command: object, cwd: Path | None = None, **env: str) -> str:
    words = [str(c) for c in command]
    env = os.environ | {"PATH": PATH} | env
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=600, env=env)
    if done.returncode != 0:
        pytest.fail(f"{' '.join(words)}\n{done.stdout}{done.stderr}")
    return done.stdout


# ---- names ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["kernels", "bench"])
def test_packaging_no_top_level_name(name: str) -> None:
    """PyPI has a package `kernels` that transformers probes for; ours must not answer in its place."""
    assert importlib.util.find_spec(name) is None


@pytest.mark.parametrize("name", ["rlkern.kernels", "rlkern.bench"])
def test_packaging_mapped_packages(name: str) -> None:
    assert importlib.import_module(name).__name__ == name


def test_packaging_import_leaves_triton_alone(tmp_path: Path) -> None:
    """A stand-in for triton that would be seen if rlkern imported it; torch alone is the yardstick."""
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("")
    code = "import sys, torch; before = 'triton' in sys.modules; import rlkern; print(before, 'triton' in sys.modules)"
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    before, after = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=path).split()
    assert after == before


# ---- the installed distribution, which is the content of the wheel it came from --------------------------------------
@pytest.fixture(scope="module")
def installed() -> importlib.metadata.Distribution:
    try:
        return importlib.metadata.distribution("rlkern")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("rlkern is imported from a tree, not installed: `make test` installs it")


def test_packaging_requirements(installed: importlib.metadata.Distribution) -> None:
    required = [r for r in installed.requires or [] if "extra ==" not in r]
    assert {re.match(r"[\w.-]+", r).group() for r in required} == {"torch", "numpy"}
    assert not any(sign in r for r in required for sign in ("==", "<", "~="))


def test_packaging_files(installed: importlib.metadata.Distribution) -> None:
    names = [str(f) for f in installed.files or []]
    assert not [n for n in names if "gomp" in n or ".libs/" in n]
    assert {"rlkern/py.typed", "rlkern/_C.pyi", "rlkern/kernels/__init__.py", "rlkern/bench/__init__.py"} <= set(names)
    top = {n.split("/")[0] for n in names if not n.startswith("..")}
    assert top <= {"rlkern", f"rlkern-{installed.version}.dist-info"}


def test_packaging_native_module(installed: importlib.metadata.Distribution) -> None:
    """At most 10 MB; neither torch nor a thread runtime of its own is linked."""
    found = [f for f in installed.files or [] if re.fullmatch(r"rlkern/_C\..*\.so", str(f))]
    if not found:
        pytest.skip("a pure-Python installation")
    module = Path(str(installed.locate_file(found[0])))
    assert module.stat().st_size <= 10 << 20
    if shutil.which("readelf"):
        dynamic = run("readelf", "-d", module)
        assert "NEEDED" in dynamic
        assert not re.search(r"NEEDED.*(torch|c10|gomp)|RPATH|RUNPATH", dynamic)


# ---- a pure-Python wheel ---------------------------------------------------------------------------------------------
GAE = """
import torch, rlkern
x = lambda *v: torch.tensor([v])
a, r = rlkern.gae(x(0., 0., 1.), x(.5, 9., .25), x(1, 0, 1), gamma=1.0, lam=1.0)
print(rlkern.__file__, a.tolist(), r.tolist(), rlkern.backends.native)
"""


def test_packaging_pure_wheel(tmp_path: Path) -> None:
    source, unpacked = tmp_path / "source", tmp_path / "unpacked"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "rlkern", "kernels", "bench"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", tmp_path]
    run(*pip, source, cwd=tmp_path, RLKERN_NATIVE="0")
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert not [n for n in archive.namelist() if n.endswith(".so")]
        archive.extractall(unpacked)
    printed = run(sys.executable, "-c", GAE, cwd=tmp_path, PYTHONPATH=str(unpacked), RLKERN_BACKEND="")
    module = unpacked / "rlkern" / "__init__.py"
    assert printed.strip() == f"{module} [[0.5, 0.75, 0.75]] [[1.0, 9.75, 1.0]] None"


# ---- the ISA units ---------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The objects the installed module was linked from; a build of their own where there are none."""
    pattern = "CMakeFiles/rlkern_*.dir/**/*.o"
    found = [o for build in ROOT.glob("build/temp*/cmake") for o in build.glob(pattern)]
    if found:
        return found
    tools = [shutil.which(t, path=PATH) for t in ("cmake", "c++")]
    if not all(tools) or not (ROOT / "CMakeLists.txt").exists() or importlib.util.find_spec("pybind11") is None:
        pytest.skip("no objects in build/, and no CMake, compiler, pybind11 or source to make them")
    build = tmp_path_factory.mktemp("isa")
    pybind11 = run(sys.executable, "-m", "pybind11", "--cmakedir").strip()
    run(tools[0], "-S", ROOT, "-B", build, f"-Dpybind11_DIR={pybind11}", f"-DPython_EXECUTABLE={sys.executable}")
    targets = re.findall(r"rlkern_(?:base|avx\w+)", run(tools[0], "--build", build, "--target", "help"))
    run(tools[0], "--build", build, "--parallel", "2", "--target", *sorted(set(targets)))
    return list(build.glob(pattern))


def strangers(objects: list[Path]) -> list[str]:
    """Weak symbols outside the namespace of the ISA whose folder the object lies in."""
    found = []
    for path in objects:
        isa = re.search(r"rlkern_(\w+)\.dir", str(path)).group(1)
        own = f"6rlkern{len(isa)}{isa}"  # rlkern::<isa>, mangled
        for line in run("nm", "--defined-only", path).splitlines():
            kind, name = line.split()[-2:]
            if kind in "WVu" and own not in name and name != "DW.ref.__gxx_personality_v0":
                found.append(f"{isa}/{path.name}: {name}")
    return found


@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm")
def test_packaging_isa_units_share_no_weak_symbol(objects: list[Path]) -> None:
    """The linker keeps one copy of a weak symbol: outside the ISA's namespace the baseline could run AVX-512 code."""
    assert objects
    assert strangers(objects) == []


@pytest.mark.skipif(not (shutil.which("nm") and shutil.which("c++")), reason="no nm or no compiler")
def test_packaging_isa_check_catches(tmp_path: Path) -> None:
    planted = tmp_path / "rlkern_avx2.dir" / "planted.o"
    planted.parent.mkdir()
    code = """namespace rlkern {
        __attribute__((noinline)) inline int shared(int x) { return x * x; }
        namespace avx2 {
        __attribute__((noinline)) inline int own(int x) { return x + x; }
        int use(int x) { return shared(x) + own(x); }
        }}"""
    planted.with_suffix(".cpp").write_text(code)
    run("c++", "-O2", "-c", planted.with_suffix(".cpp"), "-o", planted)
    assert strangers([planted]) == ["avx2/planted.o: _ZN6rlkern6sharedEi"]
