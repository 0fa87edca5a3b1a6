"Least-squares erasure against the package that its authors wrote."
import pytest
import torch

from nsnet.nullspace import EmptyNullSpace, leace_projection, project_global, project_per_sample, project_span

concept_erasure = pytest.importorskip("concept_erasure", reason="concept-erasure is not installed: make test installs it")


def images_and_concepts(n=900, d=32, k=4, seed=0):
    "Images whose covariance is far from round, and k numbers that depend on them."
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=g, dtype=torch.float64)*torch.logspace(1, -1, d, dtype=torch.float64)
    U = torch.randn(n, d, generator=g, dtype=torch.float64) @ mix + 3
    Z = U[:, :8] @ torch.randn(8, k, generator=g, dtype=torch.float64) + torch.randn(n, k, generator=g, dtype=torch.float64)
    return U, Z


@pytest.mark.parametrize("seed", range(3))
def test_leace_is_that_of_concept_erasure(seed):
    "The same images are left, but for the constant that the head absorbs."
    U, Z = images_and_concepts(seed=seed)
    theirs = concept_erasure.LeaceEraser.fit(U, Z, shrinkage=False, constrain_cov_trace=False, svd_tol=1e-6)(U)
    ours = project_global(U, leace_projection(U, Z))
    assert torch.allclose(ours - ours.mean(0), theirs - theirs.mean(0), atol=1e-6)


def test_leace_leaves_nothing_linear_and_changes_little():
    U, Z = images_and_concepts()
    left = project_global(U, leace_projection(U, Z))
    design = torch.cat([left, torch.ones(len(left), 1, dtype=left.dtype)], 1)
    fitted = design @ torch.linalg.lstsq(design, Z).solution
    assert (fitted - Z.mean(0)).abs().max() < 1e-6                          # regression finds the mean and nothing else
    orthogonal = torch.linalg.qr((U - U.mean(0)).T @ (Z - Z.mean(0))).Q     # the directions of the covariance, at right angles
    other = U - U @ orthogonal @ orthogonal.T
    change = lambda x: ((x - x.mean(0)) - (U - U.mean(0))).square().sum()
    assert change(left) < change(other)                                     # the least change of all that erase


def test_leace_keeps_what_it_is_told_to():
    U, Z = images_and_concepts()
    assert torch.linalg.matrix_rank(leace_projection(U, Z)) == 28
    assert torch.linalg.matrix_rank(leace_projection(U, Z, null_rank=31)) == 31
    assert torch.linalg.matrix_rank(leace_projection(U, Z, energy=.5)) in (29, 30, 31)
    with pytest.raises(EmptyNullSpace): leace_projection(U, U)


def test_a_span_is_its_directions_one_after_the_other():
    "Removing orthogonal directions in turn removes their span."
    g = torch.Generator().manual_seed(0)
    u, M = torch.randn(50, 16, generator=g).double(), torch.linalg.qr(torch.randn(50, 16, 3, generator=g).double()).Q.mT
    step = u
    for i in range(3): step = project_per_sample(step, M[:, i])
    assert torch.allclose(project_span(u, M), step)
