"""Programs are compiled with XLA's options for the backend, where XLA knows them."""

import gc
import threading

import jax
import numpy as np
import pytest

from jaxad.driver import program


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    program.compiler_options.cache_clear()
    yield
    program.compiler_options.cache_clear()


def convolution(x, w):
    return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


@pytest.mark.parametrize("option", [program.YNNPACK, "xla_no_such_option"])
def test_a_program_compiles_whether_or_not_xla_knows_the_option(monkeypatch, option):
    monkeypatch.setattr(program, "YNNPACK", option)
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(2, 5, 6, 3)).astype(np.float32), rng.normal(size=(3, 3, 3, 4)).astype(np.float32)
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    expected = sum(padded[:, i : i + 5, j : j + 6] @ w[i, j] for i in range(3) for j in range(3))
    np.testing.assert_allclose(program.Program(convolution)(x, w), expected, atol=1e-5)
    used, known = set(program.compiler_options()), {option} - {"xla_no_such_option"}
    assert used == known or (not used and not jax.__version__.startswith("0.10."))


def test_several_devices_compute_alike(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    assert program.compiler_options() == {}


def test_what_the_user_has_set_stays(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", f"--{program.YNNPACK}=individual_dot")
    assert program.compiler_options() == {}


def test_threads_compile_once():
    start, traced = threading.Barrier(4), []
    negative = program.Program(lambda x: traced.append(0) or -x)

    def run():
        start.wait()
        np.testing.assert_array_equal(negative(np.float32(3)), -3)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(traced) == 1


def test_what_is_in_use_is_made_once_and_the_rest_is_let_go():
    made = []

    @program.weak_cache
    def make(number):
        made.append(number)
        return program.Program(lambda x: x * number)

    used = [make(i) for i in range(2 * program.RECENT)]
    assert all(make(i) is used[i] for i in range(2 * program.RECENT)) and len(made) == 2 * program.RECENT
    del used
    gc.collect()
    make(2 * program.RECENT - 1)
    assert len(made) == 2 * program.RECENT
    make(0)
    assert len(made) == 2 * program.RECENT + 1


def test_compiled_programs_are_kept_unless_the_user_keeps_them_elsewhere(tmp_path):
    name, folder = "jax_compilation_cache_dir", tmp_path / "new" / "programs"
    before = getattr(jax.config, name)
    try:
        jax.config.update(name, "elsewhere")
        program.keep_compiled(folder)
        assert getattr(jax.config, name) == "elsewhere" and not folder.exists()
        jax.config.update(name, None)
        (tmp_path / "file").touch()
        program.keep_compiled(tmp_path / "file" / "programs")
        assert getattr(jax.config, name) is None
        program.keep_compiled(folder)
        assert getattr(jax.config, name) == str(folder) and folder.is_dir()
    finally:
        jax.config.update(name, before)
