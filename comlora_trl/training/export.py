"""Exports a branch as an ordinary PEFT adapter: a LoRA of rank r at the root of a folder, as safetensors.

The export is atomic. The files are written into a temporary folder next to the target, which is then renamed.
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

# The folder below output_dir in which retired branches are saved
RETIRED = "retired"
# Files of a checkpoint folder that belong to all branches and are copied to an exported adapter
_TOKENIZER_PARTS = (
    *TOKENIZER_FILES,
    *("special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "vocab.json", "merges.txt"),
)


def check_target(target: str | Path, overwrite: bool) -> None:
    """Checks before training that an export to a folder is possible and loses no files.

    Raises:
        FileExistsError: if the target is a file, or a folder that is not empty while `overwrite` is False.
        PermissionError: if the target can't be written.
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
    """Checks that a folder can be written, and creates it if it does not exist.

    Args:
        folder: the folder.
        option: the option to change, for the message.

    Raises:
        PermissionError: if it can't; the message names the folder, the reason and the option.
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
    """A temporary folder that is renamed to `target` if the block ends without an error, and is deleted otherwise.

    Raises:
        FileExistsError, PermissionError: as for [`check_target`].
    """
    target = Path(target).absolute()
    check_target(target, overwrite)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield temporary
        # mkdtemp makes a private folder, but the export shall have the usual permissions of a new folder
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
    """Writes a branch as an ordinary PEFT adapter into a folder, with the tokenizer and `competition.json`."""
    snapshot.save(folder)
    if processing_class is not None:
        processing_class.save_pretrained(folder)
    write_summary(summary, folder)


class Background:
    """Writes files in a thread while training continues. An error in the thread is raised by [`wait`]."""

    def __init__(self) -> None:
        self._pending: list[Future[None]] = []

    def start(self, write: Callable[..., None], *args: Any) -> None:
        """Calls `write(*args)` in a thread."""
        thread = ThreadPoolExecutor(1, thread_name_prefix="comlora-export")
        self._pending.append(thread.submit(write, *args))
        thread.shutdown(wait=False)  # the thread ends after this call; Python waits for it at exit

    def wait(self) -> None:
        """Waits for all calls that were started.

        Raises:
            Exception: the error of a call that failed.
        """
        pending, self._pending = self._pending, []
        for written in pending:
            written.result()


def write_snapshots(
    snapshots: dict[int, SavedAdapter], folder: Path, summary: dict[str, Any], record: dict[str, Any]
) -> None:
    """Writes branches as PEFT adapters, each into a subfolder, with `competition.json` and `training.json`.

    There is no tokenizer and no card. An adapter gets these when it is exported from a checkpoint.

    Args:
        snapshots: the adapters by branch.
        folder: the folder for the subfolders. Subfolders of an earlier run are replaced.
        summary: content of `competition.json`.
        record: content of `training.json`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for branch, snapshot in snapshots.items():
        with new_folder(folder / branch_name(branch), overwrite=True) as own:
            save_branch(snapshot, own, summary | {"exported_branch": branch})
            write_training_record(own, record)


def push_winner(args: CompetitionConfig, **options: Any) -> CommitInfo:
    """Uploads `output_dir`, whose root contains the winner.

    Checkpoints, the retired branches and the winner's own folder are left out.

    Args:
        args: the training arguments.
        options: as for [`HfApi.upload_folder`].
    """
    winner, output = Path(args.winner_dir).absolute(), Path(args.output_dir).absolute()
    inside = [f"{winner.relative_to(output).as_posix()}/*"] if output in winner.parents else []
    left_out = ["_*", LM_EVAL_FILE, f"{PREFIX_CHECKPOINT_DIR}-*", f"{RETIRED}/*", *inside]
    return HfApi().upload_folder(folder_path=args.output_dir, ignore_patterns=left_out, **options)


def export_checkpoint(checkpoint: str | Path, branch: int | None, target: str | Path, overwrite: bool = False) -> int:
    """Exports a branch from a checkpoint folder, without loading a model.

    Args:
        checkpoint: a `checkpoint-N` folder of a ComLoRA run.
        branch: the branch; None for the winner of the newest evaluation before the checkpoint.
        target: the folder to export to.
        overwrite: whether to replace the target if it exists and is not empty.

    Returns:
        the exported branch.

    Raises:
        ValueError: if the folder is not such a checkpoint, does not have the branch, or has no winner yet.
        FileExistsError, PermissionError: as for [`check_target`].
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
