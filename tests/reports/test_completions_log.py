import logging
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import load_dataset

from tests.hub_server import File, HubServer
from trl.reports import completions_log, completions_table
from trl.reports.completions_log import CompletionsLog
from trl.reports.completions_table import render_text

NAN = float("nan")
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")


@pytest.fixture
def warned(monkeypatch):
    """Messages of the log's warnings."""
    messages = []
    monkeypatch.setattr(completions_log.logger, "warning", messages.append)
    return messages


def _log(output_dir, **options):
    return CompletionsLog(output_dir, **{"maxlen": 8, "print_table": False, **options})


def _add(log, texts, prompts=None, **options):
    count = len(texts)
    log.add(prompts or texts, texts, {"r": [1.0] * count}, [0.5] * count, **options)


def _read(output_dir, step):
    return pd.read_parquet(output_dir / "completions" / f"completions_{step:05d}.parquet")


# ---- The file ----


def test_file_of_a_step(tmp_path, warned):
    """One row per completion: step, prompt, completion, the rewards, what was logged besides, the advantage."""
    log = _log(tmp_path)
    rewards = {"accuracy": [1.0, None, torch.tensor(0.0)], "length": [NAN, np.float32(0.5), -2]}
    extra = {"answer": ["four", None, "five"], "tokens": [3, 4, NAN], "parsed": [[4], {"a": "ü"}, "x"]}
    log.add(["2+2?", "2+2?", "2+3?"], ["4", "four", "5"], rewards, torch.tensor([1.0, NAN, -1.0]), extra)
    log.write(7)
    frame = _read(tmp_path, 7)
    assert list(frame) == [
        "step",
        "prompt",
        "completion",
        "accuracy",
        "length",
        "answer",
        "tokens",
        "parsed",
        "advantage",
    ]
    assert frame["step"].tolist() == [7, 7, 7]
    assert frame["prompt"].tolist() == ["2+2?", "2+2?", "2+3?"]
    assert frame["completion"].tolist() == ["4", "four", "5"]
    np.testing.assert_equal(frame["accuracy"].to_numpy(), [1.0, NAN, 0.0])
    np.testing.assert_equal(frame["length"].to_numpy(), [NAN, 0.5, -2.0])
    np.testing.assert_equal(frame["tokens"].to_numpy(), [3.0, 4.0, NAN])
    np.testing.assert_equal(frame["advantage"].to_numpy(), [1.0, NAN, -1.0])
    assert frame["answer"].isna().tolist() == [False, True, False]
    assert frame["parsed"].tolist() == ["[4]", '{"a": "ü"}', "x"]
    assert warned == []


def test_conversations_of_every_shape_share_a_column(tmp_path, warned):
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]}
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    completions = [
        "plain",
        [{"role": "assistant", "content": "a cat"}],
        [{"role": "assistant", "content": "a cat", "reasoning_content": "fur"}],
        [
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "name": "add", "content": "3"},
            {"role": "assistant", "content": None},
        ],
        [],
        "lone \ud800 surrogate",
    ]
    log = _log(tmp_path)
    _add(log, completions, prompts=[[{"role": "system", "content": "hm"}, user]] * 6)
    log.write(1)
    frame = _read(tmp_path, 1)
    assert frame["prompt"].tolist() == ["system\nhm\n\nuser\n<image>what is it?"] * 6
    assert frame["completion"].tolist() == [
        "plain",
        "a cat",
        "<think>fur</think>\na cat",
        "assistant\nadd({'a': 1})\n\ntool\n3\n\nassistant\n",
        "",
        "lone ? surrogate",
    ]
    assert warned == []


def test_all_files_of_a_run_load_together(tmp_path, warned):
    """A column keeps its type, also where a step has none of it, only missing values, or numbers among the texts."""
    log = _log(tmp_path)
    for step, extra in enumerate(
        [{"note": ["x"], "number": [1]}, {"note": [2.5], "number": [None]}, {"note": [None]}, {}, {"number": [2]}], 1
    ):
        log.add(["p"], [f"c{step}"], {"r": [None if step == 1 else 0.5]}, [0.0], extra)
        log.write(step)
    rows = load_dataset(
        "parquet", data_files=f"{tmp_path}/completions/*.parquet", split="train", cache_dir=str(tmp_path / "cache")
    )
    assert rows["completion"] == ["c1", "c2", "c3", "c4", "c5"]
    assert list(_read(tmp_path, 4)) == ["step", "prompt", "completion", "r", "advantage"]
    assert rows["note"] == ["x", "2.5", None, None, None]
    assert rows["number"] == [1.0, None, None, None, 2.0]
    assert rows["r"] == [None, 0.5, 0.5, 0.5, 0.5]
    assert warned == []


def test_columns_of_one_name_are_all_there(tmp_path):
    """A reward function called like a column, and a logged column called like the function."""
    log = _log(tmp_path)
    log.add(["p"], ["c"], {"completion": [0.25]}, [0.0], {"completion": ["logged"], "step": [3]})
    log.write(1)
    frame = _read(tmp_path, 1)
    named = ["step", "prompt", "completion", "completion_2", "completion_3", "step_2", "advantage"]
    assert list(frame) == named
    assert frame.iloc[0].tolist() == [1, "p", "c", 0.25, "logged", 3.0, 0.0]


def test_a_file_is_written_whole(tmp_path, monkeypatch, warned):
    """What fails half-way leaves the file of before, and the run goes on."""
    log = _log(tmp_path)
    _add(log, ["good"])
    log.write(1)

    def half(table, path):
        Path(path).write_bytes(b"PAR1")
        raise OSError("no space left")

    _add(log, ["bad"])
    monkeypatch.setattr(completions_log.pq, "write_table", half)
    log.write(1)
    assert _read(tmp_path, 1)["completion"].tolist() == ["good"]
    (message,) = warned
    assert "Writing the completions failed: OSError: no space left. Training goes on." in message
    monkeypatch.undo()
    log.write(1)
    assert [path.name for path in (tmp_path / "completions").iterdir()] == ["completions_00001.parquet"]
    assert _read(tmp_path, 1)["completion"].tolist() == ["bad"]


# ---- What is held ----


def test_holds_the_last_generation(tmp_path):
    log = _log(tmp_path, maxlen=3)
    log.write(1)
    assert not (tmp_path / "completions").exists()
    _add(log, ["a", "b"])
    _add(log, ["c", "d"])
    log.write(2)
    assert _read(tmp_path, 2)["completion"].tolist() == ["b", "c", "d"]
    log.write(3)  # the same generation trains another step
    assert _read(tmp_path, 3)["completion"].tolist() == ["b", "c", "d"]
    _add(log, ["e"])
    assert len(log) == 1
    log.write(3)
    assert _read(tmp_path, 3)["completion"].tolist() == ["e"]
    _add(log, ["f"])
    log.clear()
    _add(log, ["g"])
    log.write(4)
    assert _read(tmp_path, 4)["completion"].tolist() == ["g"]


def test_lengths_are_checked(tmp_path):
    log = _log(tmp_path)
    with pytest.raises(ValueError, match="`fast` has 1 values for 2 completions"):
        log.add(["p", "q"], ["a", "b"], {"fast": [1.0]}, [0.0, 0.0])
    assert len(log) == 0


# ---- The terminal ----


def test_table_in_the_terminal(tmp_path, capsys):
    log = _log(tmp_path, print_table=True, num_to_print=1)
    answer = [{"role": "assistant", "content": "[bold]4[/bold]"}]
    log.add(["2+2?"] * 3, [answer] * 3, {"accuracy": [None, NAN, None]}, [0.25] * 3, {"gold": ["four"] * 3})
    log.write(12)
    shown = capsys.readouterr().out
    for part in ("Step 12", "2+2?", "assistant", "[bold]4[/bold]", "accuracy", "0.25", "four"):
        assert shown.count(part) == 1, part
    assert "nan" not in shown
    assert len(_read(tmp_path, 12)) == 3


def test_no_table_in_the_terminal(tmp_path, capsys, monkeypatch):
    """Switched off, or without rich; the file is written all the same."""
    for step, available in ((1, True), (2, False)):
        monkeypatch.setattr(completions_log, "is_rich_available", lambda available=available: available)
        log = _log(tmp_path, print_table=not available)
        _add(log, ["x"])
        log.write(step)
        assert capsys.readouterr().out == ""
        assert len(_read(tmp_path, step)) == 1


def test_reading_text():
    assert render_text("  as it is ") == "  as it is "
    assert render_text([{"role": "user", "content": "hi"}]) == "user\nhi"
    assert render_text([{"role": "assistant", "content": [{"type": "text", "text": ""}, "b"]}]) == "b"
    assert completions_table._number(NAN) == "-"


def test_the_terminal_does_not_obey_a_completion(tmp_path, capsys):
    log = _log(tmp_path, print_table=True)
    _add(log, ["a\x1b[2J\x9bb\rc\td"], extra={"said": ["\x1b[2J"]})
    log.write(1)
    shown = capsys.readouterr().out
    assert "a\ufffd[2J\ufffdb\ufffdc" in shown
    assert not set("\x1b\x9b\r") & set(shown)
    assert _read(tmp_path, 1)["completion"].tolist() == ["a\x1b[2J\x9bb\rc\td"]


# ---- The trackers ----


@pytest.fixture
def wandb(monkeypatch):
    """Stands in for wandb with an active run: keeps what is logged."""
    fake = types.ModuleType("wandb")
    fake.run, fake.logged = object(), []
    fake.Table = lambda columns, data: (columns, [list(row) for row in data])
    fake.Image = lambda image: ("wandb image", image)
    fake.log = fake.logged.append
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


@pytest.fixture
def trackio(monkeypatch):
    fake = types.ModuleType("trackio")
    fake.logged, current = [], ["run"]
    fake.context_vars = types.SimpleNamespace(current_run=types.SimpleNamespace(get=lambda: current[0]))
    fake.current = current
    fake.Table = lambda dataframe: dataframe
    fake.Image = lambda image: ("trackio image", image)
    fake.log = fake.logged.append
    monkeypatch.setitem(sys.modules, "trackio", fake)
    return fake


def test_trackers_get_the_table(tmp_path, wandb, trackio, warned):
    log = _log(tmp_path, report_to=["wandb", "trackio"])
    log.add(["p", "p"], ["a", "b"], {"r": [1.0, None]}, [0.5, NAN], {"gold": ["x", None]})
    log.write(3)
    ((columns, data),) = [entry["completions"] for entry in wandb.logged]
    assert columns == ["step", "prompt", "completion", "r", "gold", "advantage"]
    assert data == [[3, "p", "a", 1.0, "x", 0.5], [3, "p", "b", None, None, None]]
    (frame,) = [entry["completions"] for entry in trackio.logged]
    assert list(frame) == columns
    assert frame["completion"].tolist() == ["a", "b"]
    assert warned == []


def test_messages_that_cannot_be_read_end_no_run(tmp_path, warned):
    log = _log(tmp_path, print_table=True)
    _add(log, [[{"content": 3}, "no message"]])
    log.write(1)
    assert [message.split(" failed: ")[0] for message in warned] == [
        "Showing the completions",
        "Making a table of the completions",
    ]
    _add(log, ["good"])
    log.write(2)
    assert len(_read(tmp_path, 2)) == 1


def test_only_trackers_of_the_run_get_it(tmp_path, wandb, trackio):
    log = _log(tmp_path, report_to=["wandb"])
    _add(log, ["a"])
    log.write(1)
    wandb.run = None
    log.write(2)
    assert len(wandb.logged) == 1
    assert trackio.logged == []
    other = _log(tmp_path, report_to="trackio")
    _add(other, ["a"])
    other.write(3)
    trackio.current[0] = None
    other.write(4)
    assert len(trackio.logged) == 1
    assert len(wandb.logged) == 1


def test_unique_prompts_are_for_the_trackers_only(tmp_path, wandb):
    log = _log(tmp_path, report_to=["wandb"], unique_prompts=True)
    turns = [{"role": "user", "content": "hi"}]
    _add(log, ["a", "b", "c", "d"], prompts=[turns, turns, "other", list(turns)])
    log.write(1)
    _, data = wandb.logged[0]["completions"]
    assert [row[1:3] for row in data] == [["user\nhi", "a"], ["other", "c"]]
    assert len(_read(tmp_path, 1)) == 4


def test_images_are_for_the_trackers_only(tmp_path, wandb, trackio, warned):
    """As the tracker's own type, beside the completion they belong to; not in the file; not where switched off."""
    import io

    from PIL import Image

    red, blue = Image.new("RGB", (2, 2), "red"), Image.new("RGB", (2, 2), "blue")
    buffer = io.BytesIO()
    blue.save(buffer, "PNG")
    undecoded = {"bytes": buffer.getvalue(), "path": None}
    images = [[red], None, [undecoded, {"bytes": None, "path": "cat.png"}]]
    for multimodal in (True, False):
        log = _log(tmp_path, report_to=["wandb", "trackio"], multimodal=multimodal, unique_prompts=True)
        _add(log, ["a", "b", "c"], prompts=["p", "q", "r"], images=images)
        log.write(1)
    (columns, data), (columns_without, _) = [entry["completions"] for entry in wandb.logged]
    assert columns == [*columns_without, "image"]
    assert data[0][-1] == [("wandb image", red)]
    assert data[1][-1] is None
    (_, decoded), path = data[2][-1]
    assert decoded.getpixel((0, 0)) == (0, 0, 255)
    assert path == ("wandb image", "cat.png")
    frame, frame_without = [entry["completions"] for entry in trackio.logged]
    assert frame["image"][0] == [("trackio image", red)]
    assert "image" not in frame_without
    assert "image" not in _read(tmp_path, 1)
    assert warned == []


def test_a_tracker_that_fails_does_not_end_the_run(tmp_path, wandb, trackio, warned):
    def fail(entry):
        raise ConnectionError("gone\nfar away")

    wandb.log = fail
    log = _log(tmp_path, report_to=["wandb", "trackio"])
    _add(log, ["a"])
    log.write(1)
    assert warned == ["Sending the completions to wandb failed: ConnectionError: gone. Training goes on."]
    assert len(trackio.logged) == 1


# ---- The Hub ----


def start_worker() -> None:
    from huggingface_hub.utils import _http

    # The client's own backoff sleeps up to 23 s per request.
    _http.time = types.SimpleNamespace(
        sleep=lambda seconds: time.sleep(0.005), monotonic=time.monotonic, time=time.time
    )


class Messages(logging.Handler):
    def __init__(self):
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def write_steps(output_dir: str, steps: list[int], limit_s: float = 30.0, **options) -> dict:
    """Write some steps and close, in the worker; everything that tests look at."""
    messages = Messages()
    for name in ("trl", "huggingface_hub"):
        logging.getLogger(name).addHandler(messages)
    result = {"error": None, "messages": messages.texts, "files": []}
    try:
        log = _log(output_dir, **{"hub_repo": "tester/done", "hub_token": "hf_writer", **options})
        for step in steps:
            _add(log, [f"completion {step}"])
            log.write(step)
        start = time.monotonic()
        log.close(limit_s)
        result["seconds"] = time.monotonic() - start
        result["goes_on"] = log.commit_scheduler is not None
        if log.commit_scheduler is not None:
            log.commit_scheduler.stop()
            log.commit_scheduler = None
    except Exception as error:
        result["error"] = f"{type(error).__name__}: {error}"
    finally:
        for name in ("trl", "huggingface_hub"):
            logging.getLogger(name).removeHandler(messages)
    result["files"] = sorted(path.name for path in Path(output_dir).glob("completions/*"))
    return result


@pytest.fixture(scope="module")
def hub():
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def environment(hub, tmp_path_factory):
    return hub.environment(str(tmp_path_factory.mktemp("hf_home")), OMP_NUM_THREADS="1")


@pytest.fixture(scope="module")
def worker(hub, environment):
    with hub.worker(environment, start_worker) as call:
        yield call


@pytest.fixture
def upload(worker, hub, tmp_path):
    hub.heal()
    hub.repos.clear()
    hub.large_files.clear()
    hub.requests.clear()
    yield lambda *steps, **options: worker(write_steps, str(tmp_path), list(steps), **options)
    hub.heal()


def test_files_reach_the_hub(upload, hub, tmp_path):
    """A private dataset with a card, and every file as it is here."""
    result = upload(1, 2, hub_private=True, trainer_name="GRPO")
    assert result["error"] is None
    assert result["messages"] == []
    assert result["goes_on"]
    repo = hub.repo("tester/done", "datasets")
    assert repo.private
    files = repo.files()
    card = files.pop("README.md").decode()
    assert "# done" in card
    assert "GRPO" in card
    assert set(files) == {".gitattributes", "completions_00001.parquet", "completions_00002.parquet"}
    for name in ("completions_00001.parquet", "completions_00002.parquet"):
        assert files[name] == (tmp_path / "completions" / name).read_bytes()


def test_a_resumed_run_goes_on_with_its_dataset(upload, hub):
    """Public as asked, made once; a card that its owner has written stays."""
    assert upload(1, hub_private=False)["error"] is None
    repo = hub.repo("tester/done", "datasets")
    assert not repo.private
    own = File(b"# my completions", is_large=False)
    repo.commit("main", "my card", {**repo.find("main").files, "README.md": own})
    assert upload(2)["error"] is None
    assert repo.files()["README.md"] == own.content
    assert {"completions_00001.parquet", "completions_00002.parquet"} <= set(repo.files())


def test_no_dataset_no_run(upload, hub):
    """What is wrong with the Hub is said at construction, before anything is trained."""
    result = upload(1, hub_token="hf_reader")
    assert result["error"].startswith(
        "RuntimeError: The dataset 'tester/done' for the logged completions cannot be made"
    )
    assert "403" in result["error"]
    assert "hf auth login" in result["error"]
    assert "leave out `log_completions_hub_repo`" in result["error"]
    assert result["files"] == []


def test_a_hub_that_fails_later_ends_no_run(upload, hub):
    hub.fail("POST /api/datasets/.*/commit/", "status", status=403)
    result = upload(1)
    assert result["error"] is None
    assert result["files"] == ["completions_00001.parquet"]
    text = "\n".join(result["messages"])
    assert "Writing the card of the completions' dataset failed" in text
    assert "The last upload of completions to tester/done failed" in text
    assert "hf upload tester/done" in text
    assert not result["goes_on"]


def test_closing_has_a_time_limit(upload, hub):
    hub.fail("PUT /_lfs/", "hang")
    result = upload(1, limit_s=0.5)
    assert result["error"] is None
    assert 0.4 < result["seconds"] < 5
    assert "failed: no end after 0.5 s" in "\n".join(result["messages"])


def test_a_script_that_ends_without_closing_uploads(upload, hub, environment, tmp_path):
    """Also one that ends with an error."""
    script = f"""
from tests.reports.test_completions_log import _add, _log
log = _log({str(tmp_path)!r}, hub_repo="tester/done", hub_token="hf_writer")
for step in range(1, 4):
    _add(log, [f"completion {{step}}"])
    log.write(step)
raise SystemExit(3)
"""
    done = subprocess.run([sys.executable, "-c", script], env=environment, cwd=ROOT, capture_output=True, timeout=90)
    assert done.returncode == 3, done.stderr.decode()
    files = set(hub.repo("tester/done", "datasets").files())
    assert {f"completions_0000{step}.parquet" for step in (1, 2, 3)} <= files


def test_without_a_repository_nothing_is_uploaded(tmp_path):
    threads = threading.active_count()
    log = _log(tmp_path)
    assert log.commit_scheduler is None
    log.close()
    assert threading.active_count() == threads
