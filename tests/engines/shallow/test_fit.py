"""A fitted head: it finds what is there, and says honestly how it does on queries left out."""

import numpy as np
import pytest

from edje.engines.shallow.fit import NUM_FOLDS, PENALTIES, fit_head, predicted

WIDTH, QUERIES, CANDIDATES = 30, 12, 20


def rows_of(random, queries=QUERIES):
    return [
        random.standard_normal((CANDIDATES, WIDTH)).astype(np.float32) + 3 for _ in range(queries)
    ]


def test_a_linear_score_is_found():
    random = np.random.default_rng(0)
    weight = random.standard_normal(WIDTH)
    rows = rows_of(random)
    scores = [(each @ weight - 4).astype(np.float32) for each in rows]
    fit = fit_head(rows, scores)
    assert fit.penalty == PENALTIES[0]
    assert fit.correlation > 0.9999
    for each, expected in zip(rows_of(random), scores, strict=True):
        np.testing.assert_allclose(predicted(fit.head, each), each @ weight - 4, atol=0.02)
        assert len(expected) == CANDIDATES
    assert fit.depths["1"] == {"0.9": 0.05, "0.95": 0.05, "0.99": 0.05, "1": 0.05}
    assert fit.depths["10"]["1"] == 0.5


def test_pure_noise_is_told_as_noise_although_a_head_could_learn_it_by_heart():
    random = np.random.default_rng(1)
    rows = [random.standard_normal((4, WIDTH)).astype(np.float32) for _ in range(8)]
    scores = [random.standard_normal(4).astype(np.float32) for _ in rows]
    fit = fit_head(rows, scores)
    assert fit.penalty == PENALTIES[-1]
    assert abs(fit.correlation) < 0.6
    learned = [predicted(fit.head, each) for each in rows]
    assert np.mean([np.square(a - b).mean() for a, b in zip(learned, scores, strict=True)]) < 1


def test_a_querys_left_out_scores_do_not_know_its_own():
    """Change one query's scores: what is predicted for it stays, for others it moves."""
    random = np.random.default_rng(2)
    rows = rows_of(random)
    scores = [each[:, 0].copy() for each in rows]
    before = fit_head(rows, scores)
    changed = [scores[0] + 0.1 * rows[0][:, 1], *scores[1:]]
    after = fit_head(rows, changed)
    assert before.penalty == after.penalty
    np.testing.assert_allclose(before.scores[0], after.scores[0], atol=1e-4)
    same_fold = [n for n in range(QUERIES) if n % NUM_FOLDS == 0]
    moved = [np.abs(a - b).max() for a, b in zip(before.scores, after.scores, strict=True)]
    assert all(moved[n] < 1e-4 for n in same_fold)
    assert all(moved[n] > 1e-3 for n in range(QUERIES) if n not in same_fold)


@pytest.mark.parametrize("queries", [1, 2, 3])
def test_few_queries_are_enough_for_a_head(queries):
    rows = rows_of(np.random.default_rng(3), queries)
    fit = fit_head(rows, [each[:, 2] for each in rows])
    assert np.isfinite(fit.head.weight).all()
    assert len(fit.scores) == queries


def test_silent_rows_give_a_head_that_says_the_mean():
    rows = [np.zeros((5, WIDTH), np.float32)] * 4
    fit = fit_head(rows, [np.full(5, 2.5, np.float32)] * 4)
    np.testing.assert_allclose(predicted(fit.head, rows[0]), 2.5)
