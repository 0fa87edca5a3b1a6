"A stage of nbs/studies/make_mini that was interrupted goes on where it was, and ends with the same weights."
from functools import partial
from pathlib import Path

import nbformat
import pytest
import torch

NOTEBOOK = Path(__file__).resolve().parents[1]/"nbs/studies/make_mini.ipynb"


@pytest.fixture
def stage(tmp_path):
    "The notebook's imports and its training loop, with an empty cache."
    cells = [c.source for c in nbformat.read(NOTEBOOK, 4).cells if c.cell_type == "code"]
    names = dict(seed=0, cache=tmp_path)
    for needle in ("import open_clip", "def learn(", "def started("):
        [source] = [s for s in cells if needle in s]
        exec(source, names)
    return names


def trained(stage, cache, stop=None):
    "Weights and learning curve after 330 steps on made-up data; KeyboardInterrupt at step `stop`."
    cache.mkdir(exist_ok=True)
    stage["cache"], x = cache, torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    net = stage["started"](partial(torch.nn.Linear, 8, 1))
    steps = iter(range(1000))
    def loss(g):
        if next(steps) == stop: raise KeyboardInterrupt
        rows = x[torch.randint(64, (16,), generator=g)]
        return (net(rows)[:, 0] - rows.square().sum(1)).square().mean(), {}
    log = stage["learn"]("line", net, loss, 330, .01, [x])
    return net.state_dict(), log.drop(columns="seconds"), 1000 - len(list(steps))


def test_an_interrupted_stage_goes_on(stage, tmp_path):
    whole, curve, _ = trained(stage, tmp_path/"whole")
    with pytest.raises(KeyboardInterrupt): trained(stage, tmp_path/"cut", stop=250)
    again, same, steps = trained(stage, tmp_path/"cut")
    assert steps == 130                                       # from the 200 that were saved
    assert all(torch.equal(whole[k], again[k]) for k in whole) and same.equals(curve)
    assert trained(stage, tmp_path/"cut", stop=0)[1].equals(curve)      # kept: nothing is trained again
    assert not list((tmp_path/"cut").glob("*.part"))
