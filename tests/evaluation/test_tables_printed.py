"""How `comlora-tables` prints: ranks, formats, its file, its errors and its help."""

import csv
import io
import statistics
from pathlib import Path

import pytest
from result_files import commonsense, notes, write_adapter, write_recorded, write_results

from comlora_trl.cli.tables import main
from comlora_trl.evaluation.tables import build_tables, read_runs
from comlora_trl.evaluation.tables_render import Cell, Row, Table, latex, markdown, ranks


def test_ranks_compare_the_measured_with_the_measured():
    def row(method: str, source: str, figure: float | None) -> Row:
        return Row(method, source, 1, {"x": Cell() if figure is None else Cell((figure,))})

    rows = [row("a", "paper", 90), row("b", "paper", 80), row("c", "paper", 70)]
    rows += [
        row("a", "measured", 30.001),
        row("b", "measured", 30.004),
        row("c", "measured", 20),
        row("d", "measured", None),
    ]
    table = Table("9", "t", {"x": "x"}, rows)

    assert ranks(table) == {(0, "x"): 1, (1, "x"): 2, (3, "x"): 1, (4, "x"): 1, (5, "x"): 2}
    text = markdown([table])
    assert "| a | paper | **90.00** |" in text and "| b | paper | <u>80.00</u> |" in text
    assert "| b | 1 run | **30.00** |" in text and "| d | 1 run | – |" in text
    assert r"a & paper & \textbf{90.00} \\" in latex([table]) and r"d & 1 run & -- \\" in latex([table])
    alone = Table("9", "t", {"x": "x"}, rows[:1])
    assert ranks(alone) == {}


def test_only_what_was_measured_alike_is_ranked(tmp_path: Path):
    write_recorded(tmp_path, 1, 0.5, "a", method="LoRA r=8")
    write_recorded(tmp_path, 2, 0.6, "b", method="LoRA r=4")
    write_recorded(tmp_path, 3, 0.9, "c", method="LoRA r=16", rows=64)
    text = markdown(build_tables(read_runs([str(tmp_path)]), ["3"]))

    assert "| LoRA r=4 | 1 run | **60.00** |" in text and "| LoRA r=8 | 1 run | <u>50.00</u> |" in text
    assert "| LoRA r=16 | 1 run | 90.00 |" in text


def test_latex_escapes_names(tmp_path: Path):
    write_results(tmp_path, "x", commonsense(0.5))
    text = latex(build_tables(read_runs([f"my_{{50%}} & co={tmp_path}"]), ["3"]))

    assert r"my\_\{50\%\} \& co & 1 run & 50.00" in text


def test_csv_is_unrounded_and_has_no_unmeasured_figure(tmp_path: Path, capsys: pytest.CaptureFixture):
    for seed in range(2):
        adapter = write_adapter(tmp_path / f"{seed}" / "adapter")
        write_results(tmp_path / f"{seed}", adapter, {"comlora_boolq": {"acc,none": 0.123456 + seed / 10}})

    assert main([str(tmp_path), "--table", "3", "--format", "csv"]) == 0

    output = capsys.readouterr()
    lines = [line for line in csv.DictReader(io.StringIO(output.out)) if line["source"] == "measured"]
    assert [(line["method"], line["column"], line["runs"]) for line in lines] == [("LoRA r=8", "boolq", "2")]
    assert float(lines[0]["mean"]) == pytest.approx(17.3456)
    assert float(lines[0]["std"]) == pytest.approx(100 * statistics.stdev([0.123456, 0.223456]))
    assert "no average" in output.err


def test_notes_name_adapters_from_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_results(tmp_path / "r", write_adapter(tmp_path / "seed1" / "winner", k=2), commonsense(0.5))
    monkeypatch.chdir(tmp_path)

    assert notes(["r"]).splitlines()[0] == "ComLoRA K=2 r=8: seed1/winner."


def test_output_goes_to_a_file(tmp_path: Path, capsys: pytest.CaptureFixture):
    write_results(tmp_path / "r", write_adapter(tmp_path / "adapter"), commonsense(0.5))
    target = tmp_path / "tables.md"

    assert main([str(tmp_path / "r"), "--output", str(target)]) == 0

    assert capsys.readouterr().out == ""
    text = target.read_text()
    assert [f"**Table {n}: " in text for n in "234"] == [True] * 3
    assert text.count("Nothing was measured for this table.") == 2


@pytest.mark.parametrize(
    ("argument", "content", "says"),
    [
        ("missing", None, "no such file or folder"),
        ("name=missing", None, "no such file or folder"),
        (".", None, "no result file of lm_eval"),
        ("a.json", "{", "can't be read as JSON"),
        ("a.json", "[1]", 'has no "results"'),
        ("a.json", '{"a": 1}', 'has no "results"'),
        ("a.json", '{"results": {"comlora_boolq": {"acc,none": 61.5}}}', "from 0 to 1"),
        ("a.json", '{"results": {"comlora_boolq": {"acc,a": 0.1, "acc,b": 0.2}}}', "acc,a, acc,b"),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch, argument: str, content: str | None, says: str
):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / argument).write_text(content)

    assert main([argument]) == 1

    output = capsys.readouterr()
    assert output.out == "" and output.err.count("\n") == 1
    assert says in output.err and argument in output.err


def test_help_teaches(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])

    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert all(part in text for part in ("NAME=RESULTS", "competition.json", "--output_path", "latex"))
