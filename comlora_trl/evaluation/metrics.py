"""The CONVAI2 metrics, each from its own library: sacrebleu, rouge-score, NLTK's METEOR and bert-score.

This module adds replies with several references, empty replies, and a check of the data that METEOR and BERTScore
need, so that nothing fails after hours of generation. Every library
is imported, and every model read, when the metric is first used, once per process.

Choices that the libraries leave open:

- BLEU: `sacrebleu.corpus_bleu` as it stands (13a tokens, case kept, exponential smoothing).
- METEOR: `nltk.translate.meteor_score` with its defaults, the mean over replies. Tokens come from NLTK's
  `word_tokenize` with `preserve_line=True`. The `evaluate` library takes the same tokenizer after splitting sentences
  with the Punkt model, which is one more download; the two differ only at a period that ends a sentence inside a
  reply and has no space before it, and CONVAI2 puts one before each.
- ROUGE-L: the F1 of `rouge_score` without stemming, the mean over replies.
- BERTScore: `bert_score.BERTScorer` without idf weights or rescaling, the mean over replies.
  With transformers 5, bert-score 0.3.13 no longer gets a space before the first word of a text into RoBERTa's
  tokens, as it did with transformers 4, so figures are comparable to the last digit only under one version.
"""

import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from comlora_trl import compat
from comlora_trl.data.files import file_state

if TYPE_CHECKING:
    from bert_score import BERTScorer

MODEL_VARIABLE = "COMLORA_BERTSCORE_MODEL"
LAYERS_VARIABLE = "COMLORA_BERTSCORE_LAYERS"
DEFAULT_MODEL = "roberta-large"
METRICS = ("bleu", "meteor", "rouge_l", "bertscore_precision", "bertscore_recall", "bertscore_f1")


def score_dialogue(predictions: list[str], references: list[list[str]]) -> dict[str, float]:
    """Scores replies against their references; if a reply has several, the best one counts, as in each library.

    An empty reply (nothing but white space) scores 0 in every metric: it adds nothing to the corpus BLEU's matches,
    and 0 to the means of the others.

    Args:
        predictions: one reply per dialogue.
        references: for each reply, one or more references.

    Returns:
        the six `METRICS` and `average`, their unweighted mean; all in percent (0 to 100).

    Raises:
        ValueError: if the lists are empty or of different lengths, or a reply has no reference.
        RuntimeError: if WordNet or the BERTScore model is missing, as `check_requirements` says.
    """
    _check_input(predictions, references)
    predictions = [prediction if prediction.strip() else "" for prediction in predictions]
    precision, recall, f1 = _bertscore(predictions, references)
    scores = {
        "bleu": _bleu(predictions, references),
        "meteor": _meteor(predictions, references),
        "rouge_l": _rouge_l(predictions, references),
        "bertscore_precision": precision,
        "bertscore_recall": recall,
        "bertscore_f1": f1,
    }
    return scores | {"average": sum(scores.values()) / len(scores)}


def check_requirements() -> None:
    """Loads the data that METEOR and BERTScore need, so that a missing file is reported before generation.

    A model named by its hub id is downloaded if the machine is online. What is loaded stays loaded for scoring.

    Raises:
        RuntimeError: naming everything that is missing, with the commands that fix it, online and offline.
        ValueError: if COMLORA_BERTSCORE_LAYERS is not a layer count of the model.
    """
    problems = []
    for load in (_wordnet, _bert_scorer):
        try:
            load()
        except RuntimeError as error:
            problems.append(str(error))
    if problems:
        raise RuntimeError("\n".join(problems))


def bertscore_model_name() -> str:
    """The model that BERTScore uses: COMLORA_BERTSCORE_MODEL (a hub id or a folder), else roberta-large."""
    return os.environ.get(MODEL_VARIABLE) or DEFAULT_MODEL


def bertscore_layers() -> int:
    """The layer whose embeddings BERTScore compares.

    COMLORA_BERTSCORE_LAYERS if set, else bert-score's own choice for the model: by its id, or by the last part of a
    folder's path (`models/roberta-large` is taken for roberta-large).

    Raises:
        ValueError: if the variable is no whole number above 0, or is not set and bert-score does not know the model.
    """
    from bert_score.utils import model2layers

    name = bertscore_model_name()
    value = os.environ.get(LAYERS_VARIABLE)
    if value:
        if not value.isascii() or not value.isdigit() or int(value) < 1:
            raise ValueError(f"{LAYERS_VARIABLE}={value} is not a layer count: give a whole number from 1 up.")
        return int(value)
    if name in model2layers:
        return model2layers[name]
    last = Path(name).name
    known = [layers for model, layers in model2layers.items() if model.rsplit("/", 1)[-1] == last]
    if known:
        return known[0]
    raise ValueError(
        f"bert-score knows no layer for the model {name}: set {LAYERS_VARIABLE} to the layer to compare, "
        "from 1 to the model's number of layers."
    )


def bertscore_identity() -> tuple:
    """The identity of BERTScore's figures: the model's name, the layer, the files of a model's folder."""
    name = bertscore_model_name()
    folder = Path(name).expanduser()
    files = sorted(file for file in folder.iterdir() if file.is_file()) if folder.is_dir() else []
    return name, os.environ.get(LAYERS_VARIABLE), tuple(file_state(file) for file in files)


def _check_input(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if not predictions or len(predictions) != len(references):
        raise ValueError(
            f"got {len(predictions)} replies and references for {len(references)}: give as many of one as of the "
            "other, and at least one."
        )
    for row, group in enumerate(references):
        if isinstance(group, str) or not group:
            raise ValueError(f"reply {row} has the references {group!r}: give a list of at least one string.")


def _bleu(predictions: list[str], references: list[list[str]]) -> float:
    import sacrebleu

    # sacrebleu takes one stream per reference; None marks where a reply has no further one
    most = max(len(group) for group in references)
    streams = [[group[i] if i < len(group) else None for group in references] for i in range(most)]
    # `force` only silences a warning: CONVAI2's periods stand apart on both sides
    return sacrebleu.corpus_bleu(predictions, streams, force=True).score


def _meteor(predictions: list[str], references: list[list[str]]) -> float:
    from nltk import word_tokenize
    from nltk.translate.meteor_score import meteor_score

    _wordnet()

    def tokens(text: str) -> list[str]:
        return word_tokenize(text, preserve_line=True)

    scores = [
        meteor_score([tokens(r) for r in group], tokens(p)) for p, group in zip(predictions, references, strict=True)
    ]
    return 100 * sum(scores) / len(scores)


def _rouge_l(predictions: list[str], references: list[list[str]]) -> float:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    scores = [
        scorer.score_multi(group, p)["rougeL"].fmeasure for p, group in zip(predictions, references, strict=True)
    ]
    return 100 * sum(scores) / len(scores)


def _bertscore(predictions: list[str], references: list[list[str]]) -> tuple[float, float, float]:
    """Mean precision, recall and F1. Empty strings, on which bert-score 0.3.13 crashes, are kept from it."""
    import torch

    pairs = [(p, [r for r in group if r.strip()]) for p, group in zip(predictions, references, strict=True) if p]
    pairs = [(prediction, group) for prediction, group in pairs if group]
    if not pairs:
        return 0.0, 0.0, 0.0
    scorer = _bert_scorer()
    scorer.device = "cuda" if torch.cuda.is_available() else "cpu"
    compat.scorer_model(scorer).to(scorer.device)
    try:
        scores = scorer.score([prediction for prediction, _ in pairs], [group for _, group in pairs])
    finally:
        compat.scorer_model(scorer).to("cpu")
    precision, recall, f1 = (100 * s.double().sum().item() / len(predictions) for s in scores)
    return precision, recall, f1


@lru_cache(maxsize=1)
def _wordnet() -> None:
    """Loads WordNet, or says in one message how to get it."""
    try:
        from nltk.corpus import wordnet

        wordnet.ensure_loaded()
    except ImportError as error:
        raise RuntimeError(_not_installed(error)) from error
    except LookupError as error:
        raise RuntimeError(
            "METEOR needs NLTK's WordNet data, which is in none of NLTK's folders. Online: `python -m nltk.downloader "
            "wordnet`. Offline: `export NLTK_DATA=FOLDER`, where FOLDER/corpora/wordnet comes from `python -m "
            "nltk.downloader -d FOLDER wordnet` on a machine with a network."
        ) from error


def _bert_scorer() -> "BERTScorer":
    """The scorer, loaded once per model and layer count, or one message on how to get its model."""
    try:
        name, _, files = bertscore_identity()
        return _load_bert_scorer(name, bertscore_layers(), files)
    except ImportError as error:
        raise RuntimeError(_not_installed(error)) from error


@lru_cache(maxsize=1)
def _load_bert_scorer(name: str, layers: int, files: tuple = ()) -> "BERTScorer":
    from bert_score import BERTScorer
    from transformers import AutoConfig
    from transformers.utils import logging

    progress = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(name)
        available = config.num_hidden_layers
        if layers > available:
            raise ValueError(
                f"the model {name} has layers 1 to {available}, not {layers}: set {LAYERS_VARIABLE} to one of them."
            )
        # On the CPU until it is used, so that the model under evaluation has the whole accelerator
        scorer = BERTScorer(model_type=name, num_layers=layers, device="cpu")
    except OSError as error:
        folder = Path(name).expanduser()
        # A folder that no longer exists is downloaded again by its name
        hub_id = folder.name if folder.exists() or name.startswith((".", "/", "~")) else name
        raise RuntimeError(
            f"BERTScore needs the model {name}, which is neither a folder with a model nor in the hub's cache, nor "
            f"can it be downloaded now. Online: `hf download {hub_id}`. Offline: `export {MODEL_VARIABLE}=FOLDER/"
            f"{Path(name).name}`, a folder that comes from `hf download {hub_id} --local-dir FOLDER/"
            f"{Path(name).name}` on a machine with a network."
        ) from error
    finally:
        if progress:
            logging.enable_progress_bar()
    _limit_length(scorer, getattr(config, "max_position_embeddings", None))
    return scorer


def _limit_length(scorer: "BERTScorer", positions: int | None) -> None:
    """Gives a tokenizer that names no maximum the model's own; bert-score would pass on 1e30, and crash."""
    if positions and compat.scorer_tokenizer(scorer).model_max_length > positions:
        # RoBERTa's positions start at padding_idx + 1 = 2
        compat.scorer_tokenizer(scorer).model_max_length = positions - 2


def _not_installed(error: ImportError) -> str:
    return f'the CONVAI2 metrics need a package that is not installed ({error}): `pip install "comlora-trl[eval]"`.'
