"""One grain's activations of a checkpoint in a file, to be patched into another checkpoint later.

So that two models need not be in memory together: run the first and store, free it, load the other
and patch from the file, which is read layer by layer. The file is plain safetensors, written batch
by batch as the model runs, and bears its name only when it is whole.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.errors import AnalysisError
from mechinterp.files import atomic_file
from mechinterp.hooked import HookedModel, load
from mechinterp.patching.metrics import Metric
from mechinterp.patching.reference import site_shape
from mechinterp.progress import progress_bar
from mechinterp.sites import Site
from mechinterp.store.tensor_file import TensorFile

_METRIC = "metric"


@dataclass(frozen=True)
class StoredActivations(Sequence[Tensor]):
    """Activations by layer, read from their file when asked for. Made by `store_activations`.

    A sequence with one tensor [items positions *site] per layer, which `patch_sites` takes as
    `new`. `rows` limits it to some items, without reading the others.
    """

    path: Path
    grain: str
    n_layers: int
    rows: slice = field(default_factory=lambda: slice(None))

    @classmethod
    def open(
        cls,
        path: str | Path,
        model: HookedModel | None = None,
        tokens: Int[Tensor, "items positions"] | None = None,
    ) -> StoredActivations:
        """Open a file and check that it fits the `model` to be patched and holds `tokens`.

        Raises:
            AnalysisError: it is no such file, or of a network of another shape or other prompts.
        """
        from safetensors import SafetensorError, safe_open

        path = Path(path)
        try:
            with safe_open(path, framework="pt") as file:
                about = file.metadata() or {}
                stored = cls(path, about["grain"], int(about["n_layers"]))
                shape = file.get_slice(stored._name(0)).get_shape()
                kept = file.get_tensor("tokens")
        except (OSError, SafetensorError, KeyError) as error:
            reason = str(error).splitlines()[0]
            raise AnalysisError(f"{path}: is no file of stored activations: {reason}") from None
        if tokens is not None and not torch.equal(kept, tokens.cpu()):
            raise AnalysisError(f"{path}: holds the activations of other prompts; store them anew")
        if model is not None:
            items = 1 if stored.grain == "pattern" else 2
            expected = (model.n_layers, *site_shape(model, stored.grain, kept.shape[1]))
            if (stored.n_layers, *shape[items:]) != expected:
                raise AnalysisError(
                    f"{path}: expected {stored.grain} of a network with (layers, site) "
                    f"{expected}, got {(stored.n_layers, *shape[items:])}"
                )
        return stored

    def __len__(self) -> int:
        return self.n_layers

    @overload
    def __getitem__(self, index: int) -> Float[Tensor, "items positions *site"]: ...
    @overload
    def __getitem__(self, index: slice) -> list[Float[Tensor, "items positions *site"]]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[layer] for layer in range(*index.indices(self.n_layers))]
        if not -self.n_layers <= index < self.n_layers:
            raise IndexError(f"layer {index} of {self.n_layers}")
        return self._read(self._name(index % self.n_layers))

    def __iter__(self) -> Iterator[Float[Tensor, "items positions *site"]]:
        return (self[layer] for layer in range(self.n_layers))

    def select(self, rows: slice) -> StoredActivations:
        """The items at `rows`, of the file, still unread."""
        return StoredActivations(self.path, self.grain, self.n_layers, rows)

    @property
    def tokens(self) -> Int[Tensor, "items positions"]:
        """The prompts that were run."""
        return self._read("tokens")

    @property
    def has_metric(self) -> bool:
        """Whether the metric of the source's own run was stored too."""
        from safetensors import safe_open

        with safe_open(self.path, framework="pt") as file:
            return _METRIC in file.keys()  # noqa: SIM118, safe_open is no mapping

    @property
    def metric(self) -> Float[Tensor, " items"]:
        """The metric of the source's own run.

        Raises:
            AnalysisError: none was given when the file was written.
        """
        if not self.has_metric:
            raise AnalysisError(f"{self.path}: was stored without a metric; give store one")
        return self._read(_METRIC)

    def _read(self, name: str) -> Tensor:
        from safetensors import safe_open

        with safe_open(self.path, framework="pt") as file:
            return file.get_slice(name)[self.rows]

    def _name(self, layer: int) -> str:
        return str(Site(self.grain, layer))


@torch.no_grad()
def store_activations(
    source: HookedModel | str | Path,
    tokens: Int[Tensor, "items positions"],
    grain: str,
    path: str | Path,
    *,
    metric: Metric | None = None,
    decision: int | Int[Tensor, " items"] = -1,
    attention_mask: Int[Tensor, "items positions"] | None = None,
    batch_size: int = 64,
    **load_options: Any,
) -> StoredActivations:
    """Run `tokens` through `source` and write one grain's activations, one batch at a time.

    Args:
        source: a hooked model or the directory of a checkpoint, which is loaded (`load_options` as
            of `mechinterp.load`) and freed again before this returns.
        path: the file to write; it is replaced at the end, or left as it was.
        metric: also keep this metric of the source's own run, read at `decision`.

    Raises:
        SiteError: the network has no such site.
    """
    if not isinstance(source, HookedModel):
        loaded = load(source, **load_options)
        try:
            return store_activations(
                loaded,
                tokens,
                grain,
                path,
                metric=metric,
                decision=decision,
                attention_mask=attention_mask,
                batch_size=batch_size,
            )
        finally:
            del loaded
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    sites = source.sites(grain)
    n_items, n_positions = tokens.shape
    site = site_shape(source, grain, n_positions)
    shape = (n_items, *site) if grain == "pattern" else (n_items, n_positions, *site)
    layout: dict[str, tuple[torch.dtype, tuple[int, ...]]]
    layout = {str(place): (source.dtype, shape) for place in sites}
    layout["tokens"] = (torch.int64, tuple(tokens.shape))
    scores = None
    if metric is not None:
        scores = _own_metric(source, tokens, metric, decision, attention_mask, batch_size)
        layout[_METRIC] = (scores.dtype, (n_items,))
    about = {"grain": grain, "n_layers": str(source.n_layers), "format": "pt"}
    with (
        atomic_file(path) as temporary,
        progress_bar(f"storing {grain}", n_items, unit="prompts") as advance,
    ):
        file = TensorFile(temporary, layout, about)
        file.reserve()
        file.write("tokens", 0, tokens)
        if scores is not None:
            file.write(_METRIC, 0, scores)
        for start in range(0, n_items, batch_size):
            rows = slice(start, start + batch_size)
            mask = None if attention_mask is None else attention_mask[rows]
            captured = source.capture(tokens[rows], sites, attention_mask=mask)
            for place in sites:
                file.write(str(place), start, captured[place])
            advance(len(tokens[rows]))
        file.seal({name: file.checksum(name) for name in layout})
    return StoredActivations(Path(path), grain, source.n_layers)


def _own_metric(
    model: HookedModel,
    tokens: Int[Tensor, "items positions"],
    metric: Metric,
    decision: int | Int[Tensor, " items"],
    attention_mask: Int[Tensor, "items positions"] | None,
    batch_size: int,
) -> Float[Tensor, " items"]:
    items, scores = torch.arange(len(tokens), device=model.device), []
    for start in range(0, len(tokens), batch_size):
        rows = slice(start, start + batch_size)
        logits = model.forward(
            tokens[rows],
            attention_mask=None if attention_mask is None else attention_mask[rows],
            positions=decision if isinstance(decision, int) else decision[rows],
        )
        if metric.token_ids is not None:
            logits = logits[:, metric.token_ids.to(logits.device)]
        scores.append(metric(logits, items[rows]).cpu())
    return torch.cat(scores)
