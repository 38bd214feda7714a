"""Samba in vLLM: the plug-in that vLLM finds by its entry point in the group `vllm.general_plugins`.

samba.py      the model, of vLLM's own layers
cpu_mamba.py  its Mamba on a CPU, for which vLLM's own lacks a kernel
"""


def register() -> None:
    """Tells vLLM of the model, and transformers of its configuration, so that no code of a folder is executed."""
    from vllm import ModelRegistry

    import sambalm.model.hf  # noqa: F401  (registers the configuration)

    ModelRegistry.register_model("SambaForCausalLM", "sambalm.model.vllm.samba:SambaForCausalLM")
