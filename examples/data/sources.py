"""Where official files come from: the user's folder, or a checked download."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pooch


@dataclass(frozen=True)
class Source:
    """A file as its publisher gives it out, and the name of the data set it belongs to."""

    dataset: str
    name: str
    url: str
    md5: str

    @property
    def remedy(self) -> str:
        """What to do about a copy that cannot be read."""
        return f"Get the file again from {self.url}, or leave --data out to have it downloaded."


def locate(
    source: Source, folder: str | Path | None, *, quiet: bool, unpacked: tuple[str, ...] = ()
) -> Path:
    """The file, or the first of ``unpacked`` that is there, in ``folder/dataset`` or ``folder``.

    Without a folder the file is downloaded, unless it was before.
    """
    if folder is None:
        return download(source, Path(pooch.os_cache("implicitopt"), source.dataset), quiet=quiet)
    names = (*unpacked, source.name)
    places = [at / name for at in (Path(folder, source.dataset), Path(folder)) for name in names]
    for place in places:
        if place.is_file():
            return place
    tried = "\n".join(f"  {place}" for place in places)
    raise FileNotFoundError(
        f"{source.dataset} is not in {folder}. Looked for\n{tried}\n"
        f"Put the file from {source.url} there, or leave --data out to have it downloaded."
    )


def download(source: Source, cache: Path, *, quiet: bool) -> Path:
    """The file's copy in the cache, which is there only if its checksum is right."""
    pooch.get_logger().setLevel("WARNING" if quiet else "INFO")
    remedy = f"Try again, or put the file in a folder and name the folder with --data: {source.url}"
    downloader = pooch.HTTPDownloader(progressbar=not quiet, chunk_size=2**16)
    try:
        path = pooch.retrieve(
            source.url, f"md5:{source.md5}", source.name, cache, downloader=downloader
        )
    except ValueError as error:  # the checksum
        raise ValueError(f"The download of {source.name} is damaged: {error} {remedy}") from None
    except OSError as error:  # the network or the disk
        raise OSError(f"{source.name} was not downloaded: {error}. {remedy}") from None
    return Path(path)


def damaged(file: str | Path, expected: str, found: str, remedy: str) -> ValueError:
    """The error for a file whose contents are not what they should be."""
    return ValueError(f"{file} cannot be read. Expected {expected}; found {found}. {remedy}")


@contextmanager
def decoding(file: str | Path, expected: str, remedy: str) -> Iterator[None]:
    """Turn whatever a decoder trips over into one error that names the file."""
    try:
        yield
    except Exception as error:
        # An error with a number is the system's (no permission, say): nothing is wrong with the
        # contents. For the rest, gzip, tarfile, zipfile, pickle and Pillow have no common type.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        found = f"{type(error).__name__}: {error}".removesuffix(".")
        raise damaged(file, expected, found, remedy) from None
