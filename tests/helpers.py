"""What several test files share. No test inside."""

import json
import math

import mpmath
import numpy as np

from meanformer.__main__ import main

EPS = float(np.finfo(np.float64).eps)


def random_tokens(rng, n, d):
    """n random unit vectors of R^d, shape (n, d)."""
    x = rng.normal(size=(n, d))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def random_rotation(rng, d):
    """A random orthogonal matrix, shape (d, d)."""
    return np.linalg.qr(rng.normal(size=(d, d)))[0]


def at_angle(mean, angle):
    """Unit vectors of R^d at the given angles to the unit vector `mean`, shape (n, d)."""
    mean, angle = np.asarray(mean, float), np.asarray(angle, float)
    aside = np.linalg.qr(np.stack([mean, np.roll(mean, 1) + np.eye(len(mean))[0]], 1))[0]
    return np.cos(angle)[..., None] * mean + np.sin(angle)[..., None] * aside[:, 1]


def central_difference(f, x, h):
    """f'(x) for a scalar x, with error h⁴|f⁽⁵⁾|/30 and rounding 1.5·eps·|f|/h."""
    f = [np.asarray(f(x + j * h), float) for j in (-2, -1, 1, 2)]
    return (f[0] - 8 * f[1] + 8 * f[2] - f[3]) / (12 * h)


def sphere_area(d):
    """|S^{d−1}| with 40 digits."""
    with mpmath.workdps(40):
        return float(
            2 * mpmath.pi ** (mpmath.mpf(d) / 2) / mpmath.gamma(mpmath.mpf(d) / 2)
        )


def zonal_integral(f, d, scale=1.0):
    """∫ f(θ) |S^{d−2}| sin^{d−2}θ dθ over [0, π], the integral over S^{d−1} of a function
    of the angle θ to one direction, which varies over angles of size `scale` at 0: the
    Gauss rule with 40 nodes on panels that grow geometrically."""
    edges = np.append(0.0, np.geomspace(scale / 4, math.pi, 24))
    q, w = np.polynomial.legendre.leggauss(40)
    half = np.diff(edges)[:, None] / 2
    theta = (edges[:-1, None] + half * (1 + q)).ravel()
    around = 2.0 if d == 2 else sphere_area(d - 1)
    values = np.asarray(f(theta), float) * around * np.sin(theta) ** (d - 2)
    return float((half * w).ravel() @ values)


def relative_errors(values, exact):
    """|value/exact − 1| for float `values` and mpmath `exact` (absolute where exact = 0)."""
    return np.array(
        [
            float(abs(mpmath.mpf(float(v)) - e) / (abs(e) if e else 1))
            for v, e in zip(np.asarray(values).ravel(), exact)
        ]
    )


def run_quick_version(name, folder):
    """The quick version of an experiment, through the command: its checks hold, and it
    writes what the command promises."""
    out = folder / "runs" / "of" / name.replace("/", "-")
    status = main(["run", name, "--quick", "--out", str(out)])
    summary = json.loads((out / "summary.json").read_text())
    failed = [c["claim"] for c in summary["checks"] if not c["holds"]]
    assert not failed
    assert status == 0
    assert summary["experiment"] == name
    assert "arXiv" in summary["source"]
    wanted = {"parameters", "seed", "checks", "seconds", "versions", "device"}
    assert wanted <= summary.keys()
    for c in summary["checks"]:
        row = {"claim", "item", "measured", "expected", "tolerance", "holds", "source"}
        assert row <= c.keys()
        assert c["tolerance"] <= abs(c["effect"]) / 2
    stems = {p.stem for p in out.glob("*.png")}
    assert stems
    assert stems == {p.stem for p in out.glob("*.pdf")}
    with np.load(out / "data.npz", allow_pickle=False) as data:
        assert all(np.all(np.isfinite(data[k])) for k in data.files)
    assert not list(out.glob(".*")), "a draft was left behind"
