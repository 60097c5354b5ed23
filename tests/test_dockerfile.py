"""The Dockerfile, as far as it can be read without Docker; dockerfile.py takes its steps."""

from pathlib import Path

import dockerfile
import pytest
from dockerfile import Image, Step

FILE = dockerfile.PROJECT / "Dockerfile"


def test_lines_are_joined_as_docker_does() -> None:
    text = "# first\nFROM a:${B}\n\nRUN x \\\n # between\n  && y 'c; \\\n  d'\nCMD [\"z\"]\n"
    assert list(dockerfile.steps(text)) == [
        Step("FROM", "a:${B}"),
        Step("RUN", "x   && y 'c;   d'"),
        Step("CMD", '["z"]'),
    ]


def test_every_step_but_commands_can_be_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is copied is there, and is in the image where the commands look for it."""
    commands: list[tuple[list[str], str]] = []
    monkeypatch.setattr(
        dockerfile, "run", lambda image, command: commands.append((command, image.folder))
    )
    image = Image(tmp_path, {"DALI": "cuda120"})
    for step in dockerfile.steps(FILE.read_text()):
        dockerfile.take(step, image)
    assert image.arguments["DALI"] == "cuda120"
    assert image.environment["PATH"].startswith("/opt/venv/bin:/")
    assert {folder for _, folder in commands[1:]} == {image.folder}
    root = tmp_path / image.folder.lstrip("/")
    assert (root / image.command[1]).is_file()
    assert (root / "configs" / "sew34_t4.yaml").is_file()


def test_an_unknown_instruction_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has a VOLUME"):
        dockerfile.take(Step("VOLUME", "/x"), Image(tmp_path, {}))
