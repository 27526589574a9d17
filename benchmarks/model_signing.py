"""Does OpenSSF's own verifier accept what we sign, and refuse it after a change?

Needs an environment of its own, for the package brings 33 others: pip install model-signing==1.1.1 pyOpenSSL.

    python benchmarks/model_signing.py --python /path/to/that/environment/bin/python
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from pathlib import Path

from freehold.proof import bundle, keys, trust


def main() -> None:
    """Sign a small folder, verify it with model-signing, change a byte, verify again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True, help="the Python that has model-signing")
    python = parser.parse_args().python
    with tempfile.TemporaryDirectory() as name:
        folder, public = Path(name) / "pack", Path(name) / "key.pub"
        (folder / "model").mkdir(parents=True)
        (folder / "model" / "weights.safetensors").write_bytes(bytes(range(256)) * 64)
        (folder / "README.md").write_text("# Card\n")
        key, signature = keys.new_key("release"), folder / "pack.sig"
        public.write_bytes(trust.public_pem(key.public))
        signature.write_bytes(bundle.sign_folder(folder, key, name="pack", ignored=frozenset({"pack.sig"})))
        command = [python, "-m", "model_signing", "verify", "key", str(folder), "--signature", str(signature)]
        command += ["--public_key", str(public), "--ignore-paths", str(signature)]
        accepted = subprocess.run(command).returncode == 0
        (folder / "README.md").write_text("# Cart\n")
        refused = subprocess.run(command, capture_output=True).returncode != 0
    print(f"accepted as signed: {accepted}, refused after a change: {refused}")
    raise SystemExit(not (accepted and refused))


if __name__ == "__main__":
    main()
