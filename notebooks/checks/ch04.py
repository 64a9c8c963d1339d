"""Checks of the exercises of chapter 4: from data to a model."""

from collections.abc import Callable

import numpy as np

from realization import StochasticRealization, cva, kalman_filter


def check_kalman_step(kalman_step: Callable) -> None:
    """Exercise 4.1: ``kalman_step(A, C, Q, R, x, P, y) -> (x_next, P_next, e, F)``.

    Raises
    ------
    AssertionError
        Says what is wrong.
    """
    A, C = np.array([[0.8, 0.5], [-0.5, 0.8]]), np.array([[1.0, 0.3], [0.2, -1.0]])
    Q, R = np.array([[0.5, 0.1], [0.1, 0.3]]), np.diag([1.0, 0.5])
    model = StochasticRealization(A, C, Q, R)
    y = model.simulate(6, seed=0)
    mean, cov = np.array([1.0, -1.0]), np.array([[2.0, 0.4], [0.4, 1.0]])
    right = kalman_filter(model, y, x0=mean, P0=cov)
    x, P = mean, cov
    for t in range(5):
        x_before, P_before = x, P
        result = kalman_step(A, C, Q, R, x, P, y[t])
        assert len(result) == 4, "return four things: x_next, P_next, e, F"
        x, P, e, F = (np.asarray(value, dtype=float) for value in result)
        assert np.allclose(e, y[t] - C @ x_before), (
            "the innovation is y less its prediction, e = y - C x"
        )
        assert not np.allclose(F, C @ P_before @ C.T), (
            "F lacks the measurement noise: e has the uncertainty of C x and of v, F = C P C' + R"
        )
        assert np.allclose(F, right.innovation_covariances[t]), "F must be C P C' + R"
        gain = P_before @ C.T @ np.linalg.inv(F)
        filtered = P_before - gain @ F @ gain.T
        if np.allclose(x, x_before + gain @ e):
            raise AssertionError(
                "this is x_t given y_t, the filtered state; move it one step on: x_next = A (...)"
            )
        assert not np.allclose(P, A @ filtered @ A.T), (
            "P_next lacks Q: on its way to t + 1 the state takes up new noise"
        )
        assert not np.allclose(P, A @ P_before @ A.T + Q), (
            "P_next does not know that y was seen: subtract K F K'"
        )
        expected = right.states[t + 1], right.covariances[t + 1]
        assert np.allclose(x, expected[0]), "x_next must be A x + K e with K = A P C' F^-1"
        assert np.allclose(P, expected[1]), "P_next must be A P A' + Q - K F K'"
    print("OK: the conditional mean and covariance of the next state")


def check_order_by_validation(order_by_validation: Callable) -> None:
    """Exercise 4.2: ``order_by_validation(train, test, orders) -> int``.

    Raises
    ------
    AssertionError
        Says what is wrong.
    """
    orders = [1, 2, 3, 4, 6, 8]
    for seed in (35, 6, 11):  # where the likelihood and the halves of `test` judge differently
        y = _two_oscillations(seed)
        train, test = y[:150], y[150:]
        errors = {n: _errors(train, test, n) for n in orders}
        chosen = order_by_validation(train, test, orders)
        assert chosen in orders, f"return one of the orders {orders}, not {chosen!r}"
        best_on_train = min(orders, key=lambda n: errors[n][0])
        best_on_test = min(orders, key=lambda n: errors[n][1])
        assert chosen != best_on_train or best_on_train == best_on_test, (
            f"you chose {chosen}, the best on the record that the models were fitted to: there a "
            "larger model nearly always wins. Judge on `test`"
        )
        halves = {
            min(orders, key=lambda n: _errors(train, half, n)[1])
            for half in (test[:100], test[100:])
        }
        assert chosen == best_on_test or chosen not in halves, (
            f"you chose {chosen}, which is best on one half of `test`; on all of it order "
            f"{best_on_test} is. Use the whole record"
        )
        likeliest = max(orders, key=lambda n: _log_likelihood(train, test, n))
        assert chosen == best_on_test or chosen != likeliest, (
            f"you chose {chosen}, which has the largest log-likelihood on `test`. The mean squared "
            f"one-step error asks for order {best_on_test}: the likelihood also judges the "
            "covariances that the model claims"
        )
        assert chosen == best_on_test, (
            f"the smallest mean squared one-step error on `test` belongs to order {best_on_test}, "
            f"you returned {chosen}. Fit with cva(train, order=n, block_rows=12), "
            'predict with kalman_filter(model, test, x0="estimate")'
        )
    print("OK: judged by what the models had not seen")


def _errors(train, test, n) -> tuple[float, float]:
    """Mean squared one-step errors on train and on test of the model of order n."""
    model = cva(train, order=n, block_rows=12)
    runs = (kalman_filter(model, record, x0="estimate").innovations for record in (train, test))
    return tuple(float(np.mean(e**2)) for e in runs)


def _log_likelihood(train, test, n) -> float:
    """Log-likelihood of test under the model of order n fitted to train."""
    return kalman_filter(cva(train, order=n, block_rows=12), test, x0="estimate").loglik


def _two_oscillations(seed: int) -> np.ndarray:
    """350 steps of two noisy oscillations, shape (350, 1): a process of order 4."""
    A = np.zeros((4, 4))
    for k, angle in enumerate((0.5, 1.6)):
        c, s = 0.96 * np.cos(angle), 0.96 * np.sin(angle)
        A[2 * k : 2 * k + 2, 2 * k : 2 * k + 2] = [[c, s], [-s, c]]
    model = StochasticRealization(A, np.array([[1.0, 0, 1.0, 0]]), np.eye(4), np.eye(1))
    return model.simulate(350, seed)
