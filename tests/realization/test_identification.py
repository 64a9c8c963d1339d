"""N4SID, MOESP, CVA: exact on exact data, consistent on noisy data, honest on impossible data."""

from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from random_models import random_A, random_realization, seeds
from random_systems import random_system

from realization import (
    StateSpace,
    cva,
    estimate_order,
    innovation_form,
    innovations_model,
    kalman_filter,
    moesp,
    n4sid,
    whiteness_test,
)
from realization.identification import fit_inputs, stabilized
from realization.subspace import compress, hankel_gram, select_order

METHODS = pytest.mark.parametrize("method", [n4sid, moesp, cva])
DAISY = Path(__file__).resolve().parents[3] / "shared" / "data" / "daisy"


def markov_error(found: StateSpace, true: StateSpace, k: int = 40) -> float:
    difference = found.markov(k) - true.markov(k)
    return float(np.linalg.norm(difference) / np.linalg.norm(true.markov(k)))


# --- deterministic --------------------------------------------------------------------------------


@METHODS
@settings(max_examples=15)
@given(
    seed=seeds,
    n=st.integers(1, 12),
    p=st.integers(1, 4),
    m=st.integers(1, 4),
    radius=st.sampled_from([0.5, 0.9, 0.999]),
    repeated=st.booleans(),
)
def test_data_without_noise_give_the_system_back(method, seed, n, p, m, radius, repeated):
    base = random_realization(seed, n, p, m, radius, repeated)
    system = StateSpace(base.A, base.B, base.C, base.D)
    i = -(-n // p) + 2
    rng = np.random.default_rng(seed)
    u, x0 = rng.standard_normal((max(300, 8 * i * (m + p)), m)), rng.standard_normal(n)
    y = system.simulate(u, x0)
    hankel = scipy.linalg.hankel(np.arange(i), np.arange(i - 1, 2 * i - 1))
    H = system.markov(2 * i)[1:][hankel].transpose(0, 2, 1, 3).reshape(i * p, i * m)
    values = np.linalg.svd(H, compute_uv=False)
    assume(len(values) >= n and values[n - 1] > 1e-4 * values[0])  # of order n to working precision
    model = method(y, u, order=n, block_rows=i)
    assert markov_error(model.deterministic, system) < 1e-5
    assert np.abs(model.deterministic.simulate(u, model.x0) - y).max() < 1e-5 * np.abs(y).max()
    assert np.sqrt(np.diag(model.Lambda)).max() < 1e-5 * np.abs(y).max()


def test_order_of_exact_data_is_found():
    base = random_realization(5, n=5, p=2, m=2)
    u = np.random.default_rng(0).standard_normal((600, 2))
    y = StateSpace(base.A, base.B, base.C, base.D).simulate(u)
    order, correlations = estimate_order(y, u, block_rows=8)
    assert order == 5
    assert np.allclose(correlations[:5], 1)
    assert np.abs(correlations[5:]).max() < 1e-3
    assert n4sid(y, u, block_rows=8).n == 5


# --- combined and stochastic ----------------------------------------------------------------------


@METHODS
def test_noisy_data_the_error_falls_like_one_over_root_t(method):
    base = random_realization(11, n=4, p=2, m=2, radius=0.85)
    system = StateSpace(base.A, base.B, base.C, base.D)
    true = innovation_form(base)
    u = np.random.default_rng(0).standard_normal((64_000, 2))
    y = base.simulate(64_000, 3, u)
    errors, noise_errors = [], []
    for T in (1000, 64_000):
        model = method(y[:T], u[:T], order=4, block_rows=10)
        errors.append(markov_error(model.deterministic, system))
        scaled = [M.stochastic.markov(20) for M in (model, true)]
        noise_errors.append(np.linalg.norm(scaled[0] - scaled[1]) / np.linalg.norm(scaled[1]))
    assert errors[1] < 0.25 * errors[0]
    assert errors[1] < 0.02
    assert noise_errors[1] < 0.05
    assert np.allclose(model.Lambda, true.Lambda, rtol=0.05, atol=0.02 * np.abs(true.Lambda).max())


@METHODS
def test_a_process_driven_by_noise_alone(method):
    true = innovation_form(random_realization(21, n=3, p=2, radius=0.9))
    y = true.simulate(60_000, 4)
    model = method(y, order=3, block_rows=10)
    assert model.B is None
    assert model.D is None
    error = model.stochastic.markov(20) - true.stochastic.markov(20)
    assert np.linalg.norm(error) < 0.05 * np.linalg.norm(true.stochastic.markov(20))
    assert np.allclose(model.Lambda, true.Lambda, rtol=0.03, atol=0.03 * np.abs(true.Lambda).max())
    # The innovations it leaves on a new record are white.
    assert whiteness_test(kalman_filter(model, true.simulate(3000, 5)).innovations).is_white()
    assert abs(estimate_order(y, block_rows=10)[0] - 3) <= 1


@METHODS
def test_units_of_the_outputs_do_not_matter(method):
    base = random_realization(8, n=3, p=2, m=1)
    u = np.random.default_rng(1).standard_normal((800, 1))
    y, units = base.simulate(800, 2, u), np.array([1e6, 1e-4])
    one, other = (method(data, u, order=3, block_rows=8) for data in (y, y * units))
    assert np.allclose(
        other.deterministic.markov(10),
        one.deterministic.markov(10) * units[:, None],
        rtol=1e-6,
        atol=1e-9 * np.abs(units * y).max(),
    )
    assert np.allclose(other.Lambda, one.Lambda * np.outer(units, units), rtol=1e-6)


def test_b_d_and_x0_minimize_the_prediction_error():
    base = random_realization(6, n=3, p=2, m=2)
    u = np.random.default_rng(2).standard_normal((400, 2))
    y = base.simulate(400, 3, u)
    true = innovation_form(base)
    B, D, x0, _ = fit_inputs(true.A, true.K, true.C, true.Lambda, y, u)
    W = np.linalg.inv(np.linalg.cholesky(true.Lambda))

    def errors(B, D, x0):
        model = StateSpace(true.A - true.K @ true.C, np.hstack([B - true.K @ D, true.K]), true.C)
        yhat = model.simulate(np.hstack([u, y]), x0) + u @ D.T
        return ((y - yhat) @ W.T).ravel()

    best = errors(B, D, x0)
    # Orthogonality: no direction of (B, D, x0) is correlated with the remaining error.
    for k, theta in enumerate((B, D, x0)):
        for index in np.ndindex(theta.shape):
            moved = [B.copy(), D.copy(), x0.copy()]
            moved[k][index] += 1.0
            slope = errors(*moved) - best
            assert abs(slope @ best) < 1e-8 * np.linalg.norm(slope) * np.linalg.norm(best)


def test_compression_by_structure_equals_orthogonal_triangularization():
    rng = np.random.default_rng(3)
    y, u = rng.standard_normal((500, 2)), rng.standard_normal((500, 1))
    data = compress(y, u, 4)
    H = np.array([np.r_[np.hstack([u, y])[t : t + 8].ravel()] for t in range(493)])
    assert np.allclose(hankel_gram(np.hstack([u, y]), 8), H.T @ H)
    assert np.allclose(np.tril(data.L), data.L)
    order = [3 * k for k in range(4, 8)] + [3 * k for k in range(4)]
    order += [3 * k + c for k in range(4) for c in (1, 2)]
    order += [3 * k + c for k in range(4, 8) for c in (1, 2)]
    R = np.linalg.qr(H[:, order] / np.sqrt(493), mode="r")
    assert np.allclose(data.L @ data.L.T, R.T @ R, atol=1e-12)
    # Singular data (no noise) take the orthogonal route and keep their exact rank.
    exact = StateSpace(*(np.array(M) for M in ([[0.5]], [[1.0]], [[1.0]], [[0.0]]))).simulate(u)
    values = np.linalg.svd(compress(exact, u, 4).L32, compute_uv=False)
    assert values[1] < 1e-12 * values[0]


@settings(max_examples=15)
@given(seed=seeds, n=st.integers(1, 6), p=st.integers(1, 3), radius=st.floats(0.3, 0.9))
def test_cva_is_as_likely_as_the_system_that_made_the_data(seed, n, p, radius):
    """CVA is asymptotically maximum likelihood, which the truth cannot beat by more than chance."""
    rng = np.random.default_rng(seed)
    A, C, K = random_A(rng, n, radius), rng.standard_normal((p, n)), rng.standard_normal((n, p))
    P = scipy.linalg.solve_discrete_lyapunov(A, K @ K.T)  # A - K C need not be stable here
    true = innovations_model(A, C, A @ P @ C.T + K, C @ P @ C.T + np.eye(p))
    assume(np.abs(np.linalg.eigvals(true.A - true.K @ true.C)).max() < 0.8)  # forgets in 20 steps
    y = StateSpace(A, K, C, np.eye(p)).simulate(rng.standard_normal((4000, p)))
    found = cva(y, order=n, block_rows=20)
    excess = kalman_filter(true, y).loglik - kalman_filter(found, y).loglik
    assert excess < 0.01 * len(y)  # nats a sample


# --- order, stability, excitation -----------------------------------------------------------------


def test_order_selection_finds_strong_states_and_ignores_noise():
    base = random_realization(11, n=4, p=2, m=1, radius=0.85)
    u = np.random.default_rng(5).standard_normal((4000, 1))
    y = base.simulate(4000, 6, u)
    assert estimate_order(y, u, block_rows=10)[0] == 4
    assert cva(y, u, block_rows=10).n == 4
    assert select_order(np.array([0.9, 0.5, 0.01, 0.005]), 1000, 1) == 2
    white = np.random.default_rng(7).standard_normal((2000, 1))
    assert estimate_order(white)[0] == 1  # the smallest order there is


@METHODS
def test_stability_is_enforced_on_request_only(method):
    rng = np.random.default_rng(0)
    u = rng.standard_normal((300, 1))
    trend = StateSpace(*(np.array(M) for M in ([[1.01]], [[1.0]], [[1.0]], [[0.0]])))
    y = trend.simulate(u) + 0.1 * rng.standard_normal((300, 1))
    free = method(y, u, order=1, block_rows=5)
    assert abs(free.A[0, 0] - 1.01) < 1e-3
    forced = method(y, u, order=1, block_rows=5, stable=True)
    assert forced.A[0, 0] == pytest.approx(0.999)
    for model in (free, forced):
        assert np.abs(np.linalg.eigvals(model.A - model.K @ model.C)).max() < 1


def test_stabilized_moves_only_the_eigenvalues_that_must_move():
    rng = np.random.default_rng(1)
    T = rng.standard_normal((5, 5))
    rotation = 1.2 * np.array([[0.6, 0.8], [-0.8, 0.6]])
    A = T @ scipy.linalg.block_diag([[0.5]], rotation, [[-1.5]], [[0.3]]) @ np.linalg.inv(T)
    values = np.sort_complex(np.linalg.eigvals(stabilized(A, 0.9)))
    expected = np.sort_complex([0.5, 0.3, -0.9, 0.9 * (0.6 + 0.8j), 0.9 * (0.6 - 0.8j)])
    assert np.allclose(values, expected)
    stable = stabilized(A, 0.9)
    assert np.allclose(stabilized(stable), stable)


def test_the_first_state_is_estimated():
    base = random_realization(4, n=3, p=1, m=1, radius=0.98)
    u = np.random.default_rng(0).standard_normal((400, 1))
    y = base.simulate(400, 1, u, x0=50 * np.ones(3))
    model = n4sid(y, u, order=3, block_rows=10)
    with_x0 = kalman_filter(model, y, u, model.x0).innovations
    without = kalman_filter(model, y, u, np.zeros(3)).innovations
    assert np.sum(with_x0[:20] ** 2) < 0.2 * np.sum(without[:20] ** 2)
    assert np.allclose(with_x0.T @ with_x0 / 400, model.Lambda)


@METHODS
def test_excitation_between_twice_the_block_rows_and_n_more(method):
    """Three sines excite to order 6: enough for the inputs, not for inputs and states together."""
    plant = StateSpace([[0.5, 0.3], [-0.3, 0.5]], [[1.0], [0.5]], [[1.0, 0.2]], [[0.1]])

    def record(sines):
        t = np.arange(3000)
        u = sum(np.sin(w * t + w) for w in (0.3, 0.9, 1.7, 2.3)[:sines])[:, None]
        return plant.simulate(u)[1000:], u[1000:]  # no transient: the states are sines, too

    with pytest.raises(ValueError, match=r"order 6 \+ n"):
        method(*record(3), order=2, block_rows=3)
    found = method(*record(4), order=2, block_rows=3)
    assert np.allclose(found.deterministic.markov(20), plant.markov(20), atol=1e-12)


rng = np.random.default_rng(0)
noise = rng.standard_normal((400, 2))
slow = np.sin(0.3 * np.arange(400))[:, None]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: n4sid(noise, slow, order=2, block_rows=8), r"exciting of order 16.*rank 2 of 16"),
        (lambda: n4sid(noise, np.zeros((400, 1)), order=2), "rank 0"),
        (lambda: n4sid(noise, np.ones((399, 1)), order=2), "u must have shape"),
        (lambda: n4sid(noise[:30], order=2, block_rows=10), "at least 59 rows"),
        (lambda: n4sid(noise, order=20, block_rows=10), "at most p"),
        (lambda: n4sid(noise, order=0), "order must be a positive integer"),
        (lambda: n4sid(noise, order=2, block_rows=1), "at least 2"),
        (lambda: n4sid(np.ones((400, 1)), order=1), "constant"),
        (lambda: n4sid(np.full((400, 1), np.nan), order=1), "finite"),
        (lambda: stabilized(np.eye(2), 1.5), "radius"),
        (lambda: select_order(np.array([0.5]), 100, 1), "at least 2"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- real records with published fits -------------------------------------------------------------

# name: input column, output column, rows to identify on, rows to validate on, published N4SID error
PUBLISHED = {
    "dryer": (0, 1, slice(0, 750), slice(750, 1000), 4.7682),
    "exchanger": (1, 2, slice(0, 3000), slice(3000, 4000), 24.1221),
    "ballbeam": (0, 1, slice(0, 1000), slice(0, 1000), 2.3220),
}


@pytest.mark.skipif(not DAISY.is_dir(), reason=f"the DaISy records are not in {DAISY}")
@pytest.mark.parametrize("name", PUBLISHED)
def test_n4sid_predicts_as_well_as_the_published_fit(name):
    """Favoreel et al., SLICOT Working Note 1998-6: the best of a grid of block rows and orders."""
    column_u, column_y, identify, validate, published = PUBLISHED[name]
    table = np.loadtxt(DAISY / f"{name}.dat")

    def centred(rows, column):
        return table[rows, [column]] - table[rows, column].mean()

    u, y = centred(identify, column_u), centred(identify, column_y)
    u_new, y_new = centred(validate, column_u), centred(validate, column_y)
    errors = []
    for i in (5, 10, 15, 20, 25):
        for order in range(1, min(i, 16)):
            model = n4sid(y, u, order=order, block_rows=i)
            e = kalman_filter(model, y_new, u_new, x0="estimate").innovations
            errors.append(100 * np.linalg.norm(e) / np.linalg.norm(y_new))
    assert min(errors) <= 1.02 * published
    assert min(errors) >= 0.9 * published  # far below would mean that the protocol is not theirs


@pytest.mark.parametrize("method", [n4sid, moesp, cva])
@pytest.mark.parametrize("units", [(1e-12, 1e12), (1e12, 1e-12), (1e-9, 1e-9)])
def test_units_of_inputs_and_outputs_do_not_matter(method, units):
    sys = random_system(4, 4, 2, 2, radius=0.9)
    rng = np.random.default_rng(0)
    u = rng.standard_normal((500, 2))
    y = sys.simulate(u, rng.standard_normal(4))
    model = method(y * units[1], u * units[0], order=4)
    markov = model.deterministic.markov(20) * (units[0] / units[1])
    assert np.abs(markov - sys.markov(20)).max() < 1e-6 * np.abs(sys.markov(20)).max()
    mixed = method(y, u * np.array([1.0, units[0]]), order=4).deterministic.markov(20)
    mixed = mixed * np.array([1.0, units[0]])
    assert np.abs(mixed - sys.markov(20)).max() < 1e-6 * np.abs(sys.markov(20)).max()
