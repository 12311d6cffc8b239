"""Another system, as far as Python can pretend: what Windows or macOS lack is taken away before the package is loaded.

python tests/support/foreign.py windows '[["doctor", "--json"]]'    commands of mixoff, one by one
"""

import builtins
import json
import mmap
import os
import pathlib
import sys
import tempfile

LACKING = {"macos": ("posix_fadvise", "sched_getaffinity", "O_DIRECT")}
LACKING["windows"] = (*LACKING["macos"], "preadv", "pread", "geteuid", "fork", "register_at_fork")
MAPPINGS = {
    "windows": ("MAP_PRIVATE", "MAP_ANONYMOUS", "MADV_HUGEPAGE", "MADV_DONTFORK"),
    "macos": ("MADV_HUGEPAGE", "MADV_DONTFORK"),
}


class NoBlocks:
    """What `stat` tells, without the blocks that Windows does not count."""

    def __init__(self, found):
        self.found = found

    def __getattr__(self, name):
        if name == "st_blocks":
            raise AttributeError(name)
        return getattr(self.found, name)


def pretend(system):
    for name in LACKING[system]:
        if hasattr(os, name):
            delattr(os, name)
    for name in MAPPINGS[system]:
        if hasattr(mmap, name):
            delattr(mmap, name)
    if system == "windows":
        _lock_files()


def _lock_files():
    """A file that is open cannot be removed, nor one that a temporary file holds be opened again; `fsync` writes."""
    import fcntl

    removed, stat, fsync, opened = os.unlink, pathlib.Path.stat, os.fsync, builtins.open

    def unlink(path, *arguments, **how):
        real = os.path.realpath(path)
        if any(_leads_to(fd, real) for fd in os.listdir("/proc/self/fd")):
            raise PermissionError(13, "The process cannot access the file because it is being used", str(path))
        removed(path, *arguments, **how)

    def sync(fd):
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY and not os.path.isdir(f"/proc/self/fd/{fd}"):
            raise OSError(9, "Bad file descriptor")
        fsync(fd)

    temporary, open_fd = tempfile.NamedTemporaryFile, os.open
    held = set()

    def named(*arguments, **how):
        file = temporary(*arguments, **how)
        if how.get("delete", True):
            held.add(file.name)
        return file

    def refuse_held(open_it):
        def checked(path, *arguments, **how):
            if isinstance(path, (str, os.PathLike)) and os.fspath(path) in held:
                raise PermissionError(13, "Permission denied", str(path))
            return open_it(path, *arguments, **how)

        return checked

    os.unlink, os.remove, os.fsync = unlink, unlink, sync
    os.open, builtins.open, tempfile.NamedTemporaryFile = refuse_held(open_fd), refuse_held(opened), named
    pathlib.Path.unlink = lambda self, missing_ok=False: None if missing_ok and not self.exists() else unlink(self)
    pathlib.Path.stat = lambda self, **how: NoBlocks(stat(self, **how))


def _leads_to(fd, real):
    try:
        return os.readlink(f"/proc/self/fd/{fd}") == real
    except OSError:
        return False


if __name__ == "__main__":
    import psutil  # noqa: F401  these know Linux by what is about to go
    import torch  # noqa: F401

    pretend(sys.argv[1])
    from mixoff.commands.cli import main

    sys.exit(max(main(command) for command in json.loads(sys.argv[2])))
