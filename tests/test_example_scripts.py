"""The example scripts that do more than their `trl` command run on a tiny model, and judge as they say."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess

import pytest

from trl.rollouts.transformers_engine import TransformersEngine

from .conftest import build_model, build_tokenizer
from .rollouts.helpers import ScriptedEngine, build_tool_tokenizer, tool_call
from .test_examples import EXAMPLES, as_flags, load_script
from .two_processes import free_port


def message(text: str, role: str = "assistant", **more) -> dict:
    return {"role": role, "content": text, **more}


def run(script, *flags: str) -> None:
    script.main(*script.make_parser().parse_args_and_config(list(flags)))


def quiet_flags(tmp_path, **more) -> list[str]:
    settings = {
        "output_dir": tmp_path / "out",
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "num_generations": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "bf16": "false",
        "use_cpu": "true",
        **more,
    }
    return as_flags(settings)


def logged(capsys) -> dict[str, float]:
    """What the one step of a run logged."""
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("{") and "'loss'" in line]
    return {key: float(value) for key, value in ast.literal_eval(line).items()}


def test_math(tmp_path, monkeypatch, tiny_model_path, capsys):
    example = load_script("scripts/grpo_math.py", monkeypatch)
    row = {"question": "How many?", "answer": "600 + 634 = <<600+634=1234>>1234\n#### 1,234"}
    problem = example.make_problem(row)
    assert problem["solution"] == "$1234$"
    assert [turn["role"] for turn in problem["prompt"]] == ["system", "user"]
    completions = [[message("That is 1234: \\boxed{1234}")], [message("\\boxed{1243}")]]
    assert example.accuracy_reward(completions, solution=[problem["solution"]] * 2) == [1.0, 0.0]

    folder = tmp_path / "data"
    folder.mkdir()
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text((json.dumps(row) + "\n") * 2)
    flags = {"model_name_or_path": tiny_model_path, "dataset_name": folder, "max_completion_length": 4}
    flags |= {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 2}
    run(example, *quiet_flags(tmp_path, **flags))
    printed = capsys.readouterr().out
    assert "'eval_pass@1': '0'" in printed
    assert "'eval_pass@2': '0'" in printed
    assert "'rewards/accuracy_reward/mean'" in printed


@pytest.fixture
def tool_model(tmp_path):
    """A folder with a tiny model whose template knows tools, and its tokenizer."""
    path, tokenizer = str(tmp_path / "model"), build_tool_tokenizer()
    build_model(vocab_size=len(tokenizer), max_position_embeddings=2048).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path, tokenizer


@pytest.fixture
def say(monkeypatch, tool_model):
    """Puts words into the model's mouth: `script[turn][row]`."""

    def say(script):
        engine = ScriptedEngine(tool_model[1], script, with_logps=False)
        monkeypatch.setattr(TransformersEngine, "generate", lambda self, *args: engine.generate(*args))

    return say


def test_tools(tmp_path, monkeypatch, tool_model, say, capsys):
    example = load_script("scripts/grpo_tools.py", monkeypatch)
    (problem,) = example.make_problems(1)
    a, b, c = re.findall(r"\d+", problem["prompt"][0]["content"])
    expression = f"{a} * {b} {'+' if 'plus' in problem['prompt'][0]['content'] else '-'} {c}"
    assert example.calculate(expression) == str(problem["value"])
    monkeypatch.setattr(example, "make_problems", lambda count, seed=0: example.Dataset.from_list([problem]))
    calls = [tool_call("calculate", expression=text) for text in (expression, "__import__('os')")]
    say([calls, [f"It is {problem['value']:,}", "I do not know."]])
    run(example, *quiet_flags(tmp_path, model_name_or_path=tool_model[0], max_completion_length=400))
    step = logged(capsys)
    assert step["reward"] == 0.5
    assert step["tools/call_frequency"] == 1.0
    assert step["tools/failure_frequency"] == 0.5


@pytest.mark.parametrize(
    ("expression", "value"),
    [("(12 + 30) * -7", "-294"), ("4837*912-77", "4411267"), ("--5", "5"), ("1000 - 1", "999")],
)
def test_calculator(monkeypatch, expression, value):
    assert load_script("scripts/grpo_tools.py", monkeypatch).calculate(expression) == value


@pytest.mark.parametrize("expression", ["2 ** 9", "abs(3)", "9" * 40, "x", "'a' * 3", "True + 1", "1 +"])
def test_calculator_runs_nothing_else(monkeypatch, expression):
    with pytest.raises((ValueError, SyntaxError)):
        load_script("scripts/grpo_tools.py", monkeypatch).calculate(expression)


def test_tool_reward_reads_the_last_message(monkeypatch):
    is_right = load_script("scripts/grpo_tools.py", monkeypatch).is_right
    completions = [
        [message("7 it is, or rather 1,234")],
        [message("1234, or 7")],
        [message("", tool_calls=[]), message("1234", role="tool")],
        [message("1234", role="tool"), message("-1234")],
        [message("none")],
    ]
    assert is_right(completions, value=[1234] * 5) == [1.0, 0.0, 0.0, 0.0, 0.0]


def test_environment_can_be_solved(monkeypatch):
    """From the signs alone, in at most two moves; the reward falls with the moves, and errors are told."""
    hunt = load_script("scripts/grpo_environment.py", monkeypatch).TreasureHunt()
    for seed in range(60):
        seen = hunt.reset(seed=seed, prompt=[])
        assert hunt.get_reward() == 0.0
        for sign in seen.split(": ")[1].rstrip(".").split(", "):
            count, way = sign.split(" to the ")
            seen = hunt.move(way, int(count))
        assert "found the treasure" in seen
        assert hunt.get_reward() == 1.0
    hunt.reset(seed=1)
    for _ in range(4):
        hunt.move("north", 6)
    assert hunt.y == 6
    hunt.x, hunt.y = hunt.treasure
    assert hunt.get_reward() == pytest.approx(0.8)
    for wrong in ({"direction": "up", "fields": 1}, {"direction": "north", "fields": 0}):
        with pytest.raises(ValueError, match="is"):
            hunt.move(**wrong)


def test_environment(tmp_path, monkeypatch, tool_model, say, capsys):
    example = load_script("scripts/grpo_environment.py", monkeypatch)
    (row,) = example.make_hunts(1, first_seed=1)
    monkeypatch.setattr(example, "make_hunts", lambda count, first_seed=0: example.Dataset.from_list([row]))
    hunt = example.TreasureHunt()
    signs = hunt.reset(**row).split(": ")[1].rstrip(".").split(", ")
    assert len(signs) == 2
    steps = [sign.split(" to the ") for sign in signs]
    moves = [tool_call("move", direction=way, fields=int(count)) for count, way in steps]
    say([[moves[0], moves[0]], [moves[1], "I give up."], ["Found it.", ""]])
    with pytest.warns(UserWarning, match="environment_factory"):
        run(example, *quiet_flags(tmp_path, model_name_or_path=tool_model[0], max_completion_length=900))
    step = logged(capsys)
    assert step["rewards/TreasureHunt/mean"] == step["reward"] == 0.5
    assert step["tools/failure_frequency"] == 0.0


# ---- vLLM ----


@pytest.fixture(scope="module")
def vllm_model(tmp_path_factory):
    """A folder with a tiny model that vLLM's CPU kernels take, and a small tokenizer with a chat template."""
    path, tokenizer = str(tmp_path_factory.mktemp("vllm") / "model"), build_tokenizer()
    model = build_model(hidden_size=64, num_attention_heads=2, num_key_value_heads=1)
    model.config.architectures = [type(model).__name__]
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_vllm_in_the_training_process(tmp_path, monkeypatch, vllm_model, capsys):
    pytest.importorskip("vllm")
    example = load_script("scripts/grpo_vllm_colocate.py", monkeypatch)
    sums = example.make_sums()
    assert len(set(sums["prompt"])) == 144
    assert example.right_sum([" 13. 12", "2 or 13", "?"], [13, 13, 13]) == [1.0, 0.0, 0.0]
    flags = {"model_name_or_path": vllm_model, "vllm_max_model_length": 256, "vllm_verify": "full"}
    run(example, *quiet_flags(tmp_path, **flags, eval_strategy="no", eval_on_start="false"))
    printed = capsys.readouterr().out
    assert "Held-out sums that were right: not asked" in printed
    assert float(re.search(r"log-prob: (\S+) nats", printed)[1]) < 1e-4


def test_vllm_server(tmp_path, monkeypatch, vllm_model, capsys):
    """The script's own part: it asks a server, whose place the address of nobody takes here."""
    example = load_script("scripts/grpo_vllm_server.py", monkeypatch)
    row = {"question": "How many?", "answer": "#### 5"}
    (tmp_path / "questions.jsonl").write_text((json.dumps(row) + "\n") * 2)
    flags = {"model_name_or_path": vllm_model, "dataset_name": tmp_path / "questions.jsonl"}
    flags |= {"vllm_server_port": free_port(), "vllm_server_timeout": 1}
    with pytest.raises(
        ConnectionError, match=f"No vLLM server was ready at http://127.0.0.1:{flags['vllm_server_port']}"
    ):
        run(example, *quiet_flags(tmp_path, **flags))


# ---- Slurm ----

STAND_INS = {
    "scontrol": 'printf "node1\\nnode2\\nnode3\\n"',
    "curl": 'echo "curl $*" >> "$CALLS"; [ -e "$CALLS.up" ] && [ -z "$SERVER_ENDS" ] || { touch "$CALLS.up"; exit 22; }',
    "sleep": "exec /bin/sleep 0.05",
    "accelerate": 'echo "accelerate $VLLM_API_KEY $*" >> "$CALLS"; exit ${TRAINING_ENDS:-0}',
    "trl": 'echo "trl $VLLM_API_KEY $*" >> "$CALLS"; trap "echo stopped >> $CALLS; exit 0" TERM; '
    "${SERVER_ENDS:-:}; while :; do /bin/sleep 0.05; done",
    # Runs what comes after the options, on as many nodes as it says.
    "srun": 'echo "srun $*" >> "$CALLS"; while [[ $1 == --* ]]; do '
    '[[ $1 == --ntasks=* ]] && n=${1#*=}; shift; done; [[ $1 == trl ]] && exec "$@"; '
    'for ((i = 0; i < n; i++)); do SLURM_PROCID=$i "$@" || exit $?; done',
}


@pytest.fixture
def slurm(tmp_path):
    """Runs the job with stand-ins for Slurm and for the programs it starts: what was called, and how it ended."""
    for name, body in STAND_INS.items():
        file = tmp_path / name
        file.write_text(f"#!/bin/bash\n{body}\n")
        file.chmod(0o755)

    def run_job(**variables):
        environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls")}
        environment |= {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-3]", **variables}
        job = EXAMPLES / "slurm" / "grpo_vllm_server.slurm"
        done = subprocess.run(["bash", job], env=environment, capture_output=True, text=True, timeout=60)
        return (tmp_path / "calls").read_text().splitlines(), done

    return run_job


def test_slurm_job(slurm, monkeypatch):
    """The last node serves with a key, the others train with the same one once it is healthy, and it is stopped."""
    calls, done = slurm()
    assert done.returncode == 0, done.stderr
    serve = next(call for call in calls if call.startswith("trl "))
    trainings = [call for call in calls if call.startswith("accelerate ")]
    (key,) = {call.split()[1] for call in [serve, *trainings]}
    assert len(key) > 30
    assert not any(key in call for call in calls if call.startswith("srun"))
    assert any("--nodelist=node3 " in call and "vllm-serve" in call for call in calls)
    assert any("--nodelist=node1,node2 " in call for call in calls)
    assert sum("http://node3:8000/health" in call for call in calls) == 2
    assert calls.index(trainings[0]) > max(index for index, call in enumerate(calls) if call.startswith("curl"))
    for rank, training in enumerate(trainings):
        assert f"--num_machines 2 --num_processes 16 --machine_rank {rank} --main_process_ip node1" in training
        assert "--vllm_server_base_url http://node3:8000" in training
    assert calls[-1] == "stopped"

    parser = load_script("scripts/grpo_vllm_server.py", monkeypatch).make_parser()
    training_args = parser.parse_args_and_config([*trainings[0].partition(".py ")[2].split(), "--bf16", "false"])[1]
    assert (training_args.vllm_mode, training_args.max_completion_length) == ("server", 2048)


def test_slurm_job_stops_its_server_when_training_fails(slurm):
    calls, done = slurm(TRAINING_ENDS="3")
    assert done.returncode == 3
    assert calls[-1] == "stopped"


def test_slurm_job_tells_that_the_server_ended(slurm):
    calls, done = slurm(SERVER_ENDS="exit 1")
    assert done.returncode == 1
    assert "The server ended before it was up" in done.stderr
    assert not any(call.startswith("accelerate") for call in calls)
