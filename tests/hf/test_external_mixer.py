"""A mixer of another package in the Hugging Face format: converted, verified and loaded by the folder's own code."""

import json
from pathlib import Path

import pytest

import sambalm.model.hf
from sambalm.model import registry
from sambalm.model.hf import HFError, SambaConfig, load_for_generation
from sambalm.model.hf.folder import FolderState
from sambalm.model.hf.folder_code import folder_code
from sambalm.model.hf.generate import load_config
from sambalm.model.hf.modeling_samba import SambaForCausalLM
from sambalm.model.hf.names import hf_config, model_config
from sambalm.model.hf.verify import verify_export
from sambalm.model.registry import mixer
from tests.hf.test_modeling import difference_in_padded_turns
from tests.support import toy_mixer
from tests.support.hf import RandomState, hf_model, tiny_config
from tests.support.hf_mixers import assert_logits_are_the_training_models
from tests.support.remote_code import same_by_remote_code

SIZES = {"token_shift": {"channels": 22}}
PATTERNS = ["MT*-T-", "T", "T-*"]


@pytest.fixture(scope="module", autouse=True)
def _installed():
    toy_mixer.install()
    yield
    toy_mixer.uninstall()


def config_of(pattern: str, **changes):
    return tiny_config(pattern, mixers=SIZES, **changes)


@pytest.fixture(scope="module")
def folder(export):
    """(folder, state, config) of an export, which compares logits in pieces too."""
    config = config_of("MT*-T-", vocab_size=1200, dt_rank=3)
    return *export(config), config


@pytest.mark.parametrize("pattern", PATTERNS)
def test_logits_are_the_training_models_at_once_in_pieces_and_with_padding(pattern):
    config = config_of(pattern)
    assert_logits_are_the_training_models(
        config, length=30, pieces=[7, 1, 1, 21], tolerance=1e-5, static="*" in pattern
    )
    assert difference_in_padded_turns(hf_model(config_of(pattern, window=64), RandomState(config))) < 1e-5


def test_a_model_made_of_the_configuration_alone_has_initial_weights():
    model = SambaForCausalLM(hf_config(config_of("T-")))
    weight = dict(model.named_parameters())["backbone.layers.0.mixer.mix.weight"]
    assert 0.5 < weight.abs().max() < 2**-0.5


def test_the_folder_says_what_its_letters_are(folder):
    path, state, config = folder
    keys = json.loads((path / "config.json").read_text())
    described = {"name": "token_shift", "layer_type": "linear_attention", "is_mlp": False, "sizes": {"channels": 22}}
    assert keys["extensions"] == {"T": described}
    linear, window = "linear_attention", "sliding_attention"
    assert keys["layer_types"] == [linear, linear, window, linear]
    assert model_config(load_config(path)) == config
    assert FolderState(path, load_config(path)).shapes() == state.shapes()
    card = (path / "README.md").read_text()
    assert "- `T`: shift by a token: 22 channels" in card
    assert "token_shift's mix.weight" in card
    assert "It has no layer like T (token_shift)" in card


def test_defaults_of_sizes_are_written():
    described = hf_config(tiny_config("T")).extensions["T"]
    assert described["sizes"] == {"channels": 32}


def test_a_mixer_of_this_package_beyond_the_first_three_is_described_too(monkeypatch):
    monkeypatch.setitem(registry.BUILT_IN, "t", "toy_mixer.mixer:MIXER")
    monkeypatch.setattr(type(mixer("t")), "letter", "t")
    config = config_of("M-t-", dt_rank=3)
    assert set(hf_config(config).extensions) == {"t"}
    assert model_config(hf_config(config)) == config


@pytest.mark.slow
def test_remote_code_needs_neither_package(folder, tmp_path):
    given = same_by_remote_code(folder[0], tmp_path)
    fp32 = {name.removeprefix("fp32 ") for name in given if name.startswith("fp32") and "mix." in name}
    assert fp32 == {f"backbone.layers.{i}.mixer.mix.weight" for i in (1, 3)}
    names = {file.name for file in (tmp_path / "copy").glob("*.py")}
    assert names == set(folder_code("MT*-")) > {"mixer_token_shift.py", "mixer_token_shift_ops.py"}


def forget_always(patch):
    patch.setattr("toy_mixer.hf.carried_states", lambda cache, layer_idx: (None, None))


def forget_at_single_tokens(patch):
    from toy_mixer.hf import TokenShift

    forward = TokenShift.forward

    def forgetful_forward(self, hidden_states, context):
        if hidden_states.shape[1] == 1:
            context = context._replace(cache=None)
        return forward(self, hidden_states, context)

    patch.setattr(TokenShift, "forward", forgetful_forward)


@pytest.mark.parametrize("forget", [forget_always, forget_at_single_tokens])
def test_the_verification_finds_a_step_that_forgets(forget, folder, documents, sentencepiece_model, monkeypatch):
    path, state, config = folder
    verify_export(path, state, config, documents[:3], sentencepiece_model)
    forget(monkeypatch)
    with pytest.raises(HFError, match="logits of the exported model differ"):
        verify_export(path, state, config, documents[:3], sentencepiece_model)


def test_a_package_that_is_missing_or_another_is_named(folder, monkeypatch):
    path = folder[0]
    monkeypatch.setattr(type(mixer("T")), "name", "transposition")
    with pytest.raises(HFError, match=r"means the mixer token_shift by the letter T, but .* is transposition"):
        load_for_generation(path)
    monkeypatch.undo()
    toy_mixer.uninstall()
    try:
        with pytest.raises(HFError, match=r"no mixer has the letter 'T'.* install the package that brings it"):
            load_for_generation(path)
    finally:
        toy_mixer.install()


def test_a_mixer_without_a_side_for_hugging_face_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(type(mixer("T")), "hf", None)
    with pytest.raises(HFError, match=r"token_shift \(T in model\.pattern\) cannot be written"):
        hf_config(config_of("MT"))


def extension(**changes) -> dict:
    return {"name": "other", "layer_type": "moe", "is_mlp": False, "sizes": {}} | changes


def test_extensions_in_a_configuration():
    config = SambaConfig(
        pattern="GgM-g", mlp_size=256, extensions={"G": extension(), "g": extension(name="wide", is_mlp=True)}
    )
    assert [(block.mixer, block.mlp) for block in config.blocks] == [("G", "g"), ("M", "-"), (None, "g")]
    assert config.layer_types == ["moe", "linear_attention", "moe"]
    assert config.fla_obstacle == "It has no layer like G (other) of the pattern GgM-g."
    assert "extensions" not in SambaConfig(pattern="M-").to_dict()


@pytest.mark.parametrize(
    ("letter", "changes", "message"),
    [
        ("M", {}, "other letters than M"),
        ("GG", {}, "other letters than M"),
        ("G", {"is_mlp": 1}, "each by name, layer_type, is_mlp, sizes"),
        ("G", {"layer_type": "chunked_attention"}, "'chunked_attention': use one of linear_attention"),
        ("H", {}, "allowed are the letters M, [*], - and H"),
    ],
)
def test_extensions_that_mean_nothing_are_refused(letter, changes, message):
    with pytest.raises(ValueError, match=message):
        SambaConfig(pattern="G-", mlp_size=256, extensions={letter: extension(**changes)})


def test_no_file_of_the_package_names_it():
    root = Path(sambalm.model.hf.__file__).parents[1]
    texts = {path: path.read_text("utf-8") for path in root.rglob("*.py")}
    assert len(texts) > 30
    assert not [path for path, text in texts.items() if "toy_mixer" in text or "TokenShift" in text]
