"""Builds native/*.cpp into src/slingshot/kernels/slingshot_native.so, and native/heap/ into a library of its own in
src/slingshot/machine, where a C++ compiler is; goes on without it else.

    python setup.py build_ext --inplace      # in a source tree; `pip install` does it by itself

The library is plain C++ behind C functions. Sources that compute are compiled once for every level of instructions;
what the processor has is seen when it is loaded (slingshot/kernels/native.py). A level that the compiler does not know
is left out.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

NATIVE = Path("native")
ONCE = [
    "attention_plan.cpp",
    "cpu.cpp",
    "expand_plan.cpp",
    "pool.cpp",
    "scratch.cpp",
    "share.cpp",
]  # the same at every level
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-pthread", "-Wall", "-g0"]
# GCC 12's own headers of intrinsics warn of themselves, and of what a level leaves unused.
FLAGS += ["-Wno-uninitialized", "-Wno-maybe-uninitialized", "-Wno-unused-function", "-Wno-attributes"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]
AVX512BF16 = [*AVX512, "-mavx512bf16", "-mavx512vnni"]
LEVELS = {
    "avx2": AVX2,
    "avx512": AVX512,
    "avx512bf16": AVX512BF16,
    "amx": [*AVX512BF16, "-mamx-tile", "-mamx-bf16", "-mamx-int8"],
}


def sources_digest(folder: Path) -> str:
    """Names the contents of native/, as slingshot/kernels/native.py does."""
    files = sorted(path for path in folder.iterdir() if path.suffix in (".cpp", ".h"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


class BuildNative(build_ext):
    """Compiles the sources once per level and links them into one library with a plain name."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []

    def build_extension(self, ext: Extension) -> None:
        if ext is heap:
            if not sys.platform.startswith("linux"):
                raise CompileError(f"the heap's library is written for Linux, this is {sys.platform}")
            super().build_extension(ext)
            return
        target = Path(self.get_ext_fullpath(ext.name))
        digest = sources_digest(NATIVE)
        built = Path("src", self.get_ext_filename(ext.name))  # by an earlier installation from this tree
        if built.exists() and digest.encode() in built.read_bytes():
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.resolve() != built.resolve():
                shutil.copy2(built, target)
            return
        if os.name != "posix" or platform.machine() not in ("x86_64", "AMD64"):
            raise CompileError(f"native kernels are written for x86-64, this is {platform.machine()}")
        self.compiler.src_extensions.append(".cpp")
        every = [source for source in ext.sources if Path(source).name not in ONCE]
        once = [source for source in ext.sources if Path(source).name in ONCE]
        every.sort(key=os.path.getsize, reverse=True)  # about the longest first, so that all cores end together
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            common = [pool.submit(self._compile, source, "base", [f'-DSOURCES="{digest}"']) for source in once]
            try:
                objects = [made for job in common for made in job.result()]
            except CompileError as error:
                raise CompileError(f"no C++ compiler works here, so slingshot runs on torch's path: {error}") from error
            headers = {level: pool.submit(self._precompile, level) for level in LEVELS}
            jobs = {
                (level, source): pool.submit(self._compile, source, level, [*headers[level].result(), *LEVELS[level]])
                for source in every
                for level in LEVELS
            }
        for level in LEVELS:
            try:
                objects += [made for source in every for made in jobs[level, source].result()]
            except CompileError as error:
                self.warn(f"level {level} is left out: {error}")
        target.parent.mkdir(parents=True, exist_ok=True)
        # Templates of the standard library are in the objects of every level; the linker keeps the first: the lowest.
        self.compiler.link_shared_object(objects, str(target), extra_postargs=["-pthread"], target_lang="c++")

    def _compile(self, source: str, level: str, flags: list[str]) -> list[str]:
        return self.compiler.compile(
            [source], self._folder(level), macros=[("LEVEL", level)], extra_postargs=[*FLAGS, *flags],
            depends=[str(path) for path in NATIVE.glob("*.h")],
        )  # fmt: skip

    def _precompile(self, level: str) -> list[str]:
        """Flags by which the level's sources find what all of them begin with compiled already: the intrinsics."""
        header = Path(self._folder(level)) / "first.h"
        header.parent.mkdir(parents=True, exist_ok=True)
        header.write_text(f'#include "{(NATIVE / "simd.h").resolve()}"\n', encoding="utf-8")
        compiler = getattr(self.compiler, "compiler_so_cxx", self.compiler.compiler_so)
        flags = [*FLAGS, *LEVELS[level], f"-DLEVEL={level}", "-x", "c++-header"]
        if subprocess.run([*compiler, *flags, header, "-o", f"{header}.gch"], capture_output=True).returncode:
            return []
        return ["-include", str(header)]

    def _folder(self, level: str) -> str:
        return os.path.join(self.build_temp, level)


sources = sorted(str(path) for path in NATIVE.glob("*.cpp"))
native = Extension("slingshot.kernels.slingshot_native", sources, language="c++", optional=True)
heap = Extension(
    "slingshot.machine.slingshot_heap", ["native/heap/aligned.cpp"], extra_compile_args=FLAGS, language="c++",
    optional=True,
)  # fmt: skip
setup(ext_modules=[native, heap], cmdclass={"build_ext": BuildNative})
