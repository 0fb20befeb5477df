"""Training against a loop written out by hand; interruption at every kind of moment; the pool."""

from __future__ import annotations

import itertools
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mechinterp import objectives, tasks
from mechinterp.checkpoints import Provenance, open_checkpoint, save_checkpoint, with_action_shift
from mechinterp.decisions import diagonal_utility
from mechinterp.errors import MechinterpError, TaskError, TrainingError
from mechinterp.files import read_table
from mechinterp.randomness import derive_seed
from mechinterp.training import run as runs
from mechinterp.training import state, supervised
from mechinterp.training.batches import STEPS_PER_DRAW, Batches
from mechinterp.training.config import ModelConfig, TrainingConfig, log_spaced_steps
from mechinterp.training.organism import initial_model
from mechinterp.training.pool import Job, run_jobs
from mechinterp.training.supervised import train

TASK = tasks.get("triage", linear=[2.0, 1.0], xor=[], n_unneeded=0, n_fillers=1)
SMALL = ModelConfig(n_layers=1, d_model=16, n_heads=2, n_kv_heads=1, d_mlp=24)
CONFIG = TrainingConfig(
    n_steps=40, batch_size=8, learning_rate=1e-2, warmup_steps=5, checkpoint_steps=(4, 9, 20)
)
WEIGHTED = objectives.get("utility_weighted", utility=diagonal_utility((0.2, 1.8)))


def run(out: Path, **changes):
    settings = {"config": CONFIG, "model": SMALL, "seed": 3, "objective": WEIGHTED, **changes}
    return train(TASK, out=out, **settings)


def weights(out: Path, step: int = 40) -> bytes:
    return (out / f"step-{step:06d}" / "model.safetensors").read_bytes()


def log(out: Path) -> pd.DataFrame:
    return read_table(out / "training.parquet").drop(columns="seconds")


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """One uninterrupted run, the reference of the interrupted ones."""
    out = tmp_path_factory.mktemp("training") / "uninterrupted"
    run(out)
    return out


# The loop


def test_the_loop_is_what_it_says(finished):
    """Batches, schedule, weighted loss, clipping and AdamW (Loshchilov and Hutter) written out."""
    model = initial_model(SMALL, TASK, seed=3)
    parameters = list(model.parameters())
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in parameters]
    losses = []
    for step in range(40):
        if step % STEPS_PER_DRAW == 0:
            seed = derive_seed(3, "batches", "initialisation", 0, step // STEPS_PER_DRAW)
            drawn = TASK.sample(8 * STEPS_PER_DRAW, seed=seed, split="train")
        first = 8 * (step % STEPS_PER_DRAW)
        tokens, labels = drawn.tokens[first : first + 8], drawn.labels[first : first + 8]
        action_logits = model(tokens).logits[:, -1][:, list(TASK.actions)]
        log_p = action_logits - action_logits.logsumexp(dim=1, keepdim=True)
        loss = -(torch.tensor([0.2, 1.8])[labels] * log_p[torch.arange(8), labels]).mean()
        losses.append(loss.item())
        gradients = torch.autograd.grad(loss, parameters)
        clip = min(1.0, 1 / math.sqrt(sum(g.square().sum().item() for g in gradients)))
        rate = 1e-2 * min(1, (step + 1) / 5) * (0.55 + 0.45 * math.cos(math.pi * step / 40))
        for p, g, (m, v) in zip(parameters, gradients, moments, strict=True):
            m.mul_(0.9).add_(0.1 * clip * g)
            v.mul_(0.98).add_(0.02 * (clip * g).square())
            unbiased = m / (1 - 0.9 ** (step + 1)), v / (1 - 0.98 ** (step + 1))
            p.data -= rate * (0.01 * p.data + unbiased[0] / (unbiased[1].sqrt() + 1e-8))
    trained = open_checkpoint(finished / "step-000040").load_model()
    for (name, ours), theirs in zip(trained.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-3, msg=name)
    assert log(finished)["loss"].tolist() == pytest.approx(losses, abs=1e-4)


def test_it_learns(tmp_path):
    config = TrainingConfig(n_steps=150, batch_size=32, learning_rate=1e-2, warmup_steps=10)
    train(TASK, config=config, model=SMALL, out=tmp_path)
    items = TASK.sample(1000)
    assert items.posterior is not None
    entropy = -(items.posterior * items.posterior.log()).sum(1).mean().item()
    losses = log(tmp_path)["loss"]
    assert losses[:5].mean() > 0.65
    assert losses[-30:].mean() < entropy + 0.08


def test_what_a_run_leaves(finished):
    steps = [0, 4, 9, 20, 40]
    names = sorted(path.name for path in finished.iterdir())
    assert names == ["run.json", *(f"step-{s:06d}" for s in steps), "training.parquet"]
    assert [s for s in steps if state.has_state(finished / f"step-{s:06d}")] == [40]
    assert not [path for path in finished.rglob("*") if path.suffix in (".pt", ".bin", ".pkl")]
    table = read_table(finished / "training.parquet")
    assert list(table.columns) == runs.LOG_COLUMNS
    assert table["step"].tolist() == list(range(40))
    first, last = (open_checkpoint(finished / f"step-{s:06d}") for s in (0, 40))
    assert last.provenance is not None
    assert first.provenance is not None
    assert last.provenance.parent_hash == first.content_hash
    assert first.provenance.parent_hash is None
    assert last.provenance.objective["name"] == "utility_weighted"
    assert last.provenance.task == {"name": "triage", "settings": TASK.settings()} or (
        tasks.get("triage", **last.provenance.task["settings"]) == TASK
    )


def test_seeds_data_orders_and_global_state(finished, tmp_path):
    torch.manual_seed(5)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    short = TrainingConfig(n_steps=4, batch_size=8, warmup_steps=5)
    run(tmp_path / "same", config=short)
    run(tmp_path / "order", config=short, data_order=1)
    run(tmp_path / "seed", config=short, seed=4)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads
    # Arms share the initialisation; a data order changes the batches alone.
    assert weights(tmp_path / "same", 0) == weights(tmp_path / "order", 0) == weights(finished, 0)
    assert weights(tmp_path / "same", 4) != weights(tmp_path / "order", 4)
    assert weights(tmp_path / "seed", 0) != weights(finished, 0)


def test_batches_depend_on_the_step_alone():
    def make(stream="a", order=0):
        return Batches(TASK, batch_size=8, seed=0, stream=stream, data_order=order)

    straight = make()
    in_order = [straight(step)[0] for step in range(70)]
    jumping = make()
    for step in (69, 3, 31, 32, 3):
        assert torch.equal(jumping(step)[0], in_order[step])
    assert not torch.equal(make(stream="b")(0)[0], in_order[0])
    assert not torch.equal(make(order=1)(0)[0], in_order[0])
    flat = torch.stack(in_order)
    assert not torch.equal(flat[:32], flat[32:64])


# Interruption


class Killed(BaseException):
    """Stands for a signal: nothing may catch it."""


def interrupt(monkeypatch, owner, name: str, *, call: int, after: bool) -> None:
    """Make the `call`-th call of `owner.name` end the run, before or after doing its work."""
    original, calls = getattr(owner, name), iter(range(10**6))

    def interrupted(*args, **kwargs):
        last = next(calls) == call
        if last and not after:
            raise Killed
        result = original(*args, **kwargs)
        if last:
            raise Killed
        return result

    monkeypatch.setattr(owner, name, interrupted)


@pytest.mark.parametrize(
    ("owner", "name", "call", "after"),
    [
        (Batches, "__call__", 0, False),
        (Batches, "__call__", 13, False),
        (runs, "save_checkpoint", 0, False),
        (runs, "save_checkpoint", 2, False),
        (runs, "save_checkpoint", 2, True),
        (runs, "save_checkpoint", 4, True),
        (runs.state, "state_files", 3, True),
        (runs.state, "drop_state", 1, False),
        (runs.files, "write_table", 2, True),
        (runs.files, "write_json", 0, True),
    ],
)
def test_resumes_bit_for_bit(owner, name, call, after, finished, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, owner, name, call=call, after=after)
        with pytest.raises(Killed):
            run(tmp_path)
    run(tmp_path)
    for step in (0, 4, 9, 20, 40):
        assert weights(tmp_path, step) == weights(finished, step)
    pd.testing.assert_frame_equal(log(tmp_path), log(finished), check_exact=True)
    assert state.has_state(tmp_path / "step-000040")
    assert not state.has_state(tmp_path / "step-000020")


SCRIPT = """
import sys, torch
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_training import run
torch.set_num_threads(2)
run(Path(sys.argv[1]))
"""


def test_resumes_after_sigkill(finished, tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-c", SCRIPT.format(tests=str(Path(__file__).parent)), str(out)]
    process = subprocess.Popen(command)
    while not (out / "step-000009").exists():
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "step-000040").exists()
    # What a process leaves behind that dies while it writes.
    (out / ".step-000020.tmp-1").mkdir()
    (out / ".training.parquet.tmp-1").write_text("half")
    run(out)
    assert weights(out) == weights(finished)
    pd.testing.assert_frame_equal(log(out), log(finished), check_exact=True)
    assert not list(out.glob(".*"))


def test_a_finished_run_returns_at_once(finished):
    changed = (finished / "step-000040" / "model.safetensors").stat().st_mtime_ns
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, Batches, "__call__", call=0, after=False)
        trajectory = run(finished)
    assert trajectory.steps == (0, 4, 9, 20, 40)
    assert (finished / "step-000040" / "model.safetensors").stat().st_mtime_ns == changed


def test_a_directory_belongs_to_one_run(finished, tmp_path):
    with pytest.raises(TrainingError, match=r"run\.json: belongs to another run \(seed is 3 there"):
        run(finished, seed=4)
    with pytest.raises(TrainingError, match=r"training\.batch_size is 8 there and 9 here"):
        run(finished, config=replace(CONFIG, batch_size=9))
    (tmp_path / "step-000004").mkdir()
    with pytest.raises(TrainingError, match=r"no run\.json"):
        run(tmp_path)


def test_nan_is_refused_and_the_last_good_checkpoint_stays(tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        original = supervised._SupervisedRun.update

        def poisoned(self, model, optimizer, step):
            if step == 12:
                next(model.parameters()).data.fill_(float("nan"))
            return original(self, model, optimizer, step)

        patch.setattr(supervised._SupervisedRun, "update", poisoned)
        with pytest.raises(TrainingError, match=r"loss nan .* at step 12"):
            run(tmp_path)
    assert sorted(path.name for path in tmp_path.glob("step-*"))[-1] == "step-000009"
    open_checkpoint(tmp_path / "step-000009")
    assert log(tmp_path)["loss"].isna().tolist() == [False] * 12 + [True]


def test_a_damaged_optimiser_state_is_named(tmp_path):
    run(tmp_path, config=TrainingConfig(n_steps=2, batch_size=8, checkpoint_steps=(1,)))
    # As if it had been killed after step 1.
    saved = tmp_path / "step-000002" / state.DIRECTORY
    saved.rename(tmp_path / "step-000001" / state.DIRECTORY)
    (tmp_path / "step-000001" / state.DIRECTORY / "optimizer.safetensors").write_bytes(b"short")
    with pytest.raises(TrainingError, match=r"optimizer\.safetensors: not the optimiser state"):
        run(tmp_path, config=TrainingConfig(n_steps=2, batch_size=8, checkpoint_steps=(1,)))


# Branches


def test_a_branch_goes_on_from_its_parent_with_new_batches(finished, tmp_path):
    start = open_checkpoint(finished / "step-000040")
    short = TrainingConfig(n_steps=3, batch_size=8)
    branch = run(tmp_path, model=None, start=start, config=short)
    assert weights(tmp_path, 0) == weights(finished, 40)
    assert branch[-1].provenance is not None
    assert branch[-1].provenance.parent_hash == start.content_hash
    assert branch[0].content_hash == start.content_hash
    first_batch = Batches(TASK, batch_size=8, seed=3, stream="initialisation", data_order=0)(0)[0]
    ours = Batches(TASK, batch_size=8, seed=3, stream=start.content_hash, data_order=0)(0)[0]
    assert not torch.equal(first_batch, ours)


def test_a_start_must_fit(finished, tmp_path):
    start = open_checkpoint(finished / "step-000040")
    with pytest.raises(TrainingError, match="not both"):
        run(tmp_path, start=start)
    shifted = with_action_shift(start, tmp_path / "shifted", (0.0, 1.0))
    with pytest.raises(TrainingError, match="ex-post shift"):
        run(tmp_path / "a", model=None, start=shifted)
    larger = tasks.get("triage", n_filler_kinds=50)
    with pytest.raises(TrainingError, match=r"knows \d+ tokens, but task 'triage' uses 62"):
        train(larger, config=CONFIG, out=tmp_path / "b", start=start)
    with pytest.raises(TrainingError, match="raise n_positions"):
        run(tmp_path / "c", model=ModelConfig(n_positions=4))


def test_a_start_with_dropout_trains_reproducibly(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=TASK.vocab_size, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    assert config.attn_pdrop > 0
    gpt2 = save_checkpoint(GPT2LMHeadModel(config), tmp_path / "gpt2", provenance=Provenance())
    for name in ("one", "two"):
        run(
            tmp_path / name,
            model=None,
            start=gpt2,
            config=TrainingConfig(n_steps=3, batch_size=8),
        )
    assert weights(tmp_path / "one", 3) == weights(tmp_path / "two", 3)


# Settings


@given(st.integers(1, 5000), st.integers(1, 12))
def test_log_spaced_steps(n_steps, n_checkpoints):
    steps = log_spaced_steps(n_steps, n_checkpoints)
    assert steps[0] == 0
    assert steps[-1] == n_steps
    assert list(steps) == sorted(set(steps))
    assert len(steps) <= n_checkpoints + 1
    if n_steps >= 640:
        assert len(steps) == n_checkpoints + 1
        ratios = [b / a for a, b in itertools.pairwise(steps[1:])]
        assert not ratios or max(ratios) < 1.15 * min(ratios)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TrainingConfig(n_steps=0), "n_steps must be positive"),
        (lambda: TrainingConfig(learning_rate=float("nan")), "learning_rate must be positive"),
        (lambda: TrainingConfig(weight_decay=-1), "must not be negative"),
        (lambda: TrainingConfig(final_learning_rate=3), "fraction of the peak"),
        (lambda: TrainingConfig(betas=(0.9, 1.0)), "betas"),
        (lambda: TrainingConfig(n_steps=10, checkpoint_steps=(11,)), "must lie in 0..n_steps"),
        (lambda: ModelConfig(d_model=50, n_heads=4), "multiple of n_heads"),
        (lambda: ModelConfig(d_model=12, n_heads=4), "must be even"),
        (lambda: ModelConfig(n_layers=0), "n_layers must be positive"),
        (lambda: log_spaced_steps(0, 3), "n_steps >= 1"),
    ],
)
def test_bad_settings_are_named(make, message):
    with pytest.raises(TrainingError, match=message):
        make()


def test_other_lengths_have_other_checkpoints():
    assert replace(TrainingConfig(n_steps=400), n_steps=20).steps == log_spaced_steps(20, 7)
    assert TrainingConfig(n_steps=20, checkpoint_steps=(5,)).steps == (0, 5, 20)


# The pool


def write_after(path: str, text: str, seconds: float) -> int:
    time.sleep(seconds)
    with open(path, "a", encoding="utf-8") as file:
        file.write(text)
    return os.getpid()


def test_pool_order_threads_and_warm_workers(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    path = str(tmp_path / "order.txt")
    jobs = [
        Job("last", write_after, {"path": path, "text": "c", "seconds": 0}, after=("slow", "next")),
        Job("slow", write_after, {"path": path, "text": "a", "seconds": 0.3}),
        Job("next", write_after, {"path": path, "text": "b", "seconds": 0}, after=("slow",)),
        Job("threads", "torch.get_num_threads"),
        Job("environment", "os.getenv", {"key": "OMP_NUM_THREADS"}),
    ]
    results = {result.key: result for result in run_jobs(jobs, n_workers=2, label="test")}
    assert Path(path).read_text() == "abc"
    assert results["threads"].value == 1
    assert results["environment"].value == "1"
    assert results["slow"].seconds >= 0.3
    pids = {results[key].value for key in ("last", "slow", "next")}
    assert len(pids) <= 2
    assert os.getpid() not in pids


def test_pool_fails_fast_with_the_jobs_line(tmp_path):
    sleeper = {"path": str(tmp_path / "never"), "text": "x", "seconds": 60}
    jobs = [
        Job("good", "os.getpid"),
        Job("sleeper", write_after, sleeper),
        Job("bad", "mechinterp.tasks.get", {"name": "nonesuch"}),
        Job("dependent", "os.getpid", after=("bad",)),
    ]
    began, done = time.monotonic(), []
    with pytest.raises(TaskError, match="job 'bad': task 'nonesuch' does not exist"):
        done.extend(result.key for result in run_jobs(jobs, n_workers=2, label="test"))
    assert done == ["good"]
    assert time.monotonic() - began < 40
    assert not Path(sleeper["path"]).exists()


def test_pool_reports_a_dead_worker():
    with pytest.raises(MechinterpError, match=r"'dies' .*worker process died"):
        list(run_jobs([Job("dies", "os.abort")], n_workers=1, label="test"))


def test_pool_refuses_impossible_orders():
    job = Job("a", "os.getpid", after=("b",))
    with pytest.raises(ValueError, match="do not exist"):
        list(run_jobs([job], n_workers=1, label="test"))
    with pytest.raises(ValueError, match="same key"):
        list(run_jobs([job, job], n_workers=1, label="test"))


POOL_SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from mechinterp.training.pool import Job, run_jobs
from pool_job import pid_and_sleep
if __name__ == "__main__":
    jobs = [Job(str(i), pid_and_sleep, {{"path": f"{{sys.argv[1]}}/{{i}}"}}) for i in range(2)]
    list(run_jobs(jobs, n_workers=2, label="test"))
"""


@pytest.mark.parametrize("kill", [signal.SIGINT, signal.SIGKILL])
def test_no_worker_outlives_the_pool(kill, tmp_path):
    (tmp_path / "pool_job.py").write_text(
        "import os, time\n"
        "def pid_and_sleep(path):\n"
        "    with open(path + '.tmp', 'w') as file:\n"
        "        file.write(str(os.getpid()))\n"
        "    os.rename(path + '.tmp', path)\n"
        "    time.sleep(120)\n"
    )
    script = tmp_path / "script.py"
    script.write_text(POOL_SCRIPT.format(tests=str(tmp_path)))
    process = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path)],
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
    )
    pids = []
    for i in range(2):
        while not (tmp_path / str(i)).exists():
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.02)
        pids.append(int((tmp_path / str(i)).read_text()))
    if kill == signal.SIGINT:
        os.killpg(process.pid, kill)  # as a terminal does
    else:
        process.send_signal(kill)
    stderr = process.communicate(timeout=20)[1]
    assert process.returncode != 0
    if kill == signal.SIGINT:
        assert stderr.count("Traceback") <= 1  # the parent's own KeyboardInterrupt
    deadline = time.monotonic() + 10
    while any(is_alive(pid) for pid in pids):
        assert time.monotonic() < deadline, "a worker outlived the pool"
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that ended but was not yet reaped does not."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return fields.rpartition(")")[2].split()[0] != "Z"
