"""One cyclic model in both kinds of folder, for the tests of this folder."""

from __future__ import annotations

import pytest

from megatron_kvshare.cli.main import main
from megatron_kvshare.sharing.patterns import build_map
from megatron_kvshare.sharing.solver import RECIPES
from tests.huggingface import write_folder

TOP = build_map(8, "sandwich-top", 3)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, single):
    root = tmp_path_factory.mktemp("models")
    write_folder(root / "hf", TOP, RECIPES["one-sweep"])
    assert (
        main(["convert", "from-hf", "--hf", str(root / "hf"), "--save", str(root / "native")]) == 0
    )
    return root
