"""What the documents name exists: options of commands, and files that they link to."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer

from hf_paged.cli import app
from hf_paged.integrations.openai_server.options import MODEL_FIELDS, SERVER_FIELDS
from hf_paged.llm.arguments import PLAIN

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [document.name for document in DOCUMENTS]

OTHERS = (
    "docker", "kubectl", "openssl", "pip", "python", "vllm", "sglang", "torchrun", "nvidia-smi", "curl", "nginx", "git",
    "accelerate", "make", "pytest", "ruff", "scripts/",
)  # fmt: skip
"""Programs of others: what stands behind them on a line are their options, or those of a module with its own help."""

WITH_EXAMPLES = ("benchmarks.md", "grpo.md", "parallel.md", "scaling.md", "CONTRIBUTING.md")
"""These name options of examples and of modules' own programs: in them, lines that call hf-paged are looked at."""


def command_options() -> dict[str, set[str]]:
    """Options by command, `bench serve` being one; `serve` and `run-batch` take the server's."""
    found: dict[str, set[str]] = {}

    def walk(command: object, name: str) -> None:
        for word, below in getattr(command, "commands", {}).items():
            walk(below, f"{name} {word}".strip())
        options = [option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)]  # type: ignore[attr-defined]
        found[name] = {"--help", *(option for option in options if option.startswith("--"))}

    walk(typer.main.get_command(app), "")
    server = {f"--{name.replace('_', '-')}" for name in (*SERVER_FIELDS, *MODEL_FIELDS, *PLAIN, "config")}
    server |= {option.replace("--", "--no-") for option in server}
    found["serve"] |= server
    found["run-batch"] |= server
    return found


OPTIONS = command_options()
ANY = set().union(*OPTIONS.values())


def lines_of(text: str) -> list[str]:
    """Lines, those that a backslash breaks joined."""
    return re.sub(r"\\\n\s*", " ", text).splitlines()


@pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES)
def test_options_exist(document: Path) -> None:
    unknown = []
    for line in lines_of(document.read_text(encoding="utf-8")):
        called = re.search(r"hf-paged ((?:bench )?[a-z][a-z-]*)\b(.*)", line)
        known = OPTIONS.get(called[1], ANY) if called and line.strip().strip("`").startswith("hf-paged") else ANY
        text = line.split("  # ")[0].split("    #")[0]
        others = document.name in WITH_EXAMPLES or any(re.search(rf"(?:^|[\s`(]){name}", text) for name in OTHERS)
        if others and not called:
            continue
        unknown += [
            f"{option} in: {line.strip()}"
            for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", text)
            if option not in known
        ]
    assert not unknown


@pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES)
def test_links_lead_somewhere(document: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", document.read_text(encoding="utf-8"))
    local = [link for link in links if "://" not in link]
    assert [link for link in local if not (document.parent / link).exists()] == []
