"""
What README and docs show, works: their code blocks are run, their commands are checked, the site builds.

Models and datasets of the Hub that the pages name are tiny stand-ins on a Hub of ours over loopback. The Python blocks of
a page run one after another, like a notebook. A block that cannot run says why: `<!-- not run: reason -->` before it.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from datasets import Dataset

import trl
from tests.hub_server import HubServer
from tests.rollouts.helpers import build_tool_tokenizer

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / name for name in ("README.md", "MIGRATION.md", "CONTRIBUTING.md")]
PAGES += sorted(path for path in (ROOT / "docs").rglob("*.md"))

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
TOOL_MODEL = "Qwen/Qwen3-0.6B"
METHODS = ("sft", "dpo", "reward", "kto", "grpo", "rloo")
BLOCK = re.compile(
    r"(?:^<!-- not run: *(?P<reason>.*?) *-->\n)?^```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    language: str
    code: str
    reason: str | None  # why it is not run
    line: int


def blocks(page: Path, language: str | None = None) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = [
        Block(m["language"], m["code"], m["reason"], text[: m.start("code")].count("\n") + 1)
        for m in BLOCK.finditer(text)
    ]
    return [block for block in found if language in (None, block.language)]


def pages_with(language: str) -> list:
    chosen = [page for page in PAGES if any(block.reason is None for block in blocks(page, language))]
    return [pytest.param(page, id=str(page.relative_to(ROOT))) for page in chosen]


# ---- In the worker process ----


def run_blocks(folder: str, page: str, code: list[tuple[str, int]]) -> str | None:
    """Run Python blocks in one namespace; a traceback's text if one fails."""
    import traceback

    os.chdir(folder)
    namespace: dict = {"__name__": "__main__"}
    for text, line in code:
        try:
            exec(compile("\n" * line + text, page, "exec"), namespace)
        except BaseException:
            return traceback.format_exc()
    return None


def parse_training(folder: str, args: list[str]) -> str:
    """Parse a `trl <method>` command as the command does, launch options included; the model's name."""
    import importlib

    from trl.scripts.launch_options import split_launch_args

    os.chdir(folder)
    method, *args = args
    parser = importlib.import_module(f"trl.scripts.{method}").make_parser()
    script_args = split_launch_args(args, parser)[1]
    *_, model_args, _ = parser.parse_args_and_config(script_args)
    return model_args.model_name_or_path


def parse_serving(args: list[str]) -> str:
    """Parse a `trl vllm-serve` command, and make vLLM's own of it; the model's name."""
    from trl.scripts.vllm_serve import build_command, read_arguments

    script_args, rest = read_arguments(args)
    assert script_args.model in build_command(script_args, rest)
    return script_args.model


def run_trl(folder: str, args: list[str]) -> tuple[int, str]:
    """Run the `trl` command in this process; exit code and output."""
    from trl.cli import main

    os.chdir(folder)
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            code = main(args)
        except SystemExit as exit_:
            code = exit_.code
    return code or 0, output.getvalue()


# ---- The stand-ins ----


def conversations() -> list[dict]:
    def turn(i: int) -> list[dict]:
        question = {"role": "user", "content": f"what is {i} plus 30?"}
        return [question, {"role": "assistant", "content": f"the answer is {i + 30}."}]

    return [{"messages": turn(i) + turn(i + 1)} for i in range(16)]


def pairs() -> list[dict]:
    def whole(i: int, answer: str) -> list[dict]:
        return [
            {"role": "user", "content": f"what is {i} plus 30?"},
            {"role": "assistant", "content": answer},
        ]

    return [
        {"chosen": whole(i, f"the answer is {i + 30}."), "rejected": whole(i, "how are you today?")} for i in range(16)
    ]


def rated_answers() -> list[dict]:
    return [
        {"prompt": pair[side][:1], "completion": pair[side][1:], "label": side == "chosen"}
        for i, pair in enumerate(pairs())
        for side in ("chosen", "rejected")[:: 1 if i % 2 else -1]
    ]


def problems() -> list[dict]:
    return [
        {"prompt": [{"role": "user", "content": f"what is {i} plus 30?"}], "solution": f"${i + 30}$"}
        for i in range(16)
    ]


def jsonl(rows: list[dict]) -> bytes:
    return "\n".join(json.dumps(row) for row in rows).encode()


DATASETS = {
    "trl-lib/Capybara": conversations,
    "trl-lib/ultrafeedback_binarized": pairs,
    "trl-lib/kto-mix-14k": rated_answers,
    "trl-lib/DeepMath-103K": problems,
}


def model_files(folder: str | Path) -> dict[str, bytes]:
    """A model whose samples are short: so many tokens end one that a random model soon draws one of them."""
    files = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    config = json.loads(files["generation_config.json"])
    config["eos_token_id"] = [config["eos_token_id"], *range(64, 128)]
    return {**files, "generation_config.json": json.dumps(config).encode()}


@pytest.fixture(scope="module")
def hub(tiny_model_path, tmp_path_factory):
    with_tools = tmp_path_factory.mktemp("with-tools")
    shutil.copytree(tiny_model_path, with_tools, dirs_exist_ok=True)
    build_tool_tokenizer().save_pretrained(with_tools)
    with HubServer() as server:
        server.add_repo(MODEL, model_files(tiny_model_path))
        server.add_repo(TOOL_MODEL, model_files(with_tools))
        for name, rows in DATASETS.items():
            server.add_repo(name, {"train.jsonl": jsonl(rows())}, kind="datasets")
        sums = [{"question": f"What is {i} plus {i}?", "answer": f"{i} + {i} = {2 * i}"} for i in range(8)]
        card = b"---\nconfigs:\n- config_name: main\n  data_files: main/train.jsonl\n---\n"
        server.add_repo("openai/gsm8k", {"README.md": card, "main/train.jsonl": jsonl(sums)}, kind="datasets")
        yield server


@pytest.fixture(scope="module")
def worker(hub, tmp_path_factory):
    environment = hub.environment(str(tmp_path_factory.mktemp("hf_home")), HF_TOKEN="hf_writer", WANDB_MODE="disabled")
    with hub.worker(environment) as call:
        yield call


@pytest.fixture
def folder(tmp_path, request):
    """A folder with the files that the page shows: a YAML block whose first line is its name."""
    page = request.node.callspec.params["page"]
    for block in blocks(page, "yaml"):
        name = re.match(r"# (\S+\.yaml)\n", block.code)
        if name:
            (tmp_path / name[1]).write_text(block.code)
    if not (tmp_path / "sft.yaml").exists():
        named = [
            block.code for block in blocks(ROOT / "docs" / "cli.md", "yaml") if block.code.startswith("# sft.yaml")
        ]
        (tmp_path / "sft.yaml").write_text(named[0])
    (tmp_path / "more.jsonl").write_bytes(jsonl(conversations()))
    return tmp_path


# ---- Tests ----


def test_every_block_is_accounted_for():
    """A block has a language that the tests below run or check, and one that is left out says why."""
    for page in PAGES:
        for block in blocks(page):
            where = f"{page.relative_to(ROOT)}:{block.line}"
            assert block.language in ("python", "bash", "yaml", ""), where
            assert block.reason is None or len(block.reason) > 10, f"{where}: a block that is not run says why"
        assert page.read_text(encoding="utf-8").count("```") == 2 * len(blocks(page)), page


@pytest.mark.parametrize("page", pages_with("python"))
def test_python_blocks_run(page, folder, worker):
    code = [(block.code, block.line) for block in blocks(page, "python") if block.reason is None]
    failure = worker(run_blocks, str(folder), str(page), code)
    assert failure is None, failure


def commands(page: Path) -> list[list[str]]:
    lines = "\n".join(block.code for block in blocks(page, "bash") if block.reason is None)
    return [shlex.split(line) for line in lines.replace("\\\n", " ").splitlines() if line.strip()]


@pytest.mark.parametrize("page", pages_with("bash"))
def test_commands_are_right(page, folder, worker):
    """`trl` commands parse with the real parser (previews and `env` run), make targets and extras exist."""
    for command in commands(page):
        program, *args = command
        if program == "make":
            assert re.search(rf"^{args[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), command
        elif program == "pip":
            check_extras(args[-1])
        elif program == "trl" and args[0] in METHODS:
            assert worker(parse_training, str(folder), args) == MODEL, command
        elif program == "trl" and args[0] == "vllm-serve":
            assert worker(parse_serving, args[1:]) == MODEL, command
        elif program == "trl" and args[0] in ("preview", "env"):
            code, output = worker(run_trl, str(folder), args)
            assert code == 0, output
        else:
            pytest.fail(f"{page.name} shows a command that this test does not know: {shlex.join(command)}")


@pytest.mark.parametrize("page", pages_with("yaml"))
def test_config_files_parse(page, folder, worker):
    """Config files that a page shows are accepted by the method they are named after, else by `trl sft`."""
    for block in blocks(page, "yaml"):
        name = re.match(r"# (\S+\.yaml)\n", block.code)
        assert name, f"{page.name}:{block.line}: the first line of a config file is its name, `# name.yaml`"
        method = name[1].split(".")[0]
        method = method if method in METHODS else "sft"
        assert worker(parse_training, str(folder), [method, "--config", name[1]]) == MODEL


def check_extras(requirement: str) -> None:
    text = (ROOT / "pyproject.toml").read_text()
    section = text.split("[project.optional-dependencies]")[1].split("\n[")[0]
    known = set(re.findall(r"^([\w-]+) =", section, re.MULTILINE))
    match = re.fullmatch(r"\.(?:\[(.+)\])?", requirement)
    assert match, requirement
    assert set((match[1] or "").split(",")) - {""} <= known


def explained(page: str) -> set[str]:
    """What a page's text names as code: `name`, or `name=value`."""
    text = BLOCK.sub("", (ROOT / "docs" / page).read_text(encoding="utf-8"))
    return {name.split("=")[0] for name in re.findall(r"`([^`\n]+)`", text)}


@pytest.mark.parametrize("method", ["GRPO", "RLOO"])
def test_every_option_of_online_training_is_explained(method):
    """Each field that only methods have which sample is in the text of their page, not only in the table at its end."""
    declared = {
        name
        for base in getattr(trl, f"{method}Config").__mro__
        if base.__module__ in ("trl.trainer.online_config", f"trl.trainer.{method.lower()}_config")
        for name in vars(base).get("__annotations__", {})
        if not name.startswith("_")
    }
    assert len(declared) > 40
    pages = explained("grpo.md") | explained("vllm.md")
    pages |= explained("rloo.md") if method == "RLOO" else set()
    assert declared - pages - {"remove_unused_columns"} == set()


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("GRPO", {"beta": 0.1, "entropy_coef": 0.01}),
        ("GRPO", {"loss_type": "cispo", "epsilon_high": 5.0}),
        ("GRPO", {"loss_type": "vespo"}),
        ("RLOO", {}),
    ],
)
def test_every_logged_metric_is_explained(tmp_path, tiny_model, tokenizer, method, settings):
    def brief(completions, log_metric, **kwargs):
        log_metric("longest", max(map(len, completions)))
        return [-float(len(text)) for text in completions]

    args = getattr(trl, f"{method}Config")(
        str(tmp_path), use_cpu=True, bf16=False, report_to=[], save_strategy="no", disable_tqdm=True, logging_steps=1,
        max_steps=1, per_device_train_batch_size=4, num_generations=2, max_completion_length=4, **settings,
    )  # fmt: skip
    prompts = Dataset.from_list([{"prompt": "the sky is"}] * 2)
    trainer = getattr(trl, f"{method}Trainer")(tiny_model, brief, args, prompts, processing_class=tokenizer)
    trainer.train()
    logged = {key.replace("/brief/", "/{name}/") for key in trainer.state.log_history[0]}
    assert {"reward", "rewards/{name}/mean", "longest"} <= logged
    assert logged - explained("logged_metrics.md") == {"longest", "step"}  # by its own name, and of the log itself


def test_the_readme_command_trains(tmp_path, hub, worker):
    """The README's `trl sft` line, run as it stands, leaves a model that loads."""
    command = next(args for args in commands(ROOT / "README.md") if args[:2] == ["trl", "sft"])
    environment = hub.environment(str(tmp_path / "hf_home"), WANDB_MODE="disabled")
    done = subprocess.run(
        [sys.executable, "-m", "trl.cli", *command[1:]],
        env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "capybara" / "model.safetensors").is_file()


def test_a_failing_block_is_noticed(tmp_path, worker):
    """The check itself: an error comes with the page and the line."""
    failure = worker(run_blocks, str(tmp_path), "page.md", [("x = 1\n", 3), ("assert x == 2\n", 7)])
    assert 'File "page.md", line 8' in failure
    with pytest.raises(AssertionError):
        check_extras(".[no-such-extra]")


@pytest.mark.parametrize("page", [page for page in PAGES if page.parent == ROOT], ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    """Links between files of the repository; the site's own are checked when it is built."""
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (ROOT / target).exists(), f"{page.name}: {target}"


def test_the_site_builds(tmp_path):
    """The site builds strictly (no broken link, every documented name found) and loads nothing from elsewhere."""
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")],
        env=environment, cwd=ROOT, capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for html in (tmp_path / "site").rglob("*.html"):
        text = html.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img)[^>]+src=\"(https?:[^\"]+)", text)
        loaded += re.findall(r"<link[^>]+rel=\"(?:stylesheet|preconnect)\"[^>]+href=\"(https?:[^\"]+)", text)
        assert not loaded, f"{html.name}: {loaded}"
    config = (tmp_path / "site" / "api" / "sft" / "index.html").read_text(encoding="utf-8")
    assert "packing_strategy" in config
