"""The spectra of a model's weights as a page, and where KaSA's cut falls. Offline, in under a minute on SmolLM2.

python examples/spectra.py                        # writes outputs/spectra.html
python examples/spectra.py --model my/folder --r 16
python examples/spectra.py --images docs/images   # the pictures of docs/reports.md
"""

import argparse
from pathlib import Path

import torch
from base_model import smollm2
from transformers import AutoModelForCausalLM

from peft_kasa.report import spectrum
from peft_kasa.report.drawn import figures
from peft_kasa.report.picture import png

PICTURES = {"Singular values": "spectra", "What KaSA's cut takes": "cut", "Effective rank": "effective_rank"}


def main() -> None:
    """Computes, prints and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="a folder or an id on the Hub; SmolLM2-135M-Instruct by default")
    parser.add_argument("--r", type=int, default=8, help="the rank whose cut is marked")
    parser.add_argument("--out", type=Path, default=Path("outputs/spectra.html"))
    parser.add_argument("--images", type=Path, default=None, help="a folder for single charts as PNG")
    given = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(given.model or smollm2(), dtype=torch.float32)
    report = spectrum(model, ranks=[given.r])
    print(report.summary())
    report.to_html(given.out)
    print(f"Written: {given.out}")
    if given.images:
        given.images.mkdir(parents=True, exist_ok=True)
        for figure in figures(report):
            if name := PICTURES.get(figure.title):
                (given.images / f"{name}.png").write_bytes(png([figure], scale=1.25))


if __name__ == "__main__":
    main()
