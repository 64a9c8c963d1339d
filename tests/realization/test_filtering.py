"""Kalman filters against brute-force conditioning of the joint Gaussian and statsmodels."""

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import random_realization, seeds

from realization import (
    InnovationModel,
    StochasticRealization,
    covariance_parameters,
    innovation_form,
    innovations_model,
    kalman_filter,
    log_likelihood,
    square_root_filter,
    state_covariance,
    steady_state_filter,
    steady_state_gain,
)
from realization.gains import gain_schedule, riccati_step


def arrays(*matrices):
    return [np.array(M, dtype=float) for M in matrices]


specs = st.fixed_dictionaries(
    {
        "seed": seeds,
        "n": st.integers(1, 12),
        "p": st.integers(1, 4),
        "m": st.integers(0, 3),
        "radius": st.sampled_from([0.5, 0.95, 0.999, 1.05]),
        "repeated": st.booleans(),
    }
)


# --- the oracle: y as one Gaussian vector ---------------------------------------------------------


class JointGaussian:
    """[x_0 .. x_T; y_0 .. y_{T-1}] as affine functions of x_0 and all noises, no recursion used."""

    def __init__(self, model, T, u):
        n, p, width = model.n, model.p, model.n + T * (model.n + model.p)
        X, Y = np.zeros((T + 1, n, width)), np.zeros((T, p, width))
        self.mx, self.my = np.zeros((T + 1, n)), np.zeros((T, p))
        X[0, :, :n] = np.eye(n)
        for t in range(T):
            w = slice(n + t * (n + p), 2 * n + t * (n + p))
            v = slice(w.stop, w.stop + p)
            Y[t] = model.C @ X[t]
            Y[t, :, v] += np.eye(p)
            X[t + 1] = model.A @ X[t]
            X[t + 1, :, w] += np.eye(n)
            self.my[t], self.mx[t + 1] = model.C @ self.mx[t], model.A @ self.mx[t]
            if u is not None:
                self.my[t] += model.D @ u[t]
                self.mx[t + 1] += model.B @ u[t]
        noise = np.block([[model.Q, model.S], [model.S.T, model.R]])
        self.noise = np.kron(np.eye(T), noise)
        self.X, self.Y, self.n, self.T = X, Y, n, T

    def moments(self, x0, P0):
        """Means and joint covariance of all states and outputs under x_0 ~ (x0, P0)."""
        M = np.vstack([self.X.reshape(-1, self.X.shape[2]), self.Y.reshape(-1, self.X.shape[2])])
        mean = np.concatenate([self.mx.ravel(), self.my.ravel()]) + M[:, : self.n] @ x0
        cov = M[:, : self.n] @ P0 @ M[:, : self.n].T
        return mean, cov + M[:, self.n :] @ self.noise @ M[:, self.n :].T

    def outputs(self):
        """(mean, noise covariance, effect of x_0) of all outputs."""
        Y = self.Y.reshape(-1, self.X.shape[2])
        return self.my.ravel(), Y[:, self.n :] @ self.noise @ Y[:, self.n :].T, Y[:, : self.n]


def conditioned(mean, cov, index, seen, y_seen):
    """Mean and covariance of the entries `index` given the entries `seen`."""
    gain = np.linalg.solve(cov[np.ix_(seen, seen)], cov[np.ix_(seen, index)]).T
    conditional = cov[np.ix_(index, index)] - gain @ cov[np.ix_(seen, index)]
    return mean[index] + gain @ (y_seen - mean[seen]), conditional


def record(spec, T=9, missing=0.2):
    """Model, y with missing entries and one missing row, u, and a prior."""
    model = random_realization(**spec)
    rng = np.random.default_rng(spec["seed"])
    u = rng.standard_normal((T, spec["m"])) if spec["m"] else None
    y = model.simulate(T, 1, u, x0=rng.standard_normal(model.n))
    y[rng.random(y.shape) < missing] = np.nan
    if missing:
        y[T // 2] = np.nan
    root = rng.standard_normal((model.n, model.n))
    return model, y, u, rng.standard_normal(model.n), root @ root.T


@settings(max_examples=60)
@given(specs)
def test_both_filters_are_conditional_expectations(spec):
    model, y, u, x0, P0 = record(spec)
    T, n, p = len(y), model.n, model.p
    joint = JointGaussian(model, T, u)
    mean, cov = joint.moments(x0, P0)
    scale = max(1.0, np.abs(cov).max())
    result, rooted = kalman_filter(model, y, u, x0, P0), square_root_filter(model, y, u, x0, P0)
    seen_y = np.flatnonzero(~np.isnan(y.ravel()))
    offset = (T + 1) * n
    for t in range(T):
        past = seen_y[seen_y < t * p]
        now = seen_y[seen_y < (t + 1) * p]
        state, out = np.arange(t * n, t * n + n), offset + np.arange(t * p, t * p + p)
        x, P = conditioned(mean, cov, state, offset + past, y.ravel()[past])
        yhat, F = conditioned(mean, cov, out, offset + past, y.ravel()[past])
        filtered, _ = conditioned(mean, cov, state, offset + now, y.ravel()[now])
        for r in (result, rooted):
            assert np.allclose(r.states[t], x, atol=1e-8 * scale)
            assert np.allclose(r.covariances[t], P, atol=1e-8 * scale)
            assert np.allclose(r.predictions[t], yhat, atol=1e-8 * scale)
            assert np.allclose(r.innovation_covariances[t], F, atol=1e-8 * scale)
            assert np.allclose(r.filtered_states[t], filtered, atol=1e-8 * scale)
    last, P_last = conditioned(
        mean, cov, np.arange(T * n, T * n + n), offset + seen_y, y.ravel()[seen_y]
    )
    density = scipy.stats.multivariate_normal(
        mean[offset + seen_y], cov[np.ix_(offset + seen_y, offset + seen_y)], allow_singular=False
    ).logpdf(y.ravel()[seen_y])
    for r in (result, rooted):
        assert np.allclose(r.next_state, last, atol=1e-8 * scale)
        assert np.allclose(r.next_covariance, P_last, atol=1e-8 * scale)
        assert np.isclose(r.loglik, density, rtol=1e-9, atol=1e-7)
        assert np.allclose(r.innovations, y - r.predictions, equal_nan=True)
    assert np.isclose(log_likelihood(model, y, u, x0, P0), density, rtol=1e-9, atol=1e-7)


@settings(max_examples=40)
@given(specs)
def test_unknown_first_state_is_estimated_or_integrated_out(spec):
    model, y, u, _, _ = record(spec | {"n": min(spec["n"], 5)}, T=24, missing=0.1)
    mean, noise, effect = JointGaussian(model, len(y), u).outputs()
    seen = ~np.isnan(y.ravel())
    cov, G, d = noise[np.ix_(seen, seen)], effect[seen], (y.ravel() - mean)[seen]
    weighted = np.linalg.solve(cov, G)
    N = G.T @ weighted
    if np.linalg.cond(N) > 1e7:
        return  # x_0 is not determined by this record: the test below on rank covers that
    x0 = np.linalg.solve(N, weighted.T @ d)
    profile = scipy.stats.multivariate_normal(np.zeros(len(d)), cov).logpdf(d - G @ x0)
    estimated = kalman_filter(model, y, u, "estimate")
    assert np.allclose(estimated.x0, x0, rtol=1e-5, atol=1e-6 * max(1, np.abs(x0).max()))
    assert np.isclose(estimated.loglik, profile, rtol=1e-8)
    diffuse = profile - 0.5 * np.linalg.slogdet(N)[1]
    for run in (kalman_filter, square_root_filter):
        result = run(model, y, u, "diffuse")
        assert np.isclose(result.loglik, diffuse, rtol=1e-6)
        known = np.isfinite(result.states).all(axis=1)
        assert known[-1]
        assert not known[0]
    # lim log p + n/2 log k, with k large
    k = 1e6
    proper = log_likelihood(model, y, u, np.zeros(model.n), k * np.eye(model.n))
    smallest = np.linalg.eigvalsh(N)[0]
    slack = 10 * (model.n + x0 @ x0) / (k * min(smallest, 1))
    assert abs(proper + model.n / 2 * np.log(k) - diffuse) < slack + 1e-6 * abs(diffuse)


def test_unobserved_directions_of_the_first_state_stay_zero_and_diffuse_refuses_them():
    model = StochasticRealization(*arrays(np.diag([0.5, 0.8]), [[1, 0]], np.eye(2), [[1]]))
    y = model.simulate(30, 0)
    assert abs(kalman_filter(model, y, x0="estimate").x0[1]) < 1e-12
    with pytest.raises(ValueError, match="do not"):
        kalman_filter(model, y, x0="diffuse")


# --- long records: stretches of constant gain -----------------------------------------------------


def loop_filter(model, y, u, x, P):
    """The equations of the module docstring, one step after the other."""
    loglik, innovations = 0.0, []
    for t, row in enumerate(y):
        seen = ~np.isnan(row)
        C, S, R = model.C[seen], model.S[:, seen], model.R[np.ix_(seen, seen)]
        e = row[seen] - C @ x
        if u is not None:
            e = e - model.D[seen] @ u[t]
        F = C @ P @ C.T + R
        K = np.linalg.solve(F, (model.A @ P @ C.T + S).T).T
        loglik -= 0.5 * (len(e) * np.log(2 * np.pi) + np.linalg.slogdet(F)[1])
        loglik -= 0.5 * e @ np.linalg.solve(F, e)
        x = model.A @ x + K @ e + (0 if u is None else model.B @ u[t])
        P = model.A @ P @ model.A.T + model.Q - K @ F @ K.T
        innovations.append(e)
    return loglik, np.concatenate(innovations), x


@pytest.mark.parametrize("radius", [0.6, 0.999])
@pytest.mark.parametrize("gaps", [False, True])
def test_stretches_of_constant_gain_change_nothing(radius, gaps):
    model = random_realization(7, n=5, p=2, m=1, radius=radius)
    u = np.random.default_rng(0).standard_normal((3000, 1))
    y = model.simulate(3000, 1, u)
    if gaps:
        y[700:705], y[1500, 0], y[2999, 1] = np.nan, np.nan, np.nan
    P0 = state_covariance(model)
    loglik, innovations, last = loop_filter(model, y, u, np.zeros(5), P0)
    for run in (kalman_filter, square_root_filter):
        result = run(model, y, u, np.zeros(5), P0)
        found = result.innovations[~np.isnan(y)]
        assert np.allclose(found, innovations, atol=1e-10)
        assert np.isclose(result.loglik, loglik, rtol=1e-12)
        assert np.allclose(result.next_state, last, atol=1e-10)
    assert np.isclose(log_likelihood(model, y, u, np.zeros(5), P0), loglik, rtol=1e-12)


def test_a_small_step_after_a_vague_start_is_not_taken_for_convergence():
    # P falls by 1e6, then by far less, then by a fraction of that: no geometric series yet.
    start, P0 = np.zeros(1), np.array([[1e6]])
    for R in np.geomspace(0.03, 10, 40):
        model = StochasticRealization(*arrays([[0.999]], [[2.4]], [[2.6]], [[R]]))
        y = model.simulate(24, 0)
        loglik, innovations, _ = loop_filter(model, y, None, start, P0)
        result = kalman_filter(model, y, None, start, P0)
        assert np.isclose(result.loglik, loglik, rtol=1e-10)
        assert np.allclose(result.innovations[:, 0], innovations, rtol=1e-9, atol=1e-10)


def test_loglik_equals_statsmodels_over_a_long_record():
    kalman = pytest.importorskip("statsmodels.tsa.statespace.kalman_filter")
    base = random_realization(3, n=8, p=2, radius=0.97)
    model = StochasticRealization(base.A, base.C, base.Q, base.R)  # statsmodels wants S = 0
    y = model.simulate(20_000, 0)
    peer = kalman.KalmanFilter(k_endog=2, k_states=8, k_posdef=8)
    peer.bind(y.copy())
    peer["design"], peer["transition"], peer["selection"] = model.C, model.A, np.eye(8)
    peer["state_cov"], peer["obs_cov"] = model.Q, model.R
    peer.initialize_stationary()
    assert np.isclose(log_likelihood(model, y), peer.loglike(), rtol=1e-9)
    # and the same object, bound to other data of the same shape, is not remembered
    other = model.simulate(20_000, 1)
    assert log_likelihood(model, other) != log_likelihood(model, y)


def test_diffuse_loglik_equals_statsmodels_on_the_local_level_model():
    structural = pytest.importorskip("statsmodels.tsa.statespace.structural")
    y = np.cumsum(np.random.default_rng(0).standard_normal((80, 1)), axis=0)
    y[10:20] = np.nan
    peer = structural.UnobservedComponents(y, "llevel", use_exact_diffuse=True)
    model = StochasticRealization(*arrays([[1]], [[1]], [[0.7]], [[1.3]]))
    assert np.isclose(log_likelihood(model, y, x0="diffuse"), peer.loglike([1.3, 0.7]), rtol=1e-9)


# --- innovation models, steady state --------------------------------------------------------------


@settings(max_examples=30)
@given(specs)
def test_the_innovation_form_has_the_same_likelihood_and_the_same_innovations(spec):
    spec = spec | {"m": 0, "radius": min(spec["radius"], 0.95)}
    model = random_realization(**spec)
    innovation = innovation_form(model)
    y = model.simulate(400, 2)
    assert np.isclose(log_likelihood(model, y), log_likelihood(innovation, y), rtol=1e-8)
    direct = innovations_model(*covariance_parameters(model))
    assert np.allclose(direct.Lambda, innovation.Lambda, rtol=1e-8, atol=1e-10)
    late = slice(300, None)
    expected = kalman_filter(model, y).innovations[late]
    if np.abs(np.linalg.eigvals(model.A - innovation.K @ model.C)).max() < 0.95:
        for result in (steady_state_filter(model, y), kalman_filter(innovation, y)):
            assert np.allclose(result.innovations[late], expected, atol=1e-4)


def test_the_filter_inverts_the_innovation_model_exactly():
    base = innovations_model(*covariance_parameters(random_realization(1, n=4, p=2)))
    model = InnovationModel(base.A, base.K, base.C, base.Lambda, np.ones((4, 1)))
    rng = np.random.default_rng(0)
    u, x0 = rng.standard_normal((500, 1)), rng.standard_normal(4)
    e = rng.standard_normal((500, 2))
    y = model.stochastic.simulate(e) + model.deterministic.simulate(u, x0)
    for run in (kalman_filter, square_root_filter, steady_state_filter):
        result = run(model, y, u, x0)
        assert np.allclose(result.innovations, e, atol=1e-10)
    assert np.allclose(steady_state_filter(model, y, u, "estimate").innovations[200:], e[200:])
    # The state at the start can be estimated, but not beyond what the record says of it.
    estimated = kalman_filter(model, y, u)  # a model with inputs: "estimate" is the default
    assert estimated.loglik >= kalman_filter(model, y, u, x0).loglik


def test_standardized_innovations_of_the_right_model_are_white_with_unit_covariance():
    model = random_realization(2, n=3, p=2)
    y = model.simulate(20_000, 5)
    y[100:120, 0] = np.nan
    z = kalman_filter(model, y).standardized
    assert z.shape == (20_000 - 20, 2)
    assert np.allclose(z.T @ z / len(z), np.eye(2), atol=0.04)
    assert np.abs(z[1:].T @ z[:-1] / len(z)).max() < 0.04


def test_square_root_filter_keeps_covariances_that_the_plain_one_loses():
    # Almost perfect measurements of an integrator chain: P shrinks by 1e-16 in one direction.
    A = np.array([[1.0, 1.0], [0.0, 1.0]])
    model = StochasticRealization(*arrays(A, [[1, 0]], 1e-18 * np.eye(2), [[1e-18]]))
    y = np.zeros((200, 1))
    result = square_root_filter(model, y, x0=np.zeros(2), P0=1e6 * np.eye(2))
    smallest = np.array([np.linalg.eigvalsh(P)[0] for P in result.covariances])
    assert smallest.min() >= 0
    exact = steady_state_gain(model)[2]
    assert np.allclose(result.next_covariance, exact, rtol=1e-6)


def test_a_filter_that_forgets_slowly_settles_at_the_precision_of_floats():
    # A closed loop of radius 1 - 4e-9 converges in 1e9 steps; P stops moving at eps long before.
    slow = StochasticRealization(*arrays([[1 - 4e-9]], [[1]], [[1e-22]], [[1]]))
    P = steady_state_gain(slow)[2]
    y = np.random.default_rng(0).normal(size=(300, 1))
    plain, exact = kalman_filter(slow, y, x0=[0.0], P0=P), steady_state_filter(slow, y, x0=[0.0])
    assert np.allclose(plain.next_covariance, P, rtol=1e-9)
    assert np.allclose(plain.loglik, exact.loglik, rtol=1e-12)


def test_steady_state_gain_equals_python_control():
    control = pytest.importorskip("control")
    base = random_realization(12, n=6, p=2, radius=1.02)  # also for an unstable system
    model = StochasticRealization(base.A, base.C, base.Q, base.R)
    K, Lambda, P = steady_state_gain(model)
    gain, covariance, _ = control.dlqe(model.A, np.eye(6), model.C, model.Q, model.R)
    assert np.allclose(P, covariance, rtol=1e-8)
    assert np.allclose(K, gain, rtol=1e-7)
    assert np.allclose(Lambda, model.C @ covariance @ model.C.T + model.R)


def test_a_model_without_state_is_white_noise():
    empty = InnovationModel(np.zeros((0, 0)), np.zeros((0, 2)), np.zeros((2, 0)), np.diag([1.0, 4]))
    y = empty.simulate(50, 0)
    density = scipy.stats.norm(scale=[1.0, 2.0]).logpdf(y).sum()
    for run in (kalman_filter, square_root_filter, steady_state_filter):
        assert np.isclose(run(empty, y).loglik, density)


def test_a_gain_that_does_not_exist_is_refused():
    hidden = StochasticRealization(*arrays(np.diag([0.5, 1.2]), [[1, 0]], np.eye(2), [[1]]))
    with pytest.raises(ValueError, match="stabilizing"):
        steady_state_gain(hidden)


scalar = StochasticRealization(*arrays([[0.5]], [[1]], [[1]], [[1]]))
noiseless = InnovationModel(*arrays([[0.5]], [[0]], [[1]], [[0]]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kalman_filter(scalar, np.ones(5)), "y must have shape"),
        (lambda: kalman_filter(scalar, np.ones((5, 2))), "y must have shape"),
        (lambda: kalman_filter(scalar, np.zeros((0, 1))), "y must have shape"),
        (lambda: kalman_filter(scalar, np.full((5, 1), np.inf)), "infinity"),
        (lambda: kalman_filter(scalar, np.ones((5, 1)), np.ones((5, 1))), "no inputs"),
        (lambda: kalman_filter(scalar, np.ones((5, 1)), x0="prior"), "x0 must be"),
        (lambda: kalman_filter(scalar, np.ones((5, 1)), x0=[1.0, 2.0]), "x0 must have shape"),
        (lambda: kalman_filter(scalar, np.ones((5, 1)), x0=[1.0], P0=[[-1.0]]), "P0"),
        (lambda: kalman_filter(scalar, np.ones((5, 1)), P0=[[1.0]]), "P0 needs"),
        (lambda: steady_state_filter(scalar, np.full((5, 1), np.nan)), "missing"),
        (lambda: steady_state_filter(scalar, np.ones((5, 1)), x0="diffuse"), "estimate"),
        (lambda: kalman_filter(noiseless, np.ones((1, 1))), "singular"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- units ----------------------------------------------------------------------------------------


def in_units(model, x, y):
    """The model whose states are measured in 1/x and whose outputs in 1/y."""
    return StochasticRealization(
        model.A * x[:, None] / x,
        model.C * y[:, None] / x,
        model.Q * np.outer(x, x),
        model.R * np.outer(y, y),
        model.S * np.outer(x, y),
    )


@pytest.mark.parametrize("state", [1e-8, 1.0, 1e8])
@pytest.mark.parametrize("output", [1e-12, 1.0, 1e12])
def test_gains_do_not_depend_on_units(state, output):
    for seed in range(5):
        model = random_realization(seed, 5, 2, 0, 0.95, False)
        x, y = np.array([state, 1, 1, state, 1]), np.array([output, 1.0])
        other = in_units(model, x, y)
        K, F, P = steady_state_gain(model)
        K2, F2, P2 = steady_state_gain(other)
        assert np.allclose(K2 / x[:, None] * y, K, rtol=1e-6, atol=1e-8 * np.abs(K).max())
        assert np.allclose(F2 / np.outer(y, y), F, rtol=1e-8)
        assert np.allclose(P2 / np.outer(x, x), P, rtol=1e-6, atol=1e-8 * np.abs(P).max())
        record = model.simulate(40, seed)
        expected = square_root_filter(model, record).innovations
        found = square_root_filter(other, record * y).innovations / y
        assert np.allclose(found, expected, rtol=1e-7, atol=1e-8)


def test_diffuse_start_waits_for_data_in_one_pass():
    turn = [[0.0, 1.0], [-1.0, 0.0]]
    model = StochasticRealization(turn, [[1.0, 0.0]], 0.01 * np.eye(2), [[1.0]])
    y = model.simulate(3000, 0)
    y[:2500] = np.nan
    innovations = kalman_filter(model, y, x0="diffuse").innovations
    assert np.isnan(innovations[:2502]).all() and np.isfinite(innovations[2502:]).all()
    with pytest.raises(ValueError, match="before the record ends"):
        kalman_filter(model, y[:2502], x0="diffuse")


@pytest.mark.parametrize("unit", [1.0, 1e5, 1e9])
@pytest.mark.parametrize("state", [0, 1])
def test_a_slow_state_keeps_the_gain_moving_whatever_the_units_of_the_others(state, unit):
    A, Q = np.diag([0.5, 0.9999]), np.diag([1.0, 1e-6])
    model = StochasticRealization(A, np.eye(2), Q, np.eye(2))
    y, x = model.simulate(3000, 1), np.ones(2)
    x[state] = unit
    other = in_units(model, x, np.ones(2))
    for run in (kalman_filter, square_root_filter):
        assert run(other, y, x0=[0, 0]).loglik == pytest.approx(-9658.334551554646, abs=1e-8)


def test_a_state_without_noise_settles_though_its_variance_goes_to_zero():
    model = StochasticRealization(np.diag([0.9, 0.8]), [[1.0, 1.0]], np.diag([1.0, 0]), [[1.0]])
    schedule, _ = gain_schedule(riccati_step, model, np.eye(2), np.ones((3000, 1), bool))
    assert len(schedule) < 100


@settings(max_examples=40)
@given(st.lists(st.floats(-8, 8), min_size=2, max_size=2), seeds)
def test_an_estimated_first_state_does_not_depend_on_units(exponents, seed):
    model = InnovationModel(
        np.diag([0.9, 0.99]), [[0.3], [0.1]], [[1.0, 1.0]], [[1.0]], B=[[1.0], [1.0]]
    )
    u = np.random.default_rng(seed).standard_normal((300, 1))
    y = model.simulate(300, seed, u=u, x0=[5.0, -30.0])
    x = 10.0 ** np.array(exponents)
    expected = kalman_filter(model, y, u, x0="estimate")
    found = kalman_filter(model.transform(np.diag(x)), y, u, x0="estimate")
    assert np.allclose(found.x0 / x, expected.x0, rtol=1e-8)
    assert found.loglik == pytest.approx(expected.loglik, rel=1e-10)


def test_a_realization_without_state_has_its_own_noise_as_innovation():
    empty = StochasticRealization(
        np.zeros((0, 0)), np.zeros((2, 0)), np.zeros((0, 0)), np.diag([1.0, 4])
    )
    K, Lambda, P = steady_state_gain(empty)
    assert K.shape == (0, 2) and P.shape == (0, 0) and np.array_equal(Lambda, empty.R)
    assert np.array_equal(innovation_form(empty).Lambda, empty.R)
    y = empty.simulate(30, 0)
    assert steady_state_filter(empty, y).loglik == pytest.approx(log_likelihood(empty, y))


def test_the_steady_filter_names_a_singular_innovation_covariance():
    model = InnovationModel([[0.5]], [[1.0, 0]], [[1.0], [0]], np.ones((2, 2)))
    with pytest.raises(ValueError, match="innovation covariance must be positive definite"):
        steady_state_filter(model, np.ones((3, 2)))
