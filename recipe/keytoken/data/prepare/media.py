"""Finds the clip, folder of frames or image that a row names, below the media root and nowhere else."""

import os
import re
from pathlib import Path

from keytoken.data.decoders.folder import RATE_FILE, frame_files
from keytoken.data.prepare.samples import Draft, RowProblem
from keytoken.errors import DataError

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:(?://|[^\\/])")
_DRIVE = re.compile(r"[A-Za-z]:[\\/]")


def locate(draft: Draft, root: Path) -> Path:
    """The file of a row, with symbolic links followed.

    Args:
        draft: The row.
        root: The media root, with symbolic links followed.

    Returns:
        An existing file or folder of frames below the root.

    Raises:
        RowProblem: The row names a URL, or a file outside the root, by itself or through a link, or one that
            is missing, empty or neither a file nor a folder of frames.
    """
    name = draft.media.strip()
    if not name or "\0" in name:
        raise RowProblem("no media", f"the path {name!r} names no file; write the path below media_root")
    if _DRIVE.match(name):
        raise RowProblem("path outside media_root", f"{name} is on a drive; write the path below media_root")
    if _URL.match(name):
        raise RowProblem("URL", f"{name[:100]} is an address; download the file and write its path")
    if "\\" in name and not os.path.lexists(root / name):
        name = name.replace("\\", "/")
    path = Path(os.path.normpath(root / name))
    if not path.is_relative_to(root):
        if not (draft.slash_is_root and name.startswith("/") and ".." not in Path(name).parts):
            raise RowProblem(
                "path outside media_root", f"{name} lies outside {root}; move the file or set media_root"
            )
        path = root / name.lstrip("/")
    try:
        real = path.resolve(strict=True)
        size = real.stat().st_size
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        if isinstance(error, PermissionError):
            raise RowProblem("media not readable", f"{path}: permission denied; change it") from error
        raise RowProblem(
            "media missing", f"{path}: no such file; check media_root and the row's path"
        ) from error
    if not real.is_relative_to(root):
        raise RowProblem(
            "path outside media_root",
            f"{path} is a link to {real}, outside {root}; copy the file or point media_root at its folder",
        )
    if real.is_dir() and draft.kind == "video":
        _check_frames(real, root)
        return real
    if not real.is_file():
        raise RowProblem("media is no file", f"{path} is a folder or a device; name a video or image file")
    if size == 0:
        raise RowProblem("media empty", f"{path} has 0 bytes; copy or download it again")
    return real


def _check_frames(folder: Path, root: Path) -> None:
    """Whether a folder has frames, all below the root as is their rate."""
    try:
        frames = frame_files(folder)
    except (DataError, OSError) as problem:
        raise RowProblem(
            "media is no file", f"{folder} is a folder and none of frames: {problem}; name a video file"
        ) from problem
    for file in [*frames, folder / RATE_FILE]:
        if file.is_symlink() and not file.resolve().is_relative_to(root):
            raise RowProblem(
                "path outside media_root",
                f"{file} is a link to {file.resolve()}, outside {root}; copy the file or point media_root "
                "at its folder",
            )
