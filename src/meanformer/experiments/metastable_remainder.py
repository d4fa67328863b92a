"""Theorem 4.2 of *Emergence of meta-stable clustering in mean-field transformer models*
(arXiv:2410.23228): what is left of µ(T₁) beside its dominant mode, for up to 10⁷ tokens.

Expected values are made in NumPy from Fourier modes and the growth rates of `theory`; no
tokens, no field and no solver are used for them.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
import tqdm

from .. import theory
from ..attention import AbstractField, UnnormalizedSelfAttention
from ..charts import Curve, Panel, panels
from ..flow import solve
from ..measures import Empirical, Uniform
from ..partition import Harmonic
from ..plotting import Picture
from .report import Check, Report
from .settings import BadArgument, Settings

BETAS = (2.0, 5.0)
MODES = 24  # degrees that are predicted; those above do not grow
DEGREE = 2048  # degrees that are measured: above is 5e-4 of ‖µ_0 − µ_∞‖²
CELLS = 2**17
ERROR = 2e-4  # per step and token, in units of n^{−1/4}
WIDTH = 2**13  # fewer tokens are filled up with tokens of mass 0: one program for all


def remainder(settings: Settings) -> Report:
    """|R|_{H⁻¹}/n^{−1/4} for n tokens drawn from the uniform law on S¹, (USA) at β = 2 and 5:

        µ(T₁) = µ_∞ + (1/2π)·2 Re(ε (µ̂_k(0)/‖ρ_0‖) e^{ikθ}) + R,    T₁ = ln(ε/‖ρ_0‖)/γ_k,

    with k = k_max, ρ_0 = µ(0) − µ_∞, ε = n^{−1/4} and ‖·‖ the H⁻¹ norm in its Fourier form.

    Until T₁ mode m grows from n^{−1/2} to n^{−1/2 + γ_m/(4γ_k)}. To first order, with
    g = √n µ̂(0) and h = √n‖ρ_0‖, whose law does not depend on n,

        (|R|/n^{−1/4})² = Σ_{m≠0,±k} |g_m|² h^{−2γ_m/γ_k} n^{−(1 − γ_m/γ_k)/2}/(1 + m²).

    The slowest term, that of the second fastest mode, makes |R|/n^{−1/4} fall like
    n^{−(1 − γ₋/γ_k)/4}: ×.59 from 10⁴ to 10⁷ at β = 2, ×.81 at β = 5. The others fall faster,
    and at these n are larger, so that the sum falls faster too. Products of modes add terms of
    order n^{−1/4} to the ratio.

    |R| varies by a quarter of itself from sample to sample; so does the prediction of the mean
    field from the modes of the same sample. Beside plain means over seeds, means are therefore
    formed as E|R predicted| over Gaussian modes + mean over seeds of |R| − |R predicted|:
    unbiased whatever the prediction is worth, and with a small interval."""
    if jnp.result_type(float) != jnp.float64:
        raise BadArgument(
            "Argument `--precision` must be 64 for this experiment, which measures modes of "
            "size n^(−1/2) in tokens of size 1."
        )
    sizes = _sizes(settings)
    # The largest size takes half an hour for one β: it is spent on the first.
    own = [sizes, sizes if settings.quick else sizes[:-1]]
    seeds, draws = (16, 1000) if settings.quick else (32, 4000)
    rates = [_Rates.of(beta) for beta in BETAS]
    samples = _simulate(settings, rates, own, seeds)
    rng = np.random.default_rng(settings.seed)
    real, imaginary = rng.normal(size=(2, draws, MODES + 1)) / math.sqrt(2)
    outcomes = [
        _Outcome.of(one, found, sample, real + 1j * imaginary)
        for one, found, sample in zip(rates, own, samples)
    ]
    arrays: dict[str, np.ndarray] = {}
    for o in outcomes:
        arrays |= {f"beta{o.rates.beta:g}_{name}": v for name, v in o.arrays().items()}
    return Report(
        settings.record(
            n=sizes,
            beta=list(BETAS),
            seeds=seeds,
            norm="H^-1, Fourier form",
            gaussian_samples=draws,
            error_per_step=f"{ERROR:g} n^(-1/4)",
        ),
        [check for o in outcomes for check in _checks(o)],
        {"remainder": _picture(outcomes)},
        arrays,
        [_note(o) for o in outcomes],
    )


def _sizes(settings: Settings) -> list[int]:
    """Numbers of tokens, increasing up to the one asked for."""
    factor, count, least = (4, 3, 500) if settings.quick else (10, 4, 500)
    n = settings.count(paper=10_000_000, quick=8_000, minimum=factor * least)
    found = [n // factor**j for j in reversed(range(count))]
    return [size for size in found if size >= least]


# ------------------------------------------------------------- expected, in NumPy


@dataclasses.dataclass(frozen=True)
class _Rates:
    """γ_0 … γ_MODES at β, the dominant degree k and the second fastest one."""

    beta: float
    gamma: np.ndarray
    k: int
    second: int

    @classmethod
    def of(cls, beta: float) -> "_Rates":
        gamma = np.asarray(theory.growth_rates(beta, 2, np.arange(MODES + 1)))
        second, k = np.argsort(gamma)[-2:]
        return cls(beta, gamma, int(k), int(second))

    @property
    def exponent(self) -> float:
        """Of n in |second mode at T₁|/n^{−1/4}."""
        return -float(1 - self.gamma[self.second] / self.gamma[self.k]) / 4

    def end(
        self, c: np.ndarray, rest: np.ndarray, n: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """T₁ (s,) and the dominant mode that Theorem 4.2 predicts then, from the modes c
        (s, MODES + 1) at 0 and what degrees above add to ‖ρ_0‖² (s,)."""
        norm = np.sqrt(_square(c) + rest)
        return (
            np.log(n**-0.25 / norm) / self.gamma[self.k],
            n**-0.25 * c[:, self.k] / norm,
        )

    def remainder(self, c: np.ndarray, lead: np.ndarray) -> np.ndarray:
        """The modes of R from those of µ(T₁)."""
        dominant = np.arange(c.shape[-1]) == self.k
        return c - np.where(dominant, lead[:, None], 0)


def _square(c: np.ndarray, first: int = 0) -> np.ndarray:
    """Σ_{m≠0} |c_m|²/(1 + m²) of modes (…, degree), the last axis from degree `first` on."""
    m = np.arange(first, first + c.shape[-1])
    return np.asarray(np.abs(c) ** 2 @ np.where(m > 0, 2 / (1.0 + m**2), 0))


def _linear(c: np.ndarray, gamma: np.ndarray, t: np.ndarray) -> np.ndarray:
    """Modes 0 … MODES at t (s,) to first order, from those at 0 (s, MODES + 1)."""
    return c * np.exp(gamma * t[:, None])


def _mean_field(
    c: np.ndarray, gamma: np.ndarray, t: np.ndarray, steps: int = 16
) -> np.ndarray:
    """As `_linear`, of the mean field itself, cut off at degree MODES:

        ċ_m = −im ∫e^{−imθ} v dµ = γ_m c_m + m Σ_{p+q=m; p,q≠0} (γ_q/q) c_p c_q,
        v = ∂_θ(W*µ) = Σ_q i(γ_q/q) c_q e^{iqθ},

    by the classical Runge–Kutta scheme; the grid is fine enough for exact products."""
    m = np.arange(len(gamma))
    points = 4 * len(gamma)
    speed = 1j * gamma / np.maximum(m, 1)
    h = t[:, None] / steps

    def rate(c: np.ndarray) -> np.ndarray:
        density, v = (np.fft.irfft(a, points, axis=-1) for a in (c, speed * c))
        return -1j * m * points * np.fft.rfft(density * v, axis=-1)[:, : len(m)]

    c = np.where(m > 0, c, 1)
    for _ in range(steps):
        a = rate(c)
        b = rate(c + h / 2 * a)
        d = rate(c + h / 2 * b)
        c = c + h / 6 * (a + 2 * b + 2 * d + rate(c + h * d))
    return c


# ------------------------------------------------------------- measured


def _modes(x: np.ndarray) -> np.ndarray:
    """µ̂_m = (1/n) Σⱼ e^{−imθⱼ}, m = 0 … DEGREE, of tokens (n, 2) of equal mass. Each is
    shared linearly between the two nearest of CELLS nodes; their modes are those of µ times
    sinc²(m/CELLS), up to aliasing below 2(m/CELLS)²."""
    masses = np.zeros(CELLS + 1)
    for part in np.array_split(x, math.ceil(len(x) / 2**18)):
        place = (np.arctan2(part[:, 1], part[:, 0]) / (2 * math.pi) % 1) * CELLS
        left = np.minimum(place.astype(np.int64), CELLS - 1)
        share = place - left
        masses += np.bincount(left, 1 - share, CELLS + 1)
        masses += np.bincount(left + 1, share, CELLS + 1)
    masses[0] += masses[-1]
    modes = np.fft.rfft(masses[:-1])[: DEGREE + 1] / len(x)
    return modes / np.sinc(np.arange(DEGREE + 1) / CELLS) ** 2


class _Sample:
    """By size and seed: modes up to MODES at 0 and T₁, and what those above add to the
    square of the H⁻¹ norm. `step_error`: how much of |R| errors of the steps are, from a
    run with errors ten times smaller."""

    def __init__(self, sizes: int, seeds: int):
        self.start = np.zeros((sizes, seeds, MODES + 1), complex)
        self.end = np.zeros((sizes, seeds, MODES + 1), complex)
        self.start_rest = np.zeros((sizes, seeds))
        self.end_rest = np.zeros((sizes, seeds))
        self.step_error = math.nan
        self.step_size = 0


def _split(modes: np.ndarray) -> tuple[np.ndarray, float]:
    return modes[: MODES + 1], float(_square(modes[MODES + 1 :], MODES + 1))


def _simulate(
    settings: Settings, rates: list[_Rates], own: list[list[int]], seeds: int
) -> list[_Sample]:
    """The tokens, one sample after the other, of the sizes of each β; all β start from the
    same ones."""
    sizes = max(own, key=len)
    I = np.eye(2)
    fields = [UnnormalizedSelfAttention(I, I, I, r.beta, Harmonic()) for r in rates]
    samples = [_Sample(len(found), seeds) for found in own]
    probe = max(0, len(sizes) - 2), 0
    with tqdm.tqdm(
        total=seeds * sum(max(n, WIDTH) for found in own for n in found),
        unit="token",
        unit_scale=True,
        disable=None if settings.progress else True,
    ) as bar:
        for i, s in np.ndindex(len(sizes), seeds):
            n = sizes[i]
            mu = _start(jax.random.fold_in(settings.key, seeds * i + s), n)
            c, rest = _split(_modes(np.asarray(mu.points)[:n]))
            for field, r, out, found in zip(fields, rates, samples, own):
                if i >= len(found):
                    continue
                T1, lead = r.end(c[None], np.array([rest]), n)
                end = _end(field, mu, n, float(T1[0]), ERROR)
                out.start[i, s], out.start_rest[i, s] = c, rest
                out.end[i, s], out.end_rest[i, s] = _split(end)
                if (i, s) == probe:
                    fine = _end(field, mu, n, float(T1[0]), ERROR / 10)
                    R = r.remainder(fine[None], lead)[0]
                    out.step_error = math.sqrt(_square(end - fine) / _square(R))
                    out.step_size = n
                bar.update(max(n, WIDTH))
    return samples


def _start(key: jax.Array, n: int) -> Empirical:
    """n uniform tokens, and tokens of mass 0 up to WIDTH."""
    x = Uniform(2).sample(key, max(n, WIDTH))
    return Empirical(x, jnp.where(jnp.arange(x.shape[0]) < n, 1 / n, 0))


def _end(
    field: AbstractField, mu: Empirical, n: int, T1: float, error: float
) -> np.ndarray:
    """The modes of the tokens at T₁."""
    tol = error * n**-0.25
    run = solve(field, mu, [0.0, T1], rtol=tol, atol=tol, save="last")
    return _modes(np.asarray(run.xs[-1])[:n])


# ------------------------------------------------------------- the two together


@dataclasses.dataclass(frozen=True)
class _Estimate:
    """A number of each sample: measured (size, seed), predicted from the modes of the same
    tokens at 0 (size, seed), and predicted from Gaussian modes (size, draw)."""

    measured: np.ndarray
    predicted: np.ndarray
    drawn: np.ndarray

    @property
    def expected(self) -> np.ndarray:
        return self.drawn.mean(axis=1)

    @property
    def plain(self) -> tuple[np.ndarray, np.ndarray]:
        """Means over seeds and half-widths of their 95 % intervals."""
        return self.measured.mean(axis=1), _half_width(self.measured)

    @property
    def means(self) -> np.ndarray:
        """Expected + mean over seeds of what the prediction misses."""
        return self.expected + (self.measured - self.predicted).mean(axis=1)

    def fall(self, i: int, j: int) -> tuple[float, float]:
        """means[j]/means[i] and the half-width of its 95 % interval. Seeds of different
        sizes are independent, draws are the same."""
        value = self.means[j] / self.means[i]
        missed = _half_width(self.measured - self.predicted) / self.means
        drawn = self.drawn[j] / self.means[j] - self.drawn[i] / self.means[i]
        return float(value), float(
            value * math.hypot(missed[i], missed[j], _half_width(drawn))
        )


def _half_width(values: np.ndarray) -> np.ndarray:
    """Of the 95 % t-intervals of means over the last axis."""
    count = values.shape[-1]
    quantile = float(scipy.special.stdtrit(count - 1, 0.975))
    return np.asarray(quantile * values.std(axis=-1, ddof=1) / math.sqrt(count))


@dataclasses.dataclass(frozen=True)
class _Outcome:
    """Of one β, by size and seed. `ratio`, `single`: |R|/n^{−1/4} and the part of the second
    mode in it. `lead`, `dominant`: the dominant mode at T₁, by Theorem 4.2 and measured.
    `off`: |R − R predicted|/n^{−1/4}; `linear`: as `ratio`, predicted to first order."""

    rates: _Rates
    sizes: list[int]
    sample: _Sample
    ratio: _Estimate
    single: _Estimate
    T1: np.ndarray
    lead: np.ndarray
    dominant: np.ndarray
    off: np.ndarray
    linear: np.ndarray

    @classmethod
    def of(
        cls, rates: _Rates, sizes: list[int], sample: _Sample, gaussian: np.ndarray
    ) -> "_Outcome":
        m = np.arange(1.0, MODES + 1)
        above = math.pi / math.tanh(math.pi) - 1 - (2 / (1 + m**2)).sum()
        rest = np.full(len(gaussian), above)
        rows = []
        for i, n in enumerate(sizes):
            c, above_c = sample.start[i], sample.start_rest[i]
            T1, lead = rates.end(c, above_c, n)
            R = rates.remainder(sample.end[i], lead)
            guess = rates.remainder(_mean_field(c, rates.gamma, T1), lead)
            first = rates.remainder(_linear(c, rates.gamma, T1), lead)
            g = gaussian / math.sqrt(n)
            t, a = rates.end(g, rest / n, n)
            drawn = rates.remainder(_mean_field(g, rates.gamma, t), a)
            squares = [
                _square(R) + sample.end_rest[i],
                _square(guess) + above_c,
                _square(drawn) + rest / n,
                *(_square(v[:, [rates.second]], rates.second) for v in (R, guess, drawn)),
                _square(R - guess),
                _square(first) + above_c,
            ]
            size = [np.sqrt(v) / n**-0.25 for v in squares]
            rows.append([*size, T1, lead, sample.end[i][:, rates.k]])
        ratio, guess, drawn, single, one_guess, one_drawn, off, first, T1, lead, seen = (
            np.stack(column) for column in zip(*rows)
        )
        return cls(
            rates,
            sizes,
            sample,
            _Estimate(ratio, guess, drawn),
            _Estimate(single, one_guess, one_drawn),
            T1,
            lead,
            seen,
            off,
            first,
        )

    @property
    def alone(self) -> float:
        """How much the second mode alone falls from the first to the last size."""
        return (self.sizes[-1] / self.sizes[0]) ** self.rates.exponent

    def arrays(self) -> dict[str, np.ndarray]:
        mean, half = self.ratio.plain
        return {
            "sizes": np.array(self.sizes),
            "ratio": self.ratio.measured,
            "predicted": self.ratio.predicted,
            "linear": self.linear,
            "mean": mean,
            "mean_half_width": half,
            "adjusted_mean": self.ratio.means,
            "expected": self.ratio.expected,
            "second_mode": self.single.measured,
            "second_mode_expected": self.single.expected,
            "T1": self.T1,
            "modes_start": self.sample.start,
            "modes_end": self.sample.end,
        }


def _checks(o: _Outcome) -> list[Check]:
    rates, sizes, name = o.rates, o.sizes, f"β = {o.rates.beta:g}"
    expected = o.ratio.expected
    falls = [o.ratio.fall(i, i + 1) for i in range(len(sizes) - 1)]
    total = float(expected[-1] / expected[0])
    span = f"from n = {sizes[0]:g} to {sizes[-1]:g}"
    last = f"n = {sizes[-1]:g}"
    error = o.ratio.drawn.std(axis=1) / math.sqrt(o.lead.shape[1])
    lead, seen = o.lead[-1], o.dominant[-1]
    amplitude = float(np.sum(seen * lead.conj()).real / np.sum(np.abs(lead) ** 2))
    plotted = np.exp((1 / math.pi - 1) * rates.gamma[rates.k] * o.T1[-1])
    missed = np.sqrt(np.mean(o.off[-1] ** 2) / np.mean(o.ratio.measured[-1] ** 2))
    modes = "mean field of Gaussian modes"
    return [
        *[
            Check(
                f"{name}: |R|/n^(−1/4), ratio from n = {sizes[i]:g} to {sizes[i + 1]:g}: "
                "upper 95 % limit",
                "B14",
                fall + half,
                1.0,
                0.0,
                "Theorem 4.2: |R| = o(n^{−1/4})",
                1 - float(expected[i + 1] / expected[i]),
                "a remainder of order n^{−1/4}",
                "<",
            )
            for i, (fall, half) in enumerate(falls)
        ],
        Check(
            f"{name}: |R|/n^(−1/4), ratio {span}",
            "B14",
            o.ratio.fall(0, -1)[0],
            total,
            0.02,
            modes,
            o.alone - total,
            f"the second mode alone, n^({rates.exponent:.3f})",
        ),
        Check(
            f"{name}: mode {rates.second} at T₁ over n^(−1/4), ratio {span}",
            "B14",
            o.single.fall(0, -1)[0],
            o.alone,
            0.4 * (1 - o.alone),
            "n^{−(1 − γ₋/γ_max)/4}, Prop. C.10",
            1 - o.alone,
            "no gap between the modes",
        ),
        Check(
            f"{name}: plain means over seeds, largest deviation in standard errors",
            "B14",
            float(np.max(np.abs(o.ratio.plain[0] - expected) / error)),
            3.0,
            0.0,
            modes,
            float((expected[0] - expected[-1]) / error[-1]) - 3,
            "a ratio that does not fall",
            "<",
        ),
        Check(
            f"{name}: mode {rates.k} at T₁ over n^(−1/4) µ̂(0)/‖ρ_0‖, {last}, least squares",
            "B14, E2",
            amplitude,
            1.0,
            0.05,
            "Theorem 4.2 with the rate k²I_k/β",
            1 - float(np.mean(plotted)),
            "the rate that the paper's Figure 2 plots, 1/π of it",
        ),
        Check(
            f"{name}: |R − R predicted|/|R|, {last}",
            "B14, B20",
            float(missed),
            0.1,
            0.0,
            "mean field of the modes of the same tokens at t = 0",
            math.sqrt(2) - 0.1,
            "modes of other tokens",
            "<",
        ),
        Check(
            f"{name}: error of the steps/|R|, n = {o.sample.step_size:g}",
            "B14",
            o.sample.step_error,
            0.01,
            0.0,
            "the same tokens, errors per step ten times smaller",
            0.99,
            "a remainder made by the steps",
            "<",
        ),
    ]


def _note(o: _Outcome) -> str:
    mean, half = o.ratio.plain
    fall, width = o.ratio.fall(0, -1)
    local = np.diff(np.log(o.ratio.means)) / np.diff(np.log(o.sizes))
    return (
        f"β = {o.rates.beta:g}: |R|/n^(−1/4) = "
        + ", ".join(f"{m:.3f} ± {w:.3f}" for m, w in zip(mean, half))
        + f" for n = {', '.join(f'{n:g}' for n in o.sizes)} (means over seeds, 95 %). In all "
        f"×{fall:.3f} ± {width:.3f}; mode {o.rates.second} alone falls ×{o.alone:.2f}, and the "
        f"others faster. Local exponents of n: {', '.join(f'{v:.3f}' for v in local)}, to "
        f"rise to {o.rates.exponent:.3f}."
    )


# ------------------------------------------------------------- picture


def _picture(outcomes: list[_Outcome]) -> Picture:
    falls, spectra = [], []
    common = min(o.sizes[-1] for o in outcomes)
    kinds = ("", "theory", "theory3"), ("2", "theory2", "theory4")
    for o, (kind, line, thin), shift in zip(outcomes, kinds, (0.92, 1.08)):
        name, n = f"β = {o.rates.beta:g}", np.array(o.sizes, float)
        mean, half = o.ratio.plain
        seeds = np.repeat(shift * n, o.ratio.measured.shape[1])
        falls += [
            Curve(seeds, o.ratio.measured.ravel(), "", f"faint{kind}"),
            Curve(
                shift * n,
                mean - half,
                f"{name}: tokens, mean and 95 %",
                f"interval{kind}",
                upper=mean + half,
            ),
            Curve(n, o.ratio.expected, f"{name}: mean field of modes", line),
            Curve(n, o.single.expected, f"{name}: mode {o.rates.second} alone", thin),
        ]
        i = o.sizes.index(common)
        m, scale = np.arange(1, 13), common**-0.25
        end, start = o.sample.end[i, 0], o.sample.start[i, :1]
        guess = _mean_field(start, o.rates.gamma, o.T1[i, :1])[0]
        spectra += [
            Curve(m, np.abs(end[m]) / scale, f"{name}: tokens", f"points{kind}"),
            Curve(m, np.abs(guess[m]) / scale, f"{name}: from their modes at 0", line),
        ]
    noise = r"$n^{-1/2}$, the size at 0"
    spectra.append(Curve([0.5, 12.5], [scale, scale], noise, "theory3"))
    return panels(
        [
            Panel(
                "number of tokens n",
                r"$|R|_{H^{-1}}\,/\,n^{-1/4}$ at $T_1$",
                falls,
                xscale="log",
                ylim=(0, None),
            ),
            Panel(
                "degree k",
                r"$|\hat\mu_k|\,/\,n^{-1/4}$ at $T_1$",
                spectra,
                yscale="log",
                title=f"one sample, n = {common:g}",
            ),
        ]
    )
