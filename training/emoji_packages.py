"""The npm packages that the emoji data set is made of: fetched once, pinned by version and SHA-256."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import subprocess
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.config import UserError
from ldm.progress import progress


@dataclass(frozen=True)
class Source:
    """An npm package of one design: the style word of its captions, version and the tarball's SHA-256."""

    style: str
    package: str
    version: str
    licence: str
    sha256: str

    @property
    def tarball(self) -> str:
        return f"{self.package.lstrip('@').replace('/', '-')}-{self.version}.tgz"


SOURCES = (
    Source("noto", "@iconify-json/noto", "1.2.9", "Apache-2.0",
           "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad"),
    Source("noto blob", "@iconify-json/noto-v1", "1.2.5", "Apache-2.0",
           "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37"),
    Source("twemoji", "@iconify-json/twemoji", "1.2.5", "CC-BY-4.0",
           "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7"),
    Source("fluent flat", "@iconify-json/fluent-emoji-flat", "1.2.6", "MIT",
           "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175"),
    Source("fluent 3d", "@iconify-json/fluent-emoji", "1.2.7", "MIT",
           "8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b"),
    Source("emojione", "@iconify-json/emojione", "1.2.3", "CC-BY-4.0",
           "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e"),
)  # fmt: skip
# for a judge of pictures, which learns what a thing looks like by more hands than those it is to tell apart
MORE_SOURCES = (
    Source("openmoji", "@iconify-json/openmoji", "1.2.29", "CC-BY-SA-4.0",
           "03181e2c156cab35cf4a62f1f7886bd971d59212e75ac3f189d5a4cae3930fc5"),
    Source("fxemoji", "@iconify-json/fxemoji", "1.2.2", "Apache-2.0",
           "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef"),
    Source("emojione v1", "@iconify-json/emojione-v1", "1.2.3", "CC-BY-SA-4.0",
           "6641d59d48a42823fdc2b84e7427e9f302944eb98d2c7d94d6e67c139e7b37b3"),
    Source("emojione monotone", "@iconify-json/emojione-monotone", "1.2.1", "CC-BY-4.0",
           "40b90004bafb406b59266155ef9b7e1dd67bf2947fc8db8d07388776f4d0d04e"),
    Source("fluent high contrast", "@iconify-json/fluent-emoji-high-contrast", "1.2.6", "MIT",
           "0b92d48c90d2200bd499e3cdd09a127ca6a8c8ddefd34c35eb5a1e4994012ae0"),
    Source("streamline", "@iconify-json/streamline-emojis", "1.2.4", "CC-BY-4.0",
           "5dac87c876b322500989828c5823143e0100d78881627a2e4081a4b897cbfdbc"),
)  # fmt: skip
UNICODE = Source("", "emojibase-data", "17.0.0", "MIT",
                 "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a")  # fmt: skip


def read_package(source: Source, folder: Path) -> dict[str, Any]:
    """The JSON files of a package that are used, by name. Raises UserError where it is missing or another."""
    path = folder / source.tarball
    if not path.exists():
        raise UserError(f"{path}: missing; `npm pack {source.package}@{source.version}` makes it")
    data = path.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if digest != source.sha256:
        raise UserError(
            f"{path}: SHA-256 is {digest}, expected {source.sha256}: the file is damaged or not the pinned version; "
            f"delete it and run `npm pack {source.package}@{source.version}` again"
        )
    wanted = {"package/icons.json", "package/chars.json", "package/info.json", "package/en/data.json"}
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        files = {m.name: tar.extractfile(m) for m in tar if m.isfile() and m.name in wanted}
        return {Path(name).name: json.load(file) for name, file in files.items() if file is not None}


def fetch(sources: Sequence[Source], folder: Path) -> None:
    """Fetch the packages that are not in `folder` yet with npm."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = [s for s in (*sources, UNICODE) if not (folder / s.tarball).exists()]
    if not missing:
        return
    if shutil.which("npm") is None:
        raise UserError(
            "npm is needed to fetch the emoji packages: install Node.js, or put these files in a folder and name it "
            "with --packages: " + ", ".join(s.tarball for s in missing)
        )
    for source in progress(missing, "fetching packages"):
        command = ["npm", "pack", "--silent", f"{source.package}@{source.version}"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            raise UserError(f"{' '.join(command)} failed: {done.stderr.strip()[-300:]}", exit_code=1)


def attribution(sources: Sequence[Source], folder: Path) -> str:
    """SOURCES.md of a data set."""
    lines = ["# Sources and licences", "", "| style | package | licence | author |", "|---|---|---|---|"]
    for source in sources:
        info = read_package(source, folder)["info.json"]
        author = f"{info['author']['name']} ({info['author'].get('url', '')})"
        lines.append(f"| {source.style} | {source.package} {source.version} | {source.licence} | {author} |")
    lines.append("\nNames and keywords: emojibase-data 17.0.0 (MIT), from Unicode CLDR. Rendered with resvg.")
    return "\n".join(lines) + "\n"
