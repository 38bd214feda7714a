"""What a run may write down of its surroundings: no credentials, whatever they are called."""

import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "(hidden)"
# Environment variables whose values are recorded. Every other name is recorded without its value.
_ALLOWED = {
    *("HOME", "HOSTNAME", "LANG", "LD_LIBRARY_PATH", "LD_PRELOAD", "PATH", "PWD", "PYTHONPATH", "SHELL", "TERM"),
    *("TMPDIR", "TZ", "USER", "VIRTUAL_ENV", "CONDA_DEFAULT_ENV", "CONDA_PREFIX", "LOADEDMODULES", "COLUMNS"),
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK"),
    *("ROLE_WORLD_SIZE", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_MAX_RESTARTS"),
    *("TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_ERROR_FILE"),
    *("TORCHELASTIC_USE_AGENT_STORE", "TORCHDYNAMO_DISABLE"),
    *("SAMBALM_ATTEMPT", "SAMBALM_CLUSTER", "SAMBALM_CLUSTERS", "SAMBALM_PYTHON", "SAMBALM_SUCCESSOR"),
    *("RANKS_PER_NODE", "MIN_GPU_FREE_GIB", "MIN_DISK_FREE_GIB", "MIN_NODE_GB_PER_S", "MIN_PAIR_GB_PER_S"),
    *("MAX_RESTARTS", "CHECK_LINKS", "SLURMD_NODENAME", "SLURM_CLUSTER_NAME", "SLURM_CPUS_ON_NODE"),
    *("SLURM_CPUS_PER_TASK", "SLURM_CPU_BIND", "SLURM_GPUS", "SLURM_GPUS_ON_NODE", "SLURM_GPUS_PER_NODE"),
    *("SLURM_JOB_ACCOUNT", "SLURM_JOB_GPUS", "SLURM_JOB_ID", "SLURM_JOB_NAME", "SLURM_JOB_NODELIST"),
    *("SLURM_JOB_NUM_NODES", "SLURM_JOB_PARTITION", "SLURM_JOB_QOS", "SLURM_LOCALID", "SLURM_MEM_PER_NODE"),
    *("SLURM_NNODES", "SLURM_NODEID", "SLURM_NODELIST", "SLURM_NPROCS", "SLURM_NTASKS", "SLURM_NTASKS_PER_NODE"),
    *("SLURM_PROCID", "SLURM_RESTART_COUNT", "SLURM_STEP_ID", "SLURM_STEP_NODELIST", "SLURM_SUBMIT_DIR"),
    *("SLURM_TASKS_PER_NODE", "SLURM_TASK_PID"),
}
_ALLOWED_PREFIXES = (
    *("CUBLAS_", "CUDA_", "CUDNN_", "FI_", "GLOO_", "GOMP_", "KMP_", "LC_", "MALLOC_", "MKL_", "NCCL_", "NVIDIA_"),
    *("NVTE_", "OMP_", "OPENBLAS_", "PYTORCH_", "TORCH_", "TORCHINDUCTOR_", "TRITON_", "UCX_"),
)
_SECRET = r"(?:key|token|secret|passw|pwd|credential|auth|jwt|cookie|sig(?=nature|=))"
_SECRET_NAME = re.compile(_SECRET, re.IGNORECASE)
_SCHEME = r"([A-Za-z][A-Za-z0-9+.-]*://)"
_USER = re.compile(rf"{_SCHEME}[^\s/?#'\"]*@")
# A password may hold what belongs behind a host; what looks like a host's port is none.
_PASSWORD = re.compile(rf"{_SCHEME}[^\s/:?#'\"]*:(?!\d+(?:[/?#]|$))[^\s'\"]*@")
_QUERY = re.compile(rf"([?&][^\s=&]*{_SECRET}[^\s=&]*=)[^\s&'\"#]+", re.IGNORECASE)


def without_credentials(value: Any) -> Any:
    """Plain values, or a text, with URLs that name no user, no password and no signature."""
    if isinstance(value, str):
        return _QUERY.sub(rf"\1{HIDDEN}", _USER.sub(r"\1", _PASSWORD.sub(r"\1", value)))
    if isinstance(value, Mapping):
        return {key: without_credentials(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_credentials(item) for item in value]
    return value


def shown_environment(environment: Mapping[str, str]) -> str:
    """Environment variables, one a line; the value only of those that are known to hold no secret."""
    lines = []
    for name, value in sorted(environment.items()):
        allowed = name in _ALLOWED or (name.startswith(_ALLOWED_PREFIXES) and not _SECRET_NAME.search(name))
        shown = " ".join(without_credentials(value).splitlines()) if allowed else HIDDEN
        lines.append(f"{name}={shown}\n")
    return "".join(lines)
