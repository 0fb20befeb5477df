"""PneumoniaMNIST as a task: on a small file of the same form, and on the real one where it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from mechinterp import tasks
from mechinterp.errors import TaskError

REAL = Path(__file__).parents[2] / "shared" / "data" / "pneumoniamnist.npz"
SIZES = {"train": 60, "val": 12, "test": 40}


@pytest.fixture
def arrays():
    """Pneumonia, three in four, is brighter; the first validation image stands in train too."""
    rng = np.random.default_rng(0)
    found = {}
    for part, n in SIZES.items():
        labels = (np.arange(n) % 4 > 0).astype(np.uint8)
        noise = rng.integers(0, 100, (n, 28, 28))
        found[f"{part}_images"] = (noise + 80 * labels[:, None, None]).astype(np.uint8)
        found[f"{part}_labels"] = labels[:, None]
    found["val_images"][0] = found["train_images"][0]
    return found


@pytest.fixture
def path(arrays, tmp_path):
    np.savez(tmp_path / "small.npz", **arrays)
    return tmp_path / "small.npz"


def test_tokens_are_mean_grey_levels_row_by_row(path, arrays):
    task = tasks.get("pneumonia", path=str(path), pool=7, n_levels=4)
    items = task.sample(40, seed=3)
    assert len(items) == 40
    for i, index in enumerate(items.groups.tolist()):
        image = arrays["test_images"][index % 1_000_000].astype(float)
        by_hand = [
            4 + int(image[7 * r : 7 * r + 7, 7 * c : 7 * c + 7].mean() / 255 * 4)
            for r in range(4)
            for c in range(4)
        ]
        assert items.tokens[i].tolist() == [0, *by_hand, 1]
        assert items.labels[i] == arrays["test_labels"][index % 1_000_000, 0]


def test_validation_leaves_out_what_stands_in_training(path):
    task = tasks.get("pneumonia", path=str(path))
    assert len(task.sample(100, split="validation")) == SIZES["val"] - 1


def test_matched_prevalence(path):
    task = tasks.get("pneumonia", path=str(path), prevalence="matched")
    items = task.sample(100)
    assert items.labels.bincount().tolist() == [10, 10]
    train = task.sample(4_000, split="train").labels.double().mean()
    assert abs(train - 0.5) < 4.5 * 0.5 / 4_000**0.5


def test_splits_share_no_group_and_training_is_noisy(path):
    task = tasks.get("pneumonia", path=str(path))
    groups = {s: set(task.sample(500, split=s).groups.tolist()) for s in ("train", "test")}
    assert not groups["train"] & groups["test"]
    train = task.sample(500, split="train")
    same = train.groups == train.groups[0]
    assert len(train.tokens[same].unique(dim=0)) > 1


def test_pairs_are_nearest_of_the_other_class(path):
    task = tasks.get("pneumonia", path=str(path))
    pairs = task.counterfactual_pairs(20)
    every = task.sample(100)
    for i in range(20):
        others = every.labels != pairs.clean.labels[i]
        levels = every.tokens[others].double()
        distance = (levels - pairs.clean.tokens[i].double()).square().sum(1)
        chosen = (pairs.corrupt.tokens[i] - pairs.clean.tokens[i]).double().square().sum()
        assert chosen == distance.min()
    assert pairs.clean.labels[:4].tolist() == [1, 0, 1, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop("val_labels"), "has no array val_labels"),
        (lambda a: a.update(test_images=a["test_images"][:, :8]), "test_images: expected"),
        (lambda a: a.update(train_labels=a["train_labels"] + 1), "labels 0 or 1"),
    ],
)
def test_bad_files(arrays, tmp_path, change, message):
    change(arrays)
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(TaskError, match=message):
        tasks.get("pneumonia", path=str(tmp_path / "bad.npz")).sample(3)


def test_no_file_says_where_to_get_it(tmp_path):
    with pytest.raises(TaskError, match=r"no file .*nowhere\.npz; download pneumoniamnist\.npz"):
        tasks.get("pneumonia", path=str(tmp_path / "nowhere.npz")).sample(3)
    (tmp_path / "text.npz").write_text("not an archive")
    with pytest.raises(TaskError, match=r"text\.npz: not an \.npz file"):
        tasks.get("pneumonia", path=str(tmp_path / "text.npz")).sample(3)


@pytest.mark.skipif(not REAL.is_file(), reason="needs pneumoniamnist.npz beside the repository")
def test_real_images_are_as_hard_as_known():
    """A linear model on the tokens does about as well as on the pixels (.82, AUROC .917)."""
    task = tasks.get("pneumonia", path=str(REAL))
    train, test = task.sample(5_000, split="train"), task.sample(1_000)
    assert test.labels.bincount().tolist() == [234, 390]
    model = LogisticRegression(max_iter=2_000)
    model.fit(task.baseline_features(train), train.labels)
    scores = model.decision_function(task.baseline_features(test))
    assert 0.89 < roc_auc_score(test.labels, scores) < 0.95
