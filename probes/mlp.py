"""A small MLP probe, the non-linear comparison: one hidden layer, many labellings at once.

Problems share the items and the order of batches and differ in labels and in which items have
weight, so that one product with the activations serves all. Each is trained as if alone: it has its
own early stopping, on items held out of its training ones. float32, unlike the closed forms.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from mechinterp.errors import AnalysisError
from mechinterp.randomness import derive_generator, derive_rng
from probes.classifier import LogitClassifier
from probes.decomposition import check_items

_CONSTANT = 1e-6  # of a feature's deviation over all items: below, it counts as constant


@dataclass(frozen=True)
class MLPConfig:
    """AdamW on batches of items, until the loss on held-out ones has not fallen for `patience`
    epochs; the parameters of its minimum are kept. `validation` is the share of items held out.
    """

    width: int = 64
    weight_decay: float = 1e-2
    learning_rate: float = 3e-3
    batch_size: int = 256
    max_epochs: int = 300
    patience: int = 20
    validation: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("width", "batch_size", "max_epochs", "patience"):
            if getattr(self, name) < 1:
                raise AnalysisError(f"{name}: must be at least 1, got {getattr(self, name)}")
        if not 0 < self.validation < 1:
            raise AnalysisError(f"validation: must lie between 0 and 1, got {self.validation}")


@dataclass(frozen=True)
class MLPFits:
    """k MLPs: logits = relu(X hidden^T + hidden_bias) output^T + output_bias.

    `validation_loss` is in nats, and `epoch` where it was least.
    """

    centre: Float[Tensor, " d"]
    hidden: Float[Tensor, "k h d"]
    hidden_bias: Float[Tensor, "k h"]
    output: Float[Tensor, "k a h"]
    output_bias: Float[Tensor, "k a"]
    validation_loss: Float[Tensor, " k"]
    epoch: Int[Tensor, " k"]

    def logits(self, X: Float[Tensor, "n d"]) -> Float[Tensor, "n k a"]:
        parameters = (self.hidden, self.hidden_bias, self.output, self.output_bias)
        X = (X.to(self.centre) - self.centre).to(self.hidden)
        return rearrange(_forward(X, *parameters), "k n a -> n k a")


def fit_mlp_many(
    X: Float[Tensor, "n d"],
    labels: Int[Tensor, "n k"],
    *,
    weights: Float[Tensor, "n k"] | None = None,
    groups: Int[Tensor, " n"] | None = None,
    config: MLPConfig | None = None,
) -> MLPFits:
    """Fit k labellings (classes 0, 1, ...), each to the items with weight in its column (of
    `weights`, 1 by default): a fold is a column that has weight 0 on what it leaves out.

    Features are standardised over the items with weight. Items of a group are held out together.
    The same seed gives the same fit on the same machine, whatever the other columns.

    Raises AnalysisError for input that is not finite and where a column has no training items or
    none to stop by.
    """
    config = config or MLPConfig()
    X, ones = check_items(X, None)
    if labels.ndim != 2 or len(labels) != len(X) or labels.is_floating_point():
        raise AnalysisError(
            f"labels: expected whole numbers of shape [{len(X)}, k], got {list(labels.shape)} of "
            f"{labels.dtype}"
        )
    weights = ones[:, None].expand(labels.shape) if weights is None else weights.to(X)
    labels = labels.to(X.device)
    held = _held_out(len(X), groups, config).to(X.device)
    centre, scale = X.mean(0), X.std(0)
    data = ((X - centre) / torch.where(scale > 0, scale, 1.0)).float()
    train, validation = weights * ~held[:, None], weights * held[:, None]
    if (train.sum(0) <= 0).any() or (validation.sum(0) <= 0).any():
        raise AnalysisError(
            "weights: a column has no items to train on, or none to stop by; use more items or "
            "another share of validation"
        )
    train, validation = (w / w.sum(0) for w in (train, validation))
    share = (weights / weights.sum(0)).float()
    mean = share.T @ data
    deviation = (share.T @ data.square() - mean.square()).clamp_min(0).sqrt()
    inverse = torch.where(deviation > _CONSTANT, 1 / deviation, 0.0)

    def unfold(parameters: list[Tensor]) -> list[Tensor]:
        """Parameters on standardised features, as parameters on `data`."""
        hidden = parameters[0] * inverse[:, None]
        return [hidden, parameters[1] - (hidden @ mean[..., None])[..., 0], *parameters[2:]]

    def loss(items: Tensor, row_weights: Tensor, parameters: list[Tensor]) -> Float[Tensor, " k"]:
        log_p = _forward(data[items], *unfold(parameters)).log_softmax(-1)
        chosen = log_p.gather(-1, labels[items].T[..., None])[..., 0]
        return -(chosen * row_weights[items].T).sum(1)

    parameters = _initial(data.shape[1], labels.shape[1], int(labels.amax()) + 1, config, X.device)
    best, found = _train(loss, parameters, train.float(), validation.float(), held, config)
    hidden, hidden_bias, output, output_bias = unfold(best)
    hidden = hidden / torch.where(scale > 0, scale, 1.0).float()
    return MLPFits(centre, hidden, hidden_bias, output, output_bias, *found)


def _forward(
    X: Tensor, hidden: Tensor, hidden_bias: Tensor, output: Tensor, bias: Tensor
) -> Float[Tensor, "k n a"]:
    rows = rearrange(X @ rearrange(hidden, "k h d -> d (k h)"), "n (k h) -> k n h", k=len(hidden))
    return (rows + hidden_bias[:, None]).relu() @ output.mT + bias[:, None]


def _held_out(n: int, groups: Int[Tensor, " n"] | None, config: MLPConfig) -> Bool[Tensor, " n"]:
    groups = torch.arange(n) if groups is None else groups.cpu().unique(return_inverse=True)[1]
    n_groups = int(groups.amax()) + 1
    order = torch.from_numpy(derive_rng(config.seed, "mlp", "validation").permutation(n_groups))
    return (order < max(1, round(config.validation * n_groups)))[groups]


def _initial(
    d: int, k: int, n_classes: int, config: MLPConfig, device: torch.device
) -> list[Tensor]:
    """He et al. (2015) for the hidden layer, 0 for the output; every problem starts alike."""
    generator = derive_generator(config.seed, "mlp", "initial")
    h = config.width
    hidden = torch.randn(h, d, generator=generator) * (2 / d) ** 0.5
    output = torch.randn(n_classes, h, generator=generator) * 0.1 / h**0.5
    start = [hidden, torch.zeros(h), output, torch.zeros(n_classes)]
    return [value.to(device).repeat(k, *[1] * value.ndim).requires_grad_() for value in start]


def _train(
    loss, parameters: list[Tensor], train: Tensor, validation: Tensor, held: Tensor, config
) -> tuple[list[Tensor], tuple[Float[Tensor, " k"], Int[Tensor, " k"]]]:
    """The parameters at each problem's least validation loss, those losses, and their epochs."""
    weights, biases = parameters[::2], parameters[1::2]
    optimiser = torch.optim.AdamW(
        [
            {"params": weights, "weight_decay": config.weight_decay},
            {"params": biases, "weight_decay": 0.0},
        ],
        lr=config.learning_rate,
    )
    rng = derive_rng(config.seed, "mlp", "batches")
    training, held_out = (~held).nonzero()[:, 0], held.nonzero()[:, 0]
    best = [value.detach().clone() for value in parameters]
    k = train.shape[1]
    least = torch.full((k,), torch.inf, device=train.device)
    epoch_of = torch.zeros(k, dtype=torch.int64, device=train.device)
    with torch.enable_grad():
        for epoch in range(1, config.max_epochs + 1):
            order = training[torch.from_numpy(rng.permutation(len(training))).to(training.device)]
            for batch in order.split(config.batch_size):
                optimiser.zero_grad()
                # Weights sum to 1 over the items: an unbiased estimate of the mean over them.
                (loss(batch, train, parameters).sum() * len(training) / len(batch)).backward()
                optimiser.step()
            with torch.no_grad():
                value = loss(held_out, validation, parameters)
                better = value < least
                least = torch.where(better, value, least)
                epoch_of[better] = epoch
                for kept, current in zip(best, parameters, strict=True):
                    kept[better] = current[better]
            if (epoch - epoch_of >= config.patience).all():
                break
    return best, (least, epoch_of)


class MLPProbe(LogitClassifier):
    """A classifier with one hidden layer, early stopping and weight decay; see `MLPConfig`.

    Deterministic from `random_state`. After `fit`: `classes_`, `fits_` (see `MLPFits`; one
    problem), `n_epochs_`. What it reads beyond a linear probe is not linearly decodable; that
    alone does not say that the network uses it.
    """

    def __init__(
        self,
        width: int = 64,
        *,
        weight_decay: float = 1e-2,
        learning_rate: float = 3e-3,
        batch_size: int = 256,
        max_epochs: int = 300,
        patience: int = 20,
        validation: float = 0.2,
        class_weight=None,
        random_state: int = 0,
        device: str = "cpu",
    ):
        self.width = width
        self.weight_decay = weight_decay
        self.learning_rate = learning_rate
        self.batch_size = batch_size
        self.max_epochs = max_epochs
        self.patience = patience
        self.validation = validation
        self.class_weight = class_weight
        self.random_state = random_state
        self.device = device

    def fit(self, X, y, sample_weight=None) -> MLPProbe:
        data = self._encode(X, y, sample_weight)
        config = MLPConfig(
            width=self.width,
            weight_decay=self.weight_decay,
            learning_rate=self.learning_rate,
            batch_size=self.batch_size,
            max_epochs=self.max_epochs,
            patience=self.patience,
            validation=self.validation,
            seed=self.random_state,
        )
        weights = data.weights[:, None]
        fits = fit_mlp_many(data.X, data.labels[:, None], weights=weights, config=config)
        self.fits_ = MLPFits(**{name: value.cpu() for name, value in vars(fits).items()})
        self.n_epochs_ = int(fits.epoch[0])
        return self

    def decision_function(self, X) -> np.ndarray:
        """Log-odds of `classes_[1]` [n], or logits of more than two classes [n, classes]."""
        check_is_fitted(self)
        X = np.asarray(validate_data(self, X, dtype=np.float64, reset=False))
        z = self.fits_.logits(torch.tensor(X))[:, 0].double().numpy()
        return z[:, 1] - z[:, 0] if len(self.classes_) == 2 else z
