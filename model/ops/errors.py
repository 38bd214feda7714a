"""What goes wrong with kernels."""


class KernelError(Exception):
    """A kernel that cannot run here; the message is one sentence for the user."""

    exit_code = 2


class DeclinedError(Exception):
    """A call that a kernel does not compute, raised before anything ran; the message says why.

    The registry gives the call to the next kernel (`registry.Fallbacks`).
    """
