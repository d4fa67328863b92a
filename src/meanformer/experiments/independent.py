"""Expected values that no formula gives, by plain NumPy: code that shares nothing with the
simulator, for experiments to be checked against."""

import numpy as np
from scipy.special import ndtri


def three_cluster_masses(
    centres: np.ndarray,
    shares: np.ndarray,
    sigma: float,
    beta: float,
    *,
    end: float = 5.0,
    step: float = 0.05,
) -> np.ndarray:
    """Masses of the clusters that form on the equator from azimuth × elevation laws with
    V = QᵀK = diag(1,1,.1) (scenario 2a), by the mean field on weighted nodes.

    Nodes: quantiles of each azimuth component × elevations, ten times denser near the poles,
    where the fate of a token is decided. x₃ → −x₃ is a symmetry, so only ψ > 0 is followed.
    """
    wide, narrow = np.linspace(0, 1.2, 13), np.linspace(1.2, np.pi / 2, 38)
    edges = np.concatenate([wide, narrow[1:]])
    psi = (edges[1:] + edges[:-1]) / 2
    rows = np.diff(edges) / (np.pi / 2)
    per = 9
    offsets = sigma * ndtri((np.arange(per) + 0.5) / per)
    theta = (centres[:, None] + offsets).ravel()
    ring = np.repeat(shares / per, per)
    p, a = (g.ravel() for g in np.meshgrid(psi, theta, indexing="ij"))
    w = (rows[:, None] * ring).ravel()
    x = np.stack([np.cos(p) * np.cos(a), np.cos(p) * np.sin(a), np.sin(p)], axis=1)
    scale = np.array([1.0, 1.0, 0.1])
    for _ in range(round(end / step)):
        flat = beta * x[:, :2] @ x[:, :2].T
        tall = 0.1 * beta * np.outer(x[:, 2], x[:, 2])
        top = flat.max(axis=1, keepdims=True)
        # Each token and its mirror image: cosh and sinh of the vertical part.
        e = np.exp(flat - top) * w
        even, odd = e * np.cosh(tall), e * np.sinh(tall)
        z = even.sum(axis=1, keepdims=True)
        mean = np.concatenate([even @ x[:, :2], odd @ x[:, 2:]], axis=1) / z
        v = scale * mean
        x = x + step * (v - (v * x).sum(axis=1, keepdims=True) * x)
        x /= np.linalg.norm(x, axis=1, keepdims=True)
    angle = np.arctan2(x[:, 1], x[:, 0])
    off = np.abs(np.angle(np.exp(1j * (angle[:, None] - centres))))
    return np.array([w[off.argmin(axis=1) == j].sum() for j in range(len(centres))])
