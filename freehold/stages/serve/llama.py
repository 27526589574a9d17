"""llama.cpp in a process of its own: run as a module it opens a GGUF file and answers on a local port.

So an abort in it, its threads and its shutdown (which can wait for ever) stay out of the server. It prints one
line, its address or `error: ...`, and ends when its standard input closes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from freehold.core.errors import ArtifactError


class Llama:
    """The process, seen from outside; `address` is where it listens."""

    def __init__(self, path: Path, context_tokens: int, threads: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(path), str(context_tokens), str(threads)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for the server, which then closes us
        )
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().strip()
        if not self.address.startswith("http"):
            self.close()
            raise ArtifactError("llama.cpp cannot open the file", where=path, found=self.address or "it died")

    def close(self) -> None:
        """End the process and wait for it."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


def _serve(path: str, context_tokens: int, threads: int) -> None:
    ours = os.dup(1)
    os.dup2(2, 1)  # whatever llama.cpp prints is not our one line
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = path
    parameters.n_ctx, parameters.n_parallel = context_tokens, 1
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
    parameters.warmup, parameters.verbosity, parameters.cache_ram_mib = False, -1, 0
    try:
        server = xllamacpp.Server(parameters)
    except RuntimeError as error:
        os.write(ours, f"error: {error}\n".encode())
        os._exit(1)
    os.write(ours, (server.listening_address + "\n").encode())
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    _serve(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
