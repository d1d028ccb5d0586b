"""When answers that fail mean that a run cannot go on."""

from keytoken.errors import ClusterError, KeyTokenError
from keytoken.verl_adapter.lost import lost_process

MAX_FAILED_PROMPTS = 3


class FailureWatch:
    """Decides when failed prompts mean that the run cannot go on.

    One of KeyToken's own errors is enough: a wrong setting or a lost clip does not heal. Nor does an engine
    that died: verl asks it again for every prompt. Other errors may be passing ones until
    :data:`MAX_FAILED_PROMPTS` prompts in a row have failed.

    Attributes:
        last: What the answer that failed last said; None if none has.
    """

    def __init__(self) -> None:
        self._prompts: set[str] = set()
        self._final: KeyTokenError | None = None
        self.last: str | None = None

    def failed(self, prompt: str, error: Exception) -> None:
        """Note that an answer to a prompt failed."""
        self.last = str(error) if isinstance(error, KeyTokenError) else f"{type(error).__name__}: {error}"
        self._prompts.add(prompt)
        final = error if isinstance(error, KeyTokenError) else lost_process(error)
        if final is not None:
            self._final = final
        elif len(self._prompts) >= MAX_FAILED_PROMPTS:
            self._final = ClusterError(
                f"rollout: {len(self._prompts)} prompts in a row failed, the last with "
                f"{type(error).__name__}: {error}; see the log of the vLLM server, then resubmit: "
                "trainer.resume_mode=auto continues from the last checkpoint"
            )

    def succeeded(self) -> None:
        """Note that an answer came back."""
        self._prompts.clear()

    def raise_if_hopeless(self) -> None:
        """Raise what ends the run, if anything does."""
        if self._final is not None:
            raise self._final
