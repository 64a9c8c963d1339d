"""The checks of chapter 4 accept right answers and say what is wrong with plausible wrong ones."""

import numpy as np
import pytest
from checks.ch04 import check_kalman_step, check_order_by_validation

from realization import cva, kalman_filter


def kalman_step(A, C, Q, R, x, P, y):
    e, F = y - C @ x, C @ P @ C.T + R
    K = A @ P @ C.T @ np.linalg.inv(F)
    return A @ x + K @ e, A @ P @ A.T + Q - K @ F @ K.T, e, F


def without_R(A, C, Q, R, x, P, y):
    x_next, P_next, e, _ = kalman_step(A, C, Q, 0 * R, x, P, y)
    return x_next, P_next, e, C @ P @ C.T


def filtered(A, C, Q, R, x, P, y):
    e, F = y - C @ x, C @ P @ C.T + R
    K = P @ C.T @ np.linalg.inv(F)
    return x + K @ e, P - K @ F @ K.T, e, F


def without_Q(A, C, Q, R, x, P, y):
    x_next, P_next, e, F = kalman_step(A, C, Q, R, x, P, y)
    return x_next, P_next - Q, e, F


def open_loop_covariance(A, C, Q, R, x, P, y):
    x_next, _, e, F = kalman_step(A, C, Q, R, x, P, y)
    return x_next, A @ P @ A.T + Q, e, F


def wrong_gain(A, C, Q, R, x, P, y):
    _, P_next, e, F = kalman_step(A, C, Q, R, x, P, y)
    return A @ x + A @ P @ C.T @ e, P_next, e, F


def wrong_innovation(A, C, Q, R, x, P, y):
    x_next, P_next, _, F = kalman_step(A, C, Q, R, x, P, y)
    return x_next, P_next, y - C @ x_next, F


def error(record, train, n):
    model = cva(train, order=n, block_rows=12)
    return np.mean(kalman_filter(model, record, x0="estimate").innovations ** 2)


def by_halves(half):
    def wrong(train, test, orders):
        part = test[: len(test) // 2] if half == 0 else test[len(test) // 2 :]
        return min(orders, key=lambda n: error(part, train, n))

    return wrong


def by_likelihood(train, test, orders):
    def loglik(n):
        return kalman_filter(cva(train, order=n, block_rows=12), test, x0="estimate").loglik

    return max(orders, key=loglik)


def test_right_answers_pass(capsys):
    check_kalman_step(kalman_step)
    check_order_by_validation(
        lambda train, test, orders: min(orders, key=lambda n: error(test, train, n))
    )
    assert capsys.readouterr().out.count("OK") == 2


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (without_R, "measurement noise"),
        (filtered, "filtered state"),
        (without_Q, "lacks Q"),
        (open_loop_covariance, "does not know that y was seen"),
        (wrong_gain, "x_next must be"),
        (wrong_innovation, "y less its prediction"),
        (lambda *a: kalman_step(*a)[:3], "four things"),
    ],
)
def test_wrong_steps_are_explained(answer, message):
    with pytest.raises(AssertionError, match=message):
        check_kalman_step(answer)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            lambda train, test, orders: min(orders, key=lambda n: error(train, train, n)),
            "Judge on `test`",
        ),
        (by_halves(0), "one half of `test`"),
        (by_halves(1), "one half of `test`"),
        (by_likelihood, "largest log-likelihood"),
        (lambda train, test, orders: orders[0], "smallest mean squared"),
        (lambda train, test, orders: 5, "one of the orders"),
    ],
)
def test_wrong_orders_are_explained(answer, message):
    with pytest.raises(AssertionError, match=message):
        check_order_by_validation(answer)
