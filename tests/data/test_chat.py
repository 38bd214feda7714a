"""Conversations to ids: what transformers makes of the same template, what counts, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from sambalm.data_pipeline.chat import ChatEncoder, ChatError, ChatOptions, ChatTemplate
from sambalm.data_pipeline.config import DataConfig
from sambalm.data_pipeline.errors import DataError
from sambalm.data_pipeline.inspection import Inspector
from sambalm.data_pipeline.preprocess import preprocess
from sambalm.data_pipeline.shards import read_manifest
from sambalm.data_pipeline.sources import open_sources
from sambalm.data_pipeline.tokenizer_formats import load_tokenizer
from sambalm.data_pipeline.verify import verify
from sambalm.model.hf.tokenizer import load_tokenizer as load_hf_tokenizer
from sambalm.model.hf.tokenizer import save_chat_template, save_tokenizer

OURS = (Path(__file__).parents[2] / "configs" / "finetune" / "chat_template.jinja").read_text()
CHATML = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
BRACKETS = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}[INST] {{ message.content }} [/INST]"
    "{% elif message.role == 'assistant' %}{% generation %} {{ message.content }} {{ eos_token }}{% endgeneration %}"
    "{% else %}{{ raise_exception('no role ' + message.role) }}{% endif %}{% endfor %}"
)
# Whose prompt ends in a space, which is a part of the answer's first token.
SPACE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
BREAKS = CHATML.replace("messages %}", "messages %}{% if loop.index > 9 %}{% break %}{% endif %}", 1)
TEMPLATES = {"ours": OURS, "chatml": CHATML, "brackets": BRACKETS, "space": SPACE, "breaks": BREAKS}
CHAT = [
    {"role": "user", "content": "stone river\n  under 42?"},
    {"role": "assistant", "content": "quiet harbour."},
    {"role": "user", "content": "été"},
    {"role": "assistant", "content": "seven\nwindow"},
]


@pytest.mark.parametrize("name", TEMPLATES)
def test_text_and_ids_are_those_of_transformers(name, tokenizer, tmp_path):
    save_tokenizer(tokenizer.path, tmp_path)
    save_chat_template(TEMPLATES[name], tmp_path)
    theirs = load_hf_tokenizer(tmp_path)
    parts = ChatTemplate(TEMPLATES[name], tokenizer).parts(CHAT)
    assert "".join(text for text, _ in parts) == theirs.apply_chat_template(CHAT, tokenize=False)
    ids, _ = encode(CHAT, TEMPLATES[name], tokenizer, append_eos=False)
    assert ids == theirs.apply_chat_template(CHAT, tokenize=True, return_dict=False)
    # What the model is asked with is what it has learnt to answer after.
    prompt = theirs.apply_chat_template(CHAT[:3], tokenize=True, return_dict=False, add_generation_prompt=True)
    assert ids[: len(prompt) - 1] == prompt[:-1]  # the last may join with what is answered


def test_a_tokenizer_json_gives_the_ids_of_transformers_and_keeps_written_control_tokens_as_text(corpus, tmp_path):
    """Byte-level BPE with control tokens of its own, as most models of today have."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|im_end|>!"]
    options = {"special_tokens": special, "initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    inner.train([str(corpus)], trainers.BpeTrainer(vocab_size=400, show_progress=False, **options))
    inner.save(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(tmp_path / "tokenizer.json")
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), chat_template=CHATML)
    ids, counts = encode(CHAT, CHATML, ours, append_eos=False)
    assert ids == theirs.apply_chat_template(CHAT, tokenize=True, return_dict=False)
    end = ours.id_of("<|im_end|>")
    assert [counts[place] for place, token in enumerate(ids) if token == end] == [False, True, False, True]

    longer = CHATML.replace("<|im_end|>", "<|im_end|>!")
    ids, _ = encode(CHAT, longer, ours, append_eos=False)
    assert (ids.count(ours.id_of("<|im_end|>!")), ids.count(end)) == (4, 0), "the longest token that stands there"
    assert ChatTemplate("{{ bos_token }}{{ messages[0].content }}", ours).prompt(CHAT) == CHAT[0]["content"]

    written = [{**CHAT[0], "content": "<|im_end|> stone"}, CHAT[1]]
    ids, _ = encode(written, CHATML, ours)
    assert ids.count(end) == 2
    assert "<|im_end|> stone" in ours.decode(ids)


def encode(messages, template, tokenizer, *, append_eos: bool = True, loss: str = "assistant"):
    return ChatEncoder(ChatOptions(template, loss), tokenizer, append_eos=append_eos).encode(messages)


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_the_assistant_says_counts_and_nothing_else(name, tokenizer):
    ids, counts = encode(CHAT, TEMPLATES[name], tokenizer)
    counted = [[]]
    for token, counts_here, before in zip(ids, counts, [False, *counts], strict=False):
        if counts_here:
            if not before:
                counted.append([])
            counted[-1].append(token)
    said = [tokenizer.decode(run).removesuffix("\n").replace("<|im_end|>", "").strip() for run in counted[1:]]
    assert said == [CHAT[1]["content"], CHAT[3]["content"]]
    assert ids[-1] == tokenizer.eos_id
    assert counts[-1]  # that it ends there is for the model to say
    assert encode(CHAT, TEMPLATES[name], tokenizer, loss="all") == (ids, [True] * len(ids))
    last, counts = encode(CHAT[:3], TEMPLATES[name], tokenizer)
    assert last[-1] == tokenizer.eos_id
    assert not counts[-1]  # a user's end is not


def test_a_conversation_ends_in_one_end(tokenizer):
    assert encode(CHAT, OURS, tokenizer)[0][-2:].count(tokenizer.eos_id) == 1
    assert encode(CHAT, OURS, tokenizer) == encode(CHAT, OURS, tokenizer, append_eos=False)


def test_a_control_token_in_a_message_stays_text(tokenizer):
    """Nobody can end the assistant's turn by writing its end."""
    ends = encode(CHAT, OURS, tokenizer)[0].count(tokenizer.eos_id)
    written = [{**message, "content": message["content"] + " </s> <s>"} for message in CHAT]
    ids, _ = encode(written, OURS, tokenizer)
    assert ids.count(tokenizer.eos_id) == ends
    assert tokenizer.decode(ids).count("</s> <s>") == 4


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ("hello", "its messages are no list"),
        ([], "no list with at least one message"),
        (["hello"], "message 1 is str, not an object"),
        ([{"content": "a"}], "message 1 has no 'role' that is a string"),
        ([CHAT[0], {"role": "assistant", "content": ["a"]}], "message 2 has no 'content' that is a string"),
        ([CHAT[0]], "no message has the role 'assistant', so there is nothing to learn"),
        ([{"role": "tool", "content": "a"}, CHAT[1]], r"the chat template refuses it \(no role tool\)"),
        ([{"role": "user", "content": "\ufdd0"}, CHAT[1]], r"holds U\+FDD0"),
        ([{"role": "user", "content": "\ud800"}, CHAT[1]], "holds an unpaired surrogate"),
    ],
)
def test_what_is_no_conversation_is_said(messages, reason, tokenizer):
    with pytest.raises(ChatError, match=reason):
        encode(messages, BRACKETS, tokenizer)


def test_a_template_that_changes_what_was_said_is_refused(tokenizer):
    only_last = "{{ messages[-1].role }}: {{ messages[-1].content }}"
    with pytest.raises(ChatError, match="writes what is before message 2 in another way once that is there"):
        encode(CHAT, only_last, tokenizer)
    with pytest.raises(DataError, match="the chat template is no jinja template"):
        ChatTemplate("{% for %}", tokenizer)
    with pytest.raises(ChatError, match=r"the chat template (fails|refuses)"):
        encode(CHAT, "{{ messages[0].content.nothing.more }}", tokenizer)


@pytest.fixture
def chats(tmp_path) -> Path:
    path = tmp_path / "chats.jsonl"
    lines = [
        json.dumps({"messages": [{"role": "user", "content": f"stone {n}"}, CHAT[1], *CHAT[2:]]}) for n in range(40)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def template(tmp_path) -> Path:
    path = tmp_path / "template.jinja"
    path.write_text(OURS)
    return path


def test_shards_hold_conversations_and_masks_for_any_number_of_workers(chats, template, tokenizer, tmp_path):
    options = {"tokenizer": tokenizer.path, "chat_template": template, "shard_tokens": 900}
    for workers, name in ((1, "a/d"), (2, "b/d")):
        summary = preprocess([chats], output_prefix=tmp_path / name, workers=workers, **options)
        assert (summary.documents, summary.slow_because) == (40, None)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert [name for name in files if name.endswith(".mask")] == [f"d_{n:05d}.mask" for n in range(summary.shards)]
    assert summary.shards > 1
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() or name == "d.json"
    manifest = read_manifest(tmp_path / "a" / "d")
    assert manifest.options["chat_template"] == OURS
    assert verify(tmp_path / "a" / "d").problems == []

    config = DataConfig(train="unused", validation=str(tmp_path / "a" / "d"), sequence_length=8)
    (source,) = open_sources(config.separate_validation)  # of which nothing is held out
    stream = source.stream(held_out=False)
    expected = [
        encode([{"role": "user", "content": f"stone {n}"}, CHAT[1], *CHAT[2:]], OURS, tokenizer) for n in range(40)
    ]
    assert np.array_equal(stream.read(0, len(stream)), np.concatenate([ids for ids, _ in expected]))
    assert np.array_equal(stream.counts(0, len(stream)), np.concatenate([counts for _, counts in expected]))
    for number in (0, 1, 7, 39):  # which begin at any bit of a byte
        shown = Inspector(tmp_path / "a" / "d").document(number)
        assert "[[ quiet harbour.</s>]]" in shown
        assert f"stone {number}" in shown
        assert f"{sum(expected[number][1])} tokens count" in shown

    mask = tmp_path / "a" / "d_00000.mask"
    mask.write_bytes(bytes([mask.read_bytes()[0] ^ 1]) + mask.read_bytes()[1:])
    assert verify(tmp_path / "a" / "d").problems == [
        f"{mask} has changed since it was written; fetch or preprocess it again"
    ]
    with pytest.raises(DataError, match=r"d_00000\.mask has changed"):
        open_sources(DataConfig(train=str(tmp_path / "a" / "d"), sequence_length=8))
    mask.unlink()
    assert "cannot read the loss mask" in verify(tmp_path / "a" / "d").problems[0]


def test_with_all_tokens_counted_there_is_no_mask(chats, template, tokenizer, tmp_path):
    preprocess(
        [chats], output_prefix=tmp_path / "d", tokenizer=tokenizer.path, chat_template=template, loss="all", workers=1
    )
    assert not list(tmp_path.glob("*.mask"))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"text": "a"}', r"no key 'messages' \(keys: text\); choose the key of the messages"),
        ("{", "malformed JSON"),
        ('{"messages": "a"}', "its messages are no list"),
    ],
)
def test_a_bad_line_is_named_or_counted(line, reason, chats, template, tokenizer, tmp_path):
    chats.write_text(chats.read_text() + line + "\n")
    options = {"tokenizer": tokenizer.path, "chat_template": template, "output_prefix": tmp_path / "d", "workers": 1}
    with pytest.raises(DataError, match=rf"chats\.jsonl:41: .*{reason}"):
        preprocess([chats], **options)
    assert preprocess([chats], on_error="skip", **options).malformed_documents == 1


def test_messages_without_a_template_are_told_of_it(chats, tokenizer, tmp_path):
    with pytest.raises(DataError, match=r"no key 'text' \(keys: messages\); .* or give a --chat-template"):
        preprocess([chats], tokenizer=tokenizer.path, output_prefix=tmp_path / "d")


def test_what_holds_no_conversations_is_refused_before_anything_is_written(chats, template, tokenizer, tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("stone")
    with pytest.raises(DataError, match=r"a\.txt is no JSONL, which conversations are read from"):
        preprocess([text], tokenizer=tokenizer.path, output_prefix=tmp_path / "d", chat_template=template)
    with pytest.raises(DataError, match=r"nowhere\.jinja cannot be read"):
        preprocess(
            [chats], tokenizer=tokenizer.path, output_prefix=tmp_path / "d", chat_template=tmp_path / "nowhere.jinja"
        )
    assert not list(tmp_path.glob("d*"))
