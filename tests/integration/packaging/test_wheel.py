"""The wheel builds, installs into an empty environment with what it says it needs, and runs."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]


def run(*command: str | Path, **environ: str) -> str:
    """Run a command and return what it printed; fail with all of it when it fails."""
    done = subprocess.run(  # noqa: S603 -- the test's own commands
        [str(part) for part in command],
        env={**os.environ, **environ},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_wheel_installs_and_runs(tmp_path: Path) -> None:
    """Both ways to start it work from the wheel alone, outside the source tree."""
    uv = Path(sys.executable).parent / "uv"
    run(uv, "build", "--quiet", "--no-config", "--wheel", "--out-dir", tmp_path, ROOT)
    (wheel,) = tmp_path.glob("*.whl")
    run(uv, "venv", "--quiet", "--python", sys.executable, tmp_path / "venv")
    run(uv, "pip", "install", "--quiet", "--no-config", wheel, VIRTUAL_ENV=str(tmp_path / "venv"))
    commands = tmp_path / "venv" / "bin"
    assert run(commands / "pm2-exporter", "--version").startswith("pm2-exporter ")
    page = run(commands / "python", "-m", "exporter", "--once", PM2_HOME=str(tmp_path))
    assert "pm2_up 0\n" in page
    assert "node_load1 " in page
