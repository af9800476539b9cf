"""An artefact on disk: a folder, or the same files in one uncompressed zip. Whole or not at all.

A file's name holds the hash of its content, so that a new version stands beside an old one until
the manifest, which is replaced in one step, names it.
"""

import os
import shutil
import stat
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from glob import escape
from hashlib import file_digest, sha256
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # where there is none, nobody waits for anybody
    fcntl = None

from jaxaccel.export._manifest import FILES, FORMAT, LONGEST, File, Manifest, is_file_name, parse

MANIFEST = "manifest.json"
ZIP = ".zip"
_SEAL = 64  # the comment of a zip: the SHA-256 of all bytes before it, in hexadecimal digits
_PARTIAL = ".jaxaccel-partial"
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the same bytes whenever it is saved


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """A folder beside `path` to write into, gone afterwards; those of killed processes go first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{escape(path.name)}.*{_PARTIAL}"):
        with suppress(OSError), _locked(left, wait=False):
            shutil.rmtree(left)
    with ExitStack() as stack:
        stage = _stage(path, stack)
        try:
            yield stage
        finally:
            shutil.rmtree(stage, ignore_errors=True)


def _stage(path: Path, stack: ExitStack) -> Path:
    """A new folder, locked; before it is, another process may take it for one that was left."""
    while True:
        stage = Path(tempfile.mkdtemp(_PARTIAL, f".{path.name}.", path.parent))
        with suppress(FileNotFoundError):
            stack.enter_context(_locked(stage))
            if stage.exists():
                return stage


@contextmanager
def _locked(folder: Path, *, wait: bool = True, shared: bool = False) -> Iterator[None]:
    """Alone, or with others that share it, until the process ends, even if it is killed.

    Raises:
        OSError: where it should not wait, and another one holds it.
    """
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        # Some file systems have no locks: there nobody waits for anybody.
        with suppress(OSError) if wait else nullcontext():
            kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
            fcntl.flock(handle, kind if wait else kind | fcntl.LOCK_NB)
        yield
    finally:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)  # a process that was forked meanwhile has it too
        os.close(handle)


def described(file: Path) -> File:
    """The length and the hash of a file."""
    with file.open("rb") as opened:
        return File(file.stat().st_size, file_digest(opened, "sha256").hexdigest())


def check_target(path: Path) -> None:
    """Raises where something is there that is no artefact.

    Raises:
        FileExistsError: the message says what.
    """
    if is_zip(path):
        if path.is_dir():
            raise FileExistsError(f"{path}: is a folder; name a file, or a folder without {ZIP}")
        if path.exists() and not _has_seal(path):
            raise FileExistsError(f"{path}: is no artefact; remove it, or name another file")
    elif path.exists() and not path.is_dir():
        raise FileExistsError(f"{path}: is a file; name a folder, or a file that ends in {ZIP}")
    elif path.is_dir() and any(path.iterdir()) and not _is_ours(path):
        raise FileExistsError(f"{path}: holds other files; name an empty or a new folder")


def _is_ours(folder: Path) -> bool:
    names = [name for name in os.listdir(folder) if not name.startswith(".")]
    if not all(name == MANIFEST or is_file_name(name) for name in names):
        return False
    if MANIFEST not in names:
        return True
    with (folder / MANIFEST).open("rb") as file:
        return FORMAT.encode() in file.read(100)


def is_zip(path: Path) -> bool:
    """Whether all is to be in one file."""
    return path.suffix.lower() == ZIP


def _has_seal(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return len(archive.comment) == _SEAL


def commit(stage: Path, manifest: Manifest, path: Path) -> None:
    """Puts the staged files and their manifest in the place of what was there."""
    for part in FILES:
        os.replace(stage / part, stage / manifest.name(part))
    (stage / MANIFEST).write_text(manifest.text())
    for file in stage.iterdir():
        sync(file)
    if is_zip(path):
        _zip(stage, manifest, path)
    else:
        _replace(stage, manifest, path)
    sync(path.parent)


def _replace(stage: Path, manifest: Manifest, path: Path) -> None:
    path.mkdir(exist_ok=True)
    ours = {manifest.name(part) for part in FILES}
    with _locked(path):
        for name in ours:
            os.replace(stage / name, path / name)
        sync(path)
        os.replace(stage / MANIFEST, path / MANIFEST)
        sync(path)
        for name in os.listdir(path):
            if is_file_name(name) and name not in ours:
                (path / name).unlink()


def _zip(stage: Path, manifest: Manifest, path: Path) -> None:
    whole = stage / "whole"
    with zipfile.ZipFile(whole, "w", zipfile.ZIP_STORED) as archive:
        for name in (MANIFEST, *map(manifest.name, FILES)):
            info = zipfile.ZipInfo(name, _EPOCH)
            info.external_attr = 0o644 << 16
            info.file_size = (stage / name).stat().st_size  # decides whether sizes take 64 bits
            with (stage / name).open("rb") as source, archive.open(info, "w") as target:
                shutil.copyfileobj(source, target, 1 << 20)
        archive.comment = bytes(_SEAL)
    with whole.open("r+b") as opened:
        seal = _hash_but_last(opened)
        opened.seek(-_SEAL, os.SEEK_END)
        opened.write(seal.encode())
    sync(whole)
    os.replace(whole, path)


def _hash_but_last(file: IO[bytes]) -> str:
    """The hash of all but the seal."""
    found, left = sha256(), file.seek(0, os.SEEK_END) - _SEAL
    file.seek(0)
    while left > 0 and (chunk := file.read(min(left, 1 << 20))):
        found.update(chunk)
        left -= len(chunk)
    return found.hexdigest()


def sync(path: Path) -> None:
    """Until it would outlive a loss of power."""
    with suppress(PermissionError):  # a folder cannot be opened everywhere
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def opened(path: Path) -> Iterator["Stored"]:
    """An artefact to read, as it is now: who saves there waits, or puts another file there.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        ValueError: it is no artefact, or damaged.
    """
    if path.is_dir():
        with _locked(path, shared=True):
            yield Stored(path, None)
        return
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if not path.is_file() or not zipfile.is_zipfile(path):
        raise ValueError(f"{path}: not an artefact: neither a folder nor a zip")
    with path.open("rb") as file:
        whole = _hash_but_last(file)
        if file.read(_SEAL) != whole.encode():
            raise ValueError(
                f"{path}: damaged: the hash at its end is not that of its bytes; {_FIX}"
            )
        with _read_from(path):
            archive = zipfile.ZipFile(file)
        yield Stored(path, archive)


@contextmanager
def _read_from(where: Any) -> Iterator[None]:
    """Damage as an error that names the file."""
    try:
        yield
    except (zipfile.BadZipFile, EOFError, OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"{where}: damaged: {error}; {_FIX}") from None


class Stored:
    """An artefact that is open, with its manifest checked; `read` checks what it reads."""

    def __init__(self, path: Path, archive: zipfile.ZipFile | None) -> None:
        self.path, self._archive = path, archive
        text = self._bytes(MANIFEST, None).decode("utf-8", "replace")
        self.manifest = parse(text, self.where(MANIFEST))

    def where(self, name: str) -> str:
        """How an error names a file."""
        return str(self.path / name) if self._archive is None else f"{self.path}: {name}"

    def read(self, part: str) -> bytes:
        """The content of a file.

        Raises:
            ValueError: it is not what the manifest says.
        """
        file, name = self.manifest.files[part], self.manifest.name(part)
        content = self._bytes(name, file.bytes)
        if sha256(content).hexdigest() != file.sha256:
            raise ValueError(f"{self.where(name)}: damaged: its hash is not the manifest's; {_FIX}")
        return content

    def _bytes(self, name: str, size: int | None) -> bytes:
        """Of this length, or of any that a manifest may have: never more than is there."""
        if self._archive is None:
            return self._from_folder(name, size)
        return self._from_zip(self._archive, name, size)

    def _from_folder(self, name: str, size: int | None) -> bytes:
        file, where = self.path / name, self.where(name)
        try:
            status = file.lstat()
        except FileNotFoundError:
            raise ValueError(f"{where}: missing; {_FIX}") from None
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{where}: is no regular file; {_FIX}")
        _check_size(where, status.st_size, size)
        return file.read_bytes()

    def _from_zip(self, archive: zipfile.ZipFile, name: str, size: int | None) -> bytes:
        where, whole = self.where(name), self.path.stat().st_size
        if name not in archive.namelist():
            raise ValueError(f"{where}: missing; {_FIX}")
        info = archive.getinfo(name)
        _check_size(where, info.file_size, size)
        if info.compress_type != zipfile.ZIP_STORED or info.file_size > whole:
            raise ValueError(f"{where}: compressed, which artefacts are not; {_FIX}")
        with _read_from(where):
            return archive.read(info)


_FIX = "copy or save it anew"


def _check_size(where: str, found: int, expected: int | None) -> None:
    if expected is None and found > LONGEST:
        raise ValueError(f"{where}: {found:,} bytes; a manifest has at most {LONGEST:,}")
    if expected is not None and found != expected:
        raise ValueError(f"{where}: {found:,} bytes, expected {expected:,}; {_FIX}")
