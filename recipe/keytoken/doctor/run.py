"""The registry of checks, and who calls them."""

import dataclasses
import json
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from omegaconf import DictConfig

from keytoken.doctor import (
    cluster,
    codecs,
    configuration,
    devices,
    exposure,
    memory,
    model,
    packages,
    reward,
    rows,
    system,
)
from keytoken.doctor.finding import Check, Finding, Subject, of_error, skip, warn
from keytoken.doctor.report import as_json, table_text
from keytoken.errors import DoctorError, KeyTokenError
from keytoken.verl_adapter.versions import check_versions

logger = logging.getLogger(__name__)

# Add a check: write a function from Subject to Finding and name it here. They are made in this order.
CHECKS: tuple[Check, ...] = (
    Check("python", packages.python, short=True),
    Check("packages", packages.packages, short=True),
    Check("imports", packages.imports),
    Check("gpu", devices.gpu, short=True, needs_here=True),
    Check("gpu_kernel", devices.gpu_kernel, needs_here=True),
    Check("shared_memory", system.shared_memory, short=True, needs_here=True),
    Check("open_files", system.open_files, short=True),
    Check("network", system.network, short=True, needs_here=True),
    Check("socket_paths", system.socket_paths, short=True, needs_here=True),
    Check("disks", system.disks, short=True, about_files=True),
    Check("decoders", codecs.decoders),
    Check("clip", codecs.clip),
    Check("ray", cluster.ray),
    Check("configuration", configuration.configuration, short=True, needs_run=True),
    Check("files", configuration.files, short=True, needs_run=True),
    Check("verl_rules", configuration.verl_rules, needs_run=True),
    Check("ports", system.ports, short=True, needs_run=True, needs_here=True),
    Check("exposure", exposure.exposure, short=True, needs_run=True),
    Check("memory", memory.ram, short=True, needs_here=True),
    Check("gpu_memory", memory.gpu_memory, short=True, needs_run=True, needs_here=True),
    Check("model_files", model.model_files, short=True, needs_run=True, about_files=True),
    Check("processor", model.processor, needs_run=True, about_files=True),
    Check("data_rows", rows.data_rows, short=True, needs_run=True, about_files=True),
    Check("media_files", rows.media_files, short=True, needs_run=True, about_files=True),
    Check("clip_sample", rows.clip_sample, needs_run=True, about_files=True),
    Check("reward", reward.reward, short=True, needs_run=True, about_files=True),
)


def examine(
    subject: Subject, checks: Sequence[Check] = CHECKS, watch: Callable[[str], None] = lambda name: None
) -> list[Finding]:
    """Make all checks that apply.

    Args:
        subject: What is examined.
        checks: The checks to choose from.
        watch: Told the name of every check before it is made.

    Returns:
        One finding for each check that applies, in their order.
    """
    about_run = subject.config is not None or subject.problem is not None
    findings = []
    for check in checks:
        short = check.short or (check.name == "clip" and subject.clip is not None)
        if (subject.short and not short) or (check.needs_run and not about_run):
            continue
        watch(check.name)
        start = time.monotonic()
        finding = _ask(check, subject)
        seconds = round(time.monotonic() - start, 3)
        findings.append(dataclasses.replace(finding, name=check.name, seconds=seconds))
    return findings


def _ask(check: Check, subject: Subject) -> Finding:
    if check.needs_run and subject.config is None and check.name != "configuration":
        return skip("needs a configuration that composes")
    if check.needs_here and not subject.here:
        return skip("the run joins a cluster, whose nodes are not this machine")
    try:
        finding = check.ask(subject)
    except (KeyTokenError, OSError) as problem:
        finding = of_error(problem)
    if finding.status == "fail" and check.about_files and not subject.here:
        seen = "seen from this machine; the nodes of the cluster may have other files"
        return warn(f"{finding.found} ({seen})", finding.remedy)
    return finding


def require_healthy(config: DictConfig, report: Path) -> None:
    """Make the quick checks before a run; warnings are logged, and everything is kept in a file.

    Args:
        config: The run's resolved configuration.
        report: Where the findings go, as JSON.

    Raises:
        VersionError: a package that KeyToken insists on has another version.
        DoctorError: something would keep the run from working: what, and the remedy.
    """
    check_versions()  # with others nothing else can be judged
    findings = examine(Subject(config, short=True))
    try:
        report.write_text(json.dumps(as_json(findings), indent=1) + "\n", encoding="utf-8")
    except OSError as problem:  # the checks say what is wrong there, and shall be heard
        logger.warning("doctor: %s cannot be written (%s)", report, problem.strerror)
    for finding in findings:
        if finding.status == "warn":
            logger.warning("doctor: %s: %s. %s", finding.name, finding.found, finding.remedy)
    failed = [finding for finding in findings if finding.status == "fail"]
    if len(failed) == 1:
        raise DoctorError(f"{failed[0].name}: {failed[0].found}. {failed[0].remedy}")
    if failed:
        raise DoctorError(
            f"{len(failed)} things have to be mended before this run can start "
            f"(keytoken.doctor=off starts it all the same):\n{table_text(failed)}"
        )
