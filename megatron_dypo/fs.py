"""Files and folders that appear whole or not at all, and files that only one process can make; also over NFS.

A reader sees either the old content or the new one. After a durable write returns, the file also survives a crash of
the
machine: the content is on the disk before the name, and the name before the return. A cheap write (``durable=False``)
leaves that to the operating system; it is for files that each step writes again.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import shutil
import stat
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

_log = logging.getLogger(__name__)
_HASH_BYTES = 8 * 2**20
_OTHERS = 0o077
"""Mode bits of the group and of other users."""
_WRITE_OF_OTHERS = 0o022
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


def set_access(*, shared: bool) -> None:
    """Let only this user read the files that this process and its children make from now on.

    Args:
        shared: leave the modes to the umask that the process has.
    """
    if not shared:
        os.umask(os.umask(_OTHERS) | _OTHERS)


def private_folder(path: Path) -> Path:
    """Make a folder that only this user may enter, and return it: ``path``, or a new one with a name that nobody knows.

    ``path`` may be in a folder of all users. There another user may have made it first, as a folder or as a link, or
    have been able to write to it; then a warning says so. ``slurm/node.sh`` has the same rule.
    """
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    found = path.lstat()
    if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & _WRITE_OF_OTHERS:
        path.chmod(0o700)
        return path
    _log.warning("%s is not a folder that only this user may write to: another one is used", path)
    return Path(tempfile.mkdtemp(prefix=f"{path.name}.", dir=path.parent))


def make_exclusively(path: Path, text: str) -> bool:
    """Make ``path`` with this text; return False if it exists already. If several processes try, one succeeds."""
    with passing(path.with_name(f"{path.name}.{uuid.uuid4().hex}"), text) as temporary:
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
        else:
            return True
    try:  # a file system without links: a reader may see the file while it is empty
        with path.open("x") as file:
            file.write(text)
    except FileExistsError:
        return False
    return True


@contextlib.contextmanager
def passing(path: Path, text: str) -> Iterator[Path]:
    """Make a file with this text, and remove it at the end of the block."""
    try:
        path.write_text(text)
        yield path
    finally:
        path.unlink(missing_ok=True)


def replace_file(path: Path, content: str | bytes, *, durable: bool = True) -> None:
    """Write ``path`` (text in UTF-8), whole or not at all. Several processes may write the same file."""
    with new_file(path, durable=durable) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def new_file(path: Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """Open a new file. It gets the name ``path`` when the block ends without an error, else it is removed.

    It replaces an existing file. Several processes may do so at the same time: the last one counts.
    """
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            if durable:
                _flush(file)
        temporary.replace(path)
        if durable:
            sync(path.absolute().parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def durable_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file in a folder that is being filled. Its content is on the disk at the end of the block."""
    with path.open("wb") as file:
        yield file
        _flush(file)


@contextlib.contextmanager
def new_folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Make a new folder. It gets the name ``path`` when the block ends without an error, else it is removed.

    Args:
        replace: it replaces an HF folder at ``path``.

    Raises:
        ValueError: ``path`` exists and is not an empty folder (with ``replace``: nor an HF folder).
    """
    if not (replace and (path / "config.json").is_file()):
        check_vacant(path)
    partial = start_folder(path)
    try:
        yield partial
        commit_folder(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def check_vacant(path: Path) -> None:
    """Raise ValueError unless ``path`` is free, or an empty folder."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"{path}: is there already and is not an empty folder; choose another or remove it")


def partial_path(path: Path) -> Path:
    """Return the path of the folder before it gets the name ``path``: beside it, so that a rename is enough."""
    return path.absolute().with_name(f".{path.name}.partial")


def start_folder(path: Path) -> Path:
    """Create the empty folder that will become ``path``; remove the remains of an interrupted attempt.

    Raises:
        ValueError: no folder can be created there.
    """
    partial = partial_path(path)
    try:
        remove(partial)
        partial.mkdir(parents=True)
    except OSError as error:
        raise ValueError(f"{path}: cannot be created: {error.strerror}") from error
    return partial


def commit_folder(partial: Path, path: Path) -> None:
    """Give a filled folder its name, replacing what has this name. It is durable once this returns."""
    for file in [*partial.rglob("*"), partial]:
        sync(file)
    if os.path.lexists(path):
        # A folder cannot be renamed onto one that is not empty, so the old one steps aside first.
        old = path.absolute().with_name(f".{path.name}.replaced")
        remove(old)
        path.rename(old)
        partial.rename(path)
        remove(old)
    else:
        partial.rename(path)
    sync(path.absolute().parent)


def hash_file(handle: BinaryIO, update: Callable[[int], object] | None = None) -> str:
    """Return the SHA-256 of an open file, in hexadecimal; ``update`` is told the bytes of each block as it is read."""
    digest = hashlib.sha256()
    offset = 0
    # Read by offset, so that threads may share the handle.
    while block := os.pread(handle.fileno(), _HASH_BYTES, offset):
        digest.update(block)
        offset += len(block)
        if update is not None:
            update(len(block))
    return digest.hexdigest()


def remove(path: Path) -> None:
    """Remove a folder, a file or a link (not its target). Nothing happens if nothing has that name."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
