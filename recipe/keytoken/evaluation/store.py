"""The file that an evaluation grows answer by answer, and goes on with after whatever ended it.

The first line says what the answers depend on; each further line is one answer, written and flushed at once.
A line that a kill has cut in two is dropped when the file is opened again, and its answer is asked for anew.
A file without any answer, be it of another evaluation, is begun anew.
"""

import fcntl
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from keytoken.errors import ConfigurationError, DataError
from keytoken.evaluation.rows import SampleKey, key_of
from keytoken.scoring.items import Prediction

FILE_NAME = "predictions.jsonl"


class PredictionStore:
    """The open prediction file of one evaluation; a context manager.

    Attributes:
        path: The file.
        predictions: What is there, by key.
    """

    def __init__(self, folder: Path, header: Mapping[str, Any], *, retry_failed: bool = False) -> None:
        """Open the file of a folder, new or to go on with.

        Args:
            folder: The evaluation's folder; made if needed.
            header: What the answers depend on, as JSON has it.
            retry_failed: Drop the answers that failed, so that they are asked for again.

        Raises:
            ConfigurationError: the file's answers were made under another header, or another evaluation
                is writing it.
            DataError: a line that is no answer.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / FILE_NAME
        self._file = self.path.open("ab", buffering=0)  # one write to a line
        try:
            self._lock()
            self.predictions = self._read(dict(header))
            if retry_failed:
                self._drop_failed(header)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "PredictionStore":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def append(self, prediction: Prediction) -> None:
        """Write one answer; it is on its way to the disk when this returns.

        Raises:
            DataError: the disk is full or gone.
        """
        self._write({"benchmark": self._benchmark, **asdict(prediction)})
        self.predictions[key_of(prediction)] = prediction

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as problem:
            raise ConfigurationError(
                f"{self.path}: another evaluation is writing it; wait for its end, or give out=FOLDER"
            ) from problem

    def _read(self, header: dict[str, Any]) -> dict[SampleKey, Prediction]:
        self._benchmark = str(header["benchmark"])
        content: dict[SampleKey, Prediction] = {}
        end, first = 0, header
        with self.path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.endswith(b"\n"):
                    break  # cut by a kill
                end += len(line)
                fields = _object(line, self.path, number)
                if number == 1:
                    first = fields
                    if fields.get("keytoken") != header.get("keytoken"):  # somebody else's file
                        self._require_same(fields, header)
                    continue
                if number == 2:
                    self._require_same(first, header)
                prediction = _prediction(fields, self.path, number)
                if key_of(prediction) in content:
                    raise DataError(f"{self.path}, line {number}: a second answer for {key_of(prediction)}")
                content[key_of(prediction)] = prediction
        if not content and first != header:
            end = 0  # nothing was answered under that header
        self._file.truncate(end)
        if end == 0:
            self._write(header)
        return content

    def _require_same(self, found: dict[str, Any], header: dict[str, Any]) -> None:
        """Refuse to mix answers of two evaluations in one file."""
        found, header = ({key: side[key] for key in side if key != "model"} for side in (found, header))
        differences = _differences(found, header)  # the digest says which model, wherever it lies
        if differences:
            raise ConfigurationError(
                f"{self.path} holds answers of another evaluation: {'; '.join(differences)}. Give out=FOLDER "
                "for a new one, or the same options to go on with this one."
            )

    def _drop_failed(self, header: Mapping[str, Any]) -> None:
        """Rewrite the file without failed answers, in one step."""
        kept = {key: value for key, value in self.predictions.items() if value.response is not None}
        if len(kept) == len(self.predictions):
            return
        partial = self.path.with_suffix(".partial")
        lines = [dict(header), *({"benchmark": self._benchmark, **asdict(each)} for each in kept.values())]
        partial.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        old, self._file = self._file, partial.open("ab", buffering=0)
        self._lock()
        partial.replace(self.path)
        old.close()
        self.predictions = kept

    def _write(self, fields: Mapping[str, Any]) -> None:
        # ASCII JSON: no character of an answer can be taken for the end of a line.
        line = json.dumps(fields).encode("ascii") + b"\n"
        try:
            written = self._file.write(line)
        except OSError as problem:
            raise self._unwritable(os.strerror(problem.errno or 0)) from problem
        if written != len(line):
            raise self._unwritable("the disk is full")

    def _unwritable(self, reason: str) -> DataError:
        return DataError(
            f"{self.path}: cannot be written ({reason}); mend that and start the same command again, which "
            "goes on where this one ended"
        )


def _object(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        fields = json.loads(line)
    except ValueError as problem:
        raise DataError(f"{path}, line {number}: is no JSON ({problem}); remove the line") from problem
    if not isinstance(fields, dict):
        raise DataError(f"{path}, line {number}: is no JSON object; remove the line")
    return fields


def _prediction(fields: dict[str, Any], path: Path, number: int) -> Prediction:
    try:
        return Prediction(**{name: value for name, value in fields.items() if name != "benchmark"})
    except TypeError as problem:
        raise DataError(f"{path}, line {number}: is no answer ({problem}); remove the line") from problem


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Each key whose values differ, with both, down to the leaves."""
    result = []
    for name in dict.fromkeys([*found, *wanted]):
        old, new = found.get(name), wanted.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            result += _differences(old, new, f"{prefix}{name}.")
        elif old != new:
            result.append(f"{prefix}{name} was {old!r} and is {new!r}")
    return result
