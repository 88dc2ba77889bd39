"""`comlora-plot`: what is drawn is what `competition.json` says, and what can't be drawn gets one line."""

import json
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from matplotlib.figure import Figure

from comlora_trl import plots
from comlora_trl.cli import plot

LOSSES = {5: [3.0, 2.0, 2.5], 10: [2.8, 1.5, None], 20: [None, 1.2, None]}


def competition(**changes) -> dict:
    """Three branches, rungs at steps 5 and 10, branch_1 wins; as training writes it."""
    rungs = [
        {"step": 5, "survivors": 2, "retired": [2], "validation_nll": LOSSES[5]},
        {"step": 10, "survivors": 1, "retired": [0], "validation_nll": LOSSES[10]},
    ]
    history = [
        {"step": 4, "loss": 3.0} | {f"comlora/{kind}_{k}": 3.0 - k for kind in ("loss", "wins") for k in range(3)},
        {"step": 8, "comlora/loss_0": 2.5, "comlora/loss_1": 1.0, "comlora/wins_0": 0.0, "comlora/wins_1": 4.0},
        {"step": 10, "eval_mine_comlora/loss_0": 2.8, "eval_mine_comlora/loss_1": 1.5, "eval_mine_comlora/winner": 1},
        {"step": 20, "comlora/loss_1": 0.9},
        {"step": 20, "eval_comlora/loss_1": 1.2, "eval_comlora/winner": 1, "eval_comlora/accuracy_1": 0.8},
    ]
    branches = [
        {"branch": k, "learning_rate": rate, "retired_at_step": end, "disqualified_at_step": None}
        for k, (rate, end) in enumerate([(1e-3, 10), (2e-3, None), (4e-3, 5)])
    ]
    content = {"k": 3, "winner": 1, "branches": branches, "rungs": rungs, "row_passes": 160, "history": history}
    return content | changes


@pytest.fixture
def winner(tmp_path):
    def write(**changes) -> Path:
        (tmp_path / "competition.json").write_text(json.dumps(competition(**changes)))
        return tmp_path

    return write


def drawn(folder: Path, figure: str):
    axes = Figure().add_subplot()
    plots.FIGURES[figure](axes, plots.read_competition(folder))
    lines = {line.get_label().split(",")[0]: line for line in axes.lines if not line.get_label().startswith("_")}
    return axes, {name: dict(zip(*line.get_data(), strict=True)) for name, line in lines.items()}, lines


def test_losses_end_at_the_rungs_and_the_winner_stands_out(winner):
    axes, curves, lines = drawn(winner(), "losses")
    for branch in range(3):
        expected = {step: row[branch] for step, row in LOSSES.items() if row[branch] is not None}
        assert curves[f"branch_{branch}"] == expected
    assert [line.get_label() for line in lines.values()] == [
        "branch_0, rate 0.001: retired at step 10",
        "branch_1, rate 0.002: winner",
        "branch_2, rate 0.004: retired at step 5",
    ]
    thin = [dict(zip(*line.get_data(), strict=True)) for line in axes.lines if line.get_linewidth() < 1]
    assert thin == [{4: 3.0, 8: 2.5}, {4: 2.0, 8: 1.0, 20: 0.9}, {4: 1.0}]
    assert lines["branch_1"].get_linewidth() > lines["branch_0"].get_linewidth()
    assert {text.get_text(): text.xy[0] for text in axes.texts} == {"3 → 2": 5, "2 → 1": 10}
    assert "training" in axes.get_ylabel()


def test_wins_are_cumulative_while_there_is_a_race(winner):
    _, curves, _ = drawn(winner(), "wins")
    # 3, 2, 1 wins by step 4; then four more of branch_1
    assert curves["branch_0"] == pytest.approx({4: 50.0, 8: 30.0})
    assert curves["branch_1"] == pytest.approx({4: 100 / 3, 8: 60.0})
    assert curves["branch_2"] == pytest.approx({4: 100 / 6})


def test_scores_against_losses(winner):
    entries = [
        {"step": step} | {f"eval_comlora/{kind}_{k}": step * (k + 1) for kind in ("loss", "score") for k in range(3)}
        for step in (1, 2)
    ]
    axes, _, _ = drawn(winner(history=entries, rungs=[]), "scores")
    last = [group.get_offsets().tolist() for group in axes.collections if group.get_label().startswith("branch")]
    assert last == [[[2, 2]], [[4, 4]], [[6, 6]]]


@pytest.mark.parametrize("name", ["picture.png", "picture.svg"])
def test_the_command_writes_a_picture(winner, tmp_path, capsys, name):
    plot.main([str(winner()), "--output", str(tmp_path / name)])
    assert capsys.readouterr().out == f"{tmp_path / name}\n"
    content = (tmp_path / name).read_bytes()
    assert content.startswith(b"\x89PNG") if name.endswith("png") else ElementTree.fromstring(content) is not None
    plot.main([str(tmp_path), "--figure", "wins"])
    assert (tmp_path / "wins.png").stat().st_size > 5000


BAD = {
    "no winner": ({}, ["missing"], "missing: no competition.json there"),
    "no history": ({"history": [], "rungs": []}, ["."], "has no branch's loss"),
    "no scores": ({}, [".", "--figure", "scores"], "only a run with a selector has them"),
    "nobody to beat": ({"history": []}, [".", "--figure", "wins"], "no step that several branches could win"),
    "not ours": ({"branches": None}, ["."], "is not what training writes"),
    "format": ({}, [".", "--output", "picture.gif"], "must end in .png, .svg, .pdf"),
    "no folder": ({}, [".", "--output", "nowhere/picture.png"], "No such file"),
}


@pytest.mark.parametrize("changes, arguments, message", BAD.values(), ids=BAD)
def test_bad_input_is_one_line(winner, monkeypatch, changes, arguments, message):
    monkeypatch.chdir(winner(**changes))
    with pytest.raises(SystemExit) as ended:
        plot.main(arguments)
    assert str(ended.value).startswith("error: ") and message in str(ended.value)
    assert "\n" not in str(ended.value)


def test_without_matplotlib(winner, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit, match="error: pictures need matplotlib: pip install matplotlib"):
        plot.main([str(winner())])


def test_a_real_tournament(train, tmp_path):
    settings = {"comlora_tournament": True, "max_steps": 12, "logging_steps": 2}
    trainer = train(**settings, trainer={"eval_dataset": None})
    run = plots.read_competition(trainer.args.winner_dir)
    state = trainer.competition.state
    assert run.rungs == [(2, 4, 2), (3, 2, 1)] and run.winner == state.leader
    assert {branch: max(run.validation[branch]) for branch in state.retired} == state.retired
    assert list(run.validation[run.winner]) == [2, 3, 12]
    assert plots.draw(trainer.args.winner_dir).read_bytes().startswith(b"\x89PNG")
