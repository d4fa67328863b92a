"""The order of the modules, what each may import, and that jax multiplies correctly."""

import ast
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import meanformer

SOURCE = Path(meanformer.__file__).parent
# Each module imports only from those above it.
ORDER = ["checks", "files", "sphere", "matrices", "special", "harmonics", "measures"]
ORDER += ["partition", "attention", "kernels", "blocks", "limits", "consensus"]
ORDER += ["theory", "transport", "observables", "trajectory", "flow", "layers"]
ORDER += ["plotting", "charts"]
ORDER += ["experiments", "bench", "__main__"]
# Predictions share no code with the simulator that they are compared to.
THEORY = {"checks", "sphere", "matrices", "special", "harmonics", "measures", "theory"}
# Modules that may import inside functions, and why.
LAZY = {
    "bench": "torch and cbx are optional peers, imported by who asks for them",
    "__main__": "`meanformer --help` answers without loading the experiments",
    "transport": "ott is slow to import, POT is optional: whoever asks for them waits",
}
# Packages and the only modules that may import them.
RESERVED = {
    "diffrax": {"flow"},
    "matplotlib": {"plotting"},
    "ott": {"transport"},
    "ot": {"transport"},
    "plotly": set(),
    "torch": {"bench"},
    "cbx": {"bench"},
}


def module_name(path):
    """The entry of ORDER to which a source file belongs."""
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports(tree, folder=SOURCE):
    """Pairs (node, dotted name) of all imports; those from meanformer start with "."."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            depth = len(folder.relative_to(SOURCE).parts) + 1 - node.level
            if node.level and depth > 0:  # inside a subpackage
                yield node, "." + folder.relative_to(SOURCE).parts[0]
            elif node.level and node.module is None:
                yield from ((node, "." + alias.name) for alias in node.names)
            else:
                yield node, ("." if node.level else "") + node.module


FILES = {
    str(path.relative_to(SOURCE)): (path, ast.parse(path.read_text()))
    for path in sorted(SOURCE.rglob("*.py"))
}
MODULES = [name for name in FILES if name != "__init__.py"]


def own(name):
    """Modules of meanformer that the file imports, by their entry in ORDER."""
    path, tree = FILES[name]
    for _, imported in imports(tree, path.parent):
        if imported.startswith(("meanformer.", ".")):
            yield imported.removeprefix("meanformer").lstrip(".").split(".")[0]


@pytest.mark.parametrize("name", MODULES)
def test_modules_import_only_from_those_above(name):
    """No cycle, and a reader can go from top to bottom."""
    here = ORDER.index(module_name(FILES[name][0]))
    for imported in own(name):
        there = ORDER.index(imported)
        inside = there == here and (SOURCE / imported).is_dir()
        assert there < here or inside, f"{name} imports {imported}"


@pytest.mark.parametrize("name", [n for n in FILES if n.startswith("theory")])
def test_theory_knows_no_field_and_no_solver(name):
    """So that its agreement with a simulation is evidence."""
    assert set(own(name)) <= THEORY


@pytest.mark.parametrize("name", list(FILES))
def test_imports_stand_at_the_top(name):
    """An import inside a function hides a cycle; the exceptions have reasons."""
    if module_name(FILES[name][0]) in LAZY:
        return
    for node in ast.walk(FILES[name][1]):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            inner = [
                n for n in ast.walk(node) if isinstance(n, (ast.Import, ast.ImportFrom))
            ]
            assert not inner, f"{name}, line {inner[0].lineno}, in `{node.name}`"


@pytest.mark.parametrize("name", list(FILES))
def test_heavy_packages_have_one_door(name):
    """Only flow imports diffrax, only plotting matplotlib, only transport ott; none plotly."""
    path, tree = FILES[name]
    for _, imported in imports(tree, path.parent):
        allowed = RESERVED.get(imported.split(".")[0])
        assert allowed is None or module_name(path) in allowed, f"{name}: {imported}"


def test_importing_meanformer_is_light_quiet_and_changes_no_setting():
    """No warning, no figures, no other framework, and float32 stays jax's default."""
    code = (
        "import sys, meanformer, jax\n"
        "heavy = {'ott', 'ot', 'matplotlib', 'plotly', 'torch'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert not jax.config.jax_enable_x64\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("d", range(2, 9))
def test_jax_multiplies_tall_matrices_correctly(d, dtype):
    """Products of a d × d matrix with 33000 tokens agree with NumPy to d roundings of the
    largest term. A release of jax was wrong here on CPU, silently (jax-ml/jax#39103)."""
    rng = np.random.default_rng(d)
    x = rng.normal(size=(33_000, d)).astype(dtype)
    V = rng.normal(size=(d, d)).astype(dtype)
    exact = np.asarray(x, float) @ np.asarray(V, float).T
    bound = np.abs(x).astype(float) @ np.abs(V).astype(float).T
    eps = np.finfo(dtype).eps
    computed = (
        jax.jit(lambda x: x @ V.T)(x),
        jax.jit(lambda x: V @ x.T)(x).T,
        jax.jit(jax.vmap(lambda row: V @ row))(x),
    )
    for value in computed:
        assert np.max(np.abs(np.asarray(value, float) - exact) / bound) <= d * eps
    squares = jax.jit(lambda x: jnp.sum((V @ x.T) ** 2, 0))(x)
    error = np.abs(np.asarray(squares, float) - np.sum(exact**2, 1))
    assert np.max(error / np.sum(bound**2, 1)) <= 4 * d * eps
