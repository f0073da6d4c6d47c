"""What is shown while something runs, and the words for it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from fastcompat.cli import display
from fastcompat.cli.display import LiveDisplay, figures_of, saved_share, statuses_line
from fastcompat.scoring.engine import Progress
from fastcompat.wording import counted_noun, duration, first_sentence, markdown, percent, printable, visible


def progress(**changes: object) -> Progress:
    figures = {
        "n_rows": 1024,
        "n_rows_skipped": 0,
        "n_rows_total": 4000,
        "n_tokens": 69_000,
        "n_unshared_tokens": 100_000,
    }
    return SimpleNamespace(**(figures | {"seconds": 30.0} | changes))  # type: ignore[return-value]


def test_a_line_of_progress():
    assert figures_of(progress()) == ("1,024/4,000 responses · 2,300 tokens/s · 31% saved by sharing · 0:01:27 left")
    assert figures_of(progress(n_rows_skipped=2976)) == "4,000/4,000 responses · 2,300 tokens/s · 31% saved by sharing"
    assert figures_of(progress(n_rows=0, n_tokens=0, n_unshared_tokens=0)) == "0/4,000 responses · 0 tokens/s"
    assert saved_share(progress(n_unshared_tokens=0)) == 0


def test_off_a_terminal_a_line_now_and_then(capsys, monkeypatch):
    shown = LiveDisplay("model")
    with shown.showing():
        shown.show(1, 10, "1/10")
        assert capsys.readouterr().out == ""
        monkeypatch.setattr(display, "PLAIN_SECONDS", 0.0)
        shown.show(2, 10, "2/10")
    assert capsys.readouterr().out == "model: 2/10\n"


def test_statuses_begin_with_ok():
    assert statuses_line({"empty": 3, "ok": 3990, "truncated": 7}) == "ok 3,990 · truncated 7 · empty 3"
    assert statuses_line({}) == "no rows"


def test_words():
    assert [duration(seconds) for seconds in (0.4, 59.6, 3600, 100_000)] == [
        "0:00:00",
        "0:01:00",
        "1:00:00",
        "27:46:40",
    ]
    assert [counted_noun(n, "file") for n in (0, 1, 2000)] == ["0 files", "1 file", "2,000 files"]
    shares = (None, 0.0, 0.004, 0.37, 0.994, 1.0)
    assert [percent(share) for share in shares] == ["–", "0%", "<1%", "37%", ">99%", "100%"]
    assert printable("a\x1b[31m\nb") == "a\\x1b[31m\\nb"
    assert visible("a\x00b\tc\x7f") == "a␀b\tc␡"
    assert markdown(["a|b"], [["c\n|"]]) == "| a|b |\n| --- |\n| c\\n\\| |"


@pytest.mark.parametrize(("error", "sentence"), [(ValueError("a. \nb"), "a"), (KeyError(), "KeyError")])
def test_a_librarys_error_in_one_sentence(error, sentence):
    assert first_sentence(error) == sentence
