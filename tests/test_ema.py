"""The EMA against its closed form, on modules whose weights are set by hand."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from annealers.ema import EMA


class Tied(nn.Module):
    """Two names for one parameter, a floating-point, an integer and a non-persistent buffer."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(3, 3)
        self.decoder = nn.Linear(3, 3)
        self.decoder.weight = self.encoder.weight
        self.register_buffer("codebook", torch.randn(4, 3))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("table", torch.arange(3.0), persistent=False)


def scalar_module(value=0.0, dtype=torch.float64):
    module = nn.Module()
    module.weight = nn.Parameter(torch.tensor([value], dtype=dtype))
    return module


def set_weights(module, value):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(value)


def randomise(module, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in [*module.parameters(), *module.buffers()]:
            tensor.copy_(100 * torch.rand(tensor.shape, generator=generator))


def state_of(module):
    return {name: tensor.clone() for name, tensor in [*module.named_parameters(), *module.named_buffers()]}


def averages(ema):
    return ema.state_dict()["tensors"]


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_under_constant_weights_the_distance_shrinks_by_the_decay_each_update():
    module = scalar_module(5.0)
    ema = EMA(module, decay=0.9, warmup=False)
    set_weights(module, 2.0)
    for n in range(1, 30):
        ema.update()
        assert averages(ema)["weight"].item() == pytest.approx(2.0 + 3.0 * 0.9**n, rel=1e-12)


def test_under_linear_weights_the_average_lags_by_decay_over_one_minus_decay():
    """For theta_n = n and shadow_0 = 0 the recursion gives shadow_n = n - lag + lag d^n with lag = d / (1 - d)."""
    module, decay = scalar_module(0.0), 0.8
    ema = EMA(module, decay=decay, warmup=False)
    lag = decay / (1 - decay)
    for n in range(1, 40):
        set_weights(module, float(n))
        ema.update()
        assert averages(ema)["weight"].item() == pytest.approx(n - lag + lag * decay**n, rel=1e-12)


def test_warm_up_forgets_the_initial_weights_as_the_product_of_its_decays():
    """prod_{k=1..n} (1 + k) / (10 + k) = (n + 1)! 10! / (n + 10)! while the decay's cap is not reached."""
    module = scalar_module(1.0)
    ema = EMA(module, decay=0.9999)
    set_weights(module, 0.0)
    remaining = 1.0
    for n in range(1, 200):
        ema.update()
        remaining *= (1 + n) / (10 + n)
        assert averages(ema)["weight"].item() == pytest.approx(remaining, rel=1e-10)
    falling = torch.lgamma(torch.tensor([201.0, 11.0, 210.0], dtype=torch.float64))
    assert remaining == pytest.approx((falling[0] + falling[1] - falling[2]).exp().item(), rel=1e-9)


def test_warm_up_ends_where_it_reaches_the_decay():
    ema = EMA(scalar_module(), decay=0.99)
    values = [ema.decay(n) for n in range(1, 2000)]
    assert values[0] == 2 / 11 and values == sorted(values) and values[-1] == 0.99
    assert next(n for n, d in enumerate(values, start=1) if d == 0.99) == 890  # (1 + n) / (10 + n) = 0.99
    assert EMA(scalar_module(), decay=0.99, warmup=False).decay(1) == 0.99


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights_are_averaged_in_float32(dtype):
    module = scalar_module(1.0, dtype)
    ema = EMA(module, decay=0.999, warmup=False)
    set_weights(module, 0.0)
    for _ in range(100):
        ema.update()
    average = averages(ema)["weight"]
    assert average.dtype == torch.float32  # in bfloat16 a step of 1e-3 from 1 rounds to nothing
    assert average.item() == pytest.approx(0.999**100, rel=1e-5)


def test_parameters_of_several_dtypes_are_averaged_together():
    module = nn.Module()
    for name, dtype in (("a", torch.bfloat16), ("b", torch.float32), ("c", torch.float64)):
        module.register_parameter(name, nn.Parameter(torch.ones(2, dtype=dtype)))
    ema = EMA(module, decay=0.5, warmup=False)
    set_weights(module, 3.0)
    ema.update()
    assert all((average == 2.0).all() for average in averages(ema).values())
    with ema.swapped_in():
        assert [p.dtype for p in module.parameters()] == [torch.bfloat16, torch.float32, torch.float64]
        assert all((p == 2.0).all() for p in module.parameters())


def test_buffers_are_the_latest_ones_and_not_averages():
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    ema = EMA(module, decay=0.9, warmup=False)
    for seed in range(4):
        module(torch.randn(16, 3, generator=torch.Generator().manual_seed(seed)))
        ema.update()
    saved = averages(ema)
    assert saved["1.num_batches_tracked"] == 4 and saved["1.num_batches_tracked"].dtype == torch.int64
    for name in ("1.running_mean", "1.running_var"):
        assert torch.equal(saved[name], module.state_dict()[name])
    module(torch.randn(16, 3))
    assert averages(ema)["1.num_batches_tracked"] == 4  # a copy, not a view of the module


def test_a_buffer_that_the_module_replaces_is_followed():
    module = Tied()
    ema = EMA(module)
    module.codebook = torch.full((4, 3), 7.0)
    ema.update()
    assert (averages(ema)["codebook"] == 7.0).all()
    with ema.swapped_in():
        module.codebook = torch.zeros(4, 3)
    assert (module.codebook == 7.0).all()


def test_tied_parameters_are_averaged_once():
    module = Tied()
    ema = EMA(module, decay=0.5, warmup=False)
    set_weights(module, 1.0)
    start = averages(ema)["encoder.weight"]
    ema.update()
    assert "decoder.weight" not in averages(ema)
    torch.testing.assert_close(averages(ema)["encoder.weight"], (start + 1.0) / 2)


def test_the_average_does_not_follow_the_weights_between_updates():
    module = Tied()
    ema = EMA(module)
    before = averages(ema)
    randomise(module, 1)
    assert_same(averages(ema), before)


def test_swapping_in_shows_the_averages_and_restores_every_bit():
    module = Tied()
    ema = EMA(module, decay=0.7, warmup=False)
    randomise(module, 1)
    ema.update()
    randomise(module, 2)
    live, pointers = state_of(module), [p.data_ptr() for p in module.parameters()]
    with ema.swapped_in() as swapped:
        assert swapped is module and module.decoder.weight is module.encoder.weight
        assert_same(state_of(module), averages(ema))
        randomise(module, 3)  # whatever happens inside, such as BatchNorm in train mode
    assert_same(state_of(module), live)
    assert [p.data_ptr() for p in module.parameters()] == pointers
    assert all(p.requires_grad and p.is_leaf for p in module.parameters())


def test_an_exception_inside_the_swap_restores_every_bit_too():
    module = Tied()
    ema = EMA(module)
    randomise(module, 1)
    live, average = state_of(module), averages(ema)
    with pytest.raises(KeyError, match="inside"), ema.swapped_in():
        raise KeyError("inside")
    assert_same(state_of(module), live)
    assert_same(averages(ema), average)


def test_gradients_flow_inside_the_swap():
    module = scalar_module(1.0)
    with EMA(module).swapped_in():
        module.weight.square().sum().backward()
    assert module.weight.grad.item() == 2.0


@pytest.mark.parametrize("warmup", [True, False])
def test_a_saved_average_continues_bit_for_bit(warmup, tmp_path):
    def run(ema, seeds):
        for seed in seeds:
            randomise(ema.module, seed)
            ema.update()

    torch.manual_seed(0)
    straight = EMA(Tied(), decay=0.99, warmup=warmup)
    run(straight, range(10))

    torch.manual_seed(0)
    first = EMA(Tied(), decay=0.99, warmup=warmup)
    run(first, range(5))
    state = first.state_dict()
    save_file(state["tensors"], tmp_path / "ema.safetensors")
    run(first, range(90, 95))  # the saved copy must not move with it

    second = EMA(Tied(), decay=0.99, warmup=warmup)
    second.load_state_dict({"updates": state["updates"], "tensors": load_file(tmp_path / "ema.safetensors")})
    run(second, range(5, 10))
    assert second.updates == straight.updates == 10
    assert_same(averages(second), averages(straight))


def test_loading_does_not_touch_the_live_module():
    ema, module = EMA(Tied()), Tied()
    other = EMA(module)
    live = state_of(module)
    other.load_state_dict(ema.state_dict())
    assert_same(state_of(module), live)
    assert_same(averages(other), averages(ema))


def test_channels_last_weights_can_be_saved(tmp_path):
    module = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    ema = EMA(module)
    save_file(averages(ema), tmp_path / "ema.safetensors")
    assert torch.equal(load_file(tmp_path / "ema.safetensors")["weight"], module.weight)


def test_names_are_those_of_the_bare_module_when_it_is_compiled():
    module = nn.Linear(3, 3)
    assert averages(EMA(torch.compile(module, backend="eager"))).keys() == {"weight", "bias"}


def test_a_state_of_another_module_is_refused():
    state = EMA(nn.Linear(3, 3)).state_dict()
    with pytest.raises(ValueError, match="weight has shape"):
        EMA(nn.Linear(4, 3)).load_state_dict(state)
    with pytest.raises(ValueError, match="bias has shape .* in the state and none in the module"):
        EMA(nn.Linear(3, 3, bias=False)).load_state_dict(state)


@pytest.mark.parametrize("decay", [-0.1, 1.0, 1.5])
def test_a_decay_out_of_range_is_refused(decay):
    with pytest.raises(ValueError, match=f"decay={decay}"):
        EMA(scalar_module(), decay=decay)


def test_a_parameter_kept_elsewhere_is_refused():
    module = nn.Module()
    module.weight = nn.Parameter(torch.empty(0))
    with pytest.raises(ValueError, match="weight"):
        EMA(module)
