"""Write a package index with wheels that hold next to nothing: `python make_index.py FOLDER`."""

import sys
import zipfile
from pathlib import Path

# vLLM's build looks for CUDA in torch; a torch for the CPU says there is none.
TORCH = {
    "torch/__init__.py": "class version:\n    cuda = hip = xpu = None\n",
    "torch/utils/__init__.py": "",
    "torch/utils/cpp_extension.py": "CUDA_HOME = ROCM_HOME = None\n",
}
PACKAGES = {
    ("torch", "2.10.0+cpu"): TORCH,
    ("torchvision", "0.25.0+cpu"): {},
    ("torchaudio", "2.10.0+cpu"): {},
    ("triton-ascend", "3.2.2"): {},
}


def main(index: Path) -> None:
    for (name, version), files in PACKAGES.items():
        folder = index / name
        folder.mkdir(parents=True)
        wheel = f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
        info = f"{name.replace('-', '_')}-{version}.dist-info"
        texts = {
            **files,
            f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
            f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: stand-in\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        }
        texts[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in [*texts, f"{info}/RECORD"])
        with zipfile.ZipFile(folder / wheel, "w") as archive:
            for path, text in texts.items():
                archive.writestr(path, text)
        (folder / "index.html").write_text(f'<a href="{wheel.replace("+", "%2B")}">{wheel}</a>\n')


if __name__ == "__main__":
    main(Path(sys.argv[1]))
