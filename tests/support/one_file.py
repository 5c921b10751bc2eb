"""Classes as someone has them who has one file of code, and not annealers."""

import importlib.util
import sys

from annealers.single_file import single_file


def copies_from_one_file(names, folder, monkeypatch):
    """Copies of classes, each from its file without the last lines, by which that hands out the installed ones."""
    copies = []
    for name in names:
        file = folder / f"copy_of_{name}.py"
        file.write_text(single_file(name).split("# Where annealers is installed")[0])
        specification = importlib.util.spec_from_file_location(file.stem, file)
        module = importlib.util.module_from_spec(specification)
        monkeypatch.setitem(sys.modules, file.stem, module)
        specification.loader.exec_module(module)
        copies.append(getattr(module, name))
    return copies
