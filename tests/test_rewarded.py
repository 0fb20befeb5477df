"""Training by reward against loops written out; resumption; rewards that fail; closed forms."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from test_training import Killed, interrupt
from written_tasks import ASKED, END, FIRST, REPORTS, Bandit, Copying

from mechinterp import advantages
from mechinterp.adapters import Adapters
from mechinterp.checkpoints import open_checkpoint
from mechinterp.errors import TaskError, TrainingError
from mechinterp.files import read_table
from mechinterp.policy_gradient import policy_loss
from mechinterp.randomness import derive_generator
from mechinterp.rollouts import sample_completions
from mechinterp.tasks.written import unsolvable
from mechinterp.training import rewarded
from mechinterp.training import run as runs
from mechinterp.training.config import ModelConfig, TrainingConfig
from mechinterp.training.problem_batches import ProblemBatches, ProblemSource
from mechinterp.training.rewarded import Reward, RewardedConfig, train_by_reward
from mechinterp.training.warm_up import warm_up

TASK = Copying()
SMALL = ModelConfig(n_layers=2, d_model=16, n_heads=2, n_kv_heads=1, d_mlp=24, n_positions=16)
OPTIMIZER = TrainingConfig(
    n_steps=6,
    batch_size=5,
    learning_rate=3e-3,
    warmup_steps=2,
    weight_decay=0.0,
    checkpoint_steps=(2, 4),
)
CONFIG = RewardedConfig(optimizer=OPTIMIZER, n_samples=4, kl_every=2)
STEPS = (0, 2, 4, 6)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Copies one letter well, two now and then."""
    out = tmp_path_factory.mktemp("start") / "warm"
    config = TrainingConfig(n_steps=50, batch_size=32, learning_rate=1e-2, warmup_steps=10)
    return warm_up(TASK, config=config, out=out, model=SMALL, levels=(1, 1, 2))[-1]


def run(out: Path, start, **changes: Any):
    return train_by_reward(
        TASK, out=out, **{"start": start, "config": CONFIG, "seed": 3, **changes}
    )


def weights(out: Path, step: int) -> bytes:
    return (out / f"step-{step:06d}" / "model.safetensors").read_bytes()


def log(out: Path) -> pd.DataFrame:
    return read_table(out / "training.parquet").drop(columns=["seconds", "seconds_sampling"])


# The loop


def by_full_passes(model, problems, completions, mask, temperature):
    """Log-probabilities by one pass over prompts and completions side by side, no cache."""
    n = completions.shape[1]
    tokens = torch.cat([problems.tokens.repeat_interleave(n, 0), completions.flatten(0, 1)], 1)
    mask = torch.cat([problems.mask.repeat_interleave(n, 0), mask.flatten(0, 1)], 1).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(tokens, attention_mask=mask, position_ids=positions, use_cache=False).logits
    log_probs = (logits / temperature).log_softmax(-1)[:, :-1]
    chosen = log_probs.gather(-1, tokens[:, 1:, None])[..., 0]
    return chosen[:, -completions.shape[2] :].unflatten(0, (-1, n))


def by_hand(start, config: RewardedConfig, n_steps: int, seed: int = 3):
    """The same steps with everything computed for all prompts at once."""
    model, reference = start.load_model(), start.load_model()
    rate = config.optimizer
    optimizer = torch.optim.AdamW(model.parameters(), betas=rate.betas, weight_decay=0.0)
    stream = start.content_hash
    batches = ProblemBatches(
        TASK, ProblemSource(), batch_size=rate.batch_size, seed=seed, stream=stream, data_order=0
    )
    losses = []
    for step in range(n_steps):
        problems = batches(step)
        rollouts = sample_completions(
            model,
            problems.tokens,
            problems.mask,
            n_samples=config.n_samples,
            max_new_tokens=4,
            end_token=END,
            pad_token=0,
            temperature=config.temperature,
            generator=derive_generator(seed, "rollouts", stream, 0, step),
        )
        correct = TASK.mark(problems, rollouts.completions, rollouts.mask).correct
        sampled = (problems, rollouts.completions, rollouts.mask, config.temperature)
        with torch.no_grad():
            old, base = (by_full_passes(m, *sampled) for m in (model, reference))
        for _ in range(config.n_updates):
            log_probs = by_full_passes(model, *sampled)
            if config.method == "rejection":
                kept = correct[..., None] & rollouts.mask
                loss = -log_probs[kept].mean() if kept.any() else 0 * log_probs.sum()
            else:
                loss = policy_loss(
                    log_probs,
                    getattr(advantages, config.advantage)(correct.float()),
                    rollouts.mask,
                    old_log_probs=old,
                    clip=config.clip,
                    reference_log_probs=base,
                    kl_weight=config.kl_weight,
                    by=config.aggregation,
                    length=config.length,
                )
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), rate.gradient_clip)
            for group in optimizer.param_groups:
                group["lr"] = rate.learning_rate_at(step)
            optimizer.step()
        losses.append(loss.item())
    return model, losses


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"advantage": "centred", "aggregation": "constant", "length": 4.0, "temperature": 1.4},
        {"advantage": "leave_one_out", "aggregation": "token"},
        {"advantage": "reinforce", "kl_weight": 0.3},
        {"n_updates": 3, "clip": (0.1, 0.2), "kl_weight": 0.1},
        {"method": "rejection", "n_updates": 2},
    ],
)
def test_the_loop_is_what_it_says(changes, start, tmp_path, monkeypatch):
    """With plain gradient steps: AdamW makes whole steps even of gradients that are rounding."""
    monkeypatch.setattr(torch.optim, "AdamW", lambda p, **_: torch.optim.SGD(p))
    monkeypatch.setattr(rewarded, "LOGITS_AT_ONCE", 300)  # some prompts at a time
    optimizer = replace(OPTIMIZER, learning_rate=0.3, batch_size=12)
    config = replace(CONFIG, optimizer=optimizer, **changes)
    run(tmp_path, start, config=config)
    expected, losses = by_hand(start, config, 6)
    found = open_checkpoint(tmp_path / "step-000006").load_model()
    before = start.load_model()
    ours, theirs, old = (
        torch.cat([p.detach().flatten() for p in m.parameters()]) for m in (found, expected, before)
    )
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert (ours - old).abs().max() > 1e-2
    assert log(tmp_path)["loss"].tolist() == pytest.approx(losses, abs=1e-4)
    assert log(tmp_path)["degenerate"].between(0.1, 0.9).any()


def test_the_first_gradient_is_that_of_the_verified_loss(start, tmp_path, monkeypatch):
    gradients = []

    def keep(self, optimizer, step):
        gradients.append([p.grad.clone() for g in optimizer.param_groups for p in g["params"]])
        raise Killed

    def keep_theirs(self):
        gradients.append([p.grad for g in self.param_groups for p in g["params"]])

    monkeypatch.setattr(runs.Run, "descend", keep)
    config = replace(CONFIG, optimizer=replace(OPTIMIZER, batch_size=30))
    with pytest.raises(Killed):
        run(tmp_path, start, config=config)
    monkeypatch.setattr(torch.optim.AdamW, "step", keep_theirs)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: None)
    by_hand(start, config, 1)
    assert max(float(g.abs().max()) for g in gradients[0]) > 1e-2
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_no_signal_moves_nothing(start, tmp_path):
    pool = unsolvable(TASK.problems(20, seed=1))
    run(tmp_path, start, problems=pool)
    assert weights(tmp_path, 6) == weights(tmp_path, 0)
    assert log(tmp_path)["degenerate"].tolist() == [1.0] * 6


def test_rewards_teach(start, tmp_path):
    """Against the same prompts and seeds without a step that moves anything."""
    correct = {}
    for rate in (5e-3, 1e-12):
        optimizer = replace(OPTIMIZER, n_steps=60, batch_size=16, learning_rate=rate)
        config = replace(CONFIG, optimizer=optimizer, n_samples=8)
        run(tmp_path / f"{rate:g}", start, config=config, levels=(1, 2))
        correct[rate] = log(tmp_path / f"{rate:g}")["correct"]
    assert (correct[5e-3] - correct[1e-12])[-30:].mean() > 0.04  # its standard error is .02
    table = log(tmp_path / "0.005")
    assert table["kl"].notna().tolist() == [step % 2 == 0 for step in range(60)]
    assert table["kl"][0] == pytest.approx(0, abs=1e-6)
    assert table["kl"].dropna().iloc[-5:].mean() > 0.05


def texts(rollouts):
    return rollouts.completions.flatten(0, 1).tolist()


def test_the_log_by_hand(start, tmp_path, monkeypatch):
    seen = []
    original = rewarded.measure_samples
    monkeypatch.setattr(rewarded, "measure_samples", lambda *a: (seen.append(a), original(*a))[1])
    config = replace(CONFIG, optimizer=replace(OPTIMIZER, batch_size=40), n_samples=6)
    run(tmp_path, start, config=config)
    n_lone = 0
    for row, (problems, rollouts, marked, _) in zip(
        log(tmp_path).to_dict(orient="records"), seen, strict=True
    ):
        right = marked.correct.sum(1)
        assert row["correct"] == pytest.approx(float(right.sum()) / 240)
        assert row["reward"] == pytest.approx(row["correct"])
        assert row["solved"] == pytest.approx(float((right > 0).double().mean()))
        assert row["degenerate"] == pytest.approx(
            float(((right == 0) | (right == 6)).double().mean())
        )
        assert row["lone"] == pytest.approx(float((right == 1).double().mean()))
        if row["lone"]:
            n_lone += 1
            assert row["lone_advantage"] == pytest.approx(math.sqrt(5), rel=1e-5)
        lengths = [
            len(t[m])
            for t, m in zip(
                rollouts.completions.flatten(0, 1), rollouts.mask.flatten(0, 1), strict=True
            )
        ]
        assert row["length"] == pytest.approx(sum(lengths) / 240)
        first = marked.answer.flatten().tolist()
        assert row["repetition"] == pytest.approx(max(first.count(a) for a in first) / 240)
        for level in (1, 2, 3):
            of_level = right[problems.level == level].double()
            assert row[f"correct_level_{level}"] == pytest.approx(float(of_level.mean()) / 6)
        assert math.isnan(row["confidence"])
        norms = [row[f"gradient_norm_layer_{layer}"] for layer in (0, 1)]
        assert 0 < math.hypot(*norms) < row["gradient_norm"]
    assert n_lone > 2


# Interruption


@pytest.fixture(scope="module")
def finished(start, tmp_path_factory):
    out = tmp_path_factory.mktemp("rewarded") / "uninterrupted"
    run(out, start)
    return out


@pytest.fixture(scope="module")
def finished_adapted(start, tmp_path_factory):
    out = tmp_path_factory.mktemp("adapted") / "uninterrupted"
    run(out, start, adapters=ADAPTERS)
    return out


ADAPTERS = Adapters((1,), "mlp", rank=2)
MOMENTS = [
    (ProblemBatches, "__call__", 3, False),
    (rewarded, "sample_answers", 5, True),
    (runs.Run, "descend", 2, True),
    (runs, "save_checkpoint", 0, False),
    (runs, "save_checkpoint", 2, False),
    (runs, "save_checkpoint", 2, True),
    (runs.files, "write_table", 2, True),
]


@pytest.mark.parametrize("adapters", [None, ADAPTERS])
@pytest.mark.parametrize(("owner", "name", "call", "after"), MOMENTS)
def test_resumes_bit_for_bit(
    owner, name, call, after, adapters, start, finished, finished_adapted, tmp_path
):
    whole = finished if adapters is None else finished_adapted
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, owner, name, call=call, after=after)
        with pytest.raises(Killed):
            run(tmp_path, start, adapters=adapters)
    run(tmp_path, start, adapters=adapters)
    for step in STEPS:
        assert weights(tmp_path, step) == weights(whole, step)
    pd.testing.assert_frame_equal(log(tmp_path), log(whole), check_exact=True)


def test_a_directory_belongs_to_one_run(finished, start):
    with pytest.raises(TrainingError, match=r"objective\.advantage is standardised there"):
        run(finished, start, config=replace(CONFIG, advantage="centred"))
    with pytest.raises(TrainingError, match=r"problems\.levels"):
        run(finished, start, levels=(1,))
    with pytest.raises(TrainingError, match="n_pool"):
        run(finished, start, problems=TASK.problems(9))


def test_seeds_and_global_state(start, finished, tmp_path):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    run(tmp_path / "same", start)
    assert torch.equal(torch.get_rng_state(), before)
    assert weights(tmp_path / "same", 6) == weights(finished, 6)
    run(tmp_path / "seed", start, seed=4)
    run(tmp_path / "order", start, data_order=1)
    assert len({weights(tmp_path / name, 6) for name in ("same", "seed", "order")}) == 3


# Adapters


def test_adapters_leave_other_weights_as_they_were(start, finished_adapted):
    before, after = (
        open_checkpoint(finished_adapted / f"step-{step:06d}").load_model() for step in (0, 6)
    )
    assert open_checkpoint(finished_adapted / "step-000000").content_hash == start.content_hash
    old, new = before.state_dict(), after.state_dict()
    assert old.keys() == new.keys()
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    mlp = ("gate_proj", "up_proj", "down_proj")
    assert changed == {f"model.layers.1.mlp.{name}.weight" for name in mlp}
    for name in changed:
        sizes = torch.linalg.svdvals((new[name] - old[name]).double())
        assert sizes[2] < 1e-5 * sizes[0]


# Rewards that fail


def shortest(entry, tokens):
    return -float(len(tokens))


def raises(entry, tokens):
    if len(entry) == 3:
        raise KeyError("no such key")
    return shortest(entry, tokens)


def not_a_number(entry, tokens):
    return math.nan if len(entry) == 3 else 0.0


def hangs(entry, tokens):
    while len(entry) == 3:
        pass
    return 0.0


def test_a_reward_of_one_s_own(start, tmp_path):
    optimizer = replace(OPTIMIZER, n_steps=40, batch_size=16, learning_rate=5e-3)
    run(tmp_path, start, config=replace(CONFIG, optimizer=optimizer), reward=shortest)
    lengths = log(tmp_path)["length"]
    assert lengths[-5:].mean() < lengths[:5].mean() - 0.3
    assert open_checkpoint(tmp_path / "step-000040").provenance.objective["reward"] == (
        "test_rewarded.shortest"
    )


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (raises, r"raises raised KeyError: 'no such key'"),
        (not_a_number, r"not_a_number returned nan"),
        (hangs, r"hangs took longer than 0\.2 s"),
    ],
)
def test_a_broken_reward_is_named_and_the_last_checkpoint_kept(broken, message, start, tmp_path):
    """Problems of level 3 break it; there are none of these before step 3."""

    def levels(self, step):
        return TASK.problems(5, seed=step, levels=(1,) if step < 3 else (3,))

    began = time.monotonic()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ProblemBatches, "__call__", levels)
        item = r"step 3, problem \d \(\d, \d, \d\), sample \d: "
        with pytest.raises(TaskError, match=item + message):
            run(tmp_path, start, reward=broken, reward_seconds=0.2)
    assert time.monotonic() - began < 20
    assert sorted(path.name for path in tmp_path.glob("step-*"))[-1] == "step-000002"
    open_checkpoint(tmp_path / "step-000002")


# A bandit, solved on paper


@pytest.mark.parametrize("score", ["brier", "spherical"])
@pytest.mark.parametrize("routed", [False, True])
def test_a_bandit_is_right_and_says_how_often(score, routed, tmp_path):
    """The better answer is right in 0.7 of the problems, which is the best report."""
    bandit = Bandit(honesty=0.7)
    network = ModelConfig(n_layers=1, d_model=16, n_heads=2, n_kv_heads=1, d_mlp=16)
    optimizer = TrainingConfig(
        n_steps=1, batch_size=1, learning_rate=1e-9, checkpoint_steps=(), warmup_steps=0
    )
    first = warm_up(bandit, config=optimizer, out=tmp_path / "start", model=network)[0]
    optimizer = TrainingConfig(
        n_steps=100, batch_size=64, learning_rate=1e-2, warmup_steps=5, weight_decay=0.0
    )
    config = RewardedConfig(
        optimizer=optimizer,
        advantage="centred",
        aggregation="constant",
        reward=Reward(score=score, routed=routed),
        kl_every=0,
    )
    train_by_reward(bandit, start=first, config=config, out=tmp_path / "run")
    model = open_checkpoint(tmp_path / "run" / "step-000100").load_model()
    with torch.no_grad():
        answer = model(torch.tensor([[ASKED]])).logits[0, -1].softmax(0)
        report = model(torch.tensor([[ASKED, FIRST]])).logits[0, -1].softmax(0)
    assert answer[FIRST] > 0.9
    assert REPORTS[int(report[FIRST + 2 :].argmax())] == 0.7
    assert report[FIRST + 2 :].max() > 0.6
    assert log(tmp_path / "run")["confidence"][-20:].mean() == pytest.approx(0.7, abs=0.08)


def test_routed_tokens_learn_from_their_own_part():
    from mechinterp.rollouts import Rollouts
    from mechinterp.training.rewarded_signal import make_signal

    bandit = Bandit(honesty=1.0)
    completions = torch.tensor([[[3, 5], [3, 9], [4, 7], [3, 1]]])  # .1, .9, wrong and .5, none
    mask = torch.ones_like(completions).bool()
    zeros = torch.zeros(completions.shape)
    rollouts = Rollouts(completions, mask, zeros, zeros)
    marked = bandit.mark(bandit.problems(1), completions, mask)
    config = replace(CONFIG, advantage="centred", reward=Reward("brier", weight=0.5, routed=True))
    signal = make_signal(config, rollouts, marked)
    scores = -0.5 * torch.tensor([0.81, 0.01, 0.25, 1.0])  # none counts as the worst
    right = torch.tensor([1.0, 1.0, 0.0, 1.0])
    expected = torch.stack([right - right.mean(), scores - scores.mean()], 1)
    torch.testing.assert_close(signal.advantages[0], expected)
    torch.testing.assert_close(signal.rewards[0], right + scores)
    joint = make_signal(replace(config, reward=Reward("brier", weight=0.5)), rollouts, marked)
    torch.testing.assert_close(joint.rewards, signal.rewards)
    whole = right + scores
    torch.testing.assert_close(joint.advantages[0, :, 1], whole - whole.mean())


def test_a_tasks_own_score_is_the_reward():
    from mechinterp.rollouts import Rollouts
    from mechinterp.training.rewarded_signal import make_signal

    completions = torch.tensor([[[3], [4], [4]]])
    mask = torch.ones_like(completions).bool()
    zeros = torch.zeros(completions.shape)
    bandit = Bandit()
    marked = bandit.mark(bandit.problems(1), completions, mask)
    marked = replace(marked, score=torch.tensor([[1.0, 0.25, 0.0]]))
    config = replace(CONFIG, advantage="centred")
    signal = make_signal(config, Rollouts(completions, mask, zeros, zeros), marked)
    torch.testing.assert_close(signal.rewards, marked.score)
    torch.testing.assert_close(signal.advantages[..., 0], marked.score - marked.score.mean())


# Problems


def test_problems_depend_on_the_step_alone():
    def make(**changes):
        options = {"batch_size": 4, "seed": 0, "stream": "a", "data_order": 0, **changes}
        return ProblemBatches(TASK, ProblemSource(levels=(2,)), **options)

    straight, jumping = make(), make()
    in_order = [straight(step).entries for step in range(70)]
    for step in (69, 3, 31, 32, 3):
        assert jumping(step).entries == in_order[step]
    assert {len(entry) for entries in in_order for entry in entries} == {2}
    for other in ({"stream": "b"}, {"data_order": 1}, {"seed": 1}):
        assert make(**other)(0).entries != in_order[0]


def test_a_pool_is_gone_through_evenly():
    pool = TASK.problems(10, seed=4)
    numbered = replace(pool, entries=tuple(range(10)))
    options = {"batch_size": 4, "seed": 0, "stream": "a", "data_order": 0}
    batches = ProblemBatches(TASK, ProblemSource(pool=numbered), **options)
    seen = [entry for step in range(5) for entry in batches(step).entries]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]
    assert batches(3).entries == tuple(seen[12:16])
    wide = ProblemBatches(TASK, ProblemSource(pool=numbered), **{**options, "batch_size": 25})
    assert sorted(wide(1).entries) == sorted([*range(10), *range(10), *wide(1).entries[:5]])
    for problem in range(10):
        row = batches(seen.index(problem) // 4)
        at = row.entries.index(problem)
        assert torch.equal(row.tokens[at], pool.tokens[problem])


def test_a_pool_is_named_by_what_is_in_it():
    pool = TASK.problems(10, seed=4)
    name = ProblemSource(pool=pool).describe()
    padded = replace(
        pool,
        tokens=torch.nn.functional.pad(pool.tokens, (2, 0)),
        mask=torch.nn.functional.pad(pool.mask, (2, 0)),
    )
    assert ProblemSource(pool=padded).describe() == name
    for other in (unsolvable(pool), pool.select(range(9)), TASK.problems(10, seed=5)):
        assert ProblemSource(pool=other).describe() != name


# Warm-up


def test_warm_up_is_the_cross_entropy_of_the_solutions(start, tmp_path):
    config = TrainingConfig(n_steps=3, batch_size=8, learning_rate=1e-2, warmup_steps=0)
    warm_up(TASK, config=config, out=tmp_path, start=start, seed=2)
    model = start.load_model()
    batches = ProblemBatches(
        TASK, ProblemSource(), batch_size=8, seed=2, stream=start.content_hash, data_order=0
    )
    problems = batches(0)
    tokens = torch.cat([problems.tokens, problems.solutions], 1)
    mask = torch.cat([problems.mask, problems.solution_mask], 1)
    prompt = torch.arange(tokens.shape[1]) < problems.tokens.shape[1]
    loss = model(
        tokens,
        attention_mask=mask.long(),
        position_ids=(mask.long().cumsum(1) - 1).clamp(min=0),
        labels=tokens.masked_fill(~mask | prompt, -100),
    ).loss
    losses = read_table(tmp_path / "training.parquet")["loss"]
    assert losses[0] == pytest.approx(float(loss.detach()), abs=1e-5)


# Settings


def test_settings_survive_a_file():
    import json

    config = replace(CONFIG, clip=(0.2, 0.3), reward=Reward("group", routed=True))
    assert RewardedConfig.from_inputs(json.loads(json.dumps(config.as_inputs()))) == config


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: replace(CONFIG, advantage="best"), "advantage must be one of standardised"),
        (lambda: replace(CONFIG, method="ppo"), "method must be one of"),
        (lambda: replace(CONFIG, temperature=0.0), "temperature must be positive"),
        (lambda: replace(CONFIG, n_samples=1), "at least 2"),
        (lambda: replace(CONFIG, clip=(2.0, 0.1)), "clip must be"),
        (lambda: replace(CONFIG, kl_weight=-1.0), "kl_weight"),
        (lambda: replace(CONFIG, max_new_tokens=0), "max_new_tokens"),
        (lambda: Reward(routed=True), "routed needs a score"),
        (lambda: Reward("group"), "set routed"),
        (lambda: Reward("quadratic"), "score must be one of"),  # type: ignore[arg-type]
        (lambda: Reward("brier", weight=-1), "weight"),
        (lambda: ProblemSource(pool=TASK.problems(3), planted=0.5), "no planted"),
        (lambda: ProblemSource(pool=TASK.problems(3).select([])), "pool is empty"),
    ],
)
def test_bad_settings_are_named(make, message):
    with pytest.raises(TrainingError, match=message):
        make()


def test_problems_must_fit_the_network(start, tmp_path):
    with pytest.raises(TrainingError, match="up to 34 tokens, but the network has 16 positions"):
        run(tmp_path, start, config=replace(CONFIG, max_new_tokens=30))
