"""The page of --page: what is in it, and, where a browser is installed, what it shows."""

import base64
import json
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_integer_network import folded, quantize, small_net
from test_onnx_export import MEAN, STD, normalized, pixels

from engine.deploy import deployed_files, onnx_session, page
from engine.deploy.onnx_emitter import FileForm
from engine.images.loader import Loader
from engine.system.errors import SetupError

pytest.importorskip("onnx", reason="requirements-export.txt is not installed")
pytest.importorskip("onnxruntime", reason="requirements-export.txt is not installed")
MODULES = Path(__file__).parents[2] / "node_modules"
SOURCE = {"model": "Small", "bits": "4", "act_bits": "4", "checkpoint": "</script>.pt"}
DRIVER = """
const { chromium } = require(process.argv[1] + "/playwright-core");
(async () => {
  const args = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"];
  const browser = await chromium.launch({ executablePath: process.argv[2], args });
  const tab = await browser.newPage();
  const requests = [];
  tab.on("request", (each) => requests.push(each.url()));
  await tab.goto("file://" + process.argv[3]);
  await tab.waitForFunction(() =>
    document.body.dataset.done || document.getElementById("error").textContent);
  const shown = {};
  for (const id of ["error", "agreement", "float-right", "where"])
    shown[id] = await tab.textContent("#" + id);
  await tab.click("#next");
  shown.next = await tab.textContent("#where");
  await browser.close();
  console.log(JSON.stringify({ shown, requests }));
})();
"""


def write_page(path, classes="abcd", batch_size=105):
    images = pixels(110)
    dataset = SimpleNamespace(
        test_images=images,
        test_labels=torch.arange(110) % 4,
        mean=MEAN,
        std=STD,
        classes=tuple(classes),
    )
    net, float_net = quantize(small_net(), normalized(images[:8]), 4, 4)[0], folded(small_net())
    test = Loader(images, dataset.test_labels, batch_size, MEAN, STD)
    page.write_page(path, float_net, net, FileForm(), test, dataset, SOURCE)
    return net, float_net, images


@pytest.mark.parametrize(
    ("classes", "batch_size", "names"),
    [("abcd", 105, "abcd"), ("", 40, [f"class {k}" for k in range(4)]), ("abcde", 50, "abcd")],
)
def test_a_page_holds_models_images_runtime_and_the_simulated_logits(
    classes, batch_size, names, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SetupError, match="--page needs Node.js and, in this folder: npm install"):
        write_page(Path("net.html"))
    with pytest.raises(SetupError, match="--page needs Node.js"):  # before anything is measured
        deployed_files.check_run(["page"])
    package = Path("node_modules", "onnxruntime-web")
    (package / "dist").mkdir(parents=True)
    (package / "package.json").write_text('{"version": "1.2.3"}')
    (package / page.FILES["runtime"]).write_text("export const a = '</script>';")
    (package / page.FILES["wasm"]).write_bytes(b"wasm")
    net, float_net, images = write_page(Path("net.html"), classes, batch_size)
    text = Path("net.html").read_text(encoding="utf-8")
    [content] = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text)
    data = json.loads(content)
    assert data["classes"] == list(names)  # as many as logits, which the page reads by them
    assert data["version"] == "1.2.3" and data["runtime"] == "export const a = '</script>';"
    assert data["about"].startswith("</script>.pt, 4-bit weights") and "100 test" in data["about"]
    of = {name: base64.b64decode(data[name]) for name in ("images", "simulated", "wasm")}
    assert of["wasm"] == b"wasm" and of["images"] == images[:100].numpy().tobytes()
    simulated = torch.from_numpy(np.frombuffer(of["simulated"], "<f4").copy()).view(100, 4)
    for name, expected in (("integers", simulated), ("float", float_net(normalized(images))[:100])):
        run = onnx_session.open_session(base64.b64decode(data[name]), "m")
        tolerance = 0 if name == "integers" else 1e-4
        torch.testing.assert_close(run(images[:100]), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(simulated, net(normalized(images[:100]))[0], rtol=0, atol=0)
    assert not re.search(r"(src|href)=", text)  # nothing is loaded from anywhere


@pytest.mark.slow
@pytest.mark.skipif(
    not all((MODULES / name).is_dir() for name in ("onnxruntime-web", "playwright-core"))
    or not (shutil.which("chromium") and shutil.which("node")),
    reason="needs chromium, node, and npm install --no-save onnxruntime-web playwright-core",
)
def test_a_browser_shows_the_logits_of_the_simulation(monkeypatch, tmp_path):
    monkeypatch.chdir(MODULES.parent)
    path = tmp_path / "net.html"
    write_page(path)
    command = ["node", "-e", DRIVER, MODULES.resolve(), shutil.which("chromium"), path]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    shown = found["shown"]
    assert shown["error"] == ""
    assert shown["agreement"].startswith("100 of 100 images have the logits")
    assert shown["where"] == "image 1 of 100: a" and shown["next"] == "image 2 of 100: b"
    assert all(url.startswith(("file://", "blob:", "data:")) for url in found["requests"])
