"""Runs the commands in a page's console blocks and puts what they print under them, so that none is from memory.

    python docs/tools/run_commands.py docs/decision.md

Commands are the lines after "$ ", all run in one new directory.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

_BLOCK = re.compile(r"(```console\n)(.*?)(```)", re.DOTALL)


def main() -> None:
    page = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as directory:
        text = _BLOCK.sub(lambda block: block[1] + rerun(block[2], Path(directory)) + block[3], page.read_text())
    page.write_text(text)


def rerun(block: str, directory: Path) -> str:
    """The block with each command's output as it is now."""
    commands = re.findall(r"^\$ (.*)$", block, flags=re.MULTILINE)
    return "".join("\n".join([f"$ {command}", *_printed(command, directory)]) + "\n" for command in commands)


def _printed(command: str, directory: Path) -> list[str]:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, shell=True, cwd=directory, env=environment, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"$ {command}\n{result.stdout}{result.stderr}")
    lines = [line.rstrip() for line in result.stdout.split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    return lines


if __name__ == "__main__":
    main()
