"""What `doctor` says where nothing but the standard library is installed; run by tests/commands/test_cli.py.

Arguments: the package's `__init__.py` and its folder, as no finder may lead to it.
"""

import importlib.util
import sys


def main(init: str, folder: str) -> None:
    sys.path[:] = [p for p in sys.path if "site-packages" not in p]
    sys.meta_path[:] = [f for f in sys.meta_path if "cnpp_trt" not in str(f)]
    spec = importlib.util.spec_from_file_location("cnpp_trt", init, submodule_search_locations=[folder])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["cnpp_trt"] = module
    spec.loader.exec_module(module)
    from cnpp_trt.doctor import describe, examine

    print(describe(examine()))


if __name__ == "__main__":
    main(*sys.argv[1:])
