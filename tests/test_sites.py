import pytest
from hypothesis import given
from hypothesis import strategies as st

from mechinterp.errors import SiteError
from mechinterp.sites import GRAINS, GRAINS_WITH_HEADS, Site

sites = st.builds(
    lambda grain, layer, head: Site(grain, layer, head if grain in GRAINS_WITH_HEADS else None),
    st.sampled_from(list(GRAINS)),
    st.integers(0, 200),
    st.none() | st.integers(0, 200),
)


@given(sites)
def test_a_name_parses_to_its_site(site):
    assert Site.parse(str(site)) == site
    assert Site.parse(site) is site


@given(sites)
def test_transformer_lens_names_parse_to_the_site_with_all_its_heads(site):
    assert Site.parse(site.transformer_lens_name) == Site(site.grain, site.layer)


@given(st.lists(sites, unique=True))
def test_sites_sort_by_layer_then_by_order_of_computation(unsorted):
    grains = list(GRAINS)
    expected = sorted(
        unsorted,
        key=lambda s: (s.layer, grains.index(s.grain), -1 if s.head is None else s.head),
    )
    assert sorted(unsorted) == expected
    assert sorted(set(unsorted)) == expected


@pytest.mark.parametrize(
    ("name", "site"),
    [
        ("resid_pre.3", Site("resid_pre", 3)),
        ("head.2.5", Site("head", 2, 5)),
        ("head.2", Site("head", 2)),
        ("blocks.3.hook_resid_pre", Site("resid_pre", 3)),
        ("blocks.3.hook_in", Site("resid_pre", 3)),
        ("blocks.3.attn.hook_z", Site("head", 3)),
        ("blocks.3.attn.o.hook_in", Site("head", 3)),
        ("blocks.3.attn.hook_pattern", Site("pattern", 3)),
        ("blocks.3.mlp.hook_post", Site("neuron", 3)),
    ],
)
def test_known_names(name, site):
    assert Site.parse(name) == site


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("resid_prre.3", "resid_pre"),
        ("blocks.3.hook_resid_prre", "hook_resid_pre"),
        ("blocks.3.attn.hook_zz", "attn.hook_z"),
        ("resid_pre", "GRAIN.LAYER"),
        ("resid_pre.-1", "GRAIN.LAYER"),
        ("mlp_out.1.2", "no heads"),
        ("zzz.1", "expected one of"),
        ("", "GRAIN.LAYER"),
    ],
)
def test_a_misspelt_name_is_refused_with_the_nearest(name, hint):
    with pytest.raises(SiteError, match=hint) as error:
        Site.parse(name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("fields", [("resid_pre", -1), ("head", 0, -1), ("resid_mid", 0, 1)])
def test_impossible_sites_are_refused(fields):
    with pytest.raises(SiteError):
        Site(*fields)
