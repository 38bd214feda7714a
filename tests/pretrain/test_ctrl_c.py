"""Ctrl-C to whole commands, as a terminal sends it: one sentence, exit code 130, and the same command goes on after."""

import contextlib
import functools
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

from sambalm.pretrain.cli import interrupts
from sambalm.pretrain.errors import ExitCode, Interrupted
from tests.conftest import small_run
from tests.support import program
from tests.support.data import make_texts, write_jsonl
from tests.support.program import wait_until

COMMANDS = {
    "python-corpus": "data python-corpus {out}/corpus.jsonl",
    "tokenizer": "data tokenizer --input {texts} --vocab-size 400 --output {out}/t.model",
    "preprocess": "data preprocess --input {texts} --tokenizer {tokenizer} --output {out}/p --shard-tokens 4000",
    "shuffle": "data preprocess --input {texts} --tokenizer {tokenizer} --output {out}/p --shuffle 1 --workers 2",
    "passkey": "data passkey --tokenizer {tokenizer} --output {out}/p --documents 300 --tokens 500",
    "verify": "data verify {tokens}",
    "inspect": "data inspect {tokens}",
    "index": "data index {config} data.cache_dir={out}/cache",
    "plan": "plan samba_3.8b --gpus 64 --gpu-memory-gib 80",
    "estimate": "slurm estimate samba_3.8b --nodes 8",
    "show": "config show {config}",
    "check-layout": "check-layout {config} --world-size 2",
    "train": "train {config} run.dir={out}/run",
    "to-hf": "convert to-hf {run} {out}/hf",
    "generate": "generate {run} --prompt abc --max-new-tokens 400",
    "evaluate": "evaluate {run} --task perplexity perplexity.lengths=[64] perplexity.tokens=4K --output {out}/e",
    "report": "report {run} --output {out}/report.html",
    "checkpoint": "checkpoint verify {run}",
}
MOMENTS = (0.0, 0.05, 0.15, 0.3, 0.45, 0.6, 0.8, 0.95)  # of what the command takes
SAYS = ("interrupted from the keyboard", "stopped", "Ctrl-C", "left after step")


def start(command, folder):
    """Starts a process in a group of its own, which heeds Ctrl-C wherever the tests run."""
    # A shell lets what it runs in the background ignore interrupts, and so would the program.
    heeds = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, start_new_session=True, preexec_fn=heeds, stdout=pipe, stderr=pipe, text=True, cwd=folder
    )


def has_begun(process):
    """Whether the program has come as far as its own first lines, which start a thread; Python's are not ours."""
    return process.poll() is not None or len(os.listdir(f"/proc/{process.pid}/task")) > 1


def interrupted(words, folder, after_s):
    """Exit code and errors of a command that Ctrl-C meets some time after its beginning, in all of its processes."""
    process = start([sys.executable, "-m", "sambalm.pretrain.cli", *words], folder)
    wait_until(lambda: has_begun(process), 60)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(after_s)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=interrupts.UNWINDING_S + 10)
    return process.returncode, errors


def assert_ends_well(words, folder, after_s):
    """Interrupts a command, and runs it again to its end where it was not at its end before."""
    code, errors = interrupted(words, folder, after_s)
    assert code in (0, ExitCode.INTERRUPTED), errors
    assert "Traceback" not in errors
    assert "Error" not in errors
    assert [path for path in folder.rglob("*") if path.name.endswith((".old", ".tmp")) and path.is_dir()] == []
    if code:
        assert sum(line.startswith(SAYS) for line in errors.splitlines()) >= 1, errors
        assert words[0] in ("train", "generate") or errors.count("\n") == 1, errors
        again = program.run(*words)
        assert again.returncode == 0, again.stderr


@pytest.fixture
def words_of(tokens, tmp_path):
    """The words of a command, whose output goes to tmp_path/out."""
    texts = write_jsonl(tmp_path / "texts.jsonl", make_texts(600, seed=1))
    values = small_run(tokens, tmp_path / "run")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))

    def words(name):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        (tmp_path / "out").mkdir()
        places = {"texts": texts, "out": tmp_path / "out", "tokens": tokens, "run": tmp_path / "run"}
        places |= {"tokenizer": tokens.with_name("tokenizer.model"), "config": tmp_path / "run.yaml"}
        return COMMANDS[name].format(**places).split()

    return words


@pytest.mark.parametrize(
    ("name", "after_s"), [("show", 0.0), ("tokenizer", 0.5), pytest.param("preprocess", 0.4, marks=pytest.mark.slow)]
)
def test_ctrl_c_ends_in_a_sentence(name, after_s, words_of, tmp_path):
    assert_ends_well(words_of(name), tmp_path / "out", after_s)


@pytest.mark.long
@pytest.mark.parametrize("name", COMMANDS)
def test_ctrl_c_ends_in_a_sentence_at_any_moment(name, words_of, tmp_path):
    assert program.run("train", tmp_path / "run.yaml").returncode == 0
    start_s = time.monotonic()
    code, errors = interrupted(words_of(name), tmp_path / "out", 600)
    assert code == 0, errors
    whole_s = time.monotonic() - start_s
    for moment in MOMENTS:
        assert_ends_well(words_of(name), tmp_path / "out", moment * whole_s)


LIBRARY = """
import ctypes, sys, time
from sambalm.pretrain.cli import interrupts

interrupts.DEAF_S, interrupts.UNWINDING_S, interrupts.ONCE_S = {deaf_s}, {unwinding_s}, 0.1
with interrupts.heeding_ctrl_c():
    print("ready", flush=True)
    try:
        {body}
    except KeyboardInterrupt:
        {answer}
{then}
"""
# An object that goes with its module, when Python has taken its handlers of signals away.
LATE = """
class Late:
    def __del__(self, say=print, sleep=time.sleep):
        say("over", flush=True)
        sleep(0.5)

late = Late()
sys.exit(3)
"""
ASLEEP, DEAF = "time.sleep(60)", "lock, c = bytes(64), ctypes.CDLL(None); [c.pthread_mutex_lock(lock) for _ in '12']"


@pytest.mark.parametrize(
    ("parts", "presses", "code"),
    [
        ({"answer": "raise"}, 1, 130),
        ({"answer": "raise ImportError('half a module')"}, 1, 130),
        ({"body": DEAF, "deaf_s": 0.2}, 1, 130),
        ({"answer": ASLEEP, "deaf_s": 0.2, "unwinding_s": 0.4}, 1, 130),
        ({"answer": ASLEEP}, 2, 130),
        ({"body": "pass", "then": "print('over', flush=True); time.sleep(0.5); sys.exit(3)"}, 1, 3),
        ({"body": "pass", "then": LATE}, 1, 3),
    ],
    ids=["heard", "turned into another", "in C", "swallowed", "twice", "at its end", "while Python ends"],
)
def test_a_library_that_makes_something_else_of_it(parts, presses, code, tmp_path):
    rest = {"body": ASLEEP, "answer": "raise", "deaf_s": 60, "unwinding_s": 60, "then": ""}
    process = start([sys.executable, "-c", LIBRARY.format(**rest | parts)], tmp_path)
    for line in ("ready", *(["over"] if code == 3 else [])):
        assert process.stdout.readline() == f"{line}\n"
    for _ in range(presses):
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (code, "" if code == 3 else f"{interrupts.SENTENCE}\n")


POOL = """
import os
from sambalm.data_pipeline.workers import tokenising_pool

with tokenising_pool(1, None):
    os._exit(130)
"""


def test_what_a_pool_leaves_behind_is_removed_without_a_word(tmp_path):
    process = start([sys.executable, "-c", POOL], tmp_path)
    assert process.communicate(timeout=120) == ("", "")
    assert process.returncode == 130


def test_what_is_written_twice_is_the_same():
    """The file that is there before all others has its own."""
    assert str(Interrupted()) == interrupts.SENTENCE
    assert interrupts.INTERRUPTED == ExitCode.INTERRUPTED
