"""What machines and terminals do: streams that are closed or full, consoles without our characters, no home, no GPU."""

import functools
import os
import pwd
import subprocess
import sys
from pathlib import Path

import pytest
import tyro

import jaxad
from jaxad import files
from jaxad.backbones import store
from jaxad.cli import main

ROOT = Path(jaxad.__file__).parents[1]


def run(command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs jaxad in a shell, for redirections."""
    whole = {**os.environ, "PYTHON": sys.executable, "XLA_FLAGS": "", **environment}
    shell = f'jaxad() {{ "$PYTHON" -m jaxad "$@"; }}\n{command}'
    return subprocess.run(["bash", "-c", shell], cwd=ROOT, env=whole, capture_output=True, text=True, check=False)


def test_mistakes_are_told_without_jax():
    """Importing it takes seconds."""
    mistakes = [
        ["fit", "nowhere"],
        ["fit", "demo", "--sede", "1"],
        ["fit", "demo", "--fpr", "2"],
        ["fit", "demo", "--method", "nsa", "--labels", "none"],
        ["fit", "demo", "--backbone", "resnet180"],
        ["fit", "demo", "--method", "patchcor"],
        ["benchmark", "nowhere"],
        ["benchmark", "demo", "--methods", "patchcor"],
        ["benchmark", "demo", "--sweep", "sigma"],
        ["estimate", "padim", "--data", "nowhere"],
        ["score", "nowhere", "demo"],
        ["evaluate", "jaxad"],
        ["report", "nowhere"],
        ["report"],
        ["weights", "import", "nowhere"],
        ["weights", "fetch", "resnet180"],
        ["weights", "fetch"],
    ]
    program = (
        f"import sys; from jaxad.cli import main; codes = [main(argv) for argv in {mistakes}];"
        "print(set(codes), {'jax', 'numpy', 'PIL'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "{2} set()\n"
    assert done.stderr.count("\n") == len(mistakes) and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("command", "code", "error"),
    [
        ("jaxad list >&- 2>&-", 0, ""),
        ("jaxad list >/dev/full", 2, "jaxad: error: No space left on device: stdout\n"),
        ("jaxad list | true; exit ${PIPESTATUS[0]}", 141, ""),
        ("jaxad fit nowhere 2>/dev/full", 2, ""),
        ("jaxad fit --help <&- >/dev/full", 2, "jaxad: error: No space left on device: stdout\n"),
    ],
)
def test_streams_that_are_closed_or_full(command: str, code: int, error: str):
    done = run(command)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", error)


def test_a_console_without_our_characters():
    program = "from jaxad import streams; streams.prepare(); print('0.9 ± 0.1 – … 中')"
    for encoding, line in (("ascii", "0.9 +/- 0.1 - ... \\u4e2d\n"), ("latin-1", "0.9 ± 0.1 - ... \\u4e2d\n")):
        environment = os.environ | {"PYTHONIOENCODING": encoding}
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, check=True
        )
        assert done.stdout.decode(encoding) == line


def test_a_signal_while_options_are_parsed_is_no_mistake(monkeypatch: pytest.MonkeyPatch):
    def terminate(*_, **__):
        sys.exit(143)

    monkeypatch.setattr(tyro, "cli", terminate)
    with pytest.raises(SystemExit, match="143"):
        main(["fit", "demo"])


def test_a_user_without_a_home_has_the_embedded_weights(monkeypatch: pytest.MonkeyPatch):
    def unknown(_):
        raise KeyError

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("HOME", "JAXAD_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    rows = {row.name: row.state for row in store.available()}
    assert rows["pdn_small"] == "embedded" and rows["resnet18.tv_in1k"] == "not fetched"
    with pytest.raises(FileNotFoundError, match="no home folder for weights: set JAXAD_CACHE"):
        store.cache_dir()


@pytest.mark.slow
@pytest.mark.parametrize("platforms", ["cuda", "tpu", "rocket"])
def test_devices_that_are_not_here(platforms: str, tmp_path: Path):
    done = run(f"jaxad fit demo --category gear --output {tmp_path}/runs", JAX_PLATFORMS=platforms)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"JAX_PLATFORMS is {platforms}, but JAX finds no such device on this machine" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_named(tmp_path: Path):
    for write in (files.replacing, functools.partial(files.staging, results=())):
        with pytest.raises(OSError, match="No space left") as caught, write(tmp_path / "results"):
            raise OSError(28, "No space left on device")
        assert caught.value.filename == str(tmp_path / "results")
    assert list(tmp_path.iterdir()) == []
