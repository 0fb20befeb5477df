"""Maps of probes by layer and position: what a causal network cannot know, and what circuits do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from micro_models import _BITS, xor
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler
from tiny_models import shared_model

from analyses.probe_positions import (
    STRENGTH,
    map_positions,
    pair_tables,
    prompt_units,
    read_positions,
)
from figures.probe_positions import draw
from mechinterp import tasks
from mechinterp.errors import AnalysisError
from mechinterp.hooked import HookedModel
from mechinterp.randomness import derive_generator, derive_rng
from mechinterp.sites import Site
from mechinterp.spec import AnalysisSpec
from mechinterp.tasks.base import Items
from probes.folds import grouped_folds
from probes.probe import control_labels

ROLES = ("filler", "first", "other", "second", "constant", "=")


def bits(n: int = 240) -> Items:
    """Two marked bits, whose exclusive or is the answer, an unmarked one before and between."""
    first, second, filler, other = derive_rng(0, "bits").integers(0, 2, size=(4, n))
    prompts = [
        [_BITS.index(token) for token in (str(z), f"m{a}", str(o), f"n{b}", "1", "=")]
        for a, b, z, o in zip(first, second, filler, other, strict=True)
    ]
    latents = {"first": first, "second": second, "answer": first ^ second}
    return Items(
        tokens=torch.tensor(prompts),
        labels=torch.tensor(first ^ second),
        latents={name: torch.tensor(values) for name, values in latents.items()},
        groups=torch.arange(n),
        roles=np.broadcast_to(np.array(ROLES), (n, 6)),
    )


def residuals(model: HookedModel, items: Items):
    sites = [Site("resid_pre", 0), *(Site("resid_post", i) for i in range(model.n_layers))]
    captured = model.capture(items.tokens, sites)
    return [(layer, captured[site]) for layer, site in enumerate(sites)]


def probe(model: HookedModel, items: Items):
    types = torch.arange(len(items)) // 2
    return map_positions(
        residuals(model, items), items, control_types=types, n_folds=3, n_permutations=200
    )


@pytest.fixture(scope="module")
def circuit():
    return probe(xor().model, bits())


@pytest.fixture(scope="module")
def at(circuit):
    table = circuit.to_table()
    return table.set_index(["layer", "unit", "latent", "kind", "measure"]).sort_index()


def test_a_latent_is_at_chance_before_its_token_and_readable_from_it_on(at):
    auroc = at.xs(("latent", "auroc"), level=("kind", "measure"))
    before = {"first": ROLES[:1], "second": ROLES[:3], "answer": ROLES[:3]}
    for latent, units in before.items():
        for unit in units:
            rows = auroc.xs((unit, latent), level=("unit", "latent"))
            assert len(rows) > 0
            assert rows.value.between(0.3, 0.7).all(), (latent, unit)
            assert (rows.p_map > 0.05).all(), (latent, unit)
    for latent in ("first", "second"):
        rows = auroc.xs((latent, latent), level=("unit", "latent"))
        assert (rows.value == 1).all()
        assert (rows.p_map < 0.01).all()


def test_a_circuit_is_seen_where_its_heads_write(at):
    """head.0.0 fetches the first bit to "=" in block 0; the second and the answer come in 1."""
    value = at.xs(("latent", "auroc"), level=("kind", "measure")).xs("=", level="unit")
    assert value.value[1, "first"] == value.value[2, "first"] == 1
    assert value.value[2, "second"] == value.value[2, "answer"] == 1
    assert value.p_map[2, "answer"] < 0.01 < 0.05 < value.p_map[1, "answer"]
    assert (0, "first") not in value.index  # "=" itself is the same in all items
    assert at.value[2, "=", "answer", "latent", "selectivity"] > 0.35


def test_the_surface_has_the_bits_and_not_their_exclusive_or(at):
    surface = at.value.loc[-1].xs("auroc", level="measure")
    assert surface["first", "first", "surface_token"] == 1
    assert surface["=", "first", "surface_token"] == 0.5
    assert surface["=", "first", "surface_bag"] == surface["=", "second", "surface_ordered"] == 1
    assert surface["=", "answer", "surface_ordered"] < 0.7


def test_the_change_is_what_a_lesion_takes(circuit):
    broken = xor().model
    with torch.no_grad():
        broken.model.transformer.h[1].attn.c_proj.weight.zero_()  # the second bit never arrives
    change = circuit.change_to(probe(broken, bits())).query("measure == 'auroc'")
    change = change.set_index(["layer", "unit", "latent"]).sort_index()
    lost = change.loc[2, "=", "answer"]
    assert lost.value < -0.3
    assert lost.high < 0
    assert lost.p_map < 0.05
    for untouched in (change.loc[:1], circuit.change_to(circuit)):
        assert (untouched.value == 0).all()
        assert (untouched.p_map == 1).all()


def test_maps_of_other_items_do_not_subtract(circuit):
    with pytest.raises(AnalysisError, match="is a map of other items"):
        circuit.change_to(probe(xor().model, bits(200)))


def test_a_cell_is_what_scikit_learn_gives():
    """AUROC and selectivity of one cell of a random network, roles at other places in each item."""
    model, task = shared_model("llama"), tasks.get("triage", linear=(1.5,), xor=(), n_unneeded=1)
    items = task.sample(200)
    types = task.control_types(items)
    found = map_positions(
        residuals(model, items), items, control_types=types, n_folds=4, n_permutations=9
    ).to_table()
    x = dict(residuals(model, items))[2].double().numpy()[items.roles == "value b"]
    labels = {}
    for name, latent in items.latents.items():
        generator = derive_generator(0, "control task", name)
        labels[name] = latent
        labels[f"{name} control"] = control_labels(types, latent, generator)
    folds = grouped_folds(items.groups, torch.stack(list(labels.values()), 1), 4, 0).numpy()
    areas, right = [], {"a": [], "a control": []}
    for fold in range(4):
        train, test = folds != fold, folds == fold
        scale = StandardScaler().fit(x[train])
        for name in right:
            y = labels[name].numpy()
            fit = LogisticRegression(C=1 / (STRENGTH * train.sum()), tol=1e-10, max_iter=10_000)
            fit.fit(scale.transform(x[train]), y[train])
            right[name] += (fit.predict(scale.transform(x[test])) == y[test]).tolist()
            if name == "a":
                scores = fit.decision_function(scale.transform(x[test]))
                areas.append(roc_auc_score(y[test], scores))
    cell = found.query("layer == 2 and unit == 'value b' and latent == 'a' and kind == 'latent'")
    value = cell.set_index("measure").value
    assert value["auroc"] == pytest.approx(np.mean(areas), abs=2e-3)
    selectivity = np.mean(right["a"]) - np.mean(right["a control"])
    assert value["selectivity"] == pytest.approx(selectivity, abs=0.011)  # an item or two


def test_units_are_the_roles_where_they_stand():
    items = tasks.get("triage", n_fillers=2).sample(50)
    units = {unit.name: unit for unit in prompt_units(items)}
    assert {"start", "decision", "value a", "filler 1", "filler 2"} <= set(units)
    assert units["start"].position == 0
    assert np.isnan(units["value a"].position)
    for unit in units.values():
        role = items.roles[np.arange(50), unit.index]
        assert (role == unit.name.removesuffix(" 1").removesuffix(" 2")).all()
        prefix = unit.prefix(items.tokens)
        for item in range(50):
            own = items.tokens[item, : unit.index[item] + 1]
            assert prefix[item].tolist()[-len(own) :] == own.tolist()
            assert set(prefix[item].tolist()[: -len(own)]) <= {-1}
    assert (units["filler 1"].index < units["filler 2"].index).all()


def test_noise_is_marked_readable_in_one_map_of_twenty():
    items = bits(60)
    n_false, n_maps = 0, 0
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        noise = [(layer, torch.randn(60, 6, 2, generator=generator)) for layer in range(4)]
        options = {"n_folds": 3, "n_permutations": 39, "seed": seed}
        found = map_positions(noise, items, control_types=torch.arange(60), **options)
        table = found.to_table().query("kind == 'latent' and measure == 'auroc'")
        smallest = table.groupby("latent").p_map.min()
        n_false, n_maps = n_false + int((smallest <= 0.05).sum()), n_maps + len(smallest)
    assert n_maps == 18
    assert n_false <= 4  # P(more) < 1% where 5% are false


def test_reading_through_the_store_is_reading_in_memory():
    model, task = shared_model("qwen2"), tasks.get("triage")
    items, spec = task.sample(30), AnalysisSpec(batch_size=7, max_layers=3)
    stored = {layer: x.clone() for layer, x in read_positions(model, items, task, spec=spec)}
    for layer, x in residuals(model, items):
        torch.testing.assert_close(stored[layer], x, atol=2e-5, rtol=2e-5)


def test_table_of_a_pair_has_the_change():
    from analyses.pair import Pair

    task = tasks.get("triage", linear=(1.5,), xor=(), n_unneeded=1)
    spec = AnalysisSpec(
        trajectory_items=90, probe_items=90, ladder_items=90, probe_folds=3, max_layers=2
    )
    models = {"before": shared_model("llama"), "after": shared_model("llama_tied_bias")}
    table = pair_tables(Pair(models, task, spec, {}))["probe_positions"]
    kinds = table.groupby("arm").kind.unique().map(set)
    assert kinds["after"] - kinds["before"] == {"change"}
    cells = ["layer", "unit", "latent", "measure"]
    by_kind = table.set_index(["arm", "kind", *cells]).sort_index().value
    difference = by_kind["after", "latent"] - by_kind["before", "latent"]
    change = by_kind["after", "change"]
    np.testing.assert_allclose(change, difference[change.index], atol=1e-12)
    assert set(table.latent) == {"a", "b"}
    assert table.set_index("latent").needed["a"].all()
    assert not table.set_index("latent").needed["b"].any()


def test_figure_shows_each_cell_where_it_is(circuit):
    table = circuit.to_table()
    keys = {"task": "bits", "regime": "pair", "arm": "before", "seed": 0, "step": 0}
    figure = draw({"probe_positions": table.assign(needed=True, **keys)})
    panel = next(ax for ax in figure.axes if ax.get_ylabel() == "answer")
    arrays = [mesh.get_array() for mesh in panel.collections]
    layers, surface = (array for array in arrays if array is not None)
    assert layers.shape == surface.shape == (3, 6)  # as many layers as surface rows
    auroc = table.query("kind == 'latent' and measure == 'auroc' and latent == 'answer'")
    assert layers.count() == len(auroc)
    (crosses,) = panel.lines
    marked = set(zip(*crosses.get_data(), strict=True))
    for row in auroc.itertuples():
        column = ROLES.index(row.unit)
        assert layers[row.layer, column] == row.value
        assert ((column, row.layer) in marked) == (row.p_map > 0.05)
