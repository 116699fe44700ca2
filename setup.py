"""Builds the native part of patchgen_fast; pyproject.toml holds everything else.

Two shared objects lie in the package afterwards, beside `build_record.json`, which says what was
built and, for what was not, why and what to do (`patchgen-fast info` shows it):

- `_kernels.so`: the operators, on torch's stable ABI (target 2.10), without linkage to Python: one
  file for every Python and every torch from 2.10. Loaded by `torch.ops.load_library`.
- `_native_info.*.so`: a small pybind11 module for what touches no tensor.

Environment:
    PATCHGEN_FAST_BUILD       auto (default): build what this machine can, never fail the install;
                              CUDA kernels if there are nvcc and a torch with CUDA
                              none: build nothing;  cpu, cuda: build that, or fail loudly
    PATCHGEN_FAST_CUDA_ARCHS  e.g. "80;90a;compute_120": cubins for 80 and 90a, PTX for 120
    CXX, CXXFLAGS, CUDA_HOME, MAX_JOBS   as usual
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc"))

from toolchain import (  # noqa: E402
    CXX_FLAGS,
    REINSTALL,
    BuildFailure,
    ObjectCompiler,
    assert_no_weak_symbols,
    compiler_accepts,
    compression_flags,
    cuda_arch_flags,
    extra_flags,
    find_cuda,
    find_cxx,
    import_torch_cpp_extension,
    pybind11_include,
    run_quietly,
)

CSRC = Path("csrc")
OPERATORS = "patchgen_fast._kernels"
INFO = "patchgen_fast._native_info"
RECORD = "build_record.json"

TORCH_TARGET = "0x020a000000000000"  # 2.10, the oldest torch whose stable ABI has what we use

# Instruction sets with a file kernels_<isa>.cpp, weakest first; other CPUs than x86 have the first.
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"]
# Kernels throw nothing: without unwinding there is no weak personality symbol either.
KERNEL_FLAGS = ["-fno-exceptions"]
ISA_FLAGS: dict[str, list[str]] = {
    "baseline": KERNEL_FLAGS,
    "avx2": [*KERNEL_FLAGS, "-mavx2", "-mfma", "-mf16c"],
    "avx512": [*KERNEL_FLAGS, *AVX512],
    "avx512_bf16": [*KERNEL_FLAGS, *AVX512, "-mavx512vnni", "-mavx512bf16"],
}


def glob(pattern: str) -> list[Path]:
    return sorted(path.relative_to(ROOT) for path in (ROOT / CSRC).glob(pattern))


def isa_of(path: Path) -> str:
    """kernels_avx512_bf16.cpp, cpu_kernels_avx512_bf16.o -> avx512_bf16"""
    return re.sub(r".*(kernels|calibrate)_", "", path.stem)


class BuildNative(build_ext):
    """Builds both shared objects and writes the build record, by PATCHGEN_FAST_BUILD."""

    def run(self) -> None:
        os.chdir(ROOT)
        request = os.environ.get("PATCHGEN_FAST_BUILD", "auto")
        if request not in ("auto", "none", "cpu", "cuda"):
            raise SystemExit(
                f"PATCHGEN_FAST_BUILD: expected auto, none, cpu or cuda, got {request!r}"
            )
        self.record: dict = {
            "schema": 1, "requested": request, "operators": False, "info": False, "cuda": False,
            "isa": [], "isa_left_out": {}, "cuda_archs": [], "failures": {},
            "python": platform.python_version(), "machine": platform.machine(),
        }  # fmt: skip
        self.outputs: list[str] = []
        self._remove_stale()
        if request == "none":
            self._fail("operators", "built with PATCHGEN_FAST_BUILD=none",
                       f"unset PATCHGEN_FAST_BUILD, {REINSTALL}")  # fmt: skip
        else:
            self._build(request)
        self._write_record()

    def _build(self, request: str) -> None:
        loud = request != "auto"
        try:
            cxx = find_cxx()
            version = run_quietly([*cxx, "--version"]).stdout.splitlines()
            self.record["compiler"] = version[0] if version else cxx[0]
            self._choose_isa(cxx)
            self._attempt("operators", loud, self._build_operators, cxx, request)
            self._attempt("info", loud, self._build_info, cxx)
        except BuildFailure as failure:
            if loud:
                raise SystemExit(f"patchgen_fast: {failure}") from None
            self._fail("operators", failure.reason, failure.remedy)

    def _attempt(self, part: str, loud: bool, build, *args) -> None:
        try:
            build(*args)
        except BuildFailure as failure:
            if loud:
                raise
            self._fail(part, failure.reason, failure.remedy)
        except Exception as error:  # whatever setuptools or torch raise when a compiler fails
            if loud:
                raise
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            self._fail(part, reason, f"see the log of: PATCHGEN_FAST_BUILD=cpu pip install -v .; "
                       f"mend that, {REINSTALL}")  # fmt: skip

    def _fail(self, part: str, reason: str, remedy: str) -> None:
        self.record["failures"][part] = {"reason": reason, "remedy": remedy}
        print(f"patchgen_fast: {part} not built: {reason}\nRemedy: {remedy}", flush=True)

    # The operators -------------------------------------------------------------------------------

    def _build_operators(self, cxx: list[str], request: str) -> None:
        torch, cpp_extension = import_torch_cpp_extension()
        self.record["torch"] = torch.__version__
        isa_objects = self._isa_objects(cxx, "cpu/kernels_*.cpp")
        attempts = {"cuda": [True], "cpu": [False], "auto": [True, False]}[request]
        if request == "auto" and torch.version.cuda is None:
            # Minutes of compiling for what this torch could not run.
            attempts = [False]
            self._fail("cuda", f"torch {torch.__version__} has no CUDA", "install a torch "
                       f"with CUDA, or set PATCHGEN_FAST_BUILD=cuda, {REINSTALL}")  # fmt: skip
        for with_cuda in attempts:
            try:
                self._link_operators(cpp_extension, isa_objects, with_cuda)
                break
            except Exception as error:
                if not with_cuda or request == "cuda":
                    raise
                reason = getattr(error, "reason", f"{type(error).__name__}: {error}")
                remedy = getattr(error, "remedy", "see the log of: PATCHGEN_FAST_BUILD=cuda pip "
                                 "install -v . (the CPU kernels are built)")  # fmt: skip
                self._fail("cuda", reason.splitlines()[0], remedy)
        self.record["operators"] = True

    def _choose_isa(self, cxx: list[str]) -> None:
        x86 = platform.machine().lower() in ("x86_64", "amd64")
        for isa, flags in ISA_FLAGS.items():
            if isa != "baseline" and not x86:
                continue
            if compiler_accepts(cxx, flags):
                self.record["isa"].append(isa)
            else:
                self.record["isa_left_out"][isa] = f"{cxx[0]} does not know {flags[-1]}"

    def _isa_objects(self, cxx: list[str], pattern: str) -> list[Path]:
        """Objects of the files with an instruction set of their own, each with its flags."""
        sources: dict[Path, list[str]] = {}
        for source in glob(pattern):
            isa = isa_of(source)
            if isa not in ISA_FLAGS:
                raise BuildFailure(
                    f"{source}: {isa!r} has no flags", "add it to ISA_FLAGS in setup.py"
                )
            if isa in self.record["isa"]:
                sources[source] = ISA_FLAGS[isa]
        compiler = ObjectCompiler(cxx, Path(self.build_temp) / "isa", [str(CSRC)])
        objects = compiler.compile(sources)
        assert_no_weak_symbols([o for o in objects if isa_of(o) != "baseline"])
        return objects

    def _isa_macros(self) -> list[str]:
        return [f"-DPATCHGEN_FAST_HAVE_{isa.upper()}=1" for isa in self.record["isa"]]

    def _link_operators(self, cpp_extension, isa_objects: list[Path], with_cuda: bool) -> None:
        sources = [p for p in glob("*.cpp") if p.stem != "native_module"]
        sources += [p for p in glob("cpu/*.cpp") if not p.stem.startswith("kernels_")]
        if not sources:
            raise BuildFailure("csrc holds no operators", "this is not a complete source tree")
        defines = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", *self._isa_macros()]
        # Error messages name source files: relative, not where they lay on the building machine.
        folders = [str(ROOT), *cpp_extension.include_paths()]
        relative = [f"-ffile-prefix-map={path}=." for path in folders]
        include_dirs = [str(CSRC)]
        # system headers: their warnings are not ours
        system = [flag for path in cpp_extension.include_paths() for flag in ("-isystem", path)]
        nvcc_flags, archs = [], []
        if sys.platform == "darwin":
            # by name, because torch's libraries are loaded privately there
            link = ["-ltorch_cpu"]
        else:
            # libtorch brings libtorch_cuda, where there is one, into the scope of our weak symbols
            link = ["-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-Wl,--as-needed"]
        if with_cuda:
            cuda = find_cuda()
            archs, gencode = cuda_arch_flags(cuda)
            cuda_files = glob("cuda/*.cu")
            if not cuda_files:
                raise BuildFailure(
                    "csrc holds no CUDA kernels", "this is not a complete source tree"
                )
            sources += [*cuda_files, *glob("cuda/*_op.cpp")]
            defines += ["-DUSE_CUDA", "-DPATCHGEN_FAST_HAVE_CUDA=1"]
            include_dirs.append(str(cuda / "include"))
            threads = max(1, (os.cpu_count() or 1) // max(1, len(cuda_files)))
            nvcc_flags = ["-std=c++20", "-O3", f"--threads={threads}", *gencode]
            nvcc_flags += compression_flags(cuda)
            for flag in ("-fvisibility=hidden", *relative):
                nvcc_flags += ["-Xcompiler", flag]
            nvcc_flags += [*defines, *system]
            static = [cuda / lib / "libcudart_static.a" for lib in ("lib64", "lib")]
            found = [str(path) for path in static if path.exists()]
            if not found:
                raise BuildFailure(
                    f"{static[0]} is missing", "install the CUDA runtime's static library"
                )
            link += [found[0], "-lrt", "-ldl", "-lpthread"]
            cpp_extension.CUDA_HOME = str(cuda)  # None on a CPU-only torch; only nvcc is used
            # It refuses a toolkit of another major version than torch's. Nothing of torch's CUDA is
            # compiled in here and the CUDA runtime is linked statically, so they need not match.
            cpp_extension._check_cuda_version = lambda *_: None
        extension = Extension(
            OPERATORS,
            [str(path) for path in sources],
            include_dirs=include_dirs,
            library_dirs=cpp_extension.library_paths(),
            extra_compile_args={
                "cxx": [*CXX_FLAGS, "-g0", *extra_flags(), *relative, *defines, *system],
                "nvcc": nvcc_flags,
            },
            extra_link_args=link,
            extra_objects=[str(path) for path in isa_objects],
            language="c++",
            py_limited_api=True,
        )
        self._run_torch_build(cpp_extension, extension)
        self.record["cuda"] = with_cuda
        self.record["cuda_archs"] = archs
        self._installed(OPERATORS)

    def _run_torch_build(self, cpp_extension, extension: Extension) -> None:
        outer = self

        class TorchBuild(cpp_extension.BuildExtension):
            def get_ext_filename(self, fullname: str) -> str:
                return outer.get_ext_filename(fullname)

        declared = self.distribution.ext_modules
        self.distribution.ext_modules = [extension]
        try:
            command = TorchBuild(self.distribution)
            command.inplace, command.build_lib = self.inplace, self.build_lib
            command.build_temp = self.build_temp
            command.ensure_finalized()
            command.run()
        finally:
            self.distribution.ext_modules = declared

    # The facts -----------------------------------------------------------------------------------

    def _build_info(self, cxx: list[str]) -> None:
        sources = [*glob("native_module.cpp"), *glob("native/*.cpp")]
        plain = [p for p in sources if not p.stem.startswith("calibrate_")]
        plain.append(CSRC / "cpu/isa.cpp")
        if CSRC / "native_module.cpp" not in plain:
            raise BuildFailure(
                "csrc/native_module.cpp is missing", "this is not a complete source tree"
            )
        objects = self._isa_objects(cxx, "native/calibrate_*.cpp")
        include_dirs = [str(CSRC), sysconfig.get_paths()["include"], pybind11_include()]
        compiler = ObjectCompiler(cxx, Path(self.build_temp) / "info", include_dirs)
        flags = dict.fromkeys(plain, self._isa_macros())
        flags[CSRC / "native/build_facts.cpp"] = self._fact_macros()
        objects += compiler.compile(flags)
        target = Path(self.get_ext_fullpath(INFO))
        target.parent.mkdir(parents=True, exist_ok=True)
        shared = ["-shared", "-Wl,-s"]
        if sys.platform == "darwin":
            shared = ["-bundle", "-undefined", "dynamic_lookup"]
        ldflags = shlex.split(os.environ.get("LDFLAGS", ""))
        command = [*cxx, *shared, *ldflags, *map(str, objects), "-o", str(target), "-lpthread"]
        done = run_quietly(command)
        if done.returncode:
            raise BuildFailure(f"linking {target.name} failed: {done.stderr.strip()}", REINSTALL)
        self.record["info"] = True
        self._installed(INFO)

    def _fact_macros(self) -> list[str]:
        facts = {
            "COMPILER": self.record.get("compiler", ""),
            "FLAGS": " ".join(CXX_FLAGS),
            "CUDA_ARCHS": ";".join(self.record["cuda_archs"]),
        }
        return [f'-DPATCHGEN_FAST_BUILD_{name}="{value}"' for name, value in facts.items()]

    # Where things lie ----------------------------------------------------------------------------

    def get_ext_filename(self, fullname: str) -> str:
        if fullname.endswith("_kernels"):
            return (
                os.path.join(*fullname.split(".")) + ".so"
            )  # no Python in it, so none in its name
        return super().get_ext_filename(fullname)

    def _package(self) -> Path:
        return ROOT / "patchgen_fast" if self.inplace else Path(self.build_lib) / "patchgen_fast"

    def _remove_stale(self) -> None:
        for name in (OPERATORS, INFO):
            Path(self.get_ext_fullpath(name)).unlink(missing_ok=True)

    def _installed(self, name: str) -> None:
        self.outputs.append(self.get_ext_fullpath(name))

    def _write_record(self) -> None:
        path = self._package() / RECORD
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.record, indent=2) + "\n")
        temporary.replace(path)
        self.outputs.append(str(path))

    def get_outputs(self) -> list[str]:
        return getattr(self, "outputs", [])

    def get_output_mapping(self) -> dict[str, str]:
        return {}


setup(
    ext_modules=[Extension(OPERATORS, []), Extension(INFO, [])],
    cmdclass={"build_ext": BuildNative},
)
