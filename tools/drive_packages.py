"""Serve models of public packages, each group of packages in an environment of its own.

Run it by ``make test-packages``. An environment is made under ``build/packages`` when its group is
first driven. It sees what the main environment has, PyTorch above all, by a .pth file, so that only
the group's own packages are installed. The rows of each group are kept as JSON, and the section of
docs/coverage.md is written from all that there are.
"""

from __future__ import annotations

import argparse
import os
import site
import subprocess
import sys
from pathlib import Path

HOME = Path(__file__).resolve().parent.parent
TESTS = HOME / "tests" / "packages"
BUILD = HOME / "build" / "packages"
REQUIREMENTS = TESTS / "requirements"


def environment(group: str) -> Path:
    """Return the Python of a group's environment, which is made or completed where it is not."""
    home = BUILD / group
    python = home / "bin" / "python"
    requirements = REQUIREMENTS / f"{group}.txt"
    stamp = home / ".installed"
    if stamp.exists() and stamp.read_text("utf-8") == requirements.read_text("utf-8"):
        return python
    print(f"installing {group}", flush=True)
    subprocess.run([sys.executable, "-m", "venv", home], check=True)
    (packages,) = home.glob("lib/python*/site-packages")
    shared = "\n".join(path for path in site.getsitepackages() if Path(path).is_dir())
    (packages / "main-environment.pth").write_text(f"{shared}\n", "utf-8")
    # The constraints keep pip from installing another PyTorch beside the one that it sees.
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--constraint", HOME / "constraints.txt",
         "--requirement", requirements],
        check=True,
    )  # fmt: skip
    stamp.write_text(requirements.read_text("utf-8"), "utf-8")
    return python


def drive(group: str, options: argparse.Namespace) -> int:
    """Drive the models of a group in its environment; return the exit status."""
    command: list[str | Path] = [
        environment(group), "-W", "ignore", TESTS / "prove_packages.py", group,
        "--jobs", str(options.jobs), "--limit", str(options.limit),
        "--write", BUILD / f"{group}.json",
    ]  # fmt: skip
    env = {**os.environ, "PYTHONPATH": str(HOME / "server")}
    return subprocess.run(command, env=env, check=False).returncode


def main() -> int:
    """Drive the groups named, or all of them, and write the section."""
    groups = sorted(file.stem for file in REQUIREMENTS.glob("*.txt"))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("groups", nargs="*", help=f"of {', '.join(groups)}; all if none")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="models at once")
    parser.add_argument("--limit", type=float, default=1500, help="seconds for one model")
    parser.add_argument("--write", type=Path, help="the page whose section is to be written")
    options = parser.parse_args()
    if unknown := set(options.groups) - set(groups):
        parser.error(f"groups: got {', '.join(sorted(unknown))}, expected {', '.join(groups)}")
    failed = [group for group in options.groups or groups if drive(group, options)]
    if options.write:
        script = TESTS / "write_section.py"
        subprocess.run([sys.executable, script, BUILD, options.write], check=True)
    if failed:
        print(f"wrong or failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
