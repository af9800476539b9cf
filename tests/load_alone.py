"""Loads artefacts where no framework can be imported; run by `test_export_alone.py`.

Usage: python load_alone.py FOLDER. Each folder in it holds an artefact in ``saved`` (or the file
``saved.zip``) and, in ``expected.npz``, arguments and results. Prints what differs, as JSON.
"""

import json
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path

FRAMEWORKS = ("flax", "haiku", "keras", "equinox", "optax")


class Refused(MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if fullname.split(".")[0] in FRAMEWORKS:
            raise ImportError(f"{fullname} is not to be imported here")
        return


def different(folder: Path) -> str:
    import jax
    import numpy as np

    from jaxaccel.export import load

    fn, params = load(next(folder.glob("saved*")))
    with np.load(folder / "expected.npz") as arrays:
        for size in sorted({name.split()[0] for name in arrays.files}):
            given = {k: arrays[k] for k in arrays.files if k.split()[0] == size}
            results = jax.tree.leaves(fn(params, given[f"{size} x"]))
            for k, result in enumerate(results):
                expected = given[f"{size} result {k}"]
                if result.dtype != expected.dtype or not np.array_equal(result, expected):
                    return f"batch size {size}: result {k} differs"
    return ""


if __name__ == "__main__":
    sys.meta_path.insert(0, Refused())
    found = {folder.name: different(folder) for folder in sorted(Path(sys.argv[1]).iterdir())}
    loaded = [name for name in FRAMEWORKS if name in sys.modules]
    print(json.dumps({"different": found, "loaded": loaded}))
