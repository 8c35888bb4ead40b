"""Files that appear whole, and files that one process alone can make, also over NFS."""

from __future__ import annotations

import contextlib
import errno
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


def make_exclusively(path: Path, text: str) -> bool:
    """Make ``path`` with this text; False if it is there already. Of several processes one succeeds."""
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


def replace_file(path: Path, text: str) -> None:
    """Write ``path`` in UTF-8, all of it or nothing; several processes may write the same one."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def passing(path: Path, text: str) -> Iterator[Path]:
    """A file with this text, removed at the end."""
    try:
        path.write_text(text)
        yield path
    finally:
        path.unlink(missing_ok=True)
