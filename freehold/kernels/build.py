"""Builds C++ kernels on first use, keeps the library in a cache, and loads it. Needs no torch."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

_C_TYPES = {"any": ctypes.c_void_p, "integer": ctypes.c_int64, "int": ctypes.c_int, "float": ctypes.c_float}


class UnavailableError(Exception):
    """Why there are no kernels on this machine."""


def load(source: Path, flags: tuple[str, ...], name: str) -> ctypes.CDLL:
    """Build a source file if its library is not in the cache, load it, and set the types of its functions.

    A function is declared as `EXPORT(name, (types))` in the source; it is called `freehold_<name>` in the library.
    UnavailableError when it is switched off or cannot be built; OSError when it cannot be loaded.
    """
    if os.environ.get("FREEHOLD_NATIVE", "1") == "0":
        raise UnavailableError("switched off by FREEHOLD_NATIVE=0")
    library = ctypes.CDLL(str(_built(source, flags, name)))
    for function_name, parameters in re.findall(
        r"EXPORT(?:_FLOAT)?\((\w+),\s*\(([^)]*)\)", source.read_text(encoding="utf-8")
    ):
        function = getattr(library, f"freehold_{function_name}")
        function.argtypes = [_C_TYPES[parameter.split()[0]] for parameter in parameters.split(",")]
        function.restype = None
    return library


def _compiler() -> list[str]:
    """Return the command that compiles C++, or raise UnavailableError."""
    if os.environ.get("CXX"):
        return os.environ["CXX"].split()
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    if importlib.util.find_spec("ziglang"):
        return [sys.executable, "-m", "ziglang", "c++"]
    raise UnavailableError("no C++ compiler was found (apt install g++, or pip install ziglang)")


def _built(source: Path, flags: tuple[str, ...], name: str) -> Path:
    """Return the shared library for a source, compiler and CPU, building it when it is not in the cache."""
    command = [*_compiler(), *flags, str(source)]
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text(encoding="utf-8").splitlines() if cpu.exists() else [platform.processor()]
    chip = sorted({line for line in lines if line.startswith(("model name", "flags"))})
    key = hashlib.sha256("\0".join([*command[:-1], *chip, *_texts(source)]).encode()).hexdigest()
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "freehold"
    except RuntimeError as problem:  # a user id without an entry in /etc/passwd, and no HOME
        raise UnavailableError(f"{problem} (set HOME or XDG_CACHE_HOME to a folder for the kernels)") from problem
    library = folder / f"{name}-{key[:16]}.so"
    if not library.exists():
        _compile(command, library)
    return library


def _texts(source: Path) -> list[str]:
    """Return a source and the files next to it that it includes."""
    text = source.read_text(encoding="utf-8")
    return [
        text,
        *(source.with_name(name).read_text(encoding="utf-8") for name in re.findall(r'#include "(.+)"', text)),
    ]


def _compile(command: list[str], library: Path) -> None:
    """Run the compiler next to the library and move the result there; UnavailableError with its log when it fails."""
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as room:
        fresh = Path(room) / library.name
        print(f"building the CPU kernels with {command[0]} (once; up to a minute)", file=sys.stderr)
        try:
            done = subprocess.run([*command, "-o", str(fresh)], capture_output=True, text=True, timeout=600)
        except (OSError, subprocess.TimeoutExpired) as problem:
            raise UnavailableError(f"{command[0]} could not be run: {problem}") from problem
        if done.returncode:
            log = library.with_suffix(".log")
            log.write_text(" ".join(command) + "\n" + done.stdout + done.stderr, encoding="utf-8")
            raise UnavailableError(f"{command[0]} failed; what it said is in {log}")
        os.replace(fresh, library)
