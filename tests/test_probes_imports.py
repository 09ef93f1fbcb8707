"""Importing the packages, or asking for help, loads nothing heavy."""

import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "transformers", "pandas", "matplotlib")


def loaded(code: str) -> set[str]:
    """Which of the heavy libraries a fresh interpreter holds after running `code`."""
    tell = f"import sys; print('loaded:', *[n for n in {HEAVY} if n in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{tell}"], capture_output=True, text=True, check=True
    )
    return set(done.stdout.splitlines()[-1].split()[1:])


def test_packages_are_light() -> None:
    assert loaded("import probes, steering, analyses") == set()
    assert loaded("import probes; probes.Site(0, 'q')") == set()
    assert "torch" in loaded("import probes; probes.HookedModel")  # the control


def test_help_is_light() -> None:
    script = Path(sys.executable).with_name("alignlens")
    assert script.is_file()
    code = "\n".join(
        [
            "import runpy, sys",
            "sys.argv = ['alignlens', '--help']",
            "try:",
            f"    runpy.run_path({str(script)!r}, run_name='__main__')",
            "except SystemExit as end:",
            "    assert not end.code, end.code",
        ]
    )
    assert loaded(code) == set()


@pytest.mark.parametrize("package", ["probes", "steering", "analyses"])
def test_every_public_name_exists_and_is_listed(package: str) -> None:
    code = "\n".join(
        [
            f"import {package} as p",
            "assert p.__all__ == sorted(p.__all__), p.__all__",
            "assert set(p.__all__) <= set(dir(p))",
            "[getattr(p, name) for name in p.__all__]",
            "try:",
            "    p.no_such_name",
            "except AttributeError as error:",
            "    assert 'no_such_name' in str(error)",
            "else:",
            "    raise SystemExit('found')",
        ]
    )
    loaded(code)
