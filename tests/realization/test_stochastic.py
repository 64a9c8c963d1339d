"""Covariances to states: Faurre's bounds, innovation models, Kolmogorov-Szego."""

import mpmath
import numpy as np
import pytest
import scipy.integrate
import scipy.linalg
import scipy.signal
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from random_models import block_toeplitz, random_realization, seeds

from realization import (
    InnovationModel,
    StochasticRealization,
    backward_innovations_model,
    covariance_parameters,
    covariance_realization,
    faurre_bounds,
    innovations_model,
    is_positive_real,
    kolmogorov_szego,
    output_covariances,
    positive_real_matrix,
    spectral_density,
    spectral_factor,
    state_covariance,
    stochastic_realization,
)
from realization.systems import observability_matrix, reachability_matrix

specs = st.fixed_dictionaries(
    {
        "seed": seeds,
        "n": st.integers(1, 12),
        "p": st.integers(1, 4),
        "radius": st.sampled_from([0.3, 0.9, 0.99, 0.999]),
        "repeated": st.booleans(),
    }
)


def minimal_realization(spec):
    """(A, C, G, L0) whose state the outputs determine to working precision."""
    A, C, G, L0 = covariance_parameters(random_realization(**spec))
    n = len(A)
    reach, observe = reachability_matrix(A, G, n), observability_matrix(A, C, n)
    assume(max(np.linalg.cond(reach), np.linalg.cond(observe)) < 1e5)
    return A, C, G, L0


def relative(a, b):
    return np.abs(a - b).max() / np.abs(b).max()


# --- covariance realization -----------------------------------------------------------------------


@settings(max_examples=60)
@given(specs)
def test_covariance_realization_reproduces_every_lag(spec):
    A, C, G, L0 = minimal_realization(spec)
    cov = output_covariances(A, C, G, L0, 2 * len(A) + 10)
    found = covariance_realization(cov, order=len(A))
    assert found[0].shape == A.shape
    assert relative(output_covariances(*found, len(cov)), cov) < 1e-6


def test_covariance_realization_finds_the_order_of_exact_covariances():
    model = random_realization(3, n=5, p=2)
    cov = output_covariances(*covariance_parameters(model), 30)
    A, C, G, L0 = covariance_realization(cov)
    assert len(A) == 5
    longer = output_covariances(*covariance_parameters(model), 60)
    assert relative(output_covariances(A, C, G, L0, 60), longer) < 1e-9


def test_ar_process_of_order_two_in_closed_form():
    a1, a2, s2 = 1.2, -0.7, 0.3  # y_t = a1 y_{t-1} + a2 y_{t-2} + e_t; Yule-Walker:
    rho = [1.0, a1 / (1 - a2)]
    while len(rho) < 12:
        rho.append(a1 * rho[-1] + a2 * rho[-2])
    variance = s2 / (1 - a1 * rho[1] - a2 * rho[2])
    A, C, G, L0 = covariance_realization(variance * np.reshape(rho, (-1, 1, 1)), order=2)
    model = innovations_model(A, C, G, L0)
    assert np.isclose(model.Lambda[0, 0], s2, rtol=1e-10)
    # The predictor of an AR(2) process uses two outputs: its two modes are deadbeat.
    assert np.abs(np.linalg.matrix_power(model.A - model.K @ model.C, 2)).max() < 1e-7
    impulse = [(model.C @ np.linalg.matrix_power(model.A, k) @ model.K)[0, 0] for k in range(3)]
    assert np.allclose(impulse, [a1, a1**2 + a2, a1**3 + 2 * a1 * a2], rtol=1e-8)


@pytest.mark.parametrize("theta", [-0.9, -0.3, 0.5, 0.99])
def test_ma_process_of_order_one_in_closed_form(theta):
    # y_t = e_t + theta e_{t-1}; state x_t = e_{t-1} theta has variance between theta^2 and 1.
    pars = [np.array([[v]]) for v in (0.0, 1.0, theta, 1 + theta**2)]
    P_min, P_max = faurre_bounds(*pars)
    assert np.isclose(P_min[0, 0], theta**2, rtol=1e-10)
    assert np.isclose(P_max[0, 0], 1.0, rtol=1e-10)
    model = innovations_model(*pars)
    assert np.allclose([model.K[0, 0], model.Lambda[0, 0]], [theta, 1.0], rtol=1e-10)
    # The other minimal realization with a scalar noise has its zero mirrored, 1 / theta.
    mirrored = stochastic_realization(*pars, P_max)
    assert np.isclose(mirrored.R[0, 0], theta**2, rtol=1e-9)


# --- positive-real lemma --------------------------------------------------------------------------


@settings(max_examples=50)
@given(specs)
def test_faurre_bounds_are_extreme_and_every_mixture_is_a_realization(spec):
    pars = minimal_realization(spec)
    P_min, P_max = faurre_bounds(*pars)
    # A third solution of the positive-real lemma: the state covariance we started from.
    P = state_covariance(random_realization(**spec))
    scale = np.abs(P_max).max()
    for smaller, larger in ((P_min, P), (P, P_max), (P_min, P_max)):
        assert np.linalg.eigvalsh(larger - smaller)[0] > -1e-9 * scale
    assert np.linalg.eigvalsh(P_min)[0] > -1e-12 * scale
    cov = output_covariances(*pars, 6)
    for weight in (0.0, 0.3, 0.8, 1.0):
        mixed = (1 - weight) * P_min + weight * P_max
        realization = stochastic_realization(*pars, mixed)
        again = output_covariances(*covariance_parameters(realization), 6)
        # The covariances are differences of terms of P's size: they keep P's digits, not their own.
        error = np.abs(again - cov).max()
        assert error < 1e-6 * np.abs(cov).max() + 1e-12 * np.abs(mixed).max()


def test_p_min_is_the_stabilizing_riccati_solution_and_p_max_its_mirror_image():
    for seed, (n, p) in enumerate([(1, 1), (4, 2), (7, 3), (3, 4), (12, 4)]):
        A, C, G, L0 = covariance_parameters(random_realization(seed, n, p, radius=0.95))
        P_min, P_max = faurre_bounds(A, C, G, L0)
        zero = np.zeros((n, n))
        assert relative(P_min, scipy.linalg.solve_discrete_are(A.T, C.T, zero, -L0, s=-G)) < 1e-9
        dual = scipy.linalg.solve_discrete_are(A, G, zero, -L0, s=-C.T)
        assert relative(np.linalg.inv(P_max), dual) < 1e-9


def test_p_min_is_the_covariance_of_the_state_predicted_from_a_long_past():
    A, C, G, L0 = covariance_parameters(random_realization(5, n=4, p=2, radius=0.8))
    k = 80
    cov = output_covariances(A, C, G, L0, k)
    # E x_t y_{t-h}' = A^{h-1} G; the past in the order y_{t-k} .. y_{t-1}.
    cross = np.hstack([np.linalg.matrix_power(A, h - 1) @ G for h in range(k, 0, -1)])
    past = block_toeplitz(cov, k)
    assert relative(faurre_bounds(A, C, G, L0)[0], cross @ np.linalg.solve(past, cross.T)) < 1e-10
    # And P_max^{-1} predicts its mirror image from the future: E y_{t+h} xbar_t' = C A^h.
    observe = np.vstack([C @ np.linalg.matrix_power(A, h) for h in range(k)])
    dual = observe.T @ np.linalg.solve(past, observe)
    assert relative(np.linalg.inv(faurre_bounds(A, C, G, L0)[1]), dual) < 1e-9


def test_faurre_bounds_against_40_digit_arithmetic():
    A, C, G, L0 = covariance_parameters(random_realization(8, n=3, p=1, radius=0.9))
    with mpmath.workdps(40):
        a, c, g, l0 = (mpmath.matrix(M.tolist()) for M in (A, C, G, L0))
        P = mpmath.zeros(3)
        for _ in range(600):
            gain = g - a * P * c.T
            P = a * P * a.T + gain * gain.T / (l0 - c * P * c.T)[0, 0]
        exact = np.array(P.tolist(), dtype=float)
    assert relative(faurre_bounds(A, C, G, L0)[0], exact) < 1e-10


@settings(max_examples=40)
@given(specs, st.sampled_from([1e-3, 1e-2, 0.5]))
def test_positive_real_exactly_when_the_spectrum_is_positive(spec, margin):
    A, C, G, L0 = covariance_parameters(random_realization(**spec))
    omega = np.linspace(0, np.pi, 5001)
    floor = np.linalg.eigvalsh(spectral_density(A, C, G, L0, omega)).min()
    size = margin * np.trace(L0)
    assert is_positive_real(A, C, G, L0)
    assert not is_positive_real(A, C, G, L0 - (floor + size) * np.eye(len(L0)))


def test_the_certificate_is_a_negative_eigenvalue_of_a_toeplitz_matrix():
    pars = [np.array([[v]]) for v in (0.0, 1.0, 1.0, 1.99)]  # |L_1| > L_0 / 2: not a covariance
    assert np.linalg.eigvalsh(block_toeplitz(output_covariances(*pars, 64), 64))[0] < 0
    assert not is_positive_real(*pars)
    with pytest.raises(ValueError, match="positive real"):
        faurre_bounds(*pars)
    with pytest.raises(ValueError, match="positive real"):
        innovations_model(*pars)


def test_the_solutions_fill_the_interval_only_for_order_one():
    pars = covariance_parameters(random_realization(2, n=1, p=1))
    low, high = faurre_bounds(*pars)
    for weight in (-1e-3, 1 + 1e-3):
        with pytest.raises(ValueError, match="positive-real lemma"):
            stochastic_realization(*pars, low + weight * (high - low))
    # For n = 2 a matrix between P_min and P_max need not be the covariance of any state.
    pars = covariance_parameters(random_realization(2, n=2, p=1))
    low, high = faurre_bounds(*pars)
    root = np.linalg.cholesky(high - low)
    between = low + root @ np.diag([0.0, 0.9]) @ root.T
    assert np.linalg.eigvalsh(between - low)[0] > -1e-12
    assert np.linalg.eigvalsh(high - between)[0] > 0
    assert np.linalg.eigvalsh(positive_real_matrix(*pars, between))[0] < -1e-4
    with pytest.raises(ValueError, match="positive-real lemma"):
        stochastic_realization(*pars, between)


def test_a_zero_on_the_unit_circle_closes_the_interval():
    pars = [np.array([[v]]) for v in (0.0, 1.0, 1.0, 2.0)]  # y_t = e_t + e_{t-1}
    P_min, P_max = faurre_bounds(*pars)
    assert abs(P_min[0, 0] - 1) < 1e-7
    assert abs(P_max[0, 0] - 1) < 1e-7


# --- innovation models ----------------------------------------------------------------------------


@settings(max_examples=40)
@given(specs)
def test_innovation_models_forward_and_backward(spec):
    A, C, G, L0 = minimal_realization(spec)
    cov = output_covariances(A, C, G, L0, 8)
    forward, backward = innovations_model(A, C, G, L0), backward_innovations_model(A, C, G, L0)
    P_min, P_max = faurre_bounds(A, C, G, L0)
    for innovation, sign in ((forward, 1), (backward, -1)):
        again = output_covariances(*covariance_parameters(innovation), 8)
        expected = cov if sign == 1 else cov.transpose(0, 2, 1)
        assert relative(again, expected) < 1e-8
        closed = innovation.A - innovation.K @ innovation.C
        assert np.abs(np.linalg.eigvals(closed)).max() < 1
    assert relative(state_covariance(forward), P_min) < 1e-6
    assert relative(state_covariance(backward) @ P_max, np.eye(len(A))) < 1e-4
    determinants = np.linalg.det(forward.Lambda), np.linalg.det(backward.Lambda)
    assert np.isclose(*determinants, rtol=1e-8)
    assert np.isclose(determinants[0], kolmogorov_szego(A, C, G, L0), rtol=1e-7)


@settings(max_examples=30)
@given(specs)
def test_spectral_factor_is_minimum_phase_and_exact(spec):
    A, C, G, L0 = covariance_parameters(random_realization(**spec))
    W = spectral_factor(A, C, G, L0)
    omega = np.linspace(0, np.pi, 50)
    H = W.transfer_function(np.exp(1j * omega))
    Phi = spectral_density(A, C, G, L0, omega)
    assert relative(H @ H.conj().swapaxes(1, 2), Phi) < 1e-9
    zeros = np.linalg.eigvals(W.A - W.B @ np.linalg.solve(W.D, W.C))
    assert np.abs(zeros).max() < 1
    assert W.is_stable


def test_kolmogorov_szego_against_adaptive_quadrature():
    pars = covariance_parameters(random_realization(4, n=2, p=1, radius=0.7))

    def log_phi(omega):
        return float(np.log(spectral_density(*pars, float(omega)).real.item()))

    mean = scipy.integrate.quad(log_phi, 0, np.pi, epsabs=1e-12, limit=200)[0] / np.pi
    assert np.isclose(kolmogorov_szego(*pars), np.exp(mean), rtol=1e-9)
    with pytest.raises(ValueError, match="2\\^20"):
        kolmogorov_szego(*[np.array([[v]]) for v in (0.0, 1.0, 1.0, 2.0)], rtol=1e-14)


def test_prediction_error_of_a_long_finite_past_tends_to_lambda():
    A, C, G, L0 = covariance_parameters(random_realization(9, n=4, p=2, radius=0.8))
    T = block_toeplitz(output_covariances(A, C, G, L0, 61), 61)
    error = T[-2:, -2:] - T[-2:, :-2] @ np.linalg.solve(T[:-2, :-2], T[:-2, -2:])
    assert relative(innovations_model(A, C, G, L0).Lambda, error) < 1e-9


# --- the two dataclasses --------------------------------------------------------------------------


def test_simulated_outputs_have_the_covariances_of_the_model():
    model = random_realization(1, n=3, p=2, radius=0.7)
    innovation = innovations_model(*covariance_parameters(model))
    cov = output_covariances(*covariance_parameters(model), 4)
    for source in (model, innovation):
        y = source.simulate(200_000, seed=0)
        sample = np.array([y[h:].T @ y[: len(y) - h] / len(y) for h in range(4)])
        assert relative(sample, cov) < 0.03
        assert np.array_equal(y, source.simulate(200_000, seed=0))
        assert not np.array_equal(y, source.simulate(200_000, seed=1))


def test_predictor_deterministic_part_and_change_of_basis():
    rng = np.random.default_rng(0)
    base = innovations_model(*covariance_parameters(random_realization(1, n=3, p=2)))
    model = InnovationModel(
        base.A, base.K, base.C, base.Lambda, rng.standard_normal((3, 1)), x0=np.arange(3.0)
    )
    u, x0 = rng.standard_normal((50, 1)), model.x0
    y = model.simulate(50, seed=2, u=u, x0=x0)
    predicted = model.predictor.simulate(np.hstack([u, y]), x0)
    e = y - predicted
    rebuilt = model.stochastic.simulate(e) + model.deterministic.simulate(u, x0)
    assert np.allclose(rebuilt, y)
    T = rng.standard_normal((3, 3))
    other = model.transform(T)
    assert np.allclose(other.predictor.simulate(np.hstack([u, y]), other.x0), predicted)
    assert repr(model) == "InnovationModel(n=3, m=1, p=2)"
    with pytest.raises(ValueError, match="no inputs"):
        _ = base.deterministic


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: covariance_realization(np.ones((2, 1, 1))), "k >= 3"),
        (lambda: covariance_realization(-np.ones((5, 1, 1))), "positive definite"),
        (lambda: covariance_realization(np.full((5, 2, 2), np.nan)), "finite"),
        (lambda: faurre_bounds([[1.1]], [[1.0]], [[1.0]], [[9.0]]), "stable"),
        (lambda: faurre_bounds([[0.5]], [[1.0, 2.0]], [[1.0]], [[9.0]]), "C must have shape"),
        (lambda: faurre_bounds([[0.5]], [[0.0]], [[1.0]], [[9.0]]), "observable"),
        (  # y_t = (e_t, e_{t-1}): the second output was the first one
            lambda: innovations_model([[0.0]], [[0.0], [1.0]], [[1.0, 0.0]], np.eye(2)),
            "singular innovation covariance",
        ),
        (lambda: InnovationModel([[0.5]], [[1.0]], [[1.0]], [[-1.0]]), "Lambda"),
        (lambda: InnovationModel([[0.5]], [[1.0], [2.0]], [[1.0]], [[1.0]]), "K must have shape"),
        (lambda: InnovationModel([[0.5]], [[1.0]], [[1.0]], [[1.0]], D=[[1.0]]), "without B"),
        (lambda: StochasticRealization([[0.5]], [[1.0]], [[1.0]], [[1.0]], [[2.0]]), "Q S"),
        (lambda: random_realization(0, 2, 1, m=1).simulate(5, 0), "u must be given"),
        (lambda: random_realization(0, 2, 1).simulate(5, 0, u=np.ones((5, 1))), "no inputs"),
    ],
)
def test_errors_name_the_argument(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# --- at the edge of what is a process -------------------------------------------------------------


def process_with_zeros(zeros, poles):
    """(A, C, G, L0) of the ARMA process with these zeros and poles, innovation variance 1."""
    A, B, C, _ = scipy.signal.tf2ss(np.poly(zeros), np.poly(poles))
    return covariance_parameters(InnovationModel(A, B, C, [[1.0]]))


@pytest.mark.parametrize("multiplicity", [1, 2])
def test_zeros_on_the_unit_circle_are_accepted_to_the_promised_accuracy(multiplicity):
    rng = np.random.default_rng(3)
    refused = 0
    for _ in range(60):
        n = max(int(rng.integers(1, 6)), multiplicity)
        inside = rng.uniform(-0.9, 0.9, n - multiplicity)
        process = process_with_zeros([*[1.0] * multiplicity, *inside], rng.uniform(-0.9, 0.9, n))
        if is_positive_real(*process):
            accuracy = (1e-13 * process[3][0, 0]) ** (1 / (2 * multiplicity))
            assert innovations_model(*process).Lambda[0, 0] == pytest.approx(1, abs=30 * accuracy)
        else:
            refused += 1
    assert refused <= 1  # half of them without the white noise of rounding errors


@pytest.mark.parametrize("shortage", [1e-10, 1e-11, 1e-12])
def test_covariances_just_beyond_a_process_are_still_refused(shortage):
    assert not is_positive_real([[0.0]], [[1.0]], [[-1.0]], [[2 - shortage]])


scalar = dict(A=[[0.5]], C=[[1.0]], G=[[0.5]], L0=[[2.0]])
pair = dict(A=[[0.5]], C=[[1.0], [0.0]], G=[[0.5, 0.0]], L0=[[2.0, 0.3], [0.1, 2.0]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: faurre_bounds(**pair), "L0 must be symmetric"),
        (lambda: is_positive_real(**pair), "L0 must be symmetric"),
        (lambda: positive_real_matrix(**scalar, P=np.eye(2)), r"P must have shape \(1, 1\)"),
        (lambda: stochastic_realization(**scalar, P=np.eye(2)), r"P must have shape \(1, 1\)"),
        (lambda: spectral_density(**scalar, omega=[np.nan]), "omega must be finite"),
        (lambda: spectral_density(**scalar, omega=[1j]), "omega must be an array of real numbers"),
        (
            lambda: InnovationModel([[0.5]], [[1.0]], [[1.0]], [[1.0]]).simulate(5, 0, x0=[1, 2]),
            r"x0 must have shape \(1,\)",
        ),
        (
            lambda: InnovationModel([[0.5]], [[1.0, 0]], [[1.0], [0]], np.diag([1e6, -1e-4])),
            "Lambda must be symmetric positive semidefinite",
        ),
    ],
)
def test_what_is_no_covariance_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_candidate_covariance_must_be_symmetric():
    model = InnovationModel(np.diag([0.5, 0.2]), [[1.0], [1]], [[1.0, 1]], [[1.0]])
    process = covariance_parameters(model)
    P = faurre_bounds(*process)[0] + [[0, 0.1], [0, 0]]
    for call in (positive_real_matrix, stochastic_realization):
        with pytest.raises(ValueError, match="P must be symmetric"):
            call(*process, P)


@given(st.lists(st.floats(-8, 8), min_size=3, max_size=3), seeds)
def test_whether_a_matrix_is_a_covariance_does_not_depend_on_units(exponents, seed):
    x, rng = 10.0 ** np.array(exponents), np.random.default_rng(seed)
    W = np.linalg.qr(rng.standard_normal((3, 3)))[0] * [1.0, 1.0, 0.5]
    InnovationModel(*stateless, W @ W.T * np.outer(x, x))
    indefinite = (W * [1, 1, -0.1]) @ W.T
    assume(x.max() < 1e5 * x.min() and np.diag(indefinite).min() > 0)
    with pytest.raises(ValueError, match="positive semidefinite"):
        InnovationModel(*stateless, indefinite * np.outer(x, x))


stateless = np.zeros((0, 0)), np.zeros((0, 3)), np.zeros((3, 0))
