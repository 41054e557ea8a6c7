"""Faces, or any other pictures the user has, in a training and a test part."""

from __future__ import annotations

from pathlib import Path

from data.images import Images, image_paths, read_images


def faces(
    folder: str | Path | None,
    train: bool,
    size: int = 64,
    limit: int | None = None,
    *,
    quiet: bool = False,
) -> Images:
    """The first ``limit`` training or test pictures of ``folder``, as `image_folder` reads them.

    ``folder`` or ``folder/faces`` may hold ``train`` and ``test``. Otherwise the first nine tenths
    of its pictures, in the order of their paths, are the training part. Neighbours (frames of a
    film, or CelebA's pictures, which are parted by person in this order) so stay on one side.

    Raises:
        FileNotFoundError: no folder was given, or it is not there.
        ValueError: a part would be empty, or a picture cannot be read.
    """
    if folder is None:
        raise FileNotFoundError(
            "Faces are not downloaded: CelebA's authors alone give it out, for research only. "
            "Unpack its aligned images (img_align_celeba.zip, from "
            "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html), or take any folder of pictures, "
            "and name the folder with --data DIR."
        )
    return read_images(_part(Path(folder), train), size, limit, quiet=quiet)


def _part(folder: Path, train: bool) -> list[Path]:
    for parent in (folder / "faces", folder):
        if (parent / "train").is_dir() and (parent / "test").is_dir():
            return image_paths(parent / ("train" if train else "test"))
    paths = image_paths(folder / "faces" if (folder / "faces").is_dir() else folder)
    if len(paths) < 2:
        raise ValueError(
            f"{folder} holds one picture, {paths[0].name}. Expected at least 2, "
            "one to train with and one to test with; add pictures."
        )
    cut = len(paths) * 9 // 10
    return paths[:cut] if train else paths[cut:]
