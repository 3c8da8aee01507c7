"""What every test needs before anything else is imported, and the fixtures that several folders share."""

import os

# Before torch: Triton reads the switch when it is imported, and other libraries import it on the way.
if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "2")  # a busy machine is many times slower with more

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture
def shared_data() -> Path:
    """Folder with real images; see CONTRIBUTING. Tests that use it are extra: no promise hangs on them."""
    folder = Path(os.environ.get("RVLM_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder} (set RVLM_SHARED_DATA)")
    return folder


@pytest.fixture
def browse(tmp_path_factory):
    """Opens a page in a headless browser: browse(file, width, height, *flags) returns what the browser prints."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium (Debian: apt install chromium)")
    home = tmp_path_factory.mktemp("browser")

    def opened(page: Path, width: int, height: int, *flags: str) -> str:
        command = [
            browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-dev-shm-usage",
            f"--user-data-dir={home / 'profile'}", f"--window-size={width},{height}", *flags, page.as_uri(),
        ]  # fmt: skip
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=120, env={**os.environ, "HOME": str(home)}
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return opened
