"""Memory does not grow with the number of images; a control shows a run that does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from image_files import encoded, write_tar
from mean_bundle import make_bundle

NUM_IMAGES, WARM_UP, SIZE = 20_000, 2_000, 64
MAX_GROWTH_BYTES = 24 << 20  # what all pixels would take: 18,000 * 64 * 64 * 3 = 221 MB

INDEX = """
import sys
from pathlib import Path
from edje.engines.image import ImageEncoder
from edje.runtime.indexing.index import index_images

model, images, store, leak, warm_up = sys.argv[1:]
encoder, kept, peaks = ImageEncoder.open(model), [], []
encode = encoder.encode_rgb

def encode_rgb(rgb):
    if leak == "leak":
        kept.append(rgb)
    return encode(rgb)

def progress(done, total):
    if done >= int(warm_up):
        # Not ru_maxrss: that one counts the process which started this one, too.
        status = Path("/proc/self/status").read_text()
        peaks.append(int(status.partition("VmHWM:")[2].split()[0]) * 1024)

encoder.encode_rgb = encode_rgb
report = index_images(encoder, images, store, workers=1, progress=progress)
print(report.indexed, peaks[-1] - peaks[0])
"""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tar of 20,000 images of 2 KB; a hundred different ones, to be quick."""
    path = tmp_path_factory.mktemp("many") / "images.tar"
    noise = np.random.default_rng(0).integers(0, 256, (100, 24, 24, 3), dtype=np.uint8)
    contents = [encoded(Image.fromarray(image), "BMP") for image in noise]
    return write_tar(path, ((f"{n:05}.bmp", contents[n % 100]) for n in range(NUM_IMAGES)))


def growth_bytes(tmp_path: Path, images: Path, leak: str) -> int:
    """Growth of the peak between image 2,000 and the last."""
    bundle = make_bundle(tmp_path / "bundle", size=SIZE)
    arguments = [str(bundle), str(images), str(tmp_path / "s"), leak, str(WARM_UP)]
    command = [sys.executable, "-c", INDEX, *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    indexed, growth = map(int, ran.stdout.split())
    assert indexed == NUM_IMAGES
    return growth


@pytest.mark.slow
def test_memory_stays_flat_over_20000_images(tmp_path: Path, images: Path) -> None:
    assert growth_bytes(tmp_path, images, "no leak") < MAX_GROWTH_BYTES


@pytest.mark.slow
def test_the_control_that_keeps_all_pixels_grows(tmp_path: Path, images: Path) -> None:
    assert growth_bytes(tmp_path, images, "leak") > 4 * MAX_GROWTH_BYTES
