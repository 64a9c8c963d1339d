"""The GPU's selective scan without a GPU: its kernels and its host code, run by a C++ compiler."""

import ctypes

import emulated_cuda
import pytest
import torch
from emulated_cuda import apart

from bmojo_core.ops import _nvrtc
from bmojo_core.ops.selective_scan import gpu
from bmojo_core.ops.selective_scan.gpu import Tiling, selective_scan_gpu
from bmojo_core.ops.selective_scan.reference import selective_scan_reference

pytestmark = pytest.mark.skipif(
    emulated_cuda.COMPILER is None, reason="no C++ compiler to run the kernels with"
)
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
TOLERANCE = {F32: 1e-5, BF16: 5e-3, F16: 5e-3}
OPTIONAL = ("D", "z", "delta_bias", "initial_state")
TIMED = ("u", "delta", "z", "B", "C")
ODD, EVEN = 67, 72  # channels: two blocks, element by element; the same, 16 bytes at a time


@pytest.fixture(scope="module", autouse=True)
def on_cpu():
    """A small chip whose kernels are those of `emulated_cuda`, and memory that starts as NaN."""
    with emulated_cuda.small_chip(gpu) as patch:
        patch.setattr(
            gpu._Call, "empty",
            lambda _, *shape, dtype=F32: emulated_cuda.poisoned(*shape, dtype=dtype),
        )  # fmt: skip
        yield


def force(monkeypatch, forward, backward=None):
    """One cut for every call, or one for each pass, whatever the sizes."""
    cuts = (forward, backward or forward)
    monkeypatch.setattr(gpu, "tiling", lambda *_, backward=False, **__: cuts[backward])


def compare(inputs, softplus=True, tolerance=None, through=(0, 1)):
    """Output, last state and every gradient, through one or both, against float64."""
    tolerance = tolerance or TOLERANCE[inputs["u"].dtype]
    given = {n: x for n, x in inputs.items() if x is not None}
    leaves = {n: x.detach().requires_grad_() for n, x in given.items()}
    wide = {n: x.detach().double().requires_grad_() for n, x in given.items()}
    absent = dict.fromkeys(OPTIONAL)
    got = selective_scan_gpu(**absent | leaves, delta_softplus=softplus)
    want = selective_scan_reference(**absent | wide, delta_softplus=softplus)
    assert got[0].dtype == inputs["u"].dtype and got[1].dtype == F32
    assert apart(got[0], want[0]) < tolerance, "output"
    assert apart(got[1], want[1]) < tolerance, "last state"
    weights = [torch.randn(x.shape).to(x.dtype) for x in got]
    gradients, expected = (
        torch.autograd.grad(
            [outputs[i] for i in through], list(tensors.values()),
            [weights[i].to(outputs[i].dtype) for i in through],
            allow_unused=True, materialize_grads=True,
        ) for outputs, tensors in ((got, leaves), (want, wide))
    )  # fmt: skip
    for name, a, b in zip(leaves, gradients, expected, strict=True):
        assert a.dtype == leaves[name].dtype and a.shape == b.shape
        assert apart(a, b) < tolerance, name


def problem(b, l, d, n, dtype=F32, *, delta=None, BC=None, without=()):
    torch.manual_seed(l + d + n)
    inputs = dict(
        u=torch.randn(b, l, d).to(dtype), delta=torch.randn(b, l, d).to(delta or dtype),
        A=-torch.exp(0.5 * torch.randn(d, n)),
        B=torch.randn(b, l, n).to(BC or dtype), C=torch.randn(b, l, n).to(BC or dtype),
        D=torch.randn(d), z=torch.randn(b, l, d).to(dtype), delta_bias=torch.randn(d) - 2,
        initial_state=torch.randn(b, d, n),
    )  # fmt: skip
    return inputs | dict.fromkeys(without)


@pytest.mark.parametrize(("d", "dtype"), [(ODD, F32), (EVEN, F32), (ODD, BF16), (EVEN, BF16)])
def test_any_length(d, dtype):
    """A step, a chunk less one, a chunk, one more, and many with a ragged end."""
    for l in (1, 31, 32, 33, 70, 300):
        compare(problem(2 if l < 100 else 1, l, d, 16, dtype))


def test_half_precision():
    compare(problem(2, 70, EVEN, 16, F16))


@pytest.mark.parametrize(("d", "dtype"), [(1, F32), (7, F32), (64, F32), (64, BF16), (200, BF16)])
def test_any_width(d, dtype):
    compare(problem(2, 40, d, 16, dtype))


@pytest.mark.parametrize(
    ("n", "d", "dtype"),
    [
        (1, 5, F32), (3, 5, F32), (8, 13, F32), (20, 40, BF16), (32, 40, BF16), (64, 13, F32),
        (128, 13, F32),
    ],
)  # fmt: skip
def test_any_number_of_states(n, d, dtype):
    """From all states of a channel in one thread to a warp for two channels."""
    compare(problem(2, 70, d, n, dtype))


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("segments", [1, 2, 3])
@pytest.mark.parametrize(("states", "lanes_n"), [(4, 4), (2, 8)])
def test_every_cut_computes_the_same(monkeypatch, states, lanes_n, segments, dtype):
    """Segments of equal and of unequal length, the last with a ragged end."""
    force(monkeypatch, Tiling(states, lanes_n, segments))
    for l in (70, 300):
        compare(problem(1, l, 40, 16, dtype))


@pytest.mark.parametrize("chip", [1, 2, 132])
def test_cuts_for_small_and_large_chips(monkeypatch, chip):
    """One block is enough; forward two states a thread, backward two segments; segments."""
    monkeypatch.setattr(gpu, "_multiprocessors", lambda _: chip)
    compare(problem(2, 530, 40, 16, F32))


@pytest.mark.parametrize(
    ("without", "softplus", "segments", "types"),
    [
        (OPTIONAL, False, 1, {}),
        (("D", "delta_bias", "initial_state"), False, 2, {}),
        (("z", "initial_state"), True, 3, dict(delta=BF16, BC=BF16)),
    ],
)
def test_without_optional_inputs(monkeypatch, without, softplus, segments, types):
    force(monkeypatch, Tiling(4, 4, segments))
    inputs = problem(2, 70, EVEN, 16, without=without, **types)
    inputs["delta"] = inputs["delta"].abs() / 2  # a step that is not positive lets states grow
    compare(inputs, softplus, TOLERANCE[BF16] if types else None)


def test_a_half_precision_input_beside_float32():
    """The parts of dB and dC, and the checkpoints, are float32 unless u, B and C are halves."""
    compare(problem(2, 70, EVEN, 16, BF16, delta=F32, BC=F32))


@pytest.mark.parametrize("shift", [0, 1])
def test_views_of_wider_tensors(shift):
    """Rows that lie apart; shifted by one element they cannot be moved 16 bytes at a time."""
    inputs = problem(2, 70, EVEN, 16, BF16)
    names = ("u", "z", "B", "C")
    rows = torch.randn(2, 70, 2 * EVEN + 32 + 8).bfloat16()[..., shift:]
    inputs |= zip(names, rows.split((EVEN, EVEN, 16, 16, 8 - shift), dim=-1))
    inputs["delta"] = inputs["delta"].transpose(1, 2).contiguous().transpose(1, 2)
    assert not any(inputs[name].is_contiguous() for name in (*names, "delta"))
    compare(inputs)


@pytest.mark.parametrize("through", [(0,), (1,)])
@pytest.mark.parametrize("segments", [1, 2])
def test_gradients_through_one_of_the_outputs(monkeypatch, through, segments):
    force(monkeypatch, Tiling(4, 4, segments))
    compare(problem(2, 70, ODD, 16), through=through)


def test_without_gradients_the_outputs_are_the_same():
    inputs = problem(2, 70, EVEN, 16)
    alone = selective_scan_gpu(**inputs, delta_softplus=True)
    inputs["A"].requires_grad_()
    for a, b in zip(alone, selective_scan_gpu(**inputs, delta_softplus=True), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_small_steps_keep_their_digits(dtype):
    """softplus(x) is e^x there; 1 + e^x would round it away. The same for its slope."""
    inputs = problem(1, 1, 256, 16, dtype)
    inputs = {n: torch.zeros_like(x) if n in OPTIONAL else x.sign() for n, x in inputs.items()}
    inputs |= {n: inputs[n].abs() for n in ("u", "B")}
    inputs["delta"] = torch.linspace(-17, -2, 256).to(dtype).expand(1, 1, -1).requires_grad_()
    state = selective_scan_gpu(**inputs, delta_softplus=True)[1][..., 0]
    wide = inputs["delta"].detach().double()
    want = torch.nn.functional.softplus(wide)[0]
    assert ((state.double() - want).abs() < 1e-4 * want).all()
    slope = torch.autograd.grad(state.sum(), inputs["delta"])[0].double()
    rounding = {F32: 1e-4, BF16: 2**-8, F16: 2**-10}[dtype] * wide.sigmoid()
    if dtype == F16:
        rounding += 2**-25  # half its smallest number
    assert ((slope - wide.sigmoid()).abs() <= rounding).all()


def test_zero_steps_hold_the_state_exactly():
    """A padded sequence ends in the state it had: no rounding, no decay."""
    inputs = problem(2, 70, EVEN, 16, without=("delta_bias",))
    inputs["delta"] = inputs["delta"].abs()
    inputs["delta"][:, 45:] = 0
    short = {n: x[:, :45] if n in TIMED else x for n, x in inputs.items()}
    assert torch.equal(selective_scan_gpu(**inputs)[1], selective_scan_gpu(**short)[1])


def test_continues_from_a_carried_state():
    inputs = problem(2, 70, EVEN, 16)
    whole, last = selective_scan_gpu(**inputs, delta_softplus=True)
    head, tail = (
        {n: x[:, part] if n in TIMED else x for n, x in inputs.items()}
        for part in (slice(37), slice(37, None))
    )
    first, state = selective_scan_gpu(**head, delta_softplus=True)
    second, end = selective_scan_gpu(**tail | dict(initial_state=state), delta_softplus=True)
    assert apart(torch.cat([first, second], 1), whole.double()) < 1e-6
    assert apart(end, last.double()) < 1e-6


WAITING = """
struct Params { float* out; };
extern "C" __global__ void some_leave(const Params p) {
  if (threadIdx.x >= 40) return;
  __syncthreads();
  p.out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, static_cast<float>(threadIdx.x), 1);
}
extern "C" __global__ void some_stay(const Params p) {
  if (threadIdx.x == 0) __syncthreads();
  p.out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1.f, 1);
}
"""


def test_threads_that_leave_keep_nobody_waiting_and_those_that_stay_do():
    """Of the emulator itself: a kernel that would hang a GPU fails here, and no other does."""

    class Params(ctypes.Structure):
        _fields_ = (("out", ctypes.c_void_p),)

    module = emulated_cuda.load(_nvrtc.read_source("_intrinsics.cu") + WAITING, (), None)
    out = emulated_cuda.poisoned(64, dtype=F32)
    module.launch("some_leave", (1, 1, 1), 64, 0, Params(out.data_ptr()))
    assert torch.equal(out[:40], torch.arange(40.0).reshape(20, 2).flip(1).flatten())
    assert out[40:].isnan().all()
    with pytest.raises(AssertionError, match="waits for ever"):
        module.launch("some_stay", (1, 1, 1), 64, 0, Params(out.data_ptr()))
