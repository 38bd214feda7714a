"""No credential reaches a run's folder, whatever it is called."""

import stat

import pytest

from sambalm.pretrain.config_file import config_record, dump_config, parse_config
from sambalm.pretrain.credentials import shown_environment, without_credentials
from sambalm.pretrain.errors import MAX_SENTENCE_CHARACTERS, NotSavedError, one_sentence
from sambalm.pretrain.lifecycle.attempts import read_outcome, recorded_errors, write_snapshot
from tests.support.whole_runs import changed

SECRETS = {
    "HTTPS_PROXY": "http://user:s3cret@proxy:3128",
    "http_proxy": "http://user:s3cret@proxy:3128",
    "PIP_INDEX_URL": "https://__token__:s3cret@index/simple",
    "UV_EXTRA_INDEX_URL": "https://s3cret@index/simple",
    "DATABASE_URL": "postgres://user:s3cret@db/runs",
    "MYSQL_PWD": "s3cret",
    "PGPASSFILE": "s3cret",
    "SLURM_JWT": "s3cret",
    "AWS_SESSION": "s3cret",
    "WANDB_API_KEY": "s3cret",
    "HF_TOKEN": "s3cret",
    "NVIDIA_API_KEY": "s3cret",
    "CUDA_LICENSE_AUTH": "s3cret",
    "NCCL_NET_PLUGIN": "https://user:s3cret@host/plugin",
}


def test_only_known_variables_show_their_values():
    shown = shown_environment(SECRETS | {"NCCL_DEBUG": "INFO", "SLURM_JOB_ID": "7", "PATH": "/bin", "WORLD_SIZE": "2"})
    assert "s3cret" not in shown
    assert {"NCCL_DEBUG=INFO", "SLURM_JOB_ID=7", "PATH=/bin", "WORLD_SIZE=2"} <= set(shown.splitlines())
    assert "NCCL_NET_PLUGIN=https://host/plugin\n" in shown
    assert shown.count("=(hidden)\n") == len(SECRETS) - 1


def test_what_torchrun_and_slurm_tell_a_rank_is_shown():
    names = [
        *("LOCAL_RANK", "RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME", "LOCAL_WORLD_SIZE", "WORLD_SIZE"),
        *("GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT"),
        *("TORCHELASTIC_MAX_RESTARTS", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_USE_AGENT_STORE"),
        *("SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURM_NNODES", "SLURM_NODEID", "SLURM_PROCID", "SLURM_LOCALID"),
        *("SLURM_RESTART_COUNT", "SLURM_STEP_ID", "SLURMD_NODENAME", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"),
    ]
    assert shown_environment({name: "7" for name in names}).splitlines() == [f"{name}=7" for name in sorted(names)]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("data.train=s3://key:s3cret@bucket/x", "data.train=s3://bucket/x"),
        ("git+https://s3cret@host/a@v1 b", "git+https://host/a@v1 b"),
        ("https://u:s3/cr#et@host/x", "https://host/x"),
        ("https://u:p@s3cret@host/x", "https://host/x"),
        ("https://host:8080/a@b", "https://host:8080/a@b"),
        ("https://host/x?X-Amz-Signature=s3cret&part=1", "https://host/x?X-Amz-Signature=(hidden)&part=1"),
        ("https://host/x?sv=1&sig=s3cret", "https://host/x?sv=1&sig=(hidden)"),
        ("https://host/a?sigma=2", "https://host/a?sigma=2"),
        ("a@b.c and C:/x", "a@b.c and C:/x"),
    ],
)
def test_urls_lose_what_is_secret_and_nothing_else(text, shown):
    assert without_credentials(text) == shown
    assert without_credentials({"a": [text, 3, None]}) == {"a": [shown, 3, None]}


def test_a_run_folder_holds_no_credential(run_values, tmp_path, monkeypatch):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.argv", ["train", "data.train=s3://key:s3cret@bucket/x"])
    config = parse_config(changed(run_values, data={"train": "s3://key:s3cret@bucket/x"}), source="test")
    folder = tmp_path / "attempts" / "one"
    write_snapshot(folder, config_yaml=dump_config(config), world_size=1, start_step=0)
    with pytest.raises(NotSavedError), recorded_errors(folder):
        raise NotSavedError("no access to https://user:s3cret@host")
    files = {path.name: path for path in folder.iterdir()}
    assert {"attempt.json", "config.yaml", "environment.txt", "packages.txt", "outcome.json"} <= files.keys()
    # The difference to the revision, where there is one, holds this file.
    assert [name for name, path in files.items() if name != "code.diff" and "s3cret" in path.read_text()] == []
    assert "s3cret" not in str(config_record(config))
    assert stat.S_IMODE(files["environment.txt"].stat().st_mode) == 0o600


def test_an_outcome_is_one_sentence(tmp_path):
    assert one_sentence(ValueError()) == "ValueError"
    with pytest.raises(NotSavedError), recorded_errors(tmp_path):
        raise NotSavedError(f"\nfirst line\nTraceback: {'x' * 2000}")
    reason = read_outcome(tmp_path)["reason"]
    assert reason.startswith("first line Traceback: xxx")
    assert len(reason) == MAX_SENTENCE_CHARACTERS
    assert len(one_sentence("x" * 2000)) == MAX_SENTENCE_CHARACTERS
