"""What is installed: the version, the marker for type checkers, the command."""

from __future__ import annotations

import os
from importlib import metadata
from pathlib import Path

import autotp

ROOT = Path(__file__).parents[1]


def test_the_built_package_is_what_is_tested() -> None:
    """``make test`` says so by AUTOTP_TEST_INSTALLED; without it the source tree may be tested as well."""
    package = Path(autotp.__file__).resolve().parent
    if os.environ.get("AUTOTP_TEST_INSTALLED"):
        assert package != ROOT / "autotp"
        assert metadata.version("autotp")
        assert [
            point.name for point in metadata.entry_points(group="console_scripts", value="autotp.cli:main")
        ]
    assert (package / "py.typed").exists()


def test_the_license_is_whole() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert text.split()[:2] == ["Apache", "License"]
    assert "END OF TERMS AND CONDITIONS" in text
