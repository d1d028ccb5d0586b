"""The version check names the package, both versions and the remedy."""

from __future__ import annotations

from importlib import metadata

import pytest

from keytoken.errors import VersionError
from keytoken.verl_adapter.versions import check_versions


def installed_but(**changed: str | None) -> object:
    def find(name: str) -> str:
        if name in changed:
            version = changed[name]
            if version is None:
                raise metadata.PackageNotFoundError(name)
            return version
        return metadata.version(name)

    return find


def test_this_installation_fits() -> None:
    assert check_versions()["verl"] == "0.9.1"


@pytest.mark.parametrize("found", ["0.9.0", "0.10.0.dev0", None])
def test_other_verl_is_refused(found: str | None) -> None:
    with pytest.raises(VersionError) as error:
        check_versions(installed_but(verl=found))
    for part in ("verl", found or "missing", "==0.9.1", "pip install --no-deps -r requirements/"):
        assert part in str(error.value)
    assert isinstance(error.value, ImportError)
