"""Properties of vector quantisation: gradients, moving averages, restarts, precision and processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from annealers.models.vector_quantizer import VectorQuantizer, perplexity

ROOT = Path(__file__).parents[1]


def quantizer_of(codebook, **options):
    """A quantiser in training mode with a codebook (K, D)."""
    quantizer = VectorQuantizer(*codebook.shape, **{"restart_threshold": 0.0, **options})
    quantizer.set_codebook(codebook)
    return quantizer


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def latents_of(vectors, width=None):
    """Vectors (N, D) as one latent image, (1, D, N / width, width), that is trained."""
    return vectors.mT.reshape(1, vectors.shape[1], -1, width or len(vectors)).requires_grad_()


# ---- the nearest code -----------------------------------------------------------------------------------------------


def test_each_latent_becomes_the_nearest_vector_of_the_codebook_bit_for_bit():
    codebook, z = normal(7, 3), normal(2, 3, 4, 5, seed=1)
    quantizer = quantizer_of(codebook)
    result = quantizer(z)
    for b, i, j in [(b, i, j) for b in range(2) for i in range(4) for j in range(5)]:
        nearest = min(range(7), key=lambda k: ((z[b, :, i, j] - codebook[k]) ** 2).sum())
        assert result.indices[b, i, j] == nearest
        assert torch.equal(result.quantized[b, :, i, j], codebook[nearest])
    assert torch.equal(quantizer.indices(z), result.indices)
    assert torch.equal(quantizer.lookup(result.indices), result.quantized)


def test_the_nearest_code_is_found_however_far_from_the_origin():
    """Where squares of the latents are a million times those of their distances."""
    codebook, z = 0.25 * normal(64, 8), 0.25 * normal(4, 8, 6, 6, seed=1)
    for offset in (0, 256):
        far, moved = codebook + offset, z + offset
        expected = torch.cdist(moved.movedim(1, -1).flatten(0, -2).double(), far.double()).argmin(dim=1)
        assert torch.equal(quantizer_of(far).indices(moved).flatten(), expected)
        assert expected.unique().numel() > 32


def test_the_gradient_passes_straight_through_and_does_not_reach_the_codebook():
    quantizer = quantizer_of(normal(5, 2), decay=None)
    z = normal(1, 2, 2, 2, seed=1).requires_grad_()
    jacobian = torch.autograd.functional.jacobian(lambda z: quantizer(z).quantized, z)
    assert torch.equal(jacobian.reshape(8, 8), torch.eye(8))
    quantizer(z).quantized.square().sum().backward()
    assert quantizer.embedding.weight.grad is None


def test_the_commitment_pulls_the_latents_alone_and_the_codebook_loss_the_codebook_alone():
    codebook = normal(5, 3, dtype=torch.float64)
    quantizer = quantizer_of(codebook, decay=None).double()
    quantizer.set_codebook(codebook)
    z = normal(4, 3, 2, 3, seed=1, dtype=torch.float64).requires_grad_()
    n, result, weight = 4 * 2 * 3, quantizer(z), quantizer.embedding.weight
    difference = z.detach() - codebook[result.indices].movedim(-1, 1)
    (for_z,) = torch.autograd.grad(result.commitment.mean(), z, retain_graph=True)
    torch.testing.assert_close(for_z, 2 * difference / n)
    assert not torch.autograd.grad(result.commitment.mean(), weight, retain_graph=True, allow_unused=True)[0]
    (for_e,) = torch.autograd.grad(result.codebook.mean(), weight, retain_graph=True)
    expected = torch.zeros_like(codebook)
    for k, d in zip(result.indices.flatten(), difference.movedim(1, -1).flatten(0, -2), strict=True):
        expected[k] -= 2 * d / n
    torch.testing.assert_close(for_e, expected)
    assert not torch.autograd.grad(result.codebook.mean(), z, allow_unused=True)[0]


def test_the_losses_are_averages_over_positions_of_sums_over_channels_for_each_image():
    codebook = torch.tensor([[0.0, 0.0], [10.0, 10.0]])
    z = torch.zeros(2, 2, 1, 2)
    z[0, :, 0, 0] = torch.tensor([3.0, 4.0])  # 25 away from the first code, its neighbour 0
    result = quantizer_of(codebook)(z)
    assert result.commitment.tolist() == result.codebook.tolist() == [12.5, 0.0]
    repeated = quantizer_of(codebook)(z.repeat(8, 1, 1, 1))
    assert torch.equal(repeated.commitment, result.commitment.repeat(8))


def test_a_moving_average_gives_the_codebook_no_gradient():
    quantizer = quantizer_of(normal(4, 2))
    assert not list(quantizer.parameters()) and "embedding.weight" in dict(quantizer.named_buffers())
    assert not quantizer(normal(1, 2, 2, 2).requires_grad_()).codebook.requires_grad


# ---- the moving average ---------------------------------------------------------------------------------------------


def test_codes_that_no_latent_chose_stay_what_they_are_bit_for_bit():
    codebook = normal(512, 8)
    quantizer = quantizer_of(codebook, decay=0.99)
    chosen = torch.tensor([3, 77, 500])
    for _ in range(50):
        quantizer(latents_of(codebook[chosen].repeat(20, 1) + 0.01 * normal(60, 8, seed=2)))
        quantizer.update()
    others = torch.ones(512, dtype=torch.bool).index_fill(0, chosen, False)
    assert torch.equal(quantizer.embedding.weight[others], codebook[others])
    assert not torch.isclose(quantizer.embedding.weight[chosen], codebook[chosen], atol=1e-5).all()
    assert quantizer.embedding.weight.isfinite().all()


def test_a_code_is_the_average_of_its_latents_weighted_by_their_age_and_of_its_start_as_one():
    gamma, start = 0.9, torch.tensor([[0.0, 0.0], [100.0, 100.0]])
    quantizer = quantizer_of(start, decay=gamma)
    batches = [normal(n, 2, seed=n) for n in (4, 1, 7)]
    for batch in batches:
        quantizer(latents_of(batch))
        quantizer.update()
    weights = torch.cat([torch.full((len(b),), (1 - gamma) * gamma ** (2 - t)) for t, b in enumerate(batches)])
    all_latents = torch.cat([start[:1], *batches])
    weights = torch.cat([torch.tensor([gamma**3]), weights])
    expected = (weights[:, None] * all_latents).sum(0) / weights.sum()
    torch.testing.assert_close(quantizer.embedding.weight[0], expected)
    torch.testing.assert_close(quantizer.counts, torch.tensor([weights.sum(), gamma**3]))


@pytest.mark.parametrize("threshold", [0.0, 0.8])
def test_a_step_of_several_batches_moves_the_codebook_as_one_batch_does(threshold):
    codebook, z, priority = normal(16, 3), normal(6, 3, 2, 2, seed=1), torch.rand(6, 2, 2)
    states = []
    for parts in ([6], [2, 4], [1, 1, 1, 3]):
        quantizer = quantizer_of(codebook, decay=0.7, restart_threshold=threshold)
        for latents, numbers in zip(z.split(parts), priority.split(parts), strict=True):
            quantizer(latents.clone().requires_grad_(), numbers)
        quantizer.update()
        states.append(quantizer.state_dict())
    for state in states[1:]:
        for name, value in states[0].items():
            torch.testing.assert_close(state[name], value)
    assert (states[0]["embedding.weight"] != codebook).any()


@pytest.mark.parametrize("case", ["evaluation", "frozen", "no gradients", "nothing seen", "by gradient"])
def test_without_training_nothing_moves(case):
    quantizer = quantizer_of(normal(8, 2), **({"decay": None} if case == "by gradient" else {}))
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    z = normal(1, 2, 4, 4, seed=1).requires_grad_(case != "frozen")
    if case == "evaluation":
        quantizer.eval()
    with torch.set_grad_enabled(case != "no gradients"):
        if case != "nothing seen":
            quantizer(z)
    quantizer.update()
    quantizer.update()
    assert all(torch.equal(value, before[name]) for name, value in quantizer.state_dict().items())


def test_a_step_is_counted_once():
    quantizer = quantizer_of(torch.tensor([[0.0], [9.0]]), decay=0.5)
    quantizer(latents_of(torch.ones(4, 1)))
    quantizer.update()
    once = quantizer.embedding.weight.clone()
    quantizer.update()  # nothing was seen since
    assert torch.equal(quantizer.embedding.weight, once)
    torch.testing.assert_close(quantizer.counts, torch.tensor([2.5, 0.5]))


# ---- restarts -------------------------------------------------------------------------------------------------------


def test_unused_codes_become_the_latents_of_highest_priority():
    tau = 0.2
    quantizer = quantizer_of(torch.tensor([[0.0], [50.0], [60.0], [70.0]]), decay=0.1, restart_threshold=tau)
    z, priority = torch.tensor([[1.0], [2.0], [3.0], [49.0]]), torch.tensor([[[0.1, 0.9, 0.5, 0.2]]])
    quantizer(latents_of(z), priority)
    quantizer.update()
    # N of the first is 0.1 + 0.9 * 3, of the second 0.1 + 0.9; the others were left with 0.1 < tau
    assert quantizer.embedding.weight[2:].flatten().tolist() == [2.0, 3.0]
    torch.testing.assert_close(quantizer.counts, torch.tensor([2.8, 1.0, 2 * tau, 2 * tau]))
    torch.testing.assert_close(quantizer.sums[2:], 2 * tau * torch.tensor([[2.0], [3.0]]))
    torch.testing.assert_close(quantizer.embedding.weight[:2, 0], torch.tensor([0.9 * 6 / 2.8, 0.1 * 50 + 0.9 * 49]))


def test_among_more_latents_than_codes_too_those_of_highest_priority_restart_codes():
    quantizer = quantizer_of(torch.tensor([[0.0], [500.0], [600.0]]), decay=0.1, restart_threshold=0.2)
    for share in torch.tensor([[6.0, 11.0, 3.0, 8.0, 1.0, 4.0], [5.0, 10.0, 2.0, 7.0, 0.0, 9.0]]):
        quantizer(latents_of(share[:, None]), share[None, None])
    quantizer.update()
    assert quantizer.embedding.weight[1:].flatten().tolist() == [11.0, 10.0]


def test_a_code_rests_as_long_as_its_count_is_not_below_the_threshold():
    quantizer = quantizer_of(torch.tensor([[0.0], [50.0]]), decay=0.5, restart_threshold=0.25)
    for unused in (0.5, 0.25):
        quantizer(latents_of(torch.ones(4, 1)))
        quantizer.update()
        assert quantizer.counts[1] == unused and quantizer.embedding.weight[1] == 50
    quantizer(latents_of(torch.ones(4, 1)))
    quantizer.update()
    assert quantizer.counts[1] == 0.5 and quantizer.embedding.weight[1] == 1


def test_fewer_latents_than_unused_codes_restart_as_many_as_they_are():
    quantizer = quantizer_of(torch.arange(6.0)[:, None] * 100, decay=0.1, restart_threshold=0.2)
    quantizer(latents_of(torch.tensor([[1.0], [2.0]])), torch.tensor([[[0.5, 0.6]]]))
    quantizer.update()
    assert quantizer.embedding.weight[1:].flatten().tolist() == [2.0, 1.0, 300.0, 400.0, 500.0]


def test_restarts_bring_all_codes_into_use_where_most_would_lie_idle():
    """A mixture of 32 normal laws and 64 codes that start on top of each other."""
    centres, generator = 4 * normal(32, 8), torch.Generator().manual_seed(3)
    used, errors = {}, {}
    for threshold in (0.0, 0.1):
        quantizer = quantizer_of(0.01 * normal(64, 8, seed=5), decay=0.9, restart_threshold=threshold)
        for _ in range(120):
            chosen = torch.randint(32, (256,), generator=generator)
            z = centres[chosen] + 0.3 * torch.randn(256, 8, generator=generator)
            result = quantizer(latents_of(z), torch.rand(1, 1, 256, generator=generator))
            quantizer.update()
        counts = torch.bincount(result.indices.flatten(), minlength=64)
        used[threshold], errors[threshold] = perplexity(counts).item(), result.commitment.item()
    assert used[0.1] > 40 and used[0.0] < 25
    assert errors[0.1] < 1.5 * 8 * 0.3**2 < errors[0.0] / 4  # 8 * 0.3^2 is the variance within a component


def test_which_latents_restart_codes_is_drawn_if_it_is_not_given():
    def restarted(seed):
        quantizer = quantizer_of(torch.tensor([[0.0], [50.0]]), decay=0.1, restart_threshold=0.2)
        torch.manual_seed(seed)
        quantizer(latents_of(torch.arange(20.0)[:, None]))
        quantizer.update()
        return quantizer.embedding.weight[1].item()

    assert restarted(0) == restarted(0) and len({restarted(seed) for seed in range(5)}) > 1


# ---- precision ------------------------------------------------------------------------------------------------------


def close_codes():
    """Codes and latents whose nearest code is another one if distances are computed in bfloat16."""
    codebook = 10 + 0.01 * normal(32, 4)
    return codebook, (10 + 0.01 * normal(64, 4, seed=1)).bfloat16()


def test_distances_are_in_single_precision_under_autocast_and_in_a_half_precision_model():
    codebook, z = close_codes()
    z = latents_of(z).detach()
    expected = quantizer_of(codebook)(z.float()).indices
    rounded = quantizer_of(codebook.bfloat16().float())(z.float()).indices
    assert (rounded != expected).any()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = quantizer_of(codebook)(z)
    assert torch.equal(result.indices, expected) and result.quantized.dtype == torch.bfloat16
    assert result.commitment.dtype == torch.float32
    for cast in (lambda q: q.bfloat16(), lambda q: q.half(), lambda q: q.to(torch.bfloat16)):
        assert torch.equal(cast(quantizer_of(codebook))(z).indices, expected)


@pytest.mark.parametrize("decay", [0.99, None])
def test_a_cast_to_half_precision_leaves_codebook_and_statistics_as_they_are(decay):
    quantizer = quantizer_of(normal(8, 3), decay=decay)
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    cast = torch.nn.Sequential(quantizer, torch.nn.Linear(2, 2)).half()
    assert cast[1].weight.dtype == torch.float16
    assert all(torch.equal(value, before[name]) for name, value in quantizer.state_dict().items())
    assert all(value.dtype == torch.float64 for value in quantizer.double().state_dict().values())
    assert [p.requires_grad for p in quantizer.parameters()] == ([True] if decay is None else [])


# ---- processes ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("codebooks")
    script = ROOT / "tests" / "support" / "codebook_processes.py"
    done = subprocess.run(
        [sys.executable, script, folder], env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return {path.stem: load_file(path) for path in folder.glob("*.safetensors")}


@pytest.mark.parametrize("broadcast", [False, True])
def test_two_processes_learn_the_codebook_of_one(trained, broadcast):
    one = trained["1-True-0"]
    for rank in (0, 1):
        for name, value in trained[f"2-{broadcast}-{rank}"].items():
            torch.testing.assert_close(value, one[name], atol=1e-5, rtol=1e-4)


def test_both_processes_have_the_same_codebook_bit_for_bit(trained):
    first, second = trained["2-False-0"], trained["2-False-1"]
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_codes_were_restarted_in_that_run(trained):
    """Halved three times, the counts of the others are eighths."""
    eighths = 8 * trained["1-True-0"]["quantize.counts"]
    assert ((eighths - eighths.round()).abs() > 0.1).any()


# ---- perplexity and refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counts", "expected"), [([5, 5, 5, 5], 4.0), ([9, 0, 0], 1.0), ([3, 3, 0, 0], 2.0), ([1, 3], 4 / 27**0.25)]
)
def test_perplexity_is_the_number_of_codes_that_would_be_used_evenly(counts, expected):
    assert perplexity(torch.tensor(counts)).item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_embeddings": 1}, "num_embeddings >= 2 and dim >= 1, got 1 and 4"),
        ({"dim": 0}, "got 8 and 0"),
        ({"decay": 1.0}, r"decay must lie in \[0, 1\), .* got 1.0"),
        ({"restart_threshold": -1.0}, "restart_threshold must not be negative, got -1.0"),
        ({"decay": None, "restart_threshold": 0.1}, "need restart_threshold=0, got 0.1"),
    ],
)
def test_an_option_out_of_range_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        VectorQuantizer(**{"num_embeddings": 8, "dim": 4, **options})


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        (torch.tensor([[[0, 8]]]), "codes lie in 0 .. 7, got 0 .. 8"),
        (torch.tensor([[[-1, 3]]]), "got -1 .. 3"),
        (torch.zeros(1, 2, 2), r"integers of shape \(B, h, w\), got torch.float32"),
        (torch.zeros(1, 2, 2, dtype=torch.bool), r"got torch.bool \(1, 2, 2\)"),
        (torch.zeros(4, dtype=torch.long), r"got torch.int64 \(4,\)"),
    ],
)
def test_what_are_no_codes_is_refused(indices, message):
    with pytest.raises(ValueError, match=message):
        quantizer_of(normal(8, 2)).lookup(indices)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_codes_can_be_kept_in_few_bits(dtype):
    quantizer, codes = quantizer_of(normal(8, 2)), torch.arange(8).view(2, 2, 2)
    assert torch.equal(quantizer.lookup(codes.to(dtype)), quantizer.lookup(codes))


@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (2, 4, 4), (2, 2)])
def test_latents_of_another_shape_are_refused(shape):
    for call in (quantizer_of(normal(8, 2)), quantizer_of(normal(8, 2)).indices):
        with pytest.raises(ValueError, match=r"latents must be \(B, 2, h, w\) to be quantised, got \(2, "):
            call(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(2, 2, 3), (2, 12), (24,)])
def test_priorities_that_are_not_one_for_each_latent_are_refused(shape):
    with pytest.raises(ValueError, match=r"restart_priority must be \(2, 3, 4\), got"):
        quantizer_of(normal(8, 2))(normal(2, 2, 3, 4), torch.zeros(shape))


def test_a_codebook_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"shape \(8, 2\), got \(8, 3\)"):
        quantizer_of(normal(8, 2)).set_codebook(normal(8, 3))
