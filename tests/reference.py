"""Independent evaluations of what the library computes: mpmath with 40 digits, NumPy loops
and SciPy's DOP853. Nothing here calls the library or jax."""

import functools

import mpmath
import numpy as np
from scipy.integrate import solve_ivp

EPS64, EPS32 = 2.0**-53, 2.0**-24  # unit roundoff


# ------------------------------------------------------------------------ test data


def tokens(seed, n, d):
    """n random tokens on S^{d−1}."""
    x = np.random.default_rng(seed).normal(size=(n, d))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def matrices(seed, d, k=None):
    """Q, K of shape (k, d) (default k = d) and V of shape (d, d), with ‖QᵀK‖₂ = 1 and
    ‖V‖₂ = 1. None of QᵀK, V is symmetric."""
    rng = np.random.default_rng(1000 + seed)
    k = d if k is None else k
    Q, K = rng.normal(size=(2, k, d))
    V = rng.normal(size=(d, d))
    Q, K = Q / np.linalg.norm(Q, 2), K / np.linalg.norm(K, 2)
    return Q / np.linalg.norm(Q.T @ K, 2), K, V / np.linalg.norm(V, 2)


def rotation(seed, d):
    """A random orthogonal matrix."""
    return np.linalg.qr(np.random.default_rng(2000 + seed).normal(size=(d, d)))[0]


def weights(seed, n, zeros=0):
    """n weights of sum 1, `zeros` of them 0, the others between 0.1/n and 2/n or so."""
    w = np.random.default_rng(3000 + seed).uniform(0.1, 1.9, n)
    w[:zeros] = 0
    return w / w.sum()


def equiangular(n, gamma):
    """n unit vectors of R^n with every pairwise inner product equal to `gamma`."""
    return np.linalg.cholesky((1 - gamma) * np.eye(n) + gamma * np.ones((n, n)))


# ------------------------------------------------------------------- 40-digit values


def in_high_precision(f):
    """`f` with 40 digits of working precision."""

    @functools.wraps(f)
    def precise(*args, **kwargs):
        with mpmath.workdps(40):
            return f(*args, **kwargs)

    return precise


def exact(a):
    """A NumPy array of mpf numbers, each exactly the given float."""
    return np.vectorize(lambda v: mpmath.mpf(float(v)), otypes=[object])(np.asarray(a))


def dot(a, b):
    return mpmath.fsum(p * q for p, q in zip(a, b))


def floats(rows):
    return np.array(rows, dtype=object).astype(float)


@in_high_precision
def log_partition(u, y, w):
    """L(u) = log Σⱼ wⱼ e^{⟨u,yⱼ⟩} and ∇L(u) at the rows of u; all arguments are taken as
    exact (arrays of mpf pass). Two lists of mpf."""
    u, y, w = (a if a.dtype == object else exact(a) for a in map(np.asarray, (u, y, w)))
    keep = [j for j in range(len(w)) if w[j] > 0]
    values, means = [], []
    for row in u:
        s = [dot(row, y[j]) for j in keep]
        top = max(s)
        terms = [w[j] * mpmath.exp(v - top) for j, v in zip(keep, s)]
        z = mpmath.fsum(terms)
        values.append(top + mpmath.log(z))
        means.append([dot(terms, [y[j][i] for j in keep]) / z for i in range(y.shape[1])])
    return values, means


@in_high_precision
def queries(x, Q, K, beta):
    """u = β KᵀQx at the rows of x, exactly: ⟨u, y⟩ = β⟨Qx, Ky⟩. An array of mpf."""
    x, Q, K, beta = exact(x), exact(Q), exact(K), mpmath.mpf(float(beta))
    rows = []
    for row in x:
        q = [dot(Q[i], row) for i in range(len(Q))]
        rows.append([beta * dot(K[:, j], q) for j in range(K.shape[1])])
    return np.array(rows, dtype=object)


@in_high_precision
def tangential_image(x, V, means, factors=None):
    """P_x V m at the rows of x and of `means`, times `factors`. An array of mpf."""
    x, V = exact(x), exact(V)
    out = []
    for i, m in enumerate(means):
        v = [dot(row, m) for row in V]
        radial = dot(x[i], v)
        c = 1 if factors is None else factors[i]
        out.append([c * (a - radial * b) for a, b in zip(v, x[i])])
    return np.array(out, dtype=object)


@in_high_precision
def attention_fields(x, y, w, Q, K, V, beta, log_unit=0.0):
    """P_x Σⱼ wⱼ e^{β⟨Qx,Kyⱼ⟩} V yⱼ / Σⱼ wⱼ e^{β⟨Qx,Kyⱼ⟩}; the same without the division,
    times e^{−log_unit}; and e^{−log_unit} Σⱼ wⱼ e^{β⟨Qx,Kyⱼ⟩}. Two arrays of mpf and one of
    floats."""
    values, means = log_partition(queries(x, Q, K, beta), y, w)
    sums = [mpmath.exp(v - log_unit) for v in values]
    plain, scaled = (tangential_image(x, V, means, f) for f in (None, sums))
    return plain, scaled, floats(sums)


@in_high_precision
def spectral_norm(B):
    """‖B‖₂ of a matrix of floats, as an mpf."""
    B = mpmath.matrix(np.asarray(B).tolist())
    return mpmath.sqrt(max(mpmath.eigsy(B.T * B, eigvals_only=True)))


@in_high_precision
def zero_temperature(x, Q, K, V):
    """P_x V KᵀQx/|KᵀQx|, an array of mpf."""
    u = queries(x, Q, K, 1.0)
    means = [[c / mpmath.sqrt(dot(row, row)) for c in row] for row in u]
    return tangential_image(x, V, means)


@in_high_precision
def error_norms(computed, true):
    """|computed − true| row by row, the difference taken before rounding."""
    difference = exact(computed) - true
    return floats([mpmath.sqrt(dot(row, row)) for row in difference])


# ------------------------------------------------------------------ loops in float64


def self_attention_loop(x, w, Q, K, V, beta):
    """The field of tokens x of weights w on themselves, by two loops over the tokens."""
    n, d = x.shape
    out = np.zeros((n, d))
    for i in range(n):
        scores = [beta * (Q @ x[i]) @ (K @ x[j]) for j in range(n)]
        top = max(s for s, m in zip(scores, w) if m > 0)
        total, mean = 0.0, np.zeros(d)
        for j in range(n):
            a = w[j] * np.exp(min(scores[j] - top, 0.0))
            total += a
            mean += a * x[j]
        v = V @ mean / total
        out[i] = v - (x[i] @ v) * x[i]
    return out


def flow(velocity, x0, ts, rtol=1e-12):
    """The tokens at `ts` of ẋ = velocity(t, x), by SciPy's DOP853. The velocity is taken
    at x/|x|, so that rounding off the sphere cannot grow."""
    shape = x0.shape

    def rhs(t, y):
        x = y.reshape(shape)
        return velocity(t, x / np.linalg.norm(x, axis=1, keepdims=True)).ravel()

    end = solve_ivp(
        rhs,
        (ts[0], ts[-1]),
        x0.ravel(),
        method="DOP853",
        t_eval=ts,
        rtol=max(rtol, 3e-14),
        atol=rtol,
    )
    x = end.y.T.reshape(len(ts), *shape)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def attention_velocity(w, Q, K, V, beta):
    """`velocity` of `flow` for self-attention: NumPy, no loops."""
    B = Q.T @ K

    def velocity(t, x):
        s = beta * x @ B @ x.T
        a = w * np.exp(s - s.max(axis=1, keepdims=True))
        v = (a / a.sum(axis=1, keepdims=True)) @ x @ V.T
        return v - np.sum(x * v, axis=1, keepdims=True) * x

    return velocity


def slope(f, h):
    """Central difference (f(h) − f(−h))/2h, extrapolated once: error O(h⁴)."""
    wide, narrow = ((f(s) - f(-s)) / (2 * s) for s in (2 * h, h))
    return (4 * narrow - wide) / 3


def fitted_order(steps, errors):
    """The slope of log error against log step."""
    return np.polyfit(np.log(steps), np.log(errors), 1)[0]


def scalar_flow(velocity, y0, t1):
    """y(t1) of ẏ = velocity(t, y) for one number, by DOP853."""
    return solve_ivp(
        velocity, (0.0, t1), [y0], method="DOP853", rtol=1e-13, atol=1e-13
    ).y[0, -1]
