"""Runs for Figures 6–9 of *Quantifying concentration phenomena of mean-field transformers in
the low-temperature regime* (arXiv:2605.10931): the gradient-flow cases V = ±B, Q = I,
K = B = diag(b) on R³, and what is plotted and checked of them in every case."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import minimize

from .. import sphere, theory
from ..attention import SelfAttention
from ..charts import Curve, Panel, panels
from ..flow import solve
from ..layers import unroll
from ..limits import ZeroTemperature
from ..measures import Empirical, Uniform
from ..observables import log_energy
from ..transport import wasserstein
from .report import Check, Report, slope
from .settings import Settings

STEP = 0.05  # of the layers, where they are asked for
SAVES = 60  # after the start
EYE = np.eye(3)
TURN = math.pi  # geodesic distance of the two poles

SPACES = {"E": r"$E$", "E_V": r"$E_V$", "E_|V|": r"$E_{|V|}$"}
W2_LABEL = r"$W_2(\mu_t, \pi_{E\#}\mu_0)$"


@dataclasses.dataclass(frozen=True)
class GradientCase:
    """B = diag(b), V = sign·B, three β, times 0 … `end`, and `extra`: (b, β, axis) of one
    more run, from even starts, pushed a little along the axis if there is one."""

    b: tuple[float, float, float]
    sign: int
    betas: tuple[float, float, float]
    end: float
    extra: tuple[tuple[float, float, float], float, int | None]

    @property
    def B(self) -> np.ndarray:
        return np.diag(self.b)

    @property
    def V(self) -> np.ndarray:
        return self.sign * self.B

    def axis(self, space: str) -> int:
        """The coordinate axis that E, E_V or E_|V| is: where theory says."""
        if space == "E":
            basis = theory.dominant_eigenspace(EYE, self.B, self.V).basis
        else:
            basis = theory.value_eigenspace(self.V, modulus=space == "E_|V|")
        return int(np.argmax(np.abs(np.asarray(basis)[:, 0])))


@dataclasses.dataclass(frozen=True)
class Runs:
    """Tokens `xs` (group, seed, time, n, 3) and log E `energy` (group, seed, time). Groups:
    samples at the three β, even starts at the three β, and the extra one."""

    ts: np.ndarray
    xs: np.ndarray
    energy: np.ndarray
    cold: np.ndarray  # (seed, time, n, 3), the samples at β = ∞


# ------------------------------------------------------------------- the runs


@functools.partial(jax.jit, static_argnames="layers")
def _flows(b, sign, beta, x0, ts, tol, layers: int | None):
    """One group after the other, the seeds of a group side by side."""

    def one(b, beta, x):
        K = jnp.diag(b)
        field = SelfAttention(EYE, K, sign * K, beta)
        seen = {"E": lambda mu: log_energy(mu, EYE, K, beta)}
        if layers:
            saved = range(0, layers + 1, layers // SAVES)
            run = unroll(field, x, layers, STEP, save=saved, observables=seen)
        else:
            run = solve(field, x, ts, rtol=tol, atol=tol, observables=seen)
        return run.xs, run.observed["E"]

    def group(entry):
        return jax.vmap(one, (None, None, 0))(*entry)

    return jax.lax.map(group, (b, beta, x0))


@functools.partial(jax.jit, static_argnames=("count", "n"))
def _starts(key, push, count: int, n: int):
    """Samples, and even starts, those also pushed: (3, count, n, 3)."""
    x = Uniform(3).sample(key, count * n).reshape(count, n, 3)
    half = x[:, : n // 2]
    even = jnp.concatenate([half, -half], axis=1)
    return jnp.stack([x, even, sphere.normalise(even + push)])


def run_case(case: GradientCase, settings: Settings) -> Runs:
    """All groups of a case: one program for the four cases."""
    n = settings.count(paper=300, quick=100, minimum=60)
    n += n % 2
    seeds = 6 if settings.quick else 12
    b, beta, axis = case.extra
    push = np.zeros(3) if axis is None else 1e-6 * EYE[axis]
    sample, even, pushed = _starts(settings.key, push, seeds, n)
    x0 = jnp.stack([sample] * 3 + [even] * 3 + [pushed])
    betas = jnp.asarray([*case.betas, *case.betas, beta])
    spectra = jnp.asarray([case.b] * 6 + [b])
    ts = np.linspace(0, case.end, SAVES + 1)
    layers = round(case.end / STEP) if settings.layers else None
    tol = 1e-5 if jnp.result_type(float) == jnp.float64 else 1e-4
    xs, energy = _flows(spectra, float(case.sign), betas, x0, ts, tol, layers)
    all_seeds = sample.reshape(-1, 3)  # at β = ∞ tokens do not see each other
    frozen = ZeroTemperature(EYE, case.B, case.V)
    if layers:
        saved = range(0, layers + 1, layers // SAVES)
        cold = unroll(frozen, all_seeds, layers, STEP, save=saved)
    else:
        cold = solve(frozen, all_seeds, ts, rtol=tol, atol=tol)
    cold_xs = np.asarray(cold.xs, float).reshape(len(ts), seeds, n, 3)
    return Runs(
        ts,
        np.asarray(xs, float),
        np.asarray(energy, float),
        cold_xs.transpose(1, 0, 2, 3),
    )


# ------------------------------------------------------- measured, in NumPy


def along(xs: np.ndarray, axis: int) -> np.ndarray:
    """∫ x_k² dµ."""
    return (xs[..., axis] ** 2).mean(axis=-1)


def off(xs: np.ndarray, axis: int) -> np.ndarray:
    """∫ 1 − x_k² dµ, from the other coordinates: no cancellation near 0."""
    return np.delete(xs**2, axis, axis=-1).sum(axis=-1).mean(axis=-1)


def two_pole_distance(xs: np.ndarray, x0: np.ndarray, axis: int) -> np.ndarray:
    """Geodesic W₂ of tokens (..., t, n, 3) to π_E#µ₀ for the line E along `axis`: two atoms,
    of as many tokens as `x0` (..., n, 3) has on each side.

    Sending the token at angle a to the lower pole instead of the upper costs (π − a)² − a²,
    which falls with a: those nearest to the upper pole go there, and the plan is optimal."""
    across = np.sqrt(np.delete(xs**2, axis, axis=-1).sum(axis=-1))
    angle = np.sort(np.arctan2(across, xs[..., axis]), axis=-1)
    above = (x0[..., axis] > 0).sum(axis=-1)[..., None, None]
    rank = np.arange(angle.shape[-1])
    return np.sqrt((np.where(rank < above, angle, TURN - angle) ** 2).mean(axis=-1))


def pole_energy(p: np.ndarray, b: float, beta: float) -> np.ndarray:
    """2βE of pδ_z + (1 − p)δ_{−z}, ⟨z,Bz⟩ = b."""
    q = 1 - p
    return (p**2 + q**2) * np.exp(beta * b) + 2 * p * q * np.exp(-beta * b)


def token_energy(xs: np.ndarray, b: np.ndarray, beta: float) -> np.ndarray:
    """2βE of tokens (..., n, 3), summed directly."""
    rows = xs.reshape(-1, *xs.shape[-2:])
    sums = [np.exp(beta * (x * b) @ x.T).mean() for x in rows]
    return np.reshape(sums, xs.shape[:-2])


def rate(ts: np.ndarray, y: np.ndarray, seen: np.ndarray) -> float:
    """Median over seeds of the slope of log |y|, y (seed, time), over the times `seen`, at
    least four; NaN if no seed has them."""
    rows = [(ts[k], np.log(np.abs(v[k]))) for v, k in zip(y, seen) if k.sum() >= 4]
    return float(np.median([slope(*row) for row in rows])) if rows else math.nan


def mode_variances(b: np.ndarray, beta: float) -> np.ndarray:
    """Variances σ_k² along the other axes of the two modes at ±z, z the last axis, of the
    stationary even law for V = −B, B = diag(b) > 0, at large β:

        σ_k² = λ_z/(β(λ_k² − λ_z²)).

    Near z, e^{β⟨x,By⟩} tilts a normal mode to the mean βλ_kσ²x_k/(1 + βλ_zσ²), so that
    ẋ_k = λ_z x_k − λ_k·mean: 0 at this σ². It holds while the modes are far apart,
    e^{2βλ_z} ≫ 1, and narrow. A push of both by δ along axis k grows at the rate
    (λ_k² − λ_z²)/λ_k if V = −B, B < 0."""
    b = np.abs(b)
    return b[-1] / (beta * (b[:-1] ** 2 - b[-1] ** 2))


@functools.cache
def least_energy(
    b: tuple[float, ...], beta: float, rows: int = 12
) -> tuple[float, np.ndarray]:
    """Least 2βE for B = diag(b) > 0 on S², and ∫x_k²dµ of the law that has it.

    e^{β⟨x,By⟩} is then strictly positive definite, so that E is strictly convex and its
    minimum is one law, which has the symmetries x_k → −x_k of E. Averaged over them the
    kernel is Π cosh(βb_k x_k y_k), and a grid on one octant is enough:
    min µᵀGµ over µ ≥ 0, Σµ = 1, by the minimum of µᵀGµ/2 − Σµ over µ ≥ 0, a multiple of it."""
    theta = np.pi / 2 * (np.arange(rows) + 0.5) / rows
    phi = np.pi / 2 * np.arange(rows) / (rows - 1)
    t, p = (g.ravel() for g in np.meshgrid(theta, phi, indexing="ij"))
    x = np.stack([np.sin(t) * np.cos(p), np.sin(t) * np.sin(p), np.cos(t)], axis=1)
    a = beta * np.asarray(b) * x[:, None] * x
    log_kernel = (np.logaddexp(a, -a) - math.log(2)).sum(axis=-1)
    size = np.diag(log_kernel) / 2
    kernel = np.exp(log_kernel - size[:, None] - size)
    ones = np.exp(size.min() - size)  # Σµ where the kernel is 1 on its diagonal

    def lagrangian(nu):
        pull = kernel @ nu
        return nu @ pull / 2 - ones @ nu, pull - ones

    found = minimize(
        lagrangian,
        ones / len(x),
        jac=True,
        bounds=[(0, None)] * len(x),
        method="L-BFGS-B",
        options={"maxiter": 500, "ftol": 1e-15, "gtol": 1e-9},
    )
    mu = found.x * ones
    mu /= mu.sum()
    return float(mu @ np.exp(log_kernel) @ mu), mu @ x**2


class GradientFigure:
    """A case, its runs, and what the paper plots of them."""

    def __init__(self, case: GradientCase, settings: Settings):
        self.case, self.settings = case, settings
        self.b = np.asarray(case.b)
        self.E = case.axis("E")
        runs = run_case(case, settings)
        self.ts, self.xs, self.cold = runs.ts, runs.xs, runs.cold
        self.single = jnp.result_type(float) != jnp.float64
        self.n = self.xs.shape[3]
        self.log_energy = runs.energy
        self.w2 = two_pole_distance(self.xs, self.xs[:, :, 0], self.E)
        self.cold_w2 = two_pole_distance(self.cold, self.cold[:, 0], self.E)
        best = [self.best(beta) for beta in case.betas]
        betas = np.asarray(case.betas)[:, None, None]
        ratio = np.exp(self.log_energy[:3] + np.log(2 * betas)) / np.reshape(
            best, (3, 1, 1)
        )
        self.increases = case.sign > 0  # the energy, in time
        self.ratio = ratio if self.increases else 1 / ratio
        # At β = ∞ the energy is that of the largest finite β.
        cold = token_energy(self.cold, self.b, betas[-1, 0, 0]) / best[-1]
        self.cold_ratio = cold if self.increases else 1 / cold

    def best(self, beta: float) -> float:
        """2βE of the optimal state."""
        if self.case.sign < 0 and self.b.min() > 0:
            return least_energy(self.case.b, beta)[0]
        found = theory.energy_optimum(EYE, self.case.B, self.case.V, beta)
        return 2 * beta * math.exp(float(found.log_energy))

    def median(self, y: np.ndarray) -> float:
        """Over seeds, at the last time of y (seed, time)."""
        return float(np.median(y[..., -1]))

    def upper(self, group: int) -> np.ndarray:
        """The share of tokens on the upper side of E at the end."""
        return (self.xs[group, :, -1, :, self.E] > 0).mean(axis=-1)

    def mean(self, group: int, axis: int) -> np.ndarray:
        """∫ x_k dµ, (seed, time)."""
        return self.xs[group, ..., axis].mean(axis=-1)

    def turning(self, group: int, axis: int) -> float:
        """Rate of ∫ sign(x_E) x_k dµ: of two clusters that turn together."""
        side = np.sign(self.xs[group, ..., self.E])
        tilt = (side * self.xs[group, ..., axis]).mean(axis=-1)
        low = 1e-3 if self.single else 1e-6
        size = np.abs(tilt)
        return rate(self.ts, tilt, (size > low) & (size < 1e-2) & (self.ts > 5))

    def merging(self, axis: int, side: int) -> float:
        """Rate of ∫ x_k dµ, k = `side`, at the smallest β once tokens are near one pole of
        `axis`."""
        y = self.mean(0, side)
        near = off(self.xs[0], axis) < 1e-2
        return rate(self.ts, y, near & (np.abs(y) > (1e-4 if self.single else 1e-6)))

    def growth(self, axis: int, after: float) -> float:
        """Rate of ∫ x_k dµ after a push from evenness."""
        y = self.mean(6, axis)
        return rate(
            self.ts, y, (np.abs(y) > 1e-4) & (np.abs(y) < 0.1) & (self.ts > after)
        )

    def predicted_ratio(self, group: int) -> np.ndarray:
        """The ratio if all tokens stand at their poles of E (V = B)."""
        beta, b = self.case.betas[group], self.b[self.E]
        return pole_energy(self.upper(group), b, beta) / self.best(beta)

    def common(self) -> list[Check]:
        """What holds in all four cases."""
        step = np.diff(self.log_energy, axis=-1) * (1 if self.increases else -1)
        change = np.abs(self.log_energy[..., -1] - self.log_energy[..., 0])
        middle = slice(None, None, SAVES // 2)
        direct = token_energy(self.xs[1, :, middle], self.b, self.case.betas[1])
        observed = np.exp(self.log_energy[1, :, middle]) * 2 * self.case.betas[1]
        seeds, when = range(2), (SAVES // 4, SAVES)
        pairs = [
            (self._transport(1, s, i), float(self.w2[1, s, i]))
            for s in seeds
            for i in when
        ]
        rounding = 1e-4 if self.single else 1e-7
        return [
            Check(
                "energy is monotone: largest step against its direction (log E, all runs)",
                "C25",
                float((-step).max()),
                0.0,
                10 * rounding,
                "gradient flow: d/dt E has the sign of V = ±B",
                float(change.min()),
                "the least change of a run, the other way",
                "<",
            ),
            Check(
                "energy as observable / summed over all pairs (largest deviation)",
                "C25",
                float(np.abs(observed / direct - 1).max()),
                0.0,
                10 * rounding,
                "direct double sum in NumPy",
                float(np.abs(direct[:, -1] / direct[:, 0] - 1).min()),
                "the energy of another time",
            ),
            Check(
                "W₂ to π_E#µ₀: `wasserstein` against sorting by angle (largest deviation)",
                "C20",
                max(abs(a - b) for a, b in pairs),
                0.0,
                1e-3 if self.single else 1e-6,
                "optimal plan onto two poles: nearest tokens first",
                float(np.ptp(self.w2[1], axis=-1).min()),
                "the distance at another time",
            ),
            Check(
                "β = ∞ stays on E: 1 − ∫|P_E x|²dµ at the end (worst seed)",
                "C32",
                float(off(self.cold[:, -1], self.E).max()),
                0.0,
                1e-4,
                "Cor. 2: the zero-temperature flow tends to E for ever",
                2 / 3,
                "tokens that leave E again, or the uniform law",
            ),
            Check(
                "β = ∞: W₂(ρ_t, π_E#µ₀) at the end (worst seed)",
                "C32",
                float(self.cold_w2[:, -1].max()),
                0.0,
                0.02,
                "Cor. 2, the same tokens",
                float(np.median(self.cold_w2[:, 0])),
                "the distance at t = 0",
            ),
        ]

    def _transport(self, group: int, seed: int, time: int) -> float:
        start = self.xs[group, seed, 0, :, self.E]
        above = float((start > 0).mean())
        poles = Empirical(np.stack([EYE[self.E], -EYE[self.E]]), [above, 1 - above])
        tokens = Empirical(self.xs[group, seed, time])
        return float(wasserstein(tokens, poles, p=2, cost="geodesic", method="exact"))

    def report(
        self, checks: list[Check], notes: list[str], alignment=(), ratio=()
    ) -> Report:
        case = self.case
        words = {k: f"e{case.axis(k) + 1}" for k in ("E", "E_V", "E_|V|")}
        spectrum = ", ".join(f"{v:g}" for v in case.b)
        sign = "" if case.sign > 0 else "−"
        quantiles = [0.1, 0.5, 0.9]
        return Report(
            self.settings.record(
                n=self.n,
                seeds=self.xs.shape[1],
                B=list(case.b),
                V=[case.sign * v for v in case.b],
                beta=list(case.betas),
                end=case.end,
                steps=f"layers of {STEP}" if self.settings.layers else "adaptive",
                **words,
            ),
            [*self.common(), *checks],
            {
                "alignments": self._alignments(alignment),
                "energy": self._energies(ratio),
            },
            {
                "ts": self.ts,
                "beta": np.asarray(case.betas),
                "alignment_quantiles": np.quantile(
                    (self.xs**2).mean(axis=-2), quantiles, axis=1
                ),
                "cold_alignment_quantiles": np.quantile(
                    (self.cold**2).mean(axis=-2), quantiles, axis=0
                ),
                "w2": self.w2,
                "cold_w2": self.cold_w2,
                "log_energy": self.log_energy,
                "energy_ratio": self.ratio,
                "cold_energy_ratio": self.cold_ratio,
                "final_tokens": self.xs[:, 0, -1],
            },
            [
                f"Q = I, K = B = diag({spectrum}), V = {sign}B; E = {words['E']}, E_V = "
                f"{words['E_V']}, E_|V| = {words['E_|V|']}. Groups in the data: samples at the "
                "three β, even starts at the three β, one more. At β = ∞ the energy is that of "
                f"β = {case.betas[-1]:g}.",
                *notes,
            ],
        )

    # --------------------------------------------------------------- pictures

    def _columns(self):
        """(title, samples (seed, time, n, 3), their W₂, their ratio, group of even starts)."""
        for i, beta in enumerate(self.case.betas):
            yield f"β = {beta:g}", self.xs[i], self.w2[i], self.ratio[i], 3 + i
        yield "β = ∞", self.cold, self.cold_w2, self.cold_ratio, None

    def _alignments(self, expected):
        axes = {k: self.case.axis(k) for k in ("E", "E_V", "E_|V|")}
        names: dict[int, list[str]] = {}
        for space, axis in axes.items():
            names.setdefault(axis, []).append(SPACES[space])
        kinds = ["measured", "measured2"]  # no case has three distinct spaces
        style = {a: (" = ".join(k), kind) for (a, k), kind in zip(names.items(), kinds)}
        rows = []
        for i, (title, xs, *_) in enumerate(self._columns()):
            squares = (xs**2).mean(axis=-2)
            low, high = np.quantile(squares[..., self.E], [0.1, 0.9], axis=0)
            curves = [Curve(self.ts, low, "10–90 % of samples", "band", high)]
            for axis, (label, kind) in style.items():
                y = np.median(squares[..., axis], axis=0)
                curves.append(Curve(self.ts, y, label, kind))
            curves += [
                Curve(self.ts[[0, -1]], np.full(2, levels[i]), label, kind)
                for label, kind, levels in expected
            ]
            rows.append(Panel("time t", "alignment", curves, ylim=(0, 1.03), title=title))
        return panels(rows, shared=True)

    def _energies(self, expected):
        word = "energy / maximum" if self.increases else "minimum / energy"
        top = 1.1 * max(1.0, float(np.quantile(self.w2[:3], 0.9, axis=1).max()))
        rows = []
        for i, (title, _, w2, ratio, even) in enumerate(self._columns()):
            low, high = np.quantile(w2, [0.1, 0.9], axis=0)
            curves = [
                Curve(self.ts, low, "10–90 %", "band", high),
                Curve(self.ts, np.median(w2, axis=0), W2_LABEL, "measured"),
            ]
            if even is not None:
                y = np.median(self.w2[even], axis=0)
                thin = slice(None, None, 3)
                curves.append(Curve(self.ts[thin], y[thin], "even starts", "points"))
            curves.append(Curve(self.ts, np.median(ratio, axis=0), word, "measured2"))
            curves += [
                Curve(self.ts[[0, -1]], np.full(2, levels[i]), label, kind)
                for label, kind, levels in expected
            ]
            rows.append(
                Panel("time t", "distance, ratio", curves, ylim=(0, top), title=title)
            )
        return panels(rows, shared=True)
