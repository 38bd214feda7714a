"""The errors of `sambalm serve`: those of whoever starts it, and those of its clients."""

from sambalm.pretrain.errors import ExitCode


class ServingError(Exception):
    """A server that cannot start; the message is one sentence."""

    exit_code = ExitCode.BAD_INPUT


class RequestError(Exception):
    """A request that gets an error for an answer, in OpenAI's form.

    Args:
        sentence: what is wrong and what to do.
        status: of the HTTP answer.
        kind: the error's `type`.
        parameter: the field of the request that is wrong, None for none.
        code: a word for programs.
    """

    def __init__(
        self,
        sentence: str,
        *,
        status: int = 400,
        kind: str = "invalid_request_error",
        parameter: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(sentence)
        self.status, self.kind, self.parameter, self.code = status, kind, parameter, code


def stopping() -> RequestError:
    """Returns the error of requests that the server's end cuts off."""
    return RequestError(
        "the server is shutting down: send the request again later", status=503, kind="server_error", code="shutdown"
    )
