"""`sambalm generate`: the same tokens as transformers' generate(), prompts, samples, states, chats, and every end."""

import io
import json
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from sambalm.data_pipeline.errors import DataError
from sambalm.model.hf import HFError, Stream, load_for_generation
from sambalm.model.hf.tokenizer import save_tokenizer
from sambalm.pretrain.errors import ExitCode
from sambalm.pretrain.generation.chat import Conversation
from sambalm.pretrain.generation.command import Request, generate_text
from sambalm.pretrain.generation.errors import GenerationError
from sambalm.pretrain.generation.output import JsonWriter, Output, interruptible
from sambalm.pretrain.generation.prompts import read_prompts
from sambalm.pretrain.generation.rows import Row, Settings
from sambalm.pretrain.generation.sampling import Sampler, Sampling
from sambalm.pretrain.generation.source import load_source
from sambalm.pretrain.generation.text import BytesText
from tests.pretrain.test_generated_text import sentencepiece_file
from tests.support import program
from tests.support.hf import RandomState, hf_model, tiny_config

GREEDY = Sampling(temperature=0)
PROMPTS = ["one", "don't stop", "  two spaces first, and a long prompt that is longer than the window of the model"]
TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """A Hugging Face folder of a model with random weights, large enough to speak in many tokens."""
    path = tmp_path_factory.mktemp("generation") / "hf"
    path.mkdir()
    model = sentencepiece_file(path)
    save_tokenizer(model, path)
    model.unlink()
    config = tiny_config("M-*-", tie_embeddings=False, vocab_size=400)
    hf = hf_model(config, RandomState(config))
    hf.config.eos_token_id = hf.generation_config.eos_token_id = 2
    hf.save_pretrained(path)
    return path


@pytest.fixture
def generated(folder, capsys):
    """Generates and returns what was printed."""

    def run(prompts=("one",), *, path=folder, expected=ExitCode.FINISHED, source=None, **options):
        prompts = prompts if prompts is None else list(prompts)
        request = Request(prompts, **{"sampling": GREEDY, "max_new_tokens": 20} | options)
        capsys.readouterr()
        assert generate_text(path, request, **source or {}) == expected
        out, err = capsys.readouterr()
        assert err == ""
        return out

    return run


def records(out: str) -> list[dict]:
    return [json.loads(line) for line in out.splitlines()]


def by_transformers(folder, prompt, **options):
    """Tokens, and the text of them and of the prompt, by transformers' generate()."""
    model, tokenizer = load_for_generation(folder)
    inputs = tokenizer(prompt, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=20, **options)[0]
    return ids[inputs["input_ids"].shape[1] :], tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_text_is_that_of_transformers_generate(prompt, folder, generated):
    ids, text = by_transformers(folder, prompt, do_sample=False)
    assert len(set(ids.tolist())) > 3, "a constant continuation proves nothing"
    assert generated([prompt]) == text + "\n"
    assert generated([prompt], echo=False) + "." == text[len(prompt) :] + "\n."


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.7, "top_k": 20},
        {"temperature": 1.3, "top_p": 0.8},
        {"min_p": 0.2, "top_k": 50},
        {"repetition_penalty": 1.7},
        {"temperature": 0, "repetition_penalty": 1.4},
    ],
    ids=str,
)
def test_samples_are_those_of_transformers_generate(settings, folder, generated):
    """The same processors, and for one row the same draws of the same seed."""
    settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} | settings
    greedy = {"do_sample": False} if settings["temperature"] == 0 else {"do_sample": True}
    drawn = {name: value for name, value in settings.items() if greedy["do_sample"] or "penalty" in name}
    torch.manual_seed(5)
    _, text = by_transformers(folder, PROMPTS[1], **greedy, **drawn)
    assert generated(PROMPTS[1:2], sampling=Sampling(**settings, seed=5)) == text + "\n"


def test_a_batch_and_its_samples_are_as_if_alone(generated):
    """Prompts shorter and longer than the window, each with samples of the seeds from the given one on."""
    sampling = Sampling(temperature=0.9, repetition_penalty=1.2, seed=3)
    together = records(generated(PROMPTS, sampling=sampling, samples=2, as_json=True))
    order = [(record["prompt"], record["sample"]) for record in together]
    assert sorted(order) == [(prompt, sample) for prompt in range(3) for sample in range(2)]
    texts = {record["text"] for record in together}
    assert len(texts) == 6
    for record in together:
        seed = Sampling(temperature=0.9, repetition_penalty=1.2, seed=3 + record["sample"])
        (alone,) = records(generated([PROMPTS[record["prompt"]]], sampling=seed, as_json=True))
        for name in ("text", "tokens", "prompt_tokens", "reason"):
            assert alone[name] == record[name]
    plain = generated(PROMPTS, sampling=sampling, samples=2)
    by_place = {(record["prompt"], record["sample"]): record["text"] for record in together}
    blocks = (
        f"--- prompt {p + 1}, sample {s + 1} ---\n{PROMPTS[p]}{by_place[p, s]}\n" for p in range(3) for s in range(2)
    )
    assert plain == "".join(blocks)


def test_json_tells_how_a_text_ended(folder, generated, monkeypatch):
    (record,) = records(generated(as_json=True, max_new_tokens=7))
    assert record.pop("tokens_per_second") > 0
    text = record.pop("text")
    assert record == {"prompt": 0, "sample": 0, "prompt_tokens": 3, "tokens": 7, "reason": "length"} | {
        "prompt_tokens": len(load_for_generation(folder)[1].encode("one"))
    }
    stop = text[2:4]
    (stopped,) = records(generated(as_json=True, stops=["no such", stop]))
    assert (stopped["text"], stopped["reason"]) == (text[: text.index(stop)], "stop")
    assert stopped["tokens"] < 20
    ids, _ = by_transformers(folder, "one", do_sample=False)
    third = ids[2].item()
    source = load_source(folder, device=None, dtype=None, tokenizer=None)
    object.__setattr__(source, "eos_ids", frozenset([third]))
    monkeypatch.setattr("sambalm.pretrain.generation.command.load_source", lambda *_, **__: source)
    (ended,) = records(generated(as_json=True))
    first = ids.tolist().index(third)
    assert (ended["reason"], ended["tokens"]) == ("eos", first + 1)
    (ignored,) = records(generated(as_json=True, ignore_eos=True))
    assert (ignored["reason"], ignored["tokens"]) == ("length", 20)


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=0, repetition_penalty=1.5)], ids=["", "penalty"])
def test_a_state_goes_on_as_if_it_had_never_ended(sampling, generated, tmp_path):
    """Cut where no character is: a part that ends in the middle of one shows what the tokenizer makes of that."""
    state, options = tmp_path / "state", {"sampling": sampling, "ignore_eos": True}
    whole = generated(PROMPTS[2:], max_new_tokens=40, **options)
    for cut in range(10, 40):
        first = generated(PROMPTS[2:], max_new_tokens=cut, state_out=state, **options).removesuffix("\n")
        if whole.startswith(first) and first[-1] != "\ufffd":
            break
    assert first + generated(None, max_new_tokens=40 - cut, state_in=state, **options) == whole


def test_a_state_is_a_beginning_of_several_prompts(folder, generated, tmp_path):
    state = tmp_path / "state"
    generated(["one two"], max_new_tokens=1, state_out=state)
    seen = Stream.load(load_for_generation(folder)[0], state).seen_tokens
    texts = records(generated([" stop", " please"], state_in=state, as_json=True))
    for prompt, record in zip([" stop", " please"], texts, strict=True):
        (alone,) = records(generated([prompt], state_in=state, as_json=True))
        assert alone["text"] == record["text"]
    generated([" stop"], state_in=state, state_out=state, max_new_tokens=4)
    assert Stream.load(load_for_generation(folder)[0], state).seen_tokens[0] > seen[0] + 4


def test_a_state_holds_what_a_text_after_it_depends_on(folder, generated, tmp_path):
    prompt = 3 * PROMPTS[2]
    generated([prompt], max_new_tokens=9, ignore_eos=True, state_out=tmp_path / "state")
    model, tokenizer = load_for_generation(folder)
    read = tokenizer(prompt, return_tensors="pt")
    ids = model.generate(**read, max_new_tokens=9, do_sample=False, eos_token_id=None)[0].tolist()
    extras = Stream.load(model, tmp_path / "state").extras
    assert len(ids) > 64
    assert extras["tail"].tolist() == ids[-64:]
    assert extras["known_ids"].tolist() == list(dict.fromkeys(ids))


def lines_of(monkeypatch, *lines: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("".join(f"{line}\n" for line in lines).encode())))


@pytest.mark.parametrize("parts", [[("one", "", "  two ")], [("one",), ("  two ",)]], ids=["at once", "by a state"])
def test_a_chat_without_a_template_is_one_text(parts, folder, generated, monkeypatch, tmp_path):
    """Also where it goes on from a state, and where its first line is the prompt."""
    state, out, seen = tmp_path / "state", "", []
    for first, *others in parts:
        lines_of(monkeypatch, *others)
        options = {"state_in": state} if out else {}
        out += generated([first], interactive=True, ignore_eos=True, max_new_tokens=6, state_out=state, **options)
    model, tokenizer = load_for_generation(folder)
    stream, expected = Stream(model), []
    for line in ("one\n", "  two \n"):
        stream.read(torch.tensor([tokenizer.encode(line)]))
        ids = []
        seen += tokenizer.encode(line)
        for _ in range(6):
            ids.append(stream.logits.argmax(-1).item())
            stream.step(torch.tensor(ids[-1:]))
        seen += ids
        before = tokenizer.encode("x")
        expected.append(tokenizer.decode([*before, *ids], skip_special_tokens=True)[1:])
    assert out == "".join(f"{answer}\n" for answer in expected)
    saved = Stream.load(model, state)
    assert saved.seen_tokens == stream.seen_tokens
    assert saved.extras["tail"].tolist() == seen[-64:]
    assert saved.extras["known_ids"].tolist() == list(dict.fromkeys(seen))


@pytest.mark.parametrize("end", ["ctrl-c", "a closed pipe"])
@pytest.mark.usefixtures("python_s_ctrl_c")
def test_nobody_is_answered_any_more_after_the_end_of_a_chat(end, generated, monkeypatch):
    lines_of(monkeypatch, "one", "two")
    step, presses = Stream.step, (signal.raise_signal(signal.SIGINT) for _ in range(1))
    if end == "ctrl-c":
        monkeypatch.setattr(Stream, "step", lambda self, ids: (next(presses, None), step(self, ids))[1])
    else:
        monkeypatch.setattr(Output, "write", lambda self, text: setattr(self, "closed", True))
    code = ExitCode.INTERRUPTED if end == "ctrl-c" else ExitCode.FINISHED
    out = generated(None, interactive=True, ignore_eos=True, max_new_tokens=40, expected=code)
    assert out.count("\n") == (end == "ctrl-c")
    assert sys.stdin.read() == "two\n"


@pytest.mark.parametrize("rewrites", [False, True])
def test_a_chat_with_a_template_reads_each_turn_once(rewrites, folder, generated, monkeypatch, tmp_path):
    """Two turns equal one reading of the whole conversation. A template that rewrites the past is read anew."""
    copy = tmp_path / "hf"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    template = ("{{ messages | length }}" if rewrites else "") + TEMPLATE
    (copy / "chat_template.jinja").write_text(template)
    lines_of(monkeypatch, "one", "two")
    pieces = []
    read = Stream.read
    monkeypatch.setattr(Stream, "read", lambda self, ids, **_: (pieces.append(ids[0].tolist()), read(self, ids))[1])
    state, answers = tmp_path / "state", []
    answer = Conversation.answer

    def kept(self, line, *, stopped):
        shown = list(answer(self, line, stopped=stopped))
        answers.append("".join(shown))
        return shown

    monkeypatch.setattr(Conversation, "answer", kept)
    generated(None, path=copy, interactive=True, max_new_tokens=4, ignore_eos=True, state_out=state)
    assert len(pieces) == 2
    assert pieces[0].count(1) == 2, "the template's <s> are control tokens"
    model, tokenizer = load_for_generation(copy)
    text = "</s><s>user: two</s><s>assistant: "  # what comes after the answer
    if rewrites:
        first = answers[0]
        messages = [{"role": "user", "content": "one"}, {"role": "assistant", "content": first}]
        messages.append({"role": "user", "content": "two"})
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    tokenizer.backend_tokenizer.encode_special_tokens = False
    assert pieces[1] == tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    seen = Stream.load(model, state).seen_tokens[0]
    assert seen == len(pieces[1]) + 4 + (0 if rewrites else len(pieces[0]) + 4)


MISTAKES = [
    ({"prompts": [""]}, "the prompt is empty: give at least one"),
    ({"prompts": ["a", ""]}, "prompt 2 is empty"),
    ({"prompts": None}, "there is no prompt: give --prompt"),
    ({"prompts": ["a", "b"], "state_out": Path("s")}, "--state-out is for one text"),
    ({"samples": 2, "interactive": True}, "--interactive is for one text"),
    ({"as_json": True, "interactive": True}, "--json and --interactive exclude"),
    ({"state_out": Path("nowhere/s")}, "the folder of --state-out nowhere/s does not exist"),
    ({"state_in": Path("nowhere/s")}, "the state nowhere/s cannot be read"),
    ({"source": {"device": "cuda:77"}}, "the device 'cuda:77' cannot be used"),
    ({"source": {"device": "abacus"}}, "the device 'abacus' cannot be used (no such device)"),
    ({"source": {"tokenizer": Path("no.model")}}, "no.model does not exist"),
    (
        {"source": {"tokenizer": Path(__file__).parent}},
        f"the tokenizer {Path(__file__).parent} is a folder; give a file",
    ),
    ({"path": Path("nowhere")}, f"nowhere is no model: there is no such folder, seen from {Path.cwd()}"),
    ({"path": Path(__file__).parent}, "is no model: it has neither the config.json"),
    ({"path": Path(__file__)}, "is no model: it is a file; give the folder"),
]


@pytest.mark.parametrize(("options", "sentence"), MISTAKES, ids=[sentence for _, sentence in MISTAKES])
def test_a_mistake_ends_in_a_sentence(options, sentence, generated):
    with pytest.raises((GenerationError, HFError, DataError)) as raised:
        generated(**options)
    assert sentence in str(raised.value)
    assert raised.value.exit_code == 2
    assert "\n" not in str(raised.value)


def test_a_folder_takes_no_tokenizer_but_its_own(folder, generated, tmp_path):
    """Another one of as many ids would make a text of words that the model never said."""
    own, other = sentencepiece_file(tmp_path), tmp_path / "other.model"
    assert generated(source={"tokenizer": own}).startswith("one")
    sentencepiece_file(tmp_path, vocab_size=390).rename(other)
    with pytest.raises(GenerationError, match=rf"the tokenizer {other} gives other ids than the one in {folder}, .*"):
        generated(source={"tokenizer": other})


def test_the_speed_of_a_text_is_of_its_own_tokens(capsys):
    row = Row(Settings(GREEDY, 3), BytesText(lambda number: b"a"))
    writer = JsonWriter(Output(), [row])
    for number in range(3):
        text = row.take(number)
        row.seconds += 0.5
        writer.add(row, text)
    (record,) = records(capsys.readouterr().out)
    assert (record["text"], record["tokens_per_second"]) == ("aaa", 2.0)


def test_states_that_do_not_fit_are_refused(folder, generated, tmp_path):
    model, _ = load_for_generation(folder)
    stream = Stream(model)
    stream.read(torch.tensor([[5, 6]]))
    stream.save(tmp_path / "bare")
    stream.fork([0, 0]).save(tmp_path / "two")
    with pytest.raises(GenerationError, match="holds 2 texts"):
        generated(state_in=tmp_path / "two")
    with pytest.raises(GenerationError, match="does not say which tokens it has read"):
        generated(state_in=tmp_path / "bare", sampling=Sampling(repetition_penalty=2.0))
    with pytest.raises(HFError, match="another dtype"):
        generated(state_in=tmp_path / "bare", source={"dtype": "bf16"})
    assert generated(None, state_in=tmp_path / "bare")


def test_prompts_come_from_options_files_and_stdin(monkeypatch, tmp_path):
    file = tmp_path / "prompts"
    file.write_bytes("  one\ntwo é\n\n".encode())
    assert read_prompts(["a", "b"], None, lines=False) == ["a", "b"]
    assert read_prompts(None, None, lines=False) is None
    assert read_prompts(None, str(file), lines=False) == ["  one\ntwo é\n"]
    assert read_prompts(None, str(file), lines=True) == ["  one", "two é", ""]
    lines_of(monkeypatch, "from", "stdin")
    assert read_prompts(None, "-", lines=False) == ["from\nstdin"]
    file.write_bytes(b"ab\xff")
    for arguments, options, sentence in (
        ((None, str(file)), {"lines": False}, "is not UTF-8 at byte 2"),
        ((None, str(tmp_path / "none")), {"lines": False}, "cannot be read"),
        ((["a"], "-"), {"lines": False}, "exclude each other"),
        ((None, None), {"lines": True}, "give one with --prompt-file"),
    ):
        with pytest.raises(GenerationError, match=sentence):
            read_prompts(*arguments, **options)


def test_the_penalty_meets_every_token_once_at_any_length():
    """The rows that it is given are those of all ids, though they hold each once."""
    from transformers import RepetitionPenaltyLogitsProcessor

    generator = torch.Generator().manual_seed(0)
    sampler = Sampler(Sampling(temperature=0, repetition_penalty=3.0), samples=[0, 0], device=torch.device("cpu"))
    ids = torch.randint(0, 50, (2, 300), generator=generator)
    ids[0] %= 7
    for end in range(1, 300):
        for row in range(2):
            sampler.note(row, ids[row, end - 1 : end].tolist())
        logits = torch.randn(2, 50, generator=generator)
        expected = RepetitionPenaltyLogitsProcessor(3.0)(ids[:, :end], logits).argmax(-1)
        assert torch.equal(sampler(logits), expected)
    assert sampler._buffer.shape[1] <= 100


@pytest.fixture
def python_s_ctrl_c():
    """As in a terminal: what a shell starts in the background ignores Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def end_of_a_block(ends: str) -> None:
    with interruptible() as pressed:
        assert not pressed()
        if ends == "by Ctrl-C":
            signal.raise_signal(signal.SIGINT)
            assert pressed()
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler  # the second one ends the process
        if ends == "by an error":
            raise GenerationError("the text cannot go on")


@pytest.mark.parametrize("ends", ["by itself", "by Ctrl-C", "by an error"])
@pytest.mark.usefixtures("python_s_ctrl_c")
def test_ctrl_c_ends_the_process_as_ever_after_a_text(ends):
    with pytest.raises(GenerationError) if ends == "by an error" else nullcontext():
        end_of_a_block(ends)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_ctrl_c_keeps_the_text_and_the_state(folder, tmp_path):
    """An endless text ends at Ctrl-C with exit code 130, after the whole of what it printed."""
    state = tmp_path / "state"
    words = ["generate", folder, "--prompt", "one", "--max-new-tokens", 0, "--ignore-eos", "--state-out", state]
    with program.start(*words, "--temperature", 0) as running:
        shown = running._streams[0]
        program.wait_until(lambda: shown.stat().st_size > 200 or running.poll() is not None, 60)
        running.send_signal(signal.SIGINT)
        assert running.wait() == 130
        out, err = running.communicate()
    assert err == ""
    assert out.endswith("\n")
    model, tokenizer = load_for_generation(folder)
    stream = Stream.load(model, state)
    prompt = tokenizer.encode("one")
    ids = model.generate(
        torch.tensor([prompt]), do_sample=False, eos_token_id=None, max_new_tokens=stream.seen_tokens[0] - len(prompt)
    )
    assert out == tokenizer.decode(ids[0], skip_special_tokens=True) + "\n"


def test_a_closed_pipe_ends_an_endless_text(folder):
    words = [sys.executable, "-m", program.PROGRAM, "generate", folder, "--max-new-tokens", "0", "--ignore-eos"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(list(map(str, words)), **pipes) as running:
        running.stdin.write(b"one\n")
        running.stdin.close()
        assert running.stdout.read(20).startswith(b"one")
        running.stdout.close()
        assert running.wait(60) == 0
        assert running.stderr.read() == b""


def test_text_is_shown_when_it_is_there(generated, monkeypatch):
    """Each piece is written when its token is known, and not at the end."""
    written, steps = [], []
    step = Stream.step
    monkeypatch.setattr(Stream, "step", lambda self, ids: (steps.append(ids), step(self, ids))[1])
    monkeypatch.setattr(Output, "write", lambda self, text: written.append((len(steps), text)))
    generated(max_new_tokens=30, ignore_eos=True)
    assert len({at for at, text in written if text}) > 8
