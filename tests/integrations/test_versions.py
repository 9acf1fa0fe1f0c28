"""An installed version of a package that the page of its integration was not tested with fails here."""

import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

pytest.importorskip("packaging")

from packaging.requirements import Requirement

PAGES = sorted((Path(__file__).parents[2] / "docs/integrations").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_installed_versions_are_those_that_the_page_was_tested_with(page):
    lines = re.findall(r"^Tested with: (.+)$", page.read_text("utf-8"), re.MULTILINE)
    assert len(lines) == 1, f"{page.name} must say once what it was tested with"
    for requirement in map(Requirement, re.findall(r"`([^`]+)`", lines[0])):
        assert len(requirement.specifier) >= 2, f"{page.name}: {requirement} must have both ends"
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            continue
        installed = installed.partition("+")[0]
        assert installed in requirement.specifier, (
            f"{page.name} was tested with {requirement}, installed is {installed}: run the tests and move the "
            "range, or pin the version in constraints.txt"
        )
