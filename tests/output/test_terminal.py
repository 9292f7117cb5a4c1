"""What runs show: through a real terminal of several widths, into a file, without colour, and as JSON."""

import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT, TINY

from mocov3.output.terminal import Clock, Terminal, duration, fit

posix = pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals are POSIX's")
SGR_COLOUR = re.compile(r"\x1b\[[\d;]*(?:3\d|4\d|9\d)(?:;[\d;]*)?m")
SHOW_CURSOR, HIDE_CURSOR = "\x1b[?25h", "\x1b[?25l"

SHOWS = """
import sys, time
from mocov3.output.terminal import Terminal
terminal = Terminal("bar", epochs=100, iterations=50, done=1000)
terminal.say("images and settings")
for step in range(1000, 1003):
    terminal.advance(step + 1)
    terminal.status([terminal.between(5.2314, 8.317, 4.103), "k-NN 45.1", "512 img/s", "wait 3%", "found 45%"])
print("mocov3: a warning", file=sys.stderr)
terminal.say("Epoch 20: k-NN 45.10 %")
terminal.close()
terminal.result("done")
"""


def through_a_terminal(argv, columns=80, **env):
    """What a process writes to a terminal of so many columns, and its exit code."""
    import fcntl
    import pty
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    inherited = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR")}
    environment = {**inherited, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color", **env}
    process = subprocess.Popen(argv, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, cwd=ROOT)
    os.close(theirs)
    parts = []
    try:
        while part := os.read(ours, 65536):
            parts.append(part)
    except OSError:  # the other side is closed
        pass
    os.close(ours)
    return b"".join(parts).decode(), process.wait(60)


def rows(text):
    """Rows that were drawn, without control sequences."""
    plain = re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", text)
    return [row for row in re.split(r"[\r\n]+", plain) if row]


@posix
@pytest.mark.parametrize("columns", [40, 80, 132])
def test_the_bar_keeps_to_the_terminal(columns):
    text, code = through_a_terminal([sys.executable, "-c", SHOWS], columns)
    assert code == 0
    assert all(len(row) <= columns for row in rows(text))
    last = [row for row in rows(text) if row.startswith("epoch")][-1]
    assert last.startswith("epoch 21/100 ")
    assert re.search(r"\d:\d\d:\d\d$", last.rstrip()), "time left"
    if columns >= 80:
        for part in ("━━━━━━", "loss 5.231 (8.3→4.1)", "k-NN 45.1", "512 img/s", "wait 3%"):
            assert part in last
    assert ("found 45%" in last) == (columns > 80)
    # what is said stands above the bar, whole, and the cursor comes back
    for said in ("images and settings", "mocov3: a warning", "Epoch 20: k-NN 45.10 %", "done"):
        assert sum(row.strip() == said for row in rows(text)) == 1, said
    assert text.rindex(SHOW_CURSOR) > text.rindex(HIDE_CURSOR)


@posix
def test_the_first_row_stands_before_anything_is_said():
    script = (
        SHOWS[: SHOWS.index("terminal.say")] + "terminal.advance(1001)\nsys.__stdout__.write('|')\nterminal.close()\n"
    )
    text, code = through_a_terminal([sys.executable, "-c", script])
    assert code == 0
    assert "epoch 21/100" in text[: text.index("|")]


@posix
def test_no_colour_and_terminals_that_cannot_move():
    coloured, _ = through_a_terminal([sys.executable, "-c", SHOWS])
    assert SGR_COLOUR.search(coloured)
    plain, _ = through_a_terminal([sys.executable, "-c", SHOWS], NO_COLOR="1")
    assert not SGR_COLOUR.search(plain)
    assert "loss 5.231 (8.3→4.1)" in plain
    dumb, _ = through_a_terminal([sys.executable, "-c", SHOWS], TERM="dumb")
    assert "\x1b" not in dumb
    assert len([row for row in rows(dumb) if row.startswith("epoch 21/100 20% loss 5.231")]) == 3


def test_a_file_gets_short_lines_of_any_encoding():
    for encoding, arrow in (("utf-8", "→"), ("ascii", ">"), ("cp1252", ">")):
        done = subprocess.run(
            [sys.executable, "-c", SHOWS],
            capture_output=True,
            cwd=ROOT,
            check=True,
            env={**os.environ, "PYTHONIOENCODING": encoding, "PYTHONPATH": str(ROOT), "FORCE_COLOR": "1"},
        )
        text = done.stdout.decode(encoding)
        assert "\r" not in text.replace(os.linesep, "\n")
        assert "\x1b" not in text
        shown = [line for line in text.splitlines() if line.startswith("epoch")]
        assert len(shown) == 3
        assert all(len(line) <= 80 for line in shown)
        assert shown[-1].startswith(f"epoch 21/100 20% loss 5.231 (8.3{arrow}4.1) k-NN 45.1 512 img/s wait 3% ")
        assert done.stderr.decode(encoding).strip() == "mocov3: a warning"


def test_help_in_an_old_encoding(run_program, tmp_path):
    for argv in (["--help"], ["pretrain", "--help"]):
        assert "usage" in run_program(*argv, cwd=tmp_path, env={"PYTHONIOENCODING": "ascii"}).stdout


@posix
def test_a_run_shows_one_bar(images, tmp_path):
    argv = [sys.executable, "-m", "mocov3", "pretrain", str(images), *TINY, "--knn-every", "1", "--logger", "none"]
    text, code = through_a_terminal([*argv, "--output-dir", str(tmp_path)])
    assert code == 0, text
    bars = [row for row in rows(text) if row.startswith("epoch")]
    assert not [row for row in bars if len(row) > 80]
    assert re.match(r"epoch 2/2 ━+ loss \d+\.\d{3} \(11\.1→7\.5\) k-NN [\d.]+ \d+ img/s wait \d+% 0:00:00", bars[-1])
    assert text.count(HIDE_CURSOR) == 1
    assert "checkpoint_0001.pth.tar: 2 of 2 epochs, loss " in text


def test_styles(capsys):
    def told(style):
        terminal = Terminal(style, epochs=1, iterations=2)
        terminal.say("said")
        terminal.advance(1)
        terminal.status(["loss 1"])
        terminal.line("Epoch: [0]")
        terminal.json({"loss": 1})
        terminal.result("result")
        captured = capsys.readouterr()
        return captured.out.splitlines(), captured.err.splitlines()

    assert told("bar") == (["said", "epoch 1/1 50% loss 1 -:--:--", "result"], [])
    assert told("lines") == (["said", "Epoch: [0]", "result"], [])
    assert told("json") == (['{"loss": 1}'], ["said", "result"])
    assert told("quiet") == (["result"], [])
    silent = Terminal("bar", epochs=1, iterations=2, active=False)
    silent.say("said")
    silent.status(["loss 1"])
    silent.result("result")
    assert capsys.readouterr() == ("", "")


def test_parts_are_left_out_from_the_end():
    parts = ["loss 5.2", "", "k-NN 45", "512 img/s", "wait 3%"]
    assert fit(["a"], parts, ["z"], 80) == "a loss 5.2 k-NN 45 512 img/s wait 3% z"
    assert fit(["a"], parts, ["z"], 30) == "a loss 5.2 k-NN 45 512 img/s z"
    assert fit(["a"], parts, ["z"], 28) == "a loss 5.2 k-NN 45 wait 3% z"  # one that fits stands in
    assert fit(["a"], parts, ["z"], 3) == "a z"


def test_a_run_whose_end_is_decided_on_the_way(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False)
    terminal = Terminal("bar", epochs=2, iterations=10)
    for done in range(1, 27):
        if done == 15:
            terminal.expect(26)
        terminal.advance(done)
        terminal.status([])
    lines = capsys.readouterr().out.splitlines()
    assert [line.rsplit(" ", 1)[0] for line in (lines[13], lines[14], lines[25])] == [
        "epoch 2/2 70%",
        "epoch 2/3 57%",
        "epoch 3/3 100%",
    ]
    assert not [line for line in lines if line.split()[-1].startswith("-1")]
    terminal.clock.advance(30)  # later than was foreseen
    assert terminal.clock.left == "0:00:00"


def test_time_left():
    clock = Clock(total=100, done=40)
    assert clock.left == "-:--:--"
    clock.advance(41, now=1000.0)  # the first step holds what happens once
    assert clock.left == "-:--:--"
    clock.advance(51, now=1020.0)
    assert clock.left == "0:01:38"  # 49 steps of 2 s
    clock.advance(100, now=1100.0)
    assert clock.left == "0:00:00"
    assert [duration(s) for s in (0, 59.6, 3600, 47 * 3600, 50 * 3600)] == [
        "0:00:00",
        "0:01:00",
        "1:00:00",
        "47:00:00",
        "2 d 02:00",
    ]
