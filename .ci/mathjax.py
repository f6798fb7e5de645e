"""Put a copy of MathJax beside the built site, for formulas without a network (needs npm).

    python .ci/mathjax.py _docs    writes _docs/mathjax/

MathJax 3.2.2 is Apache-2.0; its licence is copied with it. `nbs/page.html` loads it where the
usual address cannot be reached.
"""

import base64
import hashlib
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

PACKAGE = "mathjax@3.2.2"
SHA512 = "Bt+SSVU8eBG27zChVewOicYs7Xsdt40qm4+UpHyX7k0/O9NliPc+x77k1/FEsPsjKPZGJvtRZM1vO+geW0OhGw=="
FILES = ("es5/tex-svg-full.js", "LICENSE")


def main():
    target = Path(sys.argv[1]) / "mathjax"
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["npm", "pack", "--silent", PACKAGE], cwd=folder, check=True)
        archive = next(Path(folder).glob("*.tgz"))
        found = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
        if found != SHA512:
            sys.exit(f"{archive.name} is not the file that was looked at: sha512-{found}")
        target.mkdir(exist_ok=True)
        with tarfile.open(archive) as packed:
            for name in FILES:
                content = packed.extractfile(f"package/{name}").read()
                (target / Path(name).name).write_bytes(content)


if __name__ == "__main__":
    main()
