import math
import subprocess
import sys

import equinox as eqx
import jax
import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from meanformer import Empirical, Uniform, WrappedNormal, plotting
from meanformer.trajectory import Trajectory


def tokens(d, n=60, seed=0):
    """n tokens on S^{d−1}."""
    return np.asarray(Uniform(d).sample(jax.random.key(seed), n))


def run(d, t=6, n=60):
    """A made-up trajectory: states without dynamics."""
    xs = np.stack([tokens(d, n, seed) for seed in range(t)])
    ts, weights = np.linspace(0.0, 1.0, t), np.full(n, 1 / n)
    arrays = (jax.numpy.asarray(a) for a in (ts, xs, weights, ts[:0]))
    return Trajectory(*arrays, {}, {})


def axes():
    return Figure().add_subplot()


def titled(figure):
    return [ax for ax in figure.axes if ax.get_title()]


# ------------------------------------------------------------------- geometry


@pytest.mark.parametrize("view", [(-60, 20), (10.0, -75.0)])
def test_the_projection_is_a_rotation_of_period_360_degrees(view):
    x = tokens(3)
    p = plotting.to_screen(x, view)
    np.testing.assert_allclose(np.linalg.norm(p, axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(p @ p.T, x @ x.T, atol=1e-6)
    a, e = view
    np.testing.assert_allclose(plotting.to_screen(x, (a + 360, e)), p, atol=1e-12)
    rows = plotting.to_screen(np.eye(3), view)
    np.testing.assert_allclose(np.linalg.det(rows), 1, atol=1e-12)  # no mirror image


def test_the_camera_looks_at_its_own_direction():
    a, e = np.deg2rad([-60.0, 20.0])
    camera = [np.cos(e) * np.cos(a), np.cos(e) * np.sin(a), np.sin(e)]
    p = plotting.to_screen(np.array(camera), (-60, 20))
    np.testing.assert_allclose(p, [0, 0, 1], atol=1e-12)


def test_hidden_tokens_are_drawn_below_visible_ones_and_fainter():
    ax, x = axes(), tokens(3)
    far, near = plotting.scatter_sphere(plotting.sphere_axes(ax), x)
    assert far.get_zorder() < near.get_zorder()
    assert far.get_alpha() < near.get_alpha()
    p = plotting.to_screen(x)
    assert len(far.get_offsets()) == (p[:, 2] < 0).sum()
    assert len(near.get_offsets()) == (p[:, 2] >= 0).sum()
    depth = np.sqrt(1 - (np.asarray(near.get_offsets()) ** 2).sum(axis=1))
    assert (np.diff(depth) >= 0).all()  # nearer ones are painted later
    assert ax.get_aspect() == 1


def test_a_curve_is_solid_where_seen_and_dashed_where_hidden():
    """The equator seen from elevation 20: half of it is hidden; lifted to radius 3 the part
    behind is partly seen beside the disc, as |3 sin 20°| > 1: all of it."""
    s = np.linspace(0, 2 * math.pi, 401)
    equator = np.stack([np.cos(s), np.sin(s), 0 * s], 1)
    for radius, share in ((1, 0.5), (3, 0)):
        ax = axes()
        plotting.curve_sphere(ax, radius * equator, (0, 20))
        far, near = ax.get_lines()
        assert far.get_linestyle() != "-"
        assert near.get_linestyle() == "-"
        hidden = np.isnan(near.get_ydata()).mean()
        assert hidden == pytest.approx(share, abs=0.01)
        assert (
            np.nanmax(far.get_ydata()) > 0 if share else np.isnan(far.get_ydata()).all()
        )


def test_the_area_of_a_dot_is_proportional_to_its_mass():
    x = np.eye(3)[[0, 0, 0, 1]]
    _, near = plotting.scatter_sphere(axes(), x, view=(45, 20))
    sizes = np.sort(near.get_sizes())
    np.testing.assert_allclose(sizes, plotting.CLUSTER * np.array([0.25, 0.75]))


def test_colours_follow_their_tokens():
    x = tokens(3)
    numbers = x[:, 2].astype(float)
    far, near = plotting.scatter_sphere(axes(), x, color=numbers, view=(0, 90))
    assert near.get_array().min() >= 0 >= far.get_array().max()  # seen from the pole
    assert near.get_clim() == far.get_clim() == (numbers.min(), numbers.max())


# ------------------------------------------------------------------- histograms


@pytest.mark.parametrize("weighted", [False, True])
def test_the_histogram_integrates_to_one(weighted):
    x = tokens(2, 200)
    weights = np.arange(1.0, 201) if weighted else None
    heights, edges, _ = plotting.histogram_circle(axes(), x, weights, 31).get_data()
    assert (edges[0], edges[-1]) == (-math.pi, math.pi)
    assert (heights * np.diff(edges)).sum() == pytest.approx(1, rel=1e-12)


def test_the_angle_pi_counts_as_minus_pi():
    heights, _, _ = plotting.histogram_circle(axes(), np.array([[-1.0, 0.0]])).get_data()
    assert heights[0] > 0
    assert heights[-1] == 0


def flat(theta):
    return 1 / (2 * math.pi)


@pytest.mark.parametrize(
    "density",
    [
        lambda theta: flat(theta) + 0 * theta,
        flat,
        Uniform(2),
        (np.linspace(-3, 3, 7), np.full(7, flat(0))),
    ],
)
def test_the_theory_is_a_labelled_line(density):
    ax = axes()
    plotting.histogram_circle(ax, tokens(2), density=density, density_label="heat")
    (line,) = ax.get_lines()
    np.testing.assert_allclose(line.get_ydata(), flat(0), rtol=1e-6)
    assert line.get_label() == "heat"
    assert line.get_color() == plotting.VERMILLION
    assert ax.get_xlabel() == "angle θ (rad)"
    assert ax.get_ylabel() == "density"


def test_the_bars_of_the_ring_have_the_lengths_of_the_histogram():
    x = tokens(2, 500)
    dots, bars = plotting.scatter_circle(axes(), x, bins=36)
    heights = plotting.histogram_circle(axes(), x, bins=36).get_data().values
    tops = [np.hypot(*p.vertices.T).max() - 1.06 for p in bars.get_paths()]
    np.testing.assert_allclose(tops, 0.6 * heights / heights.max(), atol=1e-9)
    radii = np.hypot(*np.asarray(dots.get_offsets()).T)
    np.testing.assert_allclose(radii, 1, rtol=1e-5)


# ------------------------------------------------------------------- pictures


@pytest.mark.parametrize(
    ("what", "panels"),
    [(run(2), 4), (run(3), 4), (run(5), 4), (run(3, t=2), 2), (run(2, t=1), 1)],
)
def test_a_run_gives_up_to_four_panels_titled_by_time(what, panels):
    figure = plotting.plot(what)
    times = [ax.get_title() for ax in titled(figure)]
    assert len(times) == panels
    assert times[0] == "t = 0"
    assert all(ax.get_aspect() == 1 for ax in titled(figure))
    assert figure.get_size_inches()[0] in (plotting.COLUMN, plotting.PAGE)


@pytest.mark.parametrize("what", [tokens(3), Empirical(tokens(3)), tokens(3)[None]])
def test_states_without_time_are_shown_too(what):
    assert len(plotting.plot(what).axes) == 1


def test_arrays_of_states_are_numbered_or_given_times():
    xs = np.asarray(run(3, t=3).xs)
    names = [ax.get_title() for ax in plotting.plot(xs).axes]
    assert names == ["frame 0", "frame 1", "frame 2"]
    names = [ax.get_title() for ax in plotting.plot(xs, ts=[-1, 0, 2.5]).axes]
    assert names == ["t = −1", "t = 0", "t = 2.5"]


def test_the_saved_times_nearest_to_those_asked_are_shown():
    figure = plotting.plot(run(3), times=[0.21, 0.7])
    assert [ax.get_title() for ax in figure.axes] in (
        ["t = 0.2", "t = 0.6"],
        ["t = 0.2", "t = 0.8"],
    )


def test_times_not_reached_are_left_out():
    whole = run(3, t=3)
    ts = whole.ts.at[2].set(np.inf)
    xs = whole.xs.at[2].set(np.nan)
    cut = eqx.tree_at(lambda r: (r.ts, r.xs), whole, (ts, xs))
    assert len(plotting.plot(cut).axes) == 2


def test_theory_is_drawn_at_each_time_on_the_circle_and_around_the_sphere():
    seen = []

    def theory(t, theta):
        seen.append(t)
        return np.exp(np.cos(theta)) / (2 * math.pi * np.i0(1))

    for d in (2, 3):
        figure = plotting.plot(run(d), theory=theory)
        red = [
            line
            for ax in figure.axes
            for line in ax.get_lines()
            if line.get_color() == plotting.VERMILLION
        ]
        assert len(red) == 4 * (d - 1)  # a curve around the sphere has two parts
    np.testing.assert_allclose(np.unique(seen), [0, 0.4, 0.6, 1], atol=1e-6)


def test_many_tokens_are_thinned_and_the_title_says_so():
    figure = plotting.plot(tokens(3, plotting.MAX_TOKENS + 500))
    (ax,) = figure.axes
    assert figure.get_suptitle() == "20000 of 20500 tokens drawn"
    drawn = sum(len(c.get_offsets()) for c in ax.collections)
    assert 0.8 * plotting.MAX_TOKENS < drawn <= plotting.MAX_TOKENS  # some are merged
    assert all(c.get_rasterized() for c in ax.collections)


def test_the_projection_shows_the_principal_axes_of_the_last_state():
    """Tokens in the plane of e₄ and e₅: all of the second moment is shown."""
    s = np.arange(60) / 60 * 2 * math.pi
    ring = np.stack([np.cos(s), np.sin(s)], axis=1)
    x = np.concatenate([np.zeros((60, 3)), ring], axis=1)
    figure = plotting.plot(x)
    assert "d = 5" in figure.get_suptitle()
    assert "100 % of its second moment" in figure.get_suptitle()
    far, near = figure.axes[0].collections
    assert len(far.get_offsets()) + len(near.get_offsets()) == 60


def test_snapshots_wrap_after_four():
    xs = np.asarray(run(3, t=5).xs)
    figure = plotting.snapshots(xs, [0, 1, 2, 3, 4], title="five")
    assert len(figure.axes) == 5
    assert figure.get_suptitle() == "five"
    width, height = figure.get_size_inches()
    assert height > width / 2


def test_text_is_legible_and_nothing_global_changes():
    """8 points also when drawn later, outside of the style of this module."""
    before = dict(matplotlib.rcParams)
    figure = plotting.plot(run(2))
    figure.draw_without_rendering()
    assert dict(matplotlib.rcParams) == before
    for ax in figure.axes:
        if ax.axison:
            labels = ax.get_xticklabels() + ax.get_yticklabels() + [ax.xaxis.label]
            assert {label.get_fontsize() for label in labels if label.get_text()} <= {8}


def test_a_blank_picture_has_the_style_only_within_its_block():
    before = dict(matplotlib.rcParams)
    with plotting.blank(3.0, 2.0, "title") as figure:
        assert matplotlib.rcParams["axes.labelsize"] == 8
    assert dict(matplotlib.rcParams) == before
    assert figure.get_suptitle() == "title"
    assert figure.get_size_inches()[0] == 3


def test_importing_and_plotting_leaves_pyplot_alone():
    code = (
        "import sys, numpy as np; from meanformer import plotting; "
        "f = plotting.plot(np.eye(3)); f.savefig('/dev/null', format='png'); "
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_notebooks_get_a_png():
    data, size = plotting.plot(tokens(3))._repr_png_()
    assert data.startswith(b"\x89PNG")
    assert size["width"] == 325


# ------------------------------------------------------------------- files


def test_save_writes_both_files_the_same_each_time(tmp_path):
    name = tmp_path / "new" / "beta=1.5"
    png, pdf = plotting.save(plotting.plot(run(2)), name)
    assert (png.name, pdf.name) == ("beta=1.5.png", "beta=1.5.pdf")
    first = png.read_bytes(), pdf.read_bytes()
    assert plotting.save(plotting.plot(run(2)), name) == (png, pdf)
    assert (png.read_bytes(), pdf.read_bytes()) == first
    with Image.open(png) as image:
        assert image.width == 300 * plotting.PAGE
    assert len(list(png.parent.iterdir())) == 2


def test_a_failing_save_leaves_no_file(tmp_path, monkeypatch):
    figure = plotting.plot(tokens(3))
    savefig = figure.savefig

    def fail(path, **options):
        savefig(path, **options)
        if path.suffix == ".pdf":
            raise KeyboardInterrupt

    monkeypatch.setattr(figure, "savefig", fail)
    with pytest.raises(KeyboardInterrupt):
        plotting.save(figure, tmp_path / "picture")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("d", [2, 3, 4])
def test_a_gif_has_one_frame_for_each_time(d, tmp_path):
    path = plotting.animate(run(d, t=3), tmp_path / "film.gif", fps=10, spin=20)
    with Image.open(path) as film:
        assert film.n_frames == 3
        assert film.info["duration"] == 100
        assert film.size == (390, 390)
    assert list(tmp_path.iterdir()) == [path]


def test_the_film_shows_the_same_tokens_as_the_picture(tmp_path, monkeypatch):
    """Frame by frame the tokens of the run, with the camera turned by `spin`."""
    calls, scatter = [], plotting.scatter_sphere

    def spy(ax, x, weights, color, view, *rest):
        calls.append((x, view))
        return scatter(ax, x, weights, color, view, *rest)

    monkeypatch.setattr(plotting, "scatter_sphere", spy)
    what = run(3, t=3)
    plotting.animate(what, tmp_path / "film.gif", view=(0, 10), spin=20)
    np.testing.assert_allclose([x for x, _ in calls], what.xs)
    np.testing.assert_allclose([v for _, v in calls], [(0, 10), (20, 10), (40, 10)])


def test_a_failing_film_leaves_no_file(tmp_path, monkeypatch):
    def fail(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(plotting, "scatter_sphere", fail)
    with pytest.raises(KeyboardInterrupt):
        plotting.animate(run(3), tmp_path / "film.gif")
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------- refusals

nan = np.array([[1.0, 0, 0], [0, np.nan, 0]])
figure = Figure()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: plotting.plot(jax.vmap(lambda _: run(3))(np.ones(2))),
            "must be one `Tr",
        ),
        (lambda: plotting.plot(np.ones(3)), r"`run` must be .* shape \(3,\)"),
        (
            lambda: plotting.plot(nan),
            "`run` must have rows of norm 1.*row 1 has norm nan",
        ),
        (lambda: plotting.plot(2 * np.eye(3)), "`run` must have rows of norm 1"),
        (lambda: plotting.plot(run(3), times=[]), r"`times` must have shape \(t,\)"),
        (lambda: plotting.plot(run(3), times=[2.0]), r"`times` must lie within \[0, 1\]"),
        (
            lambda: plotting.plot(run(3), times=np.linspace(0, 1, 5)),
            "`times` must hold 1 to 4 times, but holds 5. Use `snapshots`",
        ),
        (lambda: plotting.plot(run(3), ts=[0.0]), "`ts` must be left out"),
        (lambda: plotting.plot(np.asarray(run(3).xs), ts=[0.0]), r"`ts` .* shape \(6,\)"),
        (
            lambda: plotting.plot(run(4), theory=max),
            "`theory` must be left out for d > 3",
        ),
        (lambda: plotting.plot(run(3), view=(1, 2, 3)), r"`view` must have shape \(2\)"),
        (lambda: plotting.plot(run(3), color=np.ones(3)), r"`color` must have shape"),
        (lambda: plotting.scatter_sphere(axes(), nan), r"`x` must be finite.* \(1, 1\)"),
        (
            lambda: plotting.scatter_sphere(axes(), np.eye(2)),
            r"`x` must have .*\(any, 3\)",
        ),
        (lambda: plotting.scatter_sphere(axes(), np.ones((0, 3))), "at least one token"),
        (
            lambda: plotting.scatter_circle(axes(), np.eye(3)),
            r"`x` must have .*\(any, 2\)",
        ),
        (
            lambda: plotting.histogram_circle(axes(), np.ones((4, 1))),
            "`x` must have d ≥ 2",
        ),
        (lambda: plotting.histogram_circle(axes(), np.eye(2), bins=0), "`bins` must be"),
        (
            lambda: plotting.histogram_circle(axes(), np.eye(2), density=np.log),
            "`density` must be finite",
        ),
        (
            lambda: plotting.scatter_circle(axes(), np.eye(2), np.ones(3)),
            "`weights` must",
        ),
        (
            lambda: plotting.snapshots(np.ones((0, 4, 3)), np.ones(0)),
            "at least one state",
        ),
        (lambda: plotting.animate(run(3), "film.mp4"), "`path` must end in .gif"),
        (
            lambda: plotting.animate(run(3), "film.gif", fps=0),
            "`fps` must be finite and > 0",
        ),
        (lambda: plotting.save(figure, "picture.png"), "`path` must come without suffix"),
        (lambda: plotting.save(figure, "/proc/none/picture"), "`path` must be a folder"),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value encountered in log")
@pytest.mark.filterwarnings("ignore:divide by zero encountered in log")
def test_bad_input_is_refused_with_the_reason(call, message):
    with pytest.raises(ValueError, match=f"^Argument .*{message.lstrip('^')}"):
        call()


def test_a_law_on_the_circle_is_a_density_of_the_angle():
    ax, law = axes(), WrappedNormal(np.array([1.0, 0]), 0.5)
    plotting.histogram_circle(ax, tokens(2), density=law)
    theta, values = ax.get_lines()[0].get_data()
    assert np.trapezoid(values, theta) == pytest.approx(1, abs=1e-5)
