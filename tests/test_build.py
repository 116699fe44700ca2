"""What setup.py builds, and what is left when it cannot."""

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from patchgen_fast import _native

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "csrc"))
import toolchain  # noqa: E402

needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
needs_binutils = pytest.mark.skipif(
    not (shutil.which("nm") and shutil.which("objdump") and shutil.which("readelf")),
    reason="no binutils",
)
needs_library = pytest.mark.skipif(
    not _native.LIBRARY.exists(), reason="native part not built here"
)


def output(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def build(folder, **environment):
    """`setup.py build` into `folder`; the result, and the build record if there is one."""
    command = [sys.executable, "setup.py", "--quiet", "build", "--build-base", str(folder)]
    done = subprocess.run(
        [*command, "--build-lib", str(folder / "lib")],
        cwd=ROOT,
        env={**os.environ, "CXXFLAGS": "", **environment},
        capture_output=True,
        text=True,
    )
    record = folder / "lib/patchgen_fast/build_record.json"
    return done, json.loads(record.read_text()) if record.exists() else None


def run_python(folder, code, **environment):
    """`code` in a new process that finds the package of `folder`/lib only."""
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder / "lib"), **environment},
        capture_output=True,
        text=True,
    )


def script(path, text):
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


# Without a compiler -----------------------------------------------------------------------------


def test_without_a_compiler_the_install_succeeds_and_the_rest_serves(tmp_path):
    done, record = build(tmp_path, CXX="/nonexistent/c++", PATCHGEN_FAST_BUILD="auto")
    assert done.returncode == 0, done.stdout + done.stderr
    assert record["operators"] is False and record["info"] is False
    assert "/nonexistent/c++" in record["failures"]["operators"]["reason"]
    assert not list((tmp_path / "lib").rglob("*.so"))

    done = run_python(
        tmp_path,
        "import warnings; warnings.simplefilter('error')\n"
        "import torch, patchgen_fast\n"
        "from patchgen_fast import _native, dispatch\n"
        "q, k, v = torch.randn(3, 1, 2, 5, 8)\n"
        "patchgen_fast.attention(q, k, v, backend='reference')\n"
        "patchgen_fast.attention(q, k, v)\n"
        "print(dispatch.counters(), _native.status())\n"
        "try: patchgen_fast.attention(q, k, v, backend='cpu')\n"
        "except ValueError as error: print('refused:', error)\n",
    )
    assert done.returncode == 0, done.stderr
    assert "'attention.reference': 1, 'attention.torch': 1" in done.stdout
    assert "refused:" in done.stdout and done.stdout.count("no C++ compiler") >= 2
    assert "install g++ 11 or later" in done.stdout

    done = run_python(tmp_path, "from patchgen_fast.cli import main; main(['info'])")
    assert done.returncode == 0, done.stderr
    assert "no C++ compiler: '/nonexistent/c++' is not there" in done.stdout
    assert "remedy: install g++ 11 or later" in done.stdout


def test_none_builds_nothing_and_says_so(tmp_path):
    done, record = build(tmp_path, PATCHGEN_FAST_BUILD="none")
    assert done.returncode == 0, done.stderr
    assert "PATCHGEN_FAST_BUILD=none" in record["failures"]["operators"]["reason"]
    assert not list((tmp_path / "lib").rglob("*.so"))


@pytest.mark.parametrize("request_", ["cpu", "cuda"])
def test_an_explicit_build_fails_loudly(tmp_path, request_):
    done, record = build(tmp_path, CXX="/nonexistent/c++", PATCHGEN_FAST_BUILD=request_)
    assert done.returncode != 0
    assert "no C++ compiler: '/nonexistent/c++' is not there" in done.stderr
    assert "Remedy: install g++" in done.stderr
    assert record is None


def test_an_unknown_request_is_refused(tmp_path):
    done, _ = build(tmp_path, PATCHGEN_FAST_BUILD="gpu")
    assert done.returncode != 0
    assert "expected auto, none, cpu or cuda, got 'gpu'" in done.stderr


@needs_compiler
def test_a_compiler_that_fails_midway_leaves_no_native_part(tmp_path):
    # it passes the probes, which compile nothing of ours
    cxx = script(
        tmp_path / "failing-c++",
        'case "$*" in *-c\\ csrc/*) echo "kernels: error: out of registers" >&2; exit 1;; esac\n'
        'exec c++ "$@"\n',
    )
    done, record = build(tmp_path, CXX=cxx, PATCHGEN_FAST_BUILD="auto")
    assert done.returncode == 0, done.stderr
    assert "out of registers" in record["failures"]["operators"]["reason"]
    assert record["operators"] is False and not list((tmp_path / "lib").rglob("*.so"))


@needs_compiler
def test_a_compiler_too_old_for_the_language_is_named(tmp_path):
    cxx = script(tmp_path / "old-c++", 'echo "error: unknown standard c++20" >&2; exit 1\n')
    _, record = build(tmp_path, CXX=cxx, PATCHGEN_FAST_BUILD="auto")
    assert (
        "cannot compile C++20: error: unknown standard" in record["failures"]["operators"]["reason"]
    )


# Instruction sets -------------------------------------------------------------------------------


@needs_compiler
def test_a_flag_that_the_compiler_lacks_is_noticed(tmp_path):
    cxx = script(
        tmp_path / "older-c++", 'case "$*" in *avx512bf16*) exit 1;; esac\nexec c++ "$@"\n'
    )
    assert toolchain.compiler_accepts([cxx], ["-O2"])
    assert not toolchain.compiler_accepts([cxx], ["-mavx512bf16"])


@needs_compiler
@needs_binutils
def test_a_weak_symbol_is_noticed(tmp_path):
    source = tmp_path / "x.cpp"
    source.write_text("inline int weak(int x) { return x + 1; }\nint (*keep)(int) = weak;\n")
    subprocess.run(["c++", "-c", str(source), "-o", str(tmp_path / "x.o")], check=True)
    with pytest.raises(toolchain.BuildFailure, match=r"weak symbols, e.g. weak\(int\)"):
        toolchain.assert_no_weak_symbols([tmp_path / "x.o"])
    source.write_text("static int local(int x) { return x + 1; }\nint (*keep)(int) = local;\n")
    subprocess.run(["c++", "-c", str(source), "-o", str(tmp_path / "x.o")], check=True)
    toolchain.assert_no_weak_symbols([tmp_path / "x.o"])


def objects(pattern):
    """Objects of this checkout's build for this Python; skips if there are none."""
    tag = f"cpython-{sys.version_info[0]}{sys.version_info[1]}"
    found = sorted(ROOT.glob(f"build/temp.*{tag}*/{pattern}"))
    if not found:
        pytest.skip("not built in this folder")
    return found


@needs_binutils
def test_objects_of_an_instruction_set_define_their_table_and_nothing_weak():
    checked = 0
    for path in objects("isa/*.o"):
        isa = re.sub(r".*(kernels|calibrate)_", "", path.stem)
        names = [
            line.split()[-1] for line in output("nm", "-g", "--defined-only", path).splitlines()
        ]
        assert len(names) == 1 and isa in names[0], f"{path.name}: {names}"
        assert not re.search(r" [WVu] ", output("nm", "-C", path)), path.name
        checked += 1
    assert checked >= 2


# An AVX instruction is VEX- or EVEX-encoded, and its mnemonic starts with v; verr and verw do too.
AVX = re.compile(r"\t(?!verr|verw)v[a-z0-9]+\s|%[yz]mm\d")


def instructions(path):
    return output("objdump", "-d", "--no-show-raw-insn", path)


@needs_binutils
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="an x86 matter")
def test_what_every_cpu_runs_has_no_avx_in_it():
    if "-march" in os.environ.get("CXXFLAGS", "") + os.environ.get("CFLAGS", ""):
        pytest.skip("built for one CPU on request")
    common = objects("csrc/**/*.o") + objects("info/*.o") + objects("isa/*_baseline.o")
    for path in common:
        assert not AVX.search(instructions(path)), f"{path}: {AVX.search(instructions(path))}"
    special = [path for path in objects("isa/cpu_kernels_*.o") if "baseline" not in path.name]
    assert special
    for path in special:  # the pattern does find them
        assert AVX.search(instructions(path)), path
        assert ("%zmm" in instructions(path)) == ("avx512" in path.name), path


# The library ------------------------------------------------------------------------------------


@needs_library
@needs_binutils
def test_the_library_needs_no_python_and_hides_what_is_its_own():
    needed = re.findall(r"NEEDED.*\[(.*)\]", output("readelf", "-d", str(_native.LIBRARY)))
    assert "libtorch_cpu.so" in needed
    assert not [name for name in needed if "python" in name or "cuda" in name]
    exported = output("nm", "-D", "-C", "--defined-only", str(_native.LIBRARY)).splitlines()
    ours = [line for line in exported if " T " in line and "patchgen_fast" in line]
    assert any("patchgen_fast_call_count" in line for line in ours)
    assert not [line for line in ours if "::" in line], "C++ functions of ours are visible"


@needs_library
def test_the_library_holds_no_path_of_the_machine_that_built_it():
    content = _native.LIBRARY.read_bytes()
    assert str(ROOT).encode() not in content


@needs_library
def test_the_record_agrees_with_what_is_there():
    record = _native.build_record()
    assert record["operators"] is True
    assert record["isa"][0] == "baseline"
    module = _native.info_module()
    assert sorted(record["isa"]) == sorted(row["name"] for row in module.instruction_sets())
    assert module.build_facts()["compiler"] == record["compiler"]
    assert module.build_facts()["cuda_archs"] == ";".join(record["cuda_archs"])


# Compiling again --------------------------------------------------------------------------------


@needs_compiler
def test_an_object_is_compiled_again_only_if_it_must_be(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    Path("src").mkdir()
    header, source = Path("src/a.h"), Path("src/a.cpp")
    header.write_text("#define VALUE 1\n")
    source.write_text('#include "a.h"\nint value = VALUE;\n')

    def compiled(flags):
        compiler = toolchain.ObjectCompiler(["c++"], Path("out"), [])
        (target,) = compiler.compile({source: flags})
        assert target.exists()
        return "-c src/a.cpp" in capfd.readouterr().out

    assert compiled([])
    assert not compiled([])
    assert compiled(["-O1"])
    assert not compiled(["-O1"])
    later = Path("out/a.o").stat().st_mtime + 5
    os.utime(header, (later, later))
    assert compiled(["-O1"])
    header.unlink()
    with pytest.raises(toolchain.BuildFailure, match=r"a\.cpp does not compile: .*a\.h"):
        compiled(["-O1"])


# CUDA -------------------------------------------------------------------------------------------


@pytest.fixture
def toolkit(tmp_path):
    """A toolkit whose nvcc knows sm_80 and sm_90 only."""
    (tmp_path / "bin").mkdir()
    script(tmp_path / "bin/nvcc", "echo compute_80; echo compute_90\n")
    return tmp_path


def test_machine_code_is_compressed_where_every_driver_can_read_it(tmp_path):
    (tmp_path / "bin").mkdir()
    for release, flags in (("12.8, V12.8.93", []), ("13.0, V13.0.88", ["-compress-mode=size"])):
        script(tmp_path / "bin/nvcc", f"echo Cuda compilation tools, release {release}\n")
        assert toolchain.compression_flags(tmp_path) == flags


# A compiler of empty files, so that a whole build takes seconds.
EMPTY_OBJECTS = """
for argument in "$@"; do
  case "$previous" in -o) out=$argument;; -MF) dependencies=$argument;; esac
  previous=$argument
done
case " $* " in
  *" -c "*) exec c++ -fPIC -x c++ -c /dev/null -o "$out" ${dependencies:+-MMD -MF "$dependencies"};;
esac
exec c++ "$@"
"""
# On a torch with CUDA, and a machine without a CUDA toolkit.
SETUP_WITHOUT_NVCC = f"""
import runpy, sys
sys.path.insert(0, {str(ROOT / "csrc")!r})
import toolchain, torch
torch.version.cuda = torch.version.cuda or "13.0"
toolchain.USUAL_CUDA = "/nonexistent/cuda"
sys.argv[0] = "setup.py"
runpy.run_path("setup.py", run_name="__main__")
"""


@needs_compiler
def test_without_nvcc_the_cpu_part_is_built_and_info_says_so(tmp_path):
    path = [p for p in os.environ["PATH"].split(os.pathsep) if not Path(p, "nvcc").exists()]
    kept = {k: v for k, v in os.environ.items() if k not in ("CUDA_HOME", "CUDA_PATH")}
    environment = {
        **kept,
        "PATH": os.pathsep.join(path),
        "CXX": script(tmp_path / "empty-c++", EMPTY_OBJECTS),
        "CXXFLAGS": "",
        "PATCHGEN_FAST_BUILD": "auto",
    }
    command = [sys.executable, "-c", SETUP_WITHOUT_NVCC, "--quiet", "build", "--build-base"]
    command += [str(tmp_path), "--build-lib", str(tmp_path / "lib")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "lib/patchgen_fast/build_record.json").read_text())
    assert record["operators"] is True and record["cuda"] is False
    assert record["failures"]["cuda"]["reason"].startswith("no CUDA toolkit: no nvcc on PATH")
    assert (tmp_path / "lib/patchgen_fast/_kernels.so").exists()

    shown = run_python(tmp_path, "from patchgen_fast.cli import main; main(['info'])").stdout
    assert re.search(r"CUDA kernels +not there: no CUDA toolkit: no nvcc on PATH", shown), shown
    assert "remedy: install CUDA 12.8 or later, or point CUDA_HOME at it" in shown


@needs_library
def test_the_stream_is_found_where_torch_has_cuda():
    if not _native.has_cuda():
        pytest.skip("built without the CUDA part")
    assert _native.finds_stream() == (torch.version.cuda is not None)
    assert (_native.unavailable_reason("cuda") is None) == (torch.version.cuda is not None)


def test_gpu_architectures_beyond_the_compiler_are_left_out(toolkit, monkeypatch):
    monkeypatch.delenv("PATCHGEN_FAST_CUDA_ARCHS", raising=False)
    archs, flags = toolchain.cuda_arch_flags(toolkit)
    assert archs == ["80", "90a", "compute_80"]
    assert flags == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_80,code=compute_80",
    ]


@pytest.mark.parametrize(
    "asked, message", [("sm80", "expected 90a, compute_120 or the like"), ("120a", "knows none")]
)
def test_a_wrong_list_of_gpu_architectures_is_refused(toolkit, monkeypatch, asked, message):
    monkeypatch.setenv("PATCHGEN_FAST_CUDA_ARCHS", asked)
    with pytest.raises(toolchain.BuildFailure, match=message):
        toolchain.cuda_arch_flags(toolkit)


# torch ------------------------------------------------------------------------------------------


def test_an_isolated_build_takes_the_torch_that_it_is_installed_beside():
    """pip runs such a build without the environment's packages on the path."""
    code = (
        "import sys\n"
        "sys.path[:] = [p for p in sys.path if not p.endswith('-packages')]\n"
        f"sys.path.insert(0, {str(ROOT / 'csrc')!r})\n"
        "import toolchain\n"
        "torch, cpp_extension = toolchain.import_torch_cpp_extension()\n"
        "print(torch.__version__, cpp_extension.__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split()[1:] == ["torch.utils.cpp_extension"], done.stderr
