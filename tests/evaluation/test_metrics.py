"""The CONVAI2 metrics against the four libraries called directly, and what is said when their data is missing."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from libraries import directly

from comlora_trl.evaluation import metrics

pytest.importorskip("bert_score")

REPLIES = [
    "i read two books a month and my grandfather raised me . you ?",
    "i am a vegetarian , so no fish for me .",
    "do you think so ?",
    "my dog likes to run in the park near my house .",
    "what do you do for a living ?",
    "i teach maths at a small school in the north .",
]
WORDS = sorted({word for reply in REPLIES for word in reply.split()})


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch):
    """No metric's data is remembered from another test."""
    monkeypatch.delenv(metrics.MODEL_VARIABLE, raising=False)
    monkeypatch.delenv(metrics.LAYERS_VARIABLE, raising=False)
    yield
    metrics._wordnet.cache_clear()
    metrics._load_bert_scorer.cache_clear()


@pytest.fixture
def wordnet(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """WordNet where it is at hand, else one without synonyms: METEOR then matches words and stems only."""
    import nltk

    try:
        folder = request.getfixturevalue("shared_data") / "nltk_data"
    except pytest.skip.Exception:
        # into the lazy loader's own dictionary: asking it for an attribute would make it look for its data
        monkeypatch.setitem(nltk.corpus.wordnet.__dict__, "ensure_loaded", lambda: None)
        monkeypatch.setitem(nltk.corpus.wordnet.__dict__, "synsets", lambda word: [])
    else:
        monkeypatch.setattr(nltk.data, "path", [str(folder), *nltk.data.path])


def make_bert(folder: Path, name: str = "bert") -> Path:
    """A random BERT of two layers with a vocabulary of whole words, in a folder of its own."""
    from transformers import BertConfig, BertModel, BertTokenizer

    folder = folder / name
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]) + "\n")
    BertTokenizer(str(folder / "vocab.txt"), model_max_length=64).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=5 + len(WORDS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def bert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    folder = str(make_bert(tmp_path))
    monkeypatch.setenv(metrics.MODEL_VARIABLE, folder)
    monkeypatch.setenv(metrics.LAYERS_VARIABLE, "2")
    return folder


def test_gold_replies_give_100(wordnet: None, bert: str):
    scores = metrics.score_dialogue(REPLIES, [[reply] for reply in REPLIES])

    assert list(scores) == [*metrics.METRICS, "average"]
    meteor = scores.pop("meteor")
    average = scores.pop("average")
    assert scores == pytest.approx(dict.fromkeys(scores, 100), abs=1e-4)
    assert 99 < meteor < 100  # METEOR takes a little off for each chunk, and a reply has at least one
    assert average == pytest.approx((500 + meteor) / 6, abs=1e-4)


def test_scores_equal_the_libraries_with_several_references(wordnet: None, bert: str):
    draw = random.Random(0)
    predictions = [" ".join(draw.choices(WORDS, k=draw.randint(3, 12))) for _ in range(20)]
    references = [draw.sample(REPLIES, k=draw.randint(1, 3)) for _ in range(20)]

    scores = metrics.score_dialogue(predictions, references)

    expected = directly(predictions, references, bert, 2)
    assert scores == pytest.approx(expected, rel=1e-6)
    assert 0 < scores["meteor"] < 50


def test_further_references_only_help(wordnet: None, bert: str):
    predictions = REPLIES[::-1]
    one = metrics.score_dialogue(predictions, [[reply] for reply in REPLIES])
    two = metrics.score_dialogue(predictions, [[reply, p] for reply, p in zip(REPLIES, predictions, strict=True)])

    assert two["bleu"] == pytest.approx(100) and two["rouge_l"] == pytest.approx(100)
    assert all(two[name] > one[name] for name in one)


@pytest.mark.parametrize("empty", ["", "   ", "\n\t"])
def test_empty_replies_score_0(wordnet: None, bert: str, empty: str):
    scores = metrics.score_dialogue([empty] * 3, [[reply] for reply in REPLIES[:3]])

    assert scores == dict.fromkeys(scores, 0)


def test_an_empty_reply_counts_as_a_reply(wordnet: None, bert: str):
    references = [[reply] for reply in REPLIES[:4]]
    scores = metrics.score_dialogue([*REPLIES[:2], "", " "], references)

    half = {name: scores[name] for name in ("rouge_l", "bertscore_precision", "bertscore_recall", "bertscore_f1")}
    assert half == pytest.approx(dict.fromkeys(half, 50), abs=1e-4)
    assert scores["meteor"] == pytest.approx(50, abs=0.5)
    assert 0 < scores["bleu"] < 100  # the brevity penalty


def test_an_empty_reference_is_no_crash(wordnet: None, bert: str):
    scores = metrics.score_dialogue(REPLIES[:2], [["", REPLIES[0]], [" "]])

    assert scores["bertscore_f1"] == pytest.approx(50, abs=1e-4)
    assert scores["rouge_l"] == pytest.approx(50)


def test_a_long_reply_is_cut_to_the_model(wordnet: None, bert: str):
    config = Path(bert) / "tokenizer_config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps({key: value for key, value in settings.items() if key != "model_max_length"}))

    scores = metrics.score_dialogue([" ".join(REPLIES * 5)], [[REPLIES[0]]])

    assert 0 < scores["bertscore_f1"] < 100


def test_the_model_is_loaded_once(wordnet: None, bert: str, monkeypatch: pytest.MonkeyPatch):
    import bert_score

    made = []
    original = bert_score.BERTScorer
    monkeypatch.setattr(bert_score, "BERTScorer", lambda **given: made.append(given) or original(**given))
    metrics.check_requirements()
    for _ in range(2):
        metrics.score_dialogue(REPLIES[:2], [[REPLIES[0]]] * 2)

    assert made == [{"model_type": bert, "num_layers": 2, "device": "cpu"}]


def test_importing_loads_nothing_heavy():
    code = "import sys; import comlora_trl.evaluation.metrics as m; m.bertscore_model_name(); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()

    # `comlora_trl` itself is light: its public names are looked up when used
    assert not {"nltk", "sacrebleu", "rouge_score", "bert_score", "transformers"} & set(loaded)


@pytest.mark.parametrize(
    ("predictions", "references", "says"),
    [
        ([], [], "got 0 replies"),
        (["a"], [["a"], ["b"]], "got 1 replies and references for 2"),
        (["a"], [[]], "reply 0"),
        (["a", "b"], [["a"], "b"], "reply 1"),
    ],
)
def test_bad_input_is_refused(predictions: list, references: list, says: str):
    with pytest.raises(ValueError, match=says) as caught:
        metrics.score_dialogue(predictions, references)
    assert "\n" not in str(caught.value)


def test_everything_missing_is_said_before_generation(tmp_path: Path):
    """In a process of its own, where NLTK and the hub know no folder but an empty one."""
    code = """
import nltk
from comlora_trl.evaluation.metrics import check_requirements
nltk.data.path[:] = []
try:
    check_requirements()
except RuntimeError as error:
    print(error)
"""
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    environment = {k: v for k, v in environment.items() if k not in ("NLTK_DATA", "HF_HUB_CACHE")}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)

    lines = run.stdout.strip().splitlines()
    assert len(lines) == 2, run.stdout + run.stderr
    assert "python -m nltk.downloader wordnet" in lines[0] and "export NLTK_DATA=" in lines[0]
    assert "hf download roberta-large`" in lines[1] and "export COMLORA_BERTSCORE_MODEL=" in lines[1]


def test_a_folder_that_is_not_there_is_named(wordnet: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(metrics.MODEL_VARIABLE, str(tmp_path / "nothing" / "roberta-large"))

    with pytest.raises(RuntimeError, match="nothing/roberta-large") as caught:
        metrics.check_requirements()
    assert "`hf download roberta-large`" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_nothing_missing_passes(wordnet: None, bert: str):
    metrics.check_requirements()
    assert metrics.bertscore_model_name() == bert


def test_model_and_layers_from_the_environment(monkeypatch: pytest.MonkeyPatch):
    assert (metrics.bertscore_model_name(), metrics.bertscore_layers()) == ("roberta-large", 17)
    monkeypatch.setenv(metrics.MODEL_VARIABLE, "/models/roberta-base/")
    assert metrics.bertscore_layers() == 10
    monkeypatch.setenv(metrics.MODEL_VARIABLE, "/models/mine")
    with pytest.raises(ValueError, match="COMLORA_BERTSCORE_LAYERS"):
        metrics.bertscore_layers()
    monkeypatch.setenv(metrics.LAYERS_VARIABLE, "5")
    assert metrics.bertscore_layers() == 5


@pytest.mark.parametrize("layers", ["0", "-1", "two", "1.5"])
def test_wrong_layers_are_refused(bert: str, monkeypatch: pytest.MonkeyPatch, layers: str):
    monkeypatch.setenv(metrics.LAYERS_VARIABLE, layers)
    with pytest.raises(ValueError, match=f"COMLORA_BERTSCORE_LAYERS={layers}"):
        metrics.check_requirements()


@pytest.mark.parametrize("layers", ["3", None])
def test_a_layer_that_the_model_lacks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layers: str | None):
    """None: the layer of bert-score's own choice for a model of this name, 17."""
    monkeypatch.setenv(metrics.MODEL_VARIABLE, str(make_bert(tmp_path, "roberta-large")))
    if layers:
        monkeypatch.setenv(metrics.LAYERS_VARIABLE, layers)
    with pytest.raises(ValueError, match=f"layers 1 to 2, not {layers or 17}: set COMLORA_BERTSCORE_LAYERS"):
        metrics.check_requirements()
