"""Exporting a branch as an ordinary PEFT adapter: one rank-r LoRA at the folder's root, safetensors only.

The export is atomic: it is written into a temporary folder beside the target and renamed.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from comlora_trl.branches.model import branch_name
from comlora_trl.training.checkpoints import load_state
from comlora_trl.training.config import CompetitionConfig
from comlora_trl.training.report import competition_summary, write_summary
from comlora_trl.training.saved import SavedAdapter
from comlora_trl.winner.files import LM_EVAL_FILE, read_training_record, write_training_record, write_winner_files
from comlora_trl.winner.folder import TOKENIZER_FILES

# Where branches that a rung has retired are kept, below output_dir
RETIRED = "retired"
# What a checkpoint folder holds for every branch alike, to be kept beside the exported adapter
_TOKENIZER_PARTS = (
    *TOKENIZER_FILES,
    *("special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "vocab.json", "merges.txt"),
)


def check_target(target: str | Path, overwrite: bool) -> None:
    """Refuses a target that can't be written or would lose something, before training starts.

    Raises:
        FileExistsError: if the folder exists, is not empty and `overwrite` is False.
        PermissionError: if it can't be written.
    """
    target = Path(target)
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise FileExistsError(
            f"the winner's folder {target} exists and is not empty: give another one with --comlora_winner_dir, or "
            "replace it with --comlora_overwrite_winner."
        )
    check_writable(target.parent, "comlora_winner_dir")
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"the winner's folder {target} is a file: give a folder with --comlora_winner_dir.")


def check_writable(folder: str | Path, option: str) -> None:
    """Refuses a folder that can't be made or written to, in one line.

    Raises:
        PermissionError: naming the folder, the reason and the option to change.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise PermissionError(
            f"can't write to {folder} ({error.strerror}): choose another folder with --{option}, or make it writable."
        ) from error


@contextmanager
def new_folder(target: str | Path, overwrite: bool) -> Iterator[Path]:
    """A temporary folder that becomes `target` when the block ends without an error, and vanishes otherwise."""
    target = Path(target).absolute()
    check_target(target, overwrite)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield temporary
        # mkdtemp makes a private folder; the export is as readable as any other new folder
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)
        if target.exists():
            previous = Path(tempfile.mkdtemp(prefix=f".{target.name}.previous.", dir=target.parent))
            os.replace(target, previous / target.name)
            os.replace(temporary, target)
            shutil.rmtree(previous)
        else:
            os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def save_branch(snapshot: SavedAdapter, folder: Path, summary: dict[str, Any], processing_class: Any = None) -> None:
    """Writes a branch into a folder as an ordinary PEFT adapter, with tokenizer and `competition.json`."""
    snapshot.save(folder)
    if processing_class is not None:
        processing_class.save_pretrained(folder)
    write_summary(summary, folder)


class Background:
    """Writes in a thread while training goes on; an error comes out where the writing is waited for."""

    def __init__(self) -> None:
        self._pending: list[Future[None]] = []

    def start(self, write: Callable[..., None], *args: Any) -> None:
        """Begins to write."""
        thread = ThreadPoolExecutor(1, thread_name_prefix="comlora-export")
        self._pending.append(thread.submit(write, *args))
        thread.shutdown(wait=False)  # it ends with its work, which the interpreter's end waits for too

    def wait(self) -> None:
        """Waits for all that was begun."""
        pending, self._pending = self._pending, []
        for written in pending:
            written.result()


def write_snapshots(
    snapshots: dict[int, SavedAdapter], folder: Path, summary: dict[str, Any], record: dict[str, Any]
) -> None:
    """Writes branches as plain adapters, each into a folder of its own, with `competition.json` and `training.json`.

    Tokenizer and card are the winner's: an adapter gets its own when it is exported from a checkpoint.

    Args:
        folder: what they lie in; an earlier run's are replaced.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for branch, snapshot in snapshots.items():
        with new_folder(folder / branch_name(branch), overwrite=True) as own:
            save_branch(snapshot, own, summary | {"exported_branch": branch})
            write_training_record(own, record)


def push_winner(args: CompetitionConfig, **options: Any) -> CommitInfo:
    """Uploads `output_dir`, at whose root the winner lies, without checkpoints and a second copy of it.

    Args:
        options: of [`HfApi.upload_folder`].
    """
    winner, output = Path(args.winner_dir).absolute(), Path(args.output_dir).absolute()
    inside = [f"{winner.relative_to(output).as_posix()}/*"] if output in winner.parents else []
    left_out = ["_*", LM_EVAL_FILE, f"{PREFIX_CHECKPOINT_DIR}-*", *inside]
    return HfApi().upload_folder(folder_path=args.output_dir, ignore_patterns=left_out, **options)


def export_checkpoint(checkpoint: str | Path, branch: int | None, target: str | Path, overwrite: bool = False) -> int:
    """Exports a branch from a checkpoint folder, without loading a model.

    Args:
        checkpoint: a `checkpoint-N` folder of a ComLoRA run.
        branch: the branch, or None for the winner of the newest evaluation before the checkpoint.

    Returns:
        the exported branch.

    Raises:
        ValueError: if the folder is no such checkpoint, has no such branch or no winner yet.
    """
    checkpoint = Path(checkpoint)
    state = load_state(checkpoint)
    if branch is None:
        if state.selection is None:
            raise ValueError(
                f"checkpoint {checkpoint} was saved before any evaluation, so it knows no winner: name a branch with "
                f"--branch 0..{state.k - 1}, or train with --eval_strategy steps."
            )
        branch = state.selection["winner"]
    if not 0 <= branch < state.k:
        raise ValueError(f"checkpoint {checkpoint} has no branch {branch}: choose one of 0..{state.k - 1}, or all.")
    source = checkpoint / branch_name(branch)
    if branch in state.retired and not source.is_dir():
        source = checkpoint.parent / RETIRED / branch_name(branch)
    with new_folder(target, overwrite) as folder:
        for file in source.iterdir():
            shutil.copy2(file, folder)
        for name in _TOKENIZER_PARTS:
            if (checkpoint / name).is_file():
                shutil.copy2(checkpoint / name, folder)
        write_summary(competition_summary(state, []) | {"exported_branch": branch}, folder)
        if record := read_training_record(checkpoint):
            write_winner_files(folder, target=target, record=record)
    return branch
