"""Runs TRL's own tests of its GRPO and RLOO trainers with hf_paged in the place of their generation.

    git clone https://github.com/huggingface/trl && git -C trl checkout v1.16.0
    python scripts/trl_suite.py trl --out attached.txt            every trainer is attached to when it is constructed
    python scripts/trl_suite.py trl --out stock.txt --stock       TRL's own generation, to compare

The hub is not asked: the tiny models that TRL's tests load are made here in their shapes, with random weights and
SmolLM2's tokenizer, and the texts are TRL's own (`scripts/generate_zen_dataset.py`). Tests that need other files of the
hub (images, other tokenizers) fail for that in both ways.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import runpy
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

TESTS = ["tests/test_grpo_trainer.py", "tests/test_rloo_trainer.py"]
MAX_STEPS = 3
SHAPE = {
    "hidden_size": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 32,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny-Qwen2ForCausalLM-2.5": ("Qwen2ForCausalLM", {}),
    "small-Qwen2ForCausalLM-2.5": ("Qwen2ForCausalLM", {"hidden_size": 64}),
    "tiny-Qwen3ForCausalLM": ("Qwen3ForCausalLM", {"head_dim": 8}),
    "tiny-Qwen3MoeForCausalLM": (
        "Qwen3MoeForCausalLM",
        {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ),
    "tiny-GptOssForCausalLM": ("GptOssForCausalLM", {"head_dim": 8, "num_local_experts": 4}),
    "tiny-Qwen2ForSequenceClassification-2.5": ("Qwen2ForSequenceClassification", {"num_labels": 1}),
    "tiny-Qwen3ForSequenceClassification": ("Qwen3ForSequenceClassification", {"num_labels": 1, "head_dim": 8}),
    "tiny-LlamaForSequenceClassification-3.2": ("LlamaForSequenceClassification", {"num_labels": 1}),
}


# ---- stand-ins for the hub ---------------------------------------------------------------------------------


def make_models(cache: Path) -> None:
    """Writes `MODELS` into a folder that is laid out as huggingface_hub's cache."""
    import transformers
    from trl.chat_template_utils import qwen3_chat_template

    from hf_paged.bench.models import load_smollm2

    tokenizer = load_smollm2()[1]
    tokenizer.chat_template = qwen3_chat_template
    for name, (kind, changes) in MODELS.items():
        architecture = getattr(transformers, kind)
        config = architecture.config_class(
            vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
            **(SHAPE | changes),
        )  # fmt: skip
        repository = cache / f"models--trl-internal-testing--{name}"
        snapshot = repository / "snapshots" / "0"
        architecture(config).save_pretrained(snapshot)
        tokenizer.save_pretrained(snapshot)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("0")


def read_texts(source: Path) -> dict[str, Any]:
    """TRL's test texts by name of their configuration, as DatasetDicts: those that its script would publish."""
    from datasets import DatasetDict

    found: dict[str, Any] = {}
    script = runpy.run_path(str(source / "scripts" / "generate_zen_dataset.py"))
    publish = DatasetDict.push_to_hub
    DatasetDict.push_to_hub = lambda self, repo, config_name: found.update({config_name: self})  # type: ignore[method-assign]
    try:
        script["main"](0.1, True, "nowhere")
    finally:
        DatasetDict.push_to_hub = publish  # type: ignore[method-assign]
    return found


# ---- as a pytest plugin, in the process that runs the tests ------------------------------------------------


def pytest_configure() -> None:
    import datasets
    import trl

    source = Path(os.environ["TRL_SOURCE"])
    _fill_in_helpers(source)
    texts = read_texts(source)
    load = datasets.load_dataset

    def load_dataset(path: str, name: str | None = None, *, split: str | None = None, streaming: bool = False) -> Any:
        if path != "trl-internal-testing/zen":
            return load(path, name, split=split)
        found = texts[str(name)]
        if split is not None:
            return found[split].to_iterable_dataset() if streaming else found[split]
        return found

    datasets.load_dataset = load_dataset
    for kind in ("GRPO", "RLOO"):
        config = getattr(trl, f"{kind}Config")
        config.__dataclass_fields__["max_steps"].default = MAX_STEPS
        config.__init__ = _with_default(config.__init__, max_steps=MAX_STEPS)
        if "TRL_SUITE_STOCK" not in os.environ:
            trainer = getattr(trl, f"{kind}Trainer")
            trainer.__init__ = _attaching(trainer.__init__)


def _fill_in_helpers(source: Path) -> None:
    """Tests of another version than the installed one may ask for checks of optional packages that it does not have."""
    helpers = importlib.import_module("trl.import_utils")
    for name in re.findall(r"^ +(is_\w+_available),$", (source / "tests" / "testing_utils.py").read_text(), re.M):
        if not hasattr(helpers, name):
            setattr(helpers, name, lambda: False)


def _with_default(construct: Any, **defaults: Any) -> Any:
    def construct_with(self: Any, *args: Any, **kwargs: Any) -> None:
        construct(self, *args, **(defaults | kwargs))

    return construct_with


def _attaching(construct: Any) -> Any:
    import functools

    from hf_paged.integrations.trl import attach

    @functools.wraps(construct)
    def construct_and_attach(self: Any, *args: Any, **kwargs: Any) -> None:
        construct(self, *args, **kwargs)
        attach(self, kv_cache_memory_bytes=64 << 20)

    return construct_and_attach


# ---- as a program ------------------------------------------------------------------------------------------


def run(source: Path, stock: bool, out: Path, select: str | None) -> int:
    """Runs the tests in a process of their own, and writes one line per test, by outcome."""
    with tempfile.TemporaryDirectory() as scratch:
        cache, report = Path(scratch) / "hub", Path(scratch) / "report.xml"
        make_models(cache)
        here = Path(__file__).resolve().parent
        environment = os.environ | {
            "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache), "TRL_SOURCE": str(source.resolve()),
            "PYTHONPATH": os.pathsep.join([str(here), *filter(None, [os.environ.get("PYTHONPATH")])]),
        }  # fmt: skip
        if stock:
            environment["TRL_SUITE_STOCK"] = "1"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "trl_suite", "--junit-xml", str(report), *TESTS]
        command += ["-k", select] if select else []
        code = subprocess.run(command, cwd=source, env=environment).returncode
        if not report.exists():
            return code
        outcomes = read_report(report)
    lines = [f"# {len(names)} {outcome}\n" + "\n".join(names) for outcome, names in sorted(outcomes.items())]
    out.write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    print(", ".join(f"{len(names)} {outcome}" for outcome, names in sorted(outcomes.items())), "->", out)
    return code


def read_report(report: Path) -> dict[str, list[str]]:
    """Test names by outcome; a failure is told with the first line of its error."""
    outcomes: dict[str, list[str]] = {}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        name = f"{case.get('classname', '').rpartition('.')[0].rpartition('.')[2]}::{case.get('name')}"
        result = next((part for part in case if part.tag in ("failure", "error", "skipped")), None)
        outcome = "passed" if result is None else {"skipped": "skipped"}.get(result.tag, "failed")
        why = "" if result is None else "    " + (result.get("message") or "").partition("\n")[0][:150]
        outcomes.setdefault(outcome, []).append(name + why)
    return outcomes


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="an unpacked source tree of TRL")
    parser.add_argument("--out", type=Path, default=Path("trl_suite.txt"), help="where to write what passed")
    parser.add_argument("--stock", action="store_true", help="attach nothing")
    parser.add_argument("-k", dest="select", help="as pytest's -k")
    options = parser.parse_args()
    sys.exit(run(options.source, options.stock, options.out, options.select))
