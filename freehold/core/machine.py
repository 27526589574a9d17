"""What the machine refuses: space, permission, memory. One boundary turns it into an error that says what to do."""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from freehold.core.errors import ArtifactError, ConfigError, FreeholdError

# How a file system says no, where it is the user's to mend; any other OSError is a mistake of ours.
REFUSALS = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR,
    errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG,
}  # fmt: skip

FULL = (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def machine_limits(path: Path | None = None) -> Iterator[None]:
    """Turn what the disk or the memory refuses inside into one ArtifactError; everything else passes as it is.

    The error names `path`, or the file that the system named.
    """
    try:
        yield
    except FreeholdError:
        raise
    except Exception as error:
        # Some libraries report a full disk or of full memory in classes of their own: by these words alone.
        if "No space left" in str(error):
            error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), getattr(error, "filename", None))
        if isinstance(error, OSError) and error.errno in REFUSALS:
            raise disk_error(error, path or Path(error.filename or ".")) from error
        if isinstance(error, MemoryError) or "Cannot allocate memory" in str(error):
            raise ArtifactError(
                "there is not enough memory",
                where=path,
                found=str(error).partition("\n")[0] or None,
                todo="ask for less (rows, context, model, steps), or use a machine with more memory",
            ) from error
        raise


def disk_error(error: OSError, path: Path) -> ArtifactError:
    """Turn an OSError while reading or writing into an error that names the place and, on a full disk, its space."""
    what = f"could not write or read: {error.strerror or error}"
    again = "nothing written before was touched, run again to continue"
    if error.errno not in FULL:
        return ArtifactError(what, where=path, todo=f"mend that, or choose another `runs_dir`; {again}")
    parent = next(p for p in [path, *path.parents] if os.path.exists(p))  # pathlib's raises where it may not look
    return ArtifactError(
        what,
        where=path,
        found=f"{shutil.disk_usage(parent).free / 1e6:,.0f} MB free",
        todo=f"free some space or choose another `runs_dir`; {again}",
    )


def check_memory_fits(needed_bytes: int, what: str, where: str, todo: str | None = None) -> None:
    """Raise ConfigError when `what` needs more bytes than this machine has, before the system kills for them."""
    has_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed_bytes > has_bytes:
        raise ConfigError(
            "more than fits the memory of this machine",
            where=where,
            found=f"{what}: about {needed_bytes / 1e9:,.0f} GB",
            expected=f"less than {has_bytes / 1e9:,.0f} GB",
            todo=todo,
        )


def cpu_name() -> str:
    """Return the processor's name as the system reports it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def program() -> str:
    """Return how a user types `freehold` here: its path when the shell would not find it."""
    if shutil.which("freehold"):
        return "freehold"
    path = Path(sys.executable).parent / "freehold"
    if not path.exists():
        return f"{sys.executable} -m freehold.cli"
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
