"""Whether clips can be decoded here: tiny ones of every codec that can be written, by every decoder.

A decoder that skips, repeats or reorders frames is found out, not only one that fails.
"""

import functools
import tempfile
from dataclasses import replace
from pathlib import Path

from keytoken.data.child import ClipProcess
from keytoken.data.clips import read_clip
from keytoken.data.contract import SamplingContract
from keytoken.data.decoders import AUTO, DECODERS
from keytoken.data.timed import read_clip_within
from keytoken.doctor.finding import Finding, Subject, fail, of_error, ok, skip, warn
from keytoken.doctor.tiny_clips import BAR, CODECS, NUM_FRAMES, RATE, write_clips
from keytoken.errors import ClipError, ConfigurationError, KeyTokenError

_CONTRACT = SamplingContract(
    fps=float(RATE), min_frames=NUM_FRAMES, max_frames=NUM_FRAMES, min_pixels=BAR * BAR
)
_LIMIT_S = 30.0
_MISSING = "not installed"


def decoders(subject: Subject) -> Finding:
    """Every decoder against every codec; those that the run's contract asks for have to work."""
    with tempfile.TemporaryDirectory(prefix="keytoken-doctor-") as folder:
        clips, unwritten = write_clips(Path(folder))
        outcome = {name: try_decoder(name, clips) for name in DECODERS}
    return judge(subject.contract.decoder, outcome, unwritten)


def judge(chosen: str, outcome: dict[str, dict[str, str]], unwritten: list[str]) -> Finding:
    """What the decoders' results mean for a run.

    Args:
        chosen: The contract's decoder.
        outcome: By decoder and codec, why a clip is not read; empty where it is.
        unwritten: Codecs of which no clip could be made.
    """
    if len(unwritten) == len(CODECS):
        return warn(
            "nothing here writes a clip to try the decoders with",
            "Install PyAV again, whose wheel brings its codecs: pip install --no-deps --force-reinstall av",
        )
    asked = AUTO if chosen == "auto" else (chosen,)
    readable = {codec for name in asked for codec, reason in outcome[name].items() if not reason}
    words = "; ".join(_words(name, outcome[name]) for name in outcome)
    if unwritten:
        words += f"; not tried, for nothing here writes it: {', '.join(unwritten)}"
    lost = [codec for codec in CODECS if codec not in unwritten and codec not in readable]
    reasons = {f"{name}: {outcome[name][codec]}" for name in asked for codec in lost[:1]}
    if "h264" in lost:
        return fail(
            f"decoder={chosen} reads no H.264 clip ({'; '.join(sorted(reasons))}); {words}",
            "Install PyAV again, whose wheel brings its codecs (pip install --no-deps --force-reinstall av), "
            "or choose a decoder that works: keytoken.sampling.decoder=auto",
        )
    if lost:
        return warn(words, f"Clips of {', '.join(lost)} will be set aside; re-encode them to H.264.")
    return ok(words)


def try_decoder(name: str, clips: dict[str, Path]) -> dict[str, str]:
    """For every codec the reason why a decoder does not read it, empty where it does."""
    reasons: dict[str, str] = {}
    with ClipProcess(functools.partial(probe, decoder=name), _LIMIT_S) as process:
        for codec, path in clips.items():
            try:
                reasons[codec] = process.run(str(path))
            except KeyTokenError as problem:
                reasons[codec] = str(problem)
            if reasons[codec] == _MISSING:
                return dict.fromkeys(clips, _MISSING)
    return reasons


def probe(path: str, decoder: str) -> str:
    """Decode one of our clips and compare the numbers that its frames show; runs in a child."""
    try:
        frames = read_clip(path, replace(_CONTRACT, decoder=decoder)).frames
    except ConfigurationError:  # the decoder's package is not there
        return _MISSING
    except ClipError as problem:
        return str(problem)
    columns = frames.double().mean(dim=(1, 2))  # [T, W]
    bars = columns.reshape(len(frames), NUM_FRAMES, -1).mean(dim=2)
    shown = bars.argmax(dim=1).tolist()
    return "" if shown == list(range(NUM_FRAMES)) else f"shows frames {shown}"


def _words(name: str, reasons: dict[str, str]) -> str:
    if set(reasons.values()) == {_MISSING}:
        return f"{name} {_MISSING}"
    good = [codec for codec, reason in reasons.items() if not reason]
    bad = [codec for codec, reason in reasons.items() if reason]
    return f"{name} reads {', '.join(good) or 'nothing'}" + (f", not {', '.join(bad)}" if bad else "")


def clip(subject: Subject) -> Finding:
    """The user's clip, by the run's contract."""
    if subject.clip is None:
        return skip("clip=PATH decodes one of yours")
    try:
        found = read_clip_within(subject.clip, subject.contract, _LIMIT_S)
    except ClipError as problem:
        return of_error(problem)
    count, _, height, width = found.frames.shape
    words = (
        f"{subject.clip.name}: {count} of {found.num_source_frames} frames, {found.timestamps_s[0]:.1f} to "
        f"{found.timestamps_s[-1]:.1f} s, as {height}x{width}, by {found.decoder}"
    )
    if found.note:
        return warn(f"{words}; {found.note}", "Look at the clip, or re-encode it.")
    return ok(words)
