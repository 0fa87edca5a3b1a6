"Two gloo processes with a part of the batch each compute the loss and the gradients of one process with the whole batch."
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from nsnet.losses import nsnet_loss
from nsnet.model import NSNet

D, WORLD = 16, 2
# rows of each process in three steps of an epoch: full batches, then an uneven rest
EPOCHS = {"even": [(4, 4), (4, 4), (2, 2)], "uneven": [(4, 4), (5, 3), (2, 1)], "empty": [(4, 4), (4, 4), (3, 0)]}
LOSSES = {"supcon": dict(contrastive="supcon"), "as_released": dict(contrastive="as_released", align_reduction="sum", align_weight=.01)}


def make_net(projection="per_sample"):
    "A network with everything that learns: tower, mapper, head, classifier. No dropout, whose draws depend on the batch."
    torch.manual_seed(0)
    tower = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(27, D))
    return NSNet(D, projection=projection, dropout=0., head_hidden=12, head_out=8, tower=tower)


def make_batch(step, n):
    "Canvases, captions and labels of a step; 0 and 1 mixed so that both processes see both, or one."
    g = torch.Generator().manual_seed(step)
    return torch.randn(n, 3, 3, 3, generator=g), torch.randn(n, D, generator=g), torch.randint(2, (n,), generator=g)


def train(net, parts, options, rank=None):
    "Loss terms and gradients of each step of an epoch of SGD, with all rows (`rank` None) or those of one process."
    trace, opt = [], torch.optim.SGD(net.parameters(), lr=.01)
    for step, sizes in enumerate(parts):
        own = slice(None) if rank is None else slice(sum(sizes[:rank]), sum(sizes[:rank + 1]))
        x, v, y = (t[own] for t in make_batch(step, sum(sizes)))
        out = net(x, v)
        terms = nsnet_loss(out.f, out.logits, y, out.m, out.u, gather=rank is not None, **options)
        opt.zero_grad(); terms.total.backward(); opt.step()
        grads = {name.removeprefix("module."): p.grad.clone() for name, p in net.named_parameters()}
        trace.append((torch.stack([t.detach() for t in terms]), grads))
    return trace


def work(rank, folder):
    "One of the processes: every case in turn, its traces saved to a file."
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    traces = {(parts, loss): train(torch.nn.parallel.DistributedDataParallel(make_net()), EPOCHS[parts], LOSSES[loss], rank)
              for parts in EPOCHS for loss in LOSSES}
    torch.save(traces, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def traces(tmp_path_factory):
    "What each process saw, by rank."
    folder = tmp_path_factory.mktemp("gloo")
    mp.spawn(work, (folder,), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("parts", EPOCHS)
def test_two_processes_are_one(traces, parts, loss):
    whole = train(make_net(), EPOCHS[parts], LOSSES[loss])
    for rank in range(WORLD):
        for (terms, grads), (terms_here, grads_here) in zip(whole, traces[rank][parts, loss], strict=True):
            torch.testing.assert_close(terms_here, terms, rtol=1e-6, atol=1e-6)
            assert grads.keys() == grads_here.keys() and any(g.abs().max() > 1e-3 for g in grads.values())
            for name in grads: torch.testing.assert_close(grads_here[name], grads[name], rtol=1e-5, atol=1e-5, msg=name)


def test_without_gathering_they_are_not_one():
    "The comparison can fail: the mean of the two processes' own losses is another number."
    net, (x, v, y) = make_net(), make_batch(1, 8)
    def total(rows):
        out = net(x[rows], v[rows])
        return nsnet_loss(out.f, out.logits, y[rows], out.m, out.u).total
    assert abs((total(slice(0, 5)) + total(slice(5, 8))) / 2 - total(slice(None))) > 1e-2
