"""The lens of a real run."""

import json
import re

import pytest

from keytoken.lens.read import read_export
from keytoken.lens.write import write_lens

pytestmark = pytest.mark.e2e


def test_the_export_of_a_run_has_all_that_the_lens_shows(straight) -> None:
    export = read_export(straight.folder / "tokens" / "step_000003.parquet")
    assert export.version == 2 and export.missing == ()
    assert export.about["method"]["name"] == "video_ktr" and export.about["batch_answers"] == 16
    assert all(answer.accuracy is not None and answer.group_size == 4 for answer in export.answers)
    assert sorted(answer.row_key for answer in export.answers) == list(range(16))
    for answer in export.answers:
        assert answer.applies["visual"] == bool(answer.clips)
    page = write_lens(straight.folder, say=print).read_text(encoding="utf-8")
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])
    assert [item["step"] for item in data["exports"]] == [1, 2, 3, 4]
    strips = [strip for prompt in data["prompts"] for strip in prompt["strips"]]
    assert strips and all(len(strip["frames"]) == 8 and strip["note"] == "" for strip in strips)
    assert any(strip["order"] for strip in strips)
