"""That the list of mutants still fits the sources: what each of them changes is there, once."""

import pytest

from .mutants import MUTANTS, ROOT, Mutant, NotOnce, Outcome, mutated, outcome_of, print_table


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_what_a_mutant_changes_occurs_once(mutant):
    source = (ROOT / mutant.path).read_text()
    assert mutated(mutant, source) != source
    assert mutant.breaks.endswith(".")
    assert all((ROOT / "tests" / name).is_file() for name in mutant.tests)


def test_names_are_those_of_folders_of_their_own():
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)


@pytest.mark.parametrize("source", ["", "a b a"])
def test_a_text_that_does_not_occur_once_is_an_error(source):
    with pytest.raises(NotOnce, match=r"name: in file this occurs [02] times, not once"):
        mutated(Mutant("name", "file", "a", "c", "It breaks."), source)


RUNNING = "tests/test_a.py::test_b[1-x] PASSED [ 50%]\ntests/test_a.py::test_b[2-y] "


@pytest.mark.parametrize(
    ("status", "log", "noticed_by"),
    [
        (0, RUNNING, None),
        (1, RUNNING + "FAILED\nFAILED tests/test_a.py::test_b[2-y] - assert 0\n", "test_a.py::test_b[2-y]"),
        (-11, RUNNING + "Fatal Python error: Segmentation fault", "test_a.py::test_b[2-y] (signal 11)"),
        (-1, RUNNING, "test_a.py::test_b[2-y] (does not end)"),
    ],
)
def test_who_noticed_it(status, log, noticed_by):
    assert outcome_of(status, log) == Outcome(noticed_by, log)


@pytest.mark.parametrize(("status", "log"), [(1, "ERROR collecting"), (5, "deselected"), (-11, "")])
def test_what_is_no_failure_of_a_test_is_an_error(status, log):
    with pytest.raises(RuntimeError, match="no test failed"):
        outcome_of(status, log)


def test_a_survivor_stands_out_in_the_table():
    lines = []
    mutant = Mutant("name", "folder/file", "a", "b", "It breaks.")
    print_table([(mutant, Outcome("test_a.py::test_b", "")), (mutant, Outcome(None, ""))], lines.append)
    assert lines[2:] == [
        "| name (`file`) | It breaks. | `test_a.py::test_b` |",
        "| name (`file`) | It breaks. | **nothing** |",
    ]
