"""What looks like a secret: a key or password, known by its name or by the form of its value.

A configuration is printed by verl, written into the run folder, handed to trackers and kept by a cluster's
job server; a command line stands in the shell's history and in the list of processes. So secrets belong into
environment variables, and what is printed of words that may hold one goes through :func:`shown`.
"""

import re

# What the last words of a name say. Columns and special tokens (``prompt_key``, ``eos_token``) are none.
_NAME = re.compile(
    r"(^|[_.-])((api|access|auth|bearer|hf|hub|private|secret|session|wandb|refresh)[_-]?(key|token)|apikey|"
    r"password|passwd|passphrase|secret|credentials?)$",
    re.IGNORECASE,
)
# Of an environment variable less is enough: HF_TOKEN, WANDB_API_KEY, JUDGE_KEY.
_VARIABLE = re.compile(r"(^|_)(KEY|TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?|AUTH)$")
# The forms that hubs, trackers and clouds give to theirs, long enough that no path (``/data/hf_checkpoints``)
# is taken for one; and a password within an address.
_VALUE = re.compile(
    r"\b(hf_[A-Za-z0-9]{30}|sk-[A-Za-z0-9_-]{32}|gh[opsu]_[A-Za-z0-9]{30}|github_pat_\w{30}|glpat-[\w-]{20}|"
    r"xox[abp]-[A-Za-z0-9-]{24}|AKIA[0-9A-Z]{16}|AIza[\w-]{35})[\w-]*|(?<=://)[^/@\s]*:[^/@\s]+(?=@)"
)
HIDDEN = "***"


def is_secret_name(name: str) -> bool:
    """Whether a dotted key or an environment variable is named as secrets are."""
    last = name.rpartition(".")[2]
    return _NAME.search(last) is not None or (last.isupper() and _VARIABLE.search(last) is not None)


def is_secret(name: str, value: object) -> bool:
    """Whether a setting holds a secret, by its name or by the form of its value."""
    return (
        isinstance(value, str) and bool(value) and (is_secret_name(name) or _VALUE.search(value) is not None)
    )


def shown(word: str) -> str:
    """A word of a command line, ``KEY=VALUE``, as it may be printed."""
    name, equals, _ = word.partition("=")
    if equals and is_secret_name(name.lstrip("+~-")):
        return f"{name}={HIDDEN}"
    return _VALUE.sub(HIDDEN, word)
