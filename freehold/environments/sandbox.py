"""Runs code that a model wrote: another process, limits of processor time and memory, no files, no network.

The process does not know what results are right: it returns what the function returned, and the caller compares.
Time is counted on the processor alone, so a busy machine changes no reward; `time.sleep` returns immediately.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from freehold.environments.protocol import EnvironmentFault

CPU_SECONDS = 1
MEMORY_BYTES = 512 << 20
ANSWER_BYTES = 1 << 20
LIMITS = (
    (resource.RLIMIT_CPU, CPU_SECONDS),
    (resource.RLIMIT_AS, MEMORY_BYTES),
    (resource.RLIMIT_FSIZE, ANSWER_BYTES),
    (resource.RLIMIT_CORE, 0),
)
WALL_SECONDS = 120
"""When a run stops with an error: processor time is out long before, unless the machine hangs."""

_CHILD = r"""
import json, os, resource, sys, time
for which, most in json.loads(sys.argv[1]):
    resource.setrlimit(which, (most, most))
given = json.loads(sys.stdin.read())
out = os.fdopen(os.dup(1), "w")
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
time.sleep = lambda seconds: None
roots = tuple(root for root in sys.path if root)
harmless = {"compile", "exec", "import", "object.__getattr__", "object.__setattr__", "code.__new__", "builtins.id",
            "marshal.loads", "sys._getframe", "array.__new__", "os.listdir", "sys.excepthook", "sys.unraisablehook"}
def audit(event, args, harmless=frozenset(harmless), roots=roots):
    reads = event == "open" and isinstance(args[0], str) and not set(args[1] or "r") & set("wax+")
    if event not in harmless and not (reads and args[0].startswith(roots)):
        raise PermissionError(event)
class Silent:
    def write(self, text): return len(text)
    def flush(self): pass
sys.stdout = sys.stderr = Silent()
sys.stdin = None
results, scope = [], {"__name__": "answer"}
sys.addaudithook(audit)
try:
    exec(compile(given["code"], "answer", "exec"), scope)
    for arguments in given["cases"]:
        try:
            results.append({"value": scope[given["function"]](*arguments)})
        except Exception as error:
            results.append({"error": type(error).__name__})
    text = json.dumps(results)
except BaseException:
    text = "[]"
out.write(text)
out.flush()
"""


def call_function(code: str, function: str, cases: Sequence[Sequence[Any]]) -> list[Any]:
    """Return what a function of some code returns for each case, `{"value": ...}` or `{"error": ...}`.

    An empty list: the code could not be run within the limits. EnvironmentFault when the process neither ends nor
    uses its processor time.
    """
    given = json.dumps({"code": code, "function": function, "cases": list(cases)})
    # A file, not a pipe: a file has a limit, and a child that writes too much cannot wait for its reader.
    with tempfile.TemporaryFile() as out:
        try:
            subprocess.run(
                [sys.executable, "-I", "-S", "-c", _CHILD, json.dumps(LIMITS)],
                input=given.encode(), stdout=out, stderr=subprocess.DEVNULL, env={}, cwd="/", timeout=WALL_SECONDS,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise EnvironmentFault(
                "code under test neither ended nor used its processor time",
                where="sandbox",
                found=f"no end after {WALL_SECONDS} s",
                expected=f"at most {CPU_SECONDS} s of processor time",
                todo="look at the machine, then run again: finished steps are kept",
            ) from None
        out.seek(0)
        found = out.read()
    try:
        results = json.loads(found)
    except ValueError:
        return []
    return results if isinstance(results, list) else []
