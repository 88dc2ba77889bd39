"""Reading local data files, and downloading pinned ones."""

import hashlib
import json
import os
import reprlib
import tempfile
import urllib.request
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from comlora_trl.data.errors import DataError

LLM_ADAPTERS_COMMIT = "816657208af4db747803f87ba40a4c71383fed7a"
LLM_ADAPTERS_URL = f"https://raw.githubusercontent.com/AGI-Edgerunners/LLM-Adapters/{LLM_ADAPTERS_COMMIT}/"
DATA_DIR_VARIABLE = "COMLORA_DATA_DIR"

_KINDS = {str: "text", int: "a whole number", list: "a list"}


def file_state(file: Path) -> tuple[str, int, int]:
    """A file's identity: (path, modification time in ns, bytes). Caches use it as their key."""
    state = file.stat()
    return str(file.resolve()), state.st_mtime_ns, state.st_size


def read_text(path: Path) -> str:
    """The text of a file that must exist and hold something; a byte order mark is no part of it."""
    if not path.is_file():
        raise DataError(f"{path}: no such file; check the path")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: expected UTF-8 text ({error}); save the file as UTF-8") from error
    if not text.strip():
        raise DataError(f"{path}: the file is empty; fetch it again")
    return text


def read_rows(path: Path, fields: Mapping[str, type] | None = None) -> list[dict[str, Any]]:
    """The rows of a JSON list (.json) or of JSON lines (.jsonl).

    Args:
        path: the file.
        fields: what each row must hold at least, and of which type, see [`check_row`].

    Raises:
        DataError: the file is missing, empty, not JSON, not a list of objects, or a row lacks a field.
    """
    text = read_text(path)
    try:
        if path.suffix == ".jsonl":
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
        else:
            rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: not valid JSON ({error}); fetch the file again") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path}: expected a list of JSON objects; see docs/data.md")
    if not rows:
        raise DataError(f"{path}: the list holds no rows; fetch the file again")
    for number, row in enumerate(rows):
        check_row(row, number, fields or {}, str(path))
    return rows


def check_row(row: Mapping[str, Any], number: int, fields: Mapping[str, type], source: str) -> None:
    """Raises a DataError when a row lacks a field, or holds null or something of another type in it.

    Args:
        row: the row.
        number: its number in the file, for the message.
        fields: the fields and their types (str, int or list).
        source: where the row comes from, for the message.
    """
    for field, kind in fields.items():
        value = row.get(field)
        if value is None:
            raise DataError(
                f"{source}: row {number} has no {field!r}; expected the fields {', '.join(fields)}, "
                f"got {', '.join(row) or 'none'}; fix that row or fetch the file again"
            )
        if not isinstance(value, kind) or isinstance(value, bool):
            raise DataError(unexpected(source, number, field, value, _KINDS[kind]))


def unexpected(source: str, number: int, field: str, value: Any, expected: str) -> str:
    """The message on a value that is not what was expected; a long value is shortened."""
    return (
        f"{source}: row {number} has the {field} {reprlib.repr(value)}, expected {expected}; "
        "fix that row or fetch the file again"
    )


def tasks_folder() -> Path:
    """The folder of our task files for lm_eval: inside the package, or beside it in a checkout.

    It is found relative to this file, because other projects have a folder `lm_eval_tasks` too.

    Raises:
        FileNotFoundError: it is in neither place.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "lm_eval_tasks", package.parent / "lm_eval_tasks"):
        if (folder / "commonsense" / "checksums.txt").is_file():
            return folder
    raise FileNotFoundError(f"{package}: the task files are not there; install comlora-trl again")


@cache
def llm_adapters_checksums() -> dict[str, str]:
    """Git blob SHA-1s of LLM-Adapters' files at the pinned commit, by path; they are kept in the task folder."""
    text = (tasks_folder() / "commonsense" / "checksums.txt").read_text(encoding="utf-8")
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line and not line.startswith("#")]
    return {name: sha1 for sha1, name in lines}


def git_blob_sha1(path: Path) -> str:
    """The SHA-1 under which git stores a file of this content."""
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check_sha1(path: Path, sha1: str) -> None:
    """Raises a DataError when the file's git blob SHA-1 is another."""
    if (found := git_blob_sha1(path)) != sha1:
        raise DataError(
            f"{path}: git blob SHA-1 is {found}, expected {sha1}; delete the file so that it is downloaded again"
        )


def cache_folder() -> Path:
    """Where downloads are kept: COMLORA_CACHE_DIR, or a folder in the Hugging Face cache."""
    if folder := os.environ.get("COMLORA_CACHE_DIR"):
        return Path(folder).expanduser()
    return Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser() / "comlora_trl"


def download_llm_adapters(name: str) -> Path:
    """A file of LLM-Adapters' repository at the pinned commit, from the cache or downloaded, its checksum checked.

    Args:
        name: path in the repository, one of those in [`llm_adapters_checksums`].

    Raises:
        DataError: the download fails, or its checksum differs (then nothing is kept).
    """
    sha1 = llm_adapters_checksums()[name]
    target = cache_folder() / LLM_ADAPTERS_COMMIT / name
    if target.is_file():
        check_sha1(target, sha1)
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=target.parent, suffix=".part")
    try:
        _fetch(LLM_ADAPTERS_URL + name, handle)
        if (found := git_blob_sha1(Path(temporary))) != sha1:
            raise DataError(
                f"{LLM_ADAPTERS_URL + name}: git blob SHA-1 is {found}, expected {sha1}; "
                f"try again, or put a copy in the folder that {DATA_DIR_VARIABLE} names"
            )
        os.replace(temporary, target)
    except OSError as error:
        raise DataError(
            f"{LLM_ADAPTERS_URL + name}: cannot be downloaded to {target} ({error}); "
            f"offline, set {DATA_DIR_VARIABLE} to a folder that holds the data"
        ) from error
    finally:
        Path(temporary).unlink(missing_ok=True)
    return target


def _fetch(url: str, handle: int) -> None:
    from tqdm.auto import tqdm

    with os.fdopen(handle, "wb") as file, urllib.request.urlopen(url, timeout=60) as response:
        total = int(response.headers.get("Content-Length", 0)) or None
        with tqdm(total=total, unit="B", unit_scale=True, desc=url.rsplit("/", 1)[-1]) as progress:
            while block := response.read(1 << 16):
                file.write(block)
                progress.update(len(block))
