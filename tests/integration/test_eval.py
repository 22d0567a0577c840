"""``telerag eval`` from end to end: runs, references, comparisons, TREC files, errors."""

import json
import math
import subprocess
import sys

import ir_measures
import pytest
import typer
from typer.testing import CliRunner

from telerag_cli.cli.eval import evaluate as command
from telerag_cli.cli.guard import guarded
from telerag_cli.evaluation.bootstrap import MIN_QUESTIONS

CAPITALS = [
    ("France", "Paris"),
    ("Italy", "Rome"),
    ("Spain", "Madrid"),
    ("Peru", "Lima"),
    ("Cuba", "Havana"),
    ("Kenya", "Nairobi"),
    ("Japan", "Tokyo"),
    ("Chad", "N'Djamena"),
]

program = typer.Typer()
program.command("eval")(guarded(command))
program.command("idle")(lambda: None)


def telerag_eval(*arguments, stdin=None):
    return CliRunner().invoke(program, ["eval", *map(str, arguments)], input=stdin)


def figures(*arguments, stdin=None):
    """The JSON on stdout, and what was said."""
    result = telerag_eval(*arguments, "--json", stdin=stdin)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout), result.stderr


def values(result, run=0):
    return {name: found["value"] for name, found in result["runs"][run]["measures"].items()}


def line(key, answer, passages=(), **more):
    """A line as ``telerag run`` writes it; passages are (id, score, text)."""
    found = [{"rank": rank, "id": each[0], "score": each[1], "text": each[2]} for rank, each in enumerate(passages, 1)]
    return {"id": key, "question": f"{key}?", "answer": answer, "passages": found, **more}


def passages_of(country, capital):
    """Three passages, the second of which holds the answer."""
    return [
        (f"{country} a", 0.9, "The weather."),
        (f"{country} b", 0.8, f"It is the city of {capital}."),
        (f"{country} c", 0.7, "The food."),
    ]


def write(path, lines):
    path.write_text("".join(json.dumps(each) + "\n" for each in lines), encoding="utf-8")
    return path


@pytest.fixture
def good(tmp_path):
    return write(
        tmp_path / "good.jsonl",
        [line(country, f"{capital}.", passages_of(country, capital)) for country, capital in CAPITALS],
    )


@pytest.fixture
def bad(tmp_path):
    return write(
        tmp_path / "bad.jsonl", [line(country, "No idea", [("z", 0.5, "Nothing.")]) for country, _ in CAPITALS]
    )


@pytest.fixture
def questions(tmp_path):
    return write(
        tmp_path / "questions.jsonl",
        [{"id": country, "question": f"{country}?", "answers": [capital]} for country, capital in CAPITALS],
    )


def test_one_run_with_answers_from_the_questions(good, questions):
    result, said = figures(good, "--questions", questions)
    assert values(result) == pytest.approx(
        {
            "exact_match": 1,
            "f1": 1,
            "contains_answer": 1,
            "success@1": 0,
            "success@3": 1,
            "mrr": 0.5,
            "ndcg@10": 1 / math.log2(3),
        }
    )
    assert result["judged_by"] == "answers"
    assert result["cutoffs"] == [1, 3]  # the usual ones up to what was retrieved
    assert "success@k" in said
    assert result["runs"][0]["measures"]["f1"]["questions"] == len(CAPITALS)


def test_tables_are_data_and_notes_are_talk(good, bad, questions):
    result = telerag_eval(good, bad, "-q", questions)
    assert result.exit_code == 0
    shown = result.stdout
    for part in ("exact_match", "0.500", "good.jsonl", "-1.000", "-1.000 to -1.000", "differs", "success@3"):
        assert part in shown
    assert "success@k" in result.stderr
    assert "success@k" not in shown


def test_answers_on_the_runs_own_lines(tmp_path):
    run = write(
        tmp_path / "r.jsonl",
        [
            line("1", "Paris", answers=["Paris"]),
            line("2", "Rome", golden_answers=["Rome", "Roma"]),
            line("3", "Oslo", answers={"text": ["Oslo"], "answer_start": [0]}),
            line("4", "Bern"),
        ],
    )
    result, said = figures(run)
    assert values(result) == {"exact_match": 1, "f1": 1, "contains_answer": 1}
    assert result["runs"][0]["without_gold"] == 1
    assert "1 of 4 " in said
    assert " 6 " in said
    assert result["runs"][0]["measures"]["f1"]["low"] is None


def test_failed_lines_are_wrong_and_missing_questions_are_named(tmp_path, questions):
    lines = [line(country, capital, passages_of(country, capital)) for country, capital in CAPITALS[:6]]
    lines[2:4] = [{"id": lines[n]["id"], "question": "?", "error": {"message": "It failed."}} for n in (2, 3)]
    result, said = figures(write(tmp_path / "r.jsonl", lines), "--questions", questions)
    run = result["runs"][0]
    assert (run["lines"], run["failed"], run["missing"]) == (6, 2, ["Japan", "Chad"])
    assert values(result)["exact_match"] == pytest.approx(4 / 6)
    assert values(result)["mrr"] == pytest.approx(4 / 6 / 2)
    assert "2 of 6 " in said
    assert all(part in said for part in ("2 of the 8 ", str(questions), "Japan, Chad"))


def test_identical_runs_do_not_differ(tmp_path, good, questions):
    other = tmp_path / "other.jsonl"
    other.write_bytes(good.read_bytes())
    result, _ = figures(good, other, "--questions", questions)
    pair = result["comparisons"][0]
    assert (pair["questions"], pair["identical_answers"], pair["identical_passages"]) == (8, 8, 8)
    assert {(found["value"], found["low"], found["high"], found["differs"]) for found in pair["measures"].values()} == {
        (0, 0, 0, False)
    }


def test_different_runs_differ_over_what_both_answered(tmp_path, good, bad, questions):
    lines = [json.loads(each) for each in bad.read_text().splitlines()]
    lines[0] = {"id": lines[0]["id"], "question": "?", "error": {"message": "It failed."}}
    lines[1]["answer"] = "Rome."
    third = write(tmp_path / "third.jsonl", lines)
    result, _ = figures(good, bad, third, "--questions", questions)
    assert [
        (each["first"], each["second"], each["questions"], each["identical_answers"]) for each in result["comparisons"]
    ] == [("good.jsonl", "bad.jsonl", 8, 0), ("good.jsonl", "third.jsonl", 7, 1), ("bad.jsonl", "third.jsonl", 7, 6)]
    assert [each["measures"]["exact_match"]["differs"] for each in result["comparisons"]] == [True, True, False]
    assert result["comparisons"][1]["measures"]["exact_match"]["value"] == pytest.approx(-6 / 7)


def test_runs_without_gold_answers_are_compared_as_texts(good, bad):
    result, said = figures(good, bad)
    assert result["runs"][0]["measures"] == {}
    assert (result["comparisons"][0]["identical_answers"], result["comparisons"][0]["questions"]) == (0, 8)
    assert "8 of 8 " in said
    assert telerag_eval(good, bad).exit_code == 0


def batch(key, answer, **more):
    body = {"choices": [{"index": 0, "message": {"role": "assistant", "content": answer}}], **more}
    return {"id": f"batch_req_{key}", "custom_id": key, "response": {"status_code": 200, "body": body}, "error": None}


def test_batch_lines(tmp_path, questions):
    found = line("", "", passages_of(*CAPITALS[0]))["passages"]
    lines = [
        batch("France", "Paris", telerag={"passages": found}),
        batch("Italy", "Rome"),  # of another program
        {"id": "x", "custom_id": "Spain", "response": None, "error": {"code": "failed", "message": "No."}},
        {"id": "y", "custom_id": "Peru", "response": {"status_code": 500, "body": {}}, "error": None},
    ]
    result, said = figures(write(tmp_path / "b.jsonl", lines), "--questions", questions)
    assert values(result) == pytest.approx(
        {
            "exact_match": 0.5,
            "f1": 0.5,
            "contains_answer": 0.5,
            "success@1": 0,
            "success@3": 0.25,
            "ndcg@10": 0.25 / math.log2(3),
            "mrr": 0.125,
        }
    )
    assert "2 of 4 " in said


def test_stdin_and_what_search_prints(questions):
    lines = [
        {"id": country, "question": "?", "passages": line("", "", passages_of(country, capital))["passages"]}
        for country, capital in CAPITALS
    ]
    result, _ = figures("-", "-q", questions, stdin="\n".join(map(json.dumps, lines)))
    assert result["runs"][0]["run"] == "<stdin>"
    assert values(result) == pytest.approx({"success@1": 0, "success@3": 1, "ndcg@10": 1 / math.log2(3), "mrr": 0.5})


BEIR = "query-id\tcorpus-id\tscore\nFrance\tFrance b\t1\nFrance\tFrance c\t1\nItaly\tItaly a\t2\nChad\tChad a\t0\n"
TREC = "France 0 France%20b 1\nFrance 0 France%20c 1\n\nItaly 0 Italy%20a 2\nChad 0 Chad%20a 0\n"


@pytest.mark.parametrize("text", [BEIR, BEIR.split("\n", 1)[1], TREC])
def test_qrels(tmp_path, good, text):
    path = tmp_path / "qrels"
    path.write_text(text)
    result, said = figures(good, "--qrels", path, "-k", 2, "-k", 4)
    assert result["judged_by"] == "qrels"
    france = (1 / math.log2(3) + 1 / 2) / (1 + 1 / math.log2(3))
    assert values(result) == pytest.approx(
        {"recall@2": (0.5 + 1) / 2, "recall@4": 1, "mrr": (0.5 + 1) / 2, "ndcg@10": (france + 1) / 2}
    )
    assert result["runs"][0]["unjudged"] == 6
    assert all(part in said for part in ("6 of 8 ", "at 4 ", "at 3."))


def test_passages_of_the_questions_are_judgements(tmp_path, good):
    path = write(
        tmp_path / "q.jsonl",
        [
            {"id": "France", "question": "?", "answers": ["Paris"], "passages": ["France a", "absent"]},
            {"id": "Italy", "question": "?", "answers": ["Rome"]},
        ],
    )
    result, said = figures(good, "--questions", path)
    assert result["judged_by"] == "passages"
    assert values(result)["recall@3"] == 0.5
    assert result["runs"][0]["measures"]["recall@3"]["questions"] == 1
    assert "7 of 8 " in said
    qrels = tmp_path / "qrels.tsv"
    qrels.write_text(BEIR)
    assert figures(good, "--questions", path, "--qrels", qrels)[0]["judged_by"] == "qrels"


def test_questions_without_answers_beside_qrels(tmp_path, good):
    """As BEIR has them: they say which questions the run should have."""
    path = write(tmp_path / "q.jsonl", [{"_id": key, "text": "?"} for key in ("France", "Italy", "Mali")])
    qrels = tmp_path / "qrels.tsv"
    qrels.write_text(BEIR)
    result, said = figures(good, "--questions", path, "--qrels", qrels)
    assert result["runs"][0]["missing"] == ["Mali"]
    assert values(result)["mrr"] == 0.75
    assert "f1" not in values(result)
    assert "1 of the 3 " in said


def test_passages_without_texts_are_not_judged_by_answers(tmp_path, questions):
    run = write(tmp_path / "r.jsonl", [line("France", "Paris", [("a", 0.1, None)])])
    result, said = figures(run, "-q", questions)
    assert "mrr" not in values(result)
    assert "--qrels" in said


def test_a_trec_file_reads_back_as_what_was_retrieved(tmp_path, good, questions):
    path = tmp_path / "good.trec"
    assert telerag_eval(good, "-q", questions, "--trec", path).exit_code == 0
    read = list(ir_measures.read_trec_run(str(path)))
    expected = [
        (country, f"{country}%20{letter}", score)
        for country, _ in CAPITALS
        for letter, score in (("a", 0.9), ("b", 0.8), ("c", 0.7))
    ]
    assert [tuple(each) for each in read] == expected
    assert path.read_text().splitlines()[0] == "France Q0 France%20a 1 0.9 good.jsonl"


@pytest.mark.parametrize("scores", [(0.5, 0.5, 0.2), (0.5, 0.6, 0.7), (0.5, 0.4, None), (0.5, 0.4, 0.4 - 1e-12)])
def test_a_trec_file_keeps_the_order_where_scores_do_not(tmp_path, scores):
    passages = list(zip("bac", scores, ("x", "y", "z"), strict=True))
    run = write(tmp_path / "r.jsonl", [line("q", "A", passages, answers=["A"])])
    result = telerag_eval(run, "--trec", tmp_path / "r.trec")
    assert result.exit_code == 0
    assert "1 / rank" in result.stderr
    read = ir_measures.read_trec_run(str(tmp_path / "r.trec"))
    assert [(each.doc_id, each.score) for each in read] == [("b", 1), ("a", 0.5), ("c", 1 / 3)]


def test_a_passage_counts_once_and_where_it_comes_first(tmp_path):
    passages = [("a", 0.9, "x"), ("b", 0.8, "Rome"), ("a", 0.7, "x"), ("c", 0.6, "Rome")]
    run = write(tmp_path / "r.jsonl", [line("q", "Rome", passages, answers=["Rome"])])
    result, _ = figures(run, "--trec", tmp_path / "r.trec")
    assert (result["runs"][0]["most_passages"], values(result)["mrr"]) == (3, 0.5)
    read = ir_measures.read_trec_run(str(tmp_path / "r.trec"))
    assert [each.doc_id for each in read] == ["a", "b", "c"]


def test_several_runs_make_a_folder_of_trec_files(tmp_path, questions):
    runs = []
    for name in ("off", "on"):
        (tmp_path / name).mkdir()
        runs.append(write(tmp_path / name / "answers.jsonl", [line("France", "Paris", [("a", 1.0, "Paris")])]))
    assert telerag_eval(*runs, "-q", questions, "--trec", tmp_path / "new" / "trec").exit_code == 0
    assert sorted(path.name for path in (tmp_path / "new" / "trec").iterdir()) == [
        "off-answers.trec",
        "on-answers.trec",
    ]


def test_the_result_is_kept_as_json(tmp_path, good, questions):
    kept = tmp_path / "result.json"
    printed, _ = figures(good, "-q", questions, "-o", kept, "--resamples", 200, "--seed", 3)
    assert json.loads(kept.read_text()) == printed
    assert printed["bootstrap"] == {"resamples": 200, "seed": 3, "confidence": 0.95, "fewest_questions": MIN_QUESTIONS}
    assert (printed["format"], printed["version"]) == ("telerag-eval", 1)


def failed(result, code, *values):
    """One sentence on stderr that holds all of these values, and nothing on stdout."""
    assert (result.exit_code, result.stdout) == (code, "")
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert [str(value) for value in values if str(value) not in result.stderr] == [], result.stderr


def test_a_missing_extra_is_named(monkeypatch, good, questions):
    monkeypatch.delitem(sys.modules, "telerag_cli.evaluation.passages", raising=False)
    monkeypatch.setitem(sys.modules, "ir_measures", None)
    failed(telerag_eval(good, "-q", questions), 1, "ir_measures", "telerag-cli[eval]")


ANSWERED = '{"id": "a", "answer": "b"'


@pytest.mark.parametrize(
    ("text", "values"),
    [
        (f'{ANSWERED}}}\n{{"id": "Ita', ["r.jsonl:2 ", "JSON", "EOF", "does not end"]),
        ("[1]\n", ["r.jsonl:1 ", "list"]),
        ('\n{"id": "a"}\n', ["r.jsonl:2 ", "['id']"]),
        ('{"answer": "a"}\n', ["r.jsonl:1 ", "['answer']"]),
        ('{"id": "a", "answer": 3}\n', ["r.jsonl:1 ", "int"]),
        (f'{ANSWERED}, "passages": {{}}, "answers": "c"}}\n{ANSWERED}}}', ["r.jsonl:2 ", "'a'", "line 1 "]),
        (f'{ANSWERED}, "passages": {{"x": 1}}}}\n', ["r.jsonl:1 ", "dict"]),
        (f'{ANSWERED}, "passages": [{{"id": "p", "score": NaN}}]}}\n', ["r.jsonl:1 ", "JSON"]),
        (f'{ANSWERED}, "passages": [{{"id": "p"}}, "q"]}}\n', ["r.jsonl:1: ", "passage 2 "]),
        (f'{ANSWERED}, "answers": [1]}}\n', ["r.jsonl:1 ", "answers"]),
        ('{"custom_id": "a", "body": {}}\n', ["r.jsonl:1 ", "Batch"]),
        ('{"id": "\xff"}\n', ["r.jsonl:1 ", "UTF-8"]),
        ("\n\n", ["r.jsonl "]),
        ("", ["r.jsonl "]),
        (f"{ANSWERED}}}\n", ["r.jsonl has 1 "]),
    ],
)
def test_a_bad_run_is_one_sentence(tmp_path, text, values):
    path = tmp_path / "r.jsonl"
    path.write_text(text, encoding="latin-1")
    failed(telerag_eval(path, "--json"), 1, *values)


@pytest.mark.parametrize(
    ("option", "text", "values"),
    [
        ("--questions", "What is it?\n", ["f:1 ", "JSON"]),
        ("--questions", '{"id": "France", "question": "?"}\n', ["f has 1 "]),
        ("--questions", '{"id": 1, "answers": ["x"]}\n{"_id": "1", "answers": ["x"]}', ["f:2 ", "'1'", "line 1 "]),
        ("--questions", '{"id": "France", "passages": [{"id": 1}]}\n', ["f:1 ", "passages"]),
        ("--questions", '{"id": "Mali", "answers": ["Bamako"]}\n', ["1 ", "8 ", "'France'"]),
        ("--questions", "\n", ["f has 0 "]),
        ("--qrels", "", ["f "]),
        ("--qrels", "France 0 France a 1\n", ["f:1 has 5 ", "TREC", " 4"]),
        ("--qrels", "France 0 a 1\nFrance 0 b 0.5\n", ["f:2 ", "'0.5'"]),
        ("--qrels", "France 0 a 5000\n", ["f:1 ", "'5000'", "1,000"]),
        ("--qrels", "France 0 a 1\nFrance 0 a 2\n", ["f:2 ", "'a'", " 2 ", " 1."]),
        ("--qrels", "query-id\tcorpus-id\tscore\nFrance\ta\n", ["f:2 has 2 ", "BEIR", " 3"]),
        ("--qrels", "Mali 0 a 1\n", ["1 ", "8 ", "'France'"]),
    ],
)
def test_a_bad_reference_is_one_sentence(tmp_path, good, option, text, values):
    path = tmp_path / "f"
    path.write_text(text)
    failed(telerag_eval(good, option, path), 1, *values)


def test_impossible_options(tmp_path, good, bad, questions):
    for arguments, code, value in (
        (["-", "-q", "-"], 2, "2 times"),
        ([good, good], 2, "2 times"),
        ([good, "-k", 0], 2, "-k is 0"),
        ([tmp_path / "absent"], 1, tmp_path / "absent"),
        ([good, "-q", questions, "-o", tmp_path / "no" / "r.json"], 1, tmp_path / "no"),
        ([good, bad, "-q", questions, "--trec", good], 1, "good.jsonl"),
        ([write(tmp_path / "n.jsonl", [line("France", "Paris")]), "-q", questions, "--trec", "n.trec"], 1, "n.trec"),
    ):
        failed(telerag_eval(*arguments), code, value)


def test_judged_passages_alone_need_no_torch(tmp_path, good):
    qrels = tmp_path / "qrels"
    qrels.write_text(BEIR)
    code = (
        "import sys\n"
        "from telerag_cli.cli.app import app\n"
        "app(sys.argv[1:], standalone_mode=False)\n"
        "print('torch' in sys.modules)\n"
    )
    command = [sys.executable, "-c", code, "eval", good, "--qrels", qrels]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.endswith("\nFalse\n")
