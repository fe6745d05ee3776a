"""The search for a learning rate: what is drawn, what is kept, what goes on after an interruption."""

import json
import math

import pytest
import torch

from sightline.explainers._search import TRIALS, Trials, draws, search


class Runs:
    """Scores a rate by its distance to 1e-3, and counts the calls."""

    def __init__(self, stop=math.inf):
        self.rates, self.stop = [], stop

    def __call__(self, rate):
        if len(self.rates) == self.stop:
            raise KeyboardInterrupt
        self.rates.append(rate)
        return -abs(math.log10(rate) + 3)


def test_thirty_rates_are_drawn_log_uniformly_by_default():
    runs = Runs()
    state = torch.get_rng_state()
    found = search(runs)
    assert torch.equal(torch.get_rng_state(), state)
    assert list(found.rates) == runs.rates
    assert len(found.rates) == 30
    assert found.best == min(found.rates, key=lambda rate: abs(math.log10(rate) + 3))
    many = torch.tensor(draws(4000, 1e-5, 1e-1, 0)).log10()
    assert -5 <= many.min() < -4.99
    assert -1.01 < many.max() < -1
    for quarter in range(4):
        share = ((many >= quarter - 5) & (many < quarter - 4)).float().mean()
        assert abs(share - 0.25) < 0.03


def test_the_draws_depend_on_the_seed_and_not_on_their_number():
    assert draws(5, 1e-5, 1e-1, 3) == draws(9, 1e-5, 1e-1, 3)[:5]
    assert draws(5, 1e-5, 1e-1, 3) != draws(5, 1e-5, 1e-1, 4)
    assert draws(3, 0.25, 0.25, 0) == (0.25,) * 3


def test_an_interrupted_search_goes_on_where_it_stopped(tmp_path):
    whole = search(Runs(), trials=6, seed=2)
    with pytest.raises(KeyboardInterrupt):
        search(Runs(stop=4), trials=6, seed=2, out=tmp_path)
    rest = Runs()
    assert search(rest, trials=6, seed=2, out=tmp_path) == whole
    assert rest.rates == list(whole.rates[4:])
    again = Runs()
    assert search(again, trials=6, seed=2, out=tmp_path) == whole
    assert again.rates == []
    assert [path.name for path in tmp_path.iterdir()] == [TRIALS]


def test_the_number_of_trials_may_grow_and_shrink(tmp_path):
    search(Runs(), trials=3, out=tmp_path)
    more = Runs()
    assert search(more, trials=5, out=tmp_path) == search(Runs(), trials=5)
    assert len(more.rates) == 2
    assert search(Runs(stop=0), trials=2, out=tmp_path) == search(Runs(), trials=2)


def test_a_trial_that_diverges_comes_to_nothing_and_is_not_run_again(tmp_path):
    calls = []

    def run(rate):
        calls.append(rate)
        if len(calls) == 1:
            raise FloatingPointError
        return (-math.inf, math.nan, 0.5, 0.7, 0.7)[len(calls) - 2]

    found = search(run, trials=6, out=tmp_path)
    assert [math.isnan(score) for score in found.scores] == [True, True, True, False, False, False]
    assert found.best == found.rates[4]
    kept = json.loads((tmp_path / TRIALS).read_text())["trials"]
    assert [one["score"] for one in kept] == [None, None, None, 0.5, 0.7, 0.7]
    assert [one["lr"] for one in kept] == list(found.rates)
    assert search(run, trials=6, out=tmp_path).best == found.best
    assert len(calls) == 6


def test_what_does_not_fit_is_an_error(tmp_path):
    for wrong in ({"trials": 0}, {"low": 0.0}, {"low": 0.2}):
        with pytest.raises(ValueError, match="expected trials >= 1 and 0 < low <= high"):
            search(Runs(), **wrong)
    search(Runs(), trials=1, out=tmp_path)
    with pytest.raises(ValueError, match=r"belongs to a search with .*'seed': 0.*use another folder"):
        search(Runs(), trials=1, seed=1, out=tmp_path)
    for text in ("{", "[]", '{"settings": {}}', '{"settings": {}, "trials": [{"score": "x"}]}'):
        (tmp_path / TRIALS).write_text(text)
        with pytest.raises(ValueError, match="is no list of trials of ours"):
            search(Runs(), trials=1, out=tmp_path)
    with pytest.raises(ValueError, match=r"none of 2 trials gave a finite score; lower the rates"):
        _ = Trials((0.1, 0.2), (math.nan, math.nan)).best
    with pytest.raises(ValueError, match="one score a rate, got 1 for 2 rates"):
        Trials((0.1, 0.2), (0.5,))
