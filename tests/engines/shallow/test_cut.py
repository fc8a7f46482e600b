"""A graph cut after some layers gives what its definition says of the whole graph's values."""

import numpy as np
import pytest

from edje.bundle import JOINT_ENCODER, layer_of, layer_path, value_name
from edje.engines.manifest import Profile
from edje.engines.precision.emulate import runner
from edje.engines.precision.graph import Graph
from edje.engines.precision.lower import lower
from edje.engines.samples import RandomSamples, sample_batches
from edje.engines.shallow.cut import Head, cut, num_layers_of, with_rows
from edje.errors import EngineError


@pytest.fixture(scope="module")
def graph(deep_bundle):
    return Graph.read(deep_bundle / JOINT_ENCODER)


@pytest.fixture(scope="module")
def head(bundle):
    weight = np.random.default_rng(3).standard_normal(3 * bundle.sizes.hidden)
    return Head(weight.astype(np.float32), -0.75)


def batches(bundle, *buckets):
    profile = Profile(64, buckets)
    samples = RandomSamples(bundle, 5, 7)
    pad, sep = bundle.text.pad_id, bundle.text.sep_id
    return [batch for s in samples for batch in sample_batches(s, profile, pad_id=pad, sep_id=sep)]


@pytest.mark.parametrize("layers", [1, 2])
def test_the_head_reads_cls_and_the_means_of_real_text_and_visual_slots(
    graph, bundle, head, layers
):
    hidden = value_name(layer_path(layers - 1, "ffn_norm"), "LayerNormalization")
    states, shallow = runner(graph, [hidden]), runner(cut(graph, layers, head))
    for batch in batches(bundle, 15, 31, 63):
        (after,) = states(batch)
        length, slots = int(batch.text_length[0]), batch.text_ids.shape[1]
        images = after[:, slots : slots + bundle.sizes.num_tokens]
        rows = [after[:, 0], after[:, :length].mean(axis=1), images.mean(axis=1)]
        expected = np.concatenate(rows, axis=1) @ head.weight + head.bias
        np.testing.assert_allclose(shallow(batch)[0], expected, atol=2e-5)


def test_padding_and_other_pairs_do_not_move_a_score(graph, bundle, head):
    score = runner(cut(graph, 2, head))
    short, long = batches(bundle, 15, 31, 63), batches(bundle, 63)
    for one, other in zip(short, long, strict=True):
        np.testing.assert_allclose(score(one)[0], score(other)[0], atol=2e-5)
        alone = np.concatenate([score(one.part(slice(i, i + 1)))[0] for i in range(len(one))])
        np.testing.assert_allclose(alone, score(one)[0], atol=1e-6)


def test_nothing_of_the_later_layers_and_of_the_old_head_is_left(graph, head):
    shallow = cut(graph, 1, head)
    numbers = {layer_of(item.name) for item in shallow.nodes}
    assert numbers == {None, 0}
    assert not any("pooler" in item.name or "classifier" in item.name for item in shallow.nodes)
    kept = {weight.name for weight in shallow.model().graph.initializer}
    assert not any(name.startswith(("layers.1", "layers.2", "pooler")) for name in kept)


def test_what_heads_read_comes_from_one_forward(graph, bundle):
    wide, names = with_rows(graph, [1, 2])
    run, whole = runner(wide, ["scores", *names]), runner(graph)
    for batch in batches(bundle, 31, 63):
        scores, first, second = run(batch)
        np.testing.assert_allclose(scores, whole(batch)[0], atol=1e-5)
        assert first.shape == second.shape == (len(batch), 3 * bundle.sizes.hidden)
        for layers, rows in ((1, first), (2, second)):
            head = Head(np.eye(3 * bundle.sizes.hidden, dtype=np.float32)[5], 0.0)
            np.testing.assert_allclose(
                runner(cut(graph, layers, head))(batch)[0], rows[:, 5], atol=1e-6
            )


def test_lower_precision_leaves_pooling_and_head_in_float32(graph, bundle, head):
    from edje.engines.precision.emulate import scorer

    exact = runner(cut(graph, 2, head))
    rounded = scorer(lower(cut(graph, 2, head), "float16"))
    for batch in batches(bundle, 63):
        np.testing.assert_allclose(rounded(batch), exact(batch)[0], atol=0.05)


@pytest.mark.parametrize("layers", [0, 3, 4, -1])
def test_only_some_of_the_layers_can_be_kept(graph, head, layers):
    assert num_layers_of(graph) == 3
    with pytest.raises(EngineError, match="this model has 3, expected 1 to 2"):
        cut(graph, layers, head)
